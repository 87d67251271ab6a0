"""A stand-in for the CUDA driver: Triton compiles for sm_90, binds and launches for real, and nothing runs.

What a launch costs the host does not depend on what the kernel does. With a libcuda whose calls all succeed (``stand_in.c``),
a machine without a GPU goes through the whole of it: the checks of the public function, the choice of the implementation,
Triton's binding of the arguments, its launcher in C. The tensors lie in the memory of the CPU; what a launch would have
written stays unwritten. Only the time inside the driver itself is missing.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch

SOURCE = Path(__file__).with_name("stand_in.c")
CAPABILITY = (9, 0)


class Launches:
    """How many kernels have been launched so far."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._count = ctypes.c_long.in_dll(library, "stand_in_launches")

    @property
    def count(self) -> int:
        return self._count.value


def missing() -> str | None:
    """None where the stand-in can be used, else what is missing."""
    if torch.cuda.is_available():
        return "there is a GPU, and its driver is better than a stand-in"
    if shutil.which("cc") is None:
        return "there is no C compiler `cc` to build it"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    return None


@contextmanager
def stand_in_driver() -> Iterator[Launches]:
    """Triton launches kernels for tensors of the CPU, and ``impl="auto"`` takes the Triton kernels for them.

    Raises:
        RuntimeError: :func:`missing` says why.
    """
    reason = missing()
    if reason is not None:
        raise RuntimeError(f"no stand-in for the CUDA driver: {reason}")
    import triton
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime.driver import driver

    from igva_kernels import dispatch

    dispatch.implementation("triton")  # defines the kernels
    with TemporaryDirectory() as folder:
        path = Path(folder) / "libcuda.so.1"  # the name by which Triton's launcher asks for it
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", f"-Wl,-soname,{path.name}", "-o", path, SOURCE], check=True)
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        with (
            mock.patch.object(triton.knobs.nvidia, "libcuda_path", folder),
            mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, create=True),
            mock.patch.object(torch._C, "_cuda_getDevice", lambda: None, create=True),  # the index of the device "cpu"
            mock.patch.object(torch.cuda, "current_device", lambda: 0),
            mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: CAPABILITY),
            # A kernel is made for the interpreter or the compiler when it is defined; afterwards only check_supported asks.
            mock.patch.object(triton.knobs.runtime, "interpret", True),
            mock.patch.dict(dispatch.PREFERRED, {"cpu": ("triton",)}),
            mock.patch.object(driver, "_active", CudaDriver()),
        ):
            yield Launches(library)


def itself() -> None:
    """What a call pays for the stand-in where a GPU would ask torch for its current device and stream."""
    torch._C._cuda_getDevice()
    torch._C._cuda_getCurrentRawStream(0)
