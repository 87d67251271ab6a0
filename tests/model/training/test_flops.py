"""The operations of a step, against torch's own counter on the step itself."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model._hf_compat import enable_activation_checkpointing
from model.training.flops import StepFlops, peak_of, peak_of_run
from model.training.freeze import apply_stage
from model.training.lora import add_lora
from model.training.recipe import LoraSettings

ROWS, LENGTH, LABELS = 3, 24, 12


def counted(model, batch):
    """Operations of one step by torch's counter, which takes attention at the whole square of the length."""
    with FlopCounterMode(display=False) as counter:
        model(**batch, use_cache=False).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("stage", "training"), [(1, "frozen"), (2, "full"), (2, "lora")])
def test_the_count_is_that_of_torch_s_counter(stage, training, checkpointing, make_model, make_batch):
    model = make_model(fusion={"type": "llava", "layer": -2})  # a copied layer: the fusion itself has no product
    if training == "lora":
        add_lora(model, LoraSettings(r=4, alpha=8, dropout=0.0))
    apply_stage(model, stage, training)
    model.train()
    for part in (model.model.language_model, model.model.vision_tower):
        part.set_attn_implementation("eager")  # as products, which the counter knows on every device
    batch = make_batch(model, (1, 0, 2), length=LENGTH)
    flops = StepFlops.of(model)
    expected = flops.total(ROWS * LENGTH, 2 * ROWS * LENGTH**2, int((batch["labels"][:, 1:] != -100).sum()), 3)
    without = counted(model, batch)
    # The counter sees the product of rotary frequencies with positions, and what autograd skips: the first layer's input
    # gradient at text and the projector's.
    assert without == pytest.approx(expected, rel=0.03)
    if checkpointing:
        enable_activation_checkpointing(model.model.language_model)
        assert counted(model, batch) > 1.15 * without  # what is computed again is no work that the step needs
        assert StepFlops.of(model) == flops


def test_a_frozen_model_costs_no_gradient_of_its_weights(make_model):
    model = make_model()
    apply_stage(model, 1)
    frozen = StepFlops.of(model)
    apply_stage(model, 2, "full")
    full = StepFlops.of(model)
    assert full.per_token == pytest.approx(1.5 * frozen.per_token)
    assert full.per_label == pytest.approx(1.5 * frozen.per_label)
    assert full.per_squared_length == frozen.per_squared_length


def test_a_tower_that_ends_early_costs_less(make_model):
    deep, shallow = (make_model(fusion={"type": "llava", "layer": layer}).requires_grad_(False) for layer in (-1, 2))
    projector = 4 * 2 * 2 * (32 * 64 + 64 * 64)  # tokens of an image, forward and the gradient of the input
    patches = 2 * 3 * 14 * 14 * 32 * 4
    both = [StepFlops.of(model).per_image - projector - patches for model in (deep, shallow)]
    assert both[0] == 2 * both[1] > 0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", None),
        ("NVIDIA GB200", None),
        ("AMD Instinct MI300X", 1307e12),
        ("A card of tomorrow", None),
    ],
)
def test_the_peak_of_a_card_is_known_by_its_name_or_not_at_all(name, peak):
    assert peak_of(name) == peak


def test_nothing_is_claimed_where_there_is_no_peak_to_hold_against(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert peak_of_run(torch.device("cuda"), "bf16") == 312e12
    assert peak_of_run(torch.device("cuda"), "fp32") is None
    assert peak_of_run(torch.device("cpu"), "bf16") is None
