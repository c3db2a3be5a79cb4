"""Times every trick of `mmjax/cpu.py` against its plain form, forward and backward.

    python benchmarks/cpu.py [--batch=32] [--time=256] [--channels=256] [--repeats=5]

Each pair is timed in turns within this process, so that the ratios of medians hardly feel other
programs. `plain` is what JAX or Flax offers, or an LSTM that is one scan per direction left to
automatic differentiation. Results are written to benchmarks/results/cpu.json.
"""

import argparse
import json
import os
import pathlib
import sys

import jax
import jax.numpy as jnp

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.sign_layers import in_turns, load, timed  # noqa: E402
from mmjax import cpu  # noqa: E402
from mmjax.engine import optim  # noqa: E402
from mmjax.engine.config import Optimizer  # noqa: E402
from mmjax.models import packing, recurrent  # noqa: E402


def convolution(stride: int, groups: int = 1):
    """Returns the library's 1-D convolution."""
    return lambda x, kernel: jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride,),
        [(kernel.shape[0] // 2,) * 2],
        dimension_numbers=('NWC', 'WIO', 'NWC'),
        feature_group_count=groups,
    )


def plain_lstm(x, mask, kernel, recurrent, bias):
    """Computes what `bilstm` does, as one scan per direction."""

    def direction(d):
        def step(carry, frame):
            (h, c), (x, valid) = carry, frame
            i, f, g, o = jnp.split(x @ kernel[d] + h @ recurrent[d] + bias[d], 4, -1)
            c = valid * (jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g))
            h = valid * jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        start = jnp.zeros((x.shape[0], recurrent.shape[1]))
        frames = x.swapaxes(0, 1), mask.T[:, :, None]
        return jax.lax.scan(step, (start, start), frames, reverse=d == 1)[1]

    return jnp.concatenate([direction(0), direction(1)], -1).swapaxes(0, 1)


def gathered(x, indices):
    """Computes `packing.pack`, left to automatic differentiation."""
    return x.reshape(-1, x.shape[-1])[indices.order]


def pairs(batch: int, frames: int, channels: int):
    """Returns {trick: (plain, ours, arguments)}; all arguments have a gradient."""
    keys = iter(jax.random.split(jax.random.key(0), 64))
    draw = lambda *shape: jax.random.normal(next(keys), shape) * 0.05
    x = draw(batch, frames, channels)
    mask = jnp.arange(frames) < jnp.linspace(frames // 2, frames, batch).astype(int)[:, None]
    # Of floats, so that it is an argument like the others and no constant of the program.
    pack_indices = lambda mask: packing.pack_indices(mask > 0.5, batch * frames * 3 // 4)
    heads = [draw(batch, frames, 4, channels // 4) for _ in range(3)]
    image = draw(batch // 4, 56, 56, channels)
    image_dims = ('NHWC', 'HWIO', 'NHWC')
    image_conv = lambda x, k: jax.lax.conv_general_dilated(
        x, k[None, None], (1, 1), 'VALID', dimension_numbers=image_dims
    )
    lstm = [draw(2, *shape, 4 * channels) for shape in ((channels,), (channels,), ())]
    mlp = draw(channels, 4 * channels), draw(4 * channels, channels)
    gelu = lambda once: (
        lambda x, up, down: cpu.matmul(
            cpu.elementwise(jax.nn.gelu, cpu.matmul(x, up))
            if once
            else jax.nn.gelu(cpu.matmul(x, up)),
            down,
        )
    )
    depthwise = lambda taps, stride: (
        lambda x, k: convolution(stride, channels)(x, k[:, None]),
        lambda x, k: cpu.depthwise(x, k, stride),
        (x, draw(taps, channels)),
    )
    return {
        'matmul': (jnp.matmul, cpu.matmul, (x, mlp[0])),
        'conv1x1': (image_conv, cpu.conv1x1, (image, draw(channels, channels))),
        'depthwise k3': depthwise(3, 1),
        'depthwise k3 s2': depthwise(3, 2),
        'depthwise k5': depthwise(5, 1),
        'elementwise gelu': (gelu(False), gelu(True), (x, *mlp)),
        'attend': (
            jax.nn.dot_product_attention,
            lambda *qkv: cpu.attend(*qkv, None),
            heads,
        ),
        'bilstm_scan': (
            lambda x, *p: plain_lstm(x, mask, *p),
            lambda x, *p: recurrent.bilstm(x, mask, *p),
            (x, *lstm),
        ),
        'packing.pack': (
            lambda x, mask: gathered(x, pack_indices(mask)),
            lambda x, mask: packing.pack(x, pack_indices(mask)),
            (x, mask.astype(jnp.float32)),
        ),
    }


def forward_only(batch: int, frames: int, channels: int):
    """Returns {trick: (plain, ours, arguments)} of what has no gradient."""
    key = jax.random.key(1)
    logits = jax.random.normal(key, (4, 32000))
    shape = (batch * frames, channels)
    return {
        'argmax': (lambda x: jnp.argmax(x, -1), cpu.argmax, (logits,)),
        'random_bits16': (
            lambda key: jax.random.bits(key, shape) >= jnp.uint32(2**31),
            lambda key: cpu.random_bits16(key, shape) >= 2**15,
            (key,),
        ),
    }


def adam(channels: int, plain: bool):
    """Returns a call that makes an Adam update in place, of eight matrices, timed."""
    params = {f'{i}': {'kernel': jnp.ones((4 * channels, 4 * channels))} for i in range(8)}
    groups = optim.Groups(tuple((f'{i}/kernel', 'all') for i in range(8)))
    spec = Optimizer()
    state = params, optim.init(params, groups, spec)

    def update(state, gradients):
        keep = cpu.materialize
        cpu.materialize = (lambda x: x) if plain else keep
        try:
            params, moments = state
            options = {'all': 1e-3}, spec, groups, optim.norm(gradients), jnp.bool_(True)
            updates, moments = optim.update(gradients, moments, params, *options)
            params = jax.tree.map(lambda p, u: cpu.materialize(p + u), params, updates)
            return (params, moments), ()
        finally:
            cpu.materialize = keep

    return timed(update, state, jax.tree.map(jnp.copy, params))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in dict(batch=32, time=256, channels=256, repeats=5).items():
        parser.add_argument(f'--{name}', type=int, default=default)
    flags = parser.parse_args()
    sizes = flags.batch, flags.time, flags.channels
    results = {}

    def compare(name, plain, ours, arguments):
        call = lambda f: timed(lambda state, args: (state, f(*args)), (), arguments)
        row = in_turns({'plain_ms': call(plain), 'ours_ms': call(ours)}, flags.repeats)
        results[name] = row | {'ratio': row['plain_ms'] / row['ours_ms']}
        print(f'{name:18} ' + '  '.join(f'{k} {v:8.2f}' for k, v in results[name].items()))

    print(f'{" × ".join(map(str, sizes))}, float32, forward and backward, load {load()}')
    for name, (plain, ours, arguments) in pairs(*sizes).items():
        weight = jax.random.normal(jax.random.key(2), jax.eval_shape(plain, *arguments).shape)
        every = tuple(range(len(arguments)))
        train = lambda f: jax.value_and_grad(lambda *args: jnp.vdot(f(*args), weight), every)
        compare(name, train(plain), train(ours), arguments)
    for name, trick in forward_only(*sizes).items():
        compare(name, *trick)
    calls = {f'{name}_ms': adam(flags.channels, name == 'plain') for name in ('plain', 'ours')}
    row = in_turns(calls, flags.repeats)
    results['materialize adam'] = row | {'ratio': row['plain_ms'] / row['ours_ms']}
    print('materialize adam', row)
    machine = {'device': jax.devices()[0].device_kind, 'cpus': os.cpu_count(), 'load': load()}
    size = dict(zip(('batch', 'time', 'channels'), sizes, strict=True))
    path = ROOT / 'benchmarks/results/cpu.json'
    path.write_text(json.dumps({**machine, **size, 'medians': results}, indent=1) + '\n')


if __name__ == '__main__':
    main()
