"""Looking at a video: what is shared between metrics is computed once, in parts, and a lack costs only itself."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.eval.networks.test_references import Sketcher
from tests.eval.small_weights import save_clip
from tests.eval.test_measure import Setting, by_name, here, nobody, shifted, texture
from vc2.data.decode import Decoder
from vc2.data.video_files import encode_mp4
from vc2.errors import PretrainedMissing
from vc2.eval.config import EvaluateStage, Prompt
from vc2.eval.folder import import_folder
from vc2.eval.formulas import NoValue
from vc2.eval.look import Look, Networks, Reading, read
from vc2.eval.measure import measure
from vc2.eval.metrics import Video
from vc2.eval.networks.clip import Clip
from vc2.eval.networks.flow import DisFlow
from vc2.eval.networks.references import make_references
from vc2.storage import LocalStore

PROMPTS = tuple(Prompt(id=name, text=f"a video called {name}") for name in ("first", "second"))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_clip(tmp_path_factory.mktemp("networks")))


def stage(**changes: Any) -> EvaluateStage:
    return EvaluateStage(prompts=PROMPTS, flow="dis").evolve(**changes)


def look(frames: np.ndarray, prompt: Prompt = PROMPTS[0], **changes: Any) -> Look:
    return Look(prompt, frames, 8.0, Networks(stage(**changes), CPU))


def counted(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, calls: Counter[str]) -> None:
    """Count the calls of a method, which works as before."""
    method: Callable[..., Any] = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[f"{owner.__name__}.{name}"] += 1
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


# ---- parts ----


@pytest.mark.parametrize("batch", [1, 2, 3, 6])
def test_flow_in_parts_is_flow_in_one(batch: int) -> None:
    """Six pairs of frames of an odd size, a few at a time or together: the same lengths and warping errors."""
    frames = np.tile(shifted(7, 2), (2, 2, 1))[:, :93, :150]
    whole, parts = look(frames), look(frames, batch=batch)
    assert parts.flow() == whole.flow() and len(whole.flow().motions) == 6
    assert parts.flow().padded_length != parts.flow().length  # with the edge that fills up to 8, and without
    for mode in ("compat", "fixed"):
        assert parts.warping_errors(mode) == whole.warping_errors(mode) and len(whole.warping_errors(mode)) == 6


@pytest.mark.parametrize(("frames", "batch"), [(2, 1), (2, 9), (7, 3), (8, 3), (5, 4)])
def test_pairs_come_once_each_and_in_order(frames: int, batch: int) -> None:
    """No part has more pairs than the batch; put together they are all neighbours."""
    video = np.arange(frames * 3).reshape(frames, 1, 1, 3)
    parts = look(shifted(1, 0), batch=batch).windows(video)
    assert all(2 <= len(part) <= batch + 1 for part in parts)
    assert (np.concatenate([part[:-1] for part in parts]) == video[:-1]).all()
    assert (np.concatenate([part[1:] for part in parts]) == video[1:]).all()


def test_one_frame_has_no_pairs() -> None:
    """What needs a pair says so; it is a reason, not an error."""
    one = look(texture()[None])
    with pytest.raises(NoValue, match="needs two frames, has 1"):
        one.flow()
    assert read("Flow_Score", "fixed", one) == Reading(None, 1, "needs two frames, has 1")


# ---- once ----


@pytest.mark.parametrize("value", [3, None, ()])
def test_a_thing_is_computed_once(value: Any) -> None:
    """Whatever comes out; another key is another thing."""
    seen, asked = look(texture()[None]), []

    def compute() -> Any:
        asked.append(1)
        return value

    assert seen.once("a", compute) is seen.once("a", compute) is value and len(asked) == 1
    seen.once(("a", "fixed"), compute)
    assert len(asked) == 2


def test_metrics_share_frames_embeddings_and_flow(clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A video is decoded once; CLIP sees it once for each of three preparations; flow is estimated once; networks are
    loaded once for all videos. In the second run nothing at all is done."""
    (tmp_path / "videos").mkdir()
    for prompt in PROMPTS:
        (tmp_path / "videos" / f"{prompt.id}.mp4").write_bytes(encode_mp4(shifted(4, 1), 8, crf=0))
    store = LocalStore(tmp_path / "store")
    samples = import_folder(tmp_path / "videos", PROMPTS, store)
    setting, calls = Setting(store=store, work=tmp_path / "work", samples=samples), Counter[str]()
    for owner, name in ((Decoder, "frames"), (Clip, "load"), (Clip, "frames"), (DisFlow, "along")):
        counted(monkeypatch, owner, name, calls)
    metrics = ("CLIP_Score", "CLIP_Temp", "Face_Consistency", "Flow_Score", "temporal_flickering")
    config = stage(metrics=metrics, files={"clip-vit-b-32": clip})
    lines = setting.lines(config, here)
    assert len(lines) == len(PROMPTS) * (2 * len(metrics) - 1) and not any(line.reason for line in lines)
    assert calls == {"Decoder.frames": 2, "Clip.load": 1, "Clip.frames": 2 * 3, "DisFlow.along": 2}
    assert setting.lines(config, nobody) == lines


def test_flow_that_both_modes_see_alike_is_estimated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Substitute flow has no flaw to keep, so both warping errors are one; both dynamic degrees, too, but of a video of
    two frames, for which they differ."""
    calls = Counter[str]()
    counted(monkeypatch, DisFlow, "along", calls)
    for frames, expected in ((shifted(4, 2), 1 + 1), (shifted(2, 2), 1 + 2)):
        calls.clear()
        seen = look(frames)
        for name in ("Warping_Error", "dynamic_degree"):
            assert [read(name, mode, seen).value for mode in ("compat", "fixed")].count(None) == 0
        assert calls["DisFlow.along"] == expected
    degrees = [read("dynamic_degree", mode, look(shifted(2, 0))).value for mode in ("compat", "fixed")]
    assert degrees == [1, 0]


# ---- what is lacking ----


def test_a_video_that_fails_to_decode_counts_as_published(tmp_path: Path) -> None:
    """Its header is whole and its end is cut off, which is seen when it is decoded: a reason, as for any other."""
    (tmp_path / "videos").mkdir()
    for prompt, end in zip(PROMPTS, (None, -10), strict=True):
        (tmp_path / "videos" / f"{prompt.id}.mp4").write_bytes(encode_mp4(shifted(8, 1), 8, crf=0)[:end])
    store = LocalStore(tmp_path / "store")
    samples = import_folder(tmp_path / "videos", PROMPTS, store)
    assert samples.counts["unreadable"] == 0
    setting = Setting(store=store, work=tmp_path / "work", samples=samples)
    lines = setting.lines(stage(metrics=("Flow_Score", "temporal_flickering")), here)
    for line in lines:
        assert line.reason.startswith("unreadable: ") == (line.id == "second") == (line.value is None)
    assert (
        by_name(lines, "Flow_Score")["second"].frames == 0
        and setting.lines(stage(metrics=("Flow_Score", "temporal_flickering")), nobody) == lines
    )


def test_weights_given_by_path_are_those_that_are_opened(tmp_path: Path) -> None:
    """Also in place of what a package brings."""
    for name, network, package in (("rapidocr", "reader", "rapidocr"), ("dlib-faces", "dlib_faces", "dlib")):
        pytest.importorskip(package, reason=f"{package} is not installed")
        with pytest.raises(PretrainedMissing, match=str(tmp_path)):
            getattr(Networks(stage(files={name: str(tmp_path)}), CPU), network)


def test_reference_images_that_cannot_be_used_cost_their_prompt_alone(clip: str, tmp_path: Path) -> None:
    """None, of other words, spoilt: a reason each; the next prompt is measured. What is spoilt is asked again."""
    texts = {"other": "something else", "spoilt": "a video called spoilt", "first": PROMPTS[0].text}
    make_references(Sketcher(), texts, tmp_path / "references")
    Image.new("RGB", (8, 8)).save(tmp_path / "references" / "spoilt" / "2.png")
    prompts = [Prompt(id=name, text=f"a video called {name}") for name in ("none", "other", "spoilt", "first")]
    networks = Networks(stage(files={"clip-vit-b-32": clip}, references=str(tmp_path / "references")), CPU)
    videos = [Video(prompt.id, 8.0, lambda: shifted(2, 1)) for prompt in prompts]
    for mode in ("compat", "fixed"):
        found = measure("SD_Score", videos, prompts, mode, networks)
        assert found["none"].reason == "no reference images of this prompt"
        assert found["other"].reason == "the reference images were painted of other words"
        assert found["spoilt"].reason.startswith("the reference images cannot be used: spoilt/2.png: sha256")
        assert found["first"].value is not None
        assert [found[prompt.id].passing for prompt in prompts] == [False, False, True, False]


def test_persons_without_photographs_are_told_without_the_folder(tmp_path: Path) -> None:
    """Nobody of that name, a damaged file, nobody's face on it: reasons that are the same on any machine."""
    pytest.importorskip("dlib", reason="dlib is not installed (dlib-bin)")
    for person in ("Blank Face", "Damaged"):
        (tmp_path / person).mkdir()
        Image.new("RGB", (64, 64)).save(tmp_path / person / "a.png")
    (tmp_path / "Damaged" / "a.png").write_bytes(b"no picture")
    prompts = [Prompt(id=name.split()[0], text="x", attributes={"celebrity": name})
               for name in ("Nobody", "Damaged", "Blank Face")]  # fmt: skip
    videos = [Video(prompt.id, 8.0, lambda: shifted(2, 1)) for prompt in prompts]
    found = measure("Celebrity_ID_Score", videos, prompts, "fixed", Networks(stage(photos=str(tmp_path)), CPU))
    said = [found[prompt.id].reason for prompt in prompts]
    assert said[0] == "no photographs of 'Nobody'; there are some of blank face, damaged"
    assert said[1].startswith("Damaged/a.png: ") and said[2].startswith("no face is found in any of 1 photographs")
    assert not any(str(tmp_path) in reason for reason in said)
