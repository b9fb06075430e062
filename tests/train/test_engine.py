"""Laws of the engine without DeepSpeed; `test_run.py` compares it with DeepSpeed's on two ranks."""

import torch

from vc2.model.partition import trainable_names
from vc2.model.unet import UNet3D
from vc2.train.config import TrainStage
from vc2.train.engine import PlainEngine, create_engine


def make(stage: TrainStage, micro_batch: int) -> PlainEngine:
    torch.manual_seed(0)
    unet = UNet3D(stage.model.unet).eval()  # no dropout
    for parameter in unet.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)  # no zeros that hide gradients
    engine = create_engine(unet, trainable_names(unet, "all"), stage, micro_batch=micro_batch)
    assert isinstance(engine, PlainEngine)
    return engine


def inputs(stage: TrainStage) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    size = stage.batch_size
    latents, text = torch.randn(size, 4, 2, 4, 4), torch.randn(size, 3, stage.model.unet.context_dim)
    return latents, torch.randint(1000, (size,)), text, torch.full((size,), 8)


def test_steps_equal_those_of_bare_torch(stage: TrainStage) -> None:
    """Flat views change nothing: clipped AdamW on separate parameters gives the same weights."""
    engine = make(stage, 4)
    bare = make(stage, 4).module
    settings = stage.optimizer
    parameters = [torch.nn.Parameter(parameter.detach().clone()) for parameter in bare.parameters()]
    for (name, _), parameter in zip(list(bare.named_parameters()), parameters, strict=True):
        owner = bare.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], parameter)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=settings.betas, weight_decay=settings.weight_decay)
    latents, timesteps, text, fps = inputs(stage)
    for _ in range(3):
        loss = 100 * engine.forward(latents, timesteps, text, fps).square().mean()  # large enough to be clipped
        engine.backward(loss)
        assert engine.step(1e-3) and engine.grad_norm > settings.clip_norm
        optimizer.zero_grad()
        (100 * bare(latents, timesteps, text, fps=fps).square().mean()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        optimizer.step()
    for parameter, other in zip(engine.module.parameters(), parameters, strict=True):
        torch.testing.assert_close(parameter, other, atol=1e-6, rtol=1e-4)


def test_micro_batches_add_up_to_the_batch(stage: TrainStage) -> None:
    """Two passes of two clips give the gradient of one pass of four."""
    latents, timesteps, text, fps = inputs(stage)
    norms = []
    for micro_batch in (4, 2):
        engine = make(stage, micro_batch)
        for part in (slice(start, start + micro_batch) for start in range(0, 4, micro_batch)):
            engine.backward(engine.forward(latents[part], timesteps[part], text[part], fps[part]).square().mean())
        engine.step(1e-3)
        norms.append(engine.grad_norm)
    assert abs(norms[0] - norms[1]) < 1e-5 * norms[0]


def test_a_gradient_that_is_no_number_changes_nothing(stage: TrainStage) -> None:
    """The step is refused, and the next one starts clean."""
    engine = make(stage, 4)
    before = engine.shard("master").clone()
    latents, timesteps, text, fps = inputs(stage)
    engine.backward(engine.forward(latents, timesteps, text, fps).mean() * torch.inf)
    assert not engine.step(1e-3)
    assert torch.equal(engine.shard("master"), before)
    engine.backward(engine.forward(latents, timesteps, text, fps).square().mean())
    assert engine.step(1e-3)


def test_bf16_is_arithmetic_not_storage(stage: TrainStage) -> None:
    """Under bf16 the weights stay float32 and the prediction is close to the float32 one."""
    latents, timesteps, text, fps = inputs(stage)
    exact = make(stage, 4).forward(latents, timesteps, text, fps)
    engine = make(stage.evolve(precision="bf16"), 4)
    rough = engine.forward(latents, timesteps, text, fps)
    error = (rough - exact).detach()
    assert engine.shard("master").dtype == torch.float32
    assert 0 < float(error.norm() / exact.detach().norm()) < 0.05
