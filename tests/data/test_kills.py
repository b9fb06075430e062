"""Whatever is killed and whenever, the same command run again ends in the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from vc2.artifacts import Manifest, ShardSet, find, load_manifest, shard_set_prefix, verify
from vc2.data.config import FolderSource, ShardStage, shard_fingerprint, source_digest
from vc2.data.fetch import workplace
from vc2.data.prepare import prepare
from vc2.storage import LocalStore

CODE = """
import sys
from pathlib import Path
from vc2.data.config import ShardStage
from vc2.data.prepare import prepare
from vc2.storage import open_store
config = ShardStage.model_validate_json(sys.argv[1])
prepare(config, open_store(sys.argv[2]), Path(sys.argv[3]), fingerprint=sys.argv[4])
"""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, media: Any) -> ShardStage:
    """Thirty videos, three of them bad, in ten shards."""
    folder = tmp_path_factory.mktemp("mine")
    for number in range(30):
        mp4 = media.mp4(40 + number % 7, 25, width=160, height=96, first=number)
        (folder / f"v{number:02d}.mp4").write_bytes({3: b"<html>", 5: mp4[:-200], 9: b""}.get(number, mp4))
        (folder / f"v{number:02d}.txt").write_text(f"grey number {number}")
    form = {"num_frames": 8, "width": 96, "height": 64}
    source = FolderSource(name="mine", media="video", folder=str(folder))
    return ShardStage.model_validate(
        {"source": source, "form": form, "fetch": {"part_rows": 4}, "samples_per_shard": 3, "workers": 2}
    )


def name_of(stage: ShardStage) -> str:
    return shard_fingerprint("shard/mine", stage, source_digest(stage.source))


@pytest.fixture(scope="module")
def unbroken(stage: ShardStage, ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    root = tmp_path_factory.mktemp("unbroken")
    store = LocalStore(root / "store")
    made = prepare(stage, store, root / "work", fingerprint=name_of(stage))
    assert made is not None
    return load_manifest(store, made.prefix)


def victims(kind: str, driver: "subprocess.Popen[bytes]", session: str) -> list[int]:
    """Processes of one kind: the driver, Ray's workers at work, the decoders they hold."""
    if kind == "driver":
        return [driver.pid]
    found = []
    for process in psutil.process_iter(["cmdline", "name"]):
        try:
            words = " ".join(process.info["cmdline"] or ())
            wanted = (
                "vc2.data.decode" in words if kind == "decoder" else words.startswith("ray::") and "IDLE" not in words
            )
            if wanted and process.environ().get("VC2_RAY_SESSION") == session:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def kill_often(kills: int, stage: ShardStage, unbroken: Manifest, address: str, session: str, root: Path) -> None:
    """Runs that are killed at random moments, each followed by a rerun, until as many kills have hit."""
    chance = random.Random(kills)
    done = rounds = 0
    while done < kills:
        rounds += 1
        store, work = LocalStore(root / f"store-{rounds}"), root / f"work-{rounds}"
        prefix = shard_set_prefix("mine", name_of(stage))
        while find(store, prefix, ShardSet) is None:
            arguments = [stage.model_dump_json(), store.uri, str(work), name_of(stage)]
            driver = subprocess.Popen(
                [sys.executable, "-c", CODE, *arguments],
                env={**os.environ, "RAY_ADDRESS": address},
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            until = time.monotonic() + chance.uniform(1.5, 6.0)
            kind = chance.choice(["driver", "worker", "decoder"]) if done < kills else "none"
            while driver.poll() is None:
                time.sleep(0.02)
                if kind == "none" or time.monotonic() < until:
                    continue
                if targets := victims(kind, driver, session):
                    os.kill(chance.choice(targets), signal.SIGKILL)
                    done, kind = done + 1, "none"
        made = load_manifest(store, prefix)
        assert made.content_digest == unbroken.content_digest
        assert [entry.sha256 for entry in made.files] == [entry.sha256 for entry in unbroken.files]
        assert list(verify(store, prefix)) == []
        for _ in range(600):  # Ray takes a moment to end the workers of a driver that was killed
            with workplace(work) as folder:
                if not [path for path in folder.parent.iterdir() if path != folder]:
                    break
            time.sleep(0.1)
        else:
            raise AssertionError(f"temporary folders are left in {work}")


@pytest.fixture
def session(ray_address: str) -> str:
    """What marks the processes of the Ray session of these tests."""
    for process in psutil.process_iter(["cmdline"]):
        try:
            words = process.info["cmdline"] or ()
            if any("raylet" in word for word in words[:1]) and any(ray_address in word for word in words):
                return process.environ()["VC2_RAY_SESSION"]
        except (psutil.Error, KeyError):
            continue
    raise AssertionError("no Ray session of ours")


def test_three_kills(stage: ShardStage, unbroken: Manifest, ray_address: str, session: str, tmp_path: Path) -> None:
    """kill -9 of driver, worker or decoder at random moments, three times."""
    kill_often(3, stage, unbroken, ray_address, session, tmp_path)


@pytest.mark.soak
def test_fifty_kills(stage: ShardStage, unbroken: Manifest, ray_address: str, session: str, tmp_path: Path) -> None:
    """The same, fifty times."""
    kill_often(50, stage, unbroken, ray_address, session, tmp_path)


def test_a_lost_ray_is_told_and_the_next_call_does_the_rest(
    stage: ShardStage, unbroken: Manifest, tmp_path: Path
) -> None:
    """kill -9 of the head that a stage has for itself: no hang, no abort, one error; what was built stays."""
    store, name = LocalStore(tmp_path / "store"), name_of(stage)
    arguments = [stage.model_dump_json(), store.uri, str(tmp_path / "work"), name]
    own = {variable: value for variable, value in os.environ.items() if not variable.startswith("RAY_")}
    with subprocess.Popen([sys.executable, "-c", CODE, *arguments], env=own, stderr=subprocess.PIPE) as driver:
        while not [*store.list(f"{shard_set_prefix('mine', name)}/parts/")]:
            assert driver.poll() is None
            time.sleep(0.02)
        heads = [child for child in psutil.Process(driver.pid).children(recursive=True) if child.name() == "gcs_server"]
        heads[0].kill()
        said = driver.communicate()[1].decode()
    assert driver.returncode == 1 and "LaunchFailed: Ray is lost: " in said
    made = prepare(stage, store, tmp_path / "work", fingerprint=name)
    assert made is not None
    assert load_manifest(store, made.prefix).content_digest == unbroken.content_digest
