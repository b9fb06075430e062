"""The refit of the aspects: it finds the weights of a made population, counts every row, and rewards no stillness."""

import csv
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear

from vc2.artifacts import Manifest, Scorecard, commit, put_file
from vc2.errors import ConfigError, StoreError
from vc2.eval.measure import Line
from vc2.eval.metrics import METRICS
from vc2.eval.refit import Feedback, Opinion, Refit, SetScores, load_coefficients, read_feedback, read_scores, refit
from vc2.eval.scorecard import ASPECTS
from vc2.storage import LocalStore

PUBLISHED = Path(__file__).parents[1] / "reference" / "evalcrafter" / "alignment_coefficients.json"
PROMPTS = tuple(f"{number:04d}" for number in range(60))
MODELS = ("a", "b", "c")

#: Which prompts the metrics of some prompts look at; Detection_Score counts every sixth prompt twice.
SOME = {
    "Action_Score": lambda n: n % 3 == 0,
    "Motion_AC_Score": lambda n: n % 3 == 1,
    "Detection_Score": lambda n: n % 2 == 0,
    "Color_Score": lambda n: n % 5 == 0,
    "Count_Score": lambda n: n % 5 == 1,
    "OCR_Score": lambda n: n % 5 == 2,
    "Celebrity_ID_Score": lambda n: n % 5 == 3,
}
TRUE: dict[str, dict[str, float]] = {
    "visual_quality": {"VQA_A": 0.3, "VQA_T": 0.2, "IS": 0.5},
    "text_video_alignment": {
        "CLIP_Score": 0.2, "BLIP_BLEU": 0.05, "SD_Score": 0.1, "Detection_Score": 0.1, "Color_Score": 0.15,
        "Count_Score": 0.1, "OCR_Score": 0.2, "Celebrity_ID_Score": 0.1,
    },
    "motion_quality": {"Action_Score": 0.2, "Motion_AC_Score": 0.1, "Flow_Score": 2.0},
    "temporal_consistency": {"CLIP_Temp": 5.0, "Warping_Error": 0.5, "Face_Consistency": 0.2},
}  # fmt: skip
BASES = {"temporal_consistency": -5.0}


def counts(metric: str, prompt: str) -> int:
    """How often a metric's mean counts the video of a prompt."""
    if not SOME.get(metric, lambda _: True)(int(prompt)):
        return 0
    return 2 if metric == "Detection_Score" and int(prompt) % 6 == 0 else 1


def made_scores(
    seed: int = 0, models: Sequence[str] = MODELS, prompts: Sequence[str] = PROMPTS
) -> dict[str, SetScores]:
    """Random values of all 17 metrics."""
    rng = np.random.default_rng(seed)
    found = {}
    for number, model in enumerate(models):
        lines = []
        for prompt in prompts:
            for metric in (term.metric for aspect in ASPECTS.values() for term in aspect.terms):
                value = float(rng.uniform(0.99, 1) if metric == "CLIP_Temp" else rng.uniform(0, 0.6))
                value = 10 * value if metric == "Flow_Score" else value
                if times := counts(metric, prompt):
                    lines.append(Line(id=prompt, metric=metric, mode="compat", value=value, weight=times))
        found[model] = SetScores(tuple(lines), 10.0 + 3 * number + number % 2, f"scores/{model}")
    return found


def x_of(metric: str, value: float) -> float:
    term = next(term for aspect in ASPECTS.values() for term in aspect.terms if term.metric == metric)
    x = METRICS[metric].scale * value / term.unit
    return 1 - x if term.from_one else x


def label(aspect: str, lines: Mapping[str, Line], inception: float | None, true: Mapping[str, float]) -> float:
    """What people think of a video, 0..1: of its group of prompts, and of its metrics as often as they count."""
    found = BASES.get(aspect, 0.15)
    for metric, weight in true.items():
        if metric == "IS":
            found += weight * (inception or 0) / 100
        elif metric in lines:
            assert lines[metric].value is not None
            offset = 0.02 * len(metric) - 0.25 if metric in SOME else 0.0
            found += lines[metric].weight * (weight * x_of(metric, lines[metric].value or 0.0) + offset)
    return found


def by_video(scores: SetScores) -> dict[str, dict[str, Line]]:
    found: dict[str, dict[str, Line]] = {}
    for line in scores.lines:
        found.setdefault(line.id, {})[line.metric] = line
    return found


def made_rows(
    scores: Mapping[str, SetScores], true: Mapping[str, Mapping[str, float]] = TRUE, noise: float = 0.0
) -> list[dict[str, Any]]:
    """Opinions of two raters, whose noise cancels where there is none of its own."""
    rng, rows = np.random.default_rng(5), []
    for model, found in scores.items():
        for prompt, lines in by_video(found).items():
            labels = {aspect: label(aspect, lines, found.inception, of) for aspect, of in true.items()}
            for rater, bias in (("x", 0.125), ("y", -0.125)):
                opinions = {
                    aspect: float(np.clip(1 + 4 * (value + noise * rng.normal()) + bias, 1, 5))
                    for aspect, value in labels.items()
                }
                rows.append({"prompt_id": prompt, "model": model, "rater": rater} | opinions)
    return rows


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Feedback:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_feedback(path)


def printed(scores: SetScores, metric: str) -> float:
    lines = [line for line in scores.lines if line.metric == metric]
    total = math.fsum(line.weight for line in lines)
    return METRICS[metric].scale * math.fsum(line.weight * (line.value or 0.0) for line in lines) / total


def fitted(tmp_path: Path, seed: int = 0, models: int = 6, noise: float = 0.0, **changes: Any) -> Refit:
    scores = made_scores(seed, [f"m{number}" for number in range(models)])
    return refit(write(tmp_path / "rows.jsonl", made_rows(scores, noise=noise)), scores, **changes)


# ---- the fit ----


@pytest.mark.parametrize("aspect", TRUE)
def test_the_weights_of_a_made_population_are_found(tmp_path: Path, aspect: str) -> None:
    """Metrics of some prompts are weighed by the share of videos that they are read of; offsets do not disturb them."""
    found = fitted(tmp_path).aspects[aspect]
    for term in found.terms:
        share = sum(counts(term.metric, prompt) for prompt in PROMPTS) / len(PROMPTS)
        assert term.weight == pytest.approx(TRUE[aspect][term.metric] * share, rel=1e-6), term.metric


def test_the_aspect_of_a_set_is_the_mean_opinion_of_its_videos(tmp_path: Path) -> None:
    """What is fitted to videos holds for printed means: the published form says of a set what people say of it."""
    scores = made_scores(1, [f"m{number}" for number in range(5)])
    feedback = write(tmp_path / "rows.jsonl", made_rows(scores))
    for aspect, form in refit(feedback, scores).aspects.items():
        for model, found in scores.items():
            raw = {term.metric: printed(found, term.metric) for term in form.terms if term.metric != "IS"}
            said = [row.aspects[aspect] for row in feedback.opinions if row.model == model]
            mean = 100 * (math.fsum(said) / len(said) - 1) / 4
            assert form(raw | {"IS": found.inception or 0.0}) == pytest.approx(mean, abs=1e-6)


@given(st.integers(0, 10_000))
@settings(max_examples=15)
def test_weights_are_never_negative(seed: int) -> None:
    """Whatever people say, and although here they dislike what every metric likes."""
    scores = made_scores(seed, ["a", "b"], PROMPTS[:30])
    against = {name: dict.fromkeys(of, -0.2) for name, of in TRUE.items()}
    rows = made_rows(scores, against, noise=0.1 * (seed % 3))
    opinions = tuple(
        Opinion(number, row["model"], row["prompt_id"], "", {name: row[name] for name in TRUE})
        for number, row in enumerate(rows)
    )
    made = refit(Feedback(len(rows), opinions, ()), scores)
    for name, aspect in made.aspects.items():
        assert all(term.weight >= 0 for term in aspect.terms)
        assert made.fits[name].zero == tuple(term.metric for term in aspect.terms if term.weight == 0)


def test_a_still_video_does_not_win_motion_for_having_no_flow(tmp_path: Path) -> None:
    """People who dislike motion make the weight of flow zero; the published one gives the still video the most."""
    scores = made_scores()
    rows = made_rows(scores, {"motion_quality": {"Action_Score": 0.3, "Flow_Score": -3.0}})
    made = refit(write(tmp_path / "rows.jsonl", rows), scores)
    assert "Flow_Score" in made.fits["motion_quality"].zero
    still = {"Action_Score": 50.0, "Motion_AC_Score": 50.0, "Flow_Score": 0.0}
    moving = still | {"Flow_Score": 8.0}
    assert made.aspects["motion_quality"](still) == made.aspects["motion_quality"](moving)
    assert ASPECTS["motion_quality"](still) > ASPECTS["motion_quality"](moving)


def test_it_agrees_with_another_solver(tmp_path: Path) -> None:
    """scipy's bounded least squares on the whole matrix gives the same weights and the same free numbers."""
    scores, true = made_scores(3), {"motion_quality": {"Action_Score": -0.1, "Motion_AC_Score": 0.2, "Flow_Score": 1.0}}
    feedback = write(tmp_path / "rows.jsonl", made_rows(scores, true, noise=0.1))
    made = refit(feedback, scores)
    form = made.aspects["motion_quality"]
    rows, labels = [], []
    for model, found in scores.items():
        for prompt, lines in by_video(found).items():
            if prompt in made.held_out:
                continue
            said = [
                row.aspects["motion_quality"] for row in feedback.opinions if (row.model, row.prompt) == (model, prompt)
            ]
            x = [
                x_of(term.metric, lines[term.metric].value or 0.0) if term.metric in lines else 0.0
                for term in form.terms
            ]
            rows.append([*x, 1.0, "Action_Score" in lines, "Motion_AC_Score" in lines])
            labels.append((sum(said) / len(said) - 1) / 4)
    free = [-np.inf] * 3
    solved = lsq_linear(np.array(rows, float), np.array(labels), ([0, 0, 0, *free], np.inf), tol=1e-14).x
    shares = (1 / 3, 1 / 3, 1)
    assert [term.weight for term in form.terms] == pytest.approx(
        [weight * share for weight, share in zip(solved[:3], shares, strict=True)], abs=1e-6
    )
    assert form.intercept == pytest.approx(solved[3] + (solved[4] + solved[5]) / 3, abs=1e-6)
    assert form.terms[0].weight == 0


def test_held_out_prompts_are_not_in_the_fit(tmp_path: Path) -> None:
    """Other opinions of their videos change no weight; other opinions of the rest do."""
    scores = made_scores()
    rows = made_rows(scores, noise=0.05)
    first = refit(write(tmp_path / "rows.jsonl", rows), scores)
    assert len(first.held_out) == 12 and not set(first.held_out) & set(first.prompts)
    assert set(first.held_out) | set(first.prompts) == set(PROMPTS)
    for among, is_same in ((first.held_out, True), (first.prompts, False)):
        turned = [
            row | {aspect: 6 - row[aspect] for aspect in TRUE} if row["prompt_id"] in among else row for row in rows
        ]
        again = refit(write(tmp_path / "turned.jsonl", turned), scores)
        assert (again.aspects == first.aspects) == is_same
        assert again.held_out == first.held_out
        assert again.fits["motion_quality"].agreement != first.fits["motion_quality"].agreement
    assert refit(write(tmp_path / "rows.jsonl", rows), scores, seed=1).held_out != first.held_out


def test_where_people_follow_the_metrics_the_fit_ranks_as_they_do(tmp_path: Path) -> None:
    """On held-out prompts; the published weights and the plain average, which are of other people, do worse."""
    made = fitted(tmp_path)
    for name, fit in made.fits.items():
        found = {way: agreement.spearman for way, agreement in fit.agreement.items()}
        assert found["refit"] == pytest.approx(1), name
        assert found["published"] is not None and found["published"] < 0.9999
        assert found["average"] is not None and found["average"] < 0.99
        assert all(one.videos == fit.held_out == 12 * 6 for one in fit.agreement.values())


def test_the_order_of_rows_and_of_models_changes_nothing(tmp_path: Path) -> None:
    scores = made_scores()
    rows = made_rows(scores, noise=0.1)
    first = refit(write(tmp_path / "rows.jsonl", rows), scores).as_json()
    random.Random(1).shuffle(rows)
    turned = dict(reversed(scores.items()))
    again = refit(write(tmp_path / "rows.jsonl", rows), turned).as_json()
    assert json.dumps(again) == json.dumps(first)


# ---- what cannot be fitted ----


def test_the_score_of_a_set_has_no_weight_from_few_sets(tmp_path: Path) -> None:
    """IS is one number a set: three sets are no regression."""
    few, many = fitted(tmp_path, models=3), fitted(tmp_path, models=5)
    assert "IS" in few.fits["visual_quality"].left_out
    assert [term.metric for term in few.aspects["visual_quality"].terms] == ["VQA_A", "VQA_T"]
    assert [term.metric for term in many.aspects["visual_quality"].terms] == ["VQA_A", "VQA_T", "IS"]


def test_a_metric_that_a_set_lacks_has_no_weight(tmp_path: Path) -> None:
    """Nothing stands in for it: the aspect is fitted without, says so, and the published weights cannot be compared."""
    scores = made_scores()
    rows = made_rows(scores)
    scores["b"] = SetScores(tuple(line for line in scores["b"].lines if line.metric != "Celebrity_ID_Score"))
    fit = refit(write(tmp_path / "rows.jsonl", rows), scores).fits["text_video_alignment"]
    assert fit.left_out == {"Celebrity_ID_Score": "not measured of b"}
    assert fit.aspect is not None and len(fit.aspect.terms) == 7
    assert fit.agreement["published"].reason == "needs Celebrity_ID_Score"
    assert fit.agreement["average"].reason == "needs all metrics that it averages"
    assert fit.agreement["refit"].spearman is not None


def test_an_aspect_is_withheld_where_opinions_are_too_few(tmp_path: Path) -> None:
    scores = made_scores()
    rows = [row for row in made_rows(scores) if row["prompt_id"] in PROMPTS[:3] and row["model"] == "a"]
    made = refit(write(tmp_path / "rows.jsonl", rows), scores)
    assert made.fits["motion_quality"].withheld and not made.aspects.keys() & {"motion_quality"}
    assert made.used == 0 and made.rejected == {"its aspect is withheld": len(rows)}
    assert any("withheld" in line for line in made.text_lines())


def test_videos_without_a_value_are_dropped_and_said(tmp_path: Path) -> None:
    """A missing value is not taken for a metric that does not look at the video; nor is DOVER's 0 a value."""
    scores = made_scores()
    rows = made_rows(scores)
    first = refit(write(tmp_path / "rows.jsonl", rows), scores)
    lines = [
        line.evolve(value=None, reason="needs two frames, has 1") if line.id == "0007" else line
        for line in scores["a"].lines
    ]
    lines = [
        line.evolve(value=0.0, reason="unreadable: truncated") if (line.id, line.metric) == ("0008", "VQA_A") else line
        for line in lines
    ]
    again = refit(write(tmp_path / "rows.jsonl", rows), scores | {"a": SetScores(tuple(lines), 10.0)})
    assert again.rejected == {"VQA_A has no value": 2} and again.used == first.used - 2
    assert again.fits["visual_quality"].dropped == {"VQA_A has no value": 2}
    assert again.fits["motion_quality"].dropped == {"Motion_AC_Score has no value": 1}
    for name, fit in again.fits.items():
        assert fit.fitted + fit.held_out + sum(fit.dropped.values()) == 180, name


# ---- the feedback file ----

GOOD = {"prompt_id": "0003", "model": "a", "visual_quality": "4", "motion_quality": "2"}
BAD: dict[str, dict[str, str]] = {
    "not a number": {"visual_quality": "good"},
    "out of 1..5": {"motion_quality": "0"},
    "no prompt id or no model": {"model": " "},
    "no opinion": {"visual_quality": "", "motion_quality": ""},
    "no scores of that video": {"prompt_id": "0999"},
    "no scores of that model": {"model": "z"},
}


@pytest.mark.parametrize("form", ["csv", "semicolon", "jsonl"])
def test_rows_in_are_used_or_rejected_with_a_reason(tmp_path: Path, form: str) -> None:
    scores = made_scores()
    good = [GOOD | {"prompt_id": prompt, "visual_quality": str(1 + n % 5)} for n, prompt in enumerate(PROMPTS)]
    rows = [*good, *(GOOD | change for change in BAD.values()), GOOD | {"visual_quality": "nan"}]
    path = tmp_path / "feedback"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n{torn\n")
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(GOOD), delimiter="," if form == "csv" else ";")
            writer.writeheader()
            writer.writerows(rows)
            file.write("1,2,3,4,5\n" if form == "csv" else "1;2;3;4;5\n")
    made = refit(read_feedback(path), scores)
    assert made.rows == len(rows) + 1 == made.used + sum(made.rejected.values())
    assert made.rejected == dict(sorted((dict.fromkeys(BAD, 1) | {"out of 1..5": 2, "damaged row": 1}).items()))
    text = "\n".join(made.text_lines())
    assert all(reason in text for reason in made.rejected)


def test_a_row_may_speak_of_one_aspect(tmp_path: Path) -> None:
    """The long form says the same as the wide one; an aspect that nobody knows is rejected."""
    scores = made_scores()
    rows = made_rows(scores)
    long = [
        {"Prompt ID": row["prompt_id"], "Model": row["model"], "aspect": aspect, "opinion": row[aspect]}
        for row in rows
        for aspect in TRUE
    ]
    wide = refit(write(tmp_path / "wide.jsonl", rows), scores)
    made = refit(write(tmp_path / "long.jsonl", [*long, long[0] | {"aspect": "subjective_likeness"}]), scores)
    assert made.aspects == wide.aspects and made.rejected == {"unknown aspect": 1}


def test_ids_may_be_file_names_or_have_lost_their_zeros(tmp_path: Path) -> None:
    scores = made_scores()
    rows = made_rows(scores)
    first = refit(write(tmp_path / "rows.jsonl", rows), scores)
    for change in (lambda name: f"{name}.mp4", lambda name: int(name)):
        again = refit(write(tmp_path / "rows.jsonl", [r | {"prompt_id": change(r["prompt_id"])} for r in rows]), scores)
        assert again.aspects == first.aspects


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt_id,model,loveliness\n1,a,3\n", "no column for aspect; found prompt_id, model, loveliness"),
        ("visual_quality\n3\n", "no column for prompt, model"),
        ("", "no column for prompt"),
        (b"PK\x03\x04\xff\xfe", "save a spreadsheet as that"),
    ],
)
def test_a_file_that_is_no_feedback_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "feedback.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message):
        read_feedback(path)


def test_feedback_about_other_videos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="none of 1 rows can be used: 1 no scores of that model; scores are of a, b, c"
    ):
        refit(write(tmp_path / "rows.jsonl", [GOOD | {"model": "z"}]), made_scores())


# ---- files ----


def test_what_is_written_reads_back_the_same(tmp_path: Path) -> None:
    made = fitted(tmp_path, noise=0.1)
    path = tmp_path / "coefficients.json"
    path.write_text(json.dumps(made.as_json()))
    assert load_coefficients(path) == made.aspects
    assert [list(form) for form in json.loads(path.read_text())["aspects"].values()] == [
        ["x", "weight", "intercept"]
    ] * 4


def test_the_published_coefficients_read_as_those_we_score_with() -> None:
    assert load_coefficients(PUBLISHED) == ASPECTS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"aspects": {"beauty": {}}}, "aspect 'beauty' is not known"),
        ({"aspects": {"motion_quality": {"x": ["Flow"], "weight": [1], "intercept": 0}}}, "Flow not known"),
        ({"aspects": {"motion_quality": {"x": ["Flow_Score/100"], "weight": [], "intercept": 0}}}, "no coefficients"),
        ({"aspects": {"motion_quality": {"x": [], "weight": [], "intercept": math.nan}}}, "not finite"),
        ({}, "no coefficients"),
        ([], "no coefficients"),
    ],
)
def test_a_file_without_coefficients_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "coefficients.json"
    path.write_text(json.dumps(change))
    with pytest.raises(ConfigError, match=message):
        load_coefficients(path)


def test_scores_come_from_a_scorecard(tmp_path: Path) -> None:
    """Its lines and the IS of the whole set, as `score` writes them."""
    store, made = LocalStore(tmp_path), made_scores()["a"]
    lines = "".join(json.dumps(line.model_dump(mode="json", exclude={"asked"})) + "\n" for line in made.lines)
    summary = {"benchmark": {"modes": {"compat": {"metrics": {"IS": {"value": 10.0}}}, "fixed": {"metrics": {}}}}}
    for name, text in (("good", lines), ("bad", "torn")):
        files = (
            put_file(store, f"scores/{name}", "metrics.jsonl", text.encode()),
            put_file(store, f"scores/{name}", "summary.json", json.dumps(summary).encode()),
        )
        manifest = Manifest(
            kind="scorecard", stage="score", stage_version=0, fingerprint=name, config={}, inputs={}, files=files
        )
        card = commit(store, f"scores/{name}", manifest)
        assert isinstance(card, Scorecard)
        if name == "good":
            assert read_scores(store, card) == SetScores(made.lines, 10.0, card.uri)
            assert read_scores(store, card, "fixed").inception is None
        else:
            with pytest.raises(StoreError, match="no metrics of videos in it"):
                read_scores(store, card)
