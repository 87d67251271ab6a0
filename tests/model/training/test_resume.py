"""A run that was stopped and goes on ends in the very bits of one that was not; what cannot go on exactly is refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

from model.instruction import SentenceEncoder
from model.training import run
from model.training.checkpoints import MANIFEST, CheckpointFolder, check_whole, telling_what_is_safe
from model.training.precision import PrecisionChoice
from model.training.recipe import LoraSettings
from model.training.run import train

WEIGHTS = "model.safetensors"


class Stop(run.TrainerCallback):
    """Ends a run right after the checkpoint of a step, or after the step itself."""

    def __init__(self, step: int, saved: bool = True) -> None:
        self.step, self.saved = step, saved

    def on_save(self, args, state, control, **kwargs):
        if self.saved and state.global_step == self.step:
            raise InterruptedError("stopped")

    def on_step_end(self, args, state, control, **kwargs):
        if not self.saved and state.global_step == self.step:
            raise InterruptedError("stopped")


def losses(checkpoint):
    """Loss, gradient norm and learning rate of each step, the last of those that were taken twice."""
    entries = map(json.loads, Path(checkpoint, "training", "log.jsonl").read_text().splitlines())
    return {e["step"]: (e["loss"], e["grad_norm"], e["learning_rate"]) for e in entries if "loss" in e}


CASES = {
    "accumulated, in any order": ({"language_model_training": "full", "data": {"grouping": "random"}}, Stop(3)),
    "grouped, at the end of an epoch": ({"language_model_training": "full"}, Stop(4)),
    "packed, in the second epoch, between two saves": (
        {"language_model_training": "full", "data": {"packing": True}, "save_every": 2},
        Stop(5, saved=False),
    ),
    "adapters with dropout": (
        {"language_model_training": "lora", "lora": LoraSettings(r=4, dropout=0.3), "data": {"packing": True}},
        Stop(3),
    ),
    "worker processes": ({"language_model_training": "frozen", "data": {"num_workers": 1}}, Stop(3)),
    "after the last step": ({"language_model_training": "frozen"}, Stop(6)),
}


FAST = ("packed, in the second epoch, between two saves", "adapters with dropout")


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in FAST else pytest.mark.slow) for case in CASES])
def test_a_resumed_run_ends_in_the_bits_of_a_straight_one(case, make_recipe, tmp_path, monkeypatch):
    fields, stop = CASES[case]
    # Six steps of four samples, in two passes each: an epoch has four.
    fields = {"max_steps": 6, "save_every": 1, "scheduler": "cosine", "warmup": 2, "weight_decay": 0.1, **fields}
    straight = make_recipe(2, **fields)
    straight.output_dir = str(tmp_path / "straight")
    expected = train(straight)["checkpoint"]

    with pytest.raises(InterruptedError):
        train(make_recipe(2, **fields), callbacks=[stop])
    # What has been embedded is not embedded again.
    monkeypatch.setattr(SentenceEncoder, "encode", lambda *args: pytest.fail("embedded a second time"))
    result = train(make_recipe(2, resume=True, **fields))
    assert (result["train_loss"] is None) == (stop.step == 6)
    resumed = result["checkpoint"]
    assert Path(resumed, WEIGHTS).read_bytes() == Path(expected, WEIGHTS).read_bytes()
    assert losses(resumed) == losses(expected)
    assert set(losses(resumed)) == {1, 2, 3, 4, 5, 6}


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped_run(make_recipe_in, tmp_path_factory):
    """The folder of a run of four steps that was stopped at the second."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(InterruptedError):
        train(make_recipe_in(folder)(1, max_steps=4, save_every=1), callbacks=[Stop(2)])
    return folder / "stage1.partial"


@pytest.fixture
def stopped(stopped_run, tmp_path):
    """The newest checkpoint of a copy of it, where ``make_recipe(1)`` looks for one."""
    shutil.copytree(stopped_run, tmp_path / "stage1.partial")
    return CheckpointFolder(tmp_path / "stage1.partial" / "checkpoints").newest()


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"learning_rate": 1e-3, "seed": 7}, ["learning_rate was 0.01, is 0.001", "seed was 42, is 7"]),
        ({"micro_batch_size": 4}, ["micro_batch_size was 2, is 4"]),
        ({"data": {"packing": True}}, ["data.packing was False, is True"]),
    ],
)
def test_another_recipe_is_refused_with_every_difference(fields, words, stopped, make_recipe):
    folder = stopped
    before = contents(folder)
    with pytest.raises(ValueError) as error:
        train(make_recipe(1, **{"max_steps": 4, "save_every": 1, "resume": True, **fields}))
    for word in (*words, "overwrite=true", str(folder)):
        assert word in str(error.value)
    assert contents(folder) == before


def test_another_plan_of_layers_is_refused(stopped, make_recipe):
    recipe = make_recipe(1, max_steps=4, save_every=1, resume=True)
    recipe.model.fusion = {**recipe.model.fusion, "num_groups": 4}
    with pytest.raises(ValueError, match=r"model.fusion.num_groups was 2, is 4"):
        train(recipe)


def test_an_arithmetic_that_was_chosen_by_the_clock_is_the_one_that_goes_on(stopped, make_recipe, monkeypatch):
    fields = {"max_steps": 4, "save_every": 1, "resume": True}
    choices = {"auto": PrecisionChoice("bf16", "the clock"), "fp32": PrecisionChoice("fp32", "set by the recipe")}
    monkeypatch.setattr(run, "choose_precision", lambda setting, device: choices[setting])
    with pytest.raises(ValueError, match="precision was 'fp32', is 'bf16'"):
        train(make_recipe(1, precision="auto", **fields))
    assert train(make_recipe(1, precision="fp32", **fields))["steps"] == 4


def test_other_data_are_refused(stopped, make_recipe, records, picture_folder):
    fewer = picture_folder / "fewer.json"
    fewer.write_text(json.dumps(records[:-2]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"the data were 16 samples, .*, are 14 samples"):
        train(make_recipe(1, max_steps=4, save_every=1, resume=True, data={"path": str(fewer)}))


def test_what_changes_nothing_that_is_learned_may_change(stopped, make_recipe):
    result = train(make_recipe(1, max_steps=4, save_every=2, log_every=2, resume=True, data={"num_workers": 1}))
    assert result["steps"] == 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / WEIGHTS).write_bytes(b"torn"), r"model.safetensors has 4 bytes, and was saved with"),
        (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is gone"),
        (lambda folder: (folder / MANIFEST).unlink(), f"holds no {MANIFEST}"),
        (lambda folder: (folder / MANIFEST).write_text("{"), f"{MANIFEST} cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_refused_before_anything_is_touched(damage, message, stopped, make_recipe):
    folder = stopped
    damage(folder)
    before = contents(folder.parent)
    with pytest.raises(ValueError, match=f"is damaged: .*{message}"):
        train(make_recipe(1, max_steps=4, save_every=1, resume=True))
    assert contents(folder.parent) == before


def test_an_unreadable_checkpoint_is_told_as_such(stopped, make_recipe, monkeypatch):
    read_text = Path.read_text

    def refuse(self, *args, **kwargs):
        if self.name == MANIFEST:
            raise PermissionError(13, "Permission denied", str(self))
        return read_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)  # root, who runs many tests, may read everything
    with pytest.raises(OSError, match=r"checkpoint-2 cannot be read: .*Permission denied.*check its owner"):
        train(make_recipe(1, max_steps=4, save_every=1, resume=True))


# ---- full disks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_files():
    """``small_files(bytes)``: from now on the system refuses longer files, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


class FillAt(run.TrainerCallback):
    """Fills the disk when a step begins."""

    def __init__(self, limit, step: int) -> None:
        self.limit, self.step = limit, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.limit(20_000)


def test_a_full_disk_in_a_save_loses_nothing_and_says_where_to_go_on(make_recipe, tmp_path, small_files):
    fields = {"language_model_training": "full", "max_steps": 4, "save_every": 1}
    straight = make_recipe(2, **fields)
    straight.output_dir = str(tmp_path / "straight")
    expected = train(straight)["checkpoint"]

    with pytest.raises(
        OSError, match=r"could not save the checkpoint of step 3 .*GB are free.*checkpoint-2 is whole.*resume=tr"
    ):
        train(make_recipe(2, **fields), callbacks=[FillAt(small_files, 2)])
    folder = CheckpointFolder(tmp_path / "stage2.partial" / "checkpoints")
    check_whole(folder.newest())
    assert [path.name for path in folder.folder.iterdir()] == ["checkpoint-2"]  # the half one has given its room back
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    resumed = train(make_recipe(2, resume=True, **fields))["checkpoint"]
    assert Path(resumed, WEIGHTS).read_bytes() == Path(expected, WEIGHTS).read_bytes()


def test_a_disk_that_is_full_at_the_end_keeps_the_last_step(make_recipe, small_files, tmp_path):
    fields = {"language_model_training": "full", "max_steps": 2, "save_every": 1}

    class FillAfterTheLastSave(run.TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            small_files(20_000)

    with pytest.raises(OSError, match=r"could not save the finished checkpoint .*checkpoint-2 is whole.*resume=true"):
        train(make_recipe(2, **fields), callbacks=[FillAfterTheLastSave()])
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    assert Path(train(make_recipe(2, resume=True, **fields))["checkpoint"], WEIGHTS).is_file()


def test_checkpoints_that_will_not_fit_are_refused_before_the_first_step(make_recipe, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 9, 9))
    with pytest.raises(OSError, match=r"checkpoints of this run take about .* are free at .*output_dir"):
        train(make_recipe(1, save_every=1), callbacks=[Stop(1, saved=False)])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_failed_writes_of_all_libraries_become_one_error(error, tmp_path):
    message = r"could not save it .*no checkpoint had been saved before"
    with pytest.raises(OSError, match=message), telling_what_is_safe("it", tmp_path / "not" / "there", None):
        raise error


def test_an_error_that_is_no_failed_write_stays_as_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), telling_what_is_safe("it", tmp_path, None):
        raise RuntimeError("shapes do not fit")


def test_a_line_of_the_log_that_was_cut_off_does_not_spoil_the_next(stopped, make_recipe, tmp_path):
    with (tmp_path / "stage1.partial" / "log.jsonl").open("a") as log:
        log.write('{"time": 17')
    checkpoint = train(make_recipe(1, max_steps=4, save_every=1, resume=True))["checkpoint"]
    assert set(losses(checkpoint)) == {1, 2, 3, 4}


def test_what_a_killed_save_left_is_removed(stopped, make_recipe, tmp_path):
    folder = stopped.parent
    (folder / "saving" / "checkpoint-3").mkdir(parents=True)
    (folder / "saving" / "checkpoint-3" / WEIGHTS).write_bytes(b"half")
    (tmp_path / "stage1.partial" / "finished" / "training").mkdir(parents=True)
    (tmp_path / "stage1.partial" / "finished" / "old").touch()
    checkpoint = train(make_recipe(1, max_steps=4, save_every=1, resume=True))["checkpoint"]
    assert "old" not in os.listdir(checkpoint)
