"""Errors a person can act on: what was found, what was expected, what to do.

The command line and the flows print a `Vc2Error` as one line, the command line an `OSError` too; anything else is a
defect and keeps its traceback. Each says what kind of failure it is, by which whoever started the work decides whether
to try again (`vc2.failures`).

Messages quote what was asked for, and end up in logs and databases: credentials in a URL are left out of them.
"""

import re
from typing import Literal

__all__ = [
    "ConfigError",
    "FailureKind",
    "LaunchFailed",
    "Preempted",
    "PretrainedMissing",
    "ShardCorrupted",
    "SourceError",
    "StoreError",
    "Unaccounted",
    "Vc2Error",
    "WeightsError",
    "YieldTooLow",
    "first_line",
    "without_secrets",
]


FailureKind = Literal["memory", "communication", "data", "store", "preemption", "killed", "code"]


SECRETS = re.compile(
    r"(?<=://)[^/?#\s]*(?=@)"  # user:password@
    r"|(?<=[?&])(?P<name>[\w-]*(?:signature|credential|token|secret|password|sig|key))=[^&\s'\"]*",  # of a signed URL
    re.IGNORECASE,
)


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says, in one line; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def without_secrets(text: str) -> str:
    """`text` with the credentials of the URLs in it replaced by stars."""
    return SECRETS.sub(lambda found: f"{found['name']}=***" if found["name"] else "***", text)


class Vc2Error(Exception):
    """Base of all errors whose message is meant for the user."""

    kind: FailureKind = "code"

    def __str__(self) -> str:
        return without_secrets(super().__str__())


class ConfigError(Vc2Error):
    """An option, recipe or override that cannot be used."""


class SourceError(Vc2Error):
    """Raw data that is missing as a whole or not in the expected format (single bad rows are rejects instead)."""

    kind: FailureKind = "data"


class YieldTooLow(SourceError):
    """Too few rows of a source became samples."""


class Unaccounted(Vc2Error):
    """Accounts that do not add up: rows of a source without a fate, or with two."""

    kind: FailureKind = "data"


class StoreError(Vc2Error):
    """The store cannot be reached, read or written, or a manifest in it is not what it should be."""

    kind: FailureKind = "store"


class ShardCorrupted(StoreError):
    """Bytes in the store differ from what their manifest says."""

    kind: FailureKind = "data"


class PretrainedMissing(Vc2Error):
    """Foreign weights that no configured place holds."""


class WeightsError(Vc2Error):
    """A state dict that does not fit the network it is loaded into."""


class LaunchFailed(Vc2Error):
    """Ranks that ended with an error, told by the one that failed first."""

    def __init__(self, message: str, kind: FailureKind = "code") -> None:
        super().__init__(message)
        self.kind = kind


class Preempted(Vc2Error):
    """The process was asked to stop and left a state to resume from (exit code 75)."""

    kind: FailureKind = "preemption"
