"""The published plans, as class methods of :class:`igva_kernels.FusionPlan`: ``FusionPlan.dense_connector_dci(24)``.

Every docstring gives the formula, its source, and the exact indices. All indices are those of Hugging Face's ``hidden_states``
(h_0 is the embedding output, h_l the output of block l); where a publication counts otherwise (Mllama and Molmo count blocks
from 0), the preset takes its numbers and says what they become.

A preset states which layers are mixed how. Norms with parameters after the mix, and networks that compute weights, are modules
(:mod:`igva_kernels.modules`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, Self, get_args

from igva_kernels.program import Norm
from igva_kernels.slots import Layer, Mean, Slot, Weighted, resolve_group

SlotOrder = Literal["fused_first", "base_first"]
BaseOrder = Literal["base_first", "base_last"]
LayerSelectFuseStrategy = Literal["18", "3-18", "3-18-23", "former", "latter", "all"]

Channels = tuple[int | tuple[int, ...], ...]
"""What is concatenated: a layer, or the mean of several."""

_LAYER_SELECT_FUSE: dict[int, dict[str, Channels]] = {
    24: {  # clip_encoder.py
        "18": (18, 23),
        "3-18": (3, 18, 23),
        "3-18-23": (3, 18, 23),
        "former": (tuple(range(1, 13)), 23),
        "latter": (tuple(range(13, 25)), 23),
        "all": (tuple(range(1, 13)), tuple(range(13, 25)), 23),
    },
    27: {  # siglip_encoder.py
        "3-18-23": (3, 20, 25),
        "latter": (tuple(range(15, 27)), 25),
    },
}


class Presets:
    """The class methods that :class:`igva_kernels.FusionPlan` inherits."""

    if TYPE_CHECKING:

        def __init__(self, num_layers: int, slots: tuple[Slot, ...]) -> None: ...

    # ---- IGVA -------------------------------------------------------------------------------------------------------

    @classmethod
    def igva(
        cls,
        num_layers: int,
        num_groups: int = 4,
        *,
        groups: Sequence[Sequence[int]] | None = None,
        base: int = -2,
        order: SlotOrder = "fused_first",
    ) -> Self:
        """IGVA, stage 2: ``[sum_k w_k * mean(group k), h_base]`` (arXiv 2501.08443; methods section).

        CLIP-L, K = 4: the groups 1..6, 7..12, 13..18, 19..24, and h_23.

        Args:
            num_layers: L of the tower; 24 for CLIP-L.
            num_groups: K; the blocks ``1 .. L`` are cut into K runs of equal length. The embedding output h_0 is in no group,
                the last block is.
            groups: the groups themselves, where L is not divisible by K or other layers are wanted.
            base: the layer that is concatenated, by default the penultimate one.
            order: ``"fused_first"`` as the paper writes it, ``"base_first"`` as the released code does
                (``llava/model/llava_arch.py``). Projector weights trained with one order do not fit the other.

        Raises:
            ValueError: L is not divisible by K and ``groups`` is not given, or ``order`` is unknown.
        """
        return cls(num_layers, _ordered(Weighted(_groups(num_layers, num_groups, groups)), Layer(base), order))

    @classmethod
    def igva_average(
        cls,
        num_layers: int,
        num_groups: int = 4,
        *,
        groups: Sequence[Sequence[int]] | None = None,
        base: int = -2,
        order: SlotOrder = "fused_first",
    ) -> Self:
        """IGVA, stage 1: the plain mean of the group means beside one layer (``aggregate_by_average`` of the released code).

        For groups of equal size that is the mean of all their layers. Groups of unequal size would weigh a layer by the size of
        its group: run :meth:`igva` with the weights 1/K for that. Arguments as for :meth:`igva`.

        Raises:
            ValueError: the groups differ in size or share a layer.
        """
        resolved = [resolve_group(g, num_layers, f"group {k}") for k, g in enumerate(_groups(num_layers, num_groups, groups))]
        layers = [layer for group in resolved for layer in group]
        if len({len(group) for group in resolved}) > 1 or len(set(layers)) < len(layers):
            raise ValueError(
                f"groups must be disjoint and of equal size for a plain mean, got {resolved}; "
                "use FusionPlan.igva(...) with weights of 1/K instead"
            )
        return cls(num_layers, _ordered(Mean(tuple(layers)), Layer(base), order))

    # ---- layers beside each other -----------------------------------------------------------------------------------

    @classmethod
    def llava(cls, num_layers: int, *, layer: int = -2) -> Self:
        """LLaVA-1.5: one layer, by default the penultimate one, h_23 of CLIP-L (arXiv 2310.03744)."""
        return cls(num_layers, (Layer(layer),))

    @classmethod
    def layers(cls, num_layers: int, layers: int | Iterable[int]) -> Self:
        """Hugging Face's ``vision_feature_layer``: ``[h_i for i in layers]``, one after the other on the channels.

        ``LlavaModel.get_image_features`` (transformers, ``models/llava/modeling_llava.py``). The order is kept and a layer may
        appear twice.

        Args:
            layers: ``config.vision_feature_layer`` as it is, an int or a list.
        """
        return cls(num_layers, tuple(Layer(layer) for layer in ((layers,) if isinstance(layers, int) else layers)))

    @classmethod
    def vip_llava(cls, num_layers: int) -> Self:
        """VipLlava: ``[h_-2, h_-5, h_-8, h_-11, h_6]`` (arXiv 2312.00784; transformers, ``models/vipllava``).

        CLIP-L: 23, 20, 17, 14, 6. A LayerNorm with parameters over all 5*D channels follows:
        :class:`igva_kernels.modules.VipLlavaFusion`.
        """
        return cls.layers(num_layers, (-2, -5, -8, -11, 6))

    @classmethod
    def granite_vision(cls, num_layers: int) -> Self:
        """Granite Vision 3.x: ``[h_-24, h_-20, h_-12, h_-1]`` (arXiv 2502.09927; ``vision_feature_layer`` of its config.json).

        SigLIP-so400m (L = 27): 4, 8, 16, 27. The tower has no CLS token: ``num_prefix_tokens=0``.
        """
        return cls.layers(num_layers, (-24, -20, -12, -1))

    @classmethod
    def molmo(cls, num_layers: int, *, vit_layers: Sequence[int] = (-2, -9)) -> Self:
        """Molmo: ``[h_22, h_15]`` of CLIP-L, before its attention pooling (arXiv 2409.17146).

        allenai/molmo, ``olmo/model.py``, ``encode_image``; ``launch_scripts/train_captioner.py``. Molmo counts the outputs of
        the blocks, without the embedding output: its index i >= 0 is h_{i+1}, a negative one is Hugging Face's.

        Args:
            num_layers: blocks of the tower that Molmo builds. Its CLIP-L lacks the last block: 23, which gives h_22 and h_15
                (of a tower with all 24 blocks, pass the first 24 hidden states).
            vit_layers: ``(-2, -9)`` for CLIP; ``(-3, -9)`` for SigLIP (27 blocks: h_25, h_19), DINOv2 and MetaCLIP;
                ``(24, 18)`` for Molmo2 (25 blocks are loaded: h_25, h_19).
        """
        return cls.layers(num_layers, tuple(index + 1 if index >= 0 else index for index in vit_layers))

    @classmethod
    def mllama(cls, num_layers: int = 32, *, intermediate_layers: Sequence[int] = (3, 7, 15, 23, 30)) -> Self:
        """Mllama (Llama 3.2 Vision): the final state, then five layers of the local encoder (arXiv 2407.21783).

        transformers, ``models/mllama/modeling_mllama.py``, ``MllamaVisionModel.forward``. ``intermediate_layers_indices``
        counts the outputs of the blocks from 0: 3, 7, 15, 23, 30 are h_4, h_8, h_16, h_24, h_31.

        The final state comes from another encoder (the gated global one, after ``layernorm_post``), so it is none of the local
        hidden states. The plan takes it as one entry more, L + 2 in all: with the L outputs that ``MllamaVisionEncoder`` gives,
        ``fuse((None, *outputs, final_state), plan, num_prefix_tokens=0)``. Mllama keeps all tokens, hence no prefix.

        Published, the channels of the five layers are interleaved (``torch.stack(..., dim=-1)``); here they stand in blocks,
        which costs no strided stores. :func:`igva_kernels.modules.columns_to_blocks` permutes the columns of the next Linear to
        fit.

        Args:
            num_layers: L, blocks of the local encoder.
            intermediate_layers: ``config.intermediate_layers_indices``, from 0.

        Raises:
            ValueError: an index that is no block of the local encoder.
        """
        for index in intermediate_layers:
            if not 0 <= index < num_layers:
                raise ValueError(
                    f"intermediate_layers: block {index} does not exist: Mllama counts the {num_layers} blocks of the local "
                    f"encoder from 0 to {num_layers - 1}"
                )
        return cls.layers(num_layers + 1, (num_layers + 1, *(index + 1 for index in intermediate_layers)))

    @classmethod
    def dense_connector_sci(
        cls, num_layers: int, *, layers: Sequence[int] = (7, 15), base: int = -2, order: BaseOrder = "base_first"
    ) -> Self:
        """DenseConnector, sparse channel integration: ``[h_base, h_7, h_15]``.

        arXiv 2405.13800; HJYao00/DenseConnector, ``dc/model/multimodal_projector/dense_connector.py``. CLIP-L: 23, 7, 15. The
        paper counts the embedding output as layer 1 and so calls them 24, 8, 16.

        Args:
            layers: beside the base. The paper also reports (15,) and (7, 15, 19).
            base: -2 for CLIP. For SigLIP the code deletes the last block and takes the last hidden state: ``num_layers=26,
                base=-1``.
            order: ``"base_first"`` as the code does it, ``"base_last"`` as equations (1) to (4) of the paper write it.

        Raises:
            ValueError: ``order`` is unknown, or a layer does not exist.
        """
        return cls(num_layers, _with_base(tuple(Layer(layer) for layer in layers), base, order))

    @classmethod
    def dense_connector_dci(
        cls,
        num_layers: int,
        *,
        num_groups: int = 2,
        groups: Sequence[Sequence[int]] | None = None,
        base: int = -2,
        order: BaseOrder = "base_first",
    ) -> Self:
        """DenseConnector, dense channel integration: ``[h_base, mean(h_0 .. h_{L/2-1}), mean(h_{L/2} .. h_{L-1})]``.

        Source and ``order`` as for :meth:`dense_connector_sci`. The embedding output is in the first group, the last hidden
        state in none. CLIP-L: 23, the mean of 0..11, the mean of 12..23. SigLIP-so400m without its last block (``num_layers=26,
        base=-1``): 26, the mean of 0..12, the mean of 13..25.

        Args:
            num_groups: the hidden states ``0 .. L-1`` are cut into that many runs of equal length; the paper also reports 3.
            groups: the groups themselves, where L is not divisible.
            base: as for :meth:`dense_connector_sci`.

        Raises:
            ValueError: ``num_groups`` does not divide L and ``groups`` is not given; ``order`` is unknown.
        """
        if groups is None:
            groups = tuple(tuple(layer - 1 for layer in group) for group in equal_groups(num_layers, num_groups))
        return cls(num_layers, _with_base(tuple(Mean(tuple(group)) for group in groups), base, order))

    @classmethod
    def layer_select_fuse(cls, num_layers: int, strategy: LayerSelectFuseStrategy) -> Self:
        """Layer_Select_Fuse, external direct fusion (E_D), base last.

        arXiv 2503.06063; EIT-NLP/Layer_Select_Fuse_for_MLLM, ``llava/model/multimodal_encoder/{clip,siglip}_encoder.py`` and
        ``llava/model/llava_arch.py``. The published layers, which are not derived from the depth:

        =============  =====================================  =================================
        strategy       CLIP-L (L = 24)                        SigLIP-so400m (L = 27)
        =============  =====================================  =================================
        ``"18"``       18, 23                                 not published
        ``"3-18"``     3, 18, 23                              not published
        ``"3-18-23"``  3, 18, 23                              3, 20, 25
        ``"former"``   mean of 1..12, 23                      not published
        ``"latter"``   mean of 13..24, 23                     mean of 15..26, 25
        ``"all"``      mean of 1..12, mean of 13..24, 23      not published
        =============  =====================================  =================================

        The released code selects 3, 18, 23, 23 for ``"3-18-23"`` but concatenates the first three, which for CLIP is
        ``"3-18"``. For SigLIP it drops the first patch (``[:, 1:]`` of a tower without CLS); ``num_prefix_tokens=0`` keeps it.

        Raises:
            ValueError: an unknown strategy, or one that is not published for this depth.
        """
        if strategy not in get_args(LayerSelectFuseStrategy):
            raise ValueError(
                f"strategy must be one of {', '.join(map(repr, get_args(LayerSelectFuseStrategy)))}, got {strategy!r}"
            )
        channels = _LAYER_SELECT_FUSE.get(num_layers, {}).get(strategy)
        if channels is None:
            published = [depth for depth, strategies in _LAYER_SELECT_FUSE.items() if strategy in strategies]
            raise ValueError(
                f"strategy {strategy!r} is not published for {num_layers} layers, only for {published}; "
                "write FusionPlan(num_layers, (Layer(...) or Mean(...), ..., Layer(base))) for another tower"
            )
        return cls(num_layers, tuple(Layer(entry) if isinstance(entry, int) else Mean(entry) for entry in channels))

    # ---- weights for every layer ------------------------------------------------------------------------------------

    @classmethod
    def scalar_mix(cls, num_layers: int, *, layers: Sequence[int] | None = None, norm: Norm | None = None) -> Self:
        """ELMo's scalar mix, SUPERB's featurizer: ``sum_l w_l * h_l``, or of the normalised states.

        arXiv 1802.05365 (allenai/allennlp, ``allennlp/modules/scalar_mix.py``: ``w = gamma * softmax(s)``) and 2105.01051
        (s3prl/s3prl, ``s3prl/upstream/interfaces.py``: ``w = softmax(weights)``). One weight a layer, shared, per image or per
        token; :class:`igva_kernels.modules.ScalarMix` learns shared ones.

        Args:
            layers: in the order of the weights' columns; None for all, the embedding output included, as both do.
            norm: ``Norm("layer")`` is s3prl's ``normalize=True`` (``F.layer_norm`` over D, eps 1e-5). AllenNLP's
                ``do_layer_norm`` takes mean and variance over the whole masked tensor instead, and is no plan.
        """
        return cls(num_layers, (Weighted(_singles(range(num_layers + 1) if layers is None else layers), norm=norm),))

    @classmethod
    def tgif(cls, num_layers: int, *, base: int = -2) -> Self:
        """TGIF: ``h_base + sum_{l=1..L} w_l * h_l`` with weights per image (arXiv 2601.03100).

        Linchenchen/TGIF, ``llava/model/multimodal_projector/layer_selection.py``. CLIP-L: the base is h_23, column k of the 24
        weights is h_{k+1}. A LayerNorm with parameters follows: :class:`igva_kernels.modules.TGIFFusion`.
        """
        return cls(num_layers, (Weighted(_singles(range(1, num_layers + 1)), plus=base),))

    @classmethod
    def mixture_of_layers(cls, num_layers: int, *, layers: Sequence[int] | None = None) -> Self:
        """MoL: ``sum_l w[n, l] * h_l[n]``, a few layers for each token (arXiv 2610.09440).

        Pass the weights as :class:`igva_kernels.SparseWeights`: top-k values per token, the reserve layer as one more entry
        (entries of one layer add up). :class:`igva_kernels.modules.MixtureOfLayersRouter` computes them.

        Args:
            layers: the candidates, in the order of the weights' columns; None for the blocks ``1 .. L``.
        """
        return cls(num_layers, (Weighted(_singles(range(1, num_layers + 1) if layers is None else layers)),))

    # ---- a mean of normalised layers --------------------------------------------------------------------------------

    @classmethod
    def mean_of_normalised_layers(
        cls, num_layers: int, *, layers: Sequence[int] | None = None, norm: Norm | None = None
    ) -> Self:
        """RAEv2's multi-layer sum: ``mean_l norm(h_l)``, the norm without parameters, per token.

        arXiv 2605.18324; nanovisionx/RAEv2, ``src/encoders/vision_encoder.py``, ``DINOv3MultiLayerSimpleAddEncoder``: the
        blocks 11, 13, ..., 23, counted from 0, of DINOv3-L ("k7"), which are h_12, h_14, ..., h_24; all but the first for
        "k23", which are h_2 .. h_24. States are those before the tower's final norm. The code adds the mean patch of the last
        normalised layer: :class:`igva_kernels.modules.MultiLayerSum`.

        Args:
            layers: None for the blocks ``1 .. L``.
            norm: None for ``Norm("layer", eps=1e-5)`` as the code has it; ``Norm("rms", eps=...)`` for an RMSNorm. A norm whose
                scale and shift are shared by all layers (SigLIP2's post_layernorm, eps 1e-6) is this one with the scale and
                shift applied once to the mean.
        """
        chosen = tuple(range(1, num_layers + 1) if layers is None else layers)
        return cls(num_layers, (Mean(chosen, Norm("layer") if norm is None else norm),))


def equal_groups(num_layers: int, num_groups: int) -> tuple[tuple[int, ...], ...]:
    """Blocks ``1 .. L`` in K runs of L/K consecutive layers.

    Raises:
        ValueError: K is not in ``1 .. L`` or does not divide L; the text names the divisors.
    """
    if not 1 <= num_groups <= num_layers or num_layers % num_groups:
        divisors = [k for k in range(1, num_layers + 1) if num_layers % k == 0]
        raise ValueError(
            f"num_groups={num_groups} does not cut {num_layers} layers into equal runs; "
            f"use one of {divisors}, or name the layers with groups=[[...], ...]"
        )
    size = num_layers // num_groups
    return tuple(tuple(range(1 + k * size, 1 + (k + 1) * size)) for k in range(num_groups))


def _groups(num_layers: int, num_groups: int, groups: Sequence[Sequence[int]] | None) -> tuple[tuple[int, ...], ...]:
    return equal_groups(num_layers, num_groups) if groups is None else tuple(tuple(group) for group in groups)


def _singles(layers: Iterable[int]) -> tuple[tuple[int, ...], ...]:
    return tuple((layer,) for layer in layers)


def _ordered(fused: Slot, base: Layer, order: SlotOrder) -> tuple[Slot, ...]:
    if order == "fused_first":
        return (fused, base)
    if order == "base_first":
        return (base, fused)
    raise ValueError(f"order must be 'fused_first' (the paper) or 'base_first' (the released code), got {order!r}")


def _with_base(slots: tuple[Slot, ...], base: int, order: BaseOrder) -> tuple[Slot, ...]:
    if order == "base_first":
        return (Layer(base), *slots)
    if order == "base_last":
        return (*slots, Layer(base))
    raise ValueError(f"order must be 'base_first' (the released code) or 'base_last' (the paper), got {order!r}")
