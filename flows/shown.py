"""What the Prefect UI shows of a stage: progress, tables, links, and errors in one line.

Nothing here decides anything: if the server does not take an artifact, the work goes on.
"""

import functools
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec
from uuid import UUID

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.schemas.objects import State
from prefect.exceptions import CrashedRun, FailedRun
from prefect.logging import get_run_logger
from prefect.states import Completed, Crashed, Failed

from vc2.artifacts import Artifact, load_manifest
from vc2.errors import Preempted, Vc2Error
from vc2.storage import Store, join_uri

__all__ = ["ShownProgress", "show_artifact", "show_link", "show_table", "told_in_one_line"]

P = ParamSpec("P")


class _NoEcho(logging.Filter):
    """Prefect's engine logs a failed state that a flow returned once more, as an exception with its traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], FailedRun | CrashedRun))


NO_ECHO = _NoEcho()


def told_in_one_line(run: Callable[P, str]) -> Callable[P, State]:
    """Body of a flow: `run` returns one line on what was made; an error meant for users becomes one line too.

    Preempted ranks left a state to go on from: that is a crash, to be retried, and no failure.
    """

    for name in ("prefect.engine", "prefect.flow_runs"):
        logging.getLogger(name).addFilter(NO_ECHO)

    @functools.wraps(run)
    def body(*args: P.args, **kwargs: P.kwargs) -> State:
        try:
            return Completed(message=run(*args, **kwargs))
        except Preempted as error:
            get_run_logger().warning("%s", error)
            return Crashed(message=str(error))
        except Vc2Error as error:
            get_run_logger().error("%s", error)
            return Failed(message=str(error))

    return body


class ShownProgress:
    """A `vc2.progress.Progress` as a Prefect progress artifact, one per piece of work, and now and then a log line."""

    def __init__(self, stage: str, *, every: float = 2.0, log_every: float = 20.0) -> None:
        self.stage, self.every, self.log_every = stage, every, log_every
        self._artifacts: dict[str, UUID] = {}
        self._shown: dict[str, float] = {}
        self._logged: dict[str, float] = {}

    def __call__(self, work: str, done: int, total: int | None = None, **figures: float | str) -> None:
        now, ended = time.monotonic(), done == total
        line = _described(work, done, total, figures)
        if ended or now - self._logged.get(work, -1e9) >= self.log_every:
            self._logged[work] = now
            get_run_logger().info(line)
        if ended or now - self._shown.get(work, -1e9) >= self.every:
            self._shown[work] = now
            self._show(work, 100 * done / total if total else 0.0, line)

    def _show(self, work: str, percent: float, line: str) -> None:
        try:
            if work in self._artifacts:
                update_progress_artifact(self._artifacts[work], percent, line)
            else:
                self._artifacts[work] = create_progress_artifact(percent, _key(f"{self.stage}-{work}"), line)  # pyright: ignore
        except Exception as error:
            get_run_logger().warning("progress is not shown: %s", error)


def show_table(key: str, rows: Sequence[Mapping[str, Any]], description: str) -> None:
    """A table artifact; `rows` share their columns."""
    _try(create_table_artifact, table=[dict(row) for row in rows], key=_key(key), description=description)


def show_link(key: str, link: str, text: str, description: str) -> None:
    """A link artifact; a local path becomes a file link."""
    _try(
        create_link_artifact,
        link=link if "://" in link else f"file://{link}",
        link_text=text,
        key=_key(key),
        description=description,
    )


def show_artifact(stage: str, artifact: Artifact, store: Store) -> None:
    """What a stage made: where it is, its counts, and what its manifest says of it."""
    manifest = load_manifest(store, artifact.prefix)
    lines = [f"**{artifact.kind}** `{artifact.uri}`", "", "| | |", "|---|---|"]
    facts = {"fingerprint": artifact.fingerprint, "content digest": artifact.content_digest}
    figures = manifest.counts | {k: v for k, v in manifest.facts.items() if isinstance(v, int | float | str)}
    for name, value in (facts | figures | {"files": len(manifest.files), "seconds": f"{manifest.seconds:.1f}"}).items():
        lines.append(f"| {name} | {f'{value:.5g}' if isinstance(value, float) else value} |")
    _try(create_markdown_artifact, markdown="\n".join(lines), key=_key(stage), description=artifact.uri)
    for entry in manifest.files:
        if entry.name.endswith(".html"):
            place = join_uri(store.uri, entry.key)
            show_link(f"{stage}-{entry.name}", place, entry.name, place)


def _try(create: Callable[..., Any], **content: Any) -> None:
    try:
        create(**content)
    except Exception as error:
        get_run_logger().warning("%s %s is not shown: %s", create.__name__, content.get("key"), error)


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _described(work: str, done: int, total: int | None, figures: Mapping[str, float | str]) -> str:
    parts = [f"{work} {done}" if total is None else f"{work} {done} of {total}"]
    parts += [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
    ]
    return ", ".join(parts)
