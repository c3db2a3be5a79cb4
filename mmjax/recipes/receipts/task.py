"""Receipts: how many an image shows, and answers in words to questions about them."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from etils import epath

from mmjax.data import prepare, tokenizers
from mmjax.decode import autoregressive
from mmjax.engine.outputs import EmbeddingWriter, write_prediction
from mmjax.engine.task import Task
from mmjax.errors import UserError
from mmjax.losses import classification, language
from mmjax.losses.term import Term
from mmjax.models.decoder import Decoder
from mmjax.models.internvit import InternViT
from mmjax.pretrained import decoder as decoder_weights
from mmjax.pretrained import files
from mmjax.recipes.receipts import data as receipts
from mmjax.recipes.receipts import folder as receipts_folder
from mmjax.recipes.receipts.config import Config
from mmjax.recipes.receipts.model import ReceiptsModel
from mmjax.recipes.receipts.scores import VERDICTS, ReceiptScores, class_names, overlay

TOKENIZER_TEXTS = 50_000  # training texts that a tokenizer is trained on


class ReceiptsTask(Task):
    """The task of `configs/receipts.py`.

    Groups of parameters: `vision_top` (the last `model.thaw_blocks` blocks of the vision tower),
    `vision` (the rest of it), `language` (the decoder), `cross_attention` (of question to image),
    `heads` (projector, classifier).

    Losses: `classification` (of a row's image) and `language` (of a token of the answer).
    """

    Config = Config
    verdicts = VERDICTS
    takes_question = True
    towers = {
        'vision': 'vision/.*',
        'language': 'language/.*',
        'projector': 'projector_.*',
        'cross_attention': 'cross_attention/.*',
        'classifier': 'classifier/.*',
    }

    def __init__(self, config: Config, assets: epath.Path | None = None):
        if config.model.attention == 'cudnn' and jax.default_backend() != 'gpu':
            raise UserError(f"model.attention='cudnn' needs a GPU, not {jax.default_backend()}")
        self.config = config
        self.splits, self.tokenizer = _splits(config, assets)
        self.model = _model(config, self.tokenizer.size)
        self.opening_id = self.splits['train'].closing_id  # as in GPT-2, it opens a text too
        self.max_tokens = self.splits['train'].lengths[-1]

    def dataset(self, split):
        return self.splits[split]

    def rules(self):
        depth = self.model.vision.depth
        top = '|'.join(map(str, range(depth - self.config.model.thaw_blocks, depth)))
        return (
            ('vision_top', f'vision/block_({top})/.*'),
            ('vision', 'vision/.*'),
            ('language', 'language/.*'),
            ('cross_attention', 'cross_attention/.*'),
            ('heads', '(projector|classifier).*'),
        )

    def save_assets(self, workdir):
        self.tokenizer.save(workdir)

    # Model -----------------------------------------------------------------------------------

    def init(self, key, batch):
        names = ('images', 'mask', 'question', 'question_mask', 'answer', 'answer_mask')
        return self.model.init({'params': key, 'dropout': key}, *(batch[name] for name in names))

    def pretrained(self, variables):
        source = self.config.model.pretrained.language
        if not source:
            return variables
        loaded, _ = decoder_weights.load(source)
        params = dict(variables['params'])
        params['language'] = files.graft(params['language'], loaded, source)
        return {**variables, 'params': params}

    def forward(self, variables, batch, stage, *, train, key):
        rngs = None if key is None else {'dropout': key}
        apply = functools.partial(self.model.apply, variables, rngs=rngs)
        image = apply(batch['images'], train=train['vision'], method='encode')
        scores, changed = apply(
            image,
            batch['mask'],
            train=train['classifier'],
            method='classify',
            mutable=['batch_stats'],
        )
        prefix, prefix_mask, _ = apply(
            image,
            batch['question'],
            batch['question_mask'],
            train=train['cross_attention'],
            method='prefix',
        )
        answer = batch['answer'], batch['answer_mask']
        tokens = language.shift_right(*answer, self.opening_id)
        logits = apply(prefix, prefix_mask, *tokens, train=train['language'], method='answer')
        sums, counts, correct = language.token_rows(logits, *answer)
        smoothing = 0.0 if key is None else self.config.losses.smoothing
        outputs = {
            'classification': classification.cross_entropy_rows(
                scores, batch['label'], smoothing=smoothing
            ),
            'predicted': scores.argmax(-1),
            'language': sums,
            'tokens': counts,
            'tokens_correct': correct,
        }
        return outputs, changed.get('batch_stats', {})

    def terms(self, variables, outputs, batch, stage):
        mask = batch['mask']
        total = lambda x: jnp.where(mask, x, 0).sum()
        tokens = total(outputs['tokens'])
        correct = total(outputs['predicted'] == batch['label'])
        return {
            'classification': classification.classification(outputs['classification'], mask),
            'language': Term(total(outputs['language']), tokens),
            'accuracy': correct / jnp.maximum(mask.sum(), 1),
            'token_accuracy': total(outputs['tokens_correct']) / jnp.maximum(tokens, 1),
        }

    # Evaluation ------------------------------------------------------------------------------

    def _image(self, variables, batch):
        """Returns (the model's method by name, the image tokens of a batch)."""
        apply = functools.partial(self.model.apply, variables)
        return apply, apply(batch['images'], train=False, method='encode')

    def classify(self, variables, batch):
        """Returns the class probabilities, float32 [batch, classes]."""
        apply, image = self._image(variables, batch)
        return jax.nn.softmax(apply(image, None, train=False, method='classify'))

    def answer_running(self, variables, batch):
        """Answers by `decode.running`: (int32 tokens [batch, max_tokens], lengths [batch])."""
        return self._generate(variables, batch, self.config.decode.running)

    def answer_final(self, variables, batch):
        """Answers by `decode.final`: (int32 tokens [batch, max_tokens], lengths [batch])."""
        return self._generate(variables, batch, self.config.decode.final)

    def answer_other_image(self, variables, batch):
        """Answers by `decode.final` what is asked of one image, of another image of the batch.

        Returns:
          tokens, lengths as of `answer_running`; int32 [batch], the row of the other image.
        """
        partner = _partner(batch['mask'])
        tokens, lengths = self._generate(variables, batch, self.config.decode.final, partner)
        return tokens, lengths, batch['row'][partner]

    def swaps(self, variables, batch):
        """Compares the model's distributions over answer tokens before and after a swap.

        Returns:
          {'image', 'question', 'both'}: float32 [batch], the mean over the answer's tokens of
          Σ √(p q), the cosine of √p and √q, with the image, the question or both of another row;
          'row': int32 [batch], that row.
        """
        apply, image = self._image(variables, batch)
        question, mask = batch['question'], batch['question_mask']
        answer = batch['answer'], batch['answer_mask']
        tokens = language.shift_right(*answer, self.opening_id)
        partner = _partner(batch['mask'])

        def half_log_probabilities(image, question, mask):
            prefix, prefix_mask, _ = apply(image, question, mask, train=False, method='prefix')
            logits = apply(prefix, prefix_mask, *tokens, train=False, method='answer')
            return 0.5 * jax.nn.log_softmax(logits)

        before = half_log_probabilities(image, question, mask)
        swapped = {
            'image': (image[partner], question, mask),
            'question': (image, question[partner], mask[partner]),
            'both': (image[partner], question[partner], mask[partner]),
        }
        count = jnp.maximum(answer[1].sum(-1), 1)
        out = {'row': batch['row'][partner]}
        for name, inputs in swapped.items():
            cosines = jnp.exp(before + half_log_probabilities(*inputs)).sum(-1)
            out[name] = jnp.where(answer[1], cosines, 0).sum(-1) / count
        return out

    def _generate(self, variables, batch, options, partner=None):
        apply, image = self._image(variables, batch)
        image = image if partner is None else image[partner]
        prefix, prefix_mask, _ = apply(
            image, batch['question'], batch['question_mask'], train=False, method='prefix'
        )
        rows = len(prefix)
        opening = jnp.full(rows, self.opening_id, jnp.int32)
        logits, cache = apply(prefix, prefix_mask, opening, method='prefill')
        beams = options.beams if options.method == 'beam' else 1
        fold = jax.vmap(jax.random.fold_in, (None, 0))
        return autoregressive.generate(
            functools.partial(apply, cache, method='step'),
            self.model.language.suffix(rows, beams, self.max_tokens),
            logits,
            max_tokens=self.max_tokens,
            eos=self.opening_id,
            pad=self.tokenizer.pad_id,
            keys=fold(jax.random.key(self.config.seed), batch['row']),
            **dataclasses.asdict(options),
        )[:2]

    def attention(self, variables, batch):
        """Returns the cross-attention's weights, float32 [batch, heads, question, grid²]."""
        apply, image = self._image(variables, batch)
        question = batch['question'], batch['question_mask']
        return apply(image, *question, train=False, method='prefix')[2]

    def embed_images(self, variables, batch):
        """Returns the mean image token, float32 [batch, width]."""
        return self._image(variables, batch)[1].mean(1).astype(jnp.float32)

    def evaluators(self):
        return {
            name: ReceiptScores(self, split, self.config.batch_size, final_only=name == 'test')
            for name, split in self.splits.items()
            if name != 'train'
        }

    def predict(self, predict, inputs, output, question='How many receipts do you see?'):
        """Answers a question about one image; draws the attention of the question's words."""
        data = self.splits['train'].with_question(inputs, question)
        (((probabilities,), batch),) = predict('classify', data, 1)
        ((((tokens,), (length,)), _),) = predict('answer_final', data, 1)
        (((weights,), _),) = predict('attention', data, 1)
        answer = self.tokenizer.decode(tokens[:length]).strip()
        label = int(probabilities.argmax())
        content = {
            'picture': str(inputs),
            'question': question,
            'answer': answer,
            'class': class_names(data.classes)[label],
            'probability': round(float(probabilities[label]), 4),
        }
        write_prediction(output, 'answer', content)
        words = int(batch['question_mask'].sum())
        path = epath.Path(output) / 'attention.png'
        figure = overlay(batch['images'][0], weights[:, :words], question, answer)
        figure.savefig(path, dpi=120)
        return (
            f'{content["class"]} receipt(s), probability {content["probability"]:.3f}\n'
            f'{answer}\ndrawn: {path}'
        )

    def embed(self, predict, output):
        """Writes embeddings.npy [rows, width], the mean image token, and index.jsonl."""
        with EmbeddingWriter(output, sum(map(len, self.splits.values()))) as writer:
            for name, split in self.splits.items():
                for embeddings, batch in predict('embed_images', split, self.config.batch_size):
                    records = [split.record(int(row)) for row in batch['row']]
                    entries = [
                        {
                            'split': name,
                            'path': record['image_path'],
                            'question': record['question'],
                            'count': record['count'],
                        }
                        for record in records
                    ]
                    writer.add(embeddings, entries)
        return f'{writer.rows} rows: {writer.path}'


def _partner(mask):
    """Returns int [batch]: another real row for each, half of the batch away."""
    count = jnp.maximum(mask.sum(), 1)
    rows = jnp.arange(len(mask))
    return jnp.where(mask, (rows + jnp.maximum(count // 2, 1)) % count, rows)


def _splits(config: Config, assets: epath.Path | None):
    """Prepares the receipts and opens every split; the tokenizer is that of `assets`, if any.

    Returns ({split: ReceiptQuestions}, tokenizer).
    """
    spec = config.data
    names = receipts_folder.named_splits(spec.root) if spec.root else receipts.SPLITS
    prepared = receipts.prepare_receipts(
        spec.root,
        prepare.cache_dir(spec.cache),
        splits=names,
        seed=spec.seed,
        synthetic_sizes=dataclasses.asdict(spec.built_in),
        synthetic_side=spec.built_in_side,
        synthetic_most=spec.built_in_max_receipts,
        max_fault_share=spec.max_fault_share,
        max_pixels=spec.max_pixels,
        wait=jax.process_index() > 0,
    )
    options = {name: getattr(spec, name) for name in ('image_size', 'buckets', 'classes')}
    options['augmentation'] = spec.augmentation
    splits = {name: receipts.ReceiptQuestions(prepared, name, **options) for name in names}
    folder = config.model.pretrained.language
    if assets or folder:
        tokenizer = tokenizers.load_tokenizer(assets or folder)
    else:
        texts = itertools.islice(splits['train'].texts(), TOKENIZER_TEXTS)
        tokenizer = tokenizers.train_tokenizer(texts, spec.vocabulary, lower_case=False)
    closing = decoder_weights.closing(folder) if folder else None
    splits = {name: split.with_tokenizer(tokenizer, closing) for name, split in splits.items()}
    train = splits['train']
    if train.texts_cut:
        train.skipped['train texts_cut, rows kept'] = train.texts_cut
    return splits, tokenizer


def _model(config: Config, vocabulary: int) -> ReceiptsModel:
    """Builds the model for a tokenizer of `vocabulary` ids.

    The decoder has the sizes of `model.pretrained.language`, if any.
    """
    spec = config.model
    decoder = spec.language
    folder = spec.pretrained.language
    if folder:
        fields = decoder_weights.fields(folder)
        ids = fields.pop('vocabulary')
        if ids < vocabulary:
            raise UserError(
                f'{folder}: the decoder has vocabulary {ids}, its tokenizer {vocabulary}'
            )
        vocabulary = ids
        decoder = dataclasses.replace(decoder, **fields)
        decoder.check(folder)
        spec.check_cross_attention(decoder, folder)
    dtype = jnp.dtype(config.precision)
    shared = {'dtype': dtype, 'implementation': spec.attention, 'remat': spec.remat}
    vision = dataclasses.asdict(spec.vision)
    return ReceiptsModel(
        vision=InternViT(image_size=config.data.image_size, **vision, **shared),
        language=Decoder(vocabulary=vocabulary, **dataclasses.asdict(decoder), **shared),
        classes=config.data.classes,
        shuffle=spec.shuffle,
        cross_heads=spec.cross_attention.heads,
        cross_dropout=spec.cross_attention.dropout,
        dtype=dtype,
    )
