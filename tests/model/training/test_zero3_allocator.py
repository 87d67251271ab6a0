"""The fused allocator under DeepSpeed's ZeRO-3: it reads its children's parameters in its own forward.

ZeRO-3 keeps a part of each parameter on each rank and gathers a module's own parameters just before its forward. A
parameter that another module reads as an attribute is empty, unless the read happens during the engine's forward: then
DeepSpeed gathers it, and registers it with the module whose forward is running, so that from the next step on, and in the
backward, it is gathered and released with that module. The allocator is such a module, and needs no
``deepspeed.utils.set_z3_leaf_modules``.

Two processes on the CPU over gloo, with the kernels in Triton's interpreter, against one process of plain torch.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from igva_kernels.modules import WeightAllocator
from model.training.distributed import without_compiled_communication

ROOT = Path(__file__).resolve().parents[3]
SIZES = {"num_groups": 2, "vision_dim": 16, "text_dim": 16, "hidden_dim": 32, "num_blocks": 1, "num_heads": 2}
BATCH, STEPS, LEARNING_RATE = 4, 2, 0.5


class Model(nn.Module):
    """An allocator behind a layer that trains as well, so that the summaries need their gradient."""

    def __init__(self, impl: str) -> None:
        super().__init__()
        self.tower = nn.Linear(16, SIZES["vision_dim"])
        self.allocator = WeightAllocator(**SIZES, impl=impl)

    def forward(self, pixels: Tensor, embeds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.allocator(self.tower(pixels), embeds)
        return (weights - target).square().mean(), weights


def new_model(impl: str) -> Model:
    torch.manual_seed(20250115)
    model = Model(impl)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    shapes = ((BATCH, SIZES["num_groups"], 16), (BATCH, SIZES["text_dim"]), (BATCH, SIZES["num_groups"]))
    return [tuple(torch.randn(shape, generator=generator) for shape in shapes) for _ in range(STEPS)]


def train_plainly() -> dict[str, Tensor]:
    """One process, the stock modules, plain SGD."""
    model = new_model("torch")
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    results = {}
    for step, batch in enumerate(batches()):
        loss, weights = model(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        results |= {f"loss {step}": loss.detach(), f"weights {step}": weights.detach()}
    return results | {name: parameter.detach() for name, parameter in model.named_parameters()}


def train_a_rank(impl: str, folder: Path) -> None:
    """What each of the two processes runs; the first one saves the results."""
    import deepspeed
    import torch.distributed as dist

    without_compiled_communication()
    deepspeed.init_distributed(dist_backend="gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = new_model(impl)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
        config={
            "train_micro_batch_size_per_gpu": BATCH // ranks,
            "zero_allow_untested_optimizer": True,
            # a threshold of 0 partitions small parameters too; DeepSpeed would keep all of these whole
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        },
    )
    allocator = engine.module.allocator
    held = {name: parameter.numel() for name, parameter in allocator.named_parameters()}
    assert not any(held.values()), f"these parameters are not partitioned, so that reading them proves nothing: {held}"
    assert not getattr(allocator, "_z3_leaf", False)
    results = {}
    for step, batch in enumerate(batches()):
        share = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
        loss, weights = engine(*(tensor[share] for tensor in batch))
        engine.backward(loss)
        engine.step()
        losses = [torch.empty_like(loss) for _ in range(ranks)]
        parts = [torch.empty_like(weights) for _ in range(ranks)]
        dist.all_gather(losses, loss.detach())
        dist.all_gather(parts, weights.detach())
        results |= {f"loss {step}": torch.stack(losses).mean(), f"weights {step}": torch.cat(parts)}
    external = getattr(allocator, "_external_params", {})
    results["external parameters of the allocator"] = torch.tensor(len(external))
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            results[name] = parameter.detach().clone()
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed (pip install deepspeed)")
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_two_ranks_under_zero3_equal_one_process(impl, tmp_path) -> None:
    if impl == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    shared = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",  # no oneCCL: gloo
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "TRITON_INTERPRET": "1",
        "WORLD_SIZE": "2",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, impl, str(tmp_path)],
            cwd=tmp_path,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            output, _ = process.communicate(timeout=900)  # a hang guard
            assert process.returncode == 0, output[-4000:]
    finally:
        for process in ranks:
            process.kill()
    actual = torch.load(tmp_path / "results.pt")
    # all of them, while the stock path reads but the dtype of one: the routes differ, and the kernels' way is what is tested
    num_external = int(actual.pop("external parameters of the allocator"))
    assert num_external == (2 * 3 + 12 * SIZES["num_blocks"] if impl == "triton" else 1)
    expected = train_plainly()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


if __name__ == "__main__":
    train_a_rank(sys.argv[1], Path(sys.argv[2]))
