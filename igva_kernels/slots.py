"""What a slot of a fusion plan may hold, and how layer indices are read. Pure Python, without torch.

Layer indices follow Hugging Face's ``hidden_states``: ``h_0`` is the embedding output, ``h_l`` the output of block l, and a
negative index counts from the end (``-1`` is ``h_L``, ``-2`` the penultimate layer).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from igva_kernels.program import Norm


@dataclass(frozen=True)
class Layer:
    """A slot that copies one hidden state.

    Args:
        index: hidden state to copy, ``0 .. L`` or negative.
    """

    index: int


@dataclass(frozen=True)
class Mean:
    """A slot that holds the plain mean of some hidden states.

    Args:
        layers: hidden states to average, each once, ``0 .. L`` or negative.
        norm: applied to each of them before they are averaged; None for the states as they are.
    """

    layers: tuple[int, ...]
    norm: Norm | None = None


@dataclass(frozen=True)
class Weighted:
    """A slot that holds ``sum_k w_k * mean(group k)`` with weights given at run time, and one layer beside them if wanted.

    Args:
        groups: K groups of hidden states. Several weighted slots of one plan take consecutive columns of the weights.
        plus: a hidden state that is added with the constant weight 1, as it is; None for none.
        norm: applied to each hidden state of the groups before they are averaged; None for the states as they are.
    """

    groups: tuple[tuple[int, ...], ...]
    plus: int | None = None
    norm: Norm | None = None


Slot = Layer | Mean | Weighted


def resolve_slot(slot: Slot, num_layers: int, where: str) -> Slot:
    """A slot with all its indices as ``0 .. num_layers``, groups ascending.

    Raises:
        TypeError: neither :class:`Layer` nor :class:`Mean` nor :class:`Weighted`; an index or a norm of a wrong type.
        ValueError: a slot without groups, an empty or repeating group, or a layer that does not exist.
    """
    if isinstance(slot, Layer):
        return Layer(resolve_layer(slot.index, num_layers, where))
    if isinstance(slot, Mean):
        return Mean(resolve_group(slot.layers, num_layers, where), _checked_norm(slot.norm, where))
    if isinstance(slot, Weighted):
        groups = tuple(slot.groups)
        if not groups:
            raise ValueError(f"{where}: Weighted needs at least one group, got none")
        return Weighted(
            tuple(resolve_group(group, num_layers, f"{where}, group {k}") for k, group in enumerate(groups)),
            None if slot.plus is None else resolve_layer(slot.plus, num_layers, f"{where}, plus"),
            _checked_norm(slot.norm, where),
        )
    raise TypeError(f"{where} must be a Layer, Mean or Weighted, got {slot!r}")


def layers_of(slot: Slot) -> tuple[int, ...]:
    """The layers that a resolved slot reads; a layer of several groups several times."""
    if isinstance(slot, Layer):
        return (slot.index,)
    if isinstance(slot, Mean):
        return slot.layers
    return (*(layer for group in slot.groups for layer in group), *(() if slot.plus is None else (slot.plus,)))


def resolve_layer(index: int, num_layers: int, where: str) -> int:
    """A hidden-state index as ``0 .. num_layers``.

    Raises:
        TypeError: not an int.
        ValueError: outside ``-(num_layers + 1) .. num_layers``; the text names ``where``, the index and the depth.
    """
    if not isinstance(index, int) or isinstance(index, bool):
        raise TypeError(f"{where}: a layer index must be an int, got {index!r}")
    if not -(num_layers + 1) <= index <= num_layers:
        raise ValueError(
            f"{where}: layer {index} does not exist: a tower of {num_layers} layers has the hidden states "
            f"0 .. {num_layers} (or -1 .. {-(num_layers + 1)} from the end)"
        )
    return index if index >= 0 else index + num_layers + 1


def resolve_group(layers: Iterable[int], num_layers: int, where: str) -> tuple[int, ...]:
    """A group of hidden states as ascending non-negative indices.

    Raises:
        ValueError: empty, or a layer that appears twice (also as a positive and a negative index).
    """
    resolved = sorted(resolve_layer(layer, num_layers, where) for layer in layers)
    if not resolved:
        raise ValueError(f"{where}: a group needs at least one layer, got none")
    if len(set(resolved)) < len(resolved):
        repeated = sorted({layer for layer in resolved if resolved.count(layer) > 1})
        raise ValueError(f"{where}: layer {repeated[0]} appears more than once in {resolved}; list each layer once")
    return tuple(resolved)


def _checked_norm(norm: Norm | None, where: str) -> Norm | None:
    if norm is not None and not isinstance(norm, Norm):
        raise TypeError(f'{where}: norm must be a Norm or None, got {norm!r}; write Norm("rms") or Norm("layer", eps=1e-5)')
    return norm
