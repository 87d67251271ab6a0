"""The processor: pictures, text and instructions to the inputs of the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images

from model._hf_compat import load_image_processor
from model.data.images import ANYRES_GRIDS, views
from model.image_tokens import ImageTokens
from model.instruction import Encoder, InstructionPolicy, SentenceEncoder, embed_instructions
from model.spans import tokenize_with_spans

_ENCODER_FOLDER = "sentence_encoder"
_ENCODER_INTERFACE = ("encode", "dimension", "fingerprint", "save")


class IgvaLlavaProcessor(ProcessorMixin):
    """Image processor, tokenizer and, if wished, the sentence encoder, as one thing that is saved with the model.

    ``<image>`` in a text is expanded to as many placeholders as the picture has tokens.

    Args:
        image_processor: makes ``pixel_values`` (images, 3, height, width).
        tokenizer: knows ``image_token``.
        chat_template: one Jinja template, or several by name with ``"default"`` among them.
        image_token: the placeholder of a picture.
        patch_size: of the tower, in pixels.
        token_pooling, token_reduction, pooled_layers, strip: of the model, see :class:`model.image_tokens.ImageTokens`.
        aspect_ratio: how pictures were brought to the tower's square in training, see :func:`model.data.images.views`.
        anyres_grids: rows and columns that ``anyres`` may cut a picture into.
        instruction_policy: which turns stood for the instruction in training, see
            :func:`model.instruction.instruction_texts`.
        question_policy: which turns stand for it when the model is asked; ``"last_turn"`` is the question at hand, as in the
            released IGVA code (docs/use.md).
        sentence_encoder_fingerprint: of the encoder that was saved beside the processor; set by :meth:`save_pretrained`.

    Raises:
        ValueError: the tokenizer does not know ``image_token`` as one token.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | dict[str, str] | None = None,
        image_token: str = "<image>",
        patch_size: int = 14,
        token_pooling: int | None = None,
        token_reduction: int | None = None,
        pooled_layers: int = 0,
        strip: int = 8,
        aspect_ratio: str = "pad",
        anyres_grids: Sequence[Sequence[int]] = ANYRES_GRIDS,
        instruction_policy: InstructionPolicy = "mean_of_turns",
        question_policy: InstructionPolicy = "last_turn",
        sentence_encoder_fingerprint: str | None = None,
    ) -> None:
        self.image_token = image_token
        self.aspect_ratio = aspect_ratio
        self.anyres_grids = [list(grid) for grid in anyres_grids]
        self.instruction_policy: InstructionPolicy = instruction_policy
        self.question_policy: InstructionPolicy = question_policy
        self.sentence_encoder_fingerprint = sentence_encoder_fingerprint
        self.patch_size = patch_size
        self.token_pooling = token_pooling
        self.token_reduction = token_reduction
        self.pooled_layers, self.strip = pooled_layers, strip
        self._sentence_encoder: Encoder | None = None
        ids = tokenizer.encode(image_token, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(
                f"the tokenizer splits {image_token!r} into {len(ids)} tokens; add it as a special token first "
                "(model.build.build_processor does)"
            )
        self.image_token_id = ids[0]
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    # ---- pictures and text ------------------------------------------------------------------------------------------

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: None = None,
        audio: None = None,
        *,
        instruction: str | Sequence[str | Sequence[str]] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs.

        Args:
            images: pictures, paths or addresses in the order of their ``<image>``, over all texts. Each is brought to the
                images of the tower as in training, see :attr:`aspect_ratio`; with ``anyres`` a picture becomes several.
            text: one prompt or several; ``apply_chat_template`` makes them.
            videos, audio: not taken; named because ``apply_chat_template`` of transformers passes them.
            instruction: what the user asks about the pictures: one sentence for all, or for each picture one, or the user's
                turns of its conversation, which :attr:`question_policy` makes one of. They are embedded by
                :attr:`sentence_encoder`. None: the model gives all layer groups the same weight; ``apply_chat_template`` knows
                the turns, and passes them.
            kwargs: as for any processor of transformers (``padding``, ``return_tensors`` ...); padding goes to the left unless
                ``padding_side`` says otherwise.

        Returns:
            ``input_ids``, ``attention_mask``, ``pixel_values`` (images of the tower, 3, height, width), and
            ``instruction_embeds`` (images of the tower, E) where ``instruction`` is given.

        Raises:
            ValueError: numbers of pictures, placeholders and instructions that do not fit, or no sentence encoder.
        """
        if videos is not None or audio is not None:
            raise ValueError("this model takes images and text, no videos and no audio")
        counts: list[int] = []
        text = [text] if isinstance(text, str) else text
        if images is not None:
            images = self.image_processor.fetch_images(images)
            self.validate_inputs(images=images, text=text)
            shown = [self.views(picture) for picture in self._pictures(images)]
            counts, images = [len(of_picture) for of_picture in shown], [view for of_picture in shown for view in of_picture]
        if counts and text is not None:
            text = self._repeat_placeholders(text, counts)
        if text is not None and "padding_side" not in (kwargs.get("text_kwargs") or {}):
            # generate() goes on at the end of each row.
            kwargs.setdefault("padding_side", "left")
        features = super().__call__(images=images, text=text, **kwargs)
        if instruction is not None:
            turns = [instruction] * len(counts) if isinstance(instruction, str) else list(instruction)
            if not counts or len(turns) != len(counts):
                raise ValueError(
                    f"instruction holds {len(turns)} sentences for {len(counts)} images; pass one sentence, or one per image"
                )
            embeds = self._embed_turns([[turn] if isinstance(turn, str) else turn for turn in turns])
            embeds = embeds.repeat_interleave(torch.tensor(counts), dim=0)
            features["instruction_embeds"] = embeds if kwargs.get("return_tensors") == "pt" else embeds.numpy()
        return features

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. Where it makes model inputs (``tokenize=True, return_dict=True``), the instruction of each
        picture is taken from the user's turns of its conversation under :attr:`question_policy`, if there is a sentence
        encoder and ``processor_kwargs`` names no ``instruction``.
        """
        options = dict(kwargs.pop("processor_kwargs", None) or {})
        makes_inputs = kwargs.get("tokenize") and kwargs.get("return_dict")
        if makes_inputs and self._sentence_encoder is not None and "instruction" not in {**options, **kwargs}:
            conversations = [conversation] if isinstance(conversation[0], dict) else conversation
            turns = [self._user_turns(messages) for messages in conversations]
            of_pictures = [
                user for messages, user in zip(conversations, turns, strict=True) for _ in range(self._count_pictures(messages))
            ]
            if of_pictures:
                options["instruction"] = of_pictures
        if options:
            kwargs["processor_kwargs"] = options
        return super().apply_chat_template(conversation, *args, **kwargs)

    def views(self, picture: Image.Image) -> list[Image.Image]:
        """The images of the tower that stand for a picture, prepared as in training; see :func:`model.data.images.views`."""
        mean, side = self.image_processor.image_mean, self.output_size[0]
        return views(picture, self.aspect_ratio, mean, side, self.anyres_grids)

    def _pictures(self, images: Any) -> list[Image.Image]:
        """Flat, in RGB."""
        flat = make_flat_list_of_images(images)
        return [(image if isinstance(image, Image.Image) else to_pil_image(image)).convert("RGB") for image in flat]

    def _repeat_placeholders(self, texts: Sequence[str], counts: Sequence[int]) -> list[str]:
        """Texts with the placeholder of each picture as often as it has images of the tower."""
        left = iter(counts)
        return [
            self.image_token.join(
                part if index == 0 else self.image_token * (next(left) - 1) + part
                for index, part in enumerate(text.split(self.image_token))
            )
            for text in texts
        ]

    def _user_turns(self, messages: Sequence[dict[str, Any]]) -> list[str]:
        contents = [message["content"] for message in messages if message["role"] == "user"]
        return [
            content if isinstance(content, str) else " ".join(part["text"] for part in content if part["type"] == "text")
            for content in contents
        ]

    def _count_pictures(self, messages: Sequence[dict[str, Any]]) -> int:
        return sum(self._with_placeholders(message["content"]).count(self.image_token) for message in messages)

    def validate_inputs(self, images: Any = None, text: str | Sequence[str] | None = None, **kwargs: Any) -> None:
        """Refuse a number of pictures that is not the number of placeholders; the base class calls this first."""
        if text is not None:
            num_images = 0 if images is None else len(make_flat_list_of_images(images))
            num_placeholders = sum(prompt.count(self.image_token) for prompt in ([text] if isinstance(text, str) else text))
            if num_placeholders != num_images:
                raise ValueError(
                    f"the text holds {num_placeholders} {self.image_token}, but there are {num_images} images; each image "
                    "needs exactly one placeholder"
                )
        super().validate_inputs(images=images, text=text, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The placeholders of one picture; the base class calls this for every ``<image>``."""
        height, width = image_inputs["pixel_values"][image_idx].shape[-2:]
        return self.image_token * self.num_image_tokens(height, width)

    def num_image_tokens(self, height: int | None = None, width: int | None = None) -> int:
        """Placeholders of a picture of this size in pixels; by default of the size that the image processor makes."""
        if height is None or width is None:
            height, width = self.output_size
        tokens = ImageTokens(self.patch_size, self.token_pooling, self.token_reduction, self.pooled_layers, self.strip)
        return tokens.count(height, width)

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width in pixels that the image processor makes of every picture."""
        processor = self.image_processor
        size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
        return size["height"], size["width"]

    def tokenize_conversation(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        chat_template: str | None = None,
        view_counts: Sequence[int] | None = None,
    ) -> dict[str, list[int]]:
        """Token ids of a whole conversation, with a mask of what the assistant says: what training learns.

        The mask comes from the ``{% generation %}`` spans of the template by character offsets, never from tokenizing twice;
        see :func:`model.spans.tokenize_with_spans`. Pictures are taken to have :attr:`output_size`.

        Args:
            messages: ``{"role": ..., "content": ...}``, with ``<image>`` in the text or ``{"type": "image"}`` parts.
            chat_template: name of one of the processor's templates (``"plain"``), or a template; None: the default.
            view_counts: for each ``<image>`` the images of the tower that its picture becomes
                (:func:`model.data.images.num_views`); None: one each.

        Returns:
            ``input_ids``, ``attention_mask`` and ``assistant_masks``, lists of equal length.

        Raises:
            ValueError: the template marks nothing of what the assistant says, or its spans are not what the assistant says, or
                a token lies across the border of a span; or ``view_counts`` has another length than there are pictures.
        """
        texts = [self._with_placeholders(message["content"]) for message in messages]
        expanded = iter(self.expand_image_tokens(texts, view_counts))
        return tokenize_with_spans(
            self.tokenizer,
            [{**message, "content": next(expanded)} for message in messages],
            self._resolve_template(chat_template),
        )

    def expand_image_tokens(self, texts: Sequence[str], view_counts: Sequence[int] | None = None) -> list[str]:
        """Texts with every ``<image>`` repeated as often as its picture has tokens.

        Args:
            texts: with ``<image>`` where a picture stands.
            view_counts: for each ``<image>``, in reading order over all texts, the images of the tower that its picture
                becomes; None: one each.

        Raises:
            ValueError: ``view_counts`` has another length than there are ``<image>``.
        """
        num_pictures = sum(text.count(self.image_token) for text in texts)
        counts = [1] * num_pictures if view_counts is None else list(view_counts)
        if len(counts) != num_pictures:
            raise ValueError(f"view_counts has {len(counts)} entries for {num_pictures} {self.image_token}")
        tokens, remaining = self.num_image_tokens(), iter(counts)
        expanded = []
        for text in texts:
            first, *rest = text.split(self.image_token)
            expanded.append(first + "".join(self.image_token * (tokens * next(remaining)) + part for part in rest))
        return expanded

    def _with_placeholders(self, content: str | Sequence[dict[str, Any]]) -> str:
        if isinstance(content, str):
            return content
        # image_url: OpenAI's form, which transformers takes too.
        return "".join(
            f"{self.image_token}\n" if part["type"] in ("image", "image_url") else part.get("text", "") for part in content
        )

    def _resolve_template(self, chat_template: str | None) -> str:
        templates = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        resolved = templates.get(chat_template or "default", chat_template)
        if resolved is None:
            raise ValueError("this processor has no chat template; set processor.chat_template")
        return resolved

    @property
    def model_input_names(self) -> list[str]:
        """Names of the inputs that the processor makes."""
        return [*super().model_input_names, "instruction_embeds"]

    # ---- instructions -----------------------------------------------------------------------------------------------

    @property
    def sentence_encoder(self) -> Encoder | None:
        """Embeds instructions; saved in ``sentence_encoder/`` of the checkpoint."""
        return self._sentence_encoder

    @sentence_encoder.setter
    def sentence_encoder(self, encoder: Encoder | None) -> None:
        # By the class: asking the object for its dimension would load the encoder.
        if encoder is not None and not all(hasattr(type(encoder), name) for name in _ENCODER_INTERFACE):
            raise TypeError(
                f"sentence_encoder must have encode, dimension, fingerprint and save, got {type(encoder).__name__}; "
                "wrap a sentence-transformers folder or name in model.instruction.SentenceEncoder"
            )
        self._sentence_encoder = encoder

    def encode_instructions(self, sentences: Sequence[str]) -> Tensor:
        """(n, E), float32: one embedding a sentence.

        Raises:
            ValueError: the processor has no sentence encoder.
        """
        if self._sentence_encoder is None:
            raise ValueError(
                "this processor has no sentence encoder; set processor.sentence_encoder = SentenceEncoder(folder or name), or "
                "pass instruction_embeds to the model yourself"
            )
        return self._sentence_encoder.encode(list(sentences))

    def _embed_turns(self, conversations: Sequence[Sequence[str]]) -> Tensor:
        return embed_instructions(conversations, self.encode_instructions, self.question_policy, image_token=self.image_token)

    # ---- saving and loading -----------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """As in transformers, with the sentence encoder in ``sentence_encoder/``."""
        encoder = self._sentence_encoder
        self.sentence_encoder_fingerprint = None if encoder is None else encoder.fingerprint
        if encoder is not None:
            encoder.save(Path(save_directory) / _ENCODER_FOLDER)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> IgvaLlavaProcessor:
        """As in transformers; a sentence encoder that was saved with the processor is found, and loaded when first needed.

        Raises:
            ValueError: the processor was saved with a sentence encoder that is missing, or is another one.
        """
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        expected = processor.sentence_encoder_fingerprint
        if expected is not None:
            folder = _encoder_folder(pretrained_model_name_or_path, **kwargs)
            encoder = SentenceEncoder(folder)
            if not folder.is_dir() or encoder.fingerprint != expected:
                raise ValueError(
                    f"the processor was saved with the sentence encoder {expected[:12]}, but {folder} "
                    f"{'holds another one' if folder.is_dir() else 'is missing'}; copy the whole checkpoint"
                )
            processor.sentence_encoder = encoder
        return processor

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        """Image processor and tokenizer; the former always the PIL one, so that pictures become the same pixels everywhere."""
        values = (processor_dict or {}).get("image_processor")
        if values is None:
            raise ValueError(f"processor_config.json of {pretrained_model_name_or_path} describes no image_processor")
        return [load_image_processor(values), AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)]


def sentence_encoder_of(checkpoint: str | Path, device: str = "cpu") -> SentenceEncoder:
    """The sentence encoder that was saved with a checkpoint, a folder or a repository of the hub.

    Raises:
        FileNotFoundError: it has none.
    """
    folder = _encoder_folder(checkpoint)
    if not folder.is_dir():
        raise FileNotFoundError(f"the checkpoint {checkpoint} has no sentence encoder: there is no {folder}")
    return SentenceEncoder(folder, device=device)


def _encoder_folder(checkpoint: str | Path, **kwargs: Any) -> Path:
    """``sentence_encoder/`` of a folder, or of a repository of the hub, which is downloaded."""
    if Path(checkpoint).is_dir():
        return Path(checkpoint) / _ENCODER_FOLDER
    hub_arguments = {name: kwargs[name] for name in ("revision", "cache_dir", "token", "local_files_only") if name in kwargs}
    return Path(snapshot_download(str(checkpoint), allow_patterns=[f"{_ENCODER_FOLDER}/*"], **hub_arguments)) / _ENCODER_FOLDER
