"""Which runs go on by themselves, and when a run ends its own work: the rules, without a server."""

import subprocess
import sys
from datetime import UTC, datetime
from subprocess import PIPE
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.logging import disable_run_logger, get_logger
from prefect.server.events.schemas.automations import AutomationCreate, EventTrigger
from prefect.server.events.schemas.events import ReceivedEvent

from flows import supervise
from flows.automations import RESCUED, WATCHED, automations
from flows.body import told_in_one_line
from flows.rescue import LIMIT, LONGEST_PAUSE, Tries
from flows.server import ROOT
from flows.supervise import WORKERS_TURN, Watch
from vc2.errors import ConfigError, LaunchFailed, Preempted, ShardCorrupted, StoreError, Vc2Error

# ---- tries ----


def crashes(*reached: int) -> list[Tries | None]:
    """What is decided at each crash, by how far the work had come. A run that is left alone is retried by hand."""
    decided: list[Tries | None] = []
    tries = Tries()
    for attempt, far in enumerate(reached, start=1):
        after = tries.after(attempt, far)
        decided.append(after)
        tries = after or tries
    return decided


def test_a_run_that_gets_no_further_is_left_after_two_tries() -> None:
    assert [tries is not None for tries in crashes(5, 5, 5)] == [True] * LIMIT + [False]


def test_a_run_that_gets_further_is_tried_as_often_as_it_takes() -> None:
    assert all(tries and tries.used == 1 for tries in crashes(*range(20)))


def test_whoever_presses_retry_starts_the_count_anew() -> None:
    decided = crashes(5, 5, 5, 5)  # a fourth time only after somebody did
    assert decided[2] is None and decided[3] is not None


def test_pauses_grow_and_have_an_end() -> None:
    pauses = [Tries(used).pause for used in range(1, 9)]
    assert pauses == sorted(pauses) and pauses[0] < pauses[1] and pauses[-1] == LONGEST_PAUSE


def test_tries_are_found_again_in_the_labels_of_a_run() -> None:
    tries = Tries(2, 10**12 + 5, 7)
    labels: dict[str, Any] = {f"vc2.rescue.{name}": value for name, value in tries.labels().items()}
    assert Tries.of(FlowRun(flow_id=uuid4(), labels=labels)) == tries
    assert Tries.of(FlowRun(flow_id=uuid4())) == Tries()


# ---- how a run ends ----


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (StoreError("no answer"), StateType.CRASHED),
        (LaunchFailed("a rank is gone", "communication"), StateType.CRASHED),
        (LaunchFailed("ended by SIGKILL", "killed"), StateType.CRASHED),
        (Preempted("asked to stop"), StateType.CRASHED),
        (ConnectionResetError("reset"), StateType.CRASHED),
        (ShardCorrupted("other bytes"), StateType.FAILED),
        (LaunchFailed("out of memory", "memory"), StateType.FAILED),
        (ConfigError("no such setting"), StateType.FAILED),
        (Vc2Error("anything else"), StateType.FAILED),
    ],
    ids=lambda value: str(value),
)
def test_what_may_pass_is_a_crash_and_all_else_a_failure(error: Exception, ends: StateType) -> None:
    def run() -> str:
        raise error

    with disable_run_logger():
        state = told_in_one_line(run)()
    assert (state.type, state.message) == (ends, str(error))


def test_a_defect_keeps_its_traceback() -> None:
    def run() -> str:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        told_in_one_line(run)()


# ---- when a run ends its own work ----


def seen(*states: tuple[StateType, int], pause: float = 0.0) -> Watch:
    """A watch that saw a run in these states, each with the run's count of attempts, at such a pause."""
    watch, now = Watch(uuid4(), get_logger(), states[0][1]), [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervise.time, "monotonic", lambda: now[0])
        for kind, count in states:
            now[0] += pause
            watch.judge(FlowRun(flow_id=uuid4(), run_count=count, state=State(type=kind), state_type=kind))
    return watch


@pytest.mark.parametrize("elsewhere", [StateType.CRASHED, StateType.FAILED, StateType.CANCELLED, StateType.SCHEDULED])
def test_a_run_that_was_ended_or_put_back_elsewhere_ends_its_work(elsewhere: StateType) -> None:
    watch = seen((StateType.RUNNING, 1), (elsewhere, 1))
    assert watch.verdict and not watch.is_cancelled


def test_a_run_that_another_process_works_on_ends_its_work() -> None:
    assert seen((StateType.RUNNING, 1), (StateType.RUNNING, 2)).verdict


def test_a_run_that_works_or_waits_at_a_gate_goes_on() -> None:
    assert not seen((StateType.RUNNING, 2), (StateType.RUNNING, 2), (StateType.PAUSED, 2)).verdict


def test_a_cancel_is_the_workers_first_and_then_its_own() -> None:
    running, cancelling = (StateType.RUNNING, 1), (StateType.CANCELLING, 1)
    assert not seen(running, cancelling, cancelling, pause=WORKERS_TURN / 2).verdict
    assert seen(running, cancelling, cancelling, pause=WORKERS_TURN).is_cancelled


WITHOUT_A_READER = """
import sys
{}
from rich.console import Console
sys.stdin.read()
Console(file=sys.stderr).print("anybody there?")
print("nobody", flush=True)
sys.exit(7)
"""


def test_a_flow_run_goes_on_when_nobody_reads_what_it_prints() -> None:
    """Its worker is gone. Written to a broken pipe as it is, a console would end the process with code 1."""
    for prepared, ends in (("", 1), ("from flows.tied import outlive_readers; outlive_readers()", 7)):
        code = WITHOUT_A_READER.format(prepared)
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=PIPE, stdout=PIPE, stderr=PIPE)
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()
        process.stderr.close()
        process.stdin.close()
        assert process.wait(120) == ends


# ---- automations ----


def event(name: str, flow: str, run: str) -> ReceivedEvent:
    related: list[dict[str, Any]] = [
        {"prefect.resource.id": "prefect.flow.0", "prefect.resource.role": "flow", "prefect.resource.name": flow}
    ]
    resource = {"prefect.resource.id": f"prefect.flow-run.{uuid4()}", "prefect.resource.name": run}
    facts = {"occurred": datetime.now(UTC), "event": name, "resource": resource, "related": related, "id": uuid4()}
    return ReceivedEvent.model_validate(facts)


def test_automations_cover_our_runs_and_no_others() -> None:
    """Crashes are looked at, of drivers and of stages; silence is noticed of all, from the moment a worker took it."""
    made = (AutomationCreate.model_validate(data).trigger for data in automations(str(uuid4()), str(uuid4()), beat=30))
    silent, crashed, clock = (trigger for trigger in made if isinstance(trigger, EventTrigger))
    assert not clock.after and not clock.for_each and clock.posture == "Proactive", "it fires though nothing happens"
    assert silent.starts_after("prefect.flow-run.Running") and silent.expects("prefect.flow-run.Suspended")
    for flow in WATCHED:
        assert silent.covers(event("prefect.flow-run.heartbeat", flow, "any/name"))
        assert crashed.covers(event("prefect.flow-run.Crashed", flow, "brave-fox")) == (flow in RESCUED)
        assert crashed.covers(event("prefect.flow-run.Crashed", flow, "train/full")) == (flow in RESCUED)
        assert not crashed.covers(event("prefect.flow-run.Failed", flow, "brave-fox"))
    assert not silent.covers(event("prefect.flow-run.heartbeat", "somebody-elses", "brave-fox"))
