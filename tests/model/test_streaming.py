"""The model over a tower that runs layer by layer: the same numbers, less run and held; and tiles that share a sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ViTMAEConfig

FUSIONS = [{"stage": 1}, {"stage": 2}, {"stage": 1, "groups": [[1], [2, 3, 4]]}, {"type": "llava"}]


class LargestTuple(TorchDispatchMode):
    """The largest number of states that the fused operators were given at once."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in (torch.ops.igva.fuse.default, torch.ops.igva.reduce_groups.default):
            self.count = max(self.count, len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def make_frozen(make_model):
    def make(*args: Any, **kwargs: Any):
        model = make_model(*args, **kwargs)
        model.model.vision_tower.requires_grad_(False)
        return model.train()

    return make


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fusion", FUSIONS, ids=str)
@pytest.mark.parametrize("tower", ["clip", "dinov2"])
def test_streaming_gives_the_bits_of_the_tuple(make_frozen, make_batch, tower, fusion, dtype):
    results = []
    for streaming in (True, False):
        model = make_frozen(tower, {**fusion, "streaming": streaming}).to(dtype)
        batch = make_batch(model)
        results.append(model.get_image_features(batch["pixel_values"].to(dtype), batch["instruction_embeds"].to(dtype)))
    ours, expected = results
    assert torch.equal(ours.pooler_output, expected.pooler_output)
    assert (ours.fusion_weights is None) == (expected.fusion_weights is None)
    assert ours.fusion_weights is None or torch.equal(ours.fusion_weights, expected.fusion_weights)


@pytest.mark.parametrize("frozen", [True, False])
def test_loss_and_gradients_are_the_same(make_model, make_batch, frozen):
    results = []
    for streaming in (True, False):
        model = make_model(fusion={"streaming": streaming}).train()
        model.model.vision_tower.requires_grad_(not frozen)
        loss = model(**make_batch(model)).loss
        loss.backward()
        results.append((loss, gradients(model)))
    (ours, our_grads), (expected, expected_grads) = results
    assert torch.equal(ours, expected) and our_grads.keys() == expected_grads.keys()
    assert any(name.startswith("model.vision_tower.") for name in our_grads) == (not frozen)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(our_grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("frozen", [True, False])
def test_blocks_that_the_plan_does_not_read_are_not_run(make_model, make_batch, frozen):
    # LLaVA-1.5 takes the penultimate layer: the last block is of no use to it.
    model = make_model(fusion={"type": "llava"})
    model.model.vision_tower.requires_grad_(not frozen)
    ran = []
    for index, block in enumerate(model.model.vision_tower.encoder.layers, start=1):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    model(**make_batch(model))
    assert ran == [1, 2, 3]


def test_no_tuple_of_hidden_states_with_a_frozen_tower(make_frozen, make_batch):
    model = make_frozen(fusion={"num_groups": 4})
    with LargestTuple() as largest:
        model(**make_batch(model))
    assert 1 <= largest.count <= 5  # one group of one layer; for the mix 4 means and the base
    model = make_frozen(fusion={"num_groups": 1})
    with LargestTuple() as largest:
        model(**make_batch(model))
    assert largest.count == 4  # the one group is all layers


@pytest.mark.parametrize("setting", ["hooked", "unknown", "off"])
def test_auto_gives_way_to_the_towers_own_forward(make_model, make_batch, make_config, setting):
    if setting == "unknown":
        tower = ViTMAEConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, image_size=28, patch_size=14,
            mask_ratio=0.0,
        )  # fmt: skip
        model = make_model(vision_config=tower, num_prefix_tokens=1)
    else:
        model = make_model(fusion={"streaming": "auto" if setting == "hooked" else False})
    called = []
    if setting == "hooked":
        model.model.vision_tower.register_forward_pre_hook(lambda *_: called.append(True))
    else:
        forward = model.model.vision_tower.forward
        model.model.vision_tower.forward = lambda *args, **kwargs: called.append(True) or forward(*args, **kwargs)
    model(**make_batch(model))
    assert called == [True]


def test_streaming_that_is_insisted_on_and_impossible_is_an_error(make_model, make_batch):
    model = make_model(fusion={"streaming": True})
    model.model.vision_tower.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="cannot run layer by layer: the forward of this CLIPVisionModel has hooks"):
        model(**make_batch(model))


def test_an_unknown_setting_is_refused(make_config):
    with pytest.raises(ValueError, match="streaming must be one of True, False, 'auto', got 'yes'"):
        make_config(fusion={"streaming": "yes"})


def test_the_setting_changes_no_parameter_name(make_model):
    names = [set(make_model(fusion={"streaming": streaming}).state_dict()) for streaming in (True, False)]
    assert names[0] == names[1]


# ---- tiles --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiles(make_frozen, make_batch):
    """Two rows with three and one tiles, a sentence a row."""
    model = make_frozen().eval()
    batch = make_batch(model, (3, 1), length=20)
    shared = {
        **batch,
        "instruction_embeds": batch["instruction_embeds"][[0, 3]],
        "image_to_sentence": torch.tensor([0, 0, 0, 1]),
    }
    repeated = {**batch, "instruction_embeds": batch["instruction_embeds"][[0, 0, 0, 3]]}
    return model, shared, repeated


@pytest.mark.parametrize("stage", [1, 2])
def test_tiles_share_a_sentence(tiles, stage):
    model, shared, repeated = tiles
    model.set_fusion_stage(stage)
    ours, expected = model(**shared), model(**repeated)
    assert torch.equal(ours.loss, expected.loss)
    assert torch.equal(ours.image_hidden_states, expected.image_hidden_states)
    if stage == 2:
        assert torch.equal(ours.fusion_weights, expected.fusion_weights) and ours.fusion_weights.shape == (4, 2)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_generate_with_shared_sentences(tiles, options):
    model, shared, repeated = tiles
    answers = []
    for batch in (shared, repeated):
        torch.manual_seed(0)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        answers.append(model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, **options))
    assert torch.equal(*answers)


def test_sentences_are_not_repeated_with_the_beams(tiles):
    model, shared, _ = tiles
    inputs = {name: shared[name] for name in ("pixel_values", "instruction_embeds", "image_to_sentence")}
    _, expanded = model._expand_inputs_for_generation(expand_size=2, input_ids=shared["input_ids"], **inputs)
    assert expanded["image_to_sentence"].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert torch.equal(expanded["instruction_embeds"], shared["instruction_embeds"])
    assert torch.equal(expanded["pixel_values"][3], shared["pixel_values"][0])
