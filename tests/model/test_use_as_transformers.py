"""Auto classes, pipeline, batches and streaming work as for transformers' own models, and prepare inputs as in training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer, pipeline

import model as _registration  # noqa: F401 (the Auto classes learn of the model type)
from model.answering import Conversation, embed_questions, pixels_of
from model.instruction import SentenceEncoder, embed_instructions
from model.processing import IgvaLlavaProcessor

QUESTION = "Which colour?"
ROOT = Path(__file__).resolve().parents[2]

#: One fusion of each way to make tokens from layers: weighed by the text, by image or by token, fixed, more tokens, attention.
FUSIONS = {
    "igva": {"type": "igva"},
    "tgif": {"type": "tgif", "text_dim": 16, "router_dim": 8},
    "mixture_of_layers": {"type": "mixture_of_layers", "text_dim": 16, "key_dim": 8, "level": "hybrid"},
    "dense_connector": {"type": "dense_connector"},
    "sparse_token_integration": {"type": "dense_connector", "variant": "sti", "layers": [1, 2], "strip": 2},
    "mmfuser": {"type": "mmfuser", "layers": [1, 2, -2], "num_heads": 4, "num_points": 2},
}


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def message(*content: Image.Image | str, role: str = "user") -> dict:
    parts = [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "image": c} for c in content]
    return {"role": role, "content": parts}


def inputs_of(processor: IgvaLlavaProcessor, *conversations: list[dict], **options):
    arguments = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt", **options}
    return processor.apply_chat_template(conversations[0] if len(conversations) == 1 else list(conversations), **arguments)


@pytest.mark.parametrize("aspect_ratio", ["pad", "crop", "stretch", "anyres"])
def test_pictures_are_prepared_as_in_training(make_processor, aspect_ratio):
    processor = make_processor()
    processor.aspect_ratio = aspect_ratio
    inputs = inputs_of(processor, [message(picture(), picture(60, 30, 1), QUESTION)])
    expected = torch.cat([pixels_of(processor, picture()), pixels_of(processor, picture(60, 30, 1))])
    assert torch.equal(inputs["pixel_values"], expected)
    assert (len(expected) > 2) == (aspect_ratio == "anyres")
    num_tokens = int((inputs["input_ids"] == processor.image_token_id).sum())
    assert num_tokens == len(expected) * processor.num_image_tokens()


@pytest.mark.parametrize("policy", ["first_turn", "last_turn", "mean_of_turns"])
def test_the_instruction_is_made_of_the_turns_under_the_policy(make_processor, tiny_encoder, policy):
    processor = make_processor(sentence_encoder=tiny_encoder)
    processor.question_policy, processor.aspect_ratio = policy, "anyres"
    turns = [message(picture(60, 30), QUESTION), message("Red.", role="assistant"), message("How many?")]
    other = [message(picture(), "Is it dark?")]
    inputs = inputs_of(processor, turns, other, processor_kwargs={"padding": True, "padding_side": "left"})
    expected = embed_instructions([[QUESTION, "How many?"], ["Is it dark?"]], tiny_encoder.encode, policy)
    counts = torch.tensor([len(processor.views(picture(60, 30))), len(processor.views(picture()))])
    assert torch.equal(inputs["instruction_embeds"], expected.repeat_interleave(counts, dim=0))


def test_the_instruction_defaults_to_the_last_turn_whatever_training_took(make_processor, tiny_encoder):
    processor = make_processor(sentence_encoder=tiny_encoder)
    processor.instruction_policy = "mean_of_turns"
    turns = [message(picture(), QUESTION), message("Red.", role="assistant"), message("How many?")]
    assert torch.equal(inputs_of(processor, turns)["instruction_embeds"], tiny_encoder.encode(["How many?"]))
    assert torch.equal(embed_questions(processor, [[QUESTION, "How many?"]]), tiny_encoder.encode(["How many?"]))


def test_pictures_by_path_and_in_the_form_of_openai(make_processor, tiny_encoder, tmp_path):
    picture().save(tmp_path / "picture.png")
    processor = make_processor(sentence_encoder=tiny_encoder)
    expected = inputs_of(processor, [message(picture(), QUESTION)])
    forms = ({"type": "image", "path": str(tmp_path / "picture.png")},)
    forms += ({"type": "image_url", "image_url": {"url": str(tmp_path / "picture.png")}},)
    for form in forms:
        made = inputs_of(processor, [{"role": "user", "content": [form, {"type": "text", "text": QUESTION}]}])
        assert made.keys() == expected.keys()
        assert all(torch.equal(made[name], expected[name]) for name in expected)


def test_how_inputs_are_prepared_is_saved_with_the_processor(make_processor, tmp_path):
    processor = make_processor()
    settings = {
        "question_policy": "first_turn",
        "instruction_policy": "last_turn",
        "aspect_ratio": "anyres",
        "anyres_grids": [[1, 2], [3, 1]],
    }
    for name, value in settings.items():
        assert getattr(processor, name) != value
        setattr(processor, name, value)
    processor.save_pretrained(tmp_path)
    loaded = IgvaLlavaProcessor.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in settings} == settings


def test_a_chosen_instruction_is_taken_and_text_alone_needs_none(make_processor, tiny_encoder):
    processor = make_processor(sentence_encoder=tiny_encoder)
    inputs = inputs_of(processor, [message(picture(), QUESTION)], processor_kwargs={"instruction": "Another."})
    assert torch.equal(inputs["instruction_embeds"], tiny_encoder.encode(["Another."]))
    assert "instruction_embeds" not in inputs_of(processor, [message("Hello.")])
    assert "instruction_embeds" not in inputs_of(make_processor(), [message(picture(), QUESTION)])


@pytest.fixture(scope="module")
def saved(tmp_path_factory, part_folders, encoder_folder):
    """A checkpoint that was saved and then moved, as to another machine, where its parts are not."""
    from model import build_model, build_processor

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    parts = {"clip": part_folders["clip"], "llama": part_folders["llama"], "encoder": encoder_folder}
    for name, source in parts.items():
        shutil.copytree(source, folder / "parts" / name)
    clip, llama, encoder = (folder / "parts" / name for name in parts)
    fusion = {"type": "igva", "num_groups": 2, "text_dim": 16, "hidden_dim": 32, "num_blocks": 1}
    built = build_model(clip, llama, fusion=fusion)
    processor = build_processor(clip, llama, built.config, sentence_encoder=SentenceEncoder(encoder))
    built.save_pretrained(folder / "first")
    processor.save_pretrained(folder / "first")
    shutil.move(folder / "first", folder / "second")
    shutil.rmtree(folder / "parts")
    return folder / "second"


@pytest.fixture(scope="module")
def loaded(saved):
    return AutoModelForImageTextToText.from_pretrained(saved).eval(), AutoProcessor.from_pretrained(saved)


def answers(loaded, inputs, **options) -> list[str]:
    model, processor = loaded
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False, **options)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]


def test_auto_classes_answer_as_a_conversation_does(loaded):
    conversation = Conversation(*loaded)
    conversation.show(picture())
    expected, _ = conversation.ask(QUESTION, max_new_tokens=5)
    assert answers(loaded, inputs_of(loaded[1], [message(picture(), QUESTION)])) == [expected]


def test_the_pipeline_answers_the_same(loaded):
    model, processor = loaded
    answer = pipeline("image-text-to-text", model=model, processor=processor)
    made = answer(
        text=[message(picture(), QUESTION)], max_new_tokens=5, return_full_text=False, generate_kwargs={"do_sample": False}
    )
    assert [made[0]["generated_text"].strip()] == answers(loaded, inputs_of(processor, [message(picture(), QUESTION)]))


#: What a reader of the docs writes, in a process that knows nothing of the one that saved, and cannot reach a hub.
FRESH = """
import json, sys
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
import model

folder, picture, question = sys.argv[1:]
messages = [{"role": "user", "content": [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": question}]}]
processor = AutoProcessor.from_pretrained(folder)
igva = AutoModelForImageTextToText.from_pretrained(folder)
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
tokens = igva.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
ask = pipeline("image-text-to-text", model=folder)
made = ask(text=messages, max_new_tokens=5, return_full_text=False, generate_kwargs={"do_sample": False})
print(json.dumps({
    "embeds": inputs["instruction_embeds"].tolist(),
    "auto": processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)[0].strip(),
    "pipeline": made[0]["generated_text"].strip(),
}))
"""


@pytest.mark.slow
def test_a_moved_checkpoint_answers_in_a_fresh_process_without_a_hub(saved, loaded, tmp_path):
    picture().save(tmp_path / "picture.png")
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(tmp_path / "no_cache")}
    environment = {**os.environ, **offline, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FRESH, str(saved), "picture.png", QUESTION]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    (expected,) = answers(loaded, inputs_of(loaded[1], [message(picture(), QUESTION)]))
    assert told["auto"] == told["pipeline"] == expected
    torch.testing.assert_close(torch.tensor(told["embeds"]), loaded[1].encode_instructions([QUESTION]))


def test_the_pipeline_takes_several_conversations(loaded):
    model, processor = loaded
    conversations = [[message(picture(), QUESTION)], [message(picture(50, 20, 1), "A question that is longer, is it not?")]]
    answer = pipeline("image-text-to-text", model=model, processor=processor)
    made = answer(text=conversations, max_new_tokens=5, return_full_text=False, generate_kwargs={"do_sample": False})
    texts = [entry[0]["generated_text"].strip() for entry in made]
    assert texts == [answers(loaded, inputs_of(processor, conversation))[0] for conversation in conversations]


def test_a_left_padded_batch_gives_the_answers_of_single_runs(loaded):
    conversations = [
        [message(picture(), QUESTION)],
        [message(picture(50, 20, 1), picture(20, 20, 2), "What is the difference between these two pictures?")],
        [message("Hello.")],
    ]
    batch = inputs_of(loaded[1], *conversations, processor_kwargs={"padding": True})
    single = [answers(loaded, inputs_of(loaded[1], conversation))[0] for conversation in conversations]
    assert answers(loaded, batch) == single


def test_an_answer_can_be_streamed(loaded):
    model, processor = loaded
    inputs = inputs_of(processor, [message(picture(), QUESTION)])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=5, do_sample=False, streamer=streamer)
    assert ["".join(streamer).strip()] == answers(loaded, inputs)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_batch_of_tiles_pictures_and_texts_gives_the_tokens_of_single_runs(fusion, make_model, make_processor, tiny_encoder):
    model = make_model(fusion=FUSIONS[fusion])
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (model.model.fusion or torch.nn.Identity()).parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # weights that differ by question, scales that are not zero
    processor = make_processor(model.config, sentence_encoder=tiny_encoder)
    processor.aspect_ratio = "anyres"
    conversations = [
        [message("Hello.")],
        [message(picture(90, 30), QUESTION)],
        [message(picture(30, 30, 1), picture(30, 60, 2), "What is the difference?")],
        [message(picture(50, 40, 3), QUESTION), message("Red.", role="assistant"), message("How many?")],
    ]
    tiles = [len(processor.views(picture(*size))) for size in ((90, 30), (30, 30), (30, 60))]
    assert len(set(tiles)) > 1
    batch = inputs_of(processor, *conversations, processor_kwargs={"padding": True})
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 256}

    def new_tokens(inputs):
        return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]

    assert torch.equal(new_tokens(batch), torch.cat([new_tokens(inputs_of(processor, each)) for each in conversations]))
