"""Building, caching and refusing: what happens where there is no compiler, and what is never loaded."""

import ctypes
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch

from igva_kernels import FusionPlan
from igva_kernels.impl import native
from igva_kernels.impl.native import build, structs

PLAN = FusionPlan.igva(4, 2)
STATES = [torch.ones(1, 3, 8)] * 4
WEIGHTS = torch.ones(2)


def forget():
    build.library.cache_clear()
    build.why_unavailable.cache_clear()


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache; the process forgets what it built."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O0"))  # how fast it is does not matter here, but how fast it is built
    forget()
    yield tmp_path / "igva_kernels"
    forget()


def supported(states=STATES, weights=WEIGHTS, plan=PLAN, **options):
    return native.check_supported(states, weights, plan.program, 1, **options)


def test_builds_once_into_the_users_cache(_built, fresh, monkeypatch):
    assert supported() is None
    (file,) = fresh.iterdir()
    assert fresh.stat().st_mode & 0o777 == 0o700
    forget()
    monkeypatch.setattr(build, "build", None)  # a second build would fail
    assert supported() is None
    assert list(fresh.iterdir()) == [file]


@pytest.mark.parametrize("damage", ["truncated", "empty", "altered"])
def test_a_damaged_file_is_built_again_and_never_loaded(_built, fresh, damage):
    build.library()
    (file,) = fresh.iterdir()
    good = file.read_bytes()
    # Another file, since the loaded one is mapped into this process.
    file.unlink()
    file.write_bytes({"truncated": good[: len(good) // 2], "empty": b"", "altered": good[:-1] + bytes([good[-1] ^ 1])}[damage])
    file.chmod(0o700)
    forget()
    assert supported() is None
    (rebuilt,) = fresh.iterdir()
    assert rebuilt.read_bytes()[:4] == b"\x7fELF" or sys.platform != "linux"
    assert rebuilt.stem.rpartition("-")[2] == build._digest_of(rebuilt)


def test_another_source_compiler_or_processor_is_another_file(_built, monkeypatch, tmp_path):
    command = (*build.find_compiler(), *build.FLAGS)
    keys = {build.build_key(command), build.build_key((*command, "-O2"))}
    with monkeypatch.context() as patch:
        patch.setattr(build, "_processor", lambda: "another")
        keys.add(build.build_key(command))
    for name in (build.SOURCE.name, "vectors.h"):
        folder = tmp_path / f"other-{name}"
        shutil.copytree(build.SOURCE.parent, folder)
        with (folder / name).open("a") as file:
            file.write("\n")
        with monkeypatch.context() as patch:
            patch.setattr(build, "SOURCE", folder / build.SOURCE.name)
            keys.add(build.build_key(command))
    assert len(keys) == 5


def test_files_and_folders_that_others_may_write_are_refused(_built, fresh):
    build.library()
    (file,) = fresh.iterdir()
    file.chmod(0o722)
    forget()
    assert "others may write" in supported()
    file.chmod(0o700)
    fresh.chmod(0o777)
    forget()
    assert "others may write" in supported()


def test_a_link_is_not_followed(_built, fresh, tmp_path):
    build.library()
    (file,) = fresh.iterdir()
    elsewhere = tmp_path / "elsewhere.so"
    shutil.move(file, elsewhere)
    file.symlink_to(elsewhere)
    forget()
    assert "not a file of this user" in supported()


def test_a_cache_that_cannot_be_made_is_said(monkeypatch, tmp_path):
    (tmp_path / "igva_kernels").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    assert "XDG_CACHE_HOME" in supported()
    forget()


def test_without_a_compiler_the_reason_names_one_and_is_logged_once(fresh, monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.WARNING):
        reasons = {supported() for _ in range(3)}
    (reason,) = reasons
    assert "gcc" in reason and "CC" in reason
    (record,) = [record for record in caplog.records if record.name.startswith("igva_kernels")]
    assert reason in record.getMessage() and "IGVA_KERNELS_NATIVE=0" in record.getMessage()


@pytest.mark.parametrize("wanted", ["no-such-compiler -m64", "false"])
def test_a_compiler_that_does_not_work_is_named(fresh, monkeypatch, wanted):
    monkeypatch.setenv("CC", wanted)
    assert wanted.split()[0] in supported()


def test_a_source_that_does_not_compile_gives_the_compilers_words(_built, fresh, monkeypatch, tmp_path):
    source = tmp_path / "mix.c"
    source.write_text("#error these words\n")
    monkeypatch.setattr(build, "SOURCE", source)
    assert "these words" in supported()
    assert not list(fresh.iterdir())


def test_a_compiler_that_does_not_end_is_stopped(_built, fresh, monkeypatch, tmp_path):
    script = tmp_path / "endless-cc"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\nexec sleep 60\n')
    script.chmod(0o700)
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setattr(build, "TIMEOUT_S", 3)
    assert "did not end within 3 s" in supported()
    assert not list(fresh.iterdir())


def test_switched_off_without_a_word(monkeypatch, caplog):
    monkeypatch.setenv("IGVA_KERNELS_NATIVE", "0")
    forget()
    with caplog.at_level(logging.WARNING):
        assert "IGVA_KERNELS_NATIVE=0" in supported()
    assert not caplog.records
    forget()


def test_structs_have_the_sizes_that_c_gives_them(_built):
    library = build.library()
    for struct, size_of in ((structs.Forward, library.igva_size_of_forward), (structs.Backward, library.igva_size_of_backward)):
        size_of.restype = ctypes.c_int64
        assert ctypes.sizeof(struct) == size_of()


@pytest.mark.parametrize(
    ("states", "options", "word"),
    [
        ([state.double() for state in STATES], {}, "float64"),
        ([state.to("meta") for state in STATES], {}, "meta"),
        ([torch.ones(1, 8, 3).transpose(1, 2)] * 4, {}, "strides"),
    ],
)
def test_what_it_cannot_run_is_said(_built, states, options, word):
    assert word in supported(states, **options)


def test_the_source_is_part_of_the_package():
    """Also of the wheel, where these tests run as well."""
    assert {"mix.c", "vectors.h", "rows.h", "threads.h"} <= {path.name for path in Path(build.SOURCE).parent.iterdir()}
