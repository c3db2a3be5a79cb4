"""Scores of the receipts recipe: counting, answers, and where the questions looked."""

import textwrap

import jax
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from mmjax.engine.task import Evaluator, Scores, gather
from mmjax.evals import classification, generation
from mmjax.recipes.receipts import text as receipts_text

SHOWN = 4  # examples drawn


class ReceiptScores(Evaluator):
    """Counts and answers a split. Counting is scored once a picture, answers once a question.

    While training answers are decoded as `decode.running` says, at the end as `decode.final`. The
    content of an answer, whatever its words, is compared by kind of question. `texts_cut` counts
    the rows with a text too long for `data.buckets`, `rows_skipped` those left out as faulty.
    """

    def __init__(self, task, questions, batch_size: int):
        self.task, self.questions, self.batch_size = task, questions, batch_size

    def run(self, apply, *, final):
        data = self.questions
        outputs, rows = self._joined(apply, 'measure')
        _, first = np.unique(data.index['picture'][rows], return_index=True)
        truth = data.index['label'][rows]
        answers = outputs['classes'].argmax(1)
        counted = classification.score(truth[first], answers[first], data.classes)
        metrics = {
            'accuracy': counted.accuracy,
            'accuracy_low': counted.low,
            'accuracy_high': counted.high,
            'precision': counted.precision,
            'recall': counted.recall,
            'f1': counted.f1,
            'majority': counted.majority,
            'pictures': len(first),
            'questions': len(rows),
            'texts_cut': data.texts_cut,
            'rows_skipped': sum(data.skipped.values()),
        }
        metrics |= self._losses(outputs, first)
        said, place = self._joined(apply, 'answer_last' if final else 'answer_now')
        decode = self.task.tokenizer.decode
        texts = [decode(ids[:n]).strip() for ids, n in zip(*said, strict=True)]
        records = [data.record(int(row)) for row in place]
        truths = [record['answer'].strip() for record in records]
        options = self.task.decode_last if final else self.task.decode_now
        metrics |= {'decoding': options['method'], **generation.score(truths, texts)}
        metrics |= contents(records, texts)
        drawn = {}
        if final:
            names = class_names(data.classes)
            drawn = {'confusion': classification.figure(counted.confusion, names)}
            drawn |= self._examples(apply, texts, place)
        return Scores(metrics, drawn)

    def _joined(self, apply, method):
        """Applies a method to the whole split; returns (outputs, rows)."""
        outputs, batch = gather(apply, method, self.questions, self.batch_size, ('row',))
        return outputs, batch['row']

    def _losses(self, outputs, first):
        """Returns the losses: of a picture once, of tokens as sums over sums."""
        tokens = outputs['tokens'].sum()
        out = {
            'classification': float(outputs['classification'][first].mean()),
            'language': float(outputs['language'].sum() / tokens),
            'token_accuracy': float(outputs['tokens_correct'].sum() / tokens),
        }
        out['perplexity'] = float(np.exp(out['language']))
        return out | {'loss': sum(w * out[name] for name, w in self.task.weights.items())}

    def _examples(self, apply, texts, place):
        """Draws where questions of different pictures looked."""
        out, data, attention = {}, self.questions, jax.jit(self.task.attention)
        for at in np.unique(np.linspace(0, len(place) - 1, SHOWN).astype(int)):
            row = int(place[at])
            example = data.example(row, np.random.default_rng(0), False)
            batch = {key: np.asarray(value)[None] for key, value in example.items()}
            looked = np.asarray(attention(apply.variables, batch))[0]
            words = int(example['question_mask'].sum())
            record = data.record(row)
            title = f'{texts[at]}  (true: {record["answer"]})'
            shown = overlay(example['images'], looked[:, :words], record['question'], title)
            out[f'attention_{row}'] = shown
        return out


def contents(records, texts) -> dict[str, float]:
    """Returns the share of answers whose content is right, in all and by kind of question."""
    right = {}
    for record, text in zip(records, texts, strict=True):
        kind = receipts_text.kind(record['question'])
        wanted = receipts_text.content(kind, record['answer'])
        right.setdefault(kind, []).append(receipts_text.content(kind, text) == wanted)
    every = [value for values in right.values() for value in values]
    out = {'content_accuracy': float(np.mean(every))}
    return out | {f'content_{kind}': float(np.mean(values)) for kind, values in right.items()}


def class_names(classes: int) -> list[str]:
    """Returns '0', '1', …, the last with a plus."""
    return [*map(str, range(classes - 1)), f'{classes - 1}+']


def overlay(picture: np.ndarray, looked: np.ndarray, question: str, answer: str) -> Figure:
    """Draws cross-attention over a picture: averaged over the heads, then each head.

    Args:
      picture: uint8 [S, S, 3].
      looked: float [heads, tokens, grid²], averaged over the tokens of the question.
    """
    maps = looked.mean(1)
    grid = round(maps.shape[1] ** 0.5)
    maps = np.concatenate([maps.mean(0, keepdims=True), maps])
    columns = min(len(maps) + 1, 5)
    lines = -(-(len(maps) + 1) // columns)
    figure = Figure(figsize=(2.1 * columns, 2.3 * lines + 0.5), layout='constrained')
    figure.set_label('Where the words of the question look in the picture: all heads, then each.')
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis in axes:
        axis.axis('off')
    axes = iter(figure.axes)
    axis = next(axes)
    axis.imshow(picture)
    axis.set_title('picture', fontsize=7)
    for index, weights in enumerate(maps):
        axis = next(axes)
        shown = Image.fromarray(weights.reshape(grid, grid).astype(np.float32))
        shown = np.asarray(shown.resize(picture.shape[1::-1], Image.Resampling.BICUBIC))
        axis.imshow(picture)
        axis.imshow(shown, cmap='inferno', alpha=0.55)
        axis.set_title('all heads' if not index else f'head {index - 1}', fontsize=7)
    figure.suptitle(textwrap.fill(f'{question}  →  {answer}', 90), fontsize=8)
    return figure
