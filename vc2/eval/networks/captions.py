"""Captions of frames by BLIP-2 OPT-2.7B (Li et al. 2023), for BLIP_BLEU.

The benchmark captions five frames of a video, evenly spread. Each is squeezed to the network's square by OpenCV's
bilinear interpolation, without regard to its shape, normalised as CLIP's images are, and described without a prompt by
the most probable words, at most 20 tokens. It hands over frames as OpenCV reads them, blue first: a flaw (`bgr`).

Half precision on a GPU, as published; float32 on a CPU, where BLIP-2 takes 15 GB.
Shapes: N frames, H x W pixels, uint8, red green blue.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import cv2
import numpy as np
import torch
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from vc2.errors import WeightsError
from vc2.eval.networks.folders import WEIGHTS, check_folder, filled, opened

__all__ = ["FILES", "Captioner", "caption_frames"]

FILES = (
    "config.json",
    WEIGHTS,
    ("preprocessor_config.json", "processor_config.json"),
    "tokenizer_config.json",
    ("tokenizer.json", "vocab.json"),
)
MAX_NEW_TOKENS = 20  # the library's default when the benchmark was published


def caption_frames(num_frames: int) -> list[int]:
    """Numbers of the five frames that are captioned: evenly spread from first to last, rounded down; short videos
    repeat some."""
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames}: a video has one frame at least")
    return [(num_frames - 1) * place // 4 for place in range(5)]


class Captioner:
    """Describes frames in words.

    Args:
        model: BLIP-2 with a language model that only decodes, such as OPT.
        processor: Its image normalisation and tokenizer.
    """

    def __init__(self, model: Blip2ForConditionalGeneration, processor: Blip2Processor) -> None:
        self._model, self._processor = model, processor
        self._size = processor.image_processor.size["width"], processor.image_processor.size["height"]

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Self:
        """Open a folder of the hub's form (`Salesforce/blip2-opt-2.7b`).

        Raises:
            PretrainedMissing: If the folder or a file in it is missing.
            WeightsError: If it holds something else.
        """
        check_folder(path, "BLIP-2 (Salesforce/blip2-opt-2.7b)", *FILES)
        processor = opened(Blip2Processor, path)
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        model = filled(Blip2ForConditionalGeneration, path, device, dtype)
        if model.config.image_token_index is None:
            raise WeightsError(
                f"{path}: config.json has no image_token_index, so it is of before 2024; fetch the folder again"
            )
        return cls(model, processor)

    @torch.inference_mode()
    def captions(self, frames: np.ndarray, *, bgr: bool, batch: int = 5) -> list[str]:
        """One caption per frame.

        Args:
            frames: (N, H, W, 3).
            bgr: Swap red and blue first, as the benchmark does by mistake.
            batch: Frames on the device at once.
        """
        squares = [cv2.resize(frame, self._size, interpolation=cv2.INTER_LINEAR) for frame in frames]
        squares = [square[..., ::-1] for square in squares] if bgr else squares
        captions: list[str] = []
        for start in range(0, len(squares), batch):
            captions += self._captions(squares[start : start + batch])
        return captions

    def _captions(self, squares: Sequence[np.ndarray]) -> list[str]:
        model = self._model
        pixels = self._processor.image_processor(
            [np.ascontiguousarray(square) for square in squares],
            do_resize=False,
            input_data_format="channels_last",
            return_tensors="pt",
        )["pixel_values"]
        tokens = model.generate(pixels.to(model.device), max_new_tokens=MAX_NEW_TOKENS, do_sample=False, num_beams=1)
        prompt = model.config.num_query_tokens + 1  # the picture's tokens and the start come back with the answer
        texts = self._processor.tokenizer.batch_decode(tokens[:, prompt:], skip_special_tokens=True)
        return [text.strip() for text in texts]
