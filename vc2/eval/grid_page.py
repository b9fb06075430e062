"""The grid of samples as a page: what somebody looks at before a checkpoint is trained on, or let go.

It is built of the report's parts: the videos with their prompts, the training curve; what they were made by, and what
to look for. As the report, it asks nobody for anything, and escapes all text that is not ours.
"""

from collections.abc import Mapping, Sequence
from html import escape

from vc2.eval.page import element, facts_list, page, section
from vc2.eval.report_data import ReportData
from vc2.eval.report_page import controls, loss_card
from vc2.eval.report_videos import wall

__all__ = ["render_grid"]


def render_grid(data: ReportData, facts: Mapping[str, str], questions: Sequence[tuple[str, str]]) -> str:
    """The page as one HTML document that needs nothing else.

    Args:
        data: Its title, videos, notes and training curves.
        facts: What the videos were made by, and how.
        questions: What to look for, each with what an answer means.
    """
    parts = {"samples": "Samples", "questions": "What to look for", "losses": "Losses", "made": "Made by"}
    if not data.curves:
        del parts["losses"]
    links = [element("a", name, href=f"#{anchor}") for anchor, name in parts.items()]
    bar = element("nav", *links, aria_label="Parts of the page") + controls()
    asked = [element("li", element("b", escape(what)), " ", escape(meaning)) for what, meaning in questions]
    body = (
        element(
            "section",
            element("h1", escape(data.title)),
            element("p", escape(data.about), class_="lead wraps"),
            wall(data),
            *(element("p", escape(note), class_="muted small") for note in data.notes),
            id="samples",
            class_="opening",
        ),
        section(
            "questions",
            "What to look for",
            "No score is on this page; it is for the eyes.",
            element("ol", *asked, class_="questions"),
        ),
        _losses(data),
        section("made", "What they were made by", "The evaluation's own sampler and seeds.", facts_list(facts)),
        element("footer", f"{escape(data.title)}. <code>{escape(data.fingerprint)}</code>"),
    )
    skip = element("a", "To the videos", class_="skip", href="#samples")
    return page(data.title, "\n".join((skip, element("header", element("div", bar)), element("main", *body))))


def _losses(data: ReportData) -> str:
    if not data.curves:
        return ""
    return section(
        "losses",
        "How it was trained",
        "Mean squared error of the predicted noise: every logged step faintly, the trend over it. A low loss does not "
        "make good videos; look at them.",
        element("div", *(loss_card(curve) for curve in data.curves), class_="charts"),
    )
