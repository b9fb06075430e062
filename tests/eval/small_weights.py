"""Small networks that were never trained, in the forms of file that users have."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torchvision.models.optical_flow import raft_large
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    PreTrainedTokenizerFast,
    Sam2VideoConfig,
    Sam2VideoModel,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    ViTConfig,
    ViTModel,
)

from vc2.eval.networks.inception import _network

__all__ = [
    "LABELS",
    "WORDS",
    "clip_of_images",
    "save_blip2",
    "save_clip",
    "save_grounding_dino",
    "save_inception",
    "save_raft",
    "save_sam2",
    "small_files",
    "videomae",
    "vit",
]

LABELS = [f"doing thing {number}" for number in range(400)]  #: actions that `videomae` knows
WORDS = ("a", "red", "green", "cat", "dog", "bird", "car", "runs", "sits", "flies", "over", "hill", "sea", "sky", "old")


def save_clip(folder: Path) -> Path:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextConfig(**size, projection_dim=16)
    vision = CLIPVisionConfig(**size, image_size=64, patch_size=16, projection_dim=16)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    model = CLIPModel(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    place = folder / "clip" / "model.safetensors"
    place.parent.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, place)
    config.to_json_file(place.parent / "config.json")
    return place


def save_raft(folder: Path) -> Path:
    """RAFT that sees motion of about half a pixel."""
    torch.manual_seed(1)
    state = raft_large(weights=None).state_dict()
    for kind in ("weight", "bias"):
        state[f"update_block.flow_head.conv2.{kind}"] *= 0.03
    torch.save(state, folder / "raft.pth")
    return folder / "raft.pth"


def save_inception(folder: Path) -> Path:
    """Inception whose classes depend on the picture."""
    torch.manual_seed(2)
    network = _network()
    for part in network.modules():
        if isinstance(part, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
    torch.save(network.state_dict(), folder / "inception.pth")
    return folder / "inception.pth"


def small_files(folder: Path) -> dict[str, str]:
    """Files of those networks by their names, for `EvaluateStage.files`."""
    return {
        "clip-vit-b-32": str(save_clip(folder)),
        "raft-things": str(save_raft(folder)),
        "inception-2015-12-05": str(save_inception(folder)),
    }


def videomae() -> VideoMAEForVideoClassification:
    """Sees actions: two blocks of width 64 on 32 x 32 pixels."""
    config = VideoMAEConfig(
        image_size=32,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=128,
        layer_norm_eps=1e-6,
        num_labels=400,
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
    )
    model, draws = VideoMAEForVideoClassification(config).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.1)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model


def save_blip2(folder: Path) -> Path:
    """A BLIP-2 of random weights on disk, whose captions depend on the picture."""
    vocabulary = {word: number for number, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    images = BlipImageProcessor(size={"height": 28, "width": 28})
    processor = Blip2Processor(images, tokenizer, num_query_tokens=4)  # adds the token <image>
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config={**sizes, "intermediate_size": 64, "image_size": 28, "patch_size": 14},
        qformer_config={**sizes, "intermediate_size": 64, "vocab_size": 50, "max_position_embeddings": 64},
        text_config={
            **sizes,
            "model_type": "opt",
            "vocab_size": len(tokenizer),
            "ffn_dim": 64,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 64,
            "bos_token_id": 2,
            "eos_token_id": 2,
            "pad_token_id": 1,
        },
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model, draws = Blip2ForConditionalGeneration(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.dim() > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=draws) * scale)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
        model.language_projection.weight.mul_(10)
    path = folder / "blip2"
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def save_grounding_dino(folder: Path) -> Path:
    """A Grounding DINO of random weights; its text knows seven words, at the numbers that the network has built in."""
    path = folder / "grounding-dino"
    path.mkdir()
    words = [f"[unused{number}]" for number in range(1030)]
    words[0], words[100], words[101], words[102], words[103] = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
    words[1012], words[1029], words[200:203] = ".", "?", ["dog", "traffic", "light"]
    (path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer.from_pretrained(path).save_pretrained(path)
    torch.manual_seed(3)
    config = GroundingDinoConfig(
        backbone_config={
            "model_type": "swin",
            "embed_dim": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 2, 2],
            "window_size": 2,
            "image_size": 32,
            "out_indices": [2, 3, 4],
        },
        text_config={
            "model_type": "bert",
            "vocab_size": 1030,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        },
        num_queries=5,
        d_model=32,
        encoder_layers=1,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_layers=2,
        decoder_ffn_dim=32,
        decoder_attention_heads=2,
        max_text_len=16,
    )
    model = GroundingDinoForObjectDetection(config)
    with torch.no_grad():  # wide boxes that depend on the picture
        for parameter in model.bbox_embed[0].parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    model.save_pretrained(path)
    return path


def save_sam2(folder: Path) -> Path:
    """A SAM 2 of random weights on 64 x 64 pixels, that always sees something."""
    path = folder / "sam2"
    torch.manual_seed(0)
    config = Sam2VideoConfig(
        vision_config={
            "model_type": "sam2_vision_model",
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": 8,
                "image_size": [64, 64],
                "blocks_per_stage": [1, 1, 2, 1],
                "embed_dim_per_stage": [8, 16, 32, 64],
                "num_attention_heads_per_stage": [1, 1, 2, 2],
                "window_size_per_stage": [4, 2, 2, 2],
                "global_attention_blocks": [3],
                "window_positional_embedding_background_size": [2, 2],
            },
            "backbone_channel_list": [64, 32, 16, 8],
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            "fpn_hidden_size": 128,
        },
        prompt_encoder_config={"hidden_size": 128, "image_size": 64, "patch_size": 16, "mask_input_channels": 8},
        mask_decoder_config={"hidden_size": 128, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
        image_size=64,
        memory_attention_hidden_size=128,
        memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=32,
        memory_attention_rope_feat_sizes=[4, 4],
        memory_encoder_hidden_size=128,
        mask_downsampler_embed_dim=128,
        memory_fuser_embed_dim=128,
        memory_fuser_intermediate_dim=32,
        memory_fuser_num_layers=1,
    )
    model = Sam2VideoModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        list(model.mask_decoder.pred_obj_score_head.parameters())[-1].fill_(50)
    model.save_pretrained(path)
    return path


def vit() -> ViTModel:
    """DINO's network, two blocks of width 128 on squares of 64 pixels."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        image_size=64,
        patch_size=16,
        layer_norm_eps=1e-6,
    )
    model = ViTModel(config, add_pooling_layer=False).eval()
    for parameter in model.parameters():  # norms and biases too, which begin as ones and zeros
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def clip_of_images() -> CLIPModel:
    """CLIP whose pictures matter alone: two blocks of width 128 on squares of 32 pixels, 24 numbers a picture."""
    torch.manual_seed(0)
    config = CLIPConfig(
        vision_config={
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 256,
            "image_size": 32,
            "patch_size": 8,
        },
        text_config={
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "intermediate_size": 64,
            "vocab_size": 100,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        projection_dim=24,
    )
    model = CLIPModel(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model
