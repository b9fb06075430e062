"""A step that does not end: see it, keep what every rank was doing, end the run.

A hang shows on all ranks at about the same time, since all wait for each other in the next reduction; so each rank
watches itself, with nothing to agree upon. Its thread writes the stacks of all threads into the store and ends the
process. If that thread does not get to run either (a library call holds Python's lock), a timer outside of Python
writes the stacks beside the log and ends the process a little later.
"""

import faulthandler
import math
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from vc2.errors import FailureKind, Vc2Error

__all__ = ["Hang", "Watchdog"]

LAST_RESORT = 60.0  # seconds after the deadline at which the timer outside of Python ends the process


class Hang(Vc2Error):
    """A step that took longer than `hang_seconds`."""

    kind: FailureKind = "communication"


class Watchdog:
    """Ends the process when nothing was heard for too long, inside a `with` block.

    Args:
        name: Of the work, for the message.
        seconds: Of silence that are a hang.
        keep: Called with the stacks of all threads; says where they were put.
        end: Called with the error; ends the process.
        folder: Where the last resort writes its stacks.
    """

    def __init__(
        self, name: str, seconds: float, *, keep: Callable[[bytes], str], end: Callable[[Hang], None], folder: Path
    ) -> None:
        self.name, self.seconds = name, seconds
        self._keep, self._end = keep, end
        self._beaten, self._doing = time.monotonic(), "starting"
        self._armed = self._beaten
        self._over = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        self._last_words = folder / f"stacks-{os.getpid()}.txt"

    def beat(self, doing: str) -> None:
        """Something was done; what comes next is `doing`."""
        self._beaten, self._doing = time.monotonic(), doing
        if self._beaten - self._armed > min(1.0, self.seconds / 4):
            self._arm()

    def rest(self) -> None:
        """What comes next has its own limits of time; until the next beat nothing is a hang."""
        self._beaten, self._armed = math.inf, -math.inf
        faulthandler.cancel_dump_traceback_later()

    def _arm(self) -> None:
        self._armed = time.monotonic()
        faulthandler.dump_traceback_later(self.seconds + LAST_RESORT, exit=True, file=self._file)

    def __enter__(self) -> "Watchdog":
        self._file = open(self._last_words, "w")  # open as long as the timer may fire
        self.beat("the first step")
        self._arm()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join()
        self._file.close()
        self._last_words.unlink(missing_ok=True)

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.seconds / 4)):
            silent = time.monotonic() - self._beaten
            if silent > self.seconds:
                try:
                    where = self._keep(stacks())
                except Exception as error:  # the run ends all the same
                    where = f"nowhere ({error})"
                self._end(
                    Hang(
                        f"{self.name}: {self._doing} has taken {silent:.0f} s, hang_seconds is {self.seconds:.0f}; the "
                        f"stacks of this rank on {socket.gethostname()}: {where}"
                    )
                )
                return


def stacks() -> bytes:
    """What every thread of this process is doing, innermost call first."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
