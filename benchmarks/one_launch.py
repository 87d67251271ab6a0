"""``python -m benchmarks.one_launch``: a few calls of the fusion and nothing else, for a profiler.

Prints the grid, the least bytes and the predicted time of each kernel, then makes the calls. The first call of each kernel
compiles it; a profiler sees the launches alone.
"""

from __future__ import annotations

import argparse
import sys

import torch

from igva_kernels import fuse

from .cards import card_of
from .check import run
from .launch_settings import shipped_setting
from .machine_code import key
from .predict import CASE_KERNELS, kernel_bytes, read_codes
from .roofline import predict
from .sizes import CLIP_L_336, FuseCase, make_inputs

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SEED = 20261124

EXAMPLES = """\
examples:
  python3 -m benchmarks.one_launch                                  # forward and backward, frozen tower, B = 16
  python3 -m benchmarks.one_launch --mode forward --batch 1         # the launch that a single picture waits for

Nsight Compute, beside the clocks as they are:
  ncu --clock-control none --target-processes application-only --section SpeedOfLight --section MemoryWorkloadAnalysis \\
      --section Occupancy -k regex:'mix_(forward|backward)' -c 4 python3 -m benchmarks.one_launch

What to compare: dram throughput with the share of a copy that `--part kernels` measures, achieved occupancy with
programs a processor, duration with the prediction."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    command = argparse.ArgumentParser(
        prog="python -m benchmarks.one_launch",
        description=f"A few calls of the fusion at the sizes of {CLIP_L_336.name}, for a profiler.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--batch", type=int, default=16, help="images of a call (default: %(default)s)")
    modes = ("forward", "frozen", "trainable")
    command.add_argument("--mode", choices=modes, default="frozen", help="which passes (default: %(default)s)")
    command.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of the states (default: %(default)s)")
    command.add_argument("--repetitions", type=int, default=3, help="calls (default: %(default)s)")
    options = command.parse_args(arguments)
    for name in ("batch", "repetitions"):
        if getattr(options, name) < 1:
            command.error(f"--{name} must be 1 or more, got {getattr(options, name)}")
    case = FuseCase(CLIP_L_336, options.batch, DTYPES[options.dtype], mode=options.mode)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    print("\n".join(launches_of(case, name)), flush=True)
    if name is None:
        print("torch finds no GPU here: nothing is launched. Above is the prediction for an H100", file=sys.stderr)
        return 2
    inputs = make_inputs(case, torch.device("cuda"), SEED)
    plan, prefix = case.tower.plan(), case.tower.num_prefix_tokens
    for _ in range(options.repetitions):
        run(case, lambda inputs: fuse(inputs.hidden_states, plan, inputs.weights, num_prefix_tokens=prefix), inputs)
    torch.cuda.synchronize()
    print(f"{options.repetitions} calls made")
    return 0


def launches_of(case: FuseCase, device_name: str | None) -> list[str]:
    """One line for each kernel of a case: grid, threads, least bytes and, for a known card, the predicted time.

    Args:
        device_name: as torch gives it; None for an H100.
    """
    codes = read_codes()
    card = card_of("NVIDIA H100 80GB HBM3" if device_name is None else device_name)
    lines = [f"{case.name}, on {device_name or 'no card'}"]
    setting = shipped_setting(case.dtype)
    tile = setting.tile(case.tower, case.dtype)
    for kernel in CASE_KERNELS[case.mode]:
        rows = case.tower.num_tokens if kernel == "dw and dh" else case.tower.num_patches
        num_bytes = kernel_bytes(kernel, case.tower, case.dtype, case.batch)
        line = f"{kernel}: grid ({tile.count(rows)}, {case.batch}), {setting.name}, {num_bytes / 1e6:.1f} MB at least"
        code = None if card is None else codes.get(key(kernel, case.tower, case.dtype, card.target))
        if card is not None and code is not None:
            found = predict(code, card, case.batch, num_bytes)
            line += (
                f", predicted {found.seconds * 1e6:.1f} µs on {card.name} (a copy: {found.floor_s * 1e6:.1f}), "
                f"{code.registers} registers, {found.resident_programs} programs a processor, {found.waves:.2f} waves"
            )
        lines.append(line)
    return lines


if __name__ == "__main__":
    sys.exit(main())
