"""What cannot be used of the data: kinds of problems, what a recipe does about each, and the count of what was left out.

A damaged file among 665,000 must not end a run after a day; a run must not lose samples in silence either. So every problem has
a kind, a recipe says for each kind whether it stops the run or costs the sample (``data.on_error``), and what was left out is
counted, kept with the run and said at its end.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from rich.table import Table

ProblemKind = Literal[
    "broken_line",
    "broken_record",
    "placeholders",
    "outside_path",
    "missing_image",
    "damaged_image",
    "oversized_image",
    "not_learnable",
]
OnError = Literal["raise", "skip"]

MEANINGS: dict[str, str] = {
    "broken_line": "a line of a JSONL file that is no JSON",
    "broken_record": "a record without the fields of LLaVA JSON",
    "placeholders": "more or fewer <image> than images",
    "outside_path": "an image path that leaves the image folder",
    "missing_image": "no such image file",
    "damaged_image": "a file that does not decode to a picture",
    "oversized_image": "more pixels than data.max_image_pixels: a decompression bomb",
    "not_learnable": "no token to learn within data.max_length, or an image beyond it",
}


class SampleError(ValueError):
    """A sample that cannot be used.

    Args:
        kind: one of :data:`ProblemKind`.
        message: what is wrong, for the person who mends it.
    """

    def __init__(self, kind: ProblemKind, message: str) -> None:
        super().__init__(message)
        self.kind: ProblemKind = kind

    def of_sample(self, sample_id: str) -> SampleError:
        """The same with the sample named first."""
        return type(self)(self.kind, f"sample {sample_id}: {self}")

    def __reduce__(self) -> tuple:
        # A loader's worker process sends it to the training process.
        return type(self), (self.kind, str(self))


class MissingImageError(SampleError, FileNotFoundError):
    """A sample whose image file is not there."""

    __str__ = ValueError.__str__


@dataclass(frozen=True)
class Problem:
    """One sample that was left out; ``record`` is its position in ``file``, or its line in a JSONL file."""

    kind: ProblemKind
    file: str
    record: int
    message: str


class Problems:
    """What a run does about problems, and what it has left out so far.

    Args:
        on_error: ``raise`` or ``skip`` for all kinds, or by kind; kinds that are not named raise.
        path: JSONL file to which every skipped sample is appended, by whichever process meets it (ranks and workers of a
            loader); None keeps them in this process.

    Raises:
        ValueError: an unknown kind or action.
    """

    def __init__(self, on_error: OnError | Mapping[Any, OnError] = "raise", path: str | Path | None = None) -> None:
        self._actions = check_on_error(on_error)
        self._path = None if path is None else Path(path)
        self._here: set[Problem] = set()

    def skips(self, kind: ProblemKind) -> bool:
        """Whether samples with such a problem are left out, and not raised."""
        return self._actions[kind] == "skip"

    def meet(self, error: SampleError, *, file: str, record: int) -> None:
        """Count a sample that is left out.

        Raises:
            SampleError: ``error``, where its kind is not to be skipped.
        """
        if not self.skips(error.kind):
            raise error
        problem = Problem(error.kind, file, record, str(error))
        # An epoch later, the same sample is the same problem.
        if problem in self._here:
            return
        self._here.add(problem)
        if self._path is not None:
            # One write to a file opened for appending: lines of several processes do not mix.
            with self._path.open("ab", buffering=0) as stream:
                stream.write((json.dumps(asdict(problem)) + "\n").encode())

    def all(self) -> list[Problem]:
        """What was left out, by every process that shares the file, in the order of kind, file and record."""
        met = set(self._here)
        if self._path is not None and self._path.is_file():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    met.add(Problem(**json.loads(line)))
                except json.JSONDecodeError:
                    continue  # the last line of a process that was killed while writing it
        return sorted(met, key=lambda problem: (problem.kind, problem.file, problem.record))

    def counts(self) -> dict[str, int]:
        """Samples left out, by kind; kinds without any are absent."""
        return dict(Counter(problem.kind for problem in self.all()))

    def table(self) -> Table:
        """Counts by kind, each with its first sample, for a terminal."""
        from rich.table import Table
        from rich.text import Text

        problems = self.all()
        table = Table(title=f"{len(problems):,} samples left out")
        table.add_column("kind")
        table.add_column("samples", justify="right")
        table.add_column("the first")
        for kind, count in Counter(problem.kind for problem in problems).items():
            first = next(problem for problem in problems if problem.kind == kind)
            table.add_row(kind, f"{count:,}", Text(first.message))
        return table


def check_on_error(on_error: OnError | Mapping[Any, OnError]) -> dict[str, OnError]:
    """The action of every kind.

    Raises:
        ValueError: an unknown kind or action; the message names it.
    """
    given = dict.fromkeys(get_args(ProblemKind), on_error) if isinstance(on_error, str) else dict(on_error)
    unknown = [kind for kind in given if kind not in get_args(ProblemKind)]
    if unknown:
        raise ValueError(f"data.on_error names {unknown[0]!r}, which is no kind of problem; there are {', '.join(MEANINGS)}")
    wrong = [action for action in given.values() if action not in get_args(OnError)]
    if wrong:
        raise ValueError(f"data.on_error must be one of {', '.join(map(repr, get_args(OnError)))}, got {wrong[0]!r}")
    return {kind: given.get(kind, "raise") for kind in get_args(ProblemKind)}


def summed_up(errors: list[SampleError]) -> SampleError:
    """One error for many: a single one as it is, several as counts by kind with the first of each."""
    first = errors[0]
    if len(errors) == 1:
        return first
    lines = []
    for kind, count in Counter(error.kind for error in errors).items():
        example = next(error for error in errors if error.kind == kind)
        lines.append(f"{count:,} x {kind}, first: {example}")
    text = f"{'; '.join(lines)}. Mend the data, or leave such samples out with data.on_error=skip"
    return type(first)(first.kind, text)
