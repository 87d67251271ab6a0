"""Reading LLaVA JSON: records are checked one by one, and every problem names the sample.

A file is a list of

    {"id": "000000033471",
     "image": "coco/train2017/000000033471.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is on the table?"}, {"from": "gpt", "value": "A cup."}],
     "level": "identity"}

or, with the ending ``.jsonl``, holds one such record a line. ``image`` is a path, a list of paths, or absent for text only;
``level``, the kind of question, is optional and read by the evaluation only; other fields (``model`` in LLaVA's mix) are passed
over (format: haotian-liu/LLaVA, docs/Finetune_Custom_Data.md; lists of images: LLaVA-NeXT).

The published files are read as LLaVA reads them: a turn with one ``<image>`` has it moved to its front
(``preprocess_multimodal`` of llava/train/train.py), and an answer at the very beginning, to which there is no question, is
dropped (``preprocess_v1``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model.data.problems import MissingImageError, Problems, SampleError, summed_up

IMAGE_PLACEHOLDER = "<image>"
_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says; the text of a user may hold ``<image>`` placeholders."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One checked record: ``<image>`` occurs in the user's turns exactly once for each of ``images``.

    ``file`` and ``record`` say where it stood: its position in a list from 0, or its line in a JSONL file from 1.
    """

    id: str
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]
    kind: str | None = None
    file: str = ""
    record: int = 0

    @property
    def human_turns(self) -> list[str]:
        """Texts of the user's turns, placeholders included."""
        return [turn.text for turn in self.turns if turn.role == "user"]


def read_llava_json(path: str | Path, image_folder: str | Path | None = None, problems: Problems | None = None) -> list[Sample]:
    """Read and check all records of a LLaVA JSON or JSONL file.

    Args:
        path: the file.
        image_folder: what the image paths are relative to; None: the folder of the file.
        problems: what to do about records that cannot be used; None raises.

    Raises:
        FileNotFoundError: the file is missing, or an image of a sample; the message names the sample.
        ValueError: the file is no JSON list, no record of it can be used, or some are broken in a way that is not to be
            skipped; the message names the sample, or counts many by kind and names the first of each.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no data file at {path}")
    records = _lines(path) if path.suffix == ".jsonl" else enumerate(_list(path))
    folder = path.parent if image_folder is None else image_folder
    problems = problems or Problems()
    samples, num_records = _checked(records, folder, problems, path.name)
    if not num_records:
        raise ValueError(f"{path} holds no records")
    if not samples:
        raise ValueError(f"{path} holds no record that can be used: all {num_records:,} were skipped as data.on_error says")
    return samples


def samples_from_records(
    records: Sequence[Mapping[str, Any]], image_folder: str | Path, problems: Problems | None = None
) -> list[Sample]:
    """Check records that are already in memory; see :func:`read_llava_json`."""
    return _checked(enumerate(records), image_folder, problems or Problems(), "")[0]


def _list(path: Path) -> list[Any]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(records, list):
        raise ValueError(f"{path} must hold a JSON list of records, got {type(records).__name__}")
    return records


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number, from 1, and record or error of every line that is not blank."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, SampleError("broken_line", f"line {number} of {path} is not valid JSON: {error}")


def _checked(
    records: Iterable[tuple[int, Any]], image_folder: str | Path, problems: Problems, file: str
) -> tuple[list[Sample], int]:
    """The samples, and the number of records; what is to be raised is raised for all records together."""
    folder = os.path.abspath(image_folder)
    samples: list[Sample] = []
    fatal: list[SampleError] = []
    num_records = 0
    for position, record in records:
        num_records += 1
        try:
            if isinstance(record, SampleError):
                raise record
            samples.append(_sample(record, position, folder, file))
        except SampleError as error:
            if problems.skips(error.kind):
                problems.meet(error, file=file, record=position)
            else:
                fatal.append(error)
    if fatal:
        raise summed_up(fatal)
    return samples, num_records


def _sample(record: Any, position: int, folder: str, file: str) -> Sample:
    if not isinstance(record, Mapping):
        raise SampleError("broken_record", f"record {position} must be a JSON object, got {type(record).__name__}")
    sample_id = str(record.get("id", f"#{position}"))
    turns = _turns(record.get("conversations"), sample_id)
    images = _images(record.get("image"), sample_id, folder)
    in_text = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")
    if in_text != len(images):
        raise SampleError(
            "placeholders",
            f"sample {sample_id}: {in_text} {IMAGE_PLACEHOLDER} in the human turns, but {len(images)} images; "
            "each image needs exactly one placeholder",
        )
    level = record.get("level")
    return Sample(sample_id, images, turns, None if level is None else str(level), file, position)


def _turns(conversations: Any, sample_id: str) -> tuple[Turn, ...]:
    if not isinstance(conversations, list) or not conversations:
        raise _broken(f"sample {sample_id}: conversations must be a list with at least one turn")
    turns = [_turn(entry, position, sample_id) for position, entry in enumerate(conversations)]
    # Splitting long dialogues left some published samples (the ShareGPT part of mix665k) that begin with an answer;
    # LLaVA drops that turn, as there is no question to it.
    if turns[0].role == "assistant":
        turns = turns[1:]
    for position, turn in enumerate(turns):
        expected = "user" if position % 2 == 0 else "assistant"
        if turn.role != expected:
            raise _broken(f"sample {sample_id}: turns must alternate between human and gpt, but turn {position} does not")
    if len(turns) < 2:
        raise _broken(f"sample {sample_id}: no human turn with an answer after it")
    return tuple(turns)


def _turn(entry: Any, position: int, sample_id: str) -> Turn:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("value"), str):
        raise _broken(f'sample {sample_id}: turn {position} must be an object with "from" and a text in "value"')
    role = _ROLES.get(str(entry.get("from")))
    if role is None:
        raise _broken(f"sample {sample_id}: turn {position} is from {entry.get('from')!r}, expected 'human' or 'gpt'")
    if role == "assistant" and IMAGE_PLACEHOLDER in entry["value"]:
        raise SampleError("placeholders", f"sample {sample_id}: {IMAGE_PLACEHOLDER} in turn {position}, which is an answer")
    text = entry["value"]
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _broken(f"sample {sample_id}: the text of turn {position} is no Unicode text: {error}") from error
    return Turn(role, _image_first(text))  # type: ignore[arg-type]


def _image_first(text: str) -> str:
    """The text with its placeholder at the front; texts with several are left as they are, as in LLaVA-NeXT."""
    if text.count(IMAGE_PLACEHOLDER) != 1:
        return text
    return f"{IMAGE_PLACEHOLDER}\n{text.replace(IMAGE_PLACEHOLDER, '').strip()}".strip()


def _images(value: Any, sample_id: str, folder: str) -> tuple[Path, ...]:
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _broken(f"sample {sample_id}: image must be a path or a list of paths, got {value!r}")
    return tuple(_image(name, sample_id, folder) for name in names)


def _image(name: str, sample_id: str, folder: str) -> Path:
    # A data file comes from someone else: it may name pictures, not any file of this machine. The check is on the
    # path as written: links that the user has put into the image folder are his own, and stay usable.
    # Texts, not paths: for 665,000 records pathlib would take a minute.
    path = os.path.normpath(os.path.join(folder, name))
    if not path.startswith(os.path.join(folder, "")) and path != folder:
        raise SampleError("outside_path", f"sample {sample_id}: image {name!r} lies outside the image folder {folder}")
    if not os.path.isfile(path):
        raise MissingImageError("missing_image", f"sample {sample_id}: no image at {path}; check data.image_folder")
    return Path(path)


def _broken(message: str) -> SampleError:
    return SampleError("broken_record", message)
