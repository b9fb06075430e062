"""The page of a study in a real browser."""

import http.server
import importlib.util
import json
import re
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from vc2.eval.study.analyse import analyse
from vc2.eval.study.answers import StudyKey
from vc2.eval.study.build import BuiltStudy, build
from vc2.eval.study.config import StudyConfig, parse_questions
from vc2.eval.study.order import trials_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

OPEN = ".question:not(:disabled)"


def _helper() -> ModuleType:
    spec = importlib.util.spec_from_file_location("browser", Path(__file__).parents[2] / "browser.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


helper = _helper()


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    with helper.browser_or_skip() as browser:
        yield browser


@pytest.fixture
def context(browser: "Browser") -> "Iterator[BrowserContext]":
    context = browser.new_context(viewport=helper.DESKTOP, accept_downloads=True)
    yield context
    context.close()


@pytest.fixture(scope="session")
def short(folders: dict[str, Path], prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> BuiltStudy:
    """Two models, five prompts with the hostile one among them, two questions, one repeat, one attention trial."""
    some = tmp_path_factory.mktemp("some")
    lines = prompts.read_text().splitlines()
    (some / "prompts.txt").write_text("\n".join(lines[:5]))
    config = StudyConfig(
        seed=1, repeats=0.2, attention=1, min_seconds=0.2,
        questions=parse_questions(["motion_quality", "cute=<b>Which</b> is cuter?"]),
    )  # fmt: skip
    two = {model: folders[model] for model in ("Sunrise", "Moonlit")}
    return build(two, some / "study", config, prompts=some / "prompts.txt")


def enter(page: "Page", study: BuiltStudy, rater: str = "anna") -> None:
    page.goto((study.folder / "index.html").as_uri())
    page.fill("#rater", rater)
    page.keyboard.press("Enter")
    page.wait_for_selector(".trial")


def sides(page: "Page") -> list[str]:
    return page.evaluate("[...document.querySelectorAll('video')].map(video => video.src.split('/').pop())")


def answer(page: "Page", *keys: str) -> None:
    """Answer the questions of a pair by keys, once that is allowed, and go on."""
    page.wait_for_selector(OPEN)
    for key in keys:
        page.keyboard.press(key)
    page.keyboard.press("Enter")


def count(page: "Page") -> str:
    return " ".join(page.inner_text(".count").split())


def export(page: "Page", folder: Path) -> Path:
    with page.expect_download() as download:
        page.click("button.save")
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def owners(study: BuiltStudy) -> dict[str, str]:
    return {source["video"]: source["model"] for source in json.loads(study.key.read_text())["sources"]}


def test_a_study_is_done_with_keys_alone_resumed_exported_and_analysed(
    context: "BrowserContext", short: BuiltStudy, tmp_path: Path
) -> None:
    """Nothing but the keyboard; a reload midway goes on where it was; the file says what the rater meant."""
    page, whose = context.new_page(), owners(short)
    with helper.watched(page) as trouble:
        enter(page, short)
        seen = []
        for number in range(7):
            assert count(page) == f"Pair {number + 1} of 7"
            seen.append(sides(page))
            left, right = (whose[name] for name in seen[-1])
            likes_left = "3" if left == right else "1" if left == "Sunrise" else "2"
            answer(page, likes_left, "3")
            if number == 3:
                page.reload()
                page.wait_for_selector("text=4 of 7 answered")
                page.keyboard.press("Enter")  # the focus is on the button that goes on
                page.wait_for_selector(".trial")
        page.wait_for_selector("text=Thank you")
        saved = export(page, tmp_path)
    assert not trouble
    assert saved.name == f"answers-{short.study[:8]}-anna.json"
    result = analyse(short.key, [saved], resamples=100)
    motion, cute = (result.parting(question, "Sunrise", "Moonlit") for question in ("motion_quality", "cute"))
    assert motion is not None and (motion.wins_a, motion.ties, motion.votes) == (5, 0, 5)
    assert cute is not None and (cute.ties, cute.votes) == (5, 5)
    (anna,) = result.raters_themselves
    assert (anna.same, anna.repeats, anna.attention) == (2, 2, (2, 2))
    assert result.accounts["answers"] == {"in": 14, "votes": 10, "repeats": 2, "attention": 2, "rejected": {}}
    plan = json.loads(saved.read_text())["answers"][::2]
    assert [[one["left"], one["right"]] for one in plan] == seen


def test_the_page_draws_the_order_that_the_analysis_draws(
    context: "BrowserContext", study: BuiltStudy, key: StudyKey, short: BuiltStudy
) -> None:
    """The two programs agree for every rater, with repeats, attention trials, three pairs, and a part of a study."""
    page = context.new_page()
    page.goto((study.folder / "index.html").as_uri())
    for rater in ("anna", "r0", "a-b_c", *(f"r{number}" for number in range(30))):
        drawn = page.evaluate("rater => vc2Study.trialsOf(rater)", rater)
        trials = [(one["matchup"], one["left"], one["right"], one["repeat"]) for one in drawn]
        assert trials == [(one.matchup, one.left, one.right, one.is_repeat) for one in key.trials_of(rater)]
    text = (study.folder / "index.html").read_text()
    order_seed = re.search(r'"order_seed":"([0-9a-f]{32})"', text)
    assert order_seed is not None
    part = trials_of(order_seed[1], "anna", key.matchups, repeats=0.3, most=8)
    assert len(part) == 8 + 2 + 2


def test_hostile_words_are_words(context: "BrowserContext", short: BuiltStudy) -> None:
    """A prompt or question with markup is shown as it is written; nothing of it runs or is fetched."""
    page, captions = context.new_page(), []
    with helper.watched(page) as trouble:
        enter(page, short)
        for number in range(7):
            captions.append(page.inner_text("h1.caption"))
            assert "<b>Which</b> is cuter?" in page.inner_text(".questions")
            page.keyboard.press("0")
            page.keyboard.press("Enter")
            if number < 6:
                helper.wait_until(
                    page, "number => document.querySelector('.count b')?.textContent === number", str(number + 2)
                )
        assert page.title() == "Which video is better?"
        assert page.query_selector("img") is None
    assert not trouble
    assert any(caption.startswith('"><script>document.title=') and "&amp;" in caption for caption in captions)


def test_the_page_never_names_a_model(context: "BrowserContext", study: BuiltStudy) -> None:
    """Neither its source, nor what it shows, nor what it keeps."""
    page = context.new_page()
    enter(page, study)
    kept = page.evaluate("JSON.stringify(localStorage)")
    for text in ((study.folder / "index.html").read_text(), page.content(), kept):
        assert not re.search("sunrise|moonlit|noonday", text, re.IGNORECASE)


def test_answers_wait_until_both_videos_were_seen(context: "BrowserContext", short: BuiltStudy) -> None:
    """Keys and buttons do nothing before; the reason is said."""
    page = context.new_page()
    page.add_init_script("HTMLMediaElement.prototype.play = function () { return new Promise(() => {}); };")
    enter(page, short)
    helper.wait_until(page, "[...document.querySelectorAll('video')].every(video => video.readyState >= 3)")
    page.wait_for_timeout(500)
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    assert page.query_selector(OPEN) is None and page.query_selector("input[type=radio]:checked") is None
    assert count(page) == "Pair 1 of 7" and "Look at both to the end" in page.inner_text(".wait")
    helper.wait_until(page, "document.querySelector('#say').textContent.includes('to the end first')")


@pytest.mark.parametrize("ready_at_end", [2, 4])
def test_videos_play_together_and_the_shorter_waits(
    context: "BrowserContext", short: BuiltStudy, ready_at_end: int
) -> None:
    """Both start, both come to their ends, and only then both begin again; a key pauses both.

    At its end a video is HAVE_CURRENT_DATA by the standard, as in Firefox, and HAVE_ENOUGH_DATA in Chromium.
    """
    page = context.new_page()
    page.add_init_script(f"window.readyAtEnd = {ready_at_end};")
    page.add_init_script("""
        const real = Object.getOwnPropertyDescriptor(HTMLMediaElement.prototype, "readyState").get;
        const readyState = { get() { return this.ended ? readyAtEnd : real.call(this); } };
        Object.defineProperty(HTMLMediaElement.prototype, "readyState", readyState);
        window.log = [];
        const note = event => window.log.push([event.type, event.target.src]);
        for (const name of ["play", "ended"]) addEventListener(name, note, true);
    """)
    enter(page, short)
    helper.wait_until(page, "log.filter(([name]) => name === 'ended').length >= 4")
    log = [(name, source) for name, source in page.evaluate("log")]
    rounds = [(name, [source for _, source in some]) for name, some in groupby(log, key=lambda one: one[0])]
    assert [name for name, _ in rounds[:4]] == ["play", "ended"] * 2
    assert all(len(set(sources)) == 2 for _, sources in rounds[:4])
    assert all(len(sources) == 2 for name, sources in rounds[:4] if name == "ended")
    durations = page.evaluate("[...document.querySelectorAll('video')].map(video => video.duration)")
    assert abs(durations[0] - durations[1]) > 0.05
    page.keyboard.press("Space")
    helper.wait_until(page, "[...document.querySelectorAll('video')].every(video => video.paused)")
    assert "Play" in page.inner_text("button.play")


def test_from_the_start_at_the_end_plays_on(context: "BrowserContext", short: BuiltStudy) -> None:
    """R between two rounds: the next round is counted as any other, and the one after it begins."""
    page = context.new_page()
    page.add_init_script("window.ended = 0; addEventListener('ended', () => { ended += 1; }, true);")
    enter(page, short)
    helper.wait_until(page, "[...document.querySelectorAll('video')].every(video => video.ended)")
    page.keyboard.press("r")
    helper.wait_until(page, "ended >= 6")


def test_a_video_that_runs_ahead_is_set_back(context: "BrowserContext", short: BuiltStudy) -> None:
    """Slowed down, so that they do not end meanwhile, and driven apart: they come together while they play."""
    page = context.new_page()
    page.add_init_script("""
        const play = HTMLMediaElement.prototype.play;
        HTMLMediaElement.prototype.play = function () { this.playbackRate = 0.07; return play.call(this); };
    """)
    enter(page, short)
    running = "[...document.querySelectorAll('video')].every(video => !video.paused && video.currentTime > 0)"
    helper.wait_until(page, running)
    page.evaluate("document.querySelector('video').currentTime = 0.45")
    apart = "(([a, b]) => Math.abs(a.currentTime - b.currentTime))(document.querySelectorAll('video'))"
    helper.wait_until(page, f"{running} && {apart} < 0.12 && document.querySelector('video').currentTime < 0.4")


def test_answers_can_be_changed_and_pairs_revisited(
    context: "BrowserContext", short: BuiltStudy, tmp_path: Path
) -> None:
    """Back, another answer, on: the last one counts; a click does what a key does."""
    page = context.new_page()
    enter(page, short)
    answer(page, "1", "1")
    page.keyboard.press("b")
    helper.wait_until(page, "document.querySelector('.count b').textContent === '1'")
    assert page.eval_on_selector_all("input:checked", "all => all.map(one => one.value)") == ["left", "left"]
    page.click("label:has-text('Comparable') >> nth=0")
    page.focus("fieldset:nth-child(2) input:checked")
    page.keyboard.press("ArrowRight")  # as in any group of radio buttons
    data = json.loads(export(page, tmp_path).read_text())
    assert [(one["trial"], one["answer"]) for one in data["answers"]] == [(0, "comparable"), (0, "right")]


def test_a_file_of_answers_goes_on_elsewhere(browser: "Browser", short: BuiltStudy, tmp_path: Path) -> None:
    """Exported in one browser, opened in another that knows nothing; files of other studies are refused."""
    first, second = (browser.new_context(accept_downloads=True) for _ in range(2))
    page = first.new_page()
    enter(page, short, "bert")
    answer(page, "1", "2")
    helper.wait_until(page, "document.querySelector('.count b').textContent === '2'")
    saved = export(page, tmp_path)
    first.close()
    page = second.new_page()
    page.goto((short.folder / "index.html").as_uri())
    other = tmp_path / "other.json"
    other.write_text(saved.read_text().replace(short.study, "f" * 64))
    page.set_input_files("#import", other)
    page.wait_for_selector("text=holds no answers to this study")
    data = json.loads(saved.read_text())
    data["answers"] += [{"trial": 1}, None, dict(data["answers"][0], trial=2), dict(data["answers"][0], seconds="<b>")]
    saved.write_text(json.dumps(data))
    page.set_input_files("#import", saved)
    page.wait_for_selector(".trial")
    assert count(page) == "Pair 2 of 7"
    again = json.loads(export(page, tmp_path).read_text())
    assert again["rater"] == "bert" and again["answers"] == data["answers"][:2]
    second.close()


def test_without_storage_the_page_warns_and_works(context: "BrowserContext", short: BuiltStudy, tmp_path: Path) -> None:
    """Answers stay in memory until they are saved."""
    page = context.new_page()
    page.add_init_script("Object.defineProperty(window, 'localStorage', { get() { throw new Error('denied'); } });")
    with helper.watched(page) as trouble:
        page.goto((short.folder / "index.html").as_uri())
        page.wait_for_selector("text=This browser keeps nothing")
        enter(page, short)
        answer(page, "2", "2")
        helper.wait_until(page, "document.querySelector('.count b').textContent === '2'")
        assert "This browser keeps nothing" in page.inner_text("body")
        assert len(json.loads(export(page, tmp_path).read_text())["answers"]) == 2
    assert not trouble


def test_a_video_that_does_not_play_is_said_and_passed_over(
    context: "BrowserContext", short: BuiltStudy, tmp_path: Path
) -> None:
    """The page sees it, takes no other answer, and goes on; the analysis counts it apart."""
    folder = tmp_path / "copy"
    shutil.copytree(short.folder, folder)
    for video in (folder / "videos").iterdir():
        video.write_bytes(video.read_bytes()[:200])
    page = context.new_page()
    page.goto((folder / "index.html").as_uri())
    page.keyboard.press("Tab")
    page.fill("#rater", "cleo")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=This video does not play.")
    page.keyboard.press("1")
    assert page.query_selector("input:checked") is None
    page.keyboard.press("0")
    assert page.get_attribute("button.broken", "aria-pressed") == "true"
    page.keyboard.press("Enter")
    helper.wait_until(page, "document.querySelector('.count b').textContent === '2'")
    result = analyse(short.key, [export(page, tmp_path)], resamples=100)
    assert result.accounts["answers"]["rejected"] == {"a video did not play": 2}


def test_no_window_is_too_narrow(context: "BrowserContext", study: BuiltStudy) -> None:
    """No sideways scrolling anywhere; on a phone videos and answers are seen together."""
    page = context.new_page()
    enter(page, study)
    page.wait_for_selector(OPEN)
    for width in (1280, 900, 768, 360, 320):
        page.set_viewport_size({"width": width, "height": 740})
        assert helper.width_beyond(page) == 0
    tops = page.evaluate("""[".frame", "figure:nth-child(2) .frame", ".question.current .options", ".next"]
        .map(name => document.querySelector(name).getBoundingClientRect()).map(box => [box.top, box.bottom])""")
    assert all(0 <= top < bottom <= 740 for top, bottom in tops)
    assert tops[1][1] <= tops[2][0]
    page.click("text=Leave")
    page.wait_for_selector(".start")
    for width in (320, 768):
        page.set_viewport_size({"width": width, "height": 740})
        assert helper.width_beyond(page) == 0


def test_those_who_want_no_motion_press_play(browser: "Browser", short: BuiltStudy) -> None:
    """With reduced motion nothing plays by itself; a key plays both once."""
    context = browser.new_context(reduced_motion="reduce")
    page = context.new_page()
    enter(page, short)
    helper.wait_until(page, "[...document.querySelectorAll('video')].every(video => video.readyState >= 3)")
    page.wait_for_timeout(200)
    assert page.evaluate("[...document.querySelectorAll('video')].every(video => video.paused && !video.currentTime)")
    page.keyboard.press("Space")
    page.wait_for_selector(OPEN)
    helper.wait_until(page, "document.querySelector('button.play').textContent.startsWith('Play')")
    context.close()


def test_every_control_has_a_name_and_a_role(context: "BrowserContext", short: BuiltStudy) -> None:
    """Buttons, radio groups, progress and videos can be told apart by those who do not see them."""
    page = context.new_page()
    enter(page, short)
    page.wait_for_selector(OPEN)
    unnamed = page.evaluate("""[...document.querySelectorAll("button, input, video, [role]:not(#say)")]
        .filter(one => !(one.getAttribute("aria-label") || one.textContent.trim() || one.labels?.length)).length""")
    assert unnamed == 0
    assert page.get_by_role("progressbar", name="Pairs answered").get_attribute("aria-valuemax") == "7"
    group = page.get_by_role("group", name="Which video has the better motion quality?")
    assert group.get_by_role("radio").count() == 3
    assert page.evaluate("document.activeElement.tagName") == "H1"
    assert page.evaluate("document.documentElement.lang") == "en"


def test_a_static_server_does_as_well(context: "BrowserContext", short: BuiltStudy) -> None:
    """Over HTTP the page plays its videos, asks for nothing else, and sets no cookie."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            asked.append(self.path)

    asked: list[str] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(short.folder)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        page = context.new_page()
        with helper.watched(page) as trouble:
            page.goto(f"http://127.0.0.1:{server.server_address[1]}/")
            page.fill("#rater", "dora")
            page.keyboard.press("Enter")
            answer(page, "1", "1")
            helper.wait_until(page, "document.querySelector('.count b').textContent === '2'")
        assert not trouble and not context.cookies()
    finally:
        server.shutdown()
        server.server_close()
    assert all(path == "/" or path.startswith("/videos/") for path in asked)
