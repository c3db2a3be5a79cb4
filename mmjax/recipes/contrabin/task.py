"""ContraBin: embeddings of binary code, anchored by source and comment, in a curriculum."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmjax.engine.task import Kept, Task, final_weights
from mmjax.losses import contrastive, interpolation
from mmjax.losses.term import Term
from mmjax.pretrained import bert as bert_weights
from mmjax.pretrained import files
from mmjax.recipes.contrabin import output as contrabin_output
from mmjax.recipes.contrabin import splits as contrabin_data
from mmjax.recipes.contrabin.assembly import INTERPOLATIONS, LOSSES, build_model, check, chunk_of
from mmjax.recipes.contrabin.scores import CodeScores


class ContraBinTask(Task):
    """The task of `configs/contrabin.py`.

    Groups of parameters: `anchor` (the encoder of source and comment) and `heads` (theirs),
    `encoder` and `binary_head` (of binaries), and the two interpolations `linear` and `nonlinear`.
    A stage's option `interpolation` says which acts; a part whose group has rate 0 runs as in
    evaluation.

    Losses: `anchor` (InfoNCE of source and comment), `source_binary` and `comment_binary` (the
    primary ones), `intermediate` (the interpolation against the binary; none in a naive stage).

    With weights in `model.pretrained.anchor`, a stage `anchor` before the others trains these on;
    `--config.stages="('naive','linear','nonlinear')"` leaves them as they are.
    """

    def __init__(self, config, assets=None):
        check(config)
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
        # Over several devices packed tokens would be computed by each, all of them.
        pack = config.model.pack and jax.device_count() == 1
        rows = config.batch_size // config.accumulation
        self.rooms = self.splits['train'].packed_lengths(rows) if pack else {}
        self.folders = config.model.pretrained.to_dict()
        self.model = build_model(config, self.tokenizers, self.lengths)
        losses = config.losses
        self.temperature, self.softness = losses.temperature, losses.softness
        self.normalize = losses.normalize
        self.chunk = chunk_of(config)
        weights = config.loss_weights.to_dict()
        self.weights = final_weights(
            {name: w for name, w in weights.items() if name not in ('anchor', 'intermediate')}
        )
        self.batch_size, self.pool = config.batch_size, config.evaluate_pool

    def dataset(self, split):
        return self.splits[split]

    def rules(self):
        return (
            ('anchor', 'anchor/.*'),
            ('heads', '(source|comment)_head/.*'),
            # Groups apart: what gets no gradient in a stage must not age Adam's count of the rest.
            ('encoder', 'binary/.*'),
            ('binary_head', 'binary_head/.*'),
            ('linear', 'interpolation_linear/.*'),
            ('nonlinear', 'interpolation_nonlinear/.*'),
        )

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
        outputs = self._embed(variables, batch, key, kind, live, needed, self.rooms)
        return outputs, {}

    def _embed(self, variables, batch, key, kind, live, needed, rooms):
        apply = lambda method, *args: self.model.apply(
            variables, *args, method=method, rngs={'dropout': key}
        )

        def embedded(text, group, head):
            if f'kept_{text}' in batch:
                return apply('project', batch[f'kept_{text}'], text, live[head])
            tokens = batch[text], batch[f'{text}_mask']
            hidden = apply(f'encode_{text}', *tokens, live[group], rooms.get(text))
            # A frozen encoder is not run again where rows are rematerialised.
            hidden = hidden if live[group] else checkpoint_name(hidden, 'frozen')
            return apply('project', hidden, text, live[head])

        out = {text: embedded(text, 'anchor', 'heads') for text in ('source', 'comment')}
        if set(needed) - {'anchor'}:
            out['binary'] = embedded('binary', 'encoder', 'binary_head')
        if kind != 'naive' and 'intermediate' in needed:
            pair = out['source'], out['comment']
            out['interpolated'], weight = apply('interpolated', *pair, kind, live['interpolation'])
            # By row, so that mean and spread over rows and coordinates follow from them.
            out['lambda'], out['lambda_variance'] = weight.mean(-1), weight.var(-1)
        return out

    def keep(self, stage):
        if stage.trains('anchor') or not stage.option('keep_anchor', False):
            return None
        rows, place = self.splits['train'].pairs()
        return Kept('anchored', self.splits['train'].subset(rows), place)

    def anchored(self, variables, batch):
        """Returns what the anchor makes of source and comment: float32 [batch, width] each."""
        return {text: self._read(text, variables, batch) for text in ('source', 'comment')}

    def _read(self, text, variables, batch):
        tokens = batch[text], batch[f'{text}_mask']
        room = self.rooms.get(text)
        return self.model.apply(variables, *tokens, False, room, method=f'encode_{text}')

    def terms(self, variables, outputs, batch, stage):
        both = batch['mask'] & batch['has_comment']
        terms = self._terms(outputs, batch, stage.losses)
        if 'interpolated' in outputs:
            terms |= _spread(outputs['lambda'], outputs['lambda_variance'], both)
        return terms

    def _terms(self, outputs, batch, losses):
        mask, both = batch['mask'], batch['mask'] & batch['has_comment']
        shared = {'temperature': self.temperature, 'chunk': self.chunk}
        primary = dict(shared, softness=self.softness, normalize=self.normalize)
        terms = {}
        if 'anchor' in losses:
            terms['anchor'] = contrastive.infonce(
                outputs['source'], outputs['comment'], both, labels=batch['comment_id'], **shared
            )
        # Functions of one comment are no wrong answers to it; of one source there is one a batch.
        for text, rows, labels in (('source', mask, None), ('comment', both, batch['comment_id'])):
            if f'{text}_binary' in losses:
                terms[f'{text}_binary'] = interpolation.primary(
                    outputs[text], outputs['binary'], rows, labels=labels, **primary
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
            weight = batch[f'lambda_{kind}'], batch[f'lambda_variance_{kind}']
            found = _spread(*weight, batch['mask'] & batch['has_comment'])
            terms |= {f'{name}_{kind}': value for name, value in found.items()}
        return terms

    # Evaluation ------------------------------------------------------------------------------

    def encode(self, variables, batch):
        """Embeds all three texts and both interpolations.

        Returns float32 {'source', 'comment', 'binary', 'interpolated_<kind>'} [batch, features], of
        length 1 where the losses normalise, and 'lambda_<kind>' and 'lambda_variance_<kind>'
        [batch], over a row's coordinates, for linear and nonlinear.
        """
        groups = 'anchor', 'heads', 'encoder', 'binary_head', 'interpolation'
        still = dict.fromkeys(groups, False)
        out = {}
        for kind in INTERPOLATIONS[1:]:
            found = self._embed(variables, batch, jax.random.key(0), kind, still, LOSSES, {})
            out |= {name: found.pop(name) for name in ('source', 'comment', 'binary')}
            out |= {f'{name}_{kind}': value for name, value in found.items()}
        return {name: _unit(x) if self.normalize and x.ndim > 1 else x for name, x in out.items()}

    def embed_binary(self, variables, batch):
        """Embeds binaries only, as `encode` does: float32 [batch, features]."""
        return self.embed_text('binary', variables, batch)

    def embed_text(self, text, variables, batch):
        """Embeds one of 'source', 'comment', 'binary', as `encode`: float32 [batch, features]."""
        hidden = self._read(text, variables, batch)
        found = self.model.apply(variables, hidden, text, False, method='project')
        return _unit(found) if self.normalize else found

    def evaluators(self):
        options = {'batch_size': self.batch_size, 'pool': self.pool}
        return {
            name: CodeScores(self, self.splits[name], self.splits['train'], **options)
            for name in ('val', 'test')
            if name in self.splits
        }

    def predict(self, apply, inputs, output):
        return contrabin_output.predict(self, apply, inputs, output)

    def embed(self, apply, output):
        return contrabin_output.embed(self, apply, output)

    def prepare(self, output):
        return contrabin_output.copy_rows(self.compiled, output) if self.compiled else ''


def _spread(means, variances, mask) -> dict:
    """Returns mean and standard deviation of λ over the rows of `mask` and their coordinates.

    means, variances: float32 [batch], of a row's λ over its coordinates.
    """
    means, variances = jax.lax.stop_gradient((means, variances))
    count = jnp.maximum(mask.sum(), 1)
    mean = jnp.where(mask, means, 0).sum() / count
    square = jnp.where(mask, variances + (means - mean) ** 2, 0).sum() / count
    return {'lambda_mean': mean, 'lambda_spread': jnp.sqrt(square)}


def _unit(x):
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-9)
