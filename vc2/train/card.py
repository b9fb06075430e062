"""The model card of a checkpoint: what a person should know who finds it without us.

It is one of the checkpoint's files and enters its content digest, so it holds no time, host, place or name of a run:
the same training gives the same card. Form: Markdown with the header that model hubs read (Mitchell et al. 2019).
"""

from collections.abc import Mapping, Sequence

from vc2.artifacts import Manifest
from vc2.train.attempts import StateManifest
from vc2.train.request import EMA_WEIGHTS, LORA, RAW_WEIGHTS, RankRequest

__all__ = ["model_card"]


def model_card(
    request: RankRequest,
    state: StateManifest,
    *,
    data: Sequence[Manifest],
    counts: Mapping[str, int],
    facts: Mapping[str, object],
    licenses: Mapping[str, str],
    fps: Mapping[int, int],
) -> str:
    """The text of README.md.

    Args:
        request: What was trained.
        state: The state that the weights are of.
        data: Manifests of the shard sets.
        counts: Parameters by group.
        facts: `final_loss` and `linear_loss`, where they are known.
        licenses: Terms of everything that the weights come from, by name.
        fps: Frame rates that the network was told, with their weights.
    """
    parts = [
        _header(request),
        f"# VideoCrafter2, stage {request.stage.name}, step {state.step}",
        _what(request),
        "## Data and its licences",
        _data(data),
        _licences(licenses),
        "## Training",
        _training(request, state, counts, facts),
        "## Use",
        _use(request, fps),
        "## Limitations",
        _limitations(request),
    ]
    return "\n\n".join(parts) + "\n"


def _header(request: RankRequest) -> str:
    kind = "image-to-video" if request.stage.model.image is not None else "text-to-video"
    return (
        f"---\nlicense: other\nlicense_name: those-of-the-data\npipeline_tag: {kind}\ntags: [vc2, videocrafter2]\n---"
    )


def _what(request: RankRequest) -> str:
    stage = request.stage
    learnt = {"all": "all modules", "spatial": "the spatial modules", "temporal": "the temporal modules"}
    how = learnt[stage.strategy.trainable]
    if stage.strategy.lora is not None:
        how = f"low-rank updates (rank {stage.strategy.lora.rank}) of {how}, merged into these weights"
    if request.start_from is not None:
        before = request.start_from
        start = f"the {stage.start_weights} weights of the checkpoint of content `{before.content_digest[:12]}`"
        start += f", step {before.step}"
    elif stage.sd_init:
        start = f"Stable Diffusion (`{stage.sd_init}`) within a frame, and temporal modules that change nothing"
    else:
        start = "seeded random weights"
    return (
        "A latent video diffusion model: a 3D UNet that predicts noise, a frozen autoencoder and a frozen text tower "
        f"(VideoCrafter2, Chen et al. 2024). Training changed {how}. It began from {start}."
    )


def _data(data: Sequence[Manifest]) -> str:
    lines = ["| source | kind | samples | licence |", "|---|---|---|---|"]
    for manifest in data:
        source = str(manifest.facts.get("source", manifest.fingerprint[:12]))
        terms = "; ".join(sorted(set(manifest.licenses.values()))) or "not stated"
        samples = manifest.counts.get("samples")
        lines.append(
            f"| {source} | {manifest.facts.get('media', '')} | {'' if samples is None else f'{samples:,}'} | {terms} |"
        )
    return "\n".join(lines)


def _licences(licenses: Mapping[str, str]) -> str:
    known = "\n".join(f"- {name}: {terms}" for name, terms in sorted(licenses.items())) or "- not stated"
    return (
        f"Terms that came with what the weights were made from:\n\n{known}\n\n"
        "Whoever passes the weights on has to look at them; none of them was given by this project."
    )


def _training(
    request: RankRequest, state: StateManifest, counts: Mapping[str, int], facts: Mapping[str, object]
) -> str:
    stage = request.stage
    settings = stage.optimizer
    rows = {
        "steps": f"{state.step:,}, of which {state.updates:,} changed the weights",
        "clips seen": f"{state.samples:,}, {stage.batch_size} a step, {stage.image_share:.1%} of the steps on images",
        "optimizer": f"AdamW, lr {settings.lr:g}, betas {settings.betas}, weight decay {settings.weight_decay:g}, "
        f"warm-up {settings.warmup_steps} steps, gradients clipped at {settings.clip_norm:g}",
        "average": f"EMA, decay {stage.ema_decay:g}",
        "arithmetic": f"{stage.precision}, weights and moments float32",
        "captions left out": f"{stage.caption_dropout:.0%}",
        "seed": str(stage.seed),
        "parameters": ", ".join(f"{count:,} {name.removesuffix('_parameters')}" for name, count in counts.items()),
    }
    for name, words in (("final_loss", "loss at the end"), ("linear_loss", "of the best multiple of the input")):
        value = facts.get(name)
        if isinstance(value, float):
            rows[words] = f"{value:.4f}"
    if stage.phases:
        rows["phases"] = "; ".join(str(phase.model_dump(exclude_none=True)) for phase in stage.phases)
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _use(request: RankRequest, fps: Mapping[int, int]) -> str:
    common = max(fps, key=lambda rate: fps[rate]) if fps else 8
    lora = f"; `{LORA}` has the averaged updates by themselves" if request.stage.strategy.lora is not None else ""
    return f"""`{EMA_WEIGHTS}` has the averaged weights, which are the ones to take, `{RAW_WEIGHTS}` those of the
last step{lora}. With vc2, `URI` being where this checkpoint is:

```
vc2 sample "a boat on a lake" --checkpoint URI
vc2 convert URI vc2-model --to diffusers --fps {common}
```

and then with nothing of ours installed:

```python
from diffusers import TextToVideoSDPipeline

pipeline = TextToVideoSDPipeline.from_pretrained("vc2-model")
frames = pipeline("a boat on a lake").frames
```

The network is told a frame rate: fewer frames a second mean larger motion. In training it heard
{", ".join(map(str, sorted(fps))) or "none"}."""


def _limitations(request: RankRequest) -> str:
    temporal = request.stage.model.unet.temporal_length
    return (
        f"Made for {temporal} frames; other lengths work and look worse. It shows what its data shows, with its "
        "biases, watermarks and gaps, understands English captions only, and draws text and faces badly. It was not "
        "made to state facts, nor to show real people or events. Nothing filters what it makes."
    )
