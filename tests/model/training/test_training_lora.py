"""Adapters: where they go, what is saved with them, and the plain model after merging."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from model.training.lora import (
    ADAPTER_FILE,
    CONFIG_FILE,
    add_lora,
    has_lora,
    load_adapters,
    merge_lora,
    merged_state,
    save_adapters,
)
from model.training.recipe import LoraSettings


@pytest.fixture
def trained(make_model):
    """A base model, and its copy in which adapters, projector and allocator have moved."""
    base = make_model()
    model = copy.deepcopy(base)
    add_lora(model, LoraSettings(r=2, alpha=4, dropout=0.0))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or "multi_modal_projector" in name or ".fusion." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return base, model


@torch.no_grad()
def logits(model, make_batch):
    batch = make_batch(model)
    batch.pop("labels")
    return model(**batch).logits


def test_adapters_go_to_every_linear_layer_of_the_language_model_and_nowhere_else(make_model):
    model = make_model()
    language_model = model.model.language_model
    linear = sum(isinstance(module, torch.nn.Linear) for module in language_model.modules())
    add_lora(model, LoraSettings(r=2))
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert len(adapted) == linear
    assert all(name.startswith("model.language_model.layers.") for name in adapted)


def test_layers_are_chosen_by_the_last_part_of_their_name(make_model):
    model = make_model()
    add_lora(model, LoraSettings(r=2, target_modules=["q_proj", "v_proj"]))
    adapted = {name.partition(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert adapted == {"q_proj", "v_proj"}


def test_new_adapters_change_nothing(make_model, make_batch):
    model = make_model()
    before = logits(model, make_batch)
    add_lora(model, LoraSettings(r=2))
    # Adding the adapter's zeros gives attention operands of another memory layout: rounding, measured 1.4e-6 at logits of 3;
    # dropout left at work moves them by 1e-2 and more once B is not zero.
    torch.testing.assert_close(logits(model, make_batch), before, atol=1e-5, rtol=0)
    assert not any(module.training for module in model.modules())


def test_saved_adapters_with_projector_and_allocator_give_the_same_logits(trained, make_batch, tmp_path):
    base, model = trained
    save_adapters(model, tmp_path)
    load_adapters(base, tmp_path)
    assert torch.equal(logits(base, make_batch), logits(model, make_batch))


def test_the_folder_holds_projector_and_allocator(trained, tmp_path):
    save_adapters(trained[1], tmp_path)
    prefixes = {name.removeprefix("base_model.model.model.").split(".")[0] for name in load_file(tmp_path / ADAPTER_FILE)}
    assert prefixes == {"multi_modal_projector", "fusion", "language_model"}


def test_they_bring_a_base_of_stage_1_to_stage_2(trained, make_batch, tmp_path):
    base, model = trained
    save_adapters(model, tmp_path)
    base.set_fusion_stage(1)
    load_adapters(base, tmp_path)
    assert base.fusion_stage == 2
    assert torch.equal(logits(base, make_batch), logits(model, make_batch))


@pytest.mark.parametrize("fusion", [None, {"type": "llava"}, {"type": "mmfuser", "layers": [1, 2, -2], "num_heads": 4}])
def test_peft_loads_them_whole_merges_them_and_writes_what_we_read(fusion, make_model, make_batch, tmp_path):
    model = make_model(fusion=fusion)
    bases = [copy.deepcopy(model) for _ in range(2)]
    add_lora(model, LoraSettings(r=2, alpha=4, dropout=0.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or "multi_modal_projector" in name or ".fusion." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    expected = logits(model, make_batch)
    save_adapters(model, tmp_path / "ours")

    wrapped = PeftModel.from_pretrained(bases[0], str(tmp_path / "ours"))
    # The norm that may run within the pass over the layers runs on its own under peft's wrapper: rounding.
    torch.testing.assert_close(logits(wrapped, make_batch), expected, atol=1e-5, rtol=0)
    wrapped.save_pretrained(str(tmp_path / "theirs"))
    load_adapters(bases[1], tmp_path / "theirs")
    assert torch.equal(logits(bases[1], make_batch), expected)

    merged = wrapped.merge_and_unload()
    merge_lora(model)
    assert merged.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, atol=1e-7, rtol=1e-6, msg=name)


def test_dora_adapters_of_peft_load_and_merge(make_model, make_batch, tmp_path):
    base = make_model()
    other = copy.deepcopy(base)
    config = LoraConfig(
        r=2, use_dora=True, target_modules=["q_proj", "v_proj"], modules_to_save=["model.multi_modal_projector", "model.fusion"]
    )
    wrapped = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.rand_like(parameter))
    expected = logits(wrapped, make_batch)
    wrapped.save_pretrained(str(tmp_path))
    load_adapters(other, tmp_path)
    torch.testing.assert_close(logits(other, make_batch), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="no plain LoRA"):
        merged_state(other, other.state_dict())
    merge_lora(other)
    assert not has_lora(other)
    torch.testing.assert_close(logits(other, make_batch), expected, atol=1e-4, rtol=0)


def test_adapters_without_projector_or_with_embeddings_are_refused(trained, make_model, tmp_path):
    base, model = trained
    save_adapters(model, tmp_path)
    tensors = load_file(tmp_path / ADAPTER_FILE)
    save_file({name: tensor for name, tensor in tensors.items() if ".lora_" in name}, tmp_path / ADAPTER_FILE)
    with pytest.raises(ValueError, match=r"does not fit the model: .* is absent in the file"):
        load_adapters(base, tmp_path)
    embeddings = model.get_input_embeddings().weight.detach().clone()
    tensors["base_model.model.model.language_model.embed_tokens.weight"] = embeddings
    save_file(tensors, tmp_path / ADAPTER_FILE)
    with pytest.raises(ValueError, match=r"embed_tokens.weight is .* in the file and absent in the model"):
        load_adapters(base, tmp_path)


def test_adapters_of_another_kind_are_refused(trained, tmp_path):
    base, model = trained
    save_adapters(model, tmp_path)
    text = (tmp_path / CONFIG_FILE).read_text().replace('"LORA"', '"IA3"')
    (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(ValueError, match="of the kind 'IA3'"):
        load_adapters(base, tmp_path)


def test_merging_leaves_a_plain_model_with_the_same_logits(trained, make_batch):
    base, model = trained
    before = logits(model, make_batch)
    merge_lora(model)
    assert not has_lora(model)
    assert model.state_dict().keys() == base.state_dict().keys()
    # One more rounding a weight: W + B A in fp32 against W x + B (A x); measured 2e-6 at logits of about 3.
    torch.testing.assert_close(logits(model, make_batch), before, atol=1e-4, rtol=0)
    assert not torch.equal(logits(base, make_batch), before)


def test_a_merged_state_is_that_of_the_merged_model_and_leaves_the_model_alone(trained):
    model = trained[1]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = merged_state(model, model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    merge_lora(model)
    assert merged.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-7, rtol=1e-6, msg=name)


def test_diverged_adapters_are_not_merged(trained):
    state = trained[1].state_dict()
    name = next(name for name in state if "lora_B" in name)
    state[name] = state[name] * float("inf")
    with pytest.raises(ValueError, match="is not finite"):
        merged_state(trained[1], state)


def test_a_merged_model_loads_without_adapters(trained, make_batch, tmp_path):
    model = trained[1]
    merge_lora(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    # Loaded weights lie at other addresses, and the CPU's matrix products round by alignment.
    torch.testing.assert_close(logits(loaded, make_batch), logits(model, make_batch), atol=1e-5, rtol=0)


@pytest.mark.parametrize("missing", [ADAPTER_FILE, CONFIG_FILE])
def test_half_a_folder_of_adapters_is_refused(missing, trained, tmp_path):
    base, model = trained
    save_adapters(model, tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        load_adapters(base, tmp_path)


def test_adapters_of_another_model_are_refused(trained, make_model, tmp_path):
    save_adapters(trained[1], tmp_path)
    with pytest.raises(ValueError, match=r"does not fit the model: .* in the file and .* in the model"):
        load_adapters(make_model(fusion={"type": "llava"}), tmp_path)


@pytest.mark.parametrize("function", [merge_lora, lambda model: save_adapters(model, "unused")])
def test_a_model_without_adapters_is_refused(function, make_model):
    with pytest.raises(ValueError, match="no adapters"):
        function(make_model())


def test_adapters_are_added_once(trained):
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(trained[1], LoraSettings())


def test_a_layer_that_is_not_there_is_refused_with_those_that_are(make_model):
    with pytest.raises(ValueError, match=r"no linear layer \['qkv'\].*'q_proj'"):
        add_lora(make_model(), LoraSettings(target_modules=["q_proj", "qkv"]))
