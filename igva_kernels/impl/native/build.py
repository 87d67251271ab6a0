"""The compiled library: built at first use with the system's C compiler, kept in a cache of the user, loaded with ctypes.

Nothing is built at install or import. The name of a cached file holds a key of all that it was made from (source, flags,
compiler, processor) and the digest of its contents, so that a file is never loaded half-written, damaged, or on another
processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from igva_kernels.impl.native.openmp import parallel_of_torch

SOURCE = Path(__file__).with_name("mix.c")
"""Includes the headers beside it."""

SWITCH = "IGVA_KERNELS_NATIVE"
"""Environment variable: ``0`` keeps the compiled kernels out of use."""

COMPILERS = ("cc", "gcc", "clang")

# No contraction to fused multiply-adds: a result must have the same bits on every machine. Nobody reads errno.
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC", "-pthread")

# What this processor has; a compiler that does not know the flag builds for all processors of its kind.
NATIVE_FLAGS = (("-march=native",), ("-mcpu=native",), ())

TIMEOUT_S = 300
"""A build takes two seconds; on a machine with other work, a minute."""

_log = logging.getLogger(__name__)


class Unavailable(Exception):
    """The library cannot be had; the text says why and what would help."""


@cache
def why_unavailable() -> str | None:
    """None where the library can be used, else the reason. The first answer holds for the process; a bad one is logged."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0 switches the compiled kernels off"
    try:
        library()
    except Unavailable as error:
        _log.warning(
            "the compiled CPU kernels cannot be used: %s. Plain torch runs instead, several times slower in 16-bit types; "
            "%s=0 accepts that without this message",
            error,
            SWITCH,
        )
        return str(error)
    return None


@cache
def library() -> ctypes.CDLL:
    """The loaded library, built if the cache does not hold it.

    Raises:
        Unavailable: no compiler, no cache folder of the user's own, or the build failed.
    """
    if os.name != "posix" or sys.maxsize < 2**32:
        raise Unavailable("they need a 64-bit POSIX system")
    folder = cache_folder()
    compiler = find_compiler()
    failures = []
    for native in NATIVE_FLAGS:
        command = (*compiler, *FLAGS, *native)
        key = build_key(command)
        path = find_cached(folder, key)
        if path is None:
            try:
                path = build(command, folder, key)
            except subprocess.CalledProcessError as error:
                failures.append(f"{shlex.join(command)}: {_output_of(error)}")
                continue
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError as error:
            raise Unavailable(f"{path} cannot be loaded ({error}); is its file system mounted noexec?") from error
        loaded.igva_use_team(ctypes.c_void_p(parallel_of_torch()))
        return loaded
    raise Unavailable("the C compiler fails. " + " | ".join(failures))


def find_compiler() -> tuple[str, ...]:
    """The command of the C compiler: ``$CC`` if set, else the first of :data:`COMPILERS` on the path.

    Raises:
        Unavailable: there is none.
    """
    wanted = os.environ.get("CC")
    if wanted:
        command = tuple(shlex.split(wanted))
        if command and shutil.which(command[0]):
            return command
        raise Unavailable(f"CC={wanted!r} names no program")
    for name in COMPILERS:
        path = shutil.which(name)
        if path:
            return (path,)
    raise Unavailable(f"none of {', '.join(COMPILERS)} is on the path; install a C compiler (gcc or clang) or name one in CC")


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/igva_kernels``, by default below ``~/.cache``; made if it is not there, for this user alone.

    Raises:
        Unavailable: it cannot be made, or others could have put a file there.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "igva_kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(
            f"the cache folder {folder} cannot be made ({error.strerror}); set XDG_CACHE_HOME to one that can"
        ) from error
    if not _is_own(folder.lstat(), stat.S_ISDIR):
        raise Unavailable(
            f"{folder} is not a folder of this user, or others may write to it; `chmod go-w` it, or set XDG_CACHE_HOME"
        )
    return folder


def build_key(command: tuple[str, ...]) -> str:
    """A digest of the source, the command, the compiler's version and the processor.

    Raises:
        Unavailable: the compiler does not even tell its version.
    """
    try:
        version = subprocess.run([command[0], "--version"], capture_output=True, check=True, timeout=TIMEOUT_S).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"`{command[0]} --version` fails: {_output_of(error)}") from error
    sources = sorted(path for path in SOURCE.parent.iterdir() if path.suffix in (".c", ".h"))
    parts = [*(path.read_bytes() for path in sources), shlex.join(command).encode(), version, _processor().encode()]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:32]


def find_cached(folder: Path, key: str) -> Path | None:
    """The cached file of a key; None if there is none. A damaged one is removed.

    Raises:
        Unavailable: the file belongs to someone else, or others may write to it.
    """
    for path in sorted(folder.glob(f"mix-{key}-*.so")):
        try:
            is_own, digest = _is_own(path.lstat(), stat.S_ISREG), _digest_of(path)
        except FileNotFoundError:  # another process found it damaged
            continue
        if not is_own:
            raise Unavailable(f"{path} is not a file of this user, or others may write to it; remove it")
        if path.stem.rpartition("-")[2] == digest:
            return path
        _log.info("%s is damaged and is built again", path)
        path.unlink(missing_ok=True)
    return None


def build(command: tuple[str, ...], folder: Path, key: str) -> Path:
    """Compile, and put the finished file in its place in one step.

    Raises:
        subprocess.CalledProcessError: the compiler fails.
        Unavailable: it takes longer than :data:`TIMEOUT_S`, or the folder cannot be written to.
    """
    try:
        descriptor, name = tempfile.mkstemp(prefix="building-", suffix=".so", dir=folder)
    except OSError as error:
        raise Unavailable(
            f"{folder} cannot be written to ({error.strerror}); set XDG_CACHE_HOME to a folder that can"
        ) from error
    os.close(descriptor)
    unfinished = Path(name)
    try:
        subprocess.run(
            [*command, "-o", name, str(SOURCE), "-lm"], capture_output=True, text=True, check=True, timeout=TIMEOUT_S
        )
        unfinished.chmod(0o700)
        return unfinished.replace(folder / f"mix-{key}-{_digest_of(unfinished)}.so")
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"`{shlex.join(command)}` did not end within {TIMEOUT_S} s") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _is_own(status: os.stat_result, is_kind: Callable[[int], bool]) -> bool:
    return is_kind(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _processor() -> str:
    """What ``-march=native`` depends on, as far as the system tells."""
    names = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU implementer", "CPU part", "Features", "isa")
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(line for line in first.splitlines() if line.split("\t")[0].split(":")[0].strip() in names)


def _output_of(error: Exception) -> str:
    """The first line in which a compiler says what it does not like."""
    output = getattr(error, "stderr", None) or str(error)
    text = output.decode(errors="replace") if isinstance(output, bytes) else output
    lines = text.strip().splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else type(error).__name__)
