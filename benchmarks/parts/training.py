"""One training step of the whole model, and how much of it the fusion takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..context import Context
from ..memory import method
from ..timing import quantiles
from ..variants import release

MEASURES = """\
stage 2 as in training: frozen CLIP-L/14-336, allocator, projector and a Llama with random weights trained in pure bfloat16
(7B from 75 GiB of memory, 1.1B from 30 GiB, else 0.2B), AdamW, gradient checkpointing, 8 samples of 704 tokens of which
576 are an image: seconds and tokens per second of a step, peak memory, the fusion's share of it (forward and backward of the
fusion alone at the same sizes, over the step); and the same step with LLaVA-1.5's single layer instead."""

SEED = 20261123
WARM_UP, STEPS = 2, 6


@dataclass(frozen=True)
class Setup:
    """Sizes of one training step."""

    name: str
    text: dict
    vision: dict
    text_dim: int
    allocator_dim: int
    batch: int
    text_tokens: int


CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def llama(hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int, vocabulary: int = 32064) -> dict:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocabulary,
        "pad_token_id": 0,
    }


LLAMA_7B = Setup("Llama 7B", llama(4096, 11008, 32, 32, 32), CLIP_L, 768, 1024, 8, 128)
LLAMA_1B = Setup("Llama 1.1B", llama(2048, 5632, 22, 32, 4), CLIP_L, 768, 1024, 8, 128)
LLAMA_SMALL = Setup("Llama 0.2B", llama(1024, 2816, 12, 16, 16), CLIP_L, 768, 1024, 4, 128)
TINY_SETUP = Setup(
    "tiny Llama",
    llama(32, 64, 2, 4, 2, vocabulary=128),
    CLIP_L | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 28},
    24,
    64,
    2,
    8,
)


def setup_for(context: Context) -> Setup:
    """The largest model that the device trains: pure bfloat16 needs 8 bytes a parameter, 54 GB for 7B, and activations."""
    if context.tiny:
        return TINY_SETUP
    if context.device.type != "cuda":
        return LLAMA_SMALL
    gib = torch.cuda.get_device_properties(context.device).total_memory / 2**30
    return LLAMA_7B if gib >= 75 else LLAMA_1B if gib >= 30 else LLAMA_SMALL


def run_part(context: Context) -> None:
    """Record the step with IGVA and the step with one layer."""
    setup = setup_for(context)
    for fusion in ("igva", "llava"):
        parameters = {"setup": setup.name, "fusion": fusion, "batch": setup.batch, "text_tokens": setup.text_tokens}
        context.recorder.case(f"step {setup.name} {fusion}", parameters, partial(measure_step, context, setup, fusion))
        release(context.device)


def measure_step(context: Context, setup: Setup, fusion: str) -> dict:
    """Time the whole step, then the fusion alone at its sizes."""
    device = context.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(SEED)
    network = build(setup, fusion, device, dtype)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.type == "cuda")
    batch = make_batch(setup, network.config, device, dtype)

    def step() -> None:
        loss = network(**batch).loss
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is {loss.item()}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(WARM_UP):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rounds = context.rounds or STEPS
    median, low, high = quantiles([seconds(step, device) for _ in range(rounds)])
    tokens = batch["input_ids"].numel()
    metrics = {
        "median_s": median,
        "low_s": low,
        "high_s": high,
        "rounds": rounds,
        "tokens_per_s": tokens / median,
        "tokens": tokens,
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }
    if device.type == "cuda":  # on a CPU a whole step under the profiler would take longer than it tells
        metrics |= {"peak_bytes": torch.cuda.max_memory_allocated(device), "memory_method": method(device)}
    if fusion == "igva":
        fusion_s = fusion_seconds(setup, network, device, dtype)
        metrics |= {"fusion_s": fusion_s, "fusion_share": fusion_s / median}
    return metrics


def build(setup: Setup, fusion: str, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The model of the package with random weights, frozen as in stage 2."""
    from model.configuration import IgvaLlavaConfig
    from model.modeling import IgvaLlavaForConditionalGeneration

    sizes = {"type": "igva", "stage": 2, "text_dim": setup.text_dim, "hidden_dim": setup.allocator_dim}
    config = IgvaLlavaConfig(
        vision_config=setup.vision,
        text_config=setup.text,
        fusion=sizes if fusion == "igva" else {"type": "llava", "layer": -2},
        image_token_id=setup.text["vocab_size"] - 1,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            network = IgvaLlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    network.model.vision_tower.requires_grad_(False)
    network.train()
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return network


def make_batch(setup: Setup, config: object, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows of one image and ``text_tokens`` random tokens; the second half of the text is learnt."""
    generator = torch.Generator().manual_seed(SEED)
    image = torch.full((setup.batch, config.num_image_tokens), config.image_token_id)
    text = torch.randint(1, config.image_token_id, (setup.batch, setup.text_tokens), generator=generator)
    labels = torch.cat((torch.full_like(image, -100), text), dim=1)
    labels[:, : image.shape[1] + setup.text_tokens // 2] = -100
    side = config.vision_config.image_size
    batch = {
        "input_ids": torch.cat((image, text), dim=1),
        "labels": labels,
        "pixel_values": torch.randn(setup.batch, 3, side, side, generator=generator).to(dtype),
    }
    if config.fusion["type"] == "igva":
        batch["instruction_embeds"] = torch.randn(setup.batch, setup.text_dim, generator=generator).to(dtype)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return {name: tensor.to(device) for name, tensor in batch.items()}


def fusion_seconds(setup: Setup, network: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> float:
    """Forward and backward of allocator and mix alone, frozen tower, at the sizes of the step."""
    config = network.config
    module = network.model.fusion
    tokens = config.num_image_tokens + config.num_prefix_tokens
    width = config.vision_config.hidden_size
    count = config.vision_config.num_hidden_layers + 1
    states = [torch.randn(setup.batch, tokens, width, device=device, dtype=dtype) for _ in range(count)]
    embeds = torch.randn(setup.batch, setup.text_dim, device=device, dtype=dtype)
    parameters = list(module.parameters())

    def call() -> None:
        fused, _ = module(states, embeds, num_prefix_tokens=config.num_prefix_tokens)
        torch.autograd.grad(fused, parameters, torch.ones_like(fused))

    call()
    return quantiles([seconds(call, device) for _ in range(10)])[0]


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall seconds to the finished result."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
