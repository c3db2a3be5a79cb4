"""Four recipes of very different kinds in a few lines each: the engine must serve them unchanged.

A PK-sampled task with a learnable logit scale, a bucketed CTC task, a task that generates
greedily, and a two-stage task with a thaw and batch statistics.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmjax.engine import config as config_lib
from mmjax.engine.task import Evaluator, Scores, Task, tower_output
from mmjax.losses import contrastive
from mmjax.losses.term import Term
from mmjax.sections import field
from mmjax.testing import Arrays


class Mean(Evaluator):
    """The mean of a per-row score that a method of the task returns."""

    batch_size = 16

    def __init__(self, task, method, metric):
        self.dataset = task.dataset('val')
        self.methods = (method,)
        self.metric = metric

    def run(self, predict, *, final, results=None):
        scores = [out for out, _ in predict(self.methods[0], self.dataset, self.batch_size)]
        return Scores({self.metric: float(np.concatenate(scores).mean())})


@dataclasses.dataclass(frozen=True)
class Model:
    width: int = field(8, 'of the layers', least=1)
    dropout: float = field(0.1, 'of the tower', least=0, below=1)


@dataclasses.dataclass(frozen=True)
class Config(config_lib.Config):
    model: Model = Model()


@dataclasses.dataclass(frozen=True)
class Options:
    cache: bool = field(False, 'compute the outputs of the tower once')
    poisoned: bool = field(False, 'fail without cached outputs')


class PK(Task):
    """Identities in two views, SupCon over both, a learnable clamped logit scale."""

    Config = Config
    towers = {'towers': '[ab]/.*'}

    def __init__(self, config, assets=None):
        rng = np.random.default_rng(0)
        self.identities = rng.normal(size=(12, 8)).astype(np.float32)
        self.width = config.model.width

    def dataset(self, split):
        rng = np.random.default_rng(1)
        label = np.repeat(np.arange(12), 5)
        a, b = (self.identities[label] @ rng.normal(size=(8, 8)) for _ in range(2))
        return Arrays(
            split,
            {'identity': label},
            ('a', 'b'),
            a=a.astype(np.float32),
            b=b.astype(np.float32),
            label=label.astype(np.int32),
        )

    def rules(self):
        return (('scale', 'logit_scale'), ('towers', '.*'))

    def init(self, key, batch):
        k1, k2 = jax.random.split(key)
        tower = lambda k: {'kernel': jax.random.normal(k, (8, self.width)) * 0.3}
        return {'params': {'a': tower(k1), 'b': tower(k2), 'logit_scale': jnp.log(10.0)}}

    def forward(self, variables, batch, stage, *, train, key):
        p = variables['params']
        outputs = {name: batch[name] @ p[name]['kernel'] for name in 'ab'}
        return outputs | {'label': batch['label'], 'mask': batch['mask']}, {}

    def terms(self, variables, outputs, batch, stage):
        temperature = jnp.exp(-jnp.minimum(variables['params']['logit_scale'], jnp.log(100.0)))
        both = jnp.concatenate([outputs['a'], outputs['b']])
        twice = lambda x: jnp.concatenate([x, x])
        term, _ = contrastive.supcon(
            both, twice(outputs['label']), twice(outputs['mask']), temperature=temperature
        )
        return {'supcon': term}

    def distance(self, variables, batch):
        out, _ = self.forward(variables, batch, None, train={}, key=None)
        unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        return jnp.sum(unit(out['a']) * unit(out['b']), -1)

    def evaluators(self):
        return {'val': Mean(self, 'distance', 'cosine')}


class CTC(Task):
    """Sequences of several lengths in two buckets; per-row loss computed in the forward pass."""

    Config = Config
    towers = {'all': '.*'}

    def __init__(self, config, assets=None):
        self.width = config.model.width

    def dataset(self, split):
        rng = np.random.default_rng(split == 'val')
        length = rng.integers(6, 17, 64).astype(np.int32)
        labels = rng.integers(1, 5, (64, 3)).astype(np.int32)
        frames = np.zeros((64, 16, 5), np.float32)
        for i, n in enumerate(length):
            frames[i, np.arange(n), labels[i, np.arange(n) * 3 // n]] = 1
        return _Bucketed(
            split,
            {'length': length},
            ('frames',),
            (8, 16),
            frames=frames,
            length=length,
            labels=labels,
        )

    def rules(self):
        return (('all', '.*'),)

    def init(self, key, batch):
        k1, k2 = jax.random.split(key)
        kernel = lambda key, *shape: {'kernel': 0.3 * jax.random.normal(key, shape)}
        return {'params': {'in': kernel(k1, 5, self.width), 'out': kernel(k2, self.width, 5)}}

    def forward(self, variables, batch, stage, *, train, key):
        p = variables['params']
        logits = nn.relu(batch['frames'] @ p['in']['kernel']) @ p['out']['kernel']
        padded = jnp.arange(logits.shape[1]) >= batch['length'][:, None]
        none = jnp.zeros(batch['labels'].shape)
        loss = optax.ctc_loss(logits, padded.astype(jnp.float32), batch['labels'], none)
        return {'loss': loss, 'mask': batch['mask']}, {}

    def terms(self, variables, outputs, batch, stage):
        return {'ctc': Term(jnp.sum(outputs['loss'] * outputs['mask']), outputs['mask'].sum())}

    def loss(self, variables, batch):
        return self.forward(variables, batch, None, train={}, key=None)[0]['loss']

    def evaluators(self):
        return {'val': Mean(self, 'loss', 'ctc')}


class _Bucketed(Arrays):
    def collate(self, examples, bucket):
        out = super().collate(examples, bucket)
        out['frames'] = out['frames'][:, : bucket or 16]
        return out


class Generate(Task):
    """Counts up from a first token; greedy generation is scored in the evaluation."""

    Config = Config
    towers = {'all': '.*'}

    def __init__(self, config, assets=None):
        self.module = nn.Sequential([nn.Embed(10, config.model.width), nn.Dense(10)])

    def dataset(self, split):
        first = np.arange(40) % 10
        tokens = (first[:, None] + np.arange(6)) % 10
        return Arrays(split, tokens=tokens.astype(np.int32))

    def rules(self):
        return (('all', '.*'),)

    def init(self, key, batch):
        return self.module.init(key, batch['tokens'])

    def forward(self, variables, batch, stage, *, train, key):
        logits = self.module.apply(variables, batch['tokens'][:, :-1])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch['tokens'][:, 1:])
        return {'total': loss.sum(-1) * batch['mask'], 'count': 5.0 * batch['mask']}, {}

    def terms(self, variables, outputs, batch, stage):
        return {'language': Term(outputs['total'].sum(), outputs['count'].sum())}

    def generate(self, variables, batch):
        def next_token(token, _):
            token = jnp.argmax(self.module.apply(variables, token), -1).astype(jnp.int32)
            return token, token

        _, tokens = jax.lax.scan(next_token, batch['tokens'][:, 0], None, length=5)
        return jnp.all(batch['tokens'][:, 1:] == tokens.T, -1).astype(jnp.float32)

    def evaluators(self):
        return {'val': Mean(self, 'generate', 'exact_match')}


class Thaw(Task):
    """A head on a tower with batch statistics and dropout; the tower thaws in the second stage."""

    Config = Config
    towers = {'tower': 'tower/.*', 'norm': 'tower_norm/.*', 'head': 'head/.*'}

    def __init__(self, config, assets=None):
        self.width = config.model.width
        self.dropout = config.model.dropout

    def dataset(self, split):
        rng = np.random.default_rng([2, split == 'val'])
        x = rng.normal(size=(96, 6)).astype(np.float32)
        y = (np.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2]).astype(np.float32)
        return Arrays(split, None, ('x',), x=x, y=y)

    def rules(self):
        return (('tower', 'tower.*'), ('head', 'head/.*'))

    def _apply(self, variables, x, on, key):
        class Model(nn.Module):
            @nn.compact
            def __call__(m, x):
                x = nn.relu(nn.Dense(self.width, name='tower')(x))
                x = nn.BatchNorm(not on, momentum=0.9, name='tower_norm')(x)
                x = tower_output(nn.Dropout(self.dropout, deterministic=not on)(x), on)
                return nn.Dense(1, name='head')(x)[..., 0]

        if variables is None:
            return Model().init(key, x)
        out, changed = Model().apply(
            variables, x, mutable=['batch_stats'], rngs=None if key is None else {'dropout': key}
        )
        return out, changed['batch_stats']

    def init(self, key, batch):
        return self._apply(None, batch['x'], False, key)

    def forward(self, variables, batch, stage, *, train, key):
        out, stats = self._apply(variables, batch['x'], train['tower'], key)
        return {'loss': jnp.square(out - batch['y']), 'mask': batch['mask']}, stats

    def terms(self, variables, outputs, batch, stage):
        return {'mse': Term(jnp.sum(outputs['loss'] * outputs['mask']), outputs['mask'].sum())}

    def error(self, variables, batch):
        return jnp.square(self._apply(variables, batch['x'], False, None)[0] - batch['y'])

    def evaluators(self):
        return {'val': Mean(self, 'error', 'mse')}
