"""Comic panels: one embedding a panel from its picture, its text and its place on the page."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.data import images, prepare, tokenizers
from mmjax.engine.task import Task, final_weights
from mmjax.errors import UserError
from mmjax.losses import contrastive, reconstruction
from mmjax.models.bert import Bert
from mmjax.models.resnet import ResNet
from mmjax.models.vit import ViT
from mmjax.pretrained import bert as bert_weights
from mmjax.pretrained import files
from mmjax.pretrained import resnet as resnet_weights
from mmjax.pretrained import siglip as siglip_weights
from mmjax.recipes.comic import data as comic
from mmjax.recipes.comic.model import ComicModel
from mmjax.recipes.comic.scores import PageScores

BACKBONES = {'siglip': ('siglip',), 'resnet': ('resnet',), 'both': ('siglip', 'resnet')}
FAMILIES = {'siglip': siglip_weights, 'resnet': resnet_weights, 'bert': bert_weights}


class ComicTask(Task):
    """The task of `configs/stage3.py`.

    Groups of parameters: `vision` (the visual backbones), `text` (the text backbone) and `heads`
    (projections, composition, fusion, reconstruction). A backbone whose group has rate 0 runs as
    in evaluation.
    """

    def __init__(self, config, assets=None):
        if config.model.visual_backbone not in BACKBONES:
            known = ', '.join(BACKBONES)
            raise UserError(
                f"model.visual_backbone '{config.model.visual_backbone}' is not one of {known}"
            )
        self.splits, self.tokenizer = _pages(config, assets)
        self.model, self.folders = _model(config, self.tokenizer.size)
        panels = self.splits['train'].index['n_panels']
        self.pack, self.panels_a_page = config.model.pack, (panels.mean(), panels.std())
        self.temperature = config.losses.temperature
        chunk = config.losses.chunk
        self.chunk = chunk if chunk == 'auto' else int(chunk)
        self.stop_context = config.losses.stop_context
        self.weights = final_weights(config.loss_weights.to_dict())
        self.batch_size = config.batch_size

    def dataset(self, split):
        return self.splits[split]

    def rules(self):
        return (('vision', '(siglip|resnet)/.*'), ('text', 'bert/.*'), ('heads', '.*'))

    def save_assets(self, workdir):
        self.tokenizer.save(workdir)

    # Model -----------------------------------------------------------------------------------

    def _inputs(self, batch):
        names = ('images', 'tokens', 'token_mask', 'composition', 'modality')
        return (*(batch[name] for name in names), batch['panels'] & batch['mask'][:, None])

    def init(self, key, batch):
        batch = {**batch, 'mask': jnp.ones_like(batch['mask'])}
        return self.model.init({'params': key, 'dropout': key}, *self._inputs(batch), train=False)

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
        frozen = frozenset(group for group in ('vision', 'text') if not stage.trains(group))
        *arrays, asked = self._inputs(batch)
        place = jnp.cumsum(asked.reshape(-1)).reshape(asked.shape)
        inputs = (*arrays, asked & (place <= self._capacity(asked)))
        hidden = reconstruction.hidden_panel(batch['key'], inputs[-1])
        encode_key, predict_key = jax.random.split(key)
        outputs, changed = self._packed(
            inputs,
            lambda arrays: self.model.apply(
                variables,
                *arrays,
                train,
                frozen,
                method='encode',
                mutable=['batch_stats'],
                rngs={'dropout': encode_key},
            ),
        )
        context = reconstruction.context_mean(
            outputs['fused'], inputs[-1], hidden, stop_gradient=self.stop_context
        )
        predicted = self.model.apply(
            variables, context, train, method='reconstruct', rngs={'dropout': predict_key}
        )
        outputs |= {'predicted': predicted, 'hidden': hidden, 'panels': inputs[-1]}
        return outputs, changed['batch_stats']

    def _capacity(self, panels):
        """Returns how many panels a batch of this shape may hold, a multiple of 8.

        Four standard deviations above what the training pages need, so that about one batch in
        30,000 is cut; `panels_left_out` in the log counts what was.
        """
        pages, slots = panels.shape
        mean, deviation = self.panels_a_page
        needed = mean * pages + 4 * deviation * math.sqrt(pages)
        return min(math.ceil(needed / 8) * 8, pages * slots) if self.pack else pages * slots

    def _packed(self, inputs, apply):
        """Returns apply(inputs) as (outputs, changed), computed on the panels that are there.

        Pages have few of the slots they are padded to: the real panels are gathered into a row of
        fixed capacity and their outputs put back.
        """
        pages, slots = inputs[-1].shape
        capacity = self._capacity(inputs[-1])
        if capacity == pages * slots:
            return apply(inputs)
        order = jnp.argsort(~inputs[-1].reshape(-1), stable=True)[:capacity]
        take = lambda x: x.reshape(-1, *x.shape[2:])[order][None]
        outputs, changed = apply(tuple(map(take, inputs)))
        empty = lambda x: jnp.zeros((pages * slots, x.shape[-1]), x.dtype)
        put = lambda x: empty(x).at[order].set(x[0]).reshape(pages, slots, -1)
        return {name: put(x) for name, x in outputs.items()}, changed

    def terms(self, variables, outputs, batch, stage):
        terms = self._terms(outputs, outputs['panels'], batch['modality'].astype(bool))
        asked = self._inputs(batch)[-1].sum()
        return {**terms, 'panels_left_out': asked - outputs['panels'].sum()}

    def _terms(self, outputs, panels, has):
        rows = lambda x: x.reshape(-1, x.shape[-1])
        page = jnp.broadcast_to(jnp.arange(len(panels))[:, None], panels.shape).reshape(-1)
        pull, report = contrastive.supcon(
            rows(outputs['fused']),
            page,
            panels.reshape(-1),
            temperature=self.temperature,
            chunk=self.chunk,
        )
        pairs = (panels & has[..., 0] & has[..., 1]).reshape(-1)
        align = contrastive.infonce(
            rows(outputs['vision']),
            rows(outputs['text']),
            pairs,
            temperature=self.temperature,
            chunk=self.chunk,
        )
        predict = reconstruction.reconstruction(
            outputs['predicted'], outputs['fused'], panels, outputs['hidden']
        )
        diagnostics = {f'contrastive_{name}': value for name, value in report.items()}
        terms = {'contrastive': pull, 'reconstruction': predict, 'alignment': align}
        count = jnp.maximum(panels.sum(), 1)  # gates are 0 on padding
        gates = jax.lax.stop_gradient(outputs['gates'].sum((0, 1)) / count)
        diagnostics |= {f'gate_{name}': gates[i] for i, name in enumerate(comic.MODALITIES)}
        return {**terms, **diagnostics, 'alignment_cosine': _cosine(outputs, pairs)}

    # Evaluation ------------------------------------------------------------------------------

    def encode(self, variables, batch):
        """Embeds a batch for evaluation; the hidden panel of a page follows from its row."""
        inputs = self._inputs(batch)
        fold = lambda row: jax.random.fold_in(jax.random.key(0), row)
        hidden = reconstruction.hidden_panel(jax.vmap(fold)(batch['row']), inputs[-1])

        outputs = self.model.apply(variables, *inputs, False, method='encode')
        context = reconstruction.context_mean(outputs['fused'], inputs[-1], hidden)
        predicted = self.model.apply(variables, context, False, method='reconstruct')
        return {**outputs, 'predicted': predicted, 'hidden': hidden}

    def fused(self, variables, batch):
        """Embeds a batch: float32 [batch, panels, features]."""
        return self.model.apply(variables, *self._inputs(batch), False, method='encode')['fused']

    def evaluators(self):
        return {'val': PageScores(self, self.dataset('val'), self.batch_size, self.weights)}

    def predict(self, apply, inputs, output):
        """Says which of its page's texts each panel of one page finds, and writes embeddings.

        `inputs` is a picture with its JSON beside it (`page.jpg`, `page.json`).
        """
        page = self.splits['val'].with_page(inputs)
        example = page.collate([page.example(0, np.random.default_rng(0), False)], 0)
        batch = {**example, 'mask': np.ones(1, bool), 'row': np.zeros(1, np.int32)}
        found = {
            name: np.asarray(x[0])
            for name, x in jax.jit(self.encode)(apply.variables, batch).items()
        }
        output.mkdir(parents=True, exist_ok=True)
        count, texts = int(example['panels'].sum()), page.record(0)['texts']
        np.save(output / 'embeddings.npy', found['fused'][:count])
        told = [i for i in range(count) if example['modality'][0, i, 1]]
        unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)
        logits = unit(found['vision'][:count]) @ unit(found['text'][told]).T / self.temperature
        odds = np.exp(logits - logits.max(-1, keepdims=True, initial=-np.inf))
        odds /= np.maximum(odds.sum(-1, keepdims=True), 1e-30)
        lines = [f'{page.record(0)["canonical_id"]}: {count} panels, {len(told)} with text']
        for panel in range(count if told else 0):
            best = told[int(np.argmax(odds[panel]))]
            own = 'its own' if best == panel else f"panel {best + 1}'s"
            lines.append(f'panel {panel + 1} finds {own} ({odds[panel].max():.2f}): {texts[best]}')
        return '\n'.join([*lines, f'embeddings: {output / "embeddings.npy"}'])

    def embed(self, apply, output):
        """Writes embeddings.npy [pages, panels, features], mask.npy, index.jsonl, page by page."""
        splits = tuple(self.splits.values())
        output.mkdir(parents=True, exist_ok=True)
        total, panels = sum(len(split) for split in splits), splits[0].prepared.max_panels
        new = lambda name, shape, kind: np.lib.format.open_memmap(
            output / name, 'w+', dtype=kind, shape=shape
        )
        embeddings = new('embeddings.npy', (total, panels, self.model.features), np.float32)
        mask = new('mask.npy', (total, panels), bool)
        at = 0
        with (output / 'index.jsonl').open('w') as index:
            for split in splits:
                for fused, batch in apply('fused', split, self.batch_size):
                    rows, width = slice(at, at + len(fused)), fused.shape[1]
                    embeddings[rows, :width], mask[rows, :width] = fused, batch['panels']
                    for row in batch['row']:
                        page = {'row': at, 'split': split.split}
                        page['canonical_id'] = split.record(int(row))['canonical_id']
                        index.write(json.dumps(page) + '\n')
                        at += 1
        embeddings.flush()
        mask.flush()
        return f'{total} pages of at most {panels} panels: {output / "embeddings.npy"}'


def _pages(config, assets):
    """Prepares the pages and opens both splits; the tokenizer comes from the run where it has one.

    Returns ({split: ComicPages}, tokenizer).
    """
    spec = config.data
    prepared = comic.prepare_pages(
        spec.root,
        prepare.cache_dir(spec.cache),
        seed=config.seed,
        synthetic_sizes=spec.built_in.to_dict(),
        max_panels=spec.max_panels,
        max_fault_share=spec.max_fault_share,
        max_pixels=spec.max_pixels,
        wait=jax.process_index() > 0,
    )
    options = dict(
        image_size=spec.image_size,
        max_tokens=spec.max_tokens,
        buckets=tuple(spec.buckets),
        use_composition=spec.use_composition,
        hidden_tokens=spec.hidden_tokens,
        hidden_texts=spec.hidden_texts,
        hidden_places=spec.hidden_places,
        augmentation=images.Augmentation(**spec.augmentation.to_dict()),
    )
    splits = {name: comic.ComicPages(prepared, name, **options) for name in ('train', 'val')}
    if assets is not None:
        tokenizer = tokenizers.load_tokenizer(assets)
    elif config.model.pretrained.bert:
        tokenizer = tokenizers.load_tokenizer(config.model.pretrained.bert)
    else:
        tokenizer = tokenizers.train_tokenizer(splits['train'].texts(), spec.vocabulary)
    spec.ignore('vocabulary')
    return {name: split.with_tokenizer(tokenizer) for name, split in splits.items()}, tokenizer


def _model(config, vocabulary: int):
    """Builds the model and the {part: folder} of its pretrained weights."""
    spec = config.model
    used = (*BACKBONES[spec.visual_backbone], 'bert')
    spec.ignore('siglip', 'resnet')  # the backbone that is not chosen has no reader
    spec.pretrained.ignore('siglip', 'resnet', 'bert')
    dtype = jnp.dtype(config.precision)
    folders, modules = {}, {'siglip': None, 'resnet': None}
    own = {
        'siglip': {'image_size': config.data.image_size},
        'bert': {'vocabulary': vocabulary},
        'resnet': {},
    }
    for part, make in (('siglip', ViT), ('resnet', ResNet), ('bert', Bert)):
        if part not in used:
            continue
        fields = {**spec[part].to_dict(), **own[part]}
        folder = spec.pretrained[part]
        if folder:
            folders[part] = folder
            fields |= FAMILIES[part].fields(folder)
            fields |= {'image_size': config.data.image_size} if part == 'siglip' else {}
        modules[part] = make(**fields, dtype=dtype)
    heads = spec.heads.to_dict()
    model = ComicModel(**modules, **heads, visual_fusion=spec.visual_fusion, dtype=dtype)
    return model, folders


def _cosine(outputs, pairs):
    """Mean cosine of a panel's picture and its own text; collapse shows here first."""
    unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-9)
    cosine = jnp.sum(unit(outputs['vision']) * unit(outputs['text']), -1).reshape(-1)
    total = jnp.sum(jnp.where(pairs, cosine, 0.0))
    return jax.lax.stop_gradient(total / jnp.maximum(pairs.sum(), 1))
