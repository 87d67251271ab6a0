"""Launch settings: whether the tile, the warps and the eviction that the library chose are the right ones on this card."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from igva_kernels import fuse
from igva_kernels.program import MixProgram

from ..cards import card_of
from ..check import WrongResult, require_correct, run
from ..context import Context
from ..launch_settings import (
    BACKWARDS,
    PASSES,
    Compiled,
    LaunchSetting,
    Wanted,
    can_compile_ahead,
    compile_all,
    row_tile_of,
    run_pass,
    settings_of,
    shipped_setting,
)
from ..machine import ROOT
from ..predict import kernel_bytes
from ..record import loses_device, read_json
from ..roofline import case_traffic, predict
from ..sizes import CLIP_L_336, TINY, FuseCase, FuseInputs, Tower, make_inputs
from ..timing import Closure, compare
from ..variants import COPY, sets_for

MEASURES = """\
CLIP-L/14-336 at B = 1, 4, 16, 64 in bfloat16 and B = 16 in float32, each setting against the shipped one and a copy:
forward, with and without saved means: 1, 2, 4, 8 warps x 1, 2 accesses a thread x states streamed past L2 or not;
the same forward with a row a program in place of a flat tile;
dL/dw from saved means, alone and with dL/dh: 2, 4, 8 warps;
the frozen step with the means kept and with the means computed again;
at the end what is fastest, by how much, and which constant that would change."""

SEED = 20261124
WORTH = 1.01
"""Times faster than the shipped setting from which a change is proposed; less is within what the rounds spread."""

ROW, KEPT, AGAIN = "a row a program", "means kept", "means computed again"


@dataclass(frozen=True)
class Winner:
    """The fastest setting of a case, and how many times faster than the shipped one it is."""

    name: str
    case: FuseCase
    setting: str
    gain: float
    advice: str

    @property
    def line(self) -> str:
        what = f"{self.name}, B={self.case.batch} {str(self.case.dtype).removeprefix('torch.')}"
        if self.gain < WORTH:
            return f"{what}: keep the shipped setting (the best other: {self.setting}, {self.gain:.3f} times as fast)"
        return f"{what}: {self.setting} is {self.gain:.3f} times as fast as the shipped setting. {self.advice}"


def run_part(context: Context) -> None:
    """Record every setting of every case. Without a card nothing but a rehearsal at tiny sizes is of use."""
    if context.device.type == "cpu" and not context.tiny:
        reason = "launch settings are those of kernels on a card: run this part on one, or rehearse it with --tiny"
        context.recorder.case("launch settings", {"operation": "launch settings"}, lambda: {"not_run": reason})
        return
    if context.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        rehearse(context)
        return
    measure(context)


def rehearse(context: Context) -> None:
    """The tiny cases in a process of its own, whose kernels Triton interprets; its cases become this run's."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tune.json"
        command = [sys.executable, "-m", "benchmarks", "--part", "tune", "--tiny", "--device", "cpu", "--out", str(file)]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        if not file.exists():
            raise RuntimeError(f"the rehearsal wrote no results (status {done.returncode}):\n{done.stdout}{done.stderr}")
        cases = read_json(file)["cases"]
    for case in cases:
        context.recorder.case(case["name"], case["parameters"], partial(_metrics_of, case), begun=True)


def _metrics_of(case: dict) -> dict:
    if case["status"] != "ok":
        raise RuntimeError(case.get("error") or case["reason"])
    return case["metrics"]


def measure(context: Context) -> None:
    """All cases, B = 16 and 1 first, and the winners at the end."""
    tower = TINY if context.tiny else CLIP_L_336
    kinds = [(2, torch.float32)] if context.tiny else [(batch, torch.bfloat16) for batch in (16, 1, 64, 4)]
    kinds += [] if context.tiny else [(16, torch.float32)]
    codes = compile_ahead(context, tower, list(dict.fromkeys(dtype for _, dtype in kinds)))
    winners: list[Winner] = []
    for batch, dtype in kinds:
        for name in PASSES:
            winners += measure_pass(context, name, FuseCase(tower, batch, dtype), codes)
        winners += measure_means(context, FuseCase(tower, batch, dtype, mode="frozen"))
    context.recorder.show("\nLaunch settings, in the order of this run:")
    for winner in winners:
        context.recorder.show(winner.line)


def compile_ahead(context: Context, tower: Tower, dtypes: Sequence[torch.dtype]) -> dict[tuple, Compiled | str]:
    """The machine code of all settings by pass, dtype and setting; empty where it is compiled at the first launch."""
    if context.device.type != "cuda" or context.tiny:
        return {}
    target = "sm_{}{}".format(*torch.cuda.get_device_capability(context.device))
    if torch.version.hip or not can_compile_ahead(target):
        return {}
    wanted = [
        Wanted(name, tower, dtype, setting, target)
        for dtype in dtypes
        for name in PASSES
        for setting in settings_of(name, dtype)
    ]
    context.recorder.show(f"compiling {len(wanted)} kernels for {target}")
    found = compile_all(wanted)
    context.recorder.show(f"compiled after {context.recorder.elapsed_s:.0f} s")
    return {(each.name, each.dtype, each.setting): code for each, code in found.items()}


# ---- one pass -----------------------------------------------------------------------------------------------------------


def measure_pass(context: Context, name: str, case: FuseCase, codes: Mapping[tuple, Compiled | str]) -> list[Winner]:
    """All settings of a pass; the fastest as one winner, none where nothing was timed."""
    tower, dtype = case.tower, case.dtype
    shipped = shipped_setting(dtype)
    sets: list[tuple[FuseInputs, Tensor | None]] = []
    expected: dict[str, Tensor] = {}

    def prepare(tile: object, *, row: bool = False) -> list[Closure]:
        if not sets:
            sets.extend(_inputs_of(context, name, case))
        found = run_pass(name, tower, tile, *sets[0], fill=math.nan)
        if not expected:
            require_near(name, found, reference_of(name, tower, *sets[0]), tower)
            expected.update(found)
        elif row:
            require_near(name, found, expected, tower)
        else:
            require_same_bits(found, expected, tower)
        return [partial(run_pass, name, tower, tile, inputs, means) for inputs, means in sets]

    variants: dict[str, Callable[[], list[Closure]]] = {}
    details: dict[str, dict] = {}
    advices: dict[str, str] = {}
    settings = settings_of(name, dtype)
    for setting in settings[:3] if context.tiny else settings:
        code = codes.get((name, dtype, setting))
        if isinstance(code, str):
            variants[setting.name] = partial(_fail, code)
        else:
            variants[setting.name] = lambda setting=setting: prepare(setting.tile(tower, dtype))
        details[setting.name] = _launch_of(context, name, case, code) if isinstance(code, Compiled) else {}
        advices[setting.name] = advice(setting, shipped, dtype)
    if name == "forward":
        variants[ROW] = lambda: prepare(row_tile_of(tower, dtype), row=True)
        advices[ROW] = "Then _launch_forward in igva_kernels/impl/triton/__init__.py takes row_tile for these weights too."
    floor = kernel_bytes(name, tower, dtype, case.batch)
    gains = measure_settings(context, name, case, variants, shipped.name, floor, details)
    return _winners(name, case, gains, advices)


def _winners(name: str, case: FuseCase, gains: Mapping[str, float], advices: Mapping[str, str]) -> list[Winner]:
    if not gains:
        return []
    best = max(gains, key=lambda setting: gains[setting])
    return [Winner(name, case, best, gains[best], advices[best])]


def advice(setting: LaunchSetting, shipped: LaunchSetting, dtype: torch.dtype) -> str:
    """The constants of ``launch.py`` that a setting changes."""
    from igva_kernels.impl.triton.launch import WARP, elements_per_access

    changes = []
    if setting.num_warps != shipped.num_warps:
        changes.append(f"FLAT_THREADS = {setting.num_warps * WARP}")
    if setting.elements != shipped.elements:
        changes.append(f"ACCESSES = {setting.elements // elements_per_access(dtype)}")
    if setting.evict_first != shipped.evict_first:
        changes.append(f"EVICT_FIRST = {setting.evict_first}")
    return f"In igva_kernels/impl/triton/launch.py: {', '.join(changes)} (for all passes and B: compare their lines)."


def _launch_of(context: Context, name: str, case: FuseCase, compiled: Compiled) -> dict:
    """Registers, spills, residence and waves of a launch."""
    found = {"registers": compiled.code.registers, "spills": compiled.spills, "shared_bytes": compiled.code.shared_bytes}
    card = card_of(torch.cuda.get_device_name(context.device))
    if card is not None:
        num_bytes = kernel_bytes(name, case.tower, case.dtype, case.batch)
        launch = predict(compiled.code, card, case.batch, num_bytes)
        found |= {"programs_per_processor": launch.resident_programs, "waves": launch.waves, "predicted_s": launch.seconds}
    return found


def _fail(text: str) -> list[Closure]:
    raise RuntimeError(f"does not compile: {text}")


def _inputs_of(context: Context, name: str, case: FuseCase) -> list[tuple[FuseInputs, Tensor | None]]:
    """Sets of inputs, with the means that the backward reads."""
    tower, tile = case.tower, shipped_setting(case.dtype).tile(case.tower, case.dtype)
    found = []
    for index in range(sets_for(context, case.input_bytes)):
        inputs = make_inputs(case, context.device, SEED + index)
        means = run_pass("forward, means saved", tower, tile, inputs)["means"] if name in BACKWARDS else None
        if means is not None and index:
            inputs.hidden_states.clear()  # the backward reads no states; those of the first set are for the reference
            inputs.hidden_states.extend(found[0][0].hidden_states)
        found.append((inputs, means))
    return found


def reference_of(name: str, tower: Tower, inputs: FuseInputs, means: Tensor | None) -> dict[str, Tensor]:
    """What plain torch makes of a pass, on the same tensors."""
    from igva_kernels.impl import reference

    plan, prefix = tower.plan(), tower.num_prefix_tokens
    states = [inputs.hidden_states[layer] for layer in plan.sources]
    if name not in BACKWARDS:
        output, saved = reference.fuse_forward(states, inputs.weights, plan.program, prefix, name != "forward")
        return {"output": output} | ({} if name == "forward" else {"means": saved})
    grad_weights, grads = reference.fuse_backward(
        inputs.cotangent, [], means, inputs.weights, plan.program, prefix, tower.num_tokens, True, name == "dw and dh"
    )
    return {"grad_weights": grad_weights} | {f"grad_states[{index}]": each for index, each in enumerate(grads)}


def require_near(name: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tower: Tower) -> None:
    """Some roundings of the largest value; sums over all patches and channels as many as their order may make.

    Raises:
        WrongResult: names the result that is missing, left unwritten or too far off.
    """
    if found.keys() != expected.keys():
        raise WrongResult(f"{name}: has {sorted(found)}, expected {sorted(expected)}")
    for key, value in found.items():
        exact = expected[key]
        scale = exact.abs().max().item()
        allowed = 4 * torch.finfo(value.dtype).eps * scale
        if key == "grad_weights":
            terms = tower.num_patches * tower.vision_dim
            allowed = (4 * torch.finfo(torch.float32).eps * math.sqrt(terms)) * max(scale, math.sqrt(terms))
        error = (value.float() - exact.float()).abs().max().item()
        if not error <= allowed:  # also what was left unwritten: NaN
            raise WrongResult(f"{name}: {key} is off by {error:.3e}, allowed {allowed:.3e}")


def require_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tower: Tower) -> None:
    """Maps have the bits of the shipped setting; dL/dw is summed in another order by another tile.

    Raises:
        WrongResult: names the result that differs.
    """
    for key, value in found.items():
        if key == "grad_weights":
            require_near("another setting", {key: value}, {key: expected[key]}, tower)
        elif not torch.equal(value, expected[key]):  # NaN, which equals nothing, is what was left unwritten
            raise WrongResult(f"{key}: other bits than those of the shipped setting")


# ---- means --------------------------------------------------------------------------------------------------------------


def measure_means(context: Context, case: FuseCase) -> list[Winner]:
    """The frozen step, forward and backward, with the group means kept for dL/dw and with the states read again."""
    sets: list[FuseInputs] = []

    def prepare(kept: bool) -> list[Closure]:
        plan = case.tower.plan()  # one of its own: calls that repeat are remembered with it

        def variant(inputs: FuseInputs) -> Tensor:
            return fuse(inputs.hidden_states, plan, inputs.weights, num_prefix_tokens=case.tower.num_prefix_tokens)

        def step(inputs: FuseInputs) -> object:
            with mock.patch.object(MixProgram, "worth_saving_means", kept):
                return run(case, variant, inputs)

        if not sets:
            sets.extend(make_inputs(case, context.device, SEED + i) for i in range(sets_for(context, case.input_bytes)))
        with mock.patch.object(MixProgram, "worth_saving_means", kept):
            require_correct(case, variant, sets[0])
        return [partial(step, inputs) for inputs in sets]

    shipped = KEPT if case.tower.plan().program.worth_saving_means else AGAIN
    variants = {KEPT: partial(prepare, True), AGAIN: partial(prepare, False)}
    gains = measure_settings(context, "frozen step", case, variants, shipped, case_traffic(case).bytes, {})
    text = "Then MixProgram.worth_saving_means in igva_kernels/program.py draws its line elsewhere."
    return _winners("frozen step", case, gains, dict.fromkeys(variants, text))


# ---- timing -------------------------------------------------------------------------------------------------------------


def measure_settings(
    context: Context,
    name: str,
    case: FuseCase,
    variants: Mapping[str, Callable[[], Sequence[Closure]]],
    shipped: str,
    floor_bytes: int,
    details: Mapping[str, dict],
) -> dict[str, float]:
    """Record each variant, in rounds that alternate with the shipped one and the copy.

    Returns:
        Of those that were timed beside the shipped one, which leads the variants, how many times faster than it they are;
        without itself.
    """
    recorder = context.recorder
    label = f"launch settings {name}, {case.tower.name} B={case.batch} {str(case.dtype).removeprefix('torch.')}"
    if not any(recorder.chosen(f"{label}: {variant}") for variant in variants):
        return {}
    begun = not recorder.spent
    ready: dict[str, Sequence[Closure]] = {}
    failed: dict[str, Exception] = {}
    for variant, prepare in variants.items() if begun else ():
        try:
            if shipped in failed:
                raise RuntimeError("the shipped setting failed, with which this one is compared")
            ready[variant] = prepare()
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            failed[variant] = error
            if loses_device(error):
                variants, ready = {variant: prepare}, {}
                break
    timings = {}
    if ready:
        try:
            limits = {"min_rounds": 1, "max_rounds": 1} if context.tiny else {}
            timings = compare(
                {**ready, COPY: context.copy.closures}, context.device, seconds=context.seconds, rounds=context.rounds, **limits
            )
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            failed |= dict.fromkeys(ready, error)
    gains: dict[str, float] = {}

    def metrics(variant: str) -> dict:
        if variant in failed:
            raise failed[variant]
        timing = timings[variant]
        gain = timing.times_faster_than(timings[shipped])
        if variant != shipped:
            gains[variant] = gain
        return (
            timing.as_dict()
            | details.get(variant, {})
            | {
                "times_faster_than_shipped": gain,
                "floor_bytes": floor_bytes,
                "gb_per_s": floor_bytes / timing.median_s / 1e9,
                "share_of_copy": floor_bytes / context.copy.bytes * timing.times_faster_than(timings[COPY]),
            }
        )

    for variant in variants:
        parameters = {
            "operation": "launch settings",
            "pass": name,
            "tower": case.tower.name,
            "batch": case.batch,
            "dtype": str(case.dtype).removeprefix("torch."),
            "variant": variant,
            "shipped": variant == shipped,
        }
        recorder.case(f"{label}: {variant}", parameters, partial(metrics, variant), begun=begun)
    if context.device.type == "cuda":
        ready.clear()
        torch.cuda.empty_cache()
    return gains
