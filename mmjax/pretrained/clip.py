"""CLIP's published weights: Hugging Face's CLIPModel, open_clip and OpenAI's, and our Clip."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.errors import UserError
from mmjax.pretrained import clip_names, files

OPEN_CLIP_CONFIG, PREPROCESSOR = 'open_clip_config.json', 'preprocessor_config.json'
# Mean and standard deviation of pixels in 0-1 that Clip takes; some of LAION's have others.
PIXELS = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
# Buffers: positions that count 0, 1, 2, …, a counter, and sizes that OpenAI stored as tensors.
UNUSED = (
    r'.*\.position_ids',
    r'.*\.num_batches_tracked',
    'input_resolution',
    'context_length',
    'vocab_size',
)
_VISION = {
    'image_size': ('image_size', 224),
    'patch_size': ('patch_size', 32),
    'width': ('hidden_size', 768),
    'depth': ('num_hidden_layers', 12),
    'heads': ('num_attention_heads', 12),
    'mlp_width': ('intermediate_size', 3072),
    'epsilon': ('layer_norm_eps', clip_names.EPSILON),
}
_TEXT = {
    'vocabulary': ('vocab_size', 49408),
    'max_length': ('max_position_embeddings', 77),
    'width': ('hidden_size', 512),
    'depth': ('num_hidden_layers', 12),
    'heads': ('num_attention_heads', 8),
    'mlp_width': ('intermediate_size', 2048),
    'epsilon': ('layer_norm_eps', clip_names.EPSILON),
}
_OPEN_CLIP_TEXT = {
    'vocabulary': ('vocab_size', 49408),
    'max_length': ('context_length', 77),
    'width': ('width', 512),
    'depth': ('layers', 12),
    'heads': ('heads', 8),
}
# Keys of open_clip's config that change no output. A key beside these and those that are read
# would, unless it is off (None, False, 0 or empty).
_NEUTRAL = ('init_logit_scale', 'patch_dropout', 'hf_tokenizer_name', 'tokenizer_kwargs')


def fields(folder) -> dict[str, dict[str, Any]]:
    """Returns the fields of both towers, {'vision': …, 'text': …}, for `models.clip.build`.

    They are read from config.json where the tensors are named as in Hugging Face's CLIPModel.
    Where they have OpenAI's names they are read from open_clip_config.json; without one the
    weights are OpenAI's own: sizes are those of the tensors, heads are 64 wide, GELU is quick.
    `vision` has `stage_sizes` where the tower is a ModifiedResNet.

    Raises:
      UserError: neither names fit, or a config is missing, malformed or of a model that Clip does
        not compute, or images are normalised otherwise than by `PIXELS`; names file and key.
    """
    weights = files.Weights(folder)
    path = pathlib.Path(folder)
    if not clip_names.is_openai(weights):
        if (path / PREPROCESSOR).is_file():
            pixels = files.read_json(path / PREPROCESSOR)
            for key, value in zip(('image_mean', 'image_std'), PIXELS, strict=True):
                files.check_config(path / PREPROCESSOR, pixels, key, (value,))
        return _hugging_face_fields(path / files.CONFIG)
    if (path / OPEN_CLIP_CONFIG).is_file():
        return _open_clip_fields(path / OPEN_CLIP_CONFIG)
    return clip_names.openai_fields(weights)


def load(folder, image_size: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a whole model, in whichever of the three forms the folder holds.

    Args:
      folder: safetensors, and the config that `fields` reads.
      image_size: side of the images to come; the image tower's positions are resized to it
        where it is not the published one.

    Returns:
      (parameters, running statistics) of `models.clip.Clip`, float32 NumPy arrays; the statistics
      are {} unless the image tower is a ModifiedResNet.

    Raises:
      UserError: as `fields` and `files.load`.
    """
    weights = files.Weights(folder)
    published = fields(folder)
    table = clip_names.openai if clip_names.is_openai(weights) else clip_names.hugging_face
    variables = files.load(folder, table(**published), UNUSED)
    params = variables['params']
    vision = published['vision']
    if image_size is not None and image_size != vision['image_size']:
        cell = clip_names.cell(vision)
        if image_size < cell or ('stage_sizes' in vision and image_size % cell):
            fault = f'not a multiple of {cell}' if image_size >= cell else f'below {cell}'
            raise UserError(f'{folder}: image_size {image_size} is {fault}')
        part = params['vision'].get('pool', params['vision'])
        part['positions'] = resize_positions(part['positions'], image_size // cell)
    return params, variables['batch_stats']


def resize_positions(positions: np.ndarray, grid: int) -> np.ndarray:
    """Resizes positions [1 + old · old, width] to [1 + grid · grid, width]; the first row stays.

    Bicubic with half-pixel centres, smoothed where it shrinks, as open_clip does it.
    """
    resized = files.resize_positions(positions[1:], grid, 'cubic', antialias=True)
    return np.concatenate([positions[:1], resized])


def export(
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    fields: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Writes a Clip under its published names.

    Args:
      params, batch_stats: of `models.clip.Clip`.
      fields: the towers' fields, as complete as `fields` returns them.

    Returns:
      (tensors, config): a CLIPModel's, for config.json; with a ModifiedResNet, which CLIPModel
      does not have, OpenAI's names and the config for open_clip_config.json.

    Raises:
      ValueError: parameters do not have the sizes that `fields` says.
    """
    vision, text = fields['vision'], fields['text']
    resnet = 'stage_sizes' in vision
    table = clip_names.openai(vision, text) if resnet else clip_names.hugging_face(vision, text)
    tensors = files.export({'params': params, 'batch_stats': batch_stats}, table)
    if resnet:
        return tensors, _open_clip_config(vision, text)
    return tensors, _hugging_face_config(vision, text)


# ------------------------------------------- Hugging Face's config


def _hugging_face_fields(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    config = files.read_json(path)
    files.check_config(path, config, 'model_type', ('clip',))
    features = files.sizes(path, config, {'features': ('projection_dim', 512)})
    towers = {}
    for tower, keys in (('vision', _VISION), ('text', _TEXT)):
        # Configs of 2022 carry a second copy, the one that counts.
        copy = config.get(f'{tower}_config_dict') is not None
        part = _section(path, config, f'{tower}_config_dict' if copy else f'{tower}_config')
        where = f'{path}, {tower}_config'
        files.check_config(where, part, 'model_type', (f'clip_{tower}_model',))
        files.check_config(where, part, 'hidden_act', ('quick_gelu', 'gelu'))
        files.check_config(where, part, 'num_channels', (3,))
        activation = part.get('hidden_act', 'quick_gelu')
        towers[tower] = {**files.sizes(where, part, keys), **features, 'activation': activation}
    return towers


def _section(path, config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if key not in config:
        raise UserError(f"{path}: key '{key}' is missing")
    if not isinstance(config[key], Mapping):
        raise UserError(f"{path}: key '{key}' is {config[key]!r}, not an object")
    return config[key]


def _hugging_face_config(vision, text) -> dict[str, Any]:
    def part(tower: str, sizes: Mapping[str, Any], keys) -> dict[str, Any]:
        known = {key: sizes[field] for field, (key, _) in keys.items()}
        extra = {'hidden_act': sizes['activation'], 'projection_dim': sizes['features']}
        return {'model_type': f'clip_{tower}_model', **known, **extra}

    end = text['vocabulary'] - 1  # CLIPModel reads the state of this token
    return {
        'model_type': 'clip',
        'architectures': ['CLIPModel'],
        'projection_dim': text['features'],
        'vision_config': part('vision', vision, _VISION),
        'text_config': {**part('text', text, _TEXT), 'eos_token_id': end},
    }


# ------------------------------------------- open_clip's config


def _open_clip_fields(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    whole = files.read_json(path)
    if 'preprocess_cfg' in whole:
        pixels = _section(path, whole, 'preprocess_cfg')
        for key, value in zip(('mean', 'std'), PIXELS, strict=True):
            files.check_config(f'{path}, preprocess_cfg', pixels, key, (value,))
    config = _section(path, whole, 'model_cfg')
    vision, text = (_section(path, config, key) for key in ('vision_cfg', 'text_cfg'))
    _check_off(path, config, ('embed_dim', 'vision_cfg', 'text_cfg', 'quick_gelu'))
    files.check_config(path, config, 'quick_gelu', (True, False))
    activation = 'quick_gelu' if config.get('quick_gelu', False) else 'gelu'
    shared = files.sizes(path, config, {'features': ('embed_dim', 512)})
    ends = {**shared, 'activation': activation, 'epsilon': clip_names.EPSILON}
    where = f'{path}, text_cfg'
    _check_off(where, text, (*(key for key, _ in _OPEN_CLIP_TEXT.values()), 'mlp_ratio'), 'argmax')
    text_fields = files.sizes(where, text, _OPEN_CLIP_TEXT)
    text_fields |= {'mlp_width': _mlp_width(where, text, text_fields['width']), **ends}
    where = f'{path}, vision_cfg'
    known = ('image_size', 'patch_size', 'width', 'layers', 'head_width', 'mlp_ratio')
    _check_off(where, vision, known, 'tok')
    keys = {'image_size': ('image_size', 224), 'head_width': ('head_width', clip_names.HEAD)}
    if isinstance(vision.get('layers'), list):
        sizes = files.sizes(where, vision, {**keys, 'width': ('width', 64)})
        stages = tuple(vision['layers'])
        if not stages or not all(type(blocks) is int and blocks > 0 for blocks in stages):
            raise UserError(f"{where}: key 'layers' is {vision['layers']!r}, not block counts")
        sizes |= {'stage_sizes': stages, **shared}
        last = sizes['width'] * clip_names.cell(sizes)  # channels grow as the map shrinks
    else:
        keys |= {'patch_size': ('patch_size', 16)}
        sizes = files.sizes(
            where, vision, {**keys, 'width': ('width', 768), 'depth': ('layers', 12)}
        )
        last = sizes['width']
        sizes |= {'mlp_width': _mlp_width(where, vision, last), **ends}
    sizes['heads'] = clip_names.heads(where, last, sizes.pop('head_width'))
    return {'vision': sizes, 'text': text_fields}


def _check_off(path, section: Mapping[str, Any], known: Sequence[str], pool: str = '') -> None:
    for key, value in section.items():
        default = {'pool_type': pool, 'proj_type': 'linear', 'pos_embed_type': 'learnable'}
        if key in known or key in _NEUTRAL or not value or value == default.get(key):
            continue
        raise UserError(f"{path}: key '{key}' is {value!r}; Clip does not compute that")


def _mlp_width(path, section: Mapping[str, Any], width: int) -> int:
    if type(section.get('mlp_ratio')) is int:  # JSON may leave out the '.0'
        section = {**section, 'mlp_ratio': float(section['mlp_ratio'])}
    return int(width * files.sizes(path, section, {'ratio': ('mlp_ratio', 4.0)})['ratio'])


def _open_clip_config(vision, text) -> dict[str, Any]:
    last = vision['width'] * clip_names.cell(vision)
    ratio = text['mlp_width'] / text['width']
    if int(text['width'] * ratio) < text['mlp_width']:  # readers cut the product off
        ratio = math.nextafter(ratio, math.inf)
    return {
        'model_cfg': {
            'embed_dim': text['features'],
            'quick_gelu': text['activation'] == 'quick_gelu',
            'vision_cfg': {
                'image_size': vision['image_size'],
                'layers': list(vision['stage_sizes']),
                'width': vision['width'],
                'head_width': last // vision['heads'],
            },
            'text_cfg': {
                **{key: text[field] for field, (key, _) in _OPEN_CLIP_TEXT.items()},
                'mlp_ratio': ratio,
            },
        }
    }
