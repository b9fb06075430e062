"""A real browser for tests of pages: the Chromium (or Chrome) of this machine, driven by Playwright.

    with browser_or_skip() as browser:              # skips the test, with a reason, where there is none
        page = browser.new_context(viewport=DESKTOP).new_page()
        with watched(page) as trouble:              # console errors, exceptions, requests that leave the machine
            page.goto(path.as_uri())
        assert not trouble

Contexts start empty: no storage, no cache. Nothing is fetched: requests to anything but files, data and loopback are
stopped and listed as trouble.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route, ViewportSize

__all__ = [
    "DESKTOP",
    "PHONE",
    "browser_or_skip",
    "find_browser",
    "open_browser",
    "wait_until",
    "watched",
    "width_beyond",
]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--autoplay-policy=no-user-gesture-required",
)
LOCAL = ("file:", "data:", "blob:", "about:", "http://127.0.0.1", "http://localhost")
DESKTOP: "ViewportSize" = {"width": 1280, "height": 900}
PHONE: "ViewportSize" = {"width": 360, "height": 740}


def find_browser() -> str | None:
    """Path of a Chromium on this machine."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def open_browser() -> "Iterator[Browser]":
    """A headless browser that is closed at the end of the block."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def browser_or_skip() -> "Iterator[Browser]":
    """`open_browser`, or skip the test where Playwright or a browser is missing."""
    pytest.importorskip("playwright.sync_api", reason="needs Playwright for Python: pip install playwright")
    if find_browser() is None:
        pytest.skip(f"needs a browser: none of {', '.join(NAMES)} is installed")
    with open_browser() as browser:
        yield browser


@contextmanager
def watched(page: "Page") -> Iterator[list[str]]:
    """Everything that should not happen in a page, as a list that grows: errors, and requests to other machines."""
    trouble: list[str] = []

    def guard(route: "Route") -> None:
        if route.request.url.startswith(LOCAL):
            route.continue_()
        else:
            trouble.append(f"request: {route.request.url:.200}")
            route.abort()

    page.on("console", lambda message: trouble.append(f"console: {message.text}") if message.type == "error" else None)
    page.on("pageerror", lambda error: trouble.append(f"exception: {error}"))
    page.route("**/*", guard)
    yield trouble


def wait_until(page: "Page", expression: str, argument: Any = None, *, seconds: float = 20) -> None:
    """Wait until an expression is true in the page. Unlike `page.wait_for_function` it holds under a policy without
    `unsafe-eval`.

    Raises:
        TimeoutError: If it does not become true.
    """
    until = time.monotonic() + seconds
    while not page.evaluate(expression, argument):
        if time.monotonic() > until:
            raise TimeoutError(f"not within {seconds:g} s: {expression}")
        page.wait_for_timeout(20)


def width_beyond(page: "Page") -> int:
    """CSS pixels by which the page is wider than its window: above 0, it scrolls sideways."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
