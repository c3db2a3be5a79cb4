"""Scores of generated texts: BLEU by sacrebleu, ROUGE by rouge-score, exact match."""

from collections.abc import Sequence


def score(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float]:
    """Compares texts with one reference each; every score is a fraction in 0–1.

    `bleu1` … `bleu4` are corpus BLEU of that highest order, sacrebleu's '13a' tokens, case kept,
    exponential smoothing; `sentence_bleu4` is the mean of sentence BLEU-4 with effective order
    (orders longer than a text are left out). `rouge1`, `rouge2` and `rougeL` are mean F-measures of
    rouge-score, without stemming. `exact_match`: equal but for space at the ends. A failure is an
    error, never a 0; but, as these libraries count, `rouge2` of one word is 0 even where it is
    right, so is ROUGE of letters beyond a-z, and `bleu4` where no text has four tokens.

    Raises:
      ValueError: no texts, or not as many hypotheses as references.
    """
    from rouge_score import rouge_scorer
    from sacrebleu.metrics import BLEU

    if not len(references) or len(references) != len(hypotheses):
        raise ValueError(f'{len(references)} references and {len(hypotheses)} hypotheses')
    out = {}
    for order in range(1, 5):
        bleu = BLEU(max_ngram_order=order).corpus_score(list(hypotheses), [list(references)])
        out[f'bleu{order}'] = bleu.score / 100
    pairs = list(zip(references, hypotheses, strict=True))
    mean = lambda values: sum(values) / len(pairs)
    sentence = BLEU(effective_order=True)
    out['sentence_bleu4'] = mean([sentence.sentence_score(h, [r]).score / 100 for r, h in pairs])
    names = ('rouge1', 'rouge2', 'rougeL')
    scorer = rouge_scorer.RougeScorer(names)
    rouge = [scorer.score(reference, hypothesis) for reference, hypothesis in pairs]
    out |= {name: mean([scores[name].fmeasure for scores in rouge]) for name in names}
    out['exact_match'] = mean([r.strip() == h.strip() for r, h in pairs])
    return out
