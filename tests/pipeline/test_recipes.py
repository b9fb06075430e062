"""Recipes: configuration that can be resolved anywhere, and the paper's figures as the paper states them.

What the large recipes and the rows of Table 3 resolve to is committed as text, so that no change goes unseen.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vc2.errors import ConfigError
from vc2.model.partition import trainable_names
from vc2.model.unet import UNet3D
from vc2.pipeline.recipes import PipelineOverrides, paper, resolve, single_gpu
from vc2.pipeline.table3 import Row, row
from vc2.train.config import TrainStage
from vc2.train.estimate import HARDWARE
from vc2.train.fit import clips_by_phase, is_of_stills, stage_forms, usable_bytes
from vc2.train.memory import memory_of_rank

GOLDEN = Path(__file__).parent / "golden"
ANYWHERE = Path("/data/work")  # so that no path of this machine is in the text


def golden(name: str, found: object) -> None:
    """Compare with the committed text, or write it where VC2_RENEW_GOLDEN is set."""
    path, text = GOLDEN / f"{name}.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    if os.environ.get("VC2_RENEW_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), (
        f"{name} resolves to something else than {path.relative_to(Path.cwd())} says; if that is meant, run "
        "`VC2_RENEW_GOLDEN=1 python -m pytest tests/pipeline/test_recipes.py` and read the difference before you commit"
    )


def leaves(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(config, dict) and config:
        for name, value in config.items():
            yield from leaves(value, f"{path}.{name}" if path else name)
    else:
        yield path, config


def test_the_large_recipes_are_as_committed() -> None:
    golden("paper", paper(ANYWHERE).model_dump(mode="json"))
    golden("single_gpu", single_gpu(ANYWHERE).model_dump(mode="json"))


def test_the_rows_of_table_3_are_as_committed() -> None:
    """Of each row what differs from `paper`: setting -> [there, here]."""
    plain = dict(leaves(paper(ANYWHERE).model_dump(mode="json")))
    rows = {}
    for one in Row:
        found = dict(leaves(row(paper(ANYWHERE), one).model_dump(mode="json")))
        changed = [name for name in {**plain, **found} if plain.get(name) != found.get(name)]
        rows[one.value] = {name: [plain.get(name), found.get(name)] for name in changed}
    golden("table3", rows)


def test_the_papers_figures(tmp_path: Path) -> None:
    """VideoCrafter2, Sec. 4.1: 270K steps at batch 128 on 32 GPUs, 30K at 256 on 8, learning rate 5e-5, 512 x 320."""
    config = paper(tmp_path)
    full, spatial = config.full, config.spatial
    assert (full.num_steps, full.batch_size, full.world_size, full.optimizer.lr) == (270_000, 128, 32, 5e-5)
    assert (spatial.num_steps, spatial.batch_size, spatial.world_size, spatial.optimizer.lr) == (30_000, 256, 8, 5e-5)
    assert (full.strategy.trainable, spatial.strategy.trainable) == ("all", "spatial")
    assert (full.zero_stage, spatial.zero_stage) == (1, 1)
    form = config.webvid.form
    assert (form.width, form.height, form.num_frames) == (512, 320, 16)
    assert (config.jdb.form.width, config.jdb.form.height, config.jdb.form.num_frames) == (512, 512, 1)


def test_the_papers_network_has_the_papers_parameters(tmp_path: Path) -> None:
    with torch.device("meta"):
        unet = UNet3D(paper(tmp_path).full.model.unet)
    sizes = {name: parameter.numel() for name, parameter in unet.named_parameters()}
    assert sum(sizes[name] for name in trainable_names(unet, "spatial")) == 865_910_724
    assert sum(sizes[name] for name in trainable_names(unet, "temporal")) == 547_373_696


def test_batches_divide_and_everything_fits_80_gb(tmp_path: Path) -> None:
    """By the memory model of vc2.train.memory, on cards of 79 usable GiB, with a tenth to spare."""
    usable = usable_bytes(HARDWARE["a100-80"].memory_gib)
    for config, shares in ((paper(tmp_path), (4, 32)), (single_gpu(tmp_path), (16, 64))):
        full = (config.full, stage_forms(video=config.webvid.form, image=config.laion_coco.form))
        spatial = (config.spatial, stage_forms(image=config.jdb.form))
        for (stage, forms), share in zip((full, spatial), shares, strict=True):
            assert share_of(stage) == share
            stills = is_of_stills(stage, set(forms))
            clips = {clip for _, sizes in clips_by_phase(stage, forms) for clip in sizes.values()}
            memory = memory_of_rank(stage, clips, stage.world_size or 1, stills=stills)
            assert memory.total(stage.micro_batch or 1) < 0.9 * usable


def share_of(stage: TrainStage) -> int:
    """Samples of a rank and step, which micro-batches must divide."""
    assert stage.world_size and stage.micro_batch
    share, rest = divmod(stage.batch_size, stage.world_size)
    assert not rest and not share % stage.micro_batch
    return share


def test_where_it_runs_does_not_change_what_is_asked_for(tmp_path: Path) -> None:
    here, there = resolve("miniature", work=tmp_path / "a"), resolve("miniature", work=tmp_path / "b")
    assert here.identity() == there.identity()


def test_one_card_trains_the_papers_network(tmp_path: Path) -> None:
    assert single_gpu(tmp_path).full.model == paper(tmp_path).full.model


def test_settings_come_as_the_forms_type_or_as_plain_values(tmp_path: Path) -> None:
    plain = resolve("miniature", {"full": {"num_steps": 3}}, work=tmp_path)
    typed = resolve("miniature", PipelineOverrides.model_validate({"full": {"num_steps": 3}}), work=tmp_path)
    assert plain == typed
    assert plain.full.num_steps == 3


def test_an_unknown_recipe_is_told_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="the recipes are miniature, study, study_gpu, single_gpu, paper"):
        resolve("minature")
