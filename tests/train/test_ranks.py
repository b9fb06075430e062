"""Laws across numbers of ranks, in float32 and without dropout: the same training, whoever does which part of it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vc2.storage import LocalStore
from vc2.train.attempts import Run, newest_state
from vc2.train.config import TrainStage
from vc2.train.fragments import KINDS, Fragment, read_fragments
from vc2.train.metrics import read_metrics
from vc2.train.states import state_files

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed and gloo over loopback: Linux")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, stage: TrainStage, autoencoder_file: Path) -> LocalStore:
    """All scenarios of `ranks.py`, in one store."""
    folder = tmp_path_factory.mktemp("ranks")
    shutil.copy(autoencoder_file, folder / "autoencoder.safetensors")
    model = stage.model.evolve(unet=stage.model.unet.evolve(temporal_conv_dropout=0.0))
    asked = stage.evolve(model=model, state_every_steps=2).model_dump_json()
    script = Path(__file__).with_name("ranks.py")
    done = subprocess.run(
        [sys.executable, str(script), asked, str(folder / "store"), str(folder)],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return LocalStore(folder / "store")


def whole(store: LocalStore, name: str) -> dict[str, dict[str, torch.Tensor]]:
    """Masters, moments and EMA of a run's last state, put together from the fragments of its ranks."""
    run = Run(store, "full", name)
    state, damaged = newest_state(run, at_most=8)
    assert state is not None and not damaged
    assert state.step == 8
    found: dict[str, dict[str, torch.Tensor]] = {}
    for kind in KINDS:
        with state_files(run, state, kind, Path(store.uri)) as paths:
            sizes: dict[str, int] = {}
            for path in paths:
                from safetensors import safe_open

                with safe_open(str(path), framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118 - not a dict
                        fragment = Fragment.from_key(key)
                        sizes[fragment.name] = max(sizes.get(fragment.name, 0), fragment.stop)
            wanted = {Fragment(name, 0, size): torch.empty(size) for name, size in sizes.items()}
            read_fragments(paths, wanted)
            found[kind] = {fragment.name: tensor for fragment, tensor in wanted.items()}
    return found


def assert_equal_within_rounding(store: LocalStore, one: str, other: str) -> None:
    left, right = whole(store, one), whole(store, other)
    for kind in KINDS:
        assert left[kind].keys() == right[kind].keys()
        for name, tensor in left[kind].items():
            torch.testing.assert_close(tensor, right[kind][name], atol=2e-5, rtol=1e-3, msg=f"{kind} {name}")


def curve(store: LocalStore, name: str, figure: str = "loss") -> list[float | None]:
    return [line[figure] for line in read_metrics(store, "full", name)]


@pytest.mark.parametrize("other", ["zero-1", "zero-2"])
def test_zero_changes_where_things_lie_and_not_what_they_are(trained: LocalStore, other: str) -> None:
    """ZeRO-0 on one rank, ZeRO-1 and ZeRO-2 on two: the same weights, moments, average and curve."""
    assert_equal_within_rounding(trained, "zero-0", other)
    for figure in ("loss", "loss_q1", "grad_norm", "grad_norm_spatial", "grad_norm_temporal"):
        expected = [pytest.approx(value, abs=1e-4) for value in curve(trained, "zero-0", figure)]
        assert curve(trained, other, figure) == expected, figure


def test_a_run_goes_through_one_two_four_and_one_ranks(trained: LocalStore) -> None:
    """Two steps on each number of ranks, re-sharded each time, are eight steps on one."""
    run = Run(trained, "full", "resharded")
    assert [run.attempt(number).layout.world_size for number in range(1, 5)] == [1, 2, 4, 1]
    assert_equal_within_rounding(trained, "zero-0", "resharded")


def test_all_ranks_skip_the_step_in_which_one_has_no_number(trained: LocalStore) -> None:
    """The sample lies on the second rank; both skip the same steps, and go on as one rank does."""
    assert curve(trained, "poisoned-1", "skipped") == [0, 0, 1, 0, 0, 1, 0, 0]
    assert_equal_within_rounding(trained, "poisoned-0", "poisoned-1")
    state, _ = newest_state(Run(trained, "full", "poisoned-1"), at_most=8)
    assert state is not None and state.updates == 6
