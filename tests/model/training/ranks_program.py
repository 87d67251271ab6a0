"""Run by test_loss_ranks.py on two processes: gradients of some steps under DistributedDataParallel and FSDP2.

    python -m torch.distributed.run --standalone --nproc_per_node=2 ranks_program.py FOLDER

FOLDER holds a model (``model/``) and ``steps.pt``, a list of steps with one batch for each rank; rank 0 writes ``ddp.pt`` and
``fsdp.pt``, the gradients of each step by name.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForImageTextToText

import model  # noqa: F401 (registers the model)
from model import cross_entropy


def gradients(wrapped: nn.Module, steps: list[list[dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
    """Gradients of each step; the losses are scaled as the Trainer scales them, against the averaging over ranks."""
    results = []
    for step in steps:
        wrapped.zero_grad()
        num_items = sum((batch["labels"][:, 1:] != -100).sum() for batch in step)
        loss = wrapped(**step[dist.get_rank()], num_items_in_batch=num_items, use_cache=False).loss
        (loss * dist.get_world_size()).backward()
        grads = {name: p.grad for name, p in wrapped.named_parameters() if p.grad is not None}
        # Every rank takes part in putting a sharded gradient together.
        whole = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}
        results.append({name.removeprefix("module."): grad.clone() for name, grad in whole.items()})
    return results


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    plain = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    plain.model.vision_tower.requires_grad_(False)
    plain.train()
    steps = torch.load(folder / "steps.pt")
    # Ranks with many labels run many chunks of the head, those with few run one.
    cross_entropy.LOGITS_PER_CHUNK = 4 * plain.lm_head.out_features

    results = {"ddp": gradients(DistributedDataParallel(copy.deepcopy(plain), find_unused_parameters=False), steps)}
    sharded = copy.deepcopy(plain)
    language_model = sharded.model.language_model
    # Each gathered at its own call: ranks that call them in another order, or not equally often, would not come together.
    for part in (*language_model.layers, language_model.embed_tokens, sharded.model.multi_modal_projector, sharded.lm_head):
        fully_shard(part)
    fully_shard(sharded)
    results["fsdp"] = gradients(sharded, steps)
    if dist.get_rank() == 0:
        for name, value in results.items():
            torch.save(value, folder / f"{name}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
