"""Where a run writes: everything in ``OUTPUT_DIR.partial``, and the finished checkpoint in one rename.

A run that fails, or is killed, leaves the earlier checkpoint as it was.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from model.configuration import IgvaLlavaConfig
from model.training.checkpoints import CheckpointFolder, RunIdentity, check_space, check_whole, sync_tree
from model.training.recipe import TrainRecipe

RUN_RECORDS = "training"


class RunFolders:
    """The folders of one run.

    Args:
        recipe: names the checkpoint folder, says whether it may be replaced, and whether the run goes on from an earlier
            one.
    """

    def __init__(self, recipe: TrainRecipe) -> None:
        self.checkpoint = recipe.checkpoint_folder
        self.partial = self.checkpoint.with_name(self.checkpoint.name + ".partial")
        self._may_replace = recipe.overwrite or recipe.smoke
        self._resume = recipe.resume

    def check(self) -> None:
        """Refuse a run that would cost something that is there.

        Raises:
            FileExistsError: something stands where the checkpoint is to go and ``overwrite`` is not set, or it is no
                checkpoint of this package; or an unfinished run stands there and neither ``resume`` nor ``overwrite`` is
                set.
            FileNotFoundError: ``resume`` is set and there is no intermediate checkpoint.
            OSError, ValueError: the newest intermediate checkpoint cannot be read, or is damaged.
        """
        self._restore_replaced()
        if self._trash.exists():
            shutil.rmtree(self._trash)
        if _holds_something(self.checkpoint):
            self._check_replaceable()
        if self._resume:
            newest = self._newest_intermediate()
            if newest is None:
                raise FileNotFoundError(
                    f"resume is set, but there is no intermediate checkpoint in {self.intermediate}; begin with resume=false"
                )
            check_whole(newest)
        elif _holds_something(self.partial) and not self._may_replace:
            raise FileExistsError(
                f"an unfinished run stands in {self.partial}; set resume=true to go on with it, or overwrite=true to replace it"
            )

    @property
    def log(self) -> Path:
        """The JSONL log of the run."""
        return self.partial / "log.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's files, where it is among the trackers."""
        return self.partial / "tensorboard"

    @property
    def intermediate(self) -> Path:
        """Folder of the intermediate checkpoints."""
        return self.partial / "checkpoints"

    @property
    def instructions(self) -> Path:
        """Embeddings of the instructions, where the recipe names no file for them."""
        return self.partial / "instructions.safetensors"

    @property
    def problems(self) -> Path:
        """Samples that were left out, one a line."""
        return self.partial / "problems.jsonl"

    @property
    def staging(self) -> Path:
        """Where the finished checkpoint is put together."""
        return self.partial / "finished"

    @property
    def records(self) -> Path:
        """What the checkpoint tells of the run that made it."""
        return self.staging / RUN_RECORDS

    def start(self) -> None:
        """Make the folder of the run, empty unless it is resumed."""
        if self.partial.exists() and not self._resume:
            self._throw_away(self.partial)
        self.partial.mkdir(parents=True, exist_ok=True)

    def resume_from(self, identity: RunIdentity) -> str | None:
        """The intermediate checkpoint that a resumed run goes on from; None for a run from the beginning.

        Raises:
            FileNotFoundError: this process sees none: the folder is not shared by the machines of the run.
            ValueError: it is of a run that differs from this one.
        """
        if not self._resume:
            return None
        newest = self._newest_intermediate()
        if newest is None:
            raise FileNotFoundError(f"no intermediate checkpoint in {self.intermediate}; all machines must share this folder")
        identity.check(check_whole(newest), newest)
        return str(newest)

    def check_room(self, finished: int, intermediate: int) -> None:
        """Refuse a run whose checkpoints will not fit on the disk.

        Args:
            finished: bytes of the finished checkpoint, in about.
            intermediate: the same of an intermediate one, of which two are there at times; 0: none is saved.

        Raises:
            OSError: they do not fit.
        """
        check_space(self.partial, finished + 2 * intermediate, "the checkpoints of this run")

    def stage(self) -> None:
        """Make the folder for the finished checkpoint, empty even where an interrupted save left something."""
        if self.staging.exists():
            shutil.rmtree(self.staging)
        self.records.mkdir(parents=True)

    def publish(self) -> None:
        """Move the staged checkpoint to its place; a replaced one is deleted only after that."""
        sync_tree(self.staging)
        if self.checkpoint.exists():
            os.replace(self.checkpoint, self._replaced)
        try:
            os.replace(self.staging, self.checkpoint)
        except OSError:
            self._restore_replaced()
            raise
        self._throw_away(self.partial)
        if self._replaced.exists():
            shutil.rmtree(self._replaced)

    @property
    def _replaced(self) -> Path:
        return self.checkpoint.with_name(self.checkpoint.name + ".replaced")

    @property
    def _trash(self) -> Path:
        return self.checkpoint.with_name(self.checkpoint.name + ".trash")

    def _throw_away(self, folder: Path) -> None:
        """Delete a folder that holds checkpoints: out of its name first, as a deletion that is cut short leaves a part."""
        os.replace(folder, self._trash)
        shutil.rmtree(self._trash)

    def _restore_replaced(self) -> None:
        """Put back what a run moved aside if it ended between its two renames; else remove it."""
        if not self._replaced.exists():
            return
        if self.checkpoint.exists():
            shutil.rmtree(self._replaced)
        else:
            os.replace(self._replaced, self.checkpoint)

    def _newest_intermediate(self) -> Path | None:
        return CheckpointFolder(self.intermediate).newest()

    def _check_replaceable(self) -> None:
        if not self._may_replace:
            raise FileExistsError(f"{self.checkpoint} is not empty; choose another output_dir, or set overwrite=true")
        # A slip such as output_dir=. must not cost a folder of something else.
        if not is_checkpoint(self.checkpoint):
            raise FileExistsError(
                f"{self.checkpoint} is no {IgvaLlavaConfig.model_type} checkpoint, so it is not overwritten; choose another "
                "output_dir, or move the folder away"
            )


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a model of this package."""
    config = folder / "config.json"
    if not config.is_file():
        return False
    return json.loads(config.read_text(encoding="utf-8")).get("model_type") == IgvaLlavaConfig.model_type


def require_checkpoint(name: str) -> None:
    """Refuse a name that can be neither a checkpoint folder nor a hub name, before a library says it at length.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder holds no model of this package, or its ``config.json`` is damaged.
    """
    folder = Path(name)
    if folder.exists():
        try:
            found = is_checkpoint(folder)
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'} is damaged ({error}); copy or download it again") from error
        if not found:
            raise ValueError(
                f"{folder} holds no {IgvaLlavaConfig.model_type} checkpoint; give the output_dir of a finished training run"
            )
    # A hub name is "owner/name" and nothing that a path begins with.
    elif name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no checkpoint at {folder}")


def _holds_something(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.iterdir()))
