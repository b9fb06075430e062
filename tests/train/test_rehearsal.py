"""A rehearsal: real ranks, started as in training, through a step and a state; it leaves nothing, however it ends."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from vc2.errors import LaunchFailed
from vc2.storage import LocalStore
from vc2.train import rehearsal
from vc2.train.config import Layout, TrainStage
from vc2.train.rehearsal import RehearsalRequest, rehearse

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed and gloo over loopback: Linux")

CALLER = """
import sys
from pathlib import Path
from vc2.storage import LocalStore
from vc2.train.config import TrainStage
from vc2.train.rehearsal import rehearse
rehearse(TrainStage(device="cpu"), LocalStore(Path(sys.argv[1])), Path(sys.argv[2]), world_size=2)
"""


def keys(store: LocalStore) -> list[str]:
    return [entry.key for entry in store.list("")]


def ranks_of(process: psutil.Process) -> list[psutil.Process]:
    """Processes of ranks below a process."""
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.environ().get("RANK") and "vc2.train.rehearsal_rank" in child.cmdline():
                found.append(child)
    return found


def awaited(process: psutil.Process, count: int) -> list[psutil.Process]:
    while len(found := ranks_of(process)) < count:
        time.sleep(0.05)
    return found


@contextlib.contextmanager
def done_to_a_rank(what: Callable[[psutil.Process], None], times: int = 1) -> Iterator[list[psutil.Process]]:
    """The second rank of what this process starts, to which something is done as soon as it is there, and no other."""
    over, done = threading.Event(), list[psutil.Process]()

    def wait() -> None:
        while len(done) < times and not over.wait(0.05):
            for rank in ranks_of(psutil.Process()):
                with contextlib.suppress(psutil.Error):
                    if rank.environ()["RANK"] == "1" and rank not in done:
                        what(rank)
                        done.append(rank)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    yield done
    over.set()
    thread.join()
    for rank in done:
        with contextlib.suppress(psutil.Error):
            rank.kill()


def test_the_ranks_meet_and_nothing_is_left(store: LocalStore, tmp_path: Path) -> None:
    """All steps are told in order, the figures are there, and the store and the work folder are as before."""
    steps = []
    found = rehearse(
        TrainStage(device="cpu", launcher="local"),
        store,
        tmp_path / "work",
        world_size=2,
        progress=lambda work, done, total=None, **figures: steps.append(figures["step"]),
    )
    assert steps == ["started", "met", "summed", "updated", "kept", "restored"]
    assert (found.world_size, len(found.hosts), found.device) == (2, 2, "cpu")
    assert found.state_bytes >= 4 * 4 * 2**20  # four kinds of a layer of 2^20 float32 values
    assert min(found.sum_seconds, found.write_seconds, found.read_seconds) > 0
    assert re.match(r"2 ranks on cpu of 1 machine met in .* bit for bit", found.described())
    assert keys(store) == []
    assert [path for path in (tmp_path / "work" / "states").rglob("*")] == []


def test_ranks_that_do_not_meet_are_told_in_a_sentence(store: LocalStore, tmp_path: Path) -> None:
    """A rank that hangs makes nobody wait for longer than the limit; the sentence says which, and nothing goes on.

    Where it hangs before it has asked to be killed with its parent, it outlives that until it is let go on.
    """
    with done_to_a_rank(psutil.Process.suspend) as ranks:
        words = r"^(1 of 2 ranks started|the 2 ranks did not start) in 8 s.*log: "
        with pytest.raises(LaunchFailed, match=words) as told:
            rehearse(TrainStage(device="cpu"), store, tmp_path / "work", world_size=2, starting=8.0)
        assert "\n" not in str(told.value)
        assert told.value.kind == "communication"
        for rank in ranks:
            with contextlib.suppress(psutil.Error):
                rank.resume()
        assert psutil.wait_procs(ranks, timeout=30)[1] == []
    assert ranks_of(psutil.Process()) == []
    assert keys(store) == []


@pytest.mark.parametrize("times", [1, 2])
def test_a_rank_that_is_killed_once_is_no_finding(store: LocalStore, tmp_path: Path, times: int) -> None:
    """They are started once more; ranks that are killed again are told."""
    with done_to_a_rank(psutil.Process.kill, times) as ranks:
        with contextlib.nullcontext() if times == 1 else pytest.raises(LaunchFailed, match=r"signal|SIGKILL"):
            found = rehearse(TrainStage(device="cpu"), store, tmp_path / "work", world_size=2)
            assert found.world_size == 2
        assert len(ranks) == times
    assert keys(store) == []


def test_a_rank_that_fails_leaves_nothing_on_its_disk(store: LocalStore, tmp_path: Path) -> None:
    """It is the rank's own: on a cluster nobody else can clear it. Here its state cannot be kept."""
    name, layout = "f" * 32, Layout(world_size=1, micro_batch=1, threads=1)
    store.write(f"rehearsals/{name}/states", b"a file where states would be")
    stage = TrainStage(device="cpu", batch_size=1, micro_batch=1, world_size=1)
    request = RehearsalRequest(
        stage=stage, store=store.uri, work=str(tmp_path / "work"), name=name, layout=layout, patience=8.0
    )
    (tmp_path / "request.json").write_text(request.model_dump_json())
    command = [sys.executable, "-m", "vc2.train.rehearsal_rank", str(tmp_path / "request.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "@error" in done.stdout
    assert [*(tmp_path / "work" / "states").rglob("*")] == []


def test_a_rehearsal_that_is_killed_leaves_nothing_running(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ranks end with it, and what it left in the store goes with a later rehearsal."""
    command = [sys.executable, "-c", CALLER, store.uri, str(tmp_path / "work")]
    with subprocess.Popen(command) as caller:
        ranks = awaited(psutil.Process(caller.pid), 2)
        os.kill(caller.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert alive == []
    assert keys(store)
    monkeypatch.setattr(rehearsal, "OLD", -60.0)  # an hour later
    rehearsal._sweep(store)
    assert keys(store) == []
