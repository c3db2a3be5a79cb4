"""BERT, MiniLM, RoBERTa, CodeBERT, GraphCodeBERT: Hugging Face's names, and our Bert.

The names of BertModel and RobertaModel are the same, with or without 'bert.' or 'roberta.'.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.errors import UserError
from mmjax.pretrained import files

# The pooler and the pre-training heads, and a buffer that counts 0, 1, 2, …
UNUSED = (
    r'pooler\..*',
    r'cls\..*',
    r'lm_head\..*',
    r'classifier\..*',
    r'embeddings\.position_ids',
)
_KEYS = {
    'vocabulary': ('vocab_size', 30522),
    'width': ('hidden_size', 768),
    'depth': ('num_hidden_layers', 12),
    'heads': ('num_attention_heads', 12),
    'mlp_width': ('intermediate_size', 3072),
    'max_length': ('max_position_embeddings', 512),
    'types': ('type_vocab_size', 2),
    'epsilon': ('layer_norm_eps', 1e-12),
}
_BLOCK = {
    'attention/query': 'attention.self.query',
    'attention/key': 'attention.self.key',
    'attention/value': 'attention.self.value',
    'attention/out': 'attention.output.dense',
    'norm_1': 'attention.output.LayerNorm',
    'mlp/up': 'intermediate.dense',
    'mlp/down': 'output.dense',
    'norm_2': 'output.LayerNorm',
}


def fields(folder) -> dict[str, Any]:
    """Returns the fields of `models.bert.Bert` that config.json describes (not its dropout).

    Raises:
      UserError: the config is missing, malformed, or of an encoder that Bert does not compute.
    """
    path = pathlib.Path(folder) / files.CONFIG
    config = files.read_json(path)
    files.check_config(path, config, 'model_type', ('bert', 'roberta'))
    files.check_config(path, config, 'hidden_act', ('gelu',))
    files.check_config(path, config, 'position_embedding_type', ('absolute',))
    files.check_config(path, config, 'is_decoder', (False,))
    if config.get('model_type') != 'roberta':
        return files.sizes(path, config, _KEYS)
    fields = files.sizes(path, config, _KEYS | {'vocabulary': ('vocab_size', 50265)})
    pad = config.get('pad_token_id', 1)
    if isinstance(pad, bool) or not isinstance(pad, int) or not 0 <= pad < fields['max_length'] - 1:
        raise UserError(
            f"{path}: key 'pad_token_id' is {pad!r}, not a whole number from 0 that leaves "
            f"positions of 'max_position_embeddings' {fields['max_length']} to tokens"
        )
    return fields | {'position_offset': pad + 1}


def entries(
    *,
    vocabulary: int,
    width: int,
    depth: int,
    mlp_width: int,
    max_length: int,
    types: int,
    **_: Any,
) -> list[files.Entry]:
    """Returns the table of an encoder of these sizes (fields of Bert), without the prefix."""
    embedding = lambda theirs, ours, count: files.Entry(
        f'embeddings.{theirs}_embeddings.weight', (count, width), (f'params/{ours}/embedding',)
    )
    return [
        embedding('word', 'words', vocabulary),
        embedding('position', 'positions', max_length),
        embedding('token_type', 'types', types),
        *files.norm('embeddings.LayerNorm', 'params/norm', width),
        *files.blocks('encoder.layer', 'params', depth, _BLOCK, width, mlp_width),
    ]


def _rename(name: str) -> str:
    # Checkpoints of heads prefix the encoder; the oldest ones name LayerNorm as TensorFlow did.
    name = name.removeprefix('bert.').removeprefix('roberta.')
    name = re.sub(r'LayerNorm\.gamma$', 'LayerNorm.weight', name)
    return re.sub(r'LayerNorm\.beta$', 'LayerNorm.bias', name)


def load(folder) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads an encoder: (parameters of `models.bert.Bert`, {}), float32 NumPy arrays.

    Raises:
      UserError: as `files.load`.
    """
    table = entries(**fields(folder))
    return files.load(folder, table, UNUSED, _rename)['params'], {}


def export(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns a Bert's parameters under BertModel's names, without prefix and without pooler."""
    vocabulary, width = params['words']['embedding'].shape
    depth = sum(name.startswith('block_') for name in params)
    table = entries(
        vocabulary=vocabulary,
        width=width,
        depth=depth,
        mlp_width=params['block_0']['mlp']['up']['bias'].shape[0] if depth else 0,
        max_length=len(params['positions']['embedding']),
        types=len(params['types']['embedding']),
    )
    return files.export({'params': params}, table)
