"""mp4 and WebM files as bytes: which codec is inside, and the same file without the words that say where it is from.

Generated videos often carry their settings as a comment, a title, the name of a tool, a time. `Container.anonymous`
overwrites these in place: no byte moves and no pixel changes. What the encoder wrote between the pictures themselves
(x264 leaves its options there) stays; no player shows it.

An mp4 is a tree of boxes, (size, four letters, payload), ISO/IEC 14496-12. A WebM is a tree of elements, (id, size,
payload) with ids and sizes of 1 to 8 bytes, RFC 8794 and 9559.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = ["Container", "read_container"]

PLAYED = {"avc1": "H.264", "avc3": "H.264", "vp08": "VP8", "vp09": "VP9", "av01": "AV1",
          "V_VP8": "VP8", "V_VP9": "VP9", "V_AV1": "AV1"}  # fmt: skip
PLAYED_PROFILES = (66, 77, 88, 100)  # of H.264: 8 bits, chroma halved; others only some browsers play
PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
WORDS = (b"udta", b"meta", b"uuid", b"free", b"skip")  # boxes of mp4 with text of all kinds, or with nothing
TIMES = (b"mvhd", b"tkhd", b"mdhd")
ENTRY_CODEC_NAME, ENTRY_SIZE = 50, 86  # of a visual sample entry: where a tool may write its name; where boxes follow

EBML, SEGMENT, INFO, TRACKS, TRACK, TAGS = 0x1A45DFA3, 0x18538067, 0x1549A966, 0x1654AE6B, 0xAE, 0x1254C367
DOC_TYPE, TRACK_KIND, CODEC_ID, CHECKSUM, VOID = 0x4282, 0x83, 0x86, 0xBF, 0xEC
INFO_WORDS = (0x7BA9, 0x4D80, 0x5741, 0x7384, 0x4461)  # title, two names of tools, name of the file, date
TRACK_NAME = 0x536E


@dataclass(frozen=True, slots=True)
class Container:
    """What a file says about itself."""

    ending: Literal["mp4", "webm"]
    codec: str  # the name people use where browsers play it, else the file's own
    is_played: bool  # whether today's browsers play it
    anonymous: bytes  # the file without words and times


def read_container(data: bytes) -> Container | None:
    """The container of a video; None where it is neither a sound mp4 nor a sound WebM."""
    try:
        if data[4:8] == b"ftyp":
            return _read_mp4(data)
        if data[:4] == EBML.to_bytes(4, "big"):
            return _read_webm(data)
    except (ValueError, LookupError, RecursionError):
        pass
    return None


# ---- mp4 ----


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int, int]]:
    """Kind, start, start of the payload and end of each box between two places."""
    while start + 8 <= end:
        size, kind, payload = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8], start + 8
        if size == 1:
            size, payload = int.from_bytes(data[start + 8 : start + 16], "big"), start + 16
        stop = end if size == 0 else start + size
        if stop < payload or stop > end:
            raise ValueError(f"a box {kind!r} of {size} bytes does not fit")
        yield kind, start, payload, stop
        start = stop


def _read_mp4(data: bytes) -> Container:
    blank, handler = bytearray(data), b""
    codecs: list[tuple[str, bool]] = []

    def clear(start: int, stop: int) -> None:
        blank[start:stop] = bytes(max(0, stop - start))

    def visit(start: int, end: int) -> None:
        nonlocal handler
        for kind, place, payload, stop in _boxes(data, start, end):
            if kind in WORDS:
                blank[place + 4 : place + 8] = b"free"
                clear(payload, stop)
            elif kind in TIMES:
                clear(payload + 4, payload + (20 if data[payload] else 12))
            elif kind == b"hdlr":
                handler = data[payload + 8 : payload + 12]
                clear(payload + 24, stop)
            elif kind in PARENTS:
                visit(payload, stop)
            elif kind == b"stsd" and handler == b"vide":
                entry = payload + 8
                codecs.append(_codec_of_entry(data, entry, stop))
                clear(entry + ENTRY_CODEC_NAME, min(entry + ENTRY_CODEC_NAME + 32, stop))

    visit(0, len(data))
    if not codecs:
        raise ValueError("no video track")
    codec, is_played = codecs[0]
    return Container("mp4", codec, is_played and data[8:12] != b"qt  ", bytes(blank))


def _codec_of_entry(data: bytes, entry: int, end: int) -> tuple[str, bool]:
    kind = data[entry + 4 : entry + 8].decode("latin-1")
    is_played = kind in PLAYED
    if kind in ("avc1", "avc3"):
        boxes = {name: payload for name, _, payload, _ in _boxes(data, entry + ENTRY_SIZE, end)}
        is_played = b"avcC" in boxes and data[boxes[b"avcC"] + 1] in PLAYED_PROFILES
    return PLAYED.get(kind, kind), is_played


# ---- WebM ----


def _elements(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Id, start, start of the payload and end of each element between two places; one of unknown size is the last."""
    while start < end:
        width = 9 - data[start].bit_length()
        name, place = int.from_bytes(data[start : start + width], "big"), start + width
        width = 9 - data[place].bit_length()
        size, payload = int.from_bytes(data[place : place + width], "big") - (1 << 7 * width), place + width
        stop = end if size == (1 << 7 * width) - 1 else payload + size
        if width > 8 or stop > end:
            raise ValueError(f"an element {name:x} of {size} bytes does not fit")
        yield name, start, payload, stop
        start = stop


def _read_webm(data: bytes) -> Container:
    blank = bytearray(data)
    codecs: list[str] = []

    def clear(start: int, stop: int) -> None:
        blank[start:stop] = bytes(stop - start)

    def void(start: int, stop: int) -> None:
        """An element of the same size that says nothing."""
        size = stop - start
        head = bytes((VOID, 0x80 | size - 2)) if size < 9 else bytes((VOID, 0x01)) + (size - 9).to_bytes(7, "big")
        blank[start:stop] = head.ljust(size, b"\0")

    def words(start: int, end: int, names: tuple[int, ...]) -> None:
        for name, place, payload, stop in _elements(data, start, end):
            if name == CHECKSUM:
                void(place, stop)
            elif name in names:
                clear(payload, stop)

    def track(start: int, end: int) -> None:
        words(start, end, (TRACK_NAME,))
        found = {name: data[payload:stop] for name, _, payload, stop in _elements(data, start, end)}
        if int.from_bytes(found.get(TRACK_KIND, b"\1"), "big") == 1:
            codecs.append(found[CODEC_ID].rstrip(b"\0").decode("latin-1"))

    is_webm = False
    for name, _, payload, stop in _elements(data, 0, len(data)):
        if name == EBML:
            kinds = [data[first:last] for kind, _, first, last in _elements(data, payload, stop) if kind == DOC_TYPE]
            is_webm = kinds == [b"webm"]
        if name != SEGMENT:
            continue
        for part, place, inside, end in _elements(data, payload, stop):
            if part in (TAGS, CHECKSUM):
                void(place, end)
            elif part == INFO:
                words(inside, end, INFO_WORDS)
            elif part == TRACKS:
                words(inside, end, ())
                for kind, _, first, last in _elements(data, inside, end):
                    if kind == TRACK:
                        track(first, last)
    if not codecs:
        raise ValueError("no video track")
    codec = codecs[0]
    return Container("webm", PLAYED.get(codec, codec), is_webm and codec in PLAYED, bytes(blank))
