"""ResNets: torchvision's names (timm's too) as safetensors, with running statistics."""

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
    sizes = stage_sizes(weights)
    if not sizes or 0 in sizes:
        raise UserError(f"{folder}: the tensors are not named as torchvision's ResNets are")
    stem = weights.shape('conv1.weight')
    if len(stem) != 4:
        raise UserError(f"{weights.names['conv1.weight']}: tensor 'conv1.weight' is no convolution")
    return {
        'stage_sizes': sizes,
        'width': stem[0],
        'bottleneck': 'layer1.0.conv3.weight' in weights.names,
        'stem_kernel': stem[2],
    }


def entries(
    *, stage_sizes: tuple[int, ...], width: int, bottleneck: bool, stem_kernel: int, **_: Any
) -> list[files.Entry]:
    """Returns the table of a net of these sizes (fields of ResNet)."""
    return [
        *convolution('conv1', 'bn1', 'stem', 'stem_norm', (width, 3, stem_kernel)),
        *stages(stage_sizes, width, bottleneck),
    ]


def stage_sizes(weights: files.Weights, prefix: str = '') -> tuple[int, ...]:
    """Returns how many blocks the stages `layer1`, `layer2`, … have, by the tensors' names."""
    count = weights.count(rf'{prefix}layer(\d+)\.', first=1)
    return tuple(weights.count(rf'{prefix}layer{i}\.(\d+)\.') for i in range(1, count + 1))


def stages(
    stage_sizes: tuple[int, ...],
    width: int,
    bottleneck: bool,
    *,
    prefix: str = '',
    root: str = '',
) -> list[files.Entry]:
    """Returns the table of all blocks of a ResNet.

    Args:
      prefix: of the published names.
      root: of our paths, behind 'params/' and 'batch_stats/'.
    """
    table = []
    inputs = width
    index = 0
    for stage, blocks in enumerate(stage_sizes):
        inner = width * 2**stage
        plan = ((inner, 1), (inner, 3), (4 * inner, 1)) if bottleneck else ((inner, 3),) * 2
        for position in range(blocks):
            name, path = f'{prefix}layer{stage + 1}.{position}', f'{root}block_{index}'
            features = inputs
            for number, (outputs, kernel) in enumerate(plan, start=1):
                table += convolution(
                    f'{name}.conv{number}',
                    f'{name}.bn{number}',
                    f'{path}/conv_{number}',
                    f'{path}/norm_{number}',
                    (outputs, features, kernel),
                )
                features = outputs
            if inputs != features or (position == 0 and stage > 0):
                table += convolution(
                    f'{name}.downsample.0',
                    f'{name}.downsample.1',
                    f'{path}/shortcut',
                    f'{path}/shortcut_norm',
                    (features, inputs, 1),
                )
            inputs = features
            index += 1
    return table


def convolution(
    conv: str, norm: str, path: str, norm_path: str, shape: tuple[int, int, int]
) -> list[files.Entry]:
    """Returns a convolution and its batch norm; `shape` is (outputs, inputs, kernel)."""
    outputs, inputs, kernel = shape
    weight = (outputs, inputs, kernel, kernel)
    return [
        files.Entry(f'{conv}.weight', weight, (f'params/{path}/kernel',), files.CONV),
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
