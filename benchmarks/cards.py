"""The cards that times are predicted for: what the model in :mod:`benchmarks.roofline` has to know of each.

Nominal bandwidths, processors and clocks are those of the vendors' data sheets (NVIDIA A100 80 GB, H100 SXM5 and H200 SXM5,
AMD Instinct MI300X); sizes of register files and limits of residence are those of the CUDA C++ Programming Guide (compute
capabilities 8.0 and 9.0) and of AMD's CDNA 3 instruction set guide. Copy bandwidth: 3.0 TB/s was measured on an H100 (torch's
device-to-device copy, 89.6 % of nominal; quack publishes 3.01 for its fastest kernels). For the others the same share of
nominal is ASSUMED. A run on a card measures its copy bandwidth, and the predictions printed beside its figures use that.
"""

from __future__ import annotations

from dataclasses import dataclass

MEASURED_SHARE = 3.0 / 3.35
"""Copy over nominal bandwidth on the one card where it was measured."""


@dataclass(frozen=True)
class Card:
    """One GPU.

    Args:
        name: printed in tables.
        marks: parts of the name that ``torch.cuda.get_device_name`` gives; all must be in it.
        target: for which target of ``tests/aot`` its code is compiled.
        nominal_bytes_per_s: of the data sheet.
        copy_bytes_per_s: read plus written, that a copy reaches.
        processors: streaming multiprocessors, or compute units.
        clock_hz: sustained under load where that is known to be lower than the highest.
        issue_per_clock: instructions of a warp that a processor issues in one clock. NVIDIA: four schedulers, one each. AMD:
            four SIMDs of 16 lanes, which take four clocks for the 64 threads of a wavefront.
        registers: of 32 bits, in one processor.
        register_unit: a thread gets its registers in multiples of this.
        threads: resident threads of a processor.
        programs: resident programs of a processor.
        latency_s: of a load from memory under load; 600 to 800 ns are published for the H100.
        shared_bytes: shared memory of a processor, for all resident programs.
        shared_reserved: of it, what the system takes for each program.
    """

    name: str
    marks: tuple[str, ...]
    target: str
    nominal_bytes_per_s: float
    copy_bytes_per_s: float
    processors: int
    clock_hz: float
    issue_per_clock: float
    registers: int
    register_unit: int
    threads: int
    programs: int
    latency_s: float = 700e-9
    shared_bytes: int = 228 << 10
    shared_reserved: int = 1 << 10


CARDS = (
    Card("H100 SXM", ("NVIDIA H100", "HBM3"), "sm_90", 3.35e12, 3.0e12, 132, 1.7e9, 4, 65536, 8, 2048, 32),
    Card("H200", ("NVIDIA H200",), "sm_90", 4.8e12, MEASURED_SHARE * 4.8e12, 132, 1.7e9, 4, 65536, 8, 2048, 32),
    Card(
        "A100 80GB",
        ("NVIDIA A100-SXM", "80GB"),
        "sm_80",
        2.039e12,
        MEASURED_SHARE * 2.039e12,
        108,
        1.41e9,
        4,
        65536,
        8,
        2048,
        32,
        shared_bytes=164 << 10,
    ),
    Card(
        "MI300X",
        ("MI300X",),
        "gfx942",
        5.3e12,
        MEASURED_SHARE * 5.3e12,
        304,
        2.1e9,
        1,
        131072,
        8,
        2048,
        32,
        shared_bytes=64 << 10,
        shared_reserved=0,
    ),
)


def card_of(device_name: str) -> Card | None:
    """The card behind a device's name; None if it is none of :data:`CARDS`."""
    for card in CARDS:
        if all(mark in device_name for mark in card.marks):
            return card
    return None
