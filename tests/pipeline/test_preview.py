"""What a plan predicts: by what was measured, else by counted operations, else nothing; and what was spent."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.counted import stages_of
from tests.pipeline.finished import SECONDS, finish
from vc2.artifacts import commit, load_manifest
from vc2.cli import main
from vc2.config import merge
from vc2.errors import ConfigError, SourceError
from vc2.pipeline.driver import FIELDS, asked_of, plan
from vc2.pipeline.preview import PlanRow, growth, lines_of, previewed, spent, total
from vc2.pipeline.recipes import PipelineConfig, resolve
from vc2.pipeline.table3 import Row
from vc2.storage import LocalStore
from vc2.train.attempts import Attempt, Run, StateManifest, StateRef, this_process
from vc2.train.config import Layout
from vc2.train.counted import SHIPPED, NotCounted, Recorded
from vc2.train.estimate import HARDWARE, MFU, estimate

ON_GPUS: dict[str, Any] = {"full": {"device": "cuda"}, "spatial": {"device": "cuda"}}


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    return resolve("miniature", work=tmp_path)


def rows_of(config: PipelineConfig, store: LocalStore, **terms: Any) -> dict[str, PlanRow]:
    return {row.stage: row for row in previewed(plan(config, store), config, store, **terms)}


def begin(config: PipelineConfig, store: LocalStore, step: int) -> Run:
    """A run of the first training stage that has come to a step, in two attempts; of the first, ten steps were lost."""
    name = next(stage.fingerprint for stage in plan(config, store) if stage.name == "train/full")
    run, layout = Run(store, "full", name), Layout(world_size=2, micro_batch=4, threads=1)
    asked = {"stage": {"device": config.full.device}}
    for number, start in ((1, None), (2, StateRef(attempt=1, step=step))):
        assert run.claim(
            Attempt(
                number=number, start=start, layout=layout, holder=this_process(), heartbeat_seconds=60, request=asked
            )
        )
    state = StateManifest(attempt=1, step=step, samples=0, ema_updates=0, updates=0, layout=layout, files=())
    store.write(f"{run.state_prefix(state.ref)}/manifest.json", state.model_dump_json().encode())
    lines = [{"step": n, "loss": 1.0, "seconds": 360.0} for n in range(1, step + 11)]
    store.write(run.metrics_key(1, 0), "".join(f"{json.dumps(line)}\n" for line in lines).encode())
    store.write(run.metrics_key(2, step), json.dumps({"step": step, "val_loss_ema": 1.0}).encode())
    return run


def test_what_was_measured_holds_for_the_same_work(config: PipelineConfig, store: LocalStore) -> None:
    """Another learning rate takes as long, twice the steps twice as long; another batch was never measured."""
    finish(config, store)
    assert all(row.hours is None and row.usd is None for row in rows_of(config, store).values())  # all done
    slower = rows_of(merge(config, {"full": {"optimizer": {"lr": 1e-4}, "num_steps": 2200}}), store)
    assert slower["train/full"].hours == pytest.approx(2 * SECONDS / 3600)
    assert slower["train/spatial"].hours == pytest.approx(SECONDS / 3600)
    assert slower["train/full"].basis.startswith("measured, as in runs/full/")
    assert slower["train/full"].gpu_hours == 0 and slower["train/full"].usd is None  # two CPU ranks
    for change in ({"batch_size": 16}, {"world_size": 1}, {"model": {"unet": {"model_channels": 64}}}):
        assert rows_of(merge(config, {"full": change}), store)["train/full"].hours is None
    smaller = {"webvid": {"form": {"width": 64}}}
    assert rows_of(merge(config, smaller), store)["train/full"].hours is None


def test_shards_take_as_long_as_rows_of_the_same_raw_data(
    config: PipelineConfig, store: LocalStore, tmp_path: Path
) -> None:
    finish(config, store)
    other = rows_of(merge(config, {"webvid": {"seed": 5}}), store)["shard/webvid"]
    assert other.hours == pytest.approx(SECONDS / 3600) and other.bytes == 1000
    half = rows_of(merge(config, {"webvid": {"seed": 5, "limit": 120}}), store)["shard/webvid"]
    assert half.hours == pytest.approx(SECONDS / 7200) and half.bytes == 500
    for strange in (
        merge(config, {"webvid": {"form": {"width": 64}}}),
        resolve("miniature", {"world": {"seed": 7}}, work=tmp_path),
    ):
        row = rows_of(strange, store)["shard/webvid"]
        assert row.hours is None and row.cells()["time"] == "?" and "--dry-run" in row.basis


def rewritten(store: LocalStore, prefix: str, **changes: Any) -> None:
    """An artifact as it would be noted with other facts."""
    manifest = load_manifest(store, prefix)
    store.delete(f"{prefix}/manifest.json")
    commit(store, prefix, manifest.evolve(**changes))


def test_a_set_that_was_resumed_has_measured_nothing(config: PipelineConfig, store: LocalStore) -> None:
    """Its seconds are those of the last attempt alone."""
    made = finish(config, store)["shard/webvid"]
    other = merge(config, {"webvid": {"seed": 5}})
    facts = load_manifest(store, made.prefix).facts
    for resumed, is_measured in (({}, True), ({"resumed_shards": 2}, False), ({"resumed_parts": 2}, False)):
        rewritten(store, made.prefix, facts=facts | resumed)
        assert (rows_of(other, store)["shard/webvid"].hours is not None) == is_measured


def test_bytes_are_those_that_the_store_still_grows_by(config: PipelineConfig, store: LocalStore) -> None:
    """What a stage has stored already is not asked for again."""
    finish(config, store)
    longer = merge(config, {"full": {"seed": 5}})
    whole = rows_of(longer, store)["train/full"].bytes or 0
    run = begin(longer, store, 90)
    there = sum(entry.size for entry in store.list(f"{run.prefix}/states/"))
    store.write(f"{run.state_prefix(StateRef(attempt=1, step=90))}/rank-0-master.safetensors", bytes(5000))
    assert rows_of(longer, store)["train/full"].bytes == whole - there - 5000
    other = merge(config, {"webvid": {"seed": 5}})
    prefix = next(stage.prefix for stage in plan(other, store) if stage.name == "shard/webvid")
    store.write(f"{prefix}/planned.json", b'{"shards": 4}')
    store.write(f"{prefix}/parts/shard-000000.0123456789abcdef.parquet", b"built")
    row = rows_of(other, store)["shard/webvid"]
    assert (row.state, row.bytes) == ("partial", 750)
    assert row.hours == pytest.approx(0.75 * (SECONDS - 60) / 3600)  # 60 of them were for fetching, which is over
    assert growth(plan(longer, store), longer, store, ["train/full"]) == whole - there - 5000
    assert growth(plan(config, store), config, store, [*FIELDS]) == 0


def test_hours_on_gpus_are_those_of_a_dry_run(config: PipelineConfig, store: LocalStore) -> None:
    """The same arithmetic on the same counts, for the rest of a run too; cost by price, and by none on CPUs."""
    on_gpus = merge(config, ON_GPUS)
    for stage, (wanted, forms) in zip(("train/full", "train/spatial"), stages_of("miniature"), strict=True):
        assert rows_of(config, store)[stage].hours is None  # nobody knows the CPU
        row = rows_of(on_gpus, store, hardware="h100-80", price=4.0, mfu=0.5)[stage]
        whole = estimate(wanted, forms, hardware="h100-80", mfu=0.5, price=4.0, counts=SHIPPED)
        assert row.hours == pytest.approx(whole.hours) and row.gpu_hours == pytest.approx(whole.gpu_hours)
        assert row.usd == pytest.approx(whole.usd) and "MFU 50%" in row.basis
    begin(on_gpus, store, 275)
    row = rows_of(on_gpus, store)["train/full"]
    assert row.state == "partial" and row.why.startswith("step 275 of 1100; ")
    [(wanted, forms), _] = stages_of("miniature")
    whole = estimate(wanted, forms, counts=SHIPPED)
    assert row.hours == pytest.approx(whole.hours * 3 / 4)
    assert estimate(wanted, forms, done=275, counts=SHIPPED).hours == pytest.approx(row.hours)


def test_a_gpu_run_was_measured_only_on_the_gpu_that_is_asked_for(config: PipelineConfig, store: LocalStore) -> None:
    on_gpus = merge(config, ON_GPUS)
    finish(on_gpus, store, device="cuda")  # on which one is not known
    row = rows_of(merge(on_gpus, {"full": {"seed": 4}}), store)["train/full"]
    assert row.basis.startswith(f"counted operations at MFU {MFU:.0%} on a100-80")
    seeded = merge(on_gpus, {"full": {"seed": 5}})
    finish(seeded, store, device="cuda", gpu="NVIDIA A100-SXM4-80GB")
    again = merge(seeded, {"full": {"seed": 6}})
    row = rows_of(again, store)["train/full"]
    assert row.basis.startswith("measured") and row.gpu_hours == pytest.approx(2 * SECONDS / 3600)
    assert rows_of(again, store, hardware="h100-80")["train/full"].basis.startswith("counted")
    assert rows_of(again, store, hardware="a100-40")["train/full"].basis.startswith("counted")


def test_what_is_not_known_stays_empty(config: PipelineConfig, store: LocalStore) -> None:
    """A network that nobody counted; the total leaves it out and says so."""
    strange = merge(config, ON_GPUS | {"full": {"device": "cuda", "model": {"unet": {"num_res_blocks": 2}}}})
    rows = [*rows_of(strange, store).values()]
    by_name = {row.stage: row for row in rows}
    assert by_name["train/full"].hours is None and "--dry-run counts" in by_name["train/full"].basis.replace("`", "")
    assert by_name["train/full"].cells()["USD"] == "?"
    found = total(rows)
    assert found.unknown == tuple(row.stage for row in rows if row.hours is None)
    assert found.hours == by_name["train/spatial"].hours and "train/full" in found.line()
    with pytest.raises(ConfigError, match="take one of"):
        rows_of(config, store, hardware="abacus")


def test_the_total_is_the_sum(config: PipelineConfig, store: LocalStore) -> None:
    finish(config, store)
    changed = merge(config, {"full": {"seed": 5}})
    rows = [*rows_of(changed, store).values()]
    found = total(rows)
    todo = [row for row in rows if row.state != "done"]
    assert found.stages == len(todo) == 3 and found.usd == 0
    assert found.hours == pytest.approx(sum(row.hours or 0 for row in todo))
    assert "USD" not in found.line()
    text = "\n".join(lines_of(rows, found))
    assert "full.seed 0 -> 5" in text and text.endswith(found.line())
    assert total([row for row in rows if row.state == "done"]).line().startswith("nothing is to do")


def test_what_was_spent_is_added_up_over_attempts(config: PipelineConfig, store: LocalStore) -> None:
    """Lost steps were paid for too. Runs on CPUs have CPU-hours and no price."""
    assert spent(plan(config, store), store) == []
    on_gpus = merge(config, ON_GPUS)
    begin(on_gpus, store, 90)  # with ten steps that were lost: 100 of 0.1 hours, on two ranks
    [row] = spent(plan(on_gpus, store), store, hardware="h100-80")
    assert (row.stage, row.state) == ("train/full", "partial")
    assert row.hours == pytest.approx(10) and row.gpu_hours == pytest.approx(20)
    assert row.usd == pytest.approx(20 * HARDWARE["h100-80"].usd_per_hour) and row.cpu_hours == 0
    other = merge(config, {"full": {"seed": 9}})
    begin(other, store, 90)
    [row] = spent(plan(other, store), store)
    assert row.cpu_hours == pytest.approx(20) and row.gpu_hours == 0 and row.usd is None
    assert row.cells()["USD"] == ""


def test_a_report_costs_what_its_samples_and_scores_have_cost(config: PipelineConfig, store: LocalStore) -> None:
    """Those of the base too."""
    report = finish(config, store)["evaluate/evalcrafter"]
    inputs = dict(load_manifest(store, report.prefix).inputs)
    for role, kind in (("samples", "sample_set"), ("base_samples", "sample_set"), ("scores", "scorecard")):
        manifest = load_manifest(store, report.prefix).evolve(kind=kind, inputs={}, seconds=SECONDS)
        inputs[role] = commit(store, f"{role}/1", manifest)
    rewritten(store, report.prefix, inputs=inputs, seconds=1.0)
    [row] = [row for row in spent(plan(config, store), store) if row.stage == "evaluate/evalcrafter"]
    assert row.hours == pytest.approx(3 * SECONDS / 3600)


def test_what_is_left_out_of_a_run_is_left_out_of_its_plan(config: PipelineConfig, store: LocalStore) -> None:
    """But not what it needs."""
    planned = plan(config, store)
    names = [stage.name for stage in asked_of(planned, "train/spatial", "train/spatial")]
    assert names == ["shard/jdb", "train/full", "train/spatial"]
    assert [stage.name for stage in asked_of(planned)] == [*FIELDS]


def test_the_command_prints_a_table_or_all_of_it_as_json(
    config: PipelineConfig, store: LocalStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = finish(config, store)
    where = ["--store", store.uri, "--work", str(tmp_path), "--set", "full.optimizer.lr=1e-4"]
    assert main(["plan", *where]) == 0
    out = capsys.readouterr().out
    assert out.startswith("stage ") and "full.optimizer.lr 0.0015 -> 0.0001" in out and "3 stages to do" in out
    assert main(["plan", *where, "--json", "--against", made["train/full"].uri, "--hardware", "h100-80"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total"]["stages"] == 3 and found["total"]["hardware"] == "h100-80"
    stage = next(stage for stage in found["stages"] if stage["stage"] == "train/full")
    assert stage["differences"][0] == {
        "key": "full.optimizer.lr", "before": 0.0015, "now": 0.0001, "words": "", "causes": [],
    }  # fmt: skip
    assert stage["compared_with"] == made["train/full"].uri
    assert main(["plan", *where, "--stop-after", "shard/jdb", "--start-at", "shard/jdb"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("shard/jdb")
    assert main(["plan", *where, "--hardware", "abacus"]) == 1
    assert "take one of a100-40" in capsys.readouterr().err


# ---- counts that were shipped ----


def check_counts(recipe: str, row: str = "") -> None:
    """All that the stages of a recipe ask for is shipped, and is what is counted now."""
    from vc2.train.memory import COUNTING

    again = Recorded({}, COUNTING)
    for stage, forms in stages_of(recipe, row):
        now = estimate(stage, forms, counts=again)
        assert estimate(stage, forms, counts=SHIPPED) == now
    assert again.entries


def test_the_counts_of_the_miniature_are_those_of_its_networks() -> None:
    """Else: python -m benchmarks.counted."""
    check_counts("miniature")


@pytest.mark.soak
@pytest.mark.parametrize("recipe", ["single_gpu", "paper"])
def test_the_counts_of_the_large_recipes_are_those_of_their_networks(recipe: str) -> None:
    """Else: python -m benchmarks.counted."""
    for row in ("", *Row):
        check_counts(recipe, row)


@pytest.mark.parametrize("recipe", ["miniature", "single_gpu", "paper"])
def test_every_row_of_table_3_was_counted(recipe: str) -> None:
    """For the paper: 6,200 GPU-hours of the first stage, 130 of the second, as its recipe says."""
    hours = []
    for row in ("", *Row):
        for stage, forms in stages_of(recipe, row):
            hours.append(estimate(stage, forms, counts=SHIPPED).gpu_hours)
    assert all(hours)
    if recipe == "paper":
        assert (round(hours[0], -2), round(hours[1], -1)) == (6200, 130)
    [(stage, forms), _] = stages_of(recipe)
    wider = stage.model.evolve(unet=stage.model.unet.evolve(model_channels=stage.model.unet.model_channels * 2))
    with pytest.raises(NotCounted):
        estimate(stage.evolve(model=wider), forms, counts=SHIPPED)


def test_what_training_costs_is_told_before_there_is_any_data(tmp_path: Path, store: LocalStore) -> None:
    """On a bare machine nothing has a fingerprint, each stage says what lacks, and the paper's hours are counted."""
    config = resolve("paper", work=tmp_path / "work", bind=False)
    planned = plan(config, store, tolerant=True)
    rows = {row.stage: row for row in previewed(planned, config, store)}
    assert {stage.fingerprint for stage in planned} == {""}
    assert "does not exist" in rows["shard/webvid"].why
    assert "shard/webvid" in rows["train/full"].why
    assert "prompts" in rows["evaluate/evalcrafter"].why
    assert (rows["train/full"].gpu_hours or 0) > 1000
    with pytest.raises(SourceError, match="does not exist"):
        plan(config, store)
