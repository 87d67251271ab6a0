"""The other published mixes against the eager code of their authors, and against the nearest public kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from igva_kernels import FusionPlan, OutputNorm, SparseWeights, fuse
from igva_kernels.deformable import multi_scale_deformable_attention

from ..context import Context
from ..family import (
    MIXES,
    MIXES_WITH_NORMS,
    PUBLIC_KERNELS,
    Mix,
    Weights,
    attn_res_eager,
    attn_res_weights,
    make_weights,
    mix_traffic,
    normalised_traffic,
)
from ..peers import compiled, grid_sample_deformable_attention
from ..sizes import CLIP_L_336, TINY, Tower
from ..timing import Closure
from ..variants import BASELINE, measure_variants, require_close, sets_for

MEASURES = """\
DenseConnector's SCI and DCI, s3prl's weighted sum with and without its norm, ScalarMix, TGIF, MoL's top-k weights per token,
the mean of normalised layers, TGIF and VipLlava with the LayerNorm behind them: forward, and forward + backward of what is
trained, CLIP-L/14-336 in bfloat16 at B = 16, against the authors' formulation in eager torch and torch.compile of it; the mix
of attention residuals against flash-linear-attention's and Liger's kernels, where these are installed; MMFuser's deformable
attention against grid_sample."""

OURS, COMPILE = "igva_kernels", "torch.compile"
SEED = 20261123


def run_part(context: Context) -> None:
    """Record every mix, then the public kernels."""
    tower = TINY if context.tiny else CLIP_L_336
    batch = 16 if context.device.type == "cuda" and not context.tiny else 1
    measure_attn_res(context, tower, batch)
    for mix in MIXES:
        for mode in mix.modes:
            measure_mix(context, mix, tower, batch, mode)
    for mix in MIXES_WITH_NORMS:
        for mode in mix.modes:
            measure_mix_with_norm(context, mix, tower, batch, mode)
    for mode in ("forward", "trainable"):
        measure_deformable_attention(context, batch, mode)


def measure_mix(context: Context, mix: Mix, tower: Tower, batch: int, mode: str) -> None:
    """One mode of one mix: the library, the authors' code, and torch.compile of that."""
    plan = mix.plan(tower.num_layers)
    peer = mix.peer(plan)
    prefix = tower.num_prefix_tokens
    dtype = torch.bfloat16 if context.device.type == "cuda" else torch.float32
    map_bytes = batch * tower.num_patches * tower.vision_dim * dtype.itemsize
    torch.compiler.reset()
    # compilation is most of a tiny run, and the code around it is the same for every mix
    variants = (OURS, BASELINE) if context.tiny else (OURS, BASELINE, COMPILE)
    sets: list[tuple[list[Tensor], Weights, Tensor]] = []

    def ours(states: Sequence[Tensor], weights: Weights, num_prefix_tokens: int) -> Tensor:
        return fuse(states, plan, weights, num_prefix_tokens=num_prefix_tokens)

    def prepare(name: str) -> list[Closure]:
        if not sets:
            count = sets_for(context, len(plan.sources) * map_bytes)
            sets.extend(make_inputs(context, mix, plan, tower, batch, dtype, mode, SEED + index) for index in range(count))
        variant = {OURS: ours, BASELINE: peer}.get(name) or compiled(peer)
        actual = differentiate(variant, *sets[0], prefix, mode)
        same = differentiate(peer, *sets[0], prefix, mode)
        exact = differentiate(peer, *in_float64(*sets[0]), prefix, mode)
        for position, tensors in enumerate(zip(actual, same, exact, strict=True)):
            require_close(f"result {position}", *tensors, slack=sum_slack(tower) if position else 8)
        return [partial(differentiate, variant, *inputs, prefix, mode) for inputs in sets]

    measure_variants(
        context,
        f"{mix.name}, {mode}, {tower.name} B={batch}",
        describe(tower, batch, dtype) | {"operation": "mix", "mix": mix.name, "mode": mode},
        {name: partial(prepare, name) for name in variants},
        floor_bytes=mix_traffic(mix, tower, map_bytes, mode).bytes,
        map_bytes=map_bytes,
    )


def measure_mix_with_norm(context: Context, mix: Mix, tower: Tower, batch: int, mode: str) -> None:
    """One mode of a mix with a LayerNorm behind it: in one pass, as the library's mix and torch's norm, and as the authors'
    code and torch's norm. Trained are the norm and the weights."""
    plan = mix.plan(tower.num_layers)
    peer, prefix = mix.peer(plan), tower.num_prefix_tokens
    dtype = torch.bfloat16 if context.device.type == "cuda" else torch.float32
    map_bytes = batch * tower.num_patches * tower.vision_dim * dtype.itemsize
    channels = plan.num_slots * tower.vision_dim
    torch.compiler.reset()

    def one_pass(states: Sequence[Tensor], weights: Weights, scale: Tensor, shift: Tensor) -> Tensor:
        return fuse(states, plan, weights, num_prefix_tokens=prefix, output_norm=OutputNorm(scale, shift))

    def two_passes(states: Sequence[Tensor], weights: Weights, scale: Tensor, shift: Tensor) -> Tensor:
        return layer_norm(fuse(states, plan, weights, num_prefix_tokens=prefix), (channels,), scale, shift)

    def eager(states: Sequence[Tensor], weights: Weights, scale: Tensor, shift: Tensor) -> Tensor:
        return layer_norm(peer(states, weights, prefix), (channels,), scale, shift)

    functions = {OURS: one_pass, f"{OURS}, torch's norm": two_passes, BASELINE: eager}
    if not context.tiny:
        functions[COMPILE] = compiled(eager)
    sets: list[tuple[list[Tensor], Weights, Tensor, Tensor, Tensor]] = []

    def make(seed: int) -> tuple[list[Tensor], Weights, Tensor, Tensor, Tensor]:
        states, weights, grad_out = make_inputs(context, mix, plan, tower, batch, dtype, mode, seed)
        scale, shift = (torch.randn(2, channels, device=context.device).to(dtype)).unbind(0)
        return states, weights, scale.requires_grad_(mode != "forward"), shift.requires_grad_(mode != "forward"), grad_out

    def call(function: Callable[..., Tensor], states, weights, scale, shift, grad_out: Tensor) -> list[Tensor]:
        if mode == "forward":
            with torch.no_grad():
                return [function(states, weights, scale, shift)]
        out = function(states, weights, scale, shift)
        leaves = [scale, shift] if weights is None else [scale, shift, weights]
        return [out, *torch.autograd.grad(out, leaves, grad_out)]

    def prepare(name: str) -> list[Closure]:
        if not sets:
            count = sets_for(context, len(plan.sources) * map_bytes)
            sets.extend(make(SEED + index) for index in range(count))
        states, weights, scale, shift, grad_out = sets[0]
        wide_states, wide_weights, wide_grad_out = in_float64(states, weights, grad_out)
        wide_norm = [each.detach().double().requires_grad_(each.requires_grad) for each in (scale, shift)]
        exact = call(eager, wide_states, wide_weights, *wide_norm, wide_grad_out)
        for position, tensors in enumerate(zip(call(functions[name], *sets[0]), call(eager, *sets[0]), exact, strict=True)):
            require_close(f"result {position}", *tensors, slack=sum_slack(tower) if position else 8)
        return [partial(call, functions[name], *inputs) for inputs in sets]

    measure_variants(
        context,
        f"{mix.name}, {mode}, {tower.name} B={batch}",
        describe(tower, batch, dtype) | {"operation": "mix", "mix": mix.name, "mode": mode},
        {name: partial(prepare, name) for name in functions},
        floor_bytes=normalised_traffic(mix, tower, map_bytes, mode).bytes,
        map_bytes=map_bytes,
    )


def sum_slack(tower: Tower) -> float:
    """Roundings that the sum over N*D of a gradient of weights may be off by in another order, see :mod:`benchmarks.check`."""
    return 8 + (tower.num_patches * tower.vision_dim) ** 0.5


def make_inputs(
    context: Context, mix: Mix, plan: FusionPlan, tower: Tower, batch: int, dtype: torch.dtype, mode: str, seed: int
) -> tuple[list[Tensor], Weights, Tensor]:
    """Hidden states, weights and the gradient of the output."""
    generator = torch.Generator(device=context.device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=context.device, dtype=dtype)

    states = [normal(batch, tower.num_tokens, tower.vision_dim) for _ in range(tower.num_layers + 1)]
    weights = make_weights(mix, plan, batch, tower.num_patches, states[0], generator)
    if mode != "forward" and weights is not None:
        (weights.values if isinstance(weights, SparseWeights) else weights).requires_grad_()
    if mode == "trainable":
        for state in states:
            state.requires_grad_()
    return states, weights, normal(batch, tower.num_patches, plan.num_slots * tower.vision_dim)


def in_float64(states: list[Tensor], weights: Weights, grad_out: Tensor) -> tuple[list[Tensor], Weights, Tensor]:
    def wide(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    if isinstance(weights, SparseWeights):
        weights = SparseWeights(wide(weights.values), weights.indices)
    elif weights is not None:
        weights = wide(weights)
    return [wide(state) for state in states], weights, grad_out.double()


def differentiate(
    variant, states: list[Tensor], weights: Weights, grad_out: Tensor, num_prefix_tokens: int, mode: str
) -> list[Tensor]:
    """The output and, by mode, the gradients of the weights and of the states that have one."""
    if mode == "forward":
        with torch.no_grad():
            return [variant(states, weights, num_prefix_tokens)]
    out = variant(states, weights, num_prefix_tokens)
    leaves = [] if weights is None else [weights.values if isinstance(weights, SparseWeights) else weights]
    if mode == "trainable":
        leaves += states
    grads = torch.autograd.grad(out, leaves, grad_out, allow_unused=True)
    return [out, *(grad for grad in grads if grad is not None)]


# ---- deformable attention -------------------------------------------------------------------------------------------------


def measure_deformable_attention(context: Context, batch: int, mode: str, *, compile_peer: bool = False) -> None:
    """MMFuser's cross-attention: 576 queries into four maps of 24 x 24, 16 heads of 64 channels, 4 points.

    Values, locations and weights are float32 on both sides: the released code casts them. ``compile_peer`` adds torch.compile
    of the code by ``grid_sample``.
    """
    torch.compiler.reset()
    side, heads, width = (3, 2, 8) if context.tiny else (24, 16, 64)
    levels, points, queries = 4, 4, side * side
    spatial_shapes = ((side, side),) * levels

    def make(seed: int) -> list[Tensor]:
        generator = torch.Generator(device=context.device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=context.device)

        # in cell coordinates, a few cells outside too, and never so near to a cell's edge that rounding decides about the cell:
        # the gradient of a location jumps there
        shape = (batch, queries, heads, levels, points, 2)
        cells = torch.randint(-2, side + 1, shape, generator=generator, device=context.device)
        inside = torch.rand(shape, generator=generator, device=context.device)
        locations = (cells + 0.05 + 0.9 * inside + 0.5) / side
        weights = normal(batch, queries, heads, levels * points).softmax(-1).view(batch, queries, heads, levels, points)
        tensors = [normal(batch, levels * queries, heads, width), locations, weights]
        return [tensor.requires_grad_(mode == "trainable") for tensor in tensors] + [normal(batch, queries, heads * width)]

    def call(
        function: Callable[..., Tensor], value: Tensor, locations: Tensor, weights: Tensor, grad_out: Tensor
    ) -> list[Tensor]:
        if mode == "forward":
            with torch.no_grad():
                return [function(value, spatial_shapes, locations, weights)]
        out = function(value, spatial_shapes, locations, weights)
        return [out, *torch.autograd.grad(out, (value, locations, weights), grad_out)]

    functions = {OURS: multi_scale_deformable_attention, BASELINE: grid_sample_deformable_attention}
    if mode == "trainable" and context.device.type == "cuda":  # the other way to sum the gradient of the value
        functions["igva_kernels, atomic additions"] = partial(multi_scale_deformable_attention, deterministic=False)
    if compile_peer:
        functions[COMPILE] = compiled(grid_sample_deformable_attention)
    sets: list[list[Tensor]] = []

    def prepare(name: str) -> list[Closure]:
        if not sets:
            sets.extend(make(SEED + index) for index in range(sets_for(context, 4 * batch * levels * queries * heads * width)))
        wide = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in sets[0]]
        results = (call(functions[name], *sets[0]), call(functions[BASELINE], *sets[0]), call(functions[BASELINE], *wide))
        for position, tensors in enumerate(zip(*results, strict=True)):
            require_close(f"result {position}", *tensors, slack=64)  # a gradient of a value is a sum over all who looked there
        return [partial(call, functions[name], *inputs) for inputs in sets]

    measure_variants(
        context,
        f"deformable attention, {mode}, {levels} maps of {side} x {side} B={batch}",
        {"tower": f"{levels} x {side} x {side}", "batch": batch, "dtype": "float32", "operation": "mix"}
        | {"mix": "deformable attention", "mode": mode},
        {name: partial(prepare, name) for name in functions},
    )


# ---- attention residuals --------------------------------------------------------------------------------------------------


def measure_attn_res(context: Context, tower: Tower, batch: int) -> None:
    """The mix that attention residuals and this library both do: per token a weighted sum of L states.

    The public kernels compute the weights in the same pass, from a query; ours is given them. The states have no prefix rows.
    """
    dtype = torch.bfloat16 if context.device.type == "cuda" else torch.float32
    plan = FusionPlan.mixture_of_layers(tower.num_layers)
    map_bytes = batch * tower.num_patches * tower.vision_dim * dtype.itemsize
    torch.compiler.reset()

    def make(seed: int) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        generator = torch.Generator(device=context.device).manual_seed(seed)
        shape = (batch, tower.num_patches, tower.vision_dim)
        states = [torch.randn(shape, generator=generator, device=context.device, dtype=dtype) for _ in plan.sources]
        query = torch.randn(tower.vision_dim, generator=generator, device=context.device, dtype=dtype)
        query = query * tower.vision_dim**-0.5
        norm = torch.ones(tower.vision_dim, device=context.device, dtype=dtype)
        weights = attn_res_weights([state.double() for state in states], query.double(), norm.double())
        return states, query, norm, weights.float()

    sets: list[tuple[list[Tensor], Tensor, Tensor, Tensor]] = []

    def call(name: str, states: list[Tensor], query: Tensor, norm: Tensor, weights: Tensor) -> Tensor:
        with torch.no_grad():
            if name == OURS:
                return fuse([None, *states], plan, weights, num_prefix_tokens=0)
            return functions[name](states, query, norm)

    def prepare(name: str) -> list[Closure]:
        if not sets:
            sets.extend(make(SEED + index) for index in range(sets_for(context, len(plan.sources) * map_bytes)))
        states, query, norm, _ = sets[0]
        exact = attn_res_eager([state.double() for state in states], query.double(), norm.double())
        require_close("mix", call(name, *sets[0]), attn_res_eager(states, query, norm), exact)
        return [partial(call, name, *inputs) for inputs in sets]

    functions = {BASELINE: attn_res_eager, COMPILE: compiled(attn_res_eager)}
    parameters = describe(tower, batch, dtype) | {"operation": "mix", "mix": "attention residuals", "mode": "forward"}
    name = f"attention residuals, forward, {tower.name} B={batch}"
    for kernel in PUBLIC_KERNELS:
        reason = kernel.missing(context.device)
        if reason is None:
            functions[kernel.name] = kernel.function
        else:
            report = {"not_run": reason}
            context.recorder.case(f"{name}: {kernel.name}", parameters | {"variant": kernel.name}, lambda report=report: report)
    measure_variants(
        context,
        name,
        parameters,
        {variant: partial(prepare, variant) for variant in (OURS, *functions)},
        floor_bytes=(len(plan.sources) + 1) * map_bytes,
        map_bytes=map_bytes,
    )


def describe(tower: Tower, batch: int, dtype: torch.dtype) -> dict:
    """The sizes of a case as JSON-ready parameters."""
    return {"tower": tower.name, "batch": batch, "dtype": str(dtype).removeprefix("torch.")}
