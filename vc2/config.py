"""Configuration: frozen, typed, checked at birth, and one canonical form from which digests are made.

A field is either part of what is asked for, or a *knob*: something that changes how the work is done and never its
result (workers, intervals, paths). Knobs are declared with `knob(...)` and stay out of `identity()`, hence out of every
fingerprint.
"""

import hashlib
import json
import reprlib
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Self, TypeVar, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from vc2.errors import ConfigError

__all__ = ["Config", "canonical_json", "digest", "knob", "merge", "overrides_of", "parse_settings"]


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of a value, 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def knob(default: Any = ..., **kwargs: Any) -> Any:
    """A pydantic `Field` that changes how the work is done, never what comes out."""
    return Field(default, json_schema_extra={"knob": True}, **kwargs)


class Config(BaseModel):
    """Base of all configurations."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def evolve(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again."""
        return type(self).model_validate(dict(self) | changes)

    def identity(self) -> dict[str, Any]:
        """Everything that can change the result, as plain JSON values: the config without its knobs."""
        return {
            name: _plain(getattr(self, name))
            for name, field in type(self).model_fields.items()
            if not (isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("knob"))
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.identity()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float | int | str | bool) or value is None:
        return value
    return str(value)


C = TypeVar("C", bound=Config)


@cache
def overrides_of(model: type[Config]) -> type[Config]:
    """The model of partial settings for `model`: every field optional, limits and descriptions kept.

    Empty (None) means: take the recipe's value. Unknown fields are refused. The run form of the UI, `--set a.b=c` and
    the recipes all go through this one type.
    """
    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        annotation = _optional_parts(field.annotation)
        for limit in field.metadata:
            annotation = Annotated[annotation, limit]
        fields[name] = (Union[annotation, None], Field(None, description=field.description))  # noqa: UP007
    overrides = create_model(f"{model.__name__}Overrides", __base__=Config, **fields)
    overrides.__doc__ = f"Settings of {model.__name__} to change; what is left empty keeps the recipe's value."
    return overrides


def _optional_parts(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return overrides_of(annotation)
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is Union:
        return Union[tuple(_optional_parts(arm) for arm in typing.get_args(annotation))]  # noqa: UP007
    return annotation


def merge(config: C, settings: Mapping[str, Any] | Config | None) -> C:
    """`config` with nested settings laid over it.

    Raises:
        ConfigError: If a setting names no field or breaks a limit; one line that says which.
    """
    if settings is None:
        return config
    plain = settings.model_dump(exclude_none=True) if isinstance(settings, Config) else dict(settings)
    try:
        overrides_of(type(config)).model_validate(plain)
        return _laid_over(config, plain)
    except ValidationError as error:
        raise ConfigError(_one_line(type(config).__name__, error)) from None


def _laid_over(config: C, settings: Mapping[str, Any], path: str = "") -> C:
    changes = {}
    for name, value in settings.items():
        current = getattr(config, name)
        same_kind = isinstance(value, Mapping) and value.get("kind", getattr(current, "kind", None)) == getattr(
            current, "kind", None
        )
        is_nested = isinstance(current, Config) and same_kind
        changes[name] = _laid_over(current, value, f"{path}{name}.") if is_nested else value
    try:
        return config.evolve(**changes)
    except ValidationError as error:
        raise ConfigError(_one_line(path.rstrip(".") or type(config).__name__, error)) from None


def _one_line(name: str, error: ValidationError) -> str:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"] if not str(part).endswith("Overrides"))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{name} has no setting {path!r}; `vc2 plan --json` prints all that it has{more}"
    if first["type"] == "value_error":  # told by a check of ours, whose words are a whole sentence
        said = first.get("ctx", {}).get("error", first["msg"])
        return f"{name}: {path}{': ' if path else ''}{said}{more}"
    message = first["msg"][:1].lower() + first["msg"][1:]
    return f"{name}: {path} = {reprlib.repr(first['input'])}: {message}{more}"


def parse_settings(lines: typing.Iterable[str]) -> dict[str, Any]:
    """Nested settings from `a.b=value` lines; a value is JSON where it parses as JSON, else text.

    Raises:
        ConfigError: If a line has no `=`, or sets both `a` and `a.b`.
    """
    settings: dict[str, Any] = {}
    for line in lines:
        path, equals, text = line.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"--set {line!r}: expected name=value, for example full.num_steps=200")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        place = settings
        *parents, last = path.strip().split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--set {line!r}: {parent!r} was already set to a single value")
        place[last] = value
    return settings
