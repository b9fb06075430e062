import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vc2.artifacts import ShardSet, load_manifest
from vc2.data.config import SampleForm
from vc2.data.foreign import adopt
from vc2.data.sheet import contact_sheet
from vc2.storage import LocalStore

HOSTILE = "</p><script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)>\" & 自行车 \u202e"


class Page(HTMLParser):
    """Tags with their attributes, and the words between them, as a browser reads them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words)).replace("\N{NARROW NO-BREAK SPACE}", " ")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def say(store: LocalStore, shards: ShardSet, column: str, place: int, value: str) -> None:
    """Change a word of the index."""
    path = Path(store.uri) / load_manifest(store, shards.prefix).file("index.parquet").key
    table = pq.read_table(path)
    values = table[column].to_pylist()
    values[place] = value
    table = table.set_column(table.schema.get_field_index(column), column, pa.array(values, pa.string()))
    pq.write_table(table, path)


def test_a_page_shows_the_set(store: LocalStore, make_set: Any) -> None:
    """Accounts, reasons, histograms, shards, samples and pairs are there, in one well-formed file that asks nobody."""
    rejects = [
        {"what": "row", "row": row, "key": f"va{row}", "locator": f"files/va{row}", "reason": reason, "detail": "so"}
        for row, reason in enumerate(["timeout", "timeout", "too_short"], 10)
    ]
    made = make_set(store, "va", 10, duplicates={7: 2}, rejects=rejects, facts={"source": "va"})
    manifest = load_manifest(store, made.prefix)
    text = contact_sheet(store, manifest, samples=6)
    page = Page(text)
    assert not page.open and text == contact_sheet(store, manifest, samples=6)
    counts = ("samples 10", "shards 3", "13 rows", "10 with samples", "3 rejected", "the accounts are even")
    for words in (*counts, "6 of 10, drawn evenly", "shard-000002.tar", "left out of training", "CC0", "Frame rate"):
        assert words in page.text
    cards = sum(attrs.get("class") == "card" for _, attrs in page.tags)
    assert cards == 6 + 2
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "a", "form", "object"})
    assert not re.search(r"(?:https?:)?//[a-z]", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    assert any("default-src 'none'" in (attrs.get("content") or "") for _, attrs in page.tags)
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")


def test_words_of_strangers_stay_words(store: LocalStore, make_set: Any) -> None:
    """Captions, keys, locators and reasons cannot become markup."""
    rejects = [{"what": "row", "row": 4, "key": HOSTILE, "locator": HOSTILE, "reason": "unparsable", "detail": HOSTILE}]
    made = make_set(store, "va", 4, rejects=rejects)
    for column in ("caption", "locator"):
        say(store, made, column, 1, HOSTILE)
    manifest = load_manifest(store, made.prefix)
    page = Page(contact_sheet(store, manifest))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script"})
    assert all("evil" not in str(attrs) and "onerror" not in attrs for _, attrs in page.tags)
    assert sum(HOSTILE in words for words in page.words) == 3


def test_what_cannot_be_read_is_shown_as_such(store: LocalStore, make_set: Any) -> None:
    """A damaged sample or a lost shard costs its card; rows that do not add up are said to."""
    made = make_set(store, "va", 8, facts={"source": "va"})
    manifest = load_manifest(store, made.prefix)
    tars = [Path(store.uri) / entry.key for entry in manifest.files if entry.name.endswith(".tar")]
    tars[0].write_bytes(bytes(tars[0].stat().st_size))
    tars[1].unlink()
    page = Page(contact_sheet(store, manifest.evolve(counts={"rows": 9, "samples": 8})))
    assert page.text.count("cannot be read") == 8
    assert "1 rows are unaccounted for" in page.text


def test_an_empty_set_and_a_set_of_images(store: LocalStore, make_set: Any) -> None:
    """Nothing to show is no error; pictures have no rate."""
    page = Page(contact_sheet(store, load_manifest(store, make_set(store, "none", 0).prefix)))
    assert "0 of 0" in page.text
    page = Page(contact_sheet(store, load_manifest(store, make_set(store, "ia", 3, images=True).prefix)))
    assert sum(tag == "img" for tag, _ in page.tags) == 3 and "fps" not in page.text


def test_tars_of_others_are_shown(store: LocalStore, tmp_path: Path, media: Any) -> None:
    """Clips out of somebody's tars are drawn and shown as training would see them."""
    import tarfile

    path = tmp_path / "in" / "a.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, data in {"0.mp4": media.mp4(30, 24), "0.txt": b"a video", "1.txt": b"alone"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    form = SampleForm(num_frames=4, width=32, height=32)
    made = adopt(str(path), media="video", form=form, name="theirs", store=store, work=tmp_path)
    page = Page(contact_sheet(store, load_manifest(store, made.prefix)))
    assert "cannot be read" not in page.text and "missing_file" in page.text and "a.tar" in page.text
    assert "50.0 %" in page.text
