"""From samples to what the network reads: latent moments and text features, by the frozen encoders.

Every sample is encoded alone, a batch of one, so its numbers do not depend on what it was grouped with. What was
encoded is remembered up to a bound: a small world is encoded once. Frames of the next step are read ahead in a thread.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vc2.errors import ShardCorrupted
from vc2.model.autoencoder import Autoencoder
from vc2.model.text import TextEncoder
from vc2.train.objective import Batch

__all__ = ["Batches", "Encoders", "Sample", "Samples"]


class Sample(Protocol):
    """What is known of a sample before its frames are read."""

    kind: str  # "video" or "image"
    position: int  # in the stream of its kind
    key: str
    caption: str
    fps: Any


class Samples(Protocol):
    """Samples by step: the loader of `vc2.data`, or anything like it."""

    def refs(self, step: int, rank: int, world_size: int) -> Sequence[Any]:
        """This rank's samples of a step, all of one kind."""
        ...

    def frames(self, ref: Any) -> NDArray[np.uint8]:
        """Frames of a sample, uint8 RGB, (T, H, W, 3). Raises `ShardCorrupted` if its bytes are not what they were."""
        ...

    def read(self, ref: Any) -> tuple[Any, NDArray[np.uint8]]:
        """`frames`, or those of a fixed replacement where they are corrupted; and the sample that was read."""
        ...


class Encoders:
    """The frozen autoencoder and text tower, with a memory of at most `memory_bytes`."""

    def __init__(self, autoencoder: Autoencoder, text: TextEncoder, device: torch.device, memory_bytes: int) -> None:
        self.autoencoder = autoencoder.to(device)
        self.text_encoder = text.to(device)
        self.device = device
        self._memory: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._bytes, self._most_bytes = 0, memory_bytes

    def remembers(self, key: str) -> bool:
        """Whether the moments of the sample with this key are at hand."""
        return ("moments", key) in self._memory

    def moments(self, key: str, frames: NDArray[np.uint8] | None = None) -> Tensor:
        """Mean and log-variance of the latents of a sample, (2C, T, H / 8, W / 8), on the CPU.

        Args:
            key: Of the sample.
            frames: uint8 RGB, (T, H, W, 3); None for a sample that is remembered.
        """
        return self._recall("moments", key, lambda: self._encode_frames(frames))

    def text(self, caption: str) -> Tensor:
        """Features of a caption, (L, D), on the CPU."""
        return self._recall("text", caption, lambda: self.text_encoder.encode([caption])[0].float().cpu())

    def _encode_frames(self, frames: NDArray[np.uint8] | None) -> Tensor:
        assert frames is not None, "moments of a forgotten sample need its frames"
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).to(self.device).permute(3, 0, 1, 2)[None]
        return self.autoencoder.moments(pixels.float() / 127.5 - 1)[0].float().cpu()

    def _recall(self, what: str, key: str, encode: Callable[[], Tensor]) -> Tensor:
        name = (what, key)
        if name in self._memory:
            self._memory.move_to_end(name)
            return self._memory[name]
        value = encode()
        self._memory[name] = value
        self._bytes += value.nbytes
        while self._bytes > self._most_bytes and len(self._memory) > 1:
            self._bytes -= self._memory.popitem(last=False)[1].nbytes
        return value


class Batches:
    """This rank's batches by step: a pure function of the step, one step read ahead."""

    def __init__(self, samples: Samples, encoders: Encoders, rank: int, world_size: int) -> None:
        self._samples, self._encoders = samples, encoders
        self._rank, self._world_size = rank, world_size
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="frames")  # the only thread that calls the loader
        self._ahead: dict[int, tuple[Sequence[Sample], Reads]] = {}

    def at(self, step: int) -> Batch:
        """The batch of a step; asks for the frames of the one after it."""
        refs, reads = self._ahead.pop(step, None) or self._ask(step)
        found = [self._moments(ref, reads) for ref in refs]
        refs = [ref for ref, _ in found]
        self._ahead = {step + 1: self._ask(step + 1)}
        return Batch(
            keys=tuple(ref.key for ref in refs),
            kind=refs[0].kind,
            positions=tuple(ref.position for ref in refs),
            moments=torch.stack([moments for _, moments in found]),
            text=torch.stack([self._encoders.text(ref.caption) for ref in refs]),
            empty_text=self._encoders.text(""),
            fps=torch.tensor([int(ref.fps) for ref in refs]),
        )

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)

    def _ask(self, step: int) -> "tuple[Sequence[Sample], Reads]":
        refs = self._reader.submit(self._samples.refs, step, self._rank, self._world_size).result()
        first = {ref.key: ref for ref in reversed(refs) if not self._encoders.remembers(ref.key)}  # one read per key
        return refs, {ref.position: self._reader.submit(self._read, ref) for ref in first.values()}

    def _read(self, ref: Sample) -> tuple[Sample, NDArray[np.uint8]]:
        try:
            return ref, self._samples.frames(ref)
        except ShardCorrupted:  # a store that is merely away is an error: the run goes on from its last state
            return self._samples.read(ref)

    def _moments(self, ref: Sample, reads: "Reads") -> tuple[Sample, Tensor]:
        """The sample that serves for `ref` (itself, unless its bytes are corrupted) and its moments."""
        if self._encoders.remembers(ref.key):
            return ref, self._encoders.moments(ref.key)
        asked = reads.get(ref.position)  # none where it was to be remembered by now and is not
        found, frames = (asked or self._reader.submit(self._read, ref)).result()
        return found, self._encoders.moments(found.key, frames)


Reads = dict[int, Future[tuple[Sample, NDArray[np.uint8]]]]  # of samples that are not remembered, by position
