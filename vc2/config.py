"""Configuration: frozen, typed, checked at birth, and one canonical form from which digests are made.

A field is either part of what is asked for, or a *knob*: something that changes how the work is done and never its
result (workers, intervals, paths). Knobs are declared with `knob(...)` and stay out of `identity()`, hence out of every
fingerprint.

What a field means is said once, in its description or in the comment beside it; forms show either.

Secrets are no part of a configuration: it is kept in manifests, and shown. A URL with a user or a password in it is
refused, wherever in the first word of a setting it stands, by the model and by the schema that forms and deployments
are checked with. Further words are prose, such as prompts and messages, and what is of any type are records of what
was checked when it was asked for; neither is looked through.
"""

import ast
import hashlib
import inspect
import io
import json
import re
import reprlib
import sys
import tokenize
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Self, TypeVar, Union

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, ValidationError, create_model

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


CREDENTIALS = r"\s*\S*://(?!\*\*\*@)[^/?#\s]*@"  # how a text begins whose first word has some; stars blank them


class Config(BaseModel):
    """Base of all configurations."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True)
    described_by: ClassVar[type["Config"] | None] = None  # the model whose fields are meant, if they are another's

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The schema that forms are made of: a field without a description gets the comment beside it."""
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        model = cls.described_by or cls
        for name, field in properties.items():
            if "description" not in field and (said := _said_of(model, name)):
                field["description"] = said
            for text in _texts(field):
                text.setdefault("pattern", f"^(?!{CREDENTIALS})")
        return schema

    def model_post_init(self, context: Any, /) -> None:
        for name in _searched(type(self)):
            for text in _strings(getattr(self, name)):
                if "://" in text and "@" in text and re.match(CREDENTIALS, text):
                    raise ValueError(
                        f"{name} is a URL with a user or a password, which would be stored and shown; leave them out, "
                        "or use s3://, whose credentials come from the environment"
                    )

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


def _texts(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The parts of a field's schema that stand for free text."""
    if schema.get("type") == "string" and not {"enum", "const", "format"} & set(schema):
        yield schema
    for part in schema.get("anyOf", ()):
        yield from _texts(part)
    for several in ("items", "additionalProperties"):
        if isinstance(schema.get(several), dict):
            yield from _texts(schema[several])
    for part in schema.get("prefixItems", ()):
        yield from _texts(part)


@cache
def _searched(model: type[Config]) -> tuple[str, ...]:
    """Fields that are looked through for credentials: those without a part of any type."""

    def is_known(annotation: Any) -> bool:
        return annotation is not Any and all(map(is_known, typing.get_args(annotation)))

    return tuple(name for name, field in model.model_fields.items() if is_known(field.annotation))


def _strings(value: Any) -> Iterator[str]:
    """The texts in a setting; settings within it look through their own."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in (*value, *value.values()):
            yield from _strings(part)
    elif isinstance(value, list | tuple | set | frozenset):
        for part in value:
            yield from _strings(part)


def _said_of(model: type[Config], name: str) -> str:
    """The comment beside a field, else the first line of what its own model says of itself."""
    for owner in model.__mro__:
        if said := _comments(owner.__module__).get((owner.__name__, name)):
            return said[0].upper() + said[1:]
    field = model.model_fields.get(name)
    for part in (field.annotation, *typing.get_args(field.annotation)) if field else ():
        if isinstance(part, type) and issubclass(part, Config) and part.__doc__:
            return part.__doc__.strip().splitlines()[0]
    return ""


@cache
def _comments(module: str) -> dict[tuple[str, str], str]:
    """Comments at the end of the fields of a module's classes: (class, field) -> comment."""
    try:
        source = inspect.getsource(sys.modules[module])
    except (OSError, TypeError, KeyError):
        return {}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {token.start[0]: token.string.lstrip("#: ") for token in tokens if token.type == tokenize.COMMENT}
    return {
        (owner.name, line.target.id): lines[line.end_lineno]
        for owner in ast.walk(ast.parse(source))
        if isinstance(owner, ast.ClassDef)
        for line in owner.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.end_lineno in lines
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
    overrides.described_by = model
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
