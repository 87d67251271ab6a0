"""Tiny parts that all model tests share: nothing is downloaded, every model is random and made from a seed."""

from __future__ import annotations

import hashlib
import json
import signal
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from model import IgvaLlavaConfig, IgvaLlavaForConditionalGeneration, IgvaLlavaProcessor, build_processor

TEXT_DIM = 16
NUM_LAYERS = 4
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")

#: ``<image>`` comes after the 256 bytes and the special tokens.
IMAGE_TOKEN_ID = 256 + len(SPECIAL_TOKENS)


class TinyEncoder:
    """A sentence encoder of the package's protocol whose vectors come from a hash of the sentence."""

    dimension = TEXT_DIM

    def __init__(self, salt: str = "") -> None:
        self.salt = salt
        self.num_encoded = 0

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"tiny {self.salt}".encode()).hexdigest()

    def encode(self, sentences: Sequence[str]) -> torch.Tensor:
        self.num_encoded += len(sentences)
        rows = [self._vector(sentence) for sentence in sentences]
        return torch.stack(rows) if rows else torch.empty(0, self.dimension)

    def _vector(self, sentence: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32((self.salt + sentence).encode()))
        return torch.randn(self.dimension, generator=generator)

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "tiny.json").write_text(json.dumps({"salt": self.salt}), encoding="utf-8")


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own answer to SIGINT, which a program started in the background of a shell is to ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def tiny_encoder() -> TinyEncoder:
    return TinyEncoder()


@pytest.fixture
def make_encoder() -> Callable[..., TinyEncoder]:
    return TinyEncoder


@pytest.fixture(scope="session")
def vision_configs() -> dict[str, Any]:
    """Towers of 4 layers and width 32 that see 2 x 2 patches of 14 pixels."""
    shape = {"hidden_size": 32, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    return {
        "clip": CLIPVisionConfig(**shape, intermediate_size=64, projection_dim=32),
        "dinov2": Dinov2Config(**shape, mlp_ratio=2),
    }


@pytest.fixture(scope="session")
def text_config() -> LlamaConfig:
    """A Llama of 2 layers and width 64 over bytes, with tied embeddings as SmolLM2."""
    return LlamaConfig(
        vocab_size=IMAGE_TOKEN_ID + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=256,
        bos_token_id=257,
        eos_token_id=258,
        initializer_range=0.1,
    )


@pytest.fixture
def make_config(vision_configs: dict[str, Any], text_config: LlamaConfig) -> Callable[..., IgvaLlavaConfig]:
    """``make_config(tower="clip", fusion={...}, **fields)``: two groups of two layers unless told otherwise."""

    def make(tower: str = "clip", fusion: dict[str, Any] | None = None, **fields: Any) -> IgvaLlavaConfig:
        igva = {"num_groups": 2, "text_dim": TEXT_DIM, "hidden_dim": 32, "num_blocks": 2, "num_heads": 4}
        fusion = {"type": "igva", **(fusion or {})}
        if fusion["type"] == "igva":
            fusion = {**igva, **fusion}
        fields = {"image_token_id": IMAGE_TOKEN_ID, **fields}
        return IgvaLlavaConfig(
            vision_config=fields.pop("vision_config", vision_configs[tower]).to_dict(),
            text_config=fields.pop("text_config", text_config).to_dict(),
            fusion=fusion,
            **fields,
        )

    return make


@pytest.fixture
def make_model(make_config: Callable[..., IgvaLlavaConfig]) -> Callable[..., IgvaLlavaForConditionalGeneration]:
    """``make_model(seed=0, **as make_config)``, in eval mode."""

    def make(*args: Any, seed: int = 0, **kwargs: Any) -> IgvaLlavaForConditionalGeneration:
        torch.manual_seed(seed)
        return IgvaLlavaForConditionalGeneration(make_config(*args, **kwargs)).eval()

    return make


@pytest.fixture
def make_batch() -> Callable[..., dict[str, torch.Tensor]]:
    """``make_batch(model, images_per_row, length)``: random text with whole images in it, labels on the last half of a row."""

    def make(
        model: IgvaLlavaForConditionalGeneration, images_per_row: Sequence[int] = (1, 1), length: int = 16, seed: int = 0
    ) -> dict[str, torch.Tensor]:
        config = model.config
        generator = torch.Generator().manual_seed(seed)
        rows = len(images_per_row)
        input_ids = torch.randint(0, 256, (rows, length), generator=generator)
        for row, count in enumerate(images_per_row):
            input_ids[row, 1 : 1 + count * config.num_image_tokens] = config.image_token_id
        labels = input_ids.clone()
        labels[:, : length // 2] = -100
        labels[input_ids == config.image_token_id] = -100
        batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
        num_images = sum(images_per_row)
        if num_images:
            side = config.image_size
            batch["pixel_values"] = torch.randn(num_images, 3, side, side, generator=generator)
            batch["instruction_embeds"] = torch.randn(num_images, TEXT_DIM, generator=generator)
        return batch

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer without merges: one token a byte, five special tokens, no ``<image>`` yet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, *SPECIAL_TOKENS])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def part_folders(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_tokenizer_folder: Path,
    vision_configs: dict[str, Any],
    text_config: LlamaConfig,
) -> dict[str, Path]:
    """Saved parts as a user has them: ``clip``, ``dinov2`` and ``llama`` (its vocabulary has no room for ``<image>``)."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("parts")
    CLIPVisionModel(vision_configs["clip"]).save_pretrained(root / "clip")
    Dinov2Model(vision_configs["dinov2"]).save_pretrained(root / "dinov2")
    text_config = LlamaConfig(**{**text_config.to_dict(), "vocab_size": IMAGE_TOKEN_ID})
    LlamaForCausalLM(text_config).save_pretrained(root / "llama")
    PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer_folder).save_pretrained(root / "llama")
    return {name: root / name for name in ("clip", "dinov2", "llama")}


@pytest.fixture
def make_processor(
    part_folders: dict[str, Path], make_config: Callable[..., IgvaLlavaConfig]
) -> Callable[..., IgvaLlavaProcessor]:
    """``make_processor(config=None, **as build_processor)`` for the tiny parts."""

    def make(config: IgvaLlavaConfig | None = None, tower: str = "clip", **options: Any) -> IgvaLlavaProcessor:
        return build_processor(part_folders[tower], part_folders["llama"], config or make_config(tower), **options)

    return make


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> Path:
    """A saved sentence-transformers model of width 16: a random BERT and mean pooling."""
    from sentence_transformers import SentenceTransformer

    try:
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    except ImportError:  # where they were before sentence-transformers 6
        from sentence_transformers.models import Pooling, Transformer

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("encoder_of_this_machine")
    shape = {"hidden_size": TEXT_DIM, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(**shape, vocab_size=300, max_position_embeddings=64)).save_pretrained(root / "bert")
    AutoTokenizer.from_pretrained(tiny_tokenizer_folder, model_max_length=64).save_pretrained(root / "bert")
    modules = [Transformer(str(root / "bert")), Pooling(TEXT_DIM)]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(root / "encoder"))
    return root / "encoder"
