"""AMT-S (Li et al. 2023, arXiv 2304.09790): the frame in the middle between two, for motion smoothness.

A small encoder gives features an eighth the size, of which every pair of places, one in each image, is correlated
("all pairs", as in RAFT) and looked up both ways. A second encoder gives a pyramid of four levels. From the coarsest
level on, a decoder predicts the flows from the middle to both images and the state of the middle; each time an update
block corrects both by the correlations found where the flows lead. The last decoder gives several flows per place,
each with a mask and a residual; images fetched along them are blended, and the blends joined:

    middle = mean_k I_k + joined(I_1, ..., I_n),    I_k = m_k warp(I_0, f_k0) + (1 - m_k) warp(I_1, f_k1) + r_k

Motion is taken to be even: a flow from the middle to an image, doubled, leads from the other image to it.
Images are extended by their edges to sides that 16 divides, and to 128 pixels at least, as the coarsest of four
levels of correlation needs two places a side. The published VBench shrinks large videos on small GPUs; this does not.

Weights: `amt-s.pth` of MCG-NKU/AMT, a checkpoint with a `state_dict`.
Shapes: M pairs of frames, B of them at once, H x W pixels; h x w places, an eighth; n flows of a place; flows are x
then y in pixels of their level, to the image before in the first two channels, to the one after in the last two.
"""

import re
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from vc2.eval.networks.frames import in_batches
from vc2.eval.networks.public_names import Found, fill_from
from vc2.model.files import open_weights

__all__ = ["Amt", "Correlation", "pairs_at_once"]

CHANNELS = (20, 32, 44, 56)  # of the pyramid, fine to coarse
SIDE_CHANNELS = 20  # of a decoder's state, those that are refined twice
MATCH_CHANNELS = 84
LEVELS, RADIUS = 4, 3  # of the correlations, and how far around a place they are looked up
DIVISOR, LEAST_SIDE = 16, 8 * 2**LEVELS


class Amt(nn.Module):
    """Two frames to the one in their middle. Arbitrary until weights are loaded.

    Args:
        num_flows: Flows per place, n.
    """

    def __init__(self, *, num_flows: int = 3) -> None:
        super().__init__()
        self.num_flows = num_flows
        self.matching = MatchingEncoder()
        self.pyramid = nn.ModuleList(
            [
                nn.Sequential(_conv(before, channels, stride=2), _conv(channels, channels))
                for before, channels in zip((3, *CHANNELS[:-1]), CHANNELS, strict=True)
            ]
        )
        fine, second, third, coarse = CHANNELS
        self.decoders = nn.ModuleList(
            [
                Decoder(2 * coarse + 1, 2 * coarse, third + 4),  # both images and the time
                Decoder(3 * third + 4, 3 * third, second + 4),  # the state too, and the flows
                Decoder(3 * second + 4, 3 * second, fine + 4),
                Decoder(3 * fine + 4, 3 * fine, 8 * num_flows),
            ]
        )
        self.updates = nn.ModuleList([Update(third), Update(second), Update(fine)])
        self.joined = nn.Sequential(
            nn.Conv2d(3 * num_flows, 6 * num_flows, 3, padding=1),
            nn.PReLU(6 * num_flows),
            nn.Conv2d(6 * num_flows, 3, 3, padding=1),
        )
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Self:
        """The network of a file of weights.

        Raises:
            WeightsError: If a tensor is missing, unexpected or of another shape.
        """
        network = cls()
        fill_from(network, open_weights(path), _public_names(network), cause="not AMT-S; AMT-L and AMT-G are larger")
        return network.to(device)

    @torch.inference_mode()
    def interpolate(self, before: np.ndarray, after: np.ndarray, *, batch: int = 4) -> np.ndarray:
        """The frame in the middle of each pair.

        Args:
            before: (M, H, W, 3) uint8 RGB, of any size.
            after: Shape of `before`.
            batch: Pairs on the device at once; fewer of frames above 320 x 512, whose correlations weigh more.

        Returns:
            (M, H, W, 3) float32 in [0, 1].

        Raises:
            ValueError: If the frames are of another shape or type, differ in shape, or there is none.
        """
        if before.shape != after.shape:
            raise ValueError(f"frames before are {before.shape}, after {after.shape}: shapes must match")
        device, batch = next(self.parameters()).device, pairs_at_once(batch, *before.shape[1:3])
        pairs = zip(in_batches(before, batch, device), in_batches(after, batch, device), strict=True)
        return np.concatenate([self._between(first / 255, second / 255) for first, second in pairs])

    def _between(self, before: Tensor, after: Tensor) -> np.ndarray:
        height, width = before.shape[-2:]
        down, across = _missing(height), _missing(width)
        top, left = down // 2, across // 2
        edges = (left, across - left, top, down - top)
        middle = self(F.pad(before, edges, mode="replicate"), F.pad(after, edges, mode="replicate"))
        cut = middle[..., top : top + height, left : left + width]
        return rearrange(cut, "b c h w -> b h w c").cpu().numpy()

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """(B, 3, H, W) each, in [0, 1], sides as `DIVISOR` and `LEAST_SIDE` say -> (B, 3, H, W)."""
        mean = torch.stack([before, after]).mean((0, 2, 3, 4))[:, None, None, None]
        before, after = before - mean, after - mean
        correlation = Correlation(*self.matching(torch.cat([before, after])).chunk(2))
        features = []
        x = torch.cat([before, after])
        for level in self.pyramid:
            features.append(x := level(x))

        coarse = rearrange(features[-1], "(i b) d h w -> b (i d) h w", i=2)
        time = torch.full_like(coarse[:, :1], 0.5)
        flows, state = _flows_and_rest(self.decoders[0](torch.cat([coarse, time], dim=1)))
        for level, (update, decoder) in enumerate(zip(self.updates, self.decoders[1:], strict=True)):
            size = 2**level  # places of this level to one of the correlations
            small = _resized(flows, 1 / size) / size
            flow_change, state_change = update(small, correlation.along(small), state, size)
            flows, state = flows + flow_change, state + state_change
            seen = _fetched(features[-2 - level], flows)
            finer = decoder(torch.cat([state, rearrange(seen, "(i b) d h w -> b (i d) h w", i=2), flows], dim=1))
            count = self.num_flows if decoder is self.decoders[-1] else 1
            change, state = _flows_and_rest(finer, count)
            flows = change + repeat(2 * _resized(flows, 2), "b (i c) h w -> b (i n c) h w", i=2, n=count)
        return self._blended(before, after, mean, flows, state)

    def _blended(self, before: Tensor, after: Tensor, mean: Tensor, flows: Tensor, rest: Tensor) -> Tensor:
        """Images without their mean, n flows to each, n masks and n residuals -> the middle, (B, 3, H, W)."""
        count = self.num_flows
        masks, residuals = (
            rearrange(part, "b (n c) h w -> b n c h w", n=count) for part in rest.tensor_split((count,), 1)
        )
        masks = torch.sigmoid(masks)
        images = repeat(torch.stack([before, after]), "i b c h w -> (i b n) c h w", n=count)
        fetched = _warped(images, rearrange(flows, "b (i n c) h w -> (i b n) c h w", i=2, n=count))
        first, second = rearrange(fetched, "(i b n) c h w -> i b n c h w", i=2, n=count)
        blends = masks * first + (1 - masks) * second + mean[:, None] + residuals
        return (blends.mean(1) + self.joined(rearrange(blends, "b n c h w -> b (n c) h w"))).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Parts


class MatchingEncoder(nn.Module):
    """Images (B, 3, H, W) -> features to be correlated, (B, D, h, w)."""

    def __init__(self) -> None:
        super().__init__()
        self.root = nn.Conv2d(3, 32, 7, stride=2, padding=3)
        self.layers = nn.ModuleList(
            [
                Bottleneck(32, 32),
                Bottleneck(32, 32),
                Bottleneck(32, 64, stride=2),
                Bottleneck(64, 64),
                Bottleneck(64, 96, stride=2),
                Bottleneck(96, 96),
            ]
        )
        self.out = nn.Conv2d(96, MATCH_CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.instance_norm(self.root(x)))
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


class Bottleneck(nn.Module):
    """Three convolutions, each normalised per image and channel, beside a way around."""

    def __init__(self, channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        inner = out_channels // 4
        self.narrow = nn.Conv2d(channels, inner, 1)
        self.look = nn.Conv2d(inner, inner, 3, stride=stride, padding=1)
        self.widen = nn.Conv2d(inner, out_channels, 1)
        self.around = nn.Conv2d(channels, out_channels, 1, stride=stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        around = F.instance_norm(self.around(x)) if self.around else x
        for conv in (self.narrow, self.look, self.widen):
            x = F.relu(F.instance_norm(conv(x)))
        return F.relu(x + around)


class Decoder(nn.Module):
    """(B, C, h, w) -> (B, C', 2 h, 2 w)."""

    def __init__(self, channels: int, inner: int, out_channels: int) -> None:
        super().__init__()
        self.enter = _conv(channels, inner)
        self.refine = SideRefined(inner)
        self.enlarge = nn.ConvTranspose2d(inner, out_channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.enlarge(self.refine(self.enter(x)))


class SideRefined(nn.Module):
    """A residual block whose last few channels pass two more convolutions on the way (Kong et al. 2022, IFRNet)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _conv(channels, channels)
        self.first_side = _conv(SIDE_CHANNELS, SIDE_CHANNELS)
        self.second = _conv(channels, channels)
        self.second_side = _conv(SIDE_CHANNELS, SIDE_CHANNELS)
        self.third = nn.Conv2d(channels, channels, 3, padding=1)
        self.activation = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        inside = x
        for whole, side in ((self.first, self.first_side), (self.second, self.second_side)):
            main, last = whole(inside).tensor_split((-SIDE_CHANNELS,), dim=1)
            inside = torch.cat([main, side(last)], dim=1)
        return self.activation(x + self.third(inside))


class Update(nn.Module):
    """Corrections of flows and state from what the correlations show along the flows."""

    def __init__(self, state_channels: int) -> None:
        super().__init__()
        self.correlations = nn.Conv2d(2 * LEVELS * (2 * RADIUS + 1) ** 2, 64, 1)
        self.flows_wide = nn.Conv2d(4, 40, 7, padding=3)
        self.flows_narrow = nn.Conv2d(40, 20, 3, padding=1)
        self.together = nn.Conv2d(64 + 20, 68, 3, padding=1)
        self.hidden = _two_convs(68 + 4 + state_channels, 76)
        self.state = _two_convs(76, state_channels)
        self.flows = _two_convs(76, 4)

    def forward(self, flows: Tensor, correlations: Tensor, state: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Flows (B, 4, h, w), correlations along them, state (B, C, size h, size w) -> changes of flows and state, both
        of the state's size."""
        seen = _leaky(self.correlations(correlations))
        moved = _leaky(self.flows_narrow(_leaky(self.flows_wide(flows))))
        both = _leaky(self.together(torch.cat([seen, moved], dim=1)))
        hidden = self.hidden(torch.cat([both, flows, _resized(state, 1 / size)], dim=1))
        return size * _resized(self.flows(hidden), size), _resized(self.state(hidden), size)


class Correlation:
    """How alike all places of two images are, to be looked up from either."""

    def __init__(self, before: Tensor, after: Tensor) -> None:
        height, width = before.shape[-2:]
        alike = torch.einsum("bdhw,bdij->bhwij", before, after) / before.shape[1] ** 0.5
        self.there = _pooled(rearrange(alike, "b h w i j -> (b h w) 1 i j"))
        self.back = _pooled(rearrange(alike, "b h w i j -> (b i j) 1 h w"))
        self.places = _grid(height, width, before)

    def along(self, flows: Tensor) -> Tensor:
        """Correlations around where the flows from the middle lead, (B, 4, h, w) -> (B, C, h, w): from the image before
        in the one after, then the other way."""
        to_before, to_after = flows.chunk(2, dim=1)
        return torch.cat([self._around(self.there, 2 * to_after), self._around(self.back, 2 * to_before)], dim=1)

    def _around(self, levels: list[Tensor], flow: Tensor) -> Tensor:
        steps = torch.linspace(-RADIUS, RADIUS, 2 * RADIUS + 1, device=flow.device)
        # x goes with the first axis: the released weights expect channels in this order.
        window = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1)
        centres = rearrange(self.places + flow, "b c h w -> (b h w) 1 1 c")
        found = [
            rearrange(
                _sampled(level, centres / 2**number + window, padding="zeros"),
                "(b h w) 1 p q -> b (p q) h w",
                b=len(flow),
                h=flow.shape[-2],
            )
            for number, level in enumerate(levels)
        ]
        return torch.cat(found, dim=1)


def _pooled(correlations: Tensor) -> list[Tensor]:
    levels = [correlations]
    for _ in range(LEVELS - 1):
        levels.append(F.avg_pool2d(levels[-1], 2))
    return levels


def _conv(channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1), nn.PReLU(out_channels))


def _two_convs(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 76, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(76, out_channels, 3, padding=1)
    )


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1)


def _flows_and_rest(x: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    return x[:, : 4 * count], x[:, 4 * count :]


def _resized(x: Tensor, factor: float) -> Tensor:
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False) if factor != 1 else x


def _fetched(features: Tensor, flows: Tensor) -> Tensor:
    """Features of both images, (2 B, D, h, w), where flows (B, 4, h, w) lead."""
    return _warped(features, rearrange(flows, "b (i c) h w -> (i b) c h w", i=2))


def _warped(x: Tensor, flow: Tensor) -> Tensor:
    """(B, C, H, W) seen along flow (B, 2, H, W); beyond the edge it stays as at the edge."""
    places = _grid(*x.shape[-2:], x) + flow
    return _sampled(x, rearrange(places, "b c h w -> b h w c"), padding="border")


def _sampled(x: Tensor, places: Tensor, *, padding: str) -> Tensor:
    """(B, C, H, W) at places (B, P, Q, 2) in pixels, x then y."""
    height, width = x.shape[-2:]
    whole = torch.tensor([width - 1, height - 1], device=x.device)
    return F.grid_sample(x, 2 * places / whole - 1, padding_mode=padding, align_corners=True)


def _grid(height: int, width: int, like: Tensor) -> Tensor:
    """x and y of every pixel, (2, H, W)."""
    y, x = torch.meshgrid(
        torch.arange(height, device=like.device), torch.arange(width, device=like.device), indexing="ij"
    )
    return torch.stack([x, y]).to(like.dtype)


def pairs_at_once(batch: int, height: int, width: int) -> int:
    """How many larger pairs weigh as much as `batch` of 320 x 512: correlations go with the square of the area."""
    larger = max(1.0, height * width / (320 * 512))
    return max(1, int(batch / larger**2)) if batch > 0 else batch


def _missing(side: int) -> int:
    return max(LEAST_SIDE, -(-side // DIVISOR) * DIVISOR) - side


# ---------------------------------------------------------------------------------------------------------------------
# Public names: of our names, each of these words is exchanged, in this order

_RELEASED = (
    (r"^matching\.root", "feat_encoder.conv1"),
    (r"^matching\.out", "feat_encoder.conv2"),
    (r"^matching\.layers\.(\d)", lambda found: f"feat_encoder.layer{int(found[1]) // 2 + 1}.{int(found[1]) % 2}"),
    (r"^pyramid\.(\d)", lambda found: f"encoder.pyramid{int(found[1]) + 1}"),
    (r"^decoders\.(\d)", lambda found: f"decoder{4 - int(found[1])}.convblock"),
    (r"^updates\.(\d)", lambda found: f"update{4 - int(found[1])}"),
    (r"^joined", "comb_block"),
    (r"\.narrow\b", ".conv1"),
    (r"\.look\b", ".conv2"),
    (r"\.widen\b", ".conv3"),
    (r"\.around\b", ".downsample.0"),
    (r"\.enter\b", ".0"),
    (r"\.enlarge\b", ".2"),
    (r"\.refine\.first\b", ".1.conv1"),
    (r"\.refine\.first_side\b", ".1.conv2"),
    (r"\.refine\.second\b", ".1.conv3"),
    (r"\.refine\.second_side\b", ".1.conv4"),
    (r"\.refine\.third\b", ".1.conv5"),
    (r"\.refine\.activation\b", ".1.prelu"),
    (r"\.correlations\b", ".convc1"),
    (r"\.flows_wide\b", ".convf1"),
    (r"\.flows_narrow\b", ".convf2"),
    (r"\.together\b", ".conv"),
    (r"\.hidden\b", ".gru"),
    (r"\.state\b", ".feat_head"),
    (r"\.flows\b", ".flow_head"),
)


def _public_names(network: Amt) -> dict[str, Found]:
    places = {}
    for name in network.state_dict():
        public = name
        for words, others in _RELEASED:
            public = re.sub(words, others, public)
        places[name] = Found(public)
    return places
