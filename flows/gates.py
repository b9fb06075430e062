"""Gates: a run is suspended until somebody answers a form in the UI.

Nothing of the run stays on a machine while it waits. An approval is kept in the labels of the run: retried or rescued
later it goes through the gates that were opened. A refusal ends the run, and is not for ever: Retry asks again.

Prefect tells the questions of a run apart by a key, and forgets in every new attempt which keys were used, but not what
was written under them: a key that comes again can be neither asked nor answered. So the attempt is part of it.
"""

import itertools

from prefect.client.orchestration import get_client
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput, read_flow_run_input
from prefect.logging import get_run_logger
from prefect.runtime import flow_run as this_run
from pydantic import Field

from vc2.errors import ConfigError

__all__ = ["Approval", "NotApproved", "ask"]


class Approval(RunInput):
    """The form of a gate."""

    approve: bool = Field(False, title="Approve", description="whether the run shall go on")
    note: str = Field("", title="Note", description="why; it is kept in the log of the run")


class NotApproved(ConfigError):
    """Somebody said no."""


def ask(gate: str, question: str) -> None:
    """Return if the gate is open. Else suspend the run and ask; it begins again from the top when it is answered.

    Args:
        gate: Its name within the run.
        question: What the form says, in Markdown.

    Raises:
        NotApproved: If the answer is no.
    """
    gate = gate.replace("/", "-")  # it becomes part of addresses
    approved = f"vc2.approved.{gate}"
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(this_run.id)
        if (run.labels or {}).get(approved):
            return
        answer = _answer(f"{gate}-{run.run_count}", question)
        note = answer.note.strip()
        if not answer.approve:
            raise NotApproved(f"not approved ({gate}){f': {note}' if note else ''}; Retry asks again")
        client.update_flow_run_labels(run.id, {approved: run.run_count})
    get_run_logger().info("gate %s: approved%s", gate, f": {note}" if note else "")


def _answer(key: str, question: str) -> Approval:
    """What was answered in this attempt; suspends the run where nothing was. (Resume goes on in the same attempt.)"""
    for number in itertools.count():
        answer = suspend_flow_run(Approval.with_initial_data(description=question), key=f"{key}-{number}")
        if read_flow_run_input(answer.metadata.key) is not None:
            return answer
        # Asked under this key, and somebody set the run to work again without an answer: the next one.
    raise AssertionError
