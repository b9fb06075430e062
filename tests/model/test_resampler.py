import torch

from vc2.model.config import ResamplerConfig
from vc2.model.resampler import Resampler
from vc2.model.weights import resampler_from_released


@torch.no_grad()
def test_image_tokens_equal_the_recorded(golden):
    recorded = golden("i2v/resampler.npz")
    resampler = Resampler.from_released(ResamplerConfig(**recorded.meta["config"]), recorded.state)
    torch.testing.assert_close(resampler(recorded["in.x"]), recorded["out.y"], rtol=0, atol=2e-5)


def test_the_full_size_is_the_released_one(name_table):
    """48,541,696 values, every name and shape in its place."""
    with torch.device("meta"):
        resampler = Resampler(ResamplerConfig())
        rows = name_table("i2v/resampler_state_dict.tsv")
        released = {row["name"]: torch.empty([int(n) for n in row["shape"].split("x")]) for row in rows}
    renamed = resampler_from_released(released)
    assert {name: t.shape for name, t in renamed.items()} == {
        name: t.shape for name, t in resampler.state_dict().items()
    }
    assert sum(parameter.numel() for parameter in resampler.parameters()) == 48_541_696
