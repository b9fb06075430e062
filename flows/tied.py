"""Run a module as `python -m` does, and end with the process that started it: `python -m flows.tied MODULE ARGS...`.

Prefect's server, its worker and the flow runs of that worker are started through this module. With VC2_TIED=1 in the
environment (`make demo`) each asks the kernel to be killed when its parent ends, so that whatever happens to the demo
nothing is left behind. Without it (`make stack`) a flow run outlives a lost worker and finishes its work, though nobody
reads any more what it prints.
"""

import io
import os
import runpy
import sys
from typing import Any

from vc2.launch import die_with_parent

__all__ = ["PARENT", "outlive_readers", "run"]

PARENT = "VC2_PARENT"  # environment variable: pid of the process that started this one


class _Heedless(io.FileIO):
    """A stream that may be written to when nobody reads it any more. Prefect's console ends the process otherwise."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)


def outlive_readers() -> None:
    """Let this process print on when whoever read it is gone."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = io.BufferedWriter(_Heedless(number, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(stream, encoding="utf-8", errors="backslashreplace", line_buffering=True))


def run(module: str, arguments: list[str]) -> None:
    """Run `module` as the main program of this process."""
    starter = os.environ.pop(PARENT, str(os.getppid()))
    if os.environ.get("VC2_TIED") == "1":
        die_with_parent()
        if starter != str(os.getppid()):
            sys.exit("the process that started this one is gone")  # it ended before we could ask to be told
        if module == "prefect":  # the worker starts flow runs through this module
            os.environ[PARENT] = str(os.getpid())
    if module == "prefect.engine":
        outlive_readers()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m flows.tied MODULE ARGS...")
    run(sys.argv[1], sys.argv[2:])
