"""The proof by faults: a store that fails one call in ten, tears bodies, stalls and goes away for a while."""

import importlib.util
import logging
import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from vc2.errors import StoreError
from vc2.storage import S3Store
from vc2.train.attempts import Run, StateRef, newest_state
from vc2.train.config import TrainStage
from vc2.train.kept import adopt
from vc2.train.loop import Trainer
from vc2.train.metrics import read_metrics
from vc2.train.states import StateWriter

pytestmark = pytest.mark.s3

StartAttempt = Callable[..., Trainer]


def _faulty_proxy() -> Any:
    spec = importlib.util.spec_from_file_location("faults", Path(__file__).parents[1] / "faults.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FaultyProxy


@pytest.fixture
def proxy(s3_endpoint: str) -> Iterator[Any]:
    with _faulty_proxy()(s3_endpoint, seed=1, stall=0.5) as proxy:
        yield proxy


def through(endpoint: str, s3_uri: str, stage: TrainStage, name: str = "f", attempts: int = 3) -> Run:
    """A run in the bucket, by another way to it."""
    before = os.environ["AWS_ENDPOINT_URL"]
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    try:
        bucket, _, prefix = s3_uri.removeprefix("s3://").partition("/")
        return Run(S3Store(bucket, prefix, attempts=attempts, patience=5), stage.name, name * 64)
    finally:
        os.environ["AWS_ENDPOINT_URL"] = before


class Killed(Exception):
    pass


def killed_at(trainer: Trainer, step: int) -> Trainer:
    """A run that ends at a step, and whose writer writes nothing more: the process is gone."""
    batch_of = trainer.batches.at

    def dying(at: int) -> Any:
        if at == step:
            trainer.writer._ended.set()
            raise Killed
        return batch_of(at)

    trainer.batches.at = dying
    return trainer


def patiently(call: Callable[[], Any]) -> Any:
    """What somebody does whose command ends because of the network: runs it again."""
    for _ in range(20):
        try:
            return call()
        except StoreError:
            continue
    raise AssertionError("twenty times in a row")


def train_with_kills(
    stage: TrainStage, start_attempt: StartAttempt, faulty: Run, clean: Run, kills: list[int], work: Path
) -> Trainer:
    """To the end, killed at steps; after each kill it is checked that what was acknowledged is what is found."""
    for kill in kills:
        trainer = patiently(lambda: start_attempt(stage, run=faulty))
        before = list(clean.states())
        with pytest.raises(Killed):
            killed_at(trainer, trainer.step + kill).train()
        while trainer.writer._is_writing:
            trainer.writer._ended.wait(0.01)
            with trainer.writer._changed:
                trainer.writer._changed.wait(0.05)
        acknowledged = next(clean.states(), None)
        found, damaged = patiently(lambda: newest_state(faulty))
        assert damaged == [] and (found.ref if found else None) == acknowledged
        assert not before or (found is not None and found.step >= before[0].step)  # never an older one
        adopt(clean, work)
    trainer = patiently(lambda: start_attempt(stage, run=faulty))
    trainer.train()
    return trainer


def check_against_unbroken(stage: TrainStage, start_attempt: StartAttempt, trainer: Trainer, run: Run) -> None:
    """Faults have changed no bit of what was learnt and no line of the curve."""
    whole = start_attempt(stage)
    whole.train()
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        assert torch.equal(trainer.engine.shard(kind), whole.engine.shard(kind)), kind
    assert torch.equal(trainer.ema.shard, whole.ema.shard)
    curves = [
        [(line["step"], line["loss"]) for line in read_metrics(of.store, of.stage, of.fingerprint)]
        for of in (run, whole.run)
    ]
    assert curves[0] == curves[1]


def test_killed_on_a_bad_network_it_ends_as_unbroken(
    s3_endpoint: str, s3_uri: str, proxy: Any, stage: TrainStage, start_attempt: StartAttempt, tmp_path: Path
) -> None:
    """Three kills at drawn steps, one call in ten failing: every resume finds the last acknowledged state."""
    stage = stage.evolve(num_steps=10, state_every_steps=2)
    faulty, clean = through(proxy.endpoint, s3_uri, stage), through(s3_endpoint, s3_uri, stage)
    draws = random.Random(2)
    kills = [draws.randint(1, 3) for _ in range(3)]
    trainer = train_with_kills(stage, start_attempt, faulty, clean, kills, tmp_path)
    failed = sum(count for way, count in proxy.counts.items() if way != "passed")
    assert failed > 5 and proxy.counts["passed"] > 5 * failed
    check_against_unbroken(stage, start_attempt, trainer, clean)


def test_a_store_that_does_not_answer_damages_no_state(
    s3_endpoint: str, s3_uri: str, proxy: Any, stage: TrainStage, start_attempt: StartAttempt
) -> None:
    """After however many calls it goes away: the search for the newest state fails, and never finds an older one."""
    proxy.rate, stage = 0.0, stage.evolve(num_steps=2, state_every_steps=1)
    clean = through(s3_endpoint, s3_uri, stage)
    start_attempt(stage, run=clean).train()
    assert [ref.step for ref in clean.states()] == [2, 1]
    faulty = through(proxy.endpoint, s3_uri, stage, attempts=1)
    newest_state(faulty)
    calls, way = proxy.counts["passed"], proxy.way
    for answered in range(calls):
        ways = iter(["passed"] * answered)
        proxy.way = partial(next, ways, "slow_down")
        with pytest.raises(StoreError, match=r"SlowDown|503"):
            newest_state(faulty)
    proxy.way = way
    found, damaged = newest_state(faulty)
    assert found is not None and found.step == 2 and damaged == [] and calls > 8


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2))
def test_twenty_kills_on_a_bad_network(
    seed: int, s3_endpoint: str, s3_uri: str, stage: TrainStage, start_attempt: StartAttempt, tmp_path: Path
) -> None:
    """The same, twenty times, and with every way of failing."""
    stage = stage.evolve(num_steps=40, state_every_steps=2)
    with _faulty_proxy()(s3_endpoint, seed=seed, stall=1.0) as proxy:
        faulty, clean = through(proxy.endpoint, s3_uri, stage), through(s3_endpoint, s3_uri, stage)
        draws = random.Random(seed)
        kills = [draws.randint(1, 4) for _ in range(20)]
        trainer = train_with_kills(stage, start_attempt, faulty, clean, kills, tmp_path)
        assert len(proxy.counts) == 7
        check_against_unbroken(stage, start_attempt, trainer, clean)


def test_an_outage_stops_no_training(
    s3_endpoint: str, s3_uri: str, proxy: Any, stage: TrainStage, start_attempt: StartAttempt,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The store is away from step 4 to step 8; steps are taken all the same, and afterwards there is a state."""
    proxy.rate = 0.0
    stage = stage.evolve(num_steps=10, state_every_steps=2)
    clean = through(s3_endpoint, s3_uri, stage)
    trainer = start_attempt(stage, run=through(proxy.endpoint, s3_uri, stage))
    batch_of = trainer.batches.at

    def with_outage(at: int) -> Any:
        if at == 4:
            trainer.writer.wait()
            proxy.is_out = True
        if at == 8:
            while not trainer.writer._trouble:
                trainer.writer._ended.wait(0.05)
            assert next(clean.states()).step == 4
            proxy.is_out = False
        return batch_of(at)

    trainer.batches.at = with_outage
    with caplog.at_level(logging.WARNING):
        trainer.train()
    found, damaged = newest_state(clean)
    assert found is not None and found.step == 10 and damaged == []
    assert "Training goes on" in caplog.text and proxy.counts["outage"] > 0


def test_an_outage_that_lasts_ends_the_run_and_loses_nothing(
    s3_endpoint: str, s3_uri: str, proxy: Any, stage: TrainStage, start_attempt: StartAttempt, tmp_path: Path
) -> None:
    """The state is kept on this machine, the next attempt takes it up, and all ends as if nothing had been."""
    proxy.rate = 0.0
    stage = stage.evolve(state_every_steps=2)
    clean = through(s3_endpoint, s3_uri, stage)
    trainer = start_attempt(stage, run=through(proxy.endpoint, s3_uri, stage))
    writer = trainer.writer
    trainer.writer = StateWriter(
        writer.run, writer.attempt, writer.layout, writer.rank, tmp_path, writer.keep, outage_seconds=0.1
    )
    batch_of = trainer.batches.at

    def with_outage(at: int) -> Any:
        if at == 3:
            trainer.writer.wait()
            proxy.is_out = True
        if at == 5:
            while not trainer.writer.has_failed:
                trainer.writer._ended.wait(0.05)
        return batch_of(at)

    trainer.batches.at = with_outage
    with pytest.raises(StoreError, match="kept in"):
        trainer.train()
    proxy.is_out = False
    assert next(clean.states()).step == 2
    assert adopt(clean, tmp_path) == StateRef(attempt=1, step=4)
    resumed = start_attempt(stage, run=clean)
    assert resumed.step == 4
    resumed.train()
    check_against_unbroken(stage, start_attempt, resumed, clean)


def test_a_zombie_changes_nothing_that_is_read(
    s3_endpoint: str, s3_uri: str, proxy: Any, stage: TrainStage, start_attempt: StartAttempt
) -> None:
    """A writer that was cut off while another took over comes back: all that it still writes is off the chain."""
    proxy.rate = 0.0
    stage = stage.evolve(state_every_steps=2)
    clean = through(s3_endpoint, s3_uri, stage)
    zombie = start_attempt(stage, run=through(proxy.endpoint, s3_uri, stage))
    batch_of = zombie.batches.at

    def cut_off(at: int) -> Any:
        if at == 3:
            zombie.writer.wait()
            proxy.is_out = True
        if at == 5:
            start_attempt(stage, run=clean).train()
            proxy.is_out = False
        return batch_of(at)

    zombie.batches.at = cut_off
    with pytest.raises(Exception, match="attempt 2 has taken over"):
        zombie.train()
    found, damaged = newest_state(clean)
    assert found is not None and found.ref == StateRef(attempt=2, step=8) and damaged == []
    assert all(ref.attempt == 2 for ref in clean.states() if ref.step > 2)
    assert [line["attempt"] for line in read_metrics(clean.store, clean.stage, clean.fingerprint)] == [1] * 2 + [2] * 6
