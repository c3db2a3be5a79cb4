"""SigLIP's image tower: names of Hugging Face's SiglipVisionModel (or SiglipModel) and our ViT."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.errors import UserError
from mmjax.pretrained import files

# The text tower, its logit scale and bias, and a buffer that counts 0, 1, 2, …
UNUSED = (r'text_model\..*', 'logit_scale', 'logit_bias', r'.*\.position_ids')
_KEYS = {
    'image_size': ('image_size', 224),
    'patch_size': ('patch_size', 16),
    'width': ('hidden_size', 768),
    'depth': ('num_hidden_layers', 12),
    'heads': ('num_attention_heads', 12),
    'mlp_width': ('intermediate_size', 3072),
    'epsilon': ('layer_norm_eps', 1e-6),
}
_BLOCK = {
    'attention/query': 'self_attn.q_proj',
    'attention/key': 'self_attn.k_proj',
    'attention/value': 'self_attn.v_proj',
    'attention/out': 'self_attn.out_proj',
    'norm_1': 'layer_norm1',
    'norm_2': 'layer_norm2',
    'mlp/up': 'mlp.fc1',
    'mlp/down': 'mlp.fc2',
}


def fields(folder) -> dict[str, Any]:
    """Returns the fields of `models.vit.ViT` that config.json describes.

    Raises:
      UserError: the config is missing, malformed, or of a tower that ViT does not compute.
    """
    path = pathlib.Path(folder) / files.CONFIG
    config = files.read_json(path)
    config = config.get('vision_config', config)
    files.check_config(path, config, 'model_type', ('siglip_vision_model',))
    files.check_config(path, config, 'hidden_act', ('gelu_pytorch_tanh',))
    files.check_config(path, config, 'num_channels', (3,))
    files.check_config(path, config, 'vision_use_head', (True,))
    return files.sizes(path, config, _KEYS)


def entries(
    *, image_size: int, patch_size: int, width: int, depth: int, mlp_width: int, **_: Any
) -> list[files.Entry]:
    """Returns the table of a tower of these sizes (fields of ViT)."""
    patches = (image_size // patch_size) ** 2
    name = 'vision_model.embeddings'
    head = 'vision_model.head'
    pool = 'params/pool'
    probe = files.Layout(lambda x: x[0], lambda x: x[None])
    return [
        files.Entry(
            f'{name}.patch_embedding.weight',
            (width, 3, patch_size, patch_size),
            ('params/patch_embedding/kernel',),
            files.PATCHES,
        ),
        files.Entry(f'{name}.patch_embedding.bias', (width,), ('params/patch_embedding/bias',)),
        files.Entry(f'{name}.position_embedding.weight', (patches, width), ('params/positions',)),
        *files.blocks('vision_model.encoder.layers', 'params', depth, _BLOCK, width, mlp_width),
        *files.norm('vision_model.post_layernorm', 'params/norm', width),
        files.Entry(f'{head}.probe', (1, 1, width), (f'{pool}/probe',), probe),
        *files.fused_attention(f'{head}.attention', f'{pool}/attention', width),
        *files.norm(f'{head}.layernorm', f'{pool}/norm', width),
        *files.linear(f'{head}.mlp.fc1', f'{pool}/mlp/up', width, mlp_width),
        *files.linear(f'{head}.mlp.fc2', f'{pool}/mlp/down', mlp_width, width),
    ]


def _rename(name: str) -> str:
    # transformers 5 saves a SiglipVisionModel without the prefix that published files have.
    bare = name.startswith(('embeddings.', 'encoder.', 'post_layernorm.', 'head.'))
    return f'vision_model.{name}' if bare else name


def load(folder, image_size: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the tower's weights.

    Args:
      folder: config.json and safetensors.
      image_size: size of the images to come; positions are resized to it (bilinear) where it
        is not the published one.

    Returns:
      (parameters of `models.vit.ViT`, {}), float32 NumPy arrays.

    Raises:
      UserError: as `files.load`.
    """
    published = fields(folder)
    params = files.load(folder, entries(**published), UNUSED, _rename)['params']
    if image_size is not None and image_size != published['image_size']:
        grid = image_size // published['patch_size']
        if not grid:
            size = published['patch_size']
            raise UserError(f'{folder}: image_size {image_size} is below the patch size {size}')
        params['positions'] = files.resize_positions(
            params['positions'], grid, 'bilinear', antialias=False
        )
    return params, {}


def export(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns a ViT's parameters under SiglipVisionModel's names."""
    positions, width = params['positions'].shape
    patch_size = math.isqrt(params['patch_embedding']['kernel'].shape[0] // 3)
    table = entries(
        image_size=math.isqrt(positions) * patch_size,
        patch_size=patch_size,
        width=width,
        depth=sum(name.startswith('block_') for name in params),
        mlp_width=params['pool']['mlp']['up']['bias'].shape[0],
    )
    return files.export({'params': params}, table)
