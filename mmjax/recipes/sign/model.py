"""The sign-language model: streams of landmarks → MobileNet over time → BiLSTM → gloss logits."""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.models import packing
from mmjax.models.convolutions import Conv, Upsample, clear
from mmjax.models.layers import Attention, Dense, Dropout, MaskedBatchNorm, kernel_init
from mmjax.models.mobilenet1d import PUBLISHED, MobileNet1d, Row
from mmjax.models.recurrent import BiLSTM


class Stream(NamedTuple):
    """Columns start:end of the features, encoded to `width`."""

    name: str
    start: int
    end: int
    width: int


# The parts that train or are frozen as a whole, and the paths of their parameters.
PARTS = {
    'encoder': '(encoder_[^/]+|attention)/.*',
    'mobilenet': 'mobilenet/.*',
    'top': '(upsample|upsample_norm|refine|refine_norm|lstm_[0-9]+|head)/.*',
}
STRIDE = MobileNet1d().stride  # frames per frame of the MobileNet's output
EVALUATION = dict.fromkeys(PARTS, False)
PHOENIX = (
    Stream('pose', 0, 99, 64),
    Stream('hands', 99, 225, 128),
    Stream('face', 225, 1629, 64),
    Stream('temporal', 1629, 6516, 128),
)


class StreamEncoder(nn.Module):
    """Two linear layers per frame, of (inputs + width) // 2 and `width`, each with a LayerNorm."""

    width: int
    dropout: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps x […, inputs] to […, width]."""
        dense = lambda name, features: Dense(
            features, dtype=self.dtype, kernel_init=kernel_init, name=name
        )
        norm = lambda name: nn.LayerNorm(1e-5, dtype=self.dtype, name=name)
        hidden = nn.relu(norm('norm_1')(dense('linear_1', (x.shape[-1] + self.width) // 2)(x)))
        hidden = Dropout(self.dropout)(hidden, deterministic=not train)
        return norm('norm_2')(dense('linear_2', self.width)(hidden))


class CrossAttention(nn.Module):
    """Lets the streams of one frame attend to each other; frames do not meet.

    Each stream is projected to `width` and gets a learnt vector of its own; the output of attention
    over the streams is projected back and added to the stream.
    """

    width: int
    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, streams: list[jax.Array]) -> list[jax.Array]:
        """Maps streams […, any width] to the same shapes; the other axes are frames."""
        dense = lambda name, features: Dense(
            features, dtype=self.dtype, kernel_init=kernel_init, name=name
        )
        frames = streams[0].shape[:-1]
        tokens = [dense(f'in_{k}', self.width)(x) for k, x in enumerate(streams)]
        tokens = jnp.stack(tokens, -2).reshape(-1, len(streams), self.width)
        marks = self.param('marks', nn.initializers.normal(0.02), tokens.shape[1:])
        tokens = nn.LayerNorm(dtype=self.dtype, name='norm')(tokens + marks.astype(self.dtype))
        tokens = Attention(self.heads, dtype=self.dtype, name='attention')(tokens)
        mixed = tokens.reshape(*frames, len(streams), self.width)
        return [x + dense(f'out_{k}', x.shape[-1])(mixed[..., k, :]) for k, x in enumerate(streams)]


class Sign(nn.Module):
    """Landmarks of each frame → logits of each frame over glosses, blank included.

    Time is shortened by the MobileNet and restored by a transposed convolution of the same stride,
    never pooled away. The defaults are the published sizes. The LSTM has one bias per gate where
    PyTorch's has two; of the convolutions only the transposed one and the one after it have a bias.

    A frame's logits depend on the valid frames of its own row only, whatever the row is padded to;
    in training also on the batch statistics, which are those of valid frames.
    """

    vocabulary: int
    streams: tuple[Stream, ...] = PHOENIX
    stem: int = 16
    blocks: tuple[Row, ...] = PUBLISHED
    width: int = 128  # after the transposed convolution
    lstm_features: int = 128  # a direction
    lstm_layers: int = 1
    dropout: float = 0.3
    cross_attention: bool = False
    attention_width: int = 128
    attention_heads: int = 4
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        dtype = self.dtype
        self.encoder = {s.name: StreamEncoder(s.width, self.dropout, dtype) for s in self.streams}
        if self.cross_attention:
            self.attention = CrossAttention(self.attention_width, self.attention_heads, dtype)
        self.mobilenet = MobileNet1d(self.stem, self.blocks, dtype=dtype)
        self.upsample = Upsample(self.width, self.mobilenet.stride, dtype=dtype)
        self.upsample_norm = MaskedBatchNorm(dtype=dtype)
        self.refine = Conv(self.width, 3, use_bias=True, dtype=dtype)
        self.refine_norm = MaskedBatchNorm(dtype=dtype)
        self.drop = Dropout(self.dropout)
        self.lstm = [BiLSTM(self.lstm_features) for _ in range(self.lstm_layers)]
        self.head = Dense(self.vocabulary, kernel_init=kernel_init)

    def __call__(
        self,
        features: jax.Array,
        mask: jax.Array,
        *,
        train: Mapping[str, bool] = EVALUATION,
        packed_length: float | None = None,
    ) -> jax.Array:
        """Maps features [batch, time, columns] to logits [batch, time, vocabulary], float32.

        Args:
          features: float32, finite on valid frames; what stands on the others is not read.
          mask: bool [batch, time], True on a prefix of each row, which may be empty.
          train: part → whether it trains, with dropout (rng 'dropout') and batch statistics
            (collection 'batch_stats'); the others run as in evaluation.
          packed_length: frames per row, on average over a batch, that are encoded without their
            padding. A batch that has more is encoded with it, and has other dropout; features then
            have no gradient. None: all batches are.

        The collection 'intermediates' has 'lstm_inputs' [batch, time, width] and 'hidden', what the
        head reads, [batch, time, 2·lstm_features], 0 beyond the end of a row.
        """
        columns = max(stream.end for stream in self.streams)
        if features.ndim != 3 or features.shape[-1] < columns:
            raise ValueError(f'features {features.shape} are not [batch, time, ≥{columns}]')
        x = self._encode(features, mask, train['encoder'], packed_length)
        x = self.mobilenet(x, mask, train=train['mobilenet'])
        x = self.upsample(x, mask[:, :: self.mobilenet.stride])[:, : mask.shape[1]]
        x = nn.relu(self.upsample_norm(x, mask, train=train['top']))
        x = nn.relu(self.refine_norm(self.refine(x, mask), mask, train=train['top']))
        x = self.drop(x, deterministic=not train['top'])
        self.sow('intermediates', 'lstm_inputs', x)
        for index, layer in enumerate(self.lstm):
            x = self.drop(x, deterministic=not train['top']) if index else x
            x = layer(x, mask)
        self.sow('intermediates', 'hidden', x)
        return self.head(x)

    def _encode(self, features, mask, train, packed_length):
        """Encodes the streams of each frame, side by side: [batch, time, their widths]."""
        rows = packing.packed_rows(mask, packed_length)

        def encode(call, take):
            streams = [
                call(self.encoder[name], take(start, end), train=train)
                for name, start, end, _ in self.streams
            ]
            streams = call(self.attention, streams) if self.cross_attention else streams
            return jnp.concatenate(streams, -1)

        # Cleared, so that nothing beyond the end of a row overflows.
        cleared = lambda x, mask: lambda start, end: clear(x[:, :, start:end], mask)
        if rows == mask.size or self.is_initializing():
            return encode(lambda part, x, **how: part(x, **how), cleared(features, mask))
        parts = [*self.encoder.values(), *([self.attention] if self.cross_attention else [])]
        keys = {}
        if train and self.dropout:
            split = jax.random.split(self.make_rng('dropout'), len(parts))
            keys = {part.name: {'dropout': key} for part, key in zip(parts, split, strict=True)}

        def caller(params, keys):
            return lambda part, x, **how: part.clone(parent=None).apply(
                {'params': params[part.name]}, x, rngs=keys.get(part.name), **how
            )

        def packed(params, x, mask, keys):
            indices = packing.pack_indices(mask, rows)
            real = jnp.arange(rows) < mask.sum()
            pack = lambda start, end: packing.pack(x[:, :, start:end], indices)
            take = lambda start, end: jnp.where(real[:, None], pack(start, end), 0)
            return packing.unpack(encode(caller(params, keys), take), indices)

        def padded(params, x, mask, keys):
            return encode(caller(params, keys), cleared(x, mask))

        params = {part.name: part.variables['params'] for part in parts}
        data = features, mask, keys
        return packing.cond(mask.sum() <= rows, packed, padded, params, *data)


def temporal_squares(x: jax.Array, frames: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Measures how much x [batch, time, width] varies with time; 0 is a temporal collapse.

    The variance of each feature is taken over frames a stride apart, which are made by the same
    taps of the transposed convolution: over all frames, and behind the LSTM, features vary even if
    the inputs are equal. The first and the last frame of a row are left out: they see its ends.

    Returns:
      float32 [batch] sums of squares about the means, and [batch] how many.
    """
    ends = jnp.pad(frames, ((0, 0), (1, 1)))
    inner = (frames & ends[:, :-2] & ends[:, 2:])[..., None]
    pad = ((0, 0), (0, -x.shape[1] % STRIDE), (0, 0))
    x, inner = (
        jnp.pad(a, pad).reshape(len(a), -1, STRIDE, a.shape[2])
        for a in (x.astype(jnp.float32), inner)
    )
    count = jnp.maximum(inner.sum(1, keepdims=True), 1)
    mean = jnp.where(inner, x, 0).sum(1, keepdims=True) / count
    squares = jnp.where(inner, (x - mean) ** 2, 0).sum((1, 2, 3))
    return squares, inner.sum((1, 2, 3)) * x.shape[3]
