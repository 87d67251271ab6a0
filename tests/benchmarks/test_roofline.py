"""The byte counts that every share of the bandwidth rests on, against sums done by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.roofline import Traffic, backward_traffic, case_traffic, forward_traffic, official_forward_traffic
from benchmarks.sizes import CLIP_L_336, SIGLIP_SO400M_384, FuseCase
from igva_kernels import FusionPlan

BF16 = torch.bfloat16


def test_clip_forward_is_24_reads_and_2_writes() -> None:
    case = FuseCase(CLIP_L_336, 16, BF16)
    traffic = case_traffic(case)
    assert case.map_bytes == 16 * 576 * 1024 * 2
    assert (traffic.reads, traffic.writes) == (24, 2)
    assert traffic.bytes == 490_733_568
    assert traffic.seconds(3.0e12) == pytest.approx(163.6e-6, rel=1e-3)


def test_clip_frozen_keeps_the_means() -> None:
    """24 + 2 + 4 kept; backward: the cotangent of the mixed slot and 4 means."""
    traffic = case_traffic(FuseCase(CLIP_L_336, 16, BF16, mode="frozen"))
    assert (traffic.reads, traffic.writes) == (24 + 1 + 4, 2 + 4)


def test_recomputing_costs_51_maps() -> None:
    program = CLIP_L_336.plan().program
    traffic = forward_traffic(program, 1) + backward_traffic(program, 1, weights=True, states=False, saved_means=False)
    assert traffic.maps == 26 + 25


def test_clip_trainable_writes_one_gradient_a_class() -> None:
    """Four groups, and the penultimate layer that is copied as well: five tensors of (B, T, D)."""
    traffic = case_traffic(FuseCase(CLIP_L_336, 16, BF16, mode="trainable"))
    assert (traffic.reads, traffic.writes) == (24 + 2 + 4, 2 + 4 + 5)
    assert traffic.extra_bytes == 5 * 16 * 1024 * 2  # one CLS row for each image and class


def test_stage_one_has_two_classes_and_no_weights() -> None:
    traffic = case_traffic(FuseCase(CLIP_L_336, 16, BF16, stage=1, mode="trainable"))
    assert (traffic.reads, traffic.writes) == (24 + 2, 2 + 2)


def test_a_copied_layer_outside_the_groups_is_read_as_well() -> None:
    program = FusionPlan.igva(4, groups=[[1, 2], [3]], num_groups=2, base=0).program
    assert forward_traffic(program, 1).reads == 4


def test_backward_alone_is_the_rest_of_both_passes() -> None:
    frozen = case_traffic(FuseCase(CLIP_L_336, 16, BF16, mode="frozen backward"))
    assert (frozen.reads, frozen.writes) == (1 + 4, 0)  # the cotangent of the mixed slot and 4 means
    trainable = case_traffic(FuseCase(CLIP_L_336, 16, BF16, mode="trainable backward"))
    assert (trainable.reads, trainable.writes) == (2 + 4, 5)
    assert trainable.extra_bytes == 5 * 16 * 1024 * 2


def test_siglip_has_no_prefix_rows() -> None:
    traffic = case_traffic(FuseCase(SIGLIP_SO400M_384, 1, BF16, mode="trainable"))
    assert traffic.reads == 27 + 2 + 3 and traffic.extra_bytes == 0


def test_the_official_forward_moves_101_maps() -> None:
    """76 for the groups' stacks and means, 8 to stack them, 8 for the product, 5 for the sum, 4 to concatenate."""
    assert official_forward_traffic(FuseCase(CLIP_L_336, 16, BF16)).maps == 76 + 8 + 8 + 5 + 4


def test_maps_of_different_size_do_not_add() -> None:
    with pytest.raises(ValueError, match="cannot be added"):
        Traffic(1, 1, 10) + Traffic(1, 1, 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "backward"}, "mode"),
        ({"stage": 1, "mode": "frozen"}, "stage 1"),
        ({"stage": 1, "mode": "frozen backward"}, "stage 1"),
    ],
)
def test_impossible_cases_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FuseCase(CLIP_L_336, 1, BF16, **arguments)
