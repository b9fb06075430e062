"""Tables of a study, and the layouts of the paper."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from vc2.errors import ConfigError
from vc2.eval.study.analyse import analyse
from vc2.eval.study.build import BuiltStudy
from vc2.eval.study.results import StudyResult
from vc2.eval.study.tables import paper_table, render_markdown

TABLE_2 = """ours_vs,text_video_alignment_pct,motion_quality_pct,visual_quality_pct
moon-lit,56,46,34
Dusk,55,64,69
"""
TABLE_4 = """preferred,against,motion_quality_pct
Noonday,Sunrise,87
"""


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


@pytest.fixture
def result(study: BuiltStudy, rate: Callable, likes: Callable, saved: Callable) -> StudyResult:
    """Two of three raters like Sunrise best, one Moonlit."""
    liked = {"anna": ("Sunrise", "Moonlit"), "bert": ("Sunrise", "Moonlit"), "cleo": ("Moonlit", "Sunrise")}
    files = [saved(name, rate(name, likes(*order))) for name, order in liked.items()]
    return analyse(study.key, [*files, saved("bad|<b>", "{")], resamples=200)


def cells(table: str, first: str) -> list[str]:
    return next(
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith(f"| {first} |")
    )


def test_table_2_is_ours_against_each(result: StudyResult) -> None:
    """Columns in the paper's order, n in the row, the paper's own figures beneath under whatever spelling."""
    table = paper_table(result, ours="Sunrise", published=rows(TABLE_2))
    head = cells(table, "ours against")
    assert head[1:] == ["text-video alignment", "motion quality", "visual quality", "votes", "prompts"]
    lines = table.splitlines()
    assert cells(table, "Moonlit")[4:] == ["27", "9"] and cells(table, "Moonlit")[1].startswith("67 [")
    assert (
        lines[lines.index(next(line for line in lines if line.startswith("| Moonlit"))) + 1]
        == "| *paper* | 56 | 46 | 34 |  |  |"
    )
    assert "In the paper, not in this study: Dusk." in table
    turned = paper_table(result, ours="Moonlit")
    assert cells(turned, "Sunrise")[1].startswith("33 [") and "*paper*" not in turned


def test_table_4_has_the_preferred_first(result: StudyResult) -> None:
    """A row for each pair, turned as the paper has it, with its one question."""
    table = paper_table(result, published=rows(TABLE_4))
    assert cells(table, "Noonday, Sunrise")[1].startswith("0 [0, ")
    assert "| *paper* |  | 87 |  |  |  |" in table
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == 1 + 3 + 1


def test_the_whole_is_one_markdown_page_and_one_json(result: StudyResult) -> None:
    """All pairs, strengths, raters, rejected files; words of others cannot break out; no NaN in JSON."""
    text = render_markdown(result, ours="Sunrise", published=rows(TABLE_2))
    for words in (
        "3 raters of 4 files",
        "## All models at once",
        "Krippendorff",
        "p (Holm)",
        "1 of 4 files were rejected",
    ):
        assert words in text
    assert r"bad\|\<b\>.json: no JSON" in text and "<b>" not in text
    for table in text.split("\n\n"):
        if table.startswith("|"):
            assert len({line.replace(r"\|", "").count("|") for line in table.splitlines()}) == 1
    plain = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert plain["models"] == ["Sunrise", "Moonlit", "Noonday"] and len(plain["partings"]) == 9
    assert all(math.isfinite(one["split"]["value"]) for one in plain["partings"])


def test_ours_must_be_one_of_the_models(result: StudyResult) -> None:
    with pytest.raises(ConfigError, match="no model is called 'ours'; the study has Sunrise, Moonlit, Noonday"):
        paper_table(result, ours="ours")


@pytest.mark.parametrize("name", ["videocrafter2_paper_table2.csv", "videocrafter2_paper_table4.csv"])
def test_the_papers_own_rows_are_read(result: StudyResult, name: str) -> None:
    """The shipped data has the columns that are expected of it."""
    path = Path(__file__).parents[3] / "vc2" / "eval" / "published" / name
    if not path.exists():
        pytest.skip(f"{name} is not there")
    with path.open() as file:
        table = paper_table(result, ours="Sunrise" if "table2" in name else None, published=list(csv.DictReader(file)))
    assert ("Show-1" in table) if "table2" in name else ("F-Spa-LORA" in table)
