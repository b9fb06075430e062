"""Reading text in frames, by the models that rapidocr ships."""

import logging
import shutil
import socket
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from vc2.errors import PretrainedMissing, WeightsError

pytest.importorskip("rapidocr", reason="rapidocr is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from vc2.eval.networks.digests import digest_of
from vc2.eval.networks.ocr import TextReader

CPU = torch.device("cpu")


def written(width: int, height: int, *lines: str, size: int = 30) -> np.ndarray:
    """Dark lines on a light ground, (height, width, 3)."""
    image = Image.new("RGB", (width, height), (230, 230, 225))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    for number, line in enumerate(lines):
        pen.text((20, 20 + number * (size + 20)), line, fill=(20, 20, 40), font=font)
    return np.array(image)


@pytest.fixture(scope="module")
def reader() -> TextReader:
    return TextReader.load(None, CPU)


def test_lines_are_read_from_top_to_bottom(reader: TextReader) -> None:
    """What is written in a frame comes back line by line, for each of the frames."""
    frames = np.stack([written(512, 320, "STOP", "THE GRASS", "2026"), np.full((320, 512, 3), 128, np.uint8)])
    assert reader.lines(frames) == [["STOP", "THE GRASS", "2026"], None]


def test_text_on_its_head_is_read(reader: TextReader) -> None:
    """The angle classifier turns lines that stand upside down."""
    assert reader.lines(written(300, 100, "Hello video")[None, ::-1, ::-1]) == [["Hello video"]]


def test_equal_frames_read_equal(reader: TextReader) -> None:
    """A still video reads the same in all of its frames, and the same again."""
    frames = np.repeat(written(110, 80, "EXIT", size=24)[None], 2, axis=0)
    assert reader.lines(frames) == reader.lines(frames) == [["EXIT"]] * 2


@pytest.mark.parametrize(("height", "width"), [(8, 8), (1, 1), (2, 700), (101, 133)])
def test_frames_of_any_size_are_taken(reader: TextReader, height: int, width: int) -> None:
    """Tiny, flat and odd frames without text give None, not an error."""
    assert reader.lines(np.zeros((1, height, width, 3), np.uint8)) == [None]


def test_no_frames_give_no_lines(reader: TextReader) -> None:
    """A video without frames gives an empty list."""
    assert reader.lines(np.zeros((0, 64, 64, 3), np.uint8)) == []


def test_nothing_is_downloaded_or_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Loading and reading open no connection and write to neither output."""

    def refuse(*_: object) -> NoReturn:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with caplog.at_level(logging.INFO):
        TextReader.load(None, CPU).lines(np.zeros((1, 32, 32, 3), np.uint8))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_the_digest_is_of_the_models(reader: TextReader, tmp_path: Path) -> None:
    """The same models from another folder read with the same digest; other bytes have another."""
    import rapidocr

    shipped = Path(rapidocr.__file__).parent / "models"
    for model in shipped.glob("*.onnx"):
        (tmp_path / model.name).symlink_to(model)
    copied = TextReader.load(tmp_path, CPU)
    assert copied.digest == reader.digest == digest_of(shipped.glob("*.onnx"))
    assert copied.lines(written(110, 80, "EXIT", size=24)[None]) == [["EXIT"]]
    (tmp_path / "x").write_bytes(b"other")
    assert digest_of([tmp_path / "x"]) != reader.digest


def test_missing_and_broken_models_are_told(tmp_path: Path) -> None:
    """A folder without the models, or with a broken one, is refused when it is loaded."""
    import rapidocr

    with pytest.raises(PretrainedMissing, match=r"0 files \*det\*\.onnx"):
        TextReader.load(tmp_path, CPU)
    for model in (Path(rapidocr.__file__).parent / "models").glob("*.onnx"):
        shutil.copy(model, tmp_path)
    next(tmp_path.glob("*det*")).write_bytes(b"not a network")
    with pytest.raises(WeightsError, match="cannot be opened"):
        TextReader.load(tmp_path, CPU)
