"""The time model against sums done by hand, and the reading of machine code against listings with known counts."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import machine_code, predict, report
from benchmarks.cards import CARDS, card_of
from benchmarks.context import Context
from benchmarks.machine import ROOT
from benchmarks.roofline import START_S, KernelCode
from benchmarks.roofline import predict as predict_launch
from benchmarks.sizes import CLIP_L_336, DINOV2_L_518, TINY, FuseCase
from benchmarks.variants import measure_variants

H100 = CARDS[0]
FORWARD = KernelCode(
    instructions=800,
    registers=102,
    threads=128,
    warp_size=32,
    loads_in_flight=12,
    loads=24,
    programs_per_image=576,
    loops=False,
)
BYTES = 490_733_568  # CLIP-L, B = 16, bfloat16


def test_a_memory_bound_launch() -> None:
    found = predict_launch(FORWARD, H100, 16, BYTES)
    assert found.resident_programs == 4  # 65536 registers // (104 * 128)
    assert found.waves == pytest.approx(576 * 16 / (132 * 4))
    assert found.bytes_in_flight == 12 * 16 * 128 * 4
    assert found.bytes_needed == pytest.approx(3.0e12 * 700e-9 / 132)
    assert found.memory_s == pytest.approx(found.floor_s) and found.floor_s == pytest.approx(163.6e-6, rel=1e-3)
    # 36,864 warps, four a clock on 132 processors at 1.7 GHz
    assert found.issue_s == pytest.approx(36_864 * 800 / (132 * 4 * 1.7e9))
    assert found.tail_s == pytest.approx(2 * 700e-9)  # 24 loads, 12 at once
    assert found.seconds == pytest.approx(START_S + found.floor_s + found.tail_s)


def test_few_loads_under_way_bound_the_memory() -> None:
    """Little's law: one load of 16 bytes in each of 2048 threads is 32 KB, twice what the H100 needs; of 512, half of that."""
    thin = replace(FORWARD, loads_in_flight=1, registers=32, programs_per_image=132)  # of 16 images a full wave
    assert predict_launch(thin, H100, 16, BYTES).memory_s == pytest.approx(BYTES / 3.0e12)
    starved = replace(thin, registers=128)  # four programs of 128 threads
    found = predict_launch(starved, H100, 16, BYTES)
    assert found.bytes_in_flight == 16 * 512 < found.bytes_needed
    assert found.memory_s == pytest.approx(BYTES / (16 * 512 * 132 / 700e-9))


def test_many_instructions_bound_the_issue() -> None:
    found = predict_launch(replace(FORWARD, instructions=8000), H100, 16, BYTES)
    assert found.seconds == pytest.approx(START_S + found.issue_s + found.tail_s) and found.issue_s > found.memory_s


def test_a_small_launch_does_not_fill_the_card() -> None:
    found = predict_launch(replace(FORWARD, programs_per_image=132), H100, 1, BYTES // 64)
    assert found.bytes_in_flight == 12 * 16 * 128 * 1


def test_a_partial_last_wave_fills_the_card_less() -> None:
    """132 processors with 4 programs each: 528 are a full wave; 12 more have too few loads for the bandwidth."""
    full = predict_launch(replace(FORWARD, programs_per_image=528), H100, 1, 528 * 10_000)
    partial = predict_launch(replace(FORWARD, programs_per_image=540), H100, 1, 540 * 10_000)
    assert full.waves == 1 and full.memory_s == pytest.approx(528 * 10_000 / 3.0e12)
    of_last = 12 * 128 * 12 * 16 / 700e-9  # programs, threads, loads of 16 bytes under way
    assert of_last < 3.0e12
    assert partial.memory_s == pytest.approx(full.memory_s + 12 * 10_000 / of_last)


def test_shared_memory_bounds_the_programs_of_a_processor() -> None:
    assert predict_launch(replace(FORWARD, shared_bytes=16), H100, 1, BYTES).resident_programs == 4
    assert predict_launch(replace(FORWARD, shared_bytes=100 << 10), H100, 1, BYTES).resident_programs == 2


def test_a_measured_copy_bandwidth_takes_the_place_of_the_tables() -> None:
    found = predict_launch(FORWARD, H100, 16, BYTES, copy_bytes_per_s=2.0e12)
    assert found.memory_s == pytest.approx(BYTES / 2.0e12)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-40GB", None),
    ],
)
def test_cards_are_known_by_their_names(device: str, name: str | None) -> None:
    card = card_of(device)
    assert (card.name if card else None) == name


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.EF.128 R4, desc[UR8][R2.64] ;
        /*0020*/                   LDG.E.EF.128 R8, desc[UR8][R2.64+0x10] ;
        /*0030*/                   LDG.E R16, desc[UR8][R2.64+0x20] ;
        /*0040*/                   FADD R20, R5, R1 ;
        /*0050*/                   LDG.E.EF.128 R12, desc[UR8][R2.64] ;
        /*0060*/                   FADD R21, R8, R12 ;
        /*0070*/               @P1 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
        /*00a0*/                   NOP;
"""


def test_sass_is_counted() -> None:
    found = machine_code.read_nvidia(SASS, "Function f: REG:24 STACK:0")
    assert found == {"instructions": 9, "registers": 24, "loads_in_flight": 2, "loads": 3, "loops": False}
    looping = SASS.replace("@P1 BRA `(.L_x_0)", "@P1 BRA 0x10")
    assert machine_code.read_nvidia(looping, "REG:24")["loops"]


AMD = """
f:
	v_mov_b32_e32 v0, 0
	s_load_dwordx2 s[0:1], s[4:5], 0x0
	global_load_dwordx4 v[0:3], v[8:9], off nt
	global_load_dwordx4 v[4:7], v[8:9], off offset:16
	global_load_dword v10, v[8:9], off
	s_waitcnt vmcnt(1)
	global_load_dwordx4 v[12:15], v[8:9], off
	s_waitcnt vmcnt(0) lgkmcnt(0)
.LBB0_1:
	v_add_f32_e32 v0, v1, v2 ; a comment
	s_endpgm
    .vgpr_count:     30
"""


def test_amd_assembly_is_counted() -> None:
    found = machine_code.read_amd(AMD)
    assert found == {"instructions": 6, "registers": 30, "loads_in_flight": 3, "loads": 3, "loops": False}
    assert machine_code.read_amd(AMD.replace("s_endpgm", "s_cbranch_scc1 .LBB0_1"))["loops"]


def test_every_kernel_is_recorded_for_every_card() -> None:
    codes = predict.read_codes()
    rows = list(
        predict.predictions(
            codes, CARDS, machine_code.KERNELS, machine_code.TOWERS.values(), machine_code.DTYPES.values(), predict.BATCHES
        )
    )
    by_row = sum(kernel.by_row for kernel in machine_code.KERNELS.values())
    combinations = (len(machine_code.KERNELS) - by_row) * 3 * 2 + by_row  # by row for one tower and dtype alone
    assert len(rows) == len(CARDS) * combinations * len(predict.BATCHES)
    assert len(codes) == combinations * len(machine_code.TARGETS)
    for row in rows:
        assert row.prediction.nominal_s < row.prediction.floor_s < row.prediction.seconds
        assert row.prediction.resident_programs >= 1
        if row.card.target != "gfx942":  # there LLVM jumps back to a block that it placed before
            assert not codes[machine_code.key(row.kernel, row.tower, row.dtype, row.card.target)].loops


def test_a_case_is_the_sum_of_its_launches() -> None:
    bf16 = torch.bfloat16
    frozen = predict.predict_case(FuseCase(CLIP_L_336, 16, bf16, mode="frozen"), H100, 3.0e12)
    codes = predict.read_codes()
    parts = [
        predict_launch(
            codes[machine_code.key(kernel, CLIP_L_336, bf16, "sm_90")],
            H100,
            16,
            predict.kernel_bytes(kernel, CLIP_L_336, bf16, 16),
        ).seconds
        for kernel in ("forward, means saved", "dw")
    ]
    assert frozen == pytest.approx(sum(parts) + START_S)
    assert predict.kernel_bytes("forward", CLIP_L_336, bf16, 16) == BYTES
    # the gradients of the states have the prefix rows as well
    assert predict.kernel_bytes("dh", DINOV2_L_518, bf16, 1) == (2 * 1369 + 5 * 1374) * 1024 * 2


def test_nothing_is_predicted_of_what_is_not_known() -> None:
    bf16 = torch.bfloat16
    assert predict.predict_case(FuseCase(CLIP_L_336, 1, bf16), None, 3.0e12) is None
    assert predict.predict_case(FuseCase(TINY, 1, bf16), H100, 3.0e12) is None
    assert predict.predict_case(FuseCase(CLIP_L_336, 1, bf16, stage=1), H100, 3.0e12) is None
    assert predict.predict_case(FuseCase(CLIP_L_336, 1, torch.float16), H100, 3.0e12) is None


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert predict.main(["--card", "H200", "--tower", CLIP_L_336.name, "--kernel", "forward", "--batch", "16"]) == 0
    maps, _, header, rule, *rows = capsys.readouterr().out.strip().splitlines()
    assert maps.endswith("forward 26, frozen 35, trainable 41; by the official formulation, forward: 101")
    assert "predicted µs" in header and len(rows) == 2 and {line.count("|") for line in (rule, *rows)} == {header.count("|")}


def test_kernels_are_compiled_without_a_gpu(tmp_path) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    file = tmp_path / "codes.json"
    arguments = ["--compile", "--card", "H100 SXM", "--tower", CLIP_L_336.name, "--kernel", "forward", "--dtype", "bfloat16"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.predict", *arguments, "--file", str(file)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    name = machine_code.key("forward", CLIP_L_336, torch.bfloat16, "sm_90")
    (code,) = predict.read_codes(file).values()
    recorded = predict.read_codes()[name]
    # instructions and registers change with Triton's version and stand under a budget in tests/aot
    assert (code.loads, code.threads, code.programs_per_image) == (24, recorded.threads, recorded.programs_per_image)


def test_a_prediction_stands_beside_the_measured_time(context: Context) -> None:
    measure_variants(
        context,
        "fuse something",
        {"tower": "T", "batch": 1, "dtype": "bfloat16", "stage": 2, "mode": "forward"},
        {"igva_kernels": lambda: [lambda: None], "other": lambda: [lambda: None], "official eager": lambda: [lambda: None]},
        predicted_s={"igva_kernels": 2.0, "other": None},
    )
    ours, other, eager = (case["metrics"] for case in context.recorder.document["cases"])
    assert ours["predicted_s"] == 2.0 and ours["measured_over_predicted"] == ours["median_s"] / 2.0
    assert "predicted_s" not in other and "predicted_s" not in eager
    machine = {"device": "X", "cpu": "Y", "cpu_count": 1, "cpu_capability": "Z", "torch_threads": 1, "versions": {"torch": "2"}}
    text = report.render(context.recorder.document | {"machine": machine})
    assert "| predicted µs | measured / predicted |" in text and "| 2,000,000 | 0.00 |" in text


def test_without_a_gpu_nothing_is_predicted(context: Context) -> None:
    assert context.predict(FuseCase(CLIP_L_336, 1, torch.bfloat16)) is None
