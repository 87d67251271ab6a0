"""Samples to tensors and batches: labels are the assistant's tokens, all of them and nothing else."""

from __future__ import annotations

import shutil

import pytest
import torch

from model.chat_templates import CHAT_TEMPLATES
from model.data.collator import ImageTextCollator
from model.data.dataset import LlavaDataset
from model.data.llava_json import samples_from_records
from model.instruction import embed_instructions
from model.loss import IGNORE_INDEX


@pytest.fixture
def make_dataset(model_and_processor, records, picture_folder):
    def make(**options):
        samples = samples_from_records(options.pop("records", records), picture_folder)
        processor = model_and_processor[1]
        policy = options.pop("instruction_policy", "mean_of_turns")

        def embed(conversations):
            return embed_instructions(conversations, processor.encode_instructions, policy)

        return LlavaDataset(samples, processor, embed=embed, **options)

    return make


def index_of(dataset, sample_id):
    return [sample.id for sample in dataset.samples].index(sample_id)


@pytest.mark.parametrize(
    ("template", "learned"),
    [("vicuna_v1", "green</s>no</s>"), ("chatml", "green<|im_end|>no<|im_end|>"), ("plain", "green\nno\n")],
)
def test_labels_are_exactly_what_the_assistant_says(template, learned, make_dataset, model_and_processor):
    dataset = make_dataset(chat_template=CHAT_TEMPLATES[template])
    item = dataset[index_of(dataset, "turns")]
    has_label = item["labels"] != IGNORE_INDEX
    assert model_and_processor[1].tokenizer.decode(item["labels"][has_label]) == learned
    assert torch.equal(item["labels"][has_label], item["input_ids"][has_label])


def test_an_answer_of_the_same_words_as_the_question_is_told_apart(make_dataset, make_record, model_and_processor):
    # Masks by searching, or by tokenizing the parts again, fail here.
    record = make_record("echo", None, "green", "green", "green green", "green")
    dataset = make_dataset(records=[record], chat_template=CHAT_TEMPLATES["chatml"])
    item = dataset[0]
    text = model_and_processor[1].tokenizer.decode(item["input_ids"])
    learned = "".join(chr(token) if token != IGNORE_INDEX else "." for token in _bytes(item["labels"], model_and_processor[1]))
    assert len(learned) == len(_bytes(item["input_ids"], model_and_processor[1]))
    assert text.count("green") == 5
    assert learned.count("green") == 2
    assert learned.endswith("green#.")


def _bytes(ids, processor):
    """One character a token of the byte tokenizer: special tokens as #, ignored ones as they are."""
    special = set(processor.tokenizer.all_special_ids)
    return [
        IGNORE_INDEX if token == IGNORE_INDEX else ord("#") if token in special else ord(processor.tokenizer.decode([token]))
        for token in ids.tolist()
    ]


def test_each_image_has_its_placeholders_pixels_and_embedding(make_dataset, model_and_processor):
    model, processor = model_and_processor
    dataset = make_dataset()
    item = dataset[index_of(dataset, "two")]
    assert int((item["input_ids"] == processor.image_token_id).sum()) == 2 * model.config.num_image_tokens
    assert item["pixel_values"].shape == (2, 3, 28, 28)
    assert not torch.equal(item["pixel_values"][0], item["pixel_values"][1])
    assert torch.equal(item["instruction_embeds"], processor.encode_instructions(["Which colours?"]))


def test_a_text_only_sample_has_no_image_inputs(make_dataset):
    dataset = make_dataset()
    assert set(dataset[index_of(dataset, "text-a")]) == {"input_ids", "labels"}


@pytest.mark.parametrize(
    ("policy", "texts"),
    [("first_turn", ["Which colour?"]), ("last_turn", ["Is it dark?"]), ("mean_of_turns", ["Which colour?", "Is it dark?"])],
)
def test_the_policy_decides_which_turns_are_the_instruction(policy, texts, make_dataset, model_and_processor):
    dataset = make_dataset(instruction_policy=policy)
    embeds = dataset[index_of(dataset, "turns")]["instruction_embeds"]
    expected = model_and_processor[1].encode_instructions(texts).mean(0, keepdim=True)
    torch.testing.assert_close(embeds, expected)


def test_aspect_ratios_give_different_pixels(make_dataset):
    padded, stretched = (make_dataset(aspect_ratio=ratio)[0]["pixel_values"] for ratio in ("pad", "stretch"))
    # The padding is the mean colour, which normalisation takes to nearly zero; stretched, every row is the picture.
    assert padded[0, :, 0].abs().max() < 0.02
    assert stretched[0, 0, 0].abs().min() > 0.5


def test_a_long_sample_is_cut_at_its_end(make_dataset, make_record):
    record = make_record("long", None, "Say a.", "a" * 300)
    item = make_dataset(records=[record], max_length=250)[0]
    assert len(item["input_ids"]) == len(item["labels"]) == 250
    assert item["labels"][-1] != IGNORE_INDEX


@pytest.fixture
def broken_picture(picture_folder):
    """``images/broken.png``, for one test: others go through the whole folder."""
    path = picture_folder / "images" / "broken.png"
    path.write_bytes(b"\x89PNG broken")
    yield path
    path.unlink()


@pytest.mark.parametrize(
    ("turns", "image", "options", "message"),
    [
        (("<image>\nWhich colour?", "red"), "images/red.png", {"max_length": 20}, "no token to learn"),
        (
            ("Hello. " * 40 + "<image><image>", "red"),
            ["images/red.png", "images/blue.png"],
            {"max_length": 200},
            "would cut an image",
        ),
        (("Hello.", ""), None, {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}, "no {% generation %}"),
        (("<image>\nWhich?", "red"), "images/broken.png", {}, "cannot read the image"),
        (
            ("<image>\nWhich?", "red"),
            "images/red.png",
            {"chat_template": "{% generation %}{{ messages[1].content }}{% endgeneration %}"},
            "0 image tokens in the text, but 1 images need 4",
        ),
    ],
)
def test_what_cannot_be_learned_is_refused_with_the_id(
    turns, image, options, message, make_dataset, make_record, broken_picture
):
    dataset = make_dataset(records=[make_record("sample-9", image, *turns)], **options)
    with pytest.raises(ValueError, match=r"sample sample-9: ") as error:
        dataset[0]
    assert message in str(error.value)


def test_an_image_that_vanished_is_reported_with_the_id(make_dataset, make_record, picture_folder):
    vanishing = picture_folder / "images" / "vanishing.png"
    shutil.copy(picture_folder / "images" / "red.png", vanishing)
    dataset = make_dataset(records=[make_record("sample-9", "images/vanishing.png", "<image>\nWhich?", "red")])
    vanishing.unlink()
    with pytest.raises(ValueError, match=r"sample sample-9: no image at"):
        dataset[0]


def test_a_batch_pads_on_the_right_and_names_the_owner_of_each_image(make_dataset, model_and_processor):
    dataset = make_dataset()
    items = [dataset[index_of(dataset, name)] for name in ("text-a", "two", "turns")]
    pad = model_and_processor[1].tokenizer.pad_token_id
    batch = ImageTextCollator(pad)(items)
    lengths = [len(item["input_ids"]) for item in items]
    assert batch["input_ids"].shape == batch["labels"].shape == (3, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert (batch["input_ids"][0, lengths[0] :] == pad).all()
    assert (batch["labels"][0, lengths[0] :] == IGNORE_INDEX).all()
    assert batch["image_to_sample"].tolist() == [1, 1, 2]
    assert torch.equal(batch["pixel_values"][2:], items[2]["pixel_values"])
    assert torch.equal(batch["instruction_embeds"], torch.cat([items[1]["instruction_embeds"], items[2]["instruction_embeds"]]))
    assert batch["image_to_sentence"].tolist() == [0, 0, 1]


def test_a_batch_without_images_has_no_image_inputs(make_dataset):
    dataset = make_dataset()
    batch = ImageTextCollator(0)([dataset[index_of(dataset, "text-a")], dataset[index_of(dataset, "text-b")]])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_samples_with_and_without_embeddings_are_not_mixed_up(make_dataset):
    dataset = make_dataset()
    dataset.embed = None
    batch = ImageTextCollator(0)([dataset[0], dataset[1]])
    assert "instruction_embeds" not in batch
    assert batch["pixel_values"].shape == (2, 3, 28, 28)
