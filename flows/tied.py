"""Run a module as `python -m` does, and end with the process that started it: `python -m flows.tied MODULE ARGS...`.

Prefect's server, its worker and the flow runs of that worker are started through this module. With VC2_TIED=1 in the
environment (`make demo`) each asks the kernel to be killed when its parent ends, so that whatever happens to the demo
nothing is left behind. Without it (`make stack`) a flow run outlives a lost worker and finishes its work.
"""

import os
import runpy
import sys

from vc2.launch import die_with_parent

__all__ = ["PARENT", "run"]

PARENT = "VC2_PARENT"  # environment variable: pid of the process that started this one


def run(module: str, arguments: list[str]) -> None:
    """Run `module` as the main program of this process."""
    starter = os.environ.pop(PARENT, str(os.getppid()))
    if os.environ.get("VC2_TIED") == "1":
        die_with_parent()
        if starter != str(os.getppid()):
            sys.exit("the process that started this one is gone")  # it ended before we could ask to be told
        if module == "prefect":  # the worker starts flow runs through this module
            os.environ[PARENT] = str(os.getpid())
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m flows.tied MODULE ARGS...")
    run(sys.argv[1], sys.argv[2:])
