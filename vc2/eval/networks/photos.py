"""Photographs of people that the user supplies, to compare faces with.

The benchmark's own photographs have unclear rights and are not part of this project. A folder holds, for each person, a
folder of pictures by that name, or pictures called by the name and a number, as the benchmark has them:

    Tom Cruise/a.jpg  Tom Cruise/b.png        Tom_Cruise_1.jpg  Tom_Cruise_2.jpg  Tom_Cruise_3.jpg

Names are compared by their words alone: case, accents and all signs between words are the same.
"""

import io
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vc2.errors import SourceError

__all__ = ["open_photo", "photo_files", "photos_of"]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # what Pillow may take a file for
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_BYTES, MAX_PIXELS = 50_000_000, 50_000_000

Words = tuple[str, ...]


def photos_of(folder: Path, text: str) -> list[np.ndarray]:
    """Pictures of the person that a text names, each (H, W, 3) uint8 RGB, in the order of their file names.

    Args:
        folder: All people's pictures.
        text: The person's name, or a prompt in which it stands.

    Raises:
        SourceError: If there are no pictures of that person, the text names several, or a picture cannot be used.
    """
    return [open_photo(path) for path in photo_files(folder, text)]


def photo_files(folder: Path, text: str) -> list[Path]:
    """The files that `photos_of` opens, by name."""
    if not folder.is_dir():
        raise SourceError(f"{folder}: is no folder; give one with a folder of photographs for each person")
    people = _people(folder)
    words = _words(text)
    named = [words] if words in people else [name for name in people if _holds(words, name)]
    named = [name for name in named if not any(name != other and _holds(other, name) for other in named)]
    if len(named) != 1:
        why = f"photographs of several people fit: {_list(named)}" if named else f"no photographs of {text!r}"
        raise SourceError(f"{folder}: {why}; there are some of {_list(list(people)) or 'nobody'}")
    return sorted(people[named[0]])


def open_photo(path: Path) -> np.ndarray:
    """A picture file as (H, W, 3) uint8 RGB: turned as its camera was held, transparency on white.

    Raises:
        SourceError: If it is too large, damaged, or of a format other than JPEG, PNG, WebP or BMP.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES // 1_000_000} MB")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow: its limit, and oddities of metadata
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels")
                image = ImageOps.exif_transpose(image)
                if image.has_transparency_data:
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
                return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise SourceError(
            f"{path}: is not a photograph that can be used ({type(error).__name__}: {error}); "
            "give JPEG, PNG, WebP or BMP files, or take it away"
        ) from None


def _people(folder: Path) -> dict[Words, list[Path]]:
    """Files by the words of the person's name."""
    people: defaultdict[Words, list[Path]] = defaultdict(list)
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            people[_words(entry.name)] += [path for path in sorted(entry.iterdir()) if _is_photo(path)]
        elif _is_photo(entry):
            words = _words(entry.stem)
            people[words[:-1] if words and words[-1].isdigit() else words].append(entry)
    return {words: files for words, files in people.items() if words and files}


def _is_photo(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in ENDINGS and not path.name.startswith(".")


def _words(text: str) -> Words:
    plain = "".join(sign for sign in unicodedata.normalize("NFKD", text) if not unicodedata.combining(sign))
    return tuple("".join(sign if sign.isalnum() else " " for sign in plain.casefold()).split())


def _holds(words: Words, name: Words) -> bool:
    """Whether the words of a name stand in a text, side by side."""
    return any(words[first : first + len(name)] == name for first in range(len(words) - len(name) + 1))


def _list(names: Sequence[Words]) -> str:
    shown = [" ".join(name) for name in sorted(names)]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")
