"""``igva web``: what is wrong is told before anything is loaded; and it serves."""

from __future__ import annotations

import importlib.util

import pytest

from model.cli.main import main


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else find_spec(name, *rest))
    assert main(["web", "nowhere"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'igva-kernels[web]'" in line


@pytest.mark.parametrize("option", ["--queue=0", "--max_new_tokens=0", "--port=often"])
def test_options_that_cannot_be_are_refused(option, capsys):
    assert main(["web", "nowhere", option]) == 2
    assert option.partition("=")[0] in capsys.readouterr().err


def test_it_serves_the_checkpoint_on_this_machine_alone(talk, monkeypatch, capsys):
    pytest.importorskip("gradio", reason="needs gradio: make test-web")
    import gradio

    from model.cli import checkpoint
    from model.web import page

    launched = {}

    def block_thread(self):
        launched.update(server=self.server_name, share=self.share, waiting=self._queue.max_size)
        self.close(verbose=False)

    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda name, **_: checkpoint.Checkpoint(talk.model, talk.processor))
    monkeypatch.setattr(gradio.Blocks, "block_thread", block_thread)
    assert main(["web", "runs/mine", "--queue=3"]) == 0
    assert launched == {"server": "127.0.0.1", "share": False, "waiting": 3}
    assert "runs/mine answers at http://127.0.0.1:" in capsys.readouterr().out
    assert page.launch_options()["run_history"] is False
