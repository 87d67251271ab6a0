"""Towers that are trained: only the hidden states that a plan reads, with gradients and activation checkpointing."""

from __future__ import annotations

import pytest
import torch

from igva_kernels import FusionPlan, fuse
from igva_kernels.towers import selected_hidden_states


def test_states_are_those_of_the_tower(case, tuple_of):
    plan = FusionPlan.igva(4, groups=[[1], [3]], base=2)
    states = selected_hidden_states(case.tower, case.pixel_values, plan, **case.inputs)
    expected = tuple_of(case)
    assert len(states) == 5 and states[0] is None and states[4] is None
    assert all(torch.equal(states[layer], expected[layer]) for layer in (1, 2, 3))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_tuple_path(make_case, checkpointing):
    plan = FusionPlan.igva(4, groups=[[1], [2, 3]], base=-2)
    grads = []
    for selected in (True, False):
        case = make_case("dinov2")
        tower = case.tower.requires_grad_(True).train()
        if checkpointing and selected:
            # GradientCheckpointingLayer of transformers, as its enabling methods set it (their name changed in 5.23)
            tower._set_gradient_checkpointing(
                gradient_checkpointing_func=lambda f, *a: torch.utils.checkpoint.checkpoint(f, *a, use_reentrant=False)
            )
        if selected:
            states = selected_hidden_states(tower, case.pixel_values, plan)
        else:
            states = tower(case.pixel_values, output_hidden_states=True).hidden_states
        fuse(states, plan, torch.tensor([0.3, 0.7]), num_prefix_tokens=1).square().mean().backward()
        grads.append({name: parameter.grad for name, parameter in tower.named_parameters() if parameter.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 30
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], msg=name)
    assert not any(".layer.3." in name for name in grads[0])  # block 4 is not read


def test_checkpointed_blocks_run_again_in_the_backward_and_unused_ones_never(make_case):
    case = make_case("clip_vision_model")
    tower = case.tower.requires_grad_(True).train()
    tower._set_gradient_checkpointing(
        gradient_checkpointing_func=lambda f, *a: torch.utils.checkpoint.checkpoint(f, *a, use_reentrant=False)
    )
    runs = [0] * 4
    for index, block in enumerate(tower.encoder.layers):
        # Of its first part: the versions differ in whether the block's own hooks run twice, and checkpoints stop early.
        block.layer_norm1.register_forward_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    plan = FusionPlan.llava(4)
    fuse(selected_hidden_states(tower, case.pixel_values, plan), plan, num_prefix_tokens=1).sum().backward()
    assert runs == [2, 2, 2, 0]


def test_wrong_depth_is_refused(make_case):
    case = make_case("vit")
    with pytest.raises(ValueError, match="plan is for 8 layers, but the tower has 4 blocks"):
        selected_hidden_states(case.tower, case.pixel_values, FusionPlan.llava(8))
