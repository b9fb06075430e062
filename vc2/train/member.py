"""One of the ranks that somebody else has started: by Slurm, the DeepSpeed launcher, or torchrun by hand.

All ranks make the same call. The first one does what a starter does (finds the finished run, waits for a living one,
claims the next attempt) and tells the others over the process group; then all do the work of a rank, here.
"""

import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

from vc2.errors import LaunchFailed, Preempted, Vc2Error
from vc2.failures import rank_error
from vc2.launch import end_rank, reporting_to, this_rank
from vc2.progress import Progress, silent
from vc2.train import rank as training
from vc2.train.config import TrainStage
from vc2.train.engine import device_of, join_ranks

__all__ = ["Member"]

T = TypeVar("T")

COMMIT_SECONDS = 1800.0  # that the first rank may take over the checkpoint when training is done


class Member:
    """This process among its ranks; they have met when it is made.

    Raises:
        ConfigError: If a GPU is asked for and there is none.
    """

    def __init__(self, config: TrainStage) -> None:
        self.rank = this_rank()
        join_ranks(device_of(config, self.rank.local_rank), config.hang_seconds)

    def decided(self, decide: Callable[[], T]) -> T:
        """What the first rank decides, on every rank; its error too.

        Args:
            decide: Called on the first rank alone.
        """
        told: list[Any] = [None, None]  # a decision, or an error
        if self.rank.is_first:
            try:
                told[0] = decide()
            except Vc2Error as error:
                told[1] = (type(error), str(error))
            except Exception as error:  # the others must not wait for a rank that is gone
                told[1] = (LaunchFailed, f"rank 0: {type(error).__name__}: {error}")
                traceback.print_exc()
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(told)
        if told[1] is not None:
            kind, message = told[1]
            raise kind(message)
        return told[0]

    def work(
        self,
        request_uri: str,
        beating: AbstractContextManager[object],
        *,
        ended: Callable[[Vc2Error], None],
        progress: Progress,
    ) -> None:
        """Do this rank's part of an attempt. A failure ends the process: the ranks that are left cannot go on.

        Args:
            request_uri: Path or URI of the request.
            beating: Entered by the first rank meanwhile.
            ended: Told by the first rank what the attempt ended by.
            progress: Told by the first rank about steps.

        Raises:
            Preempted: If the ranks were asked to stop.
        """
        try:
            with reporting_to(progress if self.rank.is_first else silent):
                with beating if self.rank.is_first else nullcontext():
                    training.main(request_uri)
        except Preempted as stop:
            if self.rank.is_first:
                ended(stop)
            raise
        except Exception as error:
            if self.rank.is_first:
                told = rank_error(error, self.rank.rank)
                ended(LaunchFailed(told.message, told.kind))
            end_rank(error)

    def waited_for(self, find: Callable[[], T | None]) -> T:
        """What the first rank leaves in the store, as soon as it is there.

        Raises:
            LaunchFailed: If it does not come.
        """
        until = time.monotonic() + COMMIT_SECONDS
        while time.monotonic() < until:
            if (found := find()) is not None:
                return found
            time.sleep(1.0)
        raise LaunchFailed(f"the first rank has left no checkpoint within {COMMIT_SECONDS:.0f} s; its log says why")
