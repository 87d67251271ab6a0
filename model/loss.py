"""The training loss: exact per token under any batching, with the balance term weighted like the tokens.

    loss = Σ_b (ce_sum_b + λ · n_b · balance_b) / num_items

over the samples b of all batches that share one optimizer step: ``ce_sum_b`` is the summed cross-entropy of the sample, ``n_b``
the number of its labels, ``balance_b`` the mean over its images of the negative entropy of their fusion weights, ``num_items``
the sum of n_b over the whole step. A mean per batch would be multiplied by the accumulation steps and the ranks; this sum is
the same for one batch of 32 and four of 8.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

IGNORE_INDEX = -100


def token_exact_loss(
    hidden_states: Tensor,
    labels: Tensor,
    lm_head: nn.Module,
    *,
    num_items_in_batch: Tensor | int | None = None,
    fusion_weights: Tensor | None = None,
    image_to_sample: Tensor | None = None,
    balance_loss_weight: float = 0.0,
    legacy_double_softmax: bool = False,
) -> Tensor:
    """The loss of one forward pass.

    The head runs at positions with a label only: in LLaVA's data four of five positions are image or prompt tokens, whose
    logits would cost (positions x vocabulary) floats for nothing.

    Args:
        hidden_states: (rows, S, H), the last hidden states of the language model.
        labels: (rows, S), not shifted; -100 where there is nothing to learn. Position s is predicted from position s - 1.
        lm_head: (M, H) to (M, vocabulary).
        num_items_in_batch: labels of the whole optimizer step, all ranks together; None takes those of this batch.
        fusion_weights: (images, K) with rows that sum to 1; None leaves the balance term out.
        image_to_sample: (images,), the row of ``labels`` that each image belongs to; needed with ``fusion_weights``.
        balance_loss_weight: λ.
        legacy_double_softmax: see :func:`negative_entropy`.

    Returns:
        A float32 scalar. A batch without a single label gives 0 with a gradient of 0, so that all ranks run the same backward.

    Raises:
        ValueError: shapes that do not fit, or ``fusion_weights`` without ``image_to_sample``.
    """
    if labels.shape != hidden_states.shape[:2]:
        raise ValueError(f"labels has the shape {tuple(labels.shape)}, expected (rows, S) = {tuple(hidden_states.shape[:2])}")
    targets = labels[:, 1:].to(hidden_states.device)
    has_label = targets != IGNORE_INDEX  # (rows, S-1)
    logits = lm_head(hidden_states[:, :-1][has_label])  # (M, vocabulary)
    total = nn.functional.cross_entropy(logits.float(), targets[has_label], reduction="sum")
    num_labels = has_label.sum(dim=1)  # (rows,)
    if fusion_weights is not None and balance_loss_weight:
        if image_to_sample is None:
            raise ValueError("image_to_sample is None, but the balance term needs the sample of each image")
        balance = negative_entropy(fusion_weights, legacy_double_softmax=legacy_double_softmax)  # (images,)
        total = total + balance_loss_weight * _token_weighted_sum(balance, image_to_sample, num_labels)
    num_items = num_labels.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
    return total / num_items.to(total.device).clamp(min=1)


def negative_entropy(weights: Tensor, *, legacy_double_softmax: bool = False) -> Tensor:
    """``Σ_k w_k log w_k`` of each row: 0 for a single group, −log K for uniform weights.

    Args:
        weights: (images, K), rows that sum to 1.
        legacy_double_softmax: of ``softmax(weights)`` instead, as the released code computes it. For K = 4 that can only move
            between −1.386 and −1.268.

    Returns:
        (images,), float32.
    """
    weights = weights.float()
    if legacy_double_softmax:
        weights = weights.softmax(dim=-1)
    # A weight that underflowed to 0 contributes 0, with a finite gradient.
    return (weights * weights.clamp_min(torch.finfo(weights.dtype).tiny).log()).sum(dim=-1)


def _token_weighted_sum(per_image: Tensor, image_to_sample: Tensor, num_labels: Tensor) -> Tensor:
    """Σ_b n_b · mean of ``per_image`` over the images of sample b; samples without images add nothing."""
    if image_to_sample.shape != per_image.shape:
        raise ValueError(
            f"image_to_sample has the shape {tuple(image_to_sample.shape)}, expected one entry for each of the "
            f"{per_image.shape[0]} images"
        )
    image_to_sample = image_to_sample.to(num_labels.device)
    images_of_sample = torch.bincount(image_to_sample, minlength=num_labels.shape[0])
    share = num_labels[image_to_sample] / images_of_sample[image_to_sample]
    return (per_image * share.to(per_image)).sum()
