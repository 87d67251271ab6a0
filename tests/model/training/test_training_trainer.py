"""The trainer: a loss that accumulation does not change, groups of learning rates, and what it logs."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import TrainingArguments

from model.data.batches import HeldOutBatchSampler
from model.data.collator import ImageTextCollator
from model.data.dataset import LlavaDataset
from model.data.llava_json import samples_from_records
from model.instruction import embed_instructions
from model.training.callbacks import status_text
from model.training.flops import StepFlops
from model.training.freeze import apply_stage
from model.training.trainer import IgvaTrainer, _HeldOutLoss


@pytest.fixture
def make_trainer(model_and_processor, picture_folder, make_record, tmp_path):
    """A trainer on eight samples whose answers differ much in length, so that no two batches have equal label counts."""
    model, processor = model_and_processor
    lengths = (50, 1, 3, 35, 2, 20, 7, 1)
    turns = [make_record(f"{n}", "images/red.png", "<image>\nSay it.", "a" * n) for n in lengths[:-2]]
    turns.append(make_record("two", ["images/red.png", "images/blue.png"], "<image><image>\nBoth?", "b" * lengths[-2]))
    turns.append(make_record("text", None, "Say it.", "c" * lengths[-1]))

    def embed(conversations):
        return embed_instructions(conversations, processor.encode_instructions)

    data = LlavaDataset(samples_from_records(turns, picture_folder), processor, embed=embed)

    def make(micro_batch_size=8, accumulation=1, learning_rates=None, **options):
        trained = copy.deepcopy(model)
        trained.config.balance_loss_weight = options.pop("balance_loss_weight", 0.5)
        trained.config.legacy_double_softmax = options.pop("legacy_double_softmax", False)
        apply_stage(trained, 2, "full")
        # Plain gradient descent: Adam would hide a gradient of the wrong scale.
        defaults = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "max_steps": 1}
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "trainer"),
            per_device_train_batch_size=micro_batch_size,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            **{**defaults, **options},
        )
        return IgvaTrainer(
            model=trained,
            args=arguments,
            train_dataset=data,
            data_collator=ImageTextCollator(processor.tokenizer.pad_token_id),
            **(learning_rates or {}),
        )

    return make


def test_accumulation_gives_the_update_of_one_large_batch(make_trainer):
    whole, accumulated = make_trainer(8, 1), make_trainer(2, 4)
    before = copy.deepcopy(whole.model.state_dict())
    whole.train()
    accumulated.train()
    moved = 0.0
    for name, expected in whole.model.state_dict().items():
        step = (expected - before[name]).abs().max()
        moved = max(moved, float(step))
        # fp32 sums in another order: rounding of the gradients, not their scale (a wrong count is off by tens of percent).
        torch.testing.assert_close(
            accumulated.model.state_dict()[name], expected, atol=1e-4 * float(step) + 1e-7, rtol=0, msg=name
        )
    assert moved > 1e-2


def test_accumulation_logs_the_loss_of_one_large_batch(make_trainer):
    logged = []
    for trainer in (make_trainer(8, 1), make_trainer(2, 4)):
        trainer.train()
        logged.append(trainer.state.log_history[0])
    for key in ("loss", "objective", "balance"):
        assert logged[0][key] == pytest.approx(logged[1][key], rel=1e-5), key


@pytest.mark.parametrize("legacy", [False, True])
def test_the_logged_loss_is_the_loss_without_the_balance_term(legacy, make_trainer):
    with_balance = make_trainer(2, 4, balance_loss_weight=5.0, legacy_double_softmax=legacy)
    without = make_trainer(2, 4, balance_loss_weight=0.0, legacy_double_softmax=legacy)
    with_balance.train()
    without.train()
    first, plain = with_balance.state.log_history[0], without.state.log_history[0]
    assert first["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert with_balance.state.log_history[-1]["train_loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert first["objective"] == pytest.approx(first["loss"] + 5.0 * first["balance"], rel=1e-6)
    assert first["balance"] == pytest.approx(plain["balance"], rel=1e-6) and first["balance"] < -0.1
    assert "objective" not in plain
    # The gradient is that of the sum: the balance term has moved the allocator.
    allocators = (trainer.model.model.fusion.allocator.sentence_proj.weight for trainer in (with_balance, without))
    assert not torch.allclose(*allocators, rtol=1e-3)


def test_the_held_out_loss_is_the_cross_entropy(make_trainer):
    losses = []
    for weight in (0.0, 5.0):
        trainer = make_trainer(2, balance_loss_weight=weight)
        losses.append(trainer.evaluate(trainer.train_dataset)["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_held_out_loss_weighs_tokens_and_not_batches(make_trainer):
    losses = []
    for size in (1, 3, 8):
        trainer = make_trainer(2, per_device_eval_batch_size=size)
        losses.append(trainer.evaluate(trainer.train_dataset)["eval_loss"])
    # The answers have 1 to 50 letters: the mean of the batches' means would be off by percents.
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    model = trainer.model.eval()
    whole = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
    with torch.no_grad():
        assert losses[0] == pytest.approx(model(**whole).cross_entropy.item(), rel=1e-6)


@pytest.mark.parametrize(("samples", "size", "ranks"), [(7, 2, 1), (7, 2, 2), (9, 2, 2), (1, 4, 3), (12, 3, 4)])
def test_every_held_out_sample_counts_once_and_every_rank_runs_as_often(samples, size, ranks):
    samplers = [HeldOutBatchSampler(samples, size, rank, ranks) for rank in range(ranks)]
    assert len({len(sampler) for sampler in samplers}) == 1
    assert all(0 < len(batch) <= size for sampler in samplers for batch in sampler)
    counted = [index for sampler in samplers for batch in list(sampler)[: sampler.num_counted] for index in batch]
    assert sorted(counted) == list(range(samples))


def test_fillers_do_not_count(make_trainer):
    loss = _HeldOutLoss(1, torch.device("cpu"))
    labels = torch.tensor([[-100, 1, 2, -100]])
    assert loss.add(torch.tensor(6.0), labels) == 3
    loss.add(torch.tensor(100.0), labels)
    assert loss.read(lambda sums: sums) == 3


def test_the_log_shows_the_mean_weights_of_the_groups_and_the_speed(make_trainer):
    trainer = make_trainer()
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["fusion_weight_1"] + entry["fusion_weight_2"] == pytest.approx(1)
    assert entry["tokens_per_second"] > entry["samples_per_second"] > 0
    # All eight samples in one pass: the longest has the answer of 50 letters.
    lengths = [len(sample["input_ids"]) for sample in trainer.train_dataset]
    assert entry["padding_share"] == pytest.approx(1 - sum(lengths) / (8 * max(lengths)))
    text = status_text(entry)
    for part in ("loss ", "weights 0.", "tokens/s", "samples/s", "TFLOP/s", "padding ", "data wait ", "peak "):
        assert part in text
    assert "of the card" not in text and "share_of_peak" not in entry  # nothing is claimed on a CPU
    assert 0 < entry["data_wait_share"] < 1


def test_the_log_shows_the_operations_and_their_share_of_a_known_card(make_trainer):
    trainer = make_trainer()
    trainer._peak_flops = 1e12
    trainer.train()
    entry = trainer.state.log_history[0]
    samples = [trainer.train_dataset[index] for index in range(8)]
    lengths = [len(sample["input_ids"]) for sample in samples]
    labels = sum(int((sample["labels"][1:] != -100).sum()) for sample in samples)
    images = sum(len(sample.get("pixel_values", ())) for sample in samples)
    total = StepFlops.of(trainer.model).total(sum(lengths), sum(length**2 for length in lengths), labels, images)
    assert entry["tflops_per_second"] == pytest.approx(total * entry["samples_per_second"] / 8 / 1e12)
    assert entry["share_of_peak"] == pytest.approx(entry["tflops_per_second"])
    assert f"({100 * entry['share_of_peak']:.1f} % of the card)" in status_text(entry)


def test_the_time_at_the_loader_counts_as_waiting_for_data(make_trainer, monkeypatch):
    trainer = make_trainer()
    clock = iter([0.0, 0.0, 3.0, 3.0, 4.0, 5.0, 5.0, 10.0])
    monkeypatch.setattr("model.training.meter.time.perf_counter", lambda: next(clock))
    trainer.start_window()
    assert list(trainer._meter.timed(iter([7, 8]))) == [7, 8]
    logs = trainer._meter.read(1, lambda counts: counts)
    assert logs["data_wait_share"] == pytest.approx((3 + 1) / 10)


def test_projector_and_allocator_may_have_learning_rates_of_their_own(make_trainer):
    rates = {"projector_learning_rate": 0.3, "allocator_learning_rate": 0.02}
    trainer = make_trainer(learning_rates=rates, weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            expected = 0.3 if "projector" in name else 0.02 if "fusion" in name else 0.1
            assert group["lr"] == expected, name
            # No decay on vectors: biases and norms.
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0), name
    assert not [name for name in names.values() if "vision_tower" not in name]
