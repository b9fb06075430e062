"""How a process ended is heard whoever else asked, and an interrupt between does no harm."""

import os
import signal
import subprocess
import sys

from vc2.children import exit_code, wait_for


def test_exit_codes_are_those_of_the_process() -> None:
    for code, ends in ((0, "pass"), (3, "raise SystemExit(3)"), (-9, "import os; os.kill(os.getpid(), 9)")):
        child = subprocess.Popen([sys.executable, "-c", ends])
        assert wait_for(child) == exit_code(child) == child.poll() == code
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    assert wait_for(child, 0.05) is exit_code(child) is None
    child.kill()
    os.waitpid(child.pid, 0)  # somebody else heard how it ended
    assert wait_for(child) == -signal.SIGKILL
