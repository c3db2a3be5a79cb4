"""Built-in signing: sentences of a small sign language as landmarks, each a function of numbers.

A sign is a function of (seed, gloss): a shape of the hand that may change, a place, a palm's
orientation, a path with direction, size and repetitions, and what the other hand does. No two
signs share all but one of these, save the pairs of `PAIRS`, which differ in the hand's shape or in
the direction of the movement only. A signer is a function of (seed, number): proportions, stand in
the picture, tempo, amplitude, tremor, accent (own places, fingers, orientations, and own variants
of single signs), and about one in eight is left-handed. A sentence is a function of
(seed, split, signer, index); its glosses do not depend on the signer and are in no other split.

Signs run into each other: hands travel between them with a movement of their own, places and
fingers lean towards the neighbours, everything is smoothed over time, an idle hand rests, holds
its last pose or is out of the picture. A hand that the detector missed is all zeros.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator, Mapping

import numpy as np

from mmjax.data import processes
from mmjax.data.faults import FaultReport
from mmjax.data.records import pack
from mmjax.errors import UserError
from mmjax.recipes.sign.synthetic import skeleton
from mmjax.recipes.sign.synthetic.skeleton import (
    ANGLES,
    ORIENTATIONS,
    PLACES,
    SHAPES,
    WRIST,
    smooth,
)

SIZES = ('train', 'dev', 'test', 'signers', 'held_out_signers')
WORDS = {
    'time': 'YESTERDAY TODAY TOMORROW NOW MORNING EVENING',
    'person': 'MOTHER FATHER FRIEND TEACHER CHILD I YOU SHE',
    'thing': 'BOOK HOUSE CAR DOG CAT BREAD WATER SCHOOL MONEY FLOWER TABLE COAT',
    'verb': 'SEE BUY GIVE LIKE WANT HELP FIND CARRY LOSE DRAW VISIT WASH',
    'quality': 'RED BIG OLD NEW SMALL GOOD',
    'end': 'NOT MAYBE WHY WHEN',
}
WORDS = {name: tuple(words.split()) for name, words in WORDS.items()}
GLOSSES = tuple(gloss for words in WORDS.values() for gloss in words)
PAIRS = {  # gloss → (the other of the pair, in what alone they differ)
    'FATHER': ('MOTHER', 'shape'),
    'CAT': ('DOG', 'shape'),
    'TEACHER': ('FRIEND', 'shape'),
    'TODAY': ('NOW', 'shape'),
    'HELP': ('CARRY', 'shape'),
    'COAT': ('BOOK', 'shape'),
    'TOMORROW': ('YESTERDAY', 'direction'),
    'BUY': ('GIVE', 'direction'),
    'NEW': ('OLD', 'direction'),
    'LOSE': ('FIND', 'direction'),
}
_CHUNK = 128  # sentences that a process makes at a time
HANDS = ('one', 'mirror', 'alternate', 'base')


@dataclasses.dataclass(frozen=True)
class Sign:
    """What makes a gloss; two signs are told apart by these alone."""

    shape: str
    shape_end: str  # the same, where the hand keeps its shape
    place: str
    orientation: str
    path: str
    direction: int  # eighths of a turn; circles turn the other way from 4 on
    size: float  # shoulder widths
    repeats: int
    hands: str


def _stream(*key) -> np.random.Generator:
    """A generator that knows its key only, the same on every machine."""
    digest = hashlib.sha256('/'.join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], 'little')))


def _pick(rng, options, chances=None):
    """One of the options, by their chances; of all the same where none are given."""
    weights = np.ones(len(options)) if chances is None else np.asarray(chances, float)
    return options[int(np.searchsorted(np.cumsum(weights), rng.random() * weights.sum()))]


def _draw(rng, simple: bool) -> Sign:
    shape, path = _pick(rng, tuple(SHAPES)), _pick(rng, skeleton.PATHS, (3, 2, 2, 1, 1))
    changes = not simple and (path == 'twist' or rng.random() < 0.15)
    direction = int(rng.integers(8))
    if not simple and path in ('circle', 'twist'):  # they have no other
        direction = direction // 4 * 4 if path == 'circle' else 0
    return Sign(
        shape=shape,
        shape_end=_pick(rng, [s for s in SHAPES if s != shape]) if changes else shape,
        place=_pick(rng, tuple(PLACES)),
        orientation=_pick(rng, tuple(ORIENTATIONS)),
        path='line' if simple else path,
        direction=direction,
        size=float(_pick(rng, (0.3, 0.5))),
        repeats=1 if simple else _pick(rng, (1, 2, 3), (4, 3, 1)),
        hands=_pick(rng, HANDS, (6, 2, 1, 2)),
    )


def differences(one: Sign, two: Sign) -> set[str]:
    """Names the properties, beyond size and repetition, in which two signs differ."""
    names = ('shape', 'place', 'orientation', 'path', 'direction', 'hands')
    found = {name for name in names if getattr(one, name) != getattr(two, name)}
    return found | ({'shape'} if one.shape_end != two.shape_end else set())


@functools.lru_cache(maxsize=8)
def signs(seed: int) -> dict[str, Sign]:
    """Draws the sign of every gloss, in the order of `GLOSSES`."""
    found: dict[str, Sign] = {}
    pairs = {other: (gloss, what) for gloss, (other, what) in PAIRS.items()}
    for gloss in (gloss for gloss in GLOSSES if gloss not in PAIRS):
        rng, clear = _stream('sign', seed, gloss), False
        while not clear:
            drawn = {gloss: _draw(rng, simple=gloss in pairs)}
            if gloss in pairs:
                name, what = pairs[gloss]
                shape = _pick(rng, [s for s in SHAPES if s != drawn[gloss].shape])
                opposite = {'direction': (drawn[gloss].direction + 4) % 8}
                change = {'shape': shape, 'shape_end': shape} if what == 'shape' else opposite
                drawn[name] = dataclasses.replace(drawn[gloss], **change)
            others = found.values()
            clear = all(len(differences(s, o)) > 1 for s in drawn.values() for o in others)
        found |= drawn
    return {gloss: found[gloss] for gloss in GLOSSES}


@dataclasses.dataclass(frozen=True)
class Signer:
    """A person's body, stand and manner of signing."""

    body: skeleton.Body
    camera: skeleton.Camera
    left_handed: bool
    tempo: float  # multiplies durations
    amplitude: float
    blur: float  # frames over which movements run together
    tremor: float
    places: dict[str, np.ndarray]
    fingers: np.ndarray  # [6], added to curls and spread
    angles: np.ndarray  # [3], added to a hand's


@functools.lru_cache(maxsize=256)
def signer(seed: int, number: int) -> Signer:
    """Draws a person; `seed` and `number` are not negative."""
    rng = _stream('signer', seed, number)
    lengths = np.array(dataclasses.astuple(skeleton.Body())) * rng.uniform(0.88, 1.12, 6)
    return Signer(
        body=skeleton.Body(*lengths.tolist()),
        camera=skeleton.Camera(
            scale=float(rng.uniform(0.38, 0.5)),
            centre=(float(rng.uniform(0.42, 0.58)), float(rng.uniform(0.36, 0.46))),
            roll=float(rng.normal(0, 0.04)),
            narrowed=float(rng.uniform(0.84, 1.0)),
        ),
        left_handed=bool(rng.random() < 0.125),
        tempo=float(rng.uniform(0.8, 1.25)),
        amplitude=float(rng.uniform(0.75, 1.25)),
        blur=float(rng.uniform(0.7, 1.5)),
        tremor=float(rng.uniform(0.003, 0.015)),
        places={name: rng.normal(0, 0.08, 2) for name in PLACES},
        fingers=rng.normal(0, 0.07, 6),
        angles=rng.normal(0, 0.15, 3),
    )


def gloss_sequence(seed: int, split: str, index: int) -> tuple[str, ...]:
    """Writes the glosses of a sentence, 3 to 8; no other split has the same ones.

    Every sequence belongs to one split, by its digest: seven tenths of them to train.
    """
    rng = _stream('glosses', seed, split, index)
    while True:
        words = {name: _pick(rng, options) for name, options in WORDS.items()}
        quality, twice, time, second, end = (rng.random(5) < (0.45, 0.08, 0.6, 0.15, 0.35)).tolist()
        thing = [words['thing']] + [words['quality']] * quality
        person, verb = [words['person']], [words['verb']] * (1 + twice)
        orders = (thing + person + verb, person + verb + thing, person + thing + verb)
        found = [words['time']] * time + _pick(rng, orders, (0.4, 0.15, 0.45))
        found = tuple(found + [_pick(rng, WORDS['thing'])] * second + [words['end']] * end)
        digest = hashlib.sha256(f'{seed} {" ".join(found)}'.encode()).digest()[0] / 256
        owner = 'train' if digest < 0.7 else 'dev' if digest < 0.85 else 'test'
        if owner == split:
            return found


@dataclasses.dataclass(frozen=True)
class Signing:
    """A signed sentence."""

    glosses: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]  # frames [start, end) of each gloss, without the ways
    features: np.ndarray  # float16 [frames, 92], by `sign_skeleton.STREAMS`
    left_handed: bool


def _stroke(sign: Sign, gloss: str, lean: np.ndarray, key, who: Signer, rng):
    """Performs one sign: the arms' channels [frames, 11]; None where the other hand is idle."""
    own = _stream('accent', *key, gloss)
    repeats = sign.repeats + (int(own.integers(2)) if sign.repeats > 1 else 0)
    frames = 8 + 4 * (repeats - 1) + 4 * (sign.path in ('circle', 'zigzag', 'twist'))
    frames = max(6, round(frames * who.tempo * rng.uniform(0.8, 1.2)))
    u = np.linspace(0, 1, frames)
    ease = (3 * u**2 - 2 * u**3)[:, None]
    at = PLACES[sign.place] + who.places[sign.place] + own.normal(0, 0.07, 2) + lean
    at = at + rng.normal(0, 0.05, 2)
    angle = sign.direction * np.pi / 4 + own.normal(0, 0.15) + rng.normal(0, 0.12)
    size = sign.size * who.amplitude * math.exp(rng.normal(0, 0.12))
    way = skeleton.way(sign.path, u, angle, size, repeats, sign.direction > 3)
    arm = np.empty((frames, skeleton.CHANNELS))
    arm[:, WRIST] = at + way
    arm[:, ANGLES] = ORIENTATIONS[sign.orientation] + who.angles + rng.normal(0, 0.1, 3)
    if sign.path == 'twist':
        arm[:, 4] += 0.9 * np.sin(2 * np.pi * (repeats + 1) * u)
    first, last = (np.array(SHAPES[name]) for name in (sign.shape, sign.shape_end))
    fingers = first + (last - first) * ease + who.fingers + rng.normal(0, 0.05, 6)
    arm[:, 5:] = fingers.clip(0, 1)
    if sign.hands == 'one':
        return arm, None
    other = arm + rng.normal(0, 0.04, skeleton.CHANNELS)
    if sign.hands == 'alternate':
        other[:, WRIST] -= 2 * way
    if sign.hands == 'base':
        other[:, WRIST] = np.array([0.15, 0.62]) + rng.normal(0, 0.05, 2)
        other[:, 2:] = np.concatenate([ORIENTATIONS['across'], SHAPES['flat']])
    return arm, other


def _head(glosses, spans, total: int, rng) -> np.ndarray:
    """The head sways; questions frown, a negation shakes it: [total, 5]."""
    head = 4 * smooth(rng.normal(0, 1, (total, 5)), 5) * (0.03, 0.02, 0.05, 0.3, 0.4)
    for gloss, (start, stop) in zip(glosses, spans, strict=True):
        if gloss in ('WHY', 'WHEN'):
            head[:, 3] -= 0.8 * (np.arange(total) > start - 15)
        elif gloss == 'NOT':
            head[start:stop, 0] += 0.06 * np.sin(np.arange(stop - start) * 0.9)
    return head


def sentence(seed: int, split: str, number: int, index: int) -> Signing:
    """Performs a sentence.

    Args:
      seed: of the set.
      split: 'train', 'dev' or 'test'; `index` its sentence, not negative.
      number: of the signer, not negative.
    """
    who, table = signer(seed, number), signs(seed)
    glosses = gloss_sequence(seed, split, index)
    rng = _stream('signing', seed, split, number, index)
    places = [np.array(PLACES[table[gloss].place]) for gloss in glosses]
    time = int(rng.integers(2, 5)) + round(who.tempo * rng.uniform(5, 9))
    dominant, other, spans = [], [], []
    for place, gloss in enumerate(glosses):
        around = places[max(place - 1, 0) : place + 2]
        lean = 0.15 * (np.mean(around, axis=0) - places[place])
        arm, second = _stroke(table[gloss], gloss, lean, (seed, number), who, rng)
        dominant.append((time, arm))
        if second is not None:
            other.append((time, second))
        spans.append((time, time + len(arm)))
        time += len(arm) + max(2, round(who.tempo * rng.uniform(3, 6.5)))
    total = time + int(rng.integers(3, 8))
    arms = []
    for strokes in (dominant, other):
        arm = smooth(skeleton.joined(strokes, total, rng), who.blur)
        arm[:, WRIST] += who.tremor * 3 * smooth(rng.normal(0, 1, (total, 2)), 1.2)
        arms.append(arm)
    camera = dataclasses.replace(
        who.camera,
        scale=who.camera.scale * math.exp(rng.normal(0, 0.03)),
        centre=tuple(np.array(who.camera.centre) + rng.normal(0, 0.012, 2)),
    )
    head = _head(glosses, spans, total, rng)
    points = skeleton.landmarks(*arms, head, who.body, camera, who.left_handed)
    points = skeleton.detected(points, rng)
    return Signing(glosses, tuple(spans), points.astype(np.float16), who.left_handed)


def catalogue(seed: int, sizes: Mapping[str, int]) -> dict[str, list[tuple[int, int]]]:
    """Lists the sentences of each split.

    Args:
      sizes: `train`, `dev`, `test` sentences; `signers` of train; `held_out_signers` of dev, and
        as many others of test. All at least 1.

    Returns:
      {'train', 'dev', 'test': [(signer, index)]}. No signer is in two splits. More sentences or
      signers in train leave the other splits as they are.

    Raises:
      UserError: a size is missing or below 1.
    """
    for key in SIZES:
        if key not in sizes:
            raise UserError(f'data.built_in.{key} is missing: it is the number of built-in {key}')
        if sizes[key] < 1:
            raise UserError(f'data.built_in.{key} must be at least 1, got {sizes[key]}')
    held = sizes['held_out_signers']
    first = {'test': 0, 'dev': held, 'train': 2 * held}
    count = {'test': held, 'dev': held, 'train': sizes['signers']}
    return {
        split: [(first[split] + index % count[split], index) for index in range(sizes[split])]
        for split in ('train', 'dev', 'test')
    }


def records(
    split: str, report: FaultReport, *, seed: int, plan: Mapping[str, list[tuple[int, int]]]
) -> Iterator[dict]:
    """Yields the records of a split of `catalogue`."""
    rows = plan[split]
    report.rows = len(rows)
    perform = functools.partial(_perform, seed, split)
    performed = processes.ordered(perform, rows, chunk=_CHUNK)
    for (number, index), signing in zip(rows, performed, strict=True):
        yield {
            'id': f'{split}_{index:05d}',
            'signer': f'signer_{number:03d}',
            'words': signing.glosses,
            'line': index,
            'features': pack(signing.features),
        }


def _perform(seed: int, split: str, row: tuple[int, int]) -> Signing:
    return sentence(seed, split, *row)
