"""One step of the trainer with accumulation 1 and 4, on one rank and two, padded and packed: the same gradient.

The samples have unequal numbers of labels, of images and of tokens, so that a mean of means, or a balance term multiplied by
accumulation and ranks, would be off by tens of percent.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).with_name("steps_program.py")
ROOT = Path(__file__).resolve().parents[3]
BATCH_SIZE = 8
#: Images and labels of each sample.
SAMPLES = ((1, 3), (0, 20), (2, 7), (1, 1), (1, 14), (0, 2), (3, 5), (1, 9))


@pytest.fixture
def folder(make_model, tmp_path):
    """A model and eight samples where the program looks for them."""
    network = make_model(balance_loss_weight=2.0)
    config, generator, samples = network.config, torch.Generator().manual_seed(0), []
    for images, labels in SAMPLES:
        tokens = images * config.num_image_tokens
        input_ids = torch.randint(0, 256, (1 + tokens + 4 + labels,), generator=generator)
        input_ids[1 : 1 + tokens] = config.image_token_id
        target = torch.full_like(input_ids, -100)
        target[-labels:] = input_ids[-labels:]
        sample = {"input_ids": input_ids, "labels": target}
        if images:
            side = config.image_size
            sample["pixel_values"] = torch.randn(images, 3, side, side, generator=generator)
            sample["instruction_embeds"] = torch.randn(images, 16, generator=generator)
        samples.append(sample)
    network.save_pretrained(tmp_path / "model")
    torch.save(samples, tmp_path / "samples.pt")
    return tmp_path


def run(folder, *launcher):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(PROGRAM), str(folder), str(BATCH_SIZE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=environment)  # a hang guard
    assert done.returncode == 0, done.stderr[-3000:]


def by_the_design_s_formula(network, folder):
    """Σ_b (ce_sum_b + λ · n_b · balance_b) / Σ_b n_b with each sample by itself, its gradients, and the two means."""
    cross_entropy = balance = torch.zeros(())
    samples = torch.load(folder / "samples.pt")
    for sample, (_, labels) in zip(samples, SAMPLES, strict=True):
        batch = {
            name: value if name in ("pixel_values", "instruction_embeds") else value[None] for name, value in sample.items()
        }
        out = network(**batch, return_logits=True)
        cross_entropy = cross_entropy + torch.nn.functional.cross_entropy(
            out.logits[0, :-1], sample["labels"][1:], ignore_index=-100, reduction="sum"
        )
        if "pixel_values" in sample:
            weights = out.fusion_weights
            balance = balance + labels * (weights * weights.log()).sum(1).mean()
    total = sum(labels for _, labels in SAMPLES)
    ((cross_entropy + network.config.balance_loss_weight * balance) / total).backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return gradients, cross_entropy.item() / total, balance.item() / total


def check(folder, make_model, ranks):
    network = make_model(balance_loss_weight=2.0)
    network.model.vision_tower.requires_grad_(False)
    expected, cross_entropy, balance = by_the_design_s_formula(network, folder)
    for accumulation in (1, 4):
        for layout in ("padded", "packed"):
            case = f"{ranks}-{accumulation}-{layout}"
            result = torch.load(folder / f"{case}.pt")
            assert result["loss"] == pytest.approx(cross_entropy, rel=1e-4), case
            assert result["balance"] == pytest.approx(balance, rel=1e-4), case
            assert result["held_out"] == pytest.approx(cross_entropy, rel=1e-5), case
            assert result["gradients"].keys() == expected.keys(), case
            for name, gradient in expected.items():
                # fp32 sums in another order, against the largest entry of the tensor.
                tolerance = 1e-4 * float(gradient.abs().max()) + 1e-7
                torch.testing.assert_close(result["gradients"][name], gradient, rtol=0, atol=tolerance, msg=f"{case} {name}")


def test_accumulation_and_packing_give_the_gradient_of_the_formula(folder, make_model):
    run(folder)
    check(folder, make_model, ranks=1)


@pytest.mark.slow
def test_two_ranks_give_the_gradient_of_the_formula(folder, make_model):
    run(folder, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    check(folder, make_model, ranks=2)
