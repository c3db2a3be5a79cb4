"""The ContraBin recipe's model as its config describes it, and what its config may not say."""

import jax.numpy as jnp

from mmjax.errors import UserError
from mmjax.models.bert import Bert
from mmjax.pretrained import bert as bert_weights
from mmjax.recipes.contrabin import model as contrabin

LOSSES = ('anchor', 'source_binary', 'comment_binary', 'intermediate')
INTERPOLATIONS = ('naive', 'linear', 'nonlinear')
_BYTES = 260  # the least vocabulary: bytes and special tokens
_ENCODER = {
    'width': (1, None),
    'depth': (1, None),
    'heads': (1, None),
    'mlp_width': (1, None),
    'types': (1, None),
    'position_offset': (0, None),
    'dropout': (0, 0.999),
    'epsilon': (0, None),
}
_RANGES = {  # key → the least and the largest value
    'evaluate_pool': (2, None),
    'data.max_source': (2, None),
    'data.max_comment': (2, None),
    'data.max_binary': (2, None),
    'data.vocabulary': (_BYTES, None),
    'data.binary_vocabulary': (_BYTES, None),
    'data.seed': (0, None),
    'data.max_fault_share': (0, 1),
    'data.compile.workers': (1, None),
    'data.compile.time_limit': (0.1, None),
    'data.compile.val': (0, 1),
    'data.compile.test': (0, 1),
    'model.features': (2, None),
    'model.dropout': (0, 0.999),
    **{
        f'model.{side}.{field}': bounds
        for side in ('anchor', 'binary')
        for field, bounds in _ENCODER.items()
    },
    'losses.temperature': (1e-6, None),
    'losses.softness': (0, 1),
}
_CHOICES = {
    'data.binary_pieces': ('lines', 'words'),
    'model.head': tuple(contrabin.KINDS),
    'model.pooling': contrabin.POOLINGS,
}


def check(config) -> None:
    """Raises UserError, naming the key, where the config holds a value that nothing can use."""
    for key, (least, most) in _RANGES.items():
        value = _read(config, key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # Compared this way round, NaN is refused too.
        if not (number and value >= least and (most is None or value <= most)):
            wanted = f'{least} or more' if most is None else f'from {least} to {most}'
            raise UserError(f'{key}={value!r} must be a number {wanted}')
    for key, known in _CHOICES.items():
        if (value := _read(config, key)) not in known:
            raise UserError(f"{key} '{value}' is not one of {', '.join(known)}")
    for side in ('anchor', 'binary'):
        width, heads = (_read(config, f'model.{side}.{field}') for field in ('width', 'heads'))
        if width % heads:
            raise UserError(f'model.{side}.width={width} cannot be shared by {heads} heads')
    chunk_of(config)
    for name in config.loss_weights:
        if name not in LOSSES:
            raise UserError(f"loss_weights names '{name}'; there are {', '.join(LOSSES)}")
    for name in config.stages:
        options = config.stage[name].to_dict().get('options', {})
        chosen = options.pop('interpolation', 'naive')
        options.pop('keep_anchor', None)
        for key in options:
            known = 'interpolation, keep_anchor'
            raise UserError(f'unknown key stage.{name}.options.{key}; known: {known}')
        if chosen not in INTERPOLATIONS:
            known = ', '.join(INTERPOLATIONS)
            raise UserError(f"stage.{name}.options.interpolation '{chosen}' is not one of {known}")


def chunk_of(config) -> int | str:
    """Returns the rows a tile of the losses, or 'auto'; the command line gives it as text."""
    value = config.losses.chunk
    text = str(value)
    if text != 'auto' and not (text.isdecimal() and int(text)):
        raise UserError(f"losses.chunk={value!r} is neither 'auto' nor a number of rows")
    return text if text == 'auto' else int(text)


def build_model(config, tokenizers, lengths) -> contrabin.ContraBin:
    """Returns the model: encoders of the config's sizes, or of the folders it names.

    Raises:
      UserError: a folder whose encoder has too few tokens, or too little room, for the data.
    """
    spec = config.model
    longest = {'anchor': max(lengths['source'], lengths['comment']), 'binary': lengths['binary']}
    sides = {}
    for side, text in (('anchor', 'source'), ('binary', 'binary')):
        fields, folder = spec[side].to_dict(), spec.pretrained[side]
        if folder:
            fields = _published(folder, tokenizers[text].size, longest[side], fields['dropout'])
        else:
            fields['vocabulary'] = tokenizers[text].size
            fields['max_length'] = longest[side] + fields['position_offset']
        sides[side] = fields
    dtype = jnp.dtype(config.precision)
    return contrabin.ContraBin(
        **{side: Bert(**fields, dtype=dtype) for side, fields in sides.items()},
        features=spec.features,
        head=spec.head,
        pooling=spec.pooling,
        dropout=spec.dropout,
        dtype=dtype,
    )


def _published(folder, vocabulary: int, longest: int, dropout: float) -> dict:
    """Returns the fields of a folder's encoder; of the config's only the dropout counts."""
    fields = {'position_offset': 0, **bert_weights.fields(folder), 'dropout': dropout}
    if fields['vocabulary'] < vocabulary:
        raise UserError(
            f'{folder}: the encoder has vocabulary {fields["vocabulary"]}, the tokenizer '
            f'{vocabulary}'
        )
    room = fields['max_length'] - fields['position_offset']
    if room < longest:
        raise UserError(
            f'{folder}: the encoder has room for {room} tokens, data.max_* need {longest}'
        )
    return fields


def _read(config, key: str):
    for part in key.split('.'):
        config = config[part]
    return config
