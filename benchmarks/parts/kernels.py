"""The fusion by itself, with the allocator and the summaries, against eager torch and the machine's ceilings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from igva_kernels import fuse, group_summaries
from igva_kernels.modules import WeightAllocator

from ..bandwidth import matmul_flops
from ..check import Variant, backward_of, official, require_correct, run
from ..context import Context
from ..peers import OfficialAllocator, compiled, official_fuse, official_summaries, plain_sum_fuse
from ..roofline import case_traffic, official_forward_traffic
from ..sizes import (
    CLIP_L_336,
    DINOV2_L_518,
    MODES,
    SIGLIP_SO400M_384,
    TINY,
    TINY_NO_PREFIX,
    FuseCase,
    FuseInputs,
    make_inputs,
)
from ..timing import Closure
from ..variants import BASELINE, measure_variants, require_close, sets_for

MEASURES = """\
copy bandwidth and bf16 matrix product of the device;
fuse, forward, forward + backward with a frozen and with a trainable tower, and each backward alone: CLIP-L/14-336,
SigLIP-so400m/14-384 and DINOv2-L/14-518 with registers at B = 1, 4, 16, 64 in bfloat16 (CLIP-L B = 16 in float32 as well),
stage 1 at B = 16; against the official eager formulation (torch.compile: the parts peers and autotune);
device time, host time, GB/s of the least bytes, share of the copy bandwidth, peak memory; CUDA graph and latency at B = 1;
group summaries and the weight allocator at B = 1 and 16."""

OURS, EAGER = "igva_kernels", BASELINE
COMPILE, AUTOTUNE = "torch.compile", "torch.compile max-autotune"
COMPILE_SUM, AUTOTUNE_SUM = f"{COMPILE} of a plain sum", f"{AUTOTUNE} of a plain sum"
COMPILED = {
    COMPILE: (official_fuse, None),
    COMPILE_SUM: (plain_sum_fuse, None),
    AUTOTUNE: (official_fuse, "max-autotune-no-cudagraphs"),
    AUTOTUNE_SUM: (plain_sum_fuse, "max-autotune-no-cudagraphs"),
}
"""What the variants of torch.compile compile, and how."""

SEED = 20261123


@dataclass(frozen=True)
class Job:
    """A case and the variants that are measured on it."""

    case: FuseCase
    variants: tuple[str, ...]


def jobs(device: torch.device, tiny: bool) -> Iterator[FuseCase]:
    """All cases, the most telling first: what does not fit into the time budget is at the end."""
    bf16 = torch.bfloat16
    if tiny:
        yield FuseCase(TINY, 2, torch.float32)
        for tower in (TINY, TINY_NO_PREFIX):
            yield from (FuseCase(tower, 1, bf16, mode=mode) for mode in MODES)
        yield FuseCase(TINY, 2, torch.float32, stage=1, mode="trainable")
    elif device.type == "cpu":
        for batch in (1, 4):
            for dtype in (torch.float32, bf16):
                yield from (FuseCase(CLIP_L_336, batch, dtype, mode=mode) for mode in MODES)
                yield FuseCase(CLIP_L_336, batch, dtype, stage=1)
        for dtype in (torch.float32, bf16):  # the other modes are more of the same
            yield FuseCase(CLIP_L_336, 16, dtype)
    else:
        for batch in (16, 1):
            yield from (FuseCase(CLIP_L_336, batch, bf16, mode=mode) for mode in MODES)
        for tower in (SIGLIP_SO400M_384, DINOV2_L_518):
            yield from (FuseCase(tower, 16, bf16, mode=mode) for mode in MODES)
        yield FuseCase(CLIP_L_336, 16, bf16, stage=1)
        yield FuseCase(CLIP_L_336, 16, torch.float32)
        for batch in (64, 4):
            yield from (FuseCase(CLIP_L_336, batch, bf16, mode=mode) for mode in MODES)
        for batch in (64, 1, 4):
            for tower in (SIGLIP_SO400M_384, DINOV2_L_518):
                yield from (FuseCase(tower, batch, bf16, mode=mode) for mode in MODES)


def run_part(context: Context) -> None:
    """Record every case of the part."""
    context.recorder.case("copy bandwidth", {}, lambda: {"gb_per_s": context.bandwidth.bytes_per_s / 1e9})
    measure_matmul(context)
    for batch in (1, 16):
        measure_summaries(context, batch)
        measure_allocator(context, batch)
    for case in jobs(context.device, context.tiny):
        measure_fuse(context, Job(case, (OURS, EAGER)))


def measure_matmul(context: Context) -> None:
    size = 64 if context.tiny else 8192 if context.device.type == "cuda" else 1024
    dtype = torch.bfloat16 if context.device.type == "cuda" else torch.float32

    def measure() -> dict:
        flops = matmul_flops(context.device, dtype, size=size, seconds=context.seconds)
        context.recorder.document["ceilings"]["matmul_flops_per_s"] = flops
        return {"tflops_per_s": flops / 1e12}

    context.recorder.case("matrix product", {"size": size, "dtype": str(dtype)}, measure)


# ---- fuse -----------------------------------------------------------------------------------------------------------


def fuse_variant(case: FuseCase, name: str) -> Variant:
    """A variant by its name."""
    if name == EAGER:
        return official(case)
    tower = case.tower
    if name == OURS:
        plan = tower.plan(case.stage)
        return lambda inputs: fuse(inputs.hidden_states, plan, inputs.weights, num_prefix_tokens=tower.num_prefix_tokens)
    function = compiled(*COMPILED[name])
    base = tower.num_layers - 1
    return lambda inputs: function(inputs.hidden_states, tower.groups, base, inputs.weights, tower.num_prefix_tokens)


def checked_closures(case: FuseCase, variant: Variant, sets: Sequence[FuseInputs]) -> list[Closure]:
    """One closure per set of inputs, after the variant has passed the check on the first.

    Where the case is the backward alone, the graphs of all sets are made here and kept, which compiled code does not allow.

    Raises:
        WrongResult: the results are wrong; there is then nothing to time.
    """
    require_correct(case, variant, sets[0])
    if case.backward_alone:
        return [backward_of(case, variant, inputs) for inputs in sets]
    return [partial(run, case, variant, inputs) for inputs in sets]


def measure_fuse(context: Context, job: Job) -> None:
    """All variants of one case."""
    case = job.case
    torch.compiler.reset()  # the peers share their code object, which may only be recompiled a few times
    sets: list[FuseInputs] = []

    def prepare(name: str) -> list[Closure]:
        if not sets:
            count = sets_for(context, case.input_bytes)
            sets.extend(make_inputs(case, context.device, SEED + index) for index in range(count))
        return checked_closures(case, fuse_variant(case, name), sets)

    measure_variants(
        context,
        f"fuse {case.name}",
        describe(case),
        {name: partial(prepare, name) for name in job.variants},
        floor_bytes=case_traffic(case).bytes,
        map_bytes=case.map_bytes,
        predicted_s={OURS: context.predict(case)},
        with_latency=case.batch == 1,
        with_graph=case.batch == 1 and case.mode == "forward",
    )


def describe(case: FuseCase) -> dict:
    """A case as JSON-ready parameters."""
    tower = case.tower
    return {
        "tower": tower.name,
        "num_layers": tower.num_layers,
        "num_groups": tower.num_groups,
        "num_patches": tower.num_patches,
        "num_prefix_tokens": tower.num_prefix_tokens,
        "vision_dim": tower.vision_dim,
        "batch": case.batch,
        "dtype": str(case.dtype).removeprefix("torch."),
        "stage": case.stage,
        "mode": case.mode,
        "floor_maps": case_traffic(case).maps,
        "official_forward_maps": official_forward_traffic(case).maps,
    }


# ---- summaries and allocator --------------------------------------------------------------------------------------------


def measure_summaries(context: Context, batch: int) -> None:
    """The CLS means of the groups: ours reads L rows an image, the official code averages whole maps to get them."""
    tower = TINY if context.tiny else CLIP_L_336
    case = FuseCase(tower, batch, torch.float32 if context.device.type == "cpu" else torch.bfloat16)

    def ours(inputs: FuseInputs) -> Tensor:
        return group_summaries(inputs.hidden_states, tower.plan(), num_prefix_tokens=tower.num_prefix_tokens)

    def eager(inputs: FuseInputs) -> Tensor:
        return official_summaries(inputs.hidden_states, tower.groups)

    def prepare(function: Callable[[FuseInputs], Tensor]) -> list[Closure]:
        count = sets_for(context, case.input_bytes)
        sets = [make_inputs(case, context.device, SEED + index) for index in range(count)]
        exact = official_summaries([state.double() for state in sets[0].hidden_states], tower.groups)
        require_close("summaries", function(sets[0]), eager(sets[0]), exact)
        return [partial(_without_grad, function, inputs) for inputs in sets]

    measure_variants(
        context,
        f"summaries {tower.name} B={batch}",
        describe(case) | {"operation": "summaries"},
        {OURS: partial(prepare, ours), EAGER: partial(prepare, eager)},
        map_bytes=case.map_bytes,
        with_latency=batch == 1,
        with_graph=batch == 1,
    )


def measure_allocator(context: Context, batch: int, variants: Iterable[str] = (OURS, EAGER)) -> None:
    """Summaries and sentence to weights: many small launches, so host time and latency are what counts.

    Calls rotate through copies of the module, so that its parameters come from memory as they do in a model, not from L2.
    """
    tower = TINY if context.tiny else CLIP_L_336
    sizes = {"num_groups": tower.num_groups, "vision_dim": tower.vision_dim}
    # the kernels take heads of 16 channels and more: 64 over four heads
    sizes |= {"text_dim": 24, "hidden_dim": 64} if context.tiny else {"text_dim": 768, "hidden_dim": 1024}
    dtype = torch.float32 if context.device.type == "cpu" else torch.bfloat16
    kinds: dict[str, type[torch.nn.Module]] = {OURS: WeightAllocator, EAGER: OfficialAllocator, COMPILE: OfficialAllocator}
    torch.compiler.reset()

    def prepare(name: str) -> list[Closure]:
        torch.manual_seed(SEED)
        peer = OfficialAllocator(**sizes).to(context.device, dtype)
        parameter_bytes = sum(parameter.nbytes for parameter in peer.parameters())
        modules = [kinds[name](**sizes).to(context.device, dtype) for _ in range(sets_for(context, parameter_bytes))]
        for module in modules:
            module.load_state_dict(peer.state_dict())
        function = compiled(_call_module) if name == COMPILE else _call_module
        summaries = torch.randn(batch, tower.num_groups, tower.vision_dim, device=context.device, dtype=dtype)
        embeds = torch.randn(batch, sizes["text_dim"], device=context.device, dtype=dtype)
        with torch.no_grad():
            exact = OfficialAllocator(**sizes).to(context.device, torch.float64)
            exact.load_state_dict(peer.state_dict())
            expected = exact(summaries.double(), embeds.double())
            require_close("weights", function(modules[0], summaries, embeds), peer(summaries, embeds), expected)
        return [partial(_without_grad, function, module, summaries, embeds) for module in modules]

    measure_variants(
        context,
        f"allocator {tower.name} B={batch}",
        {"operation": "allocator", "tower": tower.name, "batch": batch, "dtype": str(dtype).removeprefix("torch.")} | sizes,
        {name: partial(prepare, name) for name in variants},
        with_latency=True,
        with_graph=True,
    )


def _call_module(module: torch.nn.Module, *arguments: Tensor) -> Tensor:
    return module(*arguments)


def _without_grad(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    with torch.no_grad():
        return function(*arguments)
