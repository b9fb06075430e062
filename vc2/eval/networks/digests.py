"""One name for the weights of a network that come in several files."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from vc2.storage import file_digest

__all__ = ["digest_of"]


def digest_of(files: Iterable[Path]) -> str:
    """One sha256 for several files: of their names and their own sha256, in the order of the names."""
    lines = sorted(f"{file.name} {file_digest(file).sha256}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
