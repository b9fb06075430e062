"""What the ranks of sampling and of scoring have in common."""

import torch

from vc2.errors import ConfigError

__all__ = ["device_of"]


def device_of(name: str, local_rank: int) -> torch.device:
    """The device of a rank, set up so that the same work gives the same bits.

    Raises:
        ConfigError: If it is asked for a GPU and there is none.
    """
    if name == "cpu":
        torch.set_num_threads(1)  # sums over threads round differently: bits must not depend on how many there are
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device=cuda: no GPU is visible; set device=cpu")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False  # a thousandth of CLIP_Temp is a point and a half
    return torch.device("cuda", local_rank % torch.cuda.device_count())
