"""The frame of a self-contained page: elements, styles, script, and a policy that forbids the browser to ask anyone.

The script is allowed by its own hash, so text that found its way into the page could not run even if escaping failed.
"""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

__all__ = [
    "column",
    "data_uri",
    "element",
    "empty",
    "facts_list",
    "flat",
    "number",
    "page",
    "row_head",
    "section",
    "table",
]

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


def facts_list(facts: Mapping[str, str]) -> str:
    """Facts by name, in as many columns as there is room for."""
    listed = [
        element("div", element("dt", escape(name)), element("dd", escape(value))) for name, value in facts.items()
    ]
    return element("dl", *listed, class_="facts")


def flat(value: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Nested settings by their dotted names, as text."""
    found: dict[str, str] = {}
    for name, item in value.items():
        if isinstance(item, Mapping) and item:
            found |= flat(item, f"{before}{name}.")
        else:
            text = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False, default=str)
            found[f"{before}{name}"] = text
    return found


def page(
    title: str,
    body: str,
    *,
    look: str = "report.css",
    script: str = "report.js",
    media: str = "data:",
    styled_inside: bool = True,
    head: Sequence[str] = (),
) -> str:
    """A whole HTML document around `body`, which is trusted markup.

    Args:
        title: Of the document.
        body: What is in it; its script comes behind.
        look: Styles of this kind of page, beside those that all share (`page.css`).
        script: Of this kind of page.
        media: Where videos may come from, in the words of a content security policy.
        styled_inside: Elements may have styles of their own; else only the sheet's count.
        head: More elements of the head.
    """
    assets = files("vc2.eval") / "assets"
    common, own, code = ((assets / name).read_text(encoding="utf-8") for name in ("page.css", look, script))
    style = f"{common}\n{own}"
    allowed = "'unsafe-inline'" if styled_inside else _hash(style)
    policy = (
        f"default-src 'none'; script-src {_hash(code)}; style-src {allowed}; "
        f"img-src data:; media-src {media}; base-uri 'none'; form-action 'none'"
    )
    elements = "\n".join(
        (
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=policy),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            *head,
            element("title", escape(title)),
            f"<style>{style}</style>",
        )
    )
    whole = f"<head>\n{elements}\n</head>\n<body>\n{body}\n<script>{code}</script>\n</body>"
    return f'<!doctype html>\n<html lang="en">\n{whole}\n</html>\n'


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
