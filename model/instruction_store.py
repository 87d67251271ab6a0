"""Embeddings of instructions in one file that is read through its memory map.

One row for each different instruction, that is for the texts which the policy takes of a conversation: 665,000 conversations
take 2.0 GB in float32 at width 768 and no memory. The file is safetensors: ``keys`` (n, 32) uint8, the sorted SHA-256 of the
texts, and ``embeds`` (n, E), with the encoder's fingerprint and the policy in its metadata. A file of another encoder or policy
is refused, since its vectors would be wrong and nothing else would show it.

While a file is filled, finished rows lie in ``FILE.partial``, to which they are appended; a process that is killed loses the
rows of one chunk at most, and the next one goes on from there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from model.instruction import Encoder, InstructionPolicy, instruction_texts

_FORMAT = "igva-instructions-1"
_KEY_BYTES = 32
StoreDtype = Literal["float32", "float16"]
_SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16"}
#: Rows that are copied at once when a file is put together.
_BLOCK = 8192


@dataclass(frozen=True)
class FillReport:
    """What :func:`fill` did: different instructions asked for, how many of them were encoded now, rows of the file."""

    asked: int
    encoded: int
    rows: int


class InstructionStore:
    """Reads the vectors of instructions from a file of :func:`fill`.

    Args:
        path: the file.
        fingerprint: of the encoder whose vectors are wanted, see :class:`model.instruction.Encoder`.
        policy: which turns stand for the instruction.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no file of this kind, a damaged one, or one of another encoder or policy.
    """

    def __init__(self, path: str | Path, *, fingerprint: str, policy: InstructionPolicy) -> None:
        self.path = Path(path)
        self.policy: InstructionPolicy = policy
        self._fingerprint = fingerprint
        self._open()

    def __len__(self) -> int:
        """Number of instructions."""
        return len(self._prefixes)

    @property
    def dimension(self) -> int:
        """E, the width of the vectors."""
        return self._dimension

    def embed(self, conversations: Sequence[Sequence[str]]) -> Tensor:
        """The vectors of conversations.

        Args:
            conversations: the human turns of each.

        Returns:
            (conversations, E), float32 on the CPU.

        Raises:
            ValueError: an instruction that the file does not hold; the message quotes it.
        """
        rows = [self._row(instruction_texts(turns, self.policy)) for turns in conversations]
        if not rows:
            return torch.empty(0, self._dimension)
        return torch.cat([self._embeds[row : row + 1] for row in rows]).float()

    def has(self, key: bytes) -> bool:
        """Whether the file holds the instruction of a key, see :func:`instruction_key`."""
        return self._find(key) is not None

    def _row(self, texts: Sequence[str]) -> int:
        row = self._find(instruction_key(texts))
        if row is None:
            raise ValueError(
                f"{self.path} holds no vector of the instruction {' / '.join(texts)[:80]!r} ({len(self):,} others); run "
                "`igva embed` on this data file again, which adds what is missing"
            )
        return row

    def _find(self, key: bytes) -> int | None:
        row = int(np.searchsorted(self._prefixes, int.from_bytes(key[:8], "big")))
        while row < len(self._prefixes) and self._keys[row, :8].tobytes() == key[:8]:
            if self._keys[row].tobytes() == key:
                return row
            row += 1
        return None

    def _open(self) -> None:
        from safetensors import SafetensorError, safe_open

        if not self.path.is_file():
            raise FileNotFoundError(f"no file of instruction embeddings at {self.path}; `igva embed` makes it")
        try:
            handle = safe_open(str(self.path), framework="pt")
            metadata = handle.metadata() or {}
            _check_origin(self.path, metadata, _metadata(self._fingerprint, self.policy))
            keys, self._embeds = handle.get_tensor("keys"), handle.get_slice("embeds")
        except SafetensorError as error:
            raise ValueError(
                f"{self.path} is no intact file of instruction embeddings ({error}); delete it and embed anew"
            ) from error
        self._keys = keys.numpy()
        self._dimension = self._embeds.get_shape()[1]
        # The first 8 bytes of each key in memory, 5 MB for 665,000: the binary search touches no page of the file.
        self._prefixes = np.ascontiguousarray(self._keys[:, :8]).view(">u8").ravel().astype(np.uint64)

    def __getstate__(self) -> dict[str, Any]:
        # A loader's worker process opens the file itself; the map is shared by the system.
        return {"path": self.path, "policy": self.policy, "_fingerprint": self._fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def instruction_key(texts: Sequence[str]) -> bytes:
    """SHA-256 of the texts that stand for an instruction, in their order."""
    digest = hashlib.sha256()
    for text in texts:
        content = text.encode()
        # With its length: ["ab", "c"] and ["a", "bc"] are different instructions.
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.digest()


def fill(
    path: str | Path,
    conversations: Iterable[Sequence[str]],
    encoder: Encoder,
    policy: InstructionPolicy = "mean_of_turns",
    *,
    dtype: StoreDtype = "float32",
    chunk_size: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> FillReport:
    """Add to a file what it lacks of the instructions of conversations; without a file, make it.

    Args:
        path: the file; it appears, or is replaced, in one piece at the end.
        conversations: the human turns of each.
        encoder: encodes what is missing.
        policy: which turns stand for the instruction; its vector is the mean of theirs.
        dtype: of the stored vectors; float16 takes half the space and rounds to 11 bits. An existing file keeps its own.
        chunk_size: instructions that are encoded before their rows are written; what a killed process loses at most.
        progress: called with (rows done, rows to do) after each chunk.

    Raises:
        ValueError: the file, or the unfinished one beside it, is of another encoder or policy, or is damaged.
        BlockingIOError: another process is filling the file.
    """
    if dtype not in get_args(StoreDtype):
        raise ValueError(f"dtype must be one of {', '.join(get_args(StoreDtype))}, got {dtype!r}")
    path = Path(path)
    fingerprint = encoder.fingerprint
    wanted: dict[bytes, list[str]] = {}
    for turns in conversations:
        texts = instruction_texts(turns, policy)
        wanted.setdefault(instruction_key(texts), texts)
    old = InstructionStore(path, fingerprint=fingerprint, policy=policy) if path.is_file() else None
    if old is not None:
        dtype = _dtype_of(old)
    missing = {key: texts for key, texts in wanted.items() if old is None or not old.has(key)}
    if old is not None and not missing:
        return FillReport(len(wanted), 0, len(old))

    path.parent.mkdir(parents=True, exist_ok=True)
    dimension = encoder.dimension
    header = {**_metadata(fingerprint, policy), "dimension": dimension, "dtype": dtype}
    encoded = 0
    with _Journal(path.with_name(path.name + ".partial"), header) as journal:
        done = set(journal.keys())
        todo = [key for key in missing if key not in done]
        for start in range(0, len(todo), chunk_size):
            keys = todo[start : start + chunk_size]
            journal.append(keys, _vectors([missing[key] for key in keys], encoder).numpy().astype(dtype))
            encoded += len(keys)
            if progress is not None:
                progress(encoded, len(todo))
        rows = _put_together(path, old, journal)
        journal.remove()
    return FillReport(len(wanted), encoded, rows)


def _vectors(instructions: Sequence[Sequence[str]], encoder: Encoder) -> Tensor:
    """(n, E): the mean over the texts of each instruction; a text that several of them have is encoded once."""
    texts = list(dict.fromkeys(text for instruction in instructions for text in instruction))
    place = {text: row for row, text in enumerate(texts)}
    embeds = encoder.encode(texts).float()
    return torch.stack([embeds[[place[text] for text in instruction]].mean(dim=0) for instruction in instructions])


class _Journal:
    """Finished rows of a file that is being filled: one line of JSON, then key, vector and checksum of each row.

    The file is locked while it is open. What a killed process left half written at the end is cut off.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path, self._header = path, header
        self._row = np.dtype(
            [("key", "u1", (_KEY_BYTES,)), ("embed", header["dtype"], (header["dimension"],)), ("checksum", "<u4")]
        )

    def __enter__(self) -> _Journal:
        self._stream: IO[bytes] = self.path.open("a+b")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._stream.close()
            raise BlockingIOError(f"another process is filling {self.path.with_suffix('')}; wait for it") from None
        try:
            self._recover()
        except BaseException:
            self._stream.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    def append(self, keys: Sequence[bytes], embeds: np.ndarray) -> None:
        """Write rows and wait until the disk has them."""
        rows = np.zeros(len(keys), self._row)
        rows["key"] = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, _KEY_BYTES)
        rows["embed"] = embeds
        for row in rows:
            row["checksum"] = zlib.crc32(row.tobytes()[:-4])
        self._stream.write(rows.tobytes())
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def rows(self) -> np.ndarray:
        """The rows, through the file's map."""
        self._stream.flush()
        size = self._stream.seek(0, os.SEEK_END)
        count = (size - self._start) // self._row.itemsize
        if count == 0:
            return np.empty(0, self._row)
        return np.memmap(self.path, self._row, mode="r", offset=self._start, shape=(count,))

    def keys(self) -> list[bytes]:
        """The keys of the rows, in their order."""
        return [key.tobytes() for key in self.rows()["key"]]

    def remove(self) -> None:
        """Delete the file; its rows are in their place."""
        self.path.unlink()

    def _recover(self) -> None:
        self._stream.seek(0)
        line = self._stream.readline()
        if not line.endswith(b"\n"):  # new, or killed in its first write
            line = (json.dumps(self._header, sort_keys=True) + "\n").encode()
            self._stream.truncate(0)
            self._stream.write(line)
            self._stream.flush()
        self._start = len(line)
        try:
            header = json.loads(line)
        except ValueError:
            raise ValueError(f"{self.path} is no unfinished file of instruction embeddings; delete it") from None
        _check_origin(self.path, header, self._header)
        if header != self._header:
            raise ValueError(f"{self.path} was begun with {header}, this run has {self._header}; delete it, or embed as then")
        intact = 0
        for row in self.rows():
            if zlib.crc32(row.tobytes()[:-4]) != int(row["checksum"]):
                break
            intact += 1
        self._stream.truncate(self._start + intact * self._row.itemsize)
        self._stream.seek(0, os.SEEK_END)


def _put_together(path: Path, old: InstructionStore | None, journal: _Journal) -> int:
    """Write old and new rows, sorted by key, to a temporary file and rename it; returns the number of rows."""
    new = journal.rows()
    sources: list[tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]] = [(new["key"], lambda rows: new["embed"][rows])]
    if old is not None:
        old_embeds = _embeds_of(old)
        sources.insert(0, (old._keys, lambda rows: old_embeds[rows]))
    keys = np.concatenate([keys for keys, _ in sources])
    source = np.repeat(np.arange(len(sources)), [len(keys) for keys, _ in sources])
    row_in_source = np.concatenate([np.arange(len(keys)) for keys, _ in sources])
    order = np.lexsort(keys.T[::-1])
    header = journal._header
    count, dimension, dtype = len(keys), header["dimension"], np.dtype(header["dtype"])
    with _replacing(path) as stream:
        stream.write(_safetensors_header(count, dimension, header))
        stream.write(keys[order].tobytes())
        # In blocks, from map to file: the vectors of all of mix665k would take gigabytes.
        for start in range(0, count, _BLOCK):
            block = order[start : start + _BLOCK]
            vectors = np.empty((len(block), dimension), dtype)
            for index, (_, read) in enumerate(sources):
                here = np.flatnonzero(source[block] == index)
                vectors[here] = read(row_in_source[block[here]])
            stream.write(vectors.tobytes())
    return count


def _safetensors_header(count: int, dimension: int, header: dict[str, Any]) -> bytes:
    """The head of a safetensors file whose tensors are then written behind it, which its own writer would want in memory."""
    ends = count * _KEY_BYTES, count * (_KEY_BYTES + dimension * np.dtype(header["dtype"]).itemsize)
    content = json.dumps(
        {
            "__metadata__": {name: str(value) for name, value in header.items()},
            "keys": {"dtype": "U8", "shape": [count, _KEY_BYTES], "data_offsets": [0, ends[0]]},
            "embeds": {
                "dtype": _SAFETENSORS_NAMES[header["dtype"]],
                "shape": [count, dimension],
                "data_offsets": list(ends),
            },
        }
    ).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def _embeds_of(store: InstructionStore) -> np.ndarray:
    """(n, E), all vectors of a file through its map; rows may be taken by an array of places."""
    with store.path.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little") + len(store) * _KEY_BYTES
    return np.memmap(store.path, _dtype_of(store), mode="r", offset=start, shape=(len(store), store.dimension))


def _dtype_of(store: InstructionStore) -> StoreDtype:
    names: dict[str, StoreDtype] = {"F32": "float32", "F16": "float16"}
    return names[str(store._embeds.get_dtype())]


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of ``path`` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _metadata(fingerprint: str, policy: InstructionPolicy) -> dict[str, str]:
    return {"format": _FORMAT, "encoder": fingerprint, "policy": policy}


def _check_origin(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    if found.get("format") != _FORMAT:
        raise ValueError(
            f"{path} is no file of instruction embeddings, expected the format {_FORMAT}, got {found.get('format')}"
        )
    if found.get("encoder") != expected["encoder"]:
        raise ValueError(
            f"{path} holds vectors of the sentence encoder {str(found.get('encoder'))[:12]}, but this model's is "
            f"{expected['encoder'][:12]} (fingerprints of the weights); embed with this model's encoder into another file"
        )
    if found.get("policy") != expected["policy"]:
        raise ValueError(
            f"{path} was made with the instruction policy {found.get('policy')}, but {expected['policy']} is asked for; set "
            f"data.instruction_policy={found.get('policy')}, or embed again into another file"
        )
