"""Receipts: how many a picture shows, and answers in words to questions about them."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import sections
from mmjax.data import images, prepare, tokenizers
from mmjax.decode import autoregressive
from mmjax.engine.task import Task, final_weights
from mmjax.errors import UserError
from mmjax.losses import classification, language
from mmjax.losses.term import Term
from mmjax.pretrained import decoder as decoder_weights
from mmjax.pretrained import files
from mmjax.recipes.receipts import assembly
from mmjax.recipes.receipts import data as receipts
from mmjax.recipes.receipts import folder as receipts_folder
from mmjax.recipes.receipts.scores import ReceiptScores, class_names, overlay

LOSSES = ('classification', 'language')
_READ = 50_000  # training texts that a tokenizer is trained on
_LEAST = len(tokenizers.SPECIAL) + 256  # ids of a tokenizer: each byte has one
# What a decoder would refuse, which at the end of a run is late.
_RANGES = {
    'beams': lambda x: x >= 1,
    'length_penalty': lambda x: x >= 0,
    'temperature': lambda x: x > 0,
    'top_k': lambda x: x >= 0,
    'top_p': lambda x: 0 < x <= 1,
}


class ReceiptsTask(Task):
    """The task of `configs/receipts.py`.

    Groups of parameters: `vision_top` (the last `model.thaw_blocks` blocks of the tower), `vision`
    (the rest of it), `language` (the decoder), `heads` (projector, cross-attention, classifier). A
    tower none of whose groups learns runs as in evaluation.

    Losses: `classification` (a picture) and `language` (a token of the answer).
    """

    def __init__(self, config, assets=None):
        assembly.check(config)
        self._open(config, assets)
        self.model = assembly.build(config, self.tokenizer.size)
        self.top = assembly.last_blocks(config.model.thaw_blocks, self.model.vision.depth)
        self.opening = self.splits['train'].closing_id  # as GPT-2 does, the end opens a text too
        self.most = self.splits['train'].lengths[-1]
        weights = config.loss_weights.to_dict()
        for name in weights:
            if name not in LOSSES:
                raise UserError(f"loss_weights names '{name}'; there are {', '.join(LOSSES)}")
        self.weights = final_weights(weights)
        self.decode_now = config.decode.running.to_dict()
        self.decode_last = config.decode.final.to_dict()
        for name, options in (('running', self.decode_now), ('final', self.decode_last)):
            if options['method'] not in ('greedy', 'sample', 'beam'):
                raise UserError(
                    f"decode.{name}.method '{options['method']}' is not greedy, sample or beam"
                )
            for key, fits in _RANGES.items():
                if not fits(options[key]):
                    raise UserError(f'decode.{name}.{key}={options[key]} is out of range')
        self.batch_size, self.seed = config.batch_size, config.seed
        self.smoothing = config.losses.smoothing
        if not 0 <= self.smoothing < 1:
            raise UserError(f'losses.smoothing={self.smoothing} is not in [0, 1)')

    def _open(self, config, assets):
        spec = config.data
        names = receipts_folder.named_splits(spec.root) if spec.root else receipts.SPLITS
        prepared = receipts.prepare_receipts(
            spec.root,
            prepare.cache_dir(spec.cache),
            splits=names,
            seed=config.seed,
            synthetic_sizes=spec.built_in.to_dict(),
            synthetic_side=spec.built_in_side,
            max_fault_share=spec.max_fault_share,
            max_pixels=spec.max_pixels,
            wait=jax.process_index() > 0,
        )
        augmentation = sections.parse(
            images.Augmentation, spec.augmentation.to_dict(), 'data.augmentation'
        )
        splits = {
            name: receipts.ReceiptQuestions(
                prepared,
                name,
                image_size=spec.image_size,
                buckets=spec.buckets,
                classes=spec.classes,
                augmentation=augmentation,
            )
            for name in names
        }
        vocabulary, self.folder = spec.vocabulary, config.model.pretrained.language
        if assets is not None:
            self.tokenizer = tokenizers.load_tokenizer(assets)
        elif self.folder:
            self.tokenizer = tokenizers.load_tokenizer(self.folder)
        else:
            if vocabulary < _LEAST:
                raise UserError(f'data.vocabulary={vocabulary} is less than {_LEAST}')
            texts = (text for text, _ in zip(splits['train'].texts(), range(_READ), strict=False))
            self.tokenizer = tokenizers.train_tokenizer(texts, vocabulary, lower_case=False)
        closing = decoder_weights.closing(self.folder) if self.folder else None
        self.splits = {
            name: x.with_tokenizer(self.tokenizer, closing) for name, x in splits.items()
        }
        train = self.splits['train']
        if train.texts_cut:
            train.skipped['train texts_cut, rows kept'] = train.texts_cut

    def dataset(self, split):
        return self.splits[split]

    def rules(self):
        top = '|'.join(map(str, self.top))
        return (
            ('vision_top', f'vision/block_({top})/.*'),
            ('vision', 'vision/.*'),
            ('language', 'language/.*'),
            ('heads', '(projector|cross_attention|classifier).*'),
        )

    def save_assets(self, workdir):
        self.tokenizer.save(workdir)

    # Model -----------------------------------------------------------------------------------

    def init(self, key, batch):
        names = 'images', 'mask', 'question', 'question_mask', 'answer', 'answer_mask'
        return self.model.init({'params': key, 'dropout': key}, *(batch[name] for name in names))

    def pretrained(self, variables):
        if not self.folder:
            return variables
        loaded, _ = decoder_weights.load(self.folder)
        params = dict(variables['params'])
        params['language'] = files.graft(params['language'], loaded, self.folder)
        return {**variables, 'params': params}

    def forward(self, variables, batch, stage, *, train, key):
        vision = stage.trains('vision') or stage.trains('vision_top')
        live = {
            'vision': train and vision,
            'language': train and stage.trains('language'),
            'heads': train and stage.trains('heads'),
        }
        return self._rows(variables, batch, live, key, frozen=not vision)

    def _rows(self, variables, batch, live, key, frozen=False):
        """Returns what each row adds to the losses, and the new batch statistics."""
        rngs = {'dropout': key} if key is not None else None
        apply = functools.partial(self.model.apply, variables, rngs=rngs)
        picture = apply(batch['images'], train=live['vision'], frozen=frozen, method='see')
        scores, changed = apply(
            picture, batch['mask'], train=live['heads'], method='classify', mutable=['batch_stats']
        )
        question = batch['question'], batch['question_mask']
        prefix, prefix_mask, _ = apply(picture, *question, train=live['heads'], method='ask')
        said = batch['answer'], batch['answer_mask']
        tokens = language.shift_right(*said, self.opening)
        hidden = apply(prefix, prefix_mask, *tokens, train=live['language'], method='answer')
        logits = apply(hidden, method='logits')
        sums, counts, right = language.token_rows(logits, *said)
        rows = classification.cross_entropy_rows(
            scores, batch['label'], smoothing=self.smoothing if key is not None else 0.0
        )
        outputs = {
            'classification': rows,
            'correct': scores.argmax(-1) == batch['label'],
            'language': sums,
            'tokens': counts,
            'tokens_correct': right,
        }
        return outputs, changed.get('batch_stats', {})

    def terms(self, variables, outputs, batch, stage):
        return self._terms(outputs, batch['mask'])

    def _terms(self, outputs, mask):
        of = {name: jnp.where(mask, x, 0) for name, x in outputs.items()}
        tokens = of['tokens'].sum()
        return {
            'classification': classification.classification(outputs['classification'], mask),
            'language': Term(of['language'].sum(), tokens),
            'train_accuracy': of['correct'].sum() / jnp.maximum(mask.sum(), 1),
            'token_accuracy': of['tokens_correct'].sum() / jnp.maximum(tokens, 1),
        }

    # Evaluation ------------------------------------------------------------------------------

    def measure(self, variables, batch):
        """Returns the losses of each row and the class probabilities float32 [batch, classes]."""
        still = dict.fromkeys(('vision', 'language', 'heads'), False)
        outputs, _ = self._rows(variables, batch, still, None)
        apply = functools.partial(self.model.apply, variables)
        picture = apply(batch['images'], train=False, method='see')
        scores = apply(picture, None, train=False, method='classify')
        return outputs | {'classes': jax.nn.softmax(scores)}

    def answer_now(self, variables, batch):
        """Answers as configured for evaluations while training: int32 [batch, most] and lengths."""
        return self._generate(variables, batch, **self.decode_now)

    def answer_last(self, variables, batch):
        """Answers as configured for the last evaluation: int32 [batch, most] and lengths."""
        return self._generate(variables, batch, **self.decode_last)

    def _generate(
        self, variables, batch, *, method, beams, length_penalty, temperature, top_k, top_p
    ):
        apply = functools.partial(self.model.apply, variables)
        picture = apply(batch['images'], train=False, method='see')
        question = batch['question'], batch['question_mask']
        prefix, prefix_mask, _ = apply(picture, *question, train=False, method='ask')
        rows = len(prefix)
        opening = jnp.full(rows, self.opening, jnp.int32)
        logits, cache = apply(prefix, prefix_mask, opening, method='begin')
        beams = beams if method == 'beam' else 1
        suffix = apply(rows, beams, self.most, method='suffix')

        def step(state, tokens, index):
            return apply(cache, state, tokens, index, method='step')

        fold = jax.vmap(jax.random.fold_in, (None, 0))
        keys = fold(jax.random.key(self.seed), batch['row'])
        return autoregressive.generate(
            step,
            suffix,
            logits,
            max_tokens=self.most,
            eos=self.opening,
            pad=self.tokenizer.pad_id,
            method=method,
            beams=beams,
            length_penalty=length_penalty,
            keys=keys,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )[:2]

    def attention(self, variables, batch):
        """Returns where the question's tokens look: float32 [batch, heads, question, grid²]."""
        apply = functools.partial(self.model.apply, variables)
        picture = apply(batch['images'], train=False, method='see')
        question = batch['question'], batch['question_mask']
        return apply(picture, *question, train=False, method='ask')[2]

    def embed_pictures(self, variables, batch):
        """Returns the mean picture token, float32 [batch, width]."""
        picture = self.model.apply(variables, batch['images'], train=False, method='see')
        return picture.mean(1).astype(jnp.float32)

    def evaluators(self):
        return {
            name: ReceiptScores(self, split, self.batch_size)
            for name, split in self.splits.items()
            if name != 'train'
        }

    def predict(self, apply, inputs, output, question='How many receipts do you see?'):
        """Answers a question about one picture; writes where the question's words looked."""
        one = self.splits['train'].with_question(inputs, question)
        ((measured, batch),) = apply('measure', one, 1)
        (tokens, lengths), _ = next(iter(apply('answer_last', one, 1)))
        looked, _ = next(iter(apply('attention', one, 1)))
        shown = self.tokenizer.decode(tokens[0][: lengths[0]]).strip()
        label = int(measured['classes'][0].argmax())
        output = pathlib.Path(output)
        output.mkdir(parents=True, exist_ok=True)
        words = int(batch['question_mask'][0].sum())
        figure = overlay(batch['images'][0], looked[0][:, :words], question, shown)
        figure.savefig(output / 'attention.png', dpi=120)
        found = {
            'picture': str(inputs),
            'question': question,
            'answer': shown,
            'class': class_names(self.splits['train'].classes)[label],
            'probability': round(float(measured['classes'][0][label]), 4),
        }
        (output / 'answer.json').write_text(json.dumps(found, indent=1, ensure_ascii=False))
        return (
            f'{found["class"]} receipt(s), probability {found["probability"]:.3f}\n{shown}\n'
            f'drawn: {output / "attention.png"}'
        )

    def embed(self, apply, output):
        """Writes embeddings.npy [rows, width], the mean picture token, and index.jsonl."""
        output.mkdir(parents=True, exist_ok=True)
        parts, at = [], 0
        with (output / 'index.jsonl').open('w') as index:
            for name, split in self.splits.items():
                for found, batch in apply('embed_pictures', split, self.batch_size):
                    parts.append(found)
                    for row in batch['row']:
                        record = split.record(int(row))
                        entry = {'row': at, 'split': name, 'path': record['image_path']}
                        entry |= {'question': record['question'], 'count': record['count']}
                        index.write(json.dumps(entry, ensure_ascii=False) + '\n')
                        at += 1
        with (output / 'embeddings.npy').open('wb') as file:
            np.save(file, np.concatenate(parts))
        return f'{at} rows: {output / "embeddings.npy"}'
