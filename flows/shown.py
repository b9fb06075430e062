"""What the Prefect UI shows of a run: the plan and its cost, progress, tables, links, assets.

Nothing here decides anything: if the server does not take it, or a page cannot be made, the work goes on.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from uuid import UUID

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.assets import Asset, AssetProperties, add_asset_metadata, materialize
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from pydantic import ValidationError

from flows.tables import (
    Row,
    brief,
    distribution_rows,
    facts,
    linked,
    markdown_table,
    plain,
    reject_rows,
    score_rows,
    training_facts,
)
from vc2.artifacts import Artifact, Manifest, load_manifest
from vc2.progress import Pace, duration_text
from vc2.storage import Store

if TYPE_CHECKING:
    from vc2.pipeline.preflight import Finding
    from vc2.pipeline.preview import PlanRow, Spent

__all__ = [
    "ShownProgress",
    "asset_of",
    "place_of",
    "show_artifact",
    "show_cost",
    "show_findings",
    "show_link",
    "show_plan",
    "show_table",
]

UNLIKE = ("stages",)  # work whose pieces are so unlike each other that a pace says nothing
PATIENCE = 30.0  # seconds that a server which does not take progress is left alone
UNITS = {
    "fetch": "rows",
    "shards": "shards",
    "index": "tars",
    "references": "prompts",
    "samples": "videos",
    "scores": "videos",
    "previews": "videos",
    "learns": "parameters",
    "garbage": "objects",
}  #: what is counted in a piece of work, by the last word of its name; in training: steps


# ---- progress ----


class ShownProgress:
    """A `vc2.progress.Progress` as a Prefect progress artifact, one per piece of work, and now and then a log line.

    Args:
        stage: Name of the stage, which the keys of the artifacts begin with.
        every: Seconds between two looks at the UI's figure.
        log_every: Seconds between two lines in the log.
    """

    def __init__(self, stage: str, *, every: float = 2.0, log_every: float = 20.0) -> None:
        self.stage, self.every, self.log_every = stage, every, log_every
        self._artifacts: dict[str, UUID] = {}
        self._shown: dict[str, float] = {}
        self._logged: dict[str, float] = {}
        self._paces: dict[str, Pace] = {}
        self._ended: set[tuple[str, int]] = set()
        self._totals: dict[str, int | None] = {}
        self._not_before = -1e9

    def __call__(self, work: str, done: int, total: int | None = None, **figures: float | str) -> None:
        now, ended = time.monotonic(), done == total
        self._totals[work] = total
        pace = self._paces.setdefault(work, Pace())
        pace.add(done, figures)
        if work not in UNLIKE and (left := pace.left(total)) is not None:
            figures["eta"] = duration_text(left)
        line = self.described(work, done, total, figures)
        is_news = not ended or (work, done) not in self._ended  # some tell of their end twice
        if is_news and (ended or now - self._logged.get(work, -1e9) >= self.log_every):
            self._logged[work] = now
            get_run_logger().info("%s", line)
        if ended:
            self._ended.add((work, done))
        if now >= self._not_before and (ended or now - self._shown.get(work, -1e9) >= self.every):
            self._shown[work] = now
            self._show(work, min(100.0, 100 * done / total) if total else 0.0, plain(line))

    def end(self) -> None:
        """The stage has ended well. Steps are told of now and then, so the last word was hardly the last step."""
        if (total := self._totals.get(self.stage)) is not None:
            self(self.stage, total, total)

    def described(self, work: str, done: int, total: int | None, figures: Mapping[str, float | str]) -> str:
        """How far it is, in a line: `fetch: 1,200 of 4,000 rows, MB/s 81, eta 7 min`."""
        count = f"{done:,}" if total is None else f"{done:,} of {total:,}"
        name = "" if work == self.stage else f"{work}: "
        parts = [f"{name}{count} {self._unit(work)}".rstrip()]
        parts += [
            f"{figure} {value:.4g}" if isinstance(value, float) else f"{figure} {value}"
            for figure, value in figures.items()
        ]
        return ", ".join(parts)

    def _unit(self, work: str) -> str:
        if work.startswith("train/") and not work.endswith("learns"):
            return "steps"
        return UNITS.get(work.split()[-1] if work else "", "")

    def _show(self, work: str, percent: float, line: str) -> None:
        key = work if work.startswith(self.stage) else f"{self.stage} {work}"
        try:
            if work in self._artifacts:
                update_progress_artifact(self._artifacts[work], percent, line)
            else:
                self._artifacts[work] = create_progress_artifact(percent, _key(key), line)  # pyright: ignore
        except Exception as error:
            self._not_before = time.monotonic() + PATIENCE  # the work must not wait for it each time
            get_run_logger().warning("progress is not shown for %.0f s: %s", PATIENCE, error)


# ---- what will run, and what it costs ----


def show_plan(rows: Sequence["PlanRow"]) -> None:
    """The plan as a table, as `vc2 plan` says it."""
    cells = [row.cells() | {"predicted by": row.basis} for row in rows]
    show_table("plan", cells, "What is done, what will run, why, and at what cost.")


def show_cost(spent: Sequence["Spent"]) -> None:
    """What was spent so far, by stage and in all."""
    rows = [stage.cells() for stage in spent]
    if rows:
        usd = [stage.usd for stage in spent if stage.usd is not None]
        sums = {
            "stage": "all",
            "time": duration_text(3600 * sum(stage.hours for stage in spent)),
            "GPU-hours": f"{sum(stage.gpu_hours for stage in spent):,.2f}",
            "USD": f"{sum(usd):,.2f}" if usd else "",
        }
        rows.append({name: sums.get(name, "") for name in rows[0]})
    show_table("cost", rows, "What was spent so far, by whichever runs made it.")


def show_findings(findings: Sequence["Finding"]) -> None:
    """What the preflight found, what is wrong first."""
    rows = [
        {
            "check": finding.name,
            "": "NOT WELL" if not finding.is_well else "well" if finding.was_tried else "not tried",
            "found": str(finding.found),
            "what to do": "" if finding.is_well else str(finding.remedy),
        }
        for finding in sorted(findings, key=lambda finding: finding.is_well)
    ]
    bad = sum(not finding.is_well for finding in findings)
    show_table("preflight", rows, f"{len(rows) - bad} of {len(rows)} checks are well.")


# ---- what was made ----


def show_artifact(stage: str, artifact: Artifact, store: Store) -> None:
    """What a stage made: what its manifest says of it, figures in tables, pages to look at, and the asset it is."""
    manifest = load_manifest(store, artifact.prefix)
    links = {"manifest": place_of(store, f"{artifact.prefix}/manifest.json")}
    for entry in manifest.files:
        if entry.name.endswith((".html", ".md")) and entry.key.startswith(artifact.prefix):
            links["model card" if entry.name == "README.md" else entry.name] = place_of(store, entry.key)
    for name, publish in PAGES.get(manifest.kind, {}).items() | ALWAYS.items():
        with _or_not(f"{name} of {stage}"):
            links[name] = place_of(store, publish(store, artifact, manifest))
    for name in [name for name in links if name != "manifest"]:
        show_link(f"{stage} {name}", links[name], f"{stage}: {name}", artifact.uri)
    with _or_not(f"tables of {stage}"):
        _show_tables(stage, manifest, store)
    _try(
        create_markdown_artifact,
        markdown="\n".join(
            [
                f"**{artifact.kind.replace('_', ' ')}** {plain(artifact.uri, 600)}",
                "",
                " · ".join(linked(name, link) for name, link in links.items()),
                "",
                *markdown_table(facts(manifest)),
            ]
        ),
        key=_key(stage),
        description=plain(artifact.uri, 600),
    )
    with _or_not(f"asset {artifact.uri}"):
        _materialize(artifact, manifest, links)


def _show_tables(stage: str, manifest: Manifest, store: Store) -> None:
    if manifest.kind == "shard_set":
        rejected, rows = manifest.counts.get("rows_rejected", 0), manifest.counts.get("rows", 0)
        _show_rows(f"{stage} rejects", reject_rows(manifest), f"{rejected:,} of {rows:,} rows were rejected: why.")
        _show_rows(f"{stage} rates", distribution_rows(manifest), "Samples by the rate of their frames.")
    elif manifest.kind == "checkpoint":
        rows = training_facts(*_curve(store, manifest))
        _show_rows(f"{stage} figures", rows, "The training curve in figures: its first line and its last.")
    elif manifest.kind == "report" and "scores" in manifest.inputs:
        scores = load_manifest(store, manifest.inputs["scores"].prefix)
        judged, measured, notes = score_rows(store, scores)
        _show_rows(f"{stage} judges", judged, "What the judges of the small world see, by set of videos.")
        _show_rows(f"{stage} scores", measured, "\n".join(["Beside the published rows.", *(f"- {n}" for n in notes)]))


def _curve(store: Store, manifest: Manifest) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    from vc2.train.metrics import read_metrics, read_validations

    run = manifest.stage.removeprefix("train/"), manifest.fingerprint
    return read_metrics(store, *run), read_validations(store, *run)


# ---- pages ----


def place_of(store: Store, key: str) -> str:
    """A link that opens in a browser: to the stack's file server where it serves this store, signed for a bucket for a
    week, else to the file on disk."""
    url, served = os.environ.get("VC2_FILES_URL", ""), os.environ.get("VC2_STORE", "").removeprefix("file://")
    if url and "://" not in store.uri and served and str(Path(served).expanduser().resolve()) == store.uri:
        return f"{url}/{quote(key)}"
    return store.link(key)


def _publish_sheet(store: Store, artifact: Artifact, manifest: Manifest) -> str:
    from vc2.data.sheet import contact_sheet

    key = f"pages/sheets/{artifact.fingerprint}.html"
    if store.entry(key) is None:  # of a set that never changes
        store.write(key, contact_sheet(store, manifest).encode())
    return key


def _publish_curves(store: Store, artifact: Artifact, manifest: Manifest) -> str:
    from vc2.pipeline.curves import publish_curves

    return publish_curves(store, manifest)


def _publish_lineage(store: Store, artifact: Artifact, manifest: Manifest) -> str:
    from vc2.pipeline.lineage import publish_lineage

    return publish_lineage(store, artifact)


Publish = Callable[[Store, Artifact, Manifest], str]
PAGES: Mapping[str, Mapping[str, Publish]] = {
    "shard_set": {"contact sheet": _publish_sheet},
    "checkpoint": {"training curves": _publish_curves},
}
ALWAYS: Mapping[str, Publish] = {"lineage": _publish_lineage}


# ---- assets ----


def asset_of(artifact: Artifact) -> str:
    """The key of an artifact among Prefect's assets: its URI, or `vc2://<prefix>` where Prefect takes no such URI."""
    uri = artifact.uri if "://" in artifact.uri else f"file://{artifact.uri}"
    try:
        return Asset(key=uri).key
    except ValidationError:
        return f"vc2://{artifact.prefix}"


def _materialize(artifact: Artifact, manifest: Manifest, links: Mapping[str, str]) -> None:
    key = asset_of(artifact)
    page = next((links[name] for name in ("report.html", "grid.html", "lineage") if name in links), links["manifest"])
    properties = AssetProperties(
        name=f"{manifest.stage} {artifact.fingerprint[:12]}", url=page, description=f"{artifact.kind} {artifact.uri}"
    )
    sources = [asset_of(source) for source in manifest.inputs.values()]

    @materialize(
        Asset(key=key, properties=properties),
        by="vc2",
        name=f"{artifact.kind.replace('_', '-')} is there",
        asset_deps=list(dict.fromkeys(sources)),
        cache_policy=NO_CACHE,  # said at every run, also where a run is retried
        persist_result=False,
        log_prints=False,
    )
    def is_there() -> None:
        figures = {name: value for name, value in manifest.facts.items() if isinstance(value, int | float | str)}
        more = {"fingerprint": artifact.fingerprint, "content_digest": artifact.content_digest}
        add_asset_metadata(key, {**manifest.counts, **figures, **more, "uri": artifact.uri})

    is_there()


# ---- ground ----


def show_table(key: str, rows: Sequence[Mapping[str, Any]], description: str) -> None:
    """A table artifact; `rows` share their columns. Cells are words, and shown as they are."""
    cells = [{name: brief(value) for name, value in row.items()} for row in rows]
    _show_rows(key, cells, plain(description))


def show_link(key: str, link: str, text: str, description: str) -> None:
    """A link artifact; a local path becomes a file link."""
    target = link if "://" in link else Path(link).absolute().as_uri()
    _try(create_link_artifact, link=target, link_text=plain(text), key=_key(key), description=plain(description, 600))


def _show_rows(key: str, rows: Sequence[Row], description: str) -> None:
    """A table of cells that are Markdown already; none where there are no rows."""
    if rows:
        _try(create_table_artifact, table=[*rows], key=_key(key), description=description)


def _try(create: Callable[..., Any], **content: Any) -> None:
    with _or_not(str(content.get("key"))):
        create(**content)


@contextmanager
def _or_not(what: str) -> Iterator[None]:
    """What goes wrong inside is said, and is all that happens."""
    try:
        yield
    except Exception as error:
        get_run_logger().warning("%s is not shown: %s: %s", what, type(error).__name__, error)


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
