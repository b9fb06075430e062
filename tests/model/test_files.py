"""Weights are read one by one from whatever holds them, never by running code, and what is no weights is said."""

import json
import os
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vc2.errors import WeightsError
from vc2.model.files import Stored, Tensors, check_shapes, fill, open_weights, published, write_tensors, write_torch


def tensors() -> dict[str, Tensor]:
    """All that a file may hold: types, scalars, nothing at all, views of one memory, other orders of axes."""
    shared = torch.randn(6, 4)
    return {
        "float32": torch.randn(3, 4),
        "float16": torch.randn(5).half(),
        "bfloat16": torch.randn(2, 2).bfloat16(),
        "float64": torch.randn(3).double(),
        "int64": torch.arange(4),
        "uint8": torch.arange(3, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(4.6),
        "empty": torch.empty(0, 3),
        "view": shared[2:4],
        "turned": shared.t(),
    }


def assert_same(found, expected) -> None:
    assert set(found) == set(expected)
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrap", [None, "state_dict", "module", "model"])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"], ids=["", "wrong ending"])
def test_a_torch_file_holds_what_was_saved(tmp_path, zipped, wrap, suffix):
    """Wherever in it the weights are, whatever it is called."""
    state = tensors()
    content = {wrap: state, "global_step": 7, "callbacks": {}} if wrap else state
    torch.save(content, tmp_path / f"model{suffix}", _use_new_zipfile_serialization=zipped)
    opened = open_weights(tmp_path / f"model{suffix}")
    assert_same(opened, state)
    assert opened.shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert set(opened.beside) == ({wrap, "global_step", "callbacks"} if wrap else set())


def test_a_safetensors_file_is_written_as_the_library_writes_it(tmp_path):
    state = {name: tensor.contiguous() for name, tensor in tensors().items() if name != "view"}
    save_file(state, tmp_path / "theirs.safetensors", metadata={"note": 'ü "x"'})
    write_tensors(tmp_path / "ours.safetensors", state, {"note": 'ü "x"'})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    opened = open_weights(tmp_path / "theirs.safetensors")
    assert_same(opened, state)
    assert opened.metadata == {"note": 'ü "x"'}


def test_nothing_is_read_before_it_is_asked_for_and_nothing_is_shared_with_the_file(tmp_path):
    for name, write in (("model.safetensors", write_tensors), ("model.ckpt", write_torch)):
        path = tmp_path / name
        write(path, {"a": torch.ones(4), "b": torch.ones(4)})
        opened = open_weights(path)
        first = opened["a"]
        with open(path, "r+b") as file:
            file.truncate(16)
        assert torch.equal(first, torch.ones(4))
        with pytest.raises(WeightsError, match="ended while it was read"):
            opened["b"]


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_shards_are_one_mapping(tmp_path, ending):
    state = {name: tensor.contiguous() for name, tensor in tensors().items() if name not in ("view", "empty")}
    half = len(state) // 2
    parts = {f"model-1{ending}": dict(list(state.items())[:half]), f"model-2{ending}": dict(list(state.items())[half:])}
    for name, part in parts.items():
        save_file(part, tmp_path / name) if ending == ".safetensors" else torch.save(part, tmp_path / name)
    index = tmp_path / f"model{ending}.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in parts.items() for name in part}}))
    assert_same(open_weights(index), state)
    assert_same(open_weights(tmp_path), state)
    (tmp_path / f"model-2{ending}").unlink()
    with pytest.raises(WeightsError, match=f"1 of 2 shards are not there: model-2{ending}"):
        open_weights(index)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.bin"}}))
    with pytest.raises(WeightsError, match="shards in the index's own folder"):
        open_weights(index)


@pytest.mark.parametrize("files", [["unet/diffusion_pytorch_model.safetensors"], ["unet/diffusion_pytorch_model.bin"]])
def test_a_folder_of_diffusers_is_opened_by_its_part(tmp_path, files):
    for name in [*files, "vae/diffusion_pytorch_model.safetensors"]:
        (tmp_path / name).parent.mkdir()
        state = {"in": torch.full((2,), float(len(name)))}
        save_file(state, tmp_path / name) if name.endswith(".safetensors") else torch.save(state, tmp_path / name)
    (tmp_path / "model_index.json").write_text("{}")
    assert float(open_weights(tmp_path)["in"][0]) == len(files[0])
    assert float(open_weights(tmp_path, "vae")["in"][0]) == len("vae/diffusion_pytorch_model.safetensors")
    assert float(open_weights(tmp_path / "unet")["in"][0]) == len(files[0])


def test_a_checkpoint_of_old_lightning_loads(tmp_path, monkeypatch):
    """It names its callbacks by their classes and its scores are numpy numbers; neither is imported or wanted."""
    names = ["pytorch_lightning", "callbacks", "model_checkpoint"]
    for end in range(1, len(names) + 1):
        monkeypatch.setitem(sys.modules, ".".join(names[:end]), types.ModuleType(names[end - 1]))
    module = sys.modules[".".join(names)]
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": ".".join(names)})
    callbacks = {module.ModelCheckpoint: {"best_model_score": np.float64(0.3), "dirpath": "x"}}
    torch.save({"state_dict": {"a": torch.ones(2)}, "callbacks": callbacks, "epoch": 1}, tmp_path / "old.ckpt")
    for end in range(1, len(names) + 1):
        monkeypatch.delitem(sys.modules, ".".join(names[:end]))
    assert_same(open_weights(tmp_path / "old.ckpt"), {"a": torch.ones(2)})
    assert ".".join(names) not in sys.modules


class RunsCode:
    """What a hostile file would hold."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_with_code_is_refused_by_the_name_of_what_it_asks_for(tmp_path, zipped):
    content = {"state_dict": {"a": torch.ones(2)}, "x": RunsCode(tmp_path / "was-run")}
    torch.save(content, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"run code: it asks for posix\.mkdir; refused\. Give a safetensors"):
        open_weights(tmp_path / "model.ckpt")
    assert not (tmp_path / "was-run").exists()


def test_pickles_in_a_newer_form_are_refused_too(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "model.ckpt", pickle_protocol=4)
    with pytest.raises(WeightsError, match="restricted reader does not take"):
        open_weights(tmp_path / "model.ckpt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>login</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"\x1f\x8b\x08" + bytes(64), "unpack it"),
        (b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
        (b"GGUF" + bytes(64), "quantised"),
        (b'{"weight": 1, "and": "so on"}', "is JSON"),
        (b"some words of somebody", "neither safetensors nor a torch file"),
        (b"PK\x03\x04" + bytes(64), "is truncated or damaged"),
        (b"\x10" + bytes(7) + b"{ not a header }", "header is damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_weights_is_said(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        open_weights(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_a_truncated_file_is_said_to_be_one(tmp_path, name):
    path = tmp_path / name
    (write_tensors if name.endswith("s") else write_torch)(path, {"a": torch.ones(1000), "b": torch.ones(10)})
    whole = path.read_bytes()
    for length in (30, len(whole) // 2, len(whole) - 2):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match="is truncated"):
            open_weights(path)


def test_other_containers_of_torch_are_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(WeightsError, match="holds a list; expected tensors by name"):
        open_weights(tmp_path / "list.pt")
    torch.save({"config": {"a": 1}}, tmp_path / "none.pt")
    with pytest.raises(WeightsError, match="no tensors by name, but config"):
        open_weights(tmp_path / "none.pt")
    write_torch(tmp_path / "plain.pt", {"a": torch.ones(100)})
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "squeezed.pt", "w", zipfile.ZIP_DEFLATED) as squeezed,
    ):
        for entry in plain.infolist():
            squeezed.writestr(entry.filename, plain.read(entry))
    with pytest.raises(WeightsError, match="zipped again with compression"):
        open_weights(tmp_path / "squeezed.pt")
    with pytest.raises(WeightsError, match="cannot be read"):
        open_weights(tmp_path / "nowhere.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="no weights in this folder"):
        open_weights(tmp_path / "empty")


def test_a_network_is_filled_whole_or_not_at_all():
    network = nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(WeightsError, match=r"0 of 2 tensors fit(.|\n)*1 missing: bias(.|\n)*likely cause: too big"):
        fill(network, {"weight": torch.ones(4, 3)}, what="a file", cause="too big")
    assert_same(network.state_dict(), before)
    fill(network, {"weight": torch.ones(2, 3).half(), "bias": torch.zeros(2)}, what="a file")
    assert torch.equal(network.weight, torch.ones(2, 3))


def test_shapes_that_agree_are_no_error():
    check_shapes({"a": (1, 2)}, {"a": (1, 2)}, what="anything")


def test_renaming_and_casting_read_nothing():
    def never() -> Tensor:
        raise AssertionError("read")

    mapping = Tensors({"a": Stored((2,), torch.float32, never), "n": Stored((), torch.int64, never)})
    other = mapping.renamed(lambda name: "b" if name == "a" else name).cast(torch.float16)
    assert [(name, other.stored[name].dtype) for name in other] == [("b", torch.float16), ("n", torch.int64)]
    assert (other | mapping).shapes == {"b": (2,), "n": (), "a": (2,)}


def test_no_tensor_is_lost_by_renaming():
    with pytest.raises(WeightsError, match="holds a twice"):
        Tensors.of({"a": torch.ones(1), "x.a": torch.ones(1)}).renamed(lambda name: name.removeprefix("x."))


def test_what_fails_halfway_leaves_what_was_there(tmp_path):
    (tmp_path / "file").write_text("before")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise ValueError

    with pytest.raises(ValueError):
        published(tmp_path / "file", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "before"


def test_a_link_is_written_through(tmp_path):
    """What it points to is replaced, the link stays, and nothing is left beside it."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    published(tmp_path / "link", lambda folder: (folder.mkdir(), (folder / "new").touch()))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "new").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}


def test_a_place_below_a_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="cannot be written"):
        published(tmp_path / "file" / "model", lambda folder: folder.mkdir())
