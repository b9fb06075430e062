"""What a run would do, why, how long it would take and what it would cost: before anything starts.

A stage's time is *measured*, where one alike was finished in this store: with the same networks, sizes and batch, on
as many ranks of the same hardware, so that its rate holds; or *counted*: the operations of its networks at an assumed
share of a GPU's peak, as `vc2 train --dry-run` has them (`vc2.train.estimate`), looked up where they were counted
before. What is known in neither way stays empty: nothing is guessed, and a sum says what it leaves out.

    training    steps that are left, at the seconds a step of the measured run, or by counted operations
    evaluation  videos x steps of the sampler x 2 for guidance x one forward pass; metrics only where measured
    shards      rows of the same raw data, at the seconds a row of the measured set

Bytes are those that the store still grows by: of training the weights, raw and averaged, and the train states that
stay, less those of the run that are there; of shards the ones that are not built yet.
Needs no torch.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from vc2.artifacts import Note, load_manifest
from vc2.config import Config
from vc2.errors import StoreError, Vc2Error
from vc2.eval.config import EvaluateStage
from vc2.pipeline.driver import FIELDS, GIVEN, PlannedStage, begun, reached
from vc2.pipeline.reasons import Difference, Past, reasons
from vc2.pipeline.recipes import PipelineConfig
from vc2.progress import duration_text, size_text
from vc2.storage import Store, join_uri
from vc2.train.attempts import Run
from vc2.train.config import TrainStage
from vc2.train.counted import SHIPPED, NotCounted
from vc2.train.estimate import DEFAULT_HARDWARE, HARDWARE, MFU, RATES, estimate, hardware_of, hours_of
from vc2.train.fit import Clip, stage_forms
from vc2.train.metrics import read_all_lines

__all__ = ["PlanRow", "Spent", "Total", "growth", "lines_of", "previewed", "short_lines", "spent", "total"]

HOUR = 3600.0
STATE_BYTES = 16  # a learning parameter in a train state: master, two moments, EMA
WEIGHT_BYTES = 8  # a parameter in a checkpoint: raw and EMA, float32
PRECISIONS: Mapping[str, str] = {"bfloat16": "bf16", "float32": "fp32"}


class PlanRow(Config):
    """A stage of the plan. None: not known."""

    stage: str
    state: str  #: done, partial or to do
    fingerprint: str
    why: str
    hours: float | None = None  #: from now to its end
    gpu_hours: float | None = None  #: 0 where no GPU is asked for
    bytes: int | None = None  #: that the store still grows by
    usd: float | None = None
    basis: str = ""  #: how it was predicted
    warnings: tuple[str, ...] = ()
    compared_with: str = ""  #: URI of the artifact that `differences` are to
    differences: tuple[Difference, ...] = ()

    @property
    def is_done(self) -> bool:
        return self.state == "done"

    def cells(self) -> dict[str, str]:
        """The row as text, by the names of its columns; `?` is what is not known."""
        return {
            "stage": self.stage,
            "state": self.state,
            "fingerprint": self.fingerprint[:12] or "?",
            "time": self._text(self.hours, _time_text),
            "GPU-hours": self._text(self.gpu_hours, _hours_text) if self.gpu_hours != 0 else "",
            "bytes": self._text(self.bytes, size_text),
            "USD": self._text(self.usd, _usd_text) if self.gpu_hours != 0 else "",
            "why": self.why,
        }

    def _text(self, value: float | None, words: Callable[[float], str]) -> str:
        return "" if self.is_done else "?" if value is None else words(value)


class Total(Config):
    """What all that is to do comes to, as far as it is known."""

    hours: float
    gpu_hours: float
    bytes: int
    usd: float
    stages: int  #: that are to do
    unknown: tuple[str, ...]  #: stages among them whose time is not known and is not in it
    hardware: str
    usd_per_hour: float
    mfu: float

    def line(self) -> str:
        """All of it in a line."""
        if not self.stages:
            return "nothing is to do: all of it is in the store"
        known = self.stages - len(self.unknown)
        if not known:
            return f"{_stages(self.stages)} to do; how long they take is not known yet"
        parts = [f"{_time_text(self.hours)} one after the other"]
        if self.gpu_hours:
            parts.append(f"{_hours_text(self.gpu_hours)} GPU-hours")
            parts.append(f"{_usd_text(self.usd)} USD at {self.usd_per_hour:g} a GPU-hour ({self.hardware})")
        if self.bytes:
            parts.append(f"{size_text(self.bytes)} more in the store")
        left = f"; without {', '.join(self.unknown)}, whose time is not known" if self.unknown else ""
        return f"{_stages(self.stages)} to do: {', '.join(parts)}{left}"


class Spent(Config):
    """What a stage has cost so far."""

    stage: str
    state: str
    hours: float  #: of work, added up over attempts
    gpu_hours: float
    cpu_hours: float  #: ranks x hours of a run without GPUs; of shards hours of the machine
    usd: float | None  #: None: no GPU was paid for

    def cells(self) -> dict[str, str]:
        """As text, by the names of the columns."""
        return {
            "stage": self.stage,
            "state": self.state,
            "time": _time_text(self.hours),
            "GPU-hours": _hours_text(self.gpu_hours) if self.gpu_hours else "",
            "CPU-hours": _hours_text(self.cpu_hours) if self.cpu_hours else "",
            "USD": "" if self.usd is None else _usd_text(self.usd),
        }


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a stage would take from now to its end."""

    hours: float | None = None
    gpus: int = 0  # while it runs
    size: int | None = None  # that the store still grows by
    basis: str = ""
    warnings: tuple[str, ...] = ()


def previewed(
    planned: Sequence[PlannedStage],
    config: PipelineConfig,
    store: Store,
    *,
    against: str = "",
    hardware: str = DEFAULT_HARDWARE,
    price: float | None = None,
    mfu: float | None = None,
) -> list[PlanRow]:
    """Every stage with what it would take and why.

    Args:
        planned: The stages, of `config`.
        config: The recipe.
        store: Where.
        against: URI of an artifact whose lineage the stages are compared with; empty: each with the nearest finished.
        hardware: The GPUs, by a name of `vc2.train.estimate.HARDWARE`.
        price: USD for a GPU and hour; None: that of the table.
        mfu: Share of the peak that useful operations get; None: what is assumed there.

    Raises:
        ConfigError: If the hardware is not known, or `against` is nothing that this DAG makes.
    """
    gpu = hardware_of(hardware)
    past = Past(store)
    why = reasons(planned, config, past, against=against)
    oracle = _Oracle({stage.name: stage for stage in planned}, config, past, hardware, mfu or MFU)
    rows = []
    for stage in planned:
        reason = why.get(stage.name)
        found = Prediction() if stage.state == "done" else oracle.prediction(stage)
        words = [stage.why] if stage.state != "to do" or reason is None else []  # of one without a name: what lacks
        hours, gpu_hours = found.hours, None if found.hours is None and found.gpus else (found.hours or 0) * found.gpus
        rows.append(
            PlanRow(
                stage=stage.name,
                state=stage.state,
                fingerprint=stage.fingerprint,
                why="; ".join([*words, *([reason.line] if reason else [])]),
                hours=hours,
                gpu_hours=gpu_hours if stage.state != "done" else None,
                bytes=found.size,
                usd=gpu_hours * (gpu.usd_per_hour if price is None else price) if gpu_hours else None,
                basis=found.basis,
                warnings=found.warnings,
                compared_with=join_uri(store.uri, reason.prefix) if reason and reason.prefix else "",
                differences=reason.differences if reason else (),
            )
        )
    return rows


def growth(planned: Sequence[PlannedStage], config: PipelineConfig, store: Store, stages: Collection[str]) -> int:
    """Bytes that the store will grow by when some of the planned stages run, as far as they are known."""
    oracle = _Oracle({stage.name: stage for stage in planned}, config, Past(store), DEFAULT_HARDWARE, MFU)
    todo = [stage for stage in planned if stage.name in stages and stage.state != "done"]
    return sum(oracle.prediction(stage).size or 0 for stage in todo)


def total(
    rows: Sequence[PlanRow],
    *,
    hardware: str = DEFAULT_HARDWARE,
    price: float | None = None,
    mfu: float | None = None,
) -> Total:
    """What the rows come to; arguments as those that the rows were made with."""
    todo = [row for row in rows if not row.is_done]
    return Total(
        hours=sum(row.hours or 0 for row in todo),
        gpu_hours=sum(row.gpu_hours or 0 for row in todo),
        bytes=sum(row.bytes or 0 for row in todo),
        usd=sum(row.usd or 0 for row in todo),
        stages=len(todo),
        unknown=tuple(row.stage for row in todo if row.hours is None),
        hardware=hardware,
        usd_per_hour=hardware_of(hardware).usd_per_hour if price is None else price,
        mfu=mfu or MFU,
    )


# ---- predictions ----


@dataclass(frozen=True)
class _Oracle:
    """Predicts stages of one plan."""

    planned: Mapping[str, PlannedStage]
    config: PipelineConfig
    past: Past
    hardware: str
    mfu: float

    @property
    def counted(self) -> str:
        return f"counted operations at MFU {self.mfu:.0%} on {self.hardware}"

    def prediction(self, stage: PlannedStage) -> Prediction:
        if stage.name.startswith("shard/"):
            return self.of_shards(stage)
        return self.of_training(stage) if stage.name.startswith("train/") else self.of_evaluation(stage)

    # shards

    def of_shards(self, stage: PlannedStage) -> Prediction:
        wanted = getattr(self.config, FIELDS[stage.name])
        unknown = f"rows are not known: `vc2 shard {stage.name.removeprefix('shard/')} --dry-run` judges by a few"
        there = begun(stage, self.past.store)
        for note in self.past.notes(f"shards/{wanted.source.name}") if stage.fingerprint else ():
            if not self._has_same_rows(stage, note):
                continue
            counts, facts = note.manifest.counts, note.manifest.facts
            ours = {track for track, (thing, _) in stage.tracks.items() if thing == "part"}
            ledgers = {f"{part.get('ledger')}/part-" for part in facts.get("generations", ())}
            is_fetched = bool(ours & ledgers or there.built)  # which is not done again
            # Of a set that was resumed after a kill the last attempt alone is known.
            if facts.get("resumed_shards") or (facts.get("resumed_parts") and not is_fetched):
                continue
            share = (min(1.0, wanted.limit / counts["rows"]) if wanted.limit else 1.0) * (1 - there.built)
            fetched = facts.get("seconds", {}).get("fetch", 0.0) if is_fetched else 0.0
            hours = (note.manifest.seconds - fetched) * share / HOUR
            return Prediction(hours, 0, int(note.size * share), self._measured(note))
        return Prediction(None, 0, None, unknown)

    def _has_same_rows(self, stage: PlannedStage, note: Note) -> bool:
        """Whether a set was made from all rows of the same raw data in the same form, so that its rate holds."""
        wanted = getattr(self.config, FIELDS[stage.name]).model_dump(mode="json")
        made = note.manifest.config
        keys = ("form", "decoder", "limit")
        if any(made.get(key) != wanted[key] for key in keys[:2]) or made.get("limit") is not None:
            return False
        if not note.manifest.counts.get("rows") or note.manifest.inputs:
            return False
        differences = reasons([*self.planned.values()], self.config, self.past, only={stage.name: note})
        changed = {difference.key for difference in differences[stage.name].differences}
        return f"{FIELDS[stage.name]}.source" not in changed

    # training

    def of_training(self, stage: PlannedStage) -> Prediction:
        wanted: TrainStage = getattr(self.config, FIELDS[stage.name])
        done = reached(stage, self.past.store) if stage.state == "partial" else 0
        size = self._bytes_of_training(wanted, stage)
        world_size, gpus = wanted.world_size or 1, wanted.world_size or 1
        if wanted.device == "cpu":
            gpus = 0
        for note in self.past.notes(f"runs/{wanted.name}"):
            if self._costs_the_same(stage, wanted, note):
                left = max(0, wanted.num_steps - done) / note.manifest.counts["steps"]
                return Prediction(left * note.manifest.seconds / HOUR, gpus, size, self._measured(note))
        if not gpus:
            return Prediction(None, 0, size, "on CPU it is known once a run alike was finished")
        forms, encoded = self._forms(stage)
        try:
            found = estimate(
                wanted, forms, hardware=self.hardware, mfu=self.mfu, encoded=encoded, done=done, counts=SHIPPED
            )
        except NotCounted:
            return Prediction(
                None, gpus, size, f"not counted at these sizes: `vc2 train {wanted.name} --dry-run` counts them"
            )
        micro = "" if found.micro_batch_is_stated else f", micro-batch {found.micro_batch}"
        return Prediction(found.hours, world_size, size, f"{self.counted}{micro}", found.warnings)

    def _forms(self, stage: PlannedStage) -> tuple[Any, bool]:
        """Forms of the samples, and whether they come encoded; of sets given by URI what their manifests say."""
        forms, encoded = {}, False
        for role, source in stage.inputs.items():
            if not source.startswith("shard/"):
                continue
            forms[role.removesuffix("s")] = getattr(self.config, FIELDS[source]).form
            given = self.planned[source]
            if given.why == GIVEN and given.artifact is not None and (note := self.past.of(given.artifact)):
                encoded = encoded or "latents" in note.manifest.facts
        return stage_forms(**forms), encoded

    def _costs_the_same(self, stage: PlannedStage, wanted: TrainStage, note: Note) -> bool:
        """Whether a step of this stage takes what a step of that run took."""
        manifest = note.manifest
        made, asked = manifest.config, wanted.model_dump(mode="json")
        deciding = ("strategy", "batch_size", "image_share", "precision", "zero_stage", "compile", "deterministic")
        if any(made.get(key) != asked[key] for key in (*deciding, "device")):
            return False
        if any(made.get("model", {}).get(part) != asked["model"][part] for part in ("unet", "autoencoder", "text")):
            return False
        if made.get("phases") != asked["phases"] or (wanted.phases and made.get("num_steps") != wanted.num_steps):
            return False
        layout = manifest.facts.get("layout", {})
        if any(asked[key] not in (None, layout.get(key)) for key in ("world_size", "micro_batch", "threads")):
            return False
        if manifest.facts.get("device") != "cpu" and not _is_named(manifest.facts.get("gpu", ""), self.hardware):
            return False
        return bool(manifest.seconds and manifest.counts.get("steps")) and self._has_same_forms(stage, note)

    def _has_same_forms(self, stage: PlannedStage, note: Note) -> bool:
        for role, source in stage.inputs.items():
            if not source.startswith("shard/"):
                continue
            used = note.manifest.inputs.get(role)
            old = self.past.of(used) if used else None
            form = getattr(self.config, FIELDS[source]).form.model_dump(mode="json")
            if old is None or any(
                old.manifest.config.get("form", {}).get(key) != form[key] for key in ("num_frames", "width", "height")
            ):
                return False
        return True

    def _bytes_of_training(self, wanted: TrainStage, stage: PlannedStage) -> int | None:
        stills = "videos" not in stage.inputs or wanted.image_share == 1.0
        try:
            groups = SHIPPED.count_parameters(wanted.model.unet, wanted.strategy, stills=stills)
        except NotCounted:
            return None
        learning = sum(some for some, _ in groups.values())
        # Low-rank updates are laid over the weights before those are written.
        everything = sum(learning + frozen for name, (learning, frozen) in groups.items() if name != "lora")
        states = wanted.keep_states + (wanted.num_steps // wanted.keep_every_steps if wanted.keep_every_steps else 0)
        there = begun(stage, self.past.store).state_bytes
        return WEIGHT_BYTES * everything + max(0, STATE_BYTES * learning * states - there)

    # evaluation

    def of_evaluation(self, stage: PlannedStage) -> Prediction:
        wanted = self.config.evaluation
        warnings = tuple(_unmeasured(wanted))
        ranks = wanted.world_size
        gpus = 0 if wanted.device == "cpu" else ranks
        try:
            videos = len(wanted.all_prompts())
        except Vc2Error as error:
            return Prediction(None, gpus, None, str(error), warnings)
        left, sampled = self._videos_left(stage, wanted, videos)
        alike = self.past.newest("samples", partial(self._samples_alike, wanted))
        scored = self.past.newest("scores", partial(self._scores_alike, wanted))
        size = None
        if alike:
            size = int(left * alike.size / alike.manifest.counts["videos"])
        if alike and (scored or not wanted.metric_names()):
            hours = left * alike.manifest.seconds / alike.manifest.counts["videos"]
            hours += videos * scored.manifest.seconds / scored.manifest.counts["videos"] if scored else 0.0
            return Prediction(hours / HOUR, gpus, size, self._measured(alike), warnings)
        if not gpus:
            return Prediction(None, 0, size, "on CPU it is known once one alike was finished", warnings)
        clip = Clip(wanted.frames, wanted.height, wanted.width)
        full = self.config.full
        try:
            once = SHIPPED.count_pass(full.model, full.strategy, clip, precision=full.precision, stills=False)
        except NotCounted:
            return Prediction(None, gpus, size, "the network was not counted at this size", warnings)
        passes = wanted.sampler.num_steps * (1 if wanted.sampler.guidance_scale == 1 else 2)
        rate = RATES[PRECISIONS[wanted.precision]]
        hours = hours_of(left * passes * once.forward_flops, ranks, hardware_of(self.hardware), self.mfu, rate)
        more = "metrics are not in it" if wanted.metric_names() else "decoding is not in it"
        there = f", {sampled} videos are there" if sampled else ""
        return Prediction(hours, gpus, size, f"{self.counted}; {more}{there}", warnings)

    def _videos_left(self, stage: PlannedStage, wanted: EvaluateStage, videos: int) -> tuple[int, int]:
        """Videos that are still to be sampled, of both checkpoints, and those that are there."""
        sampled = 0
        for track, (thing, _) in stage.tracks.items():
            if thing == "group":
                groups = sum(1 for entry in self.past.store.list(track) if entry.key.endswith(".json"))
                sampled += min(videos, groups * wanted.group_size)
        sets = sum(1 for thing, _ in stage.tracks.values() if thing == "group")
        return max(0, sets * videos - sampled), sampled

    def _samples_alike(self, wanted: EvaluateStage, note: Note) -> bool:
        made, asked = note.manifest.config, wanted.model_dump(mode="json")
        keys = ("sampler", "frames", "width", "height", "precision", "device", "world_size", "group_size")
        if any(made.get(key) != asked[key] for key in keys):
            return False
        if note.manifest.facts.get("resumed_groups") or not note.manifest.counts.get("videos"):
            return False
        if wanted.device != "cpu" and not _is_named(note.manifest.facts.get("gpu", ""), self.hardware):
            return False
        used = note.manifest.inputs.get("checkpoint")
        checkpoint = self.past.of(used) if used else None
        model = self.config.spatial.model.model_dump(mode="json")
        parts = ("unet", "autoencoder", "text")
        return checkpoint is not None and all(
            checkpoint.manifest.config.get("model", {}).get(part) == model[part] for part in parts
        )

    def _scores_alike(self, wanted: EvaluateStage, note: Note) -> bool:
        made, asked = note.manifest.config, wanted.model_dump(mode="json")
        keys = ("measured_with", "frames", "width", "height", "device", "world_size")
        if note.manifest.facts.get("resumed_videos") or not note.manifest.counts.get("videos"):
            return False
        return all(made.get(key) == asked[key] for key in keys)

    def _measured(self, note: Note) -> str:
        folder = note.prefix.removesuffix(note.prefix.partition(note.manifest.fingerprint)[2])
        return f"measured, as in {folder.replace(note.manifest.fingerprint, note.manifest.fingerprint[:12])}"


def _is_named(gpu: str, hardware: str) -> bool:
    """Whether a GPU, by its driver's name for it, is of a kind of `HARDWARE`: NVIDIA A100-SXM4-80GB is a100-80."""
    family, _, memory = hardware.partition("-")
    name = gpu.lower().replace(" ", "")
    several = sum(other.startswith(f"{family}-") for other in HARDWARE) > 1
    return bool(name) and family in name and (not several or memory in name)


def _unmeasured(wanted: EvaluateStage) -> Iterator[str]:
    missing = wanted.missing()
    if missing:
        names = list(dict.fromkeys(name.split("/")[0] for name in missing))
        yield f"{len(names)} metrics cannot be measured here: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"


# ---- what was spent ----


def spent(
    planned: Sequence[PlannedStage], store: Store, *, hardware: str = DEFAULT_HARDWARE, price: float | None = None
) -> list[Spent]:
    """What the stages have cost so far, the reused ones at what they cost when they were made.

    Training is added up from the lines that all its attempts logged, steps that were lost and done again included; one
    that is not done counts too. Shards and evaluations count once they are done, at what their manifests say.
    """
    rate = hardware_of(hardware).usd_per_hour if price is None else price
    found = []
    for stage in planned:
        seconds, ranks, on_gpu = _work_of(stage, store)
        if not seconds:
            continue
        hours = seconds / HOUR
        found.append(
            Spent(
                stage=stage.name,
                state=stage.state,
                hours=hours,
                gpu_hours=hours * ranks if on_gpu else 0.0,
                cpu_hours=0.0 if on_gpu else hours * ranks,
                usd=hours * ranks * rate if on_gpu else None,
            )
        )
    return found


def _work_of(stage: PlannedStage, store: Store) -> tuple[float, int, bool]:
    """Seconds of a stage, its ranks, and whether they had GPUs."""
    manifest = load_manifest(store, stage.artifact.prefix) if stage.artifact else None
    if stage.name.startswith("train/"):
        run = Run(store, FIELDS[stage.name], stage.fingerprint)
        newest = run.newest()
        if not newest:  # made elsewhere
            return (manifest.seconds, 1, manifest.facts.get("device") != "cpu") if manifest else (0.0, 1, False)
        attempt = run.attempt(newest)
        asked = attempt.request.get("stage", {}).get("device")
        device = manifest.facts.get("device") if manifest else asked
        seconds = sum(line.get("seconds", 0.0) for line in read_all_lines(run))
        return seconds, attempt.layout.world_size, device != "cpu"
    if manifest is None:
        return 0.0, 1, False
    on_gpu = stage.name.startswith("evaluate/") and manifest.config.get("device") == "cuda"
    ranks = manifest.config.get("world_size") or 1 if stage.name.startswith("evaluate/") else 1
    return _seconds_of(store, stage), ranks, on_gpu


def _seconds_of(store: Store, stage: PlannedStage) -> float:
    """Of a report with all samples and scores: what it took itself may be less, where those were there before."""
    assert stage.artifact is not None
    manifest = load_manifest(store, stage.artifact.prefix)
    parts = 0.0
    for role in ("samples", "base_samples", "scores"):
        try:
            parts += load_manifest(store, manifest.inputs[role].prefix).seconds if role in manifest.inputs else 0.0
        except StoreError:  # collected or deleted
            continue
    return max(manifest.seconds, parts)


# ---- words ----


def lines_of(rows: Sequence[PlanRow], total: Total) -> Iterator[str]:
    """A plan as text: a table, how its hours were predicted, what to beware of, and what it comes to."""
    cells = [row.cells() for row in rows]
    widths = {name: max(len(name), *(len(row[name]) for row in cells)) for name in cells[0]}
    numbers = ("time", "GPU-hours", "bytes", "USD")

    def line(row: Mapping[str, str]) -> str:
        texts = (
            text.rjust(widths[name]) if name in numbers else text.ljust(widths[name]) for name, text in row.items()
        )
        return "  ".join(texts).rstrip()

    yield line({name: name for name in widths})
    yield from map(line, cells)
    yield ""
    for row in rows:
        if row.basis:
            yield f"{row.stage}: {row.basis}"
    for row in rows:
        for warning in row.warnings:
            yield f"warning: {row.stage}: {warning}"
    yield total.line()


def short_lines(rows: Sequence[PlanRow]) -> Iterator[str]:
    """A plan as text, a line a stage, for whoever is about to run it."""
    for row in rows:
        cells = row.cells()
        money = f"{cells['USD']} USD" if cells["USD"] else ""
        yield f"  {row.stage:22} {row.state:8} {cells['time']:>10} {money:>10}  {row.why}"
    if not all(row.is_done for row in rows):
        yield f"  {total(rows).line()}"


def _stages(number: int) -> str:
    return f"{number} stage{'' if number == 1 else 's'}"


def _time_text(hours: float) -> str:
    return duration_text(hours * HOUR)


def _hours_text(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.1f}" if hours >= 1 else f"{hours:.2f}"


def _usd_text(usd: float) -> str:
    return f"{usd:,.0f}" if usd >= 10 else f"{usd:.2f}"
