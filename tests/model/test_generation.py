"""generate(): images are encoded once, the cache does the rest, and a batch is its rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


@pytest.fixture
def prompts(make_model, make_batch):
    """A model and two prompts with an image each, of 11 and 16 tokens."""
    model = make_model()
    short = make_batch(model, (1,), length=11, seed=1)
    long = make_batch(model, (1,), length=16, seed=2)
    for prompt in (short, long):
        del prompt["labels"]
    return model, short, long


def new_tokens(model, prompt: dict[str, Tensor], **options) -> Tensor:
    out = model.generate(**prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)
    return out[:, prompt["input_ids"].shape[1] :]


def test_images_and_instructions_are_used_in_the_first_step_only(prompts):
    model, prompt, _ = prompts
    tower_batches, allocator_inputs, lengths = [], [], []
    model.model.vision_tower.register_forward_pre_hook(lambda _, args: tower_batches.append(args[0].shape[0]))
    model.model.fusion.allocator.register_forward_pre_hook(lambda _, args: allocator_inputs.append(args[1]))
    model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    new_tokens(model, prompt)
    assert tower_batches == [1]
    assert len(allocator_inputs) == 1 and torch.equal(allocator_inputs[0], prompt["instruction_embeds"])
    assert lengths == [11, 1, 1, 1, 1, 1]


def test_cache_and_no_cache_give_the_same_tokens(prompts):
    model, prompt, _ = prompts
    assert torch.equal(new_tokens(model, prompt), new_tokens(model, prompt, use_cache=False))


def test_generated_tokens_are_those_of_repeated_forwards(prompts):
    model, prompt, _ = prompts
    inputs = dict(prompt)
    expected = []
    for _ in range(6):
        logits = model(**inputs).logits[:, -1]
        logits[:, model.generation_config.eos_token_id] = -torch.inf
        token = logits.argmax(dim=-1, keepdim=True)
        expected.append(token)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assert torch.equal(new_tokens(model, prompt), torch.cat(expected, dim=1))


def test_a_left_padded_batch_equals_its_rows(prompts):
    model, short, long = prompts
    pad = long["input_ids"].shape[1] - short["input_ids"].shape[1]
    padded = {
        "input_ids": torch.nn.functional.pad(short["input_ids"], (pad, 0), value=model.config.text_config.pad_token_id),
        "attention_mask": torch.nn.functional.pad(short["attention_mask"], (pad, 0)),
    }
    batch = {name: torch.cat([padded.get(name, short[name]), long[name]]) for name in short}
    together = new_tokens(model, batch)
    assert torch.equal(together[:1], new_tokens(model, short))
    assert torch.equal(together[1:], new_tokens(model, long))


def test_the_instruction_changes_the_answer(prompts):
    model, prompt, _ = prompts
    torch.manual_seed(0)
    # The random allocator hardly prefers a group; sharpen it so that another sentence means other groups.
    torch.nn.init.normal_(model.model.fusion.allocator.linear.weight, std=3.0)
    answers = {tuple(new_tokens(model, prompt | {"instruction_embeds": torch.randn(1, 16)})[0].tolist()) for _ in range(8)}
    assert len(answers) > 1


def test_beam_search_keeps_each_image_with_its_text(prompts, make_batch):
    model, one, _ = prompts
    two = make_batch(model, (2,), length=11, seed=5)
    two["pixel_values"][1] *= 3  # the order of the two matters
    batch = {name: torch.cat([two[name], one[name]]) for name in one}
    together = new_tokens(model, batch, num_beams=2)
    for row, prompt in enumerate(({name: two[name] for name in one}, one)):
        assert torch.equal(together[row : row + 1], new_tokens(model, prompt, num_beams=2))


def test_several_answers_to_one_text_keep_its_images(prompts, make_batch):
    """Sampled from one seed, they are the answers to the text written down that often."""
    model, one, _ = prompts
    two = make_batch(model, (2,), length=11, seed=5)
    batch = {name: torch.cat([two[name], one[name]]) for name in one}
    images, rows = torch.tensor([0, 1, 0, 1, 2, 2]), torch.tensor([0, 0, 1, 1])
    by_hand = {name: value[images if name in ("pixel_values", "instruction_embeds") else rows] for name, value in batch.items()}
    answers = []
    for inputs, options in ((batch, {"num_return_sequences": 2}), (by_hand, {})):
        torch.manual_seed(3)
        made = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=True, pad_token_id=256, **options)
        answers.append(made)
    assert torch.equal(*answers)
    assert not torch.equal(answers[0][0], answers[0][1])


@pytest.mark.parametrize("shared", [False, True])
def test_features_made_before_serve_beams_and_stay_as_they_are(prompts, make_batch, shared):
    """A cache of image features, with the sentence in its key, gives the tokens of the images, as often as it is asked."""
    model, _, _ = prompts
    batch = make_batch(model, (2, 0, 1))
    embeds, owners = batch["instruction_embeds"][:2], torch.tensor([0, 0, 1])
    sentences = (
        {"instruction_embeds": embeds, "image_to_sentence": owners} if shared else {"instruction_embeds": embeds[owners]}
    )
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = new_tokens(model, {**text, "pixel_values": batch["pixel_values"], **sentences}, num_beams=2)
    features = model.get_image_features(batch["pixel_values"], **sentences)
    before = features.pooler_output.clone()
    for _ in range(2):
        assert torch.equal(new_tokens(model, {**text, "mm_encoder_outputs": {"image": features}}, num_beams=2), expected)
    assert torch.equal(features.pooler_output, before)


def test_guessed_tokens_change_nothing(prompts, make_model):
    """Assisted decoding, by another model and by looking words up in the prompt, is faster or not, and the same."""
    model, prompt, _ = prompts
    no_image = {"suppress_tokens": [model.config.image_token_id]}
    expected = new_tokens(model, prompt, **no_image)
    assert torch.equal(new_tokens(model, prompt, prompt_lookup_num_tokens=3, **no_image), expected)
    assert torch.equal(new_tokens(model, prompt, assistant_model=make_model(seed=1), **no_image), expected)


def test_embeddings_in_place_of_ids(prompts):
    """With the image features put in by hand; the answer has no prompt in front then."""
    model, prompt, _ = prompts
    features = model.get_image_features(prompt["pixel_values"], prompt["instruction_embeds"]).pooler_output
    embeds = model.get_input_embeddings()(prompt["input_ids"])
    embeds[prompt["input_ids"] == model.config.image_token_id] = features.flatten(0, 1)
    made = model.generate(
        inputs_embeds=embeds, attention_mask=prompt["attention_mask"], max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    assert torch.equal(made, new_tokens(model, prompt))


def test_a_static_cache_gives_the_same_tokens(prompts):
    model, short, long = prompts
    pad = long["input_ids"].shape[1] - short["input_ids"].shape[1]
    padded = {name: torch.nn.functional.pad(short[name], (pad, 0), value=0) for name in ("input_ids", "attention_mask")}
    batch = {name: torch.cat([padded.get(name, short[name]), long[name]]) for name in short}
    assert torch.equal(new_tokens(model, batch, cache_implementation="static"), new_tokens(model, batch))


def test_a_conversation_goes_on_in_the_cache_of_its_first_question(prompts):
    """The pictures stay mixed as the first question weighed them; a new mix needs the pictures, and a new cache."""
    model, prompt, _ = prompts
    first = model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    more = torch.cat([first.sequences, torch.arange(5).view(1, -1)], dim=1)
    text = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    expected = new_tokens(model, {**prompt, **text})
    assert torch.equal(new_tokens(model, {**text, "past_key_values": first.past_key_values}), expected)


def test_a_compiled_step_is_one_graph(prompts):
    """The prompt with its images, and a token on a static cache: what generate() compiles on a GPU."""
    from transformers import StaticCache

    model, prompt, _ = prompts
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**prompt, use_cache=False).logits, model(**prompt).logits)
        logits = []
        for forward in (model.forward, compiled):
            cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=16)
            token = model(**prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
            mask, position = torch.ones(1, 12, dtype=torch.long), torch.full((1, 1), 11)
            step = {"input_ids": token, "attention_mask": mask, "position_ids": position, "past_key_values": cache}
            logits.append(forward(**step).logits)
    torch.testing.assert_close(*logits)


def test_images_of_one_text_stay_together_when_texts_are_repeated(prompts, make_batch):
    model, _, _ = prompts
    batch = make_batch(model, (2, 0, 1))
    pixels = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 28, 28)
    input_ids, expanded = model._expand_inputs_for_generation(
        expand_size=2, input_ids=batch["input_ids"], pixel_values=pixels, instruction_embeds=None
    )
    assert expanded["pixel_values"][:, 0, 0, 0].tolist() == [0, 1, 0, 1, 2, 2]
    assert expanded["instruction_embeds"] is None
    assert torch.equal(input_ids, batch["input_ids"].repeat_interleave(2, dim=0))


def test_text_alone_generates(make_model, make_batch):
    model = make_model()
    batch = make_batch(model, (0, 0))
    assert new_tokens(model, {name: batch[name] for name in ("input_ids", "attention_mask")}).shape == (2, 6)


def test_a_prompt_whose_images_are_missing_is_refused(prompts):
    model, prompt, _ = prompts
    del prompt["pixel_values"], prompt["instruction_embeds"]
    with pytest.raises(ValueError, match="4 image placeholders"):
        new_tokens(model, prompt)
