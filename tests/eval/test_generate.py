from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from vc2.artifacts import Checkpoint, FileEntry, Manifest, SampleSet, commit, load_manifest, put_object, verify
from vc2.data.video_files import read_video
from vc2.errors import ConfigError
from vc2.eval.config import Prompt, SampleStage
from vc2.eval.generate import cut_into_groups, generate, prompt_seed
from vc2.eval.generate_rank import load_generator, main
from vc2.eval.ranks import Launch
from vc2.model.autoencoder import Autoencoder
from vc2.model.config import AutoencoderConfig, SamplerConfig, ScheduleConfig, TextConfig, UNetConfig
from vc2.model.unet import UNet3D
from vc2.model.weights import save_unet
from vc2.pipeline.sample import read_settings
from vc2.progress import Progress
from vc2.storage import LocalStore

UNET = UNetConfig(
    model_channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1, 2), num_head_channels=8,
    context_dim=16,
    norm_groups=8, temporal_length=4,
)  # fmt: skip
AUTOENCODER = AutoencoderConfig(block_out_channels=(8, 8), layers_per_block=1, norm_groups=4, scaling_factor=1.0)
TEXT = TextConfig(width=16, heads=2, layers=2, layers_used=1, context_length=16, seed=3)
STAGE = SampleStage(
    prompts=tuple(
        Prompt(id=f"{number:04d}", text=f"a {colour} circle")
        for number, colour in enumerate(("red", "green", "blue", "pink", "grey"))
    ),
    sampler=SamplerConfig(num_steps=2, guidance_scale=3.0, eta=1.0, fps=8),
    frames=3,
    width=16,
    height=16,
    play_fps=8,
    group_size=2,
)  # fmt: skip


def make_checkpoint(store: LocalStore, folder: Path) -> Checkpoint:
    """A checkpoint of networks that were never trained, as the training stages write them."""
    files: list[FileEntry] = []
    for name, seed in (("unet.safetensors", 0), ("unet_ema.safetensors", 1)):
        torch.manual_seed(seed)
        net = UNet3D(UNET)
        for parameter in net.parameters():  # zeros at the start would hide the text
            torch.nn.init.normal_(parameter, std=0.2)
        save_unet(net, folder / name)
        files.append(put_object(store, folder / name, name))
    torch.manual_seed(2)
    Autoencoder(AUTOENCODER).save(folder / "autoencoder.safetensors")
    files.append(put_object(store, folder / "autoencoder.safetensors", "autoencoder.safetensors"))
    parts = {"unet": UNET, "schedule": ScheduleConfig(), "autoencoder": AUTOENCODER, "text": TEXT}
    manifest = Manifest(
        kind="checkpoint", stage="train/full", stage_version=1, fingerprint="c" * 64, inputs={}, files=tuple(files),
        config={"model": {name: part.model_dump(mode="json") for name, part in parts.items()}},
    )  # fmt: skip
    reference = commit(store, "runs/train/full/c/checkpoints/00000001", manifest)
    assert isinstance(reference, Checkpoint)
    return reference


def contents(store: LocalStore, samples: SampleSet) -> dict[str, str]:
    return {entry.name: entry.sha256 for entry in load_manifest(store, samples.prefix).files}


def test_groups_do_not_depend_on_ranks_and_know_what_they_were_asked(tmp_path: Path) -> None:
    """World size moves nothing between groups; other words, weights or steps make another question."""
    checkpoint = make_checkpoint(LocalStore(tmp_path / "store"), tmp_path)
    groups = cut_into_groups(STAGE, STAGE.prompts, checkpoint)
    assert [len(group.prompts) for group in groups] == [2, 2, 1]
    assert cut_into_groups(STAGE.evolve(world_size=5), STAGE.prompts, checkpoint) == groups
    other = (STAGE.prompts[0].evolve(text="a red square"), *STAGE.prompts[1:])
    changed = [
        cut_into_groups(STAGE.evolve(prompts=other), other, checkpoint),
        cut_into_groups(STAGE.evolve(weights="raw"), STAGE.prompts, checkpoint),
    ]
    assert [group.asked == other.asked for group, other in zip(groups, changed[0], strict=True)] == [False, True, True]
    assert not any(group.asked == other.asked for group, other in zip(groups, changed[1], strict=True))


def test_a_video_depends_on_its_prompt_its_seed_and_the_chosen_weights(tmp_path: Path) -> None:
    """Noise is a prompt's own: its company changes nothing but rounding; text, seed and weights change the video."""
    store = LocalStore(tmp_path / "store")
    manifest = load_manifest(store, make_checkpoint(store, tmp_path).prefix)

    def videos(config: SampleStage, prompts: tuple[Prompt, ...] = STAGE.prompts[:2]) -> np.ndarray:
        generator = load_generator(store, manifest, config, tmp_path / "cache", torch.device("cpu"))
        return generator.videos(config, prompts).astype(int)

    pair = videos(STAGE)
    assert pair.shape == (2, 3, 16, 16, 3)
    assert abs(videos(STAGE, STAGE.prompts[1:2])[0] - pair[1]).max() <= 1
    assert abs(videos(STAGE, STAGE.prompts[1::-1])[::-1] - pair).max() <= 1
    reworded = (STAGE.prompts[0].evolve(text="two blue squares"), STAGE.prompts[1])
    assert abs(videos(STAGE, reworded)[0] - pair[0]).max() > 1
    assert abs(videos(STAGE.evolve(seed=4)) - pair).max() > 1
    assert abs(videos(STAGE.evolve(weights="raw")) - pair).max() > 1
    assert prompt_seed(1, STAGE.prompts[0]) == prompt_seed(1, reworded[0]) != prompt_seed(2, STAGE.prompts[0])
    with pytest.raises(ConfigError, match="multiples of 2"):
        videos(STAGE.evolve(width=15))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launch]:
    """Ranks one after the other in this process, as a launcher would tell them who they are: saves their imports."""

    def launch(module: str, config_uri: str, *, world_size: int, work: Path, name: str, progress: Progress) -> None:
        for rank in range(world_size):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(world_size))
            main(config_uri)

    threads = torch.get_num_threads()
    yield launch
    torch.set_num_threads(threads)


def test_samples_do_not_depend_on_ranks_or_interruptions(tmp_path: Path, in_process: Launch) -> None:
    """Two real ranks, three, and one that lost a group on the way give the same bytes; what is done is not redone."""
    store = LocalStore(tmp_path / "store")
    checkpoint = make_checkpoint(store, tmp_path)
    told: list[tuple[int, int | None]] = []

    def progress(work: str, done: int, total: int | None = None, **figures: float | str) -> None:
        told.append((done, total))

    two = generate(
        STAGE.evolve(world_size=2),
        store,
        tmp_path / "two",
        fingerprint="2" * 64,
        checkpoint=checkpoint,
        progress=progress,
    )
    assert two.counts == {"videos": 5, "groups": 3} and told[-1] == (5, 5)
    assert not [*verify(store, two.prefix)]
    said = read_settings(Path(store.root / two.prefix / "0004.mp4"))
    assert (said["prompt"], said["seed"]) == ("a grey circle", prompt_seed(STAGE.seed, STAGE.prompts[4]))
    frames, fps = read_video(store.read(f"{two.prefix}/0004.mp4"))
    assert frames.shape == (3, 16, 16, 3) and fps == 8
    assert generate(STAGE, store, tmp_path / "two", fingerprint="2" * 64, checkpoint=checkpoint) == two

    # An interrupted run: group 0 is whole, group 1 has a video but no record, group 2 answers another question.
    old, new = two.prefix, "samples/" + "1" * 64
    for name in ("0000.mp4", "0001.mp4", "0002.mp4"):
        store.write(f"{new}/{name}", store.read(f"{old}/{name}"))
    moved = store.read(f"{old}/groups/00000.json").replace(old.encode(), new.encode())
    store.write(f"{new}/groups/00000.json", moved)
    store.write(f"{new}/groups/00002.json", moved)
    one = generate(STAGE, store, tmp_path / "one", fingerprint="1" * 64, checkpoint=checkpoint, launch=in_process)
    assert contents(store, one) == contents(store, two)
    assert load_manifest(store, one.prefix).facts["resumed_groups"] == 1
    assert one.content_digest == two.content_digest

    three = STAGE.evolve(world_size=3)
    assert (
        generate(three, store, tmp_path, fingerprint="3" * 64, checkpoint=checkpoint, launch=in_process).content_digest
        == two.content_digest
    )


def test_a_size_that_cannot_be_made_is_told_and_nothing_is_committed(tmp_path: Path, in_process: Launch) -> None:
    """The rank says what it found and what the autoencoder needs."""
    store = LocalStore(tmp_path / "store")
    checkpoint = make_checkpoint(store, tmp_path)
    with pytest.raises(ConfigError, match="15 x 16 pixels: the autoencoder needs multiples of 2"):
        generate(
            STAGE.evolve(width=15), store, tmp_path, fingerprint="f" * 64, checkpoint=checkpoint, launch=in_process
        )
    assert store.entry(f"samples/{'f' * 64}/manifest.json") is None
