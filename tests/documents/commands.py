"""Checks the commands of a page without running them: the real parsers read them, and what they name exists."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.util
import io
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from documents.pages import ROOT, Block

OTHERS = ("pip", "git", "cd", "wget", "curl", "unzip", "hf", "echo", "ssh", "apt-get", "lmms-eval")
"""Programs that a page may name beside those that are checked here; what follows them is not looked at."""

LAUNCHERS = ("torchrun", "accelerate", "deepspeed", "srun", "compute-sanitizer")
"""Programs that start another one: ``-m model``, ``--module model`` or ``python`` among their words, which is checked."""

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = frozenset(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))
VARIABLES = frozenset(re.findall(r"^([A-Z_]+) *[?:]?=", MAKEFILE, re.MULTILINE))


def lines_of(block: Block) -> list[tuple[int, str]]:
    """The commands of a block with the number of their line; a backslash at the end goes on, a prompt is left out."""
    found: list[tuple[int, str]] = []
    goes_on = False
    for number, line in enumerate(block.text.splitlines(), start=block.line):
        text = line.strip().removeprefix("$ ")
        if goes_on:
            found[-1] = (found[-1][0], found[-1][1].removesuffix("\\") + text)
        elif text and not text.startswith("#"):
            found.append((number, text))
        goes_on = text.endswith("\\")
    return found


def check(command: str) -> None:
    """Check one command line.

    Raises:
        AssertionError: what is wrong with it.
    """
    words = shlex.split(command, comments=True)
    for operator in ("|", "&&", ";"):
        if operator in words:
            at = words.index(operator)
            check(shlex.join(words[:at]))
            check(shlex.join(words[at + 1 :]))
            return
    if any(word.startswith(">") for word in words):
        words = words[: next(at for at, word in enumerate(words) if word.startswith(">"))]
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words:
        _check_program(words[0], words[1:])


def _check_program(program: str, words: list[str]) -> None:
    if program == "igva":
        check_igva(words)
    elif program == "make":
        check_make(words)
    elif program == "pip":
        check_pip(words)
    elif program in ("python", "python3", ".venv/bin/python"):
        check_python(words)
    elif program in (".venv/bin/pytest", "pytest"):
        check_pytest(words)
    elif program in LAUNCHERS:
        check_launched(program, words)
    else:
        known = ", ".join(("igva", "make", "python", "pytest", *LAUNCHERS, *OTHERS))
        assert program in OTHERS, f"{program!r} is no command that pages may name ({known}); output belongs in a text fence"


def check_igva(words: list[str]) -> None:
    """``igva COMMAND ...``: the command's own parser takes it, and so does the recipe where there is one."""
    from model.cli.main import _COMMANDS

    modules = {name: module for name, module, _ in _COMMANDS}
    words = [word for word in words if word != "--debug"]
    assert words and (words[0] in modules or words[0] in ("--help", "-h")), f"igva has no command {' '.join(words[:1])!r}"
    if "--help" in words or "-h" in words:
        return
    module = importlib.import_module(modules[words[0]])
    arguments, rest = parsed(module._parser(), words[1:])
    source = getattr(arguments, "recipe", None) or getattr(arguments, "source", None)
    if words[0] in ("train", "preview", "plan", "recipe") and source is not None:
        _check_recipe(source, rest)
    else:
        assert not rest, f"igva {words[0]} does not know {' '.join(rest)}"


def _check_recipe(source: str, overrides: list[str]) -> None:
    """The recipe is shipped or, a file of the user's, stands for a shipped one; it takes what overrides it."""
    from model.cli.train import find_recipe, shipped_recipes
    from model.training.recipe import load_recipe

    known = source in shipped_recipes() or (ROOT / source).is_file()
    assert known or Path(source).suffix in (".yaml", ".yml"), f"there is no recipe {source!r}"
    path = find_recipe(str(ROOT / source) if (ROOT / source).is_file() else source if known else "igva-7b-stage2")
    with _told(f"recipe {source} {' '.join(overrides)}"):
        load_recipe(path, overrides)


def check_python(words: list[str]) -> None:
    """``python -m MODULE ...``, ``python -c CODE`` or ``python FILE``."""
    if words[:1] == ["-c"]:
        ast.parse(words[1])
    elif words[:1] != ["-m"]:
        assert words and (ROOT / words[0]).is_file(), f"there is no program {' '.join(words[:1])!r}"
    elif words[1] == "model":
        check_igva(words[2:])
    elif words[1] == "pytest":
        check_pytest(words[2:])
    elif words[1] in ("venv", "pip"):
        return
    else:
        parser_of = _PARSERS.get(words[1])
        assert parser_of, f"python -m {words[1]} is none of {', '.join(('model', 'pytest', *_PARSERS))}"
        _, rest = parsed(parser_of(), words[2:])
        assert not rest, f"python -m {words[1]} does not know {' '.join(rest)}"


def _recorded_parser(module: str) -> argparse.ArgumentParser:
    """The parser of a command that builds it in ``main``: what its ``parse_args`` is called on."""

    class Recorded(Exception):
        pass

    def record(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise Recorded(parser)

    original = argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = record  # type: ignore[method-assign,assignment]
    try:
        importlib.import_module(module).main([])
    except Recorded as recorded:
        return recorded.args[0]
    finally:
        argparse.ArgumentParser.parse_args = original  # type: ignore[method-assign]
    raise AssertionError(f"{module} reads no command line")


_PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "benchmarks": lambda: importlib.import_module("benchmarks.__main__").parser(),
    "benchmarks.report": lambda: _recorded_parser("benchmarks.report"),
    "benchmarks.predict": lambda: _recorded_parser("benchmarks.predict"),
    "benchmarks.pages": lambda: _recorded_parser("benchmarks.pages"),
    "benchmarks.one_launch": lambda: _recorded_parser("benchmarks.one_launch"),
    "igva_kernels.picture": lambda: importlib.import_module("igva_kernels.picture")._parser(),
}


def check_make(words: Sequence[str]) -> None:
    """Targets and variables of the Makefile."""
    for word in words:
        name, assigns, _ = word.partition("=")
        if assigns:
            assert name in VARIABLES, f"the Makefile has no variable {name}"
        elif not word.startswith("-"):
            assert word in TARGETS, f"the Makefile has no target {word}"


def check_pip(words: Sequence[str]) -> None:
    """Extras of this package that a command installs."""
    for word in words:
        for extras in re.findall(r"^(?:igva-kernels|\.)\[([\w,-]+)\]", word):
            assert set(extras.split(",")) <= extras_of_the_package(), f"setup.py has no extra {extras}"


def extras_of_the_package() -> set[str]:
    """The keys of ``extras_require`` in setup.py."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    found = [node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "extras_require"]
    assert len(found) == 1 and isinstance(found[0], ast.Dict)
    return {str(ast.literal_eval(key)) for key in found[0].keys if key is not None}


def check_pytest(words: Sequence[str]) -> None:
    """Folders and files that are named exist."""
    for word, before in zip(words, ("", *words), strict=False):
        if not word.startswith("-") and before not in ("-k", "-m", "-n"):
            assert (ROOT / word.partition("::")[0]).exists(), f"there is nothing to test at {word}"


def check_launched(program: str, words: list[str]) -> None:
    """What a launcher starts."""
    for at, word in enumerate(words):
        if word in ("-m", "--module") and words[at + 1 : at + 2] == ["model"]:
            return check_igva(words[at + 2 :])
        if word in ("python", *LAUNCHERS):
            return _check_program(word, words[at + 1 :])
    raise AssertionError(f"{program} starts nothing that is known here")


def parsed(parser: argparse.ArgumentParser, words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What a parser makes of the words, and the words that it does not know.

    Raises:
        AssertionError: it refuses them; with its message.
    """
    with _told(f"{parser.prog} {' '.join(words)}"):
        return parser.parse_known_args(words)


@contextlib.contextmanager
def _told(what: str):
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            yield
    except (SystemExit, ValueError, TypeError, KeyError) as error:
        raise AssertionError(f"{what}: {told.getvalue()}{error}") from error
