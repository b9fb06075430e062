"""What is known of the metrics before anything is measured, and why one cannot be."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from vc2.eval.config import EvaluateStage
from vc2.eval.formulas import Mode
from vc2.eval.look import READINGS
from vc2.eval.metrics import EVALCRAFTER, METRICS, MODES, VBENCH_QUALITY, Given, modes_of, what_it_takes
from vc2.pretrained import WEIGHTS


def lacks(name: str, mode: Mode, given: Given) -> str:
    return what_it_takes(METRICS[name], mode, given)[0]


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
    reason = lacks(name, "compat", Given())
    assert all(weight in reason for weight in lacking) and bool(lacking) == reason.startswith("weights not found: ")


def test_flow_without_weights_and_files_given_by_name_are_at_hand(tmp_path: Path) -> None:
    """A file that is not there is said to be missing before anything runs."""
    assert "raft-things" in lacks("Flow_Score", "compat", Given())
    assert not lacks("Flow_Score", "compat", Given(flow="dis"))
    assert "there is no" in lacks("IS", "compat", Given(files={"inception-2015-12-05": str(tmp_path / "x")}))
    (tmp_path / "x").write_bytes(b"weights")
    assert not lacks("IS", "compat", Given(files={"inception-2015-12-05": str(tmp_path / "x")}))
    assert "clip-vit-b-32" in lacks("Action_Score", "compat", Given(flow="dis"))
    with pytest.raises(ValidationError, match="no weights are called 'dovr'"):
        EvaluateStage(files={"dovr": "x"})


def test_data_that_only_the_user_has_is_asked_for_by_its_setting(tmp_path: Path) -> None:
    files = dict.fromkeys(WEIGHTS, str(tmp_path))
    assert "evaluation.references" in lacks("SD_Score", "compat", Given(files=files))
    assert "evaluation.photos" in lacks("Celebrity_ID_Score", "compat", Given(files=files))
    images = tmp_path / "images"
    images.mkdir()
    assert "no images in it" in lacks("SD_Score", "fixed", Given(files=files, references=str(images)))
    (images / "references.json").write_text('{"complete": false, "digest": ""}')
    assert "not all images are painted" in lacks("SD_Score", "fixed", Given(files=files, references=str(images)))
    (images / "references.json").write_text('{"complete": true, "digest": "d"}')
    assert not lacks("SD_Score", "fixed", Given(files=files, references=str(images)))


def test_what_needs_no_mending_is_measured_once() -> None:
    assert modes_of(METRICS["IS"], MODES) == modes_of(METRICS["IS"], ("fixed",)) == ("compat",)
    assert modes_of(METRICS["CLIP_Score"], MODES) == MODES


def test_an_unknown_metric_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValidationError, match="VQA_A"):
        EvaluateStage(metrics=("FVD",))  # type: ignore[arg-type]


def test_what_it_is_measured_with_is_part_of_what_an_evaluation_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a scorecard without weights, or with others, would stand for one with them."""
    monkeypatch.delenv("VC2_MIRROR", raising=False)
    stage = EvaluateStage(metrics=("CLIP_Temp",))
    without = stage.with_metrics()
    assert set(without.not_measured) == {"CLIP_Temp/compat", "CLIP_Temp/fixed"} and not without.measured_with
    place = tmp_path / WEIGHTS["clip-vit-b-32"].file
    place.parent.mkdir()
    place.write_bytes(b"weights")
    monkeypatch.setenv("VC2_MIRROR", str(tmp_path))
    found = stage.with_metrics()
    assert not found.not_measured and found.identity() != without.identity()
    assert without.with_metrics() == without  # who is told what it is measured with keeps to that
    other = tmp_path / "other"
    other.write_bytes(b"weighty")
    assert stage.evolve(files={"clip-vit-b-32": str(other)}).with_metrics().identity() != found.identity()


def test_another_photograph_is_another_evaluation(tmp_path: Path) -> None:
    """Also one of the same name and size."""
    (tmp_path / "one.png").write_bytes(b"x")
    files = dict.fromkeys(("vgg-face", "opencv-haar-face"), str(tmp_path / "one.png"))
    stage = EvaluateStage(metrics=("Celebrity_ID_Score",), photos=str(tmp_path), files=files)
    before = stage.with_metrics().measured_with
    assert before
    (tmp_path / "two.png").write_bytes(b"a")
    between = stage.with_metrics().measured_with
    (tmp_path / "two.png").write_bytes(b"b")
    assert len({str(found) for found in (before, between, stage.with_metrics().measured_with)}) == 3
