"""Curves for the eyes, while training goes on: TensorBoard files in the work folder, Weights & Biases where asked for.

Both are copies of the lines that stand in the store; losing them loses nothing, and their failures end nothing.
"""

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vc2.errors import ConfigError

__all__ = ["Curves"]

log = logging.getLogger(__name__)

GROUPS = {"loss": "loss", "val": "validation", "grad": "gradient", "lr": "optimizer"}


class Curves:
    """Where the lines of a run are copied to.

    Args:
        folder: Of the TensorBoard files; None: no such files.
        wandb_project: At Weights & Biases; empty: none.
        name: Of the run, the same whenever it goes on.
        config: What it was asked for.
        step: From which it goes on; TensorBoard forgets what an earlier attempt wrote beyond.

    Raises:
        ConfigError: If a project is named and the package `wandb` is not installed.
    """

    def __init__(
        self, folder: Path | None, wandb_project: str, *, name: str, config: Mapping[str, Any], step: int
    ) -> None:
        self._board: Any = None
        self._run: Any = None
        if folder is not None:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder / name), purge_step=step + 1)
        if wandb_project:
            if importlib.util.find_spec("wandb") is None:
                raise ConfigError(
                    f"wandb_project={wandb_project!r} but the package wandb is not installed: pip install 'vc2[wandb]'"
                )
            import wandb  # pyright: ignore[reportMissingImports]

            try:
                self._run = wandb.init(project=wandb_project, id=name, name=name, resume="allow", config=dict(config))
            except Exception as error:
                log.warning("no curves at Weights & Biases: %s", error)

    def add(self, line: Mapping[str, Any]) -> None:
        """Copy a line of metrics, or of a validation."""
        step = line["step"]
        figures = {_named(name): value for name, value in line.items() if name != "step" and _is_number(value)}
        try:
            if self._board is not None:
                for name, value in figures.items():
                    self._board.add_scalar(name, value, step)
                self._board.flush()
            if self._run is not None:
                self._run.log(figures, step=step)
        except Exception as error:
            log.warning("curves of step %d were not copied: %s", step, error)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        try:
            if self._run is not None:
                self._run.finish()
        except Exception as error:
            log.warning("Weights & Biases did not take its last curves: %s", error)


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def _named(name: str) -> str:
    return f"{GROUPS.get(name.split('_')[0], 'work')}/{name}"
