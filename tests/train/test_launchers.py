"""Whoever starts the ranks, they train the same network: bit for bit at the same layout."""

import contextlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from tests.clusters import ray_head, ray_node
from vc2.artifacts import Checkpoint, FileEntry, ShardSet
from vc2.errors import ConfigError, LaunchFailed, StoreError
from vc2.launch import Unheard, rank_environment, watch
from vc2.ports import free_port
from vc2.storage import Entry, LocalStore, open_store
from vc2.train.attempts import Attempt, Run, this_process
from vc2.train.config import Layout, TrainStage
from vc2.train.rehearsal import rehearse
from vc2.train.request import RankRequest
from vc2.train.run import train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed and gloo over loopback: Linux")

ROOT = Path(__file__).parents[2]
CALLER = """
import json, signal, sys
from pathlib import Path
from vc2.artifacts import ShardSet
from vc2.errors import Preempted
from vc2.launch import leave, report
from vc2.storage import open_store
from vc2.train.config import TrainStage
from vc2.train.run import train
signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the command line does
stage, store, work, fingerprint, shards = json.loads(sys.argv[1])
try:
    train(TrainStage.model_validate(stage), open_store(store), Path(work), fingerprint=fingerprint, progress=report,
          shards={name: ShardSet.model_validate(said) for name, said in shards.items()})
except Preempted:
    sys.exit(leave(75))
"""
NAME = "a" * 64


@dataclass(frozen=True)
class Place:
    """A store with shards, and a stage of a few steps on two ranks."""

    store: LocalStore
    work: Path
    stage: TrainStage
    shards: dict[str, ShardSet]

    def train(self, stage: TrainStage, fingerprint: str = NAME) -> Checkpoint:
        return train(stage, self.store, self.work, fingerprint=fingerprint, shards=self.shards)

    def call(self, stage: TrainStage, fingerprint: str = NAME) -> list[str]:
        """The same as a command."""
        shards = {name: said.model_dump(mode="json") for name, said in self.shards.items()}
        asked = [stage.model_dump(mode="json"), self.store.uri, str(self.work), fingerprint, shards]
        return [sys.executable, "-c", CALLER, json.dumps(asked)]


@pytest.fixture(scope="module")
def make_place(
    tmp_path_factory: pytest.TempPathFactory,
    stage: TrainStage,
    autoencoder_file: Path,
    noise_shards: Callable[..., ShardSet],
) -> Callable[[], Place]:
    model = stage.model.evolve(autoencoder_path=str(autoencoder_file))
    stage = stage.evolve(model=model, num_steps=4, state_every_steps=2, world_size=2, tensorboard=False)

    def make() -> Place:
        folder = tmp_path_factory.mktemp("place")
        store = LocalStore(folder / "store")
        shards = {medium: noise_shards(store, folder, medium) for medium in ("video", "image")}
        return Place(store, folder / "work", stage, shards)

    return make


@pytest.fixture(scope="module")
def by_torchrun(make_place: Callable[[], Place]) -> Checkpoint:
    """What the others are compared with."""
    place = make_place()
    return place.train(place.stage)


@contextlib.contextmanager
def started_by_slurm(place: Place, stage: TrainStage) -> Iterator[list[subprocess.Popen[str]]]:
    """Two tasks as `srun` starts them, with the script of the example; none outlives the block."""
    settings = rank_environment(2, place.work) | {
        "SLURM_NTASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo",
        "VC2_WORK": str(place.work),
    }  # fmt: skip
    command = [str(ROOT / "infra" / "slurm" / "rank.sh"), *place.call(stage)]
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ | settings | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()


def test_ranks_that_somebody_else_started_train_the_same(
    make_place: Callable[[], Place], by_torchrun: Checkpoint
) -> None:
    """Both stop with code 75 when they are asked to, and the same command ends with the weights of torchrun's ranks."""
    place = make_place()
    stage = place.stage.evolve(launcher="env", world_size=None)
    run = Run(place.store, "full", NAME)
    with started_by_slurm(place, stage.evolve(num_steps=400, keep_states=400)) as ranks:
        while not run.all_states():
            assert all(rank.poll() is None for rank in ranks), ranks[0].communicate()[0]
            time.sleep(0.05)
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        said = [rank.communicate()[0] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [75, 75], said
    assert json.loads(place.store.read(f"{run.prefix}/attempts/0001.ended"))["kind"] == "preemption"
    for ref in run.all_states():  # go on from step 2, whatever was reached
        if ref.step > 2:
            place.store.delete(f"{run.state_prefix(ref)}/manifest.json")
    with started_by_slurm(place, stage) as ranks:
        said = [rank.communicate()[0] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], said
    assert run.newest() == 2
    assert place.train(stage.evolve(launcher="local")).content_digest == by_torchrun.content_digest


@pytest.mark.slow
def test_the_deepspeed_launcher_starts_the_command_of_the_example(
    make_place: Callable[[], Place], tmp_path: Path
) -> None:
    """The script with a list of one host, two slots: the command line trains, and one rank tells what was made."""
    place = make_place()
    (tmp_path / "hostfile").write_text("# hosts\nlocalhost slots=2\n")
    sets = {"webvid": place.shards["video"], "laion-coco": place.shards["image"]}
    options = ["full", "--store", place.store.uri, "--work", str(place.work), "--progress", "none"]
    options += [word for name, shards in sets.items() for word in ("--shards", f"{name}={shards.uri}")]
    options += ["--set", "num_steps=1", "--set", "threads=1"]
    settings = rank_environment(2, place.work) | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DEEPSPEED_OPTIONS": "--no_ssh_check",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo",
        "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    command = [str(ROOT / "infra" / "hostfile" / "train.sh"), str(tmp_path / "hostfile"), *options]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("checkpoint: ") == 1


def test_a_wrong_number_of_ranks_is_refused(make_place: Callable[[], Place], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is claimed."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    place = make_place()
    with pytest.raises(ConfigError, match="WORLD_SIZE is 3, world_size=2"):
        place.train(place.stage.evolve(launcher="env"))
    assert Run(place.store, "full", NAME).newest() == 0


def test_a_starter_that_is_asked_to_stop_leaves_a_state(make_place: Callable[[], Place]) -> None:
    """SIGTERM to the starter alone, where no state would have been due: exit code 75, and the ranks have left one."""
    place = make_place()
    run = Run(place.store, "full", NAME)
    stage = place.stage.evolve(num_steps=100_000, state_every_steps=100_000)
    with subprocess.Popen(place.call(stage), stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        steps = (line for line in starter.stdout if '"work": "train/full"' in line)
        while json.loads(next(steps).partition(" ")[2])["done"] < 1:
            pass
        assert run.all_states() == []
        starter.send_signal(signal.SIGTERM)
        starter.communicate()
    assert starter.returncode == 75
    (ref,) = run.all_states()
    assert ref.step >= 1 and run.manifest(ref).step == ref.step
    assert json.loads(place.store.read(f"{run.prefix}/attempts/0001.ended"))["kind"] == "preemption"


class AwayAtFirst(LocalStore):
    """A store that does not answer the first four questions for a list."""

    asked = 0

    def list(self, prefix: str) -> Iterator[Entry]:
        self.asked += 1
        if self.asked < 5:
            raise StoreError("the store is away")
        return super().list(prefix)


def test_a_store_that_is_away_before_the_first_step_is_waited_for(
    make_place: Callable[[], Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More often than ranks are started anew; but not longer than `outage_seconds`."""
    monkeypatch.setattr("vc2.train.run.PAUSES", (0.01, 0.02))
    place = make_place()
    stage = place.stage.evolve(launcher="ray")  # ends soon: nobody said how many clips at once
    with pytest.raises(ConfigError, match="Set micro_batch"):
        replace(place, store=AwayAtFirst(Path(place.store.uri))).train(stage)
    with pytest.raises(StoreError, match="is away"):
        replace(place, store=AwayAtFirst(Path(place.store.uri))).train(stage.evolve(outage_seconds=0))


def test_what_may_pass_is_tried_again_and_what_cannot_is_not(make_place: Callable[[], Place]) -> None:
    """A rank killed by a signal: a new attempt goes on and ends as ever. A broken setting: one attempt, and why."""
    place = make_place()
    stage = place.stage.evolve(num_steps=60, keep_states=60)
    run = Run(place.store, "full", NAME)
    told: list[dict[str, float | str]] = []

    def kill_once(work: str, done: int, total: int | None = None, **figures: float | str) -> None:
        told.append(figures)
        if run.newest() == 1 and done >= 2 and run.all_states():
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error, OSError):  # gone meanwhile
                    if child.environ().get("RANK") == "1":
                        child.kill()

    train(stage, place.store, place.work, fingerprint=NAME, shards=place.shards, progress=kill_once)
    assert run.newest() == 2 and run.attempt(2).start is not None
    ended = json.loads(place.store.read(f"{run.prefix}/attempts/0001.ended"))
    assert ended["kind"] == "killed" and "SIGKILL" in ended["message"]
    assert any(str(figures.get("failed", "")).startswith("killed: ") for figures in told)
    wrong = place.stage.evolve(loader=place.stage.loader.evolve(holdout=6))
    with pytest.raises(LaunchFailed, match="holdout=6 keeps back") as caught:
        place.train(wrong, "b" * 64)
    assert caught.value.kind == "code" and Run(place.store, "full", "b" * 64).newest() == 1


# ---- ray ----


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A head with a job server, and a second node, each with one core: a rank runs on either."""
    logs = tmp_path_factory.mktemp("cluster")
    with ray_head(logs) as head:
        with ray_node(f"--address={head.address}", folder=head.folder, log=logs / "node.log"):
            yield head.jobs


@pytest.mark.slow
def test_a_rehearsal_on_a_cluster_goes_through_all_steps_and_leaves_nothing(
    ray_cluster: str, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank on each of two nodes; what they found is told here, and the store is as before."""
    from vc2.ray_jobs import cluster_resources

    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", ray_cluster)
    while (there := cluster_resources())["machines"] < 2:
        time.sleep(0.2)
    assert there["CPU"] == 2
    steps: list[float | str] = []
    found = rehearse(
        TrainStage(device="cpu", launcher="ray"), store, tmp_path / "work", world_size=2,
        progress=lambda work, done, total=None, **figures: steps.append(figures["step"]),
    )  # fmt: skip
    assert steps == ["started", "met", "summed", "updated", "kept", "restored"]
    assert found.world_size == 2 and found.state_bytes >= 4 * 4 * 2**20
    assert list(store.list("")) == []


@pytest.mark.slow
def test_a_ray_job_trains_the_same_and_outlives_whoever_started_it(
    make_place: Callable[[], Place], by_torchrun: Checkpoint, ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks on two nodes. The caller is killed in the middle; the next one attaches to the same job."""
    from vc2.ray_jobs import is_running, job_id

    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", ray_cluster)
    place = make_place()
    stage = place.stage.evolve(launcher="ray", micro_batch=2)
    run = Run(place.store, "full", NAME)
    job = job_id(f"vc2-train-full-{NAME[:12]}", place.store, 1)
    caller = subprocess.Popen(place.call(stage), stdout=subprocess.DEVNULL)
    while not (run.newest() and is_running(job)):
        assert caller.poll() is None
        time.sleep(0.2)
    caller.kill()
    caller.wait()
    told: list[int] = []
    made = train(
        stage, place.store, place.work, fingerprint=NAME, shards=place.shards,
        progress=lambda work, done, total=None, **figures: told.append(done),
    )  # fmt: skip
    assert run.newest() == 1 and run.attempt(1).holder.place == ""
    assert made.content_digest == by_torchrun.content_digest
    assert 4 in told
    assert json.loads(place.store.read(f"{run.prefix}/attempts/0001.heartbeat"))["ended"]


def test_without_a_cluster_it_says_what_to_set(
    make_place: Callable[[], Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No address, no job."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    place = make_place()
    with pytest.raises(ConfigError, match="set RAY_API_SERVER_ADDRESS"):
        place.train(place.stage.evolve(launcher="ray", micro_batch=2))


class JobServer(http.server.BaseHTTPRequestHandler):
    """Says that it is one, that a job runs, and that it will be stopped; of its log it knows nothing."""

    def do_GET(self) -> None:
        if self.path.endswith("/logs"):
            self.answer(500, {})
        elif "/jobs/" in self.path:
            self.answer(200, {"type": "SUBMISSION", "submission_id": "job-1", "status": "RUNNING", "entrypoint": ""})
        else:
            self.answer(200, {"version": "4", "ray_version": "2.0", "ray_commit": "", "session_name": ""})

    def do_POST(self) -> None:
        self.answer(200, {"stopped": True})

    def answer(self, status: int, answer: dict[str, object]) -> None:
        said = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_job_server_that_is_away_for_a_moment_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its job is polled again; after long, whoever watches gives up, and the job is left to itself."""
    from ray.job_submission import JobSubmissionClient

    from vc2.ray_jobs import RayJob

    with http.server.HTTPServer(("127.0.0.1", 0), JobServer) as server:
        answering = threading.Thread(target=server.serve_forever)
        answering.start()
        job = RayJob(JobSubmissionClient(f"http://127.0.0.1:{server.server_port}"), "job-1")
        server.shutdown()
        answering.join()
    assert job.poll() is None
    monkeypatch.setattr("vc2.ray_jobs.SILENCE", 0.0)
    monkeypatch.setattr(job, "cancel", lambda: pytest.fail("a job that may be well was stopped"))
    with pytest.raises(Unheard, match="has not answered"):
        watch(job)


def test_a_job_that_cannot_be_heard_or_stopped_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While its status is known it is watched, though its log cannot be had; if it does not stop, that is an error."""
    from ray.job_submission import JobSubmissionClient

    from vc2.ray_jobs import RayJob

    monkeypatch.setattr("vc2.ray_jobs.SILENCE", 0.0)
    with http.server.HTTPServer(("127.0.0.1", 0), JobServer) as server:
        answering = threading.Thread(target=server.serve_forever)
        answering.start()
        try:
            job = RayJob(JobSubmissionClient(f"http://127.0.0.1:{server.server_port}"), "job-1")
            assert [job.poll(), job.poll()] == [None, None]
            job.grace = 0.1
            job.cancel()
        finally:
            server.shutdown()
            answering.join()
    assert "it is still RUNNING" in caplog.text and "ray job stop job-1" in caplog.text


@pytest.mark.parametrize(("visible", "number"), [("3", 0), ("0,1,2,3", 3), ("", 3)])
def test_a_worker_that_sees_one_gpu_calls_it_the_first(visible: str, number: int) -> None:
    """Ray shows each worker its own GPU alone, whatever its number on the machine."""
    from vc2.ray_jobs import local_rank

    assert local_rank(3, visible) == number


@pytest.mark.s3
def test_a_request_is_read_from_any_store(s3_uri: str, stage: TrainStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the URI of the attempt that holds it; each machine has a work folder of its own."""
    layout = Layout(world_size=1, micro_batch=1, threads=1)
    request = RankRequest(
        stage=stage, store=s3_uri, work="/there", fingerprint=NAME, attempt=1, start=None, layout=layout, videos=(),
        images=(), autoencoder=FileEntry(name="a", key="objects/a", size=1, sha256="a"), start_from=None, inputs={},
    )  # fmt: skip
    run = Run(open_store(s3_uri), "full", NAME)
    said = request.model_dump(mode="json")
    attempt = Attempt(number=1, start=None, layout=layout, holder=this_process(), heartbeat_seconds=1, request=said)
    assert run.claim(attempt)
    uri = f"{s3_uri}/{run.prefix}/attempts/0001.json"
    monkeypatch.delenv("VC2_WORK", raising=False)
    assert RankRequest.load(uri) == request
    monkeypatch.setenv("VC2_WORK", "/here")
    assert RankRequest.load(uri) == request.evolve(work="/here")
    with pytest.raises(StoreError, match="no request to ranks"):
        RankRequest.load(uri.replace("0001", "0002"))
