"""Of all that goes wrong on many ranks, the cause is told, and whether trying again can help."""

from pathlib import Path

import pytest

from vc2.errors import ConfigError, FailureKind, LaunchFailed, Preempted, ShardCorrupted, StoreError
from vc2.failures import RankError, Retries, classify, deciding, killed_by, may_pass
from vc2.launch import run_ranks

RANK = """
import os, signal, sys
import torch
from datetime import timedelta
from vc2.errors import StoreError
from vc2.launch import run_rank, this_rank

def main(what):
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    if this_rank().rank == 1:
        if what == "store":
            raise StoreError("the store is away")
        if what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        torch.empty(10**16)
    torch.distributed.all_reduce(torch.zeros(1))

run_rank(main)
"""


@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [("store", "store", "the store is away"), ("killed", "killed", "SIGKILL"), ("memory", "memory", "micro_batch")],
)
def test_the_cause_is_told_and_not_what_follows_from_it(
    what: str, kind: FailureKind, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 fails while rank 0 waits for it in a collective, which breaks off: rank 1's failure is told."""
    (tmp_path / "failing_rank.py").write_text(RANK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(LaunchFailed, match=rf"rank 1: .*{words}") as caught:
        run_ranks("failing_rank", what, world_size=2, work=tmp_path, name="test")
    assert caught.value.kind == kind


STUCK = """
import time
from pathlib import Path
from vc2.launch import run_rank
from vc2.train import watchdog

def main(work):
    watchdog.LAST_RESORT = 0.2
    keep = lambda stacks: time.sleep(600)  # a store that does not answer either
    with watchdog.Watchdog("test", 0.5, keep=keep, end=print, folder=Path(work) / "logs"):
        time.sleep(600)

run_rank(main)
"""


def test_a_rank_that_hangs_for_good_may_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot tell why it ended; its stacks beside the log do."""
    (tmp_path / "stuck_rank.py").write_text(STUCK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("VC2_WORK", str(tmp_path))
    with pytest.raises(LaunchFailed, match=r"rank 0: ended by its watchdog: .*stacks-\d+\.txt") as caught:
        run_ranks("stuck_rank", str(tmp_path), world_size=1, work=tmp_path, name="test")
    assert caught.value.kind == "communication"


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ShardCorrupted("bytes differ"), "data"),
        (StoreError("away"), "store"),
        (ConfigError("no"), "code"),
        (Preempted("asked"), "preemption"),
        (MemoryError(), "memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "memory"),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5"), "communication"),
        (RuntimeError("NCCL communicator was aborted on rank 0"), "communication"),
        (ConnectionResetError("reset"), "communication"),
        (RuntimeError("shapes do not match"), "code"),
        (caused(RuntimeError("a thread failed"), StoreError("away")), "store"),
    ],
)
def test_exceptions_are_classified(error: Exception, kind: FailureKind) -> None:
    """Our own errors say it themselves, others by their type and words."""
    assert classify(error) == kind


def test_the_first_error_decides_unless_it_is_a_broken_collective() -> None:
    """A broken collective is the cause only if no rank has another one to tell."""
    broken = RankError(0, "communication", "connection reset by peer", time=1.0)
    full, away = RankError(1, "memory", "out of memory", time=3.0), RankError(2, "store", "away", time=2.0)
    assert deciding([broken, full, away]) == away
    assert deciding([broken]) == broken
    assert deciding([]) is None


def test_a_signal_from_outside_may_pass_and_a_defect_does_not() -> None:
    """The kernel's memory killer against a crash of native code."""
    assert may_pass(killed_by(0, 9, 0.0).kind) and not may_pass(killed_by(0, 11, 0.0).kind)


def test_retries_are_counted_without_progress() -> None:
    """Two in a row that get no further; one that does starts the count anew; what cannot pass is never retried."""
    retries = Retries(2)
    away = StoreError("away")
    assert retries.pause(away, 0) is not None and retries.pause(away, 0) is not None
    assert retries.pause(away, 5) is not None and retries.pause(away, 5) is not None
    assert retries.pause(away, 5) is None
    assert all(Retries(2).pause(error, 0) is None for error in (ConfigError("no"), Preempted("asked")))
    assert Retries(0).pause(away, 0) is None


def test_said_and_heard_is_the_same() -> None:
    """What a rank tells of its end survives the line it is told by; a line of an older form is understood."""
    told = RankError(3, "data", "bytes differ", time=5.5, host="node-3")
    assert RankError.of(told.as_dict()) == told
    assert RankError.of({"rank": 1, "message": "x"}).kind == "code"
