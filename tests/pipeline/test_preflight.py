"""The preflight: whatever a run needs and is not there is found before anything runs, all of it, and nothing else."""

import http.client
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from vc2.cli import main
from vc2.data.config import JourneyDBSource, LaionSource, WebVidSource
from vc2.errors import ConfigError
from vc2.miniature.config import WorldConfig, autoencoder_weights, image_base_weights
from vc2.miniature.server import serve
from vc2.miniature.world import IMAGE_HOST, make_world
from vc2.pipeline.driver import STAGES, PlannedStage, plan
from vc2.pipeline.preflight import (
    Finding,
    _against,
    _crowded,
    _Look,
    _unfit,
    preflight,
    preflight_of_recipe,
    require,
)
from vc2.pipeline.preview import growth
from vc2.pipeline.recipes import PipelineConfig, resolve
from vc2.progress import silent
from vc2.storage import LocalStore, open_store
from vc2.train.attempts import Attempt, Holder, Run, StateManifest
from vc2.train.config import Layout
from vc2.train.rehearsal import NotStarted

SMALL = WorldConfig(num_videos=16, num_web_images=24, num_jdb_images=16, num_prompts=2)
SOURCES = [name for name in STAGES if name.startswith("shard/")]
OTHERS = [name for name in STAGES if not name.startswith("shard/")]
RANKS = "ranks of train/full and train/spatial"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world") / "world"
    make_world(SMALL, root)
    return root


@pytest.fixture
def place(world: Path, tmp_path: Path) -> Path:
    """A folder with all that a run needs: sources, weights, prompts."""
    for folder in ("webvid", "laion", "jdb"):
        shutil.copytree(world / folder, tmp_path / folder)
    shutil.copy(world / "prompts.jsonl", tmp_path / "prompts.jsonl")
    shutil.copy(image_base_weights(), tmp_path / "image_base.safetensors")
    shutil.copy(autoencoder_weights(), tmp_path / "autoencoder.safetensors")
    for name in ("text", "inception"):
        (tmp_path / name).write_bytes(b"weights")
    return tmp_path


@pytest.fixture
def config(place: Path) -> Iterator[PipelineConfig]:
    """The miniature with sources and weights as a user has them: named by path, and nothing is made on the way."""
    config = resolve("miniature", work=place)
    model = config.full.model.evolve(
        autoencoder_path=str(place / "autoencoder.safetensors"),
        text=config.full.model.text.evolve(seed=None),
        text_path=str(place / "text"),
    )
    by_hand = {"launcher": "env", "world_size": None, "model": model}
    with serve(place) as address:
        laion = config.laion_coco
        yield config.evolve(
            world=None,
            webvid=config.webvid.evolve(
                source=WebVidSource(table=f"{place}/webvid", videos=f"{place}/webvid/videos"),
            ),
            laion_coco=laion.evolve(
                source=LaionSource(table=f"{place}/laion"),
                fetch=laion.fetch.evolve(connect_to={IMAGE_HOST: address}),
            ),
            jdb=config.jdb.evolve(
                source=JourneyDBSource(table=f"{place}/jdb/data/train", archives=f"{place}/jdb/data/train/imgs"),
            ),
            full=config.full.evolve(sd_path=str(place / "image_base.safetensors"), **by_hand),
            spatial=config.spatial.evolve(**by_hand),
            evaluation=config.evaluation.evolve(
                prompts=(), prompts_file=str(place / "prompts.jsonl"), unmeasured="refuse", metrics=("IS",),
                files={"inception-2015-12-05": str(place / "inception")},
            ),
        )  # fmt: skip


def found(config: PipelineConfig, place: Path, stages: list[str]) -> dict[str, Finding]:
    return {one.name: one for one in preflight(config, LocalStore(place / "store"), place / "work", stages)}


def rewrite(path: Path) -> None:
    path.write_bytes(b"not what it was")


def missing_table(place: Path) -> None:
    next((place / "webvid").glob("*.csv")).unlink()


def torn_table(place: Path) -> None:
    for table in (place / "laion").glob("*.parquet"):
        rewrite(table)


def missing_archives(place: Path) -> None:
    shutil.rmtree(place / "jdb" / "data" / "train" / "imgs")


def missing_videos(place: Path) -> None:
    shutil.rmtree(place / "webvid" / "videos")
    (place / "webvid" / "videos").mkdir()


def read_only_store(place: Path) -> None:
    (place / "store").mkdir()
    (place / "store" / "probe").write_text("a file where the store would put its own")


TAKEN_AWAY: dict[str, tuple[str, list[str], Callable[[Path], None], str]] = {
    "table": ("source shard/webvid", SOURCES, missing_table, "holds no file ending in .csv"),
    "videos": ("source shard/webvid", SOURCES, missing_videos, "missing_file"),
    "torn table": ("source shard/laion-coco", SOURCES, torn_table, "not a readable Parquet file"),
    "archives": ("source shard/jdb", SOURCES, missing_archives, "does not exist"),
    "image weights": (
        "weights miniature-image-base", OTHERS, lambda place: (place / "image_base.safetensors").unlink(), "there is",
    ),
    "autoencoder": (
        "weights autoencoder", OTHERS, lambda place: rewrite(place / "autoencoder.safetensors"), "has sha256",
    ),
    "text tower": ("weights openclip-vit-h-14", OTHERS, lambda place: (place / "text").unlink(), "there is no"),
    "metric": ("weights inception-2015-12-05", OTHERS, lambda place: (place / "inception").unlink(), "for IS"),
    "prompts": ("prompts", OTHERS, lambda place: (place / "prompts.jsonl").unlink(), "prompts.jsonl"),
    "store": ("store", OTHERS, read_only_store, "not a directory"),
}  # fmt: skip


def test_where_all_is_there_all_is_well(config: PipelineConfig, place: Path) -> None:
    """Every stage's needs are looked at; ranks that somebody else starts cannot be, and that is said."""
    findings = found(config, place, list(STAGES))
    assert [one.name for one in findings.values() if not one.is_well] == []
    assert set(findings) == {
        "packages", "store", "work folder", "room", *(f"source {name}" for name in SOURCES),
        "weights miniature-image-base", "weights autoencoder", "weights openclip-vit-h-14",
        "weights inception-2015-12-05", "prompts", "ranks of train/full", "ranks of train/spatial",
    }  # fmt: skip
    assert {name for name, one in findings.items() if not one.was_tried} == {
        "ranks of train/full", "ranks of train/spatial",
    }  # fmt: skip
    require(findings.values())
    assert list(preflight(config, LocalStore(place / "store"), place / "work", [])) == []


@pytest.mark.parametrize("what", TAKEN_AWAY)
def test_what_is_taken_away_is_found_and_nothing_else(what: str, config: PipelineConfig, place: Path) -> None:
    """Each thing by itself: the one finding about it is not well and says what was found; all others stay."""
    name, stages, take, said = TAKEN_AWAY[what]
    take(place)
    findings = found(config, place, stages)
    assert [one.name for one in findings.values() if not one.is_well] == [name]
    assert said in findings[name].found
    with pytest.raises(ConfigError, match=f"for want of {name}"):
        require(findings.values())


def test_all_that_is_missing_is_named_at_once(config: PipelineConfig, place: Path) -> None:
    """Not the first thing alone."""
    wanted = {"torn table", "archives", "autoencoder", "text tower", "prompts"}
    for what in wanted:
        TAKEN_AWAY[what][2](place)
    findings = found(config, place, list(STAGES))
    assert {one.name for one in findings.values() if not one.is_well} == {TAKEN_AWAY[what][0] for what in wanted}
    with pytest.raises(ConfigError, match=r"for want of 5 things: .*prompts.*source shard/laion-coco: ") as told:
        require(findings.values())
    assert "\n" not in str(told.value)


def test_gpus_that_are_not_there_are_missed(config: PipelineConfig, place: Path) -> None:
    """No rank is started in vain; with a cluster that nobody named it is said how to name it."""
    many = {"launcher": "local", "device": "cuda", "world_size": 64, "batch_size": 64}
    wide = config.evolve(full=config.full.evolve(**many), spatial=config.spatial.evolve(**many))
    findings = found(wide, place, OTHERS)
    assert [one.name for one in findings.values() if not one.is_well] == [RANKS]
    assert "64 GPUs asked for, this machine has" in findings[RANKS].found
    assert "RAY_API_SERVER_ADDRESS" in findings[RANKS].remedy


def test_a_cluster_that_nobody_named_is_missed(
    config: PipelineConfig, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    there = {"launcher": "ray", "world_size": 2, "micro_batch": 2}
    on_ray = config.evolve(full=config.full.evolve(**there), spatial=config.spatial.evolve(**there))
    findings = found(on_ray, place, OTHERS)
    assert [one.name for one in findings.values() if not one.is_well] == [RANKS]
    assert "no cluster is named" in findings[RANKS].found


def begun(config: PipelineConfig, store: LocalStore, layout: Layout) -> list[PlannedStage]:
    """The plan of a recipe whose first training was begun, in another layout maybe."""
    name = next(stage.fingerprint for stage in plan(config, store) if stage.name == "train/full")
    run, nobody = Run(store, "full", name), Holder(host="here", pid=1, place="another boot", started="1")
    assert run.claim(Attempt(number=1, start=None, layout=layout, holder=nobody, heartbeat_seconds=1e-9, request={}))
    state = StateManifest(attempt=1, step=1, samples=0, ema_updates=0, updates=0, layout=layout, files=())
    store.write(f"{run.state_prefix(state.ref)}/manifest.json", state.model_dump_json().encode())
    return plan(config, store)


def test_a_run_that_lost_a_gpu_goes_on_with_fewer(
    config: PipelineConfig, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many ranks are tried as the stage would start: the most that share its batch on what is left."""
    store, asked = LocalStore(place / "store"), {"launcher": "local", "device": "cuda", "batch_size": 8}
    config = config.evolve(full=config.full.evolve(**asked))
    planned = begun(config, store, Layout(world_size=8, micro_batch=1, threads=1))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6")
    look = _Look(config, store, place / "work", ["train/full"], {stage.name: stage for stage in planned}, {}, silent)
    assert look._world_sizes == {"train/full": 4}
    assert _unfit(config.full, "full", 4, look._before["train/full"]) is None
    anew = _Look(config, store, place / "work", ["train/full"], {}, {}, silent)
    assert anew._world_sizes == {"train/full": 7}  # which the stage would refuse: nothing says how many it may be
    assert _unfit(config.full, "full", 7, None) is not None


def test_a_run_on_a_cluster_goes_on_as_it_was(config: PipelineConfig, place: Path) -> None:
    """Ranks and micro-batch are known by its newest attempt; anew they have to be said."""
    store = LocalStore(place / "store")
    config = config.evolve(full=config.full.evolve(launcher="ray", world_size=None, micro_batch=None))
    before = Layout(world_size=4, micro_batch=2, threads=1)
    planned = {stage.name: stage for stage in begun(config, store, before)}
    look = _Look(config, store, place / "work", ["train/full"], planned, {}, silent)
    assert _unfit(config.full, "full", look._world_sizes["train/full"], look._before["train/full"]) is None
    assert "how many ranks" in (_unfit(config.full, "full", 1, None) or ("",))[0]


def test_a_cluster_that_may_grow_is_not_refused() -> None:
    """Too few GPUs now is said, and tried; only where nothing came, and there are still too few, it is not well."""
    few = _against("ranks", {"machines": 1, "CPU": 4}, 2, 2)
    many = _against("ranks", {"machines": 3, "CPU": 20, "GPU": 2}, 2, 2)
    assert few.is_well and not few.was_tried and "0 GPUs" in few.found
    assert many.is_well and many.was_tried
    late = NotStarted("the 2 ranks did not start in 900 s", "communication")
    small, busy = _crowded(few, "full", late), _crowded(many, "full", late)
    assert not small.is_well and small.was_tried and "full.world_size" in small.remedy and "900 s" in small.found
    assert busy.is_well and not busy.was_tried and "Other work has it" in busy.found


def test_an_evaluation_on_a_cluster_is_looked_at_without_gpus_too(
    config: PipelineConfig, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    config = config.evolve(evaluation=config.evaluation.evolve(launcher="ray", device="cpu"))
    finding = found(config, place, ["evaluate/evalcrafter"])["ranks of evaluate/evalcrafter"]
    assert not finding.is_well and "no cluster is named" in finding.found


def test_room_is_asked_for_what_is_not_there_yet(config: PipelineConfig, place: Path) -> None:
    """Fetched parts, built shards and train states of a run that goes on are subtracted."""
    store, names = LocalStore(place / "store"), ["shard/laion-coco", "train/full"]

    def room() -> int:
        planned = {stage.name: stage for stage in plan(config, store)}
        look = _Look(config, store, place / "work", names, planned, {}, silent)
        assert all(one.is_well for one in look._sources())
        return look.shard_room + growth([*planned.values()], config, store, ["train/full"])

    (place / "work").mkdir()
    before, fetched = room(), 3000
    stage = next(stage for stage in plan(config, store) if stage.name == "shard/laion-coco")
    ledger = next(track for track, (thing, _) in stage.tracks.items() if thing == "part")
    store.write(f"{ledger}0000000-0123.bin", bytes(fetched))
    store.write(f"{ledger}0000000.parquet", b"")
    assert room() == before - fetched
    begun(config, store, Layout(world_size=1, micro_batch=1, threads=1))
    states = sum(entry.size for entry in store.list("runs/"))
    assert before - fetched - states <= room() < before - fetched


def test_a_wrong_uri_is_said_before_anything_is_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--work", str(tmp_path), "--progress", "none", "--shards", "/somewhere/else"]
    assert main(["run", "paper", *where]) == 1
    told = capsys.readouterr().err
    assert "/somewhere/else is not in the store" in told and "MISSING" not in told


def test_without_a_store_no_rank_is_started(config: PipelineConfig, place: Path) -> None:
    """That is said; and the store is the one thing that is not well."""
    read_only_store(place)
    local = {"launcher": "local", "world_size": 2}
    config = config.evolve(full=config.full.evolve(**local), spatial=config.spatial.evolve(**local))
    findings = found(config, place, OTHERS)
    assert [one.name for one in findings.values() if not one.is_well] == ["store"]
    assert not findings[RANKS].was_tried


class Careless(BaseHTTPRequestHandler):
    """Passes calls on to an S3 server, less the condition under which something may be stored."""

    target = ""

    def pass_on(self) -> None:
        there = urlsplit(self.target)
        connection = http.client.HTTPConnection(there.hostname or "", there.port, timeout=30)
        headers = {
            name: value for name, value in self.headers.items() if name.lower() not in ("if-none-match", "expect")
        }
        connection.request(
            self.command, self.path, self.rfile.read(int(self.headers.get("Content-Length", 0))), headers
        )
        answer = connection.getresponse()
        data = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        connection.close()

    do_GET = do_PUT = do_DELETE = do_HEAD = pass_on

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_store_that_lets_two_writers_win_is_found(
    config: PipelineConfig, place: Path, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An S3 endpoint that does not know conditional writes."""
    Careless.target = os.environ["AWS_ENDPOINT_URL"]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Careless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    try:
        findings = list(preflight(config, open_store(s3_uri), place / "work", OTHERS))
    finally:
        server.shutdown()
        server.server_close()
    assert [one.name for one in findings if not one.is_well] == ["store"]
    assert "does not honour conditional writes" in next(one.found for one in findings if one.name == "store")


def test_a_recipe_is_looked_at_even_where_it_cannot_be_planned(tmp_path: Path) -> None:
    """The paper's on an empty machine: no prompts, no sources, so nothing has a name yet; each thing is told once."""
    findings = list(preflight_of_recipe("paper", {}, str(tmp_path / "store"), tmp_path / "work"))
    names = [one.name for one in findings]
    assert len(set(names)) == len(names)
    wrong = {one.name for one in findings if not one.is_well}
    assert wrong >= {*(f"source {name}" for name in SOURCES), "weights sd21-base", "weights openclip-vit-h-14",
                     "weights dover", "prompts", RANKS}  # fmt: skip
    assert all(one.remedy for one in findings if not one.is_well)


def test_the_doctor_starts_the_ranks_of_the_miniature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0 where all is well, with the ranks tried in earnest; 1 where a thing is missing; as JSON too."""
    settings = [f"world.{name}={value}" for name, value in SMALL.model_dump().items()]
    where = ["--work", str(tmp_path / "work"), "--progress", "none", "--json"]
    command = ["doctor", "miniature", *where, *(word for line in settings for word in ("--set", line))]
    assert main([*command, "--set", "spatial.batch_size=8"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["well"]
    assert "bit for bit" in next(one["found"] for one in said["findings"] if one["name"] == RANKS)
    assert [entry.key for entry in LocalStore(tmp_path / "work" / "store").list("")] == []
    assert main([*command, "--set", "full.sd_path=nowhere", "--stop-after", "train/full", "--set", "full.launcher=env",
                 "--set", "full.world_size=null"]) == 1  # fmt: skip
    wrong = [one["name"] for one in json.loads(capsys.readouterr().out)["findings"] if not one["is_well"]]
    assert wrong == ["weights miniature-image-base"]
