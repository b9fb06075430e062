"""Laws of garbage collection: afterwards every artifact still verifies and every run still resumes."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vc2.artifacts import FileEntry, Manifest, commit, put_file, put_object, verify
from vc2.cli import main
from vc2.data.build import _write_lines, finished_shards, read_shard
from vc2.errors import ConfigError, StoreError
from vc2.pipeline.gc import collect_garbage, find_garbage, run_at
from vc2.storage import Entry, LocalStore, Store, open_store
from vc2.train.attempts import (
    Attempt,
    Heartbeat,
    Holder,
    Run,
    StateFile,
    StateManifest,
    StateRef,
    newest_state,
    this_process,
)
from vc2.train.config import Layout

LAYOUT = Layout(world_size=1, micro_batch=1, threads=1)
GONE = Holder(host="here", pid=1, place="another boot", started="1")


def put_bytes(store: Store, folder: Path, name: str) -> FileEntry:
    path = folder / "passing"
    path.write_bytes(f"content of {name}".encode())
    return put_object(store, path, name)


def put_state(run: Run, attempt: int, step: int) -> StateRef:
    ref = StateRef(attempt=attempt, step=step)
    key, data = f"{run.state_prefix(ref)}/rank-0-master.safetensors", b"weights of %d/%d" % (attempt, step)
    run.store.write(key, data)
    file = StateFile(name="m", key=key, size=len(data), sha256=hashlib.sha256(data).hexdigest(), rank=0, kind="master")
    manifest = StateManifest(
        attempt=attempt, step=step, samples=step, ema_updates=step, updates=step, layout=LAYOUT, files=(file,)
    )
    run.store.write(f"{run.state_prefix(ref)}/manifest.json", manifest.model_dump_json().encode())
    return ref


def claim(run: Run, number: int, holder: Holder, *, start: StateRef | None = None, request: dict | None = None) -> None:
    seconds = 60 if holder != GONE else 1e-9
    assert run.claim(
        Attempt(
            number=number, start=start, layout=LAYOUT, holder=holder, heartbeat_seconds=seconds, request=request or {}
        )
    )


class Full:
    """A store with something of everything, and how to tell that it is well."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store = store
        named = {name: put_bytes(store, folder, name) for name in ("tar", "weights", "autoencoder", "half")}
        self.orphan = put_bytes(store, folder, "orphan").key
        listed = hashlib.sha256(b"a removal list").hexdigest()
        store.write(f"objects/{listed}", b"a removal list")
        store.write(f"removals/webvid/{listed}", b"")

        self.artifacts = ["shards/webvid/1", "runs/full/1/checkpoints/00000008", "samples/1"]
        self._commit("shard_set", self.artifacts[0], (named["tar"],), facts={"removals": [listed]})
        for name in ("parts/shard-000000.tar.parquet", "verdicts/1.json", "unplanned.parquet", "planned.json"):
            store.write(f"shards/webvid/1/{name}", b"left over")
        self._commit("checkpoint", self.artifacts[1], (named["weights"], named["autoencoder"]))
        video = put_file(store, "samples/1", "a.mp4", b"a video")
        self._commit("sample_set", self.artifacts[2], (video,))

        self.gone = "f" * 64  # an artifact that was deleted: its note, its mark and its page are left
        self._commit("shard_set", f"shards/webvid/{self.gone}", ())
        store.delete(f"shards/webvid/{self.gone}/manifest.json")
        store.write(f"sets/webvid/{self.gone}", b"")
        store.write(f"pages/sheets/{self.gone}.html", b"a page")
        store.write("pages/sheets/without-a-name.html", b"another")
        store.write("probe/0123", b"1")

        self.half = {"prefix": "shards/jdb/2", "shard": 0, "plan_sha256": "f" * 64}  # a set that is being made
        _write_lines(store, self.half, [], named["half"])
        store.write("shards/jdb/2/planned.json", b"{}")

        self.dead = Run(store, "full", "1")
        asked = {"stage": {"keep_every_steps": 5}, "autoencoder": {"key": named["autoencoder"].key}}
        claim(self.dead, 1, GONE)
        with Heartbeat(self.dead, 1, 60):
            for step in (2, 4, 5, 6, 8):
                put_state(self.dead, 1, step)
        claim(self.dead, 2, GONE, start=StateRef(attempt=1, step=6), request=asked)
        with Heartbeat(self.dead, 2, 60):
            for step in (7, 9, 11):
                put_state(self.dead, 2, step)
        store.write(f"{self.dead.state_prefix(StateRef(attempt=2, step=10))}/rank-0-ema.safetensors", b"half")

        self.alive = Run(store, "spatial", "2")
        claim(self.alive, 1, this_process())
        for step in (1, 2, 3, 4):
            put_state(self.alive, 1, step)

    def _commit(self, kind: str, prefix: str, files: tuple[FileEntry, ...], **more: object) -> None:
        manifest = Manifest(
            kind=kind, stage=kind, stage_version=1, fingerprint=prefix, config={}, inputs={}, files=files, **more
        )  # type: ignore[arg-type]
        commit(self.store, prefix, manifest)

    def age(self, hours: float) -> None:
        """As if everything had been stored so long ago. Only of a local store."""
        then = time.time() - hours * 3600
        for path in Path(self.store.uri).rglob("*"):
            os.utime(path, (then, then))
        self.store.write(f"{self.alive.prefix}/attempts/0001.heartbeat", json.dumps({"ended": False}).encode())

    def keys(self) -> set[str]:
        return {entry.key for entry in self.store.list("")}

    def check(self) -> None:
        for prefix in self.artifacts:
            assert list(verify(self.store, prefix)) == []
        found = finished_shards(self.store, str(self.half["prefix"]), str(self.half["plan_sha256"]))
        _, tar = read_shard(self.store, found[0])
        assert self.store.entry(tar.key) is not None
        for run, step in ((self.dead, 11), (self.alive, 4)):
            state, damaged = newest_state(run)
            assert state is not None and state.step == step and damaged == []


@pytest.fixture
def full(store: LocalStore, tmp_path: Path) -> Full:
    return Full(store, tmp_path)


def kept_steps(run: Run) -> set[tuple[int, int]]:
    return {(ref.attempt, ref.step) for ref in run.all_states()}


def check_law(full: Full, grace_hours: float) -> None:
    before = full.keys()
    said = collect_garbage(full.store, keep=2, grace_hours=grace_hours, dry_run=True)
    assert full.keys() == before
    assert collect_garbage(full.store, keep=2, grace_hours=grace_hours) == said
    full.check()
    assert before - full.keys() == {key for keys in said.classes.values() for key in keys}
    assert find_garbage(full.store, keep=2, grace_hours=grace_hours).is_empty
    assert said.alive == (full.alive.prefix,)
    assert kept_steps(full.alive) == {(1, 1), (1, 2), (1, 3), (1, 4)}
    # the newest two, the multiple of five, and what the newest attempt started from
    assert kept_steps(full.dead) == {(2, 11), (2, 9), (1, 5), (1, 6)}
    assert said.classes["objects"] == (full.orphan,)
    assert len(said.classes["parts"]) == 4 and said.classes["heartbeats"] == ("runs/full/1/attempts/0001.heartbeat",)
    [note, mark] = said.classes["catalogue"]
    assert full.gone in note and mark == f"sets/webvid/{full.gone}"
    assert said.classes["pages"] == (f"pages/sheets/{full.gone}.html",) and said.classes["probes"] == ("probe/0123",)
    assert len(list(full.store.list("catalog/"))) == len(full.artifacts)
    assert len(said.classes["states"]) == 9 and said.sizes["objects"] == len("content of orphan")


def test_what_somebody_needs_stays_and_the_rest_goes(full: Full) -> None:
    """A dry run deletes nothing, a run what the dry run said, a second run finds nothing."""
    full.age(48)
    check_law(full, 24)


@pytest.mark.s3
def test_the_same_in_a_bucket(s3_uri: str, tmp_path: Path) -> None:
    """By the store's own clock."""
    check_law(Full(open_store(s3_uri), tmp_path), -1)


def test_what_is_young_stays(full: Full) -> None:
    """Somebody may be about to name it."""
    before = full.keys()
    assert collect_garbage(full.store).is_empty and full.keys() == before


def test_an_old_object_that_is_put_again_is_young(full: Full, tmp_path: Path) -> None:
    """So whoever makes a manifest of it has time to."""
    full.age(48)
    put_bytes(full.store, tmp_path, "orphan")
    assert full.orphan not in find_garbage(full.store).classes["objects"]


@pytest.mark.parametrize(
    "key",
    [
        "shards/webvid/1/manifest.json",
        "runs/full/1/checkpoints/00000008/manifest.json",
        "runs/full/1/attempts/0002.json",
        "runs/full/1/states/0001/00000004/manifest.json",
    ],
)
def test_nothing_is_deleted_while_a_manifest_cannot_be_read(full: Full, key: str) -> None:
    """It may name anything; it is said which one it is."""
    full.age(48)
    full.store.write(key, full.store.read(key)[:-12])
    before = full.keys()
    with pytest.raises(StoreError, match=key):
        collect_garbage(full.store)
    assert full.keys() == before


def test_a_run_keeps_what_it_was_asked_to_keep(full: Full) -> None:
    """A smaller `keep` takes nothing away that the run's own retention leaves there; a larger one counts."""
    run = Run(full.store, "temporal", "3")
    claim(run, 1, GONE, request={"stage": {"keep_states": 3, "keep_every_steps": None}})
    for step in range(1, 7):
        put_state(run, 1, step)
    full.age(48)
    for keep, steps in ((5, {2, 3, 4, 5, 6}), (2, {4, 5, 6})):
        collect_garbage(full.store, keep=keep)
        assert kept_steps(run) == {(1, step) for step in steps}


def test_a_pinned_state_stays(full: Full, capsys: pytest.CaptureFixture[str]) -> None:
    """By its own URI or that of a checkpoint of its step, until it is unpinned."""
    full.age(48)
    runs = f"{full.store.uri}/runs/full/1"
    collect: Callable[[], int] = lambda: main(["gc", "--yes", "--store", full.store.uri, "--keep", "1"])  # noqa: E731
    assert main(["gc", "--pin", f"{runs}/states/0001/00000004", "--pin", f"{runs}/checkpoints/00000009"]) == 0
    assert collect() == 0
    assert kept_steps(full.dead) == {(1, 4), (1, 5), (1, 6), (2, 9), (2, 11)}
    assert main(["gc", "--unpin", f"{runs}/states/0001/00000004"]) == 0
    assert collect() == 0
    assert (1, 4) not in kept_steps(full.dead)
    out = capsys.readouterr().out
    assert "pinned  step 4 of attempt 1" in out and "left alone  runs/spatial/2" in out
    full.check()
    with pytest.raises(ConfigError, match="no URI of a run"):
        run_at(f"{full.store.uri}/shards/webvid/1")
    with pytest.raises(StoreError, match="there is no run"):
        run_at(f"{full.store.uri}/runs/full/9")


def test_nothing_goes_that_was_not_shown_and_agreed_to(
    full: Full, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`vc2 gc` says what would go; it goes with --yes, or when somebody at a terminal says so."""
    full.age(48)
    before = full.keys()
    for how in ([], ["--dry-run"], ["--json"]):
        assert main(["gc", "--store", full.store.uri, *how]) == 0
        assert full.keys() == before
    out = capsys.readouterr().out
    assert "--yes deletes it" in out and full.orphan in out and '"deleted": false' in out
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: "no")
    assert main(["gc", "--store", full.store.uri]) == 0 and full.keys() == before
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert main(["gc", "--store", full.store.uri]) == 0
    assert full.store.entry(full.orphan) is None
    full.check()
    assert main(["gc", "--store", full.store.uri, "--yes"]) == 0
    assert "nothing to delete" in capsys.readouterr().out


class Listed(LocalStore):
    """A store that keeps what it was asked to list."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: list[str] = []

    def list(self, prefix: str) -> Iterator[Entry]:
        self.asked.append(prefix)
        return super().list(prefix)


def test_each_family_is_listed_once(full: Full) -> None:
    """However much is in it, and also where it is agreed to beforehand."""
    full.age(48)
    store = Listed(Path(full.store.uri))
    collect_garbage(store)
    families = ("shards/", "runs/", "samples/", "scores/", "reports/", "objects/", "catalog/")
    assert {family: store.asked.count(family) for family in families} == dict.fromkeys(families, 1)
    full.check()


def test_of_what_was_shown_only_that_goes_which_still_may(full: Full, tmp_path: Path) -> None:
    """Somebody may take long to agree: what was put anew since stays, and what became garbage since was not shown."""
    full.age(48)
    shown = find_garbage(full.store)
    later = put_bytes(full.store, tmp_path, "later").key
    full.age(48)
    put_bytes(full.store, tmp_path, "orphan")
    gone = collect_garbage(full.store, shown=shown)
    assert gone.classes["objects"] == () and {full.orphan, later} <= full.keys()
    full.check()
