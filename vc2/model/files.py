"""Weights on disk: one safetensors file per network, holding its tensors and the configuration that shapes them.

Equal tensors and configuration give equal bytes. Nothing is ever unpickled.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vc2.config import Config
from vc2.errors import WeightsError

__all__ = ["check_shapes", "fill", "read_weights", "write_weights"]

C = TypeVar("C", bound=Config)


def write_weights(path: str | Path, state: Mapping[str, Tensor], config: Config) -> None:
    """Write tensors and their configuration to `path`, making its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, str(path), metadata={"config": config.model_dump_json()})


def read_weights(path: str | Path, config_class: type[C]) -> tuple[dict[str, Tensor], C | None]:
    """Tensors of a safetensors file, and the configuration stored with them (None in a foreign file).

    Raises:
        WeightsError: If the file is missing, not safetensors, or its configuration cannot be read.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            stored = (file.metadata() or {}).get("config")
        return state, config_class.model_validate_json(stored) if stored else None
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error}); make or fetch it again") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise WeightsError(
            f"{path}: stored configuration does not fit {config_class.__name__}: {first['loc']} {first['msg']}"
        ) from None


def fill(module: nn.Module, state: Mapping[str, Tensor], *, what: str) -> None:
    """Copy tensors into all parameters and buffers of a module: every one of them, and nothing left over.

    Args:
        module: The network to fill; keeps its dtype and device.
        state: Tensors under the module's own names.
        what: Where the tensors come from, for the error.

    Raises:
        WeightsError: If a name is missing or unexpected or a shape differs; says all that is wrong, changes nothing.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    check_shapes(expected, found, what=what)
    module.load_state_dict(dict(state))


def check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], *, what: str) -> None:
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
        lines.append("  check that the configuration describes these weights")
        raise WeightsError("\n".join(lines))
