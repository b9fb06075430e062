"""What the ranks of sampling and of scoring share: who starts them, how they are asked, what they compute on."""

import os
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vc2.errors import ConfigError
from vc2.eval.config import SampleStage
from vc2.launch import reporting_to, run_ranks
from vc2.progress import Progress
from vc2.storage import Store, open_store

if TYPE_CHECKING:
    import torch

__all__ = ["Launch", "device_of", "launch_of", "read_job", "run_here", "work_here"]


class Launch(Protocol):
    """Runs `python -m module config_uri` on `world_size` ranks; `vc2.launch.run_ranks` does it on this machine."""

    def __call__(
        self, module: str, config_uri: str, *, world_size: int, work: Path, name: str, progress: Progress
    ) -> None: ...


def launch_of(config: SampleStage, store: Store, folder: str) -> Launch:
    """The launcher that a stage asks for; jobs on a cluster keep what they were asked in a folder of the store."""
    if config.launcher == "local":
        return run_ranks
    return partial(_run_as_job, store=store, folder=folder, device=config.device)


def run_here(module: str, config_uri: str, *, world_size: int, work: Path, name: str, progress: Progress) -> None:
    """A `Launch` of one rank in this process: for many small jobs, whose time would go into starting processes."""
    with reporting_to(progress):
        import_module(module).main(config_uri)


def _run_as_job(
    module: str,
    config_uri: str,
    *,
    world_size: int,
    work: Path,
    name: str,
    progress: Progress,
    store: Store,
    folder: str,
    device: str,
) -> None:
    from vc2.ray_jobs import do_as_job, start_job

    do_as_job(
        f"vc2-{name}",
        Path(config_uri).read_bytes(),
        store,
        f"{folder}/{name}",
        lambda uri, job: start_job(module, uri, world_size=world_size, job_id=job, device=device),
        reached=lambda: _count(store, folder),
        progress=progress,
    )


def _count(store: Store, folder: str) -> int:
    """Videos, records and lines that are there."""
    return sum(not entry.key.startswith(f"{folder}/") for entry in store.list(f"{folder.rpartition('/')[0]}/"))


# ---- the side of the rank ----


def read_job(place: str) -> bytes:
    """What ranks are asked: a file of this machine, or of a store by its URI."""
    if "://" not in place:
        return Path(place).read_bytes()
    folder, _, name = place.rpartition("/")
    return open_store(folder).read(name)


def work_here(asked: str) -> Path:
    """The work folder of this machine: VC2_WORK where that is set, else the one of whoever started the ranks."""
    return Path(os.environ.get("VC2_WORK") or asked)


def device_of(name: str, local_rank: int) -> "torch.device":
    """The device of a rank, set up so that the same work gives the same bits.

    Raises:
        ConfigError: If it is asked for a GPU and there is none.
    """
    import torch

    if name == "cpu":
        torch.set_num_threads(1)  # sums over threads round differently: bits must not depend on how many there are
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device=cuda: no GPU is visible; set device=cpu")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False  # a thousandth of CLIP_Temp is a point and a half
    return torch.device("cuda", local_rank % torch.cuda.device_count())
