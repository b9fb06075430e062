"""Small networks that were never trained, in the forms of file that users have."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torchvision.models.optical_flow import raft_large
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from vc2.eval.networks.inception import _network

__all__ = ["save_clip", "save_inception", "save_raft", "small_files"]


def save_clip(folder: Path) -> Path:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextConfig(**size, projection_dim=16)
    vision = CLIPVisionConfig(**size, image_size=64, patch_size=16, projection_dim=16)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    model = CLIPModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    place = folder / "clip" / "model.safetensors"
    place.parent.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, place)
    config.to_json_file(place.parent / "config.json")
    return place


def save_raft(folder: Path) -> Path:
    torch.manual_seed(1)
    torch.save(raft_large(weights=None).state_dict(), folder / "raft.pth")
    return folder / "raft.pth"


def save_inception(folder: Path) -> Path:
    torch.manual_seed(2)
    torch.save(_network().state_dict(), folder / "inception.pth")
    return folder / "inception.pth"


def small_files(folder: Path) -> dict[str, str]:
    """Files of those networks by their names, for `EvaluateStage.files`."""
    return {
        "clip-vit-b-32": str(save_clip(folder)),
        "raft-things": str(save_raft(folder)),
        "inception-2015-12-05": str(save_inception(folder)),
    }
