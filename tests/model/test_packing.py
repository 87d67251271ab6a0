"""Packed rows: the loss and gradients of padded ones, and no sample that sees another."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import varlen as torch_varlen
from transformers import modeling_flash_attention_utils as flash_utils

from model import IgvaLlavaForConditionalGeneration
from model import attention as attention_module
from model._hf_compat import enable_activation_checkpointing
from model.attention import AttentionChoice, choose_attention, varlen_is_available
from model.data.collator import ImageTextCollator, PackingCollator

#: float64 sums in another order.
EXACT = {"rtol": 1e-10, "atol": 1e-12}
PARTS = ("cross_entropy", "balance")
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def make_samples() -> Callable[..., list[dict[str, Tensor]]]:
    """``make_samples(model, images=(1, 0, 2, 1))``: samples as LlavaDataset gives them, of unequal lengths and label counts."""

    def make(model: IgvaLlavaForConditionalGeneration, images: tuple[int, ...] = (1, 0, 2, 1)) -> list[dict[str, Tensor]]:
        config, generator, samples = model.config, torch.Generator().manual_seed(0), []
        for index, count in enumerate(images):
            text = 5 + 3 * index
            input_ids = torch.randint(0, 256, (1 + count * config.num_image_tokens + text,), generator=generator)
            input_ids[1 : 1 + count * config.num_image_tokens] = config.image_token_id
            labels = torch.full_like(input_ids, -100)
            labels[-(text - index) :] = input_ids[-(text - index) :]
            sample = {"input_ids": input_ids, "labels": labels}
            if count:
                side = config.image_size
                sample["pixel_values"] = torch.randn(count, 3, side, side, generator=generator, dtype=torch.float64)
                sample["instruction_embeds"] = torch.randn(count, 16, generator=generator, dtype=torch.float64)
            samples.append(sample)
        samples[1]["labels"][0] = samples[1]["input_ids"][0]  # a label that counts for nothing in a row of its own
        return samples

    return make


def step(model: nn.Module, *batches: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Gradients of one optimizer step over the batches; the loss is that of the step."""
    model.zero_grad()
    num_items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    losses = [model(**batch, num_items_in_batch=num_items, **options) for batch in batches]
    total = sum(out.loss for out in losses)
    total.backward()
    parts = {name: sum((out[name] for out in losses if out.get(name) is not None), torch.zeros(())) for name in PARTS}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": total.detach(), **parts, **gradients}


def check_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], float32_inside: bool = True) -> None:
    """Equal to float64 rounding; to float32's with group weights or the softmax of eager attention, float32 in any model."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = {"rtol": 0.0, "atol": 1e-6 * float(value.abs().max()) + 1e-12} if float32_inside else EXACT
        torch.testing.assert_close(actual[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


# ---- the batch ----------------------------------------------------------------------------------------------------------


def test_a_packed_batch_is_the_samples_end_to_end(make_model, make_samples):
    samples = make_samples(make_model())
    before = [sample["labels"].clone() for sample in samples]
    batch = PackingCollator()(samples)
    lengths = [len(sample["input_ids"]) for sample in samples]
    assert lengths == [10, 9, 20, 19]
    assert batch["input_ids"].shape == (1, sum(lengths))
    assert torch.equal(batch["input_ids"][0], torch.cat([sample["input_ids"] for sample in samples]))
    assert batch["position_ids"][0].tolist() == [position for length in lengths for position in range(length)]
    assert batch["sample_ids"][0].tolist() == [index for index, length in enumerate(lengths) for _ in range(length)]
    assert batch["cu_seq_lens_q"].tolist() == [0, 10, 19, 39, 58]
    assert batch["cu_seq_lens_q"].dtype == torch.int32 and batch["max_length_q"] == 20
    assert batch["image_to_sample"].tolist() == [0, 2, 2, 3]
    assert batch["pixel_values"].shape[0] == batch["instruction_embeds"].shape[0] == 4  # one embedding an image
    assert "attention_mask" not in batch
    # The Trainer counts labels from the second position of a row on: the first token of a sample must not be among them.
    assert batch["labels"][0, [0, 10, 19, 39]].tolist() == [-100] * 4
    padded = ImageTextCollator(0)(samples)
    assert (batch["labels"][:, 1:] != -100).sum() == (padded["labels"][:, 1:] != -100).sum()
    assert all(torch.equal(sample["labels"], labels) for sample, labels in zip(samples, before, strict=True))


def test_a_packed_batch_of_text_has_no_images(make_model, make_samples):
    batch = PackingCollator()(make_samples(make_model(), (0, 0)))
    assert not batch.keys() & {"pixel_values", "image_to_sample", "instruction_embeds"}


# ---- packed = padded ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_have_the_loss_and_gradients_of_padded_ones(attention, make_model, make_samples):
    model = make_model(fusion={"stage": 1}).double().train()
    model.model.language_model.set_attn_implementation(attention)
    samples = make_samples(model)
    expected = step(model, ImageTextCollator(256)(samples))
    check_equal(step(model, PackingCollator()(samples)), expected, float32_inside=attention == "eager")


@pytest.mark.parametrize("legacy", [False, True])
def test_packed_rows_have_the_balance_term_of_padded_ones(legacy, make_model, make_samples):
    model = make_model(balance_loss_weight=0.5, legacy_double_softmax=legacy).double().train()
    samples = make_samples(model)
    expected = step(model, ImageTextCollator(256)(samples))
    check_equal(step(model, PackingCollator()(samples)), expected)
    # In another order, in two rows, and each in a row of its own: the step is the same.
    check_equal(step(model, PackingCollator()([samples[index] for index in (2, 0, 3, 1)])), expected)
    check_equal(step(model, PackingCollator()(samples[:1]), PackingCollator()(samples[1:])), expected)
    check_equal(step(model, *(PackingCollator()([sample]) for sample in samples)), expected)


def test_every_token_has_the_loss_of_its_padded_twin(make_model, make_samples):
    model = make_model().double()
    samples = make_samples(model)
    padded, packed = ImageTextCollator(256)(samples), PackingCollator()(samples)
    real = padded["attention_mask"].bool()
    outputs = []
    for batch in (padded, packed):
        labels = batch.pop("labels")
        logits = model(**batch).logits
        losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        outputs.append((logits, losses.view(len(labels), -1), labels))
    (logits, losses, labels), (packed_logits, packed_losses, packed_labels) = outputs
    torch.testing.assert_close(packed_logits[0], logits[real], **EXACT)
    learned = (labels[:, 1:] != -100).flatten()
    packed_learned = (packed_labels[:, 1:] != -100).flatten()
    torch.testing.assert_close(packed_losses.flatten()[packed_learned], losses.flatten()[learned], **EXACT)


def test_no_token_sees_one_of_another_sample(make_model, make_samples):
    model = make_model()
    samples = make_samples(model)
    for sample in samples:
        for name, value in sample.items():
            sample[name] = value.float() if value.is_floating_point() else value
    before = model(**PackingCollator()(samples), return_logits=True).logits[0]
    samples[1]["input_ids"] = samples[1]["input_ids"].flip(0)
    samples[2]["pixel_values"] = -samples[2]["pixel_values"]
    after = model(**PackingCollator()(samples), return_logits=True).logits[0]
    same = (before == after).all(dim=-1)
    assert same[:10].all() and same[39:].all()  # bit for bit
    assert not same[10:19].any() and not same[20:39].any()  # position 19 comes before the images that changed


def test_activation_checkpointing_keeps_the_samples_apart(make_model, make_samples):
    model = make_model().double().train()
    samples = make_samples(model)
    expected = step(model, ImageTextCollator(256)(samples))
    enable_activation_checkpointing(model.model.language_model)
    check_equal(step(model, PackingCollator()(samples)), expected)


def test_packed_rows_that_are_not_told_apart_are_refused(make_model, make_samples):
    model = make_model().double()
    batch = PackingCollator()(make_samples(model))
    for name in ("position_ids", "cu_seq_lens_k", "max_length_q"):
        with pytest.raises(ValueError, match=f"the rows are packed, but {name} is missing"):
            model(**{key: value for key, value in batch.items() if key != name})
    with pytest.raises(ValueError, match="packed, which attention_mask does not go with"):
        model(**batch, attention_mask=torch.ones_like(batch["input_ids"]))


def test_the_balance_term_of_packed_rows_needs_the_sample_of_each_image(make_model, make_samples):
    model = make_model(balance_loss_weight=0.5).double()
    batch = PackingCollator()(make_samples(model))
    del batch["image_to_sample"]
    with pytest.raises(ValueError, match="image_to_sample is None"):
        model(**batch)


# ---- attention by boundaries --------------------------------------------------------------------------------------------


class Varlen:
    """Stands in for a variable-length attention on the CPU, and records what it was given."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, scale: float, **options: Any) -> Tensor:
        self.calls.append(
            {"tokens": query.shape[0], "heads": (query.shape[1], key.shape[1]), "boundaries": boundaries, **options}
        )
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        pieces = []
        for start, end in zip(boundaries.tolist(), boundaries.tolist()[1:], strict=False):
            q, k, v = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))
            out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
            pieces.append(out.transpose(0, 1))
        return torch.cat(pieces)

    def torch_varlen(
        self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
    ):
        options = {"longest": (max_q, max_k), "window": window_size, "gqa": enable_gqa}
        assert torch.equal(cu_seq_q, cu_seq_k)
        return self(query, key, value, cu_seq_q, scale, **options)

    def torch_varlen_of_equal_heads(
        self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        """The form of torch 2.11."""
        assert torch.equal(cu_seq_q, cu_seq_k)
        assert query.shape == key.shape == value.shape
        return self(query, key, value, cu_seq_q, scale, longest=(max_q, max_k), window=window_size)

    def flash_varlen(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        return self(q, k, v, cu_seqlens_q, softmax_scale, longest=(max_seqlen_q, max_seqlen_k), causal=causal)


def in_bfloat16(model: nn.Module, samples: list[dict[str, Tensor]]) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    def cast(value: Tensor) -> Tensor:
        return value.bfloat16() if value.is_floating_point() else value

    return model.bfloat16(), [{name: cast(value) for name, value in sample.items()} for sample in samples]


def distance(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference of all gradients, relative to the norm of the expected ones."""
    names = [name for name in expected if name.startswith("model.")]
    first, second = (torch.cat([gradients[name].double().flatten() for name in names]) for gradients in (actual, expected))
    return float((first - second).norm() / second.norm())


@pytest.fixture
def varlen(monkeypatch) -> Varlen:
    stub = Varlen()
    monkeypatch.setattr(attention_module, "_varlen_attn", lambda: stub.torch_varlen)
    monkeypatch.setattr(attention_module, "_GROUPED_HEADS", True)
    return stub


def test_varlen_gets_the_boundaries_and_gives_what_the_dense_mask_gives(varlen, make_model, make_samples):
    model, samples = in_bfloat16(make_model().train(), make_samples(make_model()))
    batch = PackingCollator()(samples)
    expected = step(model, batch)
    model.model.language_model.set_attn_implementation("varlen")
    actual = step(model, batch)
    assert len(varlen.calls) == 2  # one a layer
    for call in varlen.calls:
        assert (call["tokens"], call["heads"], call["gqa"]) == (58, (4, 2), True)
        assert call["boundaries"].tolist() == [0, 10, 19, 39, 58] and call["longest"] == (20, 20)
        assert call["window"] == (-1, 0)  # causal
    assert distance(actual, expected) < 0.03  # the stub and the dense mask round differently to bfloat16's 8 bits
    assert distance(step(model, PackingCollator()(samples[:1] + samples[2:])), expected) > 0.3


def test_varlen_without_grouped_heads_gets_as_many_heads_of_keys_as_of_queries(varlen, monkeypatch, make_model, make_samples):
    model, samples = in_bfloat16(make_model().train(), make_samples(make_model()))
    batch = PackingCollator()(samples)
    model.model.language_model.set_attn_implementation("varlen")
    expected = step(model, batch)
    monkeypatch.setattr(attention_module, "_GROUPED_HEADS", False)
    monkeypatch.setattr(attention_module, "_varlen_attn", lambda: varlen.torch_varlen_of_equal_heads)
    actual = step(model, batch)
    assert [call["heads"] for call in varlen.calls] == [(4, 2), (4, 2), (4, 4), (4, 4)]
    assert distance(actual, expected) < 0.03  # gradients of the heads of a group are added in another order


def test_varlen_runs_padded_rows_and_generation_as_sdpa_does(varlen, make_model, make_batch):
    model = make_model()
    batch = make_batch(model)
    del batch["labels"]
    batch["attention_mask"][0, :3] = 0
    batch["input_ids"][0, :3] = 256
    batch["input_ids"][0, 3:7] = model.config.image_token_id
    expected = model(**batch).logits
    generated = model.generate(**batch, max_new_tokens=4, do_sample=False)
    model.model.language_model.set_attn_implementation("varlen")
    assert torch.equal(model(**batch).logits, expected)
    assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), generated)
    assert not varlen.calls


def test_varlen_refuses_packed_rows_without_boundaries_and_fp32(varlen, make_model, make_samples):
    model, samples = in_bfloat16(make_model(), make_samples(make_model()))
    language_model = model.model.language_model
    language_model.set_attn_implementation("varlen")
    batch = PackingCollator()(samples)
    embeds = language_model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match="position_ids restart within a row, but cu_seq_lens_q"):
        language_model(inputs_embeds=embeds, position_ids=batch["position_ids"], use_cache=False)
    with pytest.raises(TypeError, match=r"varlen attention needs fp16 or bf16, got torch\.float32"):
        model.float()(**{name: v.float() if getattr(v, "is_floating_point", bool)() else v for name, v in batch.items()})


def test_this_torch_has_the_varlen_attention_that_is_called():
    # Its signature is all that a CPU can check; the stubs above take the same arguments.
    assert varlen_is_available()
    parameters = list(inspect.signature(torch_varlen.varlen_attn).parameters)
    positional = list(inspect.signature(Varlen().torch_varlen).parameters)[:7]
    assert parameters[:7] == positional
    assert ("enable_gqa" in parameters) == attention_module._GROUPED_HEADS


class Processes(tuple):
    """What prepares flash-attn's arguments: a pair in newer versions of transformers, one function in older ones."""

    def __call__(self, *args, **kwargs):
        return self[0](*args, **kwargs)


def test_flash_attention_gets_the_boundaries_from_transformers(monkeypatch, make_model, make_samples):
    stub = Varlen()
    functions = (None, stub.flash_varlen, None, flash_utils._pad_input, flash_utils._unpad_input)
    process = flash_utils._lazy_define_process_function(stub.flash_varlen)
    processes = Processes((process, process))
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda *args, **kwargs: (functions, processes))
    model, samples = in_bfloat16(make_model().train(), make_samples(make_model()))
    batch = PackingCollator()(samples)
    expected = step(model, batch)
    # Past the check that flash-attn is installed.
    model.model.language_model.config._attn_implementation_internal = "flash_attention_2"
    actual = step(model, batch)
    assert len(stub.calls) == 2
    for call in stub.calls:
        assert (call["tokens"], call["heads"], call["causal"]) == (58, (4, 2), True)
        assert call["boundaries"].tolist() == [0, 10, 19, 39, 58] and call["longest"] == (20, 20)
    assert distance(actual, expected) < 0.03


# ---- the choice ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch) -> Callable[..., None]:
    """``machine(flash2, flash3, varlen)``: what is installed, on a Hopper card."""

    def install(flash2: bool = False, flash3: bool = False, varlen: bool = False) -> None:
        monkeypatch.setattr(attention_module, "is_flash_attn_2_available", lambda: flash2)
        monkeypatch.setattr(attention_module, "is_flash_attn_3_available", lambda: flash3)
        monkeypatch.setattr(attention_module, "varlen_is_available", lambda: varlen)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    return install


@pytest.mark.parametrize(
    ("installed", "device", "packing", "half", "expected"),
    [
        ({"flash2": True, "flash3": True, "varlen": True}, GPU, True, True, "flash_attention_3"),
        ({"flash2": True, "varlen": True}, GPU, False, True, "flash_attention_2"),
        ({"varlen": True}, GPU, True, True, "varlen"),
        ({"varlen": True}, GPU, False, True, "sdpa"),
        ({"flash2": True}, GPU, False, False, "sdpa"),
        ({"flash2": True, "varlen": True}, CPU, True, True, "sdpa"),
        ({}, CPU, False, False, "sdpa"),
    ],
)
def test_auto_takes_the_fastest_attention_that_can_run(installed, device, packing, half, expected, machine):
    machine(**installed)
    assert choose_attention("auto", device, packing=packing, half_precision=half).name == expected


def test_a_set_attention_is_taken(machine):
    machine(flash2=True)
    choice = choose_attention("flash_attention_2", GPU, packing=True, half_precision=True)
    assert choice == AttentionChoice("flash_attention_2", "set by the recipe")
    assert choose_attention("eager", CPU, packing=True, half_precision=False).name == "eager"


@pytest.mark.parametrize(
    ("setting", "device", "packing", "half", "message"),
    [
        ("flash", CPU, False, True, "attention must be one of auto, sdpa"),
        (
            "flash_attention_2",
            GPU,
            True,
            True,
            "flash_attention_2, which is not installed.*install flash-attn, or set attention",
        ),
        ("varlen", CPU, True, True, "does not run on cpu; install flash-attn or torch 2.11 or newer"),
        ("sdpa", GPU, True, True, r"a mask of \(length, length\) for each row; set attention to auto"),
        ("auto", GPU, True, True, "no attention for packed rows can run here; install flash-attn or torch"),
        ("auto", GPU, True, False, "no attention for packed rows can run here; set precision to bf16"),
    ],
)
def test_what_cannot_run_is_refused_by_name(setting, device, packing, half, message, machine):
    machine()
    with pytest.raises(ValueError, match=message):
        choose_attention(setting, device, packing=packing, half_precision=half)


def test_fast_attention_is_refused_in_fp32(machine):
    machine(varlen=True)
    with pytest.raises(ValueError, match="varlen, which needs bf16, but the precision is fp32"):
        choose_attention("varlen", GPU, packing=True, half_precision=False)
