"""A signing person: what hands can do, how they move, and where that puts landmarks in a picture.

Lengths are in shoulder widths of an average person, from the middle of the shoulders, x to the
side of the arm in question and y down. An arm is posed in this space as if it were the right one
of a person who is seen from behind; the other arm is its mirror image.
"""

import dataclasses
import itertools

import numpy as np

HAND_POINTS, FACE_POINTS = 16, 8
STREAMS = {'pose': (0, 12), 'left': (12, 44), 'right': (44, 76), 'face': (76, 92)}
FEATURES, COORDINATES = 92, 2  # x and y of every landmark
WRIST, ANGLES, CURLS, SPREAD = slice(0, 2), slice(2, 5), slice(5, 10), slice(10, 11)
CHANNELS = 11  # of one arm: wrist x, y; direction, tilt, turn of the hand; 5 curls; spread
REST = np.array([0.42, 1.3, np.pi, 0.2, 0.6, 0.35, 0.3, 0.3, 0.3, 0.3, 0.2])

SHAPES = {  # curls of thumb … little, spread
    'flat': (0.1, 0.0, 0.0, 0.0, 0.0, 0.1),
    'five': (0.0, 0.0, 0.0, 0.0, 0.0, 1.0),
    'fist': (0.7, 1.0, 1.0, 1.0, 1.0, 0.0),
    'thumb': (0.0, 1.0, 1.0, 1.0, 1.0, 0.0),
    'index': (0.7, 0.0, 1.0, 1.0, 1.0, 0.0),
    'two': (0.7, 0.0, 0.0, 1.0, 1.0, 0.6),
    'three': (0.0, 0.0, 0.0, 1.0, 1.0, 0.7),
    'little': (0.6, 1.0, 1.0, 1.0, 0.0, 0.0),
    'horns': (0.6, 0.0, 1.0, 1.0, 0.0, 0.4),
    'angle': (0.0, 0.0, 1.0, 1.0, 1.0, 0.3),
    'claw': (0.3, 0.45, 0.45, 0.45, 0.45, 0.8),
    'round': (0.5, 0.6, 0.6, 0.6, 0.6, 0.1),
}
PLACES = {
    'forehead': (0.12, -0.98),
    'cheek': (0.33, -0.68),
    'chin': (0.1, -0.3),
    'shoulder': (-0.3, 0.02),
    'chest': (0.1, 0.3),
    'belly': (0.15, 0.78),
    'side': (0.75, 0.35),
    'high': (0.72, -0.55),
    'middle': (0.35, 0.5),
}
ORIENTATIONS = {  # direction, tilt, turn
    'out': (0.0, 0.1, 0.0),
    'in': (0.0, 0.1, np.pi),
    'edge': (-0.2, 0.2, 0.5 * np.pi),
    'across': (-1.3, 0.2, np.pi),
    'down': (-0.9, 1.0, 0.2),
    'up': (-0.6, -0.9, 0.3),
}
PATHS = ('line', 'arc', 'circle', 'zigzag', 'twist')

# Of a hand of length 1 from wrist to middle finger's tip: x to the thumb, y along the fingers.
_BASES = np.array([[0.2, 0.16], [0.17, 0.5], [0.03, 0.52], [-0.1, 0.48], [-0.2, 0.42]])
_BONES = np.array([[0.22, 0.2], [0.22, 0.22], [0.24, 0.24], [0.22, 0.22], [0.17, 0.17]])
_FAN = np.array([-0.75, -0.35, -0.04, 0.25, 0.55])  # radians to each side at spread 1
_FACE = np.array(  # nose, chin, eyes, brows, corners of the mouth; head radii from its middle
    [
        [0, 0.1],
        [0, 0.95],
        [-0.35, -0.2],
        [0.35, -0.2],
        [-0.38, -0.45],
        [0.38, -0.45],
        [-0.25, 0.5],
        [0.25, 0.5],
    ]
)


@dataclasses.dataclass(frozen=True)
class Body:
    """Proportions of a person, in shoulder widths of an average one."""

    shoulders: float = 0.5  # half their width
    upper_arm: float = 0.8
    forearm: float = 0.7
    hand: float = 0.5
    head: float = 0.36  # radius
    neck: float = 0.72  # from the shoulders up to the middle of the head


@dataclasses.dataclass(frozen=True)
class Camera:
    """How a person stands in the picture, whose sides are 1."""

    scale: float = 0.46  # of an average shoulder width
    centre: tuple[float, float] = (0.5, 0.39)  # of the middle of the shoulders
    roll: float = 0.0  # radians
    narrowed: float = 1.0  # width of a body that is not seen quite from the front

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Maps body points [..., 2], x to the right of the picture, to picture coordinates."""
        cos, sin = np.cos(self.roll), np.sin(self.roll)
        turn = self.scale * np.array([[cos, sin], [-sin, cos]])
        return (points * (self.narrowed, 1.0)) @ turn + self.centre


def hand(arm: np.ndarray, length: float) -> np.ndarray:
    """Returns the landmarks of a hand: the wrist, then base, joint and tip of thumb … little.

    Args:
      arm: [T, 11]; a direction of 0 points up, a turn of 0 shows the palm, a curl of 1 closes.
      length: from the wrist to the middle finger's tip.

    Returns:
      [T, 16, 2] in the arm's space.
    """
    curls, frames = arm[:, CURLS], len(arm)
    first = curls * (0.5 * np.pi)
    second = first + curls * (0.6 * np.pi)
    fan = _FAN * arm[:, SPREAD]
    fan[:, 0] -= 0.5 * (1 - curls[:, 0])  # an open thumb stands off
    side = np.stack([-np.sin(fan), np.cos(fan)], -1)  # [T, 5, 2] in the plane of the palm
    points = np.zeros((frames, 5, 3, 3))
    points[:, :, :, :2] = _BASES[:, None]
    for joint, bend in ((1, first), (2, second)):
        step = np.concatenate([side * np.cos(bend)[..., None], np.sin(bend)[..., None]], -1)
        points[:, :, joint:] += (step * _BONES[:, joint - 1, None])[:, :, None]
    points = points.reshape(frames, 15, 3)
    direction, tilt, turn = arm[:, ANGLES].T
    x = points[..., 0] * np.cos(turn)[:, None] + points[..., 2] * np.sin(turn)[:, None]
    z = points[..., 2] * np.cos(turn)[:, None] - points[..., 0] * np.sin(turn)[:, None]
    y = points[..., 1] * np.cos(tilt)[:, None] - z * np.sin(tilt)[:, None]
    cos, sin = np.cos(direction)[:, None], np.sin(direction)[:, None]
    flat = np.stack([-x * cos + y * sin, -x * sin - y * cos], -1)  # the thumb is inside, y down
    wrist = arm[:, None, WRIST]
    return np.concatenate([wrist, wrist + length * flat], 1)


def elbow(wrists: np.ndarray, body: Body) -> tuple[np.ndarray, np.ndarray]:
    """Bends an arm so that it reaches its wrist, elbow out and down.

    Args:
      wrists: [T, 2] in the arm's space.

    Returns:
      elbows and wrists [T, 2]; a wrist out of reach is brought back to where the arm ends. An
      elbow that should bend towards the camera lies nearer to the line than the arm is long.
    """
    shoulder = np.array([body.shoulders, 0.0])
    offset = wrists - shoulder
    distance = np.maximum(np.linalg.norm(offset, axis=1, keepdims=True), 1e-6)
    along = offset / distance
    reach = np.clip(
        distance, abs(body.upper_arm - body.forearm) + 0.02, body.upper_arm + body.forearm
    )
    far = (body.upper_arm**2 - body.forearm**2 + reach**2) / (2 * reach)
    height = np.sqrt(np.maximum(body.upper_arm**2 - far**2, 0))
    outwards = np.array([0.66, 0.75])
    bent = outwards - (along @ outwards)[:, None] * along
    return shoulder + along * far + bent * height, shoulder + along * np.minimum(distance, reach)


def face(head: np.ndarray, body: Body) -> np.ndarray:
    """Returns the landmarks of a face [T, 8, 2], x to the right of the picture.

    Args:
      head: [T, 5]: shift x, y; tilt in radians; brows raised and mouth open, both about −1 … 1.
    """
    points = np.tile(_FACE, (len(head), 1, 1))
    points[:, 4:6, 1] -= 0.16 * head[:, 3:4]
    points[:, 1, 1] += 0.12 * head[:, 4]
    points[:, 6:, 1] += 0.08 * head[:, 4:5]
    cos, sin = np.cos(head[:, 2]), np.sin(head[:, 2])
    turn = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], 1)
    points = body.head * points @ turn
    return points + head[:, None, :2] + (0.0, -body.neck)


def landmarks(
    dominant: np.ndarray,
    other: np.ndarray,
    head: np.ndarray,
    body: Body,
    camera: Camera,
    left_handed: bool = False,
) -> np.ndarray:
    """Draws a whole person.

    Args:
      dominant, other: [T, 11], the arms, each in its own space.
      head: [T, 5], as `face` has it.
      left_handed: the dominant hand is the left one, which is to the right of the picture.

    Returns:
      [T, 92] picture coordinates by `STREAMS`, x and y of a landmark side by side: pose has
      shoulders, elbows and wrists, left before right; a hand has the landmarks of `hand`.
    """
    arms = {}
    for is_left, arm in ((left_handed, dominant), (not left_handed, other)):
        elbows, wrists = elbow(arm[:, WRIST], body)
        reached = np.concatenate([wrists, arm[:, 2:]], 1)
        shoulders = np.tile([body.shoulders, 0.0], (len(arm), 1))
        joints = np.stack([shoulders, elbows, wrists], 1)
        side = (1.0, 1.0) if is_left else (-1.0, 1.0)
        arms[is_left] = joints * side, hand(reached, body.hand) * side
    (left, left_hand), (right, right_hand) = arms[True], arms[False]
    pose = np.stack([left, right], 2).reshape(len(left), 6, 2)
    parts = [pose, left_hand, right_hand, face(head, body)]
    return camera(np.concatenate(parts, 1)).reshape(len(pose), FEATURES)


def way(
    path: str, u: np.ndarray, angle: float, size: float, repeats: int, reverse: bool
) -> np.ndarray:
    """Returns a wrist's way about its place [len(u), 2].

    Args:
      path: one of `PATHS`.
      u: time from 0 to 1.
      angle: radians, where a line leads and a circle begins; it turns the other way in `reverse`.
      size: length of a line, diameter of a circle.
      repeats: 1 leads from end to end, more there and back so many times.
    """
    along = np.array([np.cos(angle), np.sin(angle)])
    aside = np.array([-along[1], along[0]])
    cycles = 2 * np.pi * repeats * u
    swing = -np.cos(np.pi * u if repeats == 1 else cycles) / 2  # −½ … ½
    if path == 'twist':
        return np.zeros((len(u), 2))
    if path == 'circle':
        sense = -1 if reverse else 1
        across = sense * np.outer(np.sin(cycles), aside)
        return 0.5 * size * (np.outer(np.cos(cycles), along) + across)
    bump = {
        'line': np.zeros_like(u),
        'arc': 0.5 - 2 * swing**2,
        'zigzag': 0.35 * np.sin(4 * np.pi * u),
    }[path]
    return size * (np.outer(swing, along) + np.outer(bump, aside))


def joined(strokes, total: int, rng: np.random.Generator) -> np.ndarray:
    """Leads an arm from rest through its strokes (start, [frames, 11]) and back: [total, 11]."""
    path = np.empty((total, CHANNELS))
    rest = (REST + rng.normal(0, 0.04, CHANNELS))[None]
    pieces = [(0, rest), *strokes, (total - 1, rest)]

    def travel(start, stop, a, b):
        t = (np.arange(start, stop) - start + 1)[:, None] / (stop - start + 1)
        path[start:stop] = a + (b - a) * (3 * t**2 - 2 * t**3)
        aside = (b - a)[[1, 0]] * (-1, 1) * rng.normal(0, 0.15)
        path[start:stop, WRIST] += np.sin(np.pi * t) * aside

    for (start, piece), (stop, following) in itertools.pairwise(pieces):
        begin = start + len(piece)
        path[start:begin] = piece
        away = round(rng.uniform(5, 8))
        if stop - begin <= 2 * away:
            travel(begin, stop, piece[-1], following[0])
        else:
            pause = rest[0] if rng.random() < 0.6 else piece[-1]
            travel(begin, begin + away, piece[-1], pause)
            path[begin + away : stop - away] = pause
            travel(stop - away, stop, pause, following[0])
    path[total - 1] = rest[0]
    return path


def smooth(values: np.ndarray, width: float) -> np.ndarray:
    """Blurs [T, C] over time with a Gaussian of `width` frames; the ends are continued."""
    reach = int(np.ceil(3 * width))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    padded = np.pad(values, ((reach, reach), (0, 0)), mode='edge')
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=0)
    return windows @ (kernel / kernel.sum())


def detected(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Jitters landmarks [T, 92] as a detector does; a hand that it misses is all zeros.

    It misses what lies below the picture, and every now and then a hand for some frames.
    """
    points = points + rng.normal(0, 0.004, points.shape)
    for name in ('left', 'right'):
        start, stop = STREAMS[name]
        missed = points[:, start + 1 : stop : 2].mean(1) > 1
        for _ in range(rng.poisson(len(points) / 45)):
            begin = int(rng.integers(len(points)))
            missed[begin : begin + int(rng.integers(2, 9))] = True
        points[missed, start:stop] = 0
    return points
