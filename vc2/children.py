"""How a process that we started ended, asked without a lock.

`Popen.poll` and `Popen.wait` ask under a lock. A Ctrl-C that arrives just as it is taken leaves it taken, and the next
`wait` never returns: of a thousand second Ctrl-Cs about thirty were lost so, and with them the end of the ranks. The
functions here ask the kernel, and whoever interrupts them can be followed by another call.
"""

import math
import os
import signal
import subprocess
import time

__all__ = ["exit_code", "wait_for"]

LONGEST_NAP = 0.05  # seconds


def exit_code(child: subprocess.Popen[bytes]) -> int | None:
    """The exit code of a process (-n: killed by signal n), or None while it runs. Not for two threads at once."""
    if child.returncode is None:
        try:
            pid, status = os.waitpid(child.pid, os.WNOHANG)
        except ChildProcessError:  # whoever heard how it ended was interrupted, or nobody is told: SIGCHLD is ignored
            child.returncode = -signal.SIGKILL
        else:
            child.returncode = os.waitstatus_to_exitcode(status) if pid else None
    return child.returncode


def wait_for(child: subprocess.Popen[bytes], seconds: float = math.inf) -> int | None:
    """Wait until a process ends: its exit code, or None if it still runs after so many seconds."""
    until, nap = time.monotonic() + seconds, 0.0005
    while (code := exit_code(child)) is None and (left := until - time.monotonic()) > 0:
        time.sleep(min(nap, left))
        nap = min(2 * nap, LONGEST_NAP)
    return code
