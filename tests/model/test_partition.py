import pytest
import torch

from vc2.errors import ConfigError
from vc2.model.config import UNetConfig
from vc2.model.partition import group_of, is_temporal, trainable_names
from vc2.model.unet import UNet3D
from vc2.model.weights import released_names


@pytest.fixture(scope="module")
def full_size() -> UNet3D:
    with torch.device("meta"):
        return UNet3D(UNetConfig())


def test_spatial_and_temporal_divide_the_released_network(full_size):
    """1,413,284,420 values: each either inherited from Stable Diffusion 2.1 or new, none both, none neither."""
    sizes = {name: parameter.numel() for name, parameter in full_size.named_parameters()}
    spatial, temporal = (trainable_names(full_size, group) for group in ("spatial", "temporal"))
    assert sum(sizes[name] for name in spatial) == 865_910_724
    assert sum(sizes[name] for name in temporal) == 547_373_696
    assert sum(sizes[name] for name in trainable_names(full_size, "all")) == 1_413_284_420
    assert sorted(spatial + temporal) == sorted(sizes)
    assert (len(spatial), len(temporal)) == (686, 798)
    assert not list(full_size.buffers())


@pytest.mark.parametrize(
    ("table", "with_image"),
    [("videocrafter2_t2v512_state_dict.tsv", False), ("videocrafter1_i2v512_state_dict.tsv", True)],
)
def test_every_parameter_is_in_the_group_the_released_table_says(name_table, table, with_image):
    """Names, shapes and groups of all tensors, the image-to-video network's included."""
    with torch.device("meta"):
        unet = UNet3D(UNetConfig(use_image_attention=with_image))
    names = released_names(unet)
    ours = {
        "model.diffusion_model." + names[name]: ("x".join(map(str, parameter.shape)), group_of(name))
        for name, parameter in unet.named_parameters()
    }
    assert ours == {row["name"]: (row["shape"], row["group"]) for row in name_table(table)}


def test_the_first_layers_and_the_frame_rate_count_as_motion():
    assert is_temporal("fps_embedding.out.bias") and is_temporal("first_temporal_attention.norm.weight")
    assert not is_temporal("time_embedding.out.bias") and not is_temporal(
        "down.0.layers.0.spatial_attention.norm.weight"
    )


def test_a_group_that_is_not_there_is_refused(make_unet):
    image_network = make_unet(temporal_conv=False, temporal_attention=False, addition_attention=False, fps_cond=False)
    with pytest.raises(ConfigError, match="no temporal parameters"):
        trainable_names(image_network, "temporal")
    with pytest.raises(ConfigError, match="expected one of all, spatial, temporal"):
        trainable_names(image_network, "both")
