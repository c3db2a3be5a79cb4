"""Compares our decoder with Hugging Face's Llama and Qwen2, both ways, and what both generate.

Needs torch and transformers beside jax and flax, best in an environment of their own:
    pip install torch transformers jax flax safetensors && python -m benchmarks.parity_decoder
Small random models travel through safetensors; nothing is downloaded. 'load' is theirs read by us,
'export' ours read by from_pretrained: logits must agree to 1e-4, relative to the largest. 'greedy'
and 'beam' generate from prompts of several lengths with the cache: every token must be the same,
and of beams the scores to 1e-4.
"""

import argparse
import functools
import json
import pathlib
import sys
import tempfile

import jax
import numpy as np
import safetensors.numpy
import torch
import transformers

from benchmarks.parity_towers import deviation
from mmjax.decode.autoregressive import Generated, generate
from mmjax.models.decoder import Decoder
from mmjax.pretrained import decoder
from mmjax.pretrained.files import CONFIG, SINGLE

LIMIT = 1e-4
ROOT = pathlib.Path(__file__).parent.parent
SIZES = {
    'vocab_size': 101,
    'hidden_size': 48,
    'num_hidden_layers': 2,
    'num_attention_heads': 6,
    'intermediate_size': 96,
    'bos_token_id': None,
    'eos_token_id': 7,
    'pad_token_id': 0,
}
# Old configs have rope_theta; from_pretrained gathers it in rope_parameters, which it writes.
CONFIGS = (
    ('llama', {**SIZES, 'num_key_value_heads': 2, 'rope_theta': 500.0, 'rms_norm_eps': 1e-3}),
    ('llama', {**SIZES, 'num_key_value_heads': 6, 'tie_word_embeddings': True}),
    ('qwen2', {**SIZES, 'num_key_value_heads': 3, 'rope_theta': 1e6}),
    ('qwen2', {**SIZES, 'num_key_value_heads': 1, 'tie_word_embeddings': True}),
)
ROWS, PROMPT, TOKENS = 24, 9, 12


def build(family: str, config: dict, seed: int) -> torch.nn.Module:
    """Makes a model whose every parameter is random and whose logits differ by much."""
    kind = {
        'llama': (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        'qwen2': (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }
    make_config, make = kind[family]
    generator = torch.Generator().manual_seed(seed)
    model = make(make_config(**config))
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def prompts(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and masks [ROWS, PROMPT]; padding stands on the left, where theirs needs it."""
    rng = np.random.default_rng(seed)
    mask = np.arange(PROMPT) >= rng.integers(0, PROMPT, (ROWS, 1))
    return np.where(mask, rng.integers(8, 101, mask.shape), 0), mask


def their_logits(model: torch.nn.Module, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    tensor, real = torch.from_numpy(tokens), torch.from_numpy(mask).long()
    with torch.no_grad():
        return model(tensor, real, position_ids=(real.cumsum(1) - 1).clamp(min=0)).logits.numpy()


def our_logits(model: Decoder, params, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    apply = functools.partial(model.apply, {'params': params})
    hidden = apply(apply(tokens, method='embed'), mask, train=False)
    return np.asarray(apply(hidden, method='logits'))


def our_texts(model: Decoder, params, tokens, mask, eos: int, beams: int) -> Generated:
    """Generates greedily with one beam, by beam search with more."""

    @jax.jit
    def run(params):
        apply = functools.partial(model.apply, {'params': params})
        last, prefix = apply(apply(tokens, method='embed'), mask, method='prefill')

        def step(suffix, tokens, index):
            x = apply(tokens, method='embed')
            hidden, suffix = apply(x, prefix, suffix, index, method='step')
            return apply(hidden, method='logits'), suffix

        return generate(
            step,
            model.suffix(ROWS, beams, TOKENS - 1),
            apply(last, method='logits'),
            max_tokens=TOKENS,
            eos=eos,
            pad=0,
            method='beam' if beams > 1 else 'greedy',
            beams=beams,
        )

    return jax.tree.map(np.asarray, run(params))


def their_texts(model, tokens: np.ndarray, mask: np.ndarray, eos: int | None, beams: int):
    """The same by `generate`; no early end of a search changes a result."""
    early = {'early_stopping': 'never', 'length_penalty': 1.0} if beams > 1 else {}
    model.generation_config.eos_token_id = eos
    with torch.no_grad():
        return model.generate(
            torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(mask).long(),
            max_new_tokens=TOKENS,
            do_sample=False,
            num_beams=beams,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **early,
        )


def compare(family: str, config: dict, folder: pathlib.Path, seed: int) -> tuple[dict, int]:
    """Returns the deviations by case, and how many parameters there are."""
    theirs, (tokens, mask) = build(family, config, seed), prompts(seed)
    theirs.save_pretrained(folder)
    params, _ = decoder.load(folder)
    model = Decoder(**decoder.fields(folder))
    expected = their_logits(theirs, tokens, mask)[mask]
    found = our_logits(model, params, tokens, mask)[mask]
    errors = {'load': deviation(found, torch.from_numpy(expected))}

    # The token that most texts hold becomes the one that ends them, so that many do.
    texts = their_texts(theirs, tokens, mask, None, 1).sequences[:, PROMPT:].numpy()
    eos = int(np.argmax([(texts == token).any(1).sum() for token in range(1, 101)])) + 1
    ended = set()
    for case, beams in (('greedy', 1), ('beam', 4)):
        found = our_texts(model, params, tokens, mask, eos, beams)
        texts = their_texts(theirs, tokens, mask, eos, beams)
        sequences = texts.sequences[:, PROMPT:].numpy()
        sequences = np.pad(sequences, ((0, 0), (0, TOKENS - sequences.shape[1])))
        # What follows an end differs: we pad, their beams repeat the end.
        sequences[(np.cumsum(sequences == eos, 1) - (sequences == eos)) > 0] = 0
        errors[f'{case}, other texts'] = float((found.tokens != sequences).any(1).mean())
        if beams > 1:
            errors[f'{case}, scores'] = deviation(found.scores, texts.sequences_scores)
        ended |= {*found.lengths.tolist()}
    if len(ended) < 4:
        raise ValueError(f'lengths {ended} say little about how texts end')

    other = folder / 'export'
    other.mkdir()
    tensors, written = decoder.export(params, decoder.fields(folder))
    safetensors.numpy.save_file(tensors, other / SINGLE, metadata={'format': 'pt'})
    (other / CONFIG).write_text(json.dumps(written))
    again = type(theirs).from_pretrained(other).eval()
    errors['export'] = deviation(
        their_logits(again, tokens, mask)[mask], torch.from_numpy(expected)
    )
    return errors, sum(x.numel() for x in theirs.parameters())


def main() -> int:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    results = []
    for seed, (family, config) in enumerate(CONFIGS):
        with tempfile.TemporaryDirectory() as folder:
            errors, count = compare(family, config, pathlib.Path(folder), seed)
        found = ', '.join(f'{key} {error:.1e}' for key, error in errors.items())
        print(f'{family:6s} {count:>8,d} parameters   {found}')
        setting = {key: value for key, value in config.items() if key not in SIZES}
        results.append({'family': family, 'setting': setting, 'deviation': errors})
    worst = max(max(result['deviation'].values()) for result in results)
    path = ROOT / 'benchmarks/results/parity_decoder.json'
    path.parent.mkdir(exist_ok=True)
    versions = {x.__name__: x.__version__.split('+')[0] for x in (jax, torch, transformers)}
    header = {'limit': LIMIT, 'worst': worst, 'versions': versions}
    path.write_text(json.dumps({**header, 'results': results}, indent=1))
    print('agree' if worst < LIMIT else f'DISAGREE: {worst:.1e} is not below {LIMIT:.0e}')
    return 0 if worst < LIMIT else 1


if __name__ == '__main__':
    sys.exit(main())
