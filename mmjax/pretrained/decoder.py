"""Decoders: names of Llama, Qwen2 and InternLM2, alone or in an InternVL, and our Decoder."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.errors import UserError
from mmjax.pretrained import files

# Frequencies of the rotation, which are computed, and the other parts of an InternVL.
UNUSED = (r'.*\.rotary_emb\.inv_freq', r'vision_model\..*', r'mlp1\..*')
_KEYS = {
    'width': ('hidden_size', 4096),
    'depth': ('num_hidden_layers', 32),
    'heads': ('num_attention_heads', 32),
    'epsilon': ('rms_norm_eps', 1e-6),
}
# Published defaults of the sizes in which the families differ: vocabulary and MLP.
_DEFAULTS = {'llama': (32000, 11008), 'qwen2': (151936, 22016), 'internlm2': (103168, 11008)}
_LLAMA = {
    'words': 'model.embed_tokens',
    'head': 'lm_head',
    'norm': 'model.norm',
    'norm_1': 'input_layernorm',
    'norm_2': 'post_attention_layernorm',
    'query': 'self_attn.q_proj',
    'key': 'self_attn.k_proj',
    'value': 'self_attn.v_proj',
    'out': 'self_attn.o_proj',
    'gate': 'mlp.gate_proj',
    'up': 'mlp.up_proj',
    'down': 'mlp.down_proj',
}
_INTERNLM2 = {
    'words': 'model.tok_embeddings',
    'head': 'output',
    'norm': 'model.norm',
    'norm_1': 'attention_norm',
    'norm_2': 'ffn_norm',
    'fused': 'attention.wqkv',
    'out': 'attention.wo',
    'gate': 'feed_forward.w1',
    'up': 'feed_forward.w3',
    'down': 'feed_forward.w2',
}


def fields(folder) -> dict[str, Any]:
    """Returns the fields of `models.decoder.Decoder` that config.json describes (not its dropout).

    The config is that of a LlamaForCausalLM, Qwen2ForCausalLM or InternLM2ForCausalLM, or of an
    InternVL, whose `llm_config` is one of these.

    Raises:
      UserError: the config is missing, malformed, or of a decoder that Decoder does not compute.
    """
    where, config = _config(folder)
    family = config['model_type']
    files.check_config(where, config, 'hidden_act', ('silu',))
    files.check_config(where, config, 'tie_word_embeddings', (True, False))
    for key in ('attention_bias', 'mlp_bias', 'bias', 'use_sliding_window'):
        files.check_config(where, config, key, (False,))
    vocabulary, mlp_width = _DEFAULTS[family]
    keys = {
        **_KEYS,
        'vocabulary': ('vocab_size', vocabulary),
        'mlp_width': ('intermediate_size', mlp_width),
    }
    sizes = files.sizes(where, config, keys)
    # Without the key, each query head has its key head.
    grouped = config.get('num_key_value_heads') is not None
    kv_heads = {'kv_heads': ('num_key_value_heads', sizes['heads'])}
    sizes |= files.sizes(where, config if grouped else {}, kv_heads)
    files.check_config(where, config, 'head_dim', (None, sizes['width'] / sizes['heads']))
    return {
        **sizes,
        'theta': _theta(where, config),
        'qkv_bias': family == 'qwen2',
        'tied': config.get('tie_word_embeddings', False),
    }


def _config(folder) -> tuple[str, Mapping[str, Any]]:
    path = pathlib.Path(folder) / files.CONFIG
    where, config = str(path), files.read_json(path)
    if 'llm_config' in config:
        where, config = f'{path}, llm_config', config['llm_config']
        if not isinstance(config, Mapping):
            raise UserError(f"{path}: key 'llm_config' is {config!r}, not an object")
    if 'model_type' not in config:
        raise UserError(f"{where}: key 'model_type' is missing")
    files.check_config(where, config, 'model_type', tuple(_DEFAULTS))
    return where, config


def closing(folder) -> int | None:
    """Returns the id of the token that closes texts, None if the folder names none.

    It is `eos_token` of tokenizer_config.json, a token of tokenizer.json, else `eos_token_id` of
    config.json (of several the first); a folder that has neither closes texts with the token that
    it pads them with.

    Raises:
      UserError: a file is malformed, or names a token that does not exist.
    """
    where, config = _config(folder)
    path = pathlib.Path(folder) / 'tokenizer_config.json'
    named = files.read_json(path) if path.is_file() else {}
    for kind in ('eos', 'pad'):
        token = named.get(f'{kind}_token')
        if token := token.get('content') if isinstance(token, Mapping) else token:
            added = files.read_json(pathlib.Path(folder) / 'tokenizer.json').get('added_tokens', [])
            ids = [entry['id'] for entry in added if entry['content'] == token]
            if not ids:
                raise UserError(f"{path}: {kind}_token '{token}' is none of tokenizer.json")
            return ids[0]
        number = config.get(f'{kind}_token_id')
        number = next(iter(number), None) if isinstance(number, list) else number
        if number is not None:
            vocabulary = fields(folder)['vocabulary']
            if type(number) is not int or not 0 <= number < vocabulary:
                raise UserError(
                    f'{where}: {kind}_token_id {number!r} is not in 0 … {vocabulary - 1}'
                )
            return number
    return None


def _theta(where: str, config: Mapping[str, Any]) -> float:
    # transformers 5 has gathered what was rope_theta and rope_scaling before.
    gathered = config.get('rope_parameters') or {}
    for scaling in (gathered, config.get('rope_scaling') or {}):
        for key in ('rope_type', 'type'):
            # 'dynamic' acts only on texts longer than the model was trained on.
            files.check_config(where, scaling, key, ('default', 'dynamic'))
    section = gathered if 'rope_theta' in gathered else config
    if type(section.get('rope_theta')) is int:  # JSON may leave out the '.0'
        section = {'rope_theta': float(section['rope_theta'])}
    return files.sizes(where, section, {'theta': ('rope_theta', 10000.0)})['theta']


def entries(
    *,
    vocabulary: int,
    width: int,
    depth: int,
    heads: int,
    kv_heads: int,
    mlp_width: int,
    qkv_bias: bool,
    tied: bool,
    fused: bool = False,
    **_: Any,
) -> list[files.Entry]:
    """Returns the table of a decoder of these sizes (fields of Decoder).

    `fused`: under InternLM2's names, whose queries, keys and values are one tensor `fused`.
    """
    names = _INTERNLM2 if fused else _LLAMA
    narrow = width // heads * kv_heads
    norm = lambda name, path: files.Entry(f'{name}.weight', (width,), (f'{path}/scale',))
    head = files.Entry(
        f'{names["head"]}.weight', (vocabulary, width), ('params/head',), files.LINEAR
    )
    table = [
        files.Entry(f'{names["words"]}.weight', (vocabulary, width), ('params/words',)),
        norm(names['norm'], 'params/norm'),
        *([] if tied else [head]),
    ]
    inward = {'query': (width, width), 'key': (width, narrow), 'value': (width, narrow)}
    if fused:
        inward = {'fused': (width, width + 2 * narrow)}
    shapes = inward | {
        'out': (width, width),
        'gate': (width, mlp_width),
        'up': (width, mlp_width),
        'down': (mlp_width, width),
    }
    for index in range(depth):
        layer, block = f'model.layers.{index}', f'params/block_{index}'
        for ours in ('norm_1', 'norm_2'):
            table.append(norm(f'{layer}.{names[ours]}', f'{block}/{ours}'))
        for ours, shape in shapes.items():
            linear = files.linear(f'{layer}.{names[ours]}', f'{block}/{ours}', *shape)
            table += linear if qkv_bias and ours in inward else linear[:1]
    return table


def load(folder) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a decoder: (parameters of `models.decoder.Decoder`, {}), float32 NumPy arrays.

    Raises:
      UserError: as `fields` and `files.load`.
    """
    published, fused = fields(folder), _config(folder)[1]['model_type'] == 'internlm2'
    table = entries(**published, fused=fused)
    # A tied head is sometimes stored nonetheless.
    unused = (*UNUSED, *((r'lm_head\.weight', r'output\.weight') if published['tied'] else ()))
    rename = lambda name: name.removeprefix('language_model.')
    params = files.load(folder, table, unused, rename)['params']
    if fused:
        for index in range(published['depth']):
            block = params[f'block_{index}']
            block |= _split(block.pop('fused')['kernel'], published['heads'], published['kv_heads'])
    return params, {}


def _split(kernel: np.ndarray, heads: int, kv_heads: int) -> dict[str, Any]:
    """Splits [width, …]: for each key head in turn its queries, the key and the value."""
    width, group = len(kernel), heads // kv_heads
    parts = kernel.reshape(width, kv_heads, group + 2, width // heads)
    parts = {'query': parts[:, :, :group], 'key': parts[:, :, group], 'value': parts[:, :, -1]}
    return {name: {'kernel': x.reshape(width, -1).copy()} for name, x in parts.items()}


def export(
    params: Mapping[str, Any], fields: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Writes a decoder under its published names.

    Args:
      params: of `models.decoder.Decoder`.
      fields: its fields, as complete as `fields` returns them.

    Returns:
      (tensors, config for config.json) of a Qwen2ForCausalLM, or of a LlamaForCausalLM where
      queries, keys and values have no biases. The ids of special tokens are left to the caller.

    Raises:
      ValueError: parameters do not have the sizes that `fields` says.
    """
    family = 'qwen2' if fields['qkv_bias'] else 'llama'
    keys = {field: key for field, (key, _) in _KEYS.items()} | {
        'vocabulary': 'vocab_size',
        'mlp_width': 'intermediate_size',
        'kv_heads': 'num_key_value_heads',
        'theta': 'rope_theta',
        'tied': 'tie_word_embeddings',
    }
    config = {
        'model_type': family,
        'architectures': [f'{family.capitalize()}ForCausalLM'],
        'hidden_act': 'silu',
        **{key: fields[field] for field, key in keys.items()},
        **dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id')),
    }
    return files.export({'params': params}, entries(**fields)), config
