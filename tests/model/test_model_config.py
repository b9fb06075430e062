import subprocess
import sys

import pytest
from pydantic import ValidationError

from vc2.model.config import TextConfig, UNetConfig


def test_configurations_are_read_without_importing_torch():
    code = "import sys, vc2.model.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (UNetConfig, {"model_channels": 48}, "not divisible into norm_groups=32"),
        (UNetConfig, {"channel_mult": ()}, "at least 1 item"),
        (UNetConfig, {"channel_mult": (1, 0)}, "every level needs at least 1"),
        (UNetConfig, {"model_channels": 32}, "narrower than one head"),
        (TextConfig, {"layers_used": 25}, "more than layers=24"),
        (TextConfig, {"heads": 7}, "not divisible into heads=7"),
    ],
)
def test_shapes_that_cannot_be_built_are_refused_at_birth(config, change, message):
    with pytest.raises(ValidationError, match=message):
        config(**change)


def test_recomputing_activations_is_a_knob_and_changes_no_fingerprint():
    assert UNetConfig(gradient_checkpointing=True).identity() == UNetConfig().identity()
