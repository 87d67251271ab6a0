"""What each rank of test_sharded.py does: compare sharded towers with towers that are not; run by torchrun."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

from igva_kernels import FusionPlan, fuse, mix
from igva_kernels.towers import StreamingTower, selected_hidden_states, stream_group_means

PLAN = FusionPlan.igva(4, 2)
SIZES = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def make_tower(name: str) -> nn.Module:
    torch.manual_seed(3)
    if name == "dinov2":
        return Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2)).eval()
    config = CLIPVisionConfig(**SIZES, intermediate_size=32)
    return (CLIPVisionModelWithProjection if name == "clip_with_projection" else CLIPVisionModel)(config).eval()


def blocks(tower: nn.Module) -> nn.ModuleList:
    tower = getattr(tower, "vision_model", tower)
    return getattr(tower.encoder, "layers", None) or tower.encoder.layer


def inputs_of(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(2, 3, 28, 28, generator=generator), torch.rand(2, 2, generator=generator)


def check_streaming(mesh: DeviceMesh, name: str, root: str) -> None:
    """The blocks are sharded, and either the tower or the module around it."""
    tower = make_tower(name).requires_grad_(False)
    pixels, weights = inputs_of(dist.get_rank())
    expected = mix(stream_group_means(tower, pixels, PLAN), PLAN, weights)
    last = tower(pixels).last_hidden_state
    for block in blocks(tower):
        fully_shard(block, mesh=mesh)
    module = StreamingTower(tower)
    if root == "tower":
        if hasattr(tower, "vision_model"):
            fully_shard(tower.vision_model, mesh=mesh)
        fully_shard(tower, mesh=mesh)
    else:
        fully_shard(module, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in tower.parameters())
    for _ in range(2):  # the second call meets what the first one left
        assert torch.equal(mix(module(pixels, plan=PLAN), PLAN, weights), expected)
    assert all(isinstance(parameter, DTensor) for block in blocks(tower) for parameter in block.parameters())
    if root == "module":
        return
    # The tower's own forward still works. (Asked for hidden states, transformers 5.23 gives None: it knows classes by name, and
    # fully_shard makes a new class.)
    assert torch.equal(tower(pixels).last_hidden_state, last)


def check_training(mesh: DeviceMesh, name: str) -> None:
    """The gradients of the ranks are the mean of the gradients of their batches."""
    world = dist.get_world_size()

    def loss_of(tower: nn.Module, rank: int) -> Tensor:
        pixels, weights = inputs_of(rank)
        return fuse(selected_hidden_states(tower, pixels, PLAN), PLAN, weights, num_prefix_tokens=1).square().mean()

    single = make_tower(name).train()
    (sum(loss_of(single, rank) for rank in range(world)) / world).backward()
    tower = make_tower(name).train()
    tower.gradient_checkpointing_enable({"use_reentrant": False})
    for block in blocks(tower):
        fully_shard(block, mesh=mesh)
    fully_shard(tower, mesh=mesh)
    loss_of(tower, dist.get_rank()).backward()
    checked = 0
    for (key, ours), theirs in zip(tower.named_parameters(), single.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None or not ours.grad.full_tensor().any(), key
            continue
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, rtol=1e-4, atol=1e-6, msg=key)
        checked += 1
    assert checked > 4 * 10


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in ("clip_vision_model", "clip_with_projection", "dinov2"):
        for root in ("tower", "module"):
            check_streaming(mesh, name, root)
            if dist.get_rank() == 0:
                print("streams", name, root, flush=True)
        check_training(mesh, name)
        if dist.get_rank() == 0:
            print("trains", name, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
