"""Tables of CLIP's tensors: Hugging Face's CLIPModel, and OpenAI's names, which open_clip keeps.

`logit_scale`, a scalar, is called so in both.
"""

import math
from collections.abc import Mapping
from typing import Any

from mmjax.errors import UserError
from mmjax.pretrained import files, resnet

EPSILON = 1e-5  # of every LayerNorm, unless a Hugging Face config says otherwise
LOGIT_SCALE = files.Entry('logit_scale', (), ('params/logit_scale',))
HEAD = 64  # the width of each of OpenAI's heads

_HUGGING_FACE = {
    'query': 'self_attn.q_proj',
    'key': 'self_attn.k_proj',
    'value': 'self_attn.v_proj',
    'out': 'self_attn.out_proj',
    'norm_1': 'layer_norm1',
    'norm_2': 'layer_norm2',
    'up': 'mlp.fc1',
    'down': 'mlp.fc2',
}
_OPENAI = {'norm_1': 'ln_1', 'norm_2': 'ln_2', 'up': 'mlp.c_fc', 'down': 'mlp.c_proj'}


def hugging_face(vision: Mapping[str, Any], text: Mapping[str, Any]) -> list[files.Entry]:
    """Returns CLIPModel's table for towers of these fields (ClipVision, ClipText)."""
    width, root, path = vision['width'], 'vision_model', 'params/vision'
    table = [
        LOGIT_SCALE,
        files.Entry(f'{root}.embeddings.class_embedding', (width,), (f'{path}/class_token',)),
        _patches(f'{root}.embeddings.patch_embedding.weight', vision),
        files.Entry(
            f'{root}.embeddings.position_embedding.weight',
            (positions(vision), width),
            (f'{path}/positions',),
        ),
        *files.norm(f'{root}.pre_layrnorm', f'{path}/norm_pre', width),  # spelled so there
        *_layers(root, path, vision),
        *files.norm(f'{root}.post_layernorm', f'{path}/norm', width),
        files.Entry(
            'visual_projection.weight',
            (vision['features'], width),
            (f'{path}/projection/kernel',),
            files.LINEAR,
        ),
    ]
    width, root, path = text['width'], 'text_model', 'params/text'
    return [
        *table,
        files.Entry(
            f'{root}.embeddings.token_embedding.weight',
            (text['vocabulary'], width),
            (f'{path}/words/embedding',),
        ),
        files.Entry(
            f'{root}.embeddings.position_embedding.weight',
            (text['max_length'], width),
            (f'{path}/positions',),
        ),
        *_layers(root, path, text),
        *files.norm(f'{root}.final_layer_norm', f'{path}/norm', width),
        files.Entry(
            'text_projection.weight',
            (text['features'], width),
            (f'{path}/projection/kernel',),
            files.LINEAR,
        ),
    ]


def openai(vision: Mapping[str, Any], text: Mapping[str, Any]) -> list[files.Entry]:
    """Returns OpenAI's table for towers of these fields (ClipVision or ModifiedResNet)."""
    width, path = text['width'], 'params/text'
    tower = _modified_resnet(vision) if 'stage_sizes' in vision else _transformer(vision)
    return [
        LOGIT_SCALE,
        *tower,
        files.Entry(
            'token_embedding.weight', (text['vocabulary'], width), (f'{path}/words/embedding',)
        ),
        files.Entry('positional_embedding', (text['max_length'], width), (f'{path}/positions',)),
        *_resblocks('transformer', path, text),
        *files.norm('ln_final', f'{path}/norm', width),
        files.Entry('text_projection', (width, text['features']), (f'{path}/projection/kernel',)),
    ]


def positions(vision: Mapping[str, Any]) -> int:
    """Returns how many positions a image tower has: the grid's, and the class token's or mean."""
    return 1 + (vision['image_size'] // cell(vision)) ** 2


def cell(vision: Mapping[str, Any]) -> int:
    """Returns the side, in pixels, of what one position stands for."""
    if 'stage_sizes' in vision:
        return 4 * 2 ** (len(vision['stage_sizes']) - 1)
    return vision['patch_size']


def heads(path, width: int, head: int) -> int:
    """Returns how many heads of width `head` there are; UserError where `width` is no multiple."""
    if width % head:
        raise UserError(f'{path}: width {width} is not a multiple of the head width {head}')
    return width // head


def is_openai(weights: files.Weights) -> bool:
    """Returns whether tensors have OpenAI's names, not CLIPModel's; UserError where they have none.

    One tensor of CLIPModel's names makes them CLIPModel's.
    """
    if any(name.startswith(('vision_model.', 'text_model.')) for name in weights.names):
        return False
    if any(name.startswith('visual.') for name in weights.names):
        return True
    raise UserError(f"{weights.folder}: the tensors are not named as CLIPModel's or OpenAI's are")


def openai_fields(weights: files.Weights) -> dict[str, dict[str, Any]]:
    """Returns the fields of both towers as OpenAI's tensors show them, and its quick GELU.

    Raises:
      UserError: a tensor that shows a size is missing or has not as many axes as it must, or a
        width is no multiple of `HEAD`.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        sizes = weights.shape(name)
        if len(sizes) != rank:
            file = weights.names[name]
            raise UserError(f"{file}: tensor '{name}' has shape {list(sizes)}, not {rank} axes")
        return sizes

    def transformer(root: str, width: int, features: int) -> dict[str, Any]:
        return {
            'width': width,
            'depth': weights.count(rf'{root}\.resblocks\.(\d+)\.'),
            'heads': heads(weights.folder, width, HEAD),
            'mlp_width': shape(f'{root}.resblocks.0.mlp.c_fc.bias', 1)[0],
            'features': features,
            'activation': 'quick_gelu',
            'epsilon': EPSILON,
        }

    vocabulary, _ = shape('token_embedding.weight', 2)
    max_length, width = shape('positional_embedding', 2)
    _, features = shape('text_projection', 2)
    text = {'vocabulary': vocabulary, 'max_length': max_length}
    text |= transformer('transformer', width, features)
    sizes = resnet.stage_sizes(weights, r'visual\.')
    if sizes:
        vision = {'stage_sizes': sizes, 'width': shape('visual.layer1.0.conv1.weight', 4)[0]}
        positions, channels = shape('visual.attnpool.positional_embedding', 2)
        vision |= {'heads': heads(weights.folder, channels, HEAD), 'features': features}
    else:
        width, _, patch, _ = shape('visual.conv1.weight', 4)
        positions, _ = shape('visual.positional_embedding', 2)
        vision = {'patch_size': patch, **transformer('visual.transformer', width, features)}
    return {
        'vision': {'image_size': math.isqrt(positions - 1) * cell(vision), **vision},
        'text': text,
    }


def _patches(name: str, vision: Mapping[str, Any]) -> files.Entry:
    shape = (vision['width'], 3, vision['patch_size'], vision['patch_size'])
    return files.Entry(name, shape, ('params/vision/patch_embedding/kernel',), files.PATCHES)


def _layers(root: str, path: str, tower: Mapping[str, Any]) -> list[files.Entry]:
    sizes = tower['width'], tower['mlp_width']
    return files.blocks(f'{root}.encoder.layers', path, tower['depth'], _HUGGING_FACE, *sizes)


def _resblocks(root: str, path: str, tower: Mapping[str, Any]) -> list[files.Entry]:
    width = tower['width']
    name = f'{root}.resblocks'
    table = files.blocks(name, path, tower['depth'], _OPENAI, width, tower['mlp_width'])
    for index in range(tower['depth']):
        table += files.fused_attention(f'{name}.{index}.attn', f'{path}/block_{index}', width)
    return table


def _transformer(vision: Mapping[str, Any]) -> list[files.Entry]:
    width, path = vision['width'], 'params/vision'
    return [
        files.Entry('visual.class_embedding', (width,), (f'{path}/class_token',)),
        _patches('visual.conv1.weight', vision),
        files.Entry(
            'visual.positional_embedding', (positions(vision), width), (f'{path}/positions',)
        ),
        *files.norm('visual.ln_pre', f'{path}/norm_pre', width),
        *_resblocks('visual.transformer', path, vision),
        *files.norm('visual.ln_post', f'{path}/norm', width),
        files.Entry('visual.proj', (width, vision['features']), (f'{path}/projection/kernel',)),
    ]


def _modified_resnet(vision: Mapping[str, Any]) -> list[files.Entry]:
    width, sizes = vision['width'], vision['stage_sizes']
    channels = width * cell(vision)  # of the last stage: they grow as the map shrinks
    name, path = 'visual.attnpool', 'params/vision/pool'
    table = resnet.stages(sizes, width, True, prefix='visual.', root='vision/')
    stem = ((width // 2, 3), (width // 2, width // 2), (width, width // 2))
    for number, (outputs, inputs) in enumerate(stem, start=1):
        table += resnet.convolution(
            f'visual.conv{number}',
            f'visual.bn{number}',
            f'vision/stem_{number}',
            f'vision/stem_norm_{number}',
            (outputs, inputs, 3),
        )
    shape = (positions(vision), channels)
    return [
        *table,
        files.Entry(f'{name}.positional_embedding', shape, (f'{path}/positions',)),
        *files.linear(f'{name}.q_proj', f'{path}/query', channels, channels),
        *files.linear(f'{name}.k_proj', f'{path}/key', channels, channels),
        *files.linear(f'{name}.v_proj', f'{path}/value', channels, channels),
        *files.linear(f'{name}.c_proj', f'{path}/out', channels, vision['features']),
    ]
