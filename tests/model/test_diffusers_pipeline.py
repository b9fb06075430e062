import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDIMScheduler, DiffusionPipeline, TextToVideoSDPipeline
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.utils import dynamic_modules_utils
from PIL import Image
from torch import nn

from vc2.errors import ConfigError, WeightsError
from vc2.model.autoencoder import Autoencoder
from vc2.model.bundle import VideoModel
from vc2.model.config import (
    AutoencoderConfig,
    ImageConfig,
    ImageTowerConfig,
    LoraConfig,
    ModelConfig,
    ResamplerConfig,
    SamplerConfig,
    ScheduleConfig,
    TextConfig,
    UNetConfig,
)
from vc2.model.diffusers_components import VideoCrafter2Scheduler
from vc2.model.diffusers_pipeline import VideoCrafter2Pipeline, export_full, import_full
from vc2.model.generate import generate_videos
from vc2.model.image import ImageEncoder
from vc2.model.lora import add_lora, load_lora, lora_names, merge_lora, save_lora
from vc2.model.sampler import ClipNoise, ddim_plan, ddim_step, sample
from vc2.model.schedule import NoiseSchedule
from vc2.model.stock import export_stock
from vc2.model.text import TextEncoder
from vc2.model.unet import UNet3D

UNET = UNetConfig(
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(1,),
    num_head_channels=8,
    context_dim=12,
    norm_groups=4,
)
AUTOENCODER = AutoencoderConfig(block_out_channels=(4, 8), layers_per_block=1, norm_groups=4)
TEXT = TextConfig(width=12, heads=2, layers=3, layers_used=2, seed=3)
IMAGE = ImageConfig(
    tower=ImageTowerConfig(width=16, heads=2, layers=1, image_size=28, patch_size=14, output_dim=8),
    resampler=ResamplerConfig(dim=8, depth=1, heads=2, dim_head=4, num_queries=3, embedding_dim=16, output_dim=12),
)
SIZE = {"height": 8, "width": 12, "num_frames": 2, "num_inference_steps": 4}


def new_model(**changes: Any) -> VideoModel:
    """A small model, all of whose parameters are drawn, those that begin at zero too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet3D(UNET.evolve(**changes)).eval()
        for parameter in unet.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        image = ImageEncoder(IMAGE) if unet.config.use_image_attention else None
        autoencoder, text = Autoencoder(AUTOENCODER), TextEncoder(TEXT)
    config = ModelConfig(unet=unet.config, autoencoder=AUTOENCODER, text=TEXT, image=IMAGE if image else None)
    return VideoModel(config, unet, NoiseSchedule(config.schedule), autoencoder, text, {8: 3, 24: 1}, image)


@pytest.fixture(scope="module")
def model() -> VideoModel:
    """Shared: not to be changed."""
    return new_model()


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(model: VideoModel) -> VideoCrafter2Pipeline:
    """Shared: not to be changed."""
    return quiet(VideoCrafter2Pipeline.from_model(model))


def ours(
    model: VideoModel, prompts: list[str], seeds: list[int], fps: Any = 8, negative: str = "", **options: Any
) -> torch.Tensor:
    """Latents of our own sampler, called by hand."""
    noise = ClipNoise(seeds, (4, 2, 4, 6))
    config = SamplerConfig(**({"num_steps": 4} | options))
    text, uncond = model.text.encode(prompts), model.text.encode([negative])
    return sample(model.unet, model.schedule, noise.start(), text, uncond, config, fps, noise)


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal but for the last digits of the text tower, which guidance blows up."""
    return bool((found - expected).abs().max() < 2e-4 * expected.abs().max())


@pytest.mark.parametrize(
    "options", [{}, {"solver": "dpm++"}, {"guidance_rescale": 0.7, "eta": 0.0}, {"guidance_scale": 1.0}], ids=str
)
def test_equal_seeds_give_what_our_own_sampler_gives(
    model: VideoModel, pipe: VideoCrafter2Pipeline, options: dict
) -> None:
    """With all that the network was trained with: signal scaling, frame rate, fresh noise in every step."""
    found = pipe(["A cat!", "a &amp; b"], seed=7, output_type="latent", **SIZE, **options).frames
    assert near(found, ours(model, ["A cat!", "a &amp; b"], [7, 8], **options))


def test_frames_are_those_of_our_own_program(model: VideoModel, pipe: VideoCrafter2Pipeline) -> None:
    expected = generate_videos(
        model, ["a cat"], [7], frames=2, height=8, width=12, sampler=SamplerConfig(num_steps=4), fps=8
    )
    found = pipe("a cat", seed=7, fps=8, **SIZE).frames
    assert np.abs(found * 255 - expected).max() <= 1


def test_every_video_may_have_its_own_frame_rate(model: VideoModel, pipe: VideoCrafter2Pipeline) -> None:
    """One for all, one per prompt, one per video."""

    def found(**options: Any) -> torch.Tensor:
        given = {"output_type": "latent", "num_videos_per_prompt": 2, "seed": 1} | SIZE | options
        return pipe(["a", "b"], **given).frames

    prompts, seeds = ["a", "a", "b", "b"], [1, 2, 3, 4]
    assert near(found(fps=8), ours(model, prompts, seeds, 8))
    assert near(found(fps=[8, 24]), ours(model, prompts, seeds, torch.tensor([8, 8, 24, 24])))
    assert near(found(fps=[8, 9, 10, 11]), ours(model, prompts, seeds, torch.tensor([8, 9, 10, 11])))
    for eight in (np.int64(8), torch.tensor(8), torch.tensor([8]), np.array([8, 8])):
        assert torch.equal(found(fps=eight), found(fps=8))
    assert torch.equal(found(), found(fps=8))  # what the network was told most
    with pytest.raises(ValueError, match="3 for 4 videos"):
        found(fps=[8, 9, 10])


def test_a_generator_stands_for_its_seed(pipe: VideoCrafter2Pipeline) -> None:
    """Used or not; several generators are the seeds of several videos."""
    used = torch.Generator().manual_seed(7)
    used_up = torch.rand(3, generator=used)
    assert used_up.shape == (3,)
    options = {"output_type": "latent", "eta": 1.0} | SIZE
    by_seed = pipe(["a", "b"], seed=7, **options).frames
    assert torch.equal(pipe(["a", "b"], generator=used, **options).frames, by_seed)
    both = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    assert torch.equal(pipe(["a", "b"], generator=both, **options).frames, by_seed)
    assert torch.equal(pipe(["a", "b"], seed=[7, 8], **options).frames, by_seed)
    assert not torch.equal(pipe(["a", "b"], **options).frames, by_seed)


def test_noise_and_features_may_be_given(model: VideoModel, pipe: VideoCrafter2Pipeline) -> None:
    text, uncond = model.text.encode(["a cat"]), model.text.encode(["a dog"])
    found = pipe(
        prompt_embeds=text,
        negative_prompt_embeds=uncond,
        latents=ClipNoise([7], (4, 2, 4, 6)).start(),
        seed=7,
        output_type="latent",
        **SIZE,
    ).frames
    assert near(found, ours(model, ["a cat"], [7], negative="a dog"))


def test_a_negative_prompt_takes_the_place_of_the_empty_one(model: VideoModel, pipe: VideoCrafter2Pipeline) -> None:
    for negative in ("a dog", ["a dog"]):
        found = pipe("a cat", negative_prompt=negative, seed=7, output_type="latent", **SIZE).frames
        assert near(found, ours(model, ["a cat"], [7], negative="a dog"))


def test_an_image_is_seen() -> None:
    """As by our own program, whatever form it comes in."""
    model = new_model(use_image_attention=True)
    pipe = quiet(VideoCrafter2Pipeline.from_model(model))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    expected = generate_videos(
        model, ["a"], [7], frames=2, height=8, width=12, sampler=SamplerConfig(num_steps=4), fps=8, images=pixels[None]
    )
    as_tensor = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    for image in (Image.fromarray(pixels), as_tensor, [as_tensor], pixels.astype(np.float32)[None] / 255):
        found = pipe("a", image=image, seed=7, **SIZE).frames
        assert np.abs(found * 255 - expected).max() <= 1
    with pytest.raises(ValueError, match="give `image`"):
        pipe("a", **SIZE)


@pytest.mark.parametrize(
    ("output_type", "shape"), [("np", (2, 2, 8, 12, 3)), ("pt", (2, 2, 3, 8, 12)), ("latent", (2, 4, 2, 4, 6))]
)
def test_videos_come_as_asked(pipe: VideoCrafter2Pipeline, output_type: str, shape: tuple[int, ...]) -> None:
    found = pipe("a", num_videos_per_prompt=2, seed=0, output_type=output_type, **SIZE)
    assert found.frames.shape == shape
    (plain,) = pipe("a", num_videos_per_prompt=2, seed=0, output_type=output_type, return_dict=False, **SIZE)
    assert np.array_equal(np.asarray(plain), np.asarray(found.frames))


def test_pictures_come_as_pictures(pipe: VideoCrafter2Pipeline) -> None:
    (video,) = pipe("a", output_type="pil", **SIZE).frames
    assert [frame.size for frame in video] == [(12, 8), (12, 8)]


def test_how_many_frames_are_decoded_together_changes_nothing(pipe: VideoCrafter2Pipeline) -> None:
    one, all_at_once = (pipe("a", seed=0, decode_chunk_size=size, **SIZE).frames for size in (1, 100))
    assert np.abs(one - all_at_once).max() < 1e-5


def test_a_callback_sees_every_step_and_may_change_what_goes_on(pipe: VideoCrafter2Pipeline) -> None:
    seen = []

    def replace_prompt(pipe: Any, number: int, timestep: int, tensors: dict) -> dict:
        seen.append((number, int(timestep), sorted(tensors)))
        return {"prompt_embeds": other, "latents": tensors["latents"]} if number == 1 else {}

    other, _ = pipe.encode_prompt("b", "cpu", 1, False)
    options = {"seed": 0, "output_type": "latent", "eta": 0.0} | SIZE
    names = ["latents", "prompt_embeds"]
    mixed = pipe("a", callback_on_step_end=replace_prompt, callback_on_step_end_tensor_inputs=names, **options).frames
    assert seen == [(number, timestep, names) for number, timestep in enumerate((751, 501, 251, 1))]
    assert not any(torch.allclose(mixed, pipe(prompt, **options).frames) for prompt in ("a", "b"))


@pytest.mark.parametrize("prompts", [["a"], ["a", "b"]], ids=len)
def test_guidance_cut_off_on_the_way_is_a_call_without_it_from_there_on(
    pipe: VideoCrafter2Pipeline, prompts: list[str]
) -> None:
    """By diffusers' own callback, however many prompts; half the work from there on."""
    kept, asked = {}, []

    def keep(pipe: Any, number: int, timestep: int, tensors: dict) -> dict:
        kept[number] = tensors["latents"]
        return {}

    options = {"seed": 0, "output_type": "latent", "eta": 0.0} | SIZE
    guided = pipe(prompts, callback_on_step_end=keep, **options).frames
    counting = pipe.unet.register_forward_hook(lambda *_: asked.append(1))
    cut = pipe(prompts, callback_on_step_end=SDCFGCutoffCallback(None, 2), **options).frames  # pyright: ignore[reportArgumentType]
    counting.remove()
    assert len(asked) == 3 * 2 + 1 and pipe.guidance_scale == 0
    text, _ = pipe.encode_prompt(prompts, "cpu", 1, False)
    alone = pipe.unet(kept[2], torch.ones(len(prompts)).long(), text, fps=8)
    (last,) = [step for step in ddim_plan(pipe.scheduler.schedule, 4, 0.0) if step.timestep == 1]
    assert torch.equal(cut, ddim_step(kept[2], alone, last, None)[0])
    assert not torch.allclose(cut, guided)


def test_features_of_another_shape_are_refused_whatever_a_callback_does(pipe: VideoCrafter2Pipeline) -> None:
    """One row would be all prompts; a view of what was shown is copied first."""

    def call(change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        def callback(pipe: Any, number: int, timestep: int, tensors: dict) -> dict:
            return {"prompt_embeds": change(tensors["prompt_embeds"])} if number == 0 else {}

        names = ["prompt_embeds"]
        options = {"seed": [5, 5], "output_type": "latent", "eta": 0.0} | SIZE
        return pipe(
            ["a", "b"], callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names, **options
        ).frames

    for change in (lambda text: text[:1], lambda text: text[:, :5]):
        with pytest.raises(ValueError, match="one of every video"):
            call(change)
    assert torch.equal(call(lambda text: text[:1].expand(2, -1, -1)), call(lambda text: text[[0, 0]]))


def test_an_interrupted_call_gives_what_it_has(pipe: VideoCrafter2Pipeline) -> None:
    """And the next call is a whole one again."""
    kept = {}

    def stop(pipe: Any, number: int, timestep: int, tensors: dict) -> dict:
        kept[number] = tensors["latents"]
        pipe._interrupt = number == 1
        return {}

    options = {"seed": 0, "output_type": "latent"} | SIZE
    assert torch.equal(pipe("a", callback_on_step_end=stop, **options).frames, kept[1])
    assert sorted(kept) == [0, 1]
    assert not torch.equal(pipe("a", **options).frames, kept[1])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"height": 10}, "multiples of 4"),
        ({"num_frames": 0}, "num_frames"),
        ({"prompt": None}, "either `prompt` or `prompt_embeds`"),
        ({"prompt": 3}, "`str` or `list`"),
        ({"prompt": []}, "at least one"),
        ({"negative_prompt": ["a", "b", "c"]}, "3 negative prompts for 1"),
        ({"negative_prompt_embeds": torch.zeros(1, 77, 5)}, "negative_prompt_embeds"),
        ({"latents": torch.zeros(1, 4, 2, 9, 9)}, "latents"),
        ({"num_inference_steps": 1001}, "num_inference_steps"),
        ({"output_type": "gif"}, "output_type"),
        ({"seed": 1, "generator": torch.Generator()}, "either `seed` or `generator`"),
        ({"seed": [1, 2]}, "2 seeds"),
        ({"image": Image.new("RGB", (8, 8))}, "text-to-video"),
        ({"solver": "euler"}, "solver"),
        ({"eta": 2.0}, "eta"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
    ],
)
def test_what_does_not_fit_is_refused(pipe: VideoCrafter2Pipeline, options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        pipe(**({"prompt": "a"} | SIZE | options))


def test_a_scheduler_without_signal_scaling_is_refused(pipe: VideoCrafter2Pipeline) -> None:
    with pytest.raises(ValueError, match="signal scaling"):
        VideoCrafter2Pipeline(**(pipe.components | {"scheduler": DDIMScheduler()}))


def test_a_folder_gives_the_same_pipeline_again(tmp_path: Path) -> None:
    """Exported, loaded, saved, loaded; an image encoder goes along."""
    model = new_model(use_image_attention=True)
    export_full(model, tmp_path / "first")
    first = quiet(VideoCrafter2Pipeline.from_pretrained(tmp_path / "first"))
    first.save_pretrained(tmp_path / "second")
    second = quiet(VideoCrafter2Pipeline.from_pretrained(tmp_path / "second"))
    options = {"image": Image.new("RGB", (9, 9), "red"), "seed": 0, "output_type": "latent"} | SIZE
    expected = quiet(VideoCrafter2Pipeline.from_model(model))("a", **options).frames
    for loaded in (first, second):
        assert near(loaded("a", **options).frames, expected)
        assert loaded.config.told_fps == {"8": 3, "24": 1}
    again = import_full(tmp_path / "second")
    assert again.config.evolve(text=TEXT) == model.config
    assert again.fps == model.fps
    assert again.image is not None and model.image is not None
    for mine, theirs in ((again.unet, model.unet), (again.image, model.image), (again.text.tower, model.text.tower)):
        state = theirs.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in mine.state_dict().items())


def test_diffusers_loads_the_folder_if_it_may_run_the_code_in_it(
    model: VideoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code only imports this package, which the card says has to be installed."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = str(tmp_path / "full")
    export_full(model, folder)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(folder)
    expected = latents(quiet(VideoCrafter2Pipeline.from_model(model)))
    for how in ({}, {"custom_pipeline": folder}):
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **how)
        assert type(pipe) is VideoCrafter2Pipeline
        assert near(latents(quiet(pipe)), expected)
    index = json.loads((tmp_path / "full/model_index.json").read_text())
    libraries = {name: value[0] for name, value in index.items() if isinstance(value, list) and value[0]}
    for name, library in libraries.items():  # what a hub lets through
        place = tmp_path / "full" / ("" if name == "_class_name" else name)
        assert library in ("diffusers", "transformers") or (place / f"{library}.py").is_file(), name
    card = (tmp_path / "full/README.md").read_text()
    assert "pip install" in card and "trust_remote_code=True" in card


@pytest.mark.slow
def test_a_process_that_has_not_heard_of_this_package_loads_the_folder(model: VideoModel, tmp_path: Path) -> None:
    export_full(model, tmp_path / "full")
    program = """if True:
        import sys
        from diffusers import DiffusionPipeline
        assert not any(name.startswith("vc2") for name in sys.modules)
        pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
        print(type(pipe).__module__, type(pipe).__name__)
    """
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program, str(tmp_path / "full")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["vc2.model.diffusers_pipeline", "VideoCrafter2Pipeline"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_may_be_loaded_in_half_precision(model: VideoModel, tmp_path: Path, dtype: torch.dtype) -> None:
    """And run; or written so."""
    export_full(model, tmp_path / "full")
    loaded = quiet(VideoCrafter2Pipeline.from_pretrained(tmp_path / "full", dtype=dtype))
    assert {loaded.unet.dtype, loaded.vae.dtype, loaded.text_encoder.dtype} == {dtype}
    frames = loaded("a", seed=0, **SIZE).frames
    assert frames.dtype == np.float32 and np.isfinite(frames).all()
    export_full(model, tmp_path / "half", dtype=dtype)
    assert model.unet.conv_in.weight.dtype == torch.float32
    assert (tmp_path / "half/unet/diffusion_pytorch_model.safetensors").stat().st_size < 0.6 * (
        tmp_path / "full/unet/diffusion_pytorch_model.safetensors"
    ).stat().st_size


@pytest.mark.parametrize("image", [False, True])
def test_offloading_changes_nothing(image: bool) -> None:
    """Whole networks or single layers lie aside until they are called; here all of it is on the CPU."""
    model = new_model(use_image_attention=image)
    options = {"seed": 0} | SIZE | ({"image": Image.new("RGB", (9, 9), "red")} if image else {})
    pipe = quiet(VideoCrafter2Pipeline.from_model(model))
    expected = pipe("a", **options).frames
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert np.allclose(pipe("a", **options).frames, expected, atol=1e-4)
    pipe.remove_all_hooks()
    for name, part in pipe.components.items():  # as enable_sequential_cpu_offload does, which wants an accelerator
        if isinstance(part, nn.Module) and name not in pipe._exclude_from_cpu_offload:
            cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)
    assert {parameter.device.type for parameter in pipe.unet.parameters()} == {"meta"}
    for _ in range(2):
        assert np.allclose(pipe("a", **options).frames, expected, atol=1e-4)


def test_other_kinds_of_folders_are_refused(model: VideoModel, tmp_path: Path) -> None:
    export_stock(model, tmp_path / "stock", fps=8)
    with pytest.raises(ConfigError, match="TextToVideoSDPipeline"):
        import_full(tmp_path / "stock")
    export_full(model, tmp_path / "full")
    path = tmp_path / "full/unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shape": {"model_channels": -1}}))
    with pytest.raises(ConfigError, match="shape is no UNetConfig"):
        import_full(tmp_path / "full")


# ---------------------------------------------------------------------------------------------------------------------
# The scheduler in the stock pipeline


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_our_scheduler_makes_the_stock_pipeline_sample_as_ours_does(
    model: VideoModel, tmp_path: Path, eta: float
) -> None:
    """Signal scaling included, which no scheduler of diffusers has."""
    assert model.config.schedule.signal_scaling
    export_stock(model, tmp_path / "stock", fps=8)
    pipe = quiet(TextToVideoSDPipeline.from_pretrained(tmp_path / "stock"))
    pipe.scheduler = VideoCrafter2Scheduler.from_stock(tmp_path / "stock")
    noise = torch.randn(1, 4, 2, 4, 8)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "latents": noise, "output_type": "latent", "eta": eta}
    theirs = pipe("a", 8, 16, 2, generator=torch.Generator().manual_seed(3), **options).frames

    drawn = torch.Generator().manual_seed(3)

    def as_they_draw(step: int) -> torch.Tensor:
        return torch.randn(2, 4, 4, 8, generator=drawn).transpose(0, 1)[None]

    config = SamplerConfig(num_steps=4, guidance_scale=3.0, eta=eta, fps=8)
    text, uncond = model.text.encode(["a"]), model.text.encode([""])
    expected = sample(model.unet, model.schedule, noise, text, uncond, config, noise_at_step=as_they_draw)
    assert near(theirs, expected)


# ---------------------------------------------------------------------------------------------------------------------
# LoRA

TARGETS = ("query", "value", "value_and_gate", "conv_in", "embedding", "convs.0", "proj_in")


def tuned(pipe: VideoCrafter2Pipeline, name: str) -> None:
    """Give the network an adapter that does something."""
    pipe.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=5, target_modules=list(TARGETS)), adapter_name=name)
    for parameter_name, parameter in pipe.unet.named_parameters():
        if f".{name}." in parameter_name:
            nn.init.normal_(parameter, std=0.2)


def latents(pipe: VideoCrafter2Pipeline) -> torch.Tensor:
    return pipe("a", seed=0, output_type="latent", **SIZE).frames


def test_an_adapter_saved_and_loaded_does_the_same(tmp_path: Path) -> None:
    pipe = quiet(VideoCrafter2Pipeline.from_model(new_model()))
    plain = latents(pipe)
    tuned(pipe, "mine")
    changed = latents(pipe)
    pipe.save_lora_weights(tmp_path)
    model = new_model()
    load_lora(model.unet, tmp_path / "pytorch_lora_weights.safetensors")
    merge_lora(model.unet)
    assert near(latents(quiet(VideoCrafter2Pipeline.from_model(model))), changed)
    pipe.unload_lora_weights()
    assert near(latents(pipe), plain)
    pipe.load_lora_weights(tmp_path, adapter_name="again")
    assert near(latents(pipe), changed)
    assert not torch.allclose(changed, plain)


def test_a_fused_adapter_is_saved_with_the_network(tmp_path: Path) -> None:
    """A loose one is not: the folder would hold neither network."""
    pipe = quiet(VideoCrafter2Pipeline.from_model(new_model()))
    tuned(pipe, "mine")
    changed = latents(pipe)
    with pytest.raises(ValueError, match="fuse_lora"):
        pipe.save_pretrained(tmp_path / "full")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "full")
    assert near(latents(quiet(VideoCrafter2Pipeline.from_pretrained(tmp_path / "full"))), changed)


def test_adapters_are_weighed_switched_and_fused() -> None:
    pipe = quiet(VideoCrafter2Pipeline.from_model(new_model()))
    plain = latents(pipe)
    tuned(pipe, "one")
    one = latents(pipe)
    with pytest.warns(UserWarning, match="multiple adapters"):  # so says peft
        tuned(pipe, "two")
    assert pipe.get_list_adapters() == {"unet": ["one", "two"]}
    pipe.set_adapters("one")
    assert near(latents(pipe), one)
    pipe.set_adapters(["one", "two"], [0.5, 2.0])
    both = latents(pipe)
    assert not torch.allclose(both, one)
    pipe.fuse_lora(adapter_names=["one", "two"])
    assert near(latents(pipe), both)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert near(latents(pipe), plain)
    pipe = quiet(VideoCrafter2Pipeline.from_model(new_model()))
    tuned(pipe, "one")
    pipe.disable_lora()
    assert near(latents(pipe), plain)
    with pytest.raises(ValueError, match="one number for each"):
        pipe.unet.set_adapters(["one"], [{"down": 1.0}])


def test_a_lora_of_our_training_is_loaded_as_it_is(tmp_path: Path) -> None:
    """The pipeline with the file equals the pipeline of the merged network."""
    model = new_model()
    config = LoraConfig(rank=2, alpha=3.0, targets=("attention", "convolution", "projection", "feed_forward"))
    pipe = quiet(VideoCrafter2Pipeline.from_model(new_model()))
    add_lora(model.unet, config, "all")
    for name in lora_names(model.unet):
        nn.init.normal_(model.unet.get_parameter(name), std=0.1)
    save_lora(model.unet, tmp_path / "lora.safetensors", config)
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    merge_lora(model.unet)
    assert near(latents(pipe), latents(quiet(VideoCrafter2Pipeline.from_model(model))))


def test_a_lora_of_another_network_is_refused(tmp_path: Path) -> None:
    pipe = VideoCrafter2Pipeline.from_model(new_model())
    foreign = {f"unet.blocks.7.attn.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}
    with pytest.raises(WeightsError, match="1 of its 1 layers are not in this network"):
        pipe.load_lora_weights(foreign)
    with pytest.raises(ValueError, match="name one"):
        pipe.save_lora_weights(tmp_path)


def test_our_scheduler_steps_in_float32_whatever_it_is_given() -> None:
    scheduler = VideoCrafter2Scheduler(schedule={})
    sample, noise = torch.randn(2, 1, 4, 2, 4, 4).half()
    found = scheduler.step(noise, 981, sample).prev_sample
    exact = scheduler.step(noise.float(), 981, sample.float()).prev_sample
    assert found.dtype == torch.float16 and torch.equal(found, exact.half())


def test_a_schedule_is_a_component_that_is_saved(tmp_path: Path) -> None:
    config = ScheduleConfig(signal_floor=0.5, num_timesteps=500, signal_knee=100)
    VideoCrafter2Scheduler(schedule=config.model_dump(mode="json")).save_pretrained(tmp_path)
    assert VideoCrafter2Scheduler.from_pretrained(tmp_path).schedule.config == config
