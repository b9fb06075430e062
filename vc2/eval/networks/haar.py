"""Haar cascades (Viola and Jones 2001), as OpenCV's `CascadeClassifier` runs them.

A window slides over the picture at many scales. Each stage sums votes of stumps, and a window whose votes stay below
the stage's threshold is dropped there; few windows come through all stages. A stump compares one feature with a
threshold: weighted sums of pixels in two or three rectangles, over the spread of the whole window,

    f = sum_k w_k S_k / sqrt(A Q - S^2)        S, Q: sums of pixels and squares inside the window, A: its area

all read off integral images. Windows that came through and overlap are grouped; a group of more than `min_neighbours`
windows is an object, its box the mean of theirs.

OpenCV's arithmetic is kept: which pixels are looked at (every second one below twice the size, and one more is jumped
where the first stage says no), single precision where it has it, rounding, grouping. The wheels of OpenCV 5 lack that
class and its cascade files; 4.x and Debian's `opencv-data` have the files, which are foreign weights here.

Shapes: N windows; a box is (left, top, width, height) in pixels.
"""

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from vc2.errors import WeightsError

__all__ = ["Cascade"]

LARGEST = 20_000_000  # bytes of a file; those of OpenCV are below one million
SLACK = np.float32(1e-5)  # that OpenCV takes off the threshold of every stage
ALIKE = 0.2  # of their size, how far boxes of one group may be apart


@dataclass(frozen=True, slots=True)
class _Stump:
    corners: dict[tuple[int, int], int]  # (x, y) in the window -> weight in the integral image
    threshold: np.float32
    below: np.float32  # its vote
    above: np.float32


@dataclass(frozen=True, slots=True)
class _Stage:
    stumps: tuple[_Stump, ...]
    threshold: np.float32


class Cascade:
    """Finds one kind of thing in grey pictures.

    Args:
        stages: In the order in which they are asked.
        window: Width and height of the window at its own scale, pixels.
    """

    def __init__(self, stages: tuple[_Stage, ...], window: tuple[int, int]) -> None:
        self.stages = stages
        self.window = window

    @classmethod
    def load(cls, path: Path) -> "Cascade":
        """Read a cascade of stumps over upright Haar features, in OpenCV's XML.

        Raises:
            WeightsError: If it cannot be read, or is another kind of cascade.
        """
        try:
            with open(path, "rb") as file:
                text = file.read(LARGEST + 1)
        except OSError as error:
            raise WeightsError(f"{path}: cannot be read ({error.strerror}); give the path of a cascade") from None
        if len(text) > LARGEST or b"<!DOCTYPE" in text or b"<!ENTITY" in text:
            raise WeightsError(f"{path}: is not one of OpenCV's cascades: too large, or declares entities")
        try:
            root = ElementTree.fromstring(text).find("cascade")
            if root is None:
                raise ValueError("no <cascade>")
            return _read(root)
        except (ElementTree.ParseError, ValueError, IndexError, TypeError) as error:
            raise WeightsError(
                f"{path}: is not a cascade that can be used here ({error}); expected stumps over upright Haar features "
                "in OpenCV's XML, such as haarcascade_frontalface_default.xml"
            ) from None

    def find(self, grey: np.ndarray, *, scale_factor: float = 1.1, min_neighbours: int = 10) -> np.ndarray:
        """Boxes of what is found in a grey picture (H, W), uint8.

        Args:
            grey: The picture.
            scale_factor: From one size of the window to the next.
            min_neighbours: Windows that a group must have more than.

        Returns:
            Boxes (N, 4), integers; (0, 4) where nothing is found.

        Raises:
            ValueError: If `scale_factor` or `min_neighbours` cannot be used.
        """
        if scale_factor <= 1 or min_neighbours < 1:
            raise ValueError(f"scale_factor {scale_factor}, min_neighbours {min_neighbours}: above 1, and at least 1")
        boxes = _grouped(self._windows(grey, scale_factor), min_neighbours)
        boxes[:, 2:] = np.minimum(boxes[:, 2:], (grey.shape[1], grey.shape[0]) - boxes[:, :2])  # rounding may pass it
        return boxes

    def _windows(self, grey: np.ndarray, scale_factor: float) -> np.ndarray:
        """Boxes of all windows that come through."""
        layers = self._layers(grey, scale_factor)
        if not layers:
            return np.empty((0, 4), np.int64)
        sums, squares, stride = _integrals(layers, grey.shape[1])
        stripes = -(-(grey.shape[1] + 1 - self.window[0]) // 32)
        grids = [layer.grid(self.window, stride, stripes) for layer in layers]
        at = np.concatenate([grid.ravel() for grid in grids])
        inverse, seen = self._inverse_spread(sums, squares, at, stride)
        passed = seen & self._votes(self.stages[0], sums, at, inverse, stride)
        ends = np.cumsum([grid.size for grid in grids])
        dropped = np.split(seen & ~passed, ends[:-1])
        looked = [_looked_at(part.reshape(grid.shape)).ravel() for part, grid in zip(dropped, grids, strict=True)]
        which = np.flatnonzero(passed & np.concatenate(looked))
        for stage in self.stages[1:]:
            which = which[self._votes(stage, sums, at[which], inverse[which], stride)]
        of_layer = np.searchsorted(ends, which, side="right")
        boxes = [layers[n].box(int(at[i]), stride, self.window) for n, i in zip(of_layer, which, strict=True)]
        return np.array(boxes, dtype=np.int64).reshape(-1, 4)

    def _layers(self, grey: np.ndarray, scale_factor: float) -> list["_Layer"]:
        height, width = grey.shape
        layers, factor = [], 1.0
        while round(self.window[0] * factor) <= width and round(self.window[1] * factor) <= height:
            scale = np.float32(factor)
            size = round(np.float32(width) / scale), round(np.float32(height) / scale)
            layers.append(_Layer(scale, cv2.resize(grey, size, interpolation=cv2.INTER_LINEAR_EXACT)))
            factor *= scale_factor
        return layers

    def _inverse_spread(
        self, sums: np.ndarray, squares: np.ndarray, at: np.ndarray, stride: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """1 / sqrt(A Q - S^2) of each window without its rim, and whether there is anything to see in it."""
        width, height = self.window[0] - 2, self.window[1] - 2
        area = float(width * height)
        corners = {(1, 1): 1, (1 + width, 1): -1, (1, 1 + height): -1, (1 + width, 1 + height): 1}
        total = _weighted(sums, at, corners, stride).astype(np.float64)
        square = _weighted(squares, at, corners, stride).view(np.uint32).astype(np.float64)
        spread = area * square - total * total
        inverse = np.ones(len(at), np.float32)
        seen = spread > 0
        inverse[seen] = (1 / np.sqrt(spread[seen])).astype(np.float32)
        return inverse, seen & (area * inverse.astype(np.float64) < 0.1)

    def _votes(self, stage: _Stage, sums: np.ndarray, at: np.ndarray, inverse: np.ndarray, stride: int) -> np.ndarray:
        """Which windows a stage lets through."""
        votes = np.zeros(len(at), np.float64)
        for stump in stage.stumps:
            value = _weighted(sums, at, stump.corners, stride).astype(np.float32) * inverse
            votes += np.where(value < stump.threshold, stump.below, stump.above)
        return votes >= np.float64(stage.threshold)


@dataclass(slots=True)
class _Layer:
    """The picture at one scale."""

    scale: np.float32  # a window here is so many times larger in the picture
    pixels: np.ndarray
    first: int = 0  # where its integral image begins

    def grid(self, window: tuple[int, int], stride: int, stripes: int) -> np.ndarray:
        """Where its windows begin in the flat integral image, rows by columns.

        OpenCV deals out rows in stripes of equal height, rounded so that it may leave out the last row.
        """
        step = 1 if self.scale >= 2 else 2
        height, width = (max(side + 1 - own, 0) for side, own in zip(self.pixels.shape, window[::-1], strict=True))
        stripe = max(-(-(height // step) // stripes), 1) * step
        rows = np.arange(0, min(stripes * stripe, height), step)
        columns = np.arange(0, width, step)
        return self.first + rows[:, None] * stride + columns[None]

    def box(self, start: int, stride: int, window: tuple[int, int]) -> tuple[int, int, int, int]:
        y, x = divmod(start - self.first, stride)
        left, top, width, height = (round(np.float32(value) * self.scale) for value in (x, y, *window))
        return left, top, width, height


def _integrals(layers: list[_Layer], width: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Integral images of all scales below each other, flat, and how long their rows are: as one length serves all, the
    corners of a feature lie at the same distances everywhere. Of the pixels, and of their squares."""
    stride = width + 1
    sums = np.zeros((sum(len(layer.pixels) + 1 for layer in layers), stride), np.int32)
    squares = np.zeros(sums.shape, np.int32)
    top = 0
    for layer in layers:
        layer.first = top * stride
        bottom, right = top + layer.pixels.shape[0] + 1, layer.pixels.shape[1] + 1
        sums[top:bottom, :right], square = cv2.integral2(layer.pixels, sdepth=cv2.CV_32S, sqdepth=cv2.CV_64F)
        squares[top:bottom, :right] = square.astype(np.int64).astype(np.int32)  # wraps; a window's own fits again
        top = bottom
    return sums.ravel(), squares.ravel(), stride


def _weighted(flat: np.ndarray, at: np.ndarray, corners: dict[tuple[int, int], int], stride: int) -> np.ndarray:
    """Weighted sum of an integral image at the corners of windows; sums of parts wrap, those of rectangles fit."""
    total = np.zeros(len(at), np.int32)
    for (x, y), weight in corners.items():
        part = flat[at + (y * stride + x)]
        total += part if weight == 1 else np.int32(weight) * part
    return total


def _looked_at(dropped: np.ndarray) -> np.ndarray:
    """Of a grid of windows, which are looked at: one is jumped over if its left neighbour was looked at and dropped."""
    looked = np.ones(dropped.shape, bool)
    for column in range(1, dropped.shape[1]):
        looked[:, column] = ~(looked[:, column - 1] & dropped[:, column - 1])
    return looked


def _grouped(boxes: np.ndarray, min_neighbours: int) -> np.ndarray:
    """Mean boxes of groups with more than `min_neighbours`, without those that lie in a stronger one."""
    if not len(boxes):
        return np.empty((0, 4), np.int64)
    group = _groups(boxes)
    count = group.max() + 1
    sizes = np.bincount(group, minlength=count)
    totals = np.stack([np.bincount(group, boxes[:, side], minlength=count) for side in range(4)], axis=1)
    means = np.rint(totals.astype(np.float32) * (np.float32(1) / sizes.astype(np.float32))[:, None]).astype(np.int64)
    strong = [(box, size) for box, size in zip(means, sizes, strict=True) if size > min_neighbours]
    kept = [
        box
        for i, (box, size) in enumerate(strong)
        if not any(
            i != j and _inside(box, other) and (more > max(3, size) or size < 3)
            for j, (other, more) in enumerate(strong)
        )
    ]
    return np.array(kept, dtype=np.int64).reshape(-1, 4)


def _groups(boxes: np.ndarray) -> np.ndarray:
    """Number of the group of each box: groups are joined by chains of boxes that are alike."""
    edges, sides = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1), boxes[:, 2:]
    group = np.full(len(boxes), -1)
    for first in range(len(boxes)):
        if group[first] >= 0:
            continue
        group[first] = number = group.max() + 1
        waiting = [first]
        while waiting:
            here = waiting.pop()
            reach = ALIKE * np.minimum(sides, sides[here]).sum(axis=1) * 0.5
            near = (group < 0) & (np.abs(edges - edges[here]) <= reach[:, None]).all(axis=1)
            group[near] = number
            waiting.extend(np.flatnonzero(near))
    return group


def _inside(box: np.ndarray, other: np.ndarray) -> bool:
    margin = np.rint(other[2:] * ALIKE)
    low, high = other[:2] - margin, other[:2] + other[2:] + margin
    return bool(np.all(box[:2] >= low) and np.all(box[:2] + box[2:] <= high))


# ---- the file ----


def _read(root: ElementTree.Element) -> Cascade:
    kind = _text(root, "stageType"), _text(root, "featureType")
    if kind != ("BOOST", "HAAR"):
        raise ValueError(f"stages {kind[0]} of features {kind[1]}")
    window = int(_text(root, "width")), int(_text(root, "height"))
    if min(window) < 4:
        raise ValueError(f"window of {window[0]} x {window[1]} pixels")
    features = [_corners(feature, window) for feature in _all(root, "features")]
    stages = tuple(_stage(stage, features) for stage in _all(root, "stages"))
    if not stages:
        raise ValueError("no stages")
    return Cascade(stages, window)


def _stage(stage: ElementTree.Element, features: list[dict[tuple[int, int], int]]) -> _Stage:
    stumps = []
    for weak in _all(stage, "weakClassifiers"):
        nodes, leaves = _text(weak, "internalNodes").split(), _text(weak, "leafValues").split()
        if len(nodes) != 4 or len(leaves) != 2:
            raise ValueError(f"trees of {len(leaves)} leaves")
        number = int(nodes[2])
        if not 0 <= number < len(features):
            raise ValueError(f"no feature {number}")
        below, above = (np.float32(leaf) for leaf in leaves)
        stumps.append(_Stump(features[number], np.float32(nodes[3]), below, above))
    return _Stage(tuple(stumps), np.float32(_text(stage, "stageThreshold")) - SLACK)


def _corners(feature: ElementTree.Element, window: tuple[int, int]) -> dict[tuple[int, int], int]:
    """A feature as weights of corners in the integral image."""
    if feature.findtext("tilted", "0").strip() != "0":
        raise ValueError("tilted features")
    corners: Counter[tuple[int, int]] = Counter()
    for rectangle in _all(feature, "rects"):
        words = re.split(r"\s+", (rectangle.text or "").strip())
        (x, y, width, height), weight = (int(word) for word in words[:4]), float(words[4])
        if weight != int(weight):
            raise ValueError(f"rectangle of weight {weight}")
        if min(x, y, width, height) < 0 or x + width > window[0] or y + height > window[1]:
            raise ValueError("rectangle outside the window")
        for corner, sign in (((x, y), 1), ((x + width, y), -1), ((x, y + height), -1), ((x + width, y + height), 1)):
            corners[corner] += sign * int(weight)
    return {corner: weight for corner, weight in corners.items() if weight}


def _all(parent: ElementTree.Element, tag: str) -> list[ElementTree.Element]:
    found = parent.find(tag)
    if found is None:
        raise ValueError(f"no <{tag}>")
    return found.findall("_")


def _text(parent: ElementTree.Element, tag: str) -> str:
    found = parent.findtext(tag)
    if found is None:
        raise ValueError(f"no <{tag}>")
    return found.strip()
