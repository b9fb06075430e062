"""Haar cascades, against what OpenCV finds."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from vc2.errors import WeightsError
from vc2.eval.networks.haar import Cascade

REFERENCE = Path(__file__).parents[2] / "reference" / "haar"
CASES = json.loads((REFERENCE / "boxes.json").read_text())


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """Soft blocks of grey, (height, width)."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width))
    for _ in range(30):
        left, top, side = rng.integers(0, width), rng.integers(0, height), rng.integers(4, 40)
        pixels[top : top + side, left : left + side] += rng.integers(-150, 150)
    pixels = np.sum([np.roll(pixels, (dy, dx), (0, 1)) for dy in range(4) for dx in range(4)], axis=0) // 16
    return pixels.clip(0, 255).astype(np.uint8)


def sorted_boxes(boxes: np.ndarray) -> list[list[int]]:
    return sorted([int(side) for side in box] for box in boxes)


@pytest.fixture(scope="module")
def cascade() -> Cascade:
    return Cascade.load(REFERENCE / "cascade.xml")


@pytest.mark.parametrize("case", CASES, ids=[f"{case['width']}x{case['height']}" for case in CASES])
def test_boxes_are_those_of_opencv(cascade: Cascade, case: dict) -> None:
    """The same boxes, to the pixel, as recorded from OpenCV 4.6."""
    pixels = picture(case["seed"], case["height"], case["width"])
    assert sorted_boxes(cascade.find(pixels, min_neighbours=case["min_neighbours"])) == case["boxes"]


@pytest.mark.skipif(not hasattr(cv2, "CascadeClassifier"), reason="this OpenCV has no CascadeClassifier")
def test_boxes_are_those_of_this_opencv(cascade: Cascade) -> None:
    """Where OpenCV has the class, it agrees on other pictures too."""
    theirs = cv2.CascadeClassifier(  # pyright: ignore[reportAttributeAccessIssue]
        str(REFERENCE / "cascade.xml")
    )
    for seed in range(20, 40):
        pixels = picture(seed, 70 + seed, 100 + 3 * seed)
        found = theirs.detectMultiScale(pixels, 1.1, 4)
        assert sorted_boxes(cascade.find(pixels, min_neighbours=4)) == sorted_boxes(np.asarray(found).reshape(-1, 4))


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (11, 300), (12, 12), (240, 320)])
def test_blank_pictures_hold_nothing(cascade: Cascade, shape: tuple[int, int]) -> None:
    """One colour, of any size, gives no box."""
    assert cascade.find(np.full(shape, 77, np.uint8)).shape == (0, 4)


def test_settings_out_of_range_are_refused(cascade: Cascade) -> None:
    """A window that does not grow would slide forever."""
    with pytest.raises(ValueError, match="scale_factor"):
        cascade.find(np.zeros((20, 20), np.uint8), scale_factor=1.0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("HAAR", "LBP"), "features LBP"),
        (("<tilted>0", "<tilted>1"), "tilted"),
        (("</leafValues>", " 0.5</leafValues>"), "trees of 3 leaves"),
        (("<internalNodes>0 -1 0", "<internalNodes>0 -1 900"), "no feature 900"),
        ((" 2.</_>", " 2.5</_>"), "weight 2.5"),
        (("<width>12", "<width>6"), "outside the window"),
        (("<opencv_storage>", "<!DOCTYPE x><opencv_storage>"), "entities"),
        (("</cascade>", ""), "mismatched tag"),
        (("cascade", "other"), "no <cascade>"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, change: tuple[str, str], told: str) -> None:
    """What is no cascade of stumps over upright features is told when it is read."""
    path = tmp_path / "cascade.xml"
    path.write_text((REFERENCE / "cascade.xml").read_text().replace(*change))
    with pytest.raises(WeightsError, match=told):
        Cascade.load(path)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    """No file, no cascade."""
    with pytest.raises(WeightsError, match="cannot be read"):
        Cascade.load(tmp_path / "none.xml")
