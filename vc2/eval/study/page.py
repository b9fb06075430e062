"""The page of a study: one HTML file beside a folder of videos.

Script and style are allowed by their own hashes and nothing may be fetched but videos from beside the page; no cookies,
no network. The study lies in the page as JSON in which no character could end the element around it; the script puts
words of others into the page as text, never as markup.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any

from vc2.eval.page import element

__all__ = ["render_study"]

NO_SCRIPT = (
    "This study needs JavaScript, in any browser of the last years. Nothing is sent anywhere: it runs on this page."
)


def render_study(study: Mapping[str, Any], digest: str) -> str:
    """The page as HTML.

    Args:
        study: What the page is to know (`build`), plain JSON values.
        digest: Of it.
    """
    assets = files("vc2.eval") / "assets"
    style, script = ((assets / name).read_text(encoding="utf-8") for name in ("study.css", "study.js"))
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; media-src 'self' file:; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    head = "\n".join(
        (
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=policy),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("meta", name="referrer", content="no-referrer"),
            element("meta", name="robots", content="noindex"),
            element("meta", name="vc2-study", content=digest),
            '<link rel="icon" href="data:,">',
            element("title", escape(str(study["title"]))),
            f"<style>{style}</style>",
        )
    )
    data = json.dumps({**study, "study": digest}, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    body = "\n".join(
        (
            element("div", element("noscript", element("p", NO_SCRIPT, class_="card")), id="app"),
            element("p", id="say", class_="unseen", role="status", aria_live="polite"),
            f'<script type="application/json" id="study">{data}</script>',
            f"<script>{script}</script>",
        )
    )
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
