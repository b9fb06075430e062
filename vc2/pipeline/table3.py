"""The eleven rows of Table 3 of VideoCrafter2: two bases, and nine ways to tune one with good pictures.

    base     F  every module learns in stage 1          P  the temporal ones alone, the spatial ones stay those of SD
    tuned    Spa, Temp, Spa&Temp  in stage 2            DIR  directly          LoRA  by low-rank updates
    images   JourneyDB, or LAION-Aesthetics

A row is laid over a recipe, whatever its size. Rows with the same base have the same stage 1, down to its fingerprint,
so it is trained once for all. The paper's method, and what the recipes ask for, is F-Spa-DIR.
Source: Chen et al. 2024 (VideoCrafter2), Sec. 3 and Table 3. What the paper leaves open: docs/strategies.md.
"""

from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from vc2.config import merge
from vc2.data.config import LaionSource
from vc2.errors import ConfigError
from vc2.model.config import LoraConfig

if TYPE_CHECKING:
    from vc2.pipeline.recipes import PipelineConfig

__all__ = ["TUNING_LORA", "Row", "last_stage", "named_row", "row", "row_settings"]

# The paper states neither rank nor layers. 16 with alpha = rank: docs/strategies.md says why.
TUNING_LORA = LoraConfig(rank=16, alpha=16.0, targets=("attention",))


class Row(StrEnum):
    """A row, by its name in the paper."""

    P_BASE = "P-base"
    F_BASE = "F-base"
    P_SPA_LORA = "P-Spa-LoRA"
    F_SPA_LORA = "F-Spa-LoRA"
    P_TEMP_LORA = "P-Temp-LoRA"
    F_TEMP_LORA = "F-Temp-LoRA"
    F_SPA_DIR = "F-Spa-DIR"
    F_TEMP_DIR = "F-Temp-DIR"
    F_SPA_TEMP_DIR = "F-Spa&Temp-DIR"
    F_SPA_TEMP_LORA = "F-Spa&Temp-LoRA"
    F_SPA_DIR_LAION = "F-Spa-DIR-LAION"

    @property
    def is_base(self) -> bool:
        """Whether the row is a base, as stage 1 leaves it."""
        return self.value.endswith("-base")

    @property
    def base(self) -> "Row":
        """The row whose checkpoint this one is tuned from; of a base: itself."""
        return Row.P_BASE if self.value.startswith("P-") else Row.F_BASE

    @property
    def tuned(self) -> Literal["all", "spatial", "temporal"]:
        """What learns in stage 2."""
        part = self.value.split("-")[1]
        return {"Spa": "spatial", "Temp": "temporal"}.get(part, "all")  # pyright: ignore[reportReturnType]


def named_row(name: str) -> Row:
    """The row of that name, in whatever case.

    Raises:
        ConfigError: If there is none.
    """
    for found in Row:
        if found.value.lower() == name.lower():
            return found
    raise ConfigError(f"Table 3 has no row {name!r}; its rows are {', '.join(Row)}")


def last_stage(wanted: Row) -> str | None:
    """The stage of the DAG that a row ends with; None: that of the DAG itself. A base has no stage 2."""
    return "train/full" if wanted.is_base else None


def row(config: "PipelineConfig", wanted: Row) -> "PipelineConfig":
    """A recipe as a row of Table 3 asks for it. Of a base, what comes after stage 1 stays as it is and is not run."""
    return merge(config, row_settings(config, wanted))


def row_settings(config: "PipelineConfig", wanted: Row) -> dict[str, Any]:
    """The settings that make a recipe that row."""
    learns = "all" if wanted.base is Row.F_BASE else "temporal"
    settings: dict[str, Any] = {"full": {"strategy": {"trainable": learns, "lora": None}}}
    if wanted.is_base:
        return settings
    lora = TUNING_LORA.model_dump(mode="json") if "LoRA" in wanted.value else None
    settings["spatial"] = {"strategy": {"trainable": wanted.tuned, "lora": lora}}
    if wanted is Row.F_SPA_DIR_LAION:
        settings["jdb"] = {"source": _laion_aesthetics(config).model_dump(mode="json", exclude_none=True)}
    return settings


def _laion_aesthetics(config: "PipelineConfig") -> LaionSource:
    """LAION-Aesthetics in place of JourneyDB, looked for beside LAION-COCO; a small world has one web for both."""
    beside = config.laion_coco.source
    if not isinstance(beside, LaionSource):
        raise ConfigError(f"row {Row.F_SPA_DIR_LAION} needs a LAION source; laion_coco.source is {beside.kind}")
    if config.world is not None:
        return beside.evolve(name="laion-aesthetics")

    def at_side(place: str | None) -> str | None:
        return None if place is None else f"{place.rpartition('/')[0]}/laion-aesthetics"

    return LaionSource(
        kind="laion-aesthetics",
        name="laion-aesthetics",
        table=at_side(beside.table),
        archives=at_side(beside.archives),
    )
