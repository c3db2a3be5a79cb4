"""Sign language: sequences of landmarks to sequences of glosses, by CTC, with distillation."""

import dataclasses
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mmjax.data.prepare import cache_dir
from mmjax.decode import ctc as decoding
from mmjax.decode import ngram
from mmjax.engine.outputs import EmbeddingWriter, write_prediction
from mmjax.engine.task import Task, tower_output
from mmjax.errors import UserError
from mmjax.losses import ctc, distillation
from mmjax.losses.term import Term
from mmjax.recipes.sign import folder
from mmjax.recipes.sign.augment import Normalization
from mmjax.recipes.sign.config import TEACHER_LOSSES, Config, Network
from mmjax.recipes.sign.data import SignSequences, prepare_sequences
from mmjax.recipes.sign.model import PARTS, Sign, Stream, temporal_squares
from mmjax.recipes.sign.scores import SignScores

VOCABULARY = 'vocabulary.txt'
NORMALIZATION = 'normalization.npz'
# The losses that need the logits of each model.
NEEDED_BY = {'student': {'ctc', 'distillation', 'smoothing'}, 'teacher': {*TEACHER_LOSSES}}


class SignTask(Task):
    """The task of `configs/sign_ctc.py`.

    Groups of parameters: `student` and, with `model.distill`, `teacher`: two models of the same
    form, each of its own sizes.

    Losses: `ctc` of the student, `teacher_ctc`, `distillation` (mean over frames, weighted) and
    `smoothing` (mean over frames).
    """

    Config = Config

    def __init__(self, config: Config, assets: epath.Path | None = None):
        self.splits, self.vocabulary, self.normalization = _splits(config, assets)
        train = self.splits['train']
        dtype = jnp.dtype(config.precision)
        self.models = {
            name: _model(getattr(config.model, name), train.streams, len(self.vocabulary), dtype)
            for name in ('student', 'teacher')
            if name == 'student' or config.model.distill
        }
        self.config = config
        # Over several devices packed frames would be encoded by each, all of them.
        pack = config.model.pack and jax.device_count() == 1
        rows = config.batch_size // config.accumulation
        self.packed_lengths = train.packed_lengths(rows) if pack else {}  # by padded length
        self.beam_options = {
            'beam': config.decode.beam,
            'language_model': None,
            'weight': config.decode.language_model,
            'length_bonus': config.decode.length_bonus,
        }
        if config.decode.language_model:
            self.beam_options['language_model'] = _bigrams(train, self.vocabulary)

    @property
    def towers(self):
        return {
            f'{name}/{part}': f'{name}/{regex}'
            for name in self.models
            for part, regex in PARTS.items()
        }

    def dataset(self, split):
        return self.splits[split]

    def rules(self):
        return tuple((name, f'{name}/.*') for name in self.models)

    def save_assets(self, workdir):
        self.vocabulary.save(pathlib.Path(workdir) / VOCABULARY)
        self.normalization.save(pathlib.Path(workdir) / NORMALIZATION)

    # Model -----------------------------------------------------------------------------------

    def init(self, key, batch):
        fresh = {}
        for index, (name, model) in enumerate(self.models.items()):
            keys = {'params': jax.random.fold_in(key, index), 'dropout': key}
            fresh[name] = model.init(keys, batch['features'], batch['frames'])
        collections = ('params', 'batch_stats')
        return {part: {name: tree[part] for name, tree in fresh.items()} for part in collections}

    def _apply(self, name, variables, batch, **options):
        own = {part: variables[part][name] for part in ('params', 'batch_stats')}
        return self.models[name].apply(own, batch['features'], batch['frames'], **options)

    def forward(self, variables, batch, stage, *, train, key):
        losses = {*stage.losses}
        packed_length = None
        if key is None:  # an evaluation measures all that the models can be measured by
            losses |= {'ctc', *TEACHER_LOSSES} if 'teacher' in self.models else {'ctc'}
        else:
            packed_length = self.packed_lengths.get(batch['frames'].shape[1])
        # Rows that only fill a batch are copies: batch statistics must not count them.
        batch = {**batch, 'frames': batch['frames'] & batch['mask'][:, None]}
        logits = {}
        stats = dict(variables['batch_stats'])
        for name in self.models:
            if not NEEDED_BY[name] & losses:
                continue
            parts = {part: train[f'{name}/{part}'] for part in PARTS}
            out, changed = self._apply(
                name,
                variables,
                batch,
                train=parts,
                packed_length=packed_length,
                rngs=None if key is None else {'dropout': key},
                mutable=['batch_stats'],
            )
            logits[name] = tower_output(out, any(parts.values()))
            stats[name] = changed['batch_stats']
        return self._row_losses(logits, batch, losses), stats

    def _row_losses(self, logits, batch, losses):
        """Returns what every row adds to the losses, from logits [batch, time, words]."""
        frames = batch['frames']
        out = {}
        for loss, name in (('ctc', 'student'), ('teacher_ctc', 'teacher')):
            if loss in losses:
                out[loss] = ctc.ctc_rows(
                    logits[name],
                    frames,
                    batch['labels'],
                    batch['label_mask'],
                    blank_penalty=self.config.losses.blank_penalty,
                )
        if 'distillation' in losses:
            weight = self.config.losses.distillation_blank_weight
            out['distillation'] = distillation.distillation(
                logits['student'],
                logits['teacher'],
                frames,
                temperature=self.config.losses.distillation_temperature,
                weights=distillation.frame_weights(logits['teacher'], weight),
            )
        if 'smoothing' in losses:
            out['smoothing'] = ctc.smoothing(logits['student'], frames)
        return out

    def terms(self, variables, outputs, batch, stage):
        mask = batch['mask']
        counts = batch['label_mask'].sum(1)
        terms = {}
        for name, (total, count) in outputs.items():
            if name in ('ctc', 'teacher_ctc'):
                terms[name], report = ctc.ctc(total, counts, count, mask)
                prefix = name.removesuffix('ctc')
                terms |= {f'{prefix}{key}': value for key, value in report.items()}
            else:
                terms[name] = Term(*(jnp.where(mask, x, 0.0).sum() for x in (total, count)))
        return terms

    # Evaluation ------------------------------------------------------------------------------

    def log_probs(self, variables, batch, name='student'):
        """Returns ln p(symbol | frame), float32 [batch, time, words], as it is decoded."""
        return self._log_probs(self._apply(name, variables, batch))

    def _log_probs(self, logits):
        penalty = self.config.losses.blank_penalty
        logits = logits.astype(jnp.float32).at[..., folder.BLANK_ID].add(-penalty)
        return jax.nn.log_softmax(logits)

    def _intermediate(self, variables, batch, name):
        """Returns the student's logits and an intermediate output."""
        logits, changed = self._apply('student', variables, batch, mutable=['intermediates'])
        return logits, changed['intermediates'][name][0]

    def decode(self, variables, batch):
        """Decodes greedily and by beam search.

        Returns:
          greedy, beam and, if any, teacher (greedily): int32 ids [batch, time], lengths [batch];
          temporal_squares: of the inputs of the LSTM.
        """
        frames = batch['frames']
        logits, inputs = self._intermediate(variables, batch, 'lstm_inputs')
        log_probs = self._log_probs(logits)
        beams = decoding.beam_search(log_probs, frames, **self.beam_options)
        out = {
            'greedy': decoding.greedy(log_probs, frames)[:2],
            'beam': (beams.ids[:, 0], beams.lengths[:, 0]),
            'temporal_squares': temporal_squares(inputs, frames),
        }
        if 'teacher' in self.models:
            log_probs = self.log_probs(variables, batch, 'teacher')
            out['teacher'] = decoding.greedy(log_probs, frames)[:2]
        return out

    def embed_rows(self, variables, batch):
        """Returns hidden features averaged over a row's frames, float32 [batch, width]."""
        _, hidden = self._intermediate(variables, batch, 'hidden')
        frames = batch['frames'][..., None]
        return jnp.where(frames, hidden, 0).sum(1) / jnp.maximum(frames.sum(1), 1)

    def evaluators(self):
        return {
            name: SignScores(split, self.config.batch_size)
            for name, split in self.splits.items()
            if name != 'train'
        }

    def predict(self, predict, inputs, output, question=None):
        """Reads the glosses of one `.npz` (key `features`, [T, F]) with their times."""
        features = folder.read_features(pathlib.Path(inputs), self.normalization.width)
        one = self.splits['train'].with_features(features)
        ((log_probs, batch),) = predict('log_probs', one, 1)
        greedy = decoding.greedy(log_probs, batch['frames'])
        count = int(greedy.lengths[0])
        words = self.vocabulary.decode(greedy.ids[0][:count])
        times = (
            np.stack([greedy.starts[0], greedy.ends[0]], 1)[:count] / self.config.data.frame_rate
        )
        glosses = [
            {'gloss': word, 'start': round(float(start), 3), 'end': round(float(end), 3)}
            for word, (start, end) in zip(words, times, strict=True)
        ]
        beams = decoding.beam_search(log_probs, batch['frames'], **self.beam_options)
        best = self.vocabulary.decode(np.asarray(beams.ids[0, 0])[: int(beams.lengths[0, 0])])
        write_prediction(
            output, 'glosses', {'input': inputs, 'glosses': glosses, 'beam': list(best)}
        )
        lines = [f'{g["start"]:7.2f} s – {g["end"]:6.2f} s  {g["gloss"]}' for g in glosses]
        return '\n'.join([*lines, f'beam search: {" ".join(best)}'])

    def embed(self, predict, output):
        """Writes embeddings.npy [sentences, width], mean hidden features, and index.jsonl."""
        with EmbeddingWriter(output, sum(map(len, self.splits.values()))) as writer:
            for name, split in self.splits.items():
                for embeddings, batch in predict('embed_rows', split, self.config.batch_size):
                    ids = [split.record(row)['id'] for row in batch['row']]
                    writer.add(embeddings, [{'split': name, 'id': one} for one in ids])
        return f'{writer.rows} sentences: {writer.path}'


def _splits(config: Config, assets: epath.Path | None):
    """Prepares the sentences; words and normalization are those of `assets`, if any.

    Returns ({split: SignSequences}, vocabulary, normalization).
    """
    spec = config.data
    prepared = prepare_sequences(
        spec.root,
        cache_dir(spec.cache),
        seed=spec.seed,
        streams=spec.streams,
        synthetic_sizes=dataclasses.asdict(spec.built_in),
        max_fault_share=spec.max_fault_share,
        wait=jax.process_index() > 0,
    )
    if assets is None:
        vocabulary = prepared.vocabulary()
        normalization = prepared.normalization(spec.missing, spec.differences, spec.around)
    else:
        vocabulary = folder.Vocabulary.load(pathlib.Path(assets) / VOCABULARY)
        normalization = Normalization.load(pathlib.Path(assets) / NORMALIZATION)
    splits = {
        name: SignSequences(
            prepared,
            name,
            vocabulary=vocabulary,
            normalization=normalization,
            augmentation=spec.augmentation,
            buckets=spec.buckets,
        )
        for name in prepared.splits
    }
    splits['train'].skipped['infeasible'] = splits['train'].counts['unalignable_rows']
    return splits, vocabulary, normalization


def _model(
    network: Network, streams: Mapping[str, tuple[int, int]], words: int, dtype: jnp.dtype
) -> Sign:
    """Builds a model for streams of the columns {name: (start, end)}."""
    sizes = dataclasses.asdict(network)
    width = sizes.pop('stream_width')
    widths = sizes.pop('stream_widths')
    if widths and not {*widths} & {*streams}:
        names, known = ', '.join(widths), ', '.join(streams)
        raise UserError(f"model's stream_widths names {names}; the data have {known}")
    columns = tuple(
        Stream(name, start, end, widths.get(name, width)) for name, (start, end) in streams.items()
    )
    return Sign(words, columns, dtype=dtype, **sizes)


def _bigrams(train: SignSequences, vocabulary: folder.Vocabulary) -> np.ndarray:
    """Returns the bigram table of the training sentences, without the words it lacks."""
    sentences = (vocabulary.encode(train.words(row)) for row in range(len(train)))
    known = [ids[ids != folder.UNKNOWN_ID].tolist() for ids in sentences]
    try:
        return ngram.bigrams(known, len(vocabulary))
    except ValueError as error:
        raise UserError(f'decode.language_model: {error}') from None
