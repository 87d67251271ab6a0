"""Tensors from files, without running what the files hold."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def read_tensors(source: str | Path) -> dict[str, Tensor]:
    """All tensors of a file, or of the weight files of a folder, by name, on the CPU.

    Args:
        source: a ``.safetensors`` file, a ``.bin`` file of ``torch.save`` (read with ``weights_only=True``), or a folder with
            such files; of a folder with both kinds the safetensors are read, and ``mm_projector.bin`` in any case.

    Raises:
        FileNotFoundError: there is no such file, or no weight file in the folder.
        ValueError: a file of another kind, or two files that hold a tensor of one name with different values.
        pickle.UnpicklingError: a ``.bin`` file that holds more than tensors (from torch).
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"no weights at {source}")
    files = _weight_files(source) if source.is_dir() else [source]
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in _read_file(file).items():
            if name in tensors and not torch.equal(tensors[name], tensor):
                raise ValueError(f"{file} holds another {name} than {files[0].parent}'s other files; leave one of them out")
            tensors[name] = tensor
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    files += [file for file in (folder / "mm_projector.bin",) if file.is_file()]
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors, pytorch_model*.bin or mm_projector.bin")
    return files


def _read_file(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix not in (".bin", ".pt", ".pth"):
        raise ValueError(f"{file} must be a .safetensors file or a .bin file of torch.save")
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{file} must hold a dict of tensors")
    return tensors
