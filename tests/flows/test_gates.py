"""Gates and rescues against Prefect's own server: what it makes of the states, keys and labels that we write.

The server is real, with a database of its own. It has no worker: the tests start each attempt of a run in this process.
"""

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, task
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import Pause
from prefect.flow_engine import run_flow
from prefect.logging import disable_run_logger
from prefect.states import AwaitingRetry, Cancelled, Crashed, Failed, Pending, Running, Scheduled
from prefect.testing.utilities import prefect_test_harness

from flows import pipeline, rescue
from flows.gates import NotApproved, ask
from flows.rescue import LIMIT, LONGEST_PAUSE
from vc2.errors import LaunchFailed, StoreError


@pytest.fixture(scope="module")
def client() -> Iterator[SyncPrefectClient]:
    with prefect_test_harness(server_startup_timeout=240), get_client(sync_client=True) as client:
        yield client


@flow(name="vc2")
def gated() -> str:
    ask("before-train/full", "Shall it run?")
    return "went on"


@task
def waiting() -> None:
    """Stands for a stage in its driver, as Prefect notes it."""


def created(client: SyncPrefectClient) -> FlowRun:
    deployment = client.create_deployment(client.create_flow(gated), "gated")
    return client.create_flow_run_from_deployment(deployment)


# ---- gates ----


def worked_on(client: SyncPrefectClient, run: FlowRun) -> FlowRun:
    """How a run stands after an attempt."""
    with suppress(Pause, NotApproved):
        run_flow(gated, flow_run=client.read_flow_run(run.id))
    return client.read_flow_run(run.id)


def answered(client: SyncPrefectClient, run: FlowRun, **form: Any) -> FlowRun:
    """Resume, with what was filled in."""
    client.resume_flow_run(run.id, run_input=form)
    return worked_on(client, run)


def crashed(client: SyncPrefectClient, run: FlowRun) -> FlowRun:
    client.set_flow_run_state(run.id, Crashed(message="killed"), force=True)
    return client.read_flow_run(run.id)


def retried(client: SyncPrefectClient, run: FlowRun) -> FlowRun:
    client.set_flow_run_state(run.id, AwaitingRetry())
    return worked_on(client, run)


def test_an_approval_is_kept_when_the_run_is_put_back_to_work(client: SyncPrefectClient) -> None:
    run = worked_on(client, created(client))
    assert run.state_type == StateType.PAUSED
    run = answered(client, run, approve=True, note="good")
    assert run.state_type == StateType.COMPLETED
    run = retried(client, crashed(client, run))
    assert (run.state_type, run.run_count) == (StateType.COMPLETED, 2)


def test_a_run_that_crashed_before_the_answer_asks_again(client: SyncPrefectClient) -> None:
    run = retried(client, crashed(client, worked_on(client, created(client))))
    assert run.state_type == StateType.PAUSED
    assert answered(client, run, approve=True).state_type == StateType.COMPLETED


def test_a_refusal_ends_the_run_and_retry_asks_again(client: SyncPrefectClient) -> None:
    run = answered(client, worked_on(client, created(client)), approve=False, note="too blurry")
    assert run.state_type == StateType.FAILED
    assert "too blurry" in str(run.state and run.state.message)
    run = retried(client, run)
    assert run.state_type == StateType.PAUSED
    assert answered(client, run, approve=True).state_type == StateType.COMPLETED


def test_a_run_that_goes_on_without_an_answer_asks_again(client: SyncPrefectClient) -> None:
    run = answered(client, worked_on(client, created(client)))
    assert run.state_type == StateType.PAUSED
    assert answered(client, run, approve=True).state_type == StateType.COMPLETED


# ---- rescues ----


@pytest.fixture
def run(client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FlowRun]:
    """A run that crashed a while ago."""
    monkeypatch.setattr(rescue, "SETTLES", 0.0)
    monkeypatch.setattr(rescue, "MISSED_AFTER", timedelta(0))
    monkeypatch.setenv("VC2_STORE", str(tmp_path))
    made = created(client)
    with disable_run_logger():
        yield crashes(client, made)
    client.set_flow_run_state(made.id, Cancelled(), force=True)


def crashes(client: SyncPrefectClient, run: FlowRun) -> FlowRun:
    """An attempt that ends in a crash."""
    for state in (Pending(), Running()):
        client.set_flow_run_state(run.id, state)
    return crashed(client, run)


def put_back(client: SyncPrefectClient, run: FlowRun) -> None:
    client.set_flow_run_state(run.id, AwaitingRetry())


def swept() -> str:
    """What rescue/crashed says of all that was missed."""
    return str(rescue.crashed.fn("").message)


def test_a_crashed_run_that_was_missed_is_found_until_it_is_given_up(client: SyncPrefectClient, run: FlowRun) -> None:
    for _ in range(LIMIT):
        assert f"{run.name} goes on" in swept()
        client.set_flow_run_state(run.id, Scheduled())
        crashes(client, run)
    assert f"{run.name} got no further" in swept()
    assert run.name not in swept()
    put_back(client, run)
    crashes(client, run)
    assert f"{run.name} goes on" in swept()


def test_a_stage_is_left_to_its_driver_until_that_has_ended(client: SyncPrefectClient, run: FlowRun) -> None:
    driver = created(client)
    for state in (Pending(), Running()):
        client.set_flow_run_state(driver.id, state)
    waits = client.create_task_run(waiting, driver.id, "0")
    assert run.deployment_id is not None
    stage = client.create_flow_run_from_deployment(run.deployment_id, parent_task_run_id=waits.id)
    crashes(client, stage)
    assert stage.name not in swept()
    assert "seen to by its driver" in str(rescue.crashed.fn(str(stage.id)).message)
    client.set_flow_run_state(driver.id, Failed(), force=True)
    assert f"{stage.name} goes on" in swept()


def test_a_store_that_is_away_does_not_keep_a_run_from_being_rescued(client: SyncPrefectClient, run: FlowRun) -> None:
    def away() -> int:
        raise StoreError("no answer")

    assert rescue.rescue(client, run, away)
    assert client.read_flow_run(run.id).state_name == "AwaitingRetry"


def test_of_two_that_rescue_a_run_one_puts_it_back(client: SyncPrefectClient, run: FlowRun) -> None:
    def meanwhile() -> dict[str, Any]:
        put_back(client, run)
        return {}

    assert rescue.rescue(client, run, int, meanwhile) == 0
    now = client.read_flow_run(run.id)
    assert rescue.Tries.of(now) == rescue.Tries()


def test_a_run_knows_which_attempt_somebody_started(client: SyncPrefectClient, run: FlowRun) -> None:
    rescue.rescue(client, run, int)
    client.set_flow_run_state(run.id, Scheduled())
    rescued = crashes(client, run)
    put_back(client, run)
    by_hand = crashes(client, run)
    assert [(one.run_count, rescue.started(one)) for one in (rescued, by_hand)] == [(2, 1), (3, 3)]


def test_a_run_that_was_left_put_off_is_told_from_one_that_pauses(client: SyncPrefectClient, run: FlowRun) -> None:
    found = []
    for pause in (timedelta(seconds=LONGEST_PAUSE), rescue.PUT_OFF):
        client.set_flow_run_state(run.id, AwaitingRetry(scheduled_time=datetime.now(UTC) + pause))
        found.append(rescue.is_put_off(client.read_flow_run(run.id)))
    assert found == [False, True]


# ---- what an earlier attempt left ----


@pytest.mark.parametrize("state", [Failed(message="no such table"), Cancelled(message="not now")], ids=lambda s: s.name)
def test_a_driver_that_is_rescued_leaves_alone_what_failed_or_was_cancelled(
    client: SyncPrefectClient, run: FlowRun, state: Any
) -> None:
    client.set_flow_run_state(run.id, state, force=True)
    child = client.read_flow_run(run.id)
    with pytest.raises(LaunchFailed, match=f"{state.name.lower()}: {state.message}"):
        pipeline._wait(client, child, dict, int, is_rescue=True)
    assert client.read_flow_run(run.id).state_type == state.type


def test_a_stage_that_was_deleted_is_told_of_in_one_sentence(client: SyncPrefectClient, run: FlowRun) -> None:
    gone = created(client)
    client.delete_flow_run(gone.id)
    with pytest.raises(LaunchFailed, match="was deleted"):
        pipeline._wait(client, gone, dict, int, is_rescue=False)
