# SPDX-License-Identifier: Apache-2.0
"""A recipe as text: read from TOML, overridden, refused in one line, explained, written again."""

import copy
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from harprune.recipe.faults import rule_of, value_of
from harprune.recipe.schema import Recipe, Section


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a TOML file, with `section.key=value` overrides.

    Raises:
        ValueError: unreadable, a grid, an unknown key (the nearest is named) or a value out of
            range.
    """
    content = read_toml(path, f"recipe {path}")
    if is_grid(content):
        raise ValueError(f"{path} is a grid, not a recipe; `harprune compare {path}` runs it")
    return make_recipe(content, overrides, source=str(path))


def is_grid(content: Mapping[str, Any]) -> bool:
    """Whether nested values are of a grid of runs: it has keys that no recipe has."""
    return "base" in content or "methods" in content


def read_toml(path: str | Path, what: str) -> dict[str, Any]:
    """The nested values of a TOML file; ValueError, naming it as `what`, where it is none."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{what} cannot be read: {error}") from None


def make_recipe(
    content: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "recipe"
) -> Recipe:
    """A checked `Recipe` from nested values; see `read_recipe`."""
    try:
        return Recipe.model_validate(overridden(content, overrides))
    except ValidationError as error:
        raise ValueError(f"{source}: {_first_fault(error)}") from None


def overridden(content: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Nested values with `section.key=value` put in, in a copy.

    Another `method.name` takes the options of the method that stood there away.

    Raises:
        ValueError: an override has another form.
    """
    merged = copy.deepcopy(dict(content))
    for override in overrides:
        _override(merged, override)
    before, after = content.get("method"), merged.get("method")
    if isinstance(before, Mapping) and isinstance(after, Mapping) and _renamed(before, after):
        said = {text.partition("=")[0].strip() for text in overrides}
        own = [key for key in after if key not in before or said & {"method", f"method.{key}"}]
        merged["method"] = {key: after[key] for key in own}
    return merged


def _renamed(before: Mapping, after: Mapping) -> bool:
    return "name" in before and before["name"] != after.get("name")


def settings(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> list[str]:
    """`section.key` -> value as overrides, then those given; None, nothing said, is left out.

    Raises:
        ValueError: an override that says what `values` say.
    """
    said = {key: value for key, value in values.items() if value is not None}
    for text in overrides:
        key = text.partition("=")[0].strip()
        for other in said:
            if other == key or other.startswith(f"{key}."):
                raise ValueError(
                    f"--set {text!r}: the command says {other} = {_toml(said[other])} already; "
                    "give one of the two"
                )
    return [*(f"{key}={_toml(value)}" for key, value in said.items()), *overrides]


def completed(held: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved recipe of an earlier version with the defaults of keys that came since."""
    try:
        return Recipe.model_validate(held).model_dump(mode="json")
    except ValidationError:
        return dict(held)


def describe(
    section: type[Section] = Recipe, prefix: str = "", *, notes: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    """The documented fields with their defaults, as the lines of a TOML file.

    `notes` adds comments to sections, by their names.
    """
    nested = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            nested.append((name, kind))
            continue
        value = field.get_default()
        choices = f" One of: {', '.join(named)}." if (named := _choices(kind)) else ""
        yield f"# {' '.join((field.description or '').split())}{choices}"
        yield f"# {name} =" if value is None else f"{name} = {_toml(value)}"
    yield from (f"# {note}" for note in notes.get(prefix.removesuffix("."), ()))
    for name, kind in nested:
        yield f"\n[{prefix}{name}]  # {(kind.__doc__ or '').splitlines()[0]}"
        yield from describe(kind, f"{prefix}{name}.", notes=notes)


def _choices(kind: Any) -> list[str]:
    """The words that a value of this type may be."""
    if get_origin(kind) is Literal:
        return list(map(str, get_args(kind)))
    return [word for part in get_args(kind) for word in _choices(part)]


def as_toml(content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Nested values as the lines of a TOML file; None, which TOML cannot say, is left out."""
    nested = {key: value for key, value in content.items() if isinstance(value, Mapping)}
    for key, value in content.items():
        if key not in nested and value is not None:
            yield f"{key} = {_toml(value)}"
    for key, value in nested.items():
        yield f"\n[{prefix}{key}]"
        yield from as_toml(value, f"{prefix}{key}.")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(_toml(v) for v in value)}]"
    # A JSON string is a TOML string.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _override(content: dict[str, Any], text: str) -> None:
    path, equals, value = text.partition("=")
    *sections, key = path.strip().split(".")
    if not equals or not all((*sections, key)):
        raise ValueError(
            f"--set {text!r} must have the form section.key=value, as --set prune.epochs=5"
        )
    target = content
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ValueError(f"--set {text!r}: {section!r} is a value, not a section")
    try:
        target[key] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        target[key] = value.strip()  # a bare word is a string


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    path = _path(fault["loc"])
    if fault["type"] == "extra_forbidden":
        return _unknown_key(path)
    name, given, rule = ".".join(path), value_of(fault), rule_of(fault)
    if fault["type"] == "model_type":
        return f"{name}{given} must be a section; write its keys under [{name}]"
    # A rule of another wing may have begun with the key and the value itself.
    rest = rule.removeprefix(f"{path[-1]}{given} ")
    return f"{name}{given} {rest}" if rest != rule else f"{name}{given}: {rule}"


def _path(location: Sequence[int | str]) -> list[str]:
    """The key at which a fault lies, without the member of a union that pydantic tried last."""
    path: list[str] = []
    section: type[Section] | None = Recipe
    for part in location:
        if section is None and isinstance(part, str):
            break
        path.append(str(part))
        section = _section_of(section, str(part)) if section else None
    return path


def _unknown_key(path: list[str]) -> str:
    section: type[Section] | None = Recipe
    for part in path[:-1]:
        section = _section_of(section, part) if section else None
    homes = [name for name in _sections() if path[-1] in _sections()[name].model_fields]
    known = list(section.model_fields) if section else []
    near = get_close_matches(path[-1], known, n=1, cutoff=0.6 if homes else 0.0)
    nearest = ".".join([*path[:-1], *near]) if near else f"{homes[0]}.{path[-1]}"
    return f"unknown key {'.'.join(path)!r}; the nearest known is {nearest!r}"


def _sections() -> dict[str, type[Section]]:
    kinds = {name: _section_of(Recipe, name) for name in Recipe.model_fields}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def _section_of(section: type[Section], key: str) -> type[Section] | None:
    """The section that `key` of `section` is, or None where it is a value or unknown."""
    if key not in section.model_fields:
        return None
    annotation = section.model_fields[key].annotation
    options = getattr(annotation, "__args__", (annotation,))
    return next((o for o in options if isinstance(o, type) and issubclass(o, Section)), None)
