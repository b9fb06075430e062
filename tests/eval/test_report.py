import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from vc2.artifacts import verify
from vc2.eval.leaderboard import rows_named
from vc2.eval.metrics import EVALCRAFTER
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


def _hostile_row(words: str, number: int) -> SampleRow:
    return SampleRow(
        words,
        b"1" if number else None,
        b"2",
        note=words,
        id=words,
        tags={"text": words, "detection": words},
        values={"compat": {"VQA_A": 0.5}},
        reasons={"compat": {"IS": words}},
        missing=words,
    )


def test_hostile_text_stays_text(report_data: ReportData) -> None:
    """A caption may hold any characters: it adds no element and no attribute to the page."""
    plain = "x"
    pages = []
    for words in (plain, HOSTILE):
        data = dataclasses.replace(
            report_data,
            title=words,
            hardware=words,
            about=words,
            notes=[words],
            rows=[_hostile_row(words, number) for number in range(7)],
            shards=[ShardSheet(words, 3, 1, {words: 2}, items=[SheetItem(words, [b"3"])])],
            lineage=[LineageNode(words, words, words, note=words)],
            config={words: words},
            environment={words: words},
            benchmark={
                "name": words,
                "modes": {
                    "compat": {
                        "metrics": {
                            "IS": {"not_measured": words},
                            "VQA_A": {"value": 1.0, "n": 2, "note": words, "weights": {words: words}},
                        },
                        "withheld": {"total": words},
                    }
                },
                "videos": {"expected": words, "scored": words, "rejected": {words: words}},
                "prompts": {"whole_list": False, "of_benchmark": words},
                "settings": {words: {words: words}},
                "warnings": [words],
            },
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
    """All 17 metrics are named with the reason why; no score is given; published rows stand beside."""
    html = render_html(report_data)
    assert html.count("not measured: weights not found: ") == len(EVALCRAFTER)
    assert all(f">{name}<" in html for name in EVALCRAFTER)
    assert html.count(">not given</td>") >= 5
    assert all(row.name in html for row in rows_named(["2024"]))


def test_both_modes_stand_side_by_side_and_only_compat_beside_published_rows(scored_data: ReportData) -> None:
    """Each metric has a cell for each mode; our row below the published ones holds the numbers of compat."""
    html = render_html(scored_data)
    compat, fixed = (scored_data.benchmark["modes"][mode]["metrics"]["VQA_A"]["value"] for mode in ("compat", "fixed"))
    row = html.partition('<th scope="row">VQA_A')[2].partition("</tr>")[0]
    assert row.index(f">{compat:.2f}<") < row.index(f">{fixed:.2f}<")
    published = html.partition('<section id="published"')[2].partition("</section>")[0]
    assert published.count('<tr class="ours">') == published.count("<table")
    assert f">{compat:.2f}<" in published and f">{fixed:.2f}<" not in published
    assert "the coefficients were fitted to compat values" in html


def test_nothing_is_lost_of_what_went_wrong(scored_data: ReportData) -> None:
    """Warnings, withheld scores, rejected videos and videos without a value are in the page and in Markdown."""
    for text in (render_html(scored_data), render_markdown(scored_data)):
        assert "A still video has the best motion score there is" in text
        assert "needs Celebrity_ID_Score" in text
        assert "truncated" in text and "0019" in text
        assert "needs two frames; has 1" in text and "0008, 0017" in text
        assert "RapidOCR in place of PaddleOCR" in text


def test_a_report_of_given_videos_is_silent_about_training(scored_data: ReportData) -> None:
    """What is about training is left out; videos, scores, settings and lineage stay."""
    html = render_html(scored_data)
    page = Page(html)
    sections = [section["id"] for section in page.all("section")]
    assert sections == ["samples", "scores", "published", "missing", "lineage", "configuration", "timings"]
    assert "trained" not in html.partition("<script>")[0] and "19 videos of a folder" in html
    assert "dover.order" in html and "as published" in html


def test_every_score_of_every_video_can_be_read_without_script(scored_data: ReportData) -> None:
    """Each mode has a table with a row for each video; cards hold the same numbers for the script."""
    html = render_html(scored_data)
    for mode in ("compat", "fixed"):
        table = html.partition(f'aria-label="Scores of every video, {mode}"')[2].partition("</table>")[0]
        assert table.count("<tr data-id=") == len(scored_data.rows)
        assert f"{100 * scored_data.rows[3].values[mode]['VQA_A']:.2f}" in table
    cards = {card["data-id"]: card for card in Page(html).all("article") if "data-id" in card}
    assert list(cards) == [row.id for row in scored_data.rows]
    first = float((cards["0003"]["data-compat"] or "").split(",")[0])
    assert first == pytest.approx(scored_data.rows[3].values["compat"]["VQA_A"], rel=1e-6)
    assert cards["0003"]["data-tags"] == "text detection" and cards["0003"]["data-classes"] == "dog,stop sign"
    assert "!1" in (cards["0008"]["data-compat"] or "").split(",")


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
    assert "trained 6 minutes on your CPU" in text and text.count(": not measured: ") == len(EVALCRAFTER)


def test_json_and_markdown_hold_every_score(scored_data: ReportData) -> None:
    """Values of every video, both modes, averages, what is withheld, warnings and published rows are in JSON; all but
    the values of videos in Markdown."""
    plain = json.loads(render_json(scored_data))
    assert plain["benchmark"] == json.loads(json.dumps(scored_data.benchmark))
    for written, row in zip(plain["samples"], scored_data.rows, strict=True):
        assert (written["id"], written["tags"], written["missing"]) == (row.id, row.tags, row.missing)
        assert written["values"] == row.values and written["reasons"] == row.reasons
    assert [table["name"] for table in plain["published"]][:2] == ["aspects", "metrics"]
    text = render_markdown(scored_data)
    for mode, results in scored_data.benchmark["modes"].items():
        assert f"| plain average, {mode} |" in text
        numbers = [found["value"] for found in results["metrics"].values() if "value" in found]
        assert all(f"{number:.2f}" in text or f"{number:.4f}" in text for number in numbers)
        assert all(reason in text for reason in results["withheld"].values())


def test_markdown_stays_a_table_whatever_a_text_holds(scored_data: ReportData) -> None:
    """Pipes and line ends of others neither end a cell nor begin a line."""
    hostile = "a | b\n# c"
    metrics = {"IS": {"not_measured": hostile}, "VQA_A": {"value": 1.0, "n": 1, "note": hostile}}
    modes = {"compat": {"metrics": metrics, "aspects": {}, "withheld": {"total": hostile}, "averages": {}}}
    benchmark = {**scored_data.benchmark, "modes": modes, "warnings": [hostile]}
    text = render_markdown(dataclasses.replace(scored_data, benchmark=benchmark))
    assert "\n# c" not in text and "a \\| b # c" in text


def test_a_report_of_an_older_scorecard_is_whole(scored_data: ReportData) -> None:
    """One mode, and no values of videos: the page shows what there is."""
    benchmark = {"mode": "compat", "metrics": {"IS": {"value": 15.0, "per_video": {"a": 1}}}, "aspects": {}}
    rows = [dataclasses.replace(row, values={}, reasons={}) for row in scored_data.rows]
    data = dataclasses.replace(scored_data, rows=rows, benchmark=benchmark)
    html = render_html(data)
    Page(html)
    assert ">15.00<" in html and "15.00" in render_markdown(data) and json.loads(render_json(data))


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
