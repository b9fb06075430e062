"""From samples to what the network reads: latent moments and text features, by the frozen encoders.

Every sample is encoded alone, a batch of one, so its numbers do not depend on what it was grouped with. What was
encoded is remembered up to a bound: a small world is encoded once. Frames are read ahead (`vc2.data.prefetch`).
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vc2.data.prefetch import Prefetch, Sample, Samples
from vc2.model.autoencoder import Autoencoder
from vc2.model.text import TextEncoder
from vc2.train.objective import Batch

__all__ = ["Batches", "Encoders"]


class Encoders:
    """The frozen autoencoder and text tower, with a memory of at most `memory_bytes`."""

    def __init__(self, autoencoder: Autoencoder, text: TextEncoder, device: torch.device, memory_bytes: int) -> None:
        self.autoencoder = autoencoder.to(device)
        self.text_encoder = text.to(device)
        self.device = device
        self._memory: OrderedDict[tuple[str, Hashable], Tensor] = OrderedDict()
        self._bytes, self._most_bytes = 0, memory_bytes

    def remembers(self, identity: Hashable) -> bool:
        """Whether the moments of the sample with this identity are at hand."""
        return ("moments", identity) in self._memory

    def moments(self, identity: Hashable, frames: NDArray[np.uint8] | None = None) -> Tensor:
        """Mean and log-variance of the latents of a sample, (2C, T, H / 8, W / 8), on the CPU.

        Args:
            identity: Of the sample: what its frames are.
            frames: uint8 RGB, (T, H, W, 3); None for a sample that is remembered.
        """
        return self._recall("moments", identity, lambda: self._encode_frames(frames))

    def text(self, caption: str) -> Tensor:
        """Features of a caption, (L, D), on the CPU."""
        return self._recall("text", caption, lambda: self.text_encoder.encode([caption])[0].float().cpu())

    def _encode_frames(self, frames: NDArray[np.uint8] | None) -> Tensor:
        assert frames is not None, "moments of a forgotten sample need its frames"
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).to(self.device).permute(3, 0, 1, 2)[None]
        return self.autoencoder.moments(pixels.float() / 127.5 - 1)[0].float().cpu()

    def _recall(self, what: str, of: Hashable, encode: Callable[[], Tensor]) -> Tensor:
        name = (what, of)
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
    """This rank's batches by step: a pure function of the step; the samples of the next ones are read ahead.

    Args:
        samples: The loader of `vc2.data`, or anything like it.
        encoders: The frozen encoders.
        rank: Of this process.
        world_size: Ranks in all.
        threads: That read and decode.
        memory_bytes: Frames that may wait.
    """

    def __init__(
        self,
        samples: Samples,
        encoders: Encoders,
        rank: int,
        world_size: int,
        *,
        threads: int = 1,
        memory_bytes: int = 2**28,
    ) -> None:
        self._encoders = encoders
        self._ahead = Prefetch(
            samples, rank, world_size, threads=threads, memory_bytes=memory_bytes, is_known=encoders.remembers
        )

    def at(self, step: int) -> Batch:
        """The batch of a step."""
        found = [self._moments(*read) for read in self._ahead.at(step)]
        refs = [ref for ref, _ in found]
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
        """End the reading threads."""
        self._ahead.close()

    def _moments(self, ref: Sample, frames: NDArray[np.uint8] | None) -> tuple[Sample, Tensor]:
        """The sample that serves for `ref` (itself, unless it is damaged) and its moments."""
        if frames is None and not self._encoders.remembers(ref.identity):  # forgotten since it was looked ahead at
            ref, frames = self._ahead.read(ref)
        return ref, self._encoders.moments(ref.identity, frames)
