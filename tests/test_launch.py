"""Ranks: what they report arrives, what goes wrong is told once, and none outlives its starter."""

import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from threading import Lock

import psutil
import pytest

from vc2.errors import LaunchFailed, Preempted
from vc2.launch import LocalJob, run_ranks, start, this_rank, watch

RANK = """
import os, signal, sys, time
from pathlib import Path
from vc2.errors import ConfigError, Preempted
from vc2.launch import report, run_rank, this_rank

def main(config):
    rank = this_rank()
    what = Path(config).read_text()
    if what == "fine":
        report("work", rank.rank + 1, rank.world_size, loss=0.5)
    elif what == "error" and rank.rank == 1:
        raise ConfigError("lr=-1: expected a number above 0")
    elif what == "leaves when asked":
        asked = []
        signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
        report("work", 1)
        while not asked:
            time.sleep(0.05)
        time.sleep(0.5)  # for the state
        raise Preempted("step 3 is kept")
    elif what == "talks":
        for number in range(10_000 if rank.is_first else 3):
            print(f"line {number} of {rank.rank}")
        print("the end", end="")
    elif what == "preempted":
        raise Preempted("asked to stop at step 3; the same command goes on")
    else:
        if what == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        Path(config).with_suffix(f".pid{rank.rank}").write_text(str(os.getpid()))
        time.sleep(600)

run_rank(main)
"""


@pytest.fixture
def rank_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_rank.py").write_text(RANK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "a_rank"


def run(module: str, tmp_path: Path, what: str, progress) -> None:
    (tmp_path / "config").write_text(what)
    run_ranks(module, str(tmp_path / "config"), world_size=2, work=tmp_path, name="test", progress=progress)


def test_progress_of_every_rank_arrives(rank_module: str, tmp_path: Path) -> None:
    told = []
    run(rank_module, tmp_path, "fine", lambda work, done, total=None, **figures: told.append((done, total, figures)))
    assert sorted(told, key=lambda line: line[0]) == [(1, 2, {"loss": 0.5}), (2, 2, {"loss": 0.5})]


def test_of_much_talk_some_is_passed_on_and_the_rest_is_counted(
    rank_module: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """10,000 lines make few records; those shown and those left out are all that there were, the log has them."""
    with caplog.at_level(logging.INFO, "vc2.ranks"):
        run(rank_module, tmp_path, "talks", lambda *_, **__: None)
    said = [record.getMessage() for record in caplog.records if record.name == "vc2.ranks"]
    (log,) = (tmp_path / "logs").iterdir()
    left_out = [line for line in said if "lines left out; all of them:" in line]
    assert all(line.endswith(str(log)) for line in left_out) and len(said) < 200
    count = sum(int(line.split()[1]) for line in left_out)
    assert len(said) - len(left_out) + count == len(log.read_text().splitlines()) > 10_000


def test_the_first_error_is_told_in_one_line_and_ends_all(rank_module: str, tmp_path: Path) -> None:
    with pytest.raises(LaunchFailed, match=r"test: rank 1: lr=-1: expected a number above 0 \(log: "):
        run(rank_module, tmp_path, "error", lambda *_, **__: None)


def test_nothing_but_the_log_is_left(rank_module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the ranks end: torchrun's own folder is gone, and there is none in the machine's temporary folder."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    run(rank_module, tmp_path, "fine", lambda *_, **__: None)
    with pytest.raises(LaunchFailed):
        run(rank_module, tmp_path, "error", lambda *_, **__: None)
    assert {path.suffix for path in (tmp_path / "logs").iterdir()} == {".log"}
    assert not list(temporary.glob("torchelastic_*"))


def test_preempted_ranks_are_told_apart_from_failed_ones(rank_module: str, tmp_path: Path) -> None:
    with pytest.raises(Preempted, match="goes on"):
        run(rank_module, tmp_path, "preempted", lambda *_, **__: None)


def test_who_is_stopped_while_waiting_hears_that_the_ranks_left_a_state(rank_module: str, tmp_path: Path) -> None:
    """Ctrl-C in the starter: the ranks are asked to stop, and what they say in leaving still counts."""
    (tmp_path / "config").write_text("leaves when asked")
    job = start(rank_module, str(tmp_path / "config"), world_size=2, work=tmp_path, name="test", grace=60)
    told: list[int] = []

    def interrupt_once(work: str, done: int, total: int | None = None, **figures: float | str) -> None:
        told.append(done)
        if len(told) == 2:  # both ranks listen
            raise KeyboardInterrupt

    with pytest.raises(Preempted, match="step 3 is kept"):
        watch(job, interrupt_once)


def test_asked_to_stop_twice_ends_all_at_once(rank_module: str, tmp_path: Path) -> None:
    """Ranks that do not listen have ten minutes after the first Ctrl-C, and none after the second."""
    (tmp_path / "config").write_text("deaf")
    code = textwrap.dedent(f"""
        from pathlib import Path
        from vc2.launch import start, watch
        here = Path({str(tmp_path)!r})
        watch(start("a_rank", str(here / "config"), world_size=2, work=here, name="test", grace=600))
    """)
    starter = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert starter.stderr is not None
    pids = [tmp_path / f"config.pid{rank}" for rank in range(2)]
    while not all(path.exists() and path.read_text() for path in pids):
        assert starter.poll() is None
        time.sleep(0.1)
    family = [*psutil.Process(starter.pid).children(recursive=True)]
    starter.send_signal(signal.SIGINT)
    assert "asked to stop" in starter.stderr.readline()
    assert starter.poll() is None and all(process.is_running() for process in family)
    starter.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in starter.communicate()[1]
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []


def test_an_interrupt_in_the_midst_of_asking_does_not_hinder_the_end(tmp_path: Path) -> None:
    """A Ctrl-C can leave the lock taken under which `subprocess` asks for exit codes."""
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, start_new_session=True)
    assert child.stdout is not None and child.stdout.readline()
    lock: Lock = child._waitpid_lock  # pyright: ignore[reportAttributeAccessIssue]
    assert lock.acquire(blocking=False)
    log = tmp_path / "log"
    log.touch()
    with child.stdout:
        LocalJob("test", child, log, grace=0.1).cancel()
    assert child.returncode == -signal.SIGKILL and not psutil.pid_exists(child.pid)


def test_no_rank_outlives_its_starter(rank_module: str, tmp_path: Path) -> None:
    """kill -9 of the process that started the ranks."""
    (tmp_path / "config").write_text("sleep")
    code = textwrap.dedent(f"""
        from pathlib import Path
        from vc2.launch import run_ranks
        here = Path({str(tmp_path)!r})
        run_ranks("a_rank", str(here / "config"), world_size=2, work=here, name="test")
    """)
    starter = subprocess.Popen([sys.executable, "-c", code])
    pids = [tmp_path / f"config.pid{rank}" for rank in range(2)]
    while not all(path.exists() and path.read_text() for path in pids):
        assert starter.poll() is None
        time.sleep(0.1)
    family = [*psutil.Process(starter.pid).children(recursive=True)]
    assert {int(path.read_text()) for path in pids} <= {process.pid for process in family}
    os.kill(starter.pid, signal.SIGKILL)
    starter.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []


def test_a_process_that_nobody_launched_is_the_only_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (this_rank().rank, this_rank().world_size) == (0, 1)


@pytest.mark.parametrize("is_met", [True, False])
def test_a_rank_leaves_before_anything_is_torn_down(is_met: bool) -> None:
    """Said is all there, the exit code is the one asked for; only a process that is no rank goes the usual way."""
    met = "distributed.init_process_group('gloo', store=distributed.HashStore(), rank=0, world_size=1)"
    code = f"""
import atexit, sys
from torch import distributed
from vc2.launch import leave
atexit.register(print, "torn down")
{met if is_met else ""}
sys.stdout.write("stopped ")
sys.exit(leave(75))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (75, ["stopped"] if is_met else ["stopped", "torn", "down"])
