"""Recipes: configuration that can be resolved anywhere, and the paper's figures as the paper states them."""

from pathlib import Path

import pytest

from vc2.errors import ConfigError
from vc2.pipeline.recipes import PipelineOverrides, paper, resolve, single_gpu


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
    with pytest.raises(ConfigError, match="the recipes are miniature, single_gpu, paper"):
        resolve("minature")
