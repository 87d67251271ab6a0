"""How many bytes a fusion has to move, counted from its plan alone: the floor under every measured time.

The unit is one (B, N, D) map in the dtype of the hidden states. The prefix rows are skipped by the forward and not counted; the
gradients of the hidden states are full (B, T, D) tensors, so there they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from igva_kernels.program import CopySlot, MixProgram

from .sizes import FuseCase


@dataclass(frozen=True)
class Traffic:
    """Maps and bytes that one pass must read and write.

    Args:
        reads: maps read.
        writes: maps written.
        extra_bytes: bytes beside whole maps (prefix rows of gradients).
        map_bytes: bytes of one map.
    """

    reads: int
    writes: int
    map_bytes: int
    extra_bytes: int = 0

    @property
    def maps(self) -> int:
        return self.reads + self.writes

    @property
    def bytes(self) -> int:
        return self.maps * self.map_bytes + self.extra_bytes

    def seconds(self, bytes_per_second: float) -> float:
        """The floor at a bandwidth."""
        return self.bytes / bytes_per_second

    def __add__(self, other: Traffic) -> Traffic:
        if self.map_bytes != other.map_bytes:
            raise ValueError(f"maps of {self.map_bytes} and {other.map_bytes} bytes cannot be added")
        return Traffic(
            self.reads + other.reads, self.writes + other.writes, self.map_bytes, self.extra_bytes + other.extra_bytes
        )


def forward_traffic(program: MixProgram, map_bytes: int, *, save_means: bool = False) -> Traffic:
    """Every source once, every slot once, and the group means where they are kept for the backward."""
    kept = program.num_weighted_groups if save_means else 0
    return Traffic(program.num_sources, len(program.slots) + kept, map_bytes)


def backward_traffic(
    program: MixProgram, map_bytes: int, *, weights: bool, states: bool, saved_means: bool, token_ratio: float = 1.0
) -> Traffic:
    """What the gradients need.

    Args:
        weights: dL/dw: the cotangent of the mixed slots and the group means, saved or rebuilt from their sources.
        states: dL/dh: the cotangent of all slots (shared with dL/dw), one written tensor per gradient class.
        saved_means: whether the means were kept by the forward.
        token_ratio: T / N.
    """
    mixed = sum(not isinstance(slot, CopySlot) for slot in program.slots)
    reads = len(program.slots) if states else mixed if weights else 0
    if weights:
        weighted = program.groups[: program.num_weighted_groups]
        reads += len(weighted) if saved_means else len({source for group in weighted for source in group})
    writes = len(program.gradient_classes) if states else 0
    return Traffic(reads, writes, map_bytes, round(writes * map_bytes * (token_ratio - 1)))


def case_traffic(case: FuseCase) -> Traffic:
    """The least traffic of a case: the group means are kept for dL/dw where that is less than reading the sources again."""
    program = case.tower.plan(case.stage).program
    if case.mode == "forward":
        return forward_traffic(program, case.map_bytes)
    ratio = case.tower.num_tokens / case.tower.num_patches
    weights = case.stage == 2
    options = [
        forward_traffic(program, case.map_bytes, save_means=saved)
        + backward_traffic(
            program,
            case.map_bytes,
            weights=weights,
            states=case.mode == "trainable",
            saved_means=saved,
            token_ratio=ratio,
        )
        for saved in ((False, True) if weights else (False,))
    ]
    return min(options, key=lambda traffic: traffic.bytes)


def official_forward_traffic(case: FuseCase) -> Traffic:
    """What the official eager formulation moves in its forward, one pass per operation, prefix rows not counted.

    Per group of n layers: the stack reads and writes n maps, the mean reads n and writes 1. Then the stack of the K groups
    (K + K), the product (K + K; not in stage 1), the sum or mean over the groups (K + 1), the concatenation (2 + 2).
    """
    groups = case.tower.groups
    num_groups = len(groups)
    layers = sum(len(group) for group in groups)
    reads, writes = 2 * layers, layers + num_groups
    reads, writes = reads + num_groups, writes + num_groups
    if case.stage == 2:
        reads, writes = reads + num_groups, writes + num_groups
    reads, writes = reads + num_groups, writes + 1
    return Traffic(reads + 2, writes + 2, case.map_bytes)
