"""The lineage as a page: the picture on top, then a part for every node that opens.

All text that is not ours (names, captions, prompts, paths, messages of failures) passes through `escape`, attributes
do so in `element`. The picture's boxes lead to their parts; without the script, too.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from vc2.eval.graphs import Box, graph_svg
from vc2.eval.page import column, element, facts_list, flat, page, row_head, section, table
from vc2.progress import counted, duration_text, size_text

if TYPE_CHECKING:
    from vc2.pipeline.lineage import AttemptTold, Lineage, Node

__all__ = ["render_lineage"]

MOST_FILES = 200  # listed of an artifact
MOST_FACTS = 150  # likewise
LONGEST = 600  # characters of a value

KINDS = {
    "shard_set": "shard set",
    "checkpoint": "checkpoint",
    "sample_set": "samples",
    "scorecard": "scorecard",
    "report": "report",
    "source": "raw data",
    "weights": "foreign weights",
    "prompts": "prompts",
}


def render_lineage(lineage: "Lineage") -> str:
    """The lineage as one HTML document that needs nothing else."""
    root = lineage.node(lineage.root)
    names = {node.key: f"node-{number}" for number, node in enumerate(lineage.nodes)}
    title = f"Lineage of {root.name}"
    bar = element("nav", *_links(lineage), aria_label="Parts of the page")
    button = element("button", "Open all", type="button", hidden=True, aria_expanded="false")
    top = element("header", element("div", bar, element("div", button, class_="controls")))
    parts = (
        _opening(lineage, root),
        _picture(lineage, names),
        _nodes(lineage, names),
        _licenses(lineage, names),
        _versions(lineage, names),
    )
    footer = element("footer", f"{escape(root.uri)} <code>{escape(root.fingerprint)}</code>")
    skip = element("a", "To the list", class_="skip", href="#nodes")
    body = "\n".join((skip, top, element("main", *filter(None, parts), footer)))
    return page(title, body, script="lineage.js", styled_inside=False)


def _links(lineage: "Lineage") -> list[str]:
    parts = {"picture": "Picture", "nodes": "Artifacts", "licences": "Licences", "versions": "Versions"}
    shown = {"licences": any(node.licenses for node in lineage.nodes), "versions": bool(_mixed(lineage))}
    return [element("a", name, href=f"#{anchor}") for anchor, name in parts.items() if shown.get(anchor, True)]


def _opening(lineage: "Lineage", root: "Node") -> str:
    made = [node for node in lineage.nodes if not node.is_leaf]
    files = {entry.sha256: entry.size for node in made for entry in node.files}
    figures = {
        "artifacts": str(len(made)),
        "sources, weights, prompts": str(len(lineage.nodes) - len(made)),
        "in different files": size_text(sum(files.values())),
        "of work": duration_text(sum(node.seconds for node in made)),
    }
    told = [element("div", element("dt", name), element("dd", words)) for name, words in figures.items()]
    troubles = [
        element("li", element("b", escape(node.name)), ": ", escape(trouble))
        for node in lineage.nodes
        for trouble in node.troubles
    ]
    warning = element("h3", "Not as it should be") + element("ul", *troubles)
    return element(
        "section",
        element("h1", f"What {escape(root.name)} was made of"),
        element("p", f"{escape(root.note)}. {escape(root.uri)}", class_="lead wraps"),
        element("div", warning, class_="warnings", role="note") if troubles else "",
        element("dl", *told, class_="figures"),
        class_="opening",
    )


def _picture(lineage: "Lineage", names: Mapping[str, str]) -> str:
    boxes, arrows = {}, {}
    for node in lineage.nodes:
        style = f"{'leaf' if node.is_leaf else 'made'}{' trouble' if node.troubles else ''}"
        style += " root" if node.key == lineage.root else ""
        content = (node.content_digest if node.is_leaf else node.fingerprint)[:12]
        link, label = f"#{names[node.key]}", f"{node.name}, {KINDS[node.kind]}, {node.note}"
        boxes[node.key] = Box((node.name, content or "no digest", node.note), style, link, label)
        arrows[node.key] = [(edge.role, edge.node) for edge in node.inputs]
    drawn = graph_svg(f"Lineage of {lineage.node(lineage.root).name}", arrows, boxes)
    return section(
        "picture",
        "What went into what",
        "Raw data, foreign weights and prompts have dashed boxes; everything else was made here and is named by its "
        "fingerprint. A box leads to what is known of it.",
        element(
            "div", drawn, class_="lineage-picture", tabindex=0, role="region", aria_label="The lineage as a picture"
        ),
    )


# ---- a part for every node ----


def _nodes(lineage: "Lineage", names: Mapping[str, str]) -> str:
    return section(
        "nodes",
        "All of it",
        "Sources first. A fingerprint names what was asked for, a content digest what came out.",
        element("div", *(_card(lineage, node, names) for node in lineage.nodes), class_="nodes"),
    )


def _card(lineage: "Lineage", node: "Node", names: Mapping[str, str]) -> str:
    marks = [element("span", KINDS[node.kind], class_="chip"), *_marks(node)]
    short = (node.content_digest if node.is_leaf else node.fingerprint)[:12]
    head = element(
        "summary",
        element("b", escape(node.name)),
        *(f" {mark}" for mark in marks),
        " ",
        element("span", escape("" if node.is_leaf and node.kind != "prompts" else node.note), class_="muted"),
        " ",
        element("code", escape(short)),
    )
    troubles = [element("p", escape(trouble), class_="none") for trouble in node.troubles]
    parts = (
        *troubles,
        facts_list(_described(node)),
        _edges("Made from", [(edge.role, edge.node) for edge in node.inputs], lineage, names),
        _edges(
            "Went into",
            [(edge.role, other.key) for other in lineage.nodes for edge in other.inputs if edge.node == node.key],
            lineage,
            names,
        ),
        _attempts(node.attempts),
        _differences(lineage, node, names),
        _more("What was asked for", node.asked),
        _more("How the work was done", node.knobs),
        _more("What is known of it" if node.is_leaf else "What was found", node.facts, is_open=node.is_leaf),
        _files(node),
        _more("Licences", node.licenses),
        _more("What it ran with", node.environment),
    )
    inside = element("div", *filter(None, parts), id=names[node.key], class_="inside")
    return element("details", head, inside, class_="card node")


def _marks(node: "Node") -> list[str]:
    marks = [element("span", "✗ see inside", class_="chip no")] if node.troubles else []
    if len(node.attempts) > 1:
        marks.append(element("span", counted(len(node.attempts), "attempt"), class_="chip"))
    return marks


def _described(node: "Node") -> dict[str, str]:
    if node.is_leaf:
        return {"sha256 or digest": node.content_digest or "not recorded"}
    told = {
        "made": f"{node.made_at[:19].replace('T', ' ')} UTC" if node.made_at else "",
        "took": duration_text(node.seconds) if node.seconds else "",
        "by stage": f"{node.stage} (version {node.version})" if node.stage else "",
        "repeat": str(node.repeat) if node.repeat else "",
        **{name.replace("_", " "): f"{count:,}" for name, count in node.counts.items()},
        "fingerprint": node.fingerprint,
        "content digest": node.content_digest,
        "place": node.uri,
    }
    return {name: words for name, words in told.items() if words}


def _edges(title: str, edges: Sequence[tuple[str, str]], lineage: "Lineage", names: Mapping[str, str]) -> str:
    if not edges:
        return ""
    links = [
        element(
            "li",
            element("a", escape(lineage.node(key).name), href=f"#{names[key]}"),
            element("span", f" as {escape(role)}" if role else "", class_="muted"),
        )
        for role, key in edges
    ]
    return element("h4", title) + element("ul", *links, class_="edges")


def _attempts(attempts: "Sequence[AttemptTold]") -> str:
    if not attempts:
        return ""
    rows = []
    for attempt in attempts:
        how = f"{attempt.kind}: {attempt.message}" if attempt.kind else "no failure recorded"
        words = "made this checkpoint" if attempt.made_it else how
        start = f"step {attempt.started_at:,}" if attempt.started_at else "the beginning"
        rows.append(element("tr", row_head(str(attempt.number)), *(element("td", escape(w)) for w in (start, words))))
    head = [column(name, is_number=False) for name in ("attempt", "went on from", "ended")]
    return element("h4", "Attempts at this run") + table("Attempts at this run", head, rows)


def _differences(lineage: "Lineage", node: "Node", names: Mapping[str, str]) -> str:
    if not node.sibling:
        return ""
    sibling = lineage.node(node.sibling)
    link = element("a", escape(sibling.name), href=f"#{names[sibling.key]}")
    if not node.differences:
        return element("p", f"Asked for and run as {link} was.", class_="muted small")
    rows = [
        element("tr", row_head(one.name), *(element("td", escape(_short(v) or "–")) for v in (one.here, one.there)))
        for one in node.differences[:MOST_FACTS]
    ]
    head = [column(name, is_number=False) for name in ("setting", "here", sibling.name)]
    words = counted(len(node.differences), "difference")
    return element(
        "details",
        element("summary", f"{words} from {escape(sibling.name)}"),
        element("p", f"Compared with {link}.", class_="muted small"),
        table(f"Differences from {sibling.name}", head, rows, "wraps"),
        class_="more",
    )


def _files(node: "Node") -> str:
    if not node.files:
        return ""
    rows = [
        element(
            "tr",
            row_head(entry.name, entry.key if not entry.key.endswith(entry.sha256) else ""),
            element("td", size_text(entry.size), class_="num"),
            element("td", element("code", escape(entry.sha256)), class_="digest"),
        )
        for entry in node.files[:MOST_FILES]
    ]
    head = [column("file", is_number=False), column("size"), column("sha256", is_number=False)]
    left = len(node.files) - len(rows)
    words = f"{counted(len(node.files), 'file')}, {size_text(sum(entry.size for entry in node.files))}"
    return element(
        "details",
        element("summary", words),
        table(f"Files of {node.name}", head, rows, "wraps", "scroll tall"),
        element("p", f"And {left:,} more, in the manifest.", class_="muted small") if left else "",
        class_="more",
    )


def _more(title: str, facts: Mapping[str, Any], *, is_open: bool = False) -> str:
    told = {name: _short(words) for name, words in flat(facts).items() if words not in ("", "null", "{}", "[]")}
    if not told:
        return ""
    shown = dict(list(told.items())[:MOST_FACTS])
    left = len(told) - len(shown)
    return element(
        "details",
        element("summary", f"{title} ({len(told)})"),
        facts_list(shown),
        element("p", f"And {left:,} more, in the manifest.", class_="muted small") if left else "",
        class_="more",
        open=is_open,
    )


def _short(words: str) -> str:
    return words if len(words) <= LONGEST else f"{words[:LONGEST]}… ({len(words):,} characters)"


# ---- of the whole ----


def _licenses(lineage: "Lineage", names: Mapping[str, str]) -> str:
    """Terms of everything in the chain, and whose they are."""
    found: dict[tuple[str, str], list[str]] = {}
    for node in lineage.nodes:
        for what, terms in node.licenses.items():
            found.setdefault((what, terms), []).append(element("a", escape(node.name), href=f"#{names[node.key]}"))
    if not found:
        return ""
    rows = [
        element("tr", row_head(what), element("td", escape(terms)), element("td", ", ".join(nodes)))
        for (what, terms), nodes in found.items()
    ]
    head = [column(name, is_number=False) for name in ("of", "terms", "named by")]
    lead = "The terms that the manifests name. What is made of several things is bound by the terms of all of them."
    return section("licences", "Licences", lead, table("Licences", head, rows, "wraps"))


def _versions(lineage: "Lineage", names: Mapping[str, str]) -> str:
    """What was not the same for all that was made here."""
    mixed = _mixed(lineage)
    if not mixed:
        return ""
    made = [node for node in lineage.nodes if node.environment]
    head = [column("", is_number=False), *(column(name, is_number=False) for name in mixed)]
    rows = [
        element("tr", row_head(node.name), *(element("td", escape(node.environment.get(name, "–"))) for name in mixed))
        for node in made
    ]
    lead = "The parts of this chain were not all made with the same versions of everything; these differ."
    return section("versions", "Versions", lead, table("Versions", head, rows))


def _mixed(lineage: "Lineage") -> list[str]:
    made = [node.environment for node in lineage.nodes if node.environment]
    names = dict.fromkeys(name for environment in made for name in environment)
    return [name for name in names if len({environment.get(name) for environment in made}) > 1]
