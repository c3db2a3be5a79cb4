"""Builds the receipts model from its config, and refuses by key what cannot be built."""

import jax
import jax.numpy as jnp

from mmjax.errors import UserError
from mmjax.models.decoder import Decoder
from mmjax.models.internvit import NORMS, STEMS, InternViT
from mmjax.pretrained import decoder as decoder_weights
from mmjax.recipes.receipts.model import Receipts

ATTENTION = ('xla', 'cudnn', 'auto')
_COUNTS = ('patch_size', 'width', 'depth', 'heads', 'kv_heads', 'mlp_width')


def last_blocks(count: int, depth: int) -> tuple[int, ...]:
    """Returns the numbers of the last `count` of `depth` blocks, at least one."""
    if not 1 <= count <= depth:
        raise UserError(
            f'model.thaw_blocks is {count}, the vision tower has {depth} blocks; to thaw none, '
            'leave the stage out of config.stages'
        )
    return tuple(range(depth - count, depth))


def check(config) -> None:
    """Raises UserError where sizes of the config fit no others, named by their keys."""
    spec, cross = config.model, config.model.cross_attention.to_dict()
    _check_tower(spec.vision.to_dict(), config.data.image_size, spec.shuffle)
    _check_part('model.language.', spec.language.to_dict())
    words, where = _words(config)
    _divides(f'{where}heads', words['heads'], f'{where}width', words['width'])
    _divides(f'{where}kv_heads', words['kv_heads'], f'{where}heads', words['heads'])
    if words['width'] // words['heads'] % 2:
        raise UserError(
            f'{where}heads={words["heads"]} makes heads of an odd size of {where}width='
            f'{words["width"]}, which cannot be turned'
        )
    _check_part('model.cross_attention.', cross)
    _divides('model.cross_attention.heads', cross['heads'], f'{where}width', words['width'])
    if spec.attention not in ATTENTION:
        raise UserError(f"model.attention '{spec.attention}' is not one of {', '.join(ATTENTION)}")
    if spec.attention == 'cudnn' and jax.default_backend() != 'gpu':
        raise UserError(f"model.attention 'cudnn' needs a GPU, not {jax.default_backend()}")
    if spec.attention == 'cudnn' and config.precision == 'float32':
        raise UserError("model.attention 'cudnn' needs precision bfloat16 or float16, not float32")


def build(config, vocabulary: int) -> Receipts:
    """Returns the model of a checked config for a tokenizer of `vocabulary` ids.

    Where `model.pretrained.language` names a folder, the decoder has the sizes of its weights.

    Raises:
      UserError: the decoder of that folder has fewer ids than the tokenizer.
    """
    spec, dtype = config.model, jnp.dtype(config.precision)
    words, folder = _words(config)[0], spec.pretrained.language
    if folder and words['vocabulary'] < vocabulary:
        raise UserError(
            f'{folder}: the decoder has vocabulary {words["vocabulary"]}, its tokenizer '
            f'{vocabulary}'
        )
    words = {'vocabulary': vocabulary, **words}
    shared = {'dtype': dtype, 'implementation': spec.attention, 'remat': spec.remat}
    return Receipts(
        vision=InternViT(image_size=config.data.image_size, **spec.vision.to_dict(), **shared),
        language=Decoder(**words, **shared),
        classes=config.data.classes,
        shuffle=spec.shuffle,
        cross_heads=spec.cross_attention.heads,
        cross_dropout=spec.cross_attention.dropout,
        dtype=dtype,
    )


def _words(config) -> tuple[dict, str]:
    """Returns the decoder's fields, and where they stand."""
    words, folder = config.model.language.to_dict(), config.model.pretrained.language
    if folder:
        return {**words, **decoder_weights.fields(folder)}, f'{folder}: '
    return words, 'model.language.'


def _check_part(where: str, part) -> None:
    for key in _COUNTS:
        if key in part and part[key] < 1:
            raise UserError(f'{where}{key}={part[key]} is less than 1')
    if not 0 <= part['dropout'] < 1:
        raise UserError(f'{where}dropout={part["dropout"]} is not in [0, 1)')


def _divides(key: str, parts: int, whole: str, value: int) -> None:
    if value % parts:
        raise UserError(f'{key}={parts} does not divide {whole}={value}')


def _check_tower(vision, image_size: int, shuffle: int) -> None:
    where, patch = 'model.vision.', vision['patch_size']
    _check_part(where, vision)
    for key, known in (('norm', NORMS), ('stem', STEMS)):
        if vision[key] not in known:
            raise UserError(f"{where}{key} '{vision[key]}' is not one of {', '.join(known)}")
    if vision['stem'] == 'convolutions' and patch & (patch - 1):
        raise UserError(f"{where}patch_size={patch} is no power of 2, as stem 'convolutions' needs")
    if shuffle < 1:
        raise UserError(f'model.shuffle={shuffle} is less than 1')
    if image_size < 1 or image_size % (patch * shuffle):
        raise UserError(
            f'data.image_size={image_size} is no multiple of {patch * shuffle}, the product of '
            f'{where}patch_size and model.shuffle'
        )
    _divides(f'{where}heads', vision['heads'], f'{where}width', vision['width'])
