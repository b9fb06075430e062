import csv
import json
from pathlib import Path

import numpy as np
import pytest

from vc2.artifacts import Manifest, SampleSet, commit, put_file, verify
from vc2.data.video_files import encode_mp4
from vc2.errors import Vc2Error
from vc2.eval.config import EvaluateStage, Prompt
from vc2.eval.measure_rank import main
from vc2.eval.metrics import EVALCRAFTER, METRICS, Video
from vc2.eval.scorecard import (
    ASPECTS,
    aspect_scores,
    partial_aspect_scores,
    plain_averages,
    score,
    summarise,
    warnings_of,
)
from vc2.progress import Progress
from vc2.storage import LocalStore

REFERENCE = Path(__file__).parents[1] / "reference" / "evalcrafter"
ASPECT_NAMES = ("visual_quality", "text_video_alignment", "motion_quality", "temporal_consistency")


def rows(name: str) -> dict[tuple[str, str], dict[str, str]]:
    with open(REFERENCE / name, newline="") as file:
        return {(row["model"], row.get("version", "")): row for row in csv.DictReader(file)}


def raw_of(row: dict[str, str]) -> dict[str, float]:
    return {name: float(row[name]) for name in EVALCRAFTER}


PUBLISHED = {
    model: row for model, row in rows("raw_metrics_2024.csv").items() if model in rows("aspect_scores_2024.csv")
}
ANY_RAW = raw_of(next(iter(PUBLISHED.values())))


@pytest.mark.parametrize("model", PUBLISHED, ids=lambda model: model[0])
def test_published_rows_are_reproduced(model: tuple[str, str]) -> None:
    """The aspects of every model of 2024 follow from its raw metrics to 0.1, the total to 1."""
    scores, row = aspect_scores(raw_of(PUBLISHED[model])), rows("aspect_scores_2024.csv")[model]
    assert [scores[name] for name in ASPECT_NAMES] == pytest.approx(
        [float(row[name]) for name in ASPECT_NAMES], abs=0.1
    )
    assert scores["total"] == pytest.approx(float(row["final_sum"]), abs=1)


def test_a_third_party_row_is_reproduced() -> None:
    """A row that another paper scored follows from its raw metrics, too."""
    scores = aspect_scores(raw_of(rows("raw_metrics_third_party.csv")["Pyramid-Flow", ""]))
    row = rows("aspect_scores_third_party.csv")["Pyramid-Flow", ""]
    for name in ("visual_quality", "motion_quality", "temporal_consistency"):
        assert scores[name] == pytest.approx(float(row[name]), abs=0.01)
    assert scores["total"] == pytest.approx(float(row["final_sum"]), abs=1)


def test_coefficients_are_the_published_ones() -> None:
    """Every weight and intercept is the published one to the last digit."""
    published = json.loads((REFERENCE / "alignment_coefficients.json").read_text())["aspects"]
    for name, aspect in ASPECTS.items():
        assert aspect.intercept == published[name]["intercept"]
        assert [term.weight for term in aspect.terms] == published[name]["weight"]
        for term, x in zip(aspect.terms, published[name]["x"], strict=True):
            assert term.metric in x and term.from_one == x.startswith("1 - ")


@pytest.mark.parametrize(("action", "amplitude"), [(0, 0), (1, 0), (0, 1), (0.7, 0.4)])
def test_a_still_video_has_the_law_of_the_spec(action: float, amplitude: float) -> None:
    """Without flow the motion score is 64.88 - 8.21 Action - 6.70 AC, and no moving video beats it."""
    still = ANY_RAW | {"Flow_Score": 0.0, "Action_Score": 100 * action, "Motion_AC_Score": 100 * amplitude}
    expected = 64.88 - 8.21 * action - 6.70 * amplitude
    assert aspect_scores(still)["motion_quality"] == pytest.approx(expected, abs=0.01)
    assert aspect_scores(still | {"Flow_Score": 3.0})["motion_quality"] < expected


@pytest.mark.parametrize("missing", EVALCRAFTER)
def test_a_missing_metric_withholds_what_needs_it(missing: str) -> None:
    """One missing metric costs its aspect and the total; the error names it, the other aspects stand."""
    raw = {name: value for name, value in ANY_RAW.items() if name != missing}
    with pytest.raises(Vc2Error, match=rf"1 of 17 metrics missing: {missing};"):
        aspect_scores(raw)
    with pytest.raises(ValueError, match=missing):
        aspect_scores(raw | {missing: float("nan")})
    scores, withheld = partial_aspect_scores(raw)
    assert set(withheld) == {METRICS[missing].aspect, "total"}
    whole = aspect_scores(ANY_RAW)
    assert scores == {name: whole[name] for name in ASPECT_NAMES if name not in withheld}


def test_other_columns_of_a_table_do_no_harm() -> None:
    """A row as a CSV reader gives it, with its model's name and numbers as text, scores the same."""
    row = next(iter(PUBLISHED.values()))
    assert aspect_scores(row) == aspect_scores(raw_of(row))  # type: ignore[arg-type]


def test_a_summary_counts_only_what_applies() -> None:
    """A figure's mean is over the videos that have it; zeros and ones make a share."""
    summary = summarise([{"colour": 1.0, "sharp": 0.5}, {"colour": 0.0}, {"colour": 1.0, "sharp": 0.7}])
    assert (summary["colour"].mean, summary["colour"].n, summary["colour"].is_share) == (pytest.approx(2 / 3), 3, True)
    assert (summary["sharp"].mean, summary["sharp"].n, summary["sharp"].is_share) == (pytest.approx(0.6), 2, False)


def brightness(frames: np.ndarray, prompt: Prompt, fps: float) -> dict[str, float]:
    level = float(frames.mean())
    right = float("nan") if "level" not in prompt.attributes else float(abs(level - prompt.attributes["level"]) < 8)
    return {"level": level, "right": right, "fps": fps}


def sample_set(store: LocalStore, levels: dict[str, int]) -> SampleSet:
    files = []
    for name, level in levels.items():
        frames = np.full((4, 16, 16, 3), level, np.uint8)
        files.append(put_file(store, "samples/s", f"{name}.mp4", encode_mp4(frames, 8)))
    manifest = Manifest(
        kind="sample_set",
        stage="sample",
        stage_version=1,
        fingerprint="s",
        config={"play_fps": 8},
        inputs={},
        files=tuple(files),
    )
    reference = commit(store, "samples/s", manifest)
    assert isinstance(reference, SampleSet)
    return reference


def test_a_scorecard_holds_a_line_per_video_and_says_what_is_not_measured(tmp_path: Path) -> None:
    """Judges are handed in, other sets stand beside; without weights every metric and aspect has a reason."""
    store = LocalStore(tmp_path)
    samples = sample_set(store, {"a": 40, "b": 200})
    config = EvaluateStage(
        prompts=(Prompt(id="a", text="dark", attributes={"level": 40}), Prompt(id="b", text="anything")), play_fps=8
    )
    real = [Video("a", 8.0, lambda: np.full((4, 16, 16, 3), 100, np.uint8))]
    config = config.evolve(flow="dis", mode="both").with_metrics()
    card = score(
        config, store, tmp_path / "work", fingerprint="f", samples=samples, judge=brightness,
        others={"real clips": real}, launch=in_process,
    )  # fmt: skip
    lines = [json.loads(line) for line in store.read("scores/f/videos.jsonl").splitlines()]
    assert [(line["set"], line["id"]) for line in lines] == [("samples", "a"), ("samples", "b"), ("real clips", "a")]
    assert "right" not in lines[1]["judges"]

    summary = json.loads(store.read("scores/f/summary.json"))
    assert summary["judges"]["samples"]["right"] == {"mean": 1.0, "n": 1, "is_share": True}
    assert summary["judges"]["samples"]["level"]["n"] == 2
    assert summary["judges"]["real clips"]["right"]["mean"] == 0.0
    benchmark = summary["benchmark"]
    assert benchmark["prompts"] == {
        "total": 2, "of_benchmark": 0, "whole_list": False, "without_scoring_text": 0,
    }  # fmt: skip
    assert benchmark["videos"] == {"expected": 2, "scored": 2, "rejected": {}}
    assert any("videos of 0 of the benchmark's 700 prompts" in said for said in benchmark["warnings"])
    for mode in ("compat", "fixed"):
        said = benchmark["modes"][mode]
        metrics = said["metrics"]
        assert set(metrics) == set(EVALCRAFTER)
        measured = [name for name, found in metrics.items() if "value" in found]
        assert set(measured) == {"Warping_Error", "Flow_Score"} and metrics["Warping_Error"]["n"] == 2
        assert metrics["Flow_Score"]["value"] == 0.0 and "DIS" in metrics["Flow_Score"]["note"]
        assert metrics["VQA_A"]["not_measured"].startswith("weights not found: dover")
        assert said["aspects"] == {} and set(said["withheld"]) == {*ASPECT_NAMES, "total"}
    assert "fitted to compat" in benchmark["modes"]["fixed"]["withheld"]["total"]
    read = [json.loads(line) for line in store.read("scores/f/metrics.jsonl").splitlines()]
    assert [(line["id"], line["metric"], line["mode"]) for line in read] == [
        (video, metric, mode)
        for video in ("a", "b")
        for metric in ("Warping_Error", "Flow_Score")
        for mode in ("compat", "fixed")
    ]
    assert card.counts == {"videos": 2, "sets": 2, "metrics_measured": 2}
    assert not [*verify(store, "scores/f")]
    assert score(config, store, tmp_path / "work", fingerprint="f", samples=samples, judge=None) == card


def in_process(module: str, job: str, *, world_size: int, work: Path, name: str, progress: Progress) -> None:
    main(job)


def test_plain_averages_impute_nothing_and_turn_errors_around() -> None:
    """Given where all metrics of an aspect are; what is no percentage is left out."""
    averages = plain_averages({"VQA_A": 40.0, "VQA_T": 60.0, "IS": 17.0, "Flow_Score": 3.0, "Warping_Error": 0.25})
    assert averages == {"visual_quality": 50.0}
    assert plain_averages({"Action_Score": 70.0, "Motion_AC_Score": 50.0}) == {"motion_quality": 60.0}
    temporal = {"CLIP_Temp": 90.0, "Face_Consistency": 95.0, "Warping_Error": 0.25}
    assert plain_averages(temporal)["temporal_consistency"] == pytest.approx((90 + 95 + 75) / 3)


def whole(raw: dict[str, float]) -> dict[str, dict[str, object]]:
    return {name: {"value": value, "note": METRICS[name].note} for name, value in raw.items()}


def test_where_the_formula_misleads_the_reader_is_warned() -> None:
    """A still video wins motion, a thousandth of CLIP_Temp moves the temporal aspect, no text is perfect text."""
    raw = ANY_RAW | {"Flow_Score": 0.0, "OCR_Score": 0.0}
    modes = {"compat": {"metrics": whole(raw), "aspects": aspect_scores(raw)}}
    said = " ".join(warnings_of(EvaluateStage(prompts=()), modes, 700))
    for words in ("still video", "64.88", "thousandth of CLIP_Temp", "OCR_Score is 0", "SAM 2", "RapidOCR", "SD_Score"):
        assert words in said
    assert "of the benchmark's 700" not in said


def test_sensitivity_of_the_temporal_aspect_is_as_warned() -> None:
    moved = ANY_RAW | {"CLIP_Temp": ANY_RAW["CLIP_Temp"] + 0.1}
    change = aspect_scores(moved)["temporal_consistency"] - aspect_scores(ANY_RAW)["temporal_consistency"]
    assert change == pytest.approx(1.46, abs=0.01)


GOLDEN = json.loads((REFERENCE / "golden" / "final_scores.json").read_text())
SCRIPT_NAMES = {
    "VQA_A": "VQA_A", "VQA_T": "VQA_T", "IS": "IS", "CLIP_Temp": "clip_temp_score", "Warping_Error": "warping_error",
    "Face_Consistency": "face_consistency_score", "Action_Score": "action_score", "Motion_AC_Score": "motion_ac_score",
    "Flow_Score": "flow_score", "CLIP_Score": "clip_score", "BLIP_BLEU": "blip_bleu", "SD_Score": "sd_score",
    "Detection_Score": "detection_score", "Color_Score": "color_score", "Count_Score": "count_score",
    "OCR_Score": "ocr_score", "Celebrity_ID_Score": "celebrity_id_score",
}  # fmt: skip


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_recorded_aspects_follow_from_recorded_averages(case: dict[str, dict[str, float]]) -> None:
    """The scripts' own units: fractions, but for VQA (percent), IS (plain) and flow (pixels)."""
    plain = ("VQA_A", "VQA_T", "IS", "Warping_Error", "Flow_Score")
    raw = {name: case["raw"][theirs] * (1 if name in plain else 100) for name, theirs in SCRIPT_NAMES.items()}
    assert aspect_scores(raw) == pytest.approx(case["expected"], abs=1e-6)
