"""Laws of encoding: numbers of a sample are its own."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vc2.train.encode import Batches, Encoders


def test_a_batch_is_a_function_of_its_step(encoders: Encoders, random_samples: Any) -> None:
    """Steps in any order, on one rank or on two, with any memory, give the same numbers."""
    forward = Batches(random_samples(4), encoders, 0, 1)
    batches = [forward.at(step) for step in range(3)]
    assert [batch.kind for batch in batches] == ["video", "video", "image"]
    assert batches[0].moments.shape == (4, 8, 4, 2, 2) and batches[2].moments.shape == (4, 8, 1, 2, 2)
    forgetful = Encoders(encoders.autoencoder, encoders.text_encoder, torch.device("cpu"), memory_bytes=0)
    ranks = [Batches(random_samples(4), forgetful, rank, 2) for rank in range(2)]
    for step in (2, 0, 1):
        parts = [rank.at(step) for rank in ranks]
        assert sum((part.keys for part in parts), ()) == batches[step].keys
        for name in ("moments", "text", "fps"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batches[step], name))
    for reader in (forward, *ranks):
        reader.close()


def test_memory_is_bounded(encoders: Encoders, random_samples: Any) -> None:
    """The oldest entries go when the bound is passed; what was used lately stays."""
    bounded = Encoders(encoders.autoencoder, encoders.text_encoder, torch.device("cpu"), memory_bytes=3 * 8 * 16 * 4)
    for caption in ("one", "two", "three", "one", "four"):
        bounded.text(caption)  # (8, 16) float32 each
    held = [key for _, key in bounded._memory]
    assert held == ["three", "one", "four"]
    assert bounded._bytes == 3 * 8 * 16 * 4


def test_the_empty_caption_differs_from_any_other(encoders: Encoders, random_samples: Any) -> None:
    """Dropping a caption is a thing the network can see."""
    batches = Batches(random_samples(4), encoders, 0, 1)
    batch = batches.at(0)
    assert all(not torch.equal(text, batch.empty_text) for text in batch.text)
    batches.close()


def test_a_sample_that_comes_twice_in_a_batch_keeps_both_positions(encoders: Encoders, random_samples: Any) -> None:
    """At the end of an epoch a batch may hold one sample twice: read once, with draws of its own each time."""
    samples = random_samples(4, count=3)
    batches = Batches(samples, encoders, 0, 1)
    batch = batches.at(0)
    batches.close()
    assert batch.keys == ("video-0", "video-1", "video-2", "video-0") and batch.positions == (0, 1, 2, 3)
    assert torch.equal(batch.moments[0], batch.moments[3])
    assert samples.reads.count("video-0") == 1


def test_what_is_remembered_is_the_clip_and_not_its_key(encoders: Encoders, random_samples: Any) -> None:
    """Two clips of one video, under one key, are two samples, near each other and far apart."""

    @dataclass(frozen=True)
    class Clip:
        kind: str
        position: int
        key: str = "film"
        caption: str = "a film"
        fps: int = 8

        @property
        def identity(self) -> tuple[str, int]:
            return self.key, self.position % 3

    class Clips(random_samples):
        def refs(self, step: int, rank: int, world_size: int) -> list[Any]:
            return [Clip("video", 4 * step + place) for place in range(4)]

        def frames(self, ref: Any) -> Any:
            return np.full((4, 16, 16, 3), 80 * (ref.position % 3), np.uint8)

    batches = Batches(Clips(4), encoders, 0, 1)
    first, second = batches.at(0).moments, batches.at(1).moments
    batches.close()
    assert torch.equal(first[0], first[3]) and torch.equal(first[1], second[0])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])


def test_a_corrupted_sample_is_replaced_under_its_own_position(encoders: Encoders, random_samples: Any) -> None:
    """The replacement's caption and rate go with its frames; the draws stay."""
    samples = random_samples(4)

    def read(ref: Any) -> Any:
        found = replace(ref, key="video-5", caption="a thing number 5") if ref.key == "video-2" else ref
        return found, samples.frames(found)

    samples.read = read
    batches = Batches(samples, encoders, 0, 1)
    batch = batches.at(0)
    batches.close()
    assert batch.keys == ("video-0", "video-1", "video-5", "video-3") and batch.positions == (0, 1, 2, 3)
    assert torch.equal(batch.text[2], encoders.text("a thing number 5"))
