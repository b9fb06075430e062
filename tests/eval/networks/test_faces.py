"""Distances of faces: VGG-Face as published, with small random weights; dlib with the true ones."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from vc2.errors import ConfigError, PretrainedMissing, WeightsError
from vc2.eval.networks.faces import (
    DESCRIBER,
    EYE_CASCADE,
    FACE_CASCADE,
    KERNELS,
    LANDMARKS,
    DlibFaces,
    VggFace,
    VggFaceNetwork,
    _through_jpeg,
)

skimage_data: Any = pytest.importorskip("skimage.data")
h5py: Any = pytest.importorskip("h5py", reason="h5py is not installed")

CPU = torch.device("cpu")
RANDOM_CASCADE = Path(__file__).parents[2] / "reference" / "haar" / "cascade.xml"
WIDTHS = (2, 3, 4, 4, 5, 5, 6, 6, 6, 7, 7, 7, 8, 16, 12, 10)


def tensors(widths: Sequence[int] = WIDTHS, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Kernels (height, width, before, after) and biases of VGG-Face, as Keras keeps them."""
    rng, before, made = np.random.default_rng(seed), 3, []
    for after, side in zip(widths, KERNELS, strict=True):
        spread = (2 / (side * side * before)) ** 0.5
        kernel = rng.normal(0, spread, (side, side, before, after)).astype(np.float32)
        made.append((kernel, rng.normal(0, 0.01, after).astype(np.float32)))
        before = after
    return made


def save(path: Path, layers: Sequence[tuple[np.ndarray, np.ndarray]], root: str = "/") -> Path:
    """Write weights in the layout of deepface's file: layers without weights lie between those with some."""
    with h5py.File(path, "w") as file:
        group, names = file.require_group(root), []
        for number, (kernel, bias) in enumerate(layers, start=1):
            for name in (f"zero_padding2d_{number}", f"conv2d_{number}"):
                group.create_group(name).attrs["weight_names"] = np.array([], "S1")
                names.append(name)
            layer = group[f"conv2d_{number}"]
            layer[f"conv2d_{number}/kernel:0"], layer[f"conv2d_{number}/bias:0"] = kernel, bias
            layer.attrs["weight_names"] = [f"conv2d_{number}/{part}:0".encode() for part in ("kernel", "bias")]
        group.attrs["layer_names"] = [name.encode() for name in names]
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> VggFace:
    """The published comparison, with random weights and a random cascade that finds boxes of no meaning."""
    folder = tmp_path_factory.mktemp("vgg-face")
    for name in (FACE_CASCADE, EYE_CASCADE):
        shutil.copy(RANDOM_CASCADE, folder / name)
    return VggFace.load(save(folder / "vgg_face_weights.h5", tensors()), folder, CPU)


@pytest.fixture(scope="module")
def astronaut() -> np.ndarray:
    return skimage_data.astronaut()


def small(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)


# ---- as published ----


@pytest.mark.parametrize("root", ["/", "/model_weights"])
def test_weights_come_from_the_published_layout(tmp_path: Path, root: str) -> None:
    """Kernels are turned as torch has them, layer by layer, in files of weights and of whole models."""
    path = save(tmp_path / "weights.h5", tensors(), root)
    for name in (FACE_CASCADE, EYE_CASCADE):
        shutil.copy(RANDOM_CASCADE, tmp_path / name)
    network = VggFace.load(path, tmp_path / FACE_CASCADE, CPU).network
    for convolution, (kernel, bias) in zip(network.convolutions, tensors(), strict=True):
        assert isinstance(convolution, torch.nn.Conv2d)
        pixels = np.random.default_rng(1).normal(size=kernel.shape[:3]).astype(np.float32)
        by_hand = np.einsum("hwc,hwcd->d", pixels, kernel) + bias
        one = torch.nn.functional.conv2d(
            torch.from_numpy(pixels).permute(2, 0, 1)[None], convolution.weight, convolution.bias
        )
        np.testing.assert_allclose(one.flatten().numpy(), by_hand, rtol=1e-4, atol=1e-4)


def test_a_network_of_published_widths_has_its_parameters() -> None:
    """With VGG-16's widths it has the 145,002,878 parameters of VGG-Face."""
    widths = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512, 4096, 4096, 2622)
    with torch.device("meta"):
        network = VggFaceNetwork(widths)
    assert sum(parameter.numel() for parameter in network.parameters()) == 145_002_878


def test_a_picture_is_nearest_to_itself(published: VggFace, astronaut: np.ndarray) -> None:
    """Distances are between 0 and 2, least on the diagonal, and the same whatever the batch."""
    frames = np.stack([small(astronaut, 96, 64), small(skimage_data.coffee(), 96, 64)])
    measured = published.distances(frames, list(frames))
    assert measured.distances.shape == (2, 2)
    assert measured.found.dtype == bool and measured.found.shape == (2,)
    assert (measured.distances > -1e-6).all() and (measured.distances < 2).all()
    assert measured.distances[0, 0] < measured.distances[0, 1] and measured.distances[1, 1] < measured.distances[1, 0]
    again = published.distances(frames, list(frames), batch=1)
    np.testing.assert_allclose(again.distances, measured.distances, atol=1e-5)


def test_the_nearest_of_several_faces_counts(published: VggFace, astronaut: np.ndarray) -> None:
    """A frame is as far as its nearest face from the nearest face of a photograph."""
    photo, other = small(astronaut, 96, 64), small(astronaut[:, ::-1], 96, 64)
    (here, there), found = published._described([_through_jpeg(other), photo[..., ::-1]], 16)
    assert found == [True, True] and len(here) * len(there) > 1
    nearest = min(1 - float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b)) for a in here for b in there)
    np.testing.assert_allclose(published.distances(other[None], [photo]).distances, [[nearest]], atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (1, 1), (3, 120), (31, 45)])
def test_where_no_face_is_found_the_whole_picture_stands_for_it(published: VggFace, height: int, width: int) -> None:
    """Blank frames of any size have a distance, and that to themselves is nothing."""
    frames = np.full((2, height, width, 3), 90, np.uint8)
    measured = published.distances(frames, [frames[0]])
    assert measured.found.tolist() == [False, False]
    np.testing.assert_allclose(measured.distances, 0, atol=1e-4)


def test_no_frames_have_no_distances_and_no_photos_none_to_have(published: VggFace) -> None:
    """An empty video gives an empty matrix; without a photograph there is nothing to compare with."""
    blank = np.zeros((16, 16, 3), np.uint8)
    assert published.distances(np.zeros((0, 16, 16, 3), np.uint8), [blank]).distances.shape == (0, 1)
    with pytest.raises(ConfigError, match="no photograph"):
        published.distances(blank[None], [])


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        (tensors()[:-1], "15 layers with weights"),
        ([(kernel[:2], bias) for kernel, bias in tensors()], r"layer 1 with weights is \(2, 3, 3, 2\)"),
        ([(kernel.astype(np.int32), bias) for kernel, bias in tensors()], "int32; expected floating point"),
    ],
)
def test_other_networks_are_refused(tmp_path: Path, layers: list[Any], told: str) -> None:
    """A file of other layers is told by the first that differs."""
    with pytest.raises(WeightsError, match=told):
        _load(save(tmp_path / "weights.h5", layers))


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    """No HDF5, cut off, without names of layers, pointing elsewhere: each is told."""
    path = tmp_path / "weights.h5"
    path.write_bytes(b"<html>")
    with pytest.raises(WeightsError, match="is not a Keras file"):
        _load(path)
    path.write_bytes(save(tmp_path / "whole.h5", tensors()).read_bytes()[:5000])
    with pytest.raises(WeightsError, match="is not a Keras file"):
        _load(path)
    with h5py.File(path, "w"):
        pass
    with pytest.raises(WeightsError, match="no attribute layer_names"):
        _load(path)
    with h5py.File(save(path, tensors()), "r+") as file:
        del file["conv2d_1/conv2d_1/kernel:0"]
        file["conv2d_1/conv2d_1/kernel:0"] = h5py.ExternalLink("whole.h5", "conv2d_1/conv2d_1/kernel:0")
    with pytest.raises(WeightsError, match="outside this file"):
        _load(path)


def _load(weights: Path) -> VggFace:
    for name in (FACE_CASCADE, EYE_CASCADE):
        shutil.copy(RANDOM_CASCADE, weights.parent / name)
    return VggFace.load(weights, weights.parent, CPU)


def test_missing_cascades_are_told(tmp_path: Path) -> None:
    """Without OpenCV's cascades nothing is loaded, and it is said where they come from."""
    with pytest.raises(PretrainedMissing, match="opencv-data"):
        VggFace.load(save(tmp_path / "weights.h5", tensors()), tmp_path, CPU)


def test_the_digest_is_of_all_three_files(published: VggFace, tmp_path: Path) -> None:
    """Other weights with the same cascades have another digest."""
    other = _load(save(tmp_path / "vgg_face_weights.h5", tensors(seed=1)))
    same = _load(save(tmp_path / "vgg_face_weights.h5", tensors()))
    assert same.digest == published.digest != other.digest


def _true_cascades() -> Path | None:
    places = (os.environ.get("VC2_CASCADES", ""), Path(cv2.__file__).parent / "data", "/usr/share/opencv4/haarcascades")
    return next((Path(place) for place in places if place and (Path(place) / EYE_CASCADE).is_file()), None)


@pytest.mark.skipif(_true_cascades() is None, reason="OpenCV's cascades are not installed (opencv-data, or 4.x)")
def test_true_cascades_find_and_level_the_astronaut(tmp_path: Path, astronaut: np.ndarray) -> None:
    """The face lies where OpenCV 4.6 finds it, its eyes get level; coffee has none."""
    published = VggFace.load(save(tmp_path / "weights.h5", tensors()), _true_cascades(), CPU)
    grey = cv2.cvtColor(astronaut, cv2.COLOR_RGB2GRAY)
    assert published.faces.find(grey).tolist() == [[177, 66, 95, 95]]
    eyes = published.eyes.find(grey[66 : 66 + 95, 177 : 177 + 95])
    assert sorted(eyes.tolist()) == [[10, 20, 29, 29], [55, 23, 29, 29]]
    coffee = skimage_data.coffee()[:, :512]
    frames = np.stack([astronaut, np.pad(coffee, ((0, 112), (0, 0), (0, 0)))])
    assert published.distances(frames, [astronaut]).found.tolist() == [True, False]


# ---- mended ----


@pytest.fixture(scope="module")
def mended() -> DlibFaces:
    pytest.importorskip("dlib", reason="dlib is not installed (dlib-bin)")
    try:
        return DlibFaces.load(None, CPU)
    except PretrainedMissing as error:
        pytest.skip(str(error))


def test_a_person_is_near_their_mirror_image(mended: DlibFaces, astronaut: np.ndarray) -> None:
    """The same face is at distance 0, mirrored below 0.6; a frame without a face is at distance 1."""
    coffee = np.pad(skimage_data.coffee()[:, :512], ((0, 112), (0, 0), (0, 0)))
    measured = mended.distances(np.stack([astronaut, astronaut[:, ::-1], coffee]), [astronaut])
    assert measured.found.tolist() == [True, True, False]
    assert measured.distances[0] == 0
    assert 0 < measured.distances[1] < 0.6
    assert measured.distances[2] == 1


def test_the_largest_face_counts(mended: DlibFaces, astronaut: np.ndarray) -> None:
    """Beside a small face, mirrored, the large one is compared."""
    frame = np.zeros((512, 800, 3), np.uint8)
    frame[:, :512] = astronaut
    frame[:256, 512:768] = small(astronaut[:, ::-1], 256, 256)
    assert mended.distances(frame[None], [astronaut]).distances[0, 0] < 0.05


def test_photographs_without_a_face_are_far_and_some_must_have_one(mended: DlibFaces, astronaut: np.ndarray) -> None:
    """A photograph of coffee does not come nearer than 1; coffee alone is refused."""
    coffee = skimage_data.coffee()
    assert mended.distances(astronaut[None], [coffee, astronaut]).distances.tolist() == [[1, 0]]
    with pytest.raises(ConfigError, match="no face is found in any of 1 photographs"):
        mended.distances(astronaut[None], [coffee])


@pytest.mark.parametrize(("height", "width"), [(8, 8), (1, 1), (3, 700), (31, 45)])
def test_frames_of_any_size_are_taken(mended: DlibFaces, astronaut: np.ndarray, height: int, width: int) -> None:
    """Tiny, flat and odd frames have no face, which is no error."""
    measured = mended.distances(np.zeros((1, height, width, 3), np.uint8), [astronaut])
    assert measured.distances.tolist() == [[1]] and not measured.found.any()


def test_equal_frames_are_equally_far(mended: DlibFaces, astronaut: np.ndarray) -> None:
    """The same frames give the same numbers, bit for bit."""
    frames = np.repeat(small(astronaut, 333, 301)[None], 2, axis=0)
    once, twice = (mended.distances(frames, [astronaut]).distances for _ in range(2))
    assert once[0] == once[1]
    np.testing.assert_array_equal(once, twice)


def test_missing_and_broken_models_are_told(mended: DlibFaces, tmp_path: Path) -> None:
    """A folder without dlib's models, or with broken ones, is refused."""
    with pytest.raises(PretrainedMissing, match=LANDMARKS):
        DlibFaces.load(tmp_path, CPU)
    for name in (LANDMARKS, DESCRIBER):
        (tmp_path / name).write_bytes(b"nothing of dlib's")
    with pytest.raises(WeightsError, match="cannot be read"):
        DlibFaces.load(tmp_path, CPU)
