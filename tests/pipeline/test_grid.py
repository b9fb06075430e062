"""The grid of samples: the evaluation's own videos, made once for both, on a page for the eyes."""

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.eval.test_generate import STAGE, make_checkpoint
from tests.eval.test_report import HOSTILE, Page
from vc2.artifacts import Artifact, Checkpoint, Report, SampleSet, commit, find, load_manifest, verify
from vc2.eval import generate_rank
from vc2.eval.config import EvaluateStage
from vc2.eval.generate import generate, sample_set_name, samples_prefix
from vc2.pipeline.grid import PAGE, grid_prefix, make_grid
from vc2.pipeline.recipes import PipelineConfig, miniature
from vc2.pipeline.stages import sampled
from vc2.progress import Progress, silent
from vc2.storage import LocalStore

PROMPTS = (STAGE.prompts[0].evolve(text=f"a dog {HOSTILE}"), *STAGE.prompts[1:])
EVALUATION = EvaluateStage.model_validate(STAGE.evolve(prompts=PROMPTS).model_dump() | {"benchmark": "none"})


def stage_one(store: LocalStore, folder: Path) -> Checkpoint:
    """Networks that were never trained, as a checkpoint of stage 1 with a training curve."""
    folder.mkdir(exist_ok=True)
    manifest = load_manifest(store, make_checkpoint(store, folder).prefix)
    run = f"runs/full/{'f' * 64}"
    made = commit(
        store,
        f"{run}/checkpoints/00000007",
        manifest.evolve(stage="full", fingerprint="f" * 64, counts={"steps": 7, "samples": 56}),
    )
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, 8)]
    attempt = {"number": 1, "start": None, "heartbeat_seconds": 1.0, "holder": {"host": "h", "pid": 1}}
    attempt["layout"] = {"world_size": 1, "micro_batch": 1, "threads": 1}
    store.write(f"{run}/attempts/0001.json", json.dumps(attempt).encode())
    store.write(f"{run}/metrics/0001-00000000.jsonl", "".join(f"{line}\n" for line in lines).encode())
    assert isinstance(made, Checkpoint)
    return made


class Made:
    """A grid of three prompts from a checkpoint, made first; then what the evaluation makes of all five."""

    def __init__(self, folder: Path) -> None:
        self.work = folder / "work"
        self.store = LocalStore(folder / "store")
        self.config: PipelineConfig = miniature(self.work).evolve(world=None, evaluation=EVALUATION)
        self.checkpoint = stage_one(self.store, folder / "weights")
        self.grid = make_grid(self.config, self.store, self.work, self.checkpoint, count=3)
        self.evaluated = sampled(EVALUATION.sampling(), self.store, self.work, self.checkpoint, 0, silent)

    def videos(self, samples: Artifact) -> dict[str, str]:
        files = load_manifest(self.store, samples.prefix).files
        return {entry.name: entry.sha256 for entry in files if entry.name.endswith(".mp4")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("grid"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def in_process(module: str, config_uri: str, *, world_size: int, work: Path, name: str, progress: Progress) -> None:
    generate_rank.main(config_uri)


@pytest.mark.usefixtures("one_thread")
def test_the_videos_are_those_that_the_evaluation_makes_by_itself(made: Made, tmp_path: Path) -> None:
    """Bit for bit, also where the evaluation has never heard of a grid: whole groups, so that nothing rounds apart."""
    manifest = load_manifest(made.store, made.grid.prefix)
    store = LocalStore(tmp_path / "store")
    alone = generate(
        EVALUATION.sampling(),
        store,
        tmp_path / "work",
        fingerprint="a" * 64,
        checkpoint=stage_one(store, tmp_path / "weights"),
        launch=in_process,
    )
    expected = {e.name: e.sha256 for e in load_manifest(store, alone.prefix).files if e.name.endswith(".mp4")}
    shown = made.videos(manifest.inputs["samples"])
    assert len(shown) == 4 and len(expected) == 5
    assert shown.items() <= expected.items()
    assert made.videos(made.evaluated) == expected


def test_what_the_grid_made_the_evaluation_does_not_make_again(made: Made) -> None:
    """Two groups of three were there; the set is whole, and every digest of it can be derived again."""
    facts = load_manifest(made.store, made.evaluated.prefix).facts
    assert facts["resumed_groups"] == 2
    assert list(verify(made.store, made.evaluated.prefix)) == []


def test_what_the_evaluation_made_the_grid_does_not_make_again(made: Made) -> None:
    """No ranks are started for another number of prompts, nor for all: then the evaluation's own set is shown."""
    jobs = sorted((made.work / "jobs").iterdir())
    few = make_grid(made.config, made.store, made.work, made.checkpoint, count=2)
    every = make_grid(made.config, made.store, made.work, made.checkpoint, count=64)
    assert sorted((made.work / "jobs").iterdir()) == jobs
    assert load_manifest(made.store, few.prefix).inputs["samples"].counts["videos"] == 2
    assert load_manifest(made.store, every.prefix).inputs["samples"].prefix == made.evaluated.prefix
    name = sample_set_name(EVALUATION.sampling(), made.checkpoint)
    assert find(made.store, samples_prefix(name), SampleSet) == made.evaluated


def test_a_grid_is_made_once_and_named_before_it_is_there(made: Made) -> None:
    """Asked again it is found; another number, step or repeat is another grid."""
    prefix = grid_prefix(made.config, made.checkpoint, count=3)
    assert made.grid.prefix == prefix
    assert make_grid(made.config, made.store, made.work, made.checkpoint, count=3) == made.grid
    later = made.checkpoint.evolve(prefix=f"runs/full/{'f' * 64}/checkpoints/00000008")
    others = [
        grid_prefix(made.config, made.checkpoint, count=4),
        grid_prefix(made.config, made.checkpoint, count=3, repeat=1),
        grid_prefix(made.config, later, count=3),
    ]
    assert len({prefix, *others}) == 4
    manifest = load_manifest(made.store, prefix)
    assert isinstance(made.grid, Report) and manifest.stage == "grid" and manifest.counts == {"videos": 3}
    assert set(manifest.inputs) == {"checkpoint", "samples"} and [e.name for e in manifest.files] == [PAGE]


def test_the_page_holds_its_videos_and_says_what_they_are_and_what_to_look_for(made: Made) -> None:
    """The videos as they were made, under their captions as text; checkpoint, step, weights, sampler; the curve."""
    text = made.store.read(f"{made.grid.prefix}/{PAGE}").decode()
    seen = Page(text)
    videos = [str(video["src"]).partition("base64,")[2] for video in seen.all("video")]
    digests = [hashlib.sha256(base64.b64decode(video)).hexdigest() for video in videos]
    manifest = load_manifest(made.store, made.grid.prefix)
    assert digests == list(made.videos(manifest.inputs["samples"]).values())[:3]
    words = "".join(seen.text)
    assert all(prompt.text in words and prompt.id in words for prompt in PROMPTS[:3])
    assert PROMPTS[3].text not in words
    for told in (made.checkpoint.uri, "averaged weights (EMA)", "ddim, 2 steps", "3 samples of train/full, step 7"):
        assert told in words
    assert "watermark" in words and "cannot mend motion" in words
    assert len([svg for svg in seen.all("svg") if svg.get("class") == "loss"]) == 1
    assert len(seen.scripts) == 1 and not seen.all("img")
    assert all(str(attributes.get("src", "data:")).startswith("data:") for _, attributes in seen.elements)
