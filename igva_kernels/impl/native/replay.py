"""Calling the compiled forward again, with other tensors of the same form.

Filling the structs of mix.c from two dozen tensors takes 100 microseconds of Python, a tenth of the whole call on one image in
bfloat16. A call with the same signature (:mod:`igva_kernels.quick`) differs in addresses alone: those are put in place of the
recorded ones.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from ctypes import byref
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor

from igva_kernels.impl.native.build import library
from igva_kernels.impl.native.structs import Forward, ForwardLayout
from igva_kernels.recording import Recorder, allocation_on


class Launch(NamedTuple):
    """One call of ``igva_forward`` as it was made.

    Attributes:
        job: its argument.
        maps: the array to which ``job.sources`` points.
        layout: what the other pointers of the job lie in.
        scratch_elements: floats of scratch.
        num_threads: of torch, on which the size of the scratch depends.
    """

    job: Forward
    maps: array
    layout: ForwardLayout
    scratch_elements: int
    num_threads: int


recorder: Recorder[Launch] = Recorder()
recording = recorder.recording


def replay_of(
    launches: Sequence[Launch], states: Sequence[Tensor], weights: Tensor | None, outputs: Sequence[Tensor]
) -> Replay | None:
    """How to make the same call again; None if it was not one call (nothing is launched for an empty batch).

    Args:
        launches: what was recorded of the call.
        states, weights: what it was given.
        outputs: what it made: the mix, and the group means if they were kept.
    """
    return Replay(launches[0], states, weights, outputs) if len(launches) == 1 else None


class Replay:
    """A recorded call that fills new outputs from new states. Made by :func:`replay_of`."""

    __slots__ = (
        "_converts",
        "_empty",
        "_layout",
        "_maps",
        "_num_threads",
        "_offsets",
        "_outputs",
        "_run",
        "_scratch",
        "_template",
    )

    def __init__(self, launch: Launch, states: Sequence[Tensor], weights: Tensor | None, outputs: Sequence[Tensor]) -> None:
        self._template = bytes(launch.job)
        self._layout = launch.layout  # keeps alive what the template points to
        self._maps = launch.maps
        self._offsets = tuple(at - state.data_ptr() for at, state in zip(launch.maps[::3], states, strict=True))
        self._converts = weights is not None and (weights.dtype != torch.float32 or not weights.is_contiguous())
        self._outputs = tuple((tuple(output.shape), output.stride(), output.dtype) for output in outputs)
        self._scratch = launch.scratch_elements
        self._num_threads = launch.num_threads
        self._empty = allocation_on(states[0].device)
        self._run = library().igva_forward

    def can_run(self) -> bool:
        """Whether torch still has the number of threads for which the scratch was made."""
        return torch.get_num_threads() == self._num_threads

    def run(self, addresses: tuple[int, ...], weights: Tensor | None) -> list[Tensor]:
        """New outputs, from states at these addresses and weights like the recorded ones."""
        job = Forward.from_buffer_copy(self._template)
        maps = self._maps[:]
        maps[::3] = array("q", map(add, addresses, self._offsets))
        job.sources = maps.buffer_info()[0]
        if self._converts and weights is not None:
            weights = weights.detach().to(torch.float32).contiguous()
        if weights is not None:
            job.weights.data = weights.data_ptr()
        outputs = [self._empty(*form) for form in self._outputs]
        job.out = outputs[0].data_ptr()
        if len(outputs) > 1:
            job.means = outputs[1].data_ptr()
        scratch = self._empty((self._scratch,), (1,), torch.float32)
        job.shape.scratch = scratch.data_ptr()
        self._run(byref(job))
        return outputs
