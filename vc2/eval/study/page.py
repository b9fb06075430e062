"""The page of a study: one HTML file beside a folder of videos.

Script and style are allowed by their own hashes and nothing may be fetched but videos from beside the page; no cookies,
no network. The study lies in the page as JSON in which no character could end the element around it; the script puts
words of others into the page as text, never as markup.
"""

import json
from collections.abc import Mapping
from typing import Any

from vc2.eval.page import element, page

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
    data = json.dumps({**study, "study": digest}, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    body = "\n".join(
        (
            element("div", element("noscript", element("p", NO_SCRIPT, class_="card")), id="app"),
            element("p", id="say", class_="unseen", role="status", aria_live="polite"),
            f'<script type="application/json" id="study">{data}</script>',
        )
    )
    head = (
        element("meta", name="referrer", content="no-referrer"),
        element("meta", name="robots", content="noindex"),
        element("meta", name="vc2-study", content=digest),
        '<link rel="icon" href="data:,">',
    )
    return page(
        str(study["title"]),
        body,
        look="study.css",
        script="study.js",
        media="'self' file:",
        styled_inside=False,
        head=head,
    )
