"""Which samples a training step sees, and their frames.

Everything is a function of (shard sets, config, step); there is no state to save but the step, and no process
remembers what came before.

    kind      step s is of images iff floor((s + 1) a + b) > floor(s a + b): the share a exactly, evenly spread, b
    drawn from the seed cursor    of the kind's n-th step the first position is n * batch_size, n in closed form
    sample    position p of N samples: epoch e = p // N, and the p % N-th of the e-th keyed permutation rank      r of
    W takes its contiguous part of the batch: any W that divides the batch size sees the same batches

Images are clips of one frame and have no rate. Their fps label is drawn from the labels of the videos, so that the
network, which is always told a rate, never meets one that it was not trained with.

Shapes: T frames, H x W pixels, uint8.
"""

import io
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vc2.artifacts import ShardSet, load_manifest
from vc2.data.config import LoaderConfig
from vc2.data.shards import read_frames, shard_name
from vc2.errors import ConfigError, ShardCorrupted, StoreError
from vc2.seeding import derive_seed, generator
from vc2.storage import Store

__all__ = ["Loader", "SampleRef", "Split", "fps_histogram", "is_image_step"]

Kind = Literal["video", "image"]
log = logging.getLogger(__name__)

REPLACEMENTS = 8  # samples that are tried in place of one that cannot be read
PHASES = 2**20  # steps of the schedule's phase
COLUMNS = ("shard", "offset", "length", "frame_bytes", "key", "caption", "fps", "duplicate_of")


@dataclass(frozen=True, slots=True)
class SampleRef:
    """One sample of one step: where it is and what it is told to be."""

    kind: Kind
    position: int  #: global, within its kind; draws of noise and timestep are keyed by it
    key: str
    caption: str
    fps: int
    shard: str  #: key of the tar in the store
    offset: int
    length: int
    frame_bytes: tuple[int, ...]


def is_image_step(step: int, share: Fraction, phase: Fraction) -> bool:
    """Whether the batch of a step is of images."""
    return _image_steps(step + 1, share, phase) > _image_steps(step, share, phase)


def _image_steps(step: int, share: Fraction, phase: Fraction) -> int:
    """Image steps before `step`; exact, as are the fractions."""
    return (step * share + phase).__floor__()


class Split:
    """All samples of one kind, as the concatenation of its sets; near duplicates left out."""

    def __init__(self, store: Store, sets: Sequence[ShardSet], kind: Kind, seed: int) -> None:
        self.kind: Kind = kind
        self.seed = seed
        self._shards: list[str] = []  # keys of the tars
        tables = []
        for shards in sets:
            files = {entry.name: entry.key for entry in load_manifest(store, shards.prefix).files}
            index = io.BytesIO(store.read(files["index.parquet"]))
            table = pq.read_table(index, columns=list(COLUMNS), use_threads=False)
            table = table.filter(pc.is_null(table["duplicate_of"]))  # type: ignore[attr-defined]
            tars = sorted(name for name in files if name.endswith(".tar"))
            place = {name: number for number, name in enumerate(tars, len(self._shards))}
            self._shards += [files[name] for name in tars]
            places = pa.array([place[shard_name(number)] for number in table["shard"].to_pylist()], pa.int32())
            tables.append(table.set_column(table.schema.get_field_index("shard"), "shard", places))
        rows = pa.concat_tables(tables).combine_chunks() if tables else None
        self._length = rows.num_rows if rows is not None else 0
        self._columns = {name: rows[name].chunk(0) for name in COLUMNS} if rows is not None and self._length else {}
        self._order = lru_cache(maxsize=2)(self._permutation)

    def __len__(self) -> int:
        return self._length

    @property
    def fps(self) -> list[int]:
        return self._columns["fps"].to_pylist() if self._columns else []

    def ref(self, position: int) -> SampleRef:
        """The sample at a position; positions go on without end, epoch after epoch."""
        epoch, place = divmod(position, len(self))
        number = int(self._order(epoch)[place])
        row = {name: column[number].as_py() for name, column in self._columns.items()}
        return SampleRef(
            kind=self.kind,
            position=position,
            key=row["key"],
            caption=row["caption"],
            fps=row["fps"],
            shard=self._shards[row["shard"]],
            offset=row["offset"],
            length=row["length"],
            frame_bytes=tuple(row["frame_bytes"]),
        )

    def _permutation(self, epoch: int) -> np.ndarray:
        return generator(self.seed, "order", self.kind, epoch).permutation(len(self))


def fps_histogram(videos: Split) -> dict[int, int]:
    """How often each fps label stands in the index of videos."""
    return dict(sorted(Counter(videos.fps).items()))


class Loader:
    """Batches of a training stage as functions of the step.

    Args:
        store: Where the shards are.
        videos: Shard sets of clips.
        images: Shard sets of images.
        config: Batch size, share of image steps, seed.
        image_fps: Label -> weight, for images; default: the labels of `videos`. Needed where there are none.

    Raises:
        ConfigError: If there is nothing to load, the share does not fit what there is, or images have no labels to
        draw from.
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
            "video": Split(store, videos, "video", config.seed),
            "image": Split(store, images, "image", config.seed),
        }
        there: list[Kind] = [kind for kind, split in self.splits.items() if len(split)]
        if not there:
            raise ConfigError("nothing to load: the shard sets have no samples")
        share = config.image_share if len(there) == 2 else float(there == ["image"])
        if config.image_share not in (0.0, share):
            raise ConfigError(
                f"image_share is {config.image_share}, but there are only {there[0]}s; give both kinds or leave it out"
            )
        self.share = Fraction(share).limit_denominator(10**6)
        self.phase = Fraction(derive_seed(config.seed, "phase") % PHASES, PHASES)
        self.image_fps = dict(sorted((image_fps or fps_histogram(self.splits["video"])).items()))
        if self.share and not self.image_fps:
            raise ConfigError(
                "images need fps labels to draw from: give image_fps, the labels of the videos trained on before"
            )
        self._labels = np.array(list(self.image_fps), np.int64)
        self._until = np.cumsum(list(self.image_fps.values()), dtype=np.int64)

    def kind(self, step: int) -> Kind:
        """What the batch of a step is made of."""
        return "image" if is_image_step(step, self.share, self.phase) else "video"

    def cursor(self, step: int) -> int:
        """Position, within its kind, of the first sample of a step."""
        images = _image_steps(step, self.share, self.phase)
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
        first = self.cursor(step) + rank * each
        return [self._ref(self.kind(step), position) for position in range(first, first + each)]

    def frames(self, ref: SampleRef) -> np.ndarray:
        """Frames of a sample, (T, H, W, 3) uint8, by one ranged read.

        Raises:
            StoreError: If they cannot be read, or are not what the index says.
        """
        try:
            return read_frames(self.store, ref.shard, ref.offset, ref.length, ref.frame_bytes)
        except KeyError:
            raise StoreError(f"{self.store.uri}/{ref.shard} is gone; run `vc2 verify` on the shard set") from None
        except ShardCorrupted as error:
            raise ShardCorrupted(f"{self.store.uri}/{ref.shard} sample {ref.key}: {error}") from None

    def read(self, ref: SampleRef) -> tuple[SampleRef, np.ndarray]:
        """`frames`, and where they cannot be read a replacement: a fixed function of the position, logged.

        Returns:
            The sample that was read (position as asked for, so that its draws stay) and its frames.

        Raises:
            StoreError: If the replacements cannot be read either.
        """
        found = ref
        for attempt in range(REPLACEMENTS + 1):
            try:
                return found, self.frames(found)
            except StoreError as error:
                if attempt == REPLACEMENTS:
                    raise
                log.warning("position %d: %s; replaced", ref.position, error)
            split = self.splits[ref.kind]
            other = self._ref(
                ref.kind, derive_seed(self.config.seed, "replacement", ref.kind, ref.position, attempt) % len(split)
            )
            found = replace(other, position=ref.position)
        raise AssertionError("unreachable")

    def _ref(self, kind: Kind, position: int) -> SampleRef:
        ref = self.splits[kind].ref(position)
        if kind == "video":
            return ref
        drawn = derive_seed(self.config.seed, "image fps", position) % int(self._until[-1])
        label = int(self._labels[np.searchsorted(self._until, drawn, side="right")])
        return replace(ref, fps=label)
