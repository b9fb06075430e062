from pathlib import Path

import numpy as np
import pytest

from vc2.errors import ConfigError
from vc2.eval.config import Prompt
from vc2.eval.metrics import METRICS, NotMeasured, Video, measure
from vc2.pretrained import WEIGHTS

PROMPTS = [Prompt(id="0000", text="a cat", attributes={"count": {"n": 1, "object": "cat"}})]
VIDEOS = [Video("0000", 8.0, lambda: np.zeros((2, 8, 8, 3), np.uint8))]


@pytest.mark.parametrize("name", METRICS)
def test_without_its_weights_a_metric_says_which(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every metric needs weights, and is not measured where they are not found, for that reason and by name."""
    monkeypatch.delenv("VC2_MIRROR", raising=False)
    result = measure(name, VIDEOS, PROMPTS)
    assert result == NotMeasured(f"weights not found: {', '.join(METRICS[name].weights)}")


def test_with_its_weights_a_metric_that_is_not_there_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finding weights does not make a number: what is not implemented says so."""
    place = tmp_path / WEIGHTS["dover"].file
    place.parent.mkdir()
    place.write_bytes(b"weights")
    monkeypatch.setenv("VC2_MIRROR", str(tmp_path))
    result = measure("VQA_A", VIDEOS, PROMPTS)
    assert isinstance(result, NotMeasured) and "does not implement" in result.reason


def test_an_unknown_metric_and_unpaired_videos_are_errors() -> None:
    """A wrong name lists the right ones; videos that are not those of the prompts are refused."""
    with pytest.raises(ConfigError, match=r"no metric 'FVD'.*VQA_A"):
        measure("FVD", VIDEOS, PROMPTS)
    with pytest.raises(ConfigError, match="do not pair"):
        measure("VQA_A", [], PROMPTS)
