"""Where the fused allocator keeps what: the order of its parameters, and the matrices that its backward needs.

All between the operator (:mod:`igva_kernels.allocator_ops`) and its kernels is in a few buffers of equal matrices, so that a
gradient lies at the index of what it is the gradient of, and the kernels of all blocks find theirs by arithmetic:

* *rows*: B rows of the hidden width. The projected sentence, and :data:`MATRICES_OF_A_BLOCK` for each block.
* *members*: B*K rows of the hidden width. The projected summaries, then keys and values of each block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

MATRICES_OF_A_BLOCK = ("query", "attended", "sum1", "normalised1", "ffn_hidden", "sum2", "normalised2")
"""The row matrices of a block in their order: q, o, o Wo + x, LayerNorm 1 of it, ReLU, the second sum, LayerNorm 2 of it."""

PARAMETERS_OF_A_BLOCK = 12
"""in_proj, out_proj, ffn.0, ffn.2, norm1, norm2, each a weight and a bias."""


@dataclass(frozen=True)
class AllocatorSizes:
    """The sizes of a :class:`~igva_kernels.modules.WeightAllocator`, named as its arguments."""

    num_groups: int
    vision_dim: int
    text_dim: int
    hidden_dim: int
    num_blocks: int
    num_heads: int

    @classmethod
    def of(cls, parameters: Sequence[Tensor], num_heads: int) -> AllocatorSizes:
        """The sizes that the shapes of the parameters show."""
        return cls(
            num_groups=parameters[-1].shape[0],
            vision_dim=parameters[2].shape[1],
            text_dim=parameters[0].shape[1],
            hidden_dim=parameters[0].shape[0],
            num_blocks=(len(parameters) - 6) // PARAMETERS_OF_A_BLOCK,
            num_heads=num_heads,
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_dim // self.num_heads

    @property
    def num_row_matrices(self) -> int:
        return 1 + len(MATRICES_OF_A_BLOCK) * self.num_blocks

    @property
    def num_member_matrices(self) -> int:
        return 1 + 2 * self.num_blocks

    @cached_property
    def parameter_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of all parameters, in the order in which the module hands them over."""
        hidden = self.hidden_dim
        square = ((hidden, hidden), (hidden,))
        block = ((3 * hidden, hidden), (3 * hidden,), *square, *square, *square, *(((hidden,),) * 4))
        return (
            (hidden, self.text_dim),
            (hidden,),
            (hidden, self.vision_dim),
            (hidden,),
            *(block * self.num_blocks),
            (self.num_groups, hidden),
            (self.num_groups,),
        )

    @cached_property
    def parameter_offsets(self) -> tuple[int, ...]:
        """Where each parameter begins in a flat buffer of all of them; the last entry is the size of the buffer."""
        offsets = [0]
        for shape in self.parameter_shapes:
            offsets.append(offsets[-1] + math.prod(shape))
        return tuple(offsets)


def row_matrix(block: int, name: str) -> int:
    """The index of a row matrix; ``row_matrix(block - 1, "normalised2")`` is the input of a block, for block 0 index 0."""
    return 1 + len(MATRICES_OF_A_BLOCK) * block + MATRICES_OF_A_BLOCK.index(name)


def first_parameter(block: int) -> int:
    """The index of a block's in_proj_weight among the parameters."""
    return 4 + PARAMETERS_OF_A_BLOCK * block
