import pytest
import torch
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from vc2.errors import WeightsError
from vc2.model.config import ImageConfig, ImageTowerConfig, ResamplerConfig
from vc2.model.image import ImageEncoder, scale_to_square

SMALL = ImageConfig(
    tower=ImageTowerConfig(width=32, heads=4, layers=3, image_size=28, patch_size=14, output_dim=16),
    resampler=ResamplerConfig(
        dim=16, depth=2, heads=2, dim_head=8, num_queries=5, embedding_dim=32, output_dim=12, ff_mult=2
    ),
)


def released_names(encoder: ImageEncoder, name_table) -> dict[str, Tensor]:
    """The encoder's weights under released names, by the released tables, cut to its depth."""
    tower = {f"embedder.model.visual.{name}": tensor for name, tensor in encoder.tower.state_dict().items()}
    ours = iter(encoder.resampler.state_dict().values())
    depth = len(encoder.resampler.layers)
    names = [row["name"] for row in name_table("i2v/resampler_state_dict.tsv")]
    kept = [name for name in names if ".layers." not in name or int(name.split(".layers.")[1].split(".")[0]) < depth]
    order = {"latents": 0, "proj_in": 1, "layers": 2, "proj_out": 3, "norm_out": 4}
    kept.sort(key=lambda name: order[name.split(".")[1]])
    return tower | dict(zip(kept, ours, strict=True))


@pytest.fixture
def encoder() -> ImageEncoder:
    made = ImageEncoder(SMALL)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize(
    ("height", "width"), [(320, 512), (48, 80), (224, 224), (300, 100), (100, 100), (225, 1030), (576, 1024)]
)
def test_pictures_are_scaled_as_the_released_program_scales_them(height: int, width: int) -> None:
    """Compared with the copy of its method that diffusers has for another network."""
    images = torch.rand(2, 3, height, width) * 2 - 1
    torch.testing.assert_close(
        scale_to_square(images, 224), _resize_with_antialiasing(images, (224, 224)), rtol=0, atol=2e-6
    )


def test_the_tower_takes_the_mean_and_the_spread_of_clip(encoder: ImageEncoder) -> None:
    """Mid-grey stays mid-grey at any size, white and black are the ends."""
    grey = encoder.preprocess(torch.zeros(1, 3, 50, 90))
    white = encoder.preprocess(torch.ones(1, 3, 28, 28))
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    torch.testing.assert_close(grey[0, :, 14, 3], (0.5 - mean) / std, rtol=0, atol=1e-6)
    torch.testing.assert_close(white.mean((0, 2, 3)), (1 - mean) / std, rtol=0, atol=1e-5)
    assert grey.shape == white.shape == (1, 3, 28, 28)


def test_the_tower_gives_what_transformers_has_before_its_last_norm(encoder: ImageEncoder) -> None:
    """All layers, a token for the whole and one per patch, neither normed nor projected."""
    theirs = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=28,
            patch_size=14, hidden_act="gelu",
        )
    ).eval()  # fmt: skip
    renamed = {}
    for name, tensor in encoder.tower.state_dict().items():
        if name in ("proj",):
            continue
        for ours, their in (
            ("class_embedding", "embeddings.class_embedding"),
            ("positional_embedding", "embeddings.position_embedding.weight"),
            ("conv1.", "embeddings.patch_embedding."),
            ("ln_pre.", "pre_layrnorm."),
            ("ln_post.", "post_layernorm."),
            ("transformer.resblocks.", "encoder.layers."),
            (".attn.out_proj.", ".self_attn.out_proj."),
            (".ln_1.", ".layer_norm1."),
            (".ln_2.", ".layer_norm2."),
            (".mlp.c_fc.", ".mlp.fc1."),
            (".mlp.c_proj.", ".mlp.fc2."),
        ):
            name = name.replace(ours, their)
        if "in_proj_" in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace("attn.in_proj_", f"self_attn.{part}_proj.")] = rows
        else:
            renamed[name] = tensor
    expected = theirs.state_dict()
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in expected) else ""
    missing, unexpected = theirs.load_state_dict({prefix + name: t for name, t in renamed.items()}, strict=False)
    assert not unexpected and all(name.endswith("position_ids") for name in missing)
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(
            encoder.tower_tokens(pixels), theirs(pixel_values=pixels).last_hidden_state, rtol=0, atol=2e-5
        )


def test_tokens_are_those_of_the_resampler_and_nothing_is_a_grey_picture(encoder: ImageEncoder) -> None:
    images = torch.rand(2, 3, 40, 60) * 2 - 1
    tokens = encoder.encode(images)
    assert tokens.shape == (2, 5, 12) and not tokens.requires_grad
    torch.testing.assert_close(encoder.encode(images[1:]), tokens[1:])
    nothing = encoder.encode_nothing()
    assert nothing.shape == (1, 5, 12) and nothing.abs().max() > 0.01
    torch.testing.assert_close(encoder.encode(torch.zeros(1, 3, 64, 40)), nothing)
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
        encoder.encode(images[0])


def test_an_encoder_is_frozen(encoder: ImageEncoder) -> None:
    assert not encoder.training and not any(parameter.requires_grad for parameter in encoder.parameters())


def test_a_released_checkpoint_gives_both_parts_and_leaves_the_others_aside(encoder: ImageEncoder, name_table) -> None:
    state = released_names(encoder, name_table)
    others = {"embedder.model.token_embedding.weight": torch.zeros(3, 2), "first_stage_model.x": torch.zeros(1),
              "model.diffusion_model.out.2.bias": torch.zeros(4), "betas": torch.zeros(1000)}  # fmt: skip
    images = torch.rand(1, 3, 40, 60)
    loaded = ImageEncoder.from_released(SMALL, state | others)
    assert torch.equal(loaded.encode(images), encoder.encode(images))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for gone, part in (("embedder.model.visual.proj", "image tower"), ("image_proj_model.latents", "image-token")):
        with pytest.raises(WeightsError, match=f"{part}(.|\n)*1 missing"):
            ImageEncoder.from_released(SMALL, {name: tensor for name, tensor in state.items() if name != gone})


def test_the_coarse_form_makes_its_tokens_of_the_towers_one_projected_vector() -> None:
    """What the tower itself gives for the whole image, through a linear layer and a norm."""
    coarse = ImageEncoder(SMALL.evolve(finegrained=False))
    state = {f"embedder.model.visual.{name}": tensor for name, tensor in coarse.tower.state_dict().items()}
    state |= {
        "image_proj_model.proj.weight": torch.randn(5 * 12, 16),
        "image_proj_model.proj.bias": torch.randn(5 * 12),
        "image_proj_model.norm.weight": torch.randn(12),
        "image_proj_model.norm.bias": torch.randn(12),
    }
    loaded = ImageEncoder.from_released(SMALL.evolve(finegrained=False), state)
    images = torch.rand(2, 3, 40, 60) * 2 - 1
    with torch.no_grad():
        vector = loaded.tower(loaded.preprocess(images))
    weight, bias, scale, shift = (state[f"image_proj_model.{name}"] for name in
                                  ("proj.weight", "proj.bias", "norm.weight", "norm.bias"))  # fmt: skip
    expected = torch.nn.functional.layer_norm((vector @ weight.T + bias).view(2, 5, 12), (12,), scale, shift)
    torch.testing.assert_close(loaded.encode(images), expected, rtol=0, atol=2e-5)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_full_size_is_the_released_one(name_table) -> None:
    """Every name and shape of the tower (632,076,800 values) and of the resampler in its place, and none left over."""
    rows = name_table("i2v/image_encoder_state_dict.tsv") + name_table("i2v/resampler_state_dict.tsv")
    with torch.device("meta"):
        released = {row["name"]: torch.empty([int(n) for n in row["shape"].split("x")]) for row in rows}
        encoder = ImageEncoder.from_released(ImageConfig(), released)
    assert sum(parameter.numel() for parameter in encoder.tower.parameters()) == 632_076_800
    assert sum(parameter.numel() for parameter in encoder.resampler.parameters()) == 48_541_696
