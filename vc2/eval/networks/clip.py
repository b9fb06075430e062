"""CLIP (Radford et al. 2021): embeddings of frames and of texts in one space.

The weights are one safetensors file of the transformers form; its shape is ViT-B/32 unless a `config.json` lies beside.
Texts are cut into OpenAI's byte pairs at 77 tokens.

How a frame is brought to 224 x 224 decides what comes out, so each way has a name:

    opencv        OpenCV's bilinear interpolation, values 0..255, not normalised       EvalCrafter's CLIP_Score
    torchvision   torch's bilinear interpolation without antialiasing, 0..255          its CLIP_Temp, Face, SD_Score
    unit          as torchvision, values 0..1                                          its SDXL images
    proper        bicubic to a short side of 224, centre cut, CLIP's mean and deviation   as CLIP was trained

Shapes: T frames, H x W pixels, D width of an embedding.
"""

from pathlib import Path
from typing import Any, Literal, Self

import cv2
import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from vc2.eval.networks.public_names import fill
from vc2.model.files import open_weights

__all__ = ["Clip", "Preparation", "prepared"]

Preparation = Literal["opencv", "torchvision", "unit", "proper"]

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def prepared(frames: np.ndarray, how: Preparation, size: int = 224) -> Tensor:
    """Frames (T, H, W, 3) uint8 RGB as CLIP's input, (T, 3, size, size) float32."""
    if how == "opencv":
        resized = np.stack([cv2.resize(np.ascontiguousarray(frame), (size, size)) for frame in frames])
        return rearrange(torch.from_numpy(resized), "t h w c -> t c h w").float()
    pixels = rearrange(torch.from_numpy(np.ascontiguousarray(frames)), "t h w c -> t c h w").float()
    if how != "proper":
        pixels = torch.nn.functional.interpolate(pixels, (size, size), mode="bilinear", align_corners=False)
        return pixels / 255 if how == "unit" else pixels
    height, width = pixels.shape[-2:]
    scale = size / min(height, width)
    shape = max(size, round(height * scale)), max(size, round(width * scale))
    pixels = torch.nn.functional.interpolate(pixels, shape, mode="bicubic", antialias=True, align_corners=False)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    pixels = pixels[..., top : top + size, left : left + size].clamp(0, 255) / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]


class Clip:
    """Both towers of CLIP."""

    def __init__(self, model: CLIPModel, device: torch.device) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self.model: Any = model.eval().requires_grad_(False)
        self.device = device
        self.model.to(device)
        self._tokenizer = SimpleTokenizer()

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Self:
        """CLIP from a safetensors file.

        Raises:
            WeightsError: If its tensors are not those of the network.
        """
        config = path.parent / "config.json"
        model = CLIPModel(CLIPConfig.from_json_file(config) if config.is_file() else CLIPConfig())
        cause = "not CLIP ViT-B/32, or of another shape without its config.json beside it"
        fill(model, open_weights(path), spared=lambda name: name.endswith("position_ids"), cause=cause)
        return cls(model, device)

    @torch.inference_mode()
    def frames(self, frames: np.ndarray, how: Preparation, *, batch: int = 16) -> np.ndarray:
        """Embeddings of frames (T, H, W, 3) uint8 RGB, (T, D) float32, of any length."""
        size = self.model.config.vision_config.image_size
        parts = [
            self._image(prepared(frames[start : start + batch], how, size).to(self.device))
            for start in range(0, len(frames), batch)
        ]
        return torch.cat(parts).cpu().numpy()

    def _image(self, pixels: Tensor) -> Tensor:
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> np.ndarray:
        """Embeddings of texts, (len(texts), D) float32, of any length. What exceeds 77 tokens is cut off."""
        tokens = self._tokenizer(texts, context_length=self.model.config.text_config.max_position_embeddings)
        hidden = self.model.text_model(input_ids=tokens.to(self.device)).last_hidden_state
        ends = tokens.argmax(-1).to(self.device)  # the end-of-text token has the highest number
        pooled = hidden[torch.arange(len(tokens), device=self.device), ends]
        return self.model.text_projection(pooled).cpu().numpy()
