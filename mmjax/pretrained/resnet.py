"""ResNets: torchvision's names (timm's too) as safetensors, with running statistics."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.errors import UserError
from mmjax.pretrained import files

UNUSED = (r'fc\..*', r'.*\.num_batches_tracked')  # the classifier, and a counter


def fields(folder) -> dict[str, Any]:
    """Returns the fields of `models.resnet.ResNet`, read off the tensors' names and shapes.

    torchvision publishes no config. What no tensor shows is torchvision's: stem stride 2, max pool.

    Raises:
      UserError: the names are not those of a ResNet.
    """
    weights = files.Weights(folder)
    blocks = [re.match(r'layer(\d+)\.(\d+)\.', name) for name in weights.names]
    counts: dict[int, int] = {}
    for match in filter(None, blocks):
        stage, block = int(match[1]), int(match[2])
        counts[stage] = max(counts.get(stage, 0), block + 1)
    if not counts or sorted(counts) != list(range(1, len(counts) + 1)):
        raise UserError(f"{folder}: the tensors are not named as torchvision's ResNets are")
    stem = weights.shape('conv1.weight')
    if len(stem) != 4:
        raise UserError(f"{weights.names['conv1.weight']}: tensor 'conv1.weight' is no convolution")
    return {
        'stage_sizes': tuple(counts[stage] for stage in sorted(counts)),
        'width': stem[0],
        'bottleneck': 'layer1.0.conv3.weight' in weights.names,
        'stem_kernel': stem[2],
    }


def entries(
    *, stage_sizes: tuple[int, ...], width: int, bottleneck: bool, stem_kernel: int, **_: Any
) -> list[files.Entry]:
    """Returns the table of a net of these sizes (fields of ResNet)."""
    table = _conv('conv1', 'bn1', 'stem', 'stem_norm', 3, width, stem_kernel)
    inputs, index = width, 0
    for stage, blocks in enumerate(stage_sizes):
        inner = width * 2**stage
        outputs = inner * (4 if bottleneck else 1)
        for block in range(blocks):
            name, path = f'layer{stage + 1}.{block}', f'block_{index}'
            if bottleneck:
                plan = ((inputs, inner, 1), (inner, inner, 3), (inner, outputs, 1))
            else:
                plan = ((inputs, inner, 3), (inner, inner, 3))
            for number, (before, after, kernel) in enumerate(plan, start=1):
                table += _conv(
                    f'{name}.conv{number}',
                    f'{name}.bn{number}',
                    f'{path}/conv_{number}',
                    f'{path}/norm_{number}',
                    before,
                    after,
                    kernel,
                )
            if inputs != outputs or (block == 0 and stage > 0):
                table += _conv(
                    f'{name}.downsample.0',
                    f'{name}.downsample.1',
                    f'{path}/shortcut',
                    f'{path}/shortcut_norm',
                    inputs,
                    outputs,
                    1,
                )
            inputs, index = outputs, index + 1
    return table


def _conv(
    conv: str, norm: str, path: str, norm_path: str, inputs: int, outputs: int, kernel: int
) -> list[files.Entry]:
    shape = (outputs, inputs, kernel, kernel)
    return [
        files.Entry(f'{conv}.weight', shape, (f'params/{path}/kernel',), files.CONV),
        *files.norm(norm, f'params/{norm_path}', outputs),
        files.Entry(f'{norm}.running_mean', (outputs,), (f'batch_stats/{norm_path}/mean',)),
        files.Entry(f'{norm}.running_var', (outputs,), (f'batch_stats/{norm_path}/variance',)),
    ]


def load(folder) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a net: (parameters, running statistics) of `models.resnet.ResNet`, float32 NumPy.

    Raises:
      UserError: as `files.load`.
    """
    variables = files.load(folder, entries(**fields(folder)), UNUSED)
    return variables['params'], variables['batch_stats']


def export(params: Mapping[str, Any], batch_stats: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns a ResNet's parameters and running statistics under torchvision's names."""
    depth = sum(name.startswith('block_') for name in params)
    stem_kernel, _, _, width = params['stem']['kernel'].shape
    # The width of a block's first norm tells its stage.
    inner = [params[f'block_{index}']['norm_1']['scale'].shape[0] for index in range(depth)]
    stages = int(np.log2(max(inner) // width)) + 1
    table = entries(
        stage_sizes=tuple(inner.count(width * 2**stage) for stage in range(stages)),
        width=width,
        bottleneck='conv_3' in params['block_0'],
        stem_kernel=stem_kernel,
    )
    return files.export({'params': params, 'batch_stats': batch_stats}, table)
