"""Shards, samples and scores as Ray Jobs: the same as by this machine, whatever becomes of starter, job and cluster."""

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.clusters import RayHead, ray_head
from tests.eval.test_generate import STAGE, make_checkpoint
from vc2.artifacts import ShardSet, load_manifest, shard_set_prefix
from vc2.data.config import FolderSource, ShardStage, shard_fingerprint, source_digest
from vc2.data.prepare import prepare
from vc2.eval.config import EvaluateStage, SampleStage
from vc2.eval.generate import generate
from vc2.eval.measure import take_lines
from vc2.miniature.config import WorldConfig
from vc2.pipeline.recipes import resolve
from vc2.pipeline.remote import ShardCall, _moved, prepare_as_job
from vc2.ray_jobs import is_running
from vc2.storage import LocalStore

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a Ray cluster on loopback")

CALLER = """
import json, signal, sys
from pathlib import Path
from vc2.data.config import ShardStage
from vc2.pipeline.remote import prepare_as_job
from vc2.storage import open_store
signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the command line does
stage, store, work, name = sys.argv[1:]
prepare_as_job(ShardStage.model_validate_json(stage), open_store(store), Path(work), fingerprint=name)
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    with pytest.MonkeyPatch.context() as patch, ray_head(tmp_path_factory.mktemp("head"), cpus=2) as head:
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
            patch.delenv(name, raising=False)
        patch.setenv("RAY_API_SERVER_ADDRESS", head.jobs)
        yield head


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> ShardStage:
    """Twelve pictures with captions, in three parts and four shards."""
    folder = tmp_path_factory.mktemp("mine")
    for number in range(12):
        noise = np.random.default_rng(number).integers(0, 255, (12, 16, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).resize((128, 96)).save(buffer, "JPEG", quality=90)
        (folder / f"p{number:02d}.jpg").write_bytes(buffer.getvalue())
        (folder / f"p{number:02d}.txt").write_text(f"picture {number}")
    source = FolderSource(name="mine", media="image", folder=str(folder))
    asked = {"source": source, "form": {"num_frames": 1, "width": 64, "height": 48}, "fetch": {"part_rows": 4}}
    return ShardStage.model_validate(asked | {"samples_per_shard": 3, "launcher": "ray"})


@pytest.fixture(scope="module")
def by_this_process(stage: ShardStage, head: RayHead, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the jobs are compared with: sha256 by name of the set that this process makes, spread over the cluster."""
    root = tmp_path_factory.mktemp("here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", head.address)
        prepare(stage, LocalStore(root / "store"), root / "work", fingerprint=name_of(stage))
    return contents(LocalStore(root / "store"), stage)


def name_of(stage: ShardStage) -> str:
    return shard_fingerprint("shard/mine", stage, source_digest(stage.source))


def contents(store: LocalStore, stage: ShardStage) -> dict[str, str]:
    return {entry.name: entry.sha256 for entry in load_manifest(store, prefix_of(stage)).files}


def prefix_of(stage: ShardStage) -> str:
    return shard_set_prefix("mine", name_of(stage))


def job_of(stage: ShardStage, attempt: int) -> str:
    return f"vc2-shard-mine-{name_of(stage)[:12]}-{attempt}"


def attempts(store: LocalStore, folder: str) -> list[str]:
    return [entry.key.rpartition("/")[2] for entry in store.list(f"{folder}/")]


def started(stage: ShardStage, store: LocalStore, work: Path, attempt: int) -> subprocess.Popen[bytes]:
    """A process that wants the set, and whose job runs."""
    words = [stage.model_dump_json(), store.uri, str(work), name_of(stage)]
    starter = subprocess.Popen([sys.executable, "-c", CALLER, *words], stderr=subprocess.DEVNULL)
    while f"{attempt:04d}.json" not in attempts(store, f"{prefix_of(stage)}/jobs") or not is_running(
        job_of(stage, attempt)
    ):
        assert starter.poll() is None
        time.sleep(0.1)
    return starter


def on_cluster(head: RayHead, words: str) -> list[psutil.Process]:
    """Processes of the cluster's machine whose command line has such words."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            is_meant = words in " ".join(process.info["cmdline"] or ())
            if is_meant and process.environ().get("VC2_WORK") == f"{head.folder}/work":
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_shards_are_the_same_whoever_is_lost_or_changes_their_mind(
    stage: ShardStage, head: RayHead, by_this_process: dict[str, str], tmp_path: Path
) -> None:
    """Cancel ends the job and all its work. Another one is started; its starter is killed, and the next finds it."""
    store = LocalStore(tmp_path / "store")
    starter = started(stage, store, tmp_path, 1)
    starter.send_signal(signal.SIGTERM)
    starter.wait()
    assert not is_running(job_of(stage, 1))
    _, alive = psutil.wait_procs(on_cluster(head, "vc2.pipeline.remote"), timeout=20)
    assert alive == []

    starter = started(stage, store, tmp_path, 2)
    starter.kill()
    starter.wait()
    told: list[str] = []
    made = prepare_as_job(
        stage, store, tmp_path, fingerprint=name_of(stage),
        progress=lambda work, done, total=None, **figures: told.append(f"{work} {done}/{total}"),
    )  # fmt: skip
    assert isinstance(made, ShardSet) and attempts(store, f"{prefix_of(stage)}/jobs") == ["0001.json", "0002.json"]
    assert told[-1] == "mine: shards 4/4"
    assert contents(store, stage) == by_this_process


def test_samples_and_scores_are_the_same(head: RayHead, tmp_path: Path) -> None:
    """Two ranks on the cluster make the bits of one here; prompts come from a file that the cluster need not have."""
    store = LocalStore(tmp_path / "store")
    checkpoint = make_checkpoint(store, tmp_path)
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"id": prompt.id, "prompt": prompt.text}) + "\n" for prompt in STAGE.prompts))
    settings = STAGE.model_dump() | {"prompts": (), "prompts_file": str(file), "world_size": 2, "flow": "dis"}
    wanted = EvaluateStage.model_validate(settings | {"metrics": ("Flow_Score",), "mode": "fixed"}).with_prompts()
    ray = wanted.evolve(launcher="ray")

    def sampled(stage: SampleStage, name: str):
        return generate(stage, store, tmp_path / "work", fingerprint=name * 64, checkpoint=checkpoint)

    here, there = sampled(wanted.sampling(), "a"), sampled(ray.sampling(), "b")
    assert here.content_digest == there.content_digest
    assert attempts(store, f"samples/{'b' * 64}/jobs") == ["0001.json"]
    file.unlink()  # while the digest is known, nobody needs it
    bound = [one.evolve(prompts=STAGE.prompts) for one in (wanted, ray)]
    lines = [take_lines(one, store, tmp_path / "work", made) for one, made in zip(bound, (here, there), strict=True)]
    assert lines[0] == lines[1] and len(lines[0]) == len(STAGE.prompts)


def test_a_job_that_is_lost_with_its_cluster_is_submitted_again(
    stage: ShardStage, head: RayHead, by_this_process: dict[str, str], tmp_path: Path
) -> None:
    """kill -9 of the head in the middle; it is started again and knows of nothing. Whoever waits has it done anew."""
    store, kills = LocalStore(tmp_path / "store"), []

    def kill_once(work: str, done: int, total: int | None = None, **figures: float | str) -> None:
        if not kills:
            kills.append(work)
            head.kill()
            head.start()

    assert prepare_as_job(stage, store, tmp_path, fingerprint=name_of(stage), progress=kill_once) is not None
    assert kills and contents(store, stage) == by_this_process


def test_a_job_looks_for_its_small_world_where_it_makes_it(tmp_path: Path) -> None:
    """Paths of the starter's work folder become those of the job's; all else stays."""
    world = WorldConfig(num_videos=3)
    stages = [resolve("miniature", {"world": {"num_videos": 3}}, work=tmp_path / place).jdb for place in ("a", "b")]
    asked = ShardCall(
        stage=stages[0], store="/s", work=str(tmp_path / "a"), fingerprint="f", change=None, removals=(), repeat=0,
        only=None, world=world,
    )  # fmt: skip
    assert _moved(asked, tmp_path / "b") == stages[1]
    assert _moved(asked.evolve(world=None), tmp_path / "b") == stages[0]
