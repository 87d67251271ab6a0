"""The authors' formulations, and the adapters of public kernels against functions with the signatures of these."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from benchmarks import family
from benchmarks.context import Context
from benchmarks.parts import family as part
from benchmarks.sizes import CLIP_L_336, TINY
from igva_kernels import FusionPlan

CPU = torch.device("cpu")


def test_dense_connector_with_the_numbers_of_the_released_code() -> None:
    states = [torch.randn(2, 5, 8) for _ in range(25)]
    sci = family.dense_connector_sci(FusionPlan.dense_connector_sci(24))(states, None, 1)
    assert torch.equal(sci, torch.cat([states[23][:, 1:], states[7][:, 1:], states[15][:, 1:]], dim=-1))
    dci = family.dense_connector_dci(FusionPlan.dense_connector_dci(24))(states, None, 1)
    first, second = (sum(states[layer][:, 1:] for layer in range(begin, begin + 12)) / 12 for begin in (0, 12))
    torch.testing.assert_close(dci, torch.cat([states[23][:, 1:], first, second], dim=-1))
    (published,) = (mix for mix in family.MIXES if mix.name == "DenseConnector SCI")
    assert published.plan(24) == FusionPlan.dense_connector_sci(24)


def test_floors_of_the_family() -> None:
    map_bytes = 1000
    mixes = {mix.name: mix for mix in family.MIXES}

    def maps(name: str, mode: str) -> int:
        return family.mix_traffic(mixes[name], CLIP_L_336, map_bytes, mode).maps

    assert maps("DenseConnector DCI", "forward") == 24 + 3
    assert maps("DenseConnector DCI", "trainable") == 24 + 3 + 3 + 3  # three slots' gradients, three classes
    assert maps("TGIF", "forward") == 24 + 1
    assert maps("TGIF", "frozen") == 24 + 1 + 24 + 1  # the states once more, and the gradient of the slot
    assert maps("MoL per token", "forward") == 3 + 1
    assert maps("MoL per token", "frozen") == 3 + 1 + 3 + 1
    assert maps("mean of normalised layers", "trainable") == 24 + 1 + 24 + 1 + 24  # every layer has a gradient of its own


def test_floors_with_a_norm_behind() -> None:
    tgif, vip_llava = family.MIXES_WITH_NORMS

    def maps(mix: family.Mix, mode: str) -> int:
        return family.normalised_traffic(mix, CLIP_L_336, 1000, mode).maps

    assert vip_llava.plan(24) == FusionPlan.vip_llava(24)
    assert maps(tgif, "forward") == 24 + 1 and maps(vip_llava, "forward") == 5 + 5
    # the mix is kept, read with the output's gradient, and its own gradient written and read beside the states
    assert maps(tgif, "frozen") == 24 + 2 + 3 + 1 + 24
    assert maps(vip_llava, "frozen") == 5 + 10 + 10  # no gradient of the mix: nothing in it learns


@pytest.mark.parametrize("mode", ["forward", "frozen"])
@pytest.mark.parametrize("mix", family.MIXES_WITH_NORMS, ids=lambda mix: mix.name)
def test_a_mix_with_its_norm_is_measured(mix: family.Mix, mode: str, context: Context) -> None:
    part.measure_mix_with_norm(context, mix, TINY, 1, mode)
    cases = {case["parameters"]["variant"]: case for case in context.recorder.document["cases"]}
    assert {case["status"] for case in cases.values()} == {"ok"}, cases
    assert {part.OURS, f"{part.OURS}, torch's norm"} < set(cases)


@pytest.fixture
def public_kernels(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Stand-ins with the signatures that were read in both projects; what they got."""
    got: list[tuple] = []

    def fused_attnres(
        query, residuals, rms_weight, output_rms_weight=None, rms_eps=1e-6, scale=1.0, return_weights=False, checkpoint_level=1
    ):
        got.append(("fla", type(residuals), len(residuals), output_rms_weight, rms_eps, scale))
        assert residuals[0].shape[-1:] == query.shape == rms_weight.shape
        return family.attn_res_eager(residuals, query * scale, rms_weight)

    def liger_attn_res(V, w_query, w_norm, eps: float = 1e-6):
        got.append(("liger", type(V), len(V), eps))
        return family.attn_res_eager(V, w_query, w_norm)

    modules = {name: ModuleType(name) for name in ("fla", "fla.ops", "fla.ops.attnres")}
    modules |= {name: ModuleType(name) for name in ("liger_kernel", "liger_kernel.transformers")}
    modules["liger_kernel.transformers.functional"] = ModuleType("liger_kernel.transformers.functional")
    modules["fla.ops.attnres"].fused_attnres = fused_attnres
    modules["liger_kernel.transformers.functional"].liger_attn_res = liger_attn_res
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return got


def test_public_kernels_are_called_with_what_they_take(public_kernels: list[tuple], context: Context, monkeypatch) -> None:
    monkeypatch.setattr(family.PublicKernel, "missing", lambda self, device: None)
    part.measure_attn_res(context, TINY, 1)
    cases = {case["parameters"]["variant"]: case for case in context.recorder.document["cases"]}
    assert cases["fla AttnRes"]["status"] == cases["Liger AttnRes"]["status"] == "ok", cases
    assert ("fla", tuple, 4, None, 1e-6, 1.0) in public_kernels and ("liger", list, 4, 1e-6) in public_kernels


def test_a_wrong_public_kernel_gets_no_figure(public_kernels: list[tuple], context: Context, monkeypatch) -> None:
    monkeypatch.setattr(family.PublicKernel, "missing", lambda self, device: None)
    sys.modules["fla.ops.attnres"].fused_attnres = lambda query, residuals, rms_weight, rms_eps: residuals[0]
    part.measure_attn_res(context, TINY, 1)
    cases = {case["parameters"]["variant"]: case for case in context.recorder.document["cases"]}
    assert cases["fla AttnRes"]["status"] == "error" and "WrongResult" in cases["fla AttnRes"]["error"]


def test_absent_kernels_are_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = family.PublicKernel("none", "no_package_of_this_name", lambda states, query, norm: states[0])
    assert absent.missing(CPU) == absent.missing(torch.device("cuda")) == "not installed"
    present = family.PublicKernel("torch", "torch", lambda states, query, norm: states[0])
    assert present.missing(CPU) == "needs a GPU" and present.missing(torch.device("cuda")) is None


def test_the_weights_of_attention_residuals_are_those_of_the_mix() -> None:
    states = [torch.randn(1, 3, 16, dtype=torch.float64) for _ in range(4)]
    query, norm = torch.randn(16, dtype=torch.float64), torch.rand(16, dtype=torch.float64)
    weights = family.attn_res_weights(states, query, norm)
    scores = torch.stack([(F.rms_norm(state, (16,), norm, 1e-6) * query).sum(-1) for state in states], -1)
    torch.testing.assert_close(weights, scores.softmax(-1))
    mixed = sum(weights[..., layer, None] * state for layer, state in enumerate(states))
    torch.testing.assert_close(family.attn_res_eager(states, query, norm), mixed)
