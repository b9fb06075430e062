"""Draws `docs/network.svg` from the network itself: `python docs/draw_network.py`.

Every box is a module found in a `UNet3D` of the default configuration, so the picture cannot say what is not there.
"""

from pathlib import Path
from xml.sax.saxutils import escape

import torch
from torch import nn

from vc2.model.blocks import Layer
from vc2.model.config import UNetConfig
from vc2.model.partition import group_of
from vc2.model.unet import UNet3D

__all__ = ["draw"]

PICTURE = Path(__file__).with_name("network.svg")
FILLS = {"spatial": "#cfe2f7", "temporal": "#fbd9b5"}
WORDS = {
    "residual": "residual",
    "temporal_conv": "temporal conv",
    "spatial_attention": "spatial attn",
    "temporal_attention": "temporal attn",
}
BOX, GAP, ROW = (84, 22), 4, 200  # width and height of a box, space between boxes, height of a level


class Canvas:
    def __init__(self) -> None:
        self.parts: list[str] = []

    def box(self, x: float, y: float, text: str, group: str) -> None:
        width, height = BOX
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="{FILLS[group]}" stroke="#555"/>'
        )
        self.text(x + width / 2, y + 15, text)

    def text(self, x: float, y: float, text: str, *, anchor: str = "middle", size: int = 11) -> None:
        self.parts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>')

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        path = " ".join(f"{x},{y}" for x, y in points)
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="#555"{dash} marker-end="url(#tip)"/>')

    def layer(self, x: float, y: float, layer: Layer) -> float:
        """The modules of a layer, one below the other in the order in which they run; where the next would be."""
        there = [name for name in WORDS if getattr(layer, name) is not None]
        for place, name in enumerate(there):
            self.box(x, y + place * (BOX[1] + GAP), WORDS[name], group_of(f"{name}.weight"))
        return y + len(there) * (BOX[1] + GAP)

    def svg(self, width: float, height: float) -> str:
        tip = (
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
            'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#555"/></marker></defs>'
        )
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">'
        paper = f'<rect width="{width}" height="{height}" fill="white"/>'
        return "\n".join([head, tip, paper, *self.parts, "</svg>", ""])


def count(module: nn.Module, group: str) -> int:
    return sum(p.numel() for name, p in module.named_parameters() if group_of(name) == group)


def draw(config: UNetConfig | None = None) -> str:
    """The network of a configuration (default: the released one) as SVG text."""
    config = config or UNetConfig()
    with torch.device("meta"):
        unet = UNet3D(config)
    canvas, column = Canvas(), BOX[0] + 14
    layers = config.num_res_blocks
    left, top = 40, 120
    middle = left + (layers + 1) * column + 40
    right = middle + 2 * column + 60
    levels = len(config.channel_mult)
    width = right + (layers + 2) * column + 20

    canvas.text(width / 2, 26, f"UNet3D: {sum(p.numel() for p in unet.parameters()):,} parameters", size=16)
    for place, group in enumerate(FILLS):
        x = width / 2 - 230 + 240 * place
        canvas.box(x, 42, group, group)
        canvas.text(x + BOX[0] + 8, 57, f"{count(unet, group):,}", anchor="start")
    canvas.text(
        width / 2,
        88,
        "timestep and frame rate (temporal) reach every residual block; text every spatial attention",
    )

    canvas.box(left, top, "conv in", "spatial")
    if unet.first_temporal_attention is not None:
        canvas.box(left, top + BOX[1] + GAP, WORDS["temporal_attention"], "temporal")
    for level in range(levels):
        y = top + level * ROW
        down, up = unet.down[level], unet.up[levels - 1 - level]
        channels, scale = config.channel_mult[level] * config.model_channels, 2**level
        canvas.text(
            left - 8,
            y - 8,
            f"{channels} channels, {f'1/{scale} of the latent size' if level else 'latent size'}",
            anchor="start",
        )
        first = left + column
        for place, layer in enumerate(down.layers):
            canvas.layer(first + place * column, y, layer)
        below = y + 4 * (BOX[1] + GAP) + 14
        if down.downsample is not None:
            x = first + (layers - 1) * column
            canvas.box(x, below, "half size", "spatial")
            canvas.arrow((x + BOX[0] / 2, below + BOX[1]), (x + BOX[0] / 2, y + ROW - 24), (left + 20, y + ROW - 24))
        for place, layer in enumerate(up.layers):
            end = canvas.layer(right + place * column, y, layer)
        if up.upsample is not None:
            x = right + layers * column
            canvas.box(x, end, "double size", "spatial")
        if level:
            x = right + layers * column + BOX[0] / 2
            canvas.arrow((x, y - 4), (x, y - 26))
        canvas.arrow((first + layers * column - 8, y + 11), (right - 6, y + 11), dashed=True)
        canvas.text(middle - 6, y + 6, f"{len(up.layers)} skips")
    bottom = top + (levels - 1) * ROW
    for place, layer in enumerate(unet.middle.layers):
        canvas.layer(middle + place * column - 20, bottom + 44, layer)
    canvas.text(middle + column - 26, bottom + 38, "middle")
    last = right + (layers + 1) * column
    canvas.arrow((last - 12, top + 11), (last, top + 11))
    canvas.box(last, top, "conv out", "spatial")
    canvas.text(last + BOX[0] / 2, top + BOX[1] + 16, "noise")
    canvas.text(left + BOX[0] / 2, top - 24, "latents")
    return canvas.svg(width, bottom + 190)


if __name__ == "__main__":
    PICTURE.write_text(draw())
    print(PICTURE)
