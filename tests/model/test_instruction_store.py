"""The file of instruction embeddings: one file, resumable, read through its map, refused where its vectors would be wrong."""

from __future__ import annotations

import json
import os
import pickle
import signal

import pytest
import torch
from safetensors import safe_open

from model.instruction import embed_instructions
from model.instruction_store import InstructionStore, fill, instruction_key

CONVERSATIONS = [[f"<image>\nWhat is number {number}?", "Why?"] for number in range(10)] + [["Why?"]]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "instructions.safetensors"


def opened(path, encoder, policy="mean_of_turns"):
    return InstructionStore(path, fingerprint=encoder.fingerprint, policy=policy)


@pytest.mark.parametrize("policy", ["mean_of_turns", "first_turn", "last_turn"])
def test_vectors_are_those_of_the_encoder(policy, path, tiny_encoder, make_encoder):
    report = fill(path, CONVERSATIONS, tiny_encoder, policy, chunk_size=3)
    expected = embed_instructions(CONVERSATIONS, make_encoder().encode, policy)
    store = opened(path, tiny_encoder, policy)
    torch.testing.assert_close(store.embed(CONVERSATIONS), expected, atol=1e-7, rtol=0)
    assert torch.equal(store.embed(CONVERSATIONS[::-1]), store.embed(CONVERSATIONS).flip(0))
    assert report.asked == report.encoded == report.rows == len(store) == {"last_turn": 1}.get(policy, 11)
    assert store.embed([]).shape == (0, tiny_encoder.dimension)


def test_it_is_one_plain_safetensors_file(path, tiny_encoder):
    fill(path, CONVERSATIONS, tiny_encoder)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with safe_open(str(path), framework="pt") as file:
        keys, embeds = file.get_tensor("keys"), file.get_tensor("embeds")
        assert file.metadata()["encoder"] == tiny_encoder.fingerprint
        assert file.metadata()["policy"] == "mean_of_turns"
    assert keys.shape == (11, 32) and keys.dtype == torch.uint8 and embeds.shape == (11, 16) and embeds.dtype == torch.float32
    assert [bytes(key.tolist()) for key in keys] == sorted(bytes(key.tolist()) for key in keys)


def test_what_is_there_is_not_encoded_again(path, tiny_encoder, make_encoder):
    fill(path, CONVERSATIONS[:6], tiny_encoder)
    later = make_encoder()
    report = fill(path, CONVERSATIONS, later)
    assert (report.asked, report.encoded, report.rows) == (11, 5, 11)
    assert later.num_encoded == 5  # four numbers, and "Why?" once for all of the chunk
    once = make_encoder()
    fill(path.with_name("once"), CONVERSATIONS, once)
    assert path.read_bytes() == path.with_name("once").read_bytes()
    before = path.stat().st_mtime_ns
    assert fill(path, CONVERSATIONS[:3], make_encoder()).encoded == 0
    assert path.stat().st_mtime_ns == before


def test_half_precision_takes_half_the_space(path, tiny_encoder):
    fill(path, CONVERSATIONS, tiny_encoder, dtype="float16")
    fill(path, [*CONVERSATIONS, ["One more?"]], tiny_encoder)  # the file keeps its own
    store = opened(path, tiny_encoder)
    vectors = store.embed([["One more?"]])
    assert vectors.dtype == torch.float32
    assert torch.equal(vectors, tiny_encoder.encode(["One more?"]).half().float())
    assert path.stat().st_size < 12 * (32 + 2 * 16) + 600


# ---- killed ---------------------------------------------------------------------------------------------------------------


class StoppedError(Exception):
    pass


def stopping(encoder, after):
    """The encoder, which fails at its call number ``after``."""
    encode, calls = encoder.encode, iter(range(after))

    def limited(sentences):
        if next(calls, None) is None:
            raise StoppedError
        return encode(sentences)

    encoder.encode = limited
    return encoder


def test_a_stopped_command_goes_on_where_it_stopped(path, make_encoder):
    with pytest.raises(StoppedError):
        fill(path, CONVERSATIONS, stopping(make_encoder(), 2), chunk_size=4)
    assert not path.exists()
    later = make_encoder()
    assert fill(path, CONVERSATIONS, later, chunk_size=4).encoded == 3
    assert later.num_encoded == 3  # two numbers and "Why?"
    fill(path.with_name("once"), CONVERSATIONS, make_encoder())
    assert path.read_bytes() == path.with_name("once").read_bytes()


@pytest.mark.parametrize("chunks", [0, 1, 2])
def test_kill_9_costs_one_chunk_at_most(chunks, path, make_encoder):
    child = os.fork()
    if child == 0:
        encoder = make_encoder()
        encode, calls = encoder.encode, iter(range(chunks))
        encoder.encode = lambda texts: encode(texts) if next(calls, None) is not None else os.kill(os.getpid(), signal.SIGKILL)
        fill(path, CONVERSATIONS, encoder, chunk_size=4)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not path.exists()
    assert fill(path, CONVERSATIONS, make_encoder()).encoded == 11 - 4 * chunks
    fill(path.with_name("once"), CONVERSATIONS, make_encoder())
    assert path.read_bytes() == path.with_name("once").read_bytes()


@pytest.mark.parametrize("damage", ["half a row", "a row of zeros", "a flipped bit"])
def test_what_was_half_written_is_done_again(damage, path, make_encoder):
    with pytest.raises(StoppedError):
        fill(path, CONVERSATIONS, stopping(make_encoder(), 2), chunk_size=4)
    journal = path.with_name(path.name + ".partial")
    content = bytearray(journal.read_bytes())
    row = 32 + 4 * 16 + 4
    if damage == "half a row":
        content += b"\x01" * (row // 2)
    elif damage == "a row of zeros":
        content += bytes(row)
        content[-1] = 1
    else:
        content[-row // 2] ^= 1
    journal.write_bytes(content)
    fill(path, CONVERSATIONS, make_encoder())
    fill(path.with_name("once"), CONVERSATIONS, make_encoder())
    assert path.read_bytes() == path.with_name("once").read_bytes()


def test_a_full_disk_at_the_end_costs_nothing(path, tiny_encoder, make_encoder, monkeypatch):
    fill(path, CONVERSATIONS[:2], tiny_encoder)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("model.instruction_store.os.replace", full)
        with pytest.raises(OSError, match="no space"):
            fill(path, CONVERSATIONS, tiny_encoder)
    assert path.read_bytes() == before
    assert {file.name for file in path.parent.iterdir()} == {path.name, path.name + ".partial"}
    later = make_encoder()
    assert fill(path, CONVERSATIONS, later).encoded == later.num_encoded == 0
    assert len(opened(path, later)) == 11


def test_two_commands_on_one_file_are_refused(path, tiny_encoder, make_encoder):
    def second(sentences):
        with pytest.raises(BlockingIOError, match="another process is filling"):
            fill(path, CONVERSATIONS, make_encoder())
        return make_encoder().encode(sentences)

    tiny_encoder.encode = second
    assert fill(path, CONVERSATIONS, tiny_encoder).rows == 11


# ---- refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unfinished", [False, True])
@pytest.mark.parametrize(
    ("salt", "policy", "message"),
    [
        ("other", "mean_of_turns", "vectors of the sentence encoder"),
        ("", "last_turn", "made with the instruction policy mean_of"),
    ],
)
def test_another_encoder_or_policy_is_refused_with_the_reason(salt, policy, message, unfinished, path, make_encoder):
    if unfinished:
        with pytest.raises(StoppedError):
            fill(path, CONVERSATIONS, stopping(make_encoder(), 1), chunk_size=4)
    else:
        fill(path, CONVERSATIONS, make_encoder())
        with pytest.raises(ValueError, match=message):
            opened(path, make_encoder(salt), policy)
    with pytest.raises(ValueError, match=message):
        fill(path, CONVERSATIONS, make_encoder(salt), policy)


def test_a_missing_instruction_is_quoted(path, tiny_encoder):
    fill(path, CONVERSATIONS, tiny_encoder)
    with pytest.raises(ValueError, match=r"holds no vector of the instruction 'Who\?'.*igva embed"):
        opened(path, tiny_encoder).embed([["<image>\nWho?"]])


@pytest.mark.parametrize("content", [b"", b"not a file of vectors", b"\xff" * 64])
def test_another_file_is_refused(content, path, tiny_encoder):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=path.name):
        opened(path, tiny_encoder)


def test_a_cut_file_and_a_stranger_s_file_are_refused(path, tiny_encoder):
    fill(path, CONVERSATIONS, tiny_encoder)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="no intact file"):
        opened(path, tiny_encoder)
    from safetensors.torch import save_file

    save_file({"keys": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no file of instruction embeddings"):
        opened(path, tiny_encoder)
    with pytest.raises(FileNotFoundError, match="igva embed"):
        opened(path.with_name("none"), tiny_encoder)


def test_keys_tell_lists_of_texts_apart():
    assert instruction_key(["ab", "c"]) != instruction_key(["a", "bc"])
    assert instruction_key(["a"]) == instruction_key(["a"]) and len(instruction_key([])) == 32


def test_it_goes_to_worker_processes_by_name(path, tiny_encoder):
    fill(path, CONVERSATIONS, tiny_encoder)
    store = opened(path, tiny_encoder)
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    assert torch.equal(pickle.loads(pickled).embed(CONVERSATIONS), store.embed(CONVERSATIONS))


def test_data_without_images_give_an_empty_file(path, tiny_encoder):
    assert fill(path, [], tiny_encoder).rows == 0
    assert len(opened(path, tiny_encoder)) == 0
    assert json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])["embeds"]["shape"] == [0, 16]
