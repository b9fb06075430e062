"""What is deployed, and what a run is refused for, asked for, and told, through a real Prefect server and worker."""

import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml

from flows.automations import automations, register
from flows.follow import FINAL
from flows.server import ROOT, StackError
from tests.flows.stacks import TINY_WORLD, Running, stack_command, wait_until
from vc2.pipeline.driver import STAGES

DRIVER = "vc2/full-pipeline"
ALONE = ("train/full", "train/spatial", "rescue/sweep")  # one run at a time
OTHERS = ("preflight/recipe", "sample/grid", "compare/strategies", "rescue/crashed", "rescue/sweep")


# ---- what is deployed ----


def test_the_deployments_of_the_design_exist(running: Running) -> None:
    """One per stage of the DAG, the driver and what it needs, each in its queue; trainings of a stage wait in line. So
    that a day without a worker ends in one sweep, not in hundreds, those that meet are dropped."""
    pools = {}
    for name in (DRIVER, *STAGES, *OTHERS):
        found = running.api.get(f"/deployments/name/{name}")
        assert found is not None, name
        assert found["description"] and "vc2" in found["tags"]
        recipe = "study" if name == "compare/strategies" else "miniature"
        assert found["parameters"].get("recipe", recipe) == recipe
        limit = found["global_concurrency_limit"]
        assert (limit["limit"] if limit else None) == (1 if name in ALONE else None)
        if limit:
            strategy = "CANCEL_NEW" if name == "rescue/sweep" else "ENQUEUE"
            assert found["concurrency_options"]["collision_strategy"] == strategy
        pools[name] = (found["work_pool_name"], found["work_queue_name"])
    drivers = (DRIVER, "compare/strategies", "rescue/crashed", "rescue/sweep")
    assert {pools.pop(name) for name in drivers} == {("vc2", "driver")}
    assert set(pools.values()) == {("vc2", "stages")}


def test_the_file_of_deployments_names_no_other_place() -> None:
    """prefect.yaml holds no path of a machine."""
    text = (ROOT / "prefect.yaml").read_text()
    assert str(ROOT) not in text
    assert len(yaml.safe_load(text)["deployments"]) == len(STAGES) + len(OTHERS) + 1


def leaves(schema: Mapping[str, Any], definitions: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of a form, those of nested models included."""
    for name, field in schema.get("properties", {}).items():
        yield f"{path}{name}", field
        for part in (field, *field.get("anyOf", ()), *field.get("allOf", ()), *field.get("oneOf", ())):
            if "$ref" in part:
                yield from leaves(definitions[part["$ref"].rsplit("/", 1)[1]], definitions, f"{path}{name}.")


def is_limited(field: Mapping[str, Any]) -> bool:
    """Whether a number has a limit, where the field is one."""
    limits = {"minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "enum", "const"}
    numbers = [part for part in (field, *field.get("anyOf", ())) if part.get("type") in ("integer", "number")]
    return all(limits & set(part) for part in numbers)


@pytest.mark.parametrize("name", [DRIVER, *STAGES, *OTHERS])
def test_every_field_of_a_form_has_help_and_every_number_a_limit(running: Running, name: str) -> None:
    schema = running.api.get(f"/deployments/name/{name}")["parameter_openapi_schema"]
    fields = dict(leaves(schema, schema.get("definitions", {})))
    assert [path for path, field in fields.items() if not field.get("description")] == []
    assert [path for path, field in fields.items() if not is_limited(field)] == []
    assert len(fields) > (1 if name.startswith("rescue/") else 200) - 1


def test_automations_are_registered_once_and_kept_in_line(running: Running) -> None:
    """Registered again they stay the same; one that was changed is mended under its id."""

    def known() -> dict[str, Any]:
        return {found["name"]: found for found in running.api.post("/automations/filter")}

    before = known()
    assert set(before) == {wanted["name"] for wanted in automations("", "")}
    register(running.api)
    assert known() == before
    register(running.api, beat=1000)
    changed = known()
    assert {name: found["id"] for name, found in changed.items()} == {name: f["id"] for name, f in before.items()}
    assert changed["vc2: no heartbeat"]["trigger"]["within"] == 3000
    register(running.api)
    assert known()["vc2: no heartbeat"]["trigger"]["within"] == before["vc2: no heartbeat"]["trigger"]["within"]


# ---- what is refused ----


@pytest.mark.parametrize(
    "nonsense",
    [
        {"recipe": "minature"},
        {"repeat": -1},
        {"cost_limit": -1},
        {"stop_after": "train/ful"},
        {"gate_before": "train/ful"},
        {"overrides": {"full": {"num_stepz": 3}}},
        {"overrides": {"full": {"num_steps": -3}}},
        {"overrides": {"nothing": 1}},
    ],
    ids=str,
)
def test_nonsense_is_refused_before_anything_runs(running: Running, nonsense: dict[str, Any]) -> None:
    with pytest.raises(StackError, match="refused"):
        running.submit(**nonsense)


def test_what_cannot_be_fails_at_once_in_one_sentence(running: Running) -> None:
    """What no form can know: the wrong order, another store's artifact, one that is not there, no store at all."""
    store = running.work / "store"
    wrong = {
        running.submit(start_at="train/spatial", stop_after="train/full"): "comes after",
        running.submit(gate_before="train/full", stop_after="shard/webvid"): "none of the stages asked for",
        running.submit(checkpoint="/elsewhere/runs/full/0"): "is not in the store",
        running.submit("train/full", shards=[f"webvid={store}/shards/webvid/none"]): "no manifest",
        running.submit("evaluate/evalcrafter", store="ftp://host/x"): "unknown scheme",
        running.submit("train/spatial"): "needs shard/jdb",
    }
    for run_id, words in wrong.items():
        run = running.ended(run_id)
        assert run["state_type"] == "FAILED", run["state"]
        assert words in run["state"]["message"]
        assert "\n" not in run["state"]["message"]
        assert "Traceback" not in running.log(run_id)
        assert running.children(run_id) == {}


def test_the_command_line_refuses_nonsense_in_one_line(running: Running) -> None:
    command = stack_command("demo", "--work", str(running.work.parent / "other"), "--port", str(running.port))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: port {running.port} is in use")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["up", "demo", "serve", "down"])
def test_a_work_folder_has_one_stack(running: Running, command: str) -> None:
    """Whoever comes second is told who is there, in one line."""
    done = subprocess.run(
        stack_command(command, "--work", str(running.work)), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "is in use by pid" in done.stderr


# ---- gates ----


def asked(running: Running, run_id: str) -> str:
    """The question of the gate that a run waits at, as soon as it stands there: Prefect writes it after the state."""
    run = wait_until(
        lambda: (run := running.run(run_id))["state_type"] in ("PAUSED", *FINAL) and run, "no gate was reached"
    )
    assert run["state_type"] == "PAUSED", run["state"]
    key = run["state"]["state_details"]["run_input_keyset"]["description"]
    return str(wait_until(lambda: running.api.get(f"/flow_runs/{run_id}/input/{key}"), "the gate asks nothing"))


def answer(running: Running, run_id: str, **form: Any) -> None:
    """What the Resume button of the UI does."""
    said = running.api.post(f"/flow_runs/{run_id}/resume", {"run_input": form})
    assert said["status"] == "ACCEPT", said
    wait_until(lambda: running.run(run_id)["state_type"] != "PAUSED", "the run is not resumed")


def test_a_gate_waits_for_an_answer_keeps_a_yes_and_asks_again_after_a_no(running: Running) -> None:
    """Nothing runs before the answer; a refusal is a failure with its note, and the next attempt asks once more."""
    full = {"world": TINY_WORLD}
    run_id = running.submit(gate_before="shard/webvid", stop_after="shard/webvid", preflight=False, overrides=full)
    assert "shard/webvid" in asked(running, run_id)
    assert running.children(run_id) == {}

    answer(running, run_id, approve=False, note="too blurry")
    refused = running.ended(run_id)
    assert refused["state_type"] == "FAILED"
    assert "too blurry" in refused["state"]["message"]

    running.retry(run_id)
    wait_until(lambda: running.run(run_id)["state_type"] != "SCHEDULED", "the retry did not start")
    asked(running, run_id)
    answer(running, run_id, approve=True, note="good")
    child = wait_until(lambda: running.children(run_id).get("shard/webvid"), "the stage was not started")
    assert child["parameters"]["source"] == "webvid"
    running.api.cancel(run_id)  # a run that ends by the signal before it is called cancelled is so a little later
    wait_until(lambda: running.run(run_id)["state_type"] == "CANCELLED", "the run is not cancelled")


def test_a_run_that_would_cost_more_than_the_limit_asks_first(running: Running) -> None:
    """Work on GPUs has its price in the question; who cancels a run that waits leaves nothing."""
    on_gpu = {"world": TINY_WORLD, "full": {"device": "cuda"}}
    run_id = running.submit(stop_after="train/full", cost_limit=0, preflight=False, overrides=on_gpu)
    assert "US dollars" in asked(running, run_id)
    running.api.cancel(run_id)
    wait_until(lambda: running.run(run_id)["state_type"] == "CANCELLED", "a suspended run is not cancelled")
    assert running.children(run_id) == {}


# ---- a comparison ----


@pytest.mark.timeout(1500)
def test_rows_are_trained_by_runs_of_their_own_once_and_end_in_one_page(running: Running) -> None:
    """What rows share is one run; asked once more nothing runs, and the same page is named."""
    tiny = {
        "world": TINY_WORLD | {"num_prompts": 4},
        "full": {"num_steps": 2, "batch_size": 4},
        "spatial": {"num_steps": 2, "keep_every_steps": 1, "batch_size": 4},
        "evaluation": {"sampler": {"num_steps": 2}},
    }
    asked = {"rows": ["F-Spa-DIR"], "seeds": [0], "overrides": tiny}
    run_id = running.submit("compare/strategies", **asked)
    run = wait_until(lambda: (it := running.run(run_id))["state_type"] in FINAL and it, "no comparison", 1200)
    assert run["state_type"] == "COMPLETED", run["state"]
    assert set(running.children(run_id)) == set(STAGES[:5])
    again = running.ended(running.submit("compare/strategies", **asked))
    assert again["state"]["message"] == run["state"]["message"]
    assert running.children(again["id"]) == {}
    assert run["state"]["message"].endswith("/compare.html")


def test_a_comparison_without_a_known_truth_is_refused_in_a_sentence(running: Running) -> None:
    run = running.ended(running.submit("compare/strategies", recipe="paper"))
    assert run["state_type"] == "FAILED" and "no small world" in run["state"]["message"]
