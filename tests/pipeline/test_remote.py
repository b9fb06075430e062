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
from tests.flows.stacks import wait_until
from vc2.artifacts import ShardSet, load_manifest, shard_set_prefix
from vc2.data.config import FolderSource, ShardStage, shard_fingerprint, source_digest
from vc2.data.prepare import prepare
from vc2.eval.config import EvaluateStage, SampleStage
from vc2.eval.generate import generate
from vc2.eval.measure import take_lines
from vc2.miniature.config import WorldConfig
from vc2.pipeline.recipes import resolve
from vc2.pipeline.remote import HERE, _moved, prepare_as_job
from vc2.ray_jobs import has_ended, is_running, job_id, submit
from vc2.storage import LocalStore, Store

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


def job_of(stage: ShardStage, store: Store, attempt: int) -> str:
    return job_id(f"vc2-shard-mine-{name_of(stage)[:12]}", store, attempt)


def attempts(store: LocalStore, folder: str) -> list[str]:
    return [entry.key.rpartition("/")[2] for entry in store.list(f"{folder}/")]


def started(head: RayHead, stage: ShardStage, store: LocalStore, work: Path, attempt: int) -> subprocess.Popen[bytes]:
    """A process that wants the set, and whose job runs. The job is held until it is seen: it may be a short one."""
    words = [stage.model_dump_json(), store.uri, str(work), name_of(stage)]
    starter = subprocess.Popen([sys.executable, "-c", CALLER, *words], stderr=subprocess.DEVNULL)
    while not (jobs := on_cluster(head, "vc2.pipeline.remote")):
        assert starter.poll() is None
        time.sleep(0.05)
    for job in jobs:
        job.suspend()
    while not is_running(job_of(stage, store, attempt)):
        assert starter.poll() is None
        time.sleep(0.1)
    for job in jobs:
        job.resume()
    return starter


def on_cluster(head: RayHead, module: str) -> list[psutil.Process]:
    """Processes of the cluster's machine that run such a module."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            is_meant = module in (process.info["cmdline"] or ())
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
    starter = started(head, stage, store, tmp_path, 1)
    starter.send_signal(signal.SIGTERM)
    starter.wait()
    # Ray stops a job when its supervisor has started, and that may take longer than the starter waits.
    wait_until(lambda: not is_running(job_of(stage, store, 1)), "the job goes on", 120)
    _, alive = psutil.wait_procs(on_cluster(head, "vc2.pipeline.remote"), timeout=60)
    assert alive == []

    starter = started(head, stage, store, tmp_path, 2)
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
    """kill -9 of the head in the middle; it is started again and knows of nothing. Whoever waits has it done anew. Nor
    is a job that has ended taken for one that was asked for just now, whatever its name."""
    store, kills = LocalStore(tmp_path / "store"), []
    submit(["this"], job_of(stage, store, 1))
    while not has_ended(job_of(stage, store, 1)):
        time.sleep(0.1)

    def kill_once(work: str, done: int, total: int | None = None, **figures: float | str) -> None:
        if not kills:
            kills.append(work)
            head.kill()
            head.start()

    assert prepare_as_job(stage, store, tmp_path, fingerprint=name_of(stage), progress=kill_once) is not None
    assert kills and contents(store, stage) == by_this_process
    assert attempts(store, f"{prefix_of(stage)}/jobs") == ["0001.json", "0002.json"]


def test_whoever_is_asked_to_stop_while_a_job_is_submitted_leaves_none(
    head: RayHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, when the job server has taken the job and the starter does not know it yet."""
    from ray.job_submission import JobSubmissionClient

    take = JobSubmissionClient.submit_job

    def take_and_interrupt(*asked: object, **settings: object) -> None:
        take(*asked, **settings)  # pyright: ignore[reportArgumentType, reportCallIssue]
        raise KeyboardInterrupt

    monkeypatch.setattr(JobSubmissionClient, "submit_job", take_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        submit(["http.server", "0", "--bind", "127.0.0.1"], "vc2-interrupted")
    wait_until(lambda: has_ended("vc2-interrupted"), "the job goes on", 120)  # by itself it would not end


def test_the_same_work_for_another_store_is_another_job(stage: ShardStage, tmp_path: Path) -> None:
    stores = [LocalStore(tmp_path / name) for name in ("a", "b")]
    assert len({job_of(stage, store, 1) for store in stores}) == 2


def test_a_job_looks_for_its_small_world_where_it_makes_it(tmp_path: Path) -> None:
    """Paths of the starter's work folder become those of the job's; all else stays. The request names neither."""
    world = WorldConfig(num_videos=16)
    stages = [resolve("miniature", {"world": {"num_videos": 16}}, work=tmp_path / place).jdb for place in ("a", "b")]
    asked = [_moved(stage, world, tmp_path / place, HERE) for stage, place in zip(stages, "ab", strict=True)]
    assert asked[0] == asked[1] and str(tmp_path) not in asked[0].model_dump_json()
    assert _moved(asked[0], world, HERE, tmp_path / "b") == stages[1]
    assert _moved(stages[0], None, HERE, tmp_path / "b") == stages[0]
