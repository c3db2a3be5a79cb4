"""Measures whether embeddings have collapsed: cosines within and between pages, rank, a verdict."""

import numpy as np


def page_cosines(embeddings: np.ndarray, pages: np.ndarray) -> tuple[float, float]:
    """Returns the mean cosine of two panels of one page, and of two panels of different pages.

    Means over pairs of different rows, so large pages weigh more. Exact from sums of unit vectors
    (the cosines of a set sum to ‖Σu‖²), in O(n·d): no n×n matrix.

    Args:
      embeddings: float [n, d], of any length.
      pages: int [n].

    Raises:
      ValueError: a row is not finite or zero (it has no direction), or a kind of pair is missing.
    """
    units = _units(embeddings)
    _, index = np.unique(pages, return_inverse=True)
    if index.shape != (len(units),):
        raise ValueError(f'pages must be [{len(units)}], got {list(np.shape(pages))}')
    sizes = np.bincount(index)
    order = np.argsort(index, kind='stable')
    sums = np.add.reduceat(units[order], np.cumsum(sizes) - sizes, axis=0)
    within = np.sum(sums**2)
    self_pairs = np.sum(units**2)
    all_pairs = np.sum(sums.sum(axis=0) ** 2)
    same = float(np.sum(sizes * (sizes - 1.0)))
    different = float(len(units)) ** 2 - float(np.sum(sizes**2.0))
    if not same or not different:
        raise ValueError(
            'page_cosines needs a page with two panels and a second page, '
            f'got {len(sizes)} pages with {len(units)} panels'
        )
    return float((within - self_pairs) / same), float((all_pairs - within) / different)


def verdict(
    intra: float, inter: float, accuracy: float, chance: float, standard_error: float
) -> str:
    """Names the state of a model.

    * 'collapsed': intra > .95 and intra − inter < .1, all panels are one point;
    * 'page_collapsed': intra > .95 otherwise, the panels of a page are one point (same-page
      contrast drives it there, the pages still differ);
    * 'weak_alignment': the within-page accuracy of image → text is not above chance by more than
      two standard errors;
    * 'healthy': none of these.

    Args:
      intra, inter: mean cosines, from `page_cosines`.
      accuracy, chance: R@1 within the page and its chance level, from `within_groups`.
      standard_error: of the accuracy, from `bootstrap_by_group`, not below the `chance_error` of
        `within_groups` (a bootstrap over a few equal pages gives 0). Infinity, where it is not
        known, never reads as healthy.

    Raises:
      ValueError: a number is NaN, or an infinity other than the standard error's.
    """
    numbers = {'intra': intra, 'inter': inter, 'accuracy': accuracy, 'chance': chance}
    for name, number in numbers.items():
        if not np.isfinite(number):
            raise ValueError(f'no verdict: {name} is {number}')
    if not standard_error >= 0:
        raise ValueError(f'no verdict: standard_error is {standard_error}')
    if intra > 0.95:
        return 'collapsed' if intra - inter < 0.1 else 'page_collapsed'
    # 1e-6: full ties score chance up to rounding, with a standard error of 0.
    return 'weak_alignment' if accuracy - chance <= 2 * standard_error + 1e-6 else 'healthy'


def effective_rank(embeddings: np.ndarray) -> float:
    """Returns exp(entropy) of the normalised singular values: 1 (one direction) to min(n, d).

    Rows are put to length 1 and not centred, so that collapse to one point reads 1.
    Source: Roy & Vetterli 2007; as a diagnostic, Garrido et al. 2023,
    https://arxiv.org/abs/2210.02885.

    Args:
      embeddings: float [n, d], of any length.
    """
    units = _units(embeddings)
    gram = units.T @ units if len(units) > units.shape[1] else units @ units.T
    values = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None))
    p = values / values.sum()
    p = p[p > 1e-7]  # below it: the rounding of eigvalsh under the root
    return float(np.exp(-np.sum(p * np.log(p))))


def _units(embeddings):
    rows = np.asarray(embeddings, np.float64)
    if rows.ndim != 2 or not len(rows):
        raise ValueError(f'embeddings must be [n, d] with n ≥ 1, got {list(rows.shape)}')
    norms = np.linalg.norm(rows, axis=1)
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if len(bad):
        raise ValueError(
            f'embeddings: row {bad[0]} is zero or not finite ({len(bad)} of {len(rows)} rows)'
        )
    return rows / norms[:, None]
