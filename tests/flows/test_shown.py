"""What the UI is given to show: words of strangers stay words, links open, figures are those of the store."""

import json
import re
from pathlib import Path

import pytest

from flows.follow import LINK, Row, View, _gate
from flows.server import Api
from flows.shown import ShownProgress, asset_of, place_of
from flows.tables import (
    brief,
    distribution_rows,
    facts,
    linked,
    markdown_table,
    plain,
    reject_rows,
    score_rows,
    spoken,
    training_facts,
)
from vc2.artifacts import Manifest, ShardSet, put_file
from vc2.storage import LocalStore, open_store

HOSTILE = (
    "<script>alert(1)</script> <img src=x onerror=alert(1)>",
    "[click](javascript:alert(1)) ![x](http://evil.example/p.png)",
    "see http://evil.example or www.evil.example or a@evil.example",
    "a | b | c\n| new | row |\n\n# heading",
    "`code` **bold** _it_ ~gone~ &lt;b&gt; \\| \\",
    "- item",
    "turned \u202egnp.exe",
)


def read_as_markdown(text: str) -> str:
    """As HTML, by a parser of GitHub's dialect."""
    markdown_it = pytest.importorskip("markdown_it")
    return markdown_it.MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(text)


@pytest.mark.parametrize("words", HOSTILE)
def test_words_of_strangers_stay_words(words: str) -> None:
    """Neither HTML nor links nor markup, and one cell: read as Markdown they are what was written, in a line."""
    page = read_as_markdown("\n".join(markdown_table([("caption", plain(words)), ("next", "one")])))
    assert set(re.findall(r"<(\w+)", page)) <= {"table", "thead", "tbody", "tr", "th", "td"}, page
    assert page.count("<tr>") == 3 and page.count("<td>") == 4
    alone = read_as_markdown(plain(words))
    assert set(re.findall(r"<(\w+)", alone)) == {"p"}, alone


@pytest.mark.parametrize("words", HOSTILE[:-1])
def test_what_was_made_plain_can_be_spoken(words: str) -> None:
    """A terminal shows the words without what kept Markdown off."""
    assert spoken(plain(words)) == " ".join(words.split())


def test_plain_words_stay_readable() -> None:
    """What does nothing is left as it is."""
    for words in ("no_caption 1, http_404 3 (24 rows)", "/data/my_set-2/x.tar", "37.5 %, 1,200 of 4,000"):
        assert plain(words) == words


def test_a_cell_is_not_a_book() -> None:
    assert len(plain("x" * 10_000)) == 300


def test_a_link_is_a_link() -> None:
    """Also to a place with spaces and brackets, under a name with brackets."""
    text = linked("a [b] | c", "http://127.0.0.1:1/a (b) c.html")
    assert '<a href="http://127.0.0.1:1/a%20%28b%29%20c.html">a [b] | c</a>' in read_as_markdown(text)


# ---- progress ----


def test_progress_names_what_it_counts() -> None:
    """Rows, shards, steps, videos; the stage is not said twice."""

    def described(stage: str, work: str, done: int = 5, total: int | None = 1200) -> str:
        return ShownProgress(stage).described(work, done, total, {"eta": "7 min"})

    assert described("train/full", "train/full") == "5 of 1,200 steps, eta 7 min"
    assert described("train/full", "train/full validation") == "train/full validation: 5 of 1,200 steps, eta 7 min"
    assert described("shard/webvid", "webvid: fetch", total=None) == "webvid: fetch: 5 rows, eta 7 min"
    assert described("shard/webvid", "webvid: shards") == "webvid: shards: 5 of 1,200 shards, eta 7 min"
    assert described("evaluate/evalcrafter", "samples") == "samples: 5 of 1,200 videos, eta 7 min"
    assert described("evaluate/evalcrafter", "report", 1, 1) == "report: 1 of 1, eta 7 min"


# ---- artifacts ----


def a_set(**facts: object) -> Manifest:
    counts = {"rows": 200, "rows_with_samples": 150, "rows_rejected": 40, "rows_duplicate": 10, "samples": 300}
    return Manifest(
        kind="shard_set", stage="shard/webvid", stage_version=1, fingerprint="f" * 64, config={}, inputs={},
        files=(), counts=counts | {"shards": 2, "media_bytes": 5000}, facts=facts, licenses={"webvid": "a | <b>"},
    )  # fmt: skip


def test_rejects_are_counted_by_reason() -> None:
    """Most first, with their share of the rows; a reason is a word of its own, whatever it is."""
    rows = reject_rows(a_set(reasons={"timeout": 4, "no_caption": 30, "<b>|": 4}))
    assert rows[0] == {"reason": "no_caption", "rejected": "30", "share of rows": "15 %"}
    assert [row["reason"] for row in rows] == ["no_caption", "\\<b\\>\\|", "timeout"]
    assert reject_rows(a_set()) == []


def test_rates_are_drawn_in_order() -> None:
    rows = distribution_rows(a_set(fps_histogram={"12": 1, "8": 3}))
    assert [(row["fps"], row["samples"], row["share"]) for row in rows] == [("8", "3", "75 %"), ("12", "1", "25 %")]
    assert len(rows[0][""]) == 24
    assert distribution_rows(a_set()) == []


def test_the_rows_of_a_set_add_up() -> None:
    found = dict(facts(a_set()))
    assert found["rows"] == "200 = 150 with samples + 40 rejected + 10 exact duplicates"
    assert found["licence"] == "webvid: a \\| \\<b\\>"


def test_a_training_is_told_in_figures() -> None:
    lines = [
        {"step": 10, "loss": 1.0, "skipped": 1, "loss_image": None},
        {"step": 20, "loss": 0.25, "skipped": 0, "loss_image": None},
    ]
    rows = training_facts(lines, [{"step": 20, "val_loss_ema": 0.5}])
    assert {"figure": "loss", "first": "1", "last": "0.25"} in rows
    assert {"figure": "skipped steps", "first": "", "last": "1"} in rows
    assert {"figure": "validation loss, EMA", "first": "0.5", "last": "0.5"} in rows
    assert training_facts([], []) == []


def test_scores_stand_beside_the_papers(store: LocalStore) -> None:
    """Ours, the published rows, which of them can be compared, and why a number is missing."""
    metrics = {"Flow_Score": {"value": 4.5, "n": 2}, "IS": {"not_measured": "weights not found: <i>"}}
    compat = {"metrics": metrics, "aspects": {"motion_quality": 51.2}, "withheld": {"total": "needs | IS"}}
    benchmark = {
        "modes": {"compat": compat},
        "warnings": ["videos of 2 of 700 prompts"],
    }
    judges = {"samples": {"colour": {"is_share": True, "mean": 0.5, "n": 4}}, "real <clips>": {}}
    text = json.dumps({"judges": judges, "benchmark": benchmark}).encode()
    scorecard = a_set().evolve(kind="scorecard", files=(put_file(store, "scores/x", "summary.json", text),))
    judged, rows, notes = score_rows(store, scorecard)
    assert judged == [{"judge": "colour", "samples": "50 % (n 4)", "real \\<clips\\>": ""}]
    by_measure = {row["measure"]: row for row in rows}
    assert by_measure["Motion quality"]["ours"] == "51.20"
    assert by_measure["Motion quality"]["VideoCrafter2 (2024.01)"] == "54.82"
    assert by_measure["Motion quality"]["VideoCrafter2 (paper) †"] == "53.95"
    assert by_measure["Total"]["ours"] == "not given: needs \\| IS"
    assert by_measure["IS"]["ours"] == "not measured: weights not found: \\<i\\>"
    assert by_measure["Flow_Score"]["ours"] == "4.5"
    assert {tuple(row) for row in rows} == {
        ("measure", "ours", "VideoCrafter2 (2024.01)", "VideoCrafter2 (paper) †")
    }, "rows of a table share their columns"
    assert "videos of 2 of 700 prompts" in notes and "†: not comparable with ours" in notes


def test_values_are_brief() -> None:
    assert [brief(value) for value in (True, None, 1234567, 0.123456, [1, 2], {"a|": 1})] == [
        "yes", "", "1,234,567", "0.1235", "1, 2", "a\\| 1",
    ]  # fmt: skip


# ---- links and assets ----


def test_a_link_leads_to_the_file_server_where_it_serves_this_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = open_store(str(tmp_path / "store")), open_store(str(tmp_path / "other"))
    monkeypatch.delenv("VC2_FILES_URL", raising=False)
    assert place_of(store, "a b.html") == (tmp_path / "store" / "a b.html").as_uri()
    monkeypatch.setenv("VC2_FILES_URL", "http://127.0.0.1:4201")
    monkeypatch.setenv("VC2_STORE", str(tmp_path / "x" / ".." / "store"))
    assert place_of(store, "a b#c.html") == "http://127.0.0.1:4201/a%20b%23c.html"
    assert place_of(other, "a.html").startswith("file://")


@pytest.mark.s3
def test_a_link_to_a_bucket_is_signed(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VC2_FILES_URL", "http://127.0.0.1:4201")
    monkeypatch.setenv("VC2_STORE", s3_uri)
    assert "X-Amz-Signature" in place_of(open_store(s3_uri), "a.html")


def test_an_artifact_is_one_asset_wherever_it_lies() -> None:
    def asset(uri: str) -> str:
        return asset_of(
            ShardSet(kind="shard_set", uri=uri, prefix="shards/w/abc", fingerprint="abc", content_digest="")
        )

    assert asset("s3://bucket/p/shards/w/abc") == "s3://bucket/p/shards/w/abc"
    assert asset("/data/store/shards/w/abc") == "file:///data/store/shards/w/abc"
    assert asset("/my data/store/shards/w/abc") == "vc2://shards/w/abc"


# ---- the terminal ----


def test_rows_stand_in_the_order_of_work() -> None:
    """What was there before, what was started, what is to come: a preflight stands where it took place."""
    view = View(Api("http://127.0.0.1:1/api"), "run")
    for row in (
        Row("shard/webvid", "reused"), Row("train/full", "running", started="2026-01-01T00:02"),
        Row("train/spatial"), Row("preflight", "done", started="2026-01-01T00:01"),
    ):  # fmt: skip
        view.rows[row.name] = row
    assert [row.name for row in view.in_order()] == ["shard/webvid", "preflight", "train/full", "train/spatial"]


def test_who_waits_at_a_gate_is_told_what_to_do() -> None:
    told = _gate({"id": "abc", "state": {"message": "look"}}, "http://127.0.0.1:4200")
    assert told.endswith("press Resume at http://127.0.0.1:4200/runs/flow-run/abc") and "(look)" in told


def test_a_link_artifact_is_read_back() -> None:
    found = LINK.fullmatch("[shard/webvid: contact sheet](http://127.0.0.1:4201/pages/sheets/a.html)")
    assert found and found.groups() == ("shard/webvid: contact sheet", "http://127.0.0.1:4201/pages/sheets/a.html")
