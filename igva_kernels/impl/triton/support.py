"""Which inputs the kernels can run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from igva_kernels.impl.triton.launch import ACCESS_BYTES, elements_per_access, stride_over
from igva_kernels.program import MixProgram

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

MAX_IMAGE_ELEMENTS = 2**30
"""Offsets inside one image are int32, those between images int64. Half of the range, so that the last tile, which may
run past the end of the image, does not run past that of int32."""

MAX_BATCH = 2**16 - 1
"""Images are the second dimension of the grid, and CUDA has no more blocks there."""


def check_supported(
    states: Sequence[Tensor],
    weights: Tensor | None,
    program: MixProgram,
    num_prefix_tokens: int,
    *,
    indices: Tensor | None = None,
) -> str | None:
    """Why the kernels cannot run these states, or None if they can.

    Beside what any Triton kernel needs, the states must allow 128-bit accesses: D and the batch strides multiples of 16
    bytes, rows contiguous, first elements at multiples of 16 bytes. Hidden states as transformers computes them are so.
    """
    first = states[0]
    batch, num_tokens, width = first.shape
    if not (first.is_cuda or triton.knobs.runtime.interpret):
        return f"the states are on {first.device}, and Triton needs a CUDA or ROCm device"
    dtypes = {state.dtype for state in states}  # float32 means may stand beside copies of a 16-bit tower
    if unknown := dtypes.difference(DTYPES):
        return f"the states are {unknown.pop()}, and the kernels take {', '.join(map(str, DTYPES))}"
    narrowest = min(dtypes, key=lambda dtype: dtype.itemsize)
    vec = elements_per_access(narrowest)
    if width % vec:
        return f"D={width} is not a multiple of {vec}, the elements of a 128-bit access in {narrowest}"
    if batch > MAX_BATCH:
        return f"B={batch} is more than the {MAX_BATCH} images of one launch"
    image_elements = num_tokens * width * len(program.slots)
    if image_elements >= MAX_IMAGE_ELEMENTS:
        return f"one image has S*T*D = {image_elements} elements, and offsets inside it are 32 bits wide"
    contiguous = (num_tokens * width, width, 1)
    for position, state in enumerate(states):  # at every call: two cheap questions a state
        if state.stride() != contiguous and (reason := _reject_strides(state, elements_per_access(state.dtype))):
            return f"state {position} {reason}"
        if state.data_ptr() % ACCESS_BYTES:
            return f"state {position} begins at {state.data_ptr():#x}, which is no multiple of {ACCESS_BYTES} bytes"
    return None


def _reject_strides(state: Tensor, vec: int) -> str | None:
    _, num_tokens, width = state.shape  # width > 1, as it is a multiple of vec
    if state.stride(2) != 1 or (num_tokens > 1 and state.stride(1) != width):
        return f"has no contiguous rows: its strides are {state.stride()} and D={width}"
    if stride_over(state, 0) % vec:
        return f"has the batch stride {state.stride(0)}, which is not a multiple of {vec} elements (128 bits)"
    return None
