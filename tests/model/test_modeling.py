"""The model: saving and loading, what flows where, and the loss."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForImageTextToText, CLIPConfig, CLIPModel, LlamaConfig

from igva_kernels import FusionPlan
from igva_kernels.impl import reference
from model import IgvaLlavaForConditionalGeneration, IgvaLlavaModel, build_model
from model.cross_entropy import LanguageModelHead
from model.loss import negative_entropy, token_exact_loss

# Float32 sums of different order: a few hundred roundings of 6e-8.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


class CountFusions(TorchDispatchMode):
    """Counts the fused operator, wherever it is called from."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.count += func is torch.ops.igva.fuse.default
        return func(*args, **(kwargs or {}))


def without_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- saving and loading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["clip", "dinov2"])
def test_saved_and_loaded_model_gives_the_same_logits(make_model, make_batch, tmp_path, tower):
    model = make_model(tower, projector_input_norm=True, projector_output_norm=True)
    inputs = without_labels(make_batch(model))
    expected = model(**inputs)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is IgvaLlavaForConditionalGeneration
    result = loaded(**inputs)
    assert torch.equal(result.logits, expected.logits)
    assert torch.equal(result.fusion_weights, expected.fusion_weights)


def test_base_model_loads_from_the_same_folder(make_model, make_batch, tmp_path):
    model = make_model()
    inputs = without_labels(make_batch(model))
    model.save_pretrained(tmp_path)
    base, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(base) is IgvaLlavaModel
    assert not report["missing_keys"]
    assert torch.equal(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)


def test_tied_head_is_saved_once_and_tied_again(make_model, tmp_path):
    model = make_model()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_untied_head_keeps_its_own_weights(make_model, make_batch, text_config, tmp_path):
    untied = LlamaConfig(**{**text_config.to_dict(), "tie_word_embeddings": False})
    model = make_model(text_config=untied)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    inputs = without_labels(make_batch(model))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_allocator_missing_from_a_checkpoint_starts_as_torch_starts_it(make_model, tmp_path):
    # A plain LLaVA checkpoint that becomes an IGVA model: what is loaded stays, what is new is initialised.
    plain = make_model(fusion={"type": "llava"})
    plain.save_pretrained(tmp_path)
    config = make_model().config
    torch.manual_seed(1)
    loaded, report = IgvaLlavaForConditionalGeneration.from_pretrained(
        tmp_path, config=config, output_loading_info=True, ignore_mismatched_sizes=True
    )
    assert any(name.startswith("model.fusion.allocator.") for name in report["missing_keys"])
    allocator = loaded.model.fusion.allocator
    for name, parameter in allocator.named_parameters():
        assert parameter.isfinite().all(), name
    bound = allocator.sentence_proj.in_features**-0.5
    weight = allocator.sentence_proj.weight.detach()
    assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    attention = allocator.transformers[0].cross_attention
    assert attention.in_proj_bias.eq(0).all() and attention.out_proj.bias.eq(0).all()
    assert attention.in_proj_weight.std() > 0
    assert torch.equal(loaded.get_input_embeddings().weight, plain.get_input_embeddings().weight)


@pytest.mark.parametrize("tower", ["clip", "dinov2"])
def test_build_keeps_pretrained_weights(part_folders, tower):
    fusion = {"num_groups": 2, "text_dim": 16, "hidden_dim": 32, "num_blocks": 1}
    model = build_model(part_folders[tower], part_folders["llama"], fusion=fusion)
    assert model.config.num_image_tokens == 4
    for name, part in ((tower, model.model.vision_tower), ("llama", model.model.language_model)):
        for key, expected in AutoModel.from_pretrained(part_folders[name]).state_dict().items():
            actual = part.state_dict()[key]
            assert torch.equal(actual[: len(expected)] if expected.ndim else actual, expected), f"{name}: {key}"
    # <image> did not fit into the vocabulary of 261: the embeddings grew, and nothing of the new rows is an answer.
    assert model.config.image_token_id == 261
    assert model.lm_head.weight.shape == (320, 64)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.generation_config.suppress_tokens == list(range(261, 320))


def test_a_checkpoint_names_no_folder_of_this_machine(part_folders, tmp_path):
    build_model(part_folders["clip"], part_folders["llama"], fusion={"type": "llava"}).save_pretrained(tmp_path)
    for file in tmp_path.iterdir():
        assert str(part_folders["llama"].parent).encode() not in file.read_bytes(), file.name


def test_a_built_model_attends_to_the_past_only(part_folders, make_batch):
    fusion = {"num_groups": 2, "text_dim": 16, "hidden_dim": 32, "num_blocks": 1}
    model = build_model(part_folders["clip"], part_folders["llama"], fusion=fusion)
    inputs = without_labels(make_batch(model))
    before = model(**inputs).logits
    inputs["input_ids"][:, 10] += 1
    after = model(**inputs).logits
    assert torch.equal(before[:, :10], after[:, :10]) and not torch.equal(before[:, 10:], after[:, 10:])


def test_a_built_output_norm_begins_at_the_spread_of_the_word_embeddings(part_folders):
    model = build_model(part_folders["clip"], part_folders["llama"], fusion={"type": "llava"}, projector_output_norm=True)
    features = model.get_image_features(torch.randn(8, 3, 28, 28)).pooler_output
    words = model.get_input_embeddings().weight[:261]  # the rows after them came with <image> and were never trained
    assert features.std().item() == pytest.approx(words.std().item(), rel=0.1)


def test_attention_can_be_chosen(part_folders):
    model = build_model(part_folders["clip"], part_folders["llama"], fusion={"type": "llava"}, attn_implementation="eager")
    assert model.model.vision_tower.config._attn_implementation == "eager"
    assert model.model.language_model.config._attn_implementation == "eager"


def test_build_takes_the_vision_half_of_a_full_clip(part_folders, vision_configs, tmp_path):
    torch.manual_seed(3)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    clip = CLIPModel(CLIPConfig(vision_config=vision_configs["clip"].to_dict(), text_config=text))
    clip.save_pretrained(tmp_path)
    model = build_model(tmp_path, part_folders["llama"], fusion={"type": "llava"})
    patches = "embeddings.patch_embedding.weight"
    expected = {name.removeprefix("vision_model."): value for name, value in clip.state_dict().items()}[patches]
    assert torch.equal(model.model.vision_tower.state_dict()[patches], expected)


# ---- the fused operator -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", [{"stage": 1}, {"stage": 2}, {"stage": 1, "groups": [[1], [2, 3, 4]]}, {"type": "llava"}])
def test_forward_and_generate_run_the_fused_operator(make_model, make_batch, fusion):
    model = make_model(fusion=fusion)
    batch = make_batch(model)
    with CountFusions() as fusions:
        model(**batch)
    assert fusions.count == 1
    with CountFusions() as fusions:
        model.generate(**without_labels(batch), max_new_tokens=3, min_new_tokens=3)
    assert fusions.count == 1


@pytest.mark.parametrize(("tower", "stage"), [("clip", 1), ("clip", 2), ("dinov2", 2)])
def test_image_features_are_the_projected_fusion_of_the_towers_states(make_model, make_batch, tower, stage):
    model = make_model(tower, {"stage": stage}).double()
    batch = make_batch(model)
    pixels, embeds = batch["pixel_values"].double(), batch["instruction_embeds"].double()
    features = model.get_image_features(pixels, embeds)
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    weights = features.fusion_weights
    if stage == 1:
        assert weights is None
        weights = torch.full((2, 2), 0.5, dtype=torch.float64)
    plan = FusionPlan.igva(4, 2)
    fused, _ = reference.fuse_forward([states[layer] for layer in plan.sources], weights, plan.program, 1, False)
    torch.testing.assert_close(features.pooler_output, model.model.multi_modal_projector(fused), rtol=1e-10, atol=1e-10)


def test_no_instruction_means_uniform_weights_which_is_stage_one(make_model, make_batch):
    model = make_model()
    pixels = make_batch(model)["pixel_values"]
    uniform = model.get_image_features(pixels)
    assert torch.equal(uniform.fusion_weights, torch.full((2, 2), 0.5))
    model.set_fusion_stage(1)
    averaged = model.get_image_features(pixels)
    assert averaged.fusion_weights is None
    torch.testing.assert_close(uniform.pooler_output, averaged.pooler_output, **CLOSE)


def test_missing_instructions_are_said_once(make_model, make_batch, caplog):
    model = make_model()
    pixels = make_batch(model)["pixel_values"]
    logging.Logger.warning_once.cache_clear()
    for _ in range(3):
        model.get_image_features(pixels)
    assert [record.message for record in caplog.records if "same weight" in record.message] == caplog.messages
    assert len(caplog.messages) == 1


def test_stage_is_switchable_and_saved(make_model, make_batch, tmp_path):
    model = make_model(fusion={"stage": 1})
    inputs = without_labels(make_batch(model))
    assert model.fusion_stage == 1 and model(**inputs).fusion_weights is None
    model.set_fusion_stage(2)
    assert model(**inputs).fusion_weights.shape == (2, 2)
    model.save_pretrained(tmp_path)
    assert AutoModelForImageTextToText.from_pretrained(tmp_path).fusion_stage == 2
    with pytest.raises(ValueError, match="stage must be 1"):
        model.set_fusion_stage(0)
    with pytest.raises(ValueError, match="'llava' has no stages"):
        make_model(fusion={"type": "llava"}).set_fusion_stage(1)


def test_the_instruction_changes_the_weights_and_the_features(make_model, make_batch):
    model = make_model()
    batch = make_batch(model)
    one = model.get_image_features(batch["pixel_values"], batch["instruction_embeds"])
    other = model.get_image_features(batch["pixel_values"], batch["instruction_embeds"].flip(0))
    assert not torch.allclose(one.fusion_weights, other.fusion_weights)
    assert not torch.allclose(one.pooler_output, other.pooler_output)


def test_token_pooling_averages_squares_of_the_grid(make_model):
    model = make_model(token_pooling=2, image_size=56)
    fused = torch.arange(16.0).view(1, 16, 1)
    pooled = model.model._pool(fused, 56, 56)
    assert pooled.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    with pytest.raises(ValueError, match="token_pooling=2 does not divide the 3 x 3 patches"):
        model.model._pool(torch.zeros(1, 9, 1), 42, 42)


@pytest.mark.parametrize("tower", ["clip", "dinov2"])
def test_images_of_another_size_than_the_towers(make_model, make_batch, tower):
    model = make_model(tower, image_size=56, token_pooling=2)
    batch = make_batch(model)
    assert batch["pixel_values"].shape[-1] == 56
    assert model(**batch).image_hidden_states.shape == (2, 4, 64)


def test_a_wrong_number_of_prefix_tokens_is_noticed(make_model, make_batch):
    model = make_model(num_prefix_tokens=2)
    with pytest.raises(ValueError, match=r"3 tokens after 2 prefix tokens.*2 x 2 patches; check num_prefix_tokens"):
        model(**make_batch(model))


# ---- merging images into text -------------------------------------------------------------------------------------------


def test_image_features_replace_the_placeholders_in_reading_order(make_model, make_batch):
    model = make_model()
    batch = make_batch(model, (2, 0, 1))
    seen = {}
    model.model.language_model.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    out = model(**without_labels(batch))
    is_image = batch["input_ids"] == model.config.image_token_id
    assert is_image.sum(dim=1).tolist() == [8, 0, 4]
    assert torch.equal(seen["inputs_embeds"][is_image], out.image_hidden_states.flatten(0, 1))
    text = model.get_input_embeddings()(batch["input_ids"])
    assert torch.equal(seen["inputs_embeds"][~is_image], text[~is_image])


def test_several_images_in_one_row_equal_their_own_rows(make_model, make_batch):
    model = make_model()
    both = make_batch(model, (2,))
    first = model.get_image_features(both["pixel_values"][:1], both["instruction_embeds"][:1])
    torch.testing.assert_close(model(**both).image_hidden_states[:1], first.pooler_output, **CLOSE)


def test_text_only_batches_never_run_the_tower(make_model, make_batch):
    model = make_model()
    model.model.vision_tower.register_forward_pre_hook(lambda *_: pytest.fail("the tower ran without images"))
    batch = make_batch(model, (0, 0))
    out = model(**batch)
    assert out.loss.isfinite() and out.image_hidden_states is None and out.fusion_weights is None


def test_counts_that_differ_are_both_named(make_model, make_batch):
    model = make_model()
    batch = make_batch(model, (1, 1))
    batch["input_ids"][0, 1] = 5
    with pytest.raises(ValueError, match=r"7 placeholders \(id 261\), pixel_values gave 8 features \(2 images x 4 tokens\)"):
        model(**batch)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"pixel_values": None, "instruction_embeds": None}, "8 image placeholders .id 261., but there are no pixel_values"),
        ({"pixel_values": None}, "instruction_embeds given without pixel_values"),
        ({"pixel_values": torch.zeros(3, 28, 28)}, r"pixel_values has the shape \(3, 28, 28\)"),
        ({"instruction_embeds": torch.zeros(1, 16)}, r"expected \(B, E\) = \(2, 16\)"),
        ({"input_ids": None}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 16, 64)}, "images need input_ids"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(make_model, make_batch, change, text):
    model = make_model()
    batch = {**make_batch(model), **change}
    with pytest.raises(ValueError, match=text):
        model(**batch)


def test_logits_to_keep(make_model, make_batch):
    model = make_model()
    inputs = without_labels(make_batch(model))
    every = model(**inputs).logits
    assert torch.equal(model(**inputs, logits_to_keep=2).logits, every[:, -2:])
    assert torch.equal(model(**inputs, logits_to_keep=torch.tensor([0, 3])).logits, every[:, [0, 3]])


def test_labels_leave_the_logits_out_unless_asked_for(make_model, make_batch):
    model = make_model()
    batch = make_batch(model)
    assert model(**batch).logits is None
    out = model(**batch, return_logits=True)
    assert out.logits.shape == (2, 16, model.config.text_config.vocab_size) and out.loss is not None


# ---- gradients ----------------------------------------------------------------------------------------------------------


def test_gradient_reaches_allocator_and_projector_but_not_a_frozen_tower(make_model, make_batch):
    model = make_model().train()
    model.model.vision_tower.requires_grad_(False)
    model.train()
    assert not model.model.vision_tower.training and model.model.fusion.training
    maps = []
    model.model.fusion.register_forward_pre_hook(lambda _, args: maps.extend([*args[0].means, *args[0].copies]))
    model(**make_batch(model)).loss.backward()
    assert len(maps) == 3 and not any(each.requires_grad for each in maps)
    for name, parameter in model.named_parameters():
        if name.startswith("model.vision_tower."):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for part in (model.model.fusion.allocator.sentence_proj, model.model.multi_modal_projector.linear_1):
        assert part.weight.grad.abs().max() > 0


def test_gradient_reaches_a_trainable_tower(make_model, make_batch):
    model = make_model().train()
    model(**make_batch(model)).loss.backward()
    assert model.model.vision_tower.embeddings.patch_embedding.weight.grad.abs().max() > 0


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_checkpointing_changes_no_gradient(make_model, make_batch):
    model = make_model().train()
    model.model.vision_tower.requires_grad_(False)
    model.train()
    batch = make_batch(model)
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**batch).loss.backward()
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, **CLOSE, msg=name)


def test_bfloat16_autocast_runs_forward_and_backward(make_model, make_batch):
    model = make_model(balance_loss_weight=0.1).train()
    batch = make_batch(model)
    exact = model(**batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)  # bfloat16 has 8 bits
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_bfloat16_parameters_run(make_model, make_batch):
    model = make_model().to(torch.bfloat16).train()
    out = model(**make_batch(model))
    out.loss.backward()
    assert out.fusion_weights.dtype == torch.float32
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_one_batch_can_be_learnt_by_heart(make_model, make_batch):
    model = make_model(projector_output_norm=True).train()
    model.model.vision_tower.requires_grad_(False)
    batch = make_batch(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first = model(**batch).loss.item()
    for _ in range(25):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    assert first > 4 and loss.item() < 0.1


# ---- the loss -----------------------------------------------------------------------------------------------------------


def loss_by_the_formula(model: IgvaLlavaForConditionalGeneration, batch: dict[str, Tensor], owners: list[int]) -> Tensor:
    """Σ_b (ce_sum_b + λ n_b balance_b) / Σ_b n_b, sample by sample, from the full logits."""
    out = model(**without_labels(batch))
    total, num_items = torch.zeros(()), 0
    for row, labels in enumerate(batch["labels"]):
        targets = labels[1:]
        total = total + nn.functional.cross_entropy(out.logits[row, :-1], targets, ignore_index=-100, reduction="sum")
        num_labels = int((targets != -100).sum())
        num_items += num_labels
        weights = [out.fusion_weights[image] for image, owner in enumerate(owners) if owner == row]
        if weights:
            balance = torch.stack([(w * w.log()).sum() for w in weights]).mean()
            total = total + model.config.balance_loss_weight * num_labels * balance
    return total / num_items


def unequal_batch(model: IgvaLlavaForConditionalGeneration, make_batch: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
    batch = make_batch(model, (1, 0, 2, 1))
    for row, first in enumerate((14, 2, 9, 12)):
        batch["labels"][row, :first] = -100
    return batch


def test_loss_is_the_written_formula(make_model, make_batch):
    model = make_model(balance_loss_weight=0.5)
    batch = unequal_batch(model, make_batch)
    torch.testing.assert_close(model(**batch).loss, loss_by_the_formula(model, batch, [0, 2, 2, 3]), **CLOSE)


def test_accumulating_unequal_batches_gives_the_gradient_of_one_batch(make_model, make_batch):
    model = make_model(balance_loss_weight=0.5).train()
    batch = unequal_batch(model, make_batch)
    owners = torch.tensor([0, 2, 2, 3])
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    num_items = (batch["labels"][:, 1:] != -100).sum()
    for row in range(4):
        part = {name: batch[name][row : row + 1] for name in ("input_ids", "attention_mask", "labels")}
        if (owners == row).any():
            part |= {name: batch[name][owners == row] for name in ("pixel_values", "instruction_embeds")}
        model(**part, num_items_in_batch=num_items if row % 2 else int(num_items)).loss.backward()
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        # The difference is to be small against the whole gradient, not against one near-zero element of it.
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item() + 1e-7, msg=name)


def test_owners_are_counted_from_the_placeholders_or_given(make_model, make_batch):
    model = make_model(balance_loss_weight=0.5)
    batch = unequal_batch(model, make_batch)
    counted = model(**batch).loss
    assert torch.equal(model(**batch, image_to_sample=torch.tensor([0, 2, 2, 3])).loss, counted)
    assert not torch.equal(model(**batch, image_to_sample=torch.tensor([0, 1, 2, 3])).loss, counted)


def test_rows_that_cut_an_image_are_refused_where_owners_are_counted(make_model, make_batch):
    model = make_model(balance_loss_weight=0.5)
    batch = make_batch(model, (1, 1))
    batch["input_ids"][0, 9], batch["input_ids"][1, 1] = 261, 5
    with pytest.raises(ValueError, match=r"\[5, 3\] image placeholders.*the 4 tokens of an image"):
        model(**batch)


def test_negative_entropy_of_known_weights():
    weights = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.4, 0.3, 0.2, 0.1]], requires_grad=True)
    entropy = negative_entropy(weights)
    torch.testing.assert_close(entropy, torch.tensor([-1.3862944, 0.0, -1.2798542]))
    entropy.sum().backward()
    assert weights.grad.isfinite().all()
    # The released code takes the softmax of a softmax: one-hot weights come out almost as even as uniform ones.
    double = negative_entropy(weights, legacy_double_softmax=True)
    torch.testing.assert_close(double[:2], torch.tensor([-1.3862944, -1.2683258]), rtol=1e-4, atol=1e-4)


def test_legacy_double_softmax_is_a_config_field(make_model, make_batch):
    model = make_model(balance_loss_weight=1.0)
    batch = make_batch(model)
    single = model(**batch).loss
    model.config.legacy_double_softmax = True
    double = model(**batch).loss
    weights = model(**batch).fusion_weights
    share = torch.tensor([1.0, 1.0]) / 2  # both rows have as many labels
    difference = ((negative_entropy(weights.softmax(-1)) - negative_entropy(weights)) * share).sum()
    torch.testing.assert_close(double - single, difference, rtol=1e-3, atol=1e-5)


def test_a_batch_without_labels_gives_zero_and_not_nan(make_model, make_batch):
    model = make_model(balance_loss_weight=0.5)
    batch = make_batch(model)
    batch["labels"][:] = -100
    loss = model(**batch).loss
    loss.backward()
    assert loss.item() == 0
    assert all(gradient.eq(0).all() for gradient in gradients(model).values())


def test_loss_refuses_shapes_that_do_not_fit():
    head = LanguageModelHead(4, 7)
    states, labels = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"labels has the shape \(2, 2\), expected \(rows, S\) = \(2, 3\)"):
        token_exact_loss(states, labels[:, :2], head)
    weights = torch.full((2, 2), 0.5)
    with pytest.raises(ValueError, match="image_to_sample is None"):
        token_exact_loss(states, labels, head, fusion_weights=weights, balance_loss_weight=1.0)
    with pytest.raises(ValueError, match=r"image_to_sample has the shape \(3,\).*2 images"):
        token_exact_loss(
            states, labels, head, fusion_weights=weights, image_to_sample=torch.zeros(3).long(), balance_loss_weight=1.0
        )


def test_trainer_finds_that_forward_takes_the_number_of_items(make_model):
    parameters = inspect.signature(make_model().forward).parameters
    assert "num_items_in_batch" in parameters
    assert any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


def test_language_models_that_alter_their_logits_are_refused(make_model, text_config):
    config = LlamaConfig(**{**text_config.to_dict(), "final_logit_softcapping": 30.0})
    with pytest.raises(ValueError, match=r"final_logit_softcapping=30\.0 alter their logits"):
        make_model(text_config=config)
