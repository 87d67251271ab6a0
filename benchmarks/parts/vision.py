"""The vision side of a model, pixels to language-model embeddings: IGVA, IGVA as released, and LLaVA-1.5."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from igva_kernels import GroupMeans
from igva_kernels.modules import IGVAFusion, WeightAllocator
from igva_kernels.towers import ReduceAt, stream_group_means

from ..context import Context
from ..peers import Groups, OfficialAllocator, compiled, official_fuse, official_summaries
from ..sizes import CLIP_L_336, TINY, Tower
from ..timing import Closure
from ..variants import BASELINE, measure_variants, require_close

MEASURES = """\
CLIP-L/14-336 with random weights in bfloat16 (no download), its fusion, the allocator and a two-layer projector to 4096
channels, B = 1 and 16: with igva_kernels, from the tuple of hidden states and from a tower that runs layer by layer (reducing
at the end of each group, or after each layer), with the official eager formulation, and LLaVA-1.5's side (one layer, no
fusion); device time, host time, peak memory, latency, and a CUDA graph of the whole side at B = 1."""

SEED = 20261123
COMPILE = "torch.compile"
VARIANTS = ("igva_kernels", "streaming, by group", "streaming, by layer", BASELINE, "LLaVA-1.5")


def run_part(context: Context) -> None:
    """Record B = 1 and B = 16."""
    for batch in (1, 2) if context.tiny else (1, 16):
        measure_vision(context, batch)


def measure_vision(context: Context, batch: int, variants: Iterable[str] = VARIANTS) -> None:
    """Vision sides on the same tower; of ``torch.compile`` it is the official fusion with its allocator that is compiled."""
    tower = TINY if context.tiny else CLIP_L_336
    dtype = torch.bfloat16 if context.device.type == "cuda" else torch.float32
    llm_dim, text_dim, hidden_dim = (64, 24, 64) if context.tiny else (4096, 768, 1024)
    torch.compiler.reset()
    parts: dict[str, object] = {}

    def build() -> dict:
        """Made at the first use, so that a failure is recorded with the case that it concerns."""
        if not parts:
            torch.manual_seed(SEED)
            parts["tower"], image_size = clip_tower(tower)
            sizes = {"vision_dim": tower.vision_dim, "text_dim": text_dim, "hidden_dim": hidden_dim}
            parts["peer"] = OfficialAllocator(num_groups=tower.num_groups, **sizes)
            allocator = WeightAllocator(num_groups=tower.num_groups, **sizes)
            allocator.load_state_dict(parts["peer"].state_dict())
            parts["fusion"] = IGVAFusion(tower.plan(), allocator)
            parts["projector"] = projector(2 * tower.vision_dim, llm_dim)
            parts["llava_projector"] = projector(tower.vision_dim, llm_dim)
            for module in parts.values():
                module.to(context.device, dtype).eval().requires_grad_(False)
            parts["pixels"] = torch.randn(batch, 3, image_size, image_size, device=context.device, dtype=dtype)
            parts["embeds"] = torch.randn(batch, text_dim, device=context.device, dtype=dtype)
        return parts

    def prepare(side: Callable[[dict, Tower, Any], Tensor], run_tower: Callable[[dict], Any] | None = None) -> list[Closure]:
        made = build()
        run = hidden_states if run_tower is None else run_tower
        with torch.no_grad():
            states = hidden_states(made)
            if side is not llava_side:
                exact = exact_fused(made, tower, states)
                require_close("fused map", side(made, tower, run(made)), official_side(made, tower, states), exact)
            del states

        def call() -> Tensor:
            with torch.no_grad():
                fused = side(made, tower, run(made))
                return made["llava_projector" if side is llava_side else "projector"](fused)

        return [call]

    sides: dict[str, Callable[[], list[Closure]]] = {
        "igva_kernels": partial(prepare, igva_side),
        "streaming, by group": partial(prepare, igva_side, partial(group_means, tower, "group")),
        "streaming, by layer": partial(prepare, igva_side, partial(group_means, tower, "layer")),
        BASELINE: partial(prepare, official_side),
        COMPILE: partial(prepare, partial(compiled_side, compiled(official_fusion))),
        "LLaVA-1.5": partial(prepare, llava_side),
    }
    measure_variants(
        context,
        f"vision {tower.name} B={batch}",
        {"tower": tower.name, "batch": batch, "dtype": str(dtype).removeprefix("torch."), "llm_dim": llm_dim},
        {variant: sides[variant] for variant in variants},
        with_latency=batch == 1,
        with_graph=batch == 1,
    )


def clip_tower(tower: Tower) -> tuple[nn.Module, int]:
    """A CLIP vision model with random weights, and its image size."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    side = int(tower.num_patches**0.5)
    if side * side != tower.num_patches:
        side = 2  # the tiny tower: four patches
    patch_size = 14
    config = CLIPVisionConfig(
        hidden_size=tower.vision_dim,
        intermediate_size=4 * tower.vision_dim,
        num_hidden_layers=tower.num_layers,
        num_attention_heads=max(1, tower.vision_dim // 64),
        image_size=side * patch_size,
        patch_size=patch_size,
    )
    return CLIPVisionModel(config), side * patch_size


def projector(in_dim: int, out_dim: int) -> nn.Module:
    """LLaVA's ``mlp2x_gelu``."""
    return nn.Sequential(nn.Linear(in_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))


def hidden_states(parts: dict) -> tuple[Tensor, ...]:
    return parts["tower"](parts["pixels"], output_hidden_states=True).hidden_states


def group_means(tower: Tower, reduce_at: ReduceAt, parts: dict) -> GroupMeans:
    return stream_group_means(parts["tower"], parts["pixels"], tower.plan(), reduce_at=reduce_at)


def igva_side(parts: dict, tower: Tower, states: Sequence[Tensor] | GroupMeans) -> Tensor:
    fused, _ = parts["fusion"](states, parts["embeds"], num_prefix_tokens=tower.num_prefix_tokens)
    return fused


def official_side(parts: dict, tower: Tower, states: Sequence[Tensor]) -> Tensor:
    return compiled_side(official_fusion, parts, tower, states)


def compiled_side(fusion: Callable[..., Tensor], parts: dict, tower: Tower, states: Sequence[Tensor]) -> Tensor:
    """The side with :func:`official_fusion`, or with what torch.compile made of it."""
    return fusion(parts["peer"], states, parts["embeds"], tower.groups, tower.num_layers - 1, tower.num_prefix_tokens)


def official_fusion(
    allocator: nn.Module, states: Sequence[Tensor], embeds: Tensor, groups: Groups, base: int, num_prefix_tokens: int
) -> Tensor:
    """Allocator and mix of the released code."""
    weights = allocator(official_summaries(states, groups), embeds)
    return official_fuse(states, groups, base, weights, num_prefix_tokens)


def llava_side(parts: dict, tower: Tower, states: Sequence[Tensor]) -> Tensor:
    return states[tower.num_layers - 1][:, tower.num_prefix_tokens :]


def exact_fused(parts: dict, tower: Tower, states: Sequence[Tensor]) -> Tensor:
    """The official formulation in float64 on the same hidden states."""
    wide = {"peer": copy.deepcopy(parts["peer"]).double(), "embeds": parts["embeds"].double()}
    return official_side(wide, tower, [state.double() for state in states])
