"""The eleven rows of Table 3: what learns in each, and what they share."""

from pathlib import Path

import pytest

from vc2.cli import main
from vc2.data.config import LaionSource
from vc2.errors import ConfigError
from vc2.pipeline.driver import plan
from vc2.pipeline.recipes import paper, resolve
from vc2.pipeline.table3 import TUNING_LORA, Row, last_stage, named_row, row
from vc2.storage import LocalStore

LEARNS = {
    Row.P_SPA_LORA: ("temporal", "spatial", True),
    Row.F_SPA_LORA: ("all", "spatial", True),
    Row.P_TEMP_LORA: ("temporal", "temporal", True),
    Row.F_TEMP_LORA: ("all", "temporal", True),
    Row.F_SPA_DIR: ("all", "spatial", False),
    Row.F_TEMP_DIR: ("all", "temporal", False),
    Row.F_SPA_TEMP_DIR: ("all", "all", False),
    Row.F_SPA_TEMP_LORA: ("all", "all", True),
    Row.F_SPA_DIR_LAION: ("all", "spatial", False),
}


def test_the_rows_are_the_papers() -> None:
    assert [str(one) for one in Row] == [
        "P-base", "F-base", "P-Spa-LoRA", "F-Spa-LoRA", "P-Temp-LoRA", "F-Temp-LoRA", "F-Spa-DIR", "F-Temp-DIR",
        "F-Spa&Temp-DIR", "F-Spa&Temp-LoRA", "F-Spa-DIR-LAION",
    ]  # fmt: skip
    assert {one for one in Row if one.is_base} == set(Row) - set(LEARNS)


@pytest.mark.parametrize("wanted", LEARNS, ids=str)
def test_what_learns_in_a_row(wanted: Row, tmp_path: Path) -> None:
    config = row(paper(tmp_path), wanted)
    first, second, low_rank = LEARNS[wanted]
    assert (config.full.strategy.trainable, config.full.strategy.lora) == (first, None)
    assert config.spatial.strategy.trainable == second
    assert config.spatial.strategy.lora == (TUNING_LORA if low_rank else None)
    assert config.spatial.image_share == 1.0  # stage 2 sees images alone, so temporal tuning is tuning on stills
    assert config.evolve(full=paper(tmp_path).full, spatial=paper(tmp_path).spatial, jdb=paper(tmp_path).jdb) == paper(
        tmp_path
    )


def test_the_papers_method_is_the_recipe(tmp_path: Path) -> None:
    assert row(paper(tmp_path), Row.F_SPA_DIR) == paper(tmp_path)
    assert resolve("miniature", work=tmp_path, table3="f-spa-dir") == resolve("miniature", work=tmp_path)


def test_rows_with_one_base_share_its_training(tmp_path: Path) -> None:
    """Down to the fingerprint: one stage 1 for F, one for P; and eleven different stages 2 or ends."""
    store, first, last = LocalStore(tmp_path / "store"), {}, set()
    for one in Row:
        stages = {stage.name: stage for stage in plan(resolve("miniature", work=tmp_path, table3=one), store)}
        first.setdefault(one.base, set()).add(stages["train/full"].fingerprint)
        last.add(stages[last_stage(one) or "train/spatial"].fingerprint)
    assert {base: len(found) for base, found in first.items()} == {Row.F_BASE: 1, Row.P_BASE: 1}
    assert first[Row.F_BASE] != first[Row.P_BASE] and len(last) == len(Row)


def test_another_source_of_images(tmp_path: Path) -> None:
    """LAION-Aesthetics lies beside LAION-COCO; settings laid over a row have the last word."""
    config = row(paper(tmp_path / "work"), Row.F_SPA_DIR_LAION)
    assert isinstance(config.jdb.source, LaionSource)
    assert (config.jdb.source.name, config.jdb.source.kind) == ("laion-aesthetics", "laion-aesthetics")
    assert config.jdb.source.table == f"{tmp_path}/raw/laion-aesthetics"
    assert config.jdb.form == paper(tmp_path).jdb.form
    small = resolve("miniature", {"jdb": {"source": {"table": "elsewhere"}}}, work=tmp_path, table3="F-Spa-DIR-LAION")
    assert isinstance(small.jdb.source, LaionSource) and small.jdb.source.table == "elsewhere"


def test_a_base_ends_after_stage_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ["--work", str(tmp_path), "--store", str(tmp_path / "store")]
    assert main(["plan", "--row", "P-base", *places]) == 0
    table, _, _ = capsys.readouterr().out.partition("\n\n")
    assert table.splitlines()[-1].startswith("train/full")
    assert main(["run", "--row", "P-base", "--stop-after", "train/spatial", *places]) == 1
    assert "row P-base ends with train/full" in capsys.readouterr().err


def test_an_unknown_row_is_told_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="its rows are P-base, F-base"):
        named_row("F-Spa")
