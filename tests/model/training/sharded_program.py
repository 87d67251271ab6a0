"""Run by test_distributed.py on two processes: training runs, one for each way to spread a model, in one launch.

    python -m torch.distributed.run --standalone --nproc_per_node=2 sharded_program.py FOLDER

FOLDER holds ``runs.json``, a list of {"name", "recipe" (a file), "stop_at" (a step, or null)}; each run writes
``NAME.pt`` with what the test looks at, or ``NAME.error`` with the message of the error that it ended with.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from model.training import run
from model.training.distributed import gathered_state
from model.training.recipe import load_recipe


class Watch(TrainerCallback):
    """Keeps what the run logs, sees how the weights lie during it, and stops it where it is told to."""

    def __init__(self, stop_at: int | None) -> None:
        self._stop_at = stop_at
        self.logs: list[dict[str, float]] = []
        self.sharded = 0
        self.unsharded = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({"step": state.global_step, **logs})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for parameter in model.parameters():
            whole = getattr(parameter, "ds_shape", None)
            is_part = isinstance(parameter, DTensor) or (whole is not None and parameter.numel() < whole.numel())
            self.sharded += is_part
            self.unsharded += not is_part

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self._stop_at:
            raise InterruptedError(f"stopped at step {self._stop_at}")


def main() -> None:
    folder = Path(sys.argv[1])
    kept = {}
    save = run.save_checkpoint

    def save_and_keep(recipe, trainer, *rest):
        kept["state"] = gathered_state(trainer)
        buffers = trainer.accelerator.unwrap_model(trainer.model).buffers()
        kept["buffers"] = sorted({str(buffer.dtype) for buffer in buffers if buffer.is_floating_point()})
        kept["wrapper"] = type(trainer.model_wrapped).__name__
        return save(recipe, trainer, *rest)

    run.save_checkpoint = save_and_keep
    for entry in json.loads((folder / "runs.json").read_text()):
        watch = Watch(entry["stop_at"])
        kept.clear()
        try:
            result = run.train(load_recipe(entry["recipe"]), callbacks=[watch])
        except (ValueError, InterruptedError) as error:
            if dist.get_rank() == 0:
                (folder / f"{entry['name']}.error").write_text(str(error))
        else:
            seen = {"logs": watch.logs, "sharded": watch.sharded, "unsharded": watch.unsharded, "result": result, **kept}
            if dist.get_rank() == 0:
                torch.save(seen, folder / f"{entry['name']}.pt")
        gc.collect()
        dist.barrier()
        if dist.get_rank() == 0:
            print("done", entry["name"], flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
