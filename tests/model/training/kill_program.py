"""Run by test_kill.py: kills a training run again and again, and looks at what it leaves.

    python kill_program.py FOLDER NUMBER SEED

FOLDER holds ``recipe.yaml``, a run that saves at every step and replaces a finished checkpoint, and that checkpoint in the
place of its output. Children are forked from this process, which has imported once. Half of them kill themselves (SIGKILL) at
the n-th file that is opened, renamed or removed since the training began, n drawn from SEED: moments that a clock would hardly
hit; the others are killed from here after a drawn time. After each: the newest intermediate checkpoint is whole, loads, and is
no older than the last; a finished checkpoint is there. The next child goes on with the run; one that ends must have reached
the bits of a run that nobody killed.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import random
import select
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, TrainerCallback

from model.training.checkpoints import check_whole
from model.training.folders import RunFolders
from model.training.recipe import TrainRecipe, load_recipe
from model.training.run import train

# What a run imports on first use, each child would import anew: five of its eight seconds.
for _name in ("sentence_transformers", "deepspeed", "narwhals"):
    if importlib.util.find_spec(_name) is not None:
        importlib.import_module(_name)

WEIGHTS = "model.safetensors"
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.truncate")


class Begin(TrainerCallback):
    """Tells the parent that the training begins, and counts events from there on."""

    def __init__(self, pipe: int, kill_at_event: int | None) -> None:
        self._pipe, self._left = pipe, kill_at_event

    def on_train_begin(self, args, state, control, **kwargs):
        os.write(self._pipe, b"b")
        if self._left is not None:
            sys.addaudithook(self._count)

    def _count(self, event: str, args: object) -> None:
        if event in EVENTS:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def run_child(recipe: TrainRecipe, kill_at_event: int | None, kill_after: float | None) -> bool:
    """Train in a child; returns whether it came to its end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        log = os.open(Path(recipe.output_dir).with_name("child.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            train(recipe, callbacks=[Begin(writing, kill_at_event)])
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writing)
    os.read(reading, 1)
    if kill_after is not None:
        select.select([reading], [], [], kill_after)  # or its end, if that comes first
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reading)
    if os.WIFEXITED(status):
        if os.WEXITSTATUS(status):
            raise SystemExit(Path(recipe.output_dir).with_name("child.log").read_text()[-4000:])
        return True
    return False


def main() -> None:
    folder, number, chance = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    torch.set_num_threads(1)
    recipe = load_recipe(folder / "recipe.yaml")
    straight = replace(recipe, output_dir=str(folder / "straight"))
    began = time.perf_counter()
    if not run_child(straight, None, None):
        raise SystemExit("the run that nobody kills did not end")
    seconds = time.perf_counter() - began
    expected = (folder / "straight" / WEIGHTS).read_bytes()
    old = (Path(recipe.output_dir) / WEIGHTS).read_bytes()

    folders, output = RunFolders(recipe), Path(recipe.output_dir)
    kills = ends = 0
    newest = -1
    while kills < number:
        resumes = folders._newest_intermediate() is not None
        # A run has some hundreds of events; a draw beyond its end lets it come to its end.
        event = chance.randint(1, 60 if chance.random() < 0.5 else 1200) if kills % 2 else None
        after = None if event else chance.random() * seconds
        ended = run_child(replace(recipe, resume=resumes), event, after)
        kills += not ended
        there = folders._newest_intermediate()
        finished = [path for path in (output, folders._replaced) if (path / WEIGHTS).exists()]
        if not finished:
            raise SystemExit("no finished checkpoint is left")
        for path in finished:
            weights = (path / WEIGHTS).read_bytes()
            if weights not in (expected, old):
                raise SystemExit(f"{path} holds the weights of neither run")
        if there is not None:
            check_whole(there)
            AutoModelForImageTextToText.from_pretrained(there)
            step = int(there.name.rpartition("-")[2])
            if resumes and step < newest:
                raise SystemExit(f"the newest checkpoint was of step {newest} and is of step {step}")
            newest = step
        if ended or ((output / WEIGHTS).exists() and (output / WEIGHTS).read_bytes() == expected):
            AutoModelForImageTextToText.from_pretrained(output)
            ends += 1
            if ended and (output / WEIGHTS).read_bytes() != expected:
                raise SystemExit("a killed and resumed run did not end in the bits of a straight one")
            # Begin anew, with the old checkpoint in its place.
            shutil.rmtree(folders.partial, ignore_errors=True)
            (output / WEIGHTS).write_bytes(old)
            newest = -1
        print(json.dumps({"kills": kills, "event": event, "after": after, "ended": ended, "newest": newest}), flush=True)
    # The last one, too, can be brought to its end.
    resumes = folders._newest_intermediate() is not None
    run_child(replace(recipe, resume=resumes), None, None)
    if (output / WEIGHTS).read_bytes() != expected:
        raise SystemExit("a killed and resumed run did not end in the bits of a straight one")
    print(f"{kills} kills, {ends} ends: nothing lost", flush=True)


if __name__ == "__main__":
    main()
