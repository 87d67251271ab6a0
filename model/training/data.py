"""From a recipe's ``data`` to the datasets of a run: records, instruction embeddings, and what to do about problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from model.data.batches import StepBatchSampler
from model.data.dataset import LlavaDataset
from model.data.llava_json import Sample, read_llava_json
from model.data.problems import Problems
from model.instruction import Encoder
from model.instruction_store import InstructionStore, fill
from model.processing import IgvaLlavaProcessor
from model.training.recipe import DataSource, TrainRecipe


def load_data(
    recipe: TrainRecipe,
    processor: IgvaLlavaProcessor,
    embeddings: Path,
    *,
    reads_instruction: bool | None = None,
    problems: Problems | None = None,
    fills: bool = True,
) -> tuple[LlavaDataset, LlavaDataset | None]:
    """The data to train on and those held out; every instruction is embedded before the first step.

    Args:
        recipe: names the data and says how they are prepared; the processor keeps that, and is saved with it.
        processor: tokenizes and normalises, and has the sentence encoder.
        embeddings: file of instruction embeddings where the recipe names none.
        reads_instruction: whether the model's fusion reads them; None: in stage 2, as IGVA's.
        problems: what to do about samples that cannot be used, and where they are listed; None: as the recipe says, nowhere.
        fills: whether this process embeds what the file lacks; of several processes one does, and before the others.

    Raises:
        ValueError, FileNotFoundError: data that cannot be used, see :func:`model.data.llava_json.read_llava_json`, or a file of
            embeddings of another encoder or policy.
    """
    source = recipe.data
    problems = problems or Problems(source.on_error)
    samples = read_llava_json(source.path, source.image_folder, problems)
    held_out_path = recipe.held_out_path
    held_out = read_llava_json(held_out_path, source.image_folder, problems) if held_out_path else None
    keep_settings(processor, source)
    embed = _embedding(recipe, processor, samples + (held_out or []), embeddings, reads_instruction, fills)

    def dataset(samples: list[Sample]) -> LlavaDataset:
        return _dataset(samples, processor, source, embed, problems)

    return dataset(samples), dataset(held_out) if held_out else None


def load_questions(
    recipe: TrainRecipe,
    processor: IgvaLlavaProcessor,
    embeddings: Path,
    held_out: LlavaDataset | None,
    *,
    reads_instruction: bool | None = None,
    problems: Problems | None = None,
    fills: bool = True,
) -> LlavaDataset | None:
    """The held-out questions of ``evaluation``; None where the recipe asks for none.

    Args:
        held_out: the data of the held-out loss, which may be the same.
        recipe, processor, embeddings, reads_instruction, problems, fills: as for :func:`load_data`, which comes first.

    Raises:
        ValueError, FileNotFoundError: as :func:`load_data`.
    """
    if recipe.questions_path is None or recipe.questions_path == recipe.held_out_path:
        return held_out if recipe.questions_path else None
    problems = problems or Problems(recipe.data.on_error)
    samples = read_llava_json(recipe.questions_path, recipe.data.image_folder, problems)
    embed = _embedding(recipe, processor, samples, embeddings, reads_instruction, fills)
    return _dataset(samples, processor, recipe.data, embed, problems)


def _embedding(
    recipe: TrainRecipe,
    processor: IgvaLlavaProcessor,
    samples: list[Sample],
    embeddings: Path,
    reads_instruction: bool | None,
    fills: bool,
) -> Callable[[Sequence[Sequence[str]]], Tensor] | None:
    """From the human turns of conversations to their vectors, all in a file; None where nobody reads them."""
    source = recipe.data
    if reads_instruction is None:
        reads_instruction = recipe.stage == 2
    # IGVA's stage 1 averages the layers whatever the instruction is.
    if not reads_instruction or processor.sentence_encoder is None:
        return None
    file = Path(source.instruction_cache or embeddings)
    if fills:
        fill_instructions(file, samples, processor.sentence_encoder, source)
    fingerprint = processor.sentence_encoder.fingerprint
    return InstructionStore(file, fingerprint=fingerprint, policy=source.instruction_policy).embed


def plain_dataset(
    recipe: TrainRecipe, processor: IgvaLlavaProcessor, samples: list[Sample] | None = None
) -> tuple[LlavaDataset, Problems]:
    """The data to train on without instruction embeddings, for looking at, and the records that cannot be used.

    Records that cannot be used are left out and listed, whatever the recipe says; a damaged image raises when it is read.

    Args:
        recipe: names the data and says how they are prepared.
        processor: tokenizes and normalises.
        samples: those of the recipe's data, where they are read already.
    """
    problems = Problems("skip")
    if samples is None:
        samples = read_llava_json(recipe.data.path, recipe.data.image_folder, problems)
    keep_settings(processor, recipe.data)
    return _dataset(samples, processor, recipe.data, None, Problems()), problems


def _dataset(
    samples: list[Sample],
    processor: IgvaLlavaProcessor,
    source: DataSource,
    embed: Callable[[Sequence[Sequence[str]]], Tensor] | None,
    problems: Problems,
) -> LlavaDataset:
    return LlavaDataset(
        samples,
        processor,
        embed=embed,
        aspect_ratio=source.aspect_ratio,
        anyres_grids=source.anyres_grids,
        chat_template=chat_template(source.chat_template),
        max_length=source.max_length,
        max_image_pixels=source.max_image_pixels,
        problems=problems,
    )


def step_batches(
    recipe: TrainRecipe, samples: Sequence[Sample], lengths: Sequence[int], *, rank: int, num_ranks: int
) -> StepBatchSampler:
    """Which samples share a step and a forward pass, for one of ``num_ranks`` processes; ``lengths`` in tokens, in about."""
    return StepBatchSampler(
        lengths,
        [bool(sample.images) for sample in samples],
        batch_size=recipe.accumulation_steps(num_ranks) * recipe.micro_batch_size * num_ranks,
        micro_batch_size=recipe.micro_batch_size,
        packing=recipe.data.packing,
        grouping=recipe.data.grouping,
        seed=recipe.seed,
        rank=rank,
        num_ranks=num_ranks,
    )


def keep_settings(processor: IgvaLlavaProcessor, source: DataSource) -> None:
    """Note in the processor how the data are prepared, so that whoever loads the checkpoint does the same."""
    processor.aspect_ratio = source.aspect_ratio
    processor.anyres_grids = [list(grid) for grid in source.anyres_grids]
    processor.instruction_policy = source.instruction_policy


def fill_instructions(file: Path, samples: Sequence[Sample], encoder: Encoder, source: DataSource) -> None:
    """Embed what a file lacks of the instructions of samples with images; the others have none to read."""
    if file.is_dir():
        raise ValueError(f"data.instruction_cache must be a file that `igva embed` made, but {file} is a folder")
    fill(file, (sample.human_turns for sample in samples if sample.images), encoder, source.instruction_policy)


def chat_template(name_or_file: str | None) -> str | None:
    """The text of a template file, or the name as it is."""
    if name_or_file is not None and Path(name_or_file).is_file():
        return Path(name_or_file).read_text(encoding="utf-8")
    return name_or_file
