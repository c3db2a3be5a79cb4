"""CLIP fine-tuned for retrieval: a picture, or a text, finds the pictures of its item."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from safetensors.numpy import save

from mmjax.data import augment, clip_tokenizer
from mmjax.engine.task import Task, final_weights, gather
from mmjax.errors import UserError
from mmjax.losses import contrastive
from mmjax.losses.term import Term
from mmjax.models import clip
from mmjax.pretrained import clip as clip_weights
from mmjax.pretrained import files
from mmjax.recipes.retrieval import folder as retrieval_folder
from mmjax.recipes.retrieval import prompts
from mmjax.recipes.retrieval import splits as retrieval_data
from mmjax.recipes.retrieval.scores import ItemScores, QueryGallery, shown

LOSSES = ('infonce', 'supcon', 'sigmoid')


class RetrievalTask(Task):
    """The task of `configs/clip_retrieval.py`.

    Groups of parameters: `vision`, `text` (the towers) and `temperature` (the logit scale; the
    bias too where the sigmoid loss is used). A tower whose group has rate 0 runs as in evaluation.
    """

    def __init__(self, config, assets=None):
        self.prompts = retrieval_data.Prompts(config.data)
        self.splits = retrieval_data.open_splits(config)
        self.tokenizer = retrieval_data.choose_tokenizer(config, assets, self._texts())
        limit = config.data.max_tokens
        self.prompts.settle(self.tokenizer, limit)
        longest = max(
            map(clip_tokenizer.token_counter(self.tokenizer), self.prompts.final.values())
        )
        length = min(limit, math.ceil(longest / 8) * 8)
        self.splits = {
            name: split.with_prompts(self.prompts.final, self.tokenizer, length)
            for name, split in self.splits.items()
        }
        self.splits['train'].skipped |= self.prompts.cut
        self.model, self.folder = _model(config, self.tokenizer.size, limit)
        losses = config.losses
        self.chunk = losses.chunk if losses.chunk == 'auto' else int(losses.chunk)
        self.mask_same_item, self.bias = losses.mask_same_item, losses.bias
        self.temperature = losses.temperature
        weights = config.loss_weights.to_dict()
        for name in weights:
            if name not in LOSSES:
                raise UserError(f"loss_weights names '{name}'; there are {', '.join(LOSSES)}")
        self.weights = final_weights(weights)
        self.batch_size = config.batch_size
        self.root = config.data.root

    def _texts(self):
        if self.prompts.raw is None:  # built-in items describe themselves
            prepared = self.splits['train'].prepared
            self.prompts.write(prepared.descriptions)
        used = {self.splits['train'].items[i] for i in self.splits['train'].index['identity']}
        return [self.prompts.raw[item] for item in sorted(used) if item in self.prompts.raw]

    def dataset(self, split):
        return self.splits[split]

    def rules(self):
        return (('vision', 'vision/.*'), ('text', 'text/.*'), ('temperature', 'logit_.*'))

    def save_assets(self, workdir):
        self.tokenizer.save(workdir)
        prompts.write(pathlib.Path(workdir) / retrieval_data.PROMPTS, self.prompts.final)

    # Model -----------------------------------------------------------------------------------

    def init(self, key, batch):
        inputs = (batch['images'], batch['tokens'], batch['token_mask'])
        variables = self.model.init({'params': key, 'dropout': key}, *inputs)
        if 'sigmoid' in self.weights:  # CLIP itself has no bias
            bias = {'logit_bias': jnp.float32(self.bias)}
            variables = {**variables, 'params': {**variables['params'], **bias}}
        return variables

    def pretrained(self, variables):
        if not self.folder:
            return variables
        params, stats = clip_weights.load(self.folder, image_size=self.model.vision.image_size)
        fresh = dict(variables['params'])
        own = {key: fresh.pop(key) for key in ('logit_bias',) if key in fresh}
        params = files.graft(fresh, params, self.folder)
        if self.temperature:  # else the published one holds
            params['logit_scale'] = np.float32(-math.log(self.temperature))
        out = {**variables, 'params': {**params, **own}}
        if stats:
            out['batch_stats'] = files.graft(variables['batch_stats'], stats, self.folder)
        return out

    def forward(self, variables, batch, stage, *, train, key):
        live = lambda group: train and stage.trains(group)
        keep = lambda x, group: x if stage.trains(group) else checkpoint_name(x, 'frozen')
        apply = functools.partial(self.model.apply, variables, rngs={'dropout': key})
        image, changed = apply(
            batch['images'],
            batch['mask'],
            live('vision'),
            method='encode_image',
            mutable=['batch_stats'],
        )
        text = apply(batch['tokens'], batch['token_mask'], live('text'), method='encode_text')
        outputs = {'image': keep(image, 'vision'), 'text': keep(text, 'text')}
        return outputs, changed.get('batch_stats', {})

    def terms(self, variables, outputs, batch, stage):
        return self._terms(variables, outputs, batch['identity'], batch['mask'], stage.losses)

    def _terms(self, variables, outputs, identity, mask, losses):
        """Returns the losses named, their collapse values and floors, cosine and temperature."""
        image, text = outputs['image'], outputs['text']
        scale = self.model.apply(variables, method='scale')
        shared = {'temperature': 1 / scale, 'chunk': self.chunk}
        labels = identity if self.mask_same_item else None
        terms, n = {}, mask.sum()
        wrong = mask * (n - _same(identity, mask)) if self.mask_same_item else mask * (n - 1)
        if 'supcon' in losses:
            both = jnp.concatenate([image, text])
            twice = jnp.concatenate([identity, identity]), jnp.concatenate([mask, mask])
            terms['supcon'], report = contrastive.supcon(both, *twice, **shared)
            terms |= {f'supcon_{line}': report[line] for line in ('floor', 'collapse')}
        if 'infonce' in losses:
            terms['infonce'] = contrastive.infonce(image, text, mask, labels=labels, **shared)
            terms['infonce_floor'] = 0.0
            asked = jnp.maximum((wrong > 0).sum(), 1)
            terms['infonce_collapse'] = jnp.log1p(wrong.astype(jnp.float32)).sum() / asked
        if 'sigmoid' in losses:
            if 'logit_bias' not in variables['params']:
                raise ValueError(
                    "a stage's loss_weights names 'sigmoid', config.loss_weights has not"
                )
            bias = variables['params']['logit_bias']
            terms['sigmoid'] = contrastive.sigmoid(
                image, text, mask, scale=scale, bias=bias, labels=labels, chunk=self.chunk
            )
            no = wrong.sum() / jnp.maximum(n, 1) * jax.nn.softplus(scale + bias)
            terms |= {'sigmoid_floor': 0.0, 'sigmoid_collapse': no + jax.nn.softplus(-scale - bias)}
        cosine = jnp.sum(_unit(image) * _unit(text), -1)
        terms['image_text_cosine'] = jnp.where(mask, cosine, 0).sum() / jnp.maximum(n, 1)
        terms['temperature'] = 1 / scale
        still = jax.lax.stop_gradient
        return {name: x if isinstance(x, Term) else still(x) for name, x in terms.items()}

    # Evaluation ------------------------------------------------------------------------------

    def encode(self, variables, batch):
        """Embeds pictures and prompts: {'image', 'text'} float32 [batch, features], length 1."""
        return {
            'image': self.embed_images(variables, batch),
            'text': self.embed_texts(variables, batch),
        }

    def embed_images(self, variables, batch):
        """Embeds pictures only: float32 [batch, features], length 1."""
        apply = functools.partial(self.model.apply, variables, method='encode_image')
        return _unit(apply(batch['images'], None, False))

    def embed_texts(self, variables, batch):
        """Embeds prompts only: float32 [batch, features], length 1."""
        apply = functools.partial(self.model.apply, variables, method='encode_text')
        return _unit(apply(batch['tokens'], batch['token_mask'], False))

    def evaluators(self):
        out = {'val': ItemScores(self, self.splits['val'], self.batch_size, self.weights)}
        if 'query' in self.splits and 'gallery' in self.splits:
            pair = self.splits['query'], self.splits['gallery']
            out['query_gallery'] = QueryGallery(*pair, self.batch_size)
        return out

    def predict(self, apply, inputs, output):
        """Names the ten gallery pictures nearest to a picture (a path) or to a text."""
        gallery = self.splits.get('gallery', self.splits['val'])
        path = pathlib.Path(inputs)
        if path.is_file():
            picture = gallery.open(path, inputs)
            image = augment.centre_crop(picture, gallery.image_size)
            found = jax.jit(self.embed_images)(apply.variables, {'images': image[None]})
        elif path.suffix.lower() in ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff'):
            raise UserError(f'{inputs} does not exist')
        else:
            tokens, mask = self.tokenizer.encode([inputs], self.prompts.limit)
            batch = {'tokens': tokens, 'token_mask': mask}
            found, picture = jax.jit(self.embed_texts)(apply.variables, batch), None
        encoded, _ = gather(apply, 'embed_images', gallery, self.batch_size)
        return shown(np.asarray(found), picture, inputs, encoded, gallery, output)

    def embed(self, apply, output):
        """Writes embeddings.npy [pictures, features] and index.jsonl, texts.npy and texts.jsonl."""
        output.mkdir(parents=True, exist_ok=True)
        splits = tuple(self.splits.values())
        total, at, seen, told = sum(map(len, splits)), 0, set(), []
        rows = None
        with (output / 'index.jsonl').open('w') as index:
            for split in splits:
                for outputs, batch in apply('encode', split, self.batch_size):
                    image = outputs['image']
                    if rows is None:
                        shape = (total, image.shape[1])
                        rows = np.lib.format.open_memmap(
                            output / 'embeddings.npy', 'w+', dtype=np.float32, shape=shape
                        )
                    rows[at : at + len(image)] = image
                    for place, row in enumerate(batch['row']):
                        record = split.record(int(row))
                        entry = {'row': at, 'split': split.split, 'item_id': record['item']}
                        index.write(json.dumps({**entry, 'path': record['image_path']}) + '\n')
                        at += 1
                        if record['item'] not in seen:
                            seen.add(record['item'])
                            told.append((record['item'], outputs['text'][place]))
        rows.flush()
        np.save(output / 'texts.npy', np.stack([text for _, text in told]))
        lines = [json.dumps({'row': i, 'item_id': item}) for i, (item, _) in enumerate(told)]
        (output / 'texts.jsonl').write_text('\n'.join(lines) + '\n')
        return f'{total} pictures, {len(told)} texts: {output / "embeddings.npy"}'

    def prepare(self, output):
        """Writes prompts, the pictures of items with two or more, and reports on both."""
        output = pathlib.Path(output)
        output.mkdir(parents=True, exist_ok=True)
        prompts.write(output / 'prompts_raw.json', self.prompts.raw)
        safe, report = prompts.token_safe(
            self.prompts.raw,
            clip_tokenizer.token_counter(self.tokenizer),
            self.prompts.limit,
            fallback=self.prompts.fallback,
        )
        prompts.write(output / retrieval_data.PROMPTS, safe)
        told = [report.table()]
        (output / 'prompts_report.json').write_text(json.dumps(report.to_json(), indent=1))
        if self.root:
            root = pathlib.Path(self.root).expanduser()
            table = retrieval_folder.read_table(root)
            found = prompts.consistency(self.prompts.source, table, root)
            kept, _ = prompts.keep_pairs(table, split='train')
            (output / 'consistency.json').write_text(json.dumps(found.to_json(), indent=1))
            (output / 'image_paths_clean.json').write_text(json.dumps(kept, indent=1))
            told.insert(0, found.table())
        return '\n\n'.join([*told, f'written: {output}'])

    def export(self, variables, output):
        """Writes the model in published form: Hugging Face's, or OpenAI's names for RN50."""
        if getattr(self.model.vision, 'pooling', 'attention') != 'attention':
            return "not CLIP's pooling: there is no published form of this model"
        params = {k: v for k, v in variables['params'].items() if k != 'logit_bias'}
        fields = {'vision': _fields(self.model.vision), 'text': _fields(self.model.text)}
        tensors, described = clip_weights.export(params, variables.get('batch_stats', {}), fields)
        folder = pathlib.Path(output) / 'clip'
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'model.safetensors').write_bytes(save(tensors))
        name = 'open_clip_config.json' if 'model_cfg' in described else 'config.json'
        (folder / name).write_text(json.dumps(described, indent=1))
        self.tokenizer.save(folder)
        return f'CLIP in published form: {folder}'


def _model(config, vocabulary, length):
    """Builds the model and names the folder of its pretrained weights, if any."""
    spec = config.model
    towers = {'vit': spec.vit.to_dict(), 'rn50': spec.rn50.to_dict()}
    if spec.vision not in towers:
        raise UserError(f"model.vision '{spec.vision}' is not {' or '.join(towers)}")
    fields = {
        'vision': {**towers[spec.vision], 'features': spec.features},
        'text': {
            **spec.text.to_dict(),
            'features': spec.features,
            'vocabulary': vocabulary,
            'max_length': length,
        },
    }
    if spec.pretrained:
        fields = clip_weights.fields(spec.pretrained)
        for key, needed in (('vocabulary', vocabulary), ('max_length', length)):
            if fields['text'][key] < needed:
                raise UserError(
                    f'{spec.pretrained}: the text tower has {key} {fields["text"][key]}, the '
                    f'tokenizer and data.max_tokens need {needed}'
                )
    fields['vision']['image_size'] = config.data.image_size
    model = clip.build(
        **fields, temperature=config.losses.temperature or 0.07, dtype=jnp.dtype(config.precision)
    )
    return model, spec.pretrained


def _fields(module):
    """Returns the fields of a tower that decide what it computes."""
    skip = ('dtype', 'implementation', 'parent', 'name', 'pooling', 'share')
    return {key: getattr(module, key) for key in module.__dataclass_fields__ if key not in skip}


def _unit(x):
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-9)


def _same(identity, mask):
    """Returns how many valid rows have a row's identity, itself included: int [n]."""
    order = jnp.unique(identity, return_inverse=True, size=len(identity))[1].reshape(-1)
    return jax.ops.segment_sum(mask.astype(jnp.int32), order, num_segments=len(identity))[order]
