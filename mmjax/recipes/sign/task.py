"""Sign language: sequences of landmarks to sequences of glosses, by CTC, with distillation."""

import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mmjax.decode import ctc as decoding
from mmjax.decode import ngram
from mmjax.engine.task import Task, final_weights
from mmjax.errors import UserError
from mmjax.losses import ctc, distillation
from mmjax.losses.term import Term
from mmjax.models.mobilenet1d import MobileNet1d
from mmjax.models.recurrent import BiLSTM
from mmjax.recipes.sign import folder
from mmjax.recipes.sign.model import Sign, Stream
from mmjax.recipes.sign.scores import SignScores
from mmjax.recipes.sign.splits import SignData

LOSSES = ('ctc', 'teacher_ctc', 'distillation', 'smoothing')
STRIDE = MobileNet1d().stride  # frames that are made of one frame of the MobileNet


class SignTask(Task):
    """The task of `configs/sign_ctc.py`.

    Groups of parameters: `student` and, where `model.distill` is on, `teacher`: two models of the
    same form and of sizes of their own. A model whose group has rate 0 runs as in evaluation.

    Losses: `ctc` of the student, `teacher_ctc`, `distillation` (a frame, by its weight) and
    `smoothing` (a frame).
    """

    def __init__(self, config, assets=None):
        self.data = SignData(config, assets)
        self.splits, self.vocabulary = self.data.splits, self.data.vocabulary
        spec, train = config.model, self.splits['train']
        sizes = {'student': spec.student.to_dict()}
        if spec.distill:
            sizes['teacher'] = spec.teacher.to_dict()
        else:
            spec.ignore('teacher')
        dtype = jnp.dtype(config.precision)
        self.models = {
            name: _model(fields, train.streams, len(self.vocabulary), dtype)
            for name, fields in sizes.items()
        }
        self.temperature = config.losses.distillation_temperature
        self.blank_penalty = config.losses.blank_penalty
        self.blank_weight = config.losses.distillation_blank_weight
        if not 0 <= self.blank_weight <= 1:
            raise UserError(f'losses.distillation_blank_weight={self.blank_weight} is not 0 … 1')
        weights = config.loss_weights.to_dict()
        for name in weights:
            if name not in LOSSES:
                raise UserError(f"loss_weights names '{name}'; there are {', '.join(LOSSES)}")
        self.weights = {name: weight for name, weight in final_weights(weights).items() if weight}
        # Over several devices packed frames would be encoded by each, all of them.
        pack = spec.pack and jax.device_count() == 1
        self.rooms = train.packed_lengths(config.batch_size // config.accumulation) if pack else {}
        decode = config.decode
        self.beam, self.length_bonus = decode.beam, decode.length_bonus
        self.lm_weight, self.table = decode.language_model, None
        if self.lm_weight:
            found = [self.vocabulary.encode(train.words(row)) for row in range(len(train))]
            sentences = [ids[ids != folder.UNKNOWN_ID] for ids in found]
            try:
                self.table = ngram.bigrams(sentences, len(self.vocabulary))
            except ValueError as error:
                raise UserError(f'decode.language_model: {error}') from None
        self.batch_size, self.frame_rate = config.batch_size, config.data.frame_rate
        positive = {
            'losses.distillation_temperature': self.temperature,
            'decode.beam': self.beam,
            'data.frame_rate': self.frame_rate,
        }
        for key, value in positive.items():
            if not value > 0:
                raise UserError(f'{key}={value} is not above 0')

    def dataset(self, split):
        return self.splits[split]

    def rules(self):
        return tuple((name, f'{name}/.*') for name in self.models)

    def save_assets(self, workdir):
        self.data.save(workdir)

    # Model -----------------------------------------------------------------------------------

    def init(self, key, batch):
        out = {'params': {}, 'batch_stats': {}}
        for place, (name, model) in enumerate(self.models.items()):
            keys = {'params': jax.random.fold_in(key, place), 'dropout': key}
            made = model.init(keys, batch['features'], batch['frames'], train=False)
            for part, tree in out.items():
                tree[name] = made[part]
        return out

    def _apply(self, name, variables, batch, *, train=False, key=None, **options):
        own = {part: variables[part][name] for part in ('params', 'batch_stats')}
        rngs = {'dropout': key} if train else None
        inputs = (batch['features'], batch['frames'])
        return self.models[name].apply(own, *inputs, train=train, rngs=rngs, **options)

    def forward(self, variables, batch, stage, *, train, key):
        needed = {
            'student': set(LOSSES) - {'teacher_ctc'},
            'teacher': {'teacher_ctc', 'distillation'},
        }
        for name in stage.losses:
            if name in needed['teacher'] and 'teacher' not in self.models:
                raise ValueError(f"loss_weights names '{name}': it needs config.model.distill=True")
        # Rows that only fill a batch are copies: batch statistics must not count them.
        batch = {**batch, 'frames': batch['frames'] & batch['mask'][:, None]}
        logits, stats = {}, dict(variables['batch_stats'])
        room = self.rooms.get(batch['frames'].shape[1])
        for name in self.models:
            if not needed[name] & set(stage.losses):
                continue
            live = train and stage.trains(name)
            found, changed = self._apply(
                name, variables, batch, train=live, key=key, room=room, mutable=['batch_stats']
            )
            logits[name] = found if stage.trains(name) else checkpoint_name(found, 'frozen')
            stats[name] = changed['batch_stats']
        return self._rows(logits, batch, stage.losses), stats

    def _rows(self, logits, batch, losses):
        """Returns what every row adds to the losses, from logits [batch, time, words]."""
        frames, labels = batch['frames'], (batch['labels'], batch['label_mask'])
        penalty = {'blank_penalty': self.blank_penalty}
        out = {}
        for term, name in (('ctc', 'student'), ('teacher_ctc', 'teacher')):
            if term in losses:
                out[term] = ctc.ctc_rows(logits[name], frames, *labels, **penalty)
        if 'distillation' in losses:
            out['distillation'] = distillation.distillation(
                logits['student'],
                logits['teacher'],
                frames,
                temperature=self.temperature,
                weights=distillation.frame_weights(logits['teacher'], self.blank_weight),
            )
        if 'smoothing' in losses:
            out['smoothing'] = ctc.smoothing(logits['student'], frames)
        return out

    def terms(self, variables, outputs, batch, stage):
        return self._terms(outputs, batch)

    def _terms(self, outputs, batch):
        mask, terms = batch['mask'], {}
        counts = batch['label_mask'].sum(1)
        for name in ('ctc', 'teacher_ctc'):
            if name in outputs:
                terms[name], found = ctc.ctc(outputs[name][0], counts, outputs[name][1], mask)
                prefix = name.removesuffix('ctc')
                terms |= {f'{prefix}{key}': value for key, value in found.items()}
        for name in ('distillation', 'smoothing'):
            if name in outputs:
                totals, frames = (jnp.where(mask, x, 0.0).sum() for x in outputs[name])
                terms[name] = Term(totals, frames)
        return terms

    # Evaluation ------------------------------------------------------------------------------

    def log_probs(self, variables, batch, name='student'):
        """Returns ln p(symbol | frame), float32 [batch, time, words], as it is decoded."""
        return self._scores(self._apply(name, variables, batch))

    def _scores(self, logits):
        logits = logits.astype(jnp.float32)
        return jax.nn.log_softmax(logits.at[..., folder.BLANK_ID].add(-self.blank_penalty))

    def decode(self, variables, batch):
        """Decodes greedily and by beam search, and measures the losses of each row.

        Returns:
          greedy: int32 [batch, time] and lengths [batch]; beam: as greedy; rows: per-row losses as
          `forward` gives them; spread: `spread` of what the LSTM reads; teacher: greedy, where
          there is one.
        """
        logits, losses, frames, found = {}, ['ctc'], batch['frames'], {}
        logits['student'], read = self._apply('student', variables, batch, method=with_lstm_input)
        scores = self._scores(logits['student'])
        found['greedy'], beams = decoding.greedy(scores, frames)[:2], self._beams(scores, frames)
        found['beam'] = beams.ids[:, 0], beams.lengths[:, 0]
        if 'smoothing' in self.weights:
            losses += ['smoothing']
        if 'teacher' in self.models:
            losses += ['teacher_ctc', 'distillation']
            logits['teacher'] = self._apply('teacher', variables, batch)
            found['teacher'] = decoding.greedy(self._scores(logits['teacher']), frames)[:2]
        found['rows'] = self._rows(logits, batch, losses)
        found['spread'] = spread(read, frames)
        return found

    def _beams(self, scores, frames):
        return decoding.beam_search(
            scores,
            frames,
            beam=self.beam,
            language_model=self.table,
            weight=self.lm_weight,
            length_bonus=self.length_bonus,
        )

    def embed_rows(self, variables, batch):
        """Returns hidden features averaged over a row's frames, float32 [batch, width]."""
        hidden = self._apply('student', variables, batch, method='hidden')
        return _mean(hidden, batch['frames'])

    def evaluators(self):
        return {
            name: SignScores(self, split, self.batch_size)
            for name, split in self.splits.items()
            if name != 'train'
        }

    def predict(self, apply, inputs, output):
        """Reads the glosses of one `.npz` (key `features`, [T, F]) with their times."""
        path = pathlib.Path(inputs)
        if not path.is_file():
            raise UserError(f'{inputs} does not exist')
        features = folder.read_features(path, self.data.normalization.width)
        one = self.splits['train'].with_features(features)
        ((scores, batch),) = apply('log_probs', one, 1)
        found = decoding.greedy(scores, batch['frames'])
        count = int(found.lengths[0])
        words = self.vocabulary.decode(found.ids[0][:count])
        times = np.stack([found.starts[0], found.ends[0]], 1)[:count] / self.frame_rate
        glosses = [
            {'gloss': word, 'start': round(float(start), 3), 'end': round(float(end), 3)}
            for word, (start, end) in zip(words, times, strict=True)
        ]
        beams = self._beams(scores, batch['frames'])
        best = self.vocabulary.decode(np.asarray(beams.ids[0, 0])[: int(beams.lengths[0, 0])])
        output = pathlib.Path(output)
        output.mkdir(parents=True, exist_ok=True)
        told = {'input': inputs, 'glosses': glosses, 'beam': list(best)}
        (output / 'glosses.json').write_text(json.dumps(told, indent=1))
        lines = [f'{g["start"]:7.2f} s – {g["end"]:6.2f} s  {g["gloss"]}' for g in glosses]
        return '\n'.join([*lines, f'beam search: {" ".join(best)}'])

    def embed(self, apply, output):
        """Writes embeddings.npy [sentences, width], mean hidden features, and index.jsonl."""
        output.mkdir(parents=True, exist_ok=True)
        rows = []
        with (output / 'index.jsonl').open('w') as index:
            for name, split in self.splits.items():
                for found, batch in apply('embed_rows', split, self.batch_size):
                    for place, row in enumerate(batch['row']):
                        entry = {'row': len(rows), 'split': name, 'id': split.record(row)['id']}
                        index.write(json.dumps(entry) + '\n')
                        rows.append(found[place])
        with (output / 'embeddings.npy').open('wb') as file:
            np.save(file, np.stack(rows))
        return f'{len(rows)} sentences: {output / "embeddings.npy"}'


def with_lstm_input(model, features, frames, *, train):
    """Returns logits and what the first LSTM of a model reads, [batch, time, width]."""
    found = []

    def keep(call, arguments, options, context):
        if isinstance(context.module, BiLSTM):
            found.append(arguments[0])
        return call(*arguments, **options)

    with nn.intercept_methods(keep):
        logits = model(features, frames, train=train)
    return logits, found[0]


def spread(x, frames):
    """Measures how far x [batch, time, width] moves with time, where 0 is a temporal collapse.

    That is the variance of each feature over frames a stride apart, which are made by the same
    taps of the transposed convolution: with all frames, and behind the LSTM, equal inputs would
    vary too. The first and the last frame of a row stay out, since they see its end.

    Returns:
      float32 [batch] sums of squares about the means, and [batch] how many.
    """
    ends = jnp.pad(frames, ((0, 0), (1, 1)))
    inner = frames & ends[:, :-2] & ends[:, 2:]
    time = -(-x.shape[1] // STRIDE) * STRIDE
    apart = lambda a: jnp.pad(a, ((0, 0), (0, time - a.shape[1]), (0, 0))).reshape(
        len(a), -1, STRIDE, a.shape[2]
    )
    x, inner = apart(x.astype(jnp.float32)), apart(inner[..., None])
    mean = jnp.where(inner, x, 0).sum(1, keepdims=True) / jnp.maximum(
        inner.sum(1, keepdims=True), 1
    )
    squares = jnp.where(inner, (x - mean) ** 2, 0).sum((1, 2, 3))
    return squares, inner.sum((1, 2, 3)) * x.shape[3]


def _mean(x, frames):
    """Returns the mean [batch, width] of x [batch, time, width] over a row's frames."""
    frames = frames[..., None]
    return jnp.where(frames, x, 0).sum(1) / jnp.maximum(frames.sum(1), 1)


def _model(fields, streams, words, dtype):
    width, given = fields.pop('stream_width'), dict(fields.pop('stream_widths'))
    if given and not set(given) & set(streams):
        named, known = ', '.join(given), ', '.join(streams)
        raise UserError(f"model's stream_widths names {named}; the data have {known}")
    chosen = tuple(
        Stream(name, start, end, given.get(name, width)) for name, (start, end) in streams.items()
    )
    return Sign(words, chosen, dtype=dtype, **fields)
