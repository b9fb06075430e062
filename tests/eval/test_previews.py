from fractions import Fraction

import numpy as np
import pytest

from vc2.data.video_files import encode_gif, encode_mp4, read_video
from vc2.eval.previews import LADDER, Preview, Source, previews
from vc2.seeding import generator


def frames(index: int, count: int = 5, height: int = 80, width: int = 256) -> np.ndarray:
    """Waves that move, with grain."""
    ys, xs = np.mgrid[0:height, 0:width]
    grain = generator(5, "previews", index).normal(0, 10, (height, width))
    waves = [128 + 80 * np.sin(xs / 20 + ys / 30 + index + time) + grain for time in range(count)]
    return np.stack(waves).clip(0, 255).astype(np.uint8)[..., None].repeat(3, -1)


def source(index: int, data: bytes | None = None) -> Source:
    found = encode_mp4(frames(index), 8) if data is None else data
    return Source(str(index), len(found), lambda: found)


def in_page(found: dict[str, Preview]) -> int:
    return sum(-(-len(preview.data or b"") // 3) * 4 for preview in found.values())


def test_videos_that_fit_stay_as_they_are() -> None:
    """Below the budget nothing is encoded anew; their size is found where it is asked for."""
    sources = [source(index) for index in range(3)]
    found = previews(sources)
    assert [preview.data for preview in found.values()] == [source.load() for source in sources]
    assert not any(preview.is_copy or preview.width for preview in found.values())
    assert [(p.width, p.height) for p in previews(sources, measure=True).values()] == [(256, 80)] * 3


def test_beyond_the_budget_all_but_the_first_become_small_with_all_their_frames() -> None:
    """Copies are narrow, keep shape, frames and rate, and fit the budget; the first stays as it is."""
    sources = [source(index) for index in range(8)]
    budget = 4 * (sources[0].size // 3 * 4 + 8)
    assert in_page(previews(sources, budget=10**9)) > budget
    found = previews(sources, budget=budget)
    first, *others = found.values()
    assert first.data == sources[0].load() and not first.is_copy
    for preview in others:
        assert preview.is_copy and preview.data is not None
        shown, fps = read_video(preview.data)
        assert shown.shape == (5, 60, LADDER[0][0], 3) == (5, preview.height, preview.width, 3)
        assert fps == Fraction(8)
    assert in_page(found) <= budget


@pytest.mark.parametrize("share", [0.5, 0.02])
def test_the_budget_holds_whatever_it_costs(share: float) -> None:
    """Copies become narrower still; what does not fit even then is left out and said to be."""
    sources = [source(index) for index in range(6)]
    budget = int(share * in_page(previews(sources, budget=10**9)))
    found = previews(sources, budget=budget)
    assert list(found) == [source.id for source in sources] and in_page(found) <= budget
    for preview in found.values():
        assert (preview.data is None) == preview.missing.startswith("not shown: the 0 MiB")


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"", "no known medium"), (encode_mp4(frames(1), 8)[:900], ""), (b"\0" * 500, "no known medium")],
    ids=["empty", "truncated", "zeros"],
)
def test_what_cannot_be_decoded_is_not_shown_and_has_a_reason(data: bytes, words: str) -> None:
    """A damaged file costs only itself."""
    good = source(0)
    found = previews([good, source(1, data)], budget=good.size)
    assert found["0"].data is not None and found["1"].data is None
    assert found["1"].missing.startswith("cannot be shown: ") and words in found["1"].missing


def test_what_browsers_do_not_play_is_encoded_anew() -> None:
    """A GIF becomes an mp4 of its size, however much room there is."""
    gif = encode_gif(frames(2, height=40, width=64), 10)
    found = previews([source(0, gif)])["0"]
    assert found.is_copy and found.data is not None and (found.width, found.height) == (64, 40)
    assert read_video(found.data)[0].shape == (5, 40, 64, 3)


def test_nothing_to_show_is_no_trouble() -> None:
    """No videos, no previews."""
    assert previews([]) == {}
