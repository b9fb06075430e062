"""From samples to what the network reads: latent moments and text features, by the frozen encoders.

Every sample is encoded alone, a batch of one, so its numbers do not depend on what it was grouped with. What was
encoded is remembered up to a bound: a small world is encoded once. Frames are read ahead (`vc2.data.prefetch`), and
fitted to the size of the run's phase.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vc2.data.prefetch import Prefetch, Sample, Samples
from vc2.errors import ConfigError, ShardCorrupted, StoreError
from vc2.model.autoencoder import Autoencoder
from vc2.model.text import TextEncoder
from vc2.train.config import Phase
from vc2.train.latents import unpack
from vc2.train.objective import Batch

__all__ = ["Batches", "Encoders", "fitted"]

log = logging.getLogger(__name__)

LONGEST_PAUSE = 30.0  # seconds between two attempts at a store that does not answer


def fitted(frames: NDArray[np.uint8], phase: Phase) -> NDArray[np.uint8]:
    """A clip in the size of a phase: the middle frames, scaled to cover the size, the rest cut off evenly.

    Args:
        frames: (T, H, W, 3) uint8; one frame is an image and stays one.

    Returns:
        (T', height, width, 3) uint8.

    Raises:
        ConfigError: If the phase asks for more frames or pixels than there are.
    """
    count = 1 if len(frames) == 1 else phase.num_frames or len(frames)
    height, width = phase.height or frames.shape[1], phase.width or frames.shape[2]
    if count > len(frames) or height > frames.shape[1] or width > frames.shape[2]:
        raise ConfigError(
            f"a phase asks for {count} frames of {width} x {height}, the shards have {len(frames)} of "
            f"{frames.shape[2]} x {frames.shape[1]}: prepare larger ones, or ask for less"
        )
    first = (len(frames) - count) // 2
    frames = frames[first : first + count]
    if frames.shape[1:3] == (height, width):
        return frames
    scale = max(height / frames.shape[1], width / frames.shape[2])
    size = max(height, round(frames.shape[1] * scale)), max(width, round(frames.shape[2] * scale))
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    pixels = pixels[:, :, top : top + height, left : left + width]
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


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
        phase_of: The phase of a step.
        patience: Seconds for which a store that does not answer is asked again.
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
        phase_of: Callable[[int], Phase] = lambda step: Phase(),
        patience: float = 0.0,
    ) -> None:
        self._samples, self._encoders = samples, encoders
        self._phase_of, self._patience = phase_of, patience
        self._phase = Phase()
        self._ahead = Prefetch(
            samples,
            rank,
            world_size,
            threads=threads,
            memory_bytes=memory_bytes,
            is_known=lambda identity: encoders.remembers(_sized(identity, self._phase)),
        )

    def at(self, step: int) -> Batch:
        """The batch of a step.

        Raises:
            StoreError: If a sample cannot be read and was asked for again as long as patience lasts.
            ConfigError: If the phase of the step does not fit the samples.
        """
        self._phase = self._phase_of(step)

        def read() -> Batch:
            try:
                return self._batch([self._encoded(*found, self._phase) for found in self._ahead.at(step)])
            except StoreError:
                self._ahead.restart(step)
                raise

        return self._patiently(read, f"step {step} waits for its samples")

    def of(self, refs: Sequence[Sample], phase: Phase) -> Batch:
        """Other samples than those of a step, all of one kind, in the size of a phase; with the same patience."""

        def read() -> Batch:
            known = [self._encoders.remembers(_sized(ref.identity, phase)) for ref in refs]
            found = [
                (ref, None) if is_known else self._samples.read(ref) for ref, is_known in zip(refs, known, strict=True)
            ]
            return self._batch([self._encoded(*one, phase) for one in found])

        return self._patiently(read, "validation waits for its samples")

    def _patiently(self, read: Callable[[], Batch], waiting: str) -> Batch:
        began, pause = time.monotonic(), 1.0
        while True:
            try:
                return read()
            except ShardCorrupted:
                raise
            except StoreError as error:
                waited = time.monotonic() - began
                if waited + pause > self._patience:
                    raise
                log.warning("%s since %.0f s: %s", waiting, waited, error)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _batch(self, found: Sequence[tuple[Sample, Tensor, Tensor]]) -> Batch:
        refs = [ref for ref, *_ in found]
        return Batch(
            keys=tuple(ref.key for ref in refs),
            kind=refs[0].kind,
            positions=tuple(ref.position for ref in refs),
            moments=torch.stack([moments for _, moments, _ in found]),
            text=torch.stack([text for *_, text in found]),
            empty_text=self._encoders.text(""),
            fps=torch.tensor([int(ref.fps) for ref in refs]),
        )

    def close(self) -> None:
        """End the reading threads."""
        self._ahead.close()

    def _encoded(self, ref: Sample, frames: NDArray[np.uint8] | None, phase: Phase) -> tuple[Sample, Tensor, Tensor]:
        """The sample that serves for `ref` (itself, unless it is damaged), its moments and its text."""
        if frames is None and not self._encoders.remembers(_sized(ref.identity, phase)):
            # It was remembered when it was looked ahead at, and forgotten since.
            ref, frames = self._ahead.read(ref)
        if frames is not None and frames.ndim == 1:  # encoded beforehand
            return ref, *unpack(frames)
        if frames is not None:
            frames = fitted(frames, phase)
        return ref, self._encoders.moments(_sized(ref.identity, phase), frames), self._encoders.text(ref.caption)


def _sized(identity: Hashable, phase: Phase) -> Hashable:
    """What the latents of a sample are: those of its frames, in the size of the phase."""
    size = phase.num_frames, phase.height, phase.width
    return (identity, size) if any(size) else identity
