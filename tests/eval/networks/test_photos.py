"""Photographs of people: found by name, opened with care."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vc2.errors import SourceError
from vc2.eval.networks import photos
from vc2.eval.networks.photos import open_photo, photo_files, photos_of


def photo(path: Path, colour: int = 200) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 7), (colour, 0, 0)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two layouts in one folder, and things that are no photographs."""
    for name in ("Tom Cruise/b.png", "Tom Cruise/a.jpg", "Robert_Downey_Jr._1.jpg", "Robert_Downey_Jr._2.jpg",
                 "zoë-saldaña/1.webp", "Tom/x.bmp"):  # fmt: skip
        photo(tmp_path / name)
    (tmp_path / "Tom Cruise" / "notes.txt").write_text("not a photograph")
    (tmp_path / "Tom Cruise" / ".hidden.jpg").write_bytes(b"")
    (tmp_path / "Nobody").mkdir()
    return tmp_path


@pytest.mark.parametrize("name", ["Tom Cruise", "tom_cruise", "TOM-CRUISE", "tom cruise drives a car, 4k"])
def test_people_are_found_by_the_words_of_their_names(folder: Path, name: str) -> None:
    """Case and signs between words do not matter; a prompt may name the person; files come by name."""
    assert [path.name for path in photo_files(folder, name)] == ["a.jpg", "b.png"]
    assert [picture.shape for picture in photos_of(folder, name)] == [(7, 9, 3), (7, 9, 3)]


def test_files_named_by_person_and_number_are_found(folder: Path) -> None:
    """The benchmark's own layout works too, dots and all; accents do not matter."""
    names = ["Robert_Downey_Jr._1.jpg", "Robert_Downey_Jr._2.jpg"]
    assert [path.name for path in photo_files(folder, "Robert Downey Jr.")] == names
    assert len(photo_files(folder, "Zoe Saldana")) == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Brad Pitt", "no photographs of 'Brad Pitt'; there are some of robert downey jr, tom, tom cruise"),
        ("Nobody", "no photographs of 'Nobody'"),
        ("tomcruise", "no photographs"),
        ("tom cruise meets zoe saldana", "several people fit: tom cruise, zoe saldana"),
    ],
)
def test_who_is_not_there_is_told(folder: Path, text: str, told: str) -> None:
    """Nobody, or more than one person, is a reason."""
    with pytest.raises(SourceError, match=told):
        photo_files(folder, text)


def test_no_folder_is_told(tmp_path: Path) -> None:
    """A path that is no folder, and an empty one, are reasons."""
    with pytest.raises(SourceError, match="is no folder"):
        photo_files(tmp_path / "none", "Tom")
    with pytest.raises(SourceError, match="there are some of nobody"):
        photo_files(tmp_path, "Tom")


def test_photographs_are_opened_as_they_are_seen(tmp_path: Path) -> None:
    """Turned by EXIF, grey as colour, transparency on white."""
    turned = Image.new("L", (9, 7), 50)
    exif = turned.getexif()
    exif[0x112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_photo(tmp_path / "turned.jpg").shape == (9, 7, 3)
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (open_photo(tmp_path / "clear.png") == 255).all()


def test_what_is_no_photograph_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other formats, damage and size are told with the file's name; none is left out in silence."""
    Image.new("RGB", (4, 4)).save(tmp_path / "vector.jpg", format="GIF")
    whole = photo(tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name in ("vector.jpg", "cut.png", "empty.jpg", "none.jpg"):
        with pytest.raises(SourceError, match=name):
            open_photo(tmp_path / name)
    monkeypatch.setattr(photos, "MAX_PIXELS", 62)
    with pytest.raises(SourceError, match="9 x 7 pixels"):
        open_photo(tmp_path / "whole.png")
    monkeypatch.setattr(photos, "MAX_BYTES", 10)
    with pytest.raises(SourceError, match="MB"):
        open_photo(tmp_path / "whole.png")


def test_pictures_are_as_their_files_say(tmp_path: Path) -> None:
    """Red stays red: the order of colours is red, green, blue."""
    np.testing.assert_array_equal(open_photo(photo(tmp_path / "red.png"))[0, 0], (200, 0, 0))
