"""Work on a Ray cluster as Ray Jobs: ranks, or one process that needs the cluster.

    flow or command   submits the job, polls it, stops it          JobSubmissionClient, HTTP to the job server
    Ray Job           `python -m vc2.ray_jobs`, on the cluster     Ray Train; prints what the ranks say
    train worker      one per rank, placed by Ray                  sets the rank's variables, hands on its lines
    rank              `python -m vc2.launch rank MODULE URI`       the same process as under any other launcher

The submission id (`job_id`) names the work, its store and which attempt at it this is, so whoever lost a job finds it
again: a job that is there already is attached to. The job lives and dies by itself. When it is stopped, Ray ends its
workers, and a rank dies with its worker. A cluster whose head was started anew knows nothing of its jobs: then the job
is lost.

A rank is a process of its own, since it handles signals, exits at once when it fails, and makes its own process group;
so workers need no process group of theirs, and Ray Train is asked for none.
"""

import hashlib
import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vc2.errors import ConfigError, LaunchFailed, first_line
from vc2.failures import RankError, Retries, hung, killed_by
from vc2.launch import GRACE, PARENT, PREEMPTED, RANK, Job, Unheard, last_lines, rank_environment, watch
from vc2.ports import free_port
from vc2.progress import Progress, silent
from vc2.storage import Store, join_uri

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

__all__ = ["RayJob", "cluster_resources", "do_as_job", "has_ended", "is_running", "job_id", "local_rank", "start_job"]

log = logging.getLogger(__name__)

SERVER = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # environment variables that name the cluster
PASSED_ON = ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "VC2_MIRROR", "VC2_OFFLINE")  # no secrets: jobs show them
SHARE = 20.0  # a log is not asked for again before so many times the seconds that it took
SUBMIT = 120.0  # seconds for which a job server that takes no job, or does not say what there is, is asked again
SILENCE = 600.0  # seconds for which the job server may not answer before its job is called unheard
LAST_WORDS = 60.0  # seconds for which the log of a job that has ended may not be had, before it ends without
LATE = 5.0  # seconds after which a job whose submission was broken off is known, if it ever is
NO_ANSWER = (RuntimeError, OSError)  # of a job server; what `requests` raises is an OSError
PROGRESS_EVERY = 1.0  # seconds between two lines of progress of one work in a job's log
RETRIES = 2  # attempts at a job after failures that may pass, that get no further than the one before


# ---- the side of the starter ----


class RayJob(Job):
    """A job on the cluster, by its submission id."""

    outlives_starter = True

    def __init__(self, client: "JobSubmissionClient", job_id: str) -> None:
        super().__init__(job_id)
        self._client, self.job_id = client, job_id
        self._heard = time.monotonic()
        self._ended: float | None = None  # since when it is known to have ended
        self._text, self._read, self._next_look = "", 0, 0.0

    @property
    def log(self) -> str:
        return f"ray job logs {self.job_id}"

    def poll(self, progress: Progress = silent) -> int | None:
        try:
            status = _asked(self._client, self.job_id)
        except NO_ANSWER as error:  # the job does not need its server
            if time.monotonic() - self._heard > SILENCE:
                raise Unheard(
                    f"{self.job_id}: the job server has not answered for {SILENCE:.0f} s ({first_line(error)}); the "
                    "same command comes back to the job"
                ) from None
            return None
        self._heard = time.monotonic()
        if status is None:
            why = "the cluster does not know the job any more; its head was started anew"
            self.errors.append(RankError(0, "communication", why))
            self._hear([], progress, is_last=True)
            return 1
        if status.is_terminal() and self._ended is None:
            self._ended = time.monotonic()
        if status.is_terminal() or time.monotonic() >= self._next_look:
            try:
                self._read_log(progress, is_last=status.is_terminal())
            except NO_ANSWER as error:
                if self._ended is None or time.monotonic() - self._ended < LAST_WORDS:
                    return None
                why = f"the job has ended ({status.value}), and its log cannot be had: {first_line(error)}"
                self.errors.append(RankError(0, "communication", why))
        if not status.is_terminal():
            return None
        if status.value == "STOPPED":
            self.errors.append(RankError(0, "preemption", f"{self.job_id} was stopped; the same command goes on"))
        return 0 if status.value == "SUCCEEDED" else 1

    def _read_log(self, progress: Progress, *, is_last: bool) -> None:
        began = time.monotonic()
        self._text = self._client.get_job_logs(self.job_id)
        self._next_look = time.monotonic() + SHARE * (time.monotonic() - began)
        whole = len(self._text) if is_last else self._text.rfind("\n") + 1
        self._hear(self._text[self._read : whole].splitlines(), progress, is_last=is_last)
        self._read = max(self._read, whole)

    def cancel(self) -> None:
        until = time.monotonic() + self.grace
        is_asked, is_told, why = False, False, ""
        while time.monotonic() < until:
            try:
                status = _asked(self._client, self.job_id)
                if status is None or status.is_terminal():
                    return
                why = f"it is still {status.value}"
                if not is_told:
                    is_told = True
                    log.warning("%s: asked to stop; the ranks have %.0f s to leave", self.job_id, self.grace)
                is_asked = is_asked or self._client.stop_job(self.job_id)
            except NO_ANSWER as error:
                why = f"the job server says {first_line(error)}"
            time.sleep(0.2)
        log.error(
            "%s: not stopped in %.0f s (%s), so it may go on; stop it by: ray job stop %s",
            self.job_id, self.grace, why, self.job_id,
        )  # fmt: skip

    def tail(self, lines: int = 15) -> str:
        return last_lines(self._text, lines)


def start_job(module: str, config_uri: str, *, world_size: int, job_id: str, device: str = "auto") -> RayJob:
    """Start ranks of `python -m module config_uri` on the cluster, or attach to the job of that id.

    Args:
        module: Importable on all machines of the cluster, as vc2 is.
        config_uri: That all of them can read.
        world_size: Ranks; each gets a CPU, and a GPU where the cluster has some.
        job_id: Submission id.
        device: `cpu`: no GPUs are taken.

    Raises:
        ConfigError: If no cluster is named.
        LaunchFailed: If it does not take the job.
    """
    return submit(["vc2.ray_jobs", module, config_uri, str(world_size), device], job_id)


def submit(words: Sequence[str], job_id: str) -> RayJob:
    """Run `python -m words...` on the cluster's head, or attach to the job of that id; errors as of `start_job`."""
    client = _client()
    try:
        return _submitted(client, words, job_id)
    except Exception:
        raise
    except BaseException:  # asked to stop, and the job server may have taken it already
        job, until = RayJob(client, job_id), time.monotonic() + LATE
        with suppress(*NO_ANSWER):
            while _asked(client, job_id) is None and time.monotonic() < until:
                time.sleep(0.2)
        job.cancel()
        raise


def _submitted(client: "JobSubmissionClient", words: Sequence[str], job_id: str) -> RayJob:
    if _status(client, job_id) is not None:
        return RayJob(client, job_id)
    settings = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    until = time.monotonic() + SUBMIT
    while True:
        try:
            client.submit_job(
                entrypoint=f"python -m {shlex.join(words)}", submission_id=job_id, runtime_env={"env_vars": settings}
            )
            return RayJob(client, job_id)
        except NO_ANSWER as error:  # as of a head that has just been started
            if _status(client, job_id) is not None:  # another starter was first
                return RayJob(client, job_id)
            if time.monotonic() > until:
                raise LaunchFailed(
                    f"{job_id}: the job server refused it ({first_line(error)})", "communication"
                ) from None
        time.sleep(2.0)


def do_as_job(
    name: str,
    request: bytes,
    store: Store,
    folder: str,
    begin: Callable[[str, str], RayJob],
    *,
    reached: Callable[[], int],
    progress: Progress = silent,
) -> None:
    """Have a piece of work done by a Ray Job: by the newest one where that runs, else by another. Safe to repeat.

    What was asked of attempt n is kept at `folder/<n>.json`; its job is `job_id(name, store, n)`. One that failed by
    what may pass is followed by another; one that its starter left alone is come back to.

    Args:
        name: Of the work.
        request: What is asked.
        store, folder: Where requests are kept; the cluster must reach the store by its URI.
        begin: Starts the job, or attaches to it, by the URI of the request and the submission id.
        reached: How far the work has come, in any unit that grows.
        progress: Told what the job reports.

    Raises:
        ConfigError: If no cluster is named.
        LaunchFailed: If a job failed and another would not help, or did not.
        Preempted: If the job was stopped.
    """
    retries = Retries(RETRIES)
    while True:
        try:
            number = _attempt(name, request, store, folder)
            job = begin(join_uri(store.uri, f"{folder}/{number:04d}.json"), job_id(name, store, number))
            watch(job, progress, interval=1.0)
            return
        except Unheard:
            raise  # it may well go on, and is come back to
        except LaunchFailed as failure:
            pause = retries.pause(failure, reached())
            if pause is None:
                raise
            log.warning("%s: %s; another attempt in %.0f s", name, failure, pause)
            time.sleep(pause)


def _attempt(name: str, request: bytes, store: Store, folder: str) -> int:
    """The attempt to work on: the newest where its job runs, or was asked for and never begun; else a new one."""
    client = _client()
    while True:
        newest = max((int(Path(entry.key).stem) for entry in store.list(f"{folder}/")), default=0)
        if newest:
            status = _status(client, job_id(name, store, newest))
            if status is None and store.read(f"{folder}/{newest:04d}.json") == request:
                return newest  # its starter ended right then, another is about to begin it, or its cluster is gone
            if status is not None and not status.is_terminal():
                return newest
        if store.write_if_absent(f"{folder}/{newest + 1:04d}.json", request):
            status = _status(client, job_id(name, store, newest + 1))
            if status is None or not status.is_terminal():
                return newest + 1
            # Else the cluster remembers what the store does not: a job that was asked something else.


def job_id(name: str, store: Store, attempt: int) -> str:
    """The submission id of an attempt at a piece of work. It says which store is meant, by six digits of its URI: the
    same work for another store is another job."""
    return f"{name}-{hashlib.sha256(store.uri.encode()).hexdigest()[:6]}-{attempt}"


def is_running(job: str) -> bool:
    """Whether there is a job of that id that has not ended."""
    status = _status(_client(), job)
    return status is not None and not status.is_terminal()


def has_ended(job: str) -> bool:
    """Whether there is a job of that id, and it has ended."""
    status = _status(_client(), job)
    return status is not None and status.is_terminal()


def cluster_resources() -> dict[str, float]:
    """What the machines of the cluster have in all, used or not: `CPU`, `GPU`, `memory` and whatever else they name;
    under `machines` how many there are.

    Raises:
        ConfigError: If no cluster is named.
        LaunchFailed: If it does not answer.
    """
    _client()  # tells what is wrong in our words
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    until = time.monotonic() + SUBMIT
    while True:
        try:
            nodes = list_nodes(filters=[("state", "=", "ALIVE")], limit=10_000)
            break
        except (RayStateApiException, *NO_ANSWER) as error:  # as of a head that has just been started
            if time.monotonic() > until:
                why = first_line(error).partition(". ")[0]
                raise LaunchFailed(f"the cluster does not say what it has ({why})", "communication") from None
        time.sleep(2.0)
    found: dict[str, float] = {"machines": len(nodes)}
    for node in nodes:
        for name, amount in vars(node)["resources_total"].items():  # types do not know it
            found[name] = found.get(name, 0) + amount
    return found


def _client() -> "JobSubmissionClient":
    if not any(os.environ.get(name) for name in SERVER):
        raise ConfigError(f"launcher=ray: no cluster is named; set {SERVER[0]}, for example to http://HEAD:8265")
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient()
    except (ConnectionError, RuntimeError) as error:
        where = next(os.environ[name] for name in SERVER if os.environ.get(name))
        raise LaunchFailed(
            f"launcher=ray: no job server answers at {where} ({first_line(error)}); it comes with ray[default], "
            "extra `cluster`",
            "communication",
        ) from None


def _status(client: "JobSubmissionClient", job_id: str) -> Any:
    """What a job server that answered a moment ago says of a job; one that is away is asked again for a while."""
    until = time.monotonic() + SILENCE
    while True:
        try:
            return _asked(client, job_id)
        except NO_ANSWER as error:
            if time.monotonic() > until:
                raise Unheard(f"{job_id}: for {SILENCE:.0f} s the job server says {first_line(error)}") from None
        time.sleep(2.0)


def _asked(client: "JobSubmissionClient", job_id: str) -> Any:
    """What the job server says of a job; None: it knows none of that id."""
    try:
        return client.get_job_status(job_id)
    except NO_ANSWER as error:
        if "does not exist" in str(error) or "status code 404" in str(error):
            return None
        raise


# ---- on the cluster ----


class Ears:
    """An actor that keeps what ranks say until the job prints it: logs of workers come late, or not at all."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def tell(self, line: str) -> None:
        self._lines.append(line)

    def heard(self) -> list[str]:
        """What was said since the last call."""
        lines, self._lines = self._lines, []
        return lines


def run_job(module: str, config_uri: str, world_size: int, device: str) -> int:
    """Run all ranks and print what they say; the exit code of the job."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    ray.init(log_to_driver=False)
    # Asked for by name they are waited for: a cluster that grows has none while it is idle.
    use_gpu = device == "cuda" or (device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0)
    ears = ray.remote(num_cpus=0)(Ears).remote()
    over, printed = threading.Event(), _Printed()
    speaker = threading.Thread(target=_print_all, args=(ears, over, printed), daemon=True)
    speaker.start()
    failure = None
    with tempfile.TemporaryDirectory(prefix="vc2-train-", ignore_cleanup_errors=True) as folder:  # stays next to empty
        trainer = DataParallelTrainer(
            start_rank,
            train_loop_config={"module": module, "config_uri": config_uri, "ears": ears},
            scaling_config=ScalingConfig(num_workers=world_size, use_gpu=use_gpu),
            run_config=RunConfig(
                name="vc2",
                storage_path=folder,
                failure_config=FailureConfig(max_failures=0),  # whoever submitted the job decides about another attempt
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            failure = error
        finally:
            over.set()
            speaker.join(GRACE)  # whatever ended the ranks, what they said is printed
    if failure is None:
        return 0
    if not printed.errors:
        print(failure, flush=True)
    return PREEMPTED if printed.errors and '"kind": "preemption"' in printed.errors[0] else 1


class _Printed:
    """What a job has said: progress now and then, all else at once."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self._last: dict[str, float] = {}

    def add(self, line: str) -> None:
        if line.startswith("@error "):
            self.errors.append(line)
        if line.startswith("@progress "):
            try:
                said = json.loads(line.partition(" ")[2])
            except ValueError:
                return
            work, now = str(said.get("work")), time.monotonic()
            if said.get("done") != said.get("total") and now - self._last.get(work, -PROGRESS_EVERY) < PROGRESS_EVERY:
                return
            self._last[work] = now
        print(line, flush=True)


def _print_all(ears: Any, over: threading.Event, printed: _Printed) -> None:
    import ray

    is_last = False
    while not is_last:
        is_last = over.wait(0.5)
        for line in ray.get(ears.heard.remote()):
            printed.add(line)


def start_rank(config: dict[str, Any]) -> None:
    """On a train worker: meet the others, run the rank, hand on its lines.

    Raises:
        RuntimeError: If the rank failed.
    """
    import ray
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    context, ears = get_context(), config["ears"]
    rank = context.get_world_rank()
    meeting = f"{ray.util.get_node_ip_address()} {free_port('')}" if rank == 0 else ""
    address, port = broadcast_from_rank_zero(meeting).split()
    work = Path(os.environ.get("VC2_WORK") or Path(tempfile.gettempdir()) / "vc2")
    settings = rank_environment(context.get_local_world_size(), work) | {
        "RANK": str(rank),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(local_rank(context.get_local_rank(), os.environ.get("CUDA_VISIBLE_DEVICES", ""))),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "VC2_WORK": str(work),  # the request names a folder of the starter's machine
        PARENT: str(os.getpid()),
    }
    if address.startswith("127."):
        settings["GLOO_SOCKET_IFNAME"] = "lo"
    process = subprocess.Popen(
        [sys.executable, "-m", "vc2.launch", RANK, config["module"], config["config_uri"]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | settings,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    for line in process.stdout:
        line = line.rstrip("\n")
        ray.get(ears.tell.remote(line if line.startswith("@") else f"rank {rank}: {line}"))
    code = process.wait()
    if code < 0:
        said = killed_by(rank, -code, time.time()).as_dict()
        ray.get(ears.tell.remote(f"@error {json.dumps(said)}"))
    elif code and (stuck := hung(rank, process.pid, str(work), time.time())) is not None:
        ray.get(ears.tell.remote(f"@error {json.dumps(stuck.as_dict())}"))
    if code:
        time.sleep(GRACE / 4)  # Ray Train ends all workers with the first that fails: let others say why they did
        raise RuntimeError(f"rank {rank} ended with exit code {code}")


def local_rank(by_ray: int, visible: str) -> int:
    """Number of a rank's GPU among those that its worker sees: Ray shows each worker its own alone."""
    return 0 if len([gpu for gpu in visible.split(",") if gpu]) == 1 else by_ray


if __name__ == "__main__":
    from vc2 import ray_jobs  # by its name, so that workers find what they are sent

    sys.exit(ray_jobs.run_job(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]))
