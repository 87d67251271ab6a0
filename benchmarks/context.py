"""What every part is given."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from .bandwidth import Bandwidth, Copy, copy_bandwidth, make_copy
from .cards import card_of
from .predict import predict_case
from .record import Recorder
from .sizes import FuseCase


@dataclass
class Context:
    """Device, sizes and record of one run.

    Args:
        device: where the work runs.
        tiny: tiny sizes, to run the code of every case; the figures then mean nothing.
        seconds: time for the clock of each variant, about.
        recorder: takes the cases.
        rounds: timed rounds of each variant; None: as many as fit into ``seconds``.
    """

    device: torch.device
    tiny: bool
    seconds: float
    recorder: Recorder
    rounds: int | None = None

    @cached_property
    def bandwidth(self) -> Bandwidth:
        """The copy bandwidth, measured once, at its first use."""
        measured = copy_bandwidth(self.copy, self.device, seconds=self.seconds)
        self.recorder.document["ceilings"]["copy"] = measured.as_dict()
        self.recorder.show(f"copy bandwidth: {measured.bytes_per_s / 1e9:.1f} GB/s")
        return measured

    @cached_property
    def copy(self) -> Copy:
        """The copy that is timed beside cases: a machine's speed may drift between them."""
        return make_copy(self.device, tiny=self.tiny)

    def predict(self, case: FuseCase) -> float | None:
        """Seconds that the library should take on this card at its measured copy bandwidth; None where no model is known."""
        if self.device.type != "cuda":
            return None
        return predict_case(case, card_of(torch.cuda.get_device_name(self.device)), self.bandwidth.bytes_per_s)
