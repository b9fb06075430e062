"""Which rank keeps the others waiting.

In training by steps all ranks are as slow as the slowest, and their own clocks do not show it: the fast ones wait
inside the reduction. So each rank times its forward passes, which wait for nobody; a rank that is slow line after line
is named with its host.
"""

import statistics
from collections.abc import Sequence

__all__ = ["Stragglers"]

SLOW = 1.25  # times the median
LINES = 3  # in a row


class Stragglers:
    """Watches the seconds that ranks need for the same work.

    Args:
        hosts: Host of each rank.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._behind = [0] * len(hosts)

    def look(self, what: str, seconds: Sequence[float]) -> list[str]:
        """A sentence for every rank that has become a straggler with this line.

        Args:
            what: The work that was timed, for the sentence.
            seconds: By rank.
        """
        found = []
        median = statistics.median(seconds)
        for rank, (host, taken) in enumerate(zip(self._hosts, seconds, strict=True)):
            self._behind[rank] = self._behind[rank] + 1 if taken > SLOW * median else 0
            if self._behind[rank] == LINES:
                found.append(
                    f"rank {rank} on {host} is slow: its {what} took {taken:.3g} s, the median rank's {median:.3g} s, "
                    f"for the {LINES}rd line in a row; look at its GPU's clocks and temperature, and at its neighbours"
                )
        return found
