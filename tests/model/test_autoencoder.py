import math

import pytest
import torch

from vc2.errors import WeightsError
from vc2.model.autoencoder import Autoencoder
from vc2.model.config import AutoencoderConfig
from vc2.model.weights import autoencoder_from_released

TINY = AutoencoderConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_groups=4)


def test_encoding_and_decoding_equal_the_recorded(golden):
    recorded = golden("vae/vae_small.npz")
    config = AutoencoderConfig(block_out_channels=(32, 64), layers_per_block=1, scaling_factor=0.5)
    autoencoder = Autoencoder.from_released(config, recorded.state)
    moments = autoencoder.moments(recorded["in.x"].unsqueeze(2))
    torch.testing.assert_close(moments[:, :4, 0], recorded["out.mean"], rtol=0, atol=2e-5)
    torch.testing.assert_close(moments[:, 4:, 0], recorded["out.logvar"], rtol=0, atol=2e-5)
    latents = autoencoder.sample(moments, recorded["in.noise"].unsqueeze(2))
    torch.testing.assert_close(latents[:, :, 0], 0.5 * recorded["out.z"], rtol=0, atol=2e-5)
    torch.testing.assert_close(autoencoder.decode(latents)[:, :, 0], recorded["out.y"], rtol=0, atol=2e-5)


def test_the_full_size_is_stable_diffusions(name_table):
    """Every name and shape of the released file has its place in the 83,653,863 values."""
    rows = name_table("vae_name_map.tsv")
    with torch.device("meta"):
        net = Autoencoder(AutoencoderConfig()).net
        released = {row["released_checkpoint"]: torch.empty([int(n) for n in row["shape"].split("x")]) for row in rows}
        renamed = autoencoder_from_released(released, 4)
    assert {name: t.shape for name, t in renamed.items()} == {name: t.shape for name, t in net.state_dict().items()}
    assert sum(math.prod(t.shape) for t in renamed.values()) == 83_653_863


def test_frames_are_coded_alone_in_parts_of_any_size():
    autoencoder, clips = Autoencoder(TINY), torch.rand(2, 3, 3, 16, 24) * 2 - 1
    moments = autoencoder.moments(clips)
    assert moments.shape == (2, 8, 3, 2, 3)
    torch.testing.assert_close(
        autoencoder.moments(clips[:, :, 1:2], frames_at_once=1), moments[:, :, 1:2], rtol=0, atol=1e-5
    )
    latents = autoencoder.sample(moments, torch.randn(2, 4, 3, 2, 3))
    torch.testing.assert_close(
        autoencoder.decode(latents, frames_at_once=1), autoencoder.decode(latents), rtol=0, atol=1e-5
    )
    assert autoencoder.decode(latents).shape == clips.shape


def test_it_is_frozen_until_someone_thaws_its_network():
    autoencoder = Autoencoder(TINY)
    assert not any(parameter.requires_grad for parameter in autoencoder.parameters()) and not autoencoder.net.training
    autoencoder.net.requires_grad_(True)
    assert all(parameter.requires_grad for parameter in autoencoder.parameters())


def test_saved_and_loaded_is_the_same(tmp_path):
    autoencoder, clips = Autoencoder(TINY), torch.rand(1, 3, 1, 8, 8)
    autoencoder.save(tmp_path / "autoencoder.safetensors")
    again = Autoencoder.from_safetensors(tmp_path / "autoencoder.safetensors")
    assert again.config == TINY
    assert torch.equal(again.moments(clips), autoencoder.moments(clips))
    with pytest.raises(WeightsError, match="of another shape"):
        Autoencoder.from_safetensors(
            tmp_path / "autoencoder.safetensors", TINY.evolve(block_out_channels=(8, 16, 16, 16))
        )


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="multiples of 8"):
        Autoencoder(TINY).moments(torch.zeros(1, 3, 1, 12, 16))
    with pytest.raises(ValueError, match="shapes must match"):
        Autoencoder(TINY).sample(torch.zeros(1, 8, 1, 2, 2), torch.zeros(1, 4, 2, 2, 2))
