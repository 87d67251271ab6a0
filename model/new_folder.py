"""Results that appear in one piece or not at all, and never in the place of something else."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when the block ends, and is removed when the block raises.

    Args:
        path: where it goes; its parents are made.

    Raises:
        FileExistsError: a file, or a folder that is not empty, stands there.
    """
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(f"{path} is not empty; choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place: a rename moves no bytes there.
    staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        yield staging
        staging.chmod(0o755)  # mkdtemp makes a folder private to the user
        os.replace(staging, path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """As :func:`new_folder`, for one file: the path to write to.

    Raises:
        FileExistsError: something stands there.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} is there already; choose another name, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        staging = Path(folder) / path.name
        yield staging
        os.replace(staging, path)
