"""What a run shows and keeps: a status line for the person, a JSONL for everything else."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

# Log keys of the mean weight of each layer group are this and the group's number, from 1: trackers take scalars only.
FUSION_WEIGHT_KEY = "fusion_weight_"


class StatusLine(TrainerCallback):
    """Loss, speed and memory: a bar on a terminal, one line for each log step elsewhere (files, CI)."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and self._stream.isatty():
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, file=self._stream, unit="step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        text = status_text(logs)
        if self._bar is not None and "loss" in logs:
            self._bar.set_postfix_str(text)
        elif self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(f"step {state.global_step}/{state.max_steps}  {text}", file=self._stream, flush=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class JsonlLog(TrainerCallback):
    """Appends every log entry as one JSON line, flushed at once, so that a killed run keeps what it logged.

    Args:
        path: the file; an existing one is continued.
        header: written as the first line of the run (recipe, counts of parameters, precision).
    """

    def __init__(self, path: str | Path, header: dict[str, Any]) -> None:
        self._path = Path(path)
        self._header = header

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._end_broken_line()
            self._write({"event": "start", "step": state.global_step, "torch": torch.__version__, **self._header})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            self._write({"event": "log", "step": state.global_step, **logs})

    def _end_broken_line(self) -> None:
        """Cut off what a killed run had begun to write."""
        if self._path.exists():
            whole, end, _ = self._path.read_bytes().rpartition(b"\n")
            os.truncate(self._path, len(whole) + len(end))

    def _write(self, entry: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **entry}) + "\n")


def keep_tensorboard(callbacks: Iterable[TrainerCallback], folder: Path) -> None:
    """Let TensorBoard's callback, where there is one, write to ``folder``.

    transformers writes to the folder of the intermediate checkpoints, which ends with the run. ``TENSORBOARD_LOGGING_DIR`` in
    the environment goes first.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder)


def status_text(logs: dict[str, Any]) -> str:
    """The numbers of a log entry that a person watches, in a fixed order."""
    parts = []
    for key, text in (("loss", "loss {:.4f}"), ("eval_loss", "held-out loss {:.4f}"), ("train_loss", "mean loss {:.4f}")):
        if key in logs:
            parts.append(text.format(logs[key]))
    if "eval_exact_match" in logs:
        parts.append(f"exact match {100 * logs['eval_exact_match']:.1f} ± {100 * logs['eval_exact_match_stderr']:.1f} %")
    if "balance" in logs:
        parts.append(f"balance {logs['balance']:.3f}")
    weights = [value for key, value in logs.items() if key.startswith(FUSION_WEIGHT_KEY)]
    if weights:
        parts.append("weights " + "/".join(f"{weight:.2f}" for weight in weights))
    for key, text in (("tokens_per_second", "{:,.0f} tokens/s"), ("samples_per_second", "{:.1f} samples/s")):
        if key in logs:
            parts.append(text.format(logs[key]))
    if "tflops_per_second" in logs:
        share = f" ({100 * logs['share_of_peak']:.1f} % of the card)" if "share_of_peak" in logs else ""
        parts.append(f"{logs['tflops_per_second']:.3g} TFLOP/s{share}")
    for key, text in (("padding_share", "padding"), ("data_wait_share", "data wait")):
        if key in logs:
            parts.append(f"{text} {100 * logs[key]:.1f} %")
    if "peak_memory_gb" in logs:
        parts.append(f"peak {logs['peak_memory_gb']:.2f} GB")
    if "samples_left_out" in logs:
        parts.append(f"{logs['samples_left_out']:,} samples left out")
    return "  ".join(parts)
