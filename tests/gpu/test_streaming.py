"""A tower that runs layer by layer on a card: the bits of the tuple path, in less memory."""

from __future__ import annotations

import pytest
import torch

from igva_kernels import fuse, group_summaries, mix
from igva_kernels.towers import stream_group_means

BATCH = 8


@pytest.fixture
def clip_tower(clip):
    """CLIP-L/14 336 with random weights, and pictures for it, in bfloat16."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=clip.width,
        intermediate_size=4 * clip.width,
        num_hidden_layers=clip.plan.num_layers,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    tower = transformers.CLIPVisionModel(config).eval().requires_grad_(False).to("cuda", torch.bfloat16)
    return tower, torch.randn(BATCH, 3, 336, 336, device="cuda").bfloat16()


def from_the_tuple(tower, pixel_values, plan, weights):
    states = tower(pixel_values, output_hidden_states=True).hidden_states
    return fuse(states, plan, weights, num_prefix_tokens=1, impl="triton")


def peak_of(function) -> int:
    """Bytes that a call allocates at most beyond what was allocated before it."""
    function()  # compiles, and warms up the libraries' workspaces
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("reduce_at", ["group", "layer"])
def test_streaming_gives_the_bits_of_the_tuple(clip, clip_tower, make_weights, reduce_at) -> None:
    tower, pixel_values = clip_tower
    weights = make_weights(clip, BATCH, "image")
    group_means = stream_group_means(tower, pixel_values, clip.plan, reduce_at=reduce_at, impl="triton")
    assert torch.equal(mix(group_means, clip.plan, weights, impl="triton"), from_the_tuple(*clip_tower, clip.plan, weights))
    states = tower(pixel_values, output_hidden_states=True).hidden_states
    assert torch.equal(group_means.summaries, group_summaries(states, clip.plan, num_prefix_tokens=1, impl="triton"))


@pytest.mark.parametrize("reduce_at", ["group", "layer"])
def test_streaming_holds_ten_maps_less(clip, clip_tower, make_weights, reduce_at) -> None:
    """While the last block runs, the tuple path holds 24 maps; by group it is 5 of the open group and 3 means of two maps each,
    by layer the current map and 4 accumulators of two, and the base lies in the open group or is one more."""
    tower, pixel_values = clip_tower
    weights = make_weights(clip, BATCH, "image")
    one_map = BATCH * 576 * 1024 * 2

    def streamed() -> None:
        mix(stream_group_means(tower, pixel_values, clip.plan, reduce_at=reduce_at), clip.plan, weights)

    assert peak_of(streamed) <= peak_of(lambda: from_the_tuple(*clip_tower, clip.plan, weights)) - 10 * one_map


@pytest.mark.parametrize("reduce_at", ["group", "layer"])
def test_streaming_is_captured_in_a_cuda_graph(clip, clip_tower, make_weights, reduce_at) -> None:
    tower, pixel_values = clip_tower
    weights = make_weights(clip, BATCH, "image")

    def streamed():
        return mix(stream_group_means(tower, pixel_values, clip.plan, reduce_at=reduce_at), clip.plan, weights)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        streamed()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = streamed()
    pixel_values.copy_(torch.randn_like(pixel_values))
    graph.replay()
    assert torch.equal(captured, streamed())
