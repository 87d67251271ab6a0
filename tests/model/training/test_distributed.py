"""Two real processes on the CPU: DDP, DeepSpeed's ZeRO-2 and ZeRO-3 and FSDP2 train, save, load and go on alike.

The runs of all tests share one launch. A step takes eight samples in four passes of two; of the second step of an epoch one
rank's second pass is of text alone, while the other rank's has images.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, TrainerCallback

from model.data.batches import StepBatchSampler
from model.training.distributed import CONFIGS, distributed_arguments, read_config, start_processes
from model.training.folders import RunFolders
from model.training.lora import ADAPTER_FILE
from model.training.recipe import LoraSettings
from model.training.run import train

PROGRAM = Path(__file__).with_name("sharded_program.py")
ROOT = Path(__file__).resolve().parents[3]
WITH_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
WRAPPERS = {
    "ddp": "DistributedDataParallel",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
    "fsdp2": "FSDPIgvaLlavaForConditionalGeneration",
}
WAYS = [
    pytest.param(way, marks=pytest.mark.skipif("zero" in way and not WITH_DEEPSPEED, reason="deepspeed is not installed"))
    for way in WRAPPERS
]
LORA = LoraSettings(r=4, alpha=8)


def launch(folder: Path, runs: list[dict[str, Any]]) -> None:
    for entry in runs:
        file = folder / f"{entry['name']}.yaml"
        file.write_text(yaml.safe_dump(entry["recipe"]), encoding="utf-8")
        entry["recipe"] = str(file)
    (folder / "runs.json").write_text(json.dumps(runs))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(PROGRAM), str(folder)]
    # The guard ends a hang.
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def recipe_of(make, **fields):
    defaults = {"batch_size": 8, "language_model_training": "full", "balance_loss_weight": 0.5, "learning_rate": 1e-3}
    return make(2, **{**defaults, "max_steps": 4, "save_every": 2, "scheduler": "cosine", "warmup": 1, **fields})


@pytest.fixture(scope="module")
def runs(make_recipe_in, tmp_path_factory):
    """``runs(name)``: what the run of this name wrote, see sharded_program.py, or the message that it ended with."""
    folder = tmp_path_factory.mktemp("ranks")
    make = make_recipe_in(folder)
    entries: list[dict[str, Any]] = []

    def add(name, stop_at=None, output=None, **fields):
        recipe = recipe_of(make, output_dir=str(folder / (output or name)), **fields)
        entries.append({"name": name, "recipe": recipe.to_dict(), "stop_at": stop_at})
        return recipe

    for way in WRAPPERS:
        if "zero" in way and not WITH_DEEPSPEED:
            continue
        add(way, distributed=way)
        add(f"{way} stopped", stop_at=2, output=f"{way}-2", distributed=way)
        add(f"{way} resumed", output=f"{way}-2", distributed=way, resume=True)
    for way in ("ddp", "fsdp2", *(["zero3"] if WITH_DEEPSPEED else [])):
        lora = {"language_model_training": "lora", "lora": LORA, "frozen_weights": "fp32"}
        add(f"{way} lora", distributed=way, **lora)
    add("fsdp2 lora bf16", distributed="fsdp2", language_model_training="lora", lora=LORA, precision="bf16")
    if WITH_DEEPSPEED:
        add("zero3 bf16", distributed="zero3", precision="bf16")
    no_encoder = add("no encoder", language_model_training="frozen", balance_loss_weight=0.0)
    entries[-1]["recipe"]["model"] |= {"sentence_encoder": None, "fusion": {**no_encoder.model.fusion, "text_dim": 16}}
    stopped = recipe_of(make, output_dir=str(folder / "of one process"))
    with pytest.raises(InterruptedError):
        train(stopped, callbacks=[StopAtSave()])
    add("of one process", resume=True)
    launch(folder, entries)

    def read(name):
        error = folder / f"{name}.error"
        return error.read_text() if error.exists() else torch.load(folder / f"{name}.pt", weights_only=False)

    return read


class StopAtSave(TrainerCallback):
    """Ends a run at its first checkpoint."""

    def on_save(self, args, state, control, **kwargs):
        raise InterruptedError("stopped")


@pytest.fixture(scope="module")
def alone(make_recipe_in, tmp_path_factory):
    """The same run in one process without a launcher: its log."""
    folder = tmp_path_factory.mktemp("alone")
    checkpoint = train(recipe_of(make_recipe_in(folder), output_dir=str(folder / "out")))["checkpoint"]
    entries = map(json.loads, Path(checkpoint, "training", "log.jsonl").read_text().splitlines())
    return [entry for entry in entries if "loss" in entry]


def test_one_rank_has_a_pass_without_images(records):
    """What the tests below are about; by the estimate of lengths that text is shortest."""
    has_images = ["image" in record for record in records]
    lengths = [100 if has else 10 for has in has_images]
    batches = [
        list(StepBatchSampler(lengths, has_images, batch_size=8, micro_batch_size=2, seed=42, rank=rank, num_ranks=2))
        for rank in (0, 1)
    ]
    with_images = [[any(has_images[sample] for sample in one) for one in of_rank] for of_rank in batches]
    assert sorted(zip(*with_images, strict=True)) == [(True, False), (True, True), (True, True), (True, True)]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_take_the_steps_of_one_process(way, runs, alone):
    """Losses, and gradients by their norm: Adam's steps alone would not show a gradient of another scale."""
    seen = runs(way)
    assert seen["wrapper"] == WRAPPERS[way]
    logs = [entry for entry in seen["logs"] if "loss" in entry]
    assert len(logs) == 4
    for key in ("loss", "balance", "grad_norm", "learning_rate"):
        # fp32 sums in another order; a rank too many or too few in a mean is off by half.
        assert [entry[key] for entry in logs] == pytest.approx([entry[key] for entry in alone], rel=2e-4), key


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_weights_lie_as_the_recipe_says(way, runs):
    seen = runs(way)
    if way in ("ddp", "zero2"):
        assert seen["sharded"] == 0 < seen["unsharded"]
    elif way == "zero3":  # small ones stay whole, below stage3_param_persistence_threshold
        assert seen["sharded"] > 0
    else:
        assert seen["unsharded"] == 0 < seen["sharded"]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_saved_folder_loads_in_one_process_and_holds_the_gathered_weights(way, runs):
    seen = runs(way)
    loaded = AutoModelForImageTextToText.from_pretrained(seen["result"]["checkpoint"])
    assert type(loaded).__name__ == "IgvaLlavaForConditionalGeneration"
    assert loaded.config.architectures == ["IgvaLlavaForConditionalGeneration"]
    assert loaded.dtype == torch.float32
    state, expected = loaded.state_dict(), runs("ddp")["state"]
    assert state.keys() == seen["state"].keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, seen["state"][name]), name
        # Four steps of Adam at 1e-3, whose direction is noise where a gradient is nearly zero.
        torch.testing.assert_close(tensor, expected[name], atol=1e-3, rtol=0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_of_two_ranks_ends_in_the_bits_of_a_straight_one(way, runs):
    straight, resumed = runs(way), runs(f"{way} resumed")
    assert runs(f"{way} stopped") == "stopped at step 2"
    for name, tensor in straight["state"].items():
        assert torch.equal(resumed["state"][name], tensor), name


@pytest.mark.slow
def test_a_checkpoint_of_another_number_of_processes_is_refused(runs):
    assert "processes were 1, are 2" in runs("of one process")


@pytest.mark.slow
@pytest.mark.parametrize("way", [way for way in WAYS if way.values[0] in ("zero3", "fsdp2")])
def test_sharded_adapters_are_those_of_ddp_and_are_merged_as_they_are(way, runs):
    ddp, sharded = runs("ddp lora"), runs(f"{way} lora")
    assert sharded["sharded"] > 0
    for entry, other in zip(ddp["logs"], sharded["logs"], strict=True):
        if "loss" in entry:
            assert (entry["loss"], entry["grad_norm"]) == pytest.approx((other["loss"], other["grad_norm"]), rel=2e-4)
    checkpoint = Path(sharded["result"]["checkpoint"])
    merged = AutoModelForImageTextToText.from_pretrained(checkpoint)
    for name, tensor in AutoModelForImageTextToText.from_pretrained(ddp["result"]["checkpoint"]).state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, atol=1e-3, rtol=0, msg=name)
    name = "model.language_model.layers.0.self_attn.q_proj"
    adapters = load_file(checkpoint / "adapters" / ADAPTER_FILE)
    down, up = (adapters[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    expected = sharded["state"][f"{name}.base_layer.weight"] + up @ down * (LORA.alpha / LORA.r)
    torch.testing.assert_close(merged.get_parameter(f"{name}.weight"), expected, atol=1e-6, rtol=0)
    assert up.any()


@pytest.mark.slow
@pytest.mark.skipif(not WITH_DEEPSPEED, reason="deepspeed is not installed")
def test_zero3_in_bf16_saves_the_optimizers_fp32_and_keeps_positions_in_fp32(runs):
    seen = runs("zero3 bf16")
    assert seen["buffers"] == ["torch.float32"]
    losses = [entry["loss"] for entry in seen["logs"] if "loss" in entry]
    assert losses == pytest.approx([entry["loss"] for entry in runs("ddp")["logs"] if "loss" in entry], rel=0.03)
    for name, tensor in seen["state"].items():
        learns = not name.startswith("model.vision_tower.")
        assert tensor.dtype == (torch.float32 if learns else torch.bfloat16), name
    weight = seen["state"]["model.multi_modal_projector.linear_1.weight"]
    assert (weight != weight.bfloat16().float()).any()  # AdamW's small steps are there


@pytest.mark.slow
def test_adapters_under_fsdp2_train_in_bf16_on_weights_held_in_fp32(runs):
    seen = runs("fsdp2 lora bf16")
    assert {tensor.dtype for tensor in seen["state"].values()} == {torch.float32}
    losses = [entry["loss"] for entry in seen["logs"] if "loss" in entry]
    assert losses == pytest.approx([entry["loss"] for entry in runs("ddp lora")["logs"] if "loss" in entry], rel=0.03)


@pytest.mark.slow
def test_two_ranks_without_a_sentence_encoder_train_the_projector_alone(runs):
    seen = runs("no encoder")
    assert seen["result"]["parameters"]["allocator"]["trainable"] == 0
    assert seen["result"]["steps"] == 4


# ---- what is refused, in one process -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["zero2", "zero3", "fsdp2", "mine.json"])
def test_sharding_needs_a_launcher(way, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match=f"distributed is '{way}', but this process was started alone; .*torchrun"):
        start_processes(way)


def test_a_sharding_that_accelerate_asks_for_is_refused(monkeypatch):
    monkeypatch.setattr("model.training.distributed._ASKED_BY_LAUNCHER", ["ACCELERATE_USE_FSDP"])
    with pytest.raises(ValueError, match="set its field distributed"):
        start_processes("ddp")


def test_an_unknown_way_is_refused(make_recipe):
    with pytest.raises(ValueError, match=r"distributed must be one of 'ddp', 'zero2', 'zero3', 'fsdp2', .*got 'fsdp'"):
        make_recipe(1, distributed="fsdp")


def test_fsdp2_refuses_frozen_weights_in_bf16(make_recipe):
    with pytest.raises(ValueError, match="frozen_weights is bf16 with distributed fsdp2"):
        make_recipe(1, distributed="fsdp2", frozen_weights="bf16", precision="bf16")


def test_every_shipped_configuration_reads_and_others_are_refused_by_name(make_recipe, make_model, tmp_path):
    assert read_config("zero2")["zero_optimization"]["stage"] == 2
    assert read_config("zero3")["zero_optimization"]["stage"] == 3
    arguments = distributed_arguments(make_recipe(1, distributed="fsdp2"), make_model())
    assert arguments["fsdp_config"]["transformer_layer_cls_to_wrap"] == ["LlamaDecoderLayer"]
    assert {path.name for path in CONFIGS.glob("*.json")} == {"deepspeed-zero2.json", "deepspeed-zero3.json", "fsdp2.json"}
    with pytest.raises(FileNotFoundError, match=r"no DeepSpeed configuration at nowhere\.json"):
        read_config("nowhere.json")
    for text, message in (("{", "is no JSON"), ("[]", "holds a list")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_config(str(tmp_path / "bad.json"))


def test_a_machine_that_does_not_see_the_checkpoints_says_so(make_recipe):
    with pytest.raises(FileNotFoundError, match="all machines must share this folder"):
        RunFolders(make_recipe(1, resume=True)).resume_from(None)
