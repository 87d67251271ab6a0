"""Intermediate checkpoints that are whole or not there, and the check that a run goes on as it began.

A checkpoint is written to ``saving/``, given ``complete.json`` (the size of every file, and what the run is), forced to the
disk and renamed to ``checkpoint-STEP``; only then is the older one moved back into ``saving/`` and deleted there. So whenever
a process is killed, or a disk is full, each folder named ``checkpoint-STEP`` is whole, and once there was one there always is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

MANIFEST = "complete.json"
_SAVING = "saving"
_PREFIX = "checkpoint-"

#: Fields of a recipe that may differ between a run and its continuation: they say what is kept and shown, not what is learned.
#: ``output_dir`` may, as a run's folder may have been moved.
_FREE_FIELDS = frozenset(
    {
        "name",
        "output_dir",
        "log_every",
        "save_every",
        "eval_every",
        "eval_batch_size",
        "evaluation",
        "trackers",
        "resume",
        "overwrite",
    }
)
_FREE_DATA_FIELDS = frozenset({"path", "image_folder", "eval_path", "instruction_cache", "num_workers"})


@dataclass(frozen=True)
class RunIdentity:
    """What must be the same for a run to go on exactly: recipe, processes and samples.

    Args:
        recipe: its fields as plain data, without those that change nothing of what is learned.
        num_processes: ranks of the run: each has random states and batches of its own.
        samples: a digest of the lengths of the samples in their order.
    """

    recipe: dict[str, Any]
    num_processes: int
    samples: str

    @classmethod
    def of(cls, recipe: Mapping[str, Any], num_processes: int, lengths: Sequence[int]) -> RunIdentity:
        """The identity of a run of ``recipe`` (plain data) over samples of these estimated lengths."""
        kept = {key: value for key, value in recipe.items() if key not in _FREE_FIELDS}
        kept["data"] = {key: value for key, value in recipe["data"].items() if key not in _FREE_DATA_FIELDS}
        digest = hashlib.sha256(",".join(map(str, lengths)).encode()).hexdigest()
        # Through JSON, as the one it will be compared with.
        return cls(json.loads(json.dumps(kept)), num_processes, f"{len(lengths)} samples, {digest[:16]}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as written to ``complete.json``."""
        return {"recipe": self.recipe, "num_processes": self.num_processes, "samples": self.samples}

    def check(self, began: Mapping[str, Any], folder: Path) -> None:
        """Refuse to go on with what a run of another kind left.

        Args:
            began: what :meth:`to_dict` gave when the checkpoint was saved.
            folder: the checkpoint, for the message.

        Raises:
            ValueError: they differ; the message names every difference.
        """
        differences = [
            f"{name} was {then!r}, is {now!r}"
            for (name, then), (_, now) in zip(*_aligned(_flat(began["recipe"]), _flat(self.recipe)), strict=True)
            if then != now
        ]
        if began["num_processes"] != self.num_processes:
            differences.insert(0, f"processes were {began['num_processes']}, are {self.num_processes}")
        if began["samples"] != self.samples:
            differences.append(f"the data were {began['samples']}, are {self.samples}")
        if differences:
            raise ValueError(
                f"resume=true, but {folder} is of a run that differs from this one: {'; '.join(differences)}. Go on with the "
                "settings that it began with, or begin anew with overwrite=true, resume=false"
            )


class CheckpointFolder:
    """The intermediate checkpoints of one run.

    Args:
        folder: holds ``checkpoint-STEP`` folders, and ``saving`` while one is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def saving(self) -> Path:
        """Where a checkpoint is written."""
        return self.folder / _SAVING

    def of_step(self, step: int) -> Path:
        """The folder of the checkpoint of a step."""
        return self.folder / f"{_PREFIX}{step}"

    def clear(self) -> None:
        """Remove what an interrupted save left."""
        if self.saving.exists():
            shutil.rmtree(self.saving)

    def newest(self) -> Path | None:
        """The newest checkpoint; None if there is none."""
        found = [path for path in self.folder.glob(f"{_PREFIX}*") if path.is_dir() and step_of(path) >= 0]
        return max(found, key=step_of, default=None)

    def publish(self, step: int, identity: RunIdentity | None) -> None:
        """Make the checkpoint of a step in ``saving`` the newest, and delete the older ones.

        Raises:
            OSError: the disk is full or refuses; the older ones are there still.
        """
        new = self.saving / f"{_PREFIX}{step}"
        older = [path for path in self.folder.glob(f"{_PREFIX}*") if path.is_dir()]
        files = sorted(path for path in new.rglob("*") if path.is_file())
        manifest = {
            "files": {str(path.relative_to(new)): path.stat().st_size for path in files},
            **(identity.to_dict() if identity else {}),
        }
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        sync_tree(new)
        os.replace(new, self.folder / new.name)
        _sync(self.folder)
        for path in older:
            # Out of the names that say "whole" first: deleting a folder takes many steps.
            os.replace(path, self.saving / f"old-{path.name}")
        self.clear()


def check_whole(folder: Path) -> dict[str, Any]:
    """What ``complete.json`` of a checkpoint says, once every file has been found as it says.

    Raises:
        OSError: the folder cannot be read.
        ValueError: it is damaged; the message names the first file.
    """
    help_text = "restore it from a copy, or begin anew with overwrite=true, resume=false"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, size in manifest["files"].items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                now = "is gone" if found is None else f"has {found:,} bytes"
                raise ValueError(f"the checkpoint {folder} is damaged: {name} {now}, and was saved with {size:,}; {help_text}")
            with path.open("rb"):
                pass
    except FileNotFoundError as error:
        raise ValueError(f"the checkpoint {folder} is damaged: it holds no {MANIFEST}; {help_text}") from error
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"the checkpoint {folder} is damaged: its {MANIFEST} cannot be read ({error}); {help_text}") from error
    except OSError as error:
        raise OSError(f"the checkpoint {folder} cannot be read: {error}; check its owner and the disk") from error
    return manifest


@contextmanager
def telling_what_is_safe(what: str, place: Path, safe: Path | None) -> Iterator[None]:
    """Turn a failed write into one error that says what was being saved, how full the disk is and what remains.

    Args:
        what: is being saved.
        place: where.
        safe: the newest whole checkpoint; None if there is none.

    Raises:
        OSError: in place of those of the libraries, which differ (safetensors and torch have their own).
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not isinstance(error, OSError | SafetensorError) and not _is_write_error(error):
            raise
        free = shutil.disk_usage(_existing(place)).free
        remains = f"{safe} is whole; make room and go on with resume=true" if safe else "no checkpoint had been saved before"
        raise OSError(f"could not save {what} to {place} ({error}); {free / 1e9:.2f} GB are free there. {remains}") from error


def check_space(place: Path, needed: int, what: str) -> None:
    """Refuse before the first step what would fail at a save.

    Args:
        place: a folder, or where one will be.
        needed: bytes.
        what: needs them.

    Raises:
        OSError: the disk has less.
    """
    free = shutil.disk_usage(_existing(place)).free
    if free < needed:
        raise OSError(
            f"{what} take about {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free at {place}; make room, or choose "
            "another output_dir"
        )


def _is_write_error(error: Exception) -> bool:
    """Whether a RuntimeError is torch.save's word for a file that could not be written."""
    return "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error)


def _existing(path: Path) -> Path:
    return next(candidate for candidate in (path, *path.absolute().parents) if candidate.exists())


def step_of(checkpoint: str | Path | None) -> int:
    """The step of an intermediate checkpoint by its name; 0 for None, -1 for a folder of another name."""
    if checkpoint is None:
        return 0
    number = Path(checkpoint).name.removeprefix(_PREFIX)
    return int(number) if number.isdigit() else -1


def sync_tree(folder: Path) -> None:
    """Force files and folders to the disk, before a name says that they are whole: a machine may lose its power, too."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _aligned(*sides: dict[str, Any]) -> tuple[list[tuple[str, Any]], ...]:
    names = sorted(set().union(*sides))
    return tuple([(name, side.get(name)) for name in names] for side in sides)
