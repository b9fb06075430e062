"""Which samples a training step sees, and their frames.

Everything is a function of (shard sets, config, step); there is no state to save but the step, and no process
remembers what came before. `order` has the arithmetic:

    kind      of a step, image or video, by a schedule with the share of image steps exact
    cursor    of the kind's n-th step the first position is n * batch_size, n in closed form
    sample    position p of a kind -> one of its sets, by their weights -> a row of that set, epoch after epoch
    rank      r of W takes its contiguous part of the batch: any W that divides the batch size sees the same batches

Images are clips of one frame and have no rate. Their fps label is drawn from the labels of the videos, so that the
network, which is always told a rate, never meets one that it was not trained with.

An index may have many millions of rows. It is made once into a file that is memory-mapped, and rows are read from it
as they are needed. Sets made by `foreign.adopt` point into tars of others: their clips are drawn here, by (seed,
position), and their pictures fitted to the form of a sample as `vc2 shard` would have done. Sets of latents
(`vc2.train.precompute`) hold what encoders made of the frames: their bytes are handed on as they are.

The last `holdout` rows of every set stand at no position of any epoch: they are for validation alone.

Shapes: T frames, H x W pixels, uint8.
"""

import io
import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vc2.artifacts import FileEntry, ShardSet, load_manifest
from vc2.data.cache import ShardCache, kept_file
from vc2.data.config import LoaderConfig, SampleForm
from vc2.data.foreign import FOREIGN, Extractor, draw
from vc2.data.order import Epochs, Mixture, evenly, image_steps, is_image_step
from vc2.data.places import open_file
from vc2.data.shards import decode_frames, shard_name
from vc2.errors import ConfigError, ShardCorrupted, StoreError
from vc2.seeding import derive_seed
from vc2.storage import Store, join_uri

__all__ = ["Loader", "SampleRef", "Split", "fps_histogram"]

Kind = Literal["video", "image"]
log = logging.getLogger(__name__)

REPLACEMENTS = 8  # samples that are tried in place of one that cannot be read
INDEX_VERSION = 1  # of the memory-mapped form
BATCH_ROWS = 2**16  # rows of its record batches, all but the last
FORM = ("num_frames", "width", "height")
LATENTS = "safetensors"  # ending of a member that holds latents
COLUMNS = ("shard", "key", "offset", "length", "media_sha256", "ending", "frame_bytes", "caption", "fps", *FORM)


@dataclass(frozen=True, slots=True)
class SampleRef:
    """One sample of one step: where it is and what it is told to be."""

    kind: Kind
    position: int  #: global, within its kind; draws of noise and timestep are keyed by it
    key: str
    caption: str
    fps: int
    source: int  #: number of its set among those of its kind
    shard: str  #: key of the tar in the store, or its URI
    offset: int
    length: int
    media_sha256: str | None
    ending: str
    frame_bytes: tuple[int, ...]
    clip: Mapping[str, Any] | None = None  #: of a tar of others: which frames to take, and what the decoder must know

    @property
    def identity(self) -> tuple[Kind, int, str, tuple[int, ...]]:
        """What its frames are: two samples of a `Loader` have the same ones if this is the same."""
        return self.kind, self.source, self.key, () if self.clip is None else tuple(self.clip["indices"])


class _Set:
    """One shard set: the rows that can be drawn, and its endless order. Near duplicates are left out."""

    def __init__(self, store: Store, shards: ShardSet, kind: Kind, number: int, config: LoaderConfig) -> None:
        self.uri, self.name, self.number = shards.uri, shards.prefix.split("/")[1], number
        self.kind: Kind = kind
        manifest = load_manifest(store, shards.prefix)
        self.tars = {entry.name: entry for entry in manifest.files if entry.name.endswith(".tar")}
        self.by_key = {entry.key: entry for entry in self.tars.values()}
        self.form = SampleForm.model_validate(manifest.config["form"]) if manifest.stage == FOREIGN else None
        self.media = manifest.facts.get("media", kind)
        self.rows = _Rows(store, manifest.file("index.parquet"), config.cache_dir)
        counts = _without_last(self.rows.shard_counts, config.holdout)
        self.order = Epochs(counts, config.shuffle_shards, config.seed, "order", kind, number)
        self._seed = config.seed

    def __len__(self) -> int:
        return self.order.length

    @property
    def held(self) -> int:
        """How many samples are kept back."""
        return len(self.rows) - len(self)

    def coming(self, place: int) -> list[FileEntry]:
        """Tars of the window of shards that is read at a place of this set's order, and of the next one."""
        near = (*self.order.window(place), *self.order.window(place, ahead=1))
        return [self.tars[shard_name(self.rows.shards[number])] for number in near]

    def ref(self, position: int, place: int) -> SampleRef:
        """The sample at `place` of this set's order, which stands at `position` of its kind."""
        return self._ref(position, self.order.row(place))

    def held_out(self, position: int, number: int) -> SampleRef:
        """One of the samples that are kept back, by number, at a position of its own."""
        return self._ref(position, len(self) + number)

    def _ref(self, position: int, number: int) -> SampleRef:
        row = self.rows[number]
        clip, fps = None, row["fps"]
        if self.form is not None and self.kind == "video":
            clip = draw(row["key"], row["facts"], self.form, self._seed, position)
            fps = clip["fps"]
        return SampleRef(
            kind=self.kind,
            position=position,
            key=row["key"],
            caption=row["caption"],
            fps=fps,
            source=self.number,
            shard=self.tars[shard_name(row["shard"])].key,
            offset=-1 if row["offset"] is None else row["offset"],
            length=row["length"] or 0,
            media_sha256=row["media_sha256"],
            ending=row["ending"],
            frame_bytes=tuple(row["frame_bytes"] or ()),
            clip=clip,
        )


def _without_last(counts: np.ndarray, rows: int) -> np.ndarray:
    """Samples of each shard, less the last rows of all; shards of which nothing is left are left out."""
    ends = np.minimum(np.cumsum(counts), max(0, int(counts.sum()) - rows))
    left = np.diff(ends, prepend=0)
    return left[left > 0]


class _Rows:
    """Rows of an index that can be drawn, by number, without holding them."""

    def __init__(self, store: Store, file: FileEntry, cache_dir: str | None) -> None:
        def make(sink: BinaryIO) -> None:
            with open_file(join_uri(store.uri, file.key)) as index:
                _arrow_form(index, sink)

        self._reader = pa.ipc.open_file(_mapped(file, cache_dir, make))
        batches = (self._reader.get_batch(number) for number in range(self._reader.num_record_batches))
        self._batches = [dict(zip(batch.schema.names, batch.columns, strict=True)) for batch in batches]
        numbers = self._column("shard")
        if len(numbers) and np.any(np.diff(numbers) < 0):
            raise StoreError(f"{store.uri}/{file.key}: rows are not in order of their shards; prepare the set again")
        self.shards, self.shard_counts = np.unique(numbers, return_counts=True)

    def __getitem__(self, number: int) -> dict[str, Any]:
        batch, place = divmod(number, BATCH_ROWS)
        return {name: column[place].as_py() for name, column in self._batches[batch].items() if name not in FORM}

    def __len__(self) -> int:
        return int(self.shard_counts.sum())

    def labels(self, rows: int) -> Counter[int]:
        """How often each fps label stands in the first rows."""
        found: Counter[int] = Counter()
        for number, batch in enumerate(self._batches):
            counts = pc.value_counts(batch["fps"].slice(0, max(0, rows - number * BATCH_ROWS)))  # type: ignore[attr-defined]
            found.update({entry["values"].as_py(): entry["counts"].as_py() for entry in counts})
        return found

    def forms(self) -> tuple[set[int], ...]:
        """The numbers of frames, widths and heights that occur."""
        return tuple(set(np.unique(self._column(name)).tolist()) for name in FORM)

    def _column(self, name: str) -> np.ndarray:
        columns = [batch[name].to_numpy(zero_copy_only=False) for batch in self._batches]
        return np.concatenate(columns) if columns else np.zeros(0, np.int32)


def _mapped(file: FileEntry, cache_dir: str | None, make: Any) -> Any:
    """The memory-mapped form of an index: out of the cache folder or, without one, in memory."""
    if cache_dir is not None:
        try:
            folder = Path(cache_dir).expanduser()
            return pa.memory_map(str(kept_file(folder, f"indexes/{file.sha256}-{INDEX_VERSION}", make)))
        except OSError as error:
            log.warning("indexes are held in memory: %s cannot be used (%s)", cache_dir, error)
    buffer = io.BytesIO()
    make(buffer)
    return pa.py_buffer(buffer.getbuffer())


def _arrow_form(index: Any, sink: BinaryIO) -> None:
    """The columns of an index that are needed, without near duplicates, in record batches of one size."""
    parquet = pq.ParquetFile(index)
    names = [*COLUMNS, *({"facts"} & set(parquet.schema_arrow.names))]
    schema = pa.schema([parquet.schema_arrow.field(name) for name in names])
    with pa.ipc.new_file(sink, schema) as writer:
        rest = schema.empty_table()
        for batch in parquet.iter_batches(BATCH_ROWS, columns=[*names, "duplicate_of"], use_threads=False):
            table = pa.Table.from_batches([batch])
            table = table.filter(pc.is_null(table["duplicate_of"])).select(names)  # type: ignore[attr-defined]
            rest = pa.concat_tables([rest, table])
            if len(rest) >= BATCH_ROWS:
                writer.write_batch(rest.slice(0, BATCH_ROWS).combine_chunks().to_batches()[0])
                rest = rest.slice(BATCH_ROWS)
        if len(rest):
            writer.write_batch(rest.combine_chunks().to_batches()[0])


class Split:
    """All samples of one kind: its sets, mixed by their weights.

    Raises:
        ConfigError: If a set is empty, is not of this kind, has no weight, or has samples of another form than others.
    """

    def __init__(self, store: Store, sets: Sequence[ShardSet], kind: Kind, config: LoaderConfig) -> None:
        self.kind: Kind = kind
        self.sets = [_Set(store, shards, kind, number, config) for number, shards in enumerate(sets)]
        for one in self.sets:
            if one.media != kind:
                raise ConfigError(f"{one.uri} is a set of {one.media}s, given as one of {kind}s")
            if not len(one):
                rest = f" but the {one.held} that holdout={config.holdout} keeps back" if one.held else ""
                raise ConfigError(
                    f"{one.uri} has no samples to train on{rest}; leave it out, or see its rejects.parquet"
                )
        self._check_forms()
        self._weights = self._weigh(config.weights)
        self._mixture = Mixture(self._weights, config.seed, "mixture", kind)

    def __len__(self) -> int:
        return sum(len(one) for one in self.sets)

    def ref(self, position: int) -> SampleRef:
        """The sample at a position; positions go on without end."""
        number, place = self._mixture.at(position)
        return self.sets[number].ref(position, place)

    def held_out(self) -> list[SampleRef]:
        """The samples that are kept back, set after set, at the positions -1, -2 and so on."""
        places = [(one, number) for one in self.sets for number in range(one.held)]
        return [one.held_out(-1 - place, number) for place, (one, number) in enumerate(places)]

    def coming(self, first: int, count: int) -> list[FileEntry]:
        """Tars that are read at some positions, and soon after."""
        places = dict(self._mixture.at(position) for position in range(first, first + count))  # the last of each set
        return [file for number, place in places.items() for file in self.sets[number].coming(place)]

    def labels(self) -> dict[int, int]:
        """How often each fps label comes; in parts of a million where the sets are weighted."""
        shares: dict[int, Fraction] = {}
        for one, weight in zip(self.sets, self._weights, strict=True):
            for label, count in one.rows.labels(len(one)).items():
                shares[label] = shares.get(label, Fraction(0)) + weight * Fraction(count, len(one))
        scale = 1 if sum(self._weights) == len(self) else Fraction(10**6) / sum(self._weights)
        return {label: max(1, round(share * scale)) for label, share in sorted(shares.items())}

    def _check_forms(self) -> None:
        forms = [one.rows.forms() for one in self.sets]
        for one, form in zip(self.sets, forms, strict=True):
            if form != forms[0] or any(len(values) != 1 for values in form):
                raise ConfigError(
                    f"a batch has samples of one form, but {self.sets[0].uri} has {_form_text(forms[0])} and "
                    f"{one.uri} has {_form_text(form)}; prepare both with the same `form`"
                )

    def _weigh(self, weights: Mapping[str, float]) -> list[Fraction]:
        names = [one.name for one in self.sets]
        given = [name for name in names if name in weights]
        if not given:
            return [Fraction(len(one)) for one in self.sets]
        if missing := sorted(set(names) - set(given)):
            raise ConfigError(
                f"weights name {sorted(set(given))}, but not {missing}; weigh all {self.kind} sets or none"
            )
        if len(set(names)) < len(names):
            raise ConfigError(f"weights cannot tell sets of one source apart: {names}; give one set of each source")
        return [Fraction(weights[name]).limit_denominator(10**6) for name in names]


def _form_text(form: tuple[set[int], ...]) -> str:
    frames, width, height = ("/".join(map(str, sorted(values))) for values in form)
    return f"{frames} frames of {width} x {height}"


def fps_histogram(videos: Split) -> dict[int, int]:
    """How often each fps label is met in training on videos."""
    return videos.labels()


class Loader:
    """Batches of a training stage as functions of the step.

    Args:
        store: Where the shards are.
        videos: Shard sets of clips.
        images: Shard sets of images.
        config: Batch size, share of image steps, weights, seed; and where to keep what is used again.
        image_fps: Label -> weight, for images; default: the labels of `videos`. Needed where there are none.

    Raises:
        ConfigError: If there is nothing to load, a set is empty, sets of a kind differ in the form of their samples,
            weights name no set, the share does not fit what there is, or images have no labels to draw from.
    """

    def __init__(
        self,
        store: Store,
        videos: Sequence[ShardSet],
        images: Sequence[ShardSet],
        config: LoaderConfig,
        *,
        image_fps: Mapping[int, int] | None = None,
    ) -> None:
        self.store, self.config = store, config
        self.splits: dict[Kind, Split] = {
            "video": Split(store, videos, "video", config),
            "image": Split(store, images, "image", config),
        }
        there: list[Kind] = [kind for kind, split in self.splits.items() if len(split)]
        if not there:
            raise ConfigError("nothing to load: no shard sets are given")
        names = {one.name for split in self.splits.values() for one in split.sets}
        if unknown := sorted(set(config.weights) - names):
            raise ConfigError(f"weights name {unknown}, but the sets are of {sorted(names)}")
        share = config.image_share if len(there) == 2 else float(there == ["image"])
        if config.image_share not in (0.0, share):
            raise ConfigError(
                f"image_share is {config.image_share}, but there are only {there[0]}s; give both kinds or leave it out"
            )
        self.share = Fraction(share).limit_denominator(10**6)
        self.phase = evenly(config.seed, "phase")
        self.image_fps = dict(sorted((image_fps or fps_histogram(self.splits["video"])).items()))
        if self.share and not self.image_fps:
            raise ConfigError(
                "images need fps labels to draw from: give image_fps, the labels of the videos trained on before"
            )
        self._labels = np.array(list(self.image_fps), np.int64)
        self._until = np.cumsum(list(self.image_fps.values()), dtype=np.int64)
        folder = Path(config.cache_dir).expanduser() if config.cache_dir else None
        self._cache = ShardCache(folder, int(config.cache_gib * 2**30))
        self._extractor = Extractor(config.decode_seconds)
        self._counting = threading.Lock()
        self.replaced = 0  #: samples that could not be read by this process, and were replaced

    def kind(self, step: int) -> Kind:
        """What the batch of a step is made of."""
        return "image" if is_image_step(step, self.share, self.phase) else "video"

    def cursor(self, step: int) -> int:
        """Position, within its kind, of the first sample of a step."""
        images = image_steps(step, self.share, self.phase)
        before = images if self.kind(step) == "image" else step - images
        return before * self.config.batch_size

    def refs(self, step: int, rank: int = 0, world_size: int = 1) -> list[SampleRef]:
        """The part of a step's batch that falls to a rank, in order.

        Raises:
            ConfigError: If the world size does not divide the batch size.
        """
        each, rest = divmod(self.config.batch_size, world_size)
        if rest:
            raise ConfigError(
                f"batch_size {self.config.batch_size} cannot be split over {world_size} ranks evenly; choose a multiple"
            )
        kind, first = self.kind(step), self.cursor(step) + rank * each
        if self._cache.is_used:
            self._cache.bring(self.store, self.splits[kind].coming(first, each))
        return [self._ref(kind, position) for position in range(first, first + each)]

    def held_out(self, kind: Kind) -> list[SampleRef]:
        """Samples that no step ever sees, `holdout` of each set, at positions below 0; their draws are their own."""
        return [self._labelled(ref) for ref in self.splits[kind].held_out()]

    def frames(self, ref: SampleRef) -> np.ndarray:
        """Frames of a sample, (T, H, W, 3) uint8, by one read; of a set of latents the bytes that it holds, (n,) uint8.

        Raises:
            ShardCorrupted: If the bytes there are not what the index says.
            StoreError: If they cannot be read.
        """
        source = self.splits[ref.kind].sets[ref.source]
        if ref.offset < 0:
            raise ShardCorrupted(f"{ref.shard} sample {ref.key}: it was damaged when latents were made of it")
        try:
            data = self._cache.read(self.store, source.by_key[ref.shard], ref.offset, ref.length, ref.media_sha256)
            if source.form is not None:
                return self._extractor.frames(data, ref.kind, source.form, ref.clip)
            if ref.ending == LATENTS:
                return np.frombuffer(data, np.uint8)
            return decode_frames(data, ref.frame_bytes, ref.ending)
        except KeyError:
            raise StoreError(f"{self.store.uri}/{ref.shard} is gone; run `vc2 verify` on the shard set") from None
        except ShardCorrupted as error:
            raise ShardCorrupted(f"{ref.shard} sample {ref.key}: {error}") from None

    def read(self, ref: SampleRef) -> tuple[SampleRef, np.ndarray]:
        """`frames`, and where a sample is damaged those of a replacement: a fixed function of the position, logged.

        A store that is merely out of reach is an error, not damage: a run goes on from its last state.

        Returns:
            The sample that was read (position as asked for, so that its draws stay) and its frames.

        Raises:
            StoreError: If the bytes cannot be read, or the replacements are damaged too.
        """
        found = ref
        for attempt in range(REPLACEMENTS + 1):
            try:
                return found, self.frames(found)
            except ShardCorrupted as error:
                if attempt == REPLACEMENTS:
                    raise
                log.warning("position %d: %s; replaced", ref.position, error)
            with self._counting:
                self.replaced += attempt == 0
            drawn = derive_seed(self.config.seed, "replacement", ref.kind, ref.position, attempt)
            found = replace(self._ref(ref.kind, drawn % len(self.splits[ref.kind])), position=ref.position)
        raise AssertionError("unreachable")

    def close(self) -> None:
        """End threads and child processes. State is the step alone: nothing is lost."""
        self._cache.close()
        self._extractor.close()

    def _ref(self, kind: Kind, position: int) -> SampleRef:
        return self._labelled(self.splits[kind].ref(position))

    def _labelled(self, ref: SampleRef) -> SampleRef:
        """An image gets the rate that it is told to have."""
        if ref.kind == "video":
            return ref
        drawn = derive_seed(self.config.seed, "image fps", ref.position) % int(self._until[-1])
        label = int(self._labels[np.searchsorted(self._until, drawn, side="right")])
        return replace(ref, fps=label)
