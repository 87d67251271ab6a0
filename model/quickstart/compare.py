"""``igva compare``: the quickstart's task with several fusions, trained alike and shown side by side.

Each fusion runs in a process of its own, since the peak of a process's memory cannot be reset: projector warmed up on cached
features → stage 2 with LoRA → evaluation. What is equal: parts, pictures, questions, order, seed, steps, learning rates. What
follows from the fusion: the projector's width, and what else the fusion learns. MMFuser's block begins as the identity on the
layer that LLaVA takes, so its projector begins as LLaVA's warm one; the others each have their own warm start.

Measured on two AVX2 cores: 24 min 34 s for the four of the paper. A fusion takes 6 to 7 minutes: 80 s for 1,400 pictures
through the tower and 600 steps of the warm start, 240 s for 100 steps of stage 2 with half the quickstart's batch, 50 s for
the evaluation, the rest for loading and saving.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.quickstart.parts import Parts, prepare_parts
from model.quickstart.pictures import KINDS, TEST, TRAIN, make_pictures
from model.quickstart.run import EVALUATION_BATCH, MAX_ANSWER_TOKENS, RECIPES, SMOKE_TEST, SMOKE_TRAIN, Folders

if TYPE_CHECKING:
    from rich.table import Table

FUSIONS: dict[str, dict[str, Any]] = {
    "llava": {"type": "llava"},
    "dense_connector": {"type": "dense_connector", "variant": "dci"},
    # The released layers 3, 8, 13, 18 and 23 of 24 at half the depth, and heads of the released width 64.
    "mmfuser": {"type": "mmfuser", "layers": [2, 4, 7, 9, -2], "num_heads": 6},
    "igva": {"type": "igva", "hidden_dim": 384},
    "tgif": {"type": "tgif", "router_dim": 128},
    "scalar_mix": {"type": "scalar_mix"},
}
"""What can be compared, for the quickstart's tower of 12 layers and width 384."""

PAPER = ("llava", "dense_connector", "mmfuser", "igva")
SAME_WARM_START = {"mmfuser": "llava"}

STEPS, BATCH = 100, 8
PICTURES, WARM_START_STEPS = 1400, 600
SMOKE_STEPS = 10

_EXAMPLES = """examples:
  igva compare                              the four systems of the paper; 25 minutes on two cores
  igva compare --fusions igva,tgif,llava    others
  igva compare --smoke                      the same code, ten steps of everything

Differences smaller than the standard errors beside them say nothing: one seed, a few hundred questions, 100 steps.
"""


def main(argv: Sequence[str]) -> int:
    """Run the comparison.

    Returns:
        0.

    Raises:
        PartError: a part cannot be had.
        RuntimeError: the run of a fusion failed; its own output says why.
        ValueError: an unknown fusion, or one twice.
    """
    arguments = _parser().parse_args(argv)
    names = arguments.fusions.split(",")
    check_names(names)
    folders = Folders(arguments.folder, arguments.smoke)

    from rich.console import Console

    from model.instruction import write_text_atomically
    from model.quickstart.report import machine

    console = Console()
    parts = prepare_parts(folders.parts, report=console.print)
    if arguments.one:
        result = run_fusion(names[0], folders, parts, arguments.steps)
        write_text_atomically(result_file(folders, names[0]), json.dumps(result, indent=1) + "\n")
        return 0

    small = (SMOKE_TRAIN, SMOKE_TEST) if arguments.smoke else (TRAIN, TEST)
    make_pictures(folders.pictures, train=small[0], test=small[1])
    start = time.perf_counter()
    results = {}
    # A fusion that begins as another one comes after it.
    for name in sorted(names, key=lambda name: name in SAME_WARM_START):
        console.rule(name)
        run_process(name, arguments)
        results[name] = json.loads(result_file(folders, name).read_text(encoding="utf-8"))
    results = {name: results[name] for name in names}
    console.print(comparison_table(results))
    console.print(verdict(results))
    stem = "comparison-smoke" if arguments.smoke else "comparison"
    content = {"machine": machine(), "smoke": arguments.smoke, "total_seconds": time.perf_counter() - start, "fusions": results}
    write_text_atomically(folders.root / f"{stem}.json", json.dumps(content, indent=1) + "\n")
    plot(folders.root / f"{stem}.png", results)
    console.print(f"figures in {folders.root / stem}.json, plot in {folders.root / stem}.png")
    return 0


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError for a fusion that is not among :data:`FUSIONS` or is named twice."""
    for name in names:
        if name not in FUSIONS:
            raise ValueError(f"no fusion {name!r} to compare; there are {', '.join(FUSIONS)}")
    if len(set(names)) < len(names):
        raise ValueError(f"a fusion is named twice in {','.join(names)}")


def run_process(name: str, arguments: argparse.Namespace) -> None:
    """Run one fusion in a process of its own, with this one's terminal."""
    command = [sys.executable, "-m", "model", "compare", "--one", f"--fusions={name}", f"--folder={arguments.folder}"]
    command += [f"--steps={arguments.steps}"] if arguments.steps else []
    command += ["--smoke"] if arguments.smoke else []
    outcome = subprocess.run(command, check=False)
    if outcome.returncode:
        raise RuntimeError(f"the run of {name} ended with exit status {outcome.returncode}; its output is above")


def run_fusion(name: str, folders: Folders, parts: Parts, steps: int | None = None) -> dict[str, Any]:
    """Train and evaluate one fusion; plain data for the table.

    Args:
        name: of :data:`FUSIONS`.
        folders: pictures must be there.
        parts: the pretrained models.
        steps: of stage 2; None for :data:`STEPS`.
    """
    from model.cli.checkpoint import load_checkpoint
    from model.data.llava_json import read_llava_json
    from model.evaluation import evaluate
    from model.training.recipe import load_recipe
    from model.training.run import train

    start = time.perf_counter()
    stage1 = load_recipe(
        RECIPES / "quickstart-stage1.yaml", [f"--model.{part}={place}" for part, place in asdict(parts).items()]
    )
    stage1 = replace(stage1, model=replace(stage1.model, fusion=FUSIONS[name]))
    checkpoint, warm = warm_up(name, stage1, folders)
    warmed = time.perf_counter()
    stage2 = load_recipe(
        RECIPES / "quickstart-stage2.yaml",
        [
            f"--name=compare-{name}",
            f"--output_dir={folders.output(f'compare-{name}')}",
            f"--model.checkpoint={checkpoint}",
            f"--data.path={folders.pictures / 'train.json'}",
            f"--smoke={str(folders.smoke).lower()}",
            f"--batch_size={BATCH}",
            f"--micro_batch_size={BATCH}",
            f"--max_steps={steps or STEPS}",
        ],
    )
    trained = train(stage2)
    finished = time.perf_counter()
    loaded = load_checkpoint(trained["checkpoint"])
    scores = evaluate(
        loaded.model,
        loaded.processor,
        read_llava_json(folders.pictures / "test.json"),
        batch_size=EVALUATION_BATCH,
        max_new_tokens=MAX_ANSWER_TOKENS,
        aspect_ratio=loaded.aspect_ratio,
        instruction_policy=loaded.instruction_policy,
        show_progress=True,
    )
    return {
        "fusion": loaded.model.config.fusion,
        "image_tokens": loaded.model.config.num_image_tokens,
        "scores": {kind: asdict(score) for kind, score in scores.scores.items()},
        "warm_start": warm,
        "seconds": {
            "warm start": warmed - start,
            "stage 2": finished - warmed,
            "evaluation": time.perf_counter() - finished,
        },
        "steps": trained["steps"],
        "peak_memory_gb": trained["peak_memory_gb"],
        "parameters": trained["parameters"],
    }


def warm_up(name: str, stage1: Any, folders: Folders) -> tuple[Path, dict[str, Any]]:
    """Build the model of a fusion with a warm projector and save it.

    Returns:
        Its folder, and what the warm start took and reached.
    """
    import shutil

    from transformers import AutoModelForImageTextToText, set_seed

    from model.data.llava_json import read_llava_json
    from model.quickstart.warm_start import warm_start
    from model.training.run import load_parts

    set_seed(stage1.seed)
    model, processor = load_parts(stage1.model)
    if model.fusion_stage is not None:
        model.set_fusion_stage(1)
    twin = warm_folder(folders, SAME_WARM_START.get(name, name))
    if name in SAME_WARM_START and twin.is_dir():
        projector = AutoModelForImageTextToText.from_pretrained(twin).model.multi_modal_projector
        model.model.multi_modal_projector.load_state_dict(projector.state_dict())
        result: dict[str, Any] = {"as": SAME_WARM_START[name]}
    else:
        captions = read_llava_json(folders.pictures / "captions.json")
        # Every second one or so: the kinds of pictures stand one after another in the file.
        captions = captions[:: max(1, len(captions) // PICTURES)]
        steps = SMOKE_STEPS if folders.smoke else WARM_START_STEPS
        result = asdict(
            warm_start(model, processor, captions, steps=steps, aspect_ratio=stage1.data.aspect_ratio, seed=stage1.seed)
        )
    folder = warm_folder(folders, name)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, result


def warm_folder(folders: Folders, name: str) -> Path:
    """Where the model with the warm projector is kept."""
    return folders.output(f"compare-warm-{name}" + ("-smoke" if folders.smoke else ""))


def result_file(folders: Folders, name: str) -> Path:
    """Where the process of a fusion leaves its result."""
    return folders.output(f"compare-{name}-result" + ("-smoke" if folders.smoke else "") + ".json")


def comparison_table(results: dict[str, dict[str, Any]]) -> Table:
    """One column a fusion, so that four of them fit a terminal."""
    from rich.table import Table

    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        **{kind: lambda result, kind=kind: _percent(result["scores"][kind]) for kind in _kinds(results)},
        "image tokens": lambda result: str(result["image_tokens"]),
        "trained, M": lambda result: f"{sum(part['trainable'] for part in result['parameters'].values()) / 1e6:.1f}",
        "warm start, s": lambda result: f"{result['seconds']['warm start']:.0f}",
        "stage 2, s": lambda result: f"{result['seconds']['stage 2']:.0f}",
        "peak memory, GB": lambda result: f"{result['peak_memory_gb']:.2f}",
    }
    table = Table(title="Exact match on held-out pictures in %, ± one standard error")
    table.add_column()
    for name in results:
        table.add_column(name, justify="right")
    for heading, show in rows.items():
        table.add_row(heading, *(show(result) for result in results.values()), end_section=heading == "overall")
    return table


def verdict(results: dict[str, dict[str, Any]]) -> str:
    """Which pairs differ by more than two standard errors of their difference; nothing is said about the others.

    The questions are the same for all, which makes differences surer than this; the errors are taken as independent.
    """
    overall = {name: result["scores"]["overall"] for name, result in results.items()}
    lines = []
    for first, a in overall.items():
        for second, b in overall.items():
            error = (a["standard_error"] ** 2 + b["standard_error"] ** 2) ** 0.5
            if a["accuracy"] - b["accuracy"] > 2 * error:
                lines.append(f"{first} over {second}: {100 * (a['accuracy'] - b['accuracy']):.1f} ± {100 * error:.1f} points")
    if not lines:
        return "no two fusions differ by more than two standard errors: this run ranks none of them"
    return "differences beyond two standard errors, in this one run: " + "; ".join(lines)


def plot(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Accuracy by kind with one standard error, one colour a fusion."""
    from matplotlib.figure import Figure

    kinds = _kinds(results)
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(results)
    for index, (name, result) in enumerate(results.items()):
        scores = [result["scores"][kind] for kind in kinds]
        axes.bar(
            [position + width * (index - (len(results) - 1) / 2) for position in range(len(kinds))],
            [100 * score["accuracy"] for score in scores],
            width,
            yerr=[100 * score["standard_error"] for score in scores],
            label=name,
            capsize=2,
        )
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_ylabel("exact match, %")
    axes.set_ylim(0, 105)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=len(results), frameon=False)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)


def _kinds(results: dict[str, dict[str, Any]]) -> list[str]:
    scored = next(iter(results.values()))["scores"]
    return [kind for kind in (*KINDS, "overall") if kind in scored]


def _percent(score: dict[str, Any]) -> str:
    return f"{100 * score['accuracy']:.1f} ± {100 * score['standard_error']:.1f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="igva compare",
        description="Train the quickstart's model with several fusions of the tower's layers, alike but for the fusion, and "
        "show accuracy, time and memory side by side.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--fusions", default=",".join(PAPER), help=f"which, with commas, of {', '.join(FUSIONS)} (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("build/quickstart"), help="that of the quickstart (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, help=f"optimizer steps of stage 2 (default: {STEPS})")
    parser.add_argument("--smoke", action="store_true", help="the same code with ten steps and a few pictures")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # what the processes are started with
    return parser
