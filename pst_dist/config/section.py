"""The base of all sections of a config, and the types of their values: bounded numbers, plain text, folders."""

from __future__ import annotations

import os
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from pst_dist.errors import ConfigError
from pst_dist.text.characters import hidden_character
from pst_dist.text.urls import has_scheme

Positive = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _plain(value: str) -> str:
    found = hidden_character(value)
    if found is not None:
        raise ValueError(f"contains the control character {found}")
    return value


Plain = Annotated[str, AfterValidator(_plain)]
"""Reaches scripts, URLs, headers or listings, so it is one visible line."""


def _no_url(value: str) -> str:
    if has_scheme(value):
        raise ValueError("is a URL, and would become a folder of that name; name a folder: only data_dir may be a URL")
    return value


Place = Annotated[Plain, AfterValidator(os.path.expanduser)]
"""A folder or a URL; `~/runs` is a folder of the home directory, also in quotes and in YAML."""
Folder = Annotated[Place, AfterValidator(_no_url)]
"""A folder of this machine or a file system that it has mounted."""


def types_in(annotation: Any) -> set[Any]:
    """The types that an annotation allows, without their constraints."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return types_in(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return set().union(*map(types_in, get_args(annotation)))
    return {annotation}


class Section(BaseModel):
    """Base class of all sections: frozen, refuses unknown keys, and uses the string below a field as its help text."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would read `seed: yes` as 1."""
        if isinstance(value, bool) and info.field_name is not None:
            allowed = types_in(cls.model_fields[info.field_name].annotation)
            if bool not in allowed and allowed & {int, float}:
                raise ValueError("input should be a number")
        return value

    if not TYPE_CHECKING:

        def __init__(self, /, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                first = error.errors()[0]
                place = ".".join(str(part) for part in first["loc"])
                what = first["msg"].removeprefix("Value error, ")
                if first["type"] == "extra_forbidden":
                    what, place = f"unknown key {place!r}", ""
                where = f"{place}: " if place else ""
                raise ConfigError(
                    f"{type(self).__name__}: {where}{what}", "`pst config --schema` lists all keys"
                ) from error

        # With this flag pydantic validates without calling __init__, so `model_validate` still raises pydantic's own
        # error, which `explain` needs to find the file and line.
        __init__.__pydantic_base_init__ = True

    def __setattr__(self, name: str, value: Any) -> None:
        raise ConfigError(
            f"{name} cannot be set: a config is immutable", "create a new one: load_config(config, 'key.sub=value')"
        )

    def __delattr__(self, name: str) -> None:
        raise ConfigError(f"{name} cannot be deleted: a config is immutable", "create a new one with load_config")
