"""``igva doctor``: what is installed, which implementation will run and why, and whether it computes what it should."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from igva_kernels import FusionPlan

_EXAMPLES = """examples:
  igva doctor
  igva doctor --json > report.json      to go with a bug report

The exit status is 1 if something that is needed is missing or wrong, else 0. Notes are no errors.
"""

State = Literal["ok", "note", "error"]
_COLOURS = {"ok": "green", "note": "yellow", "error": "red"}

REQUIRED = ("torch", "numpy", "transformers", "safetensors", "pillow", "jsonargparse", "rich", "PyYAML")
"""Distributions without which the model does not run."""

# Distribution, what it is for, and the extra that brings it.
OPTIONAL = (
    ("triton", "kernels on a GPU", "triton"),
    ("accelerate", "training", "train"),
    ("peft", "LoRA", "train"),
    ("sentence-transformers", "embeddings of instructions", "train"),
    ("tensorboard", "a tracker", "train"),
    ("deepspeed", "ZeRO-2 and ZeRO-3", "deepspeed"),
    ("flash-attn", "attention over packed rows", "flash"),
)

TOLERANCE = 1e-5
"""Error that a float32 mix of values near 1 may have; sums of six terms round some 1e-7 away."""


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, what was found, and what would help if it is not as it should be."""

    section: str
    name: str
    found: str
    state: State = "ok"


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    findings = examine()
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        show(findings)
    return int(any(finding.state == "error" for finding in findings))


def examine() -> list[Finding]:
    """All findings, in the order of the report."""
    findings = [*versions()]
    if not any(finding.name == "torch" and finding.state == "error" for finding in findings):
        findings += [*devices(), *implementations(), *attentions()]
    return findings


def versions() -> list[Finding]:
    """Python and the packages, those that are missing included."""
    found = [Finding("versions", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    for name in ("igva-kernels", *REQUIRED):
        version = _version(name)
        if version is not None:
            found.append(Finding("versions", name, version))
        elif name == "igva-kernels":
            found.append(Finding("versions", name, "not installed: it runs from a source tree"))
        else:
            found.append(Finding("versions", name, "missing: pip install 'igva-kernels[model]'", "error"))
    for name, purpose, extra in OPTIONAL:
        version = _version(name)
        missing = f"not installed ({purpose}): pip install 'igva-kernels[{extra}]'"
        found.append(Finding("versions", name, version or missing, "ok" if version else "note"))
    if _version("transformers") is not None and _version("torch") is not None:
        found += _imports("model", "the model")
    return found


def devices() -> list[Finding]:
    """The processor and the GPUs that torch sees."""
    import torch

    found = [Finding("devices", "cpu", f"{torch.get_num_threads()} threads")]
    if not torch.cuda.is_available():
        build = "a build for CUDA" if torch.version.cuda else "a build for ROCm" if torch.version.hip else "a build for CPUs"
        missing = "torch is " + build + (", and finds no GPU it can use" if torch.version.cuda or torch.version.hip else "")
        return [*found, Finding("devices", "gpu", f"none: {missing}", "note")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"compute capability {properties.major}.{properties.minor}"
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        found.append(Finding("devices", f"cuda:{index}", f"{properties.name}, {memory}, {capability}"))
    return found


def implementations() -> list[Finding]:
    """Which implementation of the mix each device gets, why not a faster one, and whether it agrees with the definition."""
    import torch

    from igva_kernels import dispatch

    found = []
    for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        states = [torch.linspace(-1, 1, 5 * 64, device=device).view(1, 5, 64).roll(layer) for layer in range(5)]
        reasons = []
        for name in dispatch.PREFERRED[device]:
            if name == "triton" and not dispatch.triton_installed():
                reasons.append("triton: it is not installed")
                continue
            reason = _cannot_run(name, states)
            if reason is None:
                break
            reasons.append(f"{name}: {reason}")
        else:
            name = "torch"
        error = _error_of(name, states)
        text = f"{name} runs the mix" + (f" ({'; '.join(reasons)})" if reasons else "") + f"; largest error {error:.0e}"
        state: State = "error" if not error <= TOLERANCE else "note" if reasons else "ok"
        found.append(Finding("kernels", device, text, state))
    return found


def attentions() -> list[Finding]:
    """What ``attention: auto`` takes, padded and packed, on the device that training would use."""
    if importlib.util.find_spec("transformers") is None:
        return []
    import torch

    from model.attention import choose_attention

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    found = []
    for name, packing in (("padded rows", False), ("packed rows", True)):
        try:
            choice = choose_attention("auto", device, packing=packing, half_precision=half)
            found.append(Finding("attention", name, f"{choice.name} ({choice.reason})"))
        except ValueError as error:
            found.append(Finding("attention", name, str(error), "note"))
    return found


def show(findings: Sequence[Finding]) -> None:
    """The report on a terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for section in dict.fromkeys(finding.section for finding in findings):
        table = Table(title=section, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        for finding in findings:
            if finding.section == section:
                colour = _COLOURS[finding.state]
                table.add_row(f"[{colour}]{finding.state}[/]", finding.name, escape(finding.found))
        console.print(table)
        console.print()


def _cannot_run(name: str, states: Sequence[torch.Tensor]) -> str | None:
    from igva_kernels import dispatch

    plan = _plan()
    try:
        module = dispatch.implementation(name)
    except ImportError as error:
        return str(error)
    reason: str | None = module.check_supported([states[layer] for layer in plan.sources], None, plan.program, 1)
    return reason


def _error_of(name: str, states: Sequence[torch.Tensor]) -> float:
    """Largest difference of an implementation from the mean of pairs of layers, taken in float64."""
    import torch

    from igva_kernels import dispatch

    plan = _plan()
    sources = [states[layer] for layer in plan.sources]
    fused, _ = dispatch.implementation(name).fuse_forward(sources, None, plan.program, 1, False)
    wide = [state[:, 1:].double() for state in states]
    expected = torch.cat([(wide[1] + wide[2]) / 2, (wide[3] + wide[4]) / 2, wide[3]], dim=-1)
    return float((fused.double() - expected).abs().max())


def _plan() -> FusionPlan:
    from igva_kernels import FusionPlan, Layer, Mean

    return FusionPlan(num_layers=4, slots=(Mean((1, 2)), Mean((3, 4)), Layer(3)))


def _imports(module: str, name: str) -> list[Finding]:
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever it is, the report has to say it
        return [Finding("versions", name, f"cannot be imported: {type(error).__name__}: {error}", "error")]
    return []


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="igva doctor",
        description="Versions, devices, extras, and which implementation will run on them and why.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    return parser
