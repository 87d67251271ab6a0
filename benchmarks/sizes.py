"""The sizes that are measured: vision towers with their layer groups, and what one case of the fusion consists of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from igva_kernels import FusionPlan
from igva_kernels.plan import equal_groups


@dataclass(frozen=True)
class Tower:
    """What the fusion sees of a vision tower.

    Args:
        name: printed in tables.
        num_layers: L.
        num_patches: N.
        num_prefix_tokens: P, 0 for a tower without CLS.
        vision_dim: D.
        num_groups: K; must divide L.
    """

    name: str
    num_layers: int
    num_patches: int
    num_prefix_tokens: int
    vision_dim: int
    num_groups: int

    @property
    def num_tokens(self) -> int:
        return self.num_patches + self.num_prefix_tokens

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        return equal_groups(self.num_layers, self.num_groups)

    def plan(self, stage: int = 2) -> FusionPlan:
        """IGVA in the released order (base first), so that the official formulation produces the same layout."""
        make = FusionPlan.igva if stage == 2 else FusionPlan.igva_average
        return make(self.num_layers, self.num_groups, order="base_first")


CLIP_L_336 = Tower("CLIP-L/14-336", 24, 576, 1, 1024, 4)
SIGLIP_SO400M_384 = Tower("SigLIP-so400m/14-384", 27, 729, 0, 1152, 3)
DINOV2_L_518 = Tower("DINOv2-L/14-518 with registers", 24, 1369, 5, 1024, 4)
TINY = Tower("tiny", 4, 6, 1, 32, 2)
TINY_NO_PREFIX = Tower("tiny without prefix", 6, 5, 0, 48, 3)


@dataclass(frozen=True)
class FuseCase:
    """One measurement of the fusion.

    Args:
        tower: sizes of the hidden states.
        batch: B.
        dtype: dtype of the hidden states. The weights are float32 with values that bfloat16 holds exactly, so that the official
            formulation, which casts them to the model's dtype, computes the same mix.
        stage: 2 (weighted) or 1 (plain average).
        mode: "forward" (no graph), "frozen" (forward and backward to the weights), "trainable" (to the hidden states as well),
            or the backward of one of these alone, behind a forward that is not timed.
    """

    tower: Tower
    batch: int
    dtype: torch.dtype
    stage: int = 2
    mode: str = "forward"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {self.mode!r}")
        if self.stage == 1 and self.mode.startswith("frozen"):
            raise ValueError("stage 1 has no weights: with a frozen tower there is no backward to measure")

    @property
    def trains_states(self) -> bool:
        """Whether the hidden states have gradients."""
        return self.mode.startswith("trainable")

    @property
    def backward_alone(self) -> bool:
        """Whether the forward is left out of the time, the bytes and the memory."""
        return self.mode in BACKWARD_MODES

    @property
    def map_bytes(self) -> int:
        """Bytes of one (B, N, D) map: the unit in which reads, writes and memory are counted."""
        return self.batch * self.tower.num_patches * self.tower.vision_dim * self.dtype.itemsize

    @property
    def input_bytes(self) -> int:
        """Bytes of the hidden states that the plan reads, prefix rows included."""
        tower = self.tower
        return len(tower.plan(self.stage).sources) * self.batch * tower.num_tokens * tower.vision_dim * self.dtype.itemsize

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.tower.name} B={self.batch} {dtype} stage {self.stage} {self.mode}"


BACKWARD_MODES = ("frozen backward", "trainable backward")
MODES = ("forward", "frozen", "trainable", *BACKWARD_MODES)


@dataclass
class FuseInputs:
    """Random inputs of one case: L + 1 separate hidden states, weights (B, K) or None, and a cotangent (B, N, 2D)."""

    hidden_states: list[Tensor]
    weights: Tensor | None
    cotangent: Tensor


def make_inputs(case: FuseCase, device: torch.device, seed: int) -> FuseInputs:
    """Draw the inputs of a case.

    Normal values, not constants: the clock of a GPU, and with it the bandwidth, depends on how many bits toggle.
    """
    tower = case.tower
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    hidden_states = [normal(case.batch, tower.num_tokens, tower.vision_dim) for _ in range(tower.num_layers + 1)]
    weights = None
    if case.stage == 2:
        weights = torch.softmax(normal(case.batch, tower.num_groups, dtype=torch.float32), -1).bfloat16().float()
    if case.trains_states:
        for state in hidden_states:
            state.requires_grad_()
    if case.mode != "forward" and weights is not None:
        weights.requires_grad_()
    return FuseInputs(hidden_states, weights, normal(case.batch, tower.num_patches, 2 * tower.vision_dim))
