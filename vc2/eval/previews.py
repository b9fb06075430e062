"""Videos as a page can hold them: as they are while they fit, else small copies of all but the first.

A page carries its videos as base64, four bytes for three. Where they would pass the budget, every video after the first
is encoded anew with all its frames, but narrow and coarse; should that not be enough, still narrower; what is beyond
the budget even so is left out, and said to be. Files that browsers do not play (anything but H.264 in mp4) are encoded
anew in any case. They may be files of strangers, so `vc2.data.decode.Decoder` opens them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from vc2.data.config import SampleForm
from vc2.data.decode import ClipJob, Decoder, Facts, MediaError
from vc2.progress import Progress, silent

__all__ = ["PREVIEW_BUDGET", "Preview", "Source", "previews"]

PREVIEW_BUDGET = 48 * 2**20  # bytes of videos in a page
LADDER = ((192, 30), (128, 36))  # widest width in pixels, and quality of x264, of copies
WHOLE = (1024, 18)  # of a copy that is only made because browsers do not play the file
SECONDS = 60.0  # for one file


@dataclass(frozen=True, slots=True)
class Source:
    """A video to show."""

    id: str
    size: int  #: bytes
    load: Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class Preview:
    """What is shown of it."""

    data: bytes | None  #: an mp4 with H.264; None: nothing, `missing` says why
    width: int = 0  #: pixels; 0: as it was
    height: int = 0
    is_copy: bool = False
    missing: str = ""


def previews(
    sources: Sequence[Source], *, budget: int = PREVIEW_BUDGET, measure: bool = False, progress: Progress = silent
) -> dict[str, Preview]:
    """What to show of each video, by id.

    Args:
        sources: The videos; the first is shown large.
        budget: Bytes that all of them may take in the page.
        measure: Also find width and height of those that stay as they are.
        progress: Told after each video.
    """
    with Decoder(SECONDS) as decoder:
        if sum(_in_page(source.size) for source in sources) <= budget:
            plain = {}
            for source in sources:
                plain[source.id] = _whole(decoder, source, measure)
                progress("previews", len(plain), len(sources))
            return plain
        for number, rung in enumerate(LADDER):
            is_last = number == len(LADDER) - 1
            if found := _on_rung(decoder, sources, rung, budget, measure, progress, is_last):
                return found
    return {}  # there are no sources


def _on_rung(
    decoder: Decoder,
    sources: Sequence[Source],
    rung: tuple[int, int],
    budget: int,
    measure: bool,
    progress: Progress,
    is_last: bool,
) -> dict[str, Preview] | None:
    """Small copies of all but the first; None: they do not fit. On the last rung those that do not are left out."""
    found: dict[str, Preview] = {}
    left = budget
    for source in sources:
        keeps_form = not found and _in_page(source.size) <= budget // 4
        made = _whole(decoder, source, measure) if keeps_form else _copied(decoder, source.load(), *rung)
        size = _in_page(len(made.data or b""))
        if size > left:
            if not is_last:
                return None
            made = Preview(None, missing=f"not shown: the {budget / 2**20:.0f} MiB that a page may have are spent")
        else:
            left -= size
        found[source.id] = made
        progress("previews", len(found), len(sources))
    return found


def _in_page(size: int) -> int:
    return -(-size // 3) * 4


def _whole(decoder: Decoder, source: Source, measure: bool) -> Preview:
    data = source.load()
    if not _plays_everywhere(data):
        return _copied(decoder, data, *WHOLE)
    if not measure:
        return Preview(data)
    try:
        facts = decoder.probe("film", data)
    except MediaError as error:
        return Preview(None, missing=f"cannot be shown: {error}")
    return Preview(data, *_shown_size(facts))


def _plays_everywhere(data: bytes) -> bool:
    """Whether it is an mp4 with H.264: the name of the sample entry stands in its index, wherever that is."""
    return data[4:8] == b"ftyp" and b"avc1" in data


def _copied(decoder: Decoder, data: bytes, widest: int, crf: int) -> Preview:
    try:
        facts = decoder.probe("film", data)
        width, height = _shown_size(facts)
        scale = min(1.0, widest / width)
        width, height = _even(width * scale), _even(height * scale)
        form = SampleForm(width=width, height=height, codec="x264", x264_crf=crf)
        clip = ClipJob(range(facts.frames), max(1, round(Fraction(facts.rate))))
        [made] = decoder.clips(data, [clip], facts.as_dict(), form, decoder="pyav")
    except MediaError as error:
        return Preview(None, missing=f"cannot be shown: {error}")
    return Preview(made.parts[0], width, height, is_copy=True)


def _shown_size(facts: Facts) -> tuple[int, int]:
    return max(1, round(facts.width * Fraction(facts.aspect))), facts.height


def _even(pixels: float) -> int:
    return max(8, 2 * round(pixels / 2))
