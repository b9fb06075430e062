"""A page with the curves of a training run: losses, validation, gradient, speed, learning rate, by step.

It is written anew whenever the run has left a checkpoint, under a key of the run: `pages/curves/<fingerprint>.html`.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vc2.artifacts import Manifest
from vc2.storage import Store

__all__ = ["publish_curves"]

CURVES = (
    ("loss", "Loss", "loss"),
    ("loss_video", "Loss of videos", "loss"),
    ("loss_image", "Loss of images", "loss"),
    ("val_loss_raw", "Validation loss", "loss"),
    ("val_loss_ema", "Validation loss of the EMA weights", "loss"),
    ("grad_norm", "Gradient norm before clipping", "norm"),
    ("samples_per_s", "Speed", "samples per second"),
    ("lr", "Learning rate", "learning rate"),
)  # name in the lines, title, what goes upwards


def publish_curves(store: Store, checkpoint: Manifest) -> str:
    """Write the page of the run that a checkpoint is of into the store; returns its key."""
    from vc2.train.metrics import read_metrics, read_validations

    run = checkpoint.stage.removeprefix("train/"), checkpoint.fingerprint
    lines = [*read_metrics(store, *run), *read_validations(store, *run)]
    key = f"pages/curves/{checkpoint.fingerprint}.html"
    store.write(key, _page(checkpoint, lines).encode())
    return key


def _page(checkpoint: Manifest, lines: Sequence[Mapping[str, Any]]) -> str:
    from vc2.eval.page import element, empty, page, section

    trivial = checkpoint.facts.get("trivial_loss")
    cards = [
        _card(title, what, points, trivial if what == "loss" else None)
        for name, title, what in CURVES
        if (points := [(line["step"], line[name]) for line in lines if line.get(name) is not None])
    ]
    title = f"train/{checkpoint.stage.removeprefix('train/')}: training curves"
    lead = f"Run <code>{escape(checkpoint.fingerprint)}</code>, every logged step faintly, the trend over it."
    shown = element("div", *cards, class_="charts") if cards else empty("Nothing was logged.")
    return page(title, element("main", section("curves", escape(title), lead, shown)))


def _card(title: str, what: str, points: Sequence[tuple[float, float]], trivial: float | None) -> str:
    from vc2.eval.charts import loss_svg
    from vc2.eval.page import element

    is_loss = what == "loss"
    return element(
        "div",
        element("h3", escape(title)),
        loss_svg(title, points, trivial, what=what),
        element("div", f"{len(points):,} lines, the last at step {points[-1][0]:,}", class_="reading"),
        class_="card chart",
        data_curve=json.dumps([[step, round(value, 5)] for step, value in points]) if is_loss else None,
    )
