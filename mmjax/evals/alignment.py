"""Word error rate: the words substituted, deleted and inserted between reference and hypothesis.

Rates are (S + D + I)/N over the reference words N of all sentences together; they are not capped,
as a hypothesis may hold more words than its reference.
"""

import collections
import dataclasses
from collections.abc import Hashable, Sequence


@dataclasses.dataclass(frozen=True)
class Errors:
    """Errors of a set of sentences; `words` are those of the references.

    `wrong` counts sentences with an error; `confusions[reference, hypothesis]` the substitutions.
    """

    substitutions: int
    deletions: int
    insertions: int
    words: int
    sentences: int
    wrong: int
    confusions: collections.Counter

    @property
    def wer(self) -> float:
        """Word error rate, 0 or more; NaN without a reference word."""
        edits = self.substitutions + self.deletions + self.insertions
        return edits / self.words if self.words else float('nan')

    @property
    def ser(self) -> float:
        """Sentence error rate in 0–1: the fraction with any error; NaN without a sentence."""
        return self.wrong / self.sentences if self.sentences else float('nan')


def align(
    reference: Sequence[Hashable], hypothesis: Sequence[Hashable]
) -> list[tuple[str, Hashable | None, Hashable | None]]:
    """Returns (operation, reference word, hypothesis word) from left to right.

    Operations are 'equal', 'substitute', 'delete' (no hypothesis word: None) and 'insert' (no
    reference word: None). Their number other than 'equal' is the Levenshtein distance. Of equally
    cheap ways the one that RapidFuzz and jiwer take: equal words at both ends are set aside, and
    from the end on a deletion comes first, then an insertion before a cheaper pair, then a pair.
    """
    n = len(reference)
    m = len(hypothesis)
    head = 0
    while head < min(n, m) and reference[head] == hypothesis[head]:
        head += 1
    while min(n, m) > head and reference[n - 1] == hypothesis[m - 1]:
        n -= 1
        m -= 1
    tail = [('equal', *pair) for pair in zip(reference[n:], hypothesis[m:], strict=True)]
    # costs[i][j]: from reference[head : head + i] to hypothesis[head : head + j].
    costs = [list(range(m - head + 1))]
    for i, word in enumerate(reference[head:n], 1):
        above = costs[-1]
        left = i
        row = [left]
        for other, corner, up in zip(hypothesis[head:m], above[:-1], above[1:], strict=True):
            left = corner if word == other else 1 + min(left, up, corner)
            row.append(left)
        costs.append(row)
    i = n - head
    j = m - head
    steps = []
    while i or j:
        word = reference[head + i - 1] if i else None
        other = hypothesis[head + j - 1] if j else None
        if i and costs[i][j] == costs[i - 1][j] + 1:
            steps.append(('delete', word, None))
            i -= 1
        elif not i or costs[i][j - 1] < costs[i - 1][j - 1]:
            steps.append(('insert', None, other))
            j -= 1
        else:
            steps.append(('equal' if word == other else 'substitute', word, other))
            i -= 1
            j -= 1
    start = [('equal', *pair) for pair in zip(reference[:head], hypothesis[:head], strict=True)]
    return start + steps[::-1] + tail


def errors(references: Sequence[Sequence], hypotheses: Sequence[Sequence]) -> Errors:
    """Counts the errors of hypotheses against their references, sentence by sentence.

    Args:
      references, hypotheses: sentences as lists of words (strings, ids); any may be empty.

    Raises:
      ValueError: not as many hypotheses as references, or a sentence that is a string.
    """
    _check(references, hypotheses)
    kinds = collections.Counter()
    confusions = collections.Counter()
    wrong = 0
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        if isinstance(reference, str) or isinstance(hypothesis, str):
            raise ValueError('a sentence must be a list of words, got a string: split it first')
        steps = align(reference, hypothesis)
        kinds.update(kind for kind, _, _ in steps)
        confusions.update((a, b) for kind, a, b in steps if kind == 'substitute')
        wrong += any(kind != 'equal' for kind, _, _ in steps)
    return Errors(
        substitutions=kinds['substitute'],
        deletions=kinds['delete'],
        insertions=kinds['insert'],
        words=sum(map(len, references)),
        sentences=len(references),
        wrong=wrong,
        confusions=confusions,
    )


def by_length(references: Sequence[Sequence], hypotheses: Sequence[Sequence]) -> dict[int, Errors]:
    """Returns {words in the reference: errors of those sentences}, short ones first.

    Raises:
      ValueError: as `errors`.
    """
    _check(references, hypotheses)
    groups = collections.defaultdict(list)
    for pair in zip(references, hypotheses, strict=True):
        groups[len(pair[0])].append(pair)
    return {length: errors(*zip(*groups[length], strict=True)) for length in sorted(groups)}


def _check(references: Sequence, hypotheses: Sequence) -> None:
    if len(references) != len(hypotheses):
        raise ValueError(f'{len(references)} references, but {len(hypotheses)} hypotheses')
