"""The measure of where questions look: a receipt's mask lies on the receipt, ratios are shares."""

import importlib.util
import io

import numpy as np
import pytest
from PIL import Image

from mmjax.recipes.receipts.synthetic import pictures as synthetic


@pytest.fixture(scope='module')
def measure(root):
    path = root / 'benchmarks/receipts_attention.py'
    spec = importlib.util.spec_from_file_location('receipts_attention', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_mask_lies_on_the_receipt(measure):
    """Paper is brighter than most else: moved by a third of its height the mask fits worse."""
    better = 0
    scenes = [synthetic.receipts(synthetic.scene(0, 'test', i)) for i in range(60)]
    chosen = [(i, shown[0]) for i, shown in enumerate(scenes) if len(shown) == 1]
    for number, one in chosen:
        with Image.open(io.BytesIO(synthetic.picture(0, 'test', number))) as file:
            bright = np.asarray(file.convert('L'), float)
        mask = measure.coverage(one, 112, 4).reshape(112, 112)
        area = 26 * (29.5 + 3.5 * len(one.what.goods)) * one.zoom**2
        whole = not (mask[[0, -1]].any() or mask[:, [0, -1]].any())
        assert not whole or mask.sum() == pytest.approx(area, rel=0.03)
        inside = (bright * mask).sum() / mask.sum()
        moved = [np.roll(mask, by, axis) for by in (13, -13) for axis in (0, 1)]
        better += all(inside > (bright * m).sum() / m.sum() for m in moved)
    assert len(chosen) > 10 and better >= 0.9 * len(chosen)


def test_ratios_are_mass_over_share_of_the_area(measure):
    covered = np.array([[0, 0, 0.5, 1.0], [0.2, 0, 0, 0]])
    even = np.full((2, 4), 0.25)
    np.testing.assert_allclose(measure.ratios(even, covered), 1)
    looked = np.array([[0, 0, 0, 1.0], [0, 0, 1, 0]])
    np.testing.assert_allclose(measure.ratios(looked, covered), [1 / 0.375, 0])
    found = measure.summary(looked, covered)
    assert found == pytest.approx({'mean': 4 / 3, 'median': 4 / 3, 'share_at_least_2': 0.5})
