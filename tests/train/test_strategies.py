"""Strategies in the engine: what is frozen has no optimizer state, and no step reaches it."""

import pytest
import torch

from vc2.model.config import LoraConfig
from vc2.model.partition import group_of, trainable_names
from vc2.model.stills import frame_convs, split_taps
from vc2.model.unet import UNet3D
from vc2.train.config import Strategy, TrainStage
from vc2.train.engine import create_engine
from vc2.train.memory import random_network


def drawn(stage: TrainStage, strategy: Strategy) -> UNet3D:
    """A network for images alone, none of whose parameters is zero."""
    torch.manual_seed(0)
    unet = random_network(stage.model.unet, strategy, stills=True)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return unet.train()


@pytest.mark.parametrize(
    "strategy",
    [
        Strategy(trainable="temporal"),
        Strategy(trainable="spatial"),
        Strategy(trainable="all"),
        Strategy(trainable="temporal", lora=LoraConfig(rank=2)),
    ],
    ids=lambda strategy: f"{strategy.trainable}{'-lora' if strategy.lora else ''}",
)
def test_a_step_on_images_reaches_what_learns_and_nothing_else(stage: TrainStage, strategy: Strategy) -> None:
    """Every bit of the rest stays, weight decay or not; masters and moments are as long as what learns."""
    unet = drawn(stage, strategy)
    learning = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
    before = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
    engine = create_engine(unet, learning, stage.evolve(zero_stage=0), micro_batch=2)
    for _ in range(2):  # passes of a step
        predicted = engine.forward(
            torch.randn(2, 4, 1, 4, 4), torch.tensor([3, 700]), torch.randn(2, 8, 16), torch.tensor([8, 8])
        )
        engine.backward(predicted.square().mean())
    assert engine.step(1e-2)
    size = sum(before[name].numel() for name in learning)
    assert engine.shard("master").numel() == engine.shard("exp_avg").numel() == size
    assert {fragment.name for fragment in engine.fragments(engine.shard("master"))} == set(learning)
    changed = {name for name, parameter in unet.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == set(learning)
    if strategy.trainable != "all":
        assert {group_of(name) for name in changed} == {strategy.trainable}


def test_what_was_learnt_on_images_is_read_by_who_knows_nothing_of_it(stage: TrainStage) -> None:
    """Taps split off for training and a plain network that loads the tensors: the same answer to a clip."""
    unet = drawn(stage, Strategy(trainable="temporal")).eval()
    assert all(conv.is_split for _, conv in frame_convs(unet))
    plain = UNet3D(stage.model.unet).eval()
    plain.load_state_dict(unet.state_dict())
    clip = (torch.randn(2, 4, 3, 4, 4), torch.tensor([3, 700]), torch.randn(2, 8, 16))
    with torch.no_grad():
        torch.testing.assert_close(plain(*clip, fps=8), unet(*clip, fps=8), rtol=0, atol=0)
    split_taps(plain)
    assert trainable_names(plain, "temporal", stills=True) == trainable_names(unet, "temporal", stills=True)
