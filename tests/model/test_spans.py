"""Labels come from the template's spans, and what does not fit is refused instead of trained on."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from model.chat_templates import CHAT_TEMPLATES
from model.spans import tokenize_with_spans

TURNS = [("user", "Which colour?"), ("assistant", "green"), ("user", "green?"), ("assistant", "no ⚡ green")]


def conversation(turns=TURNS):
    return [{"role": role, "content": text} for role, text in turns]


def template(user="{{ m.content + ' ' }}", assistant="{% generation %}{{ m.content }}{% endgeneration %}{{ ' ' }}"):
    return "{% for m in messages %}{% if m.role == 'user' %}" + user + "{% else %}" + assistant + "{% endif %}{% endfor %}"


@pytest.fixture
def byte_tokenizer(tiny_tokenizer_folder):
    return AutoTokenizer.from_pretrained(tiny_tokenizer_folder)


@pytest.fixture
def merging_tokenizer():
    """A byte-level tokenizer that knows "?gr", a token across a question's end and an answer's beginning."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "gr", "?gr"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("g", "r"), ("?", "gr")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")


@pytest.fixture
def sentencepiece_tokenizer():
    """As Llama's: the blank before a word belongs to its token."""
    words = ["▁", "▁green", "▁no", "▁ASSISTANT:", "▁USER:", "green", "no", "?", "▁⚡", "▁Which", "▁colour"]
    letters = sorted({letter for word in words for letter in word})
    pieces = list(dict.fromkeys(["<unk>", *letters, *words]))
    backend = Tokenizer(models.Unigram([(piece, -float(len(pieces) - len(piece))) for piece in pieces], unk_id=0))
    backend.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Replace("▁", " ")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def learned(tokenizer, encoded):
    return [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]


@pytest.mark.parametrize("name", sorted(CHAT_TEMPLATES))
def test_masks_are_those_of_transformers(name, byte_tokenizer):
    encoded = tokenize_with_spans(byte_tokenizer, conversation(), CHAT_TEMPLATES[name])
    theirs = byte_tokenizer.apply_chat_template(
        conversation(), chat_template=CHAT_TEMPLATES[name], return_dict=True, return_assistant_tokens_mask=True
    )
    assert encoded == {key: list(theirs[key]) for key in ("input_ids", "attention_mask", "assistant_masks")}


def test_a_word_takes_the_blank_before_it_along(sentencepiece_tokenizer):
    encoded = tokenize_with_spans(sentencepiece_tokenizer, conversation(), CHAT_TEMPLATES["vicuna_v1"])
    tokens = sentencepiece_tokenizer.convert_ids_to_tokens(learned(sentencepiece_tokenizer, encoded))
    assert tokens[:2] == ["▁green", "</s>"] and tokens[2] == "▁no" and tokens[-1] == "</s>"
    assert "▁ASSISTANT:" not in tokens


def test_a_token_across_prompt_and_answer_is_refused(merging_tokenizer):
    with pytest.raises(ValueError, match=r"the token '\?gr' lies across the border"):
        tokenize_with_spans(merging_tokenizer, conversation(), template(user="{{ m.content }}"))
    encoded = tokenize_with_spans(merging_tokenizer, conversation(), template())
    assert merging_tokenizer.decode(learned(merging_tokenizer, encoded)) == "greenno ⚡ green"


@pytest.mark.parametrize(
    ("assistant", "message"),
    [
        ("{{ m.content }}", r"marks no \{% generation %\} span"),
        ("{% generation %}{{ m.content[:2] }}{% endgeneration %}", "does not hold what the assistant says, 'green'"),
        ("{% generation %}{{ m.role }}{% endgeneration %}{{ m.content }}", "does not hold what the assistant says"),
        ("{% for c in [1, 2] %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "marks 4 .* has 2 turns"),
        (
            "{% if loop.first or loop.last %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}",
            "marks 1 .* has 2 turns",
        ),
    ],
)
def test_spans_that_are_not_the_answers_are_refused(assistant, message, byte_tokenizer):
    with pytest.raises(ValueError, match=message):
        tokenize_with_spans(byte_tokenizer, conversation(), template(assistant=assistant))


def test_a_template_that_marks_the_user_too_is_refused(byte_tokenizer):
    marked = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    with pytest.raises(ValueError, match=r"marks 4 .* has 2 turns"):
        tokenize_with_spans(byte_tokenizer, conversation(), marked)


def test_a_template_may_strip_and_add_an_end_mark(byte_tokenizer):
    stripping = template(assistant="{% generation %}{{ m.content | trim + eos_token }}{% endgeneration %}")
    encoded = tokenize_with_spans(byte_tokenizer, conversation([("user", "a"), ("assistant", "  b \n")]), stripping)
    assert byte_tokenizer.decode(learned(byte_tokenizer, encoded)) == "b</s>"
