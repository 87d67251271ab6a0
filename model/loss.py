"""The training loss: exact per token under any batching, with the balance term weighted like the tokens.

    loss = Σ_b (ce_sum_b + λ · n_b · balance_b) / num_items

over the samples b of all batches that share one optimizer step: ``ce_sum_b`` is the summed cross-entropy of the sample, ``n_b``
the number of its labels, ``balance_b`` the mean over its images of the negative entropy of their fusion weights, ``num_items``
the sum of n_b over the whole step. A mean per batch would be multiplied by the accumulation steps and the ranks; this sum is
the same for one batch of 32 and four of 8, and for samples that share rows or have rows of their own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.cross_entropy import LanguageModelHead

IGNORE_INDEX = -100


class TokenExactLoss(NamedTuple):
    """The loss of one forward pass and its two parts, float32 scalars (float64 for float64 inputs).

    Args:
        loss: ``cross_entropy + λ · balance``; carries the gradient.
        cross_entropy: Σ_b ce_sum_b / num_items, without gradient.
        balance: Σ_b n_b · balance_b / num_items, without gradient; None where there are no fusion weights.
    """

    loss: Tensor
    cross_entropy: Tensor
    balance: Tensor | None


def token_exact_loss(
    hidden_states: Tensor,
    labels: Tensor,
    lm_head: LanguageModelHead,
    *,
    num_items_in_batch: Tensor | int | None = None,
    fusion_weights: Tensor | None = None,
    image_to_sample: Tensor | None = None,
    sample_ids: Tensor | None = None,
    balance_loss_weight: float = 0.0,
    legacy_double_softmax: bool = False,
) -> TokenExactLoss:
    """The loss of one forward pass.

    The head runs at positions with a label only, chunk by chunk (:mod:`model.cross_entropy`): in LLaVA's data four of five
    positions are image or prompt tokens, whose logits would cost (positions x vocabulary) floats for nothing.

    Args:
        hidden_states: (rows, S, H), the last hidden states of the language model.
        labels: (rows, S), not shifted; -100 where there is nothing to learn. Position s is predicted from position s - 1.
        lm_head: the head; called once, whatever the number of labels is.
        num_items_in_batch: labels of the whole optimizer step, all ranks together; None takes those of this batch.
        fusion_weights: (images, K) with rows that sum to 1; None where there are none.
        image_to_sample: (images,), the sample that each image belongs to; needed with ``fusion_weights``.
        sample_ids: (rows, S) int64 for rows that hold several samples: the sample of each position, numbered from 0 over the
            batch, -1 for padding. No position is predicted from one of another sample. None: every row is a sample.
        balance_loss_weight: λ.
        legacy_double_softmax: see :func:`negative_entropy`.

    Returns:
        The loss and its parts. A batch without a single label gives 0 with a gradient of 0, so that all ranks run the same
        backward.

    Raises:
        ValueError: shapes that do not fit, or a balance term without ``image_to_sample``.
        TypeError: ``lm_head`` is no :class:`model.cross_entropy.LanguageModelHead`.
    """
    _check(hidden_states, labels, lm_head, sample_ids)
    if fusion_weights is not None and balance_loss_weight and image_to_sample is None:
        raise ValueError("image_to_sample is None, but the balance term needs the sample of each image")
    if fusion_weights is not None and image_to_sample is not None and image_to_sample.shape != fusion_weights.shape[:1]:
        raise ValueError(
            f"image_to_sample has the shape {tuple(image_to_sample.shape)}, expected one entry for each of the "
            f"{fusion_weights.shape[0]} images"
        )
    targets = labels[:, 1:].to(hidden_states.device)
    has_label = targets != IGNORE_INDEX  # (rows, S-1)
    if sample_ids is None:
        num_labels = has_label.sum(dim=1)  # (samples,)
    else:
        sample_ids = sample_ids.to(hidden_states.device)
        has_label &= sample_ids[:, 1:] == sample_ids[:, :-1]
        num_labels = torch.bincount(sample_ids[:, 1:][has_label], minlength=int(sample_ids.max()) + 1)
    total = lm_head(hidden_states[:, :-1][has_label], targets[has_label])
    num_items = num_labels.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
    num_items = num_items.to(total.device).clamp(min=1)
    cross_entropy = total / num_items
    if fusion_weights is None or image_to_sample is None:
        return TokenExactLoss(cross_entropy, cross_entropy.detach(), None)
    balances = negative_entropy(fusion_weights, legacy_double_softmax=legacy_double_softmax)  # (images,)
    balance = _token_weighted_sum(balances, image_to_sample, num_labels) / num_items
    loss = cross_entropy + balance_loss_weight * balance if balance_loss_weight else cross_entropy
    return TokenExactLoss(loss, cross_entropy.detach(), balance.detach())


def negative_entropy(weights: Tensor, *, legacy_double_softmax: bool = False) -> Tensor:
    """``Σ_k w_k log w_k`` of each row: 0 for a single group, −log K for uniform weights.

    Args:
        weights: (images, K), rows that sum to 1.
        legacy_double_softmax: of ``softmax(weights)`` instead, as the released code computes it. For K = 4 that can only move
            between −1.386 and −1.268.

    Returns:
        (images,), float32; float64 for float64 weights.
    """
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    if legacy_double_softmax:
        weights = weights.softmax(dim=-1)
    # A weight that underflowed to 0 contributes 0, with a finite gradient.
    return (weights * weights.clamp_min(torch.finfo(weights.dtype).tiny).log()).sum(dim=-1)


def _token_weighted_sum(per_image: Tensor, image_to_sample: Tensor, num_labels: Tensor) -> Tensor:
    """Σ_b n_b · mean of ``per_image`` over the images of sample b; samples without images add nothing."""
    image_to_sample = image_to_sample.to(num_labels.device)
    images_of_sample = torch.bincount(image_to_sample, minlength=num_labels.shape[0])
    share = num_labels[image_to_sample] / images_of_sample[image_to_sample].to(per_image.dtype)
    return (per_image * share).sum()


def _check(hidden_states: Tensor, labels: Tensor, lm_head: LanguageModelHead, sample_ids: Tensor | None) -> None:
    for name, value in (("labels", labels), ("sample_ids", sample_ids)):
        if value is not None and value.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"{name} has the shape {tuple(value.shape)}, expected (rows, S) = {tuple(hidden_states.shape[:2])}"
            )
    if not isinstance(lm_head, LanguageModelHead):
        raise TypeError(
            f"lm_head must be a LanguageModelHead, got {type(lm_head).__name__}; wrap a plain nn.Linear in "
            "LanguageModelHead.from_linear, and keep the head out of the adapters' target modules"
        )
