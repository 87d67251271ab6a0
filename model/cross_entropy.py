"""Cross-entropy that never holds the logits of more than one chunk of positions.

Legend: M labelled positions · H width of the language model · V vocabulary · C positions of a chunk.

At 16 samples of 700 tokens and V = 32,064 the full logits are 1.4 GB in fp32, and the softmax and its gradient as much again
each. Here the gradient is computed chunk by chunk in the forward pass, where the logits of the chunk are at hand (as
linkedin/Liger-Kernel: src/liger_kernel/ops/fused_linear_cross_entropy.py does in Triton), and the backward pass only scales it.
What was weighed:

* against ``torch.utils.checkpoint`` on each chunk: that computes the logits twice (four products of M x H x V, not three),
  and autograd adds the chunks' weight gradients in the weight's dtype, each rounded. Here the sum over chunks is kept in fp32
  and rounded once.
* what is held from forward to backward: (M, H) in the states' dtype and, where the head learns, (V, H) in the weight's. The
  backward of the loss runs first, so both are gone before the language model's activations are needed. A frozen head costs
  neither its gradient's product nor its memory.
* ZeRO-3 and FSDP2 gather the head's weight by hooks on the call of the module. So all chunks run in ONE call, however
  many they are: ranks with unequal numbers of labels gather equally often. A batch without labels runs one chunk of no
  positions.
* adapters on the head would need the gradient of their factors from each chunk, or W + B·A of (V, H) in every step: refused, as
  no published recipe has them there. Quantised heads are refused too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: Logits of a chunk: 134 MB in fp32 (and half of that in bf16 beside it), a tenth of what 16 x 700 positions would need. At
#: V = 32,064 that is 1,024 positions. A chunk of C positions does 2·C·H·V operations on a weight of 2·H·V bytes in bf16, C
#: operations a byte; an H100 is in balance at about 300 (989 TFLOP/s, 3.35 TB/s), so reading the weight anew in each chunk does
#: not bound the product. Below a few hundred positions it would.
LOGITS_PER_CHUNK = 2**25

#: Chunks are multiples of this where they can be, for the tiles of tensor cores.
_ROW_MULTIPLE = 64


class LanguageModelHead(nn.Linear):
    """The head of the language model: logits, or the summed cross-entropy without the logits.

    Saves and loads as ``nn.Linear``. Weights tied to the embedding and a bias work as they do there.
    """

    def forward(self, hidden_states: Tensor, targets: Tensor | None = None) -> Tensor:
        """(..., H) to logits (..., V); with ``targets``, see :func:`chunked_cross_entropy`.

        Args:
            hidden_states: (..., H); (M, H) with targets.
            targets: (M,) int64, the token to predict at each position.
        """
        if targets is None:
            return super().forward(hidden_states)
        return chunked_cross_entropy(hidden_states, targets, self.weight, self.bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> LanguageModelHead:
        """The head with the parameters of ``linear`` themselves, not copies; a ``LanguageModelHead`` comes back as it is.

        Raises:
            TypeError: a class derived from ``nn.Linear`` that computes something else (quantised, with adapters).
        """
        if isinstance(linear, cls):
            return linear
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"the language model's head must be nn.Linear, got {type(linear).__name__}; keep the head out of "
                "quantisation and out of the adapters' target modules"
            )
        head = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        head.weight, head.bias = linear.weight, linear.bias
        return head


def chunked_cross_entropy(
    hidden_states: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    logits_per_chunk: int | None = None,
) -> Tensor:
    """``Σ_m −log softmax(W h_m + b)[target_m]``, with logits of at most ``logits_per_chunk`` elements alive at once.

    Under autocast the products run in its dtype. Softmax, loss and the sums over chunks are in fp32, or float64 for float64
    inputs. Chunks are summed in order: the same bits on every run. The gradient can be taken once; torch refuses a second time.

    Args:
        hidden_states: (M, H), floating point.
        targets: (M,) int64 in 0 .. V − 1.
        weight: (V, H).
        bias: (V,), or None.
        logits_per_chunk: None takes :data:`LOGITS_PER_CHUNK`. A chunk has at least one position.

    Returns:
        A float32 scalar, float64 for float64 inputs; 0 for M = 0, with gradients of 0.

    Raises:
        ValueError: shapes that do not fit, or ``logits_per_chunk`` below 1.
    """
    if hidden_states.ndim != 2 or targets.shape != hidden_states.shape[:1] or weight.shape[1:] != hidden_states.shape[1:]:
        raise ValueError(
            f"hidden_states, targets and weight have the shapes {tuple(hidden_states.shape)}, {tuple(targets.shape)} and "
            f"{tuple(weight.shape)}, expected (positions, width), (positions,) and (vocabulary, width)"
        )
    limit = LOGITS_PER_CHUNK if logits_per_chunk is None else logits_per_chunk
    if limit < 1:
        raise ValueError(f"logits_per_chunk must be above 0, got {limit}")
    rows = max(1, limit // weight.shape[0])
    if rows > _ROW_MULTIPLE:
        rows -= rows % _ROW_MULTIPLE
    # Inside of forward() autograd is off, and the inputs' flags do not tell whether it was on outside.
    return _ChunkedCrossEntropy.apply(hidden_states, targets, weight, bias, rows, torch.is_grad_enabled())


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, rows: int, with_gradient: bool
    ) -> Tensor:
        needs_states, _, needs_weight, needs_bias = (with_gradient and needed for needed in ctx.needs_input_grad[:4])
        device = hidden_states.device.type
        dtype = torch.promote_types(hidden_states.dtype, weight.dtype)
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        exact = torch.promote_types(dtype, torch.float32)

        # With autocast off and casts written out: its cache would keep a copy of the weight that has no gradient.
        with torch.autocast(device, enabled=False):
            head = weight.to(dtype)
            head_bias = None if bias is None else bias.to(dtype)
            total = torch.zeros((), dtype=exact, device=hidden_states.device)
            grad_states = torch.empty_like(hidden_states) if needs_states else None
            grad_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device) if needs_weight else None
            grad_bias = torch.zeros(weight.shape[0], dtype=exact, device=weight.device) if needs_bias else None
            # One chunk at least, also without positions: its products make gradients of 0.
            for start in range(0, max(len(targets), 1), rows):
                chunk = hidden_states[start : start + rows].to(dtype)  # (C, H)
                loss, gradient = _loss_and_gradient(
                    nn.functional.linear(chunk, head, head_bias).to(exact), targets[start : start + rows]
                )
                total += loss
                if grad_bias is not None:
                    grad_bias += gradient.sum(dim=0)
                gradient = gradient.to(dtype)
                if grad_states is not None:
                    grad_states[start : start + rows] = gradient @ head
                if grad_weight is not None:
                    grad_weight += gradient.t() @ chunk
        grads = (
            grad_states,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        # In place: another (V, H) would double what the head's gradient takes. torch notices the change if the same graph is
        # run backward again, and refuses.
        grad_states, grad_weight, grad_bias = (None if grad is None else grad.mul_(grad_total) for grad in ctx.saved_tensors)
        return grad_states, None, grad_weight, grad_bias, None, None


def _loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of (C, V) logits, and its gradient, which takes the place of the logits."""
    targets = targets.unsqueeze(-1)  # (C, 1)
    logits -= logits.amax(dim=-1, keepdim=True)
    at_target = logits.gather(1, targets)
    sums = logits.exp_().sum(dim=-1, keepdim=True)
    gradient = logits.div_(sums)
    loss = (sums.log() - at_target).sum()
    gradient.scatter_(1, targets, gradient.gather(1, targets) - 1)
    return loss, gradient
