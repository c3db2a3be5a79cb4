"""Compares our CLIP with Hugging Face's, both ways, and its ResNet with a plain PyTorch one.

Needs torch and transformers beside jax and flax, best in an environment of their own:
    pip install torch transformers jax flax safetensors && python -m benchmarks.parity_clip
Small random models travel through safetensors; nothing is downloaded. 'load' is a CLIPModel read
by us; 'export' is ours read by CLIPModel.from_pretrained; 'resnet' is OpenAI's names read by us,
against the net written here with PyTorch's own layers; 'positions' is a resized grid against
torch's bicubic. Everything must agree to 1e-4, relative to the largest output.
"""

import argparse
import json
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from torch import nn

from mmjax.models import clip as models
from mmjax.pretrained import clip
from mmjax.pretrained.files import OPEN_CLIP, SINGLE

LIMIT = 1e-4
ROOT = pathlib.Path(__file__).parent.parent
BLOCK = {'hidden_size': 48, 'num_hidden_layers': 3, 'num_attention_heads': 4}
TEXT = {
    **BLOCK,
    'intermediate_size': 96,
    'vocab_size': 101,
    'max_position_embeddings': 16,
    'eos_token_id': 100,
    'bos_token_id': 99,
    'pad_token_id': 0,
}
CONFIGS = (
    ({**BLOCK, 'intermediate_size': 96, 'image_size': 32, 'patch_size': 8}, 'quick_gelu'),
    ({**BLOCK, 'intermediate_size': 80, 'image_size': 30, 'patch_size': 7}, 'gelu'),
)


# ------------------------------------------- CLIP's ResNet, with PyTorch's layers


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, inner: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn2, self.bn3 = nn.BatchNorm2d(inner), nn.BatchNorm2d(4 * inner)
        self.conv3 = nn.Conv2d(inner, 4 * inner, 1, bias=False)
        self.average = nn.AvgPool2d(stride)
        if stride > 1 or inputs != 4 * inner:
            conv = nn.Conv2d(inputs, 4 * inner, 1, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * inner))

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = self.average(self.bn2(self.conv2(y)).relu())
        shortcut = self.downsample(self.average(x)) if hasattr(self, 'downsample') else x
        return (self.bn3(self.conv3(y)) + shortcut).relu()


class AttentionPool(nn.Module):
    def __init__(self, places: int, width: int, features: int):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(places + 1, width))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, features)

    def forward(self, x, heads: int):
        x = x.flatten(2).permute(0, 2, 1)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding
        split = lambda y: y.unflatten(-1, (heads, -1)).transpose(1, 2)
        query, key, value = (split(f(x)) for f in (self.q_proj, self.k_proj, self.v_proj))
        pooled = nn.functional.scaled_dot_product_attention(query[:, :, :1], key, value)
        return self.c_proj(pooled.transpose(1, 2).flatten(1))


class ModifiedResNet(nn.Module):
    """A net whose state_dict has OpenAI's names without 'visual.'."""

    def __init__(self, stages: tuple[int, ...], width: int, image_size: int, features: int):
        super().__init__()
        for number, (before, after, stride) in enumerate(
            ((3, width // 2, 2), (width // 2, width // 2, 1), (width // 2, width, 1)), start=1
        ):
            conv = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
            setattr(self, f'conv{number}', conv)
            setattr(self, f'bn{number}', nn.BatchNorm2d(after))
        inputs, self.depth = width, len(stages)
        for stage, blocks in enumerate(stages):
            inner, layers = width * 2**stage, []
            for position in range(blocks):
                layers.append(Bottleneck(inputs, inner, 2 if stage and not position else 1))
                inputs = 4 * inner
            setattr(self, f'layer{stage + 1}', nn.Sequential(*layers))
        places = (image_size // (4 * 2 ** (len(stages) - 1))) ** 2
        self.attnpool = AttentionPool(places, inputs, features)

    def forward(self, x, heads: int):
        for number in (1, 2, 3):
            conv, norm = getattr(self, f'conv{number}'), getattr(self, f'bn{number}')
            x = norm(conv(x)).relu()
        x = nn.functional.avg_pool2d(x, 2)
        for stage in range(self.depth):
            x = getattr(self, f'layer{stage + 1}')(x)
        return self.attnpool(x, heads)


# ------------------------------------------- what is compared


def scramble(model: nn.Module, seed: int) -> nn.Module:
    """Makes every parameter and running statistic random, so that none hides a slip."""
    generator = torch.Generator().manual_seed(seed)
    noise = lambda x: 0.05 * torch.randn(x.shape, generator=generator)
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if x.is_floating_point():
            x.data = (x.data + noise(x)).abs() if 'running_var' in name else x.data + noise(x)
    return model.eval()


def deviation(ours, theirs) -> float:
    """Returns max |ours − theirs| / max |theirs|."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def inputs(size: int, seed: int):
    """Pictures uint8, texts that end in token 100, and their masks; padding is 0, then 100."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (4, size, size, 3), dtype=np.uint8)
    tokens = rng.integers(1, 99, (4, 16))
    ends = np.array([[15], [6], [1], [9]])
    tokens = np.where(np.arange(16) > ends, np.array([[0], [0], [100], [100]]), tokens)
    np.put_along_axis(tokens, ends, 100, 1)
    return images, tokens, np.arange(16) <= ends


def see(images: np.ndarray) -> torch.Tensor:
    mean, deviation = (np.array(x) for x in clip.PIXELS)
    pixels = ((images / 255 - mean) / deviation).astype(np.float32)
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def their_outputs(model, images, tokens, mask):
    with torch.no_grad():
        out = model(torch.from_numpy(tokens), see(images), torch.from_numpy(mask).long())
    image = model.get_image_features(see(images)).pooler_output.detach()
    text = model.get_text_features(torch.from_numpy(tokens)).pooler_output.detach()
    return image.numpy(), text.numpy(), out.logits_per_image.numpy()


def our_outputs(model, variables, images, tokens, mask):
    image, text, scale = jax.jit(model.apply)(variables, images, tokens, mask)
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    return image, text, scale * unit(image) @ unit(text).T


def compare(ours, theirs) -> dict[str, float]:
    names = ('image', 'text', 'logits')
    return {name: deviation(a, b) for name, a, b in zip(names, ours, theirs, strict=True)}


def load_case(vision: dict, activation: str, folder: pathlib.Path, seed: int):
    config = transformers.CLIPConfig(
        text_config={**TEXT, 'hidden_act': activation},
        vision_config={**vision, 'hidden_act': activation},
        projection_dim=40,
    )
    theirs = scramble(transformers.CLIPModel(config), seed)
    theirs.save_pretrained(folder)
    params, _ = clip.load(folder)
    batch = inputs(vision['image_size'], seed)
    model = models.build(**clip.fields(folder))
    ours = our_outputs(model, {'params': params}, *batch)
    return compare(ours, their_outputs(theirs, *batch)), sum(x.numel() for x in theirs.parameters())


def export_case(vision: dict, activation: str, folder: pathlib.Path, seed: int):
    ends = {'features': 40, 'activation': activation, 'epsilon': 1e-5, 'depth': 3, 'heads': 4}
    fields = {
        'vision': {
            'image_size': vision['image_size'],
            'patch_size': vision['patch_size'],
            'width': 48,
            'mlp_width': vision['intermediate_size'],
            **ends,
        },
        'text': {'vocabulary': 101, 'max_length': 16, 'width': 48, 'mlp_width': 96, **ends},
    }
    model, batch = models.build(**fields), inputs(vision['image_size'], seed)
    params = random_params(model, batch, seed)['params']
    tensors, config = clip.export(params, {}, fields)
    safetensors.numpy.save_file(tensors, folder / SINGLE, metadata={'format': 'pt'})
    (folder / 'config.json').write_text(json.dumps(config))
    theirs, report = transformers.CLIPModel.from_pretrained(folder, output_loading_info=True)
    if any(report[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')):
        raise ValueError(f'CLIPModel does not take all tensors: {report}')
    ours = our_outputs(model, {'params': params}, *batch)
    return compare(ours, their_outputs(theirs.eval(), *batch)), sum(
        x.size for x in tensors.values()
    )


def random_params(model, batch, seed: int):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(seed), *batch)
    return jax.tree.map(lambda x: rng.uniform(-0.3, 0.3, x.shape).astype(np.float32), shapes)


def resnet_case(stages: tuple[int, ...], size: int, folder: pathlib.Path, seed: int):
    """Writes OpenAI's names under open_clip's file name, reads them, and writes them again."""
    width, heads, features = 16, 8, 40
    theirs = scramble(ModifiedResNet(stages, width, size, features), seed)
    text = dict(
        vocabulary=101,
        max_length=16,
        width=48,
        depth=1,
        heads=4,
        mlp_width=96,
        features=features,
        activation='quick_gelu',
        epsilon=1e-5,
    )
    vision = dict(image_size=size, stage_sizes=stages, width=width, heads=heads, features=features)
    fields, batch = {'vision': vision, 'text': text}, inputs(size, seed)
    model = models.build(**fields)
    variables = random_params(model, batch, seed)
    tensors, config = clip.export(variables['params'], variables['batch_stats'], fields)
    state = {f'visual.{name}': x.contiguous() for name, x in theirs.state_dict().items()}
    tower = {name for name in tensors if name.startswith('visual.')}
    if tower != {name for name in state if not name.endswith('num_batches_tracked')}:
        raise ValueError('export and PyTorch name the tensors of the net differently')
    whole = {
        name: torch.from_numpy(x.copy()) for name, x in tensors.items() if name not in tower
    } | state
    safetensors.torch.save_file(whole, folder / OPEN_CLIP)
    (folder / clip.OPEN_CLIP_CONFIG).write_text(json.dumps(config))
    params, stats = clip.load(folder)
    if clip.fields(folder) != fields:
        raise ValueError('fields change on the way through open_clip_config.json')
    encode = lambda v, x, train: model.apply(
        v, x, None, train, method='encode_image', mutable=['batch_stats']
    )[0]
    encode = jax.jit(encode, static_argnums=2)
    loaded = {'params': params, 'batch_stats': stats}
    errors = {}
    for mode, train in (('image', False), ('image, batch statistics', True)):
        with torch.no_grad():
            expected = theirs.train(train)(see(batch[0]), heads).numpy()
        errors[mode] = deviation(encode(loaded, batch[0], train), expected)
    return errors, sum(x.numel() for x in theirs.parameters())


def positions_case(old: int, new: int, folder: pathlib.Path, seed: int):
    table = np.random.default_rng(seed).normal(size=(1 + old * old, 24)).astype(np.float32)
    square = torch.from_numpy(table[1:].reshape(1, old, old, 24)).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(square, (new, new), mode='bicubic', antialias=True)
    expected = np.concatenate([table[:1], grid[0].permute(1, 2, 0).reshape(-1, 24).numpy()])
    return {'grid': deviation(clip.resize_positions(table, new), expected)}, expected.size


def main() -> int:
    transformers.utils.logging.disable_progress_bar()
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    cases = [
        (name, run, *x)
        for name, run in (('load', load_case), ('export', export_case))
        for x in CONFIGS
    ]
    cases += [('resnet', resnet_case, (1, 1, 1, 1), 64), ('resnet', resnet_case, (2, 3, 1, 2), 96)]
    cases += [('positions', positions_case, 7, 9), ('positions', positions_case, 9, 4)]
    results = []
    for seed, (name, run, *setting) in enumerate(cases):
        with tempfile.TemporaryDirectory() as folder:
            errors, count = run(*setting, pathlib.Path(folder), seed)
        found = ', '.join(f'{key} {error:.1e}' for key, error in errors.items())
        print(f'{name:10s} {count:>9,d} numbers   {found}')
        results.append({'case': name, 'setting': setting, 'numbers': count, 'deviation': errors})
    worst = max(max(result['deviation'].values()) for result in results)
    path = ROOT / 'benchmarks/results/parity_clip.json'
    path.parent.mkdir(exist_ok=True)
    versions = {x.__name__: x.__version__.split('+')[0] for x in (jax, torch, transformers)}
    header = {'limit': LIMIT, 'worst': worst, 'versions': versions}
    path.write_text(json.dumps({**header, 'results': results}, indent=1))
    print('agree' if worst < LIMIT else f'DISAGREE: {worst:.1e} is not below {LIMIT:.0e}')
    return 0 if worst < LIMIT else 1


if __name__ == '__main__':
    sys.exit(main())
