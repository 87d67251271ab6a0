"""``igva doctor`` says what is there, finds what is wrong, and its exit status tells which."""

from __future__ import annotations

import json

import pytest
import torch

from igva_kernels import dispatch
from model.cli import doctor
from model.cli.main import main


def report(capsys: pytest.CaptureFixture[str]) -> dict[tuple[str, str], dict[str, str]]:
    return {(line["section"], line["name"]): line for line in json.loads(capsys.readouterr().out)}


def test_a_sound_installation_is_told_as_it_is(capsys):
    assert main(["doctor", "--json"]) == 0
    found = report(capsys)
    assert found["versions", "torch"]["found"] == torch.__version__
    assert found["kernels", "cpu"]["state"] in ("ok", "note")
    assert "runs the mix" in found["kernels", "cpu"]["found"]
    assert found["attention", "padded rows"]["found"].startswith(("sdpa", "flash", "varlen"))


def test_the_terminal_shows_every_line(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for name in ("versions", "devices", "kernels", "attention", "transformers", "runs the mix"):
        assert name in shown


def test_a_missing_package_is_an_error_and_a_missing_extra_a_note(capsys, monkeypatch):
    installed = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("rich", "flash-attn") else installed(name))
    assert main(["doctor", "--json"]) == 1
    found = report(capsys)
    assert found["versions", "rich"] == {
        "section": "versions",
        "name": "rich",
        "found": "missing: pip install 'igva-kernels[model]'",
        "state": "error",
    }
    assert found["versions", "flash-attn"]["state"] == "note"
    assert "pip install 'igva-kernels[flash]'" in found["versions", "flash-attn"]["found"]


def test_why_not_the_fast_one(capsys, monkeypatch):
    monkeypatch.setattr(dispatch.implementation("native"), "why_unavailable", lambda: "no compiler here")
    assert main(["doctor", "--json"]) == 0
    found = report(capsys)["kernels", "cpu"]
    assert found["found"].startswith("torch runs the mix (native: no compiler here); largest error")
    assert found["state"] == "note"


def test_wrong_numbers_are_an_error(capsys, monkeypatch):
    for name in ("native", "torch"):
        module = dispatch.implementation(name)
        right = module.fuse_forward

        def wrong(*arguments, right=right):
            fused, means = right(*arguments)
            return fused + 0.01, means

        monkeypatch.setattr(module, "fuse_forward", wrong)
    assert main(["doctor", "--json"]) == 1
    assert report(capsys)["kernels", "cpu"]["state"] == "error"
