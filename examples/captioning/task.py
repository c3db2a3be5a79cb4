"""Captioning: image tokens are the prefix from which a decoder writes a sentence."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from mmjax.data import images, tokenizers
from mmjax.data.drawing import COLOURS, Pen, pick
from mmjax.decode import autoregressive
from mmjax.engine import config as config_lib
from mmjax.engine.outputs import EmbeddingWriter
from mmjax.engine.task import Evaluator, Scores, Task, gather
from mmjax.evals import generation
from mmjax.losses.language import token_rows
from mmjax.losses.term import Term
from mmjax.models.decoder import Decoder
from mmjax.models.internvit import InternViT
from mmjax.sections import field
from mmjax.testing import Arrays

PAD, _, OPENING, EOS = range(4)  # the special tokens [PAD], [UNK], [CLS], [SEP]
SIZE = 32  # of an image, in pixels
LENGTH = 12  # tokens of a caption, EOS included


@dataclasses.dataclass(frozen=True)
class Config(config_lib.Config):
    task: str = field('examples.captioning.task:CaptionTask')
    images: int = field(2000, 'drawn to train on; an eighth as many are scored', least=8)
    width: int = field(64, 'of a token, a multiple of 8', least=8)


def draw(rng):
    """Returns an image of two shapes, uint8 [SIZE, SIZE, 3], and its caption."""
    image = Image.new('RGB', (SIZE, SIZE), 'white')
    names = []
    for centre in ([9, 16], [23, 16]):
        shape, n = pick(rng, (('triangle', 3), ('square', 4), ('circle', 32)))
        colour = pick(rng, ('red', 'yellow', 'green', 'blue'))
        pen = Pen(ImageDraw.Draw(image), *rng.normal(centre), rng.uniform(11, 14))
        pen.fill(np.exp(2j * np.pi * (np.arange(n) + 0.5) / n) / 2j, COLOURS[colour])
        names.append(f'a {colour} {shape}')
    return np.asarray(image), ' left of '.join(names)


class CaptionTask(Task):
    """Learns the groups `tower` and `decoder` by the loss `caption`, per token."""

    Config = Config
    towers = {'tower': 'tower/.*', 'decoder': 'decoder/.*'}

    def __init__(self, config, assets=None):
        self.tokenizer = tokenizers.load_tokenizer(assets) if assets else None
        self.datasets = {}
        for split, rows in (('train', config.images), ('val', config.images // 8)):
            rng = np.random.default_rng([config.data.seed, len(self.datasets)])
            pixels, captions = zip(*(draw(rng) for _ in range(rows)), strict=True)
            self.tokenizer = self.tokenizer or tokenizers.train_tokenizer(captions, 300)
            tokens, _ = self.tokenizer.encode(captions, LENGTH + 1)
            self.datasets[split] = Arrays(split, pixels=np.stack(pixels), tokens=tokens)
        sizes = dict(width=config.width, depth=1, heads=4, mlp_width=4 * config.width)
        self.tower = InternViT(SIZE, 8, stem='convolutions', **sizes)
        self.decoder = Decoder(self.tokenizer.size, kv_heads=4, **sizes)

    def rules(self):
        return tuple(self.towers.items())

    def dataset(self, split):
        return self.datasets[split]

    def init(self, key, batch):
        tokens = batch['tokens']
        everything = lambda model: model.logits(model(model.embed(tokens), tokens > 0, train=False))
        tower = self.tower.init(key, batch['pixels'] / 127.5, train=False)
        decoder = self.decoder.init(key, method=everything)
        return {'params': {'tower': tower['params'], 'decoder': decoder['params']}}

    def look(self, variables, batch):
        tower = self.tower.bind({'params': variables['params']['tower']})
        return tower(batch['pixels'] / 127.5 - 1.0, train=False)

    def read(self, variables, batch, tokens):
        """Returns the decoder, the embeddings of the image and `tokens`, and their mask."""
        decoder = self.decoder.bind({'params': variables['params']['decoder']})
        seen = self.look(variables, batch)
        mask = jnp.concatenate([jnp.ones(seen.shape[:2], bool), tokens != PAD], axis=1)
        return decoder, jnp.concatenate([seen, decoder.embed(tokens)], axis=1), mask

    def forward(self, variables, batch, stage, *, train, key):
        targets = batch['tokens'][:, 1:]
        decoder, embeddings, mask = self.read(variables, batch, batch['tokens'][:, :-1])
        logits = decoder.logits(decoder(embeddings, mask, train=False)[:, -LENGTH:])
        return token_rows(logits, targets, targets != PAD)[:2], {}

    def terms(self, variables, outputs, batch, stage):
        totals = (jnp.where(batch['mask'], x, 0).sum() for x in outputs)
        return {'caption': Term(*totals)}

    def generate(self, variables, batch):
        opening = jnp.full((len(batch['pixels']), 1), OPENING)
        decoder, embeddings, mask = self.read(variables, batch, opening)
        hidden, prefix = decoder.prefill(embeddings, mask)

        def step(suffix, tokens, index):
            hidden, suffix = decoder.step(decoder.embed(tokens), prefix, suffix, index)
            return decoder.logits(hidden), suffix

        start = decoder.suffix(len(opening), 1, LENGTH), decoder.logits(hidden)
        return autoregressive.greedy(step, *start, max_tokens=LENGTH, eos=EOS, pad=PAD).tokens

    def evaluators(self):
        return {'val': Captions(self)}

    def save_assets(self, workdir):
        self.tokenizer.save(workdir)

    def predict(self, predict, inputs, output, question=None):
        pixels = images.crop_resize(images.open_image(inputs), (0, 0, 1, 1), SIZE)
        tokens, _ = gather(predict, 'generate', Arrays('predict', pixels=pixels[None]), 1)
        return self.tokenizer.decode(tokens[0]).strip()

    def embed(self, predict, output):
        values, batch = gather(predict, 'look', self.datasets['val'], 32, ['tokens'])
        captions = map(self.tokenizer.decode, batch['tokens'])
        with EmbeddingWriter(output, len(values)) as writer:
            writer.add(values.mean(axis=1), [{'caption': text.strip()} for text in captions])
        return f'{len(values)} embeddings in {output}'


class Captions(Evaluator):
    methods = ('generate',)

    def __init__(self, task):
        self.dataset = task.datasets['val']
        self.decode = task.tokenizer.decode

    def run(self, predict, *, final, results=None):
        tokens, batch = gather(predict, 'generate', self.dataset, 32, ['tokens'])
        references = [self.decode(ids) for ids in batch['tokens']]
        return Scores(generation.score(references, [self.decode(ids) for ids in tokens]))
