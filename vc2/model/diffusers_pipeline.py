"""The whole model as a diffusers pipeline: per-call frame rate, signal scaling, image prompts, LoRA, offloading.

`VideoCrafter2Pipeline` runs our own network on our own sampler (`vc2/model/sampler.py`), behind the interface that
diffusers' users know. What it makes is what `vc2 sample` makes: equal seeds give equal noise, and the text tower in
transformers' form gives the same features within rounding.

`export_full` writes a folder that needs this package to be loaded: by `VideoCrafter2Pipeline.from_pretrained(folder)`
or, through the `pipeline.py` in it, by `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`.
Shapes: B clips, C latent channels, T frames, H x W pixels, h x w latent pixels, L text tokens of width D.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.outputs import BaseOutput
from diffusers.video_processor import VideoProcessor
from einops import rearrange
from PIL import Image
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from vc2.config import Config
from vc2.errors import ConfigError, WeightsError
from vc2.model.bundle import Parts, VideoModel, image_to_released
from vc2.model.config import ImageConfig, LoraConfig, ModelConfig, SamplerConfig, ScheduleConfig, UNetConfig
from vc2.model.diffusers_components import (
    INSIDE,
    VideoCrafter2ImageEncoder,
    VideoCrafter2Scheduler,
    VideoCrafter2UNet,
)
from vc2.model.diffusers_parts import (
    clip_text_model,
    clip_tokenizer,
    diffusers_autoencoder,
    empty_folder,
    holding,
    read_autoencoder,
    read_json,
    read_text_encoder,
)
from vc2.model.files import open_weights, read_weights
from vc2.model.generate import usual_fps
from vc2.model.image import pixels_of, stretched
from vc2.model.sampler import (
    ClipNoise,
    StepResult,
    StopSampling,
    clip_seeds,
    ddim_timesteps,
    dpm_timesteps,
    sample,
)
from vc2.model.text import clean_caption

__all__ = [
    "VideoCrafter2Pipeline",
    "VideoCrafter2PipelineOutput",
    "export_full",
    "import_full",
    "read_full",
]

_DEFAULTS = SamplerConfig()


@dataclass
class VideoCrafter2PipelineOutput(BaseOutput):
    """What a call gives.

    Args:
        frames: The videos, in the form that `output_type` asked for: "np" (B, T, H, W, 3) in [0, 1]; "pt" (B, T, 3, H,
            W) in [0, 1]; "pil" a list of frames per video; "latent" (B, C, T, h, w).
    """

    frames: Tensor | np.ndarray | list[list[Image.Image]]


# ---------------------------------------------------------------------------------------------------------------------
# The pipeline

Callback = Callable[[Any, int, int, dict[str, Any]], dict[str, Any] | None]
Seeds = int | Sequence[int]
Generators = torch.Generator | Sequence[torch.Generator]


class VideoCrafter2Pipeline(DiffusionPipeline, LoraBaseMixin):
    """Text, or an image and text, to video.

    Args:
        vae: Pixels and latents.
        text_encoder: The text tower.
        tokenizer: Its tokens.
        unet: The denoising network.
        scheduler: The noise schedule, which the network was trained with and our sampler runs on. Diffusers' own
            schedulers do not fit here: they know no signal scaling.
        image_encoder: Of an image-to-video network.
        told_fps: Frame rates that the network was told in training, with their weights.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae"
    _optional_components = ["image_encoder"]
    _exclude_from_cpu_offload = ["image_encoder"]  # its towers are not run by their own forward, where hooks would sit
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    _lora_loadable_modules = ["unet"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: VideoCrafter2UNet,
        scheduler: VideoCrafter2Scheduler,
        image_encoder: VideoCrafter2ImageEncoder | None = None,
        told_fps: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(scheduler, VideoCrafter2Scheduler):
            raise ValueError(
                f"`scheduler` is a {type(scheduler).__name__}, expected a VideoCrafter2Scheduler: those of diffusers "
                "have no signal scaling; choose the solver by `solver=` in the call"
            )
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
        )
        self.register_to_config(told_fps=told_fps)
        self.vae_scale_factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        self.video_processor = VideoProcessor(do_resize=False, vae_scale_factor=self.vae_scale_factor)
        self._interrupt = False
        self._guidance_scale = _DEFAULTS.guidance_scale
        self._num_timesteps = 0

    @classmethod
    def from_model(cls, model: VideoModel, *, dtype: torch.dtype | None = None) -> "VideoCrafter2Pipeline":
        """The pipeline of a model of ours; shares its weights, unless `dtype` asks for another type.

        Raises:
            ConfigError: If the text tower's vocabulary is not the tokenizer's.
        """
        with torch.device("meta"):
            unet = VideoCrafter2UNet(shape=model.unet.config.model_dump(mode="json"))
        holding(unet, {INSIDE + name: tensor for name, tensor in model.unet.state_dict().items()}, dtype)
        image_encoder = None
        if model.image is not None:
            image_encoder = VideoCrafter2ImageEncoder(shape=model.image.config.model_dump(mode="json"))
            state = {INSIDE + name: tensor for name, tensor in model.image.state_dict().items()}
            holding(image_encoder, state, dtype)
        return cls(
            vae=diffusers_autoencoder(model.autoencoder, dtype),
            text_encoder=clip_text_model(model.text, dtype),
            tokenizer=clip_tokenizer(model.config.text.context_length),
            unet=unet,
            scheduler=VideoCrafter2Scheduler(schedule=model.schedule.config.model_dump(mode="json")),
            image_encoder=image_encoder,
            told_fps={str(rate): weight for rate, weight in sorted(model.fps.items())},
        )

    @property
    def guidance_scale(self) -> float:
        """Of the next step of the current call: a callback sets `pipe._guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the next step asks the network without the prompt too."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Steps of the current call; where 1000 is no multiple of what was asked for, DDIM takes a few more."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the current call is to stop after its present step: a callback sets `pipe._interrupt = True`."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int = 320,
        width: int = 512,
        num_frames: int = 16,
        num_inference_steps: int = _DEFAULTS.num_steps,
        guidance_scale: float = _DEFAULTS.guidance_scale,
        negative_prompt: str | list[str] | None = None,
        num_videos_per_prompt: int = 1,
        eta: float = _DEFAULTS.eta,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        fps: int | Sequence[int] | None = None,
        image: Any = None,
        seed: Seeds | None = None,
        solver: str = _DEFAULTS.solver,
        guidance_rescale: float = _DEFAULTS.guidance_rescale,
        decode_chunk_size: int = 4,
    ) -> VideoCrafter2PipelineOutput | tuple[Any]:
        """Make videos.

        Args:
            prompt: What they show, one or several.
            height, width: In pixels.
            num_frames: Any number; networks are best at the number they were trained with, 16.
            num_inference_steps: More take longer and look better, up to a point.
            guidance_scale: How strongly the prompt leads; 1 or less: no guidance, half the work.
            negative_prompt: What guidance leads away from, for all prompts or for each; None: the empty prompt.
            num_videos_per_prompt: Videos of every prompt, one after the other.
            eta: Fresh noise in DDIM's steps: 0 none, 1 as in the released model.
            generator: One: its initial seed stands for `seed`. Several: one for each video. No numbers are drawn from
                them, so that the same generator gives the same videos again.
            latents: Noise to begin with, (B, C, T, h, w), instead of drawing it.
            prompt_embeds, negative_prompt_embeds: Token features, (prompts, L, D), instead of the texts.
            output_type: "np", "pt", "pil" or "latent", see `VideoCrafter2PipelineOutput`.
            return_dict: False: a tuple of the frames alone.
            callback_on_step_end: Called after each step with the pipeline, the step's number, its timestep and the
                tensors asked for; what it returns of them, in the same shape, takes their place.
            callback_on_step_end_tensor_inputs: "latents", "prompt_embeds" and "negative_prompt_embeds", or some.
            fps: The frame rate told to the network, one for all, one per prompt or one per video. Low: much motion.
                None: 28 (image-to-video: 8) if the network was told that in training, else what it was told most.
            image: What the video shows, for an image-to-video network: a PIL image, an array (H, W, 3) in [0, 1], a
                tensor (3, H, W) in [0, 1], or a list or batch of them, one for all or one per prompt. Of any size and
                shape: they are stretched to those of the video.
            seed: Of the noise. One: video i has seed + i. Several: one for each video. None: another one each time.
            solver: "ddim", or "dpm++" for few steps.
            guidance_rescale: How much of the guided prediction's excess in spread is taken back, 0 to 1.
            decode_chunk_size: Frames decoded together: bounds the memory, changes nothing else.

        Raises:
            ValueError: If an input does not fit the others or the model.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._check_size(height, width, num_frames)
        self._check_prompts(prompt, prompt_embeds, negative_prompt, negative_prompt_embeds)
        self._check_options(num_inference_steps, output_type, callback_on_step_end_tensor_inputs)
        sampler = SamplerConfig.model_validate(
            {
                "solver": solver,
                "num_steps": num_inference_steps,
                "guidance_scale": max(1.0, guidance_scale),
                "guidance_rescale": guidance_rescale,
                "eta": eta,
            }
        )
        device = self._execution_device
        self._interrupt, self._guidance_scale = False, guidance_scale
        shape = (
            self.unet.net.config.in_channels,
            num_frames,
            height // self.vae_scale_factor,
            width // self.vae_scale_factor,
        )

        text, uncond = self.encode_prompt(
            prompt,
            device,
            num_videos_per_prompt,
            self.do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )
        videos = text.shape[0]
        rates = _rates(self._usual_fps() if fps is None else fps, videos, num_videos_per_prompt)
        tokens, uncond_tokens = self._image_tokens(image, (height, width), videos, num_videos_per_prompt)
        noise = ClipNoise(_seeds(seed, generator, videos), shape, device)
        start = noise.start() if latents is None else self._given_latents(latents, (videos, *shape), device)

        def on_step(result: StepResult) -> Tensor:
            tensors = {"latents": result.latents, "prompt_embeds": text, "negative_prompt_embeds": uncond}
            replaced = self._call_back(callback_on_step_end, result, tensors, callback_on_step_end_tensor_inputs)
            if self._interrupt:
                raise StopSampling(replaced)
            return replaced

        timesteps = ddim_timesteps if solver == "ddim" else dpm_timesteps
        self._num_timesteps = len(timesteps(len(self.scheduler), num_inference_steps))
        with self.progress_bar(total=self._num_timesteps) as bar:
            clean = sample(
                self.unet,
                self.scheduler.schedule,
                start,
                text,
                uncond,
                sampler,
                rates if isinstance(rates, int) else rates.to(device),
                noise,
                lambda done, total: bar.update(),
                image=tokens,
                uncond_image=uncond_tokens,
                on_step=on_step,
                guidance_scale=lambda: max(1.0, self._guidance_scale),
            )
        frames = clean
        if output_type != "latent":
            pixels = self.decode_latents(clean, decode_chunk_size)
            frames = self.video_processor.postprocess_video(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return VideoCrafter2PipelineOutput(frames=frames) if return_dict else (frames,)

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | str,
        num_videos_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        *,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Token features of the prompts and of what guidance leads away from, (B, L, D) each, one of every video.

        What is given as features is taken, what is given as text is encoded. Without guidance the second is None.
        """
        text = self._features([prompt] if isinstance(prompt, str) else prompt, prompt_embeds, device)
        prompts = text.shape[0]
        text = text.repeat_interleave(num_videos_per_prompt, dim=0)
        if not do_classifier_free_guidance:
            return text, None
        negative = [negative_prompt or ""] if not isinstance(negative_prompt, list) else negative_prompt
        uncond = self._features(negative, negative_prompt_embeds, device)
        uncond = uncond.repeat_interleave(num_videos_per_prompt * (prompts // uncond.shape[0]), dim=0)
        return text, uncond

    def decode_latents(self, latents: Tensor, decode_chunk_size: int = 4) -> Tensor:
        """Scaled latents, (B, C, T, h, w) -> pixels around [-1, 1], (B, 3, T, H, W), float32."""
        vae: Any = self.vae
        images = rearrange(latents, "b c t h w -> (b t) c h w") / vae.config.scaling_factor
        parts = [vae.decode(chunk.to(vae.dtype), return_dict=False)[0] for chunk in images.split(decode_chunk_size)]
        return rearrange(torch.cat(parts).float(), "(b t) c h w -> b c t h w", b=latents.shape[0])

    def _call_back(
        self,
        callback: Callback | PipelineCallback | MultiPipelineCallbacks | None,
        result: StepResult,
        tensors: Mapping[str, Tensor | None],
        names: Sequence[str],
    ) -> Tensor:
        """Show a callback the tensors it asked for; the latents it wants to go on with."""
        if callback is None:
            return result.latents
        asked = {name: tensors[name] for name in names}
        changed = callback(cast(Any, self), result.number, result.timestep, asked) or {}
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            features, given = tensors[name], changed.get(name)
            if features is None or given is None:
                continue
            if not self.do_classifier_free_guidance and torch.equal(features[-given.shape[0] :], given):
                continue  # diffusers' cutoff of guidance keeps the rear, where other pipelines have the prompt's half
            if given.shape != features.shape:
                raise ValueError(
                    f"`callback_on_step_end` gave `{name}` of shape {tuple(given.shape)}, expected "
                    f"{tuple(features.shape)}: one of every video."
                )
            # In place: the sampler holds these very tensors. What is given may be a view of them.
            features.copy_(given.clone())
        return changed.get("latents", result.latents)

    def _usual_fps(self) -> int:
        told = {int(rate): weight for rate, weight in (self.config["told_fps"] or {}).items()}
        return usual_fps(self.unet.net.config, told)

    def _features(self, prompts: list[str] | None, given: Tensor | None, device: torch.device | str) -> Tensor:
        if given is not None:
            return given.to(device)
        captions = [clean_caption(prompt) for prompt in prompts or []]
        longest = self.tokenizer.model_max_length
        tokens = self.tokenizer(
            captions, padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
        ).input_ids
        return self.text_encoder(tokens.to(device)).last_hidden_state

    def _image_tokens(
        self, image: Any, size: tuple[int, int], videos: int, per_prompt: int
    ) -> tuple[Tensor | None, Tensor | None]:
        reads_images = self.unet.net.config.use_image_attention
        if image is None and not reads_images:
            return None, None
        if not reads_images:
            raise ValueError("`image` is given, but this is a text-to-video network, which reads none: leave it out.")
        if image is None:
            raise ValueError("This is an image-to-video network: give `image`.")
        if self.image_encoder is None:
            raise ValueError("`image` is given, but this pipeline has no `image_encoder`: load it whole.")
        pixels = self._pixels(image, size)
        places = _for_each(range(pixels.shape[0]), "image", videos, per_prompt)
        tokens = self.image_encoder(pixels)[torch.tensor(places)]
        return tokens, self.image_encoder(torch.zeros_like(pixels[:1])) if self.do_classifier_free_guidance else None

    def _pixels(self, image: Any, size: tuple[int, int]) -> Tensor:
        """Images in [-1, 1], (images, 3, H, W), stretched to (H, W)."""
        images = image if isinstance(image, list | tuple) else [image]
        bytes_or_levels = [pixels_of(one) / np.float32(255) if isinstance(one, Image.Image) else one for one in images]
        return torch.cat([stretched(self.video_processor.preprocess(one), *size) for one in bytes_or_levels])

    def _given_latents(self, latents: Tensor, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
        if tuple(latents.shape) != shape:
            raise ValueError(f"`latents` are {tuple(latents.shape)}, expected {shape}")
        return latents.to(device, torch.float32)

    def _check_size(self, height: int, width: int, num_frames: int) -> None:
        multiple = self.vae_scale_factor * self.unet.net.config.downsampling
        if height < 1 or width < 1 or height % multiple or width % multiple:
            raise ValueError(f"`height` and `width` have to be multiples of {multiple} but are {height} and {width}.")
        if num_frames < 1:
            raise ValueError(f"`num_frames` has to be at least 1 but is {num_frames}.")

    def _check_prompts(
        self, prompt: Any, prompt_embeds: Tensor | None, negative_prompt: Any, negative_prompt_embeds: Tensor | None
    ) -> None:
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("Provide either `prompt` or `prompt_embeds`, and not both.")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("Provide either `negative_prompt` or `negative_prompt_embeds`, not both.")
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if text is not None and not isinstance(text, str | list):
                raise ValueError(f"`{name}` has to be of type `str` or `list` but is {type(text)}.")
            if isinstance(text, list) and (not text or not all(isinstance(part, str) for part in text)):
                raise ValueError(f"`{name}` has to be a list of texts, at least one, but is {text}.")
        width = self.unet.net.config.context_dim
        for name, features in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
            if features is not None and (features.dim() != 3 or features.shape[2] != width):
                raise ValueError(f"`{name}` is {tuple(features.shape)}, expected (prompts, tokens, {width}).")
        prompts = prompt_embeds.shape[0] if prompt_embeds is not None else 1 if isinstance(prompt, str) else len(prompt)
        negatives = len(negative_prompt) if isinstance(negative_prompt, list) else 1
        negatives = negatives if negative_prompt_embeds is None else negative_prompt_embeds.shape[0]
        if negatives not in (1, prompts):
            raise ValueError(
                f"There are {negatives} negative prompts for {prompts} prompts: give one, or one for each."
            )

    def _check_options(self, num_inference_steps: int, output_type: str, tensor_inputs: Sequence[str]) -> None:
        if not 1 <= num_inference_steps <= len(self.scheduler):
            raise ValueError(
                f"`num_inference_steps` has to be from 1 to {len(self.scheduler)} but is {num_inference_steps}."
            )
        if output_type not in ("np", "pt", "pil", "latent"):
            raise ValueError(f"`output_type` has to be 'np', 'pt', 'pil' or 'latent' but is {output_type!r}.")
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be in {self._callback_tensor_inputs}, but found {unknown}"
            )

    def load_lora_weights(  # pyright: ignore[reportIncompatibleMethodOverride] - theirs takes anything
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        *,
        weight_name: str = LORA_WEIGHT_NAME_SAFE,
    ) -> None:
        """Load a LoRA into the network and use it.

        Args:
            pretrained_model_name_or_path_or_dict: A safetensors file, a folder with one, or its tensors: what
                `vc2.model.lora.save_lora` wrote, or `save_lora_weights` here.
            adapter_name: What to call it; None: `default_0`, `default_1`, ...
            weight_name: Of the file in a folder.

        Raises:
            WeightsError: If it is no LoRA, or one for another network.
        """
        if isinstance(pretrained_model_name_or_path_or_dict, Mapping):
            what, stored, settings = "state dict", dict(pretrained_model_name_or_path_or_dict), None
        else:
            path = Path(pretrained_model_name_or_path_or_dict)
            path = path / weight_name if path.is_dir() else path
            what, (stored, settings) = str(path), _read_lora(path)
        state = {INSIDE + name.removeprefix("unet.").removeprefix(INSIDE): tensor for name, tensor in stored.items()}
        layers = {name.rpartition(".lora_")[0] for name in state}
        unknown = sorted(layers - {name for name, _ in self.unet.named_modules()})
        if unknown or not layers:
            raise WeightsError(
                f"{what}: {len(unknown)} of its {len(layers)} layers are not in this network"
                + (f" ({', '.join(unknown[:3])}, ...)" if unknown else "")
                + ": not a LoRA of this network"
            )
        if settings is not None:
            settings = settings | {"target_modules": sorted(layers)}
        self.unet.load_lora_adapter(state, prefix=None, adapter_name=adapter_name, metadata=settings, _pipeline=self)

    def save_lora_weights(  # pyright: ignore[reportIncompatibleMethodOverride] - theirs is told the tensors
        self, save_directory: str | Path, adapter_name: str | None = None, *, weight_name: str = LORA_WEIGHT_NAME_SAFE
    ) -> None:
        """Write a LoRA of the network to a safetensors file in a folder, for `load_lora_weights`.

        Args:
            save_directory: The folder.
            adapter_name: Which one; None: the only one there is.
            weight_name: Of the file.

        Raises:
            ValueError: If there is no such adapter, or there are several and none is named.
        """
        from peft.utils import get_peft_model_state_dict

        known = list(getattr(self.unet, "peft_config", {}))
        name = adapter_name or (known[0] if len(known) == 1 else None)
        if name not in known:
            raise ValueError(f"`adapter_name` is {adapter_name!r}, the network has the adapters {known}: name one")
        state = get_peft_model_state_dict(cast(Any, self.unet), adapter_name=str(name))
        layers: dict[str, Any] = {place.removeprefix(INSIDE): tensor for place, tensor in state.items()}
        settings = self.unet.peft_config[name].to_dict()
        self._save_lora_weights(str(save_directory), {"unet": layers}, {"unet": settings}, weight_name=weight_name)

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the adapters to the weights they update: as fast as without, the same within rounding."""
        super().fuse_lora(components or ["unet"], lora_scale, safe_fusing, adapter_names, **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Take them out again."""
        super().unfuse_lora(components or ["unet"], **kwargs)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As diffusers' own, with `pipeline.py` and `README.md`: `DiffusionPipeline` can load the folder.

        Raises:
            ValueError: If the network has adapters, whose layers no folder can hold.
        """
        if adapters := list(getattr(self.unet, "peft_config", {})):
            raise ValueError(
                f"the network has the adapters {adapters}: write them by `save_lora_weights`; to write them into the "
                "network, `fuse_lora()` first; then take them out by `unload_lora_weights()`"
            )
        super().save_pretrained(str(save_directory), *args, **kwargs)
        _complete(Path(save_directory))

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As diffusers' own, less the mentions of code in the folder: whoever has this class needs no other."""
        config = super().load_config(*args, **kwargs)
        if not isinstance(config, dict):
            return config
        return {
            name: cls.__name__ if name == "_class_name" else [_COMPONENTS, value[1]] if _is_ours(value) else value
            for name, value in config.items()
        }


def _rates(fps: Any, videos: int, per_prompt: int) -> int | Tensor:
    """Frame rates of any kind of integers as the sampler takes them: one, or one per video."""
    fps = fps.tolist() if isinstance(fps, Tensor | np.ndarray) else fps
    if isinstance(fps, Integral):
        return int(fps)
    return torch.tensor([int(rate) for rate in _for_each(fps, "fps", videos, per_prompt)])


def _for_each(values: Sequence[Any], name: str, videos: int, per_prompt: int) -> list[Any]:
    """One value per video out of one for all, one per prompt or one per video."""
    values = list(values)
    if len(values) == 1:
        return values * videos
    if len(values) == videos:
        return values
    if len(values) * per_prompt == videos:
        return [value for value in values for _ in range(per_prompt)]
    raise ValueError(f"`{name}`: {len(values)} for {videos} videos; give one for all, one per prompt or one per video")


def _seeds(seed: Seeds | None, generator: Generators | None, videos: int) -> list[int]:
    if seed is not None and generator is not None:
        raise ValueError("Provide either `seed` or `generator`, not both.")
    if isinstance(generator, torch.Generator):
        seed = generator.initial_seed()
    elif generator is not None:
        seed = [one.initial_seed() for one in generator]
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    if isinstance(seed, int | Integral):
        return clip_seeds(int(seed), videos)
    if len(seed) != videos:
        raise ValueError(f"There are {len(seed)} seeds or generators for {videos} videos: give one, or one for each.")
    return list(seed)


def _read_lora(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors of a LoRA file, and the settings of peft; None where the file has none."""
    state, ours = read_weights(path, LoraConfig)
    if ours is not None:
        return dict(state), {"r": ours.rank, "lora_alpha": ours.alpha, "lora_dropout": ours.dropout}
    with safe_open(str(path), framework="pt") as file:
        theirs = (file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
    if theirs is None:
        return dict(state), None
    return dict(state), {name.removeprefix("unet."): value for name, value in json.loads(theirs).items()}


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def export_full(model: VideoModel, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the whole model as a folder for `VideoCrafter2Pipeline.from_pretrained`.

    Args:
        model: The model.
        folder: A new or empty folder.
        dtype: Type of all weights; None keeps those they have.

    Raises:
        ConfigError: If the folder is in use, or the text tower's vocabulary is not the tokenizer's.
    """
    pipeline = VideoCrafter2Pipeline.from_model(model, dtype=dtype)
    pipeline.save_pretrained(empty_folder(folder))


def import_full(folder: str | Path) -> VideoModel:
    """The model of a folder of `export_full` or of the pipeline's `save_pretrained`, in float32 on the CPU.

    Raises:
        ConfigError: If the folder holds another pipeline, or networks of another kind.
        WeightsError: If tensors are missing, unexpected, or of another shape.
    """
    return read_full(folder).load()


def read_full(folder: str | Path) -> Parts:
    """The parts in such a folder, their tensors unread.

    Raises:
        ConfigError: If the folder holds another pipeline, or networks of another kind.
        WeightsError: If a file of tensors is missing.
    """
    folder = Path(folder)
    index = read_json(folder / "model_index.json")
    name = index.get("_class_name")
    if (name[-1] if isinstance(name, list) and name else name) != VideoCrafter2Pipeline.__name__:
        raise ConfigError(f"{folder}: a folder for {name!r}; expected one for {VideoCrafter2Pipeline.__name__!r}")
    schedule = _shape_in(folder / "scheduler" / "scheduler_config.json", "schedule", ScheduleConfig)
    unet_config = _shape_in(folder / "unet" / "config.json", "shape", UNetConfig)
    unet = open_weights(folder, part="unet").renamed(lambda name: name.removeprefix(INSIDE))
    image_config = image = None
    if (folder / "image_encoder").is_dir():
        image_config = _shape_in(folder / "image_encoder" / "config.json", "shape", ImageConfig)
        tensors = open_weights(folder, part="image_encoder").renamed(lambda name: name.removeprefix(INSIDE))
        image = image_to_released(tensors)
    autoencoder_config, autoencoder = read_autoencoder(folder)
    text_config, text = read_text_encoder(folder)
    config = ModelConfig(
        unet=unet_config,
        schedule=schedule,
        autoencoder=autoencoder_config,
        text=text_config,
        image=image_config,
    )
    fps = {int(rate): int(weight) for rate, weight in (index.get("told_fps") or {}).items()}
    return Parts(config, unet, autoencoder, text, image, fps=fps)


C = TypeVar("C", bound=Config)


def _shape_in(path: Path, name: str, config_class: type[C]) -> C:
    try:
        return config_class.model_validate(read_json(path).get(name))
    except ValidationError as error:
        raise ConfigError(f"{path}: {name} is no {config_class.__name__}: {error.errors()[0]['msg']}") from None


def _complete(folder: Path) -> None:
    """Add to a saved pipeline what lets `DiffusionPipeline` load it, and what a reader should know."""
    (folder / "pipeline.py").write_text(_PIPELINE_CODE, encoding="utf-8")
    index = read_json(folder / "model_index.json")
    index["_class_name"] = ["pipeline", VideoCrafter2Pipeline.__name__]
    for name, value in index.items():
        if _is_ours(value):
            # A hub refuses folders with components from anywhere but diffusers and the component's own folder.
            index[name] = [_COMPONENTS_FILE, value[1]]
            (folder / name / f"{_COMPONENTS_FILE}.py").write_text(_COMPONENTS_CODE, encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if not (folder / "README.md").exists():
        (folder / "README.md").write_text(_CARD, encoding="utf-8")


def _is_ours(value: Any) -> bool:
    """Whether an entry of `model_index.json` is a component of ours: library and class."""
    return isinstance(value, list | tuple) and len(value) == 2 and value[0] in (_COMPONENTS, _COMPONENTS_FILE)


_COMPONENTS = VideoCrafter2UNet.__module__
_COMPONENTS_FILE = "components"

_PIPELINE_CODE = '''"""Where diffusers finds this pipeline: in the package vc2, which has to be installed."""

from vc2.model.diffusers_pipeline import VideoCrafter2Pipeline

__all__ = ["VideoCrafter2Pipeline"]
'''

_COMPONENTS_CODE = '''"""Where diffusers finds this component: in the package vc2, which has to be installed."""

from vc2.model.diffusers_components import (
    VideoCrafter2ImageEncoder,
    VideoCrafter2Scheduler,
    VideoCrafter2UNet,
)

__all__ = ["VideoCrafter2ImageEncoder", "VideoCrafter2Scheduler", "VideoCrafter2UNet"]
'''

_CARD = """---
library_name: diffusers
pipeline_tag: text-to-video
---

# Text to video

A VideoCrafter2 network as a diffusers pipeline, written by vc2. Its code is in the package `vc2`, which has to be
installed (`pip install` of the vc2 repository); the few lines of code in this folder only import it. diffusers runs
them if it is told `trust_remote_code=True`:

```python
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_video

pipe = DiffusionPipeline.from_pretrained("path/of/this/folder", trust_remote_code=True).to("cuda")
video = pipe("a cat in the rain", fps=28, seed=0)
export_to_video(video.frames[0], "cat.mp4", fps=10)
```

Or, which trusts nothing but the installed package:

```python
from vc2.model.diffusers_pipeline import VideoCrafter2Pipeline

pipe = VideoCrafter2Pipeline.from_pretrained("path/of/this/folder")
```
"""
