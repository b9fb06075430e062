"""The frame of a self-contained page: elements, styles, script, and a policy that forbids the browser to ask anyone.

The script is allowed by its own hash, so text that found its way into the page could not run even if escaping failed.
"""

import base64
import hashlib
import math
from collections.abc import Sequence
from html import escape
from importlib.resources import files

__all__ = ["column", "data_uri", "element", "empty", "number", "page", "row_head", "section", "table"]

VOID = ("br", "img", "input", "meta")


def element(tag: str, *children: str, **attributes: object) -> str:
    """An HTML element.

    Args:
        tag: Its name.
        children: What is in it, trusted markup: `escape` the words of others.
        attributes: Escaped here. `aria_label` is aria-label, `class_` is class; True stands bare, None and False are
        left out.
    """
    written = [tag]
    for name, value in attributes.items():
        name = name.removesuffix("_").replace("_", "-")
        if value is True:
            written.append(name)
        elif value is not None and value is not False:
            written.append(f'{name}="{escape(str(value))}"')
    start = f"<{' '.join(written)}>"
    return start if tag in VOID else f"{start}{''.join(children)}</{tag}>"


def data_uri(media_type: str, data: bytes) -> str:
    """Bytes inside the page."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def section(anchor: str, title: str, lead: str, *parts: str) -> str:
    """A part of the page with its heading; `lead` is markup."""
    return element("section", element("h2", title), element("p", lead, class_="lead"), *parts, id=anchor)


def empty(words: str) -> str:
    """What stands where there is nothing to show."""
    return element("p", words, class_="empty")


def table(label: str, head: Sequence[str], rows: Sequence[str], style: str | None = None, box: str = "scroll") -> str:
    """A table in a box that scrolls by itself, also by keyboard.

    Args:
        label: What it is, for those who do not see it.
        head: Cells of the first row, see `column`.
        rows: Elements tr.
        style: Class of the table.
        box: Class of the box.
    """
    body = element("thead", element("tr", *head)) + element("tbody", *rows)
    return element("div", element("table", body, class_=style), class_=box, tabindex=0, role="region", aria_label=label)


def column(name: str, *, is_number: bool = True, **attributes: object) -> str:
    """The head of a column."""
    return element("th", escape(name), scope="col", class_="num" if is_number else None, **attributes)


def row_head(name: str, small: str = "") -> str:
    """The head of a row, with a remark."""
    return element("th", escape(name), element("small", escape(small)) if small else "", scope="row")


def number(value: float) -> str:
    """A figure in three digits; none where it is no number."""
    if not math.isfinite(value):
        return "none"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def page(title: str, body: str) -> str:
    """A whole HTML document around `body`, which is trusted markup."""
    assets = files("vc2.eval") / "assets"
    style, script = ((assets / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{allowed}'; style-src 'unsafe-inline'; "
        "img-src data:; media-src data:; base-uri 'none'; form-action 'none'"
    )
    head = "\n".join(
        (
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=policy),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("title", escape(title)),
            f"<style>\n{style}</style>",
        )
    )
    whole = f"<head>\n{head}\n</head>\n<body>\n{body}\n<script>{script}</script>\n</body>"
    return f'<!doctype html>\n<html lang="en">\n{whole}\n</html>\n'
