"""The documentation of recipes, from its one source: the text under each field of :mod:`model.training.recipe`.

``igva train --help`` prints it by its own parser; here it becomes the comments of a YAML file and the page docs/recipes.md.
"""

from __future__ import annotations

import dataclasses
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from model.training.recipe import DataSource, EvaluationSettings, LoraSettings, ModelSource, TrainRecipe, load_recipe

#: The parts of a recipe, in the order of the page: key and class.
_SECTIONS = (
    ("", TrainRecipe),
    ("model", ModelSource),
    ("data", DataSource),
    ("lora", LoraSettings),
    ("evaluation", EvaluationSettings),
)
_COMMENT_WIDTH = 110

_PAGE_HEAD = """# Recipes

<!-- Written by `igva recipe --page > docs/recipes.md` from the fields' own documentation; edit model/training/recipe.py. -->

A recipe is a YAML file with the fields below. `igva train RECIPE` runs it, `igva train RECIPE --dry_run` checks it without
loading a weight, `igva preview RECIPE` shows which tokens it trains on, and every field is a flag that overrides the file:

    igva train igva-7b-stage2 --data.path=data.json --learning_rate=1e-5 --data.on_error='{missing_image: skip}'

RECIPE is a file, or the name of a recipe that is shipped. `igva recipe NAME` prints one with all fields, their values and this
documentation as comments: a start for your own.
"""


@dataclass(frozen=True)
class RecipeField:
    """One field: its flag (``data.path``), type and default in words, and documentation."""

    key: str
    type: str
    default: str
    text: str


def recipe_fields() -> list[RecipeField]:
    """All fields in the order of the classes, those of the parts behind those of the recipe."""
    return [entry for section, cls in _SECTIONS for entry in _fields_of(section, cls)]


def annotated_yaml(recipe: TrainRecipe) -> str:
    """A recipe as YAML with every field, each under its documentation; :func:`load_recipe` reads it back."""
    texts = {entry.key: entry for entry in recipe_fields()}
    return "\n".join(_lines("", recipe.to_dict(), texts)) + "\n"


def reference_page(recipes: Mapping[str, Path]) -> str:
    """The page docs/recipes.md.

    Args:
        recipes: the recipes that are shipped, by name.
    """
    lines = [
        _PAGE_HEAD,
        "## Recipes that are shipped\n",
        "| name | stage | samples a step | learning rate | |",
        "|---|---|---|---|---|",
    ]
    for name, path in recipes.items():
        recipe = load_recipe(path)
        lines.append(f"| `{name}` | {recipe.stage} | {recipe.batch_size} | {recipe.learning_rate:g} | {summary(path)} |")
    for section, cls in _SECTIONS:
        doc = " ".join((cls.__doc__ or "").split())
        lines += [
            "",
            f"## {f'`{section}`: ' if section else ''}{doc.rstrip('.')}",
            "",
            "| field | default | |",
            "|---|---|---|",
        ]
        for entry in _fields_of(section, cls):
            text = entry.text.replace("``", "`").replace("|", "\\|")
            kind = entry.type.replace("|", "\\|")
            lines.append(f"| `{entry.key}`<br>{kind} | {entry.default} | {text} |")
    return "\n".join(lines) + "\n"


def summary(path: Path) -> str:
    """The first line of a recipe file, a comment that says what it is."""
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()


def _fields_of(section: str, cls: type) -> Iterator[RecipeField]:
    from docstring_parser import parse_from_object

    texts = {param.arg_name: param.description or "" for param in parse_from_object(cls).params}
    types_of = get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(types_of[item.name]):
            continue  # a section of its own
        key = f"{section}.{item.name}" if section else item.name
        yield RecipeField(key, _type_text(types_of[item.name]), _default_text(item), " ".join(texts[item.name].split()))


def _type_text(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " | ".join(str(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(_type_text(part) for part in arguments if part is not type(None))
    if origin is list:
        return f"list of {_type_text(arguments[0])}"
    if origin is dict:
        # The kinds of a mapping stand in its text.
        return "mapping"
    return {str: "text", int: "integer", float: "number", bool: "true | false"}.get(kind, getattr(kind, "__name__", str(kind)))


def _default_text(item: dataclasses.Field) -> str:
    if item.default is not dataclasses.MISSING:
        return "unset" if item.default is None else f"`{_flow(item.default)}`"
    if item.default_factory is not dataclasses.MISSING:
        return f"`{_flow(item.default_factory())}`"
    return "required"


def _flow(value: Any) -> str:
    """A value as it stands behind a key."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).strip()
    return text.removesuffix("...").strip()


def _lines(section: str, values: Mapping[str, Any], texts: Mapping[str, RecipeField]) -> Iterator[str]:
    indent = "  " if section else ""
    sections = {name for name, _ in _SECTIONS}
    for name, value in values.items():
        key = f"{section}.{name}" if section else name
        if not section and name in sections:
            yield f"\n{name}:"
            yield from _lines(name, value, texts)
            yield ""
            continue
        entry = texts[key]
        default = entry.default if entry.default == "required" else f"default: {entry.default.strip('`')}"
        comment = f"{entry.text.replace('``', '`')} ({entry.type}; {default})"
        for line in textwrap.wrap(comment, _COMMENT_WIDTH, break_long_words=False, break_on_hyphens=False):
            yield f"{indent}# {line}"
        yield f"{indent}{name}: {_flow(value)}"
