"""Pictures as tiles: the pixels of LLaVA-NeXT, as many placeholders as tokens, one instruction for all tiles."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from model.answering import Conversation
from model.data.collator import ImageTextCollator
from model.data.dataset import LlavaDataset, load_images, view_counts
from model.data.images import ANYRES_GRIDS, best_grid, num_views, views
from model.data.llava_json import read_llava_json
from model.evaluation import evaluate
from model.instruction import embed_instructions
from model.training.run import train

SIDE = 28
SIZES = [(40, 20), (20, 40), (40, 40), (28, 28), (300, 50), (33, 200), (7, 5), (1, 90)]


def picture(size):
    return Image.linear_gradient("L").rotate(90).resize(size).convert("RGB")


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_llava_next(size):
    image = picture(size)
    pinpoints = [[rows * SIDE, columns * SIDE] for rows, columns in ANYRES_GRIDS]
    theirs = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=pinpoints
    )
    expected = theirs(images=[image], return_tensors="pt")["pixel_values"][0]
    plain = {"do_resize": False, "do_center_crop": False, "image_grid_pinpoints": [[SIDE, SIDE]]}
    ours = [
        LlavaNextImageProcessorPil(**{**theirs.to_dict(), **plain})(images=[view], return_tensors="pt")["pixel_values"][0, 0]
        for view in views(image, "anyres", (0.5, 0.5, 0.5), SIDE)
    ]
    assert len(ours) == len(expected) == num_views(size, "anyres", SIDE)
    torch.testing.assert_close(torch.stack(ours), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("size", "grid"),
    [((672, 336), (1, 2)), ((336, 672), (2, 1)), ((640, 480), (2, 2)), ((1000, 300), (1, 3)), ((300, 1000), (3, 1))],
)
def test_the_grid_keeps_most_pixels(size, grid):
    assert best_grid(size, 336) == grid


def test_grids_are_chosen_among_those_given():
    assert best_grid((640, 480), 336, [(1, 1), (1, 2)]) == (1, 2)
    assert best_grid((300, 480), 336, [(1, 1), (1, 2)]) == (1, 1)
    assert num_views((640, 480), "pad", 336) == 1


@pytest.fixture
def samples(picture_folder, make_record):
    for size in ((60, 20), (30, 30)):
        picture(size).save(picture_folder / "images" / f"{size[0]}.png")
    records = [
        make_record("wide", "images/60.png", "<image>\nWhich colour?", "red"),
        make_record("two", ["images/60.png", "images/30.png"], "<image>\n<image>\nWhich colours?", "red and blue"),
        make_record("text", None, "Hello.", "Hi."),
    ]
    (picture_folder / "anyres.json").write_text(json.dumps(records), encoding="utf-8")
    return read_llava_json(picture_folder / "anyres.json")


def test_tiles_have_placeholders_pixels_and_share_the_instruction(samples, model_and_processor):
    model, processor = model_and_processor

    def embed(turns):
        return embed_instructions(turns, processor.encode_instructions)

    data = LlavaDataset(samples, processor, embed=embed, aspect_ratio="anyres")
    tokens = model.config.num_image_tokens
    counts = [view_counts(sample, processor, "anyres") for sample in samples]
    assert counts == [[4], [4, 5], []]  # 1 + 1 x 3 tiles; 1 + 2 x 2 of a square
    items = [data[index] for index in range(3)]
    for item, count in zip(items, counts, strict=True):
        assert int((item["input_ids"] == processor.image_token_id).sum()) == tokens * sum(count)
        assert len(item.get("pixel_values", ())) == sum(count)
    batch = ImageTextCollator(processor.tokenizer.pad_token_id)(items)
    assert batch["image_to_sample"].tolist() == [0] * 4 + [1] * 9
    assert batch["image_to_sentence"].tolist() == [0] * 4 + [1] * 9
    assert batch["instruction_embeds"].shape == (2, 16)
    mapped = model(**batch)
    # The same as an embedding for each image.
    rows = batch.pop("image_to_sentence")
    batch["instruction_embeds"] = batch["instruction_embeds"][rows]
    plain = model(**batch)
    torch.testing.assert_close(mapped.loss, plain.loss, atol=1e-6, rtol=0)
    assert mapped.fusion_weights.shape == (13, 2)


def test_a_tile_is_the_picture_s_part_in_reading_order():
    image = Image.new("RGB", (56, 84))
    colours = [(40 * index + 20, 0, 0) for index in range(6)]
    for index, colour in enumerate(colours):
        image.paste(colour, (28 * (index % 2), 28 * (index // 2), 28 * (index % 2) + 28, 28 * (index // 2) + 28))
    tiles = views(image, "anyres", (0, 0, 0), SIDE, [(3, 2)])[1:]
    assert [tile.getpixel((14, 14)) for tile in tiles] == colours


def test_estimates_are_those_of_the_most_tiles(samples, model_and_processor):
    processor = model_and_processor[1]
    plain = LlavaDataset(samples, processor).estimated_lengths()
    tiled = LlavaDataset(samples, processor, aspect_ratio="anyres").estimated_lengths()
    tokens = processor.num_image_tokens()
    assert [more - less for more, less in zip(tiled, plain, strict=True)] == [4 * tokens, 8 * tokens, 0]


def test_a_picture_that_does_not_fit_is_not_learnable(samples, model_and_processor):
    data = LlavaDataset(samples, model_and_processor[1], aspect_ratio="anyres", max_length=12)
    with pytest.raises(ValueError, match=r"sample wide: its .* tokens exceed max_length 12, which would cut an image"):
        data[0]


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_with_tiles_trains_and_its_checkpoint_answers_with_tiles(packing, samples, make_recipe, picture_folder):
    data = {
        "path": str(picture_folder / "anyres.json"),
        "aspect_ratio": "anyres",
        "anyres_grids": [[1, 2], [1, 3]],
        "packing": packing,
    }
    result = train(make_recipe(2, data=data, language_model_training="lora", batch_size=3, micro_batch_size=3))
    model = AutoModelForImageTextToText.from_pretrained(result["checkpoint"])
    processor = AutoProcessor.from_pretrained(result["checkpoint"])
    assert (processor.aspect_ratio, processor.anyres_grids) == ("anyres", [[1, 2], [1, 3]])
    seen = []
    features = model.get_image_features
    model.get_image_features = lambda pixel_values, *rest: seen.append(len(pixel_values)) or features(pixel_values, *rest)
    scores = evaluate(model, processor, samples, aspect_ratio=processor.aspect_ratio, max_new_tokens=2, batch_size=4)
    assert scores.overall.count == 3 and seen == [4 + 4 + 3]
    conversation = Conversation(model, processor)
    conversation.show(Image.open(samples[0].images[0]).convert("RGB"))
    _, weights = conversation.ask("Which colour?", max_new_tokens=2)
    assert seen[1:] == [4] and sum(weights) == pytest.approx(1, abs=1e-5)


def test_images_of_a_sample_are_loaded_in_its_order(samples, model_and_processor):
    processor = model_and_processor[1]
    both = load_images(samples[1], processor, "anyres")
    assert torch.equal(both[:4], load_images(samples[0], processor, "anyres"))
