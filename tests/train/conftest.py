"""A world of a few random clips and images, and a stage small enough to train in seconds."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import simplejpeg
import torch
from numpy.typing import NDArray

from vc2.artifacts import Manifest, ShardSet, commit, put_file, put_object
from vc2.data.ledger import parquet_bytes
from vc2.data.media import Encoded
from vc2.data.shards import SLOTS, ShardSample, shard_name, write_shard
from vc2.launch import Rank
from vc2.model.autoencoder import Autoencoder
from vc2.model.config import AutoencoderConfig, ModelConfig, TextConfig, UNetConfig
from vc2.model.partition import trainable_names
from vc2.model.schedule import NoiseSchedule
from vc2.model.text import TextEncoder
from vc2.model.unet import UNet3D
from vc2.seeding import derive_seed, generator
from vc2.storage import LocalStore, Store
from vc2.train.attempts import Attempt, Run, StateRef, newest_state, this_process
from vc2.train.config import Layout, OptimizerConfig, TrainStage
from vc2.train.ema import Ema
from vc2.train.encode import Batches, Encoders
from vc2.train.engine import create_engine
from vc2.train.loop import StopSignal, Trainer
from vc2.train.metrics import Metrics
from vc2.train.spikes import Spikes
from vc2.train.states import StateWriter, restore

UNET = UNetConfig(
    model_channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(2,),
    num_head_channels=8,
    context_dim=16,
    norm_groups=4,
)
AUTOENCODER = AutoencoderConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_groups=4)
TEXT = TextConfig(width=16, heads=2, layers=2, layers_used=2, context_length=8, seed=0)


@dataclass(frozen=True)
class Ref:
    """What a loader says of a sample."""

    kind: str
    position: int
    key: str
    caption: str
    fps: int

    @property
    def identity(self) -> str:
        return self.key


class RandomSamples:
    """A loader over seeded noise: every third step is of images."""

    def __init__(self, batch_size: int, count: int = 6) -> None:
        self.batch_size, self.count = batch_size, count
        self.reads: list[str] = []

    def refs(self, step: int, rank: int, world_size: int) -> list[Ref]:
        kind = "image" if step % 3 == 2 else "video"
        share = self.batch_size // world_size
        first = step * self.batch_size + rank * share
        return [
            Ref(kind, place, f"{kind}-{place % self.count}", f"a thing number {place % self.count}", 8 + place % 3)
            for place in range(first, first + share)
        ]

    def frames(self, ref: Ref) -> NDArray[np.uint8]:
        self.reads.append(ref.key)
        shape = (1 if ref.kind == "image" else 4, 16, 16, 3)
        return generator(0, "frames", ref.key).integers(0, 256, shape, dtype=np.uint8)

    def read(self, ref: Ref) -> tuple[Ref, NDArray[np.uint8]]:
        return ref, self.frames(ref)


@pytest.fixture(scope="session")
def stage() -> TrainStage:
    """Eight steps of four clips; a state every third step, every step logged."""
    return TrainStage(
        model=ModelConfig(unet=UNET, autoencoder=AUTOENCODER, text=TEXT),
        batch_size=4,
        image_share=0.3,
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=2),
        ema_decay=0.9,
        precision="fp32",
        num_steps=8,
        threads=1,
        device="cpu",
        log_every=1,
        state_every_steps=3,
        heartbeat_seconds=1,
    )


@pytest.fixture(scope="session")
def autoencoder_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder with seeded weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("autoencoder") / "autoencoder.safetensors"
    Autoencoder(AUTOENCODER).save(path)
    return path


@pytest.fixture
def encoders(autoencoder_file: Path) -> Encoders:
    autoencoder = Autoencoder.from_safetensors(autoencoder_file)
    return Encoders(autoencoder, TextEncoder(TEXT), torch.device("cpu"), memory_bytes=2**24)


@pytest.fixture
def random_samples() -> type[RandomSamples]:
    return RandomSamples


def claim(
    run: Run, number: int, *, start: StateRef | None = None, seconds: float = 60, micro_batch: int = 2
) -> Attempt:
    """Become attempt `number` of a run."""
    layout = Layout(world_size=1, micro_batch=micro_batch, threads=1)
    attempt = Attempt(number=number, start=start, layout=layout, holder=this_process(), heartbeat_seconds=seconds)
    assert run.claim(attempt)
    return attempt


@pytest.fixture(name="claim")
def _claim() -> Callable[..., Attempt]:
    return claim


@pytest.fixture
def run(tmp_path: Path, stage: TrainStage) -> Run:
    return Run(LocalStore(tmp_path / "store"), stage.name, "f" * 64)


@pytest.fixture
def start_attempt(run: Run, encoders: Encoders, tmp_path: Path) -> Callable[..., Trainer]:
    """Claim the next attempt and make it ready on one rank with plain torch, from the newest state."""

    def start(config: TrainStage, samples: Any = None, run: Run = run, micro_batch: int = 2) -> Trainer:
        number = run.newest() + 1
        state, _ = newest_state(run, at_most=config.num_steps)
        layout = claim(run, number, start=state.ref if state else None, micro_batch=micro_batch).layout
        rank = Rank(0, 1, 0)
        torch.manual_seed(derive_seed(config.seed, "initial weights"))
        unet = UNet3D(config.model.unet).train()
        engine = create_engine(
            unet, trainable_names(unet, config.strategy.trainable), config, micro_batch=layout.micro_batch
        )
        ema = Ema(engine.shard("master"), config.ema_decay)
        if state:
            restore(run, state, engine, ema, rank, tmp_path)
        return Trainer(
            config=config,
            run=run,
            attempt=number,
            layout=layout,
            rank=rank,
            device=torch.device("cpu"),
            engine=engine,
            ema=ema,
            schedule=NoiseSchedule(config.model.schedule),
            batches=Batches(samples or RandomSamples(config.batch_size), encoders, 0, 1, phase_of=config.phase_at),
            writer=StateWriter(run, number, layout, rank, tmp_path, config.keep_states),
            metrics=Metrics.resumed(state.step, state.window) if state else Metrics(0),
            stop=StopSignal(),
            step=state.step if state else 0,
            updates=state.updates if state else 0,
            spikes=Spikes(config.spikes, state.loop if state else None) if config.spikes else None,
        )

    return start


def put_noise_shards(store: Store, folder: Path, medium: str) -> ShardSet:
    """A set of six samples of seeded noise, 16 x 16 pixels, as `vc2.data` would have written it."""
    size, num_frames = 16, 1 if medium == "image" else 4
    samples, facts = [], {}
    for number in range(6):
        key = f"{medium}-{number}"
        frames = generator(0, "frames", key).integers(0, 256, (num_frames, size, size, 3), dtype="uint8")
        facts[key] = {"caption": f"{medium} of thing {number}", "fps": 0 if medium == "image" else 8 + number % 3}
        parts = tuple(simplejpeg.encode_jpeg(frame, 95) for frame in frames)
        encoded = Encoded("jpg" if medium == "image" else "mjpeg", parts, (), None, 0)
        samples.append(ShardSample(key, encoded, facts[key]))
    path = folder / f"{medium}.tar"
    same = {"shard": 0, "num_frames": num_frames, "width": size, "height": size}
    rows = [
        same | {"slot": slot, **place, **facts[place["key"]]} for slot, place in enumerate(write_shard(path, samples))
    ]
    prefix = f"shards/{medium}/{medium}"
    files = (
        put_object(store, path, shard_name(0)),
        put_file(store, prefix, "index.parquet", parquet_bytes(pa.Table.from_pylist(rows, SLOTS))),
    )
    manifest = Manifest(
        kind="shard_set", stage="shard", stage_version=1, fingerprint=medium, config={}, inputs={}, files=files,
        counts={"samples": len(rows)}, facts={"media": medium, "source": medium}, licenses={medium: "made up"},
    )  # fmt: skip
    found = commit(store, prefix, manifest)
    assert isinstance(found, ShardSet)
    return found


@pytest.fixture(scope="session")
def noise_shards() -> Callable[..., ShardSet]:
    return put_noise_shards
