"""The frozen text tower: captions to the tokens that the network reads.

OpenCLIP's text transformer (Radford et al. 2021; Cherti et al. 2023), cut before its last layer, its final norm kept,
neither pooled nor projected. Captions become start token, text, end token, and padding 0; what is too long loses its
tail but keeps the end token.

Without trained weights a *seeded* tower serves: its token embeddings outweigh everything that is added to them, so that
words stay what they are at any place, and unlike words stay unlike.
Shapes: B captions, L tokens each, D width.
"""

from collections.abc import Mapping, Sequence

import torch
from open_clip.tokenizer import SimpleTokenizer, get_clean_fn
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from vc2.errors import ConfigError
from vc2.model.config import TextConfig
from vc2.model.files import fill
from vc2.model.weights import part_of_checkpoint
from vc2.seeding import generator

__all__ = ["TextEncoder", "clean_caption", "vocabulary"]

_PLACE_WEIGHT = 0.3  # how much of a seeded token is its place: enough to tell the order of words
_BLOCK_WEIGHT = 0.3  # how much a seeded block adds to a token


class TextEncoder(nn.Module):
    """Captions to token features. Frozen and in evaluation mode.

    With `config.seed` set the tower is drawn from the seed, the same on every machine; else its values are arbitrary
    until weights are loaded (`from_released`).
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.tower = TextTransformer(
            context_length=config.context_length,
            vocab_size=config.vocab_size,
            width=config.width,
            heads=config.heads,
            layers=config.layers_used,
            output_dim=None,  # no projection
            pool_type="none",
        )
        self._tokenizer = SimpleTokenizer(context_length=config.context_length)
        if config.seed is not None:
            _draw(self.tower, config.seed)
        self.requires_grad_(False).eval()

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """(B,) captions -> (B, L) token numbers.

        Raises:
            ConfigError: If the tower's vocabulary is not the tokenizer's.
        """
        if self.config.vocab_size < self._tokenizer.vocab_size:
            raise ConfigError(
                f"vocab_size={self.config.vocab_size} is smaller than the tokenizer's {self._tokenizer.vocab_size}: "
                "give the tower that many, or call encode_tokens with numbers of your own"
            )
        return self._tokenizer(list(captions))

    @torch.no_grad()
    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """(B, L) token numbers -> (B, L, D) features, in the tower's type and on its device."""
        tower = self.tower
        tokens = tokens.to(tower.positional_embedding.device)
        x = tower.token_embedding(tokens) + tower.positional_embedding[: tokens.shape[1]]
        # The whole transformer, not block by block: only it knows whether its blocks want the batch axis first.
        later = torch.full((tokens.shape[1],) * 2, float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        x = tower.transformer(x, attn_mask=later)
        return tower.ln_final(x)

    def encode(self, captions: Sequence[str]) -> Tensor:
        """(B,) captions -> (B, L, D) features; the empty caption is the unconditional one."""
        return self.encode_tokens(self.tokenize(captions))

    @classmethod
    def from_released(cls, config: TextConfig, state_dict: Mapping[str, Tensor]) -> "TextEncoder":
        """The tower of a released or OpenCLIP checkpoint.

        Args:
            config: Its shape; `layers` as stored, `layers_used` as run.
            state_dict: Names with or without the prefix `cond_stage_model.model.`.

        Raises:
            WeightsError: If any tensor that is used is missing or of another shape, or one is of no known use.
        """
        encoder = cls(config.evolve(seed=None))
        unused = ("text_projection", "logit_scale", "attn_mask", "visual.")
        unused += tuple(f"transformer.resblocks.{layer}." for layer in range(config.layers_used, config.layers))
        state = part_of_checkpoint(state_dict, "cond_stage_model.model.")
        used = state.renamed(lambda name: None if name.startswith(unused) else name)
        fill(encoder.tower, used, what="text tower", cause="" if used else "there is no text tower in it")
        return encoder


def clean_caption(caption: str) -> str:
    """The caption as it is cut into tokens: broken Unicode mended, HTML entities resolved, small letters."""
    return get_clean_fn("lower")(caption)


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """OpenCLIP's tokens with their numbers, the last two being start and end, and its merges in the order of rank."""
    tokenizer = SimpleTokenizer()
    return dict(tokenizer.encoder), [(first, second) for first, second in tokenizer.bpe_ranks]


def _draw(tower: TextTransformer, seed: int) -> None:
    """Fill a tower with seeded values: unit token embeddings, weaker places, blocks that add a little."""
    for name, parameter in tower.named_parameters():
        if ".ln_" in name or name.startswith("ln_"):
            continue  # norms keep ones and zeros
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
            continue
        spread = parameter.shape[-1] ** -0.5  # keeps the size of what passes through
        if name == "token_embedding.weight":
            spread = 1.0
        elif name == "positional_embedding":
            spread = _PLACE_WEIGHT
        elif name.endswith(("out_proj.weight", "c_proj.weight")):
            spread *= _BLOCK_WEIGHT
        draws = generator(seed, "text tower", name).standard_normal(tuple(parameter.shape), dtype="float32")
        parameter.data.copy_(torch.from_numpy(draws) * spread)
