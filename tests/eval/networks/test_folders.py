"""Folders of networks: what is missing is named, what is opened leaves no trace."""

import logging
import shutil
from pathlib import Path

import pytest
from transformers import BertConfig
from transformers.utils import logging as transformers_logging

from vc2.errors import PretrainedMissing, WeightsError
from vc2.eval.metrics import folder_digest
from vc2.eval.networks.folders import WEIGHTS, check_folder, opened, quiet


def test_all_that_is_missing_is_named(tmp_path: Path) -> None:
    """One error names every missing file, with its alternatives, and what should be there."""
    (tmp_path / "a.json").touch()
    check_folder(tmp_path, "a net", "a.json", ("b.txt", "a.json"))
    with pytest.raises(PretrainedMissing, match=r"c\.json, model\.safetensors or model\.\S+\.index\.json.*a net"):
        check_folder(tmp_path, "a net", "a.json", "c.json", WEIGHTS)


def test_an_index_is_no_weights_by_itself(tmp_path: Path) -> None:
    """An index that is broken is told; one beside the whole file is not asked."""
    (tmp_path / WEIGHTS[1]).write_text("not json")
    with pytest.raises(WeightsError, match="not an index"):
        check_folder(tmp_path, "a net", WEIGHTS)
    (tmp_path / WEIGHTS[0]).touch()
    check_folder(tmp_path, "a net", WEIGHTS)


def test_the_digest_of_a_folder_is_of_its_names_and_bytes(tmp_path: Path) -> None:
    """A copy has the same digest; another name, another byte another one; hidden files do not count."""
    (tmp_path / "one" / "inner").mkdir(parents=True)
    (tmp_path / "one" / "a").write_text("a")
    (tmp_path / "one" / "inner" / "b").write_text("b")
    expected = folder_digest(tmp_path / "one")
    other = shutil.copytree(tmp_path / "one", tmp_path / "other")
    (other / ".cache").mkdir()
    (other / ".cache" / "c").write_text("c")
    assert folder_digest(other) == expected
    (other / "a").rename(other / "d")
    assert folder_digest(other) != expected
    (other / "d").rename(other / "a")
    (other / "a").write_text("x")
    assert folder_digest(other) != expected


def test_quiet_is_over_afterwards() -> None:
    """The library's verbosity and progress bars are as before, also after an error."""
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    with pytest.raises(KeyError):
        with quiet():
            assert transformers_logging.get_verbosity() == logging.CRITICAL
            assert not transformers_logging.is_progress_bar_enabled()
            raise KeyError
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before


def test_what_cannot_be_opened_is_told_by_folder(tmp_path: Path) -> None:
    """An error of the library becomes one of ours, which says where."""
    (tmp_path / "config.json").write_text("not json")
    with pytest.raises(WeightsError, match=f"{tmp_path.name}.*BertConfig"):
        opened(BertConfig, tmp_path)
