"""Times the sign-language layers against their plain forms, and the whole training step.

    python benchmarks/sign_layers.py [--batch=32] [--time=256] [--channels=256] [--repeats=9]
    python benchmarks/sign_layers.py --step [--torch=PYTHON] [--repeats=9]

Layers are timed forward and backward, in turns within this process, so that the ratios of medians
hardly feel other programs. `plain` is the library's convolution, or an LSTM that is one scan a
direction left to automatic differentiation. Forms marked `dropped` gained too little to be kept in
mmjax; they stand here to say so.

--step: forward, CTC, backward, clipping and AdamW at the published size (4 rows, 144 frames of
6,516 numbers, 1,000 glosses), against the four stream encoders with a squared loss and the same
optimizer (what no sequence model could avoid), and against the same model in PyTorch, run by the
interpreter --torch, step by step in turns with ours.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
BATCH, FRAMES, COLUMNS, GLOSSES, LABELS = 4, 144, 6516, 1000, 10
load = lambda: ' '.join(f'{value:.1f}' for value in os.getloadavg())


def in_turns(calls: dict, repeats: int) -> dict:
    """Returns {name: median seconds} of calls that return their own seconds, after a warm-up."""
    seconds = {name: [] for name in calls}
    for name, call in (repeats + 2) * list(calls.items()):
        seconds[name].append(call())
    return {name: statistics.median(values[2:]) for name, values in seconds.items()}


def timed(call, *arguments):
    """Makes a function that returns the seconds a call takes."""
    import jax

    def run():
        start = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        return time.perf_counter() - start

    return run


# Layers --------------------------------------------------------------------------------------


def plain_lstm(x, mask, kernel, recurrent, bias):
    """What `bilstm` computes, as one scan a direction."""
    import jax
    import jax.numpy as jnp

    valid = mask.T[:, :, None]

    def direction(d):
        def step(carry, frame):
            h, c = carry
            x, valid = frame
            i, f, g, o = jnp.split(x @ kernel[d] + h @ recurrent[d] + bias[d], 4, -1)
            c = valid * (jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g))
            h = valid * jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros((x.shape[0], recurrent.shape[1]))
        return jax.lax.scan(step, (zeros, zeros), (x.swapaxes(0, 1), valid), reverse=d == 1)[1]

    return jnp.concatenate([direction(0), direction(1)], -1).swapaxes(0, 1)


def layers(batch: int, frames: int, channels: int, repeats: int):
    """Prints a line a layer: plain and ours in ms, and how many times faster ours is."""
    import jax
    import jax.numpy as jnp

    from mmjax.models import convolutions
    from mmjax.models.recurrent import bilstm

    keys = iter(jax.random.split(jax.random.key(0), 32))
    draw = lambda *shape: jax.random.normal(next(keys), shape) * 0.05
    x = draw(batch, frames, channels)
    mask = jnp.arange(frames) < jnp.linspace(frames // 2, frames, batch).astype(int)[:, None]
    library = lambda stride, groups=1: (
        lambda x, kernel: jax.lax.conv_general_dilated(
            x, kernel, (stride,), [(kernel.shape[0] // 2,) * 2],
            dimension_numbers=('NWC', 'WIO', 'NWC'), feature_group_count=groups,
        )
    )  # fmt: skip
    grouped = lambda stride: lambda x, k: library(stride, channels)(x, k[:, None])
    shifted = lambda stride: lambda x, k: convolutions.depthwise(x, k, stride)
    transposed = lambda x, k: jax.lax.conv_transpose(
        x, k.swapaxes(0, 1)[::-1], (4,), 'VALID', dimension_numbers=('NWC', 'WIO', 'NWC')
    )[:, : 4 * x.shape[1]]

    def gathered(x, kernel):
        padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
        columns = [padded[:, k : k + x.shape[1]] for k in range(3)]
        return jnp.concatenate(columns, -1) @ kernel.reshape(-1, kernel.shape[-1])

    lstm = (draw(2, channels, 4 * channels), draw(2, channels, 4 * channels),
            draw(2, 4 * channels))  # fmt: skip
    plan = {
        'depthwise k3': (grouped(1), shifted(1), draw(3, channels)),
        'depthwise k3 s2': (grouped(2), shifted(2), draw(3, channels)),
        'depthwise k5': (grouped(1), shifted(1), draw(5, channels)),
        'upsample 4': (transposed, convolutions.upsample, draw(channels, 4, 32)),
        'BiLSTM': (lambda x, p: plain_lstm(x, mask, *p), lambda x, p: bilstm(x, mask, *p), lstm),
        'k1 as product (dropped)': (library(1), lambda x, k: x @ k[0], draw(1, channels, channels)),
        'k3 as product (dropped)': (library(1), gathered, draw(3, channels, channels)),
    }
    print(f'{batch} × {frames} × {channels}, float32, forward and backward, load {load()}')
    print(f'{"":24} {"plain ms":>9} {"ours ms":>9} {"ratio":>6}')
    for name, (plain, ours, params) in plan.items():
        weight = jax.random.normal(next(keys), jax.eval_shape(plain, x, params).shape)
        train = lambda f: jax.jit(jax.value_and_grad(lambda a: jnp.vdot(f(*a), weight)))
        forms = {'plain': plain, 'ours': ours}
        calls = {form: timed(train(f), (x, params)) for form, f in forms.items()}
        seconds = in_turns(calls, repeats)
        ratio = seconds['plain'] / seconds['ours']
        print(f'{name:24} {1e3 * seconds["plain"]:9.1f} {1e3 * seconds["ours"]:9.1f} {ratio:6.2f}')
    print(f'load {load()}')


# The step ------------------------------------------------------------------------------------


def jax_step(encoders_only: bool):
    """Returns a function that trains one step on fixed data and returns its seconds."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax

    from mmjax.models.sign import PHOENIX, Sign, StreamEncoder

    class Encoders(nn.Module):
        @nn.compact
        def __call__(self, features, mask, *, train):
            encode = lambda s: StreamEncoder(s.width, 0.3, name=s.name)
            parts = [encode(s)(features[:, :, s.start : s.end], train=train) for s in PHOENIX]
            return jnp.concatenate(parts, -1)

    model = Encoders() if encoders_only else Sign(GLOSSES)
    features = jax.random.normal(jax.random.key(0), (BATCH, FRAMES, COLUMNS))
    mask = jnp.arange(FRAMES) < jnp.array([[144], [120], [131], [97]])
    labels = jax.random.randint(jax.random.key(1), (BATCH, LABELS), 1, GLOSSES)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4, weight_decay=1e-4))
    init = jax.jit(
        lambda key: model.init(key, features[:1, :8], mask[:1, :8], train=False),
        compiler_options={'xla_backend_optimization_level': 0},  # it runs once
    )
    stats = init(jax.random.key(2))  # the encoders have none
    params = stats.pop('params')

    def update(state, features, mask, labels, key):
        params, stats, moments = state

        def loss(params):
            outputs, new = model.apply(
                {'params': params, **stats}, features, mask, train=True,
                mutable=['batch_stats'], rngs={'dropout': key},
            )  # fmt: skip
            if encoders_only:
                return jnp.mean(outputs**2), stats
            losses = optax.ctc_loss(outputs, 1.0 - mask, labels, jnp.zeros(labels.shape))
            return losses.mean(), {**stats, **new}

        (value, stats), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), stats, moments), value

    update, state = jax.jit(update, donate_argnums=0), (params, stats, optimizer.init(params))

    def run():
        nonlocal state
        start = time.perf_counter()
        state, value = update(state, features, mask, labels, jax.random.key(3))
        jax.block_until_ready((state, value))
        return time.perf_counter() - start

    return run


def torch_steps():
    """Trains one step of the same model in PyTorch for each line read; answers with its seconds."""
    import torch
    from torch import nn

    def conv(inputs, outputs, kernel=1, stride=1, groups=1):
        net = nn.Conv1d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return net, nn.BatchNorm1d(outputs)

    def block(inputs, expanded, features, kernel, stride, squeeze, act):
        act = nn.ReLU if act == 'relu' else nn.Hardswish
        parts = [*conv(inputs, expanded), act()] if expanded != inputs else []
        parts += [*conv(expanded, expanded, kernel, stride, expanded), act()]
        if squeeze:
            narrow = nn.Conv1d(expanded, expanded // 4, 1)
            wide = nn.Conv1d(expanded // 4, expanded, 1)
            squeezed = nn.AdaptiveAvgPool1d(1), narrow, nn.ReLU(), wide, nn.Hardsigmoid()
            parts.append(Join('times', *squeezed))
        parts += conv(expanded, features)
        return Join('plus' if stride == 1 and inputs == features else '', *parts)

    class Join(nn.Module):
        def __init__(self, how, *net):
            super().__init__()
            self.how, self.net = how, nn.Sequential(*net)

        def forward(self, x):
            y = self.net(x)
            return x * y if self.how == 'times' else x + y if self.how == 'plus' else y

    class Model(nn.Module):
        def __init__(self, glosses):
            super().__init__()
            self.spans = ((0, 99, 64), (99, 225, 128), (225, 1629, 64), (1629, 6516, 128))
            self.encoders = nn.ModuleList()
            for start, end, width in self.spans:
                inputs, hidden = end - start, (end - start + width) // 2
                first = nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Dropout(0.3)
                second = nn.Linear(hidden, width), nn.LayerNorm(width)
                self.encoders.append(nn.Sequential(*first, *second))
            rows = (
                (16, 16, 16, 3, 1, True, 'relu'), (16, 72, 24, 3, 2, False, 'relu'),
                (24, 88, 24, 3, 1, False, 'relu'), (24, 96, 40, 5, 1, True, 'hard_swish'),
                (40, 240, 40, 5, 1, True, 'hard_swish'), (40, 120, 48, 5, 1, True, 'hard_swish'),
            )  # fmt: skip
            self.convolutions = nn.Sequential(
                *conv(384, 16, 3, 2), nn.Hardswish(), *(block(*row) for row in rows),
                nn.ConvTranspose1d(48, 128, 4, 4), nn.BatchNorm1d(128), nn.ReLU(),
                nn.Conv1d(128, 128, 3, padding=1), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.3),
            )  # fmt: skip
            self.lstm = nn.LSTM(128, 128, bidirectional=True, batch_first=True)
            self.head = nn.Linear(256, glosses)

        def forward(self, x):
            spans = zip(self.encoders, self.spans, strict=True)
            parts = [net(x[..., start:end]) for net, (start, end, _) in spans]
            x = self.convolutions(torch.cat(parts, -1).transpose(1, 2)).transpose(1, 2)
            return self.head(self.lstm(x)[0]).log_softmax(-1).transpose(0, 1)

    assert sum(p.numel() for p in Model(101).parameters()) == 14_180_464
    model, features = Model(GLOSSES), torch.randn(BATCH, FRAMES, COLUMNS)
    lengths, labels = torch.tensor([144, 120, 131, 97]), torch.randint(1, GLOSSES, (BATCH, LABELS))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=1e-4, fused=True)
    ctc = nn.CTCLoss()
    for _ in sys.stdin:
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        ctc(model(features), labels, lengths, torch.full((BATCH,), LABELS)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        print(time.perf_counter() - start, flush=True)


def step(torch: str | None, repeats: int):
    """Prints the median step of ours, of the encoders alone and, if given, of PyTorch."""
    calls = {'ours': jax_step(False), 'encoders': jax_step(True)}
    if torch:
        command = [torch, __file__, '--only=torch']
        peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

        def ask():
            print(file=peer.stdin, flush=True)
            return float(peer.stdout.readline())

        calls['PyTorch'] = ask
    print(f'{BATCH} × {FRAMES} × {COLUMNS}, {GLOSSES} glosses, a training step, load {load()}')
    seconds = in_turns(calls, repeats)
    for name, value in seconds.items():
        print(f'{name:10} {1e3 * value:8.1f} ms   {value / seconds["ours"]:5.2f} × ours')
    print(f'load {load()}')
    if torch:
        peer.stdin.close()
        peer.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (('batch', 32), ('time', 256), ('channels', 256), ('repeats', 9)):
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--step', action='store_true', help='time the whole training step')
    parser.add_argument('--torch', metavar='PYTHON', help='an interpreter that has PyTorch')
    parser.add_argument('--only', choices=['torch'], help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.only:
        torch_steps()
    elif flags.step:
        step(flags.torch, flags.repeats)
    else:
        layers(flags.batch, flags.time, flags.channels, flags.repeats)


if __name__ == '__main__':
    main()
