"""A scene: one or two coloured things that move over a background, and the caption that says all of it.

`Truth` is what a caption tells and a judge checks; `Scene` adds the geometry that a caption leaves open (place, size,
speed, backdrop). Captions follow one small grammar, so that `parse_caption(scene.caption()) == scene.truth`:

    caption := thing ["beside" thing] "over a" background "background"
    thing   := "a" [texture] colour shape ["moves" direction]

Geometry is in *units*: the largest 5:3 window that fits the frame's centre is 5/3 units wide and 1 unit high,
whatever the frame's own aspect, so a thing keeps its place and size when a frame is fitted and cropped to 5:3. The
origin is the centre, x points right, y points down, t is in seconds.

Edges are anti-aliased from signed distances. Drawing uses only +, *, floor and square roots, which round the same
everywhere: same scene, same bytes, on any CPU.

Shapes: T frames, H x W pixels.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

__all__ = [
    "BACKDROPS",
    "BACKGROUNDS",
    "COLOURS",
    "DIRECTIONS",
    "SHAPES",
    "TEXTURES",
    "VIDEO_BACKGROUNDS",
    "VIDEO_COLOURS",
    "Scene",
    "Thing",
    "ThingTruth",
    "Truth",
    "draw_picture_scene",
    "draw_video_scene",
    "parse_caption",
    "shape_cover",
]

COLOURS: dict[str, tuple[int, int, int]] = {  # of things: strong, hues far apart
    "red": (222, 44, 40),
    "green": (40, 178, 62),
    "blue": (44, 84, 232),
    "yellow": (246, 212, 44),
    "cyan": (40, 200, 214),
    "purple": (176, 52, 204),
}
VIDEO_COLOURS = ("red", "green", "blue", "yellow")

BACKGROUNDS: dict[str, tuple[int, int, int]] = {  # muted
    "grey": (128, 128, 128),
    "brown": (120, 98, 80),
    "beige": (194, 182, 160),
    "navy": (46, 54, 84),
    "green": (92, 118, 92),
    "pink": (198, 164, 172),
}
VIDEO_BACKGROUNDS = ("grey", "brown", "beige", "navy")

SHAPES = ("circle", "square", "triangle")
TEXTURES = ("plain", "striped", "dotted")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACKDROPS = ("soft", "tiles", "bands")

WIDE = 5 / 3  # width of the window that every frame shows, in units


@dataclass(frozen=True, slots=True)
class ThingTruth:
    """What a caption says of one thing. `motion` is a direction, or None for a thing at rest."""

    shape: str
    colour: str
    texture: str = "plain"
    motion: str | None = None

    def phrase(self) -> str:
        texture = "" if self.texture == "plain" else f"{self.texture} "
        motion = f" moves {self.motion}" if self.motion else ""
        return f"a {texture}{self.colour} {self.shape}{motion}"


@dataclass(frozen=True, slots=True)
class Truth:
    """What a caption says of a scene."""

    background: str
    things: tuple[ThingTruth, ...]

    @property
    def is_moving(self) -> bool:
        """Whether it is of a single thing that moves."""
        return len(self.things) == 1 and self.things[0].motion is not None

    def caption(self) -> str:
        return f"{' beside '.join(thing.phrase() for thing in self.things)} over a {self.background} background"

    def as_json(self) -> dict:
        """Plain values; `from_json` reads them back."""
        things = [{"shape": t.shape, "colour": t.colour, "texture": t.texture, "motion": t.motion} for t in self.things]
        return {"background": self.background, "things": things}

    @classmethod
    def from_json(cls, value: dict) -> "Truth":
        return cls(value["background"], tuple(ThingTruth(**thing) for thing in value["things"]))


@dataclass(frozen=True, slots=True)
class Thing:
    """One thing in its place: centre (x, y) at t = 0 and height in units, speed in units a second."""

    truth: ThingTruth
    x: float
    y: float
    size: float
    speed: float = 0.0

    def centre(self, t: float) -> tuple[float, float]:
        """Centre at time t, in units."""
        dx, dy = DIRECTIONS[self.truth.motion] if self.truth.motion else (0, 0)
        return self.x + dx * self.speed * t, self.y + dy * self.speed * t


@dataclass(frozen=True, slots=True)
class Scene:
    """Things over a background whose pattern is `backdrop`, of `contrast` grey levels, with phases from `variant`."""

    background: str
    things: tuple[Thing, ...]
    backdrop: str = "soft"
    contrast: float = 8.0
    variant: int = 0

    @property
    def truth(self) -> Truth:
        return Truth(self.background, tuple(thing.truth for thing in self.things))

    def caption(self) -> str:
        return self.truth.caption()

    def render(self, width: int, height: int, t: float = 0.0) -> np.ndarray:
        """The frame at time t, (height, width, 3) uint8."""
        return self.render_clip(width, height, [t])[0]

    def render_clip(self, width: int, height: int, times: Iterable[float]) -> np.ndarray:
        """Frames at the given times, (T, height, width, 3) uint8."""
        return np.stack(list(self.frames(width, height, times)))

    def frames(self, width: int, height: int, times: Iterable[float]) -> Iterator[np.ndarray]:
        """Frames (height, width, 3) uint8, one at a time. The background is drawn once, things only where they are."""
        still = np.rint(_background(self, width, height)).astype(np.uint8)
        for t in times:
            frame = still.copy()
            for thing in self.things:
                _draw(thing, frame, t)
            yield frame


_THING = r"an? (?:({textures}) )?({colours}) ({shapes})(?: moves ({directions}))?".format(
    textures="|".join(TEXTURES), colours="|".join(COLOURS), shapes="|".join(SHAPES), directions="|".join(DIRECTIONS)
)
_CAPTION = re.compile(rf"{_THING}(?: beside {_THING})? over an? ({'|'.join(BACKGROUNDS)}) background\b")


def parse_caption(text: str) -> Truth:
    """What a caption says; the inverse of `Truth.caption`. Words before and after the caption are passed over.

    Raises:
        ValueError: If the text holds no caption of this world's grammar.
    """
    found = _CAPTION.search(text.lower())
    if found is None:
        raise ValueError(
            f"{text!r} is no caption of this world; an example: 'a red circle moves right over a grey background'"
        )
    *words, background = found.groups()
    things = [
        ThingTruth(shape, colour, texture or "plain", motion)
        for texture, colour, shape, motion in (words[:4], words[4:])
        if shape is not None
    ]
    return Truth(background, tuple(things))


def draw_video_scene(rng: np.random.Generator, truth: Truth, seconds: float) -> Scene:
    """A scene of one moving thing that stays in sight for `seconds`, at constant velocity.

    A thing crosses most of the frame's width in two seconds, of its height in two: 0.6 and 0.4 units a second, less
    when the clip is long.
    """
    (thing,) = truth.things
    size = 0.42 * rng.uniform(0.94, 1.06)
    dx, dy = DIRECTIONS[thing.motion or "right"]
    reach = 0.68 if dx else 0.38  # of the centre, to either side
    speed = 0.0 if thing.motion is None else min((0.62 if dx else 0.38) * rng.uniform(0.92, 1.08), 2 * reach / seconds)
    lane = rng.uniform(-0.14, 0.14) if dx else rng.uniform(-0.5, 0.5)
    slack = max(0.0, reach - speed * seconds / 2)
    shift = rng.uniform(-slack, slack) * 0.8
    x = shift - dx * speed * seconds / 2 if dx else lane
    y = shift - dy * speed * seconds / 2 if dy else lane
    placed = Thing(thing, float(x), float(y), float(size), float(speed))
    return Scene(truth.background, (placed,), "soft", float(rng.uniform(4, 9)), int(rng.integers(1 << 31)))


def draw_picture_scene(rng: np.random.Generator, truth: Truth, *, rich: bool) -> Scene:
    """A still scene: one thing near the middle, or two side by side; `rich`: larger, over a strong pattern."""
    size = (0.62 if rich else 0.46) * rng.uniform(0.92, 1.08)
    places = [0.0] if len(truth.things) == 1 else [-0.42, 0.42] if rich else [-0.38, 0.38]
    things = tuple(
        Thing(
            ThingTruth(thing.shape, thing.colour, thing.texture),
            float(place + rng.uniform(-0.05, 0.05) * (6 if len(places) == 1 else 1)),
            float(rng.uniform(-0.12, 0.12)),
            float(size * rng.uniform(0.95, 1.05)),
        )
        for thing, place in zip(truth.things, places, strict=True)
    )
    backdrop = BACKDROPS[int(rng.integers(len(BACKDROPS)))] if rich else "soft"
    contrast = rng.uniform(12, 20) if rich else rng.uniform(5, 10)
    return Scene(truth.background, things, backdrop, float(contrast), int(rng.integers(1 << 31)))


def _unit(width: int, height: int) -> float:
    """Pixels in a unit."""
    return min(float(height), width / WIDE)


def _axes(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres in units: x (1, W), y (H, 1)."""
    unit = _unit(width, height)
    x = (np.arange(width) + 0.5 - width / 2) / unit
    y = (np.arange(height) + 0.5 - height / 2) / unit
    return x[None, :], y[:, None]


def _wave(phase: np.ndarray) -> np.ndarray:
    """A smooth wave of period 1 between -1 and 1, from polynomials alone."""
    ramp = np.abs(2 * (phase - np.floor(phase)) - 1)  # 1 .. 0 .. 1
    return 2 * ramp * ramp * (3 - 2 * ramp) - 1


def _square_wave(phase: np.ndarray, sharpness: float) -> np.ndarray:
    """A wave of period 1 that is -1 or 1, its steps softened over 1 / sharpness periods (anti-aliasing)."""
    ramp = np.abs(2 * (phase - np.floor(phase)) - 1)
    return np.clip((ramp - 0.5) * sharpness, -1, 1)


def _background(scene: Scene, width: int, height: int) -> np.ndarray:
    x, y = _axes(width, height)
    unit = _unit(width, height)
    phases = np.random.Generator(np.random.Philox(scene.variant)).uniform(0, 1, 6)
    if scene.backdrop == "tiles":
        pitch = 0.44 + 0.16 * phases[0]
        pattern = _square_wave(x / pitch + phases[1], unit * pitch) * _square_wave(y / pitch + phases[2], unit * pitch)
    elif scene.backdrop == "bands":
        slope = 1.0 if phases[3] < 0.5 else -1.0
        pitch = 0.4 + 0.2 * phases[0]
        pattern = _square_wave((x * 0.8 + slope * y * 0.6) / pitch + phases[1], unit * pitch)
    else:
        pattern = (
            _wave(0.35 * x + phases[0] + 0.3 * y)
            + 0.7 * _wave(0.7 * y - 0.2 * x + phases[1])
            + 0.5 * _wave(0.9 * x + 0.5 * y + phases[2])
        ) / 1.6
    colour = np.array(BACKGROUNDS[scene.background], float)
    return np.clip(colour + scene.contrast * pattern[:, :, None], 0, 255)


def _distance(shape: str, dx: np.ndarray, dy: np.ndarray, size: float) -> np.ndarray:
    """Signed distance to a shape's edge, negative inside, in the units of the arguments."""
    half = size / 2
    if shape == "circle":
        return np.sqrt(dx * dx + dy * dy) - half
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - 0.9 * half
    wide = 1.15 * half  # triangle: apex above, half width `wide` at the foot
    slant = (np.abs(dx) * size - (dy + half) * wide) / (size * size + wide * wide) ** 0.5
    return np.maximum(slant, dy - half)


def shape_cover(shape: str, width: int, height: int, x: float, y: float, area: float) -> np.ndarray:
    """How much of each pixel a shape covers, (H, W) in [0, 1], given its centre of mass and its area in pixels."""
    size = (area / {"circle": 0.7854, "square": 0.81, "triangle": 0.575}[shape]) ** 0.5
    middle = y - (size / 6 if shape == "triangle" else 0)  # a triangle's mass lies below the middle of its height
    dx = (np.arange(width) + 0.5 - x)[None, :]
    dy = (np.arange(height) + 0.5 - middle)[:, None]
    return np.clip(0.5 - _distance(shape, dx, dy, size), 0, 1)


def _draw(thing: Thing, frame: np.ndarray, t: float) -> None:
    height, width = frame.shape[:2]
    unit = _unit(width, height)
    cx, cy = thing.centre(t)
    px, py = cx * unit + width / 2, cy * unit + height / 2  # in pixels
    reach = 0.6 * thing.size * unit + 2
    left, right = max(0, int(px - reach)), min(width, int(px + reach) + 1)
    top, bottom = max(0, int(py - reach)), min(height, int(py + reach) + 1)
    if left >= right or top >= bottom:
        return
    dx = (np.arange(left, right) + 0.5 - px)[None, :]
    dy = (np.arange(top, bottom) + 0.5 - py)[:, None]
    size = thing.size * unit
    cover = np.clip(0.5 - _distance(thing.truth.shape, dx, dy, size), 0, 1)[:, :, None]
    patch = frame[top:bottom, left:right]
    paint = _paint(thing.truth, dx, dy, size)
    patch[:] = np.rint(patch + cover * (paint - patch)).astype(np.uint8)


def _paint(thing: ThingTruth, dx: np.ndarray, dy: np.ndarray, size: float) -> np.ndarray:
    """Colour of a thing's surface, (h, w, 3); stripes are darker, dots are lighter."""
    colour = np.array(COLOURS[thing.colour], float)
    if thing.texture == "striped":
        pitch = 0.36 * size
        dark = 0.5 + 0.5 * _square_wave((dx * 0.7071 + dy * 0.7071) / pitch + 0.1, pitch)
        return colour * (1 - 0.6 * dark[:, :, None])
    if thing.texture == "dotted":
        pitch = 0.34 * size
        u, v = (dx / pitch + 0.5), (dy / pitch + 0.5)
        u, v = (u - np.floor(u) - 0.5) * pitch, (v - np.floor(v) - 0.5) * pitch
        light = np.clip(0.5 - (np.sqrt(u * u + v * v) - 0.27 * pitch), 0, 1)[:, :, None]
        return colour + light * 0.75 * (255 - colour)
    return np.broadcast_to(colour, (*np.broadcast_shapes(dx.shape, dy.shape), 3))
