"""The pictures of the quickstart: three real sources, six kinds of question, in LLaVA's JSON.

========  ==============================================  ==================================================================
kind      example                                         source
========  ==============================================  ==================================================================
colour    What color is the background?                   easy-vqa; emoji compositions
count     How many objects are there?                     emoji compositions: one to four times the same sprite
shape     What shape is in the image?                     easy-vqa: circle, rectangle, triangle
presence  Is there a cat in the picture?                  easy-vqa; emoji compositions
identity  What object is shown?                           emoji compositions: one of 52 sprites
digits    Which digit is written here?                    the handwritten digits of scikit-learn
========  ==============================================  ==================================================================

The kinds need different visual levels (colour is plain in the first layers, the name of a thing in the last), which is what an
instruction-guided fusion can make use of. Questions of easy-vqa with a negation ("is there not a ...") are left out: they test
the logic of the language model, not its sight. Presence is balanced between yes and no.

Three files are written beside ``images/``:

* ``captions.json``: one record per training picture, the words for what is on it (stage 1, as LLaVA begins with captions),
* ``train.json`` and ``test.json``: questions (stage 2 and the evaluation). The kind stands in
  the field ``level`` of each record.

No test picture repeats a training picture. The test compositions of sprites (thing, background colour, number) never occur
in training, in any arrangement; easy-vqa comes with its own split; a digit whose pixels equal those of another is dropped.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from model.quickstart.parts import QUESTIONS, find_package

SPRITES = Path(__file__).with_name("sprites")

KINDS = ("colour", "count", "shape", "presence", "identity", "digits")

IMAGE_SIZE = 112
"""Pixels: 8 x 8 patches of 14, a quarter of the work of 224 pixels. The sources hold little more detail (64, 8 and 136)."""

BACKGROUNDS = {
    "red": (220, 60, 50),
    "green": (60, 170, 75),
    "blue": (60, 100, 220),
    "yellow": (245, 220, 70),
    "gray": (150, 150, 150),
    "white": (255, 255, 255),
    "black": (25, 25, 25),
    "pink": (250, 160, 200),
}

NUMBERS = ("one", "two", "three", "four")

TEMPLATES = {
    "colour": ("What color is the background?", "Which color fills the picture behind the objects?"),
    "count": ("How many objects are there?", "Count the objects in the image."),
    "identity": ("What object is shown?", "Name the thing in the picture."),
    "presence": ("Is there {a_thing} in the picture?", "Does the image show {a_thing}?"),
    "digits": ("Which digit is written here?", "Read the digit in the image."),
}

Record = dict[str, Any]


@dataclass(frozen=True)
class PictureCounts:
    """How much of each source goes into one split.

    Args:
        emoji: compositions of sprites.
        shapes: pictures of easy-vqa.
        digits: handwritten digits.
        questions: how many questions of each kind are kept; fewer where the pictures do not hold as many.
    """

    emoji: int
    shapes: int
    digits: int
    questions: dict[str, int] = field(default_factory=dict)


# Counting and naming are harder than the rest and get more questions in training. The test has the same number of each kind.
TRAIN = PictureCounts(
    emoji=1300,
    shapes=600,
    digits=900,
    questions={"colour": 600, "count": 1300, "shape": 500, "presence": 700, "identity": 1300, "digits": 900},
)
TEST = PictureCounts(emoji=120, shapes=120, digits=80, questions=dict.fromkeys(KINDS, 80))


def make_pictures(folder: str | Path, *, train: PictureCounts = TRAIN, test: PictureCounts = TEST, seed: int = 0) -> Path:
    """Writes the pictures and their three JSON files; an existing folder with the same settings is kept.

    Args:
        folder: a folder of its own; it is replaced as a whole.
        train, test: the size of the splits.
        seed: the same seed gives the same bytes.

    Returns:
        ``folder``.

    Raises:
        PartError: easy-vqa is not installed.
        ValueError: more pictures are asked for than there are.
    """
    folder = Path(folder)
    marker = {"version": 1, "seed": seed, "train": asdict(train), "test": asdict(test)}
    marker_path = folder / "pictures.json"
    if marker_path.is_file() and json.loads(marker_path.read_text(encoding="utf-8")) == marker:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (temporary / "images").mkdir()
        captions: list[Record] = []
        records: dict[str, list[Record]] = {"train": [], "test": []}
        for source in (_emoji, _shapes, _digits):
            found = source(temporary, train, test, random.Random(f"{seed}-{source.__name__}"))
            captions += [record for record in found if record["level"] == "caption" and record["split"] == "train"]
            for split, chosen in records.items():
                chosen += [record for record in found if record["split"] == split and record["level"] != "caption"]
        chooser = random.Random(f"{seed}-questions")
        _write(temporary / "captions.json", captions)
        _write(temporary / "train.json", _keep(records["train"], train.questions, chooser))
        _write(temporary / "test.json", _keep(records["test"], test.questions, chooser))
        (temporary / "pictures.json").write_text(json.dumps(marker, indent=1), encoding="utf-8")
        temporary.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load_records(path: str | Path) -> list[Record]:
    """The records of one of the JSON files."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def _keep(records: list[Record], wanted: dict[str, int], chooser: random.Random) -> list[Record]:
    """At most ``wanted[kind]`` records of each kind, in their order; presence half yes and half no."""
    kept: set[str] = set()
    for kind in KINDS:
        of_kind = [record for record in records if record["level"] == kind]
        chooser.shuffle(of_kind)
        number = wanted.get(kind, len(of_kind))
        if kind == "presence":
            by_answer = [[r for r in of_kind if _answer(r) == answer] for answer in ("yes", "no")]
            half = min(number // 2, *map(len, by_answer))
            of_kind = by_answer[0][:half] + by_answer[1][:half]
        kept.update(record["id"] for record in of_kind[:number])
    return [record for record in records if record["id"] in kept]


def _answer(record: Record) -> str:
    return record["conversations"][-1]["value"]


def _record(image: str, source: str, split: str, kind: str, question: str, answer: str) -> Record:
    return {
        "id": f"{Path(image).stem}-{kind}",
        "image": f"images/{image}",
        "source": source,
        "split": split,
        "level": kind,
        "conversations": [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": answer},
        ],
    }


def _caption(image: str, source: str, split: str, *words: str) -> Record:
    return _record(image, source, split, "caption", "Describe the picture.", " ".join(words))


def _write(path: Path, records: list[Record]) -> None:
    path.write_text(json.dumps(records, indent=0), encoding="utf-8")


# ---- emoji compositions ---------------------------------------------------------------------------------------------


def _emoji(folder: Path, train: PictureCounts, test: PictureCounts, chooser: random.Random) -> list[Record]:
    sprites = {path.stem: Image.open(path).convert("RGBA") for path in sorted(SPRITES.glob("*.png"))}
    things, compositions = list(sprites), emoji_compositions(chooser)
    if train.emoji + test.emoji > len(compositions):
        raise ValueError(f"emoji: {train.emoji} + {test.emoji} pictures asked for, there are {len(compositions)} compositions")
    records = []
    for index, (thing, background, number) in enumerate(compositions[: test.emoji + train.emoji]):
        split = "test" if index < test.emoji else "train"
        name = f"emoji-{split}-{index:05d}.png"
        compose(sprites[thing], BACKGROUNDS[background], number, chooser).save(folder / "images" / name)
        asked = thing if chooser.random() < 0.5 else chooser.choice([other for other in things if other != thing])
        answers = {
            "colour": background,
            "count": NUMBERS[number - 1],
            "identity": thing,
            "presence": "yes" if asked == thing else "no",
        }
        for kind, answer in answers.items():
            question = chooser.choice(TEMPLATES[kind]).format(a_thing=_with_article(asked))
            records.append(_record(name, "noto-emoji", split, kind, question, answer))
        records.append(_caption(name, "noto-emoji", split, NUMBERS[number - 1], thing, background))
    return records


def emoji_compositions(chooser: random.Random) -> list[tuple[str, str, int]]:
    """Every thing on every background in every number, shuffled; the first ones are held out of training."""
    things = sorted(path.stem for path in SPRITES.glob("*.png"))
    compositions = list(product(things, BACKGROUNDS, range(1, len(NUMBERS) + 1)))
    chooser.shuffle(compositions)
    return compositions


def compose(sprite: Image.Image, background: tuple[int, int, int], number: int, chooser: random.Random) -> Image.Image:
    """``number`` copies of a sprite on a plain background, in distinct quarters; a single one may also be large."""
    picture = Image.new("RGBA", (IMAGE_SIZE, IMAGE_SIZE), (*background, 255))
    half = IMAGE_SIZE // 2
    if number == 1 and chooser.random() < 0.5:
        size = chooser.randint(half, IMAGE_SIZE - 12)
        corner = (chooser.randint(0, IMAGE_SIZE - size), chooser.randint(0, IMAGE_SIZE - size))
        picture.alpha_composite(sprite.resize((size, size)), corner)
    else:
        for column, row in chooser.sample(list(product((0, half), (0, half))), number):
            size = chooser.randint(36, half - 4)
            corner = (column + chooser.randint(0, half - size), row + chooser.randint(0, half - size))
            picture.alpha_composite(sprite.resize((size, size)), corner)
    return picture.convert("RGB")


def _with_article(noun: str) -> str:
    if noun in ("bread", "cheese", "cherries"):
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


# ---- easy-vqa -------------------------------------------------------------------------------------------------------


def _shapes(folder: Path, train: PictureCounts, test: PictureCounts, chooser: random.Random) -> list[Record]:
    root = find_package(QUESTIONS)
    records = []
    for split, number in (("train", train.shapes), ("test", test.shapes)):
        by_picture: dict[int, dict[str, list[tuple[str, str]]]] = {}
        for question, answer, picture in json.loads((root / f"data/{split}/questions.json").read_text(encoding="utf-8")):
            kind = _kind_of_shape_question(question, answer)
            if kind is not None:
                by_picture.setdefault(picture, {}).setdefault(kind, []).append((question, answer))
        # Only pictures whose colour and shape are both asked for: the caption is made of these answers.
        usable = sorted(picture for picture, asked in by_picture.items() if {"colour", "shape"} <= asked.keys())
        if number > len(usable):
            raise ValueError(f"shapes: {number} {split} pictures asked for, there are {len(usable)}")
        for picture in chooser.sample(usable, number):
            name = f"shape-{split}-{picture:05d}.png"
            with Image.open(root / f"data/{split}/images/{picture}.png") as image:
                resized = image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.NEAREST)
            resized.save(folder / "images" / name)
            asked = by_picture[picture]
            for kind, candidates in asked.items():
                if kind == "presence":
                    # Four of five such questions have the answer no: draw the answer first.
                    wanted = chooser.choice(("yes", "no"))
                    candidates = [pair for pair in candidates if pair[1] == wanted] or candidates
                question, answer = chooser.choice(candidates)
                records.append(_record(name, "easy-vqa", split, kind, question.capitalize(), answer))
            records.append(_caption(name, "easy-vqa", split, asked["colour"][0][1], asked["shape"][0][1]))
    return records


def _kind_of_shape_question(question: str, answer: str) -> str | None:
    """The kind of an easy-vqa question; None for one with a negation."""
    words = question.rstrip("?").split()
    if answer in ("yes", "no"):
        return None if "not" in words or "no" in words else "presence"
    return "colour" if "color" in words else "shape"


# ---- handwritten digits ---------------------------------------------------------------------------------------------


def _digits(folder: Path, train: PictureCounts, test: PictureCounts, chooser: random.Random) -> list[Record]:
    from sklearn.datasets import load_digits

    data = load_digits()
    distinct: dict[str, int] = {}
    for index, pixels in enumerate(data.images):
        distinct.setdefault(hashlib.sha256(pixels.tobytes()).hexdigest(), index)
    order = list(distinct.values())
    chooser.shuffle(order)
    if train.digits + test.digits > len(order):
        raise ValueError(f"digits: {train.digits} + {test.digits} pictures asked for, there are {len(order)}")
    records = []
    for position, index in enumerate(order[: test.digits + train.digits]):
        split = "test" if position < test.digits else "train"
        name = f"digit-{split}-{index:05d}.png"
        # Ink of 0 .. 16 becomes black on white.
        picture = Image.fromarray((255 - data.images[index] * (255 / 16)).astype("uint8"))
        picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).convert("RGB").save(folder / "images" / name)
        answer = str(data.target[index])
        records.append(_record(name, "digits", split, "digits", chooser.choice(TEMPLATES["digits"]), answer))
        records.append(_caption(name, "digits", split, "digit", answer))
    return records
