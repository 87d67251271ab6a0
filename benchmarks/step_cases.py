"""The cases of the part ``training_step``: the lines of a step, the layers' switches, and the loss alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from model._hf_compat import enable_activation_checkpointing
from model.cross_entropy import chunked_cross_entropy
from model.training.flops import StepFlops, peak_of_run
from model.training.layers import checkpoint_layers, compile_layers, use_liger_kernels

from .context import Context
from .memory import method, peak_bytes
from .parts.training import CLIP_L, llama, seconds
from .timing import quantiles
from .training_step import (
    KERNELS_ONLY,
    LINES,
    Line,
    Setup,
    Trained,
    build,
    count,
    make_batches,
    make_samples,
    make_step,
    require_same,
)
from .variants import release

ROUNDS = 5
LIGER = "compiled layers and Liger's kernels"
LLAMA_7B = Setup("Llama 7B", 1, llama(4096, 11008, 32, 32, 32), CLIP_L, 768, 1024, 32, 8, 96)
LLAMA_1B = Setup("Llama 1.1B", 2, llama(2048, 5632, 22, 32, 4), CLIP_L, 768, 1024, 32, 8, 128)
SMALL_TOWER = CLIP_L | {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "image_size": 112,
}
SMALL = Setup("small Llama", 2, llama(256, 688, 4, 4, 4, vocabulary=8192), SMALL_TOWER, 96, 128, 8, 4, 32)
TINY_TOWER = CLIP_L | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
}
TINY = [
    Setup("tiny Llama", stage, llama(32, 64, 2, 4, 2, vocabulary=128), TINY_TOWER, 24, 64, 8, 4, 8) for stage in (1, 2)
]  # fmt: skip


def setups_for(context: Context) -> list[Setup]:
    """What fits the device: 7B frozen in bf16 takes 13.5 GB, 1.1B in fp32 with AdamW 18 GB, and activations."""
    if context.tiny:
        return TINY
    if context.device.type != "cuda":
        return [SMALL]
    gib = torch.cuda.get_device_properties(context.device).total_memory / 2**30
    return [setup for setup, needed in ((LLAMA_7B, 38), (LLAMA_1B, 38)) if gib >= needed] or [SMALL]


def run_part(context: Context) -> None:
    """Record the loss alone, then every setup."""
    measure_loss(context)
    for setup in setups_for(context):
        # a setup that does not fit into memory leaves the others theirs
        context.recorder.guard(f"{setup.name} stage {setup.stage}", partial(measure_setup, context, setup))
        release(context.device)


# ---- the step -----------------------------------------------------------------------------------------------------------


def measure_setup(context: Context, setup: Setup) -> None:
    """Time all lines round by round, so that a drifting clock hits them alike."""
    parts: dict = {}

    def prepare() -> dict:
        trained = build(setup, context.device)
        enable_activation_checkpointing(trained.network.model.language_model)
        samples = make_samples(trained)
        lines = (*LINES, KERNELS_ONLY)
        losses = require_same(trained, samples, lines)
        optimizer = torch.optim.AdamW(trained.learning(), lr=1e-5, fused=context.device.type == "cuda")
        steps = {line.name: with_optimizer(make_step(trained, samples, line.switches), optimizer) for line in lines}
        parts.update(trained=trained, samples=samples, lines=lines, losses=losses, optimizer=optimizer, steps=steps)
        return {"lines": len(lines), "largest_difference_of_the_loss": max(losses.values()) - min(losses.values())}

    title = f"{setup.name} stage {setup.stage}"
    if context.recorder.case(f"{title}: loss and gradients are the same in all lines", {}, prepare) is None:
        return
    rounds = rounds_of(context)
    times: dict[str, list[float]] = {name: [] for name in parts["steps"]}
    for step in parts["steps"].values():
        step()
    for _ in range(rounds):
        for name, step in parts["steps"].items():
            times[name].append(seconds(step, context.device))
    medians = {name: quantiles(values)[0] for name, values in times.items()}
    before = LINES[0].name
    for line in parts["lines"]:
        base = LINES[0].name if line is KERNELS_ONLY else before
        measure = partial(line_metrics, context, parts, line, times[line.name], medians[base], medians[LINES[0].name])
        record(context, setup, line.name, line.part, measure)
        before = line.name
    measure_apart(context, setup, medians)
    measure_layers(context, setup, parts)


def rounds_of(context: Context) -> int:
    """How often a step is timed."""
    return context.rounds or (1 if context.tiny else ROUNDS)


def record(context: Context, setup: Setup, name: str, part: str, measure: Callable[[], dict]) -> None:
    parameters = {"model": setup.name, "stage": setup.stage, "line": name, "part": part}
    context.recorder.case(f"{setup.name} stage {setup.stage}: {name}", parameters, measure, begun=True)


def with_optimizer(step: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """The passes of the step and the update."""

    def call() -> None:
        step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return call


def line_metrics(context: Context, parts: dict, line: Line, times: list[float], before: float, recipe: float) -> dict:
    """Speeds, padding and memory of a line; ``before`` and ``recipe`` are seconds of the line before and of the recipe."""
    trained: Trained = parts["trained"]
    median, low, high = quantiles(times)
    batches = make_batches(trained, parts["samples"], line.switches.layout)
    counts = count(batches)
    lengths = torch.tensor([len(sample["input_ids"]) for sample in parts["samples"]], dtype=torch.float64)
    images = sum("pixel_values" in sample for sample in parts["samples"])
    flops = StepFlops.of(trained.network).total(counts["tokens"], float(lengths.square().sum()), counts["labels"], images)
    peak = peak_of_run(context.device, trained.precision)
    del batches
    return {
        "median_s": median,
        "low_s": low,
        "high_s": high,
        "rounds": len(times),
        "tokens_per_s": counts["tokens"] / median,
        "samples_per_s": counts["samples"] / median,
        "padding_share": 1 - counts["tokens"] / counts["positions"],
        "times_faster_than_before": before / median,
        "times_faster_than_recipe": recipe / median,
        "tflops_per_s": flops / median / 1e12,
        **({} if peak is None else {"share_of_peak": flops / median / peak}),
        "peak_bytes": peak_bytes(parts["steps"][line.name], context.device),
        "memory_method": method(context.device),
        "loss": parts["losses"][line.name],
        **counts,
    }


def measure_apart(context: Context, setup: Setup, medians: dict[str, float]) -> None:
    """What the loop gives and what the kernels give, each behind the other and alone."""
    last_of_loop = [line for line in LINES if line.part != "kernels"][-1]
    recipe, loop, both = medians[LINES[0].name], medians[last_of_loop.name], medians[LINES[-1].name]
    for name, faster in (
        ("the loop", recipe / loop),
        ("the kernels, behind the loop", loop / both),
        ("the kernels, without the loop", recipe / medians[KERNELS_ONLY.name]),
        ("both", recipe / both),
    ):
        parameters = {"model": setup.name, "stage": setup.stage, "apart": name}
        case = f"{setup.name} stage {setup.stage}: apart: {name}"
        context.recorder.case(case, parameters, lambda faster=faster: {"times_faster": faster}, begun=True)


def measure_layers(context: Context, setup: Setup, parts: dict) -> None:
    """Switches of the language model's layers on top of all lines, one at a time; those that stay in come last."""
    language_model = parts["trained"].network.model.language_model
    step, device = parts["steps"][LINES[-1].name], context.device

    def timed() -> list[float]:
        step()
        return [seconds(step, device) for _ in range(rounds_of(context))]

    reference = quantiles(timed())[0]

    def measure(name: str, switch: Callable[[], object]) -> dict:
        if name == LIGER and importlib.util.find_spec("liger_kernel") is None:
            return {"not_run": "liger-kernel is not installed"}
        switch()
        return line_metrics(context, parts, LINES[-1], timed(), reference, reference)

    def compile_them() -> None:
        compile_layers(language_model)
        for _ in range(2):
            step()

    switches: list[tuple[str, Callable[[], object]]] = [
        ("every second layer checkpointed", partial(checkpoint_layers, language_model, 2)),
        ("no layer checkpointed", lambda: [setattr(layer, "gradient_checkpointing", False) for layer in language_model.layers]),
    ]
    if device.type == "cuda":  # on a CPU Liger does not run, and to compile takes longer than all lines
        switches.append(("compiled layers", compile_them))
        switches.append((LIGER, partial(use_liger_kernels, language_model, device)))
    for name, switch in switches:
        parameters = {"model": setup.name, "stage": setup.stage, "switch": name}
        context.recorder.case(f"{setup.name} stage {setup.stage}: all, with {name}", parameters, partial(measure, name, switch))
        checkpoint_layers(language_model, 1)


# ---- the loss alone -----------------------------------------------------------------------------------------------------


def measure_loss(context: Context) -> None:
    """Time and peak memory of head and loss, forward and backward, from the hidden states of all positions."""
    if context.tiny:
        positions, width, vocabulary = 64, 16, 96
    elif context.device.type == "cuda":
        positions, width, vocabulary = 16 * 700, 4096, 32064
    else:
        positions, width, vocabulary = 2 * 700, 256, 8192
    labelled = round(0.18 * positions)
    sizes = {"positions": positions, "labelled": labelled, "width": width, "vocabulary": vocabulary}
    for name, learned_only, chunked in (
        ("full logits", False, False),
        ("logits of labelled positions", True, False),
        ("labelled positions in chunks", True, True),
    ):
        parameters = {"loss": name, **sizes}
        measure = partial(loss_metrics, context, sizes, learned_only, chunked)
        context.recorder.case(f"loss: {name}", parameters, measure)


def loss_metrics(context: Context, sizes: dict[str, int], learned_only: bool, chunked: bool) -> dict:
    """Head and loss with gradients of states and weight."""
    device = context.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    positions, width, vocabulary = sizes["positions"], sizes["width"], sizes["vocabulary"]
    states = torch.randn(positions, width, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).mul(width**-0.5).to(device, dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (positions,), generator=generator)
    targets[: positions - sizes["labelled"]] = -100
    targets = targets.to(device)

    def call() -> Tensor:
        learned = targets != -100
        used, wanted = (states[learned], targets[learned]) if learned_only else (states, targets)
        if chunked:
            loss = chunked_cross_entropy(used, wanted, weight)
        else:
            loss = F.cross_entropy(F.linear(used, weight).float(), wanted, reduction="sum")
        gradients = torch.autograd.grad(loss / sizes["labelled"], (states, weight))
        return gradients[0]

    call()
    median, low, high = quantiles([seconds(call, device) for _ in range(rounds_of(context))])
    return {
        "median_s": median,
        "low_s": low,
        "high_s": high,
        "peak_bytes": peak_bytes(call, device),
        "memory_method": method(device),
    }
