"""Who sees what, when, and on which side: a function of the study and the rater, the same here and in the page.

Every draw is sha256 of "<order seed>/<rater>/<purpose>/<id>", in hex; things are drawn into order by sorting them by it
(and by their id, should two draws be equal). `study.js` says the same once more.

*Sides.* The matchups of a pair of models are listed in twos, and in one of the two the models stand in the opposite
order (`build`). Sides are changed, by one draw, in both of a two or in neither: so every rater sees each model as often
on the left as on the right, up to the odd matchup of a pair, though neither page nor order knows models.

*Repeats.* Drawn from the first third of a rater's matchups, mixed into the last third, sides changed: between the two
showings lies at least a third.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Matchup", "Trial", "trials_of"]


@dataclass(frozen=True, slots=True)
class Matchup:
    """Two videos of one prompt, as the page lists them."""

    id: str
    caption: str
    videos: tuple[str, str]  # file names
    twos: str  # shared with the matchup whose sides are changed together with this one's
    is_attention: bool = False  # the same video twice


@dataclass(frozen=True, slots=True)
class Trial:
    """One showing of a matchup."""

    matchup: str
    left: str  # file name
    right: str
    is_repeat: bool = False


def trials_of(
    order_seed: str, rater: str, matchups: Sequence[Matchup], *, repeats: float, most: int | None = None
) -> list[Trial]:
    """All that one rater sees, in order.

    Args:
        order_seed: Of the study.
        rater: Id of the rater.
        matchups: Of the study.
        repeats: Share of matchups that are shown again.
        most: Matchups that this rater sees, by whole twos, beside those of attention; None: all.
    """

    def draw(purpose: str, name: str) -> str:
        return hashlib.sha256(f"{order_seed}/{rater}/{purpose}/{name}".encode()).hexdigest()

    def drawn(purpose: str, names: Sequence[str]) -> list[str]:
        return sorted(names, key=lambda name: (draw(purpose, name), name))

    by_id = {matchup.id: matchup for matchup in matchups}
    members: dict[str, list[str]] = {}
    for matchup in matchups:
        if not matchup.is_attention:
            members.setdefault(matchup.twos, []).append(matchup.id)
    chosen: list[str] = []
    for twos in drawn("choice", list(members)):
        if most is None or len(chosen) < most:
            chosen += members[twos]
    order = drawn("order", [*chosen, *(matchup.id for matchup in matchups if matchup.is_attention)])
    third = len(order) // 3
    wanted = min(third, math.floor(repeats * len(chosen) + 0.5))
    early = [name for name in order[:third] if not by_id[name].is_attention]
    again = set(drawn("repeat", early)[:wanted])
    late = [(draw("late", name), name, False) for name in order[len(order) - third :]]
    late += [(draw("again", name), name, True) for name in again]

    trials = []
    for name, is_repeat in [
        *((name, False) for name in order[: len(order) - third]),
        *((name, is_repeat) for _, name, is_repeat in sorted(late)),
    ]:
        left, right = by_id[name].videos
        is_changed = int(draw("sides", by_id[name].twos)[0], 16) % 2 == 1
        if is_changed != is_repeat:
            left, right = right, left
        trials.append(Trial(name, left, right, is_repeat))
    return trials
