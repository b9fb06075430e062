"""The shared pass: what it says of strange videos, and that it says the same again, in any order, on any ranks."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.eval.small_weights import small_files
from vc2.artifacts import SampleSet, load_manifest
from vc2.config import Config
from vc2.data.video_files import encode_mp4
from vc2.errors import SourceError
from vc2.eval.config import EvaluateStage, Prompt
from vc2.eval.folder import import_folder
from vc2.eval.formulas import inception_score
from vc2.eval.measure import Line, lines_folder, pooled, rows_key, take_lines
from vc2.eval.measure_rank import main
from vc2.progress import Progress
from vc2.seeding import generator
from vc2.storage import LocalStore

ATTRIBUTES: dict[str, dict[str, Any]] = {
    "moving": {"amplitude": "slow"},
    "still": {"amplitude": "slow", "action": "jogging"},
    "written": {"text": "STOP"},
}
NAMES = ("moving", "still", "written", "one", "two", "seven", "blank")
PROMPTS = tuple(Prompt(id=name, text=f"a video called {name}", attributes=ATTRIBUTES.get(name, {})) for name in NAMES)
METRICS = ("CLIP_Score", "CLIP_Temp", "Face_Consistency", "Flow_Score", "Motion_AC_Score", "Warping_Error")


def texture(height: int = 48, width: int = 80) -> np.ndarray:
    """Something smooth enough to follow."""
    coarse = generator(3, "texture").uniform(0, 255, (height // 4 + 1, width // 4 + 1, 3))
    fine = coarse.repeat(4, 0).repeat(4, 1)[:height, :width]
    for _ in range(3):
        fine = (np.roll(fine, 1, 0) + np.roll(fine, 1, 1) + np.roll(fine, -1, 0) + np.roll(fine, -1, 1) + fine) / 5
    return fine.astype(np.uint8)


def shifted(frames: int, step: int) -> np.ndarray:
    return np.stack([np.roll(texture(), step * number, axis=1) for number in range(frames)])


def make_folder(folder: Path) -> Path:
    folder.mkdir()
    videos = {
        "moving": shifted(8, 2),
        "still": shifted(8, 0),
        "written": shifted(4, 1),
        "one": shifted(1, 0),
        "two": shifted(2, 2),
        "seven": shifted(7, 1)[:, :46, :74],
        "blank": np.zeros((4, 32, 32, 3), np.uint8),
    }
    for name, frames in videos.items():
        (folder / f"{name}.mp4").write_bytes(encode_mp4(frames, 8, crf=0))
    return folder


FILES: dict[str, str] = {}


@pytest.fixture(scope="module", autouse=True)
def small_networks(tmp_path_factory: pytest.TempPathFactory) -> None:
    FILES.update(small_files(tmp_path_factory.mktemp("networks")))


def stage(**changes: Any) -> EvaluateStage:
    return EvaluateStage(prompts=PROMPTS, metrics=METRICS, flow="dis", batch=3, files=FILES).evolve(**changes)


def here(module: str, job: str, *, world_size: int, work: Path, name: str, progress: Progress) -> None:
    """A launcher that runs each rank in this process, one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        for rank in range(world_size):
            patch.setenv("RANK", str(rank))
            patch.setenv("WORLD_SIZE", str(world_size))
            main(job)


def nobody(*_: object, **__: object) -> None:
    raise AssertionError("nothing was left to measure")


class Setting(Config):
    store: Any
    work: Any
    samples: SampleSet

    def lines(self, config: EvaluateStage, launch: Any = here) -> list[Line]:
        return take_lines(config, self.store, self.work, self.samples, launch=launch)


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    store = LocalStore(tmp_path / "store")
    samples = import_folder(make_folder(tmp_path / "videos"), PROMPTS, store)
    yield Setting(store=store, work=tmp_path / "work", samples=samples)


def by_name(lines: list[Line], metric: str, mode: str = "compat") -> dict[str, Line]:
    return {line.id: line for line in lines if line.metric == metric and line.mode == mode}


def test_every_video_has_a_value_or_a_reason_and_means_are_over_those_with_a_value(setting: Setting) -> None:
    """One-frame, two-frame, 7-frame, odd-sized and blank videos among them."""
    config = stage()
    lines = setting.lines(config)
    assert all((line.value is None) == bool(line.reason) for line in lines)
    for metric in ("CLIP_Temp", "Face_Consistency", "Flow_Score", "Warping_Error"):
        for mode in ("compat", "fixed"):
            found = by_name(lines, metric, mode)
            assert set(found) == set(NAMES)
            assert found["one"].reason == "needs two frames, has 1"
            assert [name for name, line in found.items() if line.value is None] == ["one"]
            value, count, without = pooled(metric, mode, lines, setting.store, lines_folder(config, setting.samples))
            assert count == 6 and without == {"needs two frames, has 1": 1} and value is not None
    assert set(by_name(lines, "Motion_AC_Score")) == {"moving", "still"}  # the prompts with an amplitude
    assert {line.frames for line in by_name(lines, "CLIP_Score").values()} == {1, 2, 4, 7, 8}


def test_a_still_video_has_no_flow_no_warping_error_and_full_consistency(setting: Setting) -> None:
    lines = setting.lines(stage())
    for mode in ("compat", "fixed"):
        values = {name: by_name(lines, name, mode)["still"].value for name in METRICS if name != "CLIP_Score"}
        assert values["Flow_Score"] == pytest.approx(0, abs=1e-3)
        assert values["Warping_Error"] == pytest.approx(0, abs=1e-5)
        assert [values["CLIP_Temp"], values["Face_Consistency"]] == pytest.approx([1, 1], abs=1e-6)


def test_a_translated_texture_has_its_known_flow(setting: Setting) -> None:
    """Two pixels a frame, as far as what leaves and enters at the sides lets an estimator see it."""
    flow = by_name(setting.lines(stage()), "Flow_Score", "fixed")["moving"].value
    assert flow == pytest.approx(2, rel=0.15)


def test_the_same_folder_gives_the_same_bytes_and_nothing_is_measured_twice(setting: Setting) -> None:
    first = setting.lines(stage())
    assert setting.lines(stage(), nobody) == first
    assert setting.lines(stage(prompts=PROMPTS[::-1]), nobody) == first  # order does not matter
    assert setting.lines(stage(world_size=3, batch=5), nobody) == first


def test_ranks_and_kills_change_no_bit(setting: Setting, tmp_path: Path) -> None:
    """As one rank, as three, and with some videos' lines lost or torn in between."""
    first = setting.lines(stage())
    prefix = lines_folder(stage(), setting.samples)
    setting.store.delete(f"{prefix}/seven.jsonl")
    setting.store.write(f"{prefix}/moving.jsonl", setting.store.read(f"{prefix}/moving.jsonl")[:-20])
    assert setting.lines(stage(world_size=3)) == first
    other = Setting(store=LocalStore(tmp_path / "other"), work=setting.work, samples=setting.samples)
    other = Setting(
        store=other.store, work=other.work, samples=import_folder(tmp_path / "videos", PROMPTS, other.store)
    )
    assert other.lines(stage(world_size=3)) == first


def test_another_metric_adds_to_what_is_there_and_another_prompt_does_not_stand(setting: Setting) -> None:
    few = setting.lines(stage(metrics=("CLIP_Temp",), mode="compat"))
    asked: list[tuple[str, ...]] = []

    def watched(module: str, job: str, **more: Any) -> None:
        asked.extend(tuple(task["wanted"]) for task in json.loads(Path(job).read_text())["tasks"])
        here(module, job, **more)

    more = setting.lines(stage(metrics=("CLIP_Temp", "CLIP_Score"), mode="compat"), watched)
    assert set(asked) == {("CLIP_Score/compat",)} and [line for line in more if line.metric == "CLIP_Temp"] == few
    asked.clear()
    reworded = (PROMPTS[0].evolve(text="something else"), *PROMPTS[1:])
    setting.lines(stage(metrics=("CLIP_Score",), mode="compat", prompts=reworded), watched)
    assert asked == [("CLIP_Score/compat",)]


def test_what_is_pooled_over_all_videos_comes_from_files_of_each(setting: Setting) -> None:
    """The Inception score of a set is that of all its frames in the order of their videos, in both modes."""
    config = stage(metrics=("IS",), prompts=PROMPTS[4:7])
    lines, prefix = setting.lines(config), lines_folder(config, setting.samples)
    assert {line.mode for line in lines} == {"compat"} and all(line.value is not None for line in lines)
    names = sorted(prompt.id for prompt in PROMPTS[4:7])
    assert [line.id for line in lines] == names
    rows = [np.load(io.BytesIO(setting.store.read(rows_key(prefix, line)))) for line in lines]
    for mode in ("compat", "fixed"):
        value, count, _ = pooled("IS", mode, lines, setting.store, prefix)
        assert value == pytest.approx(inception_score(np.concatenate(rows))[0]) and count == 3
    setting.store.delete(rows_key(prefix, lines[0]))  # a line without its rows does not stand
    assert setting.lines(config) == lines and setting.store.entry(rows_key(prefix, lines[0])) is not None
    few = [line for line in lines if line.id == "two"]
    assert pooled("IS", "compat", few, setting.store, prefix)[2] == {"needs 10 frames in all, there are 2": 1}


def test_two_at_once_with_other_metrics_both_end_well(setting: Setting) -> None:
    """The second begins and ends while the first has read what there is and not yet written."""
    first, second = stage(metrics=("CLIP_Temp",)), stage(metrics=("Flow_Score",))
    alone = take_lines(second, setting.store, setting.work, setting.samples, repeat=1, launch=here)

    def interrupted(module: str, job: str, **more: Any) -> None:
        assert setting.lines(second)
        here(module, job, **more)

    assert {line.metric for line in setting.lines(first, interrupted)} == {"CLIP_Temp"}
    assert setting.lines(second, nobody) == alone


def test_weights_that_cannot_be_loaded_cost_only_what_needs_them(setting: Setting, tmp_path: Path) -> None:
    """With a reason, which is no answer for ever: with good weights the metric is measured."""
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"no weights")
    spoilt = stage(metrics=("CLIP_Temp", "Flow_Score"), mode="compat", files=FILES | {"clip-vit-b-32": str(bad)})
    lines = setting.lines(spoilt)
    assert all("cannot be measured: " in line.reason for line in by_name(lines, "CLIP_Temp").values())
    assert by_name(lines, "Flow_Score")["moving"].value is not None
    good = setting.lines(spoilt.evolve(files=FILES))
    assert by_name(good, "CLIP_Temp")["moving"].value is not None


def test_repeating_measures_anew(setting: Setting) -> None:
    config, asked = stage(metrics=("Flow_Score",)), []

    def watched(module: str, job: str, **more: Any) -> None:
        asked.append(job)
        here(module, job, **more)

    first = take_lines(config, setting.store, setting.work, setting.samples, launch=watched)
    again = take_lines(config, setting.store, setting.work, setting.samples, repeat=1, launch=watched)
    assert first == again and len(asked) == 2


def test_real_ranks_measure_the_same(setting: Setting) -> None:
    from vc2.launch import run_ranks

    config = stage(metrics=("Warping_Error",), mode="compat", world_size=2)
    with_ranks = setting.lines(config, run_ranks)
    prefix = lines_folder(config, setting.samples)
    for name in NAMES:
        setting.store.delete(f"{prefix}/{name}.jsonl")
    assert setting.lines(config, here) == with_ranks


# ---- folders ----


def test_files_are_videos_unreadable_second_or_of_no_prompt(tmp_path: Path) -> None:
    """In = used + rejected, each with its reason; what has no video is named."""
    folder, store = make_folder(tmp_path / "videos"), LocalStore(tmp_path / "store")
    (folder / "still.mp4").write_bytes((folder / "moving.mp4").read_bytes()[:400])
    (folder / "two-1.mp4").write_bytes((folder / "moving.mp4").read_bytes())
    (folder / "stranger.mp4").write_bytes(b"no video at all")
    (folder / "seven.mp4").rename(folder / "seven_seed3.mp4")
    (folder / "blank.mp4").unlink()
    (folder / "notes.txt").write_text("not looked at")
    samples = import_folder(folder, PROMPTS, store)
    manifest = load_manifest(store, samples.prefix)
    counts = manifest.counts
    kept = ("videos", "unreadable", "second_videos", "of_no_prompt")
    assert counts["files"] == sum(counts[name] for name in kept)
    assert [counts[name] for name in (*kept, "prompts_without_video")] == [5, 1, 1, 1, 1]
    assert list(manifest.facts["unreadable"]) == ["still"] and list(manifest.facts["missing"]) == ["blank"]
    assert import_folder(folder, PROMPTS, store) == samples
    lines = take_lines(stage(metrics=("CLIP_Temp",)), store, tmp_path, samples, launch=here)
    assert by_name(lines, "CLIP_Temp")["still"].reason.startswith("unreadable: ")
    assert "blank" not in by_name(lines, "CLIP_Temp")


def test_a_folder_without_videos_of_the_prompts_says_what_names_it_has(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    with pytest.raises(SourceError, match="no such folder"):
        import_folder(tmp_path / "nowhere", PROMPTS, store)
    (tmp_path / "videos").mkdir()
    with pytest.raises(SourceError, match="none of 0 videos"):
        import_folder(tmp_path / "videos", PROMPTS, store)
    (tmp_path / "videos" / "a cat.mp4").write_bytes(b"")
    with pytest.raises(SourceError, match=r"called like 'a cat.mp4', prompts have ids like 'moving'"):
        import_folder(tmp_path / "videos", PROMPTS, store)
    (tmp_path / "videos" / "a cat.mp4").rename(tmp_path / "videos" / "one.mp4")
    with pytest.raises(SourceError, match=r"none of 1 videos can be read \(one.mp4: not_media"):
        import_folder(tmp_path / "videos", PROMPTS, store)
