"""ContraBin: binary code embedded beside its source and comment, and points between these two."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.errors import UserError
from mmjax.models.bert import Bert, masked_mean
from mmjax.models.layers import Dense
from mmjax.pretrained import bert as bert_weights
from mmjax.recipes.contrabin.config import Config

ENCODERS = {'source': 'anchor', 'comment': 'anchor', 'binary': 'binary'}  # modality → encoder
POOLINGS = {'first': lambda states, mask: states[:, 0], 'mean': masked_mean}
KINDS = {'linear': 1, 'nonlinear': 2}  # of a projection head: its hidden layers
TOWERS = (
    *('anchor', 'binary', 'source_head', 'comment_head', 'binary_head'),
    *('interpolation_linear', 'interpolation_nonlinear'),
)


def interpolate(a: jax.Array, b: jax.Array, weight: jax.Array) -> jax.Array:
    """Γ(A, B; λ) = λ·A + (1 − λ)·B: A itself at λ = 1, B itself at λ = 0.

    Args:
      a, b: [batch, features].
      weight: λ in [0, 1], broadcastable to a: [batch, 1] or [batch, features].
    """
    return weight * a + (1.0 - weight) * b


class Projection(nn.Module):
    """A projection head: LN(dropout(fc(GELU(p))) + p), where p = linear(x).

    `kind` 'nonlinear' has one layer more: fc(GELU(fc(GELU(p)))). The layers are `project`,
    `hidden_0`, `hidden_1` and `norm`.
    """

    features: int = 256
    kind: str = 'linear'
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps x [batch, width] to float32 [batch, features]."""
        dense = lambda name: Dense(self.features, dtype=self.dtype, name=name)
        projected = y = dense('project')(x)
        for index in range(KINDS[self.kind]):
            y = dense(f'hidden_{index}')(nn.gelu(y, approximate=False))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return nn.LayerNorm(1e-5, dtype=jnp.float32, name='norm')(y + projected)


class Simplex(nn.Module):
    """The learnt weight of a simplex interpolation: λ = σ(linear(head(a + b))).

    `kind` 'linear' has one λ per row, from a linear head; 'nonlinear' one λ per coordinate, from a
    nonlinear head. The layers are `head` and `gate`.
    """

    kind: str
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, a: jax.Array, b: jax.Array, *, train: bool) -> jax.Array:
        """Maps a and b [batch, features] to λ, float32 [batch, 1] or [batch, features]."""
        features = a.shape[-1]
        head = Projection(features, self.kind, self.dropout, self.dtype, name='head')
        gate = Dense(1 if self.kind == 'linear' else features, dtype=self.dtype, name='gate')
        return jax.nn.sigmoid(gate(head(a + b, train=train)).astype(jnp.float32))


class ContraBin(nn.Module):
    """Two encoders, a projection head per modality, and interpolations of source and comment.

    The encoders are given as modules and own the subtrees `anchor`, which reads source and comment,
    and `binary`; their vocabularies, lengths and widths may differ. The rest: `source_head`,
    `comment_head`, `binary_head`, `interpolation_linear`, `interpolation_nonlinear`.

    What is interpolated are the projected embeddings, as in the original, so D = `features`. Both
    interpolations have their parameters from the start: a stage that begins to use one brings no
    new ones.
    """

    anchor: Bert
    binary: Bert
    features: int = 256
    head: str = 'linear'  # kind of the three heads
    pooling: str = 'first'  # token, as published, or 'mean' of the tokens
    dropout: float = 0.1  # of heads and interpolations; the encoders have their own
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        head = lambda: Projection(self.features, self.head, self.dropout, self.dtype)
        self.source_head = head()
        self.comment_head = head()
        self.binary_head = head()
        self.interpolation = {kind: Simplex(kind, self.dropout, self.dtype) for kind in KINDS}

    def __call__(self, *inputs: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """Runs every part once, for initialisation.

        Args:
          inputs: tokens and mask, as in `encode`, of source, comment and binary: six arrays.
          train: whether dropout acts.

        Returns:
          The embedding of each modality and the interpolation of each kind, float32
          [batch, features], by name.
        """
        embeddings = {}
        for name, tokens, mask in zip(ENCODERS, inputs[::2], inputs[1::2], strict=True):
            hidden = self.encode(tokens, mask, name, train)
            embeddings[name] = self.project(hidden, name, train)
        pair = embeddings['source'], embeddings['comment']
        return embeddings | {kind: self.interpolated(*pair, kind, train)[0] for kind in KINDS}

    def encode(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        modality: str,
        train: bool,
        packed_length: float | None = None,
    ) -> jax.Array:
        """Encodes source code, comments (by the same encoder) or binaries.

        Args:
          tokens: int [batch, length].
          mask: [batch, length], true (or 1) on real tokens, which come before the padding.
          modality: one of `ENCODERS`.
          train: whether dropout acts (rng 'dropout'); False for a frozen encoder.
          packed_length: mean tokens per row of batches to run without their padding, see `Bert`.

        Returns:
          float32 [batch, width], pooled; finite, without meaning, where a row has no tokens.
        """
        encoder = getattr(self, ENCODERS[modality])
        # [batch, length, width]
        states = encoder(tokens, mask, train=train, packed_length=packed_length)
        return POOLINGS[self.pooling](states, mask).astype(jnp.float32)

    def project(self, hidden: jax.Array, modality: str, train: bool) -> jax.Array:
        """Maps what `encode` returned to embeddings, float32 [batch, features], of any length."""
        return getattr(self, f'{modality}_head')(hidden, train=train)

    def interpolated(
        self, source: jax.Array, comment: jax.Array, kind: str, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Interpolates embeddings of source and comment with a learnt weight.

        Args:
          source, comment: float32 [batch, features], as `project` returns them.
          kind: one of `KINDS`.
          train: whether dropout acts.

        Returns:
          (Γ(source, comment; λ) float32 [batch, features], λ float32 in (0, 1): [batch, 1] for
          'linear', [batch, features] for 'nonlinear'; at 1 it is all source).
        """
        weight = self.interpolation[kind](source, comment, train=train)
        return interpolate(source, comment, weight), weight


def build(config: Config, vocabularies: Mapping[str, int]) -> ContraBin:
    """Builds the model: encoders of the config's sizes, or of the folders that it names.

    Args:
      config: of the recipe.
      vocabularies: modality → number of ids of its tokenizer.

    Raises:
      UserError: a folder whose encoder has a smaller vocabulary, or fewer positions, than the data.
    """
    spec = config.model
    dtype = jnp.dtype(config.precision)
    lengths = {
        'source': max(config.data.max_source, config.data.max_comment),
        'binary': config.data.max_binary,
    }
    encoders = {}
    for modality, length in lengths.items():
        name = ENCODERS[modality]
        fields = dataclasses.asdict(getattr(spec, name))
        fields['vocabulary'] = vocabularies[modality]
        fields['max_length'] = length + fields['position_offset']
        folder = getattr(spec.pretrained, name)
        if folder:
            fields |= {'position_offset': 0, **bert_weights.fields(folder)}
            _check_sizes(folder, fields, vocabularies[modality], length)
        encoders[name] = Bert(**fields, dtype=dtype)
    options = {name: getattr(spec, name) for name in ('features', 'head', 'pooling', 'dropout')}
    return ContraBin(**encoders, **options, dtype=dtype)


def _check_sizes(folder: str, fields: Mapping[str, int], vocabulary: int, length: int) -> None:
    if fields['vocabulary'] < vocabulary:
        raise UserError(
            f'{folder}: the encoder has vocabulary {fields["vocabulary"]}, the tokenizer '
            f'{vocabulary}'
        )
    positions = fields['max_length'] - fields['position_offset']
    if positions < length:
        raise UserError(
            f'{folder}: the encoder has room for {positions} tokens, data.max_* need {length}'
        )
