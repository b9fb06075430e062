"""Configuration: what is part of a fingerprint, and how settings are laid over a recipe."""

from typing import Annotated, Any, Literal

import jsonschema
import pytest
from pydantic import Field

from vc2.config import Config, canonical_json, digest, knob, merge, overrides_of, parse_settings
from vc2.errors import ConfigError


class Cat(Config):
    kind: Literal["cat"] = "cat"
    lives: int = Field(9, ge=1, description="how many are left")


class Dog(Config):
    kind: Literal["dog"] = "dog"


class House(Config):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")] = Cat()
    inner: Cat = Cat()
    rooms: tuple[int, ...] = (1, 2)
    workers: int = knob(1, ge=1)


def test_a_knob_changes_no_identity() -> None:
    assert House(workers=8).identity() == House().identity()
    assert House(rooms=(1,)).identity() != House().identity()


def test_equal_values_have_equal_digests_whatever_their_order() -> None:
    assert digest({"a": 1, "b": [1.5, None]}) == digest({"b": [1.5, None], "a": 1})
    assert canonical_json({"b": 1, "a": "ü"}) == '{"a":"ü","b":1}'


def test_settings_change_what_they_name_and_nothing_else() -> None:
    changed = merge(House(), parse_settings(["inner.lives=3", "rooms=[5]", 'pet={"kind": "dog"}']))
    assert changed == House(inner=Cat(lives=3), rooms=(5,), pet=Dog())


def test_a_setting_that_does_not_fit_is_one_line_that_names_it() -> None:
    for line, words in [
        ("inner.lives=0", "inner.lives = 0"),
        ("inner.tails=1", "no setting 'inner.tails'"),
        ("inner.lives=abc", "inner.lives = 'abc'"),
        ("inner", "expected name=value"),
    ]:
        with pytest.raises(ConfigError, match=words) as caught:
            merge(House(), parse_settings([line]))
        assert "\n" not in str(caught.value)


def test_overrides_keep_limits_and_descriptions_and_need_nothing() -> None:
    overrides = overrides_of(House)
    assert merge(House(workers=3), overrides()) == House(workers=3)
    schema = overrides.model_json_schema()
    lives = schema["$defs"]["CatOverrides"]["properties"]["lives"]
    assert lives["description"] == "how many are left"
    assert lives["anyOf"][0] == {"type": "integer", "minimum": 1}


def test_a_changed_copy_is_checked_again() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        Cat().evolve(lives=0)


class Places(Config):
    table: str = ""
    others: tuple[str | None, ...] = ()
    hosts: dict[str, str] = {}
    by_name: dict[str, tuple[str, ...]] = {}
    said: dict[str, Any] = {}
    prompt: str = ""


URL = "https://me:word@host/a"


@pytest.mark.parametrize(
    ("settings", "is_taken"),
    [
        ({"table": URL}, False),
        ({"table": f" {URL}"}, False),
        ({"table": f"s3://bucket/a,{URL}"}, False),
        ({"others": [None, URL]}, False),
        ({"hosts": {"images": URL}}, False),
        ({"by_name": {"videos": ["a", URL]}}, False),
        ({"table": "s3://bucket/a@b"}, True),
        ({"table": "https://***@host/a"}, True),
        ({"prompt": f"a cat looks at {URL}"}, True),
        ({"said": {"it": URL}}, True),
    ],
)
def test_a_url_with_credentials_is_refused_wherever_a_setting_has_one(settings: dict[str, Any], is_taken: bool) -> None:
    """By the model and by the schema of forms alike; prose and records of what was said may quote one."""
    schema = Places.model_json_schema()
    assert jsonschema.Draft202012Validator(schema).is_valid(settings) == is_taken
    if is_taken:
        assert Places.model_validate(settings)
        return
    with pytest.raises(ValueError, match="a user or a password") as refused:
        Places.model_validate(settings)
    assert "word@" not in str(refused.value)
