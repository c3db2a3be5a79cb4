"""Comic panels: one embedding per panel from its image, its text and its place on the page."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mmjax.data import prepare, tokenizers
from mmjax.engine.outputs import EmbeddingWriter
from mmjax.engine.task import Task
from mmjax.losses import contrastive, reconstruction
from mmjax.losses.term import Term
from mmjax.models.bert import Bert
from mmjax.models.resnet import ResNet
from mmjax.models.vit import ViT
from mmjax.pretrained import bert as bert_weights
from mmjax.pretrained import files
from mmjax.pretrained import resnet as resnet_weights
from mmjax.pretrained import siglip as siglip_weights
from mmjax.recipes.comic import data as comic
from mmjax.recipes.comic.config import BACKBONES, Config
from mmjax.recipes.comic.model import EVALUATION, TOWERS, ComicModel
from mmjax.recipes.comic.scores import VERDICTS, PageScores

MODULES = {'siglip': ViT, 'resnet': ResNet, 'bert': Bert}
FAMILIES = {'siglip': siglip_weights, 'resnet': resnet_weights, 'bert': bert_weights}


class ComicTask(Task):
    """The task of `configs/stage3.py`.

    Groups of parameters: `vision` (the visual backbones), `text` (the text backbone) and `heads`
    (projections, composition, fusion, reconstruction).

    Losses: `contrastive` (SupCon of fused embeddings, labels are pages), `reconstruction` (of a
    hidden panel from the others of its page), `alignment` (InfoNCE of image and text),
    `unimodal` (InfoNCE of the embedding of one modality alone and the fused one of its panel, so
    that the fusion keeps what each modality tells).
    """

    Config = Config
    verdicts = VERDICTS

    def __init__(self, config: Config, assets: epath.Path | None = None):
        self.splits, self.tokenizer = _pages(config, assets)
        self.model, self.folders = _model(config, self.tokenizer.size)
        panels = self.splits['train'].index['n_panels']
        self.pack = config.model.pack
        self.panels_per_page = float(panels.mean()), float(panels.std())
        self.losses = config.losses
        self.batch_size = config.batch_size

    @property
    def towers(self):
        absent = [name for name in ('siglip', 'resnet') if getattr(self.model, name) is None]
        return {name: f'{name}/.*' for name in TOWERS if name not in absent}

    def dataset(self, split):
        return self.splits[split]

    def rules(self):
        return (('vision', '(siglip|resnet)/.*'), ('text', 'bert/.*'), ('heads', '.*'))

    def save_assets(self, workdir):
        self.tokenizer.save(workdir)

    # Model -----------------------------------------------------------------------------------

    def _inputs(self, batch):
        names = ('images', 'tokens', 'token_mask', 'composition', 'modality')
        return (*(batch[name] for name in names), _panels(batch))

    def init(self, key, batch):
        batch = {**batch, 'mask': jnp.ones_like(batch['mask'])}
        return self.model.init({'params': key, 'dropout': key}, *self._inputs(batch))

    def pretrained(self, variables):
        out = {name: dict(tree) for name, tree in variables.items()}
        for part, folder in self.folders.items():
            resize = {'image_size': self.model.siglip.image_size} if part == 'siglip' else {}
            params, stats = FAMILIES[part].load(folder, **resize)
            out['params'][part] = files.graft(out['params'][part], params, folder)
            if stats:
                out['batch_stats'][part] = files.graft(out['batch_stats'][part], stats, folder)
        return out if self.folders else variables

    def forward(self, variables, batch, stage, *, train, key):
        evaluation = key is None
        *arrays, panels = self._inputs(batch)
        capacity = panels.size if evaluation else self._capacity(panels.shape)
        order = jnp.cumsum(panels.reshape(-1)).reshape(panels.shape)
        panels &= order <= capacity  # the last ones of a batch that has more are left out
        hidden = reconstruction.hidden_panel(batch['key'], panels)
        encode_key, predict_key = (None, None) if evaluation else jax.random.split(key)
        dropout = lambda key: None if key is None else {'dropout': key}
        encode = functools.partial(
            self.model.apply,
            variables,
            train=train,
            method='encode',
            mutable=['batch_stats'],
            rngs=dropout(encode_key),
        )
        outputs, changed = _packed(encode, (*arrays, panels), capacity)
        context = reconstruction.context_mean(
            outputs['fused'], panels, hidden, stop_gradient=self.losses.stop_context
        )
        predicted = self.model.apply(
            variables,
            context,
            train['reconstruction'],
            method='reconstruct',
            rngs=dropout(predict_key),
        )
        outputs |= {'predicted': predicted, 'hidden': hidden, 'panels': panels}
        return outputs, changed['batch_stats']

    def _capacity(self, shape):
        """Returns how many panels a batch of this shape may hold, a multiple of 8.

        Four standard deviations above what the training pages need, so that about one batch in
        30,000 is cut; `panels_left_out` in the log counts what was.
        """
        pages, slots = shape
        mean, std = self.panels_per_page
        needed = mean * pages + 4 * std * math.sqrt(pages)
        return min(math.ceil(needed / 8) * 8, pages * slots) if self.pack else pages * slots

    def terms(self, variables, outputs, batch, stage):
        panels = outputs['panels']
        has = batch['modality'].astype(bool)
        options = {'temperature': self.losses.temperature, 'chunk': self.losses.chunk}
        rows = lambda x: x.reshape(-1, x.shape[-1])
        page = jnp.broadcast_to(jnp.arange(len(panels))[:, None], panels.shape).reshape(-1)
        pull, report = contrastive.supcon(
            rows(outputs['fused']), page, panels.reshape(-1), **options
        )
        pairs = (panels & has[..., 0] & has[..., 1]).reshape(-1)
        align = contrastive.infonce(
            rows(outputs['vision']), rows(outputs['text']), pairs, **options
        )
        predict = reconstruction.reconstruction(
            outputs['predicted'], outputs['fused'], panels, outputs['hidden']
        )
        count = jnp.maximum(panels.sum(), 1)  # gates are 0 on padding
        gates = jax.lax.stop_gradient(outputs['gates'].sum((0, 1)) / count)
        return {
            'contrastive': pull,
            'reconstruction': predict,
            'alignment': align,
            'unimodal': _unimodal(outputs, panels[..., None] & has, options),
            **{f'contrastive_{name}': value for name, value in report.items()},
            **{f'gate_{name}': gates[i] for i, name in enumerate(comic.MODALITIES)},
            'alignment_cosine': _cosine(outputs, pairs),
            'texts_cut': jnp.where(batch['mask'], batch['texts_cut'], 0).sum(),
            'panels_left_out': _panels(batch).sum() - panels.sum(),
        }

    # Evaluation ------------------------------------------------------------------------------

    def encode(self, variables, batch):
        """Embeds a batch: float32 {'fused', 'vision', 'text'} [batch, panels, features]."""
        outputs = self.model.apply(
            variables, *self._inputs(batch), train=EVALUATION, method='encode'
        )
        return {name: outputs[name] for name in ('fused', 'vision', 'text')}

    def fuse(self, variables, alone, present):
        """Fuses rows of modalities [rows, 3, features], see `ComicModel.fuse`."""
        return self.model.apply(variables, alone, present, method='fuse')

    def evaluators(self):
        return {'val': PageScores(self.dataset('val'), self.batch_size, self.fuse)}

    def predict(self, predict, inputs, output, question=None):
        """Prints which of its page's texts each panel of one page retrieves; writes embeddings.

        `inputs` is an image with its JSON beside it (`page.jpg`, `page.json`).
        """
        page = self.splits['val'].with_page(inputs)
        example = page.collate([page.example(0, np.random.default_rng(0), False)], 0)
        batch = {**example, 'mask': np.ones(1, bool), 'row': np.zeros(1, np.int32)}
        outputs = jax.jit(self.encode)(predict.variables, batch)
        outputs = {name: np.asarray(x[0]) for name, x in outputs.items()}
        output.mkdir(parents=True, exist_ok=True)
        record = page.record(0)
        count = int(example['panels'].sum())
        np.save(output / 'embeddings.npy', outputs['fused'][:count])
        with_text = [panel for panel in range(count) if example['modality'][0, panel, 1]]
        lines = [f'{record["canonical_id"]}: {count} panels, {len(with_text)} with text']
        unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)
        logits = unit(outputs['vision'][:count]) @ unit(outputs['text'][with_text]).T
        probabilities = np.asarray(jax.nn.softmax(logits / self.losses.temperature))
        for panel in range(count if with_text else 0):
            best = int(np.argmax(probabilities[panel]))
            match = with_text[best]
            whose = 'its own text' if match == panel else f'the text of panel {match + 1}'
            lines.append(
                f'panel {panel + 1} retrieves {whose} ({probabilities[panel, best]:.2f}): '
                f'{record["texts"][match]}'
            )
        return '\n'.join([*lines, f'embeddings: {output / "embeddings.npy"}'])

    def embed(self, predict, output):
        """Writes embeddings.npy [pages, panels, features], mask.npy, index.jsonl, page by page."""
        splits = tuple(self.splits.values())
        shape = (splits[0].prepared.max_panels, self.model.features)
        with EmbeddingWriter(output, sum(map(len, splits)), shape) as writer:
            for split in splits:
                for outputs, batch in predict('encode', split, self.batch_size):
                    names = [split.record(int(row))['canonical_id'] for row in batch['row']]
                    entries = [{'split': split.split, 'canonical_id': name} for name in names]
                    writer.add(outputs['fused'], entries, batch['panels'])
        return f'{writer.rows} pages of at most {shape[0]} panels: {writer.path}'


def _panels(batch):
    """Returns bool [batch, panels]: the panels of the rows that are not padding."""
    return batch['panels'] & batch['mask'][:, None]


def _packed(encode, inputs, capacity):
    """Returns encode(*inputs) as (outputs, changed), computed on the real panels only.

    Pages have few of the slots they are padded to: at most `capacity` real panels of the batch are
    gathered into one row, and their outputs put back.
    """
    pages, slots = inputs[-1].shape
    if capacity == pages * slots:
        return encode(*inputs)
    order = jnp.argsort(~inputs[-1].reshape(-1), stable=True)[:capacity]
    take = lambda x: x.reshape(-1, *x.shape[2:])[order][None]
    outputs, changed = encode(*map(take, inputs))
    empty = lambda x: jnp.zeros((pages * slots, *x.shape[2:]), x.dtype)
    put = lambda x: empty(x).at[order].set(x[0]).reshape(pages, slots, *x.shape[2:])
    return {name: put(x) for name, x in outputs.items()}, changed


def _pages(config: Config, assets: epath.Path | None):
    """Prepares the pages and opens both splits; the tokenizer is that of `assets`, if any.

    Returns ({split: ComicPages}, tokenizer).
    """
    spec = config.data
    prepared = comic.prepare_pages(
        spec.root,
        prepare.cache_dir(spec.cache),
        seed=spec.seed,
        synthetic_sizes=dataclasses.asdict(spec.built_in),
        max_panels=spec.max_panels,
        max_fault_share=spec.max_fault_share,
        max_pixels=spec.max_pixels,
        wait=jax.process_index() > 0,
    )
    names = ('image_size', 'max_tokens', 'buckets', 'use_composition')
    names += ('hidden_tokens', 'hidden_texts', 'hidden_compositions')
    options = {name: getattr(spec, name) for name in names}
    options['augmentation'] = spec.augmentation
    splits = {name: comic.ComicPages(prepared, name, **options) for name in ('train', 'val')}
    folder = assets or config.model.pretrained.bert
    if folder:
        tokenizer = tokenizers.load_tokenizer(folder)
    else:
        tokenizer = tokenizers.train_tokenizer(splits['train'].texts(), spec.vocabulary)
    return {name: split.with_tokenizer(tokenizer) for name, split in splits.items()}, tokenizer


def _model(config: Config, vocabulary: int) -> tuple[ComicModel, dict[str, str]]:
    """Builds the model; returns it with the {part: folder} of its pretrained weights."""
    spec = config.model
    dtype = jnp.dtype(config.precision)
    extra = {
        'siglip': {'image_size': config.data.image_size},
        'bert': {'vocabulary': vocabulary},
        'resnet': {},
    }
    folders = {}
    modules = {'siglip': None, 'resnet': None}
    for part in (*BACKBONES[spec.visual_backbone], 'bert'):
        fields = {**dataclasses.asdict(getattr(spec, part)), **extra[part]}
        folder = getattr(spec.pretrained, part)
        if folder:
            folders[part] = folder
            fields |= FAMILIES[part].fields(folder)
            fields |= {'image_size': config.data.image_size} if part == 'siglip' else {}
        modules[part] = MODULES[part](**fields, dtype=dtype)
    heads = dataclasses.asdict(spec.heads)
    model = ComicModel(**modules, **heads, visual_fusion=spec.visual_fusion, dtype=dtype)
    return model, folders


def _unimodal(outputs, present, options):
    """Returns the InfoNCE of each modality alone and the fused embedding, over all modalities.

    A panel counts where it has another modality too; otherwise both embeddings are the same.
    """
    present &= present.sum(-1, keepdims=True) > 1
    rows = lambda x: x.reshape(-1, x.shape[-1])
    fused = rows(outputs['fused'])
    terms = [
        contrastive.infonce(
            rows(outputs['alone'][..., index, :]), fused, present[..., index].reshape(-1), **options
        )
        for index in range(len(comic.MODALITIES))
    ]
    return Term(sum(term.total for term in terms), sum(term.count for term in terms))


def _cosine(outputs, pairs):
    """Returns the mean cosine of a panel's image and its own text; collapse shows here first."""
    unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-9)
    cosine = jnp.sum(unit(outputs['vision']) * unit(outputs['text']), -1).reshape(-1)
    total = jnp.sum(jnp.where(pairs, cosine, 0.0))
    return jax.lax.stop_gradient(total / jnp.maximum(pairs.sum(), 1))
