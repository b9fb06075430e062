"""Weights on disk: files of tensors, of ours and of others, read one tensor at a time and written whole or not at all.

`open_weights` takes whatever holds weights (safetensors, torch's zip files, sharded sets of either, a folder of
diffusers) and gives a mapping of names to tensors that knows all shapes and has read none of the data. A tensor is read
when it is asked for, into memory of its own: the file may be replaced afterwards, and what has been used can be freed.
So a network is filled with little more memory than it takes itself.

Nothing here ever runs code out of a file. Torch's files are pickles; they are read by torch's restricted reader, which
knows tensors and plain containers and refuses the rest. Equal tensors and metadata give equal bytes when written.
"""

import json
import math
import os
import pickle
import re
import secrets
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from vc2.config import Config
from vc2.errors import WeightsError

__all__ = [
    "Stored",
    "Tensors",
    "check_shapes",
    "files_of_folder",
    "fill",
    "open_weights",
    "published",
    "read_weights",
    "write_tensors",
    "write_torch",
    "write_weights",
]

C = TypeVar("C", bound=Config)

# ---------------------------------------------------------------------------------------------------------------------
# A mapping that reads when asked


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that can be read, and what is known of it before."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "Stored":
        """A tensor that is in memory already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)


class Tensors(Mapping[str, Tensor]):
    """Tensors by name; looking one up reads it, nothing is kept.

    Args:
        stored: By name, in the order of the file.
        what: Where they come from, for errors.
        path: The file they come from, if it is one.
        metadata: What a safetensors file says of itself; strings that lay beside the tensors in a torch file.
        beside: Names of what lay beside the tensors in a torch file: `optimizer_states`, `global_step`.
    """

    def __init__(
        self,
        stored: Mapping[str, Stored],
        *,
        what: str = "weights",
        path: Path | None = None,
        metadata: Mapping[str, str] | None = None,
        beside: tuple[str, ...] = (),
    ) -> None:
        self.stored = dict(stored)
        self.what = str(path) if path else what
        self.path = path
        self.metadata = dict(metadata or {})
        self.beside = beside

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], what: str = "weights") -> "Tensors":
        """Any mapping of names to tensors as one of this kind; one of this kind is given back as it is."""
        if isinstance(tensors, Tensors):
            return tensors
        return cls({name: Stored.of(tensor) for name, tensor in tensors.items()}, what=what)

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def __contains__(self, name: object) -> bool:
        return name in self.stored

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: stored.shape for name, stored in self.stored.items()}

    @property
    def num_bytes(self) -> int:
        return sum(math.prod(stored.shape) * stored.dtype.itemsize for stored in self.stored.values())

    def renamed(self, name_of: Callable[[str], str | None]) -> "Tensors":
        """The same tensors under other names, those without a name (None) left out; nothing is read.

        Raises:
            WeightsError: If two would have the same name.
        """
        found: dict[str, Stored] = {}
        for name, stored in self.stored.items():
            if (new := name_of(name)) is None:
                continue
            if new in found:
                raise WeightsError(f"{self.what}: holds {new} twice, with and without a prefix; keep one of them")
            found[new] = stored
        return self._with(found)

    def cast(self, dtype: torch.dtype | None) -> "Tensors":
        """The same tensors, those of floating point in another type once they are read; None keeps all as they are."""
        if dtype is None:
            return self
        return self._with({name: _cast(stored, dtype) for name, stored in self.stored.items()})

    def __or__(self, other: "Tensors") -> "Tensors":
        return self._with(self.stored | other.stored)

    def _with(self, stored: Mapping[str, Stored]) -> "Tensors":
        return Tensors(stored, what=self.what, path=self.path, metadata=self.metadata, beside=self.beside)


def _cast(stored: Stored, dtype: torch.dtype) -> Stored:
    if not stored.dtype.is_floating_point:
        return stored
    return Stored(stored.shape, dtype, lambda: stored.read().to(dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Opening


def open_weights(place: str | Path, part: str = "unet") -> Tensors:
    """All tensors of a file or folder by name, unread.

    Args:
        place: A safetensors file; a torch file (`.ckpt`, `.pt`, `.pth`, `.bin`, by content whatever its ending), of
            whose entries the one that holds the weights is taken (`state_dict`, `module`, ...); an index of shards
            (`*.index.json`); a folder with one of these, or a diffusers folder.
        part: Which network of a diffusers folder.

    Raises:
        WeightsError: If there is no such place, or it holds no weights, or cannot be read without running code.
    """
    path = Path(place)
    if path.is_dir():
        return _open_folder(path, part)
    if path.name.endswith(".index.json"):
        return _open_shards(path)
    try:
        with open(path, "rb") as file:
            start, size = file.read(512), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}); give the path of a file of weights") from None
    if start.startswith(b"PK\x03\x04"):
        return _open_torch(path)
    if start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] <= _LONGEST_HEADER:
        return _open_safetensors(path, size)
    if start.startswith(_PICKLE):  # after safetensors: its first byte may be any
        return _open_legacy(path)
    raise WeightsError(f"{path}: {_no_weights(start, size)}")


_PICKLE = b"\x80"  # how pickles begin, and with them torch's files before they became zip files


def _no_weights(start: bytes, size: int) -> str:
    """What a file is that is no file of weights, and what to do."""
    head = start.lstrip().lower()
    if size == 0:
        return "is empty (0 bytes); fetch it again"
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not weights: its download needs a login, or another address; fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a git-LFS pointer, not the weights themselves; run `git lfs pull` where it was cloned"
    if head.startswith(b"\x1f\x8b") or head.startswith(b"\xfd7z") or b"ustar" in start:
        return "is a compressed or tar archive; unpack it and give the file inside"
    if start.startswith(b"\x89HDF"):
        return "is an HDF5 (Keras) file; expected safetensors or a torch file"
    if start.startswith(b"GGUF"):
        return "is a GGUF file, whose weights are quantised; expected safetensors or a torch file"
    if head.startswith((b"{", b"[")):
        return "is JSON, not weights; an index of shards is called *.index.json"
    return f"is neither safetensors nor a torch file ({size} bytes, beginning with {start[:8]!r}); fetch it again"


def _open_folder(folder: Path, part: str) -> Tensors:
    inner = folder / part if (folder / "model_index.json").is_file() or (folder / part).is_dir() else folder
    found = files_of_folder(inner)
    if not found:
        raise WeightsError(
            f"{inner}: no weights in this folder; expected one *.safetensors or *.bin file, or an index of shards"
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise WeightsError(f"{inner}: several files of weights ({names}); give the path of one of them")
    return open_weights(found[0])


_USUAL_NAMES = (
    "diffusion_pytorch_model",
    "model",
    "pytorch_model",
    "open_clip_model",
    "open_clip_pytorch_model",
    "unet",
)


def files_of_folder(folder: Path) -> list[Path]:
    """The file of weights in a folder: of usual names the first, else all there are; an index before its shards."""
    for ending in (".safetensors", ".bin"):
        for name in _USUAL_NAMES:
            for form in (f"{name}{ending}.index.json", f"{name}{ending}", f"{name}.fp16{ending}"):
                if (folder / form).is_file():
                    return [folder / form]
    return sorted(path for path in folder.glob("*") if path.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"))


def _open_shards(index: Path) -> Tensors:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = dict.fromkeys(str(name) for name in weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index}: not an index of shards ({type(error).__name__}: {error})") from None
    if strays := [name for name in shards if Path(name).name != name]:
        raise WeightsError(f"{index}: names {strays[0]!r}; expected shards in the index's own folder")
    if missing := [name for name in shards if not (index.parent / name).is_file()]:
        raise WeightsError(f"{index}: {len(missing)} of {len(shards)} shards are not there: {', '.join(missing[:4])}")
    opened = {name: open_weights(index.parent / name).stored for name in shards}
    lost = [name for name, shard in weight_map.items() if name not in opened[shard]]
    if lost:
        raise WeightsError(f"{index}: {lost[0]} is not in {weight_map[lost[0]]}; fetch the shards again")
    return Tensors({name: opened[shard][name] for name, shard in weight_map.items()}, path=index)


# ---- safetensors ----

_SAFETENSORS_TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


def _open_safetensors(path: Path, size: int) -> Tensors:
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        if length > size - 8:
            raise WeightsError(f"{path}: {_cut_off(size, 8 + length)}")
        text = file.read(length)
    try:
        header: dict[str, Any] = json.loads(text)
        metadata = {str(name): str(value) for name, value in header.pop("__metadata__", {}).items()}
        stored = {
            name: _entry(path, 8 + length, entry["dtype"], entry["shape"], entry["data_offsets"])
            for name, entry in header.items()
        }
        end = max((8 + length + entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{path}: its safetensors header is damaged ({type(error).__name__}: {error}); fetch it again"
        ) from None
    if end > size:
        raise WeightsError(f"{path}: {_cut_off(size, end)}")
    return Tensors(stored, path=path, metadata=metadata)


def _cut_off(size: int, expected: int) -> str:
    return f"is truncated: {size:,} bytes of at least {expected:,}; fetch it again"


def _entry(path: Path, base: int, type_name: str, shape: list[int], offsets: list[int]) -> Stored:
    if type_name not in _SAFETENSORS_TYPES:
        raise WeightsError(f"{path}: holds numbers of type {type_name}; expected plain floats or integers")
    dtype, (start, end) = _SAFETENSORS_TYPES[type_name], offsets
    if start < 0 or min(shape, default=0) < 0 or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - start} bytes for a tensor {shape} of {type_name}")
    return Stored(tuple(shape), dtype, lambda: _read(path, base + start, dtype, tuple(shape)))


def _read(path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Read a tensor straight into memory of its own: no mapped pages, nothing shared with the file."""
    tensor = torch.empty(shape, dtype=dtype)
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        _read_into(file, memoryview(_bytes_of(tensor)), path)
    return tensor


def _read_into(file: BinaryIO, target: memoryview, path: Path) -> None:
    while target:
        count = file.readinto(target)  # type: ignore[attr-defined]  # raw files have it
        if not count:
            raise WeightsError(f"{path}: ended while it was read; it has changed, fetch it again")
        target = target[count:]


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


# ---- torch ----

# Entries of a torch file that may hold the weights, the likeliest first.
_WEIGHT_ENTRIES = ("state_dict", "module", "model_state_dict", "model", "params_ema", "params", "net", "weights")


class _Ignored:
    """Stands for objects that some checkpoints carry beside their weights and that we do not want: it does nothing."""

    def __init__(self, *values: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# Names that such objects are pickled under. Old Lightning names its callbacks by their classes; numpy numbers are
# scores and counters. None of these classes is imported: the names are made to mean `_Ignored`.
_IGNORED = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)


def _open_torch(path: Path) -> Tensors:
    """A zip file of torch: its pickle says where in the file every tensor lies."""
    content = _unpickled(path, "meta")
    with zipfile.ZipFile(path) as file:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
            raise WeightsError(f"{path}: was zipped again with compression; unpack it, and zip or save it without")
    size = path.stat().st_size
    return _tensors_in(content, path, lambda tensor: _placed(tensor, path, size))


def _open_legacy(path: Path) -> Tensors:
    """A torch file of before 2020, which has to be read in one go."""
    return _tensors_in(_unpickled(path, "cpu"), path, lambda tensor: Stored.of(tensor.detach()))


def _unpickled(path: Path, location: str) -> Any:
    try:
        with torch.serialization.safe_globals([(_Ignored, name) for name in _IGNORED]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickle protocols: what cannot be read is an error below
            with open(path, "rb") as file:  # by content: given a path, torch goes by its ending
                return torch.load(file, map_location=location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path}: {_refused(str(error))}") from None
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError, OSError) as error:
        text = str(error)
        if "TorchScript" in text:
            raise WeightsError(
                f"{path}: is a TorchScript program, not weights; it is not run. Give a file of its state_dict"
            ) from None
        raise WeightsError(
            f"{path}: is truncated or damaged ({text.splitlines()[0][:120] if text else type(error).__name__}); "
            "fetch it again"
        ) from None


def _refused(reason: str) -> str:
    found = re.search(r"GLOBAL (\S+)", reason) or re.search(r"function (.+?) ?$", reason, re.MULTILINE)
    if found:
        return (
            f"is a pickle that wants to run code: it asks for {found.group(1)}; refused. Give a safetensors file, or "
            "have its maker save the state_dict alone"
        )
    why = re.search(r"Unsupported operand \d+|WeightsUnpickler error: (.+)", reason)
    return (
        f"is a pickle that torch's restricted reader does not take ({why.group(0) if why else 'no reason given'}), and "
        "no other is used; give a safetensors file, or have its maker save the state_dict alone with torch.save"
    )


def _placed(tensor: Tensor, path: Path, size: int) -> Stored:
    """A tensor of a zip file of that size, that was unpickled without its data."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise WeightsError(f"{path}: holds a sparse or quantised tensor; expected dense ones")
    shape, strides, dtype = tuple(tensor.shape), tensor.stride(), tensor.dtype
    offset: int = tensor.untyped_storage()._checkpoint_offset  # type: ignore[attr-defined]  # put there by torch.load
    start = offset + int(tensor.storage_offset()) * dtype.itemsize
    span = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if tensor.numel() and start + span * dtype.itemsize > size:
        raise WeightsError(f"{path}: {_cut_off(size, start + span * dtype.itemsize)}")
    if tensor.is_contiguous():
        return Stored(shape, dtype, lambda: _read(path, start, dtype, shape))
    return Stored(shape, dtype, lambda: _read(path, start, dtype, (span,)).as_strided(shape, strides).contiguous())


def _tensors_in(content: Any, path: Path, stored: Callable[[Tensor], Stored]) -> Tensors:
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}; expected tensors by name")
    inner = next((content[name] for name in _WEIGHT_ENTRIES if _tensors_of(content.get(name))), content)
    tensors = _tensors_of(inner)
    beside = () if inner is content else tuple(str(name) for name in content)
    if not tensors:
        raise WeightsError(
            f"{path}: holds no tensors by name, but {', '.join(str(name) for name in list(content)[:8]) or 'nothing'}; "
            "expected a state_dict"
        )
    if inner is content:
        beside = tuple(str(name) for name in content if name not in tensors)
    notes = {str(name): value for name, value in content.items() if isinstance(value, str)}
    found = {name: stored(tensor) for name, tensor in tensors.items()}
    return Tensors(found, path=path, metadata=notes, beside=beside)


def _tensors_of(value: Any) -> dict[str, Tensor]:
    if not isinstance(value, Mapping):
        return {}
    return {name: item for name, item in value.items() if isinstance(name, str) and isinstance(item, Tensor)}


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def published(path: Path, make: Callable[[Path], object]) -> None:
    """Let `make` write a file, or a folder, under a temporary name beside `path`, and rename it when it is whole.

    Raises:
        WeightsError: If the place cannot be written.
    """
    path = path.resolve()  # a link stays a link
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        make(temporary)
        if path.is_dir():
            aside = path.with_name(f".{path.name}.{os.getpid()}-old")
            path.rename(aside)
            temporary.rename(path)
            _remove(aside)
        else:
            temporary.replace(path)
    except (OSError, SafetensorError) as error:
        words = getattr(error, "strerror", None) or str(error)
        raise WeightsError(f"{path}: cannot be written ({words}); choose another place") from error
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    import shutil

    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError:  # what was going wrong before is the error to tell
        pass


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, tensor by tensor: of a lazy mapping never more than one is in memory.

    The bytes are those that the safetensors library writes.
    """
    stored = Tensors.of(tensors).stored
    names = {dtype: name for name, dtype in _SAFETENSORS_TYPES.items()}
    order = list(names)
    if strange := [name for name, entry in stored.items() if entry.dtype not in names]:
        raise WeightsError(f"{strange[0]} is of type {stored[strange[0]].dtype}, which safetensors files cannot hold")
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in sorted(stored, key=lambda name: (-order.index(stored[name].dtype), name)):  # widest type first
        start, end = end, end + math.prod(stored[name].shape) * stored[name].dtype.itemsize
        header[name] = {
            "dtype": names[stored[name].dtype],
            "shape": list(stored[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in header:
                if name != "__metadata__":
                    file.write(_bytes_of(stored[name].read().detach().cpu().contiguous()))
            file.flush()
            os.fsync(file.fileno())

    published(Path(path), write)


def write_torch(path: str | Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
    """Write a torch file `{"state_dict": tensors, **notes}`; the tensors are held in memory once."""
    stored = Tensors.of(tensors).stored

    def write(temporary: Path) -> None:
        state = {name: entry.read().detach().cpu().contiguous() for name, entry in stored.items()}
        torch.save({"state_dict": state, **(notes or {})}, temporary)

    published(Path(path), write)


def write_weights(path: str | Path, state: Mapping[str, Tensor], config: Config) -> None:
    """Write tensors and their configuration to the safetensors file `path`, making its folder."""
    write_tensors(path, state, {"config": config.model_dump_json()})


def read_weights(path: str | Path, config_class: type[C]) -> tuple[Tensors, C | None]:
    """Tensors of a file, unread, and the configuration stored with them (None in a foreign file).

    Raises:
        WeightsError: If the file cannot be read as weights, or its configuration cannot be read.
    """
    tensors = open_weights(path)
    stored = tensors.metadata.get("config")
    try:
        return tensors, config_class.model_validate_json(stored) if stored else None
    except ValidationError as error:
        first = error.errors()[0]
        raise WeightsError(
            f"{path}: stored configuration does not fit {config_class.__name__}: {first['loc']} {first['msg']}"
        ) from None


# ---------------------------------------------------------------------------------------------------------------------
# Filling networks


def fill(module: nn.Module, state: Mapping[str, Tensor], *, what: str, cause: str = "") -> None:
    """Copy tensors into all parameters and buffers of a module: every one of them, and nothing left over.

    Args:
        module: The network to fill; keeps its dtype and device.
        state: Tensors under the module's own names; a lazy mapping is read one by one.
        what: Where the tensors come from, for the error.
        cause: The likely cause of a misfit, for the error.

    Raises:
        WeightsError: If a name is missing or unexpected or a shape differs; says all that is wrong, changes nothing.
    """
    own = module.state_dict()
    check_shapes(
        {name: tuple(tensor.shape) for name, tensor in own.items()}, Tensors.of(state).shapes, what=what, cause=cause
    )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def check_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], *, what: str, cause: str = ""
) -> None:
    """Compare names and shapes of tensors.

    Raises:
        WeightsError: If they differ in any way; one text that names the first few of each kind and counts the rest.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [
        f"{name} is {found[name]}, not {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if missing or unexpected or misshapen:
        fitting = len(expected) - len(missing) - len(misshapen)
        lines = [f"{what}: {fitting} of {len(expected)} tensors fit; nothing was loaded"]
        lines += [
            f"  {len(names)} {kind}: " + ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
            if names
        ]
        lines.append(f"  likely cause: {cause}" if cause else "  check that the configuration describes these weights")
        raise WeightsError("\n".join(lines))
