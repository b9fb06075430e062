"""Tars of strangers, read once from their start."""

import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, Self, cast

__all__ = ["DAMAGE", "files_of", "open_tar"]

DAMAGE = (tarfile.TarError, EOFError, zlib.error, OverflowError)  # what reading may raise


class _Checked(tarfile.TarInfo):
    """A header that is either whole or an error: tarfile itself takes a damaged one, and the end of the file, for the
    end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):  # the mark of the end
                raise
            raise tarfile.ReadError(str(error)) from None


def open_tar(file: BinaryIO, *, is_packed: bool = False) -> tarfile.TarFile:
    """Open a tar, plain or packed by gzip, bzip2 or xz.

    Raises:
        DAMAGE: If its first header is not whole.
    """
    mode = "r|*" if is_packed else "r:"
    try:
        return tarfile.open(fileobj=file, mode=mode, tarinfo=_Checked, bufsize=2**20)  # type: ignore[call-overload]
    except ValueError as error:
        raise tarfile.ReadError(str(error)) from None


def files_of(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Members that are no folders, in order; none is remembered.

    Raises:
        DAMAGE: Where a header is not whole, or leads backwards.
    """
    before = -1
    while (member := _next(tar)) is not None:
        if member.size < 0 or tar.offset <= before:
            raise tarfile.ReadError("a header that leads backwards")
        before = tar.offset
        cast(Any, tar).members = []  # it would keep all headers
        if not member.isdir():
            yield member


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return tar.next()
    except ValueError as error:  # a number that is none
        raise tarfile.ReadError(str(error)) from None
