"""What learns in which stage, said aloud.

Stage 1 trains the projector under the plain average of the layers; stage 2 trains projector, allocator and language
model. What other fusions than IGVA learn (MMFuser's block, TGIF's router) learns with the projector, in both stages, as in
their released scripts. The vision tower never learns (LLaVA-1.5 and the released IGVA scripts freeze it in both stages).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from torch import nn

from model.training.recipe import LanguageModelTraining

if TYPE_CHECKING:
    from rich.table import Table

    from model.modeling import IgvaLlavaForConditionalGeneration


@dataclass(frozen=True)
class FreezeRow:
    """Parameters of one part of the model."""

    module: str
    trainable: int
    frozen: int


@dataclass(frozen=True)
class FreezeReport:
    """How many parameters learn, by part; shared tensors count once, where they come first."""

    stage: int
    rows: tuple[FreezeRow, ...]

    @property
    def trainable(self) -> int:
        """Parameters that learn."""
        return sum(row.trainable for row in self.rows)

    @property
    def frozen(self) -> int:
        """Parameters that do not."""
        return sum(row.frozen for row in self.rows)

    def __getitem__(self, module: str) -> FreezeRow:
        for row in self.rows:
            if row.module == module:
                return row
        raise KeyError(f"no part {module!r} in the report; there are {', '.join(row.module for row in self.rows)}")

    def to_dict(self) -> dict[str, dict[str, int]]:
        """Counts by part, for the log."""
        return {row.module: {"trainable": row.trainable, "frozen": row.frozen} for row in self.rows}

    def table(self) -> Table:
        """The report for a terminal."""
        from rich.table import Table

        table = Table(title=f"Stage {self.stage}: what learns")
        table.add_column("part")
        table.add_column("trainable", justify="right")
        table.add_column("frozen", justify="right")
        for row in (*self.rows, FreezeRow("total", self.trainable, self.frozen)):
            if row.module == "total":
                table.add_section()
            table.add_row(row.module, f"{row.trainable:,}", f"{row.frozen:,}")
        return table


def apply_stage(
    model: IgvaLlavaForConditionalGeneration,
    stage: int,
    language_model_training: LanguageModelTraining = "frozen",
    *,
    instructions: bool = True,
) -> FreezeReport:
    """Set the fusion of a stage and which parameters learn.

    Args:
        model: the model, changed in place; for ``lora`` its adapters must already be there
            (:func:`model.training.lora.add_lora`).
        stage: 1 or 2.
        language_model_training: ``frozen``, ``lora`` (the adapters learn) or ``full``.
        instructions: whether there is a sentence encoder. Without one the weights are uniform and nothing runs the allocator,
            so it is frozen: a parameter that learns and takes no part would stop DistributedDataParallel.

    Raises:
        ValueError: a stage or a way of training that does not exist, a language model that should learn in stage 1, or
            ``lora`` on a model without adapters.
    """
    if stage not in (1, 2):
        raise ValueError(f"stage must be 1 or 2, got {stage!r}")
    if language_model_training not in get_args(LanguageModelTraining):
        raise ValueError(
            f"language_model_training must be one of {', '.join(get_args(LanguageModelTraining))}, "
            f"got {language_model_training!r}"
        )
    if stage == 1 and language_model_training != "frozen":
        raise ValueError(f"stage 1 trains the projector only, got language_model_training={language_model_training!r}")

    if model.fusion_stage is not None:
        model.set_fusion_stage(stage)
    model.requires_grad_(False)
    parts = dict(_parts(model))
    parts["projector"].requires_grad_(True)
    if "fusion" in parts:
        parts["fusion"].requires_grad_(True)
    if stage == 2:
        if "allocator" in parts and instructions:
            parts["allocator"].requires_grad_(True)
        if language_model_training == "full":
            parts["language_model"].requires_grad_(True)
            parts["lm_head"].requires_grad_(True)
        if language_model_training == "lora":
            _train_adapters(parts["language_model"])
    return report(model, stage)


def report(model: IgvaLlavaForConditionalGeneration, stage: int) -> FreezeReport:
    """Count what learns in a model as it stands."""
    seen: set[int] = set()
    rows = []
    for name, part in _parts(model):
        trainable = frozen = 0
        for parameter in part.parameters():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if parameter.requires_grad:
                trainable += parameter.numel()
            else:
                frozen += parameter.numel()
        rows.append(FreezeRow(name, trainable, frozen))
    return FreezeReport(stage, tuple(rows))


def _parts(model: IgvaLlavaForConditionalGeneration) -> Iterator[tuple[str, nn.Module]]:
    inner = model.model
    yield "vision_tower", inner.vision_tower
    allocator = getattr(inner.fusion, "allocator", None)
    if allocator is not None:
        yield "allocator", allocator
    elif inner.fusion is not None:
        yield "fusion", inner.fusion
    yield "projector", inner.multi_modal_projector
    yield "language_model", inner.language_model
    yield "lm_head", model.lm_head


def _train_adapters(language_model: nn.Module) -> None:
    adapters = [parameter for name, parameter in language_model.named_parameters() if ".lora_" in name]
    if not adapters:
        raise ValueError("language_model_training is 'lora', but the language model has no adapters; call add_lora first")
    for parameter in adapters:
        parameter.requires_grad_(True)
