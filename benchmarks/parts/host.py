"""What the host pays: for importing the library, and for one call beside the work of the kernel."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch

from igva_kernels import FusionPlan
from igva_kernels.checks import check_weights, select_states

from .. import stand_in
from ..context import Context
from ..host import CALL_LIMIT_S, Step, against, import_time, no_implementation, per_call
from ..pieces import pieces_of

MEASURES = """\
import igva_kernels beyond import torch; one call of fuse with 24 tensors, in microseconds: the checks alone, checks with
dispatch and autograd around an implementation that does nothing, the operator's boundary; the whole call of each implementation
that runs here on tiny tensors; the launch of the Triton kernel, on a GPU or on a stand-in for the CUDA driver."""

MODES = ("forward", "frozen", "trainable")


def run_part(context: Context) -> None:
    """Record every piece."""
    plan = FusionPlan.igva(24, 4)
    cpu = torch.device("cpu")
    context.recorder.case(
        "import igva_kernels", parameters("import igva_kernels, after torch"), lambda: import_time(2 if context.tiny else 5)
    )

    step = Step(plan, "forward", cpu)
    measure(context, "checks of the arguments", partial(check, step))
    for mode in MODES:
        step = Step(plan, mode, cpu)
        with no_implementation(plan, step) as nothing:
            measure(context, f"fuse around nothing, {mode}, forward pass", partial(step.forward, nothing))
            if mode == "forward":
                measure(context, "the operator igva::fuse around nothing", partial(call_operator, step, nothing))
            else:
                measure(context, f"fuse around nothing, {mode}, forward and backward pass", partial(step.step, nothing))
    for impl in ("torch", "native"):
        for mode in MODES:
            step = Step(plan, mode, cpu)
            measure(context, f'fuse, impl="{impl}", {mode}, tiny tensors', partial(step.step, impl), calls=10)
    measure_launch(context, plan)


def measure_launch(context: Context, plan: FusionPlan) -> None:
    """The call that launches: on the GPU at hand without waiting for it, else on the stand-in."""
    on_gpu = context.device.type == "cuda"
    where = "on the GPU at hand" if on_gpu else "on a stand-in for the CUDA driver"
    names = {mode: f"fuse with its launch, {mode}, forward pass, {where}" for mode in MODES}
    reason = None if on_gpu else stand_in.missing()
    if reason is not None:
        for name in names.values():
            context.recorder.case(name, parameters(name), lambda: {"not_run": reason})
        return
    with nullcontext() if on_gpu else stand_in.stand_in_driver():
        for mode, name in names.items():
            step = Step(plan, mode, context.device)
            with torch.no_grad() if mode == "forward" else nullcontext():
                measure(context, name, step.forward, calls=25, limit_s=None if mode == "trainable" else CALL_LIMIT_S)
                if mode != "trainable":
                    for piece, function in pieces_of(step).items():
                        measure(context, f"{mode}, {piece}", function, calls=25)
            if mode != "forward":
                out = step.forward()
                measure(
                    context,
                    name.replace("forward pass", "backward pass"),
                    lambda: torch.autograd.grad(out, step.leaves, step.grad_out, retain_graph=True),  # noqa: B023
                    calls=10,
                )
        if not on_gpu:
            measure(context, "the stand-in itself: current device, stream, nothing launched", stand_in.itself)


def check(step: Step) -> None:
    """What the public function does before it calls anything."""
    states = select_states(step.states, step.plan, step.plan.sources, 1)
    check_weights(step.weights, None, step.plan, states[0], 1)


def call_operator(step: Step, impl: str) -> object:
    states = [step.states[layer] for layer in step.plan.sources]
    with torch.no_grad():
        return torch.ops.igva.fuse(states, step.weights, None, step.plan.program.encode(), 1, False, None, impl)


def measure(
    context: Context, name: str, function: Callable[[], object], *, calls: int = 100, limit_s: float | None = None
) -> None:
    """Record the seconds of one call, and whether they are within a limit."""

    def run() -> dict:
        found: dict = per_call(function, context.seconds, calls=2 if context.tiny else calls)
        if limit_s is not None:
            found |= against(limit_s, found)
        return found

    context.recorder.case(name, parameters(name), run)


def parameters(piece: str) -> dict:
    return {"operation": "host", "piece": piece}
