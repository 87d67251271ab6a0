"""The machine code that a launch would run, without a GPU.

A launch is recorded instead of executed: the host code of the implementation runs as it does in production, on tensors
that are never touched, and the kernel is replaced by a recorder of its arguments. Triton's own binder then turns these
arguments into signature, constants and alignment, so that what is compiled here is what the just-in-time compiler would
compile there.

This file alone knows Triton's internals (``create_function_from_signature``, ``JITFunction._pack_args``, ``ASTSource``)
and the tools in its wheel. A new version of Triton breaks this file or nothing.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# cuobjdump of Triton 3.6 (CUDA 12.8) reads cubins of all three NVIDIA targets. For gfx942 the assembly text that LLVM
# emits is read instead: the wheel holds no disassembler for AMD's code objects, and none is needed.
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class MachineCode:
    """What the tests ask of a compiled kernel. Accesses are instructions on global memory, per thread."""

    wide_loads: int
    narrow_loads: int
    wide_stores: int
    narrow_stores: int
    registers: int
    spills: int
    float64: int
    evict_first: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Launch:
    """A recorded launch."""

    kernel: JITFunction
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grid: tuple[int, ...]


class _Recorder:
    """Stands for a kernel: ``recorder[grid](*args, **kwargs)`` takes a note instead of launching."""

    def __init__(self, kernel: JITFunction, launches: list[Launch]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self._launches.append(Launch(self._kernel, args, kwargs, grid))


@contextmanager
def recorded_launches(*modules: ModuleType, warp_size: int) -> Iterator[list[Launch]]:
    """Record the launches of all kernels that the modules define, for a device with warps of ``warp_size`` threads."""
    from igva_kernels.impl.triton import launch

    launches: list[Launch] = []
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(launch, "WARP", warp_size))
        for module in modules:
            for name, kernel in list(vars(module).items()):
                if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
                    stack.enter_context(mock.patch.object(module, name, _Recorder(kernel, launches)))
        yield launches


def compilation_key(launch: Launch, target: str) -> str:
    """What must be equal for two launches to share a compiled kernel."""
    backend = make_backend(TARGETS[target])
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    _, specialization, options = bind(*launch.args, **launch.kwargs)
    return f"{specialization} {options}"


def compile_launch(launch: Launch, target: str) -> MachineCode:
    """Compile a recorded launch for one of :data:`TARGETS` and count its instructions."""
    compiled = compile_kernel(launch, target)
    return _read_amd(compiled.asm) if target.startswith("gfx") else _read_nvidia(compiled.asm)


def compile_kernel(launch: Launch, target: str) -> Any:
    """Triton's ``CompiledKernel`` of a recorded launch, for one of :data:`TARGETS`."""
    backend = make_backend(TARGETS[target])
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, _ = bind(*launch.args, **launch.kwargs)
    options, signature, constants, attributes = launch.kernel._pack_args(
        backend, dict(launch.kwargs), bound, specialization, None
    )
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options=options.__dict__)


def disassemble(cubin: bytes) -> tuple[str, str]:
    """The SASS of an NVIDIA kernel, and a line of its resources."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _run(CUOBJDUMP, "-sass", file.name), _run(CUOBJDUMP, "-res-usage", file.name)


def _read_nvidia(asm: dict[str, Any]) -> MachineCode:
    listing, usage = disassemble(asm["cubin"])
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing)
    loads = [name for name in instructions if name.startswith("LDG")]
    stores = [name for name in instructions if name.startswith("STG")]
    return MachineCode(
        wide_loads=sum(".128" in name for name in loads),
        narrow_loads=sum(".128" not in name for name in loads),
        wide_stores=sum(".128" in name for name in stores),
        narrow_stores=sum(".128" not in name for name in stores),
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        # local memory: these kernels have no local arrays, so whatever goes there was spilled
        spills=sum(name.startswith(("LDL", "STL")) for name in instructions),
        float64=sum(re.fullmatch(r"D(ADD|MUL|FMA|SETP)\b.*|MUFU\.\w*64\w*", name) is not None for name in instructions),
        evict_first="evict_first" in asm["ptx"],
    )


def _read_amd(asm: dict[str, Any]) -> MachineCode:
    text = asm["amdgcn"]
    loads = re.findall(r"^\s+(?:global|buffer)_load_(\w+)", text, re.MULTILINE)
    stores = re.findall(r"^\s+(?:global|buffer)_store_(\w+)", text, re.MULTILINE)
    return MachineCode(
        wide_loads=loads.count("dwordx4"),
        narrow_loads=len(loads) - loads.count("dwordx4"),
        wide_stores=stores.count("dwordx4"),
        narrow_stores=len(stores) - stores.count("dwordx4"),
        registers=int(re.search(r"\.vgpr_count:\s+(\d+)", text).group(1)),
        spills=int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text).group(1)),
        float64=len(re.findall(r"^\s+v_\w+_f64", text, re.MULTILINE)),
        evict_first=False,  # Triton 3.6 has no such hint on AMD: the same loads come out with and without the flag
    )


def _run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout
