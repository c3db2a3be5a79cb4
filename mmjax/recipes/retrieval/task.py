"""CLIP fine-tuned for retrieval: an image, or a text, finds the images of its item."""

import dataclasses
import json
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors.numpy import save

from mmjax.data import augment, clip_tokenizer, prepare, tokenizers
from mmjax.engine.outputs import EmbeddingWriter
from mmjax.engine.task import Task, gather, tower_output
from mmjax.errors import UserError
from mmjax.losses import contrastive
from mmjax.losses.term import Term
from mmjax.pretrained import clip as clip_weights
from mmjax.pretrained import files
from mmjax.recipes.retrieval import data as retrieval
from mmjax.recipes.retrieval import folder, model, prompts
from mmjax.recipes.retrieval.config import Config, Data
from mmjax.recipes.retrieval.scores import VERDICTS, ItemScores, QueryGallery, write_nearest

DESCRIPTIONS = 'descriptions.json'
PROMPTS = 'prompts.json'
IMAGES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff')


class RetrievalTask(Task):
    """The task of `configs/clip_retrieval.py`.

    Groups of parameters: `vision` and `text` (the towers), `temperature` (the logit scale; with
    the sigmoid loss, the logit bias too).

    Losses: `infonce` (image ↔ text of a row), `supcon` (images and texts together, labels are
    items), `sigmoid` (a yes-or-no question per pair of image and text).
    """

    Config = Config
    verdicts = VERDICTS
    towers = model.TOWERS

    def __init__(self, config: Config, assets: epath.Path | None = None):
        self.config = config
        spec = config.data
        raw, self.source = _read_prompts(spec)
        splits = _open_splits(spec)
        train = splits['train']
        if raw is None:  # built-in items come with descriptions
            raw = _from_descriptions(train.prepared.descriptions, spec)
        self.raw_prompts = raw
        items = sorted({train.items[identity] for identity in train.index['identity']})
        texts = [raw[item] for item in items if item in raw]
        self.tokenizer = _tokenizer(config, assets, texts)
        self.count_tokens = clip_tokenizer.token_counter(self.tokenizer)
        if spec.prompt_policy == 'safe':
            self.prompts, report = self._token_safe()
            cut = {kind: len(report[kind]) for kind in clip_tokenizer.CUTS if kind != 'kept'}
        else:
            self.prompts = raw
            cut = {'truncated': sum(self.count_tokens(t) > spec.max_tokens for t in raw.values())}
        longest = max(map(self.count_tokens, self.prompts.values()), default=2)
        length = min(spec.max_tokens, math.ceil(longest / 8) * 8)
        self.splits = {
            name: split.with_prompts(self.prompts, self.tokenizer, length)
            for name, split in splits.items()
        }
        self.splits['train'].skipped |= {f'prompts_{kind}': n for kind, n in cut.items() if n}
        self.model = model.build(config, self.tokenizer.size)

    def _token_safe(self):
        spec = self.config.data
        fallback = prompts.noun_alone(spec.noun, spec.template_plain)
        return prompts.token_safe(
            self.raw_prompts, self.count_tokens, spec.max_tokens, fallback=fallback
        )

    def dataset(self, split):
        return self.splits[split]

    def rules(self):
        return (('vision', 'vision/.*'), ('text', 'text/.*'), ('temperature', 'logit_.*'))

    def save_assets(self, workdir):
        self.tokenizer.save(workdir)
        prompts.write(workdir / PROMPTS, self.prompts)

    # Model -----------------------------------------------------------------------------------

    def init(self, key, batch):
        variables = self.model.init(key, batch['images'], batch['tokens'], batch['token_mask'])
        if any('sigmoid' in weights for _, weights in self.config.all_loss_weights()):
            bias = {'logit_bias': jnp.float32(self.config.losses.bias)}  # CLIP itself has none
            variables = {**variables, 'params': {**variables['params'], **bias}}
        return variables

    def pretrained(self, variables):
        source = self.config.model.pretrained
        if not source:
            return variables
        params, stats = clip_weights.load(source, image_size=self.config.data.image_size)
        fresh = dict(variables['params'])
        bias = {key: fresh.pop(key) for key in ('logit_bias',) if key in fresh}
        params = files.graft(fresh, params, source) | bias
        if self.config.losses.temperature:  # else the published one stays
            params['logit_scale'] = np.float32(-math.log(self.config.losses.temperature))
        out = {**variables, 'params': params}
        if stats:
            out['batch_stats'] = files.graft(variables['batch_stats'], stats, source)
        return out

    def forward(self, variables, batch, stage, *, train, key):
        image, changed = self.model.apply(
            variables,
            batch['images'],
            batch['mask'],
            train['vision'],
            method='encode_image',
            mutable=['batch_stats'],
        )
        text = self.model.apply(
            variables, batch['tokens'], batch['token_mask'], train['text'], method='encode_text'
        )
        outputs = {
            'image': tower_output(image, train['vision']),
            'text': tower_output(text, train['text']),
        }
        return outputs, changed.get('batch_stats', {})

    def terms(self, variables, outputs, batch, stage):
        """Returns the losses of the stage with their values at collapse and floors, and more."""
        image = outputs['image']
        text = outputs['text']
        identity = batch['identity']
        mask = batch['mask']
        options = self.config.losses
        scale = self.model.apply(variables, method='scale')
        shared = {'temperature': 1 / scale, 'chunk': options.chunk}
        labels = identity if options.mask_same_item else None
        alike = _same(identity, mask) if options.mask_same_item else 1
        negatives = mask * (mask.sum() - alike)  # int [batch]
        rows = jnp.maximum(mask.sum(), 1)
        cosine = jnp.sum(_unit(image) * _unit(text), -1)
        terms = {
            'image_text_cosine': jnp.where(mask, cosine, 0).sum() / rows,
            'temperature': 1 / scale,
        }
        if 'supcon' in stage.losses:
            both = [jnp.concatenate(x) for x in ((image, text), (identity, identity), (mask, mask))]
            terms['supcon'], report = contrastive.supcon(*both, **shared)
            terms |= {f'supcon_{name}': report[name] for name in ('floor', 'collapse')}
        if 'infonce' in stage.losses:
            terms['infonce'] = contrastive.infonce(image, text, mask, labels=labels, **shared)
            collapse = jnp.log1p(negatives.astype(jnp.float32)).sum() / rows
            terms |= {'infonce_floor': 0.0, 'infonce_collapse': collapse}
        if 'sigmoid' in stage.losses:
            bias = variables['params']['logit_bias']
            terms['sigmoid'] = contrastive.sigmoid(
                image, text, mask, scale=scale, bias=bias, labels=labels, chunk=options.chunk
            )
            collapse = negatives.sum() / rows * jax.nn.softplus(scale + bias)
            collapse += jax.nn.softplus(-scale - bias)
            terms |= {'sigmoid_floor': 0.0, 'sigmoid_collapse': collapse}
        fixed = jax.lax.stop_gradient
        return {name: x if isinstance(x, Term) else fixed(x) for name, x in terms.items()}

    # Evaluation ------------------------------------------------------------------------------

    def encode(self, variables, batch):
        """Embeds images and prompts: {'image', 'text'} float32 [batch, features], length 1."""
        return {
            'image': self.embed_images(variables, batch),
            'text': self.embed_texts(variables, batch),
        }

    def embed_images(self, variables, batch):
        """Embeds images: float32 [batch, features], length 1."""
        return _unit(
            self.model.apply(variables, batch['images'], None, False, method='encode_image')
        )

    def embed_texts(self, variables, batch):
        """Embeds prompts: float32 [batch, features], length 1."""
        tokens = batch['tokens'], batch['token_mask']
        return _unit(self.model.apply(variables, *tokens, False, method='encode_text'))

    def evaluators(self):
        batch_size = self.config.batch_size
        out = {'val': ItemScores(self.splits['val'], batch_size)}
        if 'query' in self.splits and 'gallery' in self.splits:
            pair = self.splits['query'], self.splits['gallery']
            out['query_gallery'] = QueryGallery(*pair, batch_size)
        return out

    def predict(self, predict, inputs, output, question=None):
        """Names the ten gallery images nearest to an image (a path) or to a text."""
        gallery = self.splits.get('gallery', self.splits['val'])
        image = None
        if os.path.isfile(inputs):  # never raises, unlike pathlib's, for a long text
            image = gallery.open(pathlib.Path(inputs), inputs)
            pixels = augment.centre_crop(image, gallery.image_size)
            embedding = jax.jit(self.embed_images)(predict.variables, {'images': pixels[None]})
        elif inputs.lower().endswith(IMAGES):
            raise UserError(f'{inputs} does not exist')
        else:
            tokens, mask = self.tokenizer.encode([inputs], self.config.data.max_tokens)
            batch = {'tokens': tokens, 'token_mask': mask}
            embedding = jax.jit(self.embed_texts)(predict.variables, batch)
        embeddings, _ = gather(predict, 'embed_images', gallery, self.config.batch_size)
        return write_nearest(np.asarray(embedding), image, inputs, embeddings, gallery, output)

    def embed(self, predict, output):
        """Writes embeddings.npy [images, features] and index.jsonl, texts.npy and texts.jsonl."""
        splits = self.splits.values()
        items = {split.items[i] for split in splits for i in split.index['identity']}
        seen = set()
        with (
            EmbeddingWriter(output, sum(map(len, splits))) as images,
            EmbeddingWriter(output, len(items), name='texts', index='texts') as texts,
        ):
            for split in splits:
                for outputs, batch in predict('encode', split, self.config.batch_size):
                    records = [split.record(int(row)) for row in batch['row']]
                    entries = [
                        {'split': split.split, 'item_id': r['item'], 'path': r['image_path']}
                        for r in records
                    ]
                    images.add(outputs['image'], entries)
                    for text, record in zip(outputs['text'], records, strict=True):
                        if record['item'] not in seen:
                            seen.add(record['item'])
                            texts.add(text[None], [{'item_id': record['item']}])
        return f'{images.rows} images, {texts.rows} texts: {images.path}'

    def prepare(self, output):
        """Writes prompts, the images of items with two or more, and reports on both."""
        output.mkdir(parents=True, exist_ok=True)
        to_json = lambda name, content: (output / name).write_text(json.dumps(content, indent=1))
        prompts.write(output / 'prompts_raw.json', self.raw_prompts)
        safe, report = self._token_safe()
        prompts.write(output / PROMPTS, safe)
        to_json('prompts_report.json', report)
        tables = [prompts.table(report)]
        if self.config.data.root:
            root = pathlib.Path(self.config.data.root).expanduser()
            table = folder.read_table(root)
            consistency = prompts.consistency(self.source, table, root)
            to_json('consistency.json', consistency)
            to_json('image_paths_clean.json', prompts.keep_pairs(table, 'train'))
            tables.insert(0, prompts.table(consistency))
        return '\n\n'.join([*tables, f'written: {output}'])

    def export(self, variables, output):
        """Writes the model in published form: Hugging Face's, or OpenAI's names for RN50."""
        if getattr(self.model.vision, 'pooling', 'attention') != 'attention':
            return "not CLIP's pooling: there is no published form of this model"
        params = {k: v for k, v in variables['params'].items() if k != 'logit_bias'}
        fields = {name: model.tower_fields(getattr(self.model, name)) for name in self.towers}
        tensors, described = clip_weights.export(params, variables.get('batch_stats', {}), fields)
        target = output / 'clip'
        target.mkdir(parents=True, exist_ok=True)
        (target / 'model.safetensors').write_bytes(save(tensors))
        name = 'open_clip_config.json' if 'model_cfg' in described else 'config.json'
        (target / name).write_text(json.dumps(described, indent=1))
        self.tokenizer.save(target)
        return f'CLIP in published form: {target}'


def _read_prompts(spec: Data):
    """Reads the prompts that the config names, or else those of data.root.

    Returns ({item: prompt}, what the file holds); (None, None) for built-in items.
    """
    path = spec.prompts
    if path is None and spec.root:
        root = pathlib.Path(spec.root).expanduser()
        present = [root / name for name in (PROMPTS, DESCRIPTIONS) if (root / name).is_file()]
        if not present and root.is_dir():
            raise UserError(
                f'{root} holds neither {PROMPTS} nor {DESCRIPTIONS}; data.prompts can name one'
            )
        path = present[0] if present else None
    if path is None:
        return None, None
    path = pathlib.Path(path).expanduser()
    start = path.read_text('utf-8-sig', errors='replace').lstrip()[:1] if path.is_file() else ''
    if start == '[':
        source = prompts.read_descriptions(path, unique=False)
        return _from_descriptions(prompts.read_descriptions(path), spec), source
    raw = prompts.read_prompts(path)
    return raw, raw


def _from_descriptions(descriptions, spec: Data) -> dict[str, str]:
    return prompts.generate(descriptions, spec.template, spec.noun, spec.template_plain)


def _open_splits(spec: Data) -> dict[str, retrieval.ItemImages]:
    """Prepares the items and opens the splits that exist; val may be items of train."""
    names = ['train', 'val', 'query', 'gallery']
    if spec.root:
        named = folder.named_splits(spec.root)
        names = [name for name in names if name == 'train' or name in named]
    if spec.val_items:
        names = [name for name in names if name != 'val']
    elif 'val' not in names:
        folder.open_folder(spec.root, ('train',))  # its own faults come first
        raise UserError(
            f"{spec.root} has no images of split 'val': data.val_items=.1 takes items of train"
        )
    prepared = retrieval.prepare_items(
        spec.root,
        prepare.cache_dir(spec.cache),
        splits=tuple(names),
        seed=spec.seed,
        synthetic_sizes=dataclasses.asdict(spec.built_in),
        max_fault_share=spec.max_fault_share,
        max_pixels=spec.max_pixels,
        wait=jax.process_index() > 0,
    )
    options = {
        'image_size': spec.image_size,
        'augmentation': spec.augmentation,
    }
    splits = {name: retrieval.ItemImages(prepared, name, **options) for name in names}
    if spec.val_items:
        splits |= splits['train'].hold_out(spec.val_items, spec.seed)
    return splits


def _tokenizer(config: Config, assets: epath.Path | None, texts: list[str]):
    """Returns the tokenizer of `assets`, of a folder that the config names, or one of the texts."""
    if assets is not None:
        return tokenizers.load_tokenizer(assets)
    named = config.data.tokenizer or config.model.pretrained
    if named:
        return clip_tokenizer.load_clip_tokenizer(named)
    return clip_tokenizer.train_clip_tokenizer(texts, config.data.vocabulary)


def _unit(x):
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-9)


def _same(identity, mask):
    """Returns how many valid rows have a row's identity, itself included: int [n]."""
    order = jnp.unique(identity, return_inverse=True, size=len(identity))[1].reshape(-1)
    return jax.ops.segment_sum(mask.astype(jnp.int32), order, num_segments=len(identity))[order]
