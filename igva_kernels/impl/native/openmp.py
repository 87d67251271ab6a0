"""The threads that torch has already: its OpenMP runtime, found among the libraries of the process.

torch's threads wait actively for some milliseconds after each operator. Threads of our own would share the cores with them:
with two cores the forward of one image then took 1.3 to 1.8 times as long. The runtime's entry point that compilers call
(``GOMP_parallel``, which LLVM's and Intel's runtimes have too) runs our work on torch's threads instead.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import torch

_RUNTIME = re.compile(r"lib(gomp|omp|iomp5)\b[^/]*\.so[^/]*$")


def parallel_of_torch() -> int | None:
    """The address of ``GOMP_parallel`` in the runtime that torch uses; None where that cannot be told, or has none."""
    home = Path(torch.__file__).resolve().parent
    folders = (home / "lib", home.parent / "torch.libs", home.parent / "torch")
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # not Linux
        return None
    loaded = {Path(fields[5]) for fields in (line.split(maxsplit=5) for line in lines) if len(fields) == 6}
    of_torch = [path for path in loaded if _RUNTIME.search(path.name) and path.parent in folders]
    if len(of_torch) != 1:
        return None
    try:
        library = ctypes.CDLL(str(of_torch[0]), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None
