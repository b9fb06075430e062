"""The whole pipeline through a real server and worker, on a store that fails, while processes of all kinds are killed.

Who is killed and when is drawn from a seed. The stack is kept up as somebody who watches it would: what is missing of
it is started again, and a run that ended other than well is retried, or submitted anew. In the end shards and weights
are those of a run that nobody disturbed, byte for byte, and nobody is left.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from flows.follow import FINAL
from flows.server import ROOT, Stack, StackError
from tests.digests import as_options, faults_of, made
from tests.faults import FaultyProxy
from tests.flows.stacks import TINY_WORLD, Running, furnish, processes_of, wait_until
from vc2.artifacts import load_manifest
from vc2.pipeline.driver import STAGES, plan
from vc2.pipeline.recipes import resolve
from vc2.ports import free_port
from vc2.storage import Store, open_store

TINY_SHARDS = {"samples_per_shard": 8}
PATIENT = {"total_timeout": 8, "idle_timeout": 6, "connect_timeout": 6}  # on a busy machine what answers at all does so
TINY_TRAINING = {"batch_size": 4, "num_steps": 12, "state_every_steps": 3, "heartbeat_seconds": 1}
TINY = {
    "world": TINY_WORLD,
    "webvid": TINY_SHARDS,
    "laion_coco": TINY_SHARDS | {"fetch": PATIENT},
    "jdb": TINY_SHARDS,
    "full": TINY_TRAINING,
    "spatial": TINY_TRAINING | {"num_steps": 6, "state_every_steps": 2, "world_size": 1},
    "evaluation": {"sampler": {"num_steps": 2}, "group_size": 1, "world_size": 1, "metrics": ["Flow_Score"]},
}
UNFINISHED = ("RUNNING", "PENDING", "CANCELLING", "PAUSED", "SCHEDULED")
FAULTS = 0.02  # share of calls to the store that fail
MOST_TRIES = 8
WHOLE = range(100, 120)  # seeds of runs of the whole pipeline
LIMIT = 1200.0  # seconds for a run with all its tries


@dataclass
class Soaked:
    """What came of one disturbed run."""

    seed: int
    killed: list[str] = field(default_factory=list)  #: kinds of processes, in order
    tries: int = 1
    ended: list[str] = field(default_factory=list)  #: states that the tries ended in
    faults: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Disturbed:
    """A stack that stays up, and a store behind a network that fails."""

    work: Path
    port: int
    environment: Mapping[str, str]
    proxy: FaultyProxy  #: before the store
    undisturbed: Mapping[str, str]
    results: list[Soaked] = field(default_factory=list)

    @property
    def running(self) -> Running:
        return Running(self.work, self.port, None)

    def stack(self, command: str, *options: str) -> None:
        arguments = [sys.executable, "-m", "flows.stack", command, "--work", str(self.work), *options]
        done = subprocess.run(
            arguments, cwd=ROOT, env=dict(self.environment), capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{done.stdout}{done.stderr}"

    def is_whole(self) -> bool:
        stack = Stack.recorded(self.work)
        return stack is not None and stack.ended() is None

    def of_the_stack(self) -> dict[int, str]:
        """Processes that stay, by pid."""
        stack = Stack.recorded(self.work)
        return {owned.pid: name for name, owned in stack.owned.items() if owned.process()} if stack else {}

    def victims(self, run: str) -> dict[str, list[psutil.Process]]:
        """Everything that runs, by kind."""
        known, found = self.of_the_stack(), {}
        for process in processes_of(self.work):
            try:
                kind = known.get(process.pid) or kind_of(process.environ(), process.cmdline(), run)
            except psutil.Error:
                continue
            found.setdefault(kind, []).append(process)
        return found

    def left(self) -> list[str]:
        """Processes that should have ended with the runs."""
        found, known = [], self.of_the_stack()
        for process in processes_of(self.work):
            try:
                if process.pid not in known:
                    found.append(" ".join(process.cmdline()[:8]))
            except psutil.Error:
                continue
        return found


def kind_of(environment: Mapping[str, str], words: list[str], run: str) -> str:
    command = " ".join(words)
    if "LOCAL_RANK" in environment:
        return "rank"
    if "torch.distributed" in command:
        return "torchrun"
    if command.startswith("ray::"):
        return "ray worker"
    if "/ray/" in command or "vc2.ray" in command:
        return "ray"
    if "prefect.engine" in command:
        return "driver" if environment.get("PREFECT__FLOW_RUN_ID", "").endswith(run) else "stage"
    return "other"


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory, s3_endpoint: str) -> Iterator[Disturbed]:
    work = tmp_path_factory.mktemp("soak")
    furnish(work)
    command = [sys.executable, "-m", "vc2.cli", "run", "miniature", "--store", str(work / "undisturbed")]
    done = subprocess.run(
        [*command, "--work", str(work), *as_options(TINY)], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    undisturbed = open_store(str(work / "undisturbed"))
    assert list(faults_of(undisturbed)) == []
    with FaultyProxy(s3_endpoint, rate=0.0, stall=0.5) as proxy:
        own = {name: value for name, value in os.environ.items() if not name.startswith("VC2_")}
        own |= {"AWS_ENDPOINT_URL": proxy.endpoint, "VC2_OFFLINE": "1", "VC2_RESCUE_SECONDS": "2"}
        there = Disturbed(work, free_port(), own, proxy, made(undisturbed, work, TINY))
        try:
            yield there
        finally:
            there.stack("down")
    assert processes_of(work) == []
    if whole := [one for one in there.results if one.seed >= WHOLE[0]]:
        write_down(whole)


def write_down(results: list[Soaked]) -> None:
    """The summary of a soak, with what other parts of it have found on the same day."""
    now = datetime.now(UTC)
    path = ROOT / "benchmarks" / "results" / f"soak-{now.date()}.json"
    before = json.loads(path.read_text())["each"] if path.is_file() else []
    found = {one["seed"]: one for one in [*before, *map(asdict, results)]}
    each = [found[seed] for seed in sorted(found)]
    summary = {
        "command": "make soak (tests/flows/test_soak.py)",
        "date": now.isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count()},
        "runs": len(each),
        "killed": dict(Counter(kind for one in each for kind in one["killed"]).most_common()),
        "faults": dict(sum((Counter(one["faults"]) for one in each), Counter())),
        "tries": dict(sorted(Counter(one["tries"] for one in each).items())),
        "seconds": round(sum(one["seconds"] for one in each)),
        "each": each,
    }
    path.write_text(json.dumps(summary, indent=1) + "\n")


def disturb(there: Disturbed, store: str, seed: int, last: str, *, kills: int, pause: float) -> Soaked:
    """One run to its good end, whatever is killed meanwhile: so many processes, up to so many seconds between them."""
    chance, tested = random.Random(seed), Soaked(seed)
    api, started = there.running.api, time.monotonic()
    asked = {"store": store, "overrides": TINY, "stop_after": last}
    run = there.running.submit(**asked)
    kill_at = started + chance.uniform(1, pause)
    while True:
        assert time.monotonic() - started < LIMIT, f"no good end after {LIMIT:.0f} s: {tested}"
        if kills and time.monotonic() >= kill_at and (victims := there.victims(run)):
            kind = chance.choice(sorted(victims))
            kill(chance.choice(victims[kind]))
            tested.killed.append(kind)
            kills, kill_at = kills - 1, time.monotonic() + chance.uniform(1, pause)
            time.sleep(chance.uniform(0, 3))
        if not there.is_whole():
            there.stack("up", "--port", str(there.port))
        time.sleep(0.5)
        try:
            ended = there.running.run(run)
            if ended["state_type"] not in FINAL or will_go_on(there, run):
                continue
        except StackError:  # the server is away
            continue
        tested.ended.append(ended["state_name"].lower())
        if ended["state_type"] == "COMPLETED":
            break
        assert tested.tries < MOST_TRIES, f"{tested}: {ended['state']['message']}"
        tested.tries += 1
        if chance.random() < 0.5:
            there.running.retry(run)
        else:
            run = there.running.submit(**asked)
    tested.seconds = round(time.monotonic() - started, 1)
    tested.faults = dict(there.proxy.counts)
    wait_until(lambda: not api.flow_runs(state={"type": {"any_": list(UNFINISHED)}}), "runs are left", seconds=300)
    wait_until(lambda: not there.left(), "processes are left", seconds=60)
    return tested


def will_go_on(there: Disturbed, run: str, patience: float = 30.0) -> bool:
    """Whether a run that ended badly is put back to work by those whose task that is."""
    until = time.monotonic() + patience
    while (state := there.running.run(run)["state_type"]) == "CRASHED" and time.monotonic() < until:
        time.sleep(0.5)
    return state not in FINAL


def kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        pass


def check(there: Disturbed, uri: str, seed: int, first: str, last: str, *, kills: int, pause: float) -> None:
    """A disturbed run of the stages from `first` to `last`; those before are there."""
    store = open_store(uri)  # past the proxy
    before = STAGES[: STAGES.index(first)]
    give(open_store(str(there.work / "undisturbed")), store, there.work, before)
    there.proxy.counts.clear()
    there.proxy.rate = 0.0  # the stack comes up undisturbed
    there.stack("up", "--port", str(there.port))
    there.proxy.rate = FAULTS
    tested = disturb(there, uri, seed, last, kills=kills, pause=pause)
    there.results.append(tested)
    print(tested)
    assert list(faults_of(store)) == [], tested
    found = made(store, there.work, TINY, last=last)
    others = [name for name, digest in found.items() if there.undisturbed[name] != digest]
    assert not others, f"{tested}: other bytes in {others}"
    assert last != STAGES[-1] or len(found) == len(there.undisturbed), tested


def give(source: Store, target: Store, work: Path, stages: Sequence[str]) -> None:
    """Copy what some stages have made."""
    for stage in plan(resolve("miniature", TINY, work=work), source):
        if stage.name in stages:
            keys = [entry.key for entry in load_manifest(source, stage.prefix).files]
            for key in (*keys, f"{stage.prefix}/manifest.json"):
                target.write(key, source.read(key))


SHARDS, TRAINING, EVALUATION = ("shard/webvid", "shard/jdb"), ("train/full", "train/spatial"), (STAGES[-1], STAGES[-1])


@pytest.mark.s3
@pytest.mark.timeout(LIMIT + 600)
@pytest.mark.parametrize(
    ("seed", "part"),
    [
        pytest.param(1, SHARDS, marks=pytest.mark.soak),
        (2, TRAINING),
        pytest.param(3, EVALUATION, marks=pytest.mark.soak),
    ],
    ids=str,
)
def test_whoever_is_killed_the_run_ends_with_the_same_bytes(
    disturbed: Disturbed, s3_uri: str, seed: int, part: tuple[str, str]
) -> None:
    """Same shards and weights as without any trouble, and all else is there; a part of the pipeline at a time."""
    check(disturbed, s3_uri, seed, *part, kills=1, pause=40)


@pytest.mark.s3
@pytest.mark.soak
@pytest.mark.timeout(LIMIT + 600)
@pytest.mark.parametrize("seed", WHOLE)
def test_whoever_is_killed_the_whole_pipeline_ends_with_the_same_bytes(
    disturbed: Disturbed, s3_uri: str, seed: int
) -> None:
    check(disturbed, s3_uri, seed, STAGES[0], STAGES[-1], kills=1 + seed % 3, pause=60)
