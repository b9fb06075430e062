"""Automations of the server, as code: what is done about runs whose process can do nothing itself any more.

    vc2: no heartbeat     a run that began or beat, and then was silent for three beats, is called crashed
    vc2: crashed          deployment rescue/crashed looks at a crashed run, and leaves it to its driver if that is there
    vc2: sweep            deployment rescue/sweep does so every few minutes, for all that were missed

A flow run beats as it begins and then as often as its deployment says (`prefect.yaml`). If it was alive after all (the
server was away for long), it ends its work as soon as it hears of it (`flows.supervise`), and goes on where it was like
any crashed run.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flows.server import Api

__all__ = ["automations", "register"]

RESCUED = ("vc2", "shard", "train", "evaluate")  # flows of which a crashed run goes on by itself
WATCHED = (*RESCUED, "preflight", "sample", "rescue")
BEAT = 30.0  # seconds between two heartbeats of a flow run; as in prefect.yaml
BEATS = 3  # that may be missed
SWEEP = 300.0  # seconds between two looks for what was missed


def automations(rescue: str, sweep: str, beat: float = BEAT) -> list[dict[str, Any]]:
    """All of them, as the server's interface takes them.

    Args:
        rescue: Id of the deployment rescue/crashed.
        sweep: Id of the deployment rescue/sweep.
        beat: Seconds between two heartbeats of a flow run.
    """
    silent = f"The process is gone, or cut off: no heartbeat for {BEATS * beat:.0f} s."
    run_id = {"__prefect_kind": "jinja", "template": "{{ event.resource.id }}"}
    return [
        {
            "name": "vc2: no heartbeat",
            "description": "Calls a run crashed whose process was silent for three heartbeats.",
            # Of one that is killed before its first beat nothing is heard but that it began.
            "trigger": {
                **_trigger("Proactive", WATCHED, expect=["prefect.flow-run.*"], within=BEATS * beat),
                "after": ["prefect.flow-run.Running", "prefect.flow-run.heartbeat"],
                "for_each": ["prefect.resource.id"],
            },
            "actions": [{"type": "change-flow-run-state", "state": "CRASHED", "message": silent}],
        },
        {
            "name": "vc2: crashed",
            "description": "Puts a crashed run back to work after a pause, as long as that gets it further.",
            "trigger": _trigger("Reactive", RESCUED, expect=["prefect.flow-run.Crashed"], within=0),
            "actions": [_start(rescue, run=run_id)],
        },
        {
            "name": "vc2: sweep",
            "description": "Looks for crashed runs that were missed.",
            # A clock: it waits in vain. (With SQLAlchemy 2.1 Prefect 3.8.8 starts nothing by a deployment's schedule.)
            "trigger": _trigger("Proactive", RESCUED, expect=["vc2.never"], within=SWEEP),
            "actions": [_start(sweep, run="")],
        },
    ]


def register(api: "Api", beat: float = BEAT) -> None:
    """Bring the automations of a server in line with these; others are left alone."""
    rescue, sweep = (api.get(f"/deployments/name/rescue/{name}")["id"] for name in ("crashed", "sweep"))
    known = {found["name"]: found for found in api.post("/automations/filter", {"limit": 200})}
    for wanted in automations(rescue, sweep, beat):
        found = known.get(wanted["name"])
        if found is None:
            api.post("/automations/", wanted)
        elif not _has(found, wanted):
            api.put(f"/automations/{found['id']}", wanted)


def _trigger(posture: str, flows: Sequence[str], *, expect: list[str], within: float) -> dict[str, Any]:
    related = {"prefect.resource.role": "flow", "prefect.resource.name": list(flows)}
    match = {"prefect.resource.id": "prefect.flow-run.*"}
    base = {"type": "event", "posture": posture, "match": match, "match_related": related, "threshold": 1}
    return base | {"expect": expect, "within": within}


def _start(deployment: str, **parameters: Any) -> dict[str, Any]:
    chosen = {"type": "run-deployment", "source": "selected", "deployment_id": deployment}
    return chosen | {"parameters": parameters}


def _has(found: Any, wanted: Any) -> bool:
    """Whether what the server keeps says all that is wanted; it adds ids, defaults and an order of its own."""
    if isinstance(wanted, Mapping):
        return isinstance(found, Mapping) and all(_has(found.get(key), value) for key, value in wanted.items())
    if isinstance(wanted, list):
        if not isinstance(found, list) or len(found) != len(wanted):
            return False
        return all(any(_has(one, value) for one in found) for value in wanted)
    return found == wanted or found == [wanted]
