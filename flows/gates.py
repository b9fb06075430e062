"""Gates: a run is suspended until somebody answers a form in the UI.

Nothing of the run stays on a machine while it waits. An answer is asked for once: a run that is retried or rescued
later goes through the gates that were opened. A refusal ends the run, and is not for ever: Retry asks again.
"""

from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
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
    asked_before = f"vc2.asked.{gate}"
    log = get_run_logger().info
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(this_run.id)
        number = int((run.labels or {}).get(asked_before, 0))
        while True:
            try:
                answer = suspend_flow_run(Approval.with_initial_data(description=question), key=f"{gate}-{number}")
                break
            except (ObjectNotFound, PrefectHTTPStatusError):  # somebody set the run to work again without an answer
                number += 1
                client.update_flow_run_labels(run.id, {asked_before: number})
        note = answer.note.strip()
        if answer.approve:
            log("gate %s: approved%s", gate, f": {note}" if note else "")
            return
        client.update_flow_run_labels(run.id, {asked_before: number + 1})
    raise NotApproved(f"not approved ({gate}){f': {note}' if note else ''}; Retry asks again")
