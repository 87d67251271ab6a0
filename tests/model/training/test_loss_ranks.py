"""Batches without images and without labels: nobody waits for ever, and the gradients are those of one process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

PROGRAM = Path(__file__).with_name("ranks_program.py")
ROOT = Path(__file__).resolve().parents[3]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def trained(make_model, text_config):
    """A model as in stage 2: all but the tower learns; its head has weights of its own, so that it is sharded alone."""
    untied = LlamaConfig(**{**text_config.to_dict(), "tie_word_embeddings": False})
    model = make_model(balance_loss_weight=0.5, text_config=untied)
    model.model.vision_tower.requires_grad_(False)
    return model.train()


# ---- one process --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", [{}, {"stage": 1}, {"type": "llava"}], ids=str)
def test_a_batch_of_text_touches_all_that_learns_and_moves_only_the_language_model(fusion, make_model, make_batch):
    model = make_model(fusion=fusion, balance_loss_weight=0.5).train()
    if fusion.get("stage") == 1:
        model.model.fusion.requires_grad_(False)  # not run in stage 1
    model(**make_batch(model, (1, 1))).loss.backward()
    touched_by_images = set(gradients(model))
    model.zero_grad()
    model(**make_batch(model, (0, 0))).loss.backward()
    # The same parameters, no more: the tower's last norm, say, is read by no fusion.
    assert set(gradients(model)) == touched_by_images > {"model.multi_modal_projector.linear_1.weight"}
    for name, gradient in gradients(model).items():
        assert bool(gradient.any()) == name.startswith(("model.language_model.", "lm_head.")), name


def test_a_batch_of_text_gives_the_same_bits_as_without_the_vision_part(make_model, make_batch):
    model = make_model().train()
    batch = make_batch(model, (0, 0))
    loss = model(**batch).loss
    assert loss.requires_grad
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, loss.detach())
    assert model(**batch).fusion_weights.shape == (0, 2)  # those of the black image are nobody's
    assert model.eval()(**batch).fusion_weights is None


def test_stage_1_can_train_on_a_batch_of_text(make_model, make_batch):
    model = make_model(fusion={"stage": 1}).requires_grad_(False).train()
    model.model.multi_modal_projector.requires_grad_(True)
    model(**make_batch(model, (0, 0))).loss.backward()
    assert set(gradients(model)) == {
        name for name, _ in model.named_parameters() if name.startswith("model.multi_modal_projector.")
    }
    assert not any(gradient.any() for gradient in gradients(model).values())


def test_the_black_image_costs_one_forward_of_the_tower_and_none_where_nothing_of_vision_learns(make_model, make_batch):
    model = make_model().train()
    batch = make_batch(model, (0, 0))
    seen = []
    model.model.vision_tower.embeddings.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    model(**batch)
    assert seen == [1]
    for mode in (model.model.vision_tower, model.model.fusion, model.model.multi_modal_projector):
        mode.requires_grad_(False)
    model(**batch)
    model.eval()(**batch)
    assert seen == [1]


# ---- two processes ------------------------------------------------------------------------------------------------------


def steps_of(model, make_batch):
    """Steps of two ranks each: a rank without images, one without images and labels, and two without images."""
    steps = []
    for number, images in enumerate([((1, 2), (0, 0)), ((0,), (1, 1)), ((1, 0), (0,)), ((0, 0), (0,))]):
        step = [make_batch(model, of_rank, length=20, seed=10 * number + rank) for rank, of_rank in enumerate(images)]
        step[0]["labels"][0, :15] = -100  # unequal counts
        steps.append(step)
    steps[2][1]["labels"][:] = -100
    return steps


def check_head(folder, wrapper, steps):
    """Ranks whose label counts differ, one of them without any, gather the head's weight once and run a chunk at least."""
    chunks = set()
    for rank in range(2):
        passes = json.loads((folder / f"{wrapper}-{rank}.json").read_text())
        assert len(passes) == len(steps), wrapper
        for seen, step in zip(passes, steps, strict=True):
            num_labels = int((step[rank]["labels"][:, 1:] != -100).sum())
            assert seen["calls"] == [num_labels], wrapper
            assert sum(seen["chunks"]) == num_labels and len(seen["chunks"]) >= 1, wrapper
            chunks.add(len(seen["chunks"]))
    assert len(chunks) > 1 and 1 in chunks  # the numbers of chunks do differ


def check_two_ranks(wrappers, trained, make_batch, folder):
    steps = steps_of(trained, make_batch)
    trained.save_pretrained(folder / "model")
    torch.save(steps, folder / "steps.pt")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # DeepSpeed on a CPU without oneCCL: gloo.
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [*launcher, str(PROGRAM), str(folder), *wrappers]
    # The guard ends a hang, which is what this test is about.
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-12000:]
    for wrapper in wrappers:
        check_head(folder, wrapper, steps)
        for number, (step, actual) in enumerate(zip(steps, torch.load(folder / f"{wrapper}.pt"), strict=True)):
            trained.zero_grad()
            num_items = sum((batch["labels"][:, 1:] != -100).sum() for batch in step)
            sum(trained(**batch, num_items_in_batch=num_items).loss for batch in step).backward()
            expected = gradients(trained)
            assert actual.keys() == expected.keys(), wrapper
            for name, gradient in expected.items():
                # fp32 sums in another order, against the largest entry of the tensor.
                tolerance = 1e-5 * float(gradient.abs().max()) + 1e-7
                torch.testing.assert_close(actual[name], gradient, rtol=0, atol=tolerance, msg=f"{wrapper} {number} {name}")


def test_two_ranks_of_which_one_lacks_images_or_labels_give_the_gradients_of_one(trained, make_batch, tmp_path):
    check_two_ranks(("ddp", "fsdp"), trained, make_batch, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed (pip install deepspeed)")
def test_two_ranks_under_zero3_of_which_one_lacks_images_or_labels_give_the_gradients_of_one(trained, make_batch, tmp_path):
    check_two_ranks(("zero3",), trained, make_batch, tmp_path)
