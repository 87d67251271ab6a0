"""Sentence embeddings of instructions: which text is embedded, and by what (:mod:`model.instruction_store` keeps the vectors).

The encoder stands outside the model: the model takes its vectors as ``instruction_embeds`` (B, E), one row for each image.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

InstructionPolicy = Literal["mean_of_turns", "first_turn", "last_turn"]

#: The answer-format prompts of LLaVA-1.5's data (haotian-liu/LLaVA, docs/Evaluation.md). They say how to answer, not where to
#: look: the released IGVA code embeds the question without them.
ANSWER_FORMAT_SUFFIXES = (
    "Answer the question using a single word or phrase.",
    "Answer using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
    "Provide a one-sentence caption for the provided image.",
)

_FINGERPRINT_FILE = "igva_fingerprint.json"


class Encoder(Protocol):
    """What turns sentences into vectors. :class:`SentenceEncoder` does; so may any object of this form."""

    @property
    def dimension(self) -> int:
        """E, the width of the vectors."""

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest that changes whenever the vectors of the encoder would."""

    def encode(self, sentences: Sequence[str]) -> Tensor:
        """(n, E), float32 on the CPU."""

    def save(self, folder: str | Path) -> None:
        """Write the encoder so that :class:`SentenceEncoder` can read it."""


def instruction_texts(
    human_turns: Sequence[str],
    policy: InstructionPolicy = "mean_of_turns",
    *,
    image_token: str = "<image>",
    suffixes: Sequence[str] = ANSWER_FORMAT_SUFFIXES,
) -> list[str]:
    """The texts that stand for the instruction of a conversation; its embedding is the mean of theirs.

    Args:
        human_turns: what the user says, turn by turn.
        policy: ``"mean_of_turns"`` takes all turns: the released training data carry one vector a conversation and are named
            after the average of the turns. ``"first_turn"`` and ``"last_turn"`` take one; in a chat the last one is the
            question at hand.
        image_token: placeholder to take out.
        suffixes: answer-format prompts to take off the end of a turn.

    Returns:
        One text or more. A turn that holds nothing but placeholders is left out, unless there is no other.

    Raises:
        ValueError: no turns, or an unknown policy.
    """
    if not human_turns:
        raise ValueError("human_turns is empty: there is no instruction to embed")
    if policy not in get_args(InstructionPolicy):
        raise ValueError(f"policy must be one of {get_args(InstructionPolicy)}, got {policy!r}")
    if policy == "first_turn":
        human_turns = human_turns[:1]
    elif policy == "last_turn":
        human_turns = human_turns[-1:]
    texts = [_bare_question(turn, image_token, suffixes) for turn in human_turns]
    return [text for text in texts if text] or texts[:1]


def embed_instructions(
    conversations: Sequence[Sequence[str]],
    encode: Callable[[list[str]], Tensor],
    policy: InstructionPolicy = "mean_of_turns",
    *,
    image_token: str = "<image>",
    suffixes: Sequence[str] = ANSWER_FORMAT_SUFFIXES,
) -> Tensor:
    """One vector a conversation: the mean over the texts that the policy takes.

    Args:
        conversations: the human turns of each conversation.
        encode: such as ``SentenceEncoder(...).encode``.
        policy, image_token, suffixes: see :func:`instruction_texts`.

    Returns:
        (conversations, E), float32.
    """
    texts = [instruction_texts(turns, policy, image_token=image_token, suffixes=suffixes) for turns in conversations]
    embeds = encode([text for group in texts for text in group])
    return torch.stack([part.mean(dim=0) for part in embeds.split([len(group) for group in texts])])


def _bare_question(turn: str, image_token: str, suffixes: Sequence[str]) -> str:
    text = turn.replace(image_token, " ").strip()
    for suffix in sorted(suffixes, key=len, reverse=True):
        if text.endswith(suffix):
            return text.removesuffix(suffix).rstrip()
    return text


class SentenceEncoder:
    """A sentence-transformers model, loaded when it is first needed and never trained.

    Args:
        path_or_name: folder or hub name; IGVA uses ``sentence-transformers/all-mpnet-base-v2`` (E = 768).
        device: where the encoder runs.
        batch_size: sentences at once.

    Raises (on first use):
        ImportError: sentence-transformers is not installed.
        ValueError: the folder carries a fingerprint, and the encoder in it does not have it.
    """

    def __init__(self, path_or_name: str | Path, device: str = "cpu", *, batch_size: int = 64) -> None:
        self.path_or_name = str(path_or_name)
        self.device = device
        self.batch_size = batch_size
        self._encoder: Any = None
        # A folder that this class has saved names its fingerprint, which spares loading; loading then checks it.
        self._fingerprint = _stored_fingerprint(Path(path_or_name))

    @property
    def dimension(self) -> int:
        """E, the width of the vectors."""
        # Renamed in sentence-transformers 5.3; the old name warns in the new versions.
        encoder = self._loaded()
        current = getattr(encoder, "get_embedding_dimension", None) or encoder.get_sentence_embedding_dimension
        return current()

    @property
    def fingerprint(self) -> str:
        """SHA-256 over weights, vocabulary and the settings that change a vector; the same on every machine."""
        if self._fingerprint is None:
            self._fingerprint = _fingerprint_of(self._loaded())
        return self._fingerprint

    def encode(self, sentences: Sequence[str]) -> Tensor:
        """(n, E), float32 on the CPU; (0, E) for no sentences."""
        if not sentences:
            return torch.empty(0, self.dimension)
        vectors = self._loaded().encode(list(sentences), batch_size=self.batch_size, show_progress_bar=False)
        return torch.from_numpy(vectors).float()

    def save(self, folder: str | Path) -> None:
        """Write the encoder with its fingerprint; nothing in the folder names this machine.

        A folder that holds this very encoder already is left alone, since every checkpoint of a training run saves it.
        """
        folder = Path(folder)
        if _stored_fingerprint(folder) == self.fingerprint:
            return
        folder.mkdir(parents=True, exist_ok=True)
        # No model card: it would name the folder that the encoder came from.
        self._loaded().save_pretrained(str(folder), create_model_card=False)
        # Last, so that a folder with a fingerprint is a complete one.
        write_text_atomically(folder / _FINGERPRINT_FILE, json.dumps({"fingerprint": self.fingerprint}) + "\n")

    def __deepcopy__(self, memo: dict[int, Any]) -> SentenceEncoder:
        # transformers copies a whole processor to print or save its settings; the encoder never changes, so copies share it.
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A loader's worker process gets the name and loads for itself if it has to.
        return {**self.__dict__, "_encoder": None}

    def _loaded(self) -> Any:
        if self._encoder is None:
            try:
                from sentence_transformers import SentenceTransformer
            except ImportError as error:
                raise ImportError(
                    "embedding instructions needs sentence-transformers: pip install 'igva-kernels[train]' "
                    "(or pass instruction_embeds that were computed elsewhere)"
                ) from error
            with _without_progress_bars():
                encoder = SentenceTransformer(self.path_or_name, device=self.device).eval()
            if self._fingerprint is not None and (actual := _fingerprint_of(encoder)) != self._fingerprint:
                raise ValueError(
                    f"the sentence encoder in {self.path_or_name} has the fingerprint {actual[:12]}, but was saved with "
                    f"{self._fingerprint[:12]}: its files were changed; copy the folder again"
                )
            self._encoder = encoder
        return self._encoder


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """The encoder is small, and is loaded at the first question: a bar would stand in the middle of a chat."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _fingerprint_of(encoder: Any) -> str:
    digest = hashlib.sha256()
    settings = {
        "modules": [type(module).__name__ for module in encoder],
        "pooling": [getattr(module, "pooling_mode", None) for module in encoder],
        "max_seq_length": encoder.max_seq_length,
        "vocabulary": sorted(encoder.tokenizer.get_vocab().items()),
    }
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def _stored_fingerprint(folder: Path) -> str | None:
    file = folder / _FINGERPRINT_FILE
    return json.loads(file.read_text(encoding="utf-8"))["fingerprint"] if file.is_file() else None


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write a file so that readers see all of it or nothing."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text_atomically(path: Path, content: str) -> None:
    """Write a UTF-8 file so that readers see all of it or nothing."""
    write_bytes_atomically(path, content.encode())
