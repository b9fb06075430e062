import csv
import json
import math
from pathlib import Path

import pytest

from vc2.errors import ConfigError
from vc2.eval.leaderboard import (
    ASPECT_NAMES,
    ROWS,
    PublishedRow,
    as_json,
    as_markdown,
    comparison,
    read_table,
    results_by_mode,
    rows_named,
    shown,
)
from vc2.eval.metrics import EVALCRAFTER, METRICS
from vc2.eval.scorecard import aspect_scores

REFERENCE = Path(__file__).parent.parent / "reference" / "evalcrafter"
SHIPPED = Path(__file__).parent.parent.parent / "vc2" / "eval" / "published"
COMPUTABLE = [row for row in ROWS if row.score_set in ("2024", "third party") and row.raw and row.aspects]

# What a scorecard says where all was measured in compat, but for celebrities; and more in fixed.
MEASURED = {
    "name": "evalcrafter",
    "prompts": {"total": 700, "of_benchmark": 700, "whole_list": True},
    "videos": {"expected": 700, "scored": 699, "rejected": {"0003": "truncated"}},
    "modes": {
        "compat": {
            "metrics": {
                "VQA_A": {"value": 63.28, "n": 700},
                "VQA_T": {"value": 52.5, "n": 700},
                "OCR_Score": {"value": 70.0, "n": 50, "note": "RapidOCR in place of PaddleOCR"},
                "Celebrity_ID_Score": {"not_measured": "no photographs"},
            },
            "aspects": {"visual_quality": 61.5},
            "withheld": {"text_video_alignment": "needs Celebrity_ID_Score", "total": "needs text_video_alignment"},
        },
        "fixed": {"metrics": {"VQA_A": {"value": 99.99, "n": 700}}, "aspects": {}, "withheld": {}},
    },
}


@pytest.mark.parametrize("row", COMPUTABLE, ids=lambda row: row.name)
def test_aspects_follow_from_every_published_row(row: PublishedRow) -> None:
    """Aspects computed from the raw metrics of a row are those printed beside them."""
    found = aspect_scores(row.raw)
    for name, printed in row.aspects.items():
        assert found[name] == pytest.approx(printed, abs=1.0 if name == "total" else 0.1)


def test_there_are_as_many_complete_rows_as_published() -> None:
    """Seven of the leaderboard and one of another paper have both raw metrics and aspects."""
    assert len(COMPUTABLE) == 8
    assert all(set(row.raw) == set(EVALCRAFTER) for row in COMPUTABLE)
    assert set(EVALCRAFTER) <= set(METRICS)


@pytest.mark.parametrize("path", sorted(REFERENCE.glob("*.csv")), ids=lambda path: path.name)
def test_shipped_tables_are_the_reference(path: Path) -> None:
    """What is shipped is what was handed down, byte for byte."""
    assert (SHIPPED / path.name).read_bytes() == path.read_bytes()


def test_no_number_is_lost_or_changed() -> None:
    """The views in code hold every number of the files."""
    of_2024 = [row for row in ROWS if row.score_set == "2024"]
    with (SHIPPED / "raw_metrics_2024.csv").open(newline="") as file:
        lines = [tuple(float(line[name]) for name in EVALCRAFTER) for line in csv.DictReader(file)]
    assert sorted(tuple(row.raw.values()) for row in of_2024 if row.raw) == sorted(lines)
    columns = [*ASPECT_NAMES[:-1], "final_sum"]
    with (SHIPPED / "aspect_scores_2024.csv").open(newline="") as file:
        lines = [tuple(float(line[name]) for name in columns) for line in csv.DictReader(file)]
    assert sorted(tuple(row.aspects.values()) for row in of_2024) == sorted(lines)
    assert len(read_table("model_info")) == 14 and len(read_table("human_correlation")) == 24


def test_rows_say_whose_they_are_and_whether_they_compare() -> None:
    """Names are unique; only rows with the prompts, formulas and coefficients of 2024 are comparable."""
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert all(row.source for row in ROWS)
    assert not any(row.is_comparable for row in ROWS if row.score_set in ("2023", "table 3", "vbench"))
    assert all(row.is_comparable for row in ROWS if row.score_set in ("2024", "third party"))
    assert [row.model for row in ROWS if row.score_set == "table 1" and row.is_comparable] == ["Show-1"]
    assert all(row.num_prompts == 700 for row in ROWS if row.score_set == "2024")
    [own] = [row for row in rows_named(["VideoCrafter2"]) if row.score_set == "2024"]
    assert "1024" in own.note and not own.raw


def test_the_release_of_2023_is_in_the_units_of_2024() -> None:
    """It prints fractions; percentages, IS and pixels come out in the order of the later tables."""
    [gen2] = [row for row in rows_named(["gen-2"]) if row.score_set == "2023"]
    assert gen2.raw["IS"] == pytest.approx(12.57) and gen2.raw["CLIP_Temp"] == pytest.approx(99.92)
    assert gen2.raw["Flow_Score"] == pytest.approx(0.18)


def test_rows_are_found_by_name_model_or_set() -> None:
    """Case and punctuation do not matter, each row comes once, in the order asked for."""
    assert [row.name for row in rows_named(["gen2 (2023.09)"])] == ["Gen2 (2023.09)"]
    assert {row.score_set for row in rows_named(["GEN2"])} == {"2024", "2023", "table 1", "vbench"}
    assert len(rows_named(["table-3"])) == 11 and len(rows_named(["2024"])) == 9
    assert len(rows_named(["fancyvideo", "FancyVideo", "third-party"])) == 4
    assert rows_named(["all"]) == ROWS


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    """The error lists models, variants and sets."""
    with pytest.raises(ConfigError, match=r"no published row 'Sora'.*VideoCrafter2.*F-Spa-DIR.*2024, third-party"):
        rows_named(["Gen2", "Sora"])
    with pytest.raises(ConfigError, match="no published table 'x'; there are aspect_scores_2023"):
        read_table("x")


def test_votes_of_the_paper() -> None:
    """Table 2 has four rivals and three questions, Table 4 motion alone."""
    against = {line["ours_vs"]: line for line in read_table("videocrafter2_paper_table2")}
    assert len(against) == 4 and against["Gen2"]["visual_quality_pct"] == "34"
    assert [line["motion_quality_pct"] for line in read_table("videocrafter2_paper_table4")] == ["87", "73", "67"]


def test_ours_is_the_row_below_and_of_compat_alone() -> None:
    """Every table ends with our row; its numbers are those of compat; what is missing has its reason."""
    tables = {table.name: table for table in comparison(MEASURED)}
    assert list(tables) == ["aspects", "metrics", "table1", "table3", "aspects2023", "metrics2023"]
    for table in tables.values():
        assert [line.is_ours for line in table.lines] == [False] * (len(table.lines) - 1) + [True]
    ours = tables["table3"].lines[-1]
    assert ours.values == {"VQA_A": 63.28, "VQA_T": 52.5}
    aspects = tables["aspects"].lines[-1]
    assert aspects.values["visual_quality"] == 61.5 and aspects.values["total"] is None
    assert aspects.reasons["total"] == "needs text_video_alignment"
    metrics = tables["metrics"].lines[-1]
    assert metrics.reasons["Celebrity_ID_Score"] == "no photographs" and metrics.reasons["IS"] == "not asked for"
    assert "RapidOCR" in metrics.note
    assert "99.99" not in as_markdown(tuple(tables.values()))


def test_a_run_in_fixed_alone_is_laid_beside_nothing() -> None:
    """Rows never mix modes."""
    fixed = {**MEASURED, "modes": {"fixed": MEASURED["modes"]["fixed"]}}  # type: ignore[index]
    for table in comparison(fixed):
        assert not any(line.is_ours for line in table.lines)
        assert any("mode fixed alone" in note for note in table.notes)


def test_the_tables_say_how_they_differ_from_ours() -> None:
    """Table 1's mixture, the prompts then and now, videos that are missing, prompts that are not the benchmark's."""
    tables = {table.name: " ".join(table.notes) for table in comparison(MEASURED)}
    assert "mixes score sets" in tables["table1"] and "512 prompts then, 700 now" in tables["table1"]
    assert all("699 videos scored of 700" in notes for notes in tables.values())
    part = {**MEASURED, "prompts": {"total": 16, "of_benchmark": 0, "whole_list": False}}
    assert all("not comparable" in " ".join(table.notes) for table in comparison(part))


def test_named_rows_alone_are_compared() -> None:
    """Tables without any of the rows are left out."""
    tables = comparison(MEASURED, ["FancyVideo"])
    assert [table.name for table in tables] == ["aspects", "metrics"]
    assert [line.name for line in tables[0].lines] == ["FancyVideo", "this run"]
    assert "computed here" in tables[0].lines[0].note
    assert [table.name for table in comparison({}, ["vbench"])] == ["vbench"]


def test_vbench_rows_are_shown_to_those_who_measured_it() -> None:
    """Its table appears with its figures; ours is marked as of other prompts."""
    compat = {"metrics": {"dynamic_degree": {"value": 42.0, "n": 4}}, "vbench": {"quality": 80.0}}
    [table] = [table for table in comparison({"modes": {"compat": compat}}) if table.name == "vbench"]
    ours = table.lines[-1]
    assert (ours.values["quality"], ours.values["dynamic_degree"]) == (80.0, 42.0)
    assert {line.model: line.values["quality"] for line in table.lines}["VideoCrafter-2.0"] == 82.2


def test_markdown_and_json_hold_every_number() -> None:
    """A number that is shown stands in both; totals are printed as published, daggers mark what does not compare."""
    tables = comparison(MEASURED)
    text, plain = as_markdown(tables), as_json(tables)
    for table, written in zip(tables, json.loads(json.dumps(plain, allow_nan=False)), strict=True):
        assert table.title in text and written["columns"] == [column.name for column in table.columns]
        for line, row in zip(table.lines, written["rows"], strict=True):
            assert row["values"] == line.values and row["ours"] == line.is_ours
            assert all(shown(line, column) in text for column in table.columns)
    assert "| **this run** |" in text and "| Gen2 (paper) † |" in text and "| 250 |" in text
    assert as_markdown(()) == ""


def test_older_scorecards_are_read_as_one_mode() -> None:
    """Before modes stood side by side a summary had metrics and one mode."""
    old = {
        "mode": "compat",
        "metrics": {"IS": {"value": 15.0, "per_video": {"a": 1.0}}, "VQA_A": {"not_measured": "x"}},
    }
    modes = results_by_mode(old)
    assert modes["compat"]["metrics"] == {"IS": {"value": 15.0, "n": 1}, "VQA_A": {"not_measured": "x"}}
    assert results_by_mode({}) == {} == results_by_mode({"name": "none"})
    assert math.isclose(comparison(old, ["2024"])[1].lines[-1].values["IS"] or 0, 15.0)
