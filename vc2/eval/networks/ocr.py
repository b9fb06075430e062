"""Text in frames: lines found and read by rapidocr, whose wheel carries its models (det, cls, rec; ONNX, PP-OCR).

The benchmark reads with PaddleOCR 2.7, English, with the angle classifier, and gives it red-green-blue frames where
blue-green-red is expected. PaddleOCR is replaced here by its descendant rapidocr, with the right order of colours in
both modes: numbers are near the published ones and no longer theirs, which results should say (`substitute`).

A frame goes through three networks: one finds boxes around lines, one turns lines that stand on their head, one reads
them. Lines read with a confidence below 0.5 are dropped, as in PaddleOCR. Reading order is from top to bottom; lines
whose tops are within 10 pixels count as one row and go from left to right.

Everything runs on the CPU in one thread, so that sums are taken in one order: the same frames give the same lines.
Nothing is ever downloaded: all models are given by path, and a missing one is an error.

Shapes: T frames, H x W pixels, uint8, red green blue.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vc2.errors import PretrainedMissing, WeightsError
from vc2.eval.networks.digests import digest_of

__all__ = ["TextReader"]

SMALLEST = 8  # pixels: what is flatter holds no letters, and would be enlarged to a picture of thousands of pixels
PARTS = ("det", "cls", "rec")


class TextReader:
    """Reads what is written in frames.

    Args:
        engine: A `rapidocr.RapidOCR`.
        digest: Of its models.
    """

    substitute = "rapidocr for PaddleOCR 2.7"  #: what is not as published

    def __init__(self, engine: Callable[..., Any], digest: str) -> None:
        self._engine = engine
        self.digest = digest  #: sha256 over the files of the three models

    @classmethod
    def load(cls, path: Path | None = None, device: torch.device | None = None) -> "TextReader":
        """Open the models.

        Args:
            path: A folder with one model each whose name holds det, cls and rec (`*.onnx`), of the kind that the
                installed rapidocr ships; None: those of the package itself.
            device: Not used: it runs on the CPU.

        Raises:
            PretrainedMissing: If rapidocr or onnxruntime is not installed, or a model is not there.
            WeightsError: If a model cannot be opened.
        """
        try:
            import onnxruntime  # noqa: F401  # rapidocr does without until it reads
            from rapidocr import RapidOCR
        except ImportError as error:
            raise PretrainedMissing(
                f"text in frames is read by rapidocr, which cannot be imported ({error}); "
                "pip install rapidocr onnxruntime"
            ) from None
        models = _models(path or _shipped())
        threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
        paths = {f"{part.capitalize()}.model_path": str(model) for part, model in models.items()}
        engine = RapidOCR(params={"Global.log_level": "critical", **threads, **paths})
        reader = cls(engine, digest_of(models.values()))
        try:  # it opens its models when they are first used
            blank = np.full((48, 48, 3), 255, np.uint8)
            engine(blank, use_det=False, use_cls=True, use_rec=True)
            engine(blank, use_det=True, use_cls=True, use_rec=True)
        except Exception as error:  # of many kinds, by engine
            told = str(error).strip().splitlines()
            raise WeightsError(
                f"{path or 'rapidocr'}: its models cannot be opened or run ({type(error).__name__}: "
                f"{told[-1][:200] if told else ''}); install rapidocr again, or give a folder of its models"
            ) from None
        return reader

    def lines(self, frames: np.ndarray) -> list[list[str] | None]:
        """The lines of text in each frame, (T, H, W, 3), in reading order; None for a frame without text."""
        return [self._lines(frame) for frame in frames]

    def _lines(self, frame: np.ndarray) -> list[str] | None:
        if min(frame.shape[:2]) < SMALLEST:
            return None
        found = self._engine(np.ascontiguousarray(frame[..., ::-1]), use_det=True, use_cls=True, use_rec=True)
        return [str(line) for line in getattr(found, "txts", None) or ()] or None


def _shipped() -> Path:
    spec = find_spec("rapidocr")
    if spec is None or spec.origin is None:
        raise PretrainedMissing("rapidocr is not installed as files; pip install rapidocr")
    return Path(spec.origin).parent / "models"


def _models(folder: Path) -> dict[str, Path]:
    found = {part: sorted(folder.glob(f"*{part}*.onnx")) for part in PARTS}
    for part, files in found.items():
        if len(files) != 1:
            raise PretrainedMissing(
                f"{folder}: {len(files)} files *{part}*.onnx; expected one model each that finds (det), turns (cls) "
                "and reads (rec) lines, as rapidocr 3.10 ships them"
            )
    return {part: files[0] for part, files in found.items()}
