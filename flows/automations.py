"""Automations of the server, as code: what is done about runs whose process can do nothing itself any more.

    vc2: no heartbeat     a run that beat and then was silent for three beats is called crashed
    vc2: crashed          a crashed run that is nobody's child is looked at by deployment rescue/crashed

A flow run beats every PREFECT_FLOWS_HEARTBEAT_FREQUENCY seconds. If it was alive after all (the server was away for
long), it ends its work as soon as it hears of it (`flows.supervise`), and goes on where it was like any crashed run.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from flows.server import Api

__all__ = ["automations", "register"]

RESCUED = ("vc2", "shard", "train", "evaluate")  # flows of which a crashed run goes on by itself
WATCHED = (*RESCUED, "preflight", "sample", "rescue")
BEAT = 30.0  # seconds between two heartbeats of a flow run, where the environment says nothing else
BEATS = 3  # that may be missed
EVERY_RUN = {"prefect.resource.id": "prefect.flow-run.*"}
ROOT_RUNS = EVERY_RUN | {"prefect.resource.name": "!*/*"}  # a driver names the runs of its stages train/full and so on


def automations(rescue: str, beat: float | None = None) -> list[dict[str, Any]]:
    """All of them, as the server's interface takes them.

    Args:
        rescue: Id of the deployment rescue/crashed.
        beat: Seconds between two heartbeats of a flow run; None: as in the environment.
    """
    beat = beat or float(os.environ.get("PREFECT_FLOWS_HEARTBEAT_FREQUENCY") or BEAT)
    silent = f"The process is gone, or cut off: no heartbeat for {BEATS * beat:.0f} s."
    run_id = {"__prefect_kind": "jinja", "template": "{{ event.resource.id }}"}
    return [
        {
            "name": "vc2: no heartbeat",
            "description": "Calls a run crashed whose process was silent for three heartbeats.",
            "trigger": _trigger(
                "Proactive",
                EVERY_RUN,
                WATCHED,
                after=["prefect.flow-run.heartbeat"],
                expect=["prefect.flow-run.*"],
                for_each=["prefect.resource.id"],
                within=BEATS * beat,
            ),
            "actions": [{"type": "change-flow-run-state", "state": "CRASHED", "message": silent}],
        },
        {
            "name": "vc2: crashed",
            "description": "Puts a crashed run back to work after a pause, as long as that gets it further.",
            "trigger": _trigger("Reactive", ROOT_RUNS, RESCUED, expect=["prefect.flow-run.Crashed"], within=0),
            "actions": [
                {
                    "type": "run-deployment",
                    "source": "selected",
                    "deployment_id": rescue,
                    "parameters": {"run": run_id},
                }
            ],
        },
    ]


def register(api: Api, beat: float | None = None) -> None:
    """Bring the automations of a server in line with these; others are left alone."""
    deployment = api.get("/deployments/name/rescue/crashed")
    known = {found["name"]: found for found in api.post("/automations/filter", {"limit": 200})}
    for wanted in automations(deployment["id"], beat):
        found = known.get(wanted["name"])
        if found is None:
            api.post("/automations/", wanted)
        elif not _has(found, wanted):
            api.put(f"/automations/{found['id']}", wanted)


def _trigger(
    posture: str, match: Mapping[str, Any], flows: Sequence[str], *, expect: list[str], within: float, **more: Any
) -> dict[str, Any]:
    related = {"prefect.resource.role": "flow", "prefect.resource.name": list(flows)}
    base = {"type": "event", "posture": posture, "match": dict(match), "match_related": related, "threshold": 1}
    return base | {"expect": expect, "within": within} | more


def _has(found: Any, wanted: Any) -> bool:
    """Whether what the server keeps says all that is wanted; it adds ids, defaults and an order of its own."""
    if isinstance(wanted, Mapping):
        return isinstance(found, Mapping) and all(_has(found.get(key), value) for key, value in wanted.items())
    if isinstance(wanted, list):
        if not isinstance(found, list) or len(found) != len(wanted):
            return False
        return all(any(_has(one, value) for one in found) for value in wanted)
    return found == wanted or found == [wanted]
