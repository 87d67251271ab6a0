"""The processor: placeholders, templates and their assistant spans, instructions, saving and loading."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from model import IgvaLlavaProcessor, build_model, build_processor
from model.chat_templates import CHAT_TEMPLATES
from model.instruction import SentenceEncoder
from model.processing import _encoder_folder

FUSION = {"num_groups": 2, "text_dim": 16, "hidden_dim": 32, "num_blocks": 1}


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def conversation(*turns: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if index % 2 else "user", "content": turn} for index, turn in enumerate(turns)]


def learnt(processor: IgvaLlavaProcessor, encoded: dict[str, list[int]]) -> str:
    ids = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    return processor.tokenizer.decode(ids)


# ---- pictures and text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("image_size", "token_pooling", "tokens"), [(28, None, 4), (56, None, 16), (56, 2, 4)])
def test_image_token_is_expanded_to_the_tokens_of_the_picture(make_config, make_processor, image_size, token_pooling, tokens):
    config = make_config(image_size=image_size, token_pooling=token_pooling)
    processor = make_processor(config)
    inputs = processor(images=picture(), text="<image>\nWhat?", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, image_size, image_size)
    assert (inputs["input_ids"] == config.image_token_id).sum() == tokens == config.num_image_tokens
    assert processor.num_image_tokens() == tokens


def test_what_the_processor_makes_runs_through_the_model(part_folders, tiny_encoder):
    model = build_model(part_folders["clip"], part_folders["llama"], fusion=FUSION)
    processor = build_processor(part_folders["clip"], part_folders["llama"], model.config, sentence_encoder=tiny_encoder)
    inputs = processor(
        images=[picture(seed=1), picture(seed=2), picture(seed=3)],
        text=["<image>What?", "<image> or <image>, which one?"],
        instruction=["What?", "Which one?", "Which one?"],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    expected = tiny_encoder.encode(["What?", "Which one?", "Which one?"])
    assert torch.equal(inputs["instruction_embeds"], expected)
    out = model(**inputs)
    assert out.fusion_weights.shape == (3, 2)
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 2


def test_pictures_and_placeholders_must_match(make_processor):
    processor = make_processor()
    with pytest.raises(ValueError, match="holds 2 <image>, but there are 1 images"):
        processor(images=picture(), text="<image> <image>")
    with pytest.raises(ValueError, match="holds 1 <image>, but there are 0 images"):
        processor(text=["<image>", "no picture"])


def test_no_videos(make_processor):
    with pytest.raises(ValueError, match="no videos"):
        make_processor()(text="What?", videos=[0])


def test_the_image_token_must_be_one_token(make_processor, tiny_tokenizer_folder):
    bare = AutoTokenizer.from_pretrained(tiny_tokenizer_folder)
    with pytest.raises(ValueError, match="splits '<image>' into 7 tokens"):
        IgvaLlavaProcessor(make_processor().image_processor, bare)


def test_build_refuses_another_tokenizer_than_the_models(part_folders, make_config):
    with pytest.raises(ValueError, match=r"<image> has the id 261 .* config says 7"):
        build_processor(part_folders["clip"], part_folders["llama"], make_config(image_token_id=7))


@pytest.mark.parametrize(("tower", "mean"), [("clip", 0.4815), ("dinov2", 0.485)])
def test_pictures_are_normalised_as_the_tower_was_trained(make_processor, tower, mean):
    assert make_processor(tower=tower).image_processor.image_mean[0] == pytest.approx(mean, abs=1e-4)


def test_a_towers_own_image_processor_is_kept_at_the_models_size(part_folders, make_config, tmp_path):
    values = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.1] * 3, "size": {"height": 224, "width": 224}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values), encoding="utf-8")
    processor = build_processor(tmp_path, part_folders["llama"], make_config())
    assert processor.image_processor.image_mean[0] == 0.1
    assert processor(images=picture(), text="<image>", return_tensors="pt")["pixel_values"].shape == (1, 3, 28, 28)


# ---- templates ----------------------------------------------------------------------------------------------------------


def test_chatml_text_and_learnt_tokens(make_processor):
    processor = make_processor()
    messages = conversation("<image>\nWhich?", "A cat.", "Sure?", "Yes.")
    text = "<|im_start|>user\n{}\nWhich?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n" + (
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    assert processor.apply_chat_template(messages) == text.format("<image>")
    encoded = processor.tokenize_conversation(messages)
    assert processor.tokenizer.decode(encoded["input_ids"]) == text.format("<image>" * 4)
    assert learnt(processor, encoded) == "A cat.<|im_end|>Yes.<|im_end|>"


def test_vicuna_text_and_learnt_tokens(make_processor):
    processor = make_processor(chat_template="vicuna_v1")
    messages = [{"role": "system", "content": "Be brief."}, *conversation("<image>\nWhich?", "A cat.", "Sure?", "Yes.")]
    text = "<s>Be brief. USER: {}\nWhich? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT: Yes.</s>"
    assert processor.apply_chat_template(messages) == text.format("<image>")
    assert learnt(processor, processor.tokenize_conversation(messages)) == "A cat.</s>Yes.</s>"
    prompt = processor.apply_chat_template(messages[:2], add_generation_prompt=True)
    assert prompt == "<s>Be brief. USER: <image>\nWhich? ASSISTANT:"


def test_answers_are_found_where_a_token_swallows_the_space_before_it(make_processor):
    # Llama's tokenizers join the space after "ASSISTANT:" with the first word of the answer.
    characters = {chr(code) for code in range(33, 127)} | {"▁"}
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *sorted(characters), "▁A"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "A")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    processor = IgvaLlavaProcessor(make_processor().image_processor, tokenizer, CHAT_TEMPLATES["vicuna_v1"])
    encoded = processor.tokenize_conversation(conversation("<image> Which?", "A cat.", "Sure?", "Yes."))
    ids = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == "▁A▁cat.</s>Yes.</s>"


def test_plain_template_keeps_only_picture_and_caption(make_processor):
    processor = make_processor()
    encoded = processor.tokenize_conversation(conversation("Describe.\n<image>", "A cat."), chat_template="plain")
    assert processor.tokenizer.decode(encoded["input_ids"]) == "<s>" + "<image>" * 4 + "A cat.\n"
    assert learnt(processor, encoded) == "A cat.\n"


@pytest.mark.parametrize("template", sorted(CHAT_TEMPLATES))
def test_parts_and_text_give_the_same_tokens(make_processor, template):
    processor = make_processor()
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}]
    answer = conversation("", "A cat.")[1:]
    template = CHAT_TEMPLATES[template]
    from_parts = processor.tokenize_conversation(parts + answer, chat_template=template)
    from_text = processor.tokenize_conversation(conversation("<image>\nWhich?") + answer, chat_template=template)
    assert from_parts == from_text


def test_a_prompt_begins_the_conversation_that_training_sees(make_processor):
    processor = make_processor()
    messages = conversation("<image>\nWhich?", "A cat.")
    prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
    ids = processor(images=picture(), text=prompt)["input_ids"][0]
    whole = processor.tokenize_conversation(messages)
    assert whole["input_ids"][: len(ids)] == ids
    assert whole["assistant_masks"].index(1) == len(ids)


def test_chat_template_of_transformers_takes_pictures_and_instruction(make_processor, tiny_encoder):
    processor = make_processor(sentence_encoder=tiny_encoder)
    message = {"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "Which?"}]}
    inputs = processor.apply_chat_template(
        [message],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"instruction": "Which?"},
    )
    assert inputs["pixel_values"].shape == (1, 3, 28, 28)
    assert torch.equal(inputs["instruction_embeds"], tiny_encoder.encode(["Which?"]))


def test_a_template_without_assistant_spans_is_refused(make_processor):
    bare = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="nothing to learn"):
        make_processor().tokenize_conversation(conversation("Which?", "A cat."), chat_template=bare)


def test_a_tokenizers_own_template_is_kept_if_it_marks_answers(part_folders, make_config, tmp_path):
    own = "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endif %}{% endfor %}"  # noqa: E501
    tokenizer = AutoTokenizer.from_pretrained(part_folders["llama"])
    tokenizer.chat_template = own
    tokenizer.save_pretrained(tmp_path)
    processor = build_processor(part_folders["clip"], tmp_path, make_config())
    assert processor.chat_template["default"] == own


# ---- instructions, saving and loading -----------------------------------------------------------------------------------


def test_one_instruction_serves_all_pictures(make_processor, tiny_encoder):
    processor = make_processor(sentence_encoder=tiny_encoder)
    inputs = processor(images=[picture(), picture()], text="<image><image>", instruction="Which?")
    assert np.array_equal(inputs["instruction_embeds"], tiny_encoder.encode(["Which?"] * 2).numpy())


def test_instructions_must_match_the_pictures(make_processor, tiny_encoder):
    processor = make_processor(sentence_encoder=tiny_encoder)
    with pytest.raises(ValueError, match="2 sentences for 1 images"):
        processor(images=picture(), text="<image>", instruction=["a", "b"])
    with pytest.raises(ValueError, match="0 sentences for 0 images"):
        processor(text="no picture", instruction="a")


def test_without_encoder_an_instruction_is_an_error(make_processor):
    with pytest.raises(ValueError, match="this processor has no sentence encoder"):
        make_processor()(images=picture(), text="<image>", instruction="a")


def test_an_encoder_of_another_width_or_kind_is_refused(make_processor, make_config, tiny_encoder):
    with pytest.raises(ValueError, match="16 numbers a sentence, but the fusion's text_dim is 20"):
        make_processor(make_config(fusion={"text_dim": 20}), sentence_encoder=tiny_encoder)
    with pytest.raises(TypeError, match="SentenceEncoder"):
        make_processor().sentence_encoder = str.upper


def test_saved_and_loaded_processor_gives_the_same_inputs(make_processor, tmp_path):
    processor = make_processor(tower="dinov2")
    processor.save_pretrained(tmp_path)
    make_config_folder(processor, tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is IgvaLlavaProcessor
    assert type(loaded.image_processor) is type(processor.image_processor)
    arguments = {"images": picture(), "text": "<image>\nWhich?", "return_tensors": "pt"}
    expected, actual = processor(**arguments), loaded(**arguments)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    messages = conversation("<image>\nWhich?", "A cat.")
    for template in (None, "plain"):
        assert loaded.tokenize_conversation(messages, chat_template=template) == processor.tokenize_conversation(
            messages, chat_template=template
        )
    assert loaded.sentence_encoder is None


def make_config_folder(processor: IgvaLlavaProcessor, folder) -> None:
    """AutoProcessor reads the model type from the config that a checkpoint has beside its processor."""
    (folder / "config.json").write_text(json.dumps({"model_type": "igva_llava"}), encoding="utf-8")


def test_sentence_encoder_travels_with_the_processor(make_processor, encoder_folder, tmp_path):
    processor = make_processor(sentence_encoder=encoder_folder)
    expected = processor.encode_instructions(["Which?", "How many?"])
    assert expected.shape == (2, 16) and expected.dtype == torch.float32
    processor.save_pretrained(tmp_path / "first")
    make_config_folder(processor, tmp_path / "first")
    loaded = AutoProcessor.from_pretrained(tmp_path / "first")
    assert loaded.sentence_encoder.fingerprint == processor.sentence_encoder.fingerprint
    assert torch.equal(loaded.encode_instructions(["Which?", "How many?"]), expected)
    for file in (tmp_path / "first").rglob("*"):
        if file.is_file():
            assert b"encoder_of_this_machine" not in file.read_bytes(), f"{file.name} names a folder of this machine"
    # Once more, from the copy: the fingerprint is that of the vectors, not of the folder.
    loaded.save_pretrained(tmp_path / "second")
    again = SentenceEncoder(tmp_path / "second" / "sentence_encoder")
    assert torch.equal(again.encode(["Which?", "How many?"]), expected)


def test_a_missing_or_changed_sentence_encoder_is_noticed(make_processor, encoder_folder, tmp_path):
    make_processor(sentence_encoder=encoder_folder).save_pretrained(tmp_path)
    weights = tmp_path / "sentence_encoder" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="its files were changed"):
        IgvaLlavaProcessor.from_pretrained(tmp_path).encode_instructions(["Which?"])
    (tmp_path / "sentence_encoder").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is missing; copy the whole checkpoint"):
        IgvaLlavaProcessor.from_pretrained(tmp_path)


def test_the_encoder_of_a_hub_repository_is_downloaded(monkeypatch, tmp_path):
    asked = {}

    def download(repository: str, **arguments: object) -> str:
        asked.update(arguments, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr("model.processing.snapshot_download", download)
    folder = _encoder_folder("someone/checkpoint", revision="v1", trust_remote_code=False)
    assert folder == tmp_path / "sentence_encoder"
    assert asked == {"repository": "someone/checkpoint", "revision": "v1", "allow_patterns": ["sentence_encoder/*"]}
