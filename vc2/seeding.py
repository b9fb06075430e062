"""Random numbers that depend on what they are for, never on when or where they are drawn.

Every draw names its purpose: `generator(seed, "start frame", key)`. The same names give the same numbers on any number
of workers or ranks, after any restart.
"""

import hashlib

import numpy as np

__all__ = ["derive_seed", "generator"]


def derive_seed(*names: int | str) -> int:
    """A 63-bit seed from a list of names; any change in any name gives an unrelated seed."""
    text = "\x1f".join(f"{type(name).__name__}:{name}" for name in names)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*names: int | str) -> np.random.Generator:
    """A numpy generator for one purpose (Philox: the stream is the same on every platform)."""
    return np.random.Generator(np.random.Philox(derive_seed(*names)))
