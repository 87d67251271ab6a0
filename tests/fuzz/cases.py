"""Random cases of the mix: a plan, the sizes, how the tensors lie in memory, and what needs a gradient.

A :class:`Case` is data: its ``repr`` is all that is needed to run it again, the values of its tensors follow from its seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from igva_kernels import FusionPlan, Layer, Mean, Norm, Weighted

SHARINGS = ("all", "image", "token", "sparse")
"""Weights (K,), (B, K), (B, N, K), and (values, indices) of (B, N, k) each."""

STATE_LAYOUTS = ("contiguous", "first rows of a longer sequence", "last rows of a longer sequence")
ROW_LAYOUTS = (*STATE_LAYOUTS, "channels of a wider map")
ALL_LAYOUTS = (*ROW_LAYOUTS, "transposed")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GRAD_LAYOUTS = (
    "contiguous",
    "rows of a longer sequence",
    "channels of a wider map",
    "odd row stride",
    "expanded",
    "transposed",
)


@dataclass(frozen=True)
class NormBehind:
    """A norm behind the mix.

    Args:
        kind, eps: as of :class:`igva_kernels.OutputNorm`.
        weight, bias: whether there are any.
        wide: whether these are in the accumulation dtype, and so is the output.
        needs: whether they need a gradient.
    """

    kind: str
    eps: float
    weight: bool
    bias: bool
    wide: bool
    needs: bool


@dataclass(frozen=True)
class Case:
    """One call of the library.

    Args:
        plan: what is mixed.
        batch, prefix, patches, width: B, P, N, D.
        dtype: of the hidden states and of the output's gradient.
        sharing: one of :data:`SHARINGS`, or None for a plan without weights.
        num_columns: k of sparse weights.
        weights_dtype: of the weights.
        layouts: how each state that is read lies in memory; None: all L + 1 are one stacked tensor.
        unread: what stands for a layer that is not read: None, or a tensor of NaN.
        grad_layout: one of :data:`GRAD_LAYOUTS`.
        norm: behind the mix, or None.
        weights_need, states_need: what needs a gradient. A stacked tensor needs one if any of its layers does.
        seed: of the values.
    """

    plan: FusionPlan
    batch: int
    prefix: int
    patches: int
    width: int
    dtype: torch.dtype
    sharing: str | None
    num_columns: int
    weights_dtype: torch.dtype
    layouts: tuple[str, ...] | None
    unread: str
    grad_layout: str
    norm: NormBehind | None
    weights_need: bool
    states_need: tuple[bool, ...]
    seed: int

    @property
    def tokens(self) -> int:
        return self.prefix + self.patches

    @property
    def norm_needs(self) -> bool:
        """Whether a parameter of the norm behind the mix needs a gradient."""
        return self.norm is not None and self.norm.needs and (self.norm.weight or self.norm.bias)

    @property
    def out_dtype(self) -> torch.dtype:
        if self.norm is None or not self.norm.wide or not (self.norm.weight or self.norm.bias):
            return self.dtype
        return torch.promote_types(self.dtype, torch.float32)


@dataclass(frozen=True)
class Limits:
    """What an implementation can run, and how large its cases may be.

    Args:
        dtypes: of the states.
        access_bytes: D is a multiple of so many bytes.
        layouts: of the states.
        max_batch: largest B.
        max_layers: largest L.
        max_image_bytes: largest N*D of one image, in bytes.
        max_rows: largest B*T where each row is a program of its own (weights per token, norms); None: as many as come.
        sharings: the forms of the weights.
        norms: whether groups may be normalised, and the output.
        truncates: whether a store to bfloat16 cuts bits off instead of rounding, as Triton's interpreter does.
    """

    dtypes: tuple[torch.dtype, ...] = DTYPES
    access_bytes: int = 1
    layouts: tuple[str, ...] = ALL_LAYOUTS
    max_batch: int = 4
    max_layers: int = 9
    max_image_bytes: int = 8192
    max_rows: int | None = None
    sharings: tuple[str, ...] = SHARINGS
    norms: bool = True
    truncates: bool = False


@st.composite
def plans(draw: st.DrawFn, limits: Limits) -> FusionPlan:
    """Any plan: groups overlap, repeat, have a single layer, are weighted here and plain there, normalised or not.

    A third are IGVA's, with the large disjoint groups whose means are worth keeping for the backward.
    """
    num_layers = draw(st.integers(1, limits.max_layers))
    if draw(st.integers(0, 2)) == 2:
        num_groups = draw(st.sampled_from([k for k in (1, 2, 3) if num_layers % k == 0]))
        order = draw(st.sampled_from(("fused_first", "base_first")))
        return FusionPlan.igva(num_layers, num_groups, base=draw(st.integers(0, num_layers)), order=order)
    layer = st.integers(-(num_layers + 1), num_layers)  # counted from either end
    group = st.lists(st.integers(0, num_layers), min_size=1, max_size=6, unique=True).map(tuple)
    pool = draw(st.lists(group, min_size=1, max_size=4))  # few groups for many places: some are used more than once
    pooled = st.sampled_from(pool)
    norm = st.none() | st.none() | st.builds(Norm, st.sampled_from(("layer", "rms")), st.sampled_from((1e-5, 1e-6, 0.01)))
    norm = norm if limits.norms else st.none()
    slot = st.one_of(
        st.builds(Layer, layer),
        st.builds(Mean, pooled, norm),
        st.builds(Weighted, st.lists(pooled, min_size=1, max_size=4).map(tuple), st.none() | layer, norm),
    )
    return FusionPlan(num_layers, tuple(draw(st.lists(slot, min_size=1, max_size=4))))


@st.composite
def norms_behind(draw: st.DrawFn) -> NormBehind:
    kind = draw(st.sampled_from(("layer", "rms")))
    weight, bias = draw(st.booleans()), kind == "layer" and draw(st.booleans())
    eps = draw(st.sampled_from((1e-5, 0.01)))
    return NormBehind(kind, eps, weight, bias, wide=draw(st.booleans()), needs=draw(st.booleans()))


@st.composite
def cases(draw: st.DrawFn, limits: Limits) -> Case:
    """Any case within the limits."""
    plan = draw(plans(limits))
    dtype = draw(st.sampled_from(limits.dtypes))
    sharing = draw(st.sampled_from(limits.sharings)) if plan.num_groups else None
    norm = draw(st.none() | st.none() | norms_behind()) if limits.norms else None
    prefix = draw(st.sampled_from((1, 0, 5, 2)))
    in_rows = sharing in ("token", "sparse") or plan.program.has_norms or norm is not None
    by_row = limits.max_rows is not None and in_rows
    batch = draw(st.integers(0, limits.max_batch))
    max_patches = 9
    if by_row:
        prefix = min(prefix, 2)
        max_patches = max(1, limits.max_rows // max(1, batch) - prefix)
    patches = draw(st.integers(1, max_patches))
    unit = max(1, limits.access_bytes // dtype.itemsize)
    width = unit * draw(st.integers(1, max(1, limits.max_image_bytes // (dtype.itemsize * unit * (prefix + patches)))))
    sources = len(plan.sources)
    layout = st.sampled_from(limits.layouts)
    layouts = draw(st.none() | st.tuples(*[layout] * sources))
    states_need = draw(st.just((False,) * sources) | st.just((True,) * sources) | st.tuples(*[st.booleans()] * sources))
    return Case(
        plan=plan,
        batch=batch,
        prefix=prefix,
        patches=patches,
        width=width,
        dtype=dtype,
        sharing=sharing,
        num_columns=draw(st.integers(1, 4)) if sharing == "sparse" else 0,
        weights_dtype=draw(st.sampled_from((torch.float32, dtype, torch.float64))),
        layouts=layouts,
        unread=draw(st.sampled_from(("None", "NaN"))),
        grad_layout=draw(st.sampled_from(GRAD_LAYOUTS)),
        norm=norm,
        weights_need=sharing is not None and draw(st.booleans()),
        states_need=states_need,
        seed=draw(st.integers(0, 2**16)),
    )
