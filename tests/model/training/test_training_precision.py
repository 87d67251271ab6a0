"""The arithmetic is chosen by timing it."""

from __future__ import annotations

import pytest
import torch

from model.training import precision
from model.training.precision import choose_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(("bf16_seconds", "expected"), [(0.02, "bf16"), (1.4, "fp32")])
def test_auto_takes_the_faster_one_and_says_both_times(bf16_seconds, expected, monkeypatch):
    seconds = {None: 0.06, torch.bfloat16: bf16_seconds}
    monkeypatch.setattr(precision, "_timed_step", lambda device, dtype: seconds[dtype])
    choice = choose_precision("auto", CPU)
    assert choice.precision == expected
    assert "fp32 60.0 ms" in choice.reason
    assert f"bf16 {1000 * bf16_seconds:.1f} ms" in choice.reason


@pytest.mark.parametrize("setting", ["fp32", "bf16"])
def test_a_set_precision_is_not_timed(setting, monkeypatch):
    monkeypatch.setattr(precision, "_timed_step", lambda device, dtype: pytest.fail("timed"))
    assert choose_precision(setting, CPU).precision == setting


def test_a_step_is_really_run_in_both(monkeypatch):
    dtypes = []
    linear = torch.nn.functional.linear

    def record(*args):
        out = linear(*args)
        dtypes.append(out.dtype)
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", record)
    assert choose_precision("auto", CPU).precision in ("fp32", "bf16")
    assert set(dtypes) == {torch.float32, torch.bfloat16}
