"""The model as lmms-eval runs it: batches of requests to answers, or to the loss of given answers.

Prompts, pictures and the instruction are prepared as in training, by the checkpoint's own processor. What was fed to the model
stands in the results: the exact prompt takes the place of ``input`` in the samples of ``--log_samples``, and ``record=FILE``
writes everything, versions first.

Written against lmms-eval 0.7 (EvolvingLMMs-Lab/lmms-eval: api/model.py, api/task.py and evaluator.py in lmms_eval).
Legend: B requests of a batch, I images of the tower, E sentence width, T tokens.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from loguru import logger
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from model.answering import answer_end_tokens, pixels_of
from model.cli.checkpoint import load_checkpoint
from model.data.images import open_image
from model.data.llava_json import IMAGE_PLACEHOLDER
from model.instruction import InstructionPolicy, embed_instructions, instruction_texts

#: What lmms-eval's own LLaVA generates at most where a task names no number (lmms_eval/models/simple/llava.py).
DEFAULT_MAX_NEW_TOKENS = 1024

#: Of a task's generation_kwargs, what generate() gets; ``until`` is read here, and what else there is has no meaning for this
#: model (``image_aspect_ratio`` is the checkpoint's).
_GENERATION_OPTIONS = ("temperature", "top_p", "top_k", "num_beams", "repetition_penalty", "length_penalty")
_SAMPLING_OPTIONS = ("temperature", "top_p", "top_k")


@dataclass(frozen=True)
class _Conversation:
    """What a request asks: messages with ``<image>`` in their text, and the pictures in the order of these."""

    messages: list[dict[str, str]]
    pictures: list[Image.Image]

    @property
    def user_turns(self) -> list[str]:
        return [message["content"] for message in self.messages if message["role"] == "user"]


@dataclass
class Likelihood(GenerationResult):
    """The mean loss of a given answer, and whether it is the greedy one, as a pair.

    lmms-eval 0.7 turns the plain pair that its interface asks for into a text (``unwrap_generation_output`` of
    lmms_eval/api/instance.py), which its own multiple choice then cannot read; what a GenerationResult holds it leaves alone.
    """

    text: Any = (0.0, False)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.text)


class _Igva(lmms):
    """What chat and simple tasks have in common.

    Args (``--model_args NAME=VALUE,...``):
        pretrained: folder of a finished training run, or a hub name.
        batch_size: requests at once; ``--batch_size`` sets it.
        device: ``cuda:0``, ``cpu`` ...; None: this process' GPU if there is one. ``--device`` sets it.
        dtype: ``float32``, ``bfloat16`` or ``float16`` for all weights; None: as they were saved.
        instruction_policy: which user turns stand for the instruction; None: the checkpoint's ``question_policy``.
        system_prompt: text, or a file that holds it, put before every conversation.
        honour_until: cut answers at the first of a task's ``until`` texts. lmms-eval's own LLaVA models do not, so that numbers
            compare only without; a task that names none has a blank line there.
        record: JSON Lines file for versions, chat template, policy and every prompt with its answer; of several processes, the
            others write beside it with their rank in the name.

    Raises:
        ValueError: an argument that is not one of these, or has no such value; or no checkpoint of this package.
        FileNotFoundError: no such folder.
    """

    def __init__(
        self,
        pretrained: str = "",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        instruction_policy: str | None = None,
        system_prompt: str | None = None,
        honour_until: bool = False,
        record: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        unknown.pop("max_batch_size", None)  # of --batch_size auto, which is refused below
        if unknown:
            raise ValueError(
                f"--model_args: unknown {', '.join(sorted(unknown))}; there are pretrained, batch_size, device, dtype, "
                "instruction_policy, system_prompt, honour_until and record"
            )
        if not pretrained:
            raise ValueError("--model_args pretrained=CHECKPOINT is missing: a finished run's folder, or a hub name")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"--batch_size must be a number of requests, 1 or more, got {batch_size!r}")
        if instruction_policy is not None and instruction_policy not in get_args(InstructionPolicy):
            raise ValueError(
                f"instruction_policy must be one of {', '.join(get_args(InstructionPolicy))}, got {instruction_policy!r}"
            )
        if torch.cuda.is_available() and device is None:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        checkpoint = load_checkpoint(str(pretrained))
        self._model, self._processor = checkpoint.model.to(device=device, dtype=_dtype(dtype)), checkpoint.processor
        self._pretrained = str(pretrained)
        self._policy: InstructionPolicy = instruction_policy or checkpoint.instruction_policy  # type: ignore[assignment]
        self._system_prompt = self._resolve_system_prompt(system_prompt) if system_prompt else None
        self._honour_until = honour_until
        self._stop = answer_end_tokens(self._model, self._processor)
        self.batch_size = int(batch_size)
        # Each with the prompt that it became; held until clean(), as the response cache computes its keys from the requests.
        self._prompts: list[tuple[Instance, str]] = []
        rank = int(os.environ.get("RANK", 0))
        self._record = None if record is None else _Record(_of_rank(Path(record), rank))
        provenance = self.provenance()
        if self._record is not None:
            self._record.start(provenance)
        logger.info("igva: {}", {name: value for name, value in provenance.items() if name != "chat_template"})

    @property
    def device(self) -> torch.device:
        """Where the model runs; the evaluator gathers counts there."""
        return self._model.device

    @property
    def chat_template(self) -> str:
        """Asked for by ``--apply_chat_template`` only.

        Raises:
            ValueError: always: prompts get the checkpoint's template here, and would get it twice.
        """
        raise ValueError("the checkpoint's chat template is always applied; leave out --apply_chat_template")

    def provenance(self) -> dict[str, Any]:
        """What answers depend on beside the prompts: versions, checkpoint, chat template, instruction policy, pictures."""
        versions = {name: _version(name) for name in ("igva-kernels", "lmms-eval", "transformers", "torch")}
        encoder = self._processor.sentence_encoder
        reads = self._model.reads_instruction and encoder is not None
        return {
            "checkpoint": self._pretrained,
            "versions": versions,
            "chat_template": self._processor._resolve_template(None),
            "system_prompt": self._system_prompt,
            "instruction_policy": self._policy if reads else None,
            "sentence_encoder": encoder.fingerprint if reads and encoder is not None else None,
            "fusion": dict(self._model.config.fusion),
            "aspect_ratio": self._processor.aspect_ratio,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "device": str(self._model.device),
            "attention": self._model.config.text_config._attn_implementation,
            "honour_until": self._honour_until,
        }

    def clean(self) -> None:
        """Called by the evaluator between the answers and the scores: puts the prompts into the requests, frees the model.

        The evaluator logs the first argument of a request as its ``input``.
        """
        for request, prompt in self._prompts:
            request.arguments = (prompt, *request.args[1:])
        self._prompts = []
        super().clean()

    # ---- answers -----------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """An answer to each request, in their order.

        Requests with the same generation_kwargs share batches, long contexts first.
        """
        results: list[GenerationResult | None] = [None] * len(requests)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="igva") as bar:
            for options, batch in self._batches(requests):
                conversations = [self._conversation(requests[index]) for index in batch]
                prompts, answers, counts = self._generate(conversations, options)
                for index, prompt, answer, count, asked in zip(batch, prompts, answers, counts, conversations, strict=True):
                    results[index] = GenerationResult(answer, count)
                    self._note(requests[index], prompt, asked, generation_kwargs=options, answer=answer)
                bar.update(len(batch))
        return [result for result in results if result is not None]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Raises NotImplementedError: tasks of several rounds are not offered."""
        raise NotImplementedError("the igva plug-in of lmms-eval runs no tasks of several rounds; choose a task of one")

    def _conversation(self, request: Instance) -> _Conversation:
        """What is asked, as the kind of model (chat or simple) has it in its requests."""
        raise NotImplementedError

    def _options_of(self, request: Instance) -> dict[str, Any]:
        """The generation options of a request, which the two kinds of model find in different places."""
        raise NotImplementedError

    def _batches(self, requests: Sequence[Instance]) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Generation options, and the places of at most ``batch_size`` requests that have them."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[json.dumps(self._options_of(request), sort_keys=True, default=str)].append(index)
        for group in groups.values():
            group.sort(key=lambda index: -len(str(requests[index].args[0])))
            for start in range(0, len(group), self.batch_size):
                yield self._options_of(requests[group[start]]), group[start : start + self.batch_size]

    @torch.inference_mode()
    def _generate(
        self, conversations: Sequence[_Conversation], options: Mapping[str, Any]
    ) -> tuple[list[str], list[str], list[TokenCounts]]:
        """Prompts as they were fed, answers, and how many tokens each has."""
        prompts = [self._rendered(conversation) for conversation in conversations]
        images, view_counts = self._images(conversations)
        expanded = self._processor.expand_image_tokens(prompts, view_counts)
        tokenizer = self._processor.tokenizer
        text = tokenizer(expanded, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
        text, length = text.to(self.device), text["input_ids"].shape[1]
        tokens = self._model.generate(
            input_ids=text["input_ids"],
            attention_mask=text["attention_mask"],
            **images,
            **_generation_arguments(options),
            eos_token_id=self._stop,
            pad_token_id=tokenizer.pad_token_id,
        )[:, length:]
        answers = [answer.strip() for answer in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        if self._honour_until:
            answers = [_cut(answer, options.get("until")) for answer in answers]
        # The token that ends an answer may be the one that pads: those up to the first of them count.
        ends = torch.isin(tokens, torch.tensor(self._stop, device=tokens.device)).cumsum(1)
        produced = ((ends == 0).sum(1) + (ends > 0).any(1)).tolist()
        read = text["attention_mask"].sum(1).tolist()
        return prompts, answers, [TokenCounts(one, other) for one, other in zip(read, produced, strict=True)]

    def _rendered(self, conversation: _Conversation) -> str:
        return self._processor.apply_chat_template(conversation.messages, add_generation_prompt=True)

    def _images(self, conversations: Sequence[_Conversation]) -> tuple[dict[str, Tensor], list[int]]:
        """``pixel_values`` (I, 3, H, W) and ``instruction_embeds`` (I, E) of a batch, and the images of each picture."""
        pixels = [[pixels_of(self._processor, picture) for picture in one.pictures] for one in conversations]
        view_counts = [len(picture) for of_one in pixels for picture in of_one]
        if not view_counts:
            return {}, []
        inputs = {
            "pixel_values": torch.cat([picture for of_one in pixels for picture in of_one]).to(self.device, self._model.dtype)
        }
        if self._model.reads_instruction and self._processor.sentence_encoder is not None:
            turns = [one.user_turns for one in conversations]
            embeds = embed_instructions(turns, self._processor.encode_instructions, self._policy)
            counts = torch.tensor([sum(map(len, of_one)) for of_one in pixels])
            inputs["instruction_embeds"] = embeds.repeat_interleave(counts, dim=0).to(self.device)
        return inputs, view_counts

    # ---- likelihoods -------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance]) -> list[Likelihood]:
        """For each request the mean loss of the given answer over its tokens, and whether it is the greedy one.

        The loss, in nats and lower for likelier answers, stands where the interface asks for a log-probability: lmms-eval's
        multiple choice takes the smallest (``ConfigurableTask.process_results``), and its own LLaVA models return this. The
        token that ends the answer counts, as in training.
        """
        results: list[Likelihood] = []
        with tqdm(total=len(requests), disable=self.rank != 0, desc="igva") as bar:
            for start in range(0, len(requests), self.batch_size):
                batch = requests[start : start + self.batch_size]
                asked = [self._conversation(request) for request in batch]
                answers = [self._given_answer(request).strip() for request in batch]
                found = self._losses(asked, answers)
                for request, conversation, answer, (loss, greedy) in zip(batch, asked, answers, found, strict=True):
                    self._note(request, self._rendered(conversation), conversation, given=answer, loss=loss, greedy=greedy)
                results += [Likelihood(pair) for pair in found]
                bar.update(len(batch))
        return results

    def _given_answer(self, request: Instance) -> str:
        given = request.args[1]
        return str(given(self._document(request)) if callable(given) else given)

    @torch.inference_mode()
    def _losses(self, conversations: Sequence[_Conversation], answers: Sequence[str]) -> list[tuple[float, bool]]:
        images, view_counts = self._images(conversations)
        left, rows = iter(view_counts), []
        for conversation, answer in zip(conversations, answers, strict=True):
            messages = [*conversation.messages, {"role": "assistant", "content": answer}]
            counts = [next(left) for _ in conversation.pictures]
            rows.append(self._processor.tokenize_conversation(messages, view_counts=counts))
        length, pad = max(len(row["input_ids"]) for row in rows), self._processor.tokenizer.pad_token_id
        input_ids = torch.full((len(rows), length), pad)
        spoken = torch.zeros(len(rows), length, dtype=torch.bool)
        attention_mask = torch.zeros_like(input_ids)
        for row, encoded in enumerate(rows):
            own = slice(length - len(encoded["input_ids"]), length)  # padded on the left
            input_ids[row, own] = torch.tensor(encoded["input_ids"])
            attention_mask[row, own] = 1
            # Several turns of the assistant may stand in the context: the last one is the answer.
            spoken[row, own] = _last_span(torch.tensor(encoded["assistant_masks"], dtype=torch.bool))
        # Logits from the position before the first answer on: those of the images would be most of the memory.
        first = int(spoken.any(0).nonzero()[0]) - 1
        logits = self._model(
            input_ids=input_ids.to(self.device),
            attention_mask=attention_mask.to(self.device),
            **images,
            logits_to_keep=length - first,
            use_cache=False,
        ).logits[:, :-1]
        targets, counted = input_ids[:, first + 1 :].to(self.device), spoken[:, first + 1 :].to(self.device)
        losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
        mean = (losses * counted).sum(1) / counted.sum(1)
        greedy = ((logits.argmax(-1) == targets) | ~counted).all(1)
        return list(zip(mean.tolist(), greedy.tolist(), strict=True))

    # ---- requests ----------------------------------------------------------------------------------------------------

    def _document(self, request: Instance) -> dict[str, Any]:
        *_, doc_id, task, split = request.args
        return self.task_dict[task][split][doc_id]

    def _with_system_prompt(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        if self._system_prompt is None:
            return messages
        others = [message for message in messages if message["role"] != "system"]
        return [{"role": "system", "content": self._system_prompt}, *others]

    def _note(self, request: Instance, prompt: str, conversation: _Conversation, **result: Any) -> None:
        self._prompts.append((request, prompt))
        if self._record is not None:
            self._record.add(
                {
                    "task": request.task_name,
                    "doc_id": request.doc_id,
                    "prompt": prompt,
                    "pictures": [list(picture.size) for picture in conversation.pictures],
                    "instruction": instruction_texts(conversation.user_turns, self._policy) if conversation.pictures else [],
                    **result,
                }
            )


class IgvaChat(_Igva):
    """For tasks that give messages: pictures stand where the task puts them. What ``--model igva`` runs."""

    is_simple = False

    def _conversation(self, request: Instance) -> _Conversation:
        _, to_messages, _, doc_id, task, split = request.args
        messages, pictures = [], []
        for message in to_messages(self.task_dict[task][split][doc_id]):
            parts = message["content"]
            parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
            found = [_picture(part.get("url"), task) for part in parts if part["type"] != "text"]
            text = "".join(part["text"] if part["type"] == "text" else f"{IMAGE_PLACEHOLDER}\n" for part in parts)
            if len(found) and text.count(IMAGE_PLACEHOLDER) == 2 * len(found):
                # The task's own text says where the pictures stand.
                text = "".join(part["text"] for part in parts if part["type"] == "text")
            _check_placeholders(text, found, task, doc_id)
            messages.append({"role": message["role"], "content": text})
            pictures += found
        return _Conversation(self._with_system_prompt(messages), pictures)

    def _options_of(self, request: Instance) -> dict[str, Any]:
        return request.args[2]


class IgvaSimple(_Igva):
    """For tasks that give a context and pictures apart: ``--force_simple``, and all tasks of likelihoods (multiple choice)."""

    is_simple = True

    def _conversation(self, request: Instance) -> _Conversation:
        context, pictures = str(request.args[0]), []
        if len(request.args) > 2:  # the unconditional likelihood of mutual information has text alone
            to_visual, doc_id, task = request.args[2:5]
            visuals = to_visual(self._document(request)) if callable(to_visual) else None
            pictures = [_picture(visual, task) for visual in visuals or []]
            if IMAGE_PLACEHOLDER not in context:
                context = f"{IMAGE_PLACEHOLDER}\n" * len(pictures) + context
            _check_placeholders(context, pictures, task, doc_id)
        return _Conversation(self._with_system_prompt([{"role": "user", "content": context}]), pictures)

    def _options_of(self, request: Instance) -> dict[str, Any]:
        return request.args[1]


class _Record:
    """A JSON Lines file: what the model is, then a line a request.

    Args:
        path: replaced.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def start(self, provenance: Mapping[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(self._line({"event": "model", **provenance}), encoding="utf-8")

    def add(self, entry: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(self._line({"event": "request", **entry}))

    def _line(self, entry: Mapping[str, Any]) -> str:
        return json.dumps(entry, ensure_ascii=False, default=str) + "\n"


def _generation_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """A task's generation_kwargs as arguments of generate(): greedy unless a temperature above 0 is asked for."""
    asked = {name: options[name] for name in _GENERATION_OPTIONS if options.get(name) is not None}
    samples = float(asked.get("temperature", 0)) > 0 and options.get("do_sample", True)
    if not samples:
        asked = {name: value for name, value in asked.items() if name not in _SAMPLING_OPTIONS}
    max_new_tokens = int(options.get("max_new_tokens") or DEFAULT_MAX_NEW_TOKENS)
    return {**asked, "do_sample": bool(samples), "max_new_tokens": max_new_tokens}


def _cut(answer: str, until: str | Sequence[str] | None) -> str:
    """The answer up to the first of some texts."""
    for end in [until] if isinstance(until, str) else until or []:
        answer = answer.partition(end)[0] if end else answer
    return answer.strip()


def _last_span(spoken: Tensor) -> Tensor:
    """(T,) bool: of the runs of True the last."""
    end = int(spoken.nonzero()[-1]) + 1
    before = (~spoken[:end]).nonzero()
    start = int(before[-1]) + 1 if len(before) else 0
    span = torch.zeros_like(spoken)
    span[start:end] = True
    return span


def _picture(visual: Any, task: str) -> Image.Image:
    """A picture of a document in RGB: a picture of Pillow, or the path of a file."""
    if isinstance(visual, Image.Image):
        return visual.convert("RGB")
    if isinstance(visual, str) and Path(visual).suffix.lower() in Image.registered_extensions():
        return open_image(visual)
    shown = f"{type(visual).__name__} {str(visual)[:60]!r}"
    raise ValueError(f"task {task} shows {shown}; this model takes pictures, no video and no audio")


def _check_placeholders(text: str, pictures: Sequence[Image.Image], task: str, doc_id: Any) -> None:
    found = text.count(IMAGE_PLACEHOLDER)
    if found != len(pictures):
        raise ValueError(
            f"document {doc_id} of task {task} has {len(pictures)} pictures, but its text {found} {IMAGE_PLACEHOLDER}; "
            "each picture needs one, or none may stand there"
        )


def _dtype(name: str | None) -> torch.dtype | None:
    dtypes: dict[str | None, torch.dtype | None] = {
        None: None,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if name not in dtypes:
        raise ValueError(f"dtype must be one of float32, bfloat16 and float16, got {name!r}")
    return dtypes[name]


def _of_rank(path: Path, rank: int) -> Path:
    return path if rank == 0 else path.with_name(f"{path.stem}-rank{rank}{path.suffix}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
