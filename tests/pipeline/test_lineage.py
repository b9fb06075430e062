"""What an artifact was made of, told by the manifests alone; and the page of it, whatever stands in them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.browser import DESKTOP, PHONE, browser_or_skip, watched, width_beyond
from tests.eval.test_report import HOSTILE, Page
from vc2.artifacts import Artifact, Manifest, commit, put_file
from vc2.cli import main
from vc2.eval.config import EvaluateStage, SampleStage
from vc2.eval.page import flat
from vc2.eval.prompts import Prompt
from vc2.pipeline.lineage import graph, page, publish_lineage
from vc2.storage import LocalStore
from vc2.train.config import TrainStage

PROMPTS = (Prompt(id="0000", text=f"a dog {HOSTILE}"), Prompt(id="0001", text="a cat"))
SAMPLES = SampleStage(prompts=PROMPTS)
TRAINING: dict[str, Any] = {"sd_init": "sd21-base", "sd_sha256": "5d" * 32, "sd_path": HOSTILE}
FULL, SPATIAL = TrainStage(name="full", **TRAINING), TrainStage(name="spatial", batch_size=256)
PAGES = "pages/lineage"


def made(store: LocalStore, kind: Any, prefix: str, inputs: Mapping[str, Artifact], **more: Any) -> Artifact:
    """An artifact as its stage commits it, of one small file."""
    files = (put_file(store, prefix, f"{HOSTILE}.bin", prefix.encode()),)
    told = {"stage": kind, "stage_version": 1, "fingerprint": max(prefix.split("/"), key=len)}
    told |= {"config": {}, "created_at": "2026-01-02T03:04:05+00:00", "environment": {"torch": "2.15", "vc2": "0.1"}}
    return commit(store, prefix, Manifest(**{"kind": kind, "inputs": inputs, "files": files, **told, **more}))


def build(store: LocalStore) -> dict[str, Artifact]:
    """A chain of all kinds, as the whole DAG leaves it, with strange words wherever words of others may stand."""
    videos, images = (
        made(
            store,
            "shard_set",
            f"shards/{name}/{name[0] * 64}",
            {},
            stage="shard",
            config={"source": {"name": name, "table": HOSTILE, "kind": "webvid"}, "samples_per_shard": 8},
            facts={"source": name, "source_digest": name[0] * 64, "reasons": {HOSTILE: 3}},
            counts={"samples": 12, "shards": 2},
            licenses={name: f"terms of {name} {HOSTILE}"},
        )
        for name in ("webvid", "jdb")
    )
    full = made(
        store,
        "checkpoint",
        f"runs/full/{'f' * 64}/checkpoints/00000100",
        {"videos": videos},
        stage="full",
        config=FULL.model_dump(mode="json"),
        facts={"attempt": 2},
        counts={"steps": 100},
        environment={"torch": "2.14", "vc2": "0.1"},
    )
    for number, start in ((1, None), (2, {"attempt": 1, "step": 40})):
        store.write(f"runs/full/{'f' * 64}/attempts/{number:04d}.json", json.dumps({"start": start}).encode())
    end = {"kind": "killed", "message": f"rank 1 {HOSTILE}"}
    store.write(f"runs/full/{'f' * 64}/attempts/0001.ended", json.dumps(end).encode())
    spatial = made(
        store,
        "checkpoint",
        f"runs/spatial/{'e' * 64}/checkpoints/00000030",
        {"images": images, "start_from": full},
        stage="spatial",
        config=SPATIAL.model_dump(mode="json"),
        counts={"steps": 30},
    )
    samples, base = (
        made(
            store,
            "sample_set",
            f"samples/{name * 64}",
            {"checkpoint": weights},
            stage="sample",
            config=SAMPLES.model_dump(mode="json"),
            counts={"videos": 2},
        )
        for name, weights in (("a", spatial), ("b", full))
    )
    asked = EvaluateStage.model_validate(SAMPLES.model_dump() | {"measured_with": {"IS/compat": "12ab"}})
    scores = made(
        store,
        "scorecard",
        f"scores/{'c' * 64}",
        {"samples": samples},
        stage="score",
        config=asked.model_dump(mode="json"),
        facts={"judges": {HOSTILE: {"mean": 1.0}}},
    )
    inputs = {"checkpoint": spatial, "base": full, "videos": videos, "samples": samples, "base_samples": base}
    report = made(store, "report", f"reports/{'d' * 64}", inputs | {"scores": scores}, stage="evaluate/evalcrafter")
    return {"report": report, "full": full, "spatial": spatial, "samples": samples, "videos": videos, "scores": scores}


@pytest.fixture
def chain(store: LocalStore) -> dict[str, Artifact]:
    return build(store)


def manifests(store: LocalStore) -> dict[str, Manifest]:
    keys = [entry.key for entry in store.list("") if entry.key.endswith("/manifest.json")]
    return {key.removesuffix("/manifest.json"): Manifest.model_validate_json(store.read(key)) for key in keys}


def test_every_input_that_a_manifest_names_is_a_node_and_every_arrow_is_in_a_manifest(
    store: LocalStore, chain: dict[str, Artifact]
) -> None:
    """Arrows between artifacts are the manifests' own, no more and no fewer; sources come first."""
    found = graph(store, chain["report"])
    arrows = {(node.key, edge.role, edge.node) for node in found.nodes for edge in node.inputs}
    between = {arrow for arrow in arrows if not found.node(arrow[2]).is_leaf}
    named = {(key, role, one.prefix) for key, said in manifests(store).items() for role, one in said.inputs.items()}
    assert between == named and len(between) == 12
    place = {node.key: number for number, node in enumerate(found.nodes)}
    assert all(place[parent] < place[child] for child, _, parent in arrows)
    assert found.nodes[-1].key == found.root == chain["report"].prefix
    assert not any(node.troubles for node in found.nodes)


def test_raw_data_foreign_weights_and_prompts_are_leaves_with_their_digests(
    store: LocalStore, chain: dict[str, Artifact]
) -> None:
    """What no stage has made stands there once, however many were made of it, with the digest that is on record."""
    found = graph(store, chain["report"])
    leaves = {(node.kind, node.name): node for node in found.nodes if node.is_leaf}
    assert set(leaves) == {
        ("source", "webvid"), ("source", "jdb"), ("weights", "sd21-base"), ("weights", "openclip-vit-h-14"),
        ("weights", "weights of metrics"), ("prompts", "prompts"),
    }  # fmt: skip
    assert leaves["source", "webvid"].content_digest == "w" * 64
    assert leaves["weights", "sd21-base"].content_digest == "5d" * 32
    assert leaves["weights", "openclip-vit-h-14"].content_digest == ""
    into = [node.name for node in found.nodes for edge in node.inputs if edge.node == leaves["prompts", "prompts"].key]
    assert into == ["samples", "samples"]


def test_a_node_tells_what_was_asked_for_from_how_it_was_done_and_what_sets_it_apart(
    store: LocalStore, chain: dict[str, Artifact]
) -> None:
    """Knobs stand apart; two of a kind are compared by settings, inputs and versions; attempts say how they ended."""
    found = graph(store, chain["report"])
    full, spatial = (found.node(chain[name].prefix) for name in ("full", "spatial"))
    assert "batch_size" in full.asked and "num_steps" not in full.asked and "num_steps" in full.knobs
    assert flat(full.asked) | flat(full.knobs) == flat(FULL.model_dump(mode="json"))
    assert not flat(full.asked).keys() & flat(full.knobs).keys()
    assert spatial.sibling == full.key
    differing = {one.name: (one.here, one.there) for one in spatial.differences}
    assert differing["batch_size"] == ("256", "128") and differing["version of torch"] == ("2.15", "2.14")
    assert "ema_decay" not in differing and "input images" in differing
    first, second = full.attempts
    assert (first.kind, first.made_it, second.started_at, second.made_it) == ("killed", False, 40, True)
    assert HOSTILE in first.message


def test_a_missing_or_torn_manifest_is_a_node_that_says_so(store: LocalStore, chain: dict[str, Artifact]) -> None:
    """What still is known of it stays: kind, fingerprint, place; the rest of the chain is whole."""
    store.delete(f"{chain['full'].prefix}/manifest.json")
    store.write(f"{chain['scores'].prefix}/manifest.json", b'{"kind": "scorecard"')
    found = graph(store, chain["report"])
    full, scores = found.node(chain["full"].prefix), found.node(chain["scores"].prefix)
    assert full.kind == "checkpoint" and full.fingerprint == "f" * 64 and "no manifest at" in full.troubles[0]
    assert "no manifest of this version" in scores.troubles[0]
    assert not found.node(chain["spatial"].prefix).troubles
    text = page(found)
    assert "Not as it should be" in text and Page(text)


def test_what_is_no_longer_what_was_read_is_told(store: LocalStore, chain: dict[str, Artifact]) -> None:
    """A consumer names the content it read: another under the same name is trouble, and so is a circle."""
    key = f"{chain['videos'].prefix}/manifest.json"
    other = Manifest.model_validate_json(store.read(key)).evolve(
        content_digest="0" * 64, inputs={"parent": chain["spatial"]}
    )
    store.write(key, other.model_dump_json().encode())
    found = graph(store, chain["report"])
    told = [trouble for node in found.nodes for trouble in node.troubles]
    assert sum("is now 000000000000" in trouble for trouble in told) == 2
    assert sum("that arrow is left out" in trouble for trouble in told) == 1
    assert Page(page(found))


def test_a_place_that_no_store_has_is_a_node_too(store: LocalStore) -> None:
    """A reference may hold anything; nothing outside the store is read."""
    for prefix in ("../../etc", "/etc", "reports/\x00", f"reports/{'x' * 300}", ""):
        reference = Artifact(kind="report", uri=HOSTILE, prefix=prefix, fingerprint="f", content_digest="")
        (node,) = graph(store, reference).nodes
        assert node.troubles and Page(page(graph(store, reference)))


class CountingStore(LocalStore):
    """Remembers what was read and listed."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: list[str] = []

    def read(self, key: str) -> bytes:
        self.asked.append(key)
        return super().read(key)

    def list(self, prefix: str) -> Any:
        self.asked.append(prefix)
        return super().list(prefix)


def test_only_what_the_chain_names_is_read(tmp_path: Path) -> None:
    """Each manifest once, and of runs their attempts: not a list of the store, however much else is in it."""
    store = CountingStore(tmp_path / "store")
    chain = build(store)
    before = page(graph(store, chain["report"]))
    for number in range(50):
        store.write(f"samples/{number:064d}/manifest.json", b"{}")
    store.asked.clear()
    assert page(graph(store, chain["report"])) == before
    assert len(store.asked) == len(set(store.asked)) == 8 + 2 + 3  # manifests, lists of attempts, attempts
    assert not any(key.startswith("samples/0") for key in store.asked)


def test_the_page_is_well_formed_and_words_of_others_stay_words(store: LocalStore, chain: dict[str, Artifact]) -> None:
    """No element, script or request comes of a name, path, prompt, message or licence; every link leads to a part."""
    text = page(graph(store, chain["report"]))
    seen = Page(text)
    assert not seen.all("img") and len(seen.all("script")) == 1 and len(seen.scripts) == 1
    assert HOSTILE in "".join(seen.text) and f"rank 1 {HOSTILE}" in "".join(seen.text)
    ids = {attributes["id"] for _, attributes in seen.elements if "id" in attributes}
    links = [str(attributes["href"]) for attributes in seen.all("a")]
    assert all(link.startswith("#") and link[1:] in ids for link in links) and len(links) > 30
    assert len(seen.all("details")) > 14 and len([a for a in seen.all("div") if a.get("class") == "inside"]) == 14
    assert not any(attributes.get("src") or attributes.get("style") for _, attributes in seen.elements)


def test_the_published_page_is_the_same_for_the_same_store_and_nothing_needs_it(
    store: LocalStore, chain: dict[str, Artifact]
) -> None:
    """Written again it has the same bytes, each step of a run has its own, and garbage collection leaves it alone."""
    key = publish_lineage(store, chain["report"])
    text = store.read(key)
    assert key == f"{PAGES}/{'d' * 64}.html" and publish_lineage(store, chain["report"]) == key
    assert store.read(key) == text
    assert publish_lineage(store, chain["full"]) == f"{PAGES}/{'f' * 64}-00000100.html"
    assert len(list(store.list("pages/"))) == 2


def test_show_writes_page_or_json(
    store: LocalStore, chain: dict[str, Artifact], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`vc2 show URI --lineage FILE`; troubles are told on the terminal, too."""
    file = tmp_path / "new" / "lineage.html"
    assert main(["show", chain["report"].uri, "--lineage", str(file)]) == 0
    assert capsys.readouterr() == (f"{file}\n", "")
    assert file.read_text() == page(graph(store, chain["report"]))
    store.delete(f"{chain['full'].prefix}/manifest.json")
    assert main(["show", chain["report"].uri, "--lineage", str(file), "--json"]) == 0
    assert {node["name"] for node in json.loads(file.read_text())["nodes"]} >= {"train/full", "scores", "webvid"}
    assert "train/full: no manifest at" in capsys.readouterr().err


def test_show_of_a_store_tells_the_newest_of_each_kind(
    store: LocalStore, chain: dict[str, Artifact], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each with when, how much and its URI; a folder without artifacts is no store, and stays as it is."""
    assert main(["show", store.uri]) == 0
    told = capsys.readouterr().out
    assert all(artifact.uri in told for artifact in chain.values())
    assert "runs/full, the newest:" in told and "step 100" in told and "2026-01-02 03:04" in told
    assert main(["show", store.uri, "--json"]) == 0
    newest = json.loads(capsys.readouterr().out)["newest"]
    assert {note["prefix"] for notes in newest.values() for note in notes} == set(manifests(store))
    (tmp_path / "empty").mkdir()
    assert main(["show", str(tmp_path / "empty")]) == 1
    assert "expected <store>/shards/..." in capsys.readouterr().err
    assert not list((tmp_path / "empty").iterdir())


def test_the_page_in_a_browser(store: LocalStore, chain: dict[str, Artifact], tmp_path: Path) -> None:
    """A box opens its part by keyboard; nothing scrolls sideways on a phone; nothing is asked of anybody."""
    path = tmp_path / "lineage.html"
    path.write_text(page(graph(store, chain["report"])), encoding="utf-8")
    with browser_or_skip() as browser:
        for size in (DESKTOP, PHONE):
            shown = browser.new_context(viewport=size).new_page()
            with watched(shown) as trouble:
                shown.goto(path.as_uri())
                shown.locator("svg a").nth(3).focus()
                shown.keyboard.press("Enter")
                shown.wait_for_timeout(100)
                assert shown.evaluate("[...document.querySelectorAll('.node')].filter(one => one.open).length") == 1
                shown.locator(".controls button").click()
                shown.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
                assert width_beyond(shown) == 0
                assert shown.evaluate("document.querySelectorAll('.node:not([open])').length") == 0
            assert not trouble
