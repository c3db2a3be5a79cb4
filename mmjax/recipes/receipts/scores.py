"""Scores of the receipts recipe: counting, answers, and the attention of the questions."""

import itertools
import textwrap

import jax
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from mmjax.engine.task import Evaluator, Scores, gather
from mmjax.evals import classification, generation, modalities
from mmjax.recipes.receipts import text as receipts_text

VERDICTS = modalities.verdicts({'image': 'image', 'question': 'question'})
SWAPS = ('image', 'question', 'both')
EXAMPLES = 4  # drawn


class ReceiptScores(Evaluator):
    """Counts and answers a split. Counting is scored once per image, answers once per question.

    While training answers are decoded by `decode.running`, at the end by `decode.final`. The
    content of an answer, whatever its words, is compared by kind of question. `texts_cut` counts
    the rows with a text too long for `data.buckets`, `rows_skipped` those left out as faulty.
    """

    def __init__(self, task, dataset, batch_size: int, *, final_only: bool):
        self.task = task
        self.dataset = dataset
        self.batch_size = batch_size
        self.final_only = final_only
        running = () if final_only else ('answer_running',)
        self.methods = (*running, 'answer_final', 'attention', 'answer_other_image', 'swaps')

    def run(self, predict, *, final, results):
        data = self.dataset
        rows = results.batch['row']
        _, first = np.unique(data.index['picture'][rows], return_index=True)
        labels = data.index['label'][rows][first]
        predicted = results.outputs['predicted'][first]
        counted, confusion = classification.score(labels, predicted, data.classes)
        decoding = self.task.config.decode.final if final else self.task.config.decode.running
        method = 'answer_final' if final else 'answer_running'
        (tokens, lengths), batch = gather(predict, method, data, self.batch_size, ('row',))
        decode = self.task.tokenizer.decode
        texts = [decode(ids[:n]).strip() for ids, n in zip(tokens, lengths, strict=True)]
        records = [data.record(int(row)) for row in batch['row']]
        metrics = {
            **counted,
            'pictures': len(first),
            'questions': len(rows),
            'texts_cut': data.texts_cut,
            'rows_skipped': sum(data.skipped.values()),
            'perplexity': float(np.exp(results.losses['language'])),
            'decoding': decoding.method,
            **generation.score([record['answer'].strip() for record in records], texts),
            **contents(records, texts),
        }
        figures = {}
        if final:
            metrics |= self._swaps(predict, records)
            names = class_names(data.classes)
            figures = {'confusion': classification.figure(confusion, names)}
            figures |= self._examples(predict, texts, batch['row'])
        return Scores(metrics, figures)

    def _swaps(self, predict, records) -> dict[str, float | str]:
        """Returns how answers change when the image or the question is that of another row.

        `swap_cosine_<modality>`: of the distributions over the answer's tokens, see
        `ReceiptsTask.swaps`, over rows that meet another image and another kind of question;
        `content_accuracy_other_image` (by kind too): fraction of answers whose content is still
        right when another image is put in, decoded alike, of `questions_other_image` questions.
        """
        data = self.dataset
        picture = data.index['picture']
        swaps, batch = gather(predict, 'swaps', data, self.batch_size, ('row',))
        kind = lambda row: receipts_text.kind(data.record(int(row))['question'])
        pairs = list(zip(swaps['row'], batch['row'], strict=True))
        differs = picture[swaps['row']] != picture[batch['row']]
        unrelated = differs & [kind(other) != kind(row) for other, row in pairs]
        if not unrelated.any():
            return {'modality_verdict': modalities.UNKNOWN}
        cosine = {name: float(swaps[name][unrelated].mean()) for name in SWAPS}
        furthest = cosine.pop('both')
        outputs, _ = gather(predict, 'answer_other_image', data, self.batch_size)
        texts = [
            self.task.tokenizer.decode(ids[:n]).strip()
            for ids, n, other in zip(outputs[0], outputs[1], differs, strict=True)
            if other
        ]
        kept = [record for record, other in zip(records, differs, strict=True) if other]
        other = contents(kept, texts)
        return {
            **{f'swap_cosine_{name}': value for name, value in cosine.items()},
            **{f'{name}_other_image': value for name, value in other.items()},
            'questions_other_image': len(kept),
            'modality_verdict': modalities.verdict(cosine, furthest),
        }

    def _examples(self, predict, texts, rows):
        """Draws the attention of questions about different images."""
        figures = {}
        attention = jax.jit(self.task.attention)
        for place in np.unique(np.linspace(0, len(rows) - 1, EXAMPLES).astype(int)):
            row = int(rows[place])
            example = self.dataset.example(row, np.random.default_rng(0), False)
            batch = {key: np.asarray(value)[None] for key, value in example.items()}
            weights = np.asarray(attention(predict.variables, batch))[0]
            words = int(example['question_mask'].sum())
            record = self.dataset.record(row)
            answer = f'{texts[place]}  (true: {record["answer"]})'
            figures[f'attention_{row}'] = overlay(
                example['images'], weights[:, :words], record['question'], answer
            )
        return figures


def contents(records, texts) -> dict[str, float]:
    """Returns the fraction of answers whose content is right, in all and by kind of question."""
    correct = {}
    for record, text in zip(records, texts, strict=True):
        kind = receipts_text.kind(record['question'])
        target = receipts_text.content(kind, record['answer'])
        correct.setdefault(kind, []).append(receipts_text.content(kind, text) == target)
    means = {f'content_{kind}': float(np.mean(values)) for kind, values in correct.items()}
    return {'content_accuracy': float(np.mean([*itertools.chain(*correct.values())])), **means}


def class_names(classes: int) -> list[str]:
    """Returns '0', '1', …, the last with a plus."""
    return [*map(str, range(classes - 1)), f'{classes - 1}+']


def overlay(image: np.ndarray, weights: np.ndarray, question: str, answer: str) -> Figure:
    """Draws cross-attention over an image: averaged over the heads, then each head.

    Args:
      image: uint8 [S, S, 3].
      weights: float [heads, tokens, grid²]; averaged over the tokens.
    """
    maps = weights.mean(1)
    grid = round(maps.shape[1] ** 0.5)
    maps = np.concatenate([maps.mean(0, keepdims=True), maps])
    columns = min(len(maps) + 1, 5)
    lines = -(-(len(maps) + 1) // columns)
    figure = Figure(figsize=(2.1 * columns, 2.3 * lines + 0.5), layout='constrained')
    figure.set_label("Attention of the question's words to the image: all heads, then each.")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    names = ['image', 'all heads', *(f'head {index}' for index in range(len(maps) - 1))]
    for axis, name in zip(axes, names, strict=False):
        axis.imshow(image)
        axis.set_title(name, fontsize=7)
    for axis, values in zip(axes[1:], maps, strict=False):
        values = Image.fromarray(values.reshape(grid, grid).astype(np.float32))
        values = values.resize(image.shape[1::-1], Image.Resampling.BICUBIC)
        axis.imshow(np.asarray(values), cmap='inferno', alpha=0.55)
    for axis in axes:
        axis.axis('off')
    figure.suptitle(textwrap.fill(f'{question}  →  {answer}', 90), fontsize=8)
    return figure
