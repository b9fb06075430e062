"""That the paper's idea works in small: appearance moves toward the images of stage 2, motion stays. Minutes long."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vc2.storage import open_store


@pytest.mark.soak
def test_spatial_tuning_takes_the_look_of_the_images_and_leaves_the_motion(tmp_path: Path) -> None:
    """The miniature's judges: the images have no watermark and are sharp, and then so are the videos; what moves goes
    on moving as before (direction and flicker, within what 16 videos can tell)."""
    command = [sys.executable, "-m", "vc2.cli", "run", "miniature", "--work", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    store = open_store(said["uri"].split("/reports/")[0])
    scores = json.loads(store.read(f"reports/{said['uri'].rsplit('/', 1)[1]}/report.json"))["scores"]
    before, after = (
        {judge: summary["mean"] for judge, summary in scores[f"{when} stage 2"].items()} for when in ("before", "after")
    )
    assert after["watermark"] < before["watermark"]
    assert after["colour"] >= before["colour"] - 0.1
    assert abs(after["direction"] - before["direction"]) < 0.35
    assert abs(after["flicker"] - before["flicker"]) < 0.25
