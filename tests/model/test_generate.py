from collections.abc import Callable

import numpy as np
import pytest
import torch

from vc2.errors import ConfigError, WeightsError
from vc2.model.autoencoder import Autoencoder
from vc2.model.bundle import VideoModel
from vc2.model.config import (
    AutoencoderConfig,
    ImageConfig,
    ImageTowerConfig,
    ModelConfig,
    ResamplerConfig,
    SamplerConfig,
    ScheduleConfig,
    TextConfig,
    UNetConfig,
)
from vc2.model.generate import (
    as_bytes,
    cautions,
    check_request,
    generate_videos,
    pick_device,
    size_multiple,
    usual_fps,
)
from vc2.model.image import ImageEncoder
from vc2.model.sampler import StepResult, StopSampling, clip_seeds
from vc2.model.schedule import NoiseSchedule
from vc2.model.text import TextEncoder
from vc2.model.unet import UNet3D

TEXT = TextConfig(width=12, heads=2, layers=2, layers_used=1, context_length=8, seed=3)
AUTOENCODER = AutoencoderConfig(block_out_channels=(8, 8), layers_per_block=1, norm_groups=4, scaling_factor=1.0)
IMAGE = ImageConfig(
    tower=ImageTowerConfig(width=16, heads=2, layers=2, image_size=28, patch_size=14, output_dim=8),
    resampler=ResamplerConfig(dim=16, depth=1, heads=2, dim_head=8, num_queries=3, embedding_dim=16, output_dim=12),
)
SAMPLER = SamplerConfig(num_steps=2, guidance_scale=3.0, fps=8)
SIZE = {"frames": 3, "height": 16, "width": 8}


@pytest.fixture
def make_model(make_unet: Callable[..., UNet3D]) -> Callable[..., VideoModel]:
    def make(*, with_image: bool = False) -> VideoModel:
        unet = make_unet(use_image_attention=with_image)
        image = ImageEncoder(IMAGE) if with_image else None
        config = ModelConfig(unet=unet.config, autoencoder=AUTOENCODER, text=TEXT, image=IMAGE if with_image else None)
        schedule = NoiseSchedule(ScheduleConfig())
        return VideoModel(config, unet, schedule, Autoencoder(AUTOENCODER), TextEncoder(TEXT), image=image)

    return make


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(abs(a.astype(int) - b).max())


def test_a_video_is_its_prompt_and_its_seed_whatever_its_company(make_model) -> None:
    model, prompts = make_model(), ["a red circle", "a blue square"]
    pair = generate_videos(model, prompts, clip_seeds(5, 2), sampler=SAMPLER, **SIZE)
    assert pair.shape == (2, 3, 16, 8, 3) and pair.dtype == np.uint8
    alone = generate_videos(model, prompts[1:], [6], sampler=SAMPLER, **SIZE)
    assert difference(alone[0], pair[1]) <= 1
    assert difference(generate_videos(model, prompts[1:], [5], sampler=SAMPLER, **SIZE)[0], pair[1]) > 1


def test_rates_may_differ_by_clip_and_a_negative_prompt_leads_away(make_model) -> None:
    model, prompts = make_model(), ["a red circle"] * 2

    def videos(**changes: object) -> np.ndarray:
        return generate_videos(model, prompts, [1, 1], sampler=SAMPLER, **SIZE, **changes)

    plain = videos()
    assert not difference(videos(fps=8), plain) and not difference(videos(fps=[8]), plain)
    slow, fast = videos(fps=[8, 30])
    assert difference(slow, plain[0]) == 0 and difference(fast, plain[1]) > 1
    assert difference(videos(negative_prompt="noise"), plain) > 1


def test_an_image_decides_what_an_image_to_video_model_shows(make_model) -> None:
    """One for all clips or one for each; of any size."""
    model, prompts = make_model(with_image=True), ["a red circle"] * 2
    light, dark = np.full((40, 30, 3), 230, np.uint8), np.full((40, 30, 3), 20, np.uint8)

    def videos(*images: np.ndarray) -> np.ndarray:
        return generate_videos(model, prompts, [1, 1], sampler=SAMPLER, images=np.stack(images), **SIZE)

    both, one = videos(light, dark), videos(light)
    assert difference(both[0], one[0]) <= 1 and difference(one[0], one[1]) <= 1
    assert difference(both[0], both[1]) > 1


def test_who_looks_on_may_end_it_and_gets_a_video_of_what_there_is(make_model) -> None:
    seen: list[StepResult] = []

    def stop(result: StepResult) -> None:
        seen.append(result)
        raise StopSampling

    assert generate_videos(make_model(), ["x"], [1], sampler=SAMPLER, on_step=stop, **SIZE).shape == (1, 3, 16, 8, 3)
    assert len(seen) == 1


def test_half_precision_gives_nearly_the_same_video(make_model) -> None:
    model = make_model()
    exact, rounded = (
        generate_videos(model, ["a red circle"], [1], sampler=SAMPLER, precision=precision, **SIZE)
        for precision in ("float32", "bfloat16")
    )
    assert difference(exact, rounded) and abs(exact.astype(int) - rounded).mean() < 6


def test_what_does_not_fit_is_said(make_model) -> None:
    model = make_model()
    for changes, words in (
        ({"prompts": []}, "no prompt"),
        ({"seeds": [1, 2]}, "2 seeds for 1 prompts"),
        ({"fps": [1, 2]}, "2 frame rates for 1 prompts"),
        ({"width": 15}, "15 x 16 pixels: the autoencoder needs multiples of 2, for example 16 x 16"),
        ({"width": 10}, "10 x 16 pixels: the network needs multiples of 4, for example 8 x 16"),
        ({"frames": 0}, "frames=0"),
        ({"images": np.zeros((1, 8, 8, 3), np.uint8)}, "text-to-video network"),
    ):
        asked = {
            "prompts": ["x"],
            "seeds": [1] * len(changes.get("prompts", "x")),
            "sampler": SAMPLER,
            **SIZE,
            **changes,
        }
        with pytest.raises(ConfigError, match=words):
            generate_videos(model, **asked)
    with pytest.raises(ConfigError, match="image-to-video network: give it an image"):
        generate_videos(make_model(with_image=True), ["x"], [1], sampler=SAMPLER, **SIZE)


def test_the_released_model_makes_multiples_of_64_pixels() -> None:
    config = ModelConfig()
    assert size_multiple(config) == 64
    check_request(config, frames=16, height=320, width=512, with_image=False)
    with pytest.raises(ConfigError, match="for example 512 x 320"):
        check_request(config, frames=16, height=300, width=500, with_image=False)


def test_what_was_not_trained_is_told() -> None:
    """Other frame counts and rates than those of the training; a single frame is an image."""
    config = ModelConfig(unet=UNetConfig(temporal_length=16))
    assert cautions(config, frames=16) == cautions(config, frames=1, fps=(8,)) == []
    assert cautions(config, frames=8, fps=(8,), told=(8, 9), trained_frames=8) == []
    (said,) = cautions(config, frames=24)
    assert said.startswith("24 frames from a network trained on 16")
    (said,) = cautions(config, frames=16, fps=(28,), told=(8, 9))
    assert said == "fps 28 was never told to this network in training; it knows 8, 9"


@pytest.mark.parametrize(
    ("image", "told", "usual"),
    [
        (False, {}, 28),
        (True, {}, 8),
        (False, {8: 9, 28: 1}, 28),
        (True, {8: 1, 28: 9}, 8),
        (False, {8: 3, 24: 3, 4: 1}, 8),
        (True, {24: 1}, 24),
    ],
)
def test_the_usual_rate_is_the_released_one_if_it_was_told_else_the_one_told_most(
    image: bool, told: dict[int, int], usual: int
) -> None:
    assert usual_fps(UNetConfig(use_image_attention=image), told) == usual


def test_bytes_are_rounded_and_clamped() -> None:
    """-1 is black, 1 is white, what lies beyond is clamped."""
    frames = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).reshape(1, 1, 5, 1, 1).expand(1, 3, 5, 1, 1)
    assert as_bytes(frames)[0, :, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]


def test_a_device_is_one_that_is_here() -> None:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    assert pick_device() == (accelerator or torch.device("cpu")) and pick_device("cpu") == torch.device("cpu")
    for name in ("meta", "gpu", "cuda:99"):
        with pytest.raises(ConfigError, match=f"device={name}"):
            pick_device(name)


def test_latents_that_are_no_numbers_become_no_video(make_model) -> None:
    model = make_model()
    torch.nn.init.constant_(model.unet.conv_out.bias, float("nan"))
    with pytest.raises(WeightsError, match="no numbers: lower the guidance"):
        generate_videos(model, ["a"], [1], sampler=SAMPLER, **SIZE)
