"""Entry of a rank that outlives its starter: `vc2.train.rank`, whose first rank also keeps the attempt's heartbeat."""

from contextlib import nullcontext

from vc2.launch import run_rank, this_rank
from vc2.storage import open_store
from vc2.train import rank
from vc2.train.attempts import Heartbeat, Run
from vc2.train.request import RankRequest

__all__ = ["main"]


def main(request_uri: str) -> None:
    """Train as the request says."""
    request = RankRequest.load(request_uri)
    run = Run(open_store(request.store), request.stage.name, request.fingerprint)
    is_first = this_rank().is_first
    with Heartbeat(run, request.attempt, request.stage.heartbeat_seconds) if is_first else nullcontext():
        rank.main(request_uri)


if __name__ == "__main__":
    run_rank(main)
