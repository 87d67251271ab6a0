"""What a user can mend is one line and the status 1; a defect keeps its traceback."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model.cli import main as cli
from model.cli.errors import explain


def command_that_raises(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    module = types.ModuleType("model.cli.broken")

    def main(argv):
        raise error

    module.main = main
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(cli, "_COMMANDS", (("broken", module.__name__, "raises"),))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("group 3\n  is empty"), "group 3 is empty"),
        (FileNotFoundError("no image at x.png"), "no image at x.png"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 ..."), "smaller micro_batch_size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "smaller micro_batch_size"),
        (MemoryError(), "out of memory (MemoryError)"),
        (OSError(12, "Cannot allocate memory"), "out of memory ([Errno 12]"),
        (RuntimeError("std::bad_alloc"), "out of memory (std::bad_alloc)"),
        (KeyError("weight_map"), "there is no entry 'weight_map' where one is expected"),
    ],
)
def test_what_a_user_can_mend_is_one_line(monkeypatch, capsys, error, text):
    command_that_raises(monkeypatch, error)
    assert cli.main(["broken"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("igva broken: ") and line.endswith("(--debug shows where)")
    assert text in line


def test_debug_shows_where(monkeypatch, capsys):
    command_that_raises(monkeypatch, ValueError("group 3 is empty"))
    assert cli.main(["broken", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interruption_has_a_status_of_its_own(monkeypatch, capsys):
    command_that_raises(monkeypatch, KeyboardInterrupt())
    assert cli.main(["broken"]) == 130
    assert capsys.readouterr().err == "igva: interrupted\n"


@pytest.mark.parametrize("error", [AssertionError("x"), AttributeError("y"), ZeroDivisionError()])
def test_a_defect_keeps_its_traceback(monkeypatch, error):
    command_that_raises(monkeypatch, error)
    with pytest.raises(type(error)):
        cli.main(["broken"])


def test_a_damaged_file_of_weights_is_named_as_that(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(SafetensorError) as caught:
        load_file(path)
    assert "a file of weights is damaged or incomplete" in explain(caught.value)
