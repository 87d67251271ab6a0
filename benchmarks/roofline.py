"""How long a fusion must take, and how long it should: bytes from its plan, instructions from its machine code.

Bytes: the unit is one (B, N, D) map in the dtype of the hidden states. The prefix rows are skipped by the forward and not
counted; the gradients of the hidden states are full (B, T, D) tensors, so there they are.

Time: :func:`predict` is a static model, to be confirmed or refuted by a measurement. A launch takes as long as the slower of
memory and instruction issue, a start, and one program from its first load to its last store, in which the memory is filled
and drained. Memory runs at the bandwidth of a copy, if enough bytes are under way: by Little's law, bandwidth times latency.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from igva_kernels.program import CopySlot, MixProgram

from .cards import Card
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


def normalised_forward_traffic(program: MixProgram, map_bytes: int, *, training: bool = False) -> Traffic:
    """With a norm behind the mix, in the same pass: :func:`forward_traffic`, and in training the mix before the norm."""
    forward = forward_traffic(program, map_bytes)
    return forward + Traffic(0, len(program.slots), map_bytes) if training else forward


def norm_backward_traffic(program: MixProgram, map_bytes: int, *, mix: bool) -> Traffic:
    """The backward of that norm: the gradient and the mix are read, and where ``mix``, dL/d(mix) is written."""
    return Traffic(2 * len(program.slots), len(program.slots) if mix else 0, map_bytes)


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
    """The least traffic of a case: the group means are kept for dL/dw where that is less than reading the sources again.

    What is kept is decided by both passes together, also where the backward is counted alone.
    """
    program = case.tower.plan(case.stage).program
    if case.mode == "forward":
        return forward_traffic(program, case.map_bytes)
    ratio = case.tower.num_tokens / case.tower.num_patches
    weights = case.stage == 2
    options = []
    for saved in (False, True) if weights else (False,):
        forward = forward_traffic(program, case.map_bytes, save_means=saved)
        backward = backward_traffic(
            program, case.map_bytes, weights=weights, states=case.trains_states, saved_means=saved, token_ratio=ratio
        )
        options.append((forward + backward, backward))
    both, backward = min(options, key=lambda passes: passes[0].bytes)
    return backward if case.backward_alone else both


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


# ---- time -------------------------------------------------------------------------------------------------------------

START_S = 2e-6
"""From the end of one kernel to the first instruction of the next on a busy stream. ASSUMED; the first thing to correct."""


@dataclass(frozen=True)
class KernelCode:
    """One kernel, compiled for one target.

    Args:
        instructions: that one warp issues to the vector units and to memory.
        registers: of one thread.
        threads: of one program.
        warp_size: threads that share an instruction.
        loads_in_flight: 16-byte loads of one thread that are under way at once, at most, in the order of the code.
        loads: 16-byte loads of one thread.
        programs_per_image: programs of one launch over B.
        loops: whether the code jumps backwards; ``instructions`` is then a lower bound.
        shared_bytes: shared memory of one program; 0 also where it is not recorded.
    """

    instructions: int
    registers: int
    threads: int
    warp_size: int
    loads_in_flight: int
    loads: int
    programs_per_image: int
    loops: bool
    shared_bytes: int = 0

    def as_dict(self) -> dict[str, int | bool]:
        return asdict(self)


@dataclass(frozen=True)
class Prediction:
    """What the model says of one launch.

    Args:
        seconds: of the launch, from the end of the one before.
        floor_s: its bytes at the bandwidth of a copy.
        nominal_s: its bytes at the bandwidth of the data sheet.
        memory_s: its bytes at the bandwidth that the loads under way allow, at most that of a copy.
        issue_s: its instructions.
        tail_s: one program by itself.
        resident_programs: of one processor, as many as its registers, threads and shared memory allow.
        waves: programs of the launch over those that are resident at once. The last one may be partial: few programs then share
            the card, and Little's law may find too few bytes under way.
        bytes_in_flight: that the loads of one processor's programs keep under way at most.
        bytes_needed: by Little's law, of one processor.
    """

    seconds: float
    floor_s: float
    nominal_s: float
    memory_s: float
    issue_s: float
    tail_s: float
    resident_programs: int
    waves: float
    bytes_in_flight: float
    bytes_needed: float


def predict(code: KernelCode, card: Card, batch: int, num_bytes: int, *, copy_bytes_per_s: float | None = None) -> Prediction:
    """The time of one launch.

    Args:
        code: the kernel, compiled for the card's target.
        batch: B.
        num_bytes: its least bytes.
        copy_bytes_per_s: measured on the card at hand; the table's by default.
    """
    bandwidth = copy_bytes_per_s or card.copy_bytes_per_s
    programs = code.programs_per_image * batch
    registers = math.ceil(code.registers / card.register_unit) * card.register_unit * code.threads
    resident = min(card.registers // registers, card.threads // code.threads, card.programs)
    if code.shared_bytes:
        resident = min(resident, card.shared_bytes // (code.shared_bytes + card.shared_reserved))
    waves = programs / (card.processors * resident)
    in_flight = min(1, waves) * resident * code.threads * code.loads_in_flight * LOAD_BYTES
    memory_s = 0.0
    for share in (math.floor(waves), waves % 1):  # the full waves, and a partial one that does not fill the card
        if share:
            under_way = min(1, share) * resident * code.threads * code.loads_in_flight * LOAD_BYTES
            bytes_per_s = min(bandwidth, under_way * card.processors / card.latency_s)
            memory_s += num_bytes * (share / waves) / bytes_per_s
    warps = programs * code.threads // code.warp_size
    issue_s = warps * code.instructions / (card.processors * card.issue_per_clock * card.clock_hz)
    # a program alone waits for each batch of its loads in turn
    tail_s = card.latency_s * math.ceil(code.loads / max(1, code.loads_in_flight))
    return Prediction(
        seconds=START_S + max(memory_s, issue_s) + tail_s,
        floor_s=num_bytes / bandwidth,
        nominal_s=num_bytes / card.nominal_bytes_per_s,
        memory_s=memory_s,
        issue_s=issue_s,
        tail_s=tail_s,
        resident_programs=resident,
        waves=waves,
        bytes_in_flight=in_flight,
        bytes_needed=bandwidth * card.latency_s / card.processors,
    )


LOAD_BYTES = 16
"""Of one load: every access of the library is 128 bits wide (``tests/aot``)."""
