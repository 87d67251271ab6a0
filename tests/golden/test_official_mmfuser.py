"""The MMFuser block against outputs and gradients of the released code (README.md here says how they were made).

Rule: in float64 the results agree to rounding. In float32 our largest error against the official float64 result is at most
twice the largest error of the official float32 result, plus ``ULPS`` units of ``eps * max|expected|``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from igva_kernels.modules.mmfuser import MMFuserFusion, mmfuser_from_official

FOLDER = Path(__file__).parent
CASES = ("mmfuser_four_levels", "mmfuser_odd_sizes")
IMPLS = ("reference", "torch")
DTYPES = (torch.float32, torch.float64)

ULPS = 16
"""Two attentions of four matrix products each: the official float32 gradients are up to 9 units from its float64 ones."""

RTOL_FLOAT64 = 2e-13
"""About a thousand roundings of float64: any wrong term, index or order is far above it."""


@dataclass(frozen=True)
class Golden:
    """One file: its tensors, and the sizes from its metadata."""

    tensors: dict[str, Tensor]
    sizes: dict

    @property
    def official_block(self) -> dict[str, Tensor]:
        prefix = "input.block."
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}

    def fusion(self, dtype: torch.dtype, impl: str = "auto") -> MMFuserFusion:
        """The block, fed with every second layer of a tower."""
        levels = self.sizes["levels"]
        fusion = MMFuserFusion(
            range(1, 2 * levels + 2, 2),
            self.sizes["width"],
            self.sizes["heads"],
            self.sizes["points"],
            num_layers=2 * levels + 2,
            impl=impl,
        )
        fusion.load_official_state_dict(self.official_block)
        return fusion.to(dtype)

    def hidden_states(self, fusion: MMFuserFusion, sources: list[Tensor]) -> list[Tensor | None]:
        """The sources where the block looks for them, after two prefix rows of NaN; None everywhere else."""
        states: list[Tensor | None] = [None] * (fusion.num_layers + 1)
        for layer, source in zip(fusion.layers, sources, strict=True):
            states[layer] = torch.cat((source.new_full((source.shape[0], 2, source.shape[2]), float("nan")), source), dim=1)
        return states

    def check(self, actual: Tensor, key: str) -> None:
        exact = self.tensors[f"float64.{key}"]
        assert actual.shape == exact.shape
        scale = exact.abs().max().item()
        worst = (actual.detach().double() - exact).abs().max().item()
        allowed = RTOL_FLOAT64 * scale
        if actual.dtype == torch.float32:
            official_error = (self.tensors[f"float32.{key}"].double() - exact).abs().max().item()
            allowed = 2 * official_error + ULPS * torch.finfo(torch.float32).eps * scale
        assert worst <= allowed, f"{key}: error {worst:.3e} exceeds the allowance {allowed:.3e} (scale {scale:.3e})"


@pytest.fixture(params=CASES)
def golden(request: pytest.FixtureRequest) -> Golden:
    with safe_open(FOLDER / f"{request.param}.safetensors", framework="pt") as file:
        return Golden({key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["case"]))  # noqa: SIM118


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_output_and_every_gradient(golden: Golden, impl: str, dtype: torch.dtype) -> None:
    fusion = golden.fusion(dtype, impl)
    sources = [source.to(dtype).requires_grad_() for source in golden.tensors["input.sources"].unbind(0)]
    output = fusion(golden.hidden_states(fusion, sources), num_prefix_tokens=2)
    output.backward(golden.tensors["input.cotangent"].to(dtype))
    golden.check(output, "output")
    golden.check(torch.stack([source.grad for source in sources]), "grad.sources")
    gradients = fusion.official_state_dict()
    assert set(gradients) == set(golden.official_block)
    ours = mmfuser_from_official({name: name for name in gradients})
    parameters = dict(fusion.named_parameters())
    for name, official in ours.items():
        golden.check(parameters[name].grad, f"grad.block.{official}")


def test_official_names_there_and_back(golden: Golden) -> None:
    prefix = "model.mm_projector.0."
    checkpoint = {prefix + name: tensor for name, tensor in golden.official_block.items()}
    checkpoint["model.mm_projector.1.weight"] = torch.zeros(3, 3)  # the projector after the block
    fusion = golden.fusion(torch.float32)
    fusion.load_official_state_dict(checkpoint, prefix)
    back = fusion.official_state_dict(prefix)
    assert set(back) == set(checkpoint) - {"model.mm_projector.1.weight"}
    assert all(torch.equal(back[name], checkpoint[name]) for name in back)
    with pytest.raises(ValueError, match=r"no name in the state dict begins with prefix='mm_projector\.0\.'"):
        fusion.load_official_state_dict(checkpoint, "mm_projector.0.")
    with pytest.raises(RuntimeError, match="cross_scale"):
        del checkpoint[prefix + "gamma1"]
        fusion.load_official_state_dict(checkpoint, prefix)


def test_no_name_that_transformers_rewrites(golden: Golden) -> None:
    assert not [name for name in golden.fusion(torch.float32).state_dict() if "gamma" in name or "beta" in name]
