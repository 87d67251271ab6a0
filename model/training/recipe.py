"""What a training run is made of: the dataclasses that a recipe fills.

The text under each field is its only documentation: ``igva train --help`` prints it, and the recipes in
``model/recipes`` leave to it what their short comments do not say.

    recipe = load_recipe("recipe.yaml", ["--learning_rate=1e-4", "--data.path=data.json"])
    recipe = TrainRecipe(name="mine", output_dir="runs/mine", stage=1, model=ModelSource(...), data=DataSource(...))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

LanguageModelTraining = Literal["frozen", "lora", "full"]
Precision = Literal["auto", "fp32", "bf16"]
AspectRatio = Literal["pad", "crop", "stretch", "anyres"]
InstructionPolicy = Literal["first_turn", "last_turn", "mean_of_turns"]
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
Scheduler = Literal["cosine", "linear", "constant"]
Grouping = Literal["modality_length", "random"]
Attention = Literal["auto", "sdpa", "eager", "varlen", "flash_attention_2", "flash_attention_3"]
FrozenWeights = Literal["auto", "fp32", "bf16"]
LanguageModelQuantization = Literal["int8", "nf4"]
Distributed = Literal["ddp", "zero2", "zero3", "fsdp2"]

# Ten steps show every part of a run at work (data, loss, log, save) and no more.
SMOKE_STEPS = 10


@dataclass
class ModelSource:
    """Where the parts of the model come from: one checkpoint, or a vision tower and a language model."""

    checkpoint: str | None = None
    """Folder or hub name of a saved IGVA model to go on from, such as the output of stage 1. It brings its processor
    and its sentence encoder; the fields below that describe parts must then stay unset."""
    vision_tower: str | None = None
    """Folder or hub name of the vision tower (CLIP or DINOv2), for a new model."""
    language_model: str | None = None
    """Folder, hub name or GGUF file of the causal language model (Llama-like) and its tokenizer, for a new model."""
    sentence_encoder: str | None = None
    """Folder or hub name of the sentence-transformers model that embeds the instructions. It is saved with the
    checkpoint. Without one a model trains and runs with uniform weights of the layer groups. With ``checkpoint``, it
    replaces the one found there."""
    image_size: int | None = None
    """Side in pixels to which images are resized; unset: what the vision tower was trained with."""
    fusion: dict[str, Any] | None = None
    """How the tower's layers are fused: ``{type: igva, num_groups: 4, base: -2, order: fused_first}``, ``{type:
    dense_connector, variant: dci}`` or another type with its options, see docs/fusions.md. Unset: IGVA with four groups.
    The width of the instruction embedding is taken from the sentence encoder."""
    token_pooling: int | None = None
    """Side of the square of neighbouring image tokens that is averaged to one before the projector; 2 makes a quarter
    as many."""
    projector_input_norm: bool = False
    """LayerNorm before the projector: helps where the projector is small and trained from nothing."""
    projector_output_norm: bool = False
    """LayerNorm after the projector, scaled to the language model's word embeddings: same use."""


@dataclass
class DataSource:
    """Where the samples come from and how they are turned into tensors."""

    path: str
    """LLaVA JSON file: a list of ``{"id", "image", "conversations"}``; or, ending in .jsonl, one such record a line."""
    image_folder: str | None = None
    """Folder that the image paths of the file are relative to; unset: the folder of the file."""
    eval_path: str | None = None
    """LLaVA JSON file of held-out samples, for the loss on them at the end and every ``eval_every`` steps. How many of their
    questions the model answers rightly: ``evaluation``."""
    aspect_ratio: AspectRatio = "pad"
    """``pad`` puts an image on a square of the mean colour; ``crop`` keeps its middle (LLaVA's default, there called
    square); ``stretch`` makes it one. ``anyres`` is LLaVA-NeXT's: the whole image, stretched, and tiles of it at full
    resolution, each of them an image of the tower; it needs a ``max_length`` that holds all their tokens."""
    anyres_grids: list[list[int]] = field(default_factory=lambda: [[1, 2], [2, 1], [2, 2], [1, 3], [3, 1]])
    """Rows and columns of tiles that ``anyres`` may cut an image into, in units of the tower's image size; the one that keeps
    most pixels is taken. LLaVA-NeXT's ``image_grid_pinpoints`` by default."""
    on_error: OnError | dict[ProblemKind, OnError] = "raise"
    """What to do about samples that cannot be used. ``raise`` stops before the first step, or at the step that meets a
    damaged file, and names them; ``skip`` leaves them out, counts them, and lists them in ``training/problems.jsonl`` of the
    checkpoint. By kind, where the others raise: ``{missing_image: skip, damaged_image: skip}``; kinds are broken_line,
    broken_record, placeholders (more or fewer ``<image>`` than images), outside_path (out of the image folder),
    missing_image, damaged_image, oversized_image and not_learnable (no answer within ``max_length``)."""
    max_image_pixels: int = 89_478_485
    """Images with more pixels are refused by their header, before they are decoded, as decompression bombs."""
    instruction_policy: InstructionPolicy = "mean_of_turns"
    """Which human turns of a conversation are embedded as the instruction: the first, the last, or the mean of all
    embeddings."""
    instruction_cache: str | None = None
    """File of instruction embeddings that ``igva embed`` made, read through its memory map; what it lacks is added before
    the first step. One of another sentence encoder or policy is refused. Unset: a file in the run's own folder, removed
    with it."""
    chat_template: str | None = None
    """Name of the processor's chat template to train with, or a file that holds one; unset: the one that the
    processor came with."""
    max_length: int = 2048
    """Longest sequence in tokens, image tokens included. A longer sample is cut at its end; where that would cut an
    image, or leave nothing to learn, it is not learnable, see ``on_error``."""
    packing: bool = False
    """Put the samples of a forward pass end to end in one row, without padding; attention stays within each sample. Which
    samples share a step of the optimizer does not change, and so neither do loss and gradients. On a GPU it needs
    flash-attn, or a torch with variable-length attention, and bf16."""
    grouping: Grouping = "modality_length"
    """Which samples share a step and a forward pass. ``modality_length``: samples with images and samples without do not
    share a step, as in LLaVA, and neighbours in length share a pass, which leaves less padding. ``random``: any."""
    num_workers: int = 0
    """Processes that read and prepare samples beside each training process; 0: the training process does it itself."""


@dataclass
class LoraSettings:
    """Low-rank adapters in the language model (never in the tower, the allocator or the projector)."""

    r: int = 128
    """Rank of the adapters."""
    alpha: int = 256
    """Scale: the adapter's product is multiplied by alpha / r."""
    dropout: float = 0.05
    """Dropout in front of the adapters."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Linear layers that get an adapter, by the last part of their name (``[q_proj, v_proj]``), or all of the
    language model's."""


@dataclass
class EvaluationSettings:
    """Answers to held-out questions during the run."""

    exact_match: bool = False
    """At every evaluation, let the model answer the last question of held-out samples, and log the share of answers that are
    right, with its standard error, overall and by kind (``level``): ``eval_exact_match`` beside ``eval_loss``. Training is bit
    for bit the same with and without. Not with ZeRO-3."""
    path: str | None = None
    """LLaVA JSON file of the questions, best with short answers; unset: ``data.eval_path``. Images are found as those of the
    training data."""
    max_samples: int | None = None
    """Questions at most, taken evenly from the file; unset: all of them."""
    max_new_tokens: int = 16
    """Longest answer in tokens."""
    batch_size: int | None = None
    """Questions at once on one device; unset: ``eval_batch_size``."""
    keep_best: str | None = None
    """Metric by which the best of the evaluated steps becomes the finished checkpoint, in place of the last step: ``loss``,
    ``exact_match`` or ``exact_match_KIND``; unset: the last step. It needs ``eval_every``, and saves a step whenever it is the
    best so far. Not with sharded weights."""


@dataclass
class TrainRecipe:
    """One training run."""

    name: str
    """Name of the run, for logs and trackers."""
    output_dir: str
    """Folder of the finished checkpoint. It appears in one piece at the end; until then the run lives in
    ``OUTPUT_DIR.partial``."""
    stage: Literal[1, 2]
    """1: the projector learns, under the plain average of the layers. 2: projector, weight allocator and language
    model learn."""
    model: ModelSource
    """Where the parts of the model come from."""
    data: DataSource
    """Where the samples come from."""
    language_model_training: LanguageModelTraining | None = None
    """``frozen``, ``lora`` or ``full``; unset: frozen in stage 1 and full in stage 2."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """Adapters, where ``language_model_training`` is ``lora``."""
    language_model_quantization: LanguageModelQuantization | None = None
    """Hold the frozen weights under the adapters in 8 bits (``int8``, torchao) or 4 (``nf4``, bitsandbytes: QLoRA). It needs
    ``language_model_training: lora`` and ``model.checkpoint``, into whose own weights the adapters are merged at the end. The
    head and everything but the language model stay as they are. Unset: not quantised."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    """Answers to held-out questions during the run."""
    balance_loss_weight: float = 0.0
    """Weight of the balance term, the mean negative entropy of the group weights, in stage 2: it keeps all groups in
    use."""
    legacy_double_softmax: bool = False
    """Apply a second softmax in the balance term as the released IGVA code does; its effect is then 16 to 19 times
    weaker."""
    batch_size: int = 128
    """Samples between two steps of the optimizer, over all devices."""
    micro_batch_size: int = 8
    """Samples in one forward pass on one device, or on average where ``data.packing`` is on; gradients are accumulated until
    ``batch_size`` is reached."""
    eval_batch_size: int | None = None
    """Samples in one forward pass of the evaluation on one device; unset: ``micro_batch_size``."""
    epochs: float = 1.0
    """Passes over the data, unless ``max_steps`` is set."""
    max_steps: int | None = None
    """Optimizer steps; overrides ``epochs``."""
    learning_rate: float = 2e-5
    """Peak learning rate of everything that has none of its own below."""
    projector_learning_rate: float | None = None
    """Peak learning rate of the projector."""
    allocator_learning_rate: float | None = None
    """Peak learning rate of the weight allocator, or of what another fusion learns (MMFuser's block, TGIF's router)."""
    weight_decay: float = 0.0
    """AdamW's weight decay; biases and norms are left out."""
    max_grad_norm: float = 1.0
    """Norm to which gradients are clipped; 0 switches it off."""
    warmup: float = 0.03
    """Share of the steps (below 1) or number of steps in which the learning rate rises from 0."""
    scheduler: Scheduler = "cosine"
    """Course of the learning rate after the warm-up."""
    precision: Precision = "auto"
    """Arithmetic of the forward and backward pass; weights that learn stay in fp32, sharded by DeepSpeed or FSDP where they
    are at work. ``auto``: bf16 on a GPU that has it; on a CPU a step is timed in both and the faster one taken, as bf16 is
    twice as fast on some CPUs and twenty times slower on others."""
    frozen_weights: FrozenWeights = "auto"
    """How the tower and a language model that does not learn are held, and saved: ``bf16`` takes half the memory and spares
    a conversion in every product. ``auto``: bf16 on a GPU where ``precision`` is bf16, else fp32; with ``distributed: fsdp2``
    fp32, which it shards and gathers in bf16 (it takes no mixture of both)."""
    distributed: str = "ddp"
    """How the model is spread over the processes of a launcher such as torchrun. ``ddp``: whole on each. ``zero2``: DeepSpeed
    shards gradients and the optimizer's states; ``zero3``: the weights too. ``fsdp2``: torch's ``fully_shard`` shards all. Or
    the path of a DeepSpeed JSON file. The configurations of the names lie in ``model/recipes``."""
    attention: Attention = "auto"
    """Attention of the language model. ``auto``: flash-attn 3 or 2 where installed, else ``varlen`` (torch's own, for packed
    rows on a GPU), else ``sdpa``. A named one that cannot run is refused."""
    activation_checkpointing: bool = False
    """Keep only the input of each layer of the language model and compute the rest again in the backward pass: less memory,
    about a third more work."""
    checkpoint_every_n_layers: int = 1
    """With ``activation_checkpointing``: do so in every n-th layer only, which trades memory back for speed."""
    liger_kernels: bool = False
    """Norms, rotary embedding and feed-forward of the language model from Liger-Kernel (``pip install
    'igva-kernels[liger]'``); needs a GPU."""
    compile: bool = False
    """``torch.compile`` for the layers of the language model, each by itself, with sizes left open; the first steps then take
    longer."""
    seed: int = 42
    """Seed of the order of samples, of new weights and of dropout."""
    log_every: int = 10
    """Steps between two lines of the log."""
    save_every: int | None = None
    """Steps between two intermediate checkpoints in ``OUTPUT_DIR.partial/checkpoints``, of which the newest is kept;
    unset: none."""
    eval_every: int | None = None
    """Steps between two evaluations on held-out data (``data.eval_path``, ``evaluation``); unset: only at the end."""
    trackers: list[str] = field(default_factory=list)
    """Experiment trackers of transformers beside the JSONL log, such as ``tensorboard`` or ``wandb``."""
    resume: bool = False
    """Go on from the newest intermediate checkpoint in ``OUTPUT_DIR.partial``."""
    overwrite: bool = False
    """Replace what stands at ``output_dir``; without it a finished checkpoint is never touched."""
    smoke: bool = False
    """The same run cut to ten steps, into ``OUTPUT_DIR-smoke``, replacing an earlier smoke run."""

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_numbers()
        self._check_parts()
        self._check_evaluation()
        self._check_quantization()

    # ---- what the run derives from its fields ------------------------------------------------------------------------

    @property
    def resolved_language_model_training(self) -> LanguageModelTraining:
        """How the language model is trained, with the stage's default filled in."""
        return self.language_model_training or ("frozen" if self.stage == 1 else "full")

    @property
    def checkpoint_folder(self) -> Path:
        """Where the finished checkpoint goes: ``output_dir``, or beside it for a smoke run."""
        folder = Path(self.output_dir)
        return folder.with_name(folder.name + "-smoke") if self.smoke else folder

    @property
    def held_out_path(self) -> str | None:
        """Data of the held-out loss: ``data.eval_path``, or else the questions of ``evaluation``."""
        return self.data.eval_path or (self.evaluation.path if self.evaluation.exact_match else None)

    @property
    def questions_path(self) -> str | None:
        """Data of the held-out questions; None where none are answered."""
        return (self.evaluation.path or self.data.eval_path) if self.evaluation.exact_match else None

    def accumulation_steps(self, num_processes: int = 1) -> int:
        """Forward passes between two optimizer steps.

        Raises:
            ValueError: ``batch_size`` is no multiple of ``micro_batch_size * num_processes``.
        """
        per_pass = self.micro_batch_size * num_processes
        if self.batch_size % per_pass:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of micro_batch_size {self.micro_batch_size} x "
                f"{num_processes} processes; set batch_size to a multiple of {per_pass}, or lower micro_batch_size"
            )
        return self.batch_size // per_pass

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as written to ``recipe.yaml`` in the checkpoint."""
        return asdict(self)

    # ---- checks ------------------------------------------------------------------------------------------------------

    def _check_choices(self) -> None:
        _check_choice("stage", self.stage, (1, 2))
        _check_choice("language_model_training", self.language_model_training, (None, *get_args(LanguageModelTraining)))
        _check_choice("precision", self.precision, get_args(Precision))
        _check_choice("scheduler", self.scheduler, get_args(Scheduler))
        _check_choice("frozen_weights", self.frozen_weights, get_args(FrozenWeights))
        _check_choice("attention", self.attention, get_args(Attention))
        _check_choice(
            "language_model_quantization", self.language_model_quantization, (None, *get_args(LanguageModelQuantization))
        )
        if not self.distributed.endswith(".json"):
            _check_choice("distributed", self.distributed, (*get_args(Distributed), "PATH.json"))
        if self.distributed == "fsdp2" and self.frozen_weights == "bf16":
            raise ValueError(
                "frozen_weights is bf16 with distributed fsdp2, which shards frozen and learning weights together and takes "
                "no mixture of types; set frozen_weights to auto or fp32: it gathers them in bf16 all the same"
            )
        _check_choice("data.grouping", self.data.grouping, get_args(Grouping))
        _check_choice("data.aspect_ratio", self.data.aspect_ratio, get_args(AspectRatio))
        _check_choice("data.instruction_policy", self.data.instruction_policy, get_args(InstructionPolicy))
        actions = self.data.on_error if isinstance(self.data.on_error, dict) else {None: self.data.on_error}
        for kind, action in actions.items():
            _check_choice("a kind in data.on_error", kind, (None, *get_args(ProblemKind)))
            _check_choice("data.on_error", action, get_args(OnError))
        if self.stage == 1 and self.resolved_language_model_training != "frozen":
            raise ValueError(
                f"language_model_training is {self.language_model_training!r} in stage 1, where only the projector "
                "learns; leave it unset, or set stage to 2"
            )

    def _check_numbers(self) -> None:
        positive = (
            "batch_size",
            "micro_batch_size",
            "eval_batch_size",
            "epochs",
            "max_steps",
            "learning_rate",
            "log_every",
            "checkpoint_every_n_layers",
        )
        for name in (*positive, "projector_learning_rate", "allocator_learning_rate", "save_every", "eval_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        for name in ("max_length", "max_image_pixels"):
            if getattr(self.data, name) < 1:
                raise ValueError(f"data.{name} must be at least 1, got {getattr(self.data, name)}")
        grids = self.data.anyres_grids
        if not grids or not all(len(grid) == 2 and min(grid) >= 1 for grid in grids):
            raise ValueError(f"data.anyres_grids must hold pairs of rows and columns, such as [[1, 2], [2, 2]], got {grids}")
        for name in ("balance_loss_weight", "weight_decay", "max_grad_norm", "warmup"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if self.balance_loss_weight and self.stage == 1:
            raise ValueError("balance_loss_weight is set in stage 1, where no weights are learned; set it in stage 2")
        if self.checkpoint_every_n_layers > 1 and not self.activation_checkpointing:
            raise ValueError(
                f"checkpoint_every_n_layers is {self.checkpoint_every_n_layers}, but activation_checkpointing is off; "
                "switch it on"
            )
        if self.compile and self.distributed == "zero3":
            raise ValueError(
                "compile is set with distributed zero3, whose hooks gather weights inside of the layers, where torch.compile "
                "would stop at each; set compile to false, or distributed to fsdp2"
            )
        if self.eval_every and not self.held_out_path:
            raise ValueError("eval_every is set but data.eval_path is not; give a file of held-out samples")

    def _check_parts(self) -> None:
        source = self.model
        new_model = ("vision_tower", "language_model", "image_size", "fusion", "token_pooling")
        if source.checkpoint is None:
            missing = [name for name in ("vision_tower", "language_model") if getattr(source, name) is None]
            if missing:
                raise ValueError(
                    f"model.{missing[0]} is not set; give model.checkpoint, or both model.vision_tower and model.language_model"
                )
        else:
            given = [name for name in new_model if getattr(source, name) is not None]
            given += [name for name in ("projector_input_norm", "projector_output_norm") if getattr(source, name)]
            if given:
                raise ValueError(f"model.checkpoint already fixes model.{given[0]}; remove one of the two")

    def _check_quantization(self) -> None:
        if self.language_model_quantization is None:
            return
        what = f"language_model_quantization is {self.language_model_quantization}"
        if self.resolved_language_model_training != "lora":
            raise ValueError(
                f"{what}, but language_model_training is {self.resolved_language_model_training}: quantised weights cannot "
                "learn; set language_model_training to lora"
            )
        if self.model.checkpoint is None:
            raise ValueError(
                f"{what}, but the model is a new one of parts: the adapters are merged into the weights of a checkpoint at the "
                "end; set model.checkpoint, such as the output of stage 1"
            )
        if self.distributed != "ddp" or self.compile:
            other = "compile is set" if self.distributed == "ddp" else f"distributed is {self.distributed}"
            raise ValueError(f"{what}, but {other}, which takes no quantised weights; use distributed ddp without compile")

    def _check_evaluation(self) -> None:
        settings = self.evaluation
        for name in ("max_samples", "max_new_tokens", "batch_size"):
            value = getattr(settings, name)
            if value is not None and value < 1:
                raise ValueError(f"evaluation.{name} must be at least 1, got {value}")
        if settings.exact_match and not self.questions_path:
            raise ValueError("evaluation.exact_match is set but there are no questions; set evaluation.path or data.eval_path")
        if settings.path and not settings.exact_match:
            raise ValueError("evaluation.path is set but evaluation.exact_match is false; set it to true, or remove the path")
        if settings.exact_match and self.distributed == "zero3":
            raise ValueError(
                "evaluation.exact_match is set with distributed zero3, whose weights cannot be gathered while it generates; "
                "set it to false and run `igva evaluate` on the checkpoint, or set distributed to fsdp2"
            )
        best = settings.keep_best
        if best is None:
            return
        if best != "loss" and not best.startswith("exact_match"):
            raise ValueError(f"evaluation.keep_best must be loss, exact_match or exact_match_KIND, got {best!r}")
        if best != "loss" and not settings.exact_match:
            raise ValueError(f"evaluation.keep_best is {best} but evaluation.exact_match is false; set it to true")
        if not self.eval_every:
            raise ValueError("evaluation.keep_best is set but eval_every is not, so there is nothing to choose from; set it")
        if self.save_every:
            raise ValueError(
                "evaluation.keep_best and save_every are both set, but one intermediate checkpoint is kept; remove one of the "
                "two: a run with keep_best goes on from its best step"
            )
        if self.distributed != "ddp":
            raise ValueError(
                f"evaluation.keep_best is set with distributed {self.distributed}, whose shards are not put back during a run; "
                "remove keep_best, or set distributed to ddp"
            )


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def recipe_parser(prog: str = "igva train RECIPE", with_help: bool = False) -> ArgumentParser:
    """The parser that reads a recipe file (``--recipe``) and one ``--key=value`` for each field.

    Args:
        prog: name in the usage line.
        with_help: read the documentation of the fields for ``print_help``; needs docstring-parser.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    if with_help:
        # The documentation of a field is the string below it: one source for help and code.
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [--key=value ...]",
        exit_on_error=False,
        allow_abbrev=False,
        description="Fields of a recipe; each is a flag.",
    )
    parser.add_argument("--recipe", action="config", help="YAML file with values for the fields below.")
    parser.add_class_arguments(TrainRecipe)
    return parser


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> TrainRecipe:
    """Read a recipe file and apply ``--key=value`` overrides.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key that no field has, a missing field, or a value of the wrong type or range; the message names
            it.
    """
    from jsonargparse import ArgumentError

    if not Path(path).is_file():
        raise FileNotFoundError(f"no recipe at {path}")
    parser = recipe_parser()
    try:
        parsed = parser.instantiate(parser.parse_args([f"--recipe={path}", *overrides]))
    except ArgumentError as error:
        raise ValueError(f"recipe {path}: {error}") from error
    values = {key: value for key, value in parsed.as_dict().items() if key != "recipe"}
    return TrainRecipe(**values)
