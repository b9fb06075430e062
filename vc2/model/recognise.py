"""What a set of weights is, told from the names and shapes of its tensors.

Loading is whole or an error, and an error is worth most when it says what the file is instead of what it lacks. The
marks below were chosen so that one or two of them tell a family apart; they say nothing about a single tensor.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vc2.model.files import Tensors

__all__ = ["Family", "Recognised", "declares_v_prediction", "recognise"]

Family = Literal["video", "image", "ours", "stock", "other"]


@dataclass(frozen=True, slots=True)
class Recognised:
    """What weights are.

    `family` is "video" for the released networks, under their names; "image" for Stable Diffusion 2.x, under LDM's or
    diffusers' names; "ours" for the video network under our names; "stock" for it as `UNet3DConditionModel`; "other"
    for what this project cannot load.
    """

    family: Family
    words: str  # in a sentence: "this is ..."
    advice: str = ""

    @property
    def sentence(self) -> str:
        return f"this is {self.words}" + (f"; {self.advice}" if self.advice else "")


_LORA = re.compile(r"(\.lora_[AB]\.|\.lora_(up|down)\.|^lora_(unet|te)|\.lora\.(up|down)\.|_lora\.(up|down)\.)")


def recognise(tensors: Tensors) -> Recognised:
    """What weights are, as far as names and shapes tell."""
    shapes = {_bare(name): shape for name, shape in tensors.shapes.items()}
    names = shapes.keys()

    def any_of(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in names)

    if any(_LORA.search(name) for name in names):
        return Recognised("other", "a LoRA, changes to a network and not one", "merge it into its network first")
    if _is_optimizer(tensors):
        return Recognised("other", "the state of an optimizer, not a network", "give the file of weights beside it")
    if any_of(r"^conditioner\.embedders\.") or any_of(r"(^|\.)(label_emb|add_embedding)\."):
        return Recognised("other", "Stable Diffusion XL, another network", "give Stable Diffusion 2.1-base")
    if "input_blocks.0.0.weight" in names and "time_embed.0.weight" in names:
        return _ldm(shapes, any_of)
    if "conv_in.weight" in names and any_of(r"^down_blocks\.\d+\.(resnets|attentions)\."):
        return _diffusers(shapes, any_of)
    if any_of(r"^down\.\d+\.layers\.\d+\.residual\."):
        return Recognised("ours", "a video network under vc2's own names", "load it with `vc2.model.weights.load_unet`")
    if any_of(r"motion_modules\."):
        return Recognised("other", "an AnimateDiff motion module, another network")
    if any_of(r"^model_ema\."):
        return Recognised("other", "a moving average alone, under flattened names", "give the whole checkpoint")
    if any_of(r"double_blocks\.|single_transformer_blocks\.|joint_blocks\.|patch_embed"):
        return Recognised("other", "a diffusion transformer, another network")
    return _part(any_of)


def _ldm(shapes: Mapping[str, tuple[int, ...]], any_of) -> Recognised:
    """A U-Net under the names of LDM, of which the released ones are an extension."""
    channels = shapes["input_blocks.0.0.weight"][1]
    if any_of(r"\.temopral_conv\.|^init_attn\.|^fps_embedding\.|blocks\.\d+\.2\.transformer_blocks\."):
        if channels == 8:
            return Recognised(
                "other",
                "DynamiCrafter, or a network like it: 8 input channels, of which 4 are a conditioning frame",
                "give a VideoCrafter checkpoint, which has 4",
            )
        if any_of(r"\.to_k_ip\."):
            return Recognised("video", "a VideoCrafter image-to-video network")
        if any_of(r"\.relative_position_k\.") and not any_of(r"\.temopral_conv\."):
            return Recognised("video", "a VideoCrafter1 text-to-video network", "its hyper-parameters differ from 2's")
        return Recognised("video", "a VideoCrafter2 text-to-video network")
    if channels != 4:
        return Recognised("other", f"an image network of {channels} input channels (inpainting or depth)",
                          "give Stable Diffusion 2.1-base, which has 4")  # fmt: skip
    return _image(shapes, r"input_blocks\.\d+\.1\.", "LDM")


def _diffusers(shapes: Mapping[str, tuple[int, ...]], any_of) -> Recognised:
    if any_of(r"\.temp_(attentions|convs)\.|^transformer_in\."):
        return Recognised(
            "stock", "a video network of diffusers (UNet3DConditionModel)", "convert it first: `vc2 convert`"
        )
    if any_of(r"motion_modules\.|temporal_transformer"):
        return Recognised("other", "a video network of diffusers of another kind (AnimateDiff or SVD)")
    if any_of(r"^encoder\.") or not any_of(r"attn2\.to_k\.weight"):
        return Recognised("other", "a network of diffusers that reads no text")
    if (channels := shapes["conv_in.weight"][1]) != 4:
        return Recognised("other", f"an image network of {channels} input channels (inpainting or depth)",
                          "give Stable Diffusion 2.1-base, which has 4")  # fmt: skip
    return _image(shapes, r"down_blocks\.\d+\.attentions\.", "diffusers")


def _image(shapes: Mapping[str, tuple[int, ...]], attention: str, scheme: str) -> Recognised:
    width = next((shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), 0)
    projection = next(
        (shape for name, shape in shapes.items() if re.match(attention, name) and name.endswith("proj_in.weight")), ()
    )
    if width == 768 or (len(projection) == 4 and shapes.get("time_embed.0.weight", (0, 320))[1] == 320):
        return Recognised(
            "other",
            f"Stable Diffusion 1.x: its text tokens are {width} wide and its transformers project with convolutions",
            "give Stable Diffusion 2.1-base, whose tokens are 1024 wide",
        )
    if width == 2048:
        return Recognised("other", "Stable Diffusion XL, another network", "give Stable Diffusion 2.1-base")
    return Recognised("image", f"an image network (Stable Diffusion 2.x, {scheme} names)")


def _part(any_of) -> Recognised:
    if any_of(r"^first_stage_model\.|^encoder\.(down|down_blocks)\.\d+\.|^decoder\.(up|up_blocks)\.\d+\."):
        return Recognised("other", "an autoencoder alone", "give the file of the denoising network")
    if any_of(r"^image_proj_model\.|(^|\.)visual\.|^vision_model\.") and not any_of(r"(^|\.)token_embedding\."):
        return Recognised("other", "an image tower alone", "give the file of the denoising network")
    if any_of(r"^cond_stage_model\.|(^|\.)token_embedding\.|^text_model\.|(^|\.)transformer\.resblocks\."):
        return Recognised("other", "a text tower (CLIP) alone", "give the file of the denoising network")
    return Recognised("other", "no network that vc2 knows")


def _bare(name: str) -> str:
    """A name without what checkpoints put before the names of the denoising network."""
    return name.removeprefix("_forward_module.").removeprefix("model.diffusion_model.")


def _is_optimizer(tensors: Tensors) -> bool:
    words = {"optimizer_state_dict", "param_groups", "base_optimizer_state", "fp32_flat_groups"}
    if words.intersection(tensors.beside) or words.intersection(tensors):
        return not any(re.search(r"blocks\.\d+\.", name) for name in tensors)
    return bool(tensors) and all(re.search(r"(^|\.)(exp_avg|exp_avg_sq|step)$", name) for name in tensors)


# ---- noise or velocity ----


def declares_v_prediction(tensors: Tensors) -> str:
    """What says that an image network predicts velocity instead of noise; empty when nothing says so.

    Stable Diffusion 2.1-768 has the names and shapes of 2.1-base, so only what is declared around the tensors can tell:
    the scheduler of a diffusers folder, the YAML file beside a checkpoint, the metadata of a safetensors file, and the
    names the files were published under.
    """
    path = tensors.path
    for name, value in tensors.metadata.items():
        declared = f"{name}={value}".lower()
        if name.startswith("modelspec.") and re.search(r"prediction_type=v|architecture=.*768-v|-768-v", declared):
            return f"its metadata says {name}={value}"
    if path is None:
        return ""
    for folder in (path.parent, path.parent.parent):
        scheduler = folder / "scheduler" / "scheduler_config.json"
        if scheduler.is_file() and re.search(r'"prediction_type"\s*:\s*"v', scheduler.read_text()):
            return f"{scheduler} says prediction_type v_prediction"
    for config in (path.with_suffix(".yaml"), path.with_suffix(".yml")):
        if config.is_file() and re.search(r"^\s*parameterization\s*:\s*['\"]?v\b", config.read_text(), re.MULTILINE):
            return f"{config} says parameterization v"
    if re.search(r"(v2-1_768|(^|[^0-9])768-v)", path.name):
        return f"{path.name} is the published name of the 768 checkpoint"
    return ""
