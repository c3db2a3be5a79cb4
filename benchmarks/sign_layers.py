"""Times the sign-language layers against their plain forms, and the whole training step.

    python benchmarks/sign_layers.py [--batch=32] [--time=256] [--channels=256] [--repeats=9]
    python benchmarks/sign_layers.py --step [--torch=PYTHON] [--frames=144] [--repeats=9]

Layers are timed forward and backward, in turns within this process, so that the ratios of medians
hardly feel other programs. `plain` is the library's convolution, or an LSTM that is one scan a
direction left to automatic differentiation. Forms marked `dropped` gained too little to be kept.

--step: an update as mmjax makes it, `mmjax.engine.step.train_step` of
configs/sign_ctc.py:published on its streams (4 rows of 6,516 numbers a frame, 1,000 glosses, 85 %
of the frames real, for which the packed length is exact), the same without packing, against the
four stream encoders in plain Flax, padding included, with a squared loss and AdamW, and the same
model in PyTorch, run by the interpreter --torch as it is and with huge pages, all in turns. Start
it with GLIBC_TUNABLES=glibc.malloc.hugetlb=1 to give ours huge pages too. Results are written to
benchmarks/results/sign_layers.json.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from subprocess import PIPE, Popen

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BATCH, COLUMNS, GLOSSES, LABELS = 4, 6516, 1000, 10
lengths = lambda frames: [frames, frames * 5 // 6, frames * 10 // 11, frames * 2 // 3]
load = lambda: ' '.join(f'{value:.1f}' for value in os.getloadavg())


def write(part: str, found: dict):
    """Puts a part of the results beside the other, with the machine that it is of."""
    import jax

    path = ROOT / 'benchmarks/results/sign_layers.json'
    found |= {'device': jax.devices()[0].device_kind, 'cpus': os.cpu_count(), 'load': load()}
    kept = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**kept, part: found}, indent=1) + '\n')


def in_turns(calls: dict, repeats: int) -> dict:
    """Returns {name: median ms} of calls that return their own seconds.

    Each turn makes four in a row and leaves out the first, in which what ran before is still felt;
    the first turn is left out whole.
    """
    seconds = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            found = [call() for _ in range(4)]
            seconds[name] += found[1:] if turn else []
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def timed(update, state, *arguments):
    """Makes a function that returns the seconds of `state, value = update(state, *arguments)`."""
    import jax

    update = jax.jit(update, donate_argnums=0)

    def call():
        nonlocal state
        start = time.perf_counter()
        state, _ = jax.block_until_ready(update(state, *arguments))
        return time.perf_counter() - start

    return call


def plain_lstm(x, mask, kernel, recurrent, bias):
    """What `bilstm` computes, as one scan a direction."""
    import jax
    import jax.numpy as jnp

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
            x,
            kernel,
            (stride,),
            [(kernel.shape[0] // 2,) * 2],
            dimension_numbers=('NWC', 'WIO', 'NWC'),
            feature_group_count=groups,
        )
    )
    depthwise = lambda taps, stride=1: (
        lambda x, k: library(stride, channels)(x, k[:, None]),
        lambda x, k: convolutions.depthwise(x, k, stride),
        draw(taps, channels),
    )
    transposed = lambda x, k: jax.lax.conv_transpose(
        x, k.swapaxes(0, 1)[::-1], (4,), 'VALID', dimension_numbers=('NWC', 'WIO', 'NWC')
    )[:, : 4 * x.shape[1]]

    def gathered(x, kernel):
        padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
        columns = [padded[:, k : k + x.shape[1]] for k in range(3)]
        return jnp.concatenate(columns, -1) @ kernel.reshape(-1, kernel.shape[-1])

    lstm = [draw(2, *shape, 4 * channels) for shape in ((channels,), (channels,), ())]
    plan = {
        'depthwise k3': depthwise(3),
        'depthwise k3 s2': depthwise(3, 2),
        'depthwise k5': depthwise(5),
        'upsample 4': (transposed, convolutions.upsample, draw(channels, 4, 32)),
        'BiLSTM': (lambda x, p: plain_lstm(x, mask, *p), lambda x, p: bilstm(x, mask, *p), lstm),
        'k1 as product (dropped)': (library(1), lambda x, k: x @ k[0], draw(1, channels, channels)),
        'k3 as product (dropped)': (library(1), gathered, draw(3, channels, channels)),
    }
    print(f'{batch} × {frames} × {channels}, float32, forward and backward, load {load()}')
    results = {}
    for name, (plain, ours, params) in plan.items():
        weight = jax.random.normal(next(keys), jax.eval_shape(plain, x, params).shape)
        train = lambda f: jax.value_and_grad(lambda a: jnp.vdot(f(*a), weight))
        call = lambda f: timed(lambda state, a: (state, train(f)(a)), (), (x, params))
        found = in_turns({'plain_ms': call(plain), 'ours_ms': call(ours)}, repeats)
        results[name] = found | {'ratio': found['plain_ms'] / found['ours_ms']}
        print(
            f'{name:24} ' + '  '.join(f'{key} {value:7.2f}' for key, value in results[name].items())
        )
    write('layers', {'batch': batch, 'time': frames, 'channels': channels, 'medians': results})


def ours(frames: int, pack: bool = True):
    """Returns a call that makes an update of mmjax: the published config on its own streams."""
    import jax
    import numpy as np

    from configs import sign_ctc
    from mmjax.engine import build, optim, step
    from mmjax.recipes.sign.model import PHOENIX

    config, rng = sign_ctc.get_config('published').unlock(), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:  # of sentences of all glosses, as long as here
        root = config.data.root = f'{folder}/root'
        config.data.cache, text = f'{folder}/cache', ' '.join(map(str, range(1, GLOSSES)))
        config.data.buckets, config.sampler.stretch, config.model.pack = 1, 1.0, pack
        config.data.augmentation.stretch = (1.0, 1.0)
        os.makedirs(f'{root}/annotations')
        for split in ('train', 'dev'):
            os.makedirs(f'{root}/features/{split}')
            table = pathlib.Path(f'{root}/annotations/{split}.corpus.csv')
            lines = [f'{row}|me|{text}' for row in range(BATCH)]
            table.write_text('\n'.join(['id|signer|annotation', *lines]))
            for row, length in enumerate(lengths(frames)):
                features = np.ones((length, COLUMNS), np.float32)
                np.savez(f'{root}/features/{split}/{row}.npz', features=features)
        spans = {stream.name: [stream.start, stream.end] for stream in PHOENIX}
        pathlib.Path(f'{root}/streams.json').write_text(json.dumps(spans))
        run = build.run(config)
    length, stage, model = np.array(lengths(frames), np.int32), run.stages[0], run.task.models
    assert model['student'].streams == PHOENIX and model['student'].vocabulary == GLOSSES
    batch = {
        'features': rng.normal(size=(BATCH, frames, COLUMNS)).astype(np.float32),
        'frames': np.arange(frames) < length[:, None],
        'labels': rng.integers(1, GLOSSES, (BATCH, LABELS), np.int32),
        'label_mask': np.ones((BATCH, LABELS), bool),
        'length': length,
        'row': np.arange(BATCH, dtype=np.int32),
        'mask': np.ones(BATCH, bool),
    }
    rates, weights = optim.rates(stage, run.groups.names, 0), {'ctc': np.float32(1)}
    options = dict(task=run.task, stage=stage, groups=run.groups, settings=run.settings)
    update = lambda state, batch: step.train_step(state, batch, rates, weights, **options)
    state = step.create(run.init_variables(), stage, run.groups, run.settings)
    return timed(update, state, jax.device_put(batch))


def encoders(frames: int):
    """Returns a call that trains the four encoders alone for a step, in plain Flax."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax

    from mmjax.recipes.sign.model import PHOENIX

    def encoder(stream):
        columns = stream.end - stream.start
        first = nn.Dense((columns + stream.width) // 2), nn.LayerNorm(1e-5), nn.relu
        drop = nn.Dropout(0.3, deterministic=False)
        return nn.Sequential([*first, drop, nn.Dense(stream.width), nn.LayerNorm(1e-5)])

    # As rows: XLA:CPU is slower at products of more axes.
    features = jax.random.normal(jax.random.key(0), (BATCH * frames, COLUMNS))
    parts = [(encoder(s), slice(s.start, s.end)) for s in PHOENIX]
    make = lambda key: [
        net.init({'params': key, 'dropout': key}, features[:1, at]) for net, at in parts
    ]
    params, optimizer = jax.jit(make)(jax.random.key(2)), optax.adamw(3e-4, weight_decay=1e-4)

    def update(state, features, key):
        def loss(params):
            run = lambda net, p, x: net.apply(p, x, rngs={'dropout': key})
            out = [run(net, params[i], features[:, at]) for i, (net, at) in enumerate(parts)]
            return jnp.mean(jnp.concatenate(out, -1) ** 2)

        value, gradients = jax.value_and_grad(loss)(state[0])
        updates, moments = optimizer.update(gradients, state[1], state[0])
        return (optax.apply_updates(state[0], updates), moments), value

    return timed(update, (params, optimizer.init(params)), features, jax.random.key(3))


def torch_steps(frames: int):
    """Trains one step of the same model in PyTorch for each line read; answers with its seconds."""
    import torch
    from torch import nn

    class Join(nn.Module):
        def __init__(self, how, *net):
            super().__init__()
            self.how, self.net = how, nn.Sequential(*net)

        def forward(self, x):
            y = self.net(x)
            return x * y if self.how == 'times' else x + y if self.how == 'plus' else y

    def conv(inputs, outputs, kernel=1, stride=1, groups=1):
        net = nn.Conv1d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return net, nn.BatchNorm1d(outputs)

    def block(inputs, wide, features, kernel, stride, squeeze, act):
        parts = [*conv(inputs, wide), act()] if wide != inputs else []
        parts += [*conv(wide, wide, kernel, stride, wide), act()]
        if squeeze:
            down, up = nn.Conv1d(wide, wide // 4, 1), nn.Conv1d(wide // 4, wide, 1)
            parts.append(
                Join('times', nn.AdaptiveAvgPool1d(1), down, nn.ReLU(), up, nn.Hardsigmoid())
            )
        return Join(
            'plus' if stride == 1 and inputs == features else '', *parts, *conv(wide, features)
        )

    def encoder(start, end, width, both=lambda a, b: (nn.Linear(a, b), nn.LayerNorm(b))):
        hidden = (end - start + width) // 2
        first = *both(end - start, hidden), nn.ReLU(), nn.Dropout(0.3)
        return nn.Sequential(*first, *both(hidden, width))

    spans = (0, 99, 64), (99, 225, 128), (225, 1629, 64), (1629, 6516, 128)
    encode = nn.ModuleList(encoder(*span) for span in spans)
    rows = (
        (16, 16, 16, 3, 1, True, nn.ReLU),
        (16, 72, 24, 3, 2, False, nn.ReLU),
        (24, 88, 24, 3, 1, False, nn.ReLU),
        (24, 96, 40, 5, 1, True, nn.Hardswish),
        (40, 240, 40, 5, 1, True, nn.Hardswish),
        (40, 120, 48, 5, 1, True, nn.Hardswish),
    )
    convolve = nn.Sequential(
        *conv(384, 16, 3, 2),
        nn.Hardswish(),
        *(block(*row) for row in rows),
        nn.ConvTranspose1d(48, 128, 4, 4),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Conv1d(128, 128, 3, padding=1),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Dropout(0.3),
    )
    lstm, head = nn.LSTM(128, 128, bidirectional=True, batch_first=True), nn.Linear(256, GLOSSES)
    params = list(nn.ModuleList([encode, convolve, lstm, head]).parameters())
    assert sum(p.numel() for p in params) == 14_180_464 + 257 * (GLOSSES - 101)

    def forward(x):
        parts = [net(x[..., a:b]) for net, (a, b, _) in zip(encode, spans, strict=True)]
        x = convolve(torch.cat(parts, -1).transpose(1, 2)).transpose(1, 2)
        return head(lstm(x)[0]).log_softmax(-1).transpose(0, 1)

    features, ctc = torch.randn(BATCH, frames, COLUMNS), nn.CTCLoss()
    valid, labels = torch.tensor(lengths(frames)), torch.randint(1, GLOSSES, (BATCH, LABELS))
    optimizer = torch.optim.AdamW(params, 3e-4, weight_decay=1e-4, fused=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        ctc(forward(features), labels, valid, torch.full((BATCH,), LABELS)).backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        print(time.perf_counter() - start, flush=True)


def ask(peer: Popen) -> float:
    """Has the process make a step; returns its seconds."""
    print(file=peer.stdin, flush=True)
    return float(peer.stdout.readline())


def whole_step(torch: str | None, frames: int, repeats: int):
    """Prints the median step of ours, of the encoders alone and, if given, of PyTorch."""
    calls = {'ours': ours(frames), 'ours, not packed': ours(frames, pack=False)}
    calls['encoders and AdamW'] = encoders(frames)
    plain = {name: value for name, value in os.environ.items() if name != 'GLIBC_TUNABLES'}
    huge = {**plain, 'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}
    for name, env in {'PyTorch': plain, 'PyTorch, huge pages': huge}.items():
        if torch:
            command = [torch, '-c', f'import sign_layers; sign_layers.torch_steps({frames})']
            peer = Popen(
                command, cwd=ROOT / 'benchmarks', stdin=PIPE, stdout=PIPE, text=True, env=env
            )
            calls[name] = functools.partial(ask, peer)
    print(f'{BATCH} × {frames} × {COLUMNS}, {GLOSSES} glosses, a training step, load {load()}')
    medians = in_turns(calls, repeats)
    for name, value in medians.items():
        print(f'{name:20} {value:8.1f} ms   {value / medians["ours"]:5.2f} × ours')
    write('step', {'batch': BATCH, 'frames': frames, 'columns': COLUMNS, 'median_ms': medians})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in dict(batch=32, time=256, channels=256, frames=144, repeats=9).items():
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--step', action='store_true', help='time the whole training step')
    parser.add_argument('--torch', metavar='PYTHON', help='an interpreter that has PyTorch')
    flags = parser.parse_args()
    if flags.step:
        whole_step(flags.torch, flags.frames, flags.repeats)
    else:
        layers(flags.batch, flags.time, flags.channels, flags.repeats)


if __name__ == '__main__':
    main()
