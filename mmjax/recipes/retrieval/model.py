"""The towers of the retrieval recipe, built from the config or from published weights."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from mmjax.errors import UserError
from mmjax.models import clip
from mmjax.pretrained import clip as clip_weights
from mmjax.recipes.retrieval.config import Config

TOWERS = {'vision': 'vision/.*', 'text': 'text/.*'}


def build(config: Config, vocabulary: int) -> clip.Clip:
    """Builds CLIP with the sizes of the config, or of the weights that it names.

    Args:
      vocabulary: number of ids of the tokenizer.

    Raises:
      UserError: published weights whose text tower is too small for the tokenizer.
    """
    spec = config.model
    length = config.data.max_tokens
    if spec.pretrained:
        fields = clip_weights.fields(spec.pretrained)
        for key, needed in (('vocabulary', vocabulary), ('max_length', length)):
            if fields['text'][key] < needed:
                raise UserError(
                    f'{spec.pretrained}: the text tower has {key} {fields["text"][key]}, the '
                    f'tokenizer and data.max_tokens need {needed}'
                )
    else:
        shared = {'features': spec.features}
        sizes = {'vocabulary': vocabulary, 'max_length': length}
        fields = {
            'vision': dataclasses.asdict(getattr(spec, spec.vision)) | shared,
            'text': dataclasses.asdict(spec.text) | shared | sizes,
        }
    fields['vision']['image_size'] = config.data.image_size
    return clip.build(
        **fields, temperature=config.losses.temperature or 0.07, dtype=jnp.dtype(config.precision)
    )


def tower_fields(tower: nn.Module) -> dict[str, Any]:
    """Returns the fields of a tower that `pretrained.clip.export` needs."""
    skip = ('dtype', 'implementation', 'parent', 'name', 'pooling', 'share')
    return {key: getattr(tower, key) for key in tower.__dataclass_fields__ if key not in skip}
