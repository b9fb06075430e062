"""Reasons for which a row of a source, a medium or a clip is left out. Every drop has exactly one."""

from enum import StrEnum

__all__ = ["RejectReason"]


class RejectReason(StrEnum):
    """Why something did not become a sample; the value is what stands in ledgers, rejects tables and counts."""

    # the row
    UNPARSABLE = "unparsable"  # a line that is not a row of its format
    DUPLICATE_KEY = "duplicate_key"  # an earlier row has the same key (or URL)
    NO_CAPTION = "no_caption"
    CAPTION_TOO_SHORT = "caption_too_short"
    CAPTION_TOO_LONG = "caption_too_long"
    LANGUAGE = "language"  # of the caption: none of those asked for
    REMOVED = "removed"  # by a removal list
    UNMATCHED_ROW = "unmatched_row"  # no archive holds the medium of this row
    UNMATCHED_MEDIA = "unmatched_media"  # a medium in an archive that no row names; not a row itself
    # the way to the bytes
    MISSING_FILE = "missing_file"
    FORBIDDEN_ADDRESS = "forbidden_address"  # not http(s), or an address inside somebody's network
    HTTP_404 = "http_404"
    HTTP_STATUS = "http_status"
    TIMEOUT = "timeout"
    CONNECTION = "connection"
    TRUNCATED = "truncated"
    TOO_LARGE = "too_large"
    OPT_OUT = "opt_out"  # the answer's headers forbid training on it
    HASH_MISMATCH = "hash_mismatch"  # not the bytes that the table promises
    # the medium
    NOT_MEDIA = "not_media"  # judged by its first bytes, never by its name
    UNDECODABLE = "undecodable"
    DECODE_TIMEOUT = "decode_timeout"
    DECODER_CRASHED = "decoder_crashed"
    CHANGED = "changed"  # the bytes are no longer those that were probed
    TOO_SMALL = "too_small"
    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    ASPECT = "aspect"  # too long and narrow
    WATERMARK = "watermark"  # by the source's own scores, as the next three
    UNSAFE = "unsafe"
    UNLIKE_CAPTION = "unlike_caption"
    UNAESTHETIC = "unaesthetic"
    STILL = "still"  # a clip in which nothing moves
    CUT = "cut"  # a clip with a cut inside
    DUPLICATE = "duplicate"  # an earlier row has the same bytes; counted apart from the rejects
