"""Laws of train states: a snapshot is a moment, a store that fails ends nothing, what it did not take is not lost."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vc2.errors import StoreError
from vc2.launch import Rank
from vc2.storage import LocalStore
from vc2.train import states
from vc2.train.attempts import Attempt, Run, StateRef, Superseded, newest_state
from vc2.train.config import Layout, TrainStage
from vc2.train.ema import Ema
from vc2.train.engine import PlainEngine
from vc2.train.kept import adopt, kept_folder, list_key
from vc2.train.states import StateWriter, restore

Claim = Callable[..., Attempt]
LAYOUT = Layout(world_size=1, micro_batch=1, threads=1)


class Learner:
    """Something small that is trained by a real engine: all its weights are the number of its steps."""

    def __init__(self, stage: TrainStage) -> None:
        module = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
        self.engine = PlainEngine(module, dict(module.named_parameters()), stage, passes=1)
        self.ema = Ema(self.engine.shard("master"), 0.9)
        self.to(0)

    def to(self, step: int) -> "Learner":
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            self.engine.shard(kind).fill_(step)
        self.ema.shard.fill_(step)
        self.ema.updates = self.step = step
        return self

    def save(self, writer: StateWriter) -> None:
        lines = json.dumps({"step": self.step, "loss": 1.0}) + "\n"
        facts = {"step": self.step, "samples": 4 * self.step, "updates": self.step - 1}
        writer.save(self.engine, self.ema, facts, (writer.run.metrics_key(writer.attempt, 0), lines.encode()))


@pytest.fixture
def learner(stage: TrainStage) -> Learner:
    return Learner(stage)


@pytest.fixture
def writer(run: Run, claim: Claim, tmp_path: Path) -> StateWriter:
    """Of the only rank of attempt 1."""
    claim(run, 1)
    return writer_of(run, tmp_path)


def writer_of(
    run: Run, work: Path, rank: int = 0, layout: Layout = LAYOUT, attempt: int = 1, **more: Any
) -> StateWriter:
    return StateWriter(run, attempt, layout, Rank(rank, layout.world_size, rank), work, keep=9, **more)


class Outage:
    """A folder that is away: in its place lies a file, so every access is a real error.

    Each comes in place of the other in one step: in between, who tries again would make a folder of its own there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.aside, self._next = (folder.with_name(name) for name in (folder.name, "aside", "next"))
        folder.mkdir(parents=True, exist_ok=True)
        folder.rename(self.aside)
        self.end()

    def begin(self) -> None:
        self._next.write_text("no folder")
        self._next.replace(self.folder)

    def end(self) -> None:
        self._next.symlink_to(self.aside)
        self._next.replace(self.folder)


@pytest.fixture
def outage(run: Run) -> Outage:
    return Outage(Path(run.store.uri))


def steps(run: Run) -> list[int]:
    return [ref.step for ref in run.states()]


def restored(run: Run, stage: TrainStage, work: Path) -> int:
    """The step that all of a restored state says; every value of it is that step's."""
    state, damaged = newest_state(run)
    assert state is not None and not damaged
    fresh = Learner(stage)
    restore(run, state, fresh.engine, fresh.ema, Rank(0, 1, 0), work)
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        assert (fresh.engine.shard(kind) == state.step).all(), kind
    assert (fresh.ema.shard == state.step).all() and fresh.ema.updates == state.step
    return state.step


def test_a_snapshot_is_of_the_moment_it_was_taken(
    run: Run, stage: TrainStage, writer: StateWriter, learner: Learner, tmp_path: Path
) -> None:
    """Whatever training does to the weights while they are written; and Adam's count is of updates, not of steps."""
    for step in (3, 6, 9):
        learner.to(step).save(writer)
        learner.to(100 + step)
    writer.wait()
    assert steps(run) == [9, 6, 3] and writer.saved_step == 9
    assert restored(run, stage, tmp_path) == 9
    state, _ = newest_state(run)
    assert state is not None and (state.updates, state.samples) == (8, 36)
    restore(run, state, learner.engine, learner.ema, Rank(0, 1, 0), tmp_path)
    (moments,) = learner.engine._optimizer.state.values()
    assert float(moments["step"]) == 8


def test_memory_is_taken_once(writer: StateWriter, learner: Learner) -> None:
    """Snapshots after the first go to the same place, two of them at most."""
    learner.to(1).save(writer)
    writer.wait()
    places = {tensor.data_ptr() for tensor in writer._buffers[0].values()}
    for step in (2, 3, 4, 5):
        learner.to(step).save(writer)
    writer.wait()
    assert {tensor.data_ptr() for tensor in writer._buffers[0].values()} == places and len(writer._buffers) <= 2


def test_a_store_that_is_away_ends_nothing(
    run: Run, stage: TrainStage, writer: StateWriter, learner: Learner, outage: Outage, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Training goes on with states that wait; the newest replaces the one that waits; it is said; then all is there."""
    learner.to(1).save(writer)
    writer.wait()
    outage.begin()
    with caplog.at_level(logging.WARNING):
        learner.to(2).save(writer)
        while not writer._trouble:
            writer._ended.wait(0.01)
        for step in (3, 4, 5):
            learner.to(step).save(writer)
            writer.check()
        assert not writer.is_busy  # for the next one
    outage.end()
    writer.wait()
    assert steps(run) == [5, 2, 1] and restored(run, stage, tmp_path) == 5
    assert "Training goes on" in caplog.text and "takes states again" in caplog.text
    assert not list(kept_folder(run, tmp_path, StateRef(attempt=1, step=2)).glob("*"))


def test_after_too_long_the_newest_state_is_kept_and_the_next_attempt_adopts_it(
    run: Run, stage: TrainStage, claim: Claim, learner: Learner, outage: Outage, tmp_path: Path
) -> None:
    """The run ends with a line that says where the state is; brought home, it is a state like any other."""
    claim(run, 1)
    writer = writer_of(run, tmp_path, outage_seconds=0.0)
    learner.to(1).save(writer)
    writer.wait()
    outage.begin()
    learner.to(2).save(writer)
    with pytest.raises(StoreError, match=r"kept in .*00000002 on .*Run again on this machine"):
        writer.wait()
    assert writer.has_failed
    with pytest.raises(StoreError, match="is this the same store"):
        adopt(run, tmp_path)  # too early: nothing is lost by that
    outage.end()
    half = kept_folder(run, tmp_path, StateRef(attempt=1, step=7))  # of a rank that was killed while it wrote
    half.mkdir()
    (half / "rank-0-master.safetensors").write_bytes(b"half")
    assert adopt(run, tmp_path) == StateRef(attempt=1, step=2)
    assert steps(run) == [2, 1] and restored(run, stage, tmp_path) == 2
    assert not half.exists() and adopt(run, tmp_path) is None
    assert run.store.read(run.metrics_key(1, 0)).startswith(b'{"step": 2')


def test_a_kept_state_that_was_passed_over_is_not_adopted(
    run: Run, claim: Claim, learner: Learner, outage: Outage, tmp_path: Path
) -> None:
    """Another process has gone on from an earlier state: the run has one history."""
    claim(run, 1)
    writer = writer_of(run, tmp_path, outage_seconds=0.0)
    outage.begin()
    learner.to(2).save(writer)
    with pytest.raises(StoreError):
        writer.wait()
    outage.end()
    claim(run, 2)
    assert adopt(run, tmp_path) is None and steps(run) == []
    assert not kept_folder(run, tmp_path, StateRef(attempt=1, step=2)).exists()


def test_a_changed_file_is_not_adopted(
    run: Run, claim: Claim, learner: Learner, outage: Outage, tmp_path: Path
) -> None:
    """A disk is not trusted more than a store."""
    claim(run, 1)
    writer = writer_of(run, tmp_path, outage_seconds=0.0)
    outage.begin()
    learner.to(2).save(writer)
    with pytest.raises(StoreError):
        writer.wait()
    outage.end()
    (path,) = kept_folder(run, tmp_path, StateRef(attempt=1, step=2)).glob("*-ema.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert adopt(run, tmp_path) is None and steps(run) == []


@pytest.fixture
def two(run: Run, claim: Claim, stage: TrainStage, tmp_path: Path) -> SimpleNamespace:
    """Two ranks, of which the second can be kept from storing its part: a folder lies where its file would go."""
    claim(run, 1)
    layout = Layout(world_size=2, micro_batch=1, threads=1)
    blocks: list[Path] = []

    def block(step: int) -> None:
        ref = StateRef(attempt=1, step=step)
        blocks.append(Path(run.store.uri) / run.state_prefix(ref) / "rank-1-exp_avg.safetensors")
        blocks[-1].mkdir(parents=True)

    def unblock() -> None:
        for place in blocks:
            place.rmdir()

    def writers(**more: Any) -> list[StateWriter]:
        return [writer_of(run, tmp_path, rank, layout, **more) for rank in range(2)]

    return SimpleNamespace(writers=writers, learners=[Learner(stage), Learner(stage)], block=block, unblock=unblock)


def test_a_rank_without_a_store_is_waited_for(run: Run, two: SimpleNamespace) -> None:
    """What one rank cannot store the other waits with; it stops nobody, and states are whole or not there."""
    writers = two.writers()
    two.block(1)
    for step in (1, 2, 3):
        for writer, learner in zip(writers, two.learners, strict=True):
            if step == 1 or writer.rank.rank == 1:
                learner.to(step).save(writer)
                while writer.rank.rank == 1 and not writer._trouble:
                    writer._ended.wait(0.01)
    assert steps(run) == [] and not writers[0].has_failed
    two.unblock()
    for writer in writers:
        writer.wait()
    assert steps(run) == [1]
    two.learners[0].to(3).save(writers[0])  # the second rank's part has been there for a while
    writers[0].wait()
    assert steps(run) == [3, 1]


def test_a_state_that_one_rank_has_passed_over_is_left_out(run: Run, two: SimpleNamespace) -> None:
    """In an outage of its own a rank drops the state that waits; the first one finds out and goes on as well."""
    first, second = two.writers()
    for step in (1, 3):
        two.learners[1].to(step).save(second)
    second.wait()
    for step in (1, 2, 3):
        two.learners[0].to(step).save(first)
    first.wait()
    assert steps(run) == [3, 1]


def test_a_part_that_comes_while_the_first_rank_looks_is_not_passed_over(
    run: Run, two: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It found no part of step 1, and before it looks further the other rank has stored those of steps 1 and 3."""
    first, second = two.writers()
    look = first._look_ahead

    def look_late(*asked: Any) -> None:
        for step in (1, 3):
            two.learners[1].to(step).save(second)
            second.wait()
        monkeypatch.undo()
        look(*asked)

    monkeypatch.setattr(first, "_look_ahead", look_late)
    two.learners[0].to(1).save(first)
    first.wait()
    assert steps(run) == [1]


def test_a_store_that_is_too_slow_for_states_is_not_waited_for_without_end(
    run: Run, two: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    """With no patience left the newest state takes the place of the one that waits, and that is no trouble."""
    first, second = two.writers(patience=0.2)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):  # the first rank cannot commit before the other has stored its part
            two.learners[0].to(step).save(first)
            while step == 1 and first._under_way is None:
                time.sleep(0.01)
    assert first._waiting is not None and first._waiting.ref.step == 3
    assert "leaves out the state of step 2" in caplog.text and not first._trouble and first.stall >= 0.2
    for step in (1, 3):
        two.learners[1].to(step).save(second)
    for writer in (first, second):
        writer.wait()
    assert steps(run) == [3, 1]


def test_a_state_that_is_left_out_leaves_no_trouble_behind(
    run: Run, two: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What kept it from being whole is over: it must not end the run when nothing else is written for long."""
    monkeypatch.setattr(states, "LISTS_LATE", 0.0)
    first, second = two.writers()
    two.learners[0].to(1).save(first)
    while not first._trouble:
        first._ended.wait(0.01)
    two.learners[1].to(3).save(second)
    second.wait()
    while first._is_writing:
        first._ended.wait(0.01)
    assert steps(run) == [] and not first._trouble


def test_the_curve_is_the_first_ranks(run: Run, two: SimpleNamespace, tmp_path: Path) -> None:
    """A part that another rank kept makes a state whole; the curve beside it stays as the first rank left it."""
    first, second = two.writers()
    run.store.write(run.metrics_key(1, 0), b"the curve")
    two.block(4)
    two.learners[0].to(4).save(first)
    two.learners[1].to(4).save(second)
    while run.store.entry(list_key(run, StateRef(attempt=1, step=4), 0)) is None:
        first._ended.wait(0.01)
    first._ended.set()  # the process is gone
    assert second.keep_newest() is not None
    two.unblock()
    assert adopt(run, tmp_path) == StateRef(attempt=1, step=4) and steps(run) == [4]
    assert run.store.read(run.metrics_key(1, 0)) == b"the curve"


def test_the_newest_state_is_kept_however_long_its_copy_takes(
    writer: StateWriter, learner: Learner, outage: Outage
) -> None:
    """The thread that writes may be gone before the copy is there."""
    outage.begin()
    for step in (2, 3):
        learner.to(step).save(writer)
        while not writer._trouble:
            writer._ended.wait(0.01)

    def arrive() -> None:
        while writer._is_writing:
            time.sleep(0.01)

    writer._copied = SimpleNamespace(synchronize=arrive)  # an event of a GPU
    folder = writer.keep_newest()
    assert folder is not None and folder.name == "00000003" and (folder / "rank-0.json").exists()


def test_what_replaced_attempts_kept_goes(run: Run, writer: StateWriter, learner: Learner, outage: Outage,
    tmp_path: Path) -> None:  # fmt: skip
    """Also on machines where no run is started, only its ranks: what this attempt keeps stays."""
    outage.begin()
    learner.to(1).save(writer)
    kept = writer.keep_newest()
    outage.end()
    writer_of(run, tmp_path)
    assert kept is not None and kept.exists()
    writer_of(run, tmp_path, attempt=2)
    assert not kept.exists()


def test_parts_kept_here_join_parts_in_the_store(run: Run, two: SimpleNamespace, tmp_path: Path) -> None:
    """When one rank ends for its store, what the others have stored makes its kept part a whole state."""
    first, second = two.writers(outage_seconds=0.0)
    two.block(4)
    two.learners[1].to(4).save(second)
    with pytest.raises(StoreError, match="kept in"):
        second.wait()
    first.outage_seconds = 3600.0
    two.learners[0].to(4).save(first)
    assert first.keep_newest() is not None  # after its files and their list have been sent, or in the middle of it
    two.unblock()
    assert adopt(run, tmp_path) == StateRef(attempt=1, step=4) and steps(run) == [4]
    state, damaged = newest_state(run)
    assert state is not None and len(state.files) == 8 and not damaged


def test_the_others_keep_their_part_when_one_ends(run: Run, two: SimpleNamespace, tmp_path: Path) -> None:
    """`keep_newest` on every rank: then the state is whole on this machine, whoever could not store it."""
    first, second = two.writers()
    two.block(5)
    for writer, learner in zip((first, second), two.learners, strict=True):
        learner.to(5).save(writer)
    folders = {writer.keep_newest() for writer in (first, second)}
    assert folders == {kept_folder(run, tmp_path, StateRef(attempt=1, step=5))}
    two.unblock()
    assert adopt(run, tmp_path) == StateRef(attempt=1, step=5)


def test_a_process_that_must_stop_keeps_a_copy_while_it_waits(
    run: Run, claim: Claim, learner: Learner, outage: Outage, tmp_path: Path
) -> None:
    """It may be killed before the store is back; if it is not, the copy goes."""
    claim(run, 1)
    writer, place = writer_of(run, tmp_path), kept_folder(run, tmp_path, StateRef(attempt=1, step=3))
    outage.begin()
    learner.to(3).save(writer)

    def back() -> None:
        while not (place / "rank-0.json").exists():
            time.sleep(0.01)
        outage.end()

    thread = threading.Thread(target=back)
    thread.start()
    writer.wait(keep_after=0.0)
    thread.join()
    assert steps(run) == [3] and not list(place.glob("*"))


def test_a_replaced_writer_ends_at_once(run: Run, claim: Claim, writer: StateWriter, learner: Learner) -> None:
    """That is no trouble that may pass."""
    claim(run, 2)
    learner.to(1).save(writer)
    with pytest.raises(Superseded):
        writer.wait()
    with pytest.raises(Superseded):
        learner.to(2).save(writer)
    assert run.all_states() == []


def test_a_store_that_is_empty_all_of_a_sudden_is_trouble_and_no_replacement(
    run: Run, claim: Claim, learner: Learner, tmp_path: Path
) -> None:
    """A mount that was lost looks like an empty folder: the attempt is not told that another one took over."""
    claim(run, 1)
    writer = writer_of(run, tmp_path, outage_seconds=0.0)
    Path(run.store.uri).rename(tmp_path / "unmounted")
    LocalStore(Path(run.store.uri))
    learner.to(1).save(writer)
    with pytest.raises(StoreError, match=r"is this the same store.*kept in"):
        writer.wait()


def test_when_every_state_is_damaged_the_run_starts_from_nothing_and_says_so(
    run: Run, writer: StateWriter, learner: Learner
) -> None:
    """A torn manifest, a file that is gone, a flipped byte: each is named."""
    for step in (1, 2, 3):
        learner.to(step).save(writer)
    writer.wait()
    places = [Path(run.store.uri) / run.state_prefix(ref) for ref in run.states()]
    (places[0] / "manifest.json").write_bytes((places[0] / "manifest.json").read_bytes()[:-9])
    (places[1] / "rank-0-ema.safetensors").unlink()
    data = bytearray((places[2] / "rank-0-master.safetensors").read_bytes())
    data[-2] ^= 4
    (places[2] / "rank-0-master.safetensors").write_bytes(data)
    state, damaged = newest_state(run)
    assert state is None
    for line, words in zip(damaged, ("no readable manifest", "is missing", "sha256"), strict=True):
        assert words in line


FULL_DISK = """
import logging, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_states import Learner, writer_of, steps
from vc2.storage import LocalStore
from vc2.train.attempts import Run
from vc2.train.config import TrainStage
logging.basicConfig(level="WARNING", format="%(message)s")
work = Path(sys.argv[2])
run = Run(LocalStore(work / "store"), "full", "f" * 64)
learner, writer = Learner(TrainStage.model_validate_json(sys.argv[3])), writer_of(run, work)
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, most))  # no file grows beyond 2000 bytes: neither there nor here
learner.to(1).save(writer)
while not writer._under_way or writer._under_way.tries < 2:
    writer._ended.wait(0.01)
learner.to(2).save(writer)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
writer.wait()
print(steps(run))
"""


def test_a_full_disk_is_survived(run: Run, claim: Claim, stage: TrainStage, tmp_path: Path) -> None:
    """Where neither the store nor the local disk takes a byte more, states stay in memory until there is room."""
    claim(run, 1)
    asked = [sys.executable, "-c", FULL_DISK, str(Path(__file__).parent), str(tmp_path), stage.model_dump_json()]
    done = subprocess.run(asked, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[2, 1]"
    assert "stays in memory alone" in done.stderr and "Training goes on" in done.stderr
    assert newest_state(run)[0] is not None


@pytest.mark.gpu
def test_a_copy_from_a_gpu_is_of_the_moment_too(run: Run, claim: Claim, stage: TrainStage, tmp_path: Path) -> None:
    """With `overlap` training goes on while the copy is made, and calls `settle` before it changes anything."""
    claim(run, 1)
    writer = writer_of(run, tmp_path, overlap=True)
    module = nn.Linear(3000, 3000).cuda()
    engine = PlainEngine(module, dict(module.named_parameters()), stage, passes=1)
    learner = SimpleNamespace(engine=engine, ema=Ema(engine.shard("master"), 0.9))
    for step in (1, 2, 3):
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            engine.shard(kind).fill_(step)
        writer.save(engine, learner.ema, {"step": step, "samples": 0}, (run.metrics_key(1, 0), b""))
        writer.settle()
        engine.shard("master").fill_(-1)
    writer.wait()
    assert all(tensor.is_pinned() for tensor in writer._buffers[0].values())
    state, damaged = newest_state(run)
    assert state is not None and not damaged
    restore(run, state, engine, learner.ema, Rank(0, 1, 0), tmp_path)
    assert (engine.shard("master") == 3).all() and torch.equal(engine.shard("exp_avg"), engine.shard("master"))
