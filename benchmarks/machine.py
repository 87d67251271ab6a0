"""What a figure is worth nothing without: the machine and the versions that it comes from.

Where the tree is a copy without git, the variable ``IGVA_COMMIT`` says which commit it is of.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "transformers", "pytest", "pytest-benchmark", "numpy")


def describe(device: torch.device) -> dict:
    """Device, processor, versions, threads and the git commit, as JSON-ready values."""
    facts = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # above 0.1: something else ran, too
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "num_sms": properties.multi_processor_count,
            "nvidia_smi": _nvidia_smi(),
        }
    return facts


NVIDIA_SMI = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm")
"""What nvidia-smi is asked; the clocks are those of an idle card at the start, beside the highest."""


def _nvidia_smi() -> dict[str, str] | None:
    """Driver and clocks of the first card; None where there is no nvidia-smi or it does not answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(NVIDIA_SMI)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_nvidia_smi(done.stdout)


def parse_nvidia_smi(text: str) -> dict[str, str]:
    """The values of the first line by their names, with their units."""
    values = (text.splitlines() or [""])[0].split(",")
    return dict(zip(NVIDIA_SMI, (value.strip() for value in values), strict=False))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _commit() -> str | None:
    """``IGVA_COMMIT`` where it is set, else the commit of the tree, with "+changes" when files of it differ; None outside a git
    checkout or without git."""
    if given := os.environ.get("IGVA_COMMIT"):
        return given
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()
