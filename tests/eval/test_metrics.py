"""What is known of the metrics before anything is measured, and why one cannot be."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from vc2.eval.config import EvaluateStage
from vc2.eval.look import READINGS
from vc2.eval.metrics import EVALCRAFTER, METRICS, MODES, VBENCH_QUALITY, Needs, modes_of, why_not
from vc2.pretrained import WEIGHTS


def test_the_table_is_whole() -> None:
    """Every metric has a reading; every weight that one needs is in the table of foreign weights."""
    assert (*EVALCRAFTER, *VBENCH_QUALITY) == tuple(METRICS) == tuple(READINGS)
    assert len(EVALCRAFTER) == 17 and len(VBENCH_QUALITY) == 7
    for metric in METRICS.values():
        for mode in MODES:
            assert set(metric.weights_in(mode)) <= WEIGHTS.keys(), metric.name


@pytest.mark.parametrize("name", METRICS)
def test_without_its_weights_a_metric_says_which(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has neither weights nor a package on this machine is named; what needs none is measured."""
    monkeypatch.delenv("VC2_MIRROR", raising=False)
    metric = METRICS[name]
    lacking = [weight for weight in metric.weights_in("compat") if not WEIGHTS[weight].package]
    reason = why_not(metric, "compat", Needs())
    assert all(weight in reason for weight in lacking) and bool(lacking) == reason.startswith("weights not found: ")


def test_flow_without_weights_and_files_given_by_name_are_at_hand(tmp_path: Path) -> None:
    assert "raft-things" in why_not(METRICS["Flow_Score"], "compat", Needs())
    assert not why_not(METRICS["Flow_Score"], "compat", Needs(flow="dis"))
    assert not why_not(METRICS["IS"], "compat", Needs(files={"inception-2015-12-05": str(tmp_path)}))
    assert "clip-vit-b-32" in why_not(METRICS["Action_Score"], "compat", Needs(flow="dis"))


def test_data_that_only_the_user_has_is_asked_for_by_its_setting() -> None:
    files = dict.fromkeys(WEIGHTS, "x")
    assert "evaluation.references" in why_not(METRICS["SD_Score"], "compat", Needs(files=files))
    assert "evaluation.photos" in why_not(METRICS["Celebrity_ID_Score"], "compat", Needs(files=files))
    assert not why_not(METRICS["SD_Score"], "fixed", Needs(files=files, references="here"))


def test_what_needs_no_mending_is_measured_once() -> None:
    assert modes_of(METRICS["IS"], MODES) == modes_of(METRICS["IS"], ("fixed",)) == ("compat",)
    assert modes_of(METRICS["CLIP_Score"], MODES) == MODES


def test_an_unknown_metric_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValidationError, match="VQA_A"):
        EvaluateStage(metrics=("FVD",))  # type: ignore[arg-type]


def test_weights_that_arrive_change_what_an_evaluation_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a scorecard without them would stand for one with them."""
    monkeypatch.delenv("VC2_MIRROR", raising=False)
    stage = EvaluateStage(metrics=("CLIP_Temp",))
    without = stage.with_metrics()
    assert without.not_measured == ("CLIP_Temp/compat", "CLIP_Temp/fixed")
    place = tmp_path / WEIGHTS["clip-vit-b-32"].file
    place.parent.mkdir()
    place.write_bytes(b"weights")
    monkeypatch.setenv("VC2_MIRROR", str(tmp_path))
    assert stage.with_metrics().not_measured == () and stage.with_metrics().identity() != without.identity()
    photos = tmp_path / "photos"
    photos.mkdir()
    before = stage.evolve(photos=str(photos)).with_metrics().identity()
    (photos / "one.png").write_bytes(b"x")
    assert stage.evolve(photos=str(photos)).with_metrics().identity() != before
