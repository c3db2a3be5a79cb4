"""Built-in products and their photographs: each a pure function of numbers, for retrieval.

A product is a function of (seed, identity): one of 8 categories, each with two parts of three
kinds; one of 10 main colours, a second one in one of 8 patterns, a third for the parts; its
proportions. Categories and colours are few, so many products share both; no two of a catalogue
share everything that can be said. A photograph is a function of (seed, split, identity, shot) and
shows the product turned, near or far, partly out of the frame, on a background of the products'
own colours and patterns, in light of another brightness and colour from each side.

What a description says is true of the product and can be seen: category, main colour and one to
four more of pattern, kinds of parts, their colour and proportions. What no text says: continuous
shape, where a pattern starts. Left and right are in no text, so pictures may be mirrored.
"""

import functools
import hashlib
import io
from collections.abc import Iterator, Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from mmjax.data import processes
from mmjax.data.drawing import jitter, pick
from mmjax.data.faults import FaultReport
from mmjax.errors import UserError
from mmjax.recipes.retrieval.synthetic import drawing
from mmjax.recipes.retrieval.synthetic.drawing import COLOURS, PARTS, PATTERNS, Product

SIZES = ('train_items', 'val_items', 'test_items', 'shots', 'query_shots', 'gallery_shots')
STRIPES = {'vertical': 0.0, 'diagonal': 45.0, 'horizontal': 90.0}  # direction → degrees
MIRRORED = tuple(name for name in PARTS if name != 'clock')  # what looks so from behind
NOUNS = {
    'mug': ('mug', 'cup'),
    'bottle': ('bottle', 'flask'),
    'bag': ('bag', 'handbag'),
    'lamp': ('lamp', 'table lamp'),
    'chair': ('chair', 'seat'),
    'clock': ('clock', 'timepiece'),
    'hat': ('hat', 'headpiece'),
    'shoe': ('shoe', 'single shoe'),
}
_OPENINGS = (
    'A {noun} in {colour}.',
    'This {noun} is {colour}.',
    'One {colour} {noun}.',
    'The main colour of this {noun} is {colour}.',
)
_PATTERNED = (
    'It is decorated with {pattern} in {second}.',
    'The pattern: {pattern} in {second}.',
    'Look for {pattern} in {second}.',
)
_HALVES = ('Its lower half is {second}.', 'The lower half of it is {second}.')
_PLAIN = ('It has no pattern.', 'The surface is plain.', 'Plain all over.')
_PART = ('It comes with {part}.', 'It has {part}.', 'Note {part}.')
_TRIM = ('Its parts are {trim}.', 'The details are in {trim}.', 'Trimmed in {trim}.')
_TALL = ('It is taller and slimmer than most.', 'Taller than usual.')
_WIDE = ('It is lower and wider than most.', 'Wider than usual.')
_CHUNK = 64  # images that a process draws at a time
TALL = 0.2  # a stretch beyond ± this is worth a sentence


def _stream(*key) -> np.random.Generator:
    """A generator that knows its key only, the same on every machine."""
    digest = hashlib.sha256('/'.join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], 'little')))


@functools.lru_cache(maxsize=256)
def product(seed: int, identity: int) -> Product:
    """Draws what a product is; `seed` and `identity` are not negative."""
    if seed < 0 or identity < 0:
        raise ValueError(f'seed and identity must not be negative, got {seed} and {identity}')
    rng = _stream('product', seed, identity)
    category = pick(rng, tuple(PARTS))
    names = list(COLOURS)
    colour, second, trim = (names[i] for i in np.argsort(rng.random(len(names)))[:3])
    pattern = pick(rng, PATTERNS)
    direction = pick(rng, tuple(STRIPES)) if pattern == 'stripes' else ''
    angle = STRIPES[direction] if direction else 45 * (pattern == 'diamonds')
    return Product(
        category=category,
        colour=colour,
        second=second,
        trim=second if rng.random() < 0.4 else trim,
        pattern=pattern,
        bold=bool(rng.integers(2)),
        direction=direction,
        parts=tuple(pick(rng, options) for options in PARTS[category]),
        stretch=float(rng.uniform(-0.45, 0.45)),
        shape=tuple(rng.random(3).tolist()),
        phase=float(rng.random()),
        angle=float(angle + rng.uniform(-8, 8)),
    )


def look(what: Product) -> tuple:
    """All of a product that can be said and seen, but for its proportions."""
    second = '' if what.pattern == 'plain' else what.second
    bold = what.bold and what.pattern not in ('plain', 'two-tone')
    texture = (what.pattern, second, bold, what.direction)
    return (what.category, what.colour, what.trim, what.parts, texture)


def _with_article(phrase: str) -> str:
    if phrase.endswith('s'):
        return phrase
    return f'{"an" if phrase[0] in "aeiou" else "a"} {phrase}'


def _facts(rng, what: Product) -> list[str]:
    """One sentence for each thing that can be said, beyond the category and the main colour."""
    forms = dict.fromkeys(PATTERNS, _PATTERNED) | {'plain': _PLAIN, 'two-tone': _HALVES}
    size = pick(rng, ('bold', 'broad') if what.bold else ('fine', 'narrow'))
    pattern = _with_article(' '.join(filter(None, (size, what.direction, what.pattern))))
    facts = [pick(rng, forms[what.pattern]).format(pattern=pattern, second=what.second)]
    facts += [pick(rng, _PART).format(part=_with_article(part)) for part in what.parts if part]
    facts.append(pick(rng, _TRIM).format(trim=what.trim))
    if abs(what.stretch) > TALL:
        facts.append(pick(rng, _TALL if what.stretch > 0 else _WIDE))
    return facts


def item(seed: int, identity: int) -> dict:
    """Describes a product.

    Returns:
      {'item': 'mug_0042', unique to the identity, 'color': the main colour's name, 'description':
      two to five true sentences, a fact each; the first tells category and main colour}.
    """
    what = product(seed, identity)
    rng = _stream('words', seed, identity)
    opening = pick(rng, _OPENINGS).format(noun=pick(rng, NOUNS[what.category]), colour=what.colour)
    facts = _facts(rng, what)
    told = np.argsort(rng.random(len(facts)))[: int(rng.integers(1, 5))]
    return {
        'item': f'{what.category}_{identity:04d}',
        'color': what.colour,
        'description': [opening, *(facts[i] for i in told)],
    }


def catalogue(seed: int, sizes: Mapping[str, int]) -> dict[str, list[tuple[int, int]]]:
    """Lists the photographs of each split.

    Args:
      seed: of the set.
      sizes: `train_items`, `val_items`, `test_items` identities; `shots` of each in train and val;
        `query_shots` and `gallery_shots` of each test identity. All at least 1.

    Returns:
      {'train', 'val', 'query', 'gallery': [(identity, shot)]}, by identity. Query and gallery are
      other photographs of the same identities, which, like those of val, are in no other split.
      More identities in train leave the other splits as they are.

    Raises:
      UserError: a size is missing or below 1.
    """
    for key in SIZES:
        if key not in sizes:
            raise UserError(f'data.built_in.{key} is missing: it is the number of built-in {key}')
        if sizes[key] < 1:
            raise UserError(f'data.built_in.{key} must be at least 1, got {sizes[key]}')
    counts = (sizes['test_items'], sizes['val_items'], sizes['train_items'])
    identities, looks, identity = [], set(), 0
    while len(identities) < sum(counts):
        if (seen := look(product(seed, identity))) not in looks:
            looks.add(seen)
            identities.append(identity)
        identity += 1
    test, val, train = np.split(np.array(identities), np.cumsum(counts)[:2])

    def rows(chosen, shots):
        return [(int(identity), shot) for identity in chosen for shot in range(sizes[shots])]

    splits = {'train': rows(train, 'shots'), 'val': rows(val, 'shots')}
    return splits | {'query': rows(test, 'query_shots'), 'gallery': rows(test, 'gallery_shots')}


def _backdrop(rng, side: int) -> Image.Image:
    """A room's wall, planks, tiles or cloth in colours of the products, with clutter before it."""
    palette = [*COLOURS.values(), (150, 148, 146), (206, 196, 176)]
    near, far = (np.array(jitter(rng, pick(rng, palette), 30)) for _ in range(2))
    kind = int(rng.integers(5))
    far = near + (far - near) * rng.uniform(0.15, 0.5) if kind in (2, 3) else far
    near, far = tuple(near.tolist()), tuple(int(v) for v in far)
    picture = Image.new('RGB', (side, side), near)
    draw = ImageDraw.Draw(picture)
    if kind == 1:
        draw.rectangle((0, side * rng.uniform(0.5, 0.85), side, side), fill=far)
    elif kind in (2, 3):
        step, slant = side * rng.uniform(0.08, 0.3), side * rng.uniform(-0.4, 0.4)
        for row, x in enumerate(np.arange(-side, 2 * side, step)):
            if kind == 2 and row % 2:
                draw.polygon((x, 0, x + step, 0, x + step + slant, side, x + slant, side), fill=far)
            for y in np.arange((row % 2) * step, side, 2 * step) if kind == 3 else ():
                draw.rectangle((x, y, x + step, y + step), fill=far)
    elif kind == 4:
        grain = int(rng.integers(3, 24))
        noise = rng.random((grain, grain, 1)) * np.subtract(far, near) + near
        small = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
        picture = small.resize((side, side), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(0, 9))):
        x, y = (rng.random(2) * side).tolist()
        size, colour = side * rng.uniform(0.04, 0.2), jitter(rng, pick(rng, palette), 30)
        corners = np.sort(rng.random(int(rng.integers(3, 7)))) * 2 * np.pi
        if len(corners) == 6:
            draw.ellipse((x - size, y - size, x + size, y + 0.8 * size), fill=colour)
        else:
            shape = np.stack([x + size * np.cos(corners), y + size * np.sin(corners)], -1)
            draw.polygon(shape.round(1).ravel().tolist(), fill=colour)
    return picture


def _camera(rng, box, side: int) -> np.ndarray:
    """Draws a point of view: the 3 × 3 map from a photograph's pixels to the drawing's."""
    angles = np.deg2rad(rng.uniform(-1, 1, 3) * (34, 22, 22))
    cos, sin = np.cos(angles), np.sin(angles)
    aside = np.array([[cos[0], 0, sin[0]], [0, 1, 0], [-sin[0], 0, cos[0]]])
    down = np.array([[1, 0, 0], [0, cos[1], -sin[1]], [0, sin[1], cos[1]]])
    turn = np.array([[cos[2], -sin[2], 0], [sin[2], cos[2], 0], [0, 0, 1]]) @ down @ aside
    left, top, right, bottom = box
    reach = max(right - left, bottom - top) / 2
    centre = np.array([[1, 0, -(left + right) / 2], [0, 1, -(top + bottom) / 2], [0, 0, reach]])
    plane = np.stack([turn[:, 0], turn[:, 1], [0, 0, 4.0]], -1)  # four times its size away
    zoom = side * rng.uniform(0.34, 0.52) * 4
    at = side * (0.5 + rng.uniform(-0.15, 0.15, 2))
    lens = np.array([[zoom, 0, at[0]], [0, zoom, at[1]], [0, 0, 1]])
    back = np.linalg.inv(lens @ plane @ centre)
    return back / back[2, 2]


def _light(rng, pixels: np.ndarray) -> np.ndarray:
    """Lights a picture [side, side, 3]: brightness, colour, a slope and a shadow; float32."""
    side = len(pixels)
    warmth, tint = rng.uniform(-0.17, 0.17), rng.uniform(-0.05, 0.05)
    gain = np.exp(rng.uniform(-0.4, 0.2)) * np.array([1 + warmth, 1 + tint, 1 - warmth])
    axis = np.linspace(-1, 1, side)

    def along():
        angle = rng.uniform(0, 2 * np.pi)
        return np.cos(angle) * axis + np.sin(angle) * axis[:, None]

    slope = 1 + rng.uniform(0, 0.35) * along()
    if rng.random() < 0.5:
        sharp, depth, offset = rng.uniform(2, 20), rng.uniform(0.2, 0.45), rng.uniform(-0.6, 0.6)
        slope *= 1 - depth * (0.5 + sharp * (along() - offset)).clip(0, 1)
    lit = pixels * (slope[..., None] * gain).astype(np.float32)
    grain = rng.standard_normal((side, side, 1), np.float32)
    return lit + grain * np.float32(rng.uniform(0, 5))


@functools.lru_cache(maxsize=16)
def _drawn(seed: int, identity: int) -> Image.Image:
    return drawing.draw(product(seed, identity)).convert('RGBa')


def photograph(seed: int, split: str, identity: int, shot: int, *, side: int = 128) -> bytes:
    """Photographs a product.

    Args:
      seed: of the set.
      split: any name; splits have unrelated photographs.
      identity: of the product.
      shot: number of the photograph, not negative.
      side: width and height in pixels.

    Returns:
      A JPEG file of `side` × `side` pixels.
    """
    if shot < 0:
        raise ValueError(f'shot must not be negative, got {shot}')
    rng = _stream('photograph', seed, split, identity, shot)
    drawn = _drawn(seed, identity)
    picture = np.asarray(_backdrop(rng, 2 * side).reduce(2), np.float32)
    back = _camera(rng, drawn.getchannel('a').getbbox(), 2 * side)
    if product(seed, identity).category in MIRRORED and rng.random() < 0.4:
        back = np.array([[-1, 0, drawing.SIDE], [0, 1, 0], [0, 0, 1]]) @ back
    how = (Image.Transform.PERSPECTIVE, back.ravel()[:8].tolist(), Image.Resampling.BILINEAR)
    seen = drawn.transform((2 * side, 2 * side), *how).reduce(2)
    seen = np.asarray(seen, np.float32)  # colours times alpha, and alpha
    right, down = rng.integers(-side // 12, side // 12 + 1, 2).tolist()
    shadow = Image.fromarray(seen[..., 3].astype(np.uint8)).filter(ImageFilter.BoxBlur(side / 40))
    shadow = shadow.transform(shadow.size, Image.Transform.AFFINE, (1, 0, right, 0, 1, down))
    shadow = np.asarray(shadow, np.float32)
    picture *= 1 - shadow[..., None] * (0.5 / 255)
    picture = picture * (1 - seen[..., 3:] / 255) + seen[..., :3]
    if rng.random() < 0.4:
        softened = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
        softened = softened.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.1) * side / 128))
        picture = np.asarray(softened, np.float32)
    encoded = io.BytesIO()
    lit = _light(rng, picture).clip(0, 255).astype(np.uint8)
    Image.fromarray(lit).save(encoded, 'JPEG', quality=90)
    return encoded.getvalue()


def records(
    split: str, report: FaultReport, *, seed: int, plan: Mapping[str, list[tuple[int, int]]]
) -> Iterator[dict]:
    """Yields the records of a split of `catalogue`, with their images."""
    rows = plan[split]
    report.rows = len(rows)
    draw = functools.partial(_photograph, seed, split)
    photographs = processes.ordered(draw, rows, chunk=_CHUNK)
    names: dict[int, str] = {}
    for line, ((identity, shot), image) in enumerate(zip(rows, photographs, strict=True)):
        if identity not in names:
            names[identity] = item(seed, identity)['item']
        path = f'{names[identity]}/{split}_{shot:03d}.jpg'
        yield {'item': names[identity], 'image_path': path, 'line': line, 'image': image}


def _photograph(seed: int, split: str, row: tuple[int, int]) -> bytes:
    return photograph(seed, split, *row)
