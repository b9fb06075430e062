"""Networks of transformers and diffusers, as they lie in a local folder: checked, opened offline, filled completely.

A folder of the hub holds a configuration, weights (one safetensors file, or an index and its shards) and what prepares
text. Libraries tell of a missing file late and in their own words, fill missing tensors with random numbers, and print
progress; here a folder is complete or an error names what it lacks, and nothing asks the network.
"""

import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from vc2.errors import PretrainedMissing, WeightsError

__all__ = ["WEIGHTS", "check_folder", "filled", "frozen", "opened", "quiet"]

M = TypeVar("M", bound=torch.nn.Module)

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  #: either holds a network of transformers


def check_folder(folder: Path, what: str, *needed: str | tuple[str, ...]) -> None:
    """Raise unless a folder has all files that are needed.

    Args:
        folder: Where they should be.
        what: What it is and where it is published, for the error.
        needed: Paths below the folder; of a tuple, one is enough.

    Raises:
        PretrainedMissing: If there is no such folder, or files are missing; names all of them.
    """
    if not folder.is_dir():
        found = "it is a file" if folder.exists() else "there is none"
        raise PretrainedMissing(f"{folder}: expected a folder with {what}, {found}; it needs {_words(needed)}")
    missing = [names for names in needed if not any((folder / name).is_file() for name in _tuple(names))]
    if missing:
        raise PretrainedMissing(f"{folder}: {_words(missing)} not there; expected a folder with {what}")
    for names in map(_tuple, needed):
        first = next(folder / name for name in names if (folder / name).is_file())
        if first.name.endswith(".index.json"):
            _check_shards(first, what)


def _tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _words(needed: tuple[str | tuple[str, ...], ...] | list[str | tuple[str, ...]]) -> str:
    return ", ".join(" or ".join(_tuple(names)) for names in needed)


def _check_shards(index: Path, what: str) -> None:
    try:
        shards = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index}: not an index of shards ({type(error).__name__}); fetch it again") from None
    if missing := [name for name in shards if not (index.parent / name).is_file()]:
        raise PretrainedMissing(
            f"{index.parent}: {', '.join(missing)} not there, which {index.name} names; expected a folder with {what}"
        )


def opened(kind: Any, folder: Path, **settings: Any) -> Any:
    """A tokenizer, processor or configuration of transformers out of a folder, or an error that names the folder."""
    try:
        with quiet():
            return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise WeightsError(
            f"{folder}: {kind.__name__} cannot be opened ({_first_line(error)}); fetch the folder again"
        ) from None


def filled(kind: type[M], folder: Path, device: torch.device, dtype: torch.dtype = torch.float32, **settings: Any) -> M:
    """A network out of a folder, frozen and ready to be asked.

    Args:
        kind: Class of transformers or diffusers.
        folder: With its configuration and weights.
        device: Where it goes.
        dtype: Of its parameters.
        settings: Handed on to `from_pretrained`.

    Raises:
        WeightsError: If the configuration or the weights cannot be read, or they do not fit one another.
    """
    try:
        with quiet():
            opener: Any = kind
            model, told = opener.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True, **settings
            )
    except Exception as error:  # of many kinds: of files, of configurations, of shapes
        raise WeightsError(f"{folder}: not weights of {kind.__name__} ({_first_line(error)}); fetch it again") from None
    lost = sorted(told["missing_keys"]) + [f"{key[0]} (another shape)" for key in told["mismatched_keys"]]
    if lost:
        raise WeightsError(
            f"{folder}: {len(lost)} tensors of {kind.__name__} are not in its weights: {', '.join(lost[:4])}"
            f"{', ...' if len(lost) > 4 else ''}; it holds another network"
        )
    return frozen(model, device)


def frozen(model: M, device: torch.device) -> M:
    """The network itself, on a device, in evaluation mode, without gradients."""
    torch.nn.Module.to(model, device)
    return model.eval().requires_grad_(False)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:240]}" if lines else type(error).__name__


_LOGGING = ("transformers.utils.logging", "diffusers.utils.logging")  # alike; diffusers takes seconds to import


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, no reports on standard error, no warnings of the libraries about their own future."""
    with contextlib.ExitStack() as stack:
        for library in (sys.modules[name] for name in _LOGGING if name in sys.modules):
            stack.callback(library.set_verbosity, library.get_verbosity())
            if library.is_progress_bar_enabled():
                stack.callback(library.enable_progress_bar)
            library.disable_progress_bar()
            library.set_verbosity(logging.CRITICAL)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=r"(transformers|diffusers|huggingface_hub)\b.*")
        yield
