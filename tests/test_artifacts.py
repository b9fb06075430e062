"""Artifacts: named by what goes in, existing when their manifest does."""

from pathlib import Path

import pytest

from vc2.artifacts import (
    Manifest,
    ShardSet,
    commit,
    find,
    fingerprint,
    load_manifest,
    newest_notes,
    put_file,
    put_object,
    verify,
)
from vc2.errors import StoreError
from vc2.storage import LocalStore


def manifest_of(store: LocalStore, text: bytes = b"tar") -> Manifest:
    path = Path(store.uri) / "local"
    path.write_bytes(text)
    files = (put_object(store, path, "shard-000000.tar"), put_file(store, "shards/x/f", "index", b"index"))
    return Manifest(
        kind="shard_set", stage="shard/x", stage_version=1, fingerprint="f", config={}, inputs={}, files=files
    )


def test_an_artifact_exists_when_its_manifest_does(store: LocalStore) -> None:
    manifest = manifest_of(store)
    assert find(store, "shards/x/f", ShardSet) is None
    made = commit(store, "shards/x/f", manifest)
    assert find(store, "shards/x/f", ShardSet) == made


def test_the_loser_of_a_race_adopts_the_winners_result(store: LocalStore) -> None:
    first = commit(store, "shards/x/f", manifest_of(store, b"one"))
    assert commit(store, "shards/x/f", manifest_of(store, b"two")) == first


def test_a_content_digest_holds_no_times_and_no_hosts(store: LocalStore) -> None:
    manifest = manifest_of(store)
    later = manifest.evolve(seconds=9.0, created_at="2030-01-01T00:00:00+00:00", environment={"system": "other"})
    assert later.digest_of_content() == manifest.digest_of_content()
    assert manifest_of(store, b"other").digest_of_content() != manifest.digest_of_content()


def test_one_flipped_byte_is_found_and_named(store: LocalStore) -> None:
    made = commit(store, "shards/x/f", manifest_of(store))
    assert list(verify(store, made.prefix)) == []
    store.write(load_manifest(store, made.prefix).files[0].key, b"tas")
    assert [problem.split(":")[0] for problem in verify(store, made.prefix)] == ["shard-000000.tar"]


def test_a_fingerprint_changes_with_each_thing_that_goes_in() -> None:
    base = ("shard", 1, {"a": 1}, {"source": "x"}, 0)
    others = [("s", *base[1:]), ("shard", 2, *base[2:]), ("shard", 1, {"a": 2}, *base[3:]),
              (*base[:3], {"source": "y"}, 0), (*base[:4], 1)]  # fmt: skip
    assert len({fingerprint(*base), *(fingerprint(*other) for other in others)}) == 6


def test_a_folder_without_a_manifest_is_said_to_be_no_artifact(store: LocalStore) -> None:
    with pytest.raises(StoreError, match="no manifest"):
        load_manifest(store, "shards/x/nothing")
    store.write("shards/x/g/manifest.json", b"<html>")
    with pytest.raises(StoreError, match="not a manifest"):
        load_manifest(store, "shards/x/g")


def made(store: LocalStore, folder: str, name: str, **changes: object) -> str:
    plain = Manifest(kind="report", stage="evaluate", stage_version=1, fingerprint=name, config={}, inputs={}, files=())
    day = f"2026-01-{1 + int(name):02d}T00:00:00+00:00"
    return commit(store, f"{folder}/{name}", plain.evolve(created_at=day, **changes)).prefix


def test_what_was_made_before_the_catalogue_is_found_beside_what_came_after(store: LocalStore) -> None:
    """Each once."""
    old = [made(store, "reports", f"{number}") for number in range(3)]
    for entry in [*store.list("catalog/")]:
        store.delete(entry.key)
    new = [made(store, "reports", f"{number}") for number in range(3, 5)]
    found = [note.prefix for note in newest_notes(store, "reports", 4)]
    assert found[:2] == new[::-1] and len(found) == 4 and set(found[2:]) < set(old)
    assert {note.prefix for note in newest_notes(store, "reports")} == {*old, *new}


def test_artifacts_of_other_stages_hide_none(store: LocalStore) -> None:
    """However many grids lie before it, the newest report is found."""
    report = made(store, "reports", "0")
    for number in range(1, 20):
        made(store, "reports", f"{number}", stage="grid")
    assert [note.prefix for note in newest_notes(store, "reports", 5, stage="evaluate")] == [report]


def test_a_note_keeps_what_a_set_was_made_by(store: LocalStore) -> None:
    """The last of its generations and all removal lists, however many there are; other long facts stay out."""
    many = [{"ledger": "x" * 100, "change": None, "number": number} for number in range(100)]
    facts = {"generations": many, "removals": ["a" * 64] * 100, "told": "b" * 5000, "source": "webvid"}
    made(store, "shards/webvid", "0", kind="shard_set", facts=facts)
    [note] = newest_notes(store, "shards/webvid")
    assert note.manifest.facts == {"generations": many[-1:], "removals": ["a" * 64] * 100, "source": "webvid"}


def test_an_artifact_is_there_though_it_cannot_be_catalogued(store: LocalStore) -> None:
    """The catalogue is a hint."""
    (Path(store.uri) / "catalog").write_text("a file where the catalogue would be")
    assert made(store, "reports", "0") == "reports/0" and [*newest_notes(store, "reports")]
