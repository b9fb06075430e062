"""Activation checkpointing: less memory in training for more arithmetic, at three levels.

    none       every activation is kept for the backward pass
    selective  what is dear to make is kept (matrix products, convolutions, attention), the rest is made again
    full       only what enters a function is kept; the function runs again in the backward pass

The non-re-entrant form throughout: the re-entrant one silently loses the gradients of a function whose tensor inputs
need none, which is so wherever frozen modules come first. Dropout draws the same masks again.
Sources: Chen et al. 2016 for the idea, Korthikanti et al. 2022 for the selective form.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vc2.model.config import Recompute

__all__ = ["recomputed"]

_aten = torch.ops.aten
_DEAR = {
    getattr(_aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "convolution",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
}


def recomputed(level: Recompute, function: Callable[..., Tensor], *inputs: Tensor | int | None) -> Tensor:
    """`function(*inputs)`, whose activations are kept or made again as `level` says. Same values, same gradients."""
    if level == "none" or not torch.is_grad_enabled():
        return function(*inputs)
    if level == "full":
        return checkpoint(function, *inputs, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, _keep_what_is_dear)
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)


def _keep_what_is_dear(context: object, operation: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _DEAR else CheckpointPolicy.PREFER_RECOMPUTE
