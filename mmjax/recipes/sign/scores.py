"""Scores of the sign-language recipe: word error rates, and figures of decoded sentences."""

import numpy as np
from matplotlib.figure import Figure

from mmjax.decode import ctc as decoding
from mmjax.engine.task import Evaluator, Scores, gather
from mmjax.evals import alignment, posteriorgram
from mmjax.recipes.sign.data import SignSequences

DRAWN = 4  # sentences
COUNTS = ('substitutions', 'deletions', 'insertions', 'sentences', 'words')


class SignScores(Evaluator):
    """Decodes a split, greedily and by beam search, and compares with the references.

    References keep the words that training lacks: they cannot be right, and are counted as
    `unknown_words`.
    """

    methods = ('decode', 'log_probs')

    def __init__(self, sentences: SignSequences, batch_size: int):
        self.dataset = sentences
        self.batch_size = batch_size

    def run(self, predict, *, final, results=None):
        decoded, _ = gather(predict, 'decode', self.dataset, self.batch_size)
        squares, count = (x.sum(dtype=float) for x in decoded.pop('temporal_squares'))
        words = self.dataset.vocabulary.decode
        references = [self.dataset.words(row) for row in range(len(self.dataset))]
        hypotheses = {
            name: [words(row[:length]) for row, length in zip(*ids, strict=True)]
            for name, ids in decoded.items()
        }
        errors = {name: alignment.errors(references, texts) for name, texts in hypotheses.items()}
        greedy = errors['greedy']
        metrics = {
            'wer': greedy.wer,
            'ser': greedy.ser,
            **{name: getattr(greedy, name) for name in COUNTS},
            'wer_beam': errors['beam'].wer,
            'ser_beam': errors['beam'].ser,
            'unknown_words': self.dataset.counts['unknown_words'],
            'temporal_variance': float(squares / count) if count else float('nan'),
        }
        if 'teacher' in errors:
            metrics['teacher_wer'] = errors['teacher'].wer
        for length, part in alignment.by_length(references, hypotheses['greedy']).items():
            metrics[f'wer_of_{length}'] = part.wer
        figures = {}
        if final:
            figures = self._sentences(predict)
            figures['confusions'] = posteriorgram.confusions(greedy.confusions)
            figures['lengths'] = _by_length(references, hypotheses)
        return Scores(metrics, figures)

    def _sentences(self, predict):
        """Draws the posteriors of sentences spread over the split."""
        rows = np.unique(np.linspace(0, len(self.dataset) - 1, DRAWN).astype(int))
        chosen = self.dataset.subset(rows)
        names = [*self.dataset.vocabulary.words, '<unknown>']
        figures = {}
        for log_probs, batch in predict('log_probs', chosen, DRAWN):
            greedy = decoding.greedy(log_probs, batch['frames'])
            spans = [np.asarray(x) for x in (greedy.ids, greedy.starts, greedy.ends)]
            for index, row in enumerate(batch['row'].tolist()):
                count = int(greedy.lengths[index])
                labels = batch['labels'][index][batch['label_mask'][index]]
                scores = log_probs[index, : batch['length'][index]]
                figures[f'sentence_{rows[row]}'] = posteriorgram.posteriorgram(
                    np.pad(scores, ((0, 0), (0, 1)), constant_values=-np.inf),
                    list(zip(*(x[index, :count].tolist() for x in spans), strict=True)),
                    [i if i > 0 else len(names) - 1 for i in labels.tolist()],
                    names,
                    title=chosen.record(row)['id'],
                )
        return figures


def _by_length(references, hypotheses):
    figure = Figure(figsize=(6, 3), layout='constrained')
    figure.set_label('Word error rate by the number of glosses in a sentence.')
    axis = figure.subplots()
    for name, texts in hypotheses.items():
        rates = {n: part.wer for n, part in alignment.by_length(references, texts).items() if n}
        axis.plot([*rates], [*rates.values()], marker='o', label=name)
    axis.set(xlabel='glosses in the reference', ylabel='word error rate', ylim=(0, None))
    axis.legend()
    axis.grid(alpha=0.3)
    return figure
