"""The report in a real browser: what can be done with it, by mouse, by keyboard and on a phone, and what cannot be done
to it."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser import DESKTOP, PHONE, browser_or_skip, watched, width_beyond
from vc2.eval.report import ReportData, render_html

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Open = Callable[..., "Page"]
HOSTILE = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\"></script>"
IDS = "[...document.querySelectorAll('.shot[data-id]:not([hidden])')].map(card => card.dataset.id)"
SECONDS = 20


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    with browser_or_skip() as found:
        yield found


@pytest.fixture
def open_report(browser: "Browser", tmp_path: Path) -> Iterator[Open]:
    """Open a report as a file; no trouble of any kind may come of it."""
    contexts, troubles = [], []

    def opened(data: ReportData, **settings: object) -> "Page":
        path = tmp_path / "report.html"
        path.write_text(render_html(data), encoding="utf-8")
        context = browser.new_context(**{"viewport": DESKTOP, **settings})  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        watch = watched(page)
        troubles.append(watch.__enter__())
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert troubles == [[] for _ in troubles]


def shown(page: "Page") -> list[str]:
    return page.evaluate(IDS)


def until(page: "Page", claim: str) -> None:
    """Wait for something to be true. (Playwright's own waiting evaluates text, which the page's policy forbids.)"""
    end = time.monotonic() + SECONDS
    while not page.evaluate(claim):
        assert time.monotonic() < end, claim
        page.wait_for_timeout(50)


def told(page: "Page") -> str:
    return page.locator(".filters output").inner_text()


def test_videos_are_filtered_by_what_the_prompt_asks_for_and_by_its_words(
    open_report: Open, scored_data: ReportData
) -> None:
    """Attributes are alternatives, words and detection class narrow further; reset brings all back."""
    page = open_report(scored_data)
    assert shown(page) == [row.id for row in scored_data.rows] and told(page) == "20 of 20 videos"
    page.locator("[name=tag][value=color]").check()
    assert shown(page) == [row.id for row in scored_data.rows if "color" in row.tags]
    page.locator("[name=tag][value=text]").check()
    both = [row.id for row in scored_data.rows if {"color", "text"} & set(row.tags)]
    assert shown(page) == both and told(page) == f"{len(both)} of 20 videos"
    page.get_by_label("Detection class").select_option("stop sign")
    assert shown(page) == [row.id for row in scored_data.rows if "text" in row.tags]
    page.get_by_role("button", name="Reset").click()
    until(page, f"({IDS}).length === 20")
    page.locator("[name=tag][value=none]").check()
    assert shown(page) == [row.id for row in scored_data.rows if not row.tags]
    page.locator("[name=tag][value=none]").uncheck()
    page.get_by_label("Words in the prompt").fill("NUMBER 13")
    assert shown(page) == ["0013"]
    page.get_by_label("Words in the prompt").fill("no such words")
    assert shown(page) == [] and told(page) == "0 of 20 videos"


def test_videos_are_sorted_and_those_without_a_value_come_last_with_their_reason(
    open_report: Open, scored_data: ReportData
) -> None:
    """The order is that of the chosen metric in the chosen mode; both modes are told on each card."""
    page = open_report(scored_data)
    page.get_by_label("Sort by").select_option(":Flow_Score")
    for mode in ("compat", "fixed"):
        page.get_by_label("Mode").select_option(mode)
        values = {
            row.id: row.values[mode]["Flow_Score"] for row in scored_data.rows if "Flow_Score" in row.values[mode]
        }
        without = [row.id for row in scored_data.rows if row.id not in values]
        page.get_by_label("Order").select_option("down")
        assert shown(page) == [*sorted(values, key=lambda name: -values[name]), *without]
        page.get_by_label("Order").select_option("up")
        assert shown(page) == [*sorted(values, key=values.__getitem__), *without]
    assert told(page) == "20 of 20 videos, 18 with a value"
    card = page.locator(".shot[data-id='0008'] .value")
    assert card.text_content() == "Flow_Score: compat needs two frames; has 1 · fixed needs two frames; has 1"
    row = scored_data.rows[3]
    expected = " · ".join(f"{mode} {row.values[mode]['Flow_Score']:.2f} px" for mode in ("compat", "fixed"))
    assert page.locator(".shot[data-id='0003'] .value").text_content() == f"Flow_Score: {expected}"
    page.get_by_label("Sort by").select_option(":Count_Score")
    assert page.locator(".shot[data-id='0003'] .value").text_content().endswith("fixed does not apply")


def test_the_first_video_is_large_until_something_is_asked(open_report: Open, scored_data: ReportData) -> None:
    """Sorted, it stands among the others; after a reset it is large again."""
    page = open_report(scored_data)
    assert page.locator(".stage .shot.hero").get_attribute("data-id") == "0000"
    page.get_by_label("Sort by").select_option(":VQA_A")
    assert page.locator(".stage .shot").count() == 0 and page.locator(".wall .shot[data-id='0000']").count() == 1
    page.get_by_role("button", name="Reset").click()
    page.wait_for_selector(".stage .shot.hero")


def test_a_table_of_all_scores_is_sorted_by_its_heads(open_report: Open, scored_data: ReportData) -> None:
    """Its heads are buttons: the first press sorts downwards, the second upwards; aria-sort tells; cards follow."""
    page = open_report(scored_data)
    page.get_by_text("Scores of every video, fixed").click()
    table = page.locator(".scores-table[data-mode=fixed]")
    head = table.get_by_role("button", name="VQA_T")
    values = {row.id: row.values["fixed"]["VQA_T"] for row in scored_data.rows}
    down = sorted(values, key=lambda name: -values[name])
    ids = "rows => rows.filter(row => !row.hidden).map(row => row.dataset.id)"
    for direction, expected in (("descending", down), ("ascending", down[::-1])):
        head.click()
        assert head.locator("..").get_attribute("aria-sort") == direction
        assert table.locator("tbody tr").evaluate_all(ids) == expected == shown(page)
    page.locator("[name=tag][value=color]").check()
    assert table.locator("tbody tr").evaluate_all(ids) == shown(page) != expected


def test_everything_is_reached_by_keyboard(open_report: Open, scored_data: ReportData) -> None:
    """Tab goes from the link to the videos through all controls, with a visible focus; space and arrows work them."""
    page = open_report(scored_data)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "To the videos"
    seen: list[str] = []
    for _ in range(40):
        page.keyboard.press("Tab")
        name = page.evaluate("document.activeElement.name || document.activeElement.textContent.trim()")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", name
        seen.append(name)
        if name == "Reset":
            break
        if name == "words":
            page.keyboard.type("circle")
        if name == "metric":
            page.keyboard.press("ArrowDown")
        if page.evaluate("document.activeElement.value") == "color":
            page.keyboard.press("Space")
    assert [name for name in seen if name in ("words", "class", "metric", "mode", "order")] == [
        "words", "class", "metric", "mode", "order"
    ]  # fmt: skip
    assert {"Pause", "Slow", "Videos", "Scores", "Reset"} <= set(seen) and seen.count("tag") == 7
    assert page.get_by_label("Sort by").input_value() == ":VQA_A"
    found = [row.id for row in scored_data.rows if "color" in row.tags and "circle" in row.prompt]
    assert sorted(shown(page)) == found
    page.keyboard.press("Enter")
    until(page, f"({IDS}).length === 20")


def test_a_phone_shows_all_of_it_without_scrolling_sideways(
    open_report: Open, scored_data: ReportData, report_data: ReportData
) -> None:
    """Wide tables scroll by themselves; every control is on the screen and answers a finger."""
    phone = {"viewport": PHONE, "has_touch": True, "is_mobile": True}
    for data, scheme in ((report_data, "light"), (scored_data, "dark")):
        page = open_report(data, color_scheme=scheme, **phone)
        assert width_beyond(page) == 0
        page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
        assert width_beyond(page) == 0
    page.get_by_label("Sort by").select_option(":VQA_A")
    page.locator("label:has([value=color])").tap()
    assert page.locator(".filters output").is_visible() and told(page) == "4 of 20 videos, 4 with a value"
    boxes = page.locator(".filters :is(input, select, button)").evaluate_all(
        "fields => fields.map(field => field.getBoundingClientRect()).map(box => [box.left, box.right])"
    )
    assert all(left >= 0 and right <= PHONE["width"] for left, right in boxes)


def test_videos_play_when_they_are_in_view(open_report: Open, report_data: ReportData) -> None:
    """The first pair plays at once, what is far below does not; Pause stops all; a frame on is a frame on."""
    page = open_report(report_data)
    first, last = page.locator("video").first, page.locator("#stage-2 video").last
    until(page, "document.querySelector('video').currentTime > 0")
    assert last.evaluate("video => video.paused")
    page.get_by_role("button", name="Pause").click()
    assert first.evaluate("video => video.paused")
    before = first.evaluate("video => video.currentTime")
    page.get_by_role("button", name="one frame on").click()
    until(page, f"document.querySelector('video').currentTime !== {before}")
    assert page.evaluate("[...document.querySelectorAll('video')].every(video => !video.error)")


def test_a_large_page_hands_videos_to_the_player_only_in_view(open_report: Open, scored_data: ReportData) -> None:
    """Players are few: a video far away has no source and gets it when it comes near, and gives it back."""
    rows = [dataclasses.replace(scored_data.rows[number % 12], id=f"{number:04d}", missing="") for number in range(150)]
    page = open_report(dataclasses.replace(scored_data, rows=rows))
    held = "[...document.querySelectorAll('video')].filter(video => video.hasAttribute('src')).length"
    until(page, f"{held} > 0")
    assert page.evaluate(held) < 40 and len(shown(page)) == 49
    page.get_by_role("button", name="Show 48 more").click()
    assert len(shown(page)) == 97
    page.get_by_role("button", name="Show all 149").click()
    assert len(shown(page)) == 150 and page.get_by_role("button", name="Show all").count() == 0
    page.locator(".shot[data-id='0149']").scroll_into_view_if_needed()
    until(page, "document.querySelector(\".shot[data-id='0149'] video\").readyState >= 2")
    until(page, "!document.querySelector(\".shot[data-id='0001'] video\").hasAttribute('src')")
    assert page.evaluate(held) < 60


def test_nothing_moves_for_those_who_asked_for_stillness(open_report: Open, scored_data: ReportData) -> None:
    """With reduced motion no video starts by itself; the first frame is shown, and Play plays."""
    page = open_report(scored_data, reduced_motion="reduce")
    until(page, "document.querySelector('video').readyState >= 2")
    assert page.evaluate("[...document.querySelectorAll('video')].every(video => video.paused)")
    page.get_by_role("button", name="Play").click()
    until(page, "document.querySelector('video').currentTime > 0")


def test_a_hostile_caption_does_not_run(open_report: Open, scored_data: ReportData, report_data: ReportData) -> None:
    """Scripts in prompts, reasons and names are shown as text, also where the script writes them."""
    hostile = dataclasses.replace(
        scored_data.rows[8], prompt=HOSTILE, tags={HOSTILE: HOSTILE}, reasons={"compat": {"Flow_Score": HOSTILE}}
    )
    rows = [hostile, *scored_data.rows]
    for data in (scored_data, report_data):
        page = open_report(dataclasses.replace(data, title="calm", hardware=HOSTILE, about=HOSTILE, rows=rows))
        page.get_by_label("Sort by").select_option(":Flow_Score")
        assert page.title() == "calm"
        assert page.locator("img[src=x]").count() == 0 and page.locator("script").count() == 1
        assert page.locator(".shot h3", has_text="<script>").count() == 1
        assert HOSTILE in page.locator(".shot .value", has_text="onerror").text_content()


def test_without_script_all_is_there(open_report: Open, scored_data: ReportData) -> None:
    """All videos with their controls, tables of all scores; what needs the script is not shown."""
    page = open_report(scored_data, java_script_enabled=False)
    assert page.locator(".shot").count() == 20 and page.locator(".shot video[controls]").count() == 19
    assert page.locator("form.filters").is_hidden() and page.locator(".controls").is_hidden()
    page.get_by_text("Scores of every video, compat").click()
    assert page.locator(".scores-table[data-mode=compat] tbody tr").last.is_visible()


def test_a_report_of_the_small_world_is_sorted_by_its_judges(open_report: Open, report_data: ReportData) -> None:
    """Where no metric was measured the judges' figures take their place; pairs stay together."""
    rows = [dataclasses.replace(row, id=f"{number:04d}") for number, row in enumerate(report_data.rows)]
    page = open_report(dataclasses.replace(report_data, rows=rows))
    page.get_by_label("Sort by").select_option("judges:colour")
    expected = sorted(rows, key=lambda row: -row.scores["colour"])
    assert shown(page) == [row.id for row in expected]
    assert page.locator(".wall.all .shot").first.locator("video").count() == 2
