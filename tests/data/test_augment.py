"""Augmentation of photographs: formulas, probabilities and limits; crops by their position."""

import colorsys

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from scipy.spatial.transform import Rotation

from mmjax import sections
from mmjax.data import augment, images
from mmjax.errors import UserError

GREY = np.array([0.299, 0.587, 0.114])
NONE = dict(min_area=1.0, ratio=1.0, mirror=0.0, brightness=0.0, contrast=0.0, saturation=0.0)


def augmentation(**changes):
    """Returns an augmentation with only these changes on."""
    return augment.Augmentation(**(NONE | changes))


def noise(width=24, height=24, low=0, high=256, seed=0):
    pixels = np.random.default_rng(seed).integers(low, high, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def smooth(width, height):
    """Waves of a different length in each channel."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 17) + np.cos(y / 13), np.sin((x + y) / 19), np.cos((x - y) / 23)]
    return Image.fromarray((127 + 60 * np.stack(waves, -1)).astype(np.uint8))


def plane(width, height):
    """Red encodes the position from left to right, green from top to bottom."""
    pixels = np.zeros((height, width, 3))
    pixels[..., 0] = 255 * (np.arange(width) + 0.5) / width
    pixels[..., 1] = 255 * ((np.arange(height) + 0.5) / height)[:, None]
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


class Highest:
    """A generator whose every number is the highest there can be; what is random is `value`."""

    def __init__(self, value=0.5):
        self.value = value

    def uniform(self, low, high, size=None):
        return high if size is None else np.full(size, float(high))

    def random(self, size=None):
        return self.value if size is None else np.full(size, self.value)

    def integers(self, low, high=None, size=None, dtype=int):
        return 0 if size is None else np.zeros(size, dtype)


@pytest.mark.parametrize('size', [(90, 60), (60, 91), (61, 61), (200, 48), (5, 3)])
def test_the_centre_square_is_pils_own_resize_of_the_middle(size):
    image = smooth(*size)
    side = min(size)
    left, top = (size[0] - side) / 2, (size[1] - side) / 2
    box = (left, top, left + side, top + side)
    expected = np.asarray(image.resize((20, 20), Image.Resampling.BILINEAR, box)).astype(int)
    crop = augment.centre_crop(image, 20)
    assert crop.shape == (20, 20, 3) and crop.dtype == np.uint8
    assert abs(crop - expected).max() <= 1


def test_the_centre_square_leaves_both_ends_out():
    crop = augment.centre_crop(plane(300, 100), 50).astype(float) / 255
    at = (np.arange(50) + 0.5) / 50
    np.testing.assert_allclose(crop[25, :, 0], (1 + at) / 3, atol=0.006)
    np.testing.assert_allclose(crop[:, 25, 1], at, atol=0.012)


def coloured(pixels, amounts, seed):
    """The formulas of the docstring in float64, with the draws in the order it gives."""
    rng = np.random.default_rng(seed)
    names = ('brightness', 'contrast', 'saturation', 'hue')
    draw = dict(zip(names, rng.uniform(-1, 1, 4), strict=True))
    tint, grey = rng.uniform(-1, 1, 3), rng.random() < amounts.get('grey', 0)
    factor = {name: 1 + amounts.get(name, 0) * draw[name] for name in names}
    x = pixels.astype(float) * factor['brightness'] * (1 + amounts.get('tint', 0) * tint)
    mean = (x @ GREY).mean()
    x = mean + factor['contrast'] * (x - mean)
    level = (x @ GREY)[..., None]
    x = level + (0 if grey else factor['saturation']) * (x - level)
    turn = 2 * np.pi * amounts.get('hue', 0) * draw['hue']
    x = x @ Rotation.from_rotvec(turn * np.ones(3) / np.sqrt(3)).as_matrix().T
    return np.clip(np.rint(x), 0, 255)


@pytest.mark.parametrize(
    'amounts',
    [
        {'brightness': 0.6},
        {'contrast': 0.7},
        {'saturation': 0.9},
        {'tint': 0.4},
        {'hue': 0.5},
        {'grey': 1.0},
        dict(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1, tint=0.2, grey=0.3),
    ],
    ids=lambda amounts: '+'.join(amounts),
)
def test_colours_follow_their_formulas(amounts):
    pixels = np.asarray(noise(low=40, high=220))
    changed = 0
    for seed in range(20):
        result = augmentation(**amounts)._colours(pixels, np.random.default_rng(seed))
        expected = coloured(pixels, amounts, seed)
        error = abs(result - expected)
        assert error.max() <= 1 and error.mean() < 0.01  # a half may be rounded either way
        changed += abs(expected - pixels).mean() > 3
    assert changed >= 15


def test_brightness_reaches_its_limits_either_way_and_no_further():
    image = Image.new('RGB', (4, 4), (100, 100, 100))
    vary, rng = augmentation(brightness=0.4), np.random.default_rng(0)
    values = [int(vary(image, 4, rng)[0, 0, 0]) for _ in range(300)]
    assert 60 <= min(values) < 63 and 137 < max(values) <= 140


def test_hue_turns_as_colorsys_does_and_leaves_grey_alone():
    colours = [(150, 110, 120), (110, 150, 115), (118, 110, 150), (150, 148, 110), (110, 140, 150)]
    pixels = np.array([colours], np.uint8)
    for turn in (0.04, 0.12):
        moved = augmentation(hue=turn)._colours(pixels, Highest())[0]
        for before, after in zip(colours, moved, strict=True):
            hue, result = (colorsys.rgb_to_hsv(*(c / 255 for c in x))[0] for x in (before, after))
            assert (result - hue) % 1 == pytest.approx(turn, abs=0.025)
    greys = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    for seed in range(5):
        turned = augmentation(hue=0.5)._colours(greys, np.random.default_rng(seed))
        np.testing.assert_array_equal(turned, greys)
    third = augmentation(hue=1 / 3)._colours(pixels, Highest())  # red becomes green
    np.testing.assert_array_equal(third, np.roll(pixels, 1, axis=-1))


def test_mirror_is_never_always_or_as_often_as_set():
    image = noise()
    plain = np.asarray(image)
    outcomes = {}
    for probability in (0.0, 0.3, 1.0):
        rng = np.random.default_rng(1)
        crops = [augmentation(mirror=probability)(image, 24, rng) for _ in range(400)]
        mirrored = [np.array_equal(crop, plain[:, ::-1]) for crop in crops]
        assert all(m or np.array_equal(c, plain) for c, m in zip(crops, mirrored, strict=True))
        outcomes[probability] = np.mean(mirrored)
    assert (outcomes[0.0], outcomes[1.0]) == (0, 1) and 0.22 < outcomes[0.3] < 0.38


def test_grey_images_have_equal_channels_whatever_else_varies():
    image = noise(128, 128)
    vary = augmentation(grey=1.0, hue=0.5, brightness=0.5, contrast=0.5, saturation=0.5, tint=0.5)
    for seed in range(30):
        crop = vary(image, 128, np.random.default_rng(seed))
        assert (crop == crop[..., :1]).all() and crop.std() > 5
    plain = augmentation(grey=1.0)(image, 128, np.random.default_rng(0))
    assert abs(plain[..., 0] - np.asarray(image) @ GREY).max() <= 0.51
    rng = np.random.default_rng(2)
    crops = [augmentation(grey=0.3)(image, 24, rng) for _ in range(300)]
    assert 0.2 < np.mean([(crop == crop[..., :1]).all() for crop in crops]) < 0.4


def test_erased_is_one_rectangle_of_a_tenth_to_a_third():
    image = Image.new('RGB', (64, 64), (9, 9, 9))
    areas, shapes, tops = [], [], []
    for seed in range(300):
        crop = augmentation(erase=1.0)(image, 64, np.random.default_rng(seed))
        changed = (crop != 9).any(-1)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert changed[box].all() and changed[box].size == changed.sum()
        assert crop[box].std() > 60
        areas.append(changed.mean())
        shapes.append(np.log(len(rows) / len(columns)))
        tops.append(rows[0])
    assert 0.09 < min(areas) < 0.12 and 0.3 < max(areas) < 0.345
    assert -0.8 < min(shapes) < -0.5 and 0.5 < max(shapes) < 0.8
    assert min(tops) == 0 and max(tops) > 30
    rng = np.random.default_rng(3)
    erased = [augmentation(erase=0.25)(image, 64, rng).std() > 0 for _ in range(300)]
    assert 0.17 < np.mean(erased) < 0.33


@pytest.mark.parametrize('size', [(400, 200), (200, 400), (300, 300), (1000, 100)])
def test_cuts_keep_to_area_ratio_and_picture(size):
    """Judged by the slopes that a crop of `plane` has."""
    image, side = plane(*size), min(size)
    vary, rng = augmentation(min_area=0.4, ratio=1.5), np.random.default_rng(0)
    seen = []
    for _ in range(200):
        crop = vary(image, 40, rng) / 255
        red, green = crop[..., 0], crop[..., 1]
        sides = red[:, 39] - red[:, 0], green[39] - green[0]
        w, h = (np.mean(d) * 40 / 39 * n for d, n in zip(sides, size, strict=True))
        seen.append((w * h / side**2, w / h, red.mean(), green.mean()))
    area, ratio, x, y = np.array(seen).T
    slack = 1 + 2 * max(size) / side / 100  # the steps of uint8 along the longer side
    assert 0.36 / slack < area.min() < 0.5 and 0.9 < area.max() < 1.02 * slack
    assert ratio.max() < 1.5 * slack and ratio.min() > 1 / 1.5 / slack
    assert ratio.max() > 1.3 and ratio.min() < 1 / 1.3
    for centre, length in ((x, size[0]), (y, size[1])):  # from one end to the other
        reach = 0.5 * side / length
        assert centre.min() < reach and centre.max() > 1 - reach


def test_cuts_of_almost_the_whole_come_near_the_centre_square():
    image = smooth(40, 40)
    near = augmentation(min_area=0.999)(image, 20, np.random.default_rng(0)).astype(int)
    assert abs(near - augment.centre_crop(image, 20)).max() <= 2


@pytest.mark.parametrize('size', [(60, 60), (90, 60), (7, 31)])
def test_an_area_of_one_is_the_centre_square_turned_or_not(size):
    image = smooth(*size)
    square = augment.centre_crop(image, 24)
    for seed in range(5):
        crop = augmentation(ratio=3.0)(image, 24, np.random.default_rng(seed))
        np.testing.assert_array_equal(crop, square)
    quarter = augmentation(ratio=3.0, rotation=90.0)(image, 24, Highest())
    np.testing.assert_array_equal(quarter, np.rot90(square))


def test_turned_cuts_continue_their_rim_and_turn_by_the_angle():
    image = smooth(48, 48)
    turned = augmentation(rotation=30.0)(image, 48, Highest()).astype(float)
    square = augment.centre_crop(image, 48).astype(float)
    expected = ndimage.rotate(square, 30, reshape=False, order=1, mode='nearest')
    y, x = np.mgrid[:48, :48] - 23.5
    assert abs(turned - expected)[np.hypot(x, y) < 23].max() <= 2
    assert abs(turned - expected).max() < 40 < abs(turned - square).max()
    white = Image.new('RGB', (30, 20), 'white')
    for size in (1, 2, 3, 7, 32, 33):  # nothing black comes in at the corners
        for angle in (20.0, 45.0, 180.0):
            assert (augmentation(rotation=angle)(white, size, Highest()) == 255).all()
    rng = np.random.default_rng(4)
    crops = [augmentation(rotation=10.0)(image, 48, rng) for _ in range(20)]
    assert len({crop.tobytes() for crop in crops}) == 20


EVERYTHING = dict(
    min_area=0.3,
    ratio=1.4,
    mirror=0.5,
    rotation=25.0,
    brightness=0.3,
    contrast=0.3,
    saturation=0.3,
    hue=0.1,
    tint=0.1,
    grey=0.2,
    erase=0.5,
)


@pytest.mark.parametrize('size', [(1, 1), (1, 700), (700, 1), (2, 3), (5, 4), (3000, 20)])
@pytest.mark.parametrize('side', [1, 16])
def test_tiny_and_extreme_images_are_cut_too(size, side):
    vary = augment.Augmentation(**EVERYTHING)
    for seed in range(4):
        crop = vary(noise(*size), side, np.random.default_rng(seed))
        assert crop.shape == (side, side, 3) and crop.dtype == np.uint8
    plain = Image.new('RGB', size, (10, 200, 60))
    for crop in (augment.centre_crop(plain, side), augmentation(min_area=0.2)(plain, side, RNG)):
        np.testing.assert_array_equal(crop, np.full((side, side, 3), (10, 200, 60)))


RNG = np.random.default_rng(0)


def test_what_comes_out_depends_on_images_and_rng_alone():
    image = smooth(50, 40)
    before = image.tobytes()
    vary = augment.Augmentation(**EVERYTHING)
    first, again, other = (vary(image, 20, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and image.tobytes() == before
    assert augment.Augmentation() == augment.Augmentation(**vars(augment.Augmentation()))


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('min_area', 0.0),
        ('min_area', 1.1),
        ('ratio', 0.5),
        ('ratio', float('inf')),
        ('mirror', 50),
        ('grey', -0.1),
        ('erase', float('nan')),
        ('rotation', 200.0),
        ('brightness', 1.5),
        ('hue', 0.6),
        ('tint', -0.1),
        ('mirror', 'x'),
        ('contrast', True),
        ('saturation', None),
    ],
)
def test_values_out_of_their_range_are_refused_by_name(name, value):
    with pytest.raises(UserError) as error:
        sections.parse(augment.Augmentation, {name: value}, 'data.augmentation')
    assert str(error.value).startswith(f'data.augmentation.{name}={value!r} is not a number ')


@pytest.mark.parametrize('name', ['shift', 'scale', 'brightness', 'contrast'])
def test_values_of_panels_out_of_their_range_are_refused_by_name(name):
    for value in (-0.1, 1.1, float('nan'), 'x'):
        with pytest.raises(UserError) as error:
            sections.parse(images.Augmentation, {name: value}, 'data.augmentation')
        assert str(error.value).startswith(f'data.augmentation.{name}={value!r} is not a number ')
