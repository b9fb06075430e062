"""What kind of failure it was, which of many ranks' errors is the cause, and whether trying again can help.

    memory          no memory for what was asked                     stop: the same request fails again
    communication   a rank did not answer another                    again
    data            bytes that are not what they should be           stop
    store           the store did not answer                         again
    preemption      asked to stop; a state was left behind           go on later (exit code 75)
    killed          ended by a signal from outside                   again
    code            a defect or a wrong setting; all that is left    stop

One rank that fails takes the others with it: their collectives break off. So of all errors told, the first one decides
that is no broken collective; a broken collective is the cause only if nothing else was told. A rank that is killed (by
the kernel for want of memory, with its machine) tells nothing; its launcher does.
"""

import re
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vc2.errors import FailureKind, Preempted, Vc2Error

__all__ = ["RankError", "Retries", "advice", "classify", "deciding", "hung", "killed_by", "may_pass", "rank_error"]

MAY_PASS: frozenset[FailureKind] = frozenset({"communication", "store", "killed"})
DEFECTS = tuple(getattr(signal, name, None) for name in ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL"))
NOW = 60.0  # seconds between the last words of a rank and its end being seen
PAUSES = (1.0, 8.0, 60.0)  # seconds before a new attempt: the first that gets no further, the second, ...

# Torch tells most of its troubles by a RuntimeError, and by its words.
NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|_ALLOC_FAILED", re.IGNORECASE)
NO_ANSWER = re.compile(
    r"connection (reset|closed|refused|was aborted)|broken pipe|socket ?timeout|timed out waiting|heartbeat ?monitor"
    r"|\bgloo\b|\bnccl\b|\btcpstore\b|remote process exited|watchdog caught collective",
    re.IGNORECASE,
)
ADVICE: Mapping[FailureKind, str] = {
    "memory": "lower micro_batch or memory_gib, or raise model.unet.gradient_checkpointing",
    "communication": "look at the network between the machines, or for one that is gone",
    "data": "run `vc2 verify` on the shard sets",
    "store": "look whether the store answers; nothing that was committed is lost",
    "killed": "the machine may be short of memory, or was taken away",
}


@dataclass(frozen=True, slots=True)
class RankError:
    """What a rank told of its end, or its launcher for it."""

    rank: int
    kind: FailureKind
    message: str
    time: float = 0.0  # seconds since the epoch, by the clock of its machine
    host: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> "RankError":
        """From the dictionary of `as_dict`; what it does not say is left open."""
        return cls(
            rank=int(said.get("rank", 0)),
            kind=said.get("kind", "code"),
            message=str(said.get("message", "")),
            time=float(said.get("time", 0.0)),
            host=str(said.get("host", "")),
        )


def classify(error: BaseException) -> FailureKind:
    """The kind of a failure, by the exception that ended a process."""
    for cause in _causes(error):
        if isinstance(cause, Vc2Error):
            return cause.kind
        if isinstance(cause, MemoryError) or _is_called(cause, "OutOfMemoryError"):
            return "memory"
        if isinstance(cause, ConnectionError) or _is_called(cause, "DistError", "DistNetworkError"):
            return "communication"
        if isinstance(cause, RuntimeError):  # by what torch says
            if NO_MEMORY.search(str(cause)):
                return "memory"
            if NO_ANSWER.search(str(cause)):
                return "communication"
    return "code"


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _is_called(error: BaseException, *names: str) -> bool:
    """Whether a class of the error bears such a name: torch need not be imported to know its errors."""
    return any(kind.__name__ in names for kind in type(error).__mro__)


def rank_error(error: BaseException, rank: int) -> RankError:
    """What a rank tells of the exception that ends it."""
    message = str(error) if isinstance(error, Vc2Error) else f"{type(error).__name__}: {error}"
    return RankError(rank, classify(error), message, time.time(), socket.gethostname())


def killed_by(rank: int, number: int, when: float) -> RankError:
    """What a launcher tells of a rank that ended by a signal."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    kind: FailureKind = "code" if number in DEFECTS else "killed"
    return RankError(rank, kind, f"ended by {name}", when, socket.gethostname())


def hung(rank: int, pid: int, work: str | None, when: float) -> RankError | None:
    """What a launcher tells of a rank whose watchdog's last resort ended it: there are stacks in the work folder."""
    stacks = Path(work or "") / "logs" / f"stacks-{pid}.txt"  # as `vc2.train.watchdog` names it
    if not work or not stacks.is_file():
        return None
    found = stacks.stat()
    if not found.st_size or found.st_mtime < when - NOW:  # empty while all is well; or of an older process
        return None
    message = f"ended by its watchdog: nothing was heard of it for longer than hang_seconds; its stacks: {stacks}"
    return RankError(rank, "communication", message, when, socket.gethostname())


def deciding(errors: Sequence[RankError]) -> RankError | None:
    """The error that the others follow from."""
    causes = [error for error in errors if error.kind != "communication"] or errors
    return min(causes, key=lambda error: error.time, default=None)


def may_pass(kind: FailureKind) -> bool:
    """Whether the same request may succeed when it is made again."""
    return kind in MAY_PASS


def advice(kind: FailureKind) -> str:
    """What to do about failures of a kind; empty where only the message itself can say."""
    return ADVICE.get(kind, "")


class Retries:
    """How many failures that may pass are tried again: as many in a row as `limit`, unless the work got further.

    Args:
        limit: New attempts that may get no further than the one before.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._furthest = -1

    def pause(self, error: Vc2Error, reached: int) -> float | None:
        """Seconds to wait before a new attempt; None if there should be none.

        Args:
            error: What ended the last attempt.
            reached: How far the work has come, in any unit that grows.
        """
        if isinstance(error, Preempted) or not may_pass(error.kind):
            return None
        if reached > self._furthest:
            self._furthest, self._used = reached, 0
        if self._used >= self._limit:
            return None
        self._used += 1
        return PAUSES[min(self._used, len(PAUSES)) - 1]
