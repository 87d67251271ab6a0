"""The pictures of the quickstart: the same bytes for a seed, splits without overlap, answers worth predicting."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

from model.data.llava_json import read_llava_json
from model.quickstart.parts import QUESTIONS
from model.quickstart.pictures import IMAGE_SIZE, KINDS, SPRITES, TRAIN, PictureCounts, load_records, make_pictures

pytest.importorskip("sklearn")
if importlib.util.find_spec(QUESTIONS.module) is None:
    pytest.skip(f"{QUESTIONS.name} is not installed", allow_module_level=True)

SMALL_TRAIN = PictureCounts(emoji=150, shapes=60, digits=60, questions=dict.fromkeys(KINDS, 60))
SMALL_TEST = PictureCounts(emoji=30, shapes=30, digits=20, questions=dict.fromkeys(KINDS, 20))


def _make(folder: Path, seed: int = 0) -> Path:
    return make_pictures(folder, train=SMALL_TRAIN, test=SMALL_TEST, seed=seed)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make(tmp_path_factory.mktemp("quickstart") / "pictures")


def _bytes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _images(folder: Path, split: str) -> set[str]:
    return {record["image"] for record in load_records(folder / f"{split}.json")}


def test_a_seed_gives_the_same_bytes_and_another_seed_others(pictures: Path, tmp_path: Path) -> None:
    assert _bytes(_make(tmp_path / "again")) == _bytes(pictures)
    assert _bytes(_make(tmp_path / "other", seed=1)) != _bytes(pictures)


def test_an_existing_folder_is_kept_and_one_of_other_settings_replaced(tmp_path: Path) -> None:
    tiny = PictureCounts(emoji=4, shapes=2, digits=2)
    folder = make_pictures(tmp_path / "p", train=tiny, test=tiny)
    (folder / "mine").touch()
    make_pictures(folder, train=tiny, test=tiny)
    assert (folder / "mine").exists()
    make_pictures(folder, train=tiny, test=tiny, seed=1)
    assert not (folder / "mine").exists()


def test_no_test_picture_is_a_training_picture(pictures: Path) -> None:
    train = {hashlib.sha256((pictures / name).read_bytes()).hexdigest() for name in _images(pictures, "train")}
    captions = {hashlib.sha256((pictures / name).read_bytes()).hexdigest() for name in _images(pictures, "captions")}
    test = {hashlib.sha256((pictures / name).read_bytes()).hexdigest() for name in _images(pictures, "test")}
    assert not test & (train | captions)


def test_no_test_composition_occurs_in_training(pictures: Path) -> None:
    def compositions(split: str) -> set[tuple[str, ...]]:
        answers: dict[str, dict[str, str]] = {}
        for record in load_records(pictures / f"{split}.json"):
            if record["source"] == "noto-emoji":
                answers.setdefault(record["image"], {})[record["level"]] = record["conversations"][1]["value"]
        keys = ("identity", "colour", "count")
        return {tuple(found[key] for key in keys) for found in answers.values() if all(key in found for key in keys)}

    trained = {
        (thing, colour, number)
        for record in load_records(pictures / "captions.json")
        if record["source"] == "noto-emoji"
        for number, thing, colour in [record["conversations"][1]["value"].split()]
    }
    assert len(trained) == SMALL_TRAIN.emoji
    tested = compositions("test")
    assert tested and not tested & trained


def test_every_kind_is_there_in_the_number_asked_for(pictures: Path) -> None:
    for split, counts in (("train", SMALL_TRAIN), ("test", SMALL_TEST)):
        found = Counter(record["level"] for record in load_records(pictures / f"{split}.json"))
        assert found == counts.questions


def test_answers_are_spread_and_presence_is_balanced(pictures: Path) -> None:
    for split in ("train", "test"):
        answers: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        for record in load_records(pictures / f"{split}.json"):
            answers[record["level"]][record["conversations"][1]["value"]] += 1
        assert answers["presence"]["yes"] == answers["presence"]["no"]
        for kind, spread in answers.items():
            # Always giving the commonest answer must not be a way to pass. Of 20 draws from three shapes 13 are one in 100.
            assert spread.most_common(1)[0][1] <= 0.65 * spread.total(), (split, kind, spread)
        assert len(answers["identity"]) >= 12 and len(answers["digits"]) >= 7 and len(answers["count"]) == 4


def test_records_pass_the_checks_of_the_reader(pictures: Path) -> None:
    for split in ("train", "test", "captions"):
        samples = read_llava_json(pictures / f"{split}.json")
        assert len({sample.id for sample in samples}) == len(samples)
        assert all(len(sample.images) == 1 for sample in samples)
    assert {sample.kind for sample in read_llava_json(pictures / "test.json")} == set(KINDS)


def test_pictures_have_the_size_of_the_tower_input(pictures: Path) -> None:
    from PIL import Image

    for name in sorted(_images(pictures, "train"))[::20]:
        with Image.open(pictures / name) as image:
            assert image.size == (IMAGE_SIZE, IMAGE_SIZE) and image.mode == "RGB"


def test_asking_for_more_than_there_is_says_so(tmp_path: Path) -> None:
    none = PictureCounts(emoji=0, shapes=0, digits=0)
    with pytest.raises(ValueError, match=r"digits: 5000 .* there are"):
        make_pictures(tmp_path / "p", train=PictureCounts(emoji=0, shapes=0, digits=5000), test=none)
    assert not (tmp_path / "p").exists()


def test_sprites_carry_their_licence_and_fit_the_questions() -> None:
    assert len(list(SPRITES.glob("*.png"))) == 52
    assert "SIL OPEN FONT LICENSE Version 1.1" in (SPRITES / "OFL.txt").read_text(encoding="utf-8")
    assert not any("flag" in path.name for path in SPRITES.iterdir())
    assert json.dumps(TRAIN.questions)  # plain data: it goes into the marker file
