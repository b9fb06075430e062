"""A cluster of two nodes, each in a network of its own, makes the bytes that one machine makes."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.networks import HEAD, OTHER, OWN, Networks, inside, processes_in, ray_node, two_networks
from vc2.artifacts import load_manifest, shard_set_prefix
from vc2.data.config import FolderSource, ShardStage, shard_fingerprint, source_digest
from vc2.data.prepare import prepare
from vc2.storage import LocalStore

CODE = """
import sys, time
from pathlib import Path
import ray
until = time.monotonic() + 240
while not ray.is_initialized() or len(ray.nodes()) < 2:
    assert time.monotonic() < until, "no two nodes"
    try:
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
    except Exception as error:  # of a node that is half there, whatever it is
        print(error, file=sys.stderr)
    time.sleep(0.2)
from vc2.data.config import ShardStage
from vc2.data.prepare import prepare
from vc2.storage import open_store
config = ShardStage.model_validate_json(sys.argv[1])
prepare(config, open_store(sys.argv[2]), Path(sys.argv[3]), fingerprint=sys.argv[4])
"""


@pytest.fixture
def networks() -> Iterator[Networks]:
    with two_networks() as found:
        yield found


def workers_in(network: str) -> int:
    """Ray workers at work in a network."""
    commands = [" ".join(process.info["cmdline"] or ()) for process in processes_in(network)]
    return sum(words.startswith("ray::") and "IDLE" not in words for words in commands)


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
def test_two_nodes_make_the_same_bytes(networks: Networks, ray_address: str, media: Any, tmp_path: Path) -> None:
    """Both nodes work, and the set equals that of one machine file by file."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for number in range(24):
        (folder / f"v{number:02d}.mp4").write_bytes(media.mp4(30 + number % 5, 25, first=number))
        (folder / f"v{number:02d}.txt").write_text(f"grey number {number}")
    stage = ShardStage.model_validate(
        {
            "source": FolderSource(name="mine", media="video", folder=str(folder)),
            "form": {"num_frames": 8, "width": 64, "height": 48},
            "fetch": {"part_rows": 3},
            "samples_per_shard": 2,
            "workers": 2,
        }
    )
    name = shard_fingerprint("shard/mine", stage, source_digest(stage.source))
    stores = [LocalStore(tmp_path / place) for place in ("one", "two")]
    assert prepare(stage, stores[0], tmp_path / "work", fingerprint=name) is not None
    settings = [f"--node-ip-address={HEAD}", "--port=6399", "--include-dashboard=false"]
    with (
        ray_node(networks.head, "--head", *settings),
        ray_node(networks.other, f"--address={HEAD}:6399", f"--node-ip-address={OTHER}"),
    ):
        arguments = [stage.model_dump_json(), stores[1].uri, str(tmp_path / "work"), name]
        said = tmp_path / "driver.log"
        with open(said, "wb") as log:
            driver = subprocess.Popen(
                inside(networks.head, sys.executable, "-c", CODE, *arguments),
                env=OWN | {"RAY_ADDRESS": f"{HEAD}:6399"},
                stderr=log,
            )
        seen = {network: 0 for network in (networks.head, networks.other)}
        while driver.poll() is None:
            seen = {network: max(count, workers_in(network)) for network, count in seen.items()}
            time.sleep(0.05)
        assert driver.returncode == 0, said.read_text()[-2000:]
    assert min(seen.values()) >= 1
    one, two = (load_manifest(store, shard_set_prefix("mine", name)) for store in stores)
    assert [(entry.name, entry.sha256) for entry in one.files] == [(entry.name, entry.sha256) for entry in two.files]
