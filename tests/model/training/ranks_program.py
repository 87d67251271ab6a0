"""Run by test_loss_ranks.py on two processes: gradients of some steps under DistributedDataParallel, FSDP2 and ZeRO-3.

    python -m torch.distributed.run --standalone --nproc_per_node=2 ranks_program.py FOLDER ddp fsdp zero3

FOLDER holds a model (``model/``) and ``steps.pt``, a list of steps with one batch for each rank; rank 0 writes ``ddp.pt``,
``fsdp.pt`` and ``zero3.pt``, the gradients of each step by name. Each rank R writes ``ddp-R.json`` and so on: for each step,
how often the head was called, where its weight is gathered, and the positions of each chunk that it ran.
"""

from __future__ import annotations

import copy
import json
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


def watch_the_head(plain: nn.Module) -> list[dict[str, list[int]]]:
    """One entry a forward pass from now on: ``calls``, by their numbers of targets, and ``chunks``, by their positions."""
    seen: list[dict[str, list[int]]] = []
    compute = cross_entropy._loss_and_gradient

    def count_chunk(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        seen[-1]["chunks"].append(len(targets))
        return compute(logits, targets)

    cross_entropy._loss_and_gradient = count_chunk
    plain.register_forward_pre_hook(lambda module, args: seen.append({"calls": [], "chunks": []}))
    plain.lm_head.register_forward_pre_hook(lambda module, args: seen[-1]["calls"].append(len(args[1])))
    return seen


def under_ddp(plain: nn.Module, steps: list[list[dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
    return gradients(DistributedDataParallel(plain, find_unused_parameters=False), steps)


def under_fsdp(plain: nn.Module, steps: list[list[dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
    language_model = plain.model.language_model
    # Each gathered at its own call: ranks that call them in another order, or not equally often, would not come together.
    for part in (*language_model.layers, language_model.embed_tokens, plain.model.multi_modal_projector, plain.lm_head):
        fully_shard(part)
    fully_shard(plain)
    return gradients(plain, steps)


def under_zero3(plain: nn.Module, steps: list[list[dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    # Its exchange through shared memory would be compiled first, for a minute and with a compiler: gloo does it, too.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=plain,
        optimizer=torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.0),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            # A threshold of 0 partitions small parameters too; DeepSpeed would keep all of these whole.
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        },
    )
    results = []
    for step in steps:
        num_items = sum((batch["labels"][:, 1:] != -100).sum() for batch in step)
        loss = engine(**step[dist.get_rank()], num_items_in_batch=num_items, use_cache=False).loss
        engine.backward(loss * dist.get_world_size())
        learning = [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]
        results.append({name: safe_get_full_grad(parameter).clone() for name, parameter in learning})
        engine.step()
    return results


def main() -> None:
    folder, wrappers = Path(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo")
    plain = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    plain.model.vision_tower.requires_grad_(False)
    plain.train()
    steps = torch.load(folder / "steps.pt")
    # Ranks with many labels run many chunks of the head, those with few run one.
    cross_entropy.LOGITS_PER_CHUNK = 4 * plain.lm_head.out_features
    compute = cross_entropy._loss_and_gradient
    functions = {"ddp": under_ddp, "fsdp": under_fsdp, "zero3": under_zero3}
    for name in wrappers:
        wrapped = copy.deepcopy(plain)
        seen = watch_the_head(wrapped)
        results = functions[name](wrapped, steps)
        cross_entropy._loss_and_gradient = compute
        (folder / f"{name}-{dist.get_rank()}.json").write_text(json.dumps(seen))
        if dist.get_rank() == 0:
            torch.save(results, folder / f"{name}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
