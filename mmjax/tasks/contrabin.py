"""ContraBin: embeddings of binary code, anchored by source and comment, in a curriculum."""

import functools
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mmjax.data import code
from mmjax.data.dataset import DataError
from mmjax.evals import gallery
from mmjax.losses import contrastive, interpolation
from mmjax.losses.term import Term
from mmjax.models import contrabin
from mmjax.models.bert import Bert
from mmjax.pretrained import bert as bert_weights
from mmjax.pretrained import files
from mmjax.task import Kept, Task, final_weights, gather
from mmjax.tasks import contrabin_data
from mmjax.tasks.contrabin_scores import CodeScores

LOSSES = ('anchor', 'source_binary', 'comment_binary', 'intermediate')
INTERPOLATIONS = ('naive', 'linear', 'nonlinear')
SUFFIXES = {'.c': 'source', '.h': 'source', '.s': 'binary', '.asm': 'binary', '.ll': 'binary'}


class Recipe(Task):
    """The task of `configs/contrabin.py`.

    Groups of parameters: `anchor` (the encoder of source and comment) and `heads` (theirs),
    `encoder` and `binary_head` (of binaries), and the two interpolations `linear` and `nonlinear`.
    A stage's option `interpolation` says which acts; a part whose group has rate 0 runs as in
    evaluation.

    Losses: `anchor` (InfoNCE of source and comment), `source_binary` and `comment_binary` (the
    primary ones), `intermediate` (the interpolation against the binary; none in a naive stage).
    """

    def __init__(self, config, assets=None):
        self.splits, self.compiled = contrabin_data.open_splits(config)
        self.tokenizers = contrabin_data.choose_tokenizers(config, assets, self.splits['train'])
        self.lengths = {
            'source': config.data.max_source,
            'comment': config.data.max_comment,
            'binary': config.data.max_binary,
        }
        self.splits = {
            name: split.with_tokens(self.tokenizers, self.lengths)
            for name, split in self.splits.items()
        }
        self.folders = config.model.pretrained.to_dict()
        self.model = _model(config, self.tokenizers, self.lengths)
        losses = config.losses
        self.temperature, self.softness = losses.temperature, losses.softness
        self.normalize = losses.normalize
        self.chunk = losses.chunk if losses.chunk == 'auto' else int(losses.chunk)
        weights = config.loss_weights.to_dict()
        for name in weights:
            if name not in LOSSES:
                raise DataError(f"loss_weights names '{name}'; there are {', '.join(LOSSES)}")
        for name in config.stages:
            options = config.stage[name].to_dict().get('options', {})
            chosen = options.pop('interpolation', 'naive')
            options.pop('keep_anchor', None)
            for key in options:
                known = 'interpolation, keep_anchor'
                raise DataError(f'unknown key stage.{name}.options.{key}; known: {known}')
            if chosen not in INTERPOLATIONS:
                known = ', '.join(INTERPOLATIONS)
                raise DataError(
                    f"stage.{name}.options.interpolation '{chosen}' is not one of {known}"
                )
        self.weights = final_weights(
            {name: w for name, w in weights.items() if name not in ('anchor', 'intermediate')}
        )
        self.batch_size, self.pool = config.batch_size, config.evaluate_pool
        if self.pool < 2:
            raise DataError(f'evaluate_pool={self.pool}: a query chooses among 2 functions or more')

    def dataset(self, split):
        return self.splits[split]

    def rules(self):
        return (
            ('anchor', 'anchor/.*'), ('heads', '(source|comment)_head/.*'),
            # Groups apart: what gets no gradient in a stage must not age Adam's count of the rest.
            ('encoder', 'binary/.*'), ('binary_head', 'binary_head/.*'),
            ('linear', 'interpolation_linear/.*'), ('nonlinear', 'interpolation_nonlinear/.*'),
        )  # fmt: skip

    def save_assets(self, workdir):
        contrabin_data.save_tokenizers(workdir, self.tokenizers)

    # Model -----------------------------------------------------------------------------------

    def init(self, key, batch):
        inputs = [batch[name] for t in ('source', 'comment', 'binary') for name in (t, f'{t}_mask')]
        return self.model.init({'params': key, 'dropout': key}, *inputs)

    def pretrained(self, variables):
        params = dict(variables['params'])
        for side, folder in self.folders.items():
            if folder:
                loaded, _ = bert_weights.load(folder)
                params[side] = files.graft(params[side], loaded, folder)
        return {**variables, 'params': params} if any(self.folders.values()) else variables

    def forward(self, variables, batch, stage, *, train, key):
        groups = 'anchor', 'heads', 'encoder', 'binary_head'
        live = {name: train and stage.trains(name) for name in groups}
        kind = stage.option('interpolation', 'naive')
        live['interpolation'] = train and stage.trains(kind)
        needed = tuple(name for name in LOSSES if name in stage.losses)
        outputs = self._embed(variables, batch, key, kind, live, needed)
        return outputs, {}

    def _embed(self, variables, batch, key, kind, live, needed):
        apply = lambda method, *args: self.model.apply(
            variables, *args, method=method, rngs={'dropout': key}
        )

        def embedded(text, group, head):
            if f'kept_{text}' in batch:
                return apply('project', batch[f'kept_{text}'], text, live[head])
            tokens = batch[text], batch[f'{text}_mask']
            hidden = apply(f'encode_{text}', *tokens, live[group])
            # A frozen encoder is not run again where rows are rematerialised.
            hidden = hidden if live[group] else checkpoint_name(hidden, 'frozen')
            return apply('project', hidden, text, live[head])

        out = {text: embedded(text, 'anchor', 'heads') for text in ('source', 'comment')}
        if set(needed) - {'anchor'}:
            out['binary'] = embedded('binary', 'encoder', 'binary_head')
        if kind != 'naive' and 'intermediate' in needed:
            pair = out['source'], out['comment']
            out['interpolated'], weight = apply('interpolated', *pair, kind, live['interpolation'])
            out['lambda'] = weight.mean(-1)
        return out

    def keep(self, stage):
        if stage.trains('anchor') or not stage.option('keep_anchor', False):
            return None
        rows, place = self.splits['train'].pairs()
        return Kept('anchored', self.splits['train'].subset(rows), place)

    def anchored(self, variables, batch):
        """Returns what the anchor makes of source and comment: float32 [batch, width] each."""
        apply = functools.partial(self.model.apply, variables)
        read = lambda text: apply(
            batch[text], batch[f'{text}_mask'], False, method=f'encode_{text}'
        )
        return {text: read(text) for text in ('source', 'comment')}

    def terms(self, variables, outputs, batch, stage):
        both = batch['mask'] & batch['has_comment']
        terms = self._terms(outputs, batch, stage.losses)
        if 'interpolated' in outputs:
            terms |= _spread(outputs['lambda'], both)
        return terms

    def _terms(self, outputs, batch, losses):
        mask, both = batch['mask'], batch['mask'] & batch['has_comment']
        shared = {'temperature': self.temperature, 'chunk': self.chunk}
        primary = dict(shared, softness=self.softness, normalize=self.normalize)
        terms = {}
        if 'anchor' in losses:
            terms['anchor'] = contrastive.infonce(
                outputs['source'], outputs['comment'], both, labels=batch['told'], **shared
            )
        for text, rows in (('source', mask), ('comment', both)):
            if f'{text}_binary' in losses:
                terms[f'{text}_binary'] = interpolation.primary(
                    outputs[text], outputs['binary'], rows, **primary
                )
        if 'intermediate' in losses:
            terms['intermediate'] = Term(jnp.float32(0), jnp.float32(0))
            if 'interpolated' in outputs:
                terms['intermediate'] = contrastive.infonce(
                    outputs['interpolated'], outputs['binary'], both, **shared
                )
        return terms

    def every_term(self, batch) -> dict:
        """Returns the terms of encoded rows (outputs of `encode`), of both interpolations."""
        terms = self._terms(batch, batch, ('anchor', 'source_binary', 'comment_binary'))
        for kind in ('linear', 'nonlinear'):
            one = batch | {'interpolated': batch[f'interpolated_{kind}']}
            terms[f'intermediate_{kind}'] = self._terms(one, one, ('intermediate',))['intermediate']
            found = _spread(batch[f'lambda_{kind}'], batch['mask'] & batch['has_comment'])
            terms |= {f'{name}_{kind}': value for name, value in found.items()}
        return terms

    # Evaluation ------------------------------------------------------------------------------

    def encode(self, variables, batch):
        """Embeds all three texts and both interpolations.

        Returns float32 {'source', 'comment', 'binary', 'interpolated_<kind>'} [batch, features], of
        length 1 where the losses normalise, and 'lambda_<kind>' [batch], for linear and nonlinear.
        """
        groups = 'anchor', 'heads', 'encoder', 'binary_head', 'interpolation'
        still = dict.fromkeys(groups, False)
        out = {}
        for kind in INTERPOLATIONS[1:]:
            found = self._embed(variables, batch, jax.random.key(0), kind, still, LOSSES)
            out |= {name: found.pop(name) for name in ('source', 'comment', 'binary')}
            out |= {f'{name}_{kind}': value for name, value in found.items()}
        return {name: _unit(x) if self.normalize and x.ndim > 1 else x for name, x in out.items()}

    def embed_binary(self, variables, batch):
        """Embeds binaries only, as `encode` does: float32 [batch, features]."""
        return self._alone('binary', variables, batch)

    def _alone(self, text, variables, batch):
        apply = functools.partial(self.model.apply, variables)
        hidden = apply(batch[text], batch[f'{text}_mask'], False, method=f'encode_{text}')
        found = apply(hidden, text, False, method='project')
        return _unit(found) if self.normalize else found

    def evaluators(self):
        options = {'batch_size': self.batch_size, 'pool': self.pool}
        return {
            name: CodeScores(self, self.splits[name], self.splits['train'], **options)
            for name in ('val', 'test')
            if name in self.splits
        }

    def predict(self, apply, inputs, output):
        """Names the ten functions nearest to a listing, a C file (by its suffix) or a sentence."""
        path = pathlib.Path(inputs)
        kind = SUFFIXES.get(path.suffix.lower(), 'comment')
        text = inputs
        if os.path.isfile(inputs):  # Path.is_file raises where a sentence is too long for a name
            text = path.read_text('utf-8', errors='replace')
        elif kind != 'comment':
            raise DataError(f'{inputs} does not exist')
        if not text.strip():
            raise DataError(f"--input='{inputs}' holds no text")
        told = [code.as_read(kind, text)]
        tokens, mask = self.tokenizers[kind].encode(told, self.lengths[kind])
        batch = {kind: tokens, f'{kind}_mask': mask}
        alone = jax.jit(functools.partial(self._alone, kind))
        found = np.asarray(alone(apply.variables, batch))
        split = self.splits['test' if 'test' in self.splits else 'val']
        asked = split.subset(split.one_each())
        other = 'source' if kind == 'binary' else 'binary'
        encoded, _ = gather(apply, 'encode', asked, self.batch_size)
        (cosines,), (nearest,) = gallery.search(found, encoded[other], 10)
        lines, hits = [f'nearest to this {kind}, by {other}, in split {split.split}:'], []
        for place, (row, cosine) in enumerate(zip(nearest, cosines, strict=True), start=1):
            record = asked.record(int(row))
            hits.append({'name': record['name'], 'path': record['path'],
                         'comment': record['comment'], 'cosine': float(cosine)})  # fmt: skip
            told = ' '.join(record['comment'].split())
            lines.append(f'{place:2d}  {cosine:.3f}  {record["name"]}  {told:.70}')
        output = pathlib.Path(output)
        output.mkdir(parents=True, exist_ok=True)
        (output / 'nearest.json').write_text(
            json.dumps({'query': inputs, 'nearest': hits}, indent=1)
        )
        return '\n'.join(lines)

    def embed(self, apply, output):
        """Writes embeddings.npz (source, comment, binary: [rows, features]) and index.jsonl."""
        output.mkdir(parents=True, exist_ok=True)
        rows, at = {name: [] for name in ('source', 'comment', 'binary')}, 0
        with (output / 'index.jsonl').open('w') as index:
            for split in self.splits.values():
                for outputs, batch in apply('encode', split, self.batch_size):
                    for name, parts in rows.items():
                        parts.append(outputs[name])
                    for row in batch['row']:
                        record = split.record(int(row))
                        entry = {'row': at, 'split': split.split, 'opt_level': record['opt_level']}
                        entry |= {key: record[key] for key in ('name', 'path', 'label')}
                        index.write(json.dumps(entry) + '\n')
                        at += 1
        arrays = {name: np.concatenate(parts) for name, parts in rows.items()}
        with (output / 'embeddings.npz').open('wb') as file:
            np.savez(file, **arrays)
        with (output / 'embeddings.npy').open('wb') as file:
            np.save(file, arrays['binary'])
        return f'{at} binaries with source and comment: {output / "embeddings.npz"}'

    def prepare(self, output):
        """Copies the rows compiled from C files, and their report, to `output`."""
        if not self.compiled:
            return ''
        folder, told = self.compiled
        output = pathlib.Path(output)
        output.mkdir(parents=True, exist_ok=True)
        for path in sorted(pathlib.Path(folder).iterdir()):
            shutil.copy(path, output / path.name)
        return f'{told}\n\nwritten: {output}'


def _model(config, tokenizers, lengths):
    spec = config.model
    sides = {}
    for side, text in (('anchor', 'source'), ('binary', 'binary')):
        fields, folder = spec[side].to_dict(), spec.pretrained[side]
        fields |= {'vocabulary': tokenizers[text].size}
        longest = lengths['binary']
        if side == 'anchor':
            longest = max(lengths['source'], lengths['comment'])
        fields['max_length'] = longest + fields['position_offset']
        if folder:
            own = {key: fields[key] for key in ('dropout',)}
            found = bert_weights.fields(folder)
            if found['vocabulary'] < fields['vocabulary']:
                raise DataError(
                    f'{folder}: the encoder has vocabulary {found["vocabulary"]}, the tokenizer '
                    f'{fields["vocabulary"]}'
                )
            room = found['max_length'] - found.get('position_offset', 0)
            if room < longest:
                raise DataError(
                    f'{folder}: the encoder has room for {room} tokens, data.max_* need {longest}'
                )
            fields = {**fields, **found, **own}
        sides[side] = fields
    dtype = jnp.dtype(config.precision)
    return contrabin.ContraBin(
        **{side: Bert(**fields, dtype=dtype) for side, fields in sides.items()},
        features=spec.features, head=spec.head, pooling=spec.pooling, dropout=spec.dropout,
        dtype=dtype,
    )  # fmt: skip


def _spread(weight, mask) -> dict:
    """Returns mean and standard deviation of λ [batch] over the rows of `mask`."""
    weight = jax.lax.stop_gradient(weight)
    count = jnp.maximum(mask.sum(), 1)
    mean = jnp.where(mask, weight, 0).sum() / count
    square = jnp.where(mask, (weight - mean) ** 2, 0).sum() / count
    return {'lambda_mean': mean, 'lambda_spread': jnp.sqrt(square)}


def _unit(x):
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-9)
