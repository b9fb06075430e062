import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, TextToVideoSDPipeline, UNet3DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from vc2.errors import ConfigError, WeightsError
from vc2.model.autoencoder import Autoencoder
from vc2.model.bundle import VideoModel
from vc2.model.config import AutoencoderConfig, ModelConfig, SamplerConfig, ScheduleConfig, TextConfig, UNetConfig
from vc2.model.diffusers_parts import clip_text_model, clip_tokenizer
from vc2.model.sampler import sample
from vc2.model.schedule import NoiseSchedule
from vc2.model.stock import export_stock, import_stock, stock_scheduler, stock_unet
from vc2.model.text import TextEncoder, clean_caption
from vc2.model.unet import UNet3D
from vc2.model.weights import stock_names

AUTOENCODER = AutoencoderConfig(block_out_channels=(4, 8), layers_per_block=1, norm_groups=4)
TEXT = TextConfig(width=12, heads=2, layers=3, layers_used=2, seed=3)
CAPTIONS = [
    "",
    "a cat",
    "Wow! A dog!! Runs...",
    "Don't stop -- it's 2024's best: $1,000 & more (50%)",
    "café   naïve\n\ttab, ÉCOLE",
    "北京 и Москва",
    "an emoji 😀🎉 !",
    "under_score #tag @name http://x.y/z?q=1",
    " ".join(["very"] * 50 + ["long!"] * 50),
]


@pytest.fixture
def make_model(make_unet: Callable[..., UNet3D]) -> Callable[..., VideoModel]:
    def make(schedule: ScheduleConfig | None = None, **changes: object) -> VideoModel:
        unet = make_unet(**changes)
        schedule = schedule or ScheduleConfig(signal_scaling=False)
        config = ModelConfig(unet=unet.config, schedule=schedule, autoencoder=AUTOENCODER, text=TEXT)
        return VideoModel(config, unet, NoiseSchedule(schedule), Autoencoder(AUTOENCODER), TextEncoder(TEXT))

    return make


def difference(stock: UNet3DConditionModel, unet: UNet3D, fps: int, frames: int, height: int, width: int) -> float:
    latents, text = torch.randn(2, 4, frames, height, width), torch.randn(2, 7, unet.config.context_dim)
    timesteps = torch.tensor([1, 981])
    with torch.no_grad():
        theirs = stock(latents, timesteps, text).sample
        return float((theirs - unet(latents, timesteps, text, fps=fps)).abs().max())


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 4, 8), (5, 8, 4)], ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"addition_attention": False},
        {"fps_cond": False},
        {"use_linear": False},
        {"channel_mult": (1, 2, 3), "num_res_blocks": 2, "attention_resolutions": (2,)},
        {"channel_mult": (1,), "attention_resolutions": ()},
        {"model_channels": 24, "norm_groups": 8, "num_head_channels": 12},
    ],
    ids=str,
)
def test_the_stock_network_says_what_ours_says(
    make_unet: Callable[..., UNet3D], changes: dict, size: tuple[int, int, int]
) -> None:
    """Whatever the shape, at the frame rate that was folded in, dropout of the temporal convolutions included."""
    unet = make_unet(**changes)
    assert difference(stock_unet(unet, fps=24), unet, 24, *size) < 2e-5


def test_the_frame_rate_folded_in_is_the_one_asked_for(make_unet: Callable[..., UNet3D]) -> None:
    unet = make_unet()
    stock = stock_unet(unet, fps=8)
    assert difference(stock, unet, 8, 2, 4, 4) < 2e-5 < difference(stock, unet, 9, 2, 4, 4)


def test_at_full_size_only_the_frame_rate_is_left_out() -> None:
    with torch.device("meta"):
        unet, stock = UNet3D(UNetConfig()), stock_unet(UNet3D(UNetConfig()), fps=8)
    assert unet.fps_embedding is not None
    left_out = sum(parameter.numel() for parameter in unet.fps_embedding.parameters())
    assert sum(parameter.numel() for parameter in stock.parameters()) == 1_411_233_860 == 1_413_284_420 - left_out
    assert sorted(stock_names(unet).values()) == sorted(stock.state_dict())


@pytest.mark.parametrize(
    "changes",
    [
        {"use_relative_position": True},
        {"use_causal_attention": True},
        {"temporal_conv": False},
        {"temporal_attention": False},
        {"use_image_attention": True},
        {"transformer_depth": 2},
        {"channel_mult": (2, 4)},
    ],
    ids=str,
)
def test_what_stock_diffusers_cannot_hold_is_refused(make_unet: Callable[..., UNet3D], changes: dict) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(changes))}=.*full export"):
        stock_unet(make_unet(**changes), fps=8)


def test_tokens_are_those_of_open_clip(tmp_path: Path) -> None:
    """Written and read again; an exclamation mark is no padding, and too long a caption keeps its end token."""
    clip_tokenizer(77).save_pretrained(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    ours = TextEncoder(TEXT).tokenize(CAPTIONS)
    theirs = tokenizer(CAPTIONS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ours, theirs)


def test_a_cleaned_caption_has_the_same_tokens_whatever_is_wrong_with_it() -> None:
    broken = ["Tom &amp; Jerry", "“curly” quotes’s", "ﬁne ligature", "sÃ¼ÃŸ"]
    cleaned = [clean_caption(caption) for caption in broken]
    theirs = clip_tokenizer(77)(cleaned, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    assert torch.equal(TextEncoder(TEXT).tokenize(broken), theirs.input_ids)


@pytest.mark.parametrize("seed", [None, 3])
def test_the_text_tower_of_transformers_gives_the_same_features(seed: int | None) -> None:
    encoder = TextEncoder(TEXT.evolve(seed=seed))
    tokens = encoder.tokenize(CAPTIONS)
    with torch.no_grad():
        theirs = clip_text_model(encoder)(tokens).last_hidden_state
    assert (theirs - encoder.encode_tokens(tokens)).abs().max() < 2e-5


def test_a_text_tower_with_another_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size=50"):
        clip_text_model(TextEncoder(TextConfig(width=8, heads=2, layers=1, layers_used=1, vocab_size=50)))


@pytest.mark.parametrize("loader", [DiffusionPipeline, TextToVideoSDPipeline])
def test_diffusers_loads_the_folder_with_no_code_of_ours(
    make_model: Callable[..., VideoModel], tmp_path: Path, loader: type[DiffusionPipeline]
) -> None:
    """Every part is there, of diffusers' own classes and with our numbers; a video comes out."""
    model = make_model()
    export_stock(model, tmp_path / "stock", fps=8)
    pipe = loader.from_pretrained(tmp_path / "stock")
    assert type(pipe) is TextToVideoSDPipeline
    assert difference(pipe.unet, model.unet, 8, 2, 4, 4) < 2e-5
    latents = torch.randn(1, 4, 2, 4, 6)
    with torch.no_grad():
        frames = pipe.vae.decode(latents[:, :, 0] / pipe.vae.config.scaling_factor).sample
    assert torch.equal(frames, model.autoencoder.decode(latents[:, :, :1])[:, :, 0])
    embeds, _ = pipe.encode_prompt("Wow! A cat", "cpu", 1, False)
    assert (embeds - model.text.encode(["Wow! A cat"])).abs().max() < 2e-5
    pipe.set_progress_bar_config(disable=True)
    video = pipe("a cat", height=8, width=16, num_frames=2, num_inference_steps=2, output_type="pt").frames
    assert video.shape == (1, 2, 3, 8, 16)


def test_without_signal_scaling_the_stock_pipeline_samples_as_ours_does(
    make_model: Callable[..., VideoModel], tmp_path: Path
) -> None:
    model = make_model()
    export_stock(model, tmp_path / "stock", fps=8)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "stock")
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 2, 4, 4)
    theirs = pipe(
        "a cat", 8, 8, 2, num_inference_steps=5, guidance_scale=3.0, latents=noise, output_type="latent"
    ).frames
    text, uncond = model.text.encode(["a cat"]), model.text.encode([""])
    config = SamplerConfig(num_steps=5, guidance_scale=3.0, eta=0, fps=8)
    ours = sample(model.unet, model.schedule, noise, text, uncond, config)
    assert (theirs - ours).abs().max() < 1e-4 * ours.abs().max()


def contrast(schedule: ScheduleConfig, scheduler: DDIMScheduler, spread: float) -> float:
    """Spread of what `scheduler` samples over that of what ours samples: a perfect network, normal data of `spread`."""
    levels = NoiseSchedule(schedule)

    def perfect(x: Tensor, timestep: int) -> Tensor:
        signal = float(levels.alphas_cumprod[timestep].sqrt() * levels.signal_scale[timestep])
        noise = float(1 - levels.alphas_cumprod[timestep])
        return noise**0.5 * x / (signal**2 * spread**2 + noise)

    start = torch.linspace(-1, 1, 5, dtype=torch.float64)
    expected = sample(
        lambda x, timesteps, **_: perfect(x, int(timesteps[0])),
        levels,
        start.view(1, 1, 1, 1, 5),
        torch.zeros(1, 1, 1),
        None,
        SamplerConfig(num_steps=50, guidance_scale=1, eta=0),
    )
    scheduler.set_timesteps(50)
    found = start
    for timestep in scheduler.timesteps:
        found = scheduler.step(perfect(found, int(timestep)), int(timestep), found, return_dict=False)[0]
    return float(found.std() / expected.std())


def of_equal_signal_to_noise(schedule: ScheduleConfig) -> DDIMScheduler:
    """The schedule that diffusers can be given whose ratio of signal to noise is right, its loudness not."""
    levels = NoiseSchedule(schedule)
    signal = levels.alphas_cumprod * levels.signal_scale**2
    alphas = signal / (signal + 1 - levels.alphas_cumprod)
    betas = 1 - alphas / torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    return DDIMScheduler(trained_betas=betas.tolist(), clip_sample=False, set_alpha_to_one=False, steps_offset=1)


@pytest.mark.parametrize(
    ("spread", "lost", "equal_ratio"), [(1.0, 0.795, 0.858), (0.5, 0.868, 0.799), (0.3, 0.916, 0.764)]
)
def test_without_the_signal_scaling_contrast_is_lost(spread: float, lost: float, equal_ratio: float) -> None:
    """The table in docs/diffusers.md."""
    schedule, plain = ScheduleConfig(), ScheduleConfig(signal_scaling=False)
    assert contrast(schedule, stock_scheduler(schedule), spread) == pytest.approx(lost, abs=0.001)
    assert contrast(schedule, of_equal_signal_to_noise(schedule), spread) == pytest.approx(equal_ratio, abs=0.001)
    assert contrast(plain, stock_scheduler(plain), spread) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("changes", [{}, {"addition_attention": False}, {"use_linear": False}], ids=str)
def test_stock_to_ours_and_back_is_the_same_to_the_bit(
    make_model: Callable[..., VideoModel], tmp_path: Path, changes: dict
) -> None:
    model = make_model(ScheduleConfig(), **changes)
    export_stock(model, tmp_path / "first", fps=8)
    ours = import_stock(tmp_path / "first")
    assert not ours.config.unet.fps_cond
    assert ours.config.schedule == model.config.schedule
    export_stock(ours, tmp_path / "second", fps=0)
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        first, second = (tmp_path / name / f"{part}.safetensors" for name in ("first", "second"))
        assert first.read_bytes() == second.read_bytes(), part
    for part in ("unet", "vae", "scheduler"):
        configs = [next((tmp_path / name / part).glob("*config.json")).read_text() for name in ("first", "second")]
        assert configs[0] == configs[1], part


def test_a_folder_of_another_tool_is_read_too(make_model: Callable[..., VideoModel], tmp_path: Path) -> None:
    """As diffusers saves it, in the old form: pickled weights, which are read without running them, of older names."""
    model = make_model(fps_cond=False)
    export_stock(model, tmp_path / "ours", fps=0)
    pipe = TextToVideoSDPipeline.from_pretrained(tmp_path / "ours")
    pipe.save_pretrained(tmp_path / "theirs", safe_serialization=False)
    unet = tmp_path / "theirs" / "unet"
    assert not list(unet.glob("*.safetensors"))
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    vae = tmp_path / "theirs" / "vae" / "diffusion_pytorch_model.bin"
    state = torch.load(vae, weights_only=True)
    for new_name, old_name in old.items():
        state = {name.replace(new_name, old_name): tensor for name, tensor in state.items()}
    torch.save(state, vae)
    again = import_stock(tmp_path / "theirs")
    state = model.unet.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.unet.state_dict().items())
    assert again.config.schedule == ScheduleConfig(signal_scaling=False)
    assert torch.equal(again.text.encode(["a cat"]), model.text.encode(["a cat"]))
    latents = torch.randn(1, 4, 1, 4, 4)
    assert torch.equal(again.autoencoder.decode(latents), model.autoencoder.decode(latents))


def test_code_in_a_pickle_is_not_run(make_model: Callable[..., VideoModel], tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "sprung",))

    export_stock(make_model(), tmp_path / "stock", fps=8)
    (tmp_path / "stock/unet/diffusion_pytorch_model.safetensors").unlink()
    pickled = io.BytesIO()
    torch.save({"conv_in.weight": Trap()}, pickled)
    (tmp_path / "stock/unet/diffusion_pytorch_model.bin").write_bytes(pickled.getvalue())
    with pytest.raises(WeightsError):
        import_stock(tmp_path / "stock")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "StableDiffusionPipeline"),
        ("unet/config.json", {"act_fn": "gelu"}, "act_fn"),
        ("unet/config.json", {"block_out_channels": [16, 40]}, "block_out_channels"),
        ("text_encoder/config.json", {"hidden_act": "quick_gelu"}, "hidden_act"),
        ("vae/config.json", {"act_fn": "gelu"}, "act_fn"),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "prediction_type"),
    ],
)
def test_networks_of_another_kind_are_refused(
    make_model: Callable[..., VideoModel], tmp_path: Path, file: str, change: dict, says: str
) -> None:
    export_stock(make_model(), tmp_path / "stock", fps=8)
    (tmp_path / "stock/vc2.json").unlink()
    path = tmp_path / "stock" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=says):
        import_stock(tmp_path / "stock")


@pytest.mark.parametrize("part", ["vae", "text_encoder", "unet"])
def test_a_folder_without_a_part_is_refused_without_asking_a_hub(
    make_model: Callable[..., VideoModel], tmp_path: Path, part: str
) -> None:
    export_stock(make_model(), tmp_path / "stock", fps=8)
    (tmp_path / "stock" / part).rename(tmp_path / "lost")
    with pytest.raises(ConfigError, match=rf"{part}.config\.json: cannot be read"):
        import_stock(tmp_path / "stock")


def test_weights_may_be_written_in_half_precision(make_model: Callable[..., VideoModel], tmp_path: Path) -> None:
    """The model itself keeps its type."""
    model = make_model()
    export_stock(model, tmp_path / "stock", fps=8, dtype=torch.float16)
    assert model.unet.conv_in.weight.dtype == torch.float32
    stored = CLIPTextModel.from_pretrained(tmp_path / "stock/text_encoder", dtype="auto")
    assert stored.dtype == torch.float16
    assert (import_stock(tmp_path / "stock").unet.conv_in.weight - model.unet.conv_in.weight).abs().max() < 1e-3


def test_a_folder_in_use_is_left_alone(make_model: Callable[..., VideoModel], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="something there already"):
        export_stock(make_model(), tmp_path, fps=8)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
