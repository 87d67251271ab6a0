"""The plug-in in lmms-eval's own registry, evaluator and command, on local tasks with a tiny model (make test-lmms-eval)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image

from model import build_model, build_processor
from model.answering import Conversation
from model.cli.checkpoint import load_checkpoint
from model.data.llava_json import IMAGE_PLACEHOLDER
from model.instruction import SentenceEncoder
from model.published import read_lmms_eval

if importlib.util.find_spec("lmms_eval") is None:
    pytest.skip("lmms-eval is not installed (make test-lmms-eval installs it and runs this)", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220)}

# What a task's folder holds beside its data: lmms-eval reads the functions from it.
UTILS = """
from PIL import Image


def pictures(doc):
    return [Image.open(name) for name in doc["pictures"]]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"] + "\\nAnswer the question using a single word or phrase."


def scores(doc, results):
    return {"exact_match": float(results[0] == doc["answer"])}
"""

GENERATION = """
task: colour_questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: !function utils.question
doc_to_target: answer
process_results: !function utils.scores
generation_kwargs: {{max_new_tokens: 5, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""

CHOICE = """
task: colours_by_likelihood
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function utils.pictures
doc_to_text: !function utils.question
doc_to_choice: [red, green, blue]
doc_to_target: choice
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def checkpoint(part_folders, encoder_folder, tmp_path_factory):
    """IGVA with two groups, in stage 2, as a run saves it."""
    torch.manual_seed(0)
    fusion = {"type": "igva", "num_groups": 2, "text_dim": 16, "hidden_dim": 32, "num_blocks": 1}
    built = build_model(part_folders["clip"], part_folders["llama"], fusion=fusion)
    folder = tmp_path_factory.mktemp("checkpoint")
    built.save_pretrained(folder)
    encoder = SentenceEncoder(encoder_folder)
    build_processor(part_folders["clip"], part_folders["llama"], built.config, sentence_encoder=encoder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def said(checkpoint):
    """``said(pictures, question)``: what the model answers, by the way of `igva ask`."""
    loaded = load_checkpoint(str(checkpoint))

    def ask(pictures, question):
        conversation = Conversation(loaded.model, loaded.processor)
        for picture in pictures:
            conversation.show(Image.open(picture).convert("RGB"))
        return conversation.ask(question + "\nAnswer the question using a single word or phrase.", max_new_tokens=5)[0]

    return ask


@pytest.fixture(scope="module")
def task_folder(said, tmp_path_factory):
    """Two tasks of five documents, one with two pictures, one without any; every other reference is what the model says."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 20), colour).save(folder / f"{name}.png")
    shown = [["red"], ["green", "blue"], ["blue"], [], ["red", "red"]]
    documents = []
    for number, names in enumerate(shown):
        pictures = [str(folder / f"{name}.png") for name in names]
        question = f"{'Which colour' * (number + 1)} is it?"
        answer = said(pictures, question) if number % 2 == 0 else "something else"
        documents.append({"question": question, "pictures": pictures, "answer": answer, "choice": number % 3})
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    (folder / "utils.py").write_text(UTILS, encoding="utf-8")
    (folder / "questions.yaml").write_text(GENERATION.format(data=data), encoding="utf-8")
    (folder / "choice.yaml").write_text(CHOICE.format(data=data), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(checkpoint, task_folder, tmp_path_factory):
    """``run(task, **model_args)``: the results of lmms-eval's evaluator."""
    cache = tmp_path_factory.mktemp("cache")
    os.environ["LMMS_EVAL_DATASETS_CACHE"], os.environ["HF_HUB_OFFLINE"] = str(cache), "1"
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task_folder), include_defaults=False, model_name="igva")

    def evaluate(task, batch_size=2, force_simple=False, **model_args):
        arguments = ",".join(f"{name}={value}" for name, value in {"pretrained": checkpoint, **model_args}.items())
        return simple_evaluate(
            model="igva",
            model_args=arguments,
            tasks=[task],
            task_manager=manager,
            batch_size=batch_size,
            device="cpu",
            force_simple=force_simple,
            bootstrap_iters=0,
        )

    return evaluate


def answers_of(results, task="colour_questions"):
    return [sample["filtered_resps"][0] for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"])]


def prompts_of(results, task="colour_questions"):
    return [sample["arguments"][0] for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"])]


def records_of(file):
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def test_the_entry_point_makes_the_model_known():
    from lmms_eval.models import get_model

    from model.lmms_eval_model import IgvaChat, IgvaSimple

    (entry,) = (entry for entry in importlib.metadata.entry_points(group="lmms_eval.models") if entry.name == "igva")
    assert entry.value == "model.lmms_eval_plugin:manifest"
    assert get_model("igva") is get_model("igva_llava") is IgvaChat
    assert get_model("igva", force_simple=True) is IgvaSimple


def test_importing_the_model_imports_no_lmms_eval():
    code = "import sys, model, model.lmms_eval_plugin; sys.exit('lmms_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_evaluator_scores_what_the_model_says(run):
    """Three of five references are what `igva ask` says, with one picture and with two."""
    results = run("colour_questions", batch_size=2)
    assert results["results"]["colour_questions"]["exact_match,none"] == pytest.approx(0.6)


def test_a_batch_gives_the_answers_of_single_runs_in_the_order_of_the_documents(run):
    single, batched = run("colour_questions", batch_size=1), run("colour_questions", batch_size=5)
    simple = run("colour_questions", batch_size=3, force_simple=True)
    assert answers_of(single) == answers_of(batched) == answers_of(simple)
    assert len(set(answers_of(single))) > 1
    assert prompts_of(single) == prompts_of(batched) == prompts_of(simple)


def test_what_was_fed_stands_in_the_results(run, checkpoint, tmp_path):
    record = tmp_path / "records" / "prompts.jsonl"
    results = run("colour_questions", record=record)
    header, *requests = records_of(record)
    assert header["event"] == "model" and header["checkpoint"] == str(checkpoint)
    assert header["versions"]["transformers"] == transformers.__version__
    assert header["versions"]["torch"] == importlib.metadata.version("torch")
    assert header["versions"]["igva-kernels"] and header["versions"]["lmms-eval"]
    assert "generation" in header["chat_template"] and header["instruction_policy"] == "last_turn"
    by_document = {request["doc_id"]: request for request in requests}
    assert sorted(by_document) == [0, 1, 2, 3, 4]
    two = by_document[1]
    assert two["prompt"].count(IMAGE_PLACEHOLDER) == 2 and two["pictures"] == [[40, 20], [40, 20]]
    assert two["prompt"].index(IMAGE_PLACEHOLDER) < two["prompt"].index("Which colour")
    assert two["instruction"] == ["Which colourWhich colour is it?"]  # without the answer's format
    assert two["prompt"].endswith("<|im_start|>assistant\n") or two["prompt"].endswith("ASSISTANT:")
    assert by_document[3]["prompt"].count(IMAGE_PLACEHOLDER) == 0 and by_document[3]["instruction"] == []
    assert prompts_of(results) == [by_document[number]["prompt"] for number in range(5)]
    assert answers_of(results) == [by_document[number]["answer"] for number in range(5)]


def test_the_policy_and_the_system_prompt_are_the_user_s(run, tmp_path):
    system = tmp_path / "system.txt"
    system.write_text("Be brief.", encoding="utf-8")
    run("colour_questions", record=tmp_path / "a.jsonl", system_prompt=system, instruction_policy="first_turn")
    header, first, *_ = records_of(tmp_path / "a.jsonl")
    assert header["instruction_policy"] == "first_turn" and header["system_prompt"] == "Be brief."
    assert "Be brief." in first["prompt"]


def test_likelihoods_are_the_model_s_losses_and_the_smallest_is_chosen(run, checkpoint, task_folder):
    loaded = load_checkpoint(str(checkpoint))
    model, processor = loaded.model, loaded.processor
    results = run("colours_by_likelihood", batch_size=4, force_simple=True)
    samples = sorted(results["samples"]["colours_by_likelihood"], key=lambda sample: sample["doc_id"])
    document = json.loads((task_folder / "documents.jsonl").read_text().splitlines()[1])
    question = document["question"] + "\nAnswer the question using a single word or phrase."
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*({"type": "image", "image": Image.open(name)} for name in document["pictures"]),
                                      {"type": "text", "text": question}]}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    found = [loss for loss, _ in samples[1]["filtered_resps"]]
    for choice, loss in zip(("red", "green", "blue"), found, strict=True):
        asked = {"role": "user", "content": f"{IMAGE_PLACEHOLDER}\n" * 2 + question}
        encoded = processor.tokenize_conversation([asked, {"role": "assistant", "content": choice}])
        ids = torch.tensor([encoded["input_ids"]])
        labels = ids.masked_fill(~torch.tensor([encoded["assistant_masks"]], dtype=torch.bool), -100)
        with torch.no_grad():
            expected = model(
                input_ids=ids,
                pixel_values=inputs["pixel_values"],
                instruction_embeds=inputs["instruction_embeds"],
                labels=labels,
            ).loss
        assert loss == pytest.approx(expected.item(), rel=1e-4)
    chosen = [min(range(3), key=lambda index: sample["filtered_resps"][index][0]) for sample in samples]
    right = [chosen[number] == number % 3 for number in range(5)]
    assert results["results"]["colours_by_likelihood"]["acc,none"] == pytest.approx(sum(right) / 5)


@pytest.fixture(scope="module")
def simple(checkpoint):
    from model.lmms_eval_model import IgvaSimple

    return IgvaSimple(pretrained=str(checkpoint), batch_size=3, device="cpu")


def request_of(arguments, kind="generate_until"):
    from lmms_eval.api.instance import Instance

    metadata = {"task": "mine", "doc_id": 0, "repeats": 1}
    return Instance(request_type=kind, arguments=arguments, idx=0, metadata=metadata)


def test_requests_are_grouped_by_their_settings(simple):
    """Interleaved settings: each answer is that of a run of its own."""
    simple.task_dict = {"mine": {"test": [{}]}}
    requests = [
        request_of((f"Say {number}.", {"max_new_tokens": 2 + 4 * (number % 2)}, lambda doc: [], 0, "mine", "test"))
        for number in range(6)
    ]
    together = [result.text for result in simple.generate_until(requests)]
    assert together == [simple.generate_until([request])[0].text for request in requests]
    counts = [result.token_counts.output_tokens for result in simple.generate_until(requests)]
    assert all(count <= 2 + 4 * (number % 2) for number, count in enumerate(counts)) and max(counts) > 2


class Knowing:
    """A model that is sure of every next token, or of none."""

    device, dtype, reads_instruction = torch.device("cpu"), torch.float32, False

    def __init__(self, sureness):
        self.sureness = sureness

    def __call__(self, input_ids, logits_to_keep, **options):
        following = input_ids.roll(-1, dims=1)[:, -logits_to_keep:]
        return SimpleNamespace(logits=self.sureness * torch.nn.functional.one_hot(following, 300).float())


@pytest.mark.parametrize(("sureness", "expected"), [(30.0, (0.0, True)), (0.0, (math.log(300), False))])
def test_a_greedy_answer_is_known_as_greedy(sureness, expected, simple, monkeypatch):
    """In a batch of answers of different lengths."""
    monkeypatch.setattr(simple, "_model", Knowing(sureness))
    requests = [request_of((f"What, {number}?", " x" * (3 * number + 1)), "loglikelihood") for number in range(3)]
    for loss, greedy in simple.loglikelihood(requests):
        assert (loss, greedy) == (pytest.approx(expected[0], abs=1e-6), expected[1])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_new_tokens": 3, "temperature": 0, "do_sample": True}, {"do_sample": False, "max_new_tokens": 3}),
        ({"temperature": 0.7, "top_p": 0.9}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 1024}),
        ({"temperature": 0.7, "do_sample": False}, {"do_sample": False, "max_new_tokens": 1024}),
        (
            {"num_beams": 2, "until": ["x"], "image_aspect_ratio": "x"},
            {"do_sample": False, "num_beams": 2, "max_new_tokens": 1024},
        ),
    ],
)
def test_settings_of_tasks_become_those_of_generate(options, expected):
    from model.lmms_eval_model import _generation_arguments

    assert _generation_arguments(options) == expected


def test_answers_are_cut_where_that_is_asked_for():
    from model.lmms_eval_model import _cut

    assert _cut("a b\n\nc", ["\n\n"]) == "a b"
    assert _cut("a b", ["", "b"]) == "a"
    assert _cut("a b", None) == "a b"


@pytest.mark.parametrize(
    ("visuals", "context", "message"),
    [
        (["film.mp4"], "What?", "takes pictures, no video"),
        ([], f"{IMAGE_PLACEHOLDER} What?", "has 0 pictures, but its text 1"),
    ],
)
def test_documents_that_the_model_cannot_take(simple, visuals, context, message):
    simple.task_dict = {"mine": {"test": [{}]}}
    with pytest.raises(ValueError, match=message):
        simple.generate_until([request_of((context, {}, lambda doc: visuals, 0, "mine", "test"))])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pretrained=CHECKPOINT is missing"),
        ({"pretrained": "x", "modell": 1}, "unknown modell"),
        ({"pretrained": "x", "batch_size": "auto"}, "--batch_size must be a number"),
        ({"pretrained": "x", "instruction_policy": "best"}, "instruction_policy must be one of"),
        ({"pretrained": "nowhere/at/all"}, "no checkpoint at nowhere"),
    ],
)
def test_arguments_that_make_no_sense_are_named(arguments, message):
    from model.lmms_eval_model import IgvaChat

    with pytest.raises((ValueError, FileNotFoundError), match=message):
        IgvaChat(**arguments)


def test_the_commands_of_the_page_are_taken(monkeypatch):
    """By lmms-eval's own parser, and its tasks are there."""
    from lmms_eval.__main__ import parse_eval_args
    from lmms_eval.tasks import TaskManager

    page = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in re.findall(r"^lmms-eval .*$", page, flags=re.MULTILINE)]
    assert len(commands) == 11
    tasks = set()
    for command in commands:
        monkeypatch.setattr(sys, "argv", command)
        _, arguments = parse_eval_args()
        assert arguments.model == "igva" and arguments.model_args.startswith("pretrained=CHECKPOINT")
        tasks |= set(arguments.tasks.split(","))
    assert tasks <= set(TaskManager().all_tasks)


def test_the_command(checkpoint, task_folder, tmp_path):
    """As a user types it; the samples hold the prompts."""
    command = [
        *(sys.executable, "-m", "lmms_eval", "--model", "igva", "--tasks", "colour_questions"),
        *(
            "--include_path",
            str(task_folder),
            "--model_args",
            f"pretrained={checkpoint},record={tmp_path / 'prompts.jsonl'}",
            "--batch_size",
            "2",
        ),
        *("--output_path", str(tmp_path / "logs"), "--log_samples", "--device", "cpu"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "LMMS_EVAL_DATASETS_CACHE": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    found = list((tmp_path / "logs").rglob("*_results.json"))
    assert len(found) == 1, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads(found[0].read_text(encoding="utf-8"))
    assert results["results"]["colour_questions"]["exact_match,none"] == pytest.approx(0.6)
    # Under the name of a published benchmark they have a place beside it.
    found[0].write_text(json.dumps({"results": {"gqa": results["results"]["colour_questions"]}}), encoding="utf-8")
    assert read_lmms_eval(found) == {"GQA": pytest.approx(60.0)}
    (samples,) = (tmp_path / "logs").rglob("*_samples_colour_questions.jsonl")
    fed = {request["prompt"] for request in records_of(tmp_path / "prompts.jsonl")[1:]}
    assert {sample["input"] for sample in records_of(samples)} == fed and len(fed) == 5
