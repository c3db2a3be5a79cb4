"""Scores of the sign-language recipe: word error rates, losses, and pictures of what was read."""

import jax
import numpy as np
from matplotlib.figure import Figure

from mmjax.decode import ctc as decoding
from mmjax.engine.task import Evaluator, Scores
from mmjax.evals import alignment, posteriorgram

SHOWN = 4  # sentences drawn


class SignScores(Evaluator):
    """Decodes a split, greedily and by beam search, and compares with what was signed.

    References keep the words that training lacks: they cannot be right, and are counted as
    `unknown_words`.
    """

    def __init__(self, task, sequences, batch_size: int):
        self.task, self.sequences, self.batch_size = task, sequences, batch_size

    def run(self, apply, *, final):
        decoded, parts, masks, spread, rows = {}, [], [], [], []
        for outputs, batch in apply('decode', self.sequences, self.batch_size):
            for name in ('greedy', 'beam', 'teacher'):
                if name in outputs:
                    ids, lengths = outputs.pop(name)
                    decoded.setdefault(name, []).extend(
                        row[:length].tolist() for row, length in zip(ids, lengths, strict=True)
                    )
            spread.append(outputs.pop('spread'))
            parts.append(outputs['rows'])
            masks.append(batch['label_mask'])
            rows.extend(batch['row'].tolist())
        words = self.sequences.vocabulary.decode
        references = [self.sequences.words(row) for row in rows]
        read = {name: [words(ids) for ids in found] for name, found in decoded.items()}
        found = {name: alignment.errors(references, texts) for name, texts in read.items()}
        greedy = found['greedy']
        metrics = {
            'wer': greedy.wer,
            'ser': greedy.ser,
            'substitutions': greedy.substitutions,
            'deletions': greedy.deletions,
            'insertions': greedy.insertions,
            'wer_beam': found['beam'].wer,
            'ser_beam': found['beam'].ser,
            'sentences': greedy.sentences,
            'words': greedy.words,
            'unknown_words': self.sequences.counts['unknown_words'],
            'temporal_variance': _ratio(spread),
        }
        if 'teacher' in found:
            metrics['teacher_wer'] = found['teacher'].wer
        metrics |= self._losses(parts, masks)
        for length, of in alignment.by_length(references, read['greedy']).items():
            metrics[f'wer_of_{length}'] = of.wer
        drawn = {}
        if final:
            drawn = self._sentences(apply)
            drawn['confusions'] = posteriorgram.confusions(greedy.confusions)
            drawn['lengths'] = _by_length(references, read)
        return Scores(metrics, drawn)

    def _losses(self, parts, masks):
        """Returns the losses of the whole split: sums over sums."""
        rows = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        label_mask = np.concatenate(masks)
        batch = {'mask': np.ones(len(label_mask), bool), 'label_mask': label_mask}
        terms = self.task._terms(rows, batch)
        out = {n: float(t.mean() if hasattr(t, 'mean') else t) for n, t in terms.items()}
        weighed = {n: w for n, w in self.task.weights.items() if n in terms}
        return out | {'loss': sum(w * out[name] for name, w in weighed.items())}

    def _sentences(self, apply):
        """Draws the posteriors of sentences spread over the split."""
        out, vocabulary = {}, self.sequences.vocabulary
        rows = np.unique(np.linspace(0, len(self.sequences) - 1, SHOWN).astype(int))
        shown = self.sequences.subset(rows)
        names = [*vocabulary.words, '<unknown>']
        for all_scores, batch in apply('log_probs', shown, SHOWN):
            found = decoding.greedy(all_scores, batch['frames'])
            found = {name: np.asarray(value) for name, value in found._asdict().items()}
            for place, scores in enumerate(all_scores):
                count = found['lengths'][place]
                spans = [found[name][place, :count].tolist() for name in ('ids', 'starts', 'ends')]
                labels = batch['labels'][place][batch['label_mask'][place]]
                known = [i if i > 0 else len(names) - 1 for i in labels.tolist()]
                padded = np.pad(
                    scores[: batch['length'][place]], ((0, 0), (0, 1)), constant_values=-np.inf
                )
                row = int(batch['row'][place])
                out[f'sentence_{rows[row]}'] = posteriorgram.posteriorgram(
                    padded,
                    list(zip(*spans, strict=True)),
                    known,
                    names,
                    title=shown.record(row)['id'],
                )
        return out


def _ratio(parts) -> float:
    """Returns the sum of all totals over that of all counts; NaN where there are none."""
    total, count = (np.concatenate(x).sum(dtype=float) for x in zip(*parts, strict=True))
    return float(total / count) if count else float('nan')


def _by_length(references, read):
    figure = Figure(figsize=(6, 3), layout='constrained')
    figure.set_label('Word error rate by the number of glosses in a sentence.')
    axis = figure.subplots()
    for name, texts in read.items():
        found = alignment.by_length(references, texts)
        lengths = [length for length in found if length]
        axis.plot(lengths, [found[n].wer for n in lengths], marker='o', label=name)
    axis.set(xlabel='glosses in the reference', ylabel='word error rate', ylim=(0, None))
    axis.legend()
    axis.grid(alpha=0.3)
    return figure
