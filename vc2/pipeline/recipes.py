"""Recipes: what a whole run is made of. A recipe is a function; its docstring says what it yields and costs.

A recipe changes numbers, never code: the miniature on a laptop and the paper's run are the same DAG.
"""

import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field

from vc2.config import Config, digest, merge, overrides_of
from vc2.data.config import (
    FetchConfig,
    Filters,
    JourneyDBSource,
    LaionSource,
    LoaderSettings,
    SampleForm,
    ShardStage,
    WebVidSource,
)
from vc2.errors import ConfigError
from vc2.eval.config import EvaluateStage, Prompt
from vc2.miniature.config import (
    WorldConfig,
    autoencoder_config,
    autoencoder_weights,
    image_base_weights,
    large_unet_config,
    text_config,
    unet_config,
    web_base_weights,
)
from vc2.model.config import ModelConfig, Recompute, SamplerConfig
from vc2.pipeline.table3 import named_row, row
from vc2.storage import file_digest
from vc2.train.config import OptimizerConfig, Strategy, TrainStage, Validation

__all__ = [
    "DEFAULT_WORK",
    "EvaluateOverrides",
    "PipelineConfig",
    "PipelineOverrides",
    "Recipe",
    "ShardOverrides",
    "TrainOverrides",
    "default_store",
    "miniature",
    "paper",
    "resolve",
    "single_gpu",
    "study",
    "study_gpu",
    "world_folder",
]

Recipe = Literal["miniature", "study", "study_gpu", "single_gpu", "paper"]

DEFAULT_WORK = Path(os.environ.get("VC2_WORK", "work")).absolute()


def default_store() -> str:
    """VC2_STORE, else a folder inside the work folder."""
    return os.environ.get("VC2_STORE") or str(DEFAULT_WORK / "store")


class PipelineConfig(Config):
    """Everything that one run of the DAG is asked for."""

    world: WorldConfig | None = Field(None, description="a small world to make first and take as the three sources")
    webvid: ShardStage
    laion_coco: ShardStage
    jdb: ShardStage
    full: TrainStage
    spatial: TrainStage
    evaluation: EvaluateStage


PipelineOverrides = overrides_of(PipelineConfig)
ShardOverrides = overrides_of(ShardStage)
TrainOverrides = overrides_of(TrainStage)
EvaluateOverrides = overrides_of(EvaluateStage)


def resolve(
    recipe: str,
    overrides: Mapping[str, Any] | Config | None = None,
    *,
    work: Path = DEFAULT_WORK,
    table3: str = "",
    bind: bool = True,
) -> PipelineConfig:
    """The config of a recipe, with settings laid over it.

    Args:
        recipe: Name of a recipe.
        overrides: Nested settings, or a `PipelineOverrides`.
        work: Work folder; sources that the recipe makes itself lie in it.
        table3: Name of a row of the paper's Table 3, laid over the recipe before the settings; empty: none.
        bind: Read the prompts, and look up what metrics are measured with. A config without has no fingerprints yet.

    Raises:
        ConfigError: If there is no such recipe or row, or a setting does not fit.
    """
    if recipe not in get_args(Recipe):
        raise ConfigError(f"no recipe {recipe!r}; the recipes are {', '.join(get_args(Recipe))}")
    settings = overrides.model_dump(exclude_none=True) if isinstance(overrides, Config) else dict(overrides or {})
    if recipe == "miniature":
        config = miniature(work, merge(WorldConfig(), settings.pop("world", None)))
    elif recipe in ("study", "study_gpu"):
        make = study if recipe == "study" else study_gpu
        config = make(work, merge(STUDY_WORLD, settings.pop("world", None)))
    else:
        config = single_gpu(work) if recipe == "single_gpu" else paper(work)
    config = merge(row(config, named_row(table3)) if table3 else config, settings)
    if not bind:
        return config
    evaluation = config.evaluation
    if evaluation.prompts_file and not evaluation.prompts:
        evaluation = evaluation.with_prompts()
    elif config.world is not None and not evaluation.prompts:
        evaluation = _with_world_prompts(evaluation, config.world)
    return config.evolve(evaluation=evaluation.with_metrics())


def miniature(work: Path = DEFAULT_WORK, world: WorldConfig = WorldConfig()) -> PipelineConfig:
    """The whole pipeline on two CPU cores in about eight minutes: a made-up world, 80 x 48 pixels, 8 frames.

    Every real part is in the path. The trained samples are recognisable, no more: coloured things that move the way
    their captions say. Measured times and scores: docs/measured.md.
    """
    raw = world_folder(world, work)
    video = SampleForm(num_frames=8, width=80, height=48, min_stride=2, max_stride=5)
    image = SampleForm(num_frames=1, width=80, height=48)
    square = image.evolve(width=64, height=64)
    plain = Filters(min_motion=None, near_duplicate_bits=None)  # flat shapes are alike, and some move slowly
    fetch = FetchConfig(
        connect_timeout=2, idle_timeout=2, total_timeout=4, retries=1, backoff=0.1, part_rows=64, concurrency=16
    )
    model = ModelConfig(
        unet=unet_config(),
        autoencoder=autoencoder_config(),
        text=text_config(),
        autoencoder_sha256=file_digest(autoencoder_weights()).sha256,
        autoencoder_path=str(autoencoder_weights()),
    )
    full = TrainStage(
        name="full",
        model=model,
        sd_init="miniature-image-base",
        sd_sha256=file_digest(image_base_weights()).sha256,
        sd_path=str(image_base_weights()),
        batch_size=8,
        image_share=0.125,
        optimizer=OptimizerConfig(lr=1.5e-3, betas=(0.9, 0.99), warmup_steps=40, clip_norm=1.0),
        ema_decay=0.997,
        precision="fp32",
        num_steps=1100,
        world_size=2,
        threads=1,
        log_every=5,
        state_every_seconds=20,
        heartbeat_seconds=2,
        device="cpu",
    )
    return PipelineConfig(
        world=world,
        webvid=ShardStage(
            source=WebVidSource(table=f"{raw}/webvid", videos=f"{raw}/webvid/videos"),
            form=video.evolve(clips_per_video=2),
            filters=plain,
            fetch=fetch,
            samples_per_shard=64,
        ),
        laion_coco=ShardStage(source=LaionSource(table=f"{raw}/laion"), form=image, fetch=fetch, samples_per_shard=64),
        jdb=ShardStage(
            source=JourneyDBSource(table=f"{raw}/jdb/data/train", archives=f"{raw}/jdb/data/train/imgs"),
            form=square,
            filters=plain,
            fetch=fetch,
            samples_per_shard=64,
        ),
        full=full,
        spatial=full.evolve(
            name="spatial",
            strategy=Strategy(trainable="spatial"),
            sd_init="",
            sd_sha256="",
            sd_path="",
            batch_size=16,
            image_share=1.0,
            optimizer=full.optimizer.evolve(lr=5e-4),
            num_steps=300,
        ),
        evaluation=EvaluateStage(
            sampler=SamplerConfig(num_steps=25, guidance_scale=5.0, eta=0.0, fps=8),
            frames=8,
            width=80,
            height=48,
            play_fps=8,
            group_size=4,
            world_size=2,
            flow="dis",
            unmeasured="allow",
        ),
    )


STUDY_WORLD = WorldConfig(seed=2401, num_videos=360, num_web_images=360, num_jdb_images=480, num_prompts=48)


def study(work: Path = DEFAULT_WORK, world: WorldConfig = STUDY_WORLD) -> PipelineConfig:
    """The rows of Table 3 in a small world, for `vc2 compare`: one rank and one thread each, another world than the
    miniature's, prompts that ask for more than videos show.

    32,000 clips (`miniature`: 8,800), then 3,840 pictures, with five checkpoints on the way. A base takes about 20
    minutes of one core, a tuning with its samples 1 to 2. The networks are those of `miniature`, grown from an image
    network that has seen nothing that looks like the image set, as Stable Diffusion had seen nothing of Midjourney's.
    What came out: docs/study.md.
    """
    config = miniature(work, world)
    full = config.full.evolve(
        sd_init="web-image-base",
        sd_sha256=file_digest(web_base_weights()).sha256,
        sd_path=str(web_base_weights()),
        batch_size=16,
        num_steps=2000,
        world_size=1,
        zero_stage=0,
        state_every_seconds=60,
    )
    return config.evolve(
        full=full,
        spatial=config.spatial.evolve(num_steps=240, keep_every_steps=40, world_size=1, zero_stage=0),
        evaluation=config.evaluation.evolve(
            prompts=_composed_prompts(world),  # pyright: ignore[reportArgumentType] (frozen, so it has a hash)
            benchmark="none",
            group_size=12,
            world_size=1,
        ),
    )


def study_gpu(work: Path = DEFAULT_WORK, world: WorldConfig = STUDY_WORLD) -> PipelineConfig:
    """`study` for one GPU: 41.5 M parameters, 16 frames, 12,000 steps of 32 clips, then 1,500 of 64 pictures.

    Its image network is not in the repository; this makes it, where the recipe looks for it:

      python -m vc2.miniature.train_image_base --network large --web-only --device cuda --out WORK/study_gpu.safetensors

    Not run yet for want of a GPU: a step of each stage was, on a CPU.
    """
    config, image_base = study(work, world), work / "study_gpu.safetensors"
    unet = large_unet_config()
    form = config.webvid.form.evolve(num_frames=16, max_stride=3)
    full = config.full.evolve(
        model=config.full.model.evolve(unet=unet),
        sd_init="large-web-image-base",
        sd_sha256=file_digest(image_base).sha256 if image_base.is_file() else "",
        sd_path=str(image_base),
        batch_size=32,
        num_steps=12_000,
        optimizer=config.full.optimizer.evolve(lr=2e-4, warmup_steps=500),
        ema_decay=0.999,
        precision="bf16",
        device="cuda",
        threads=None,
        state_every_seconds=300,
    )
    return config.evolve(
        webvid=config.webvid.evolve(form=form),
        full=full,
        spatial=config.spatial.evolve(
            model=full.model,
            batch_size=64,
            num_steps=1_500,
            keep_every_steps=250,
            optimizer=config.spatial.optimizer.evolve(lr=5e-5, warmup_steps=100),
            ema_decay=0.999,
            precision="bf16",
            device="cuda",
            threads=None,
        ),
        evaluation=config.evaluation.evolve(frames=16, device="cuda"),
    )


WATCHED = (
    "a red panda eating bamboo in the rain",
    "an old fisherman mending a net on a pier at dawn, waves behind him",
    "a sailing boat crossing a calm bay, seen from above",
    "fireworks over a city at night",
)


def single_gpu(work: Path = DEFAULT_WORK) -> PipelineConfig:
    """The paper's networks and sizes on one 80 GB card: a useful model in days rather than the paper's figures.

    0.96 M clips instead of 34.6 M, then 0.64 M images instead of 7.7 M. By counted operations at an assumed MFU of 28 %
    (`vc2 train full --recipe single_gpu --dry-run`): stage 1 takes 7.2 days on an A100, 2.3 on an H100, stage 2 11 and
    3.5 hours, encoding on the fly included. One rank has nobody to share with, so it runs without ZeRO, whose second
    copy of the masters would cost 11 GiB. Not run yet: fit and hours are computed, not measured.
    """
    config = paper(work)
    return config.evolve(
        full=config.full.evolve(batch_size=16, num_steps=60_000, world_size=1, micro_batch=2, zero_stage=0),
        spatial=config.spatial.evolve(batch_size=64, num_steps=10_000, world_size=1, micro_batch=16, zero_stage=0),
        evaluation=config.evaluation.evolve(world_size=1),
    )


def paper(work: Path = DEFAULT_WORK) -> PipelineConfig:
    """VideoCrafter2 as its paper states it: 270K steps at batch 128 on 32 GPUs, then 30K at batch 256 on 8.

    6,200 A100 hours for the first stage (3,900 with samples encoded beforehand), 130 for the second, by counted
    operations at an assumed MFU of 28 %; docs/scaling.md. Not run: nobody has lent us that. Micro-batches and
    activation checkpointing are chosen to fit 80 GB cards by the memory model, with a margin for what it leaves out.
    Raw data is looked for in `raw/` beside the work folder; set `webvid.source` and so on to say otherwise.

    The paper does not say how many images joined the videos of stage 1. A step of images in 16 is what trainers of the
    same family do (as often as a clip has frames). Such a step costs a sixteenth of a step of videos.
    """
    raw = work.parent / "raw"
    video = SampleForm(num_frames=16, width=512, height=320)
    full = TrainStage(
        name="full",
        model=_recomputing("selective"),
        sd_init="sd21-base",
        batch_size=128,
        image_share=1 / 16,
        loader=LoaderSettings(holdout=256),
        optimizer=OptimizerConfig(lr=5e-5, warmup_steps=1000),
        num_steps=270_000,
        world_size=32,
        micro_batch=2,
        device="cuda",
        validation=Validation(every=2_000, clips=128, prompts=WATCHED),
        keep_every_steps=10_000,
    )
    return PipelineConfig(
        webvid=ShardStage(
            source=WebVidSource(table=f"{raw}/webvid/results_10M_train.csv", videos=f"{raw}/webvid/videos"), form=video
        ),
        laion_coco=ShardStage(
            source=LaionSource(table=f"{raw}/laion-coco"),
            form=video.evolve(num_frames=1),
            filters=Filters(min_side=256),
        ),
        jdb=ShardStage(
            source=JourneyDBSource(
                table=f"{raw}/jdb/data/train/train_anno_realease_repath.jsonl.tgz",
                archives=f"{raw}/jdb/data/train/imgs",
            ),
            form=video.evolve(num_frames=1, height=512),
            filters=Filters(min_side=256),
        ),
        full=full,
        spatial=full.evolve(
            name="spatial",
            model=_recomputing("none"),
            strategy=Strategy(trainable="spatial"),
            sd_init="",
            batch_size=256,
            image_share=1.0,
            num_steps=30_000,
            world_size=8,
            micro_batch=16,
        ),
        evaluation=EvaluateStage(
            prompts_file=f"{raw}/evalcrafter/prompts.jsonl", precision="bfloat16", world_size=8, device="cuda"
        ),
    )


def _recomputing(level: Recompute) -> ModelConfig:
    model = ModelConfig()
    return model.evolve(unet=model.unet.evolve(gradient_checkpointing=level))


def world_folder(world: WorldConfig, work: Path) -> Path:
    """Where the small world of a config lies in the work folder."""
    return work / "world" / digest(world.identity())[:12]


def _with_world_prompts(evaluation: EvaluateStage, world: WorldConfig) -> EvaluateStage:
    from vc2.miniature.world import prompt_rows

    return evaluation.evolve(prompts=_as_prompts(prompt_rows(world)[: evaluation.num_prompts]))


@cache
def _composed_prompts(world: WorldConfig) -> tuple[Prompt, ...]:
    from vc2.miniature.world import composed_prompts

    return _as_prompts(composed_prompts(world))


def _as_prompts(rows: Sequence[Mapping[str, Any]]) -> tuple[Prompt, ...]:
    kept = ("truth", "seen", "kind")
    return tuple(
        Prompt(id=f"{number:04d}", text=row["prompt"], attributes={name: row[name] for name in kept if name in row})
        for number, row in enumerate(rows)
    )
