"""Compares our towers with Hugging Face's on random weights that travel through safetensors.

Needs torch and transformers beside jax and flax, best in an environment of their own:
    pip install torch transformers jax flax safetensors && python -m benchmarks.parity_towers
Small configurations by default; `--published` takes siglip-base-patch16-224, MiniLM-L6 and
GraphCodeBERT (random weights; nothing is downloaded). Every tower must agree to 1e-4, relative to
the largest output.
"""

import argparse
import pathlib
import sys
import tempfile

import jax
import numpy as np
import torch
import transformers

from mmjax.models.bert import Bert
from mmjax.models.vit import ViT
from mmjax.pretrained import bert, siglip

LIMIT = 1e-4


def scramble(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Makes every parameter random, the biases and norm scales too, so that none hides a slip."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data + 0.05 * noise
    return model.eval()


def deviation(ours: jax.Array, theirs: torch.Tensor) -> float:
    """Returns max |ours − theirs| / max |theirs|."""
    theirs = theirs.numpy()
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def compare_siglip(config: dict, folder: pathlib.Path, seed: int) -> tuple[float, int]:
    config = transformers.SiglipVisionConfig(**config)
    theirs = scramble(transformers.SiglipVisionModel(config), seed)
    theirs.save_pretrained(folder)
    size = config.image_size
    images = np.random.default_rng(seed).normal(size=(2, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).pooler_output
    params, _ = siglip.load(folder)
    model = ViT(**siglip.fields(folder))
    ours = jax.jit(lambda params: model.apply({'params': params}, images, train=False))(params)
    return deviation(ours, expected), sum(x.numel() for x in theirs.parameters())


def compare_bert(config: dict, folder: pathlib.Path, seed: int) -> tuple[float, int]:
    config = transformers.BertConfig(**config)
    theirs = scramble(transformers.BertModel(config), seed)
    theirs.save_pretrained(folder)
    return deviation_of_text(theirs, folder, seed)


def compare_roberta(config: dict, folder: pathlib.Path, seed: int) -> tuple[float, int]:
    config = transformers.RobertaConfig(**config)
    # With the head of its pre-training: the encoder's names then begin with 'roberta.'.
    whole = scramble(transformers.RobertaForMaskedLM(config), seed)
    whole.save_pretrained(folder)
    return deviation_of_text(whole.roberta, folder, seed)


def deviation_of_text(
    theirs: torch.nn.Module, folder: pathlib.Path, seed: int
) -> tuple[float, int]:
    pad, rng = theirs.config.pad_token_id, np.random.default_rng(seed)
    mask = np.arange(12) < np.array([[12], [7], [1]])
    # Where it stands RoBERTa takes the padding token for padding, whatever the mask says.
    tokens = np.where(mask, rng.integers(pad + 1, theirs.config.vocab_size, (3, 12)), pad)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens), torch.from_numpy(mask).long())
    params, _ = bert.load(folder)
    model = Bert(**bert.fields(folder))
    apply = jax.jit(lambda params: model.apply({'params': params}, tokens, mask, train=False))
    ours, real = apply(params), mask.nonzero()
    error = deviation(ours[real], expected.last_hidden_state[real])
    return error, sum(x.numel() for x in theirs.parameters())


def main() -> int:
    transformers.utils.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--published', action='store_true', help='the published sizes')
    published = parser.parse_args().published
    small = {'hidden_size': 48, 'num_hidden_layers': 3, 'num_attention_heads': 4}
    vision = (
        [{}]
        if published
        else [
            {**small, 'intermediate_size': 96, 'image_size': 32, 'patch_size': 8},
            {**small, 'intermediate_size': 80, 'image_size': 30, 'patch_size': 7},
        ]
    )
    minilm = {'hidden_size': 384, 'num_hidden_layers': 6, 'intermediate_size': 1536}
    text = (
        [minilm]
        if published
        else [
            {**small, 'intermediate_size': 96, 'vocab_size': 101, 'max_position_embeddings': 16},
        ]
    )
    graphcodebert = {'max_position_embeddings': 514, 'type_vocab_size': 1, 'layer_norm_eps': 1e-5}
    code = (
        [graphcodebert]
        if published
        else [
            {
                **small,
                **graphcodebert,
                'intermediate_size': 96,
                'vocab_size': 101,
                'max_position_embeddings': 14,
            },
        ]
    )
    worst = 0.0
    cases = [('siglip', compare_siglip, x) for x in vision]
    cases += [('bert', compare_bert, x) for x in text]
    cases += [('roberta', compare_roberta, x) for x in code]
    for seed, (name, compare, config) in enumerate(cases):
        with tempfile.TemporaryDirectory() as folder:
            error, count = compare(config, pathlib.Path(folder), seed)
        print(f'{name:8s} {count:>12,d} parameters   largest deviation {error:.1e}')
        worst = max(worst, error)
    print('agree' if worst < LIMIT else f'DISAGREE: {worst:.1e} is not below {LIMIT:.0e}')
    return 0 if worst < LIMIT else 1


if __name__ == '__main__':
    sys.exit(main())
