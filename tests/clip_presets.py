"""The sizes of OpenAI's CLIP models, as fields of both towers."""

from typing import Any


def _vit(patch_size: int, width: int, depth: int, features: int, text_width: int) -> dict[str, Any]:
    block = lambda width: {'width': width, 'heads': width // 64, 'mlp_width': 4 * width}
    ends = {'features': features, 'activation': 'quick_gelu', 'epsilon': 1e-5}
    return {
        'vision': {
            'image_size': 224,
            'patch_size': patch_size,
            'depth': depth,
            **block(width),
            **ends,
        },
        'text': {'vocabulary': 49408, 'max_length': 77, 'depth': 12, **block(text_width), **ends},
    }


def vit_b_32() -> dict[str, Any]:
    """Fields of OpenAI's ViT-B/32, for `models.clip.build`: 151,277,313 parameters."""
    return _vit(32, 768, 12, 512, 512)


def vit_b_16() -> dict[str, Any]:
    """Fields of OpenAI's ViT-B/16: 149,620,737 parameters."""
    return _vit(16, 768, 12, 512, 512)


def vit_l_14() -> dict[str, Any]:
    """Fields of OpenAI's ViT-L/14: 427,616,513 parameters."""
    return _vit(14, 1024, 24, 768, 768)


def rn50() -> dict[str, Any]:
    """Fields of OpenAI's RN50: 102,007,137 parameters."""
    vision = {
        'image_size': 224,
        'stage_sizes': (3, 4, 6, 3),
        'width': 64,
        'heads': 32,
        'features': 1024,
    }
    return {'vision': vision, 'text': vit_b_32()['text'] | {'features': 1024}}
