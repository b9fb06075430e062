"""What the networks of our recipes cost, counted before: so that a plan needs neither torch nor half a minute.

`counted.json` holds what `vc2.train.memory` counted, by the digest of all that a count depends on. `python -m
benchmarks.counted` writes it anew; tests count again and compare. A network, a size or a strategy that is not in it is
not known here, and nothing is guessed: `vc2 train STAGE --dry-run` counts it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from vc2.config import Config, digest
from vc2.model.config import ModelConfig, UNetConfig
from vc2.train.config import Strategy
from vc2.train.fit import Clip, Count, Counts

__all__ = ["COUNTED_FILE", "SHIPPED", "NotCounted", "Recorded"]

COUNTED_FILE = Path(__file__).with_name("counted.json")


class NotCounted(LookupError):
    """This network at this size was not counted before."""


class Recorded:
    """Counts by the digest of what they are of: looked up, and, where there is a `source`, counted once and kept.

    Args:
        entries: What is known, as `counted.json` has it.
        source: Who counts what is not known; None: nobody.
    """

    def __init__(self, entries: Mapping[str, Any], source: Counts | None = None) -> None:
        self.entries = dict(entries)
        self._source = source

    def count_pass(self, config: ModelConfig, strategy: Strategy, clip: Clip, *, precision: str, stills: bool) -> Count:
        """As `Counts` says.

        Raises:
            NotCounted: If it is not known, and nobody counts.
        """
        of = {
            "pass": _plain(config.unet),
            "text": [config.text.context_length, config.autoencoder.downsampling],
            "strategy": _plain(strategy),
            "clip": asdict(clip),
            "how": [precision, stills],
        }
        return Count(**self._take(of, lambda source: asdict(
            source.count_pass(config, strategy, clip, precision=precision, stills=stills)
        )))  # fmt: skip

    def count_encoding(self, config: ModelConfig, clip: Clip) -> Count:
        """As `Counts` says; raises `NotCounted` too."""
        of = {"encoding": [_plain(config.autoencoder), _shape_of_text(config)], "clip": asdict(clip)}
        return Count(**self._take(of, lambda source: asdict(source.count_encoding(config, clip))))

    def count_parameters(
        self, config: UNetConfig, strategy: Strategy, *, stills: bool
    ) -> Mapping[str, tuple[int, int]]:
        """As `Counts` says; raises `NotCounted` too."""
        of = {"parameters": _plain(config), "strategy": _plain(strategy), "how": stills}
        found = self._take(of, lambda source: dict(source.count_parameters(config, strategy, stills=stills)))
        return {group: (learning, frozen) for group, (learning, frozen) in found.items()}

    def count_encoders(self, config: ModelConfig) -> int:
        """As `Counts` says; raises `NotCounted` too."""
        of = {"encoders": [_plain(config.autoencoder), _shape_of_text(config)]}
        return self._take(of, lambda source: source.count_encoders(config))

    def _take(self, of: Mapping[str, Any], count: Any) -> Any:
        name = digest(of)[:16]
        if name not in self.entries:
            if self._source is None:
                raise NotCounted(f"{next(iter(of))} {name} was not counted before")
            self.entries[name] = count(self._source)
        return self.entries[name]


def _plain(config: Config) -> dict[str, Any]:
    """With knobs: activation checkpointing is one, and changes what is counted."""
    return config.model_dump(mode="json")


def _shape_of_text(config: ModelConfig) -> dict[str, Any]:
    return {name: value for name, value in _plain(config.text).items() if name != "seed"}


class _Shipped(Recorded):
    def __init__(self) -> None:
        super().__init__({})

    def _take(self, of: Mapping[str, Any], count: Any) -> Any:
        self.entries = self.entries or _shipped_entries()
        return super()._take(of, count)


@cache
def _shipped_entries() -> dict[str, Any]:
    return json.loads(COUNTED_FILE.read_text())


SHIPPED: Counts = _Shipped()
