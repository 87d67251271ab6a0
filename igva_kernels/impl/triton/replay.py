"""Launching a kernel again, with other tensors of the same form.

Triton binds the arguments of each launch anew: it asks every tensor for its type and alignment, makes a key of them and of
the constants, and looks up the compiled kernel. For two dozen states that takes longer than the kernel runs on one image. But
a call with the same signature leads to the same kernel, grid and constants; only the addresses differ. So one call is
recorded, and later ones put their addresses in its place.

Whoever replays has to know that the signature is the same: shapes, dtypes, strides, device, and that all tensors are aligned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from igva_kernels.recording import Recorder, allocation_on


class Launch(NamedTuple):
    """One launch as it was made.

    Attributes:
        kernel: the compiled kernel.
        grid: programs along three dimensions.
        arguments: all arguments of the kernel in order, constants included.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


recorder: Recorder[Launch] = Recorder()
recording = recorder.recording


def launch_recorded(kernel: Any, grid: Sequence[int], *arguments: Any, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)``, written down where someone records."""
    compiled = kernel[tuple(grid)](*arguments, **constants)
    if recorder.is_recording and compiled is not None:  # the interpreter compiles nothing
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        recorder.add(Launch(compiled, (*grid, 1, 1)[:3], tuple(given[name] for name in kernel.arg_names)))


def replay_of(
    launches: Sequence[Launch], states: Sequence[Tensor], weights: Tensor | None, outputs: Sequence[Tensor]
) -> Replay | None:
    """How to make the same call again; None if it was not one launch, or the kernel got tensors that are not the caller's.

    Args:
        launches: what was recorded of the call.
        states, weights: what it was given.
        outputs: what it made, each a new tensor.
    """
    if len(launches) != 1:
        return None
    given = [argument for argument in launches[0].arguments if isinstance(argument, Tensor)]
    streams = [argument for argument in launches[0].arguments if isinstance(argument, tuple) and _holds_tensors(argument)]
    expected = [*outputs] if weights is None else [weights, *outputs]
    if len(streams) != 1 or not _same(streams[0], states) or not _same(given, expected):
        return None
    return Replay(launches[0], states[0].device, weights is not None, outputs)


def _holds_tensors(values: tuple) -> bool:
    return any(isinstance(value, Tensor) for value in values)


def _same(tensors: Sequence[Any], others: Sequence[Tensor]) -> bool:
    return len(tensors) == len(others) and all(tensor is other for tensor, other in zip(tensors, others, strict=True))


def _listeners() -> Any:
    """Who wants to be told of launches: a chain of hooks, of which the list is ``calls``, or a single hook or None."""
    hook = triton.knobs.runtime.launch_enter_hook
    return getattr(hook, "calls", hook)


class Replay:
    """A recorded launch that fills new outputs from new states. Made by :func:`replay_of`."""

    __slots__ = ("_arguments", "_device_index", "_empty", "_launch", "_outputs", "_states_at", "_weights_at")

    def __init__(self, launch: Launch, device: torch.device, has_weights: bool, outputs: Sequence[Tensor]) -> None:
        kernel, grid, arguments = launch
        self._device_index = device.index
        self._empty = allocation_on(device)
        self._launch = kernel.run
        before = [*grid, None, kernel.function, kernel.packed_metadata, None, None, None]  # None: the stream; no listeners
        places = [len(before) + place for place, value in enumerate(arguments) if isinstance(value, Tensor)]
        (self._states_at,) = (
            len(before) + place for place, value in enumerate(arguments) if isinstance(value, tuple) and _holds_tensors(value)
        )
        self._weights_at = places.pop(0) if has_weights else None
        self._outputs = tuple(
            (place, tuple(output.shape), output.stride(), output.dtype) for place, output in zip(places, outputs, strict=True)
        )
        held = {self._states_at, self._weights_at, *places}  # the first call's tensors are not kept alive
        self._arguments = [None if place in held else value for place, value in enumerate([*before, *arguments])]

    def can_run(self) -> bool:
        """Whether nothing but the launch itself is wanted now: the device is current, and no profiler listens to Triton."""
        return torch._C._cuda_getDevice() == self._device_index and not _listeners()

    def run(self, addresses: tuple[int, ...], weights: Tensor | None) -> list[Tensor]:
        """New outputs, from states at these addresses (each a multiple of 16) and weights like the recorded ones.

        The launcher takes addresses as well as tensors; of a tensor it would ask the driver whether a GPU can read it.
        """
        arguments = self._arguments.copy()
        arguments[_STREAM_AT] = torch._C._cuda_getCurrentRawStream(self._device_index)
        arguments[self._states_at] = addresses
        if self._weights_at is not None:
            arguments[self._weights_at] = weights.data_ptr()
        outputs = []
        for place, shape, strides, dtype in self._outputs:
            output = self._empty(shape, strides, dtype)
            arguments[place] = output.data_ptr()
            outputs.append(output)
        self._launch(*arguments)
        return outputs


_STREAM_AT = 3
"""Where the launcher of a compiled kernel takes the stream: behind the three dimensions of the grid."""
