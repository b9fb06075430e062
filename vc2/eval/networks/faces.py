"""How far the faces in a video are from photographs of a person.

*As published* (`VggFace`): deepface 0.0.79 with its defaults, through JPEG files of the frames (quality 75). OpenCV's
Haar cascade finds faces (scale 1.1, more than 10 neighbours); where it finds none the whole picture stands for a face.
A face is cut out and turned so that the two largest eyes found in it (by a second cascade) are level, scaled into
224 x 224, padded with black, and given in blue-green-red, 0 to 1, to VGG-Face (Parkhi et al. 2015): VGG-16 with one
output for each of 2,622 people. These outputs before the softmax are compared,

    distance = 1 - cos(a, b)    0: alike; the smallest over all pairs of faces in the two pictures

*Mended* (`DlibFaces`): dlib finds upright frontal faces (HOG; those of confidence 0.5 and more: true faces have about 1
and more, false ones about 0.1), the largest one counts, five landmarks level it, a ResNet describes it by 128 numbers.
The distance is Euclidean, cut at 1: below 0.6 it is the same person (King 2017), 1 is anybody else, and no face at all.

Weights: `vgg_face_weights.h5` as deepface publishes it (Keras, HDF5) with the cascades of OpenCV; the two `.dat` files
of the package face_recognition_models, whose code is not imported.

Shapes: T frames, P photographs, H x W pixels uint8 red green blue; a box is (left, top, width, height).
"""

import importlib
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vc2.errors import ConfigError, PretrainedMissing, WeightsError
from vc2.eval.networks.digests import digest_of
from vc2.eval.networks.haar import Cascade

__all__ = ["DlibFaces", "FaceDistances", "VggFace", "VggFaceNetwork"]

SIDE = 224  # pixels of the picture that VGG-Face sees
FACE_CASCADE, EYE_CASCADE = "haarcascade_frontalface_default.xml", "haarcascade_eye.xml"
USUAL = Path(cv2.__file__).parent / "data", Path("/usr/share/opencv4/haarcascades")  # where OpenCV's cascades lie
LANDMARKS, DESCRIBER = "shape_predictor_5_face_landmarks.dat", "dlib_face_recognition_resnet_model_v1.dat"
SURE = 0.5  # confidence from which dlib's face is one


@dataclass(frozen=True, slots=True)
class FaceDistances:
    """How far the frames of a video are from photographs."""

    distances: np.ndarray  #: (T, P), 0 alike
    found: np.ndarray  #: (T,), whether a face was found in the frame


# ---------------------------------------------------------------------------------------------------------------------
# As published

# Convolutions of VGG-16 in blocks, each followed by pooling by two; then three that stand for the dense layers.
BLOCKS = (2, 2, 3, 3, 3)
KERNELS = (*(3 for _ in range(sum(BLOCKS))), 7, 1, 1)


class VggFaceNetwork(nn.Module):
    """VGG-16 over faces, from pixels to one number for each person it was trained on.

    Args:
        widths: Channels after each of the 16 convolutions.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        channels = zip((3, *widths), widths, KERNELS, strict=False)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, kernel, padding=1 if kernel == 3 else 0) for before, after, kernel in channels
        )
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, 224, 224), blue green red in [0, 1], to (B, people)."""
        convolutions = iter(self.convolutions)
        for length in BLOCKS:
            for _ in range(length):
                x = F.relu(next(convolutions)(x))
            x = F.max_pool2d(x, 2)
        x = F.relu(next(convolutions)(x))
        x = F.relu(next(convolutions)(x))
        return next(convolutions)(x).flatten(1)


class VggFace:
    """Faces compared as the benchmark does it.

    Args:
        network: Describes faces.
        faces: Finds faces.
        eyes: Finds eyes in faces.
        device: Where the network runs.
        digest: Of the weights and both cascades.
    """

    def __init__(
        self, network: VggFaceNetwork, faces: Cascade, eyes: Cascade, device: torch.device, digest: str
    ) -> None:
        self.network = network.to(device)
        self.faces = faces
        self.eyes = eyes
        self.device = device
        self.digest = digest  #: sha256 over the three files

    @classmethod
    def load(cls, weights: Path, cascades: Path | None, device: torch.device) -> "VggFace":
        """Read weights and cascades.

        Args:
            weights: `vgg_face_weights.h5`, of any widths.
            cascades: The folder with `haarcascade_frontalface_default.xml` and `haarcascade_eye.xml`, or the first of
                them; None: those that OpenCV 4.x brings along, or Debian's package opencv-data.
            device: Where the network runs.

        Raises:
            PretrainedMissing: If h5py is not installed, or a cascade is not there.
            WeightsError: If a file is not what it should be.
        """
        paths = _cascades(cascades)
        faces, eyes = (Cascade.load(path) for path in paths)
        return cls(_network(weights), faces, eyes, device, digest_of((weights, *paths)))

    def distances(self, frames: np.ndarray, photos: Sequence[np.ndarray], *, batch: int = 16) -> FaceDistances:
        """Cosine distances of frames to photographs.

        Args:
            frames: (T, H, W, 3).
            photos: Pictures of the person, each (H, W, 3).
            batch: Faces on the device at once.

        Raises:
            ConfigError: If there is no photograph.
        """
        if not len(photos):
            raise ConfigError("no photograph to compare faces with; give at least one")
        references, _ = self._described((photo[..., ::-1] for photo in photos), batch)
        described, found = self._described((_through_jpeg(frame) for frame in frames), batch)
        distances = [[(1 - _cosines(one, other)).min() for other in references] for one in described]
        return FaceDistances(np.array(distances).reshape(-1, len(photos)), np.array(found, dtype=bool))

    def _described(self, pictures: Iterable[np.ndarray], batch: int) -> tuple[list[np.ndarray], list[bool]]:
        """Of pictures in blue, green, red: descriptions (N, people) of the faces in each, and whether any was found."""
        described: list[list[np.ndarray]] = []
        found: list[bool] = []

        def inputs() -> Iterator[tuple[int, np.ndarray]]:
            for number, picture in enumerate(map(np.ascontiguousarray, pictures)):
                faces = self._faces(picture)
                described.append([])
                found.append(bool(faces))
                yield from ((number, _fitted(face)) for face in faces or [picture])

        waiting = inputs()
        while some := list(islice(waiting, batch)):
            for (number, _), outputs in zip(some, self._outputs([face for _, face in some]), strict=True):
                described[number].append(outputs)
        return [np.stack(outputs) for outputs in described], found

    def _faces(self, picture: np.ndarray) -> list[np.ndarray]:
        boxes = self.faces.find(cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)).tolist()
        return [self._levelled(picture[top : top + high, left : left + wide]) for left, top, wide, high in boxes]

    @torch.inference_mode()
    def _outputs(self, faces: list[np.ndarray]) -> np.ndarray:
        pixels = torch.from_numpy(np.stack(faces)).permute(0, 3, 1, 2)
        return self.network(pixels.to(self.device)).double().cpu().numpy()

    def _levelled(self, face: np.ndarray) -> np.ndarray:
        """A face turned until its eyes are level, if there are two."""
        eyes = self.eyes.find(cv2.cvtColor(face, cv2.COLOR_BGR2GRAY))
        if len(eyes) < 2:
            return face
        # "Largest" by this product, as published; of equals the first.
        order = sorted(eyes.tolist(), key=lambda eye: abs((eye[0] - eye[2]) * (eye[1] - eye[3])), reverse=True)
        second_is_left = not order[0][0] < order[1][0]
        left, right = (order[1], order[0]) if second_is_left else (order[0], order[1])
        (x0, y0), (x1, y1) = ((int(x + wide / 2), int(y + high / 2)) for x, y, wide, high in (left, right))
        if x0 == x1 and y0 <= y1:
            return face
        tilt = math.degrees(math.atan2(abs(y1 - y0), abs(x1 - x0)))
        return np.array(Image.fromarray(face).rotate(-tilt if y0 > y1 else tilt))


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines of all rows of `a` with all rows of `b`; 0 with a row of zeros."""
    lengths = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)[None]
    return np.divide(a @ b.T, lengths, out=np.zeros(lengths.shape), where=lengths > 0)


def _through_jpeg(frame: np.ndarray) -> np.ndarray:
    """A frame as it comes back, in blue, green, red, from the file that the benchmark writes it to."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frame)).save(file, "JPEG")
    return cast(np.ndarray, cv2.imdecode(np.frombuffer(file.getbuffer(), np.uint8), cv2.IMREAD_COLOR))


def _fitted(face: np.ndarray) -> np.ndarray:
    """A face scaled into the middle of a black square, (224, 224, 3) in [0, 1]."""
    height, width = face.shape[:2]
    factor = min(SIDE / height, SIDE / width)
    wide, high = max(1, int(width * factor)), max(1, int(height * factor))
    square = np.zeros((SIDE, SIDE, 3), np.float32)
    top, left = (SIDE - high) // 2, (SIDE - wide) // 2
    square[top : top + high, left : left + wide] = cv2.resize(face, (wide, high))
    return square / 255


def _cascades(place: Path | None) -> tuple[Path, Path]:
    folder = place or next((folder for folder in USUAL if (folder / EYE_CASCADE).is_file()), USUAL[-1])
    first, folder = (folder, folder.parent) if folder.is_file() else (folder / FACE_CASCADE, folder)
    for path in (first, folder / EYE_CASCADE):
        if not path.is_file():
            raise PretrainedMissing(
                f"there is no {path}; give the folder with OpenCV's {FACE_CASCADE} and {EYE_CASCADE} (Debian's package "
                "opencv-data, or the wheel of opencv-python-headless 4.11; 5.x does not bring them)"
            )
    return first, folder / EYE_CASCADE


# ---- deepface's file of weights ----


def _network(path: Path) -> VggFaceNetwork:
    """The network in a Keras file: its layers with a kernel and a bias, in the order in which they were saved."""
    try:
        h5py: Any = importlib.import_module("h5py")
    except ImportError as error:
        raise PretrainedMissing(
            f"{path.name} is read by h5py, which cannot be imported ({error}); pip install h5py"
        ) from None
    try:
        with h5py.File(path, "r") as file:
            layers = list(_layers(file, path))
            network = VggFaceNetwork(_widths([(kernel.shape, bias.shape) for kernel, bias in layers], path))
            for convolution, (kernel, bias) in zip(network.convolutions, layers, strict=True):
                convolution.weight.copy_(torch.from_numpy(np.transpose(kernel[()], (3, 2, 0, 1))))
                convolution.bias.copy_(torch.from_numpy(bias[()]))
    except (OSError, KeyError, TypeError, RuntimeError) as error:
        raise WeightsError(
            f"{path}: is not a Keras file of VGG-Face ({type(error).__name__}: {error}); expected vgg_face_weights.h5 "
            "as deepface publishes it"
        ) from None
    return network


def _layers(file: Any, path: Path) -> Iterator[tuple[Any, Any]]:
    """Kernel and bias of every layer that has some, unread."""
    root = file.get("model_weights", file)  # of a whole model, or of its weights alone
    for layer in _names(root, "layer_names"):
        weights = [root[layer][name] for name in _names(root[layer], "weight_names")]
        if not weights:
            continue
        if len(weights) != 2:
            raise WeightsError(f"{path}: layer {layer} holds {len(weights)} tensors; expected a kernel and a bias")
        for tensor in weights:  # data of other files would be read through these
            if tensor.file.filename != file.filename or tensor.external or tensor.is_virtual:
                raise WeightsError(f"{path}: layer {layer} points to data outside this file; refused")
            if tensor.dtype.kind != "f":
                raise WeightsError(f"{path}: layer {layer} holds {tensor.dtype}; expected floating point")
        yield weights[0], weights[1]


def _names(group: Any, attribute: str) -> list[str]:
    """A list of names that Keras keeps in an attribute, or in several where it is long."""
    if attribute in group.attrs:
        parts = [group.attrs[attribute]]
    elif f"{attribute}0" in group.attrs:
        parts, number = [], 0
        while f"{attribute}{number}" in group.attrs:
            parts.append(group.attrs[f"{attribute}{number}"])
            number += 1
    else:
        raise KeyError(f"no attribute {attribute}")
    return [name.decode() if isinstance(name, bytes) else str(name) for part in parts for name in part]


def _widths(shapes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], path: Path) -> list[int]:
    """Channels after each convolution; kernels are (height, width, before, after)."""
    if len(shapes) != len(KERNELS):
        raise WeightsError(f"{path}: {len(shapes)} layers with weights; VGG-Face has {len(KERNELS)}")
    before, widths = 3, []
    for number, ((kernel, bias), side) in enumerate(zip(shapes, KERNELS, strict=True), start=1):
        if len(kernel) != 4 or kernel[:3] != (side, side, before) or bias != kernel[3:]:
            raise WeightsError(
                f"{path}: layer {number} with weights is {kernel} and {bias}; expected ({side}, {side}, {before}, n) "
                "and (n,)"
            )
        before = kernel[3]
        widths.append(before)
    return widths


# ---------------------------------------------------------------------------------------------------------------------
# Mended


class DlibFaces:
    """Faces compared by dlib. It runs on the CPU.

    Args:
        detector: Finds faces.
        landmarks: Finds five points in a face.
        describer: Turns a face into 128 numbers.
        digest: Of the weights of the last two.
    """

    def __init__(self, detector: Any, landmarks: Any, describer: Any, digest: str) -> None:
        self._detector = detector
        self._landmarks = landmarks
        self._describer = describer
        self.digest = digest  #: sha256 over both files

    @classmethod
    def load(cls, folder: Path | None = None, device: torch.device | None = None) -> "DlibFaces":
        """Open dlib's models.

        Args:
            folder: Where `shape_predictor_5_face_landmarks.dat` and `dlib_face_recognition_resnet_model_v1.dat` lie;
                None: in the installed package face_recognition_models.
            device: Not used: it runs on the CPU.

        Raises:
            PretrainedMissing: If dlib is not installed, or a model is not there.
            WeightsError: If a model cannot be read.
        """
        try:
            dlib: Any = importlib.import_module("dlib")
        except ImportError as error:
            raise PretrainedMissing(
                f"faces are found by dlib, which cannot be imported ({error}); "
                "pip install dlib-bin face_recognition_models"
            ) from None
        paths = [(folder or _shipped()) / name for name in (LANDMARKS, DESCRIBER)]
        if missing := [path for path in paths if not path.is_file()]:
            raise PretrainedMissing(
                f"there is no {missing[0]}; pip install face_recognition_models, or give its folder"
            )
        try:
            landmarks, describer = dlib.shape_predictor(str(paths[0])), dlib.face_recognition_model_v1(str(paths[1]))
        except RuntimeError as error:
            raise WeightsError(f"{paths[0].parent}: a model cannot be read ({error}); fetch it again") from None
        return cls(dlib.get_frontal_face_detector(), landmarks, describer, digest_of(paths))

    def distances(self, frames: np.ndarray, photos: Sequence[np.ndarray]) -> FaceDistances:
        """Distances of the largest face of each frame to that of each photograph; 1 where a frame has none.

        Args:
            frames: (T, H, W, 3).
            photos: Pictures of the person, each (H, W, 3); those without a face are as far as can be, 1.

        Raises:
            ConfigError: If no photograph shows a face.
        """
        references = [self._described(photo) for photo in photos]
        if all(reference is None for reference in references):
            raise ConfigError(
                f"no face is found in any of {len(photos)} photographs; give one that shows it from the front"
            )
        distances, found = np.ones((len(frames), len(photos))), np.zeros(len(frames), bool)
        for number, frame in enumerate(frames):
            described = self._described(frame)
            if described is None:
                continue
            found[number] = True
            distances[number] = [
                1.0 if reference is None else min(1.0, float(np.linalg.norm(described - reference)))
                for reference in references
            ]
        return FaceDistances(distances, found)

    def _described(self, picture: np.ndarray) -> np.ndarray | None:
        picture = np.ascontiguousarray(picture)
        boxes, _, _ = self._detector.run(picture, 1, SURE)  # looked for at twice the size: from 40 pixels on
        if not len(boxes):
            return None
        largest = max(boxes, key=lambda box: box.area())
        return np.array(self._describer.compute_face_descriptor(picture, self._landmarks(picture, largest)))


def _shipped() -> Path:
    spec = find_spec("face_recognition_models")  # looked up, not imported: its code needs a package of old
    if spec is None or spec.origin is None:
        raise PretrainedMissing(
            "face_recognition_models is not installed; pip install it, or give a folder of its models"
        )
    return Path(spec.origin).parent / "models"
