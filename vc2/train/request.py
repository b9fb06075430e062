"""What the parent asks of its ranks: one JSON file, whose path is a rank's only argument."""

from vc2.artifacts import Artifact, Checkpoint, FileEntry, ShardSet
from vc2.config import Config
from vc2.train.attempts import StateRef
from vc2.train.config import Layout, TrainStage

__all__ = [
    "AUTOENCODER",
    "EMA_WEIGHTS",
    "IMAGE_WEIGHTS",
    "LORA",
    "MODEL_CONFIG",
    "RAW_WEIGHTS",
    "TEXT_WEIGHTS",
    "RankRequest",
]

# Names of the files of a checkpoint; readers of checkpoints know them.
RAW_WEIGHTS = "unet.safetensors"
EMA_WEIGHTS = "unet_ema.safetensors"
AUTOENCODER = "autoencoder.safetensors"
TEXT_WEIGHTS = "text.safetensors"  # of an imported model and what is trained from it: others name their text tower
IMAGE_WEIGHTS = "image.safetensors"  # likewise, of an image-to-video model
MODEL_CONFIG = "model.json"
LORA = "lora.safetensors"  # averaged low-rank updates, where those were learnt


class RankRequest(Config):
    """One attempt at a run, fully resolved."""

    stage: TrainStage
    store: str  # URI
    work: str  # folder of this machine
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
