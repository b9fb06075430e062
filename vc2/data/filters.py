"""What a row must be like to become a sample: limits on what its source says and on what its probe found.

One reason a row, the first of this order: caption, size, shape, length, scores. A score that the source does not give
passes. Limits on pixels (`min_motion`, `cuts`) are applied when the clip is built (`clip_unfit`).
"""

import json
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from vc2.data.config import Filters
from vc2.data.rejects import RejectReason

if TYPE_CHECKING:
    from vc2.data.decode import Encoded

__all__ = ["Unfit", "clip_unfit", "row_unfit"]

Unfit = tuple[RejectReason, str]  # reason and detail

SCORES: tuple[tuple[str, str, bool, RejectReason], ...] = (
    # field of the filters, score in the row's `extra`, whether it is a least value, reason
    ("max_pwatermark", "pwatermark", False, RejectReason.WATERMARK),
    ("max_punsafe", "punsafe", False, RejectReason.UNSAFE),
    ("min_similarity", "similarity", True, RejectReason.UNLIKE_CAPTION),
    ("min_aesthetic", "aesthetic", True, RejectReason.UNAESTHETIC),
)


def row_unfit(line: Mapping[str, Any], filters: Filters) -> Unfit | None:
    """Why a row of the ledger cannot become a sample, or None.

    Args:
        line: A ledger row (`ledger.SCHEMA`); one that has a reason already keeps it.
        filters: The limits.
    """
    if line["reason"] is not None:
        return RejectReason(line["reason"]), line["detail"] or ""
    return _caption_unfit(line["caption"] or "", filters) or _media_unfit(line, filters) or _scores_unfit(line, filters)


def _caption_unfit(caption: str, filters: Filters) -> Unfit | None:
    if len(caption) < filters.min_caption:
        return RejectReason.CAPTION_TOO_SHORT, f"{len(caption)} characters"
    if filters.max_caption is not None and len(caption) > filters.max_caption:
        return RejectReason.CAPTION_TOO_LONG, f"{len(caption)} characters"
    if filters.languages:
        from vc2.data.sources import language_of

        found = language_of(caption)
        if found not in filters.languages:
            return RejectReason.LANGUAGE, found
    return None


def _media_unfit(line: Mapping[str, Any], filters: Filters) -> Unfit | None:
    width, height = line["width"], line["height"]
    if min(width, height) < filters.min_side:
        return RejectReason.TOO_SMALL, f"{width} x {height} pixels"
    shown = width * Fraction(line["aspect"] or 1)
    if filters.max_aspect is not None and max(shown / height, height / shown) > filters.max_aspect:
        return RejectReason.ASPECT, f"{width} x {height} pixels"
    duration = line["duration"] or 0.0
    if duration and filters.min_duration is not None and duration < filters.min_duration:
        return RejectReason.TOO_SHORT, f"{duration:g} s"
    if filters.max_duration is not None and duration > filters.max_duration:
        return RejectReason.TOO_LONG, f"{duration:g} s"
    return None


def _scores_unfit(line: Mapping[str, Any], filters: Filters) -> Unfit | None:
    limits = {name: limit for name, *_ in SCORES if (limit := getattr(filters, name)) is not None}
    extra = json.loads(line["extra"] or "{}") if limits else {}
    for field, name, least, reason in SCORES:
        limit, score = limits.get(field), extra.get(name)
        if limit is None:
            continue
        if not isinstance(score, int | float):
            continue
        if not (score >= limit if least else score <= limit):  # so that NaN is left out
            return reason, f"{name} {score:g}"
    return None


def clip_unfit(encoded: "Encoded", filters: Filters) -> Unfit | None:
    """Why the pixels of a sample are not wanted, or None."""
    if encoded.motion is not None and filters.min_motion is not None and encoded.motion < filters.min_motion:
        return RejectReason.STILL, f"frames differ by {encoded.motion:.3f}"
    if filters.cuts == "reject" and encoded.cuts:
        return RejectReason.CUT, f"{encoded.cuts} inside"
    return None
