"""``igva explain``: which layer groups each instruction uses, as a table, a heat map and JSON."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from model.explain_report import Row, group_name, require_matplotlib, row_of, write

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from model.cli.checkpoint import Checkpoint
    from model.explain import GroupSaliency

_EXAMPLES = """examples:
  igva explain runs/mine picture.jpg "What colour is the car?" "How many people are there?"
  igva explain runs/mine picture.jpg "What colour is the car?" --saliency
  igva explain runs/mine pictures/ "What colour is it?" "What is written there?"     the mean and spread over a folder
  igva explain runs/mine test.json --limit=500                                     mean weights per kind of question

Every run writes OUTPUT.json and OUTPUT.png, the heat map of questions and layer groups.
"""

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
DATA = (".json", ".jsonl")


def main(argv: Sequence[str]) -> int:
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)  # options may stand between positionals
    source = Path(arguments.source)
    is_data = source.suffix.lower() in DATA
    if is_data and (arguments.questions or arguments.saliency):
        parser.error("a data file has its own questions: give neither questions nor --saliency with one")
    if not is_data and not arguments.questions:
        parser.error("no question given; ask at least one about the picture")
    if arguments.limit is not None and arguments.limit < 1:
        parser.error(f"--limit must be at least 1, got {arguments.limit}")

    require_matplotlib()

    # After the arguments are known to be right: these imports take seconds.
    from rich.console import Console

    from model.cli.checkpoint import load_checkpoint
    from model.explain import check_weighs, collapse

    paths = [] if is_data else picture_files(source)[: arguments.limit]
    checkpoint = load_checkpoint(arguments.checkpoint)
    check_weighs(checkpoint.model, checkpoint.processor)
    saliency: list[GroupSaliency] = []
    if is_data:
        rows, samples = rows_of_data(checkpoint, source, arguments.image_folder, arguments.limit)
    else:
        rows, samples = rows_of_questions(checkpoint, paths, arguments.questions)
        saliency = saliency_of(checkpoint, paths[0], arguments.questions) if arguments.saliency else []
    groups = checkpoint.model.config.fusion_plan(stage=2).groups
    warning = collapse(samples)
    console = Console()
    console.print(weights_table(rows, groups))
    if saliency:
        console.print(saliency_table(arguments.questions, saliency, groups))
    if warning:
        console.print(f"warning: {warning}", style="yellow")
    write(Path(arguments.output), rows, groups, warning, saliency)
    console.print(f"figures in {arguments.output}.json, heat map in {arguments.output}.png")
    return 0


def picture_files(source: Path) -> list[Path]:
    """The picture, or all pictures of a folder by name.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: a folder without pictures.
    """
    if not source.is_dir():
        if not source.is_file():
            raise FileNotFoundError(f"no picture, folder or data file at {source}")
        return [source]
    found = sorted(path for path in source.iterdir() if path.suffix.lower() in PICTURES)
    if not found:
        raise ValueError(f"the folder {source} holds no pictures ({', '.join(PICTURES)})")
    return found


def rows_of_questions(checkpoint: Checkpoint, paths: Sequence[Path], questions: Sequence[str]) -> tuple[list[Row], Tensor]:
    """One row a question, and the (Q, K) mean weights."""
    import torch
    from tqdm import tqdm

    from model.data.images import open_image
    from model.explain import group_weights

    parts = [
        group_weights(checkpoint.model, checkpoint.processor, [open_image(path)], questions)
        for path in tqdm(paths, disable=len(paths) == 1, unit="picture")
    ]
    weights = torch.cat(parts)  # (I, Q, K)
    return [row_of(question, weights[:, index]) for index, question in enumerate(questions)], weights.mean(0)


def rows_of_data(checkpoint: Checkpoint, data: Path, image_folder: str | None, limit: int | None) -> tuple[list[Row], Tensor]:
    """One row a kind of question and one for all, and the (samples, K) weights; samples without a picture have none."""
    import torch
    from tqdm import tqdm

    from model.data.images import open_image
    from model.data.llava_json import IMAGE_PLACEHOLDER, read_llava_json
    from model.explain import group_weights

    by_kind: dict[str, list[Tensor]] = {}
    samples = [sample for sample in read_llava_json(data, image_folder) if sample.images][:limit]
    if not samples:
        raise ValueError(f"{data} has no samples with a picture: there are no layers to weigh")
    for sample in tqdm(samples, unit="sample"):
        question = next(turn.text for turn in reversed(sample.turns) if turn.role == "user")
        images = [open_image(path) for path in sample.images]
        weights = group_weights(
            checkpoint.model, checkpoint.processor, images, [question.replace(IMAGE_PLACEHOLDER, "").strip()]
        )
        by_kind.setdefault(sample.kind or "unnamed", []).append(weights.mean(dim=(0, 1)))
    rows = [row_of(kind, torch.stack(weights)) for kind, weights in sorted(by_kind.items())]
    every = torch.stack([weights for of_kind in by_kind.values() for weights in of_kind])
    return ([*rows, row_of("all", every)] if len(rows) > 1 else rows), every


def saliency_of(checkpoint: Checkpoint, path: Path, questions: Sequence[str]) -> list[GroupSaliency]:
    """What each group is worth to the answers about one picture."""
    from model.data.images import open_image
    from model.explain import group_saliency

    image = open_image(path)
    return [group_saliency(checkpoint.model, checkpoint.processor, image, question) for question in questions]


def weights_table(rows: Sequence[Row], groups: Sequence[Sequence[int]]) -> Table:
    """Mean weights, with their spread where there is one."""
    from rich.table import Table

    caption = "entropy: 1 where all groups weigh the same, 0 where one has all of the weight"
    table = Table(title="Weight of the layer groups", caption=caption)
    table.add_column("")
    for group in groups:
        table.add_column(f"layers {group_name(group)}", justify="right")
    table.add_column("entropy", justify="right")
    for row in rows:
        cells = zip(row.mean, row.spread, strict=True)
        shown = (f"{mean:.2f}" + (f" ± {spread:.2f}" if row.count > 1 else "") for mean, spread in cells)
        table.add_row(row.name, *shown, f"{row.entropy:.2f}")
    return table


def saliency_table(questions: Sequence[str], saliency: Sequence[GroupSaliency], groups: Sequence[Sequence[int]]) -> Table:
    """Nats that the answer loses without each group."""
    from rich.table import Table

    table = Table(title="What the answer's log-probability loses when a group is left out, in nats")
    for heading in ("question", "answer"):
        table.add_column(heading)
    for group in groups:
        table.add_column(f"layers {group_name(group)}", justify="right")
    for question, of_question in zip(questions, saliency, strict=True):
        table.add_row(question, of_question.answer, *(f"{round(lost, 2) + 0.0:+.2f}" for lost in of_question.lost))
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="igva explain",
        description="Show which groups of the vision tower's layers each instruction uses.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a finished training run, or a hub name")
    parser.add_argument("source", metavar="PICTURE", help="picture, folder of pictures, or LLaVA JSON file")
    parser.add_argument("questions", metavar="QUESTION", nargs="*", help="what to ask about the picture")
    parser.add_argument("--saliency", action="store_true", help="also what each group is worth to the answer (first picture)")
    parser.add_argument("--image_folder", help="what the paths in a data file are relative to (default: its own folder)")
    parser.add_argument("--limit", type=int, help="only the first pictures or samples")
    parser.add_argument("--output", default="explain", help="stem of the JSON and PNG files (default: %(default)s)")
    return parser
