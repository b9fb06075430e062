"""The whole DAG as a user runs it: real files, Ray, decord, two DeepSpeed ranks; killed, run again, and in a bucket."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from vc2.artifacts import load_manifest
from vc2.storage import open_store

SMALL = {
    "world.num_videos": 24,
    "world.num_web_images": 24,
    "world.num_jdb_images": 24,
    "webvid.samples_per_shard": 12,
    "laion_coco.samples_per_shard": 8,
    "jdb.samples_per_shard": 8,
    "full.batch_size": 4,
    "full.num_steps": 10,
    "full.state_every_steps": 3,
    "full.heartbeat_seconds": 1,
    "spatial.batch_size": 4,
    "spatial.num_steps": 6,
    "spatial.state_every_steps": 2,
    "spatial.heartbeat_seconds": 1,
    "evaluation.num_prompts": 2,
    "evaluation.sampler.num_steps": 2,
    # On a busy machine what answers at all does so in time, and the set is the same.
    "laion_coco.fetch.connect_timeout": 6,
    "laion_coco.fetch.idle_timeout": 6,
    "laion_coco.fetch.total_timeout": 8,
}
LIMIT = 1200  # seconds for a whole DAG: a hang is stopped, a slow machine is not
pytestmark = pytest.mark.timeout(2 * LIMIT)
SETTINGS = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]


def command(store: str, work: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "vc2.cli",
        "run",
        "miniature",
        "--store",
        store,
        "--work",
        str(work),
        *SETTINGS,
        *more,
    ]


def contents(store: str, work: Path) -> dict[str, str]:
    """Content digests of everything the plan has made, and of every file by stage."""
    plan = [sys.executable, "-m", "vc2.cli", "plan", "miniature", "--store", store, "--work", str(work), *SETTINGS]
    done = subprocess.run([*plan, "--json"], capture_output=True, text=True, check=True)
    opened, found = open_store(store), {}
    for stage in json.loads(done.stdout)["stages"]:
        if stage["state"] == "done" and not stage["stage"].startswith("evaluate"):
            manifest = load_manifest(opened, stage["uri"].removeprefix(opened.uri + "/"))
            found[stage["stage"]] = manifest.content_digest
            found |= {f"{stage['stage']} {entry.name}": entry.sha256 for entry in manifest.files}
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("unbroken")
    store = str(folder / "store")
    subprocess.run(command(store, folder / "work"), check=True, timeout=LIMIT)
    return store, folder, contents(store, folder / "work")


def test_the_whole_dag_ends_in_a_report_and_runs_once(unbroken: tuple[str, Path, dict[str, str]]) -> None:
    store, folder, found = unbroken
    assert {name for name in found if " " not in name} == {
        "shard/webvid", "shard/laion-coco", "shard/jdb", "train/full", "train/spatial",
    }  # fmt: skip
    again = subprocess.run(command(store, folder / "work"), check=True, timeout=LIMIT, capture_output=True, text=True)
    page = Path(again.stdout.strip().splitlines()[-1])
    assert page.name == "report.html" and "moves" in page.read_text()
    assert again.stderr.count(" done ") == 6
    for reports in (folder / "store" / "reports").iterdir():
        verified = subprocess.run(
            [sys.executable, "-m", "vc2.cli", "verify", str(reports)], capture_output=True, text=True
        )
        assert verified.returncode == 0, verified.stdout


def words_of(process: psutil.Process) -> list[str]:
    """Its command line; none of one that has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def kill_someone(seed: int, store: Path, work: Path, last: str) -> str:
    """Start the run, wait a seeded while, kill -9 a seeded process of its family; then see that all of it ends."""
    chance = random.Random(seed)
    main = psutil.Popen(command(str(store), work, "--stop-after", last), stderr=subprocess.DEVNULL)
    until = time.monotonic() + chance.uniform(4, 40)
    while time.monotonic() < until and main.poll() is None:
        time.sleep(0.1)
    family = [main, *main.children(recursive=True)] if main.poll() is None else []
    family = [process for process in family if process.is_running()]
    if not family:
        return "nobody: it was done"
    victim = chance.choice(family)
    what = " ".join(words_of(victim)[:6]) or "gone"
    with contextlib.suppress(psutil.NoSuchProcess):
        victim.kill()
    deadline = time.monotonic() + 240
    while main.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)  # some deaths are survived: Ray starts another worker
    if main.poll() is None:
        main.kill()
    main.wait()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == [], f"left after the end, victim {what}"
    return what


def check_kill(seed: int, tmp_path: Path, unbroken: tuple[str, Path, dict[str, str]], last: str) -> None:
    store, work = tmp_path / "store", tmp_path / "work"
    victim = kill_someone(seed, store, work, last)
    done = subprocess.run(
        command(str(store), work, "--stop-after", last), timeout=LIMIT, capture_output=True, text=True
    )
    assert done.returncode == 0, f"victim {victim}: {done.stderr[-2000:]}"
    found = contents(str(store), work)
    assert last in found
    assert found == {name: unbroken[2][name] for name in found}, f"victim {victim}"


def test_killed_anywhere_and_run_again_it_has_the_bytes_of_an_unbroken_run(
    tmp_path: Path, unbroken: tuple[str, Path, dict[str, str]]
) -> None:
    check_kill(1, tmp_path, unbroken, "train/full")


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 140))
def test_many_kills(seed: int, tmp_path: Path, unbroken: tuple[str, Path, dict[str, str]]) -> None:
    check_kill(seed, tmp_path, unbroken, "train/spatial")


@pytest.mark.s3
def test_a_bucket_holds_what_a_folder_holds(
    s3_uri: str, tmp_path: Path, unbroken: tuple[str, Path, dict[str, str]]
) -> None:
    subprocess.run(command(s3_uri, tmp_path / "work"), check=True, timeout=LIMIT)
    assert contents(s3_uri, tmp_path / "work") == unbroken[2]


def test_stopped_by_ctrl_c_it_leaves_nobody_and_goes_on(
    tmp_path: Path, unbroken: tuple[str, Path, dict[str, str]]
) -> None:
    store, folder, _ = unbroken
    longer = [*command(store, folder / "work", "--stop-after", "train/full"), "--set", "full.num_steps=100000"]
    main = psutil.Popen(longer, stderr=subprocess.PIPE, text=True)
    family: list[psutil.Process] = []
    while sum("vc2.train.rank" in " ".join(words_of(process)) for process in family) < 2:
        assert main.poll() is None
        time.sleep(0.2)
        family = main.children(recursive=True)
    time.sleep(3)
    os.kill(main.pid, signal.SIGINT)
    _, said = main.communicate(timeout=LIMIT)
    assert main.returncode in (75, 130), said
    assert psutil.wait_procs(family, timeout=60)[1] == []
