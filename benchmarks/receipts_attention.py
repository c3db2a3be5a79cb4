"""Where the questions of a receipts run look: on the receipt, or anywhere.

    python benchmarks/receipts_attention.py --workdir=RUN [--pictures=200]

Draws test pictures with one receipt that covers at most 30 % of them and asks each of them one
wording of `How many receipts do you see?`, in turn. The ratio of a picture is the cross-attention's
mass on the receipt, mean over heads and words of the question, over the receipt's share of the
area: 1 where a question looks everywhere alike. A cell that the receipt covers in part counts in
part. The control takes the receipt of the next picture in place of its own.

Writes benchmarks/results/receipts_attention.json.
"""

import argparse
import io
import json
import pathlib
import sys

import jax
import ml_collections
import numpy as np
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from mmjax.engine import build
from mmjax.engine.train import weights_from
from mmjax.recipes.receipts import data as receipts
from mmjax.recipes.receipts import text as receipts_text
from mmjax.recipes.receipts.synthetic import drawing
from mmjax.recipes.receipts.synthetic import pictures as receipts_synthetic

MOST_AREA, ENOUGH, BATCH = 0.3, 2.0, 40


def coverage(one: receipts_synthetic.Placed, grid: int, fine: int = 32) -> np.ndarray:
    """Returns how much of each cell a placed receipt covers, float [grid²] in 0–1, by rows."""
    side = grid * fine
    scale = side / receipts_synthetic.UNITS
    drawn = drawing.receipt(one.what, np.random.default_rng(0), scale * one.zoom)
    alpha = drawn.rotate(one.angle, Image.Resampling.BILINEAR, expand=True).getchannel('A')
    canvas = Image.new('L', (side, side))
    left, top = one.x * scale - alpha.width / 2, one.y * scale - alpha.height / 2
    canvas.paste(alpha, (round(left), round(top)))
    cells = np.asarray(canvas, float).reshape(grid, fine, grid, fine) / 255
    return cells.mean((1, 3)).ravel()


def ratios(looked: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Returns the mass of attention [pictures, cells] on what is covered, over its share."""
    return (looked * covered).sum(1) / covered.mean(1)


def summary(looked: np.ndarray, covered: np.ndarray) -> dict[str, float]:
    found = ratios(looked, covered)
    return {
        'mean': float(found.mean()),
        'median': float(np.median(found)),
        'share_at_least_2': float((found >= ENOUGH).mean()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--workdir', type=pathlib.Path, required=True)
    parser.add_argument('--pictures', type=int, default=200)
    told = parser.parse_args()
    plain = json.loads((told.workdir / 'config.json').read_text())['config']
    built = build.run(ml_collections.ConfigDict(plain), assets=told.workdir)
    task, data = built.task, plain['data']
    seed = data['seed']
    with jax.set_mesh(built.mesh):
        variables, _ = weights_from(built, str(told.workdir))
    questions = [
        receipts_text.pair('count', wording, '', 0)[0] for wording in range(receipts_text.WORDINGS)
    ]
    tokens, _ = receipts_text.plain_tokens(
        task.tokenizer, questions, task.max_tokens, task.opening_id
    )
    words = np.full((len(tokens), task.max_tokens), task.tokenizer.pad_id, np.int32)
    for row, ids in enumerate(tokens):
        words[row, : len(ids)] = ids
    asked = np.arange(task.max_tokens) < np.array([len(ids) for ids in tokens])[:, None]

    images, placed, number = [], [], 0
    while len(placed) < told.pictures:
        shown = receipts_synthetic.receipts(receipts_synthetic.scene(seed, 'test', number))
        if len(shown) == 1 and coverage(shown[0], 1, 224)[0] <= MOST_AREA:
            file = receipts_synthetic.picture(seed, 'test', number, side=data['built_in_side'])
            with Image.open(io.BytesIO(file)) as picture:
                images.append(np.asarray(receipts.whole_square(picture, data['image_size'])))
            placed.append(shown[0])
        number += 1
    wording = np.arange(len(images)) % len(words)
    attention, looked = jax.jit(task.attention), []
    for start in range(0, len(images), BATCH):
        rows = slice(start, start + BATCH)
        mask = asked[wording[rows]]
        batch = {
            'images': np.stack(images[rows]),
            'question': words[wording[rows]],
            'question_mask': mask,
        }
        with jax.set_mesh(built.mesh):
            weights = np.asarray(attention(variables, batch)).mean(1)  # [batch, question, cells]
        looked.append((weights * mask[..., None]).sum(1) / mask.sum(1, keepdims=True))
    looked = np.concatenate(looked)
    covered = np.stack([coverage(one, round(looked.shape[1] ** 0.5)) for one in placed])
    out = {
        'run': told.workdir.name,
        'pictures': len(placed),
        'cells': looked.shape[1],
        'area': float(covered.mean()),
        'receipt': summary(looked, covered),
        'shuffled': summary(looked, np.roll(covered, -1, 0)),
    }
    text = json.dumps(out, indent=1)
    print(text)
    path = pathlib.Path(__file__).parent / 'results' / 'receipts_attention.json'
    path.write_text(text + '\n')


if __name__ == '__main__':
    main()
