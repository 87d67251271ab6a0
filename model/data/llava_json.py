"""Reading LLaVA JSON: records are checked one by one, and every error names the sample.

A file is a list of

    {"id": "000000033471",
     "image": "coco/train2017/000000033471.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is on the table?"}, {"from": "gpt", "value": "A cup."}],
     "level": "identity"}

where ``image`` is a path, a list of paths, or absent for text only, and ``level``, the kind of question, is optional and
read by the evaluation only (format: haotian-liu/LLaVA, docs/Finetune_Custom_Data.md; lists of images: LLaVA-NeXT).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

IMAGE_PLACEHOLDER = "<image>"
_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Turn:
    """What one side says; the text of a user may hold ``<image>`` placeholders."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True)
class Sample:
    """One checked record: ``<image>`` occurs in the user's turns exactly once for each of ``images``."""

    id: str
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]
    kind: str | None = None

    @property
    def human_turns(self) -> list[str]:
        """Texts of the user's turns, placeholders included."""
        return [turn.text for turn in self.turns if turn.role == "user"]


def read_llava_json(path: str | Path, image_folder: str | Path | None = None) -> list[Sample]:
    """Read and check all records of a LLaVA JSON file.

    Args:
        path: the file.
        image_folder: what the image paths are relative to; None: the folder of the file.

    Raises:
        FileNotFoundError: the file is missing, or an image of a sample; the message names the sample.
        ValueError: the file is no JSON list, or a record is broken; the message names the sample.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no data file at {path}")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(records, list):
        raise ValueError(f"{path} must hold a JSON list of records, got {type(records).__name__}")
    if not records:
        raise ValueError(f"{path} holds no records")
    return samples_from_records(records, path.parent if image_folder is None else image_folder)


def samples_from_records(records: Sequence[Mapping[str, Any]], image_folder: str | Path) -> list[Sample]:
    """Check records that are already in memory; see :func:`read_llava_json`."""
    folder = Path(os.path.abspath(image_folder))
    return [_sample(record, position, folder) for position, record in enumerate(records)]


def _sample(record: Mapping[str, Any], position: int, folder: Path) -> Sample:
    if not isinstance(record, Mapping):
        raise ValueError(f"record {position} must be a JSON object, got {type(record).__name__}")
    sample_id = str(record.get("id", f"#{position}"))
    turns = _turns(record.get("conversations"), sample_id)
    images = _images(record.get("image"), sample_id, folder)
    in_text = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")
    if in_text != len(images):
        raise ValueError(
            f"sample {sample_id}: {in_text} {IMAGE_PLACEHOLDER} in the human turns, but {len(images)} images; "
            "each image needs exactly one placeholder"
        )
    level = record.get("level")
    return Sample(sample_id, images, turns, None if level is None else str(level))


def _turns(conversations: Any, sample_id: str) -> tuple[Turn, ...]:
    if not isinstance(conversations, list) or not conversations:
        raise ValueError(f"sample {sample_id}: conversations must be a list with at least one turn")
    turns = [_turn(entry, position, sample_id) for position, entry in enumerate(conversations)]
    # Splitting long dialogues left some published samples (the ShareGPT part of mix665k) that begin with an answer;
    # LLaVA drops that turn, as there is no question to it.
    if turns[0].role == "assistant":
        turns = turns[1:]
    for position, turn in enumerate(turns):
        expected = "user" if position % 2 == 0 else "assistant"
        if turn.role != expected:
            raise ValueError(f"sample {sample_id}: turns must alternate between human and gpt, but turn {position} does not")
    if len(turns) < 2:
        raise ValueError(f"sample {sample_id}: no human turn with an answer after it")
    return tuple(turns)


def _turn(entry: Any, position: int, sample_id: str) -> Turn:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("value"), str):
        raise ValueError(f'sample {sample_id}: turn {position} must be an object with "from" and a text in "value"')
    role = _ROLES.get(entry.get("from", ""))
    if role is None:
        raise ValueError(f"sample {sample_id}: turn {position} is from {entry.get('from')!r}, expected 'human' or 'gpt'")
    if role == "assistant" and IMAGE_PLACEHOLDER in entry["value"]:
        raise ValueError(f"sample {sample_id}: {IMAGE_PLACEHOLDER} in turn {position}, which is an answer")
    return Turn(role, entry["value"])  # type: ignore[arg-type]


def _images(value: Any, sample_id: str, folder: Path) -> tuple[Path, ...]:
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"sample {sample_id}: image must be a path or a list of paths, got {value!r}")
    return tuple(_image(name, sample_id, folder) for name in names)


def _image(name: str, sample_id: str, folder: Path) -> Path:
    # A data file comes from someone else: it may name pictures, not any file of this machine. The check is on the
    # path as written: links that the user has put into the image folder are his own, and stay usable.
    path = Path(os.path.normpath(folder / name))
    if not path.is_relative_to(folder):
        raise ValueError(f"sample {sample_id}: image {name!r} lies outside the image folder {folder}")
    if not path.is_file():
        raise FileNotFoundError(f"sample {sample_id}: no image at {path}; check data.image_folder")
    return path
