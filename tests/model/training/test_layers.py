"""How the language model's layers run: activations given up in some, compiled, with Liger's kernels."""

from __future__ import annotations

import importlib
import sys
import types
from functools import partial

import pytest
import torch

from model import attention as attention_module
from model.data.collator import PackingCollator
from model.training import layers
from model.training.layers import checkpoint_layers, compile_layers, use_liger_kernels
from model.training.run import train

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def step(model, batch):
    """Loss and gradients of one step."""
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}}


def check_close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=tolerance * float(value.abs().max()) + 1e-7, msg=name)


def pack(model, lengths, dtype=torch.float32):
    """A packed batch of text with one image in its first sample."""
    generator, samples = torch.Generator().manual_seed(sum(lengths)), []
    for length in lengths:
        input_ids = torch.randint(0, 256, (length,), generator=generator)
        samples.append({"input_ids": input_ids, "labels": input_ids.clone()})
    tokens = model.config.num_image_tokens
    samples[0]["input_ids"][1 : 1 + tokens] = model.config.image_token_id
    samples[0]["labels"][1 : 1 + tokens] = -100
    samples[0]["pixel_values"] = torch.randn(1, 3, 28, 28, generator=generator, dtype=dtype)
    samples[0]["instruction_embeds"] = torch.randn(1, 16, generator=generator, dtype=dtype)
    return PackingCollator()(samples)


# ---- activation checkpointing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "expected"), [(1, [True] * 4), (2, [True, False] * 2), (3, [True, False, False, True])])
def test_every_nth_layer_computes_its_activations_again(every, expected, make_model, make_batch, text_config):
    deep = type(text_config)(**{**text_config.to_dict(), "num_hidden_layers": 4})
    model = make_model(text_config=deep).train()
    batch = make_batch(model)
    plain = step(model, batch)
    deep_layers, runs = model.model.language_model.layers, [0] * 4
    for index, layer in enumerate(deep_layers):
        # A module inside of the layer begins once more where the layer is computed again.
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    assert checkpoint_layers(model.model.language_model, every) == (sum(expected), 4)
    assert [layer.gradient_checkpointing for layer in deep_layers] == expected
    check_close(step(model, batch), plain, 1e-6)
    assert runs == [2 if again else 1 for again in expected]


def test_the_number_of_layers_is_checked(make_model, make_recipe):
    with pytest.raises(ValueError, match="checkpoint_every_n_layers must be 1 or more, got 0"):
        checkpoint_layers(make_model().model.language_model, 0)
    with pytest.raises(ValueError, match="checkpoint_every_n_layers must be above 0, got 0"):
        make_recipe(checkpoint_every_n_layers=0)
    with pytest.raises(ValueError, match="is 2, but activation_checkpointing is off; switch it on"):
        make_recipe(checkpoint_every_n_layers=2)


# ---- torch.compile ------------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs():
    """Graphs and graph breaks that dynamo counts within the test."""
    counters = importlib.import_module("torch._dynamo.utils").counters
    torch._dynamo.reset()
    counters.clear()
    yield lambda: (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("every", [None, 1])
def test_compiled_layers_take_the_same_steps_and_no_further_graph_for_further_lengths(every, graphs, make_model, make_batch):
    model = make_model().train()
    if every:
        checkpoint_layers(model.model.language_model, every)
    # Several rows and lengths, then packed rows of several lengths and numbers of samples. The last of each brings sizes that
    # none before had.
    padded = [make_batch(model, images, length=length) for images, length in (((1, 1), 18), ((0, 1, 2), 21), ((1,) * 5, 27))]
    packed = [pack(model, lengths) for lengths in ((9, 10), (12, 5, 8), (31, 3), (7, 11, 13, 6))]
    plain = [step(model, batch) for batch in (*padded, *packed)]
    names = list(model.state_dict())
    assert compile_layers(model.model.language_model, backend="aot_eager") == 2
    for batches, expected in ((padded, plain[:3]), (packed, plain[3:])):
        for index, (batch, values) in enumerate(zip(batches, expected, strict=True)):
            before = graphs()
            check_close(step(model, batch), values, 1e-5)
            assert index < len(batches) - 1 or graphs() == before
    assert graphs()[1] == 0
    assert list(model.state_dict()) == names


@pytest.mark.slow
def test_compiled_layers_call_the_attention_of_packed_rows_without_a_break(graphs, make_model, monkeypatch):
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
        return query * 1.0

    module = importlib.import_module("torch.nn.attention.varlen")
    monkeypatch.setattr(module, "varlen_attn", varlen_attn)
    assert attention_module._varlen_attn() is varlen_attn
    model = make_model().bfloat16().train()
    model.model.language_model.set_attn_implementation("varlen")
    compile_layers(model.model.language_model, backend="aot_eager")
    for lengths in ((9, 10), (12, 5, 8), (31, 3), (7, 11, 13, 6)):
        before = graphs()
        assert step(model, pack(model, lengths, torch.bfloat16))["loss"].isfinite()
    assert graphs() == before and graphs()[1] == 0


def test_the_layers_of_a_run_are_compiled_and_take_the_same_steps(make_recipe, tmp_path, monkeypatch):
    # Traced but not compiled: the machine code is the slow tier's.
    monkeypatch.setattr(layers, "compile_layers", partial(compile_layers, backend="eager"))
    check_compiled_run(make_recipe, tmp_path)


@pytest.mark.slow
def test_a_run_with_compiled_machine_code_takes_the_same_steps(make_recipe, tmp_path):
    check_compiled_run(make_recipe, tmp_path)


def check_compiled_run(make_recipe, tmp_path):
    results = []
    for name, fields in (("plain", {}), ("compiled", {"compile": True})):
        recipe = make_recipe(2, language_model_training="full", data={"packing": True}, **fields)
        recipe.output_dir = str(tmp_path / name)
        results.append(train(recipe))
    assert results[1]["train_loss"] == pytest.approx(results[0]["train_loss"], rel=1e-4)


def test_a_language_model_without_a_list_of_layers_is_refused(make_model):
    with pytest.raises(ValueError, match="CLIPVisionModel has no list of layers to compile; set compile to false"):
        compile_layers(make_model().model.vision_tower)


def test_compile_under_zero3_is_refused(make_recipe):
    with pytest.raises(ValueError, match="compile is set with distributed zero3"):
        make_recipe(compile=True, distributed="zero3")


# ---- Liger --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def liger(monkeypatch):
    """A stand-in of liger-kernel with one function, which records what it is called with."""
    calls = []

    def apply_liger_kernel_to_llama(
        rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None
    ):
        calls.append(locals() | {"calls": None})

    functions = types.ModuleType("liger_kernel.transformers.monkey_patch")
    functions.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply_liger_kernel_to_llama}
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, functions.__name__, functions)
    return calls


def test_liger_is_applied_to_the_language_model_by_its_own_function_without_its_loss(liger, make_model):
    language_model = make_model().model.language_model
    assert use_liger_kernels(language_model, GPU) == ("rope", "rms_norm", "swiglu")
    (call,) = liger
    assert call["model"] is language_model
    assert (call["rope"], call["rms_norm"], call["swiglu"]) == (True, True, True)
    assert (call["cross_entropy"], call["fused_linear_cross_entropy"]) == (False, False)


def test_liger_is_refused_where_it_cannot_run(liger, make_model):
    with pytest.raises(ValueError, match="liger_kernels is set, but they need a GPU and the model runs on cpu"):
        use_liger_kernels(make_model().model.language_model, CPU)
    with pytest.raises(ValueError, match="no kernels for language models of type 'clip_vision_model'"):
        use_liger_kernels(make_model().model.vision_tower, GPU)
    assert not liger


def test_a_run_names_the_extra_that_is_missing(monkeypatch, make_recipe):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ValueError, match=r"liger-kernel is not installed.*pip install 'igva-kernels\[liger\]'"):
        train(make_recipe(liger_kernels=True))


def test_liger_itself_patches_this_language_model(make_model):
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed (pip install 'igva-kernels[liger]')")
    from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP, liger_rotary_pos_emb
    from transformers.models.llama import modeling_llama

    originals = {name: getattr(modeling_llama, name) for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")}
    model = make_model()
    names = list(model.state_dict())
    try:
        assert use_liger_kernels(model.model.language_model, GPU) == ("rope", "rms_norm", "swiglu")
        assert modeling_llama.apply_rotary_pos_emb is liger_rotary_pos_emb
    finally:
        for name, original in originals.items():
            setattr(modeling_llama, name, original)
    layer = model.model.language_model.layers[0]
    assert layer.mlp.forward.__func__ is LigerSwiGLUMLP.forward
    for norm in (layer.input_layernorm, layer.post_attention_layernorm, model.model.language_model.norm):
        assert norm.forward.__func__ is LigerRMSNorm.forward
    assert list(model.state_dict()) == names
