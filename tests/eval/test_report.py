import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

from vc2.artifacts import verify
from vc2.eval.leaderboard import ASPECTS
from vc2.eval.metrics import METRICS
from vc2.eval.report import (
    LineageNode,
    ReportData,
    SampleRow,
    ShardSheet,
    SheetItem,
    publish,
    render_html,
    render_json,
    render_markdown,
)
from vc2.storage import LocalStore

HOSTILE = "<script>alert(1)</script>\"'><img src=http://evil.example/x onerror=alert(2)> & </title></style>"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What a browser would see: elements with attributes, in order; and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open and self.open[-1] == "script" else self.text).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_it_opens_with_prompt_sample_and_real_clip_and_says_how_long_it_trained(report_data: ReportData) -> None:
    """Before anything else: the sentence, the prompt, what the model made of it, what it looks like in truth."""
    html = render_html(report_data)
    sentence = html.index("trained 6 minutes on your CPU")
    prompt = html.index(report_data.rows[0].prompt, sentence)
    sample = html.index(base64.b64encode(report_data.rows[0].sample).decode(), prompt)
    real = html.index(base64.b64encode(report_data.rows[0].real or b"").decode(), sample)
    assert sentence < prompt < sample < real < html.index('<section id="stage-2"')


def test_every_video_and_picture_is_in_the_page(report_data: ReportData) -> None:
    """The page holds all that it shows."""
    page = Page(render_html(report_data))
    shown = {base64.b64decode((video["src"] or "").partition(",")[2]) for video in page.all("video")}
    expected = {video for row in report_data.rows for video in (row.sample, row.real) if video}
    expected |= {video for row in report_data.before_after for video in (row.before, row.after)}
    assert shown == expected
    pictures = {base64.b64decode((image["src"] or "").partition(",")[2]) for image in page.all("img")}
    assert pictures == {frame for sheet in report_data.shards for item in sheet.items for frame in item.frames}


def test_it_asks_nobody_for_anything(report_data: ReportData) -> None:
    """Every reference is inside the page, and the page's own policy forbids requests."""
    page = Page(render_html(report_data))
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert (attributes.get(name) or "#").startswith(("data:", "#")), (tag, name)
    assert not page.all("link") and not page.all("iframe")
    style = render_html(report_data).partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style
    policy = next(m["content"] or "" for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    [script] = page.scripts
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert not re.search(r"\b(fetch|XMLHttpRequest|import|eval)\s*\(", script)


def test_hostile_text_stays_text(report_data: ReportData) -> None:
    """A caption may hold any characters: it adds no element and no attribute to the page."""
    plain = "x"
    pages = []
    for words in (plain, HOSTILE):
        data = dataclasses.replace(
            report_data,
            title=words,
            hardware=words,
            rows=[SampleRow(words, b"1", b"2", note=words)],
            shards=[ShardSheet(words, 3, 1, {words: 2}, items=[SheetItem(words, [b"3"])])],
            lineage=[LineageNode(words, words, words, note=words)],
            config={words: words},
            environment={words: words},
            benchmark={"metrics": {"IS": {"not_measured": words}}, "withheld": {"total": words}},
            curves=[dataclasses.replace(report_data.curves[0], stage=words, note=words)],
        )
        pages.append(Page(render_html(data)))
    calm, attacked = pages
    assert [tag for tag, _ in attacked.elements] == [tag for tag, _ in calm.elements]
    assert [set(attributes) for _, attributes in attacked.elements] == [
        set(attributes) for _, attributes in calm.elements
    ]
    assert attacked.scripts == calm.scripts
    assert any(HOSTILE in text for text in attacked.text)


def test_what_was_not_measured_stands_there_by_name(report_data: ReportData) -> None:
    """All 17 metrics are named with the reason why; no aspect is given; published rows stand beside."""
    html = render_html(report_data)
    assert html.count("not measured: weights not found: ") == len(METRICS)
    assert all(f">{name}<" in html for name in METRICS)
    assert html.count(">not given</td>") == 5
    assert all(model in html for model in ASPECTS)


def test_a_report_about_nothing_says_so() -> None:
    """Parts that are missing are said to be missing; the page is whole all the same."""
    html = render_html(ReportData(trained_minutes=1.0))
    Page(html)
    assert "trained 1 minute on your CPU" in html
    for words in ("No samples", "No losses", "No shards", "No lineage", "No timings", "No judges"):
        assert words in html


def test_json_and_markdown_say_the_same(report_data: ReportData) -> None:
    """Programs find every figure of the page; videos are named by their sha256."""
    plain = json.loads(render_json(report_data))
    assert plain["trained_minutes"] == report_data.trained_minutes
    assert [row["prompt"] for row in plain["samples"]] == [row.prompt for row in report_data.rows]
    assert plain["samples"][0]["sample"] == hashlib.sha256(report_data.rows[0].sample).hexdigest()
    assert plain["scores"]["real clips"]["colour"] == {"mean": 0.99, "n": 16}
    text = render_markdown(report_data)
    assert "trained 6 minutes on your CPU" in text and text.count("not measured") == len(METRICS)


def test_a_published_report_has_its_manifest_last(tmp_path: Path, report_data: ReportData) -> None:
    """The three files and a manifest that fits them; asked again it is found, not rewritten."""
    store = LocalStore(tmp_path)
    report = publish(store, report_data, fingerprint="f" * 64, inputs={}, config={"a": 1})
    assert not [*verify(store, report.prefix)]
    names = {entry.key.rsplit("/", 1)[1] for entry in store.list(report.prefix)}
    assert names == {"report.html", "report.json", "report.md", "manifest.json"}
    assert (
        publish(store, dataclasses.replace(report_data, title="x"), fingerprint="f" * 64, inputs={}, config={})
        == report
    )
