"""Laws of attempts: one writer, followed by its chain; zombies change nothing that is read."""

import hashlib
import json
import threading
from collections.abc import Callable

import pytest

from vc2.train.attempts import (
    Attempt,
    Heartbeat,
    Holder,
    Run,
    StateDamaged,
    StateFile,
    StateManifest,
    StateRef,
    Superseded,
    collect,
    is_alive,
    newest_state,
    this_process,
)
from vc2.train.config import Layout
from vc2.train.metrics import read_metrics

LAYOUT = Layout(world_size=1, micro_batch=1, threads=1)
Claim = Callable[..., Attempt]


def put_state(run: Run, attempt: int, step: int) -> StateRef:
    ref = StateRef(attempt=attempt, step=step)
    key, data = f"{run.state_prefix(ref)}/rank-0-master.safetensors", b"weights of %d/%d" % (attempt, step)
    run.store.write(key, data)
    file = StateFile(name="m", key=key, size=len(data), sha256=hashlib.sha256(data).hexdigest(), rank=0, kind="master")
    manifest = StateManifest(
        attempt=attempt, step=step, samples=step, ema_updates=step, updates=step, layout=LAYOUT, files=(file,)
    )
    run.store.write(f"{run.state_prefix(ref)}/manifest.json", manifest.model_dump_json().encode())
    return ref


def newest_ref(run: Run, at_most: int | None = None) -> StateRef | None:
    state, _ = newest_state(run, at_most=at_most)
    return state.ref if state else None


def test_one_of_many_claims_an_attempt(run: Run) -> None:
    """However many processes race for an attempt, one gets it."""
    won = []

    def race() -> None:
        attempt = Attempt(number=1, start=None, layout=LAYOUT, holder=this_process(), heartbeat_seconds=1)
        won.append(run.claim(attempt))

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 7 + [True]


def test_a_run_without_states_starts_from_its_beginning(run: Run, claim: Claim) -> None:
    """No state is an answer too."""
    assert newest_state(run) == (None, [])
    claim(run, 1)
    assert newest_state(run) == (None, [])


def test_the_newest_state_is_the_last_of_the_chain(run: Run, claim: Claim) -> None:
    """Attempt 2 started from step 4 of attempt 1: its own states come first, then those of attempt 1 up to step 4."""
    claim(run, 1)
    for step in (2, 4, 6):
        put_state(run, 1, step)
    claim(run, 2, start=StateRef(attempt=1, step=4))
    assert newest_ref(run) == StateRef(attempt=1, step=4)
    put_state(run, 2, 5)
    assert newest_ref(run) == StateRef(attempt=2, step=5)
    assert [(ref.attempt, ref.step) for ref in run.states()] == [(2, 5), (1, 4), (1, 2)]
    assert newest_ref(run, at_most=4) == StateRef(attempt=1, step=4)


def test_a_late_state_of_a_zombie_is_ignored_and_collected(run: Run, claim: Claim) -> None:
    """What attempt 1 writes after attempt 2 started is off the chain, however far it got."""
    claim(run, 1)
    put_state(run, 1, 4)
    claim(run, 2, start=StateRef(attempt=1, step=4))
    put_state(run, 1, 100)
    assert newest_ref(run) == StateRef(attempt=1, step=4)
    with pytest.raises(Superseded):
        run.ensure_newest(1)
    for step in (5, 6, 7):
        put_state(run, 2, step)
    collect(run, keep=2)
    assert {(ref.attempt, ref.step) for ref in run.all_states()} == {(1, 4), (2, 6), (2, 7)}
    assert len(list(run.store.list(f"{run.prefix}/states/"))) == 6


def test_retention_keeps_the_newest_the_spaced_the_pinned_and_the_start(run: Run, claim: Claim) -> None:
    """What is not kept for one of four reasons goes; a pin counts off the chain too, until it is taken away."""
    claim(run, 1)
    for step in (2, 4, 5, 7, 8, 10):
        put_state(run, 1, step)
    claim(run, 2, start=StateRef(attempt=1, step=7))
    for step in (9, 11, 12, 13):
        put_state(run, 2, step)
    run.pin(StateRef(attempt=1, step=2))
    run.pin(StateRef(attempt=1, step=8))  # of a zombie
    collect(run, keep=2, keep_every=5)
    found = {(ref.attempt, ref.step) for ref in run.all_states()}
    assert found == {(1, 2), (1, 5), (1, 7), (1, 8), (2, 12), (2, 13)}
    run.unpin(StateRef(attempt=1, step=8))
    collect(run, keep=2, keep_every=5)
    assert {(ref.attempt, ref.step) for ref in run.all_states()} == found - {(1, 8)}
    with pytest.raises(StateDamaged, match="no readable manifest"):
        run.pin(StateRef(attempt=1, step=3))


def test_files_of_a_state_that_was_never_committed_are_collected(run: Run, claim: Claim) -> None:
    """They go once a later state is there; what is still being written stays."""
    claim(run, 1)
    put_state(run, 1, 4)
    for step in (3, 5):
        run.store.write(f"{run.state_prefix(StateRef(attempt=1, step=step))}/rank-0-master.safetensors", b"half")
    collect(run, keep=2)
    steps = {int(entry.key.split("/")[-2]) for entry in run.store.list(f"{run.prefix}/states/")}
    assert steps == {4, 5}


def test_a_claim_whose_answer_was_lost_is_known_as_its_own(run: Run) -> None:
    """A client that writes again because it heard nothing finds its own claim, and it is its own."""
    store = run.store
    write = store.write_if_absent

    def unheard(key: str, data: bytes) -> bool:
        write(key, data)
        return write(key, data)

    attempt = Attempt(number=1, start=None, layout=LAYOUT, holder=this_process(), heartbeat_seconds=1)
    store.write_if_absent = unheard  # type: ignore[method-assign]
    assert run.claim(attempt)
    assert not run.claim(attempt)


@pytest.mark.parametrize("damage", ["flip", "shorten", "delete", "manifest"])
def test_a_damaged_state_is_passed_over_and_named(run: Run, claim: Claim, damage: str) -> None:
    """A byte flipped, a file cut or gone, a torn manifest: the state before it is taken, and it is said."""
    claim(run, 1)
    put_state(run, 1, 2)
    prefix = run.state_prefix(put_state(run, 1, 4))
    key = f"{prefix}/rank-0-master.safetensors"
    data = run.store.read(key)
    if damage == "flip":
        run.store.write(key, bytes([data[0] ^ 1]) + data[1:])
    elif damage == "shorten":
        run.store.write(key, data[:-1])
    elif damage == "delete":
        run.store.delete(key)
    else:
        run.store.write(f"{prefix}/manifest.json", run.store.read(f"{prefix}/manifest.json")[:-20])
    state, damaged = newest_state(run)
    assert state is not None and state.step == 2
    assert len(damaged) == 1 and "1/4" in damaged[0]


def test_a_holder_is_waited_for_until_it_ends_dies_or_falls_silent(run: Run, claim: Claim) -> None:
    """Alive while it beats; not after its end, nor once its process is gone, nor after three silent intervals."""
    claim(run, 1)
    assert is_alive(run, 1)
    with Heartbeat(run, 1, 60):
        assert is_alive(run, 1)
    assert not is_alive(run, 1)

    gone = this_process().model_copy(update={"started": "long ago"})
    run.claim(Attempt(number=2, start=None, layout=LAYOUT, holder=gone, heartbeat_seconds=60))
    assert not is_alive(run, 2)

    elsewhere = Holder(host="another machine", pid=1, place="another boot", started="1")
    run.claim(Attempt(number=3, start=None, layout=LAYOUT, holder=elsewhere, heartbeat_seconds=60))
    assert is_alive(run, 3)
    run.claim(Attempt(number=4, start=None, layout=LAYOUT, holder=elsewhere, heartbeat_seconds=1e-9))
    assert not is_alive(run, 4)


def test_the_curve_follows_the_chain(run: Run, claim: Claim) -> None:
    """Lines of a replaced attempt count up to the state from which the next one went on."""

    def put_lines(attempt: int, start: int, *steps: int) -> None:
        lines = "".join(json.dumps({"step": step, "loss": attempt}) + "\n" for step in steps)
        run.store.write(run.metrics_key(attempt, start), lines.encode())

    claim(run, 1)
    put_lines(1, 0, 1, 2, 3, 4)
    claim(run, 2, start=StateRef(attempt=1, step=2))
    put_lines(2, 2, 3, 4, 5)
    claim(run, 3, start=StateRef(attempt=2, step=5))
    put_lines(3, 5, 6)
    lines = read_metrics(run.store, run.stage, run.fingerprint)
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2), (6, 3)]
