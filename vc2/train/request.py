"""What is asked of ranks: one JSON document, whose path or URI is a rank's only argument.

Ranks of any machine find it in the store: the attempt that they work on holds it.
"""

import json
import os
from pathlib import Path
from typing import Self

from vc2.artifacts import Artifact, Checkpoint, FileEntry, ShardSet
from vc2.config import Config
from vc2.errors import StoreError
from vc2.storage import open_store
from vc2.train.attempts import StateRef
from vc2.train.config import Layout, TrainStage

__all__ = [
    "AUTOENCODER",
    "EMA_WEIGHTS",
    "IMAGE_WEIGHTS",
    "LORA",
    "MODEL_CARD",
    "MODEL_CONFIG",
    "RAW_WEIGHTS",
    "TEXT_WEIGHTS",
    "RankRequest",
    "Request",
]

# Names of the files of a checkpoint; readers of checkpoints know them.
RAW_WEIGHTS = "unet.safetensors"
EMA_WEIGHTS = "unet_ema.safetensors"
AUTOENCODER = "autoencoder.safetensors"
TEXT_WEIGHTS = "text.safetensors"  # of an imported model and what is trained from it: others name their text tower
IMAGE_WEIGHTS = "image.safetensors"  # likewise, of an image-to-video model
MODEL_CONFIG = "model.json"
MODEL_CARD = "README.md"
LORA = "lora.safetensors"  # averaged low-rank updates, where those were learnt


class Request(Config):
    """What any ranks are asked: at least where the store is, and which folder of their machine they may use."""

    store: str  # URI
    work: str  # folder of the machine that asks; on any other one VC2_WORK says otherwise

    @classmethod
    def load(cls, place: str) -> Self:
        """Read a request: a file of its own, or the attempt that holds it, by path or `s3://` URI.

        On a machine where VC2_WORK is set, that is the folder for what ranks pass on and keep.

        Raises:
            StoreError: If there is none.
        """
        try:
            said = json.loads(_read(place))
            request = cls.model_validate(said.get("request", said))
        except (KeyError, OSError, ValueError) as error:
            raise StoreError(f"{place}: no request to ranks ({str(error).splitlines()[0]})") from None
        return request.evolve(work=os.environ.get("VC2_WORK") or request.work)


class RankRequest(Request):
    """One attempt at a run, fully resolved."""

    stage: TrainStage
    fingerprint: str
    attempt: int
    start: StateRef | None  # the state to resume from
    layout: Layout
    videos: tuple[ShardSet, ...]
    images: tuple[ShardSet, ...]
    autoencoder: FileEntry  # in the store
    start_from: Checkpoint | None
    inputs: dict[str, Artifact]
    repeat: int = 0

    @property
    def of_stills(self) -> bool:
        """Whether the run sees images alone."""
        return not self.videos or self.stage.image_share == 1.0


def _read(place: str) -> bytes:
    if "://" not in place:
        return Path(place).read_bytes()
    folder, _, name = place.rpartition("/")
    return open_store(folder).read(name)
