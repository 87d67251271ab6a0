"""The figures that the project sets itself, read from result files: goal, what was measured, met or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from .sizes import BACKWARD_MODES
from .variants import BASELINE

OURS = "igva_kernels"
COMPILE = "torch.compile"
"""What the names of all variants of torch.compile begin with."""

Cases = list[dict]
"""The cases of one device that were measured, each with its ``part``."""

Values = dict[str, float]
"""A figure in each of its cases: label to value."""


@dataclass(frozen=True)
class Unit:
    """How a value is shown: times ``scale``, in ``form``."""

    form: str
    scale: float = 1

    def show(self, value: float) -> str:
        return self.form.format(value * self.scale)


PERCENT, PERCENT_FINE = Unit("{:.0f} %", 100), Unit("{:.1f} %", 100)
SHARE = Unit("{:.3f} %", 100)
TIMES, TIMES_FINE = Unit("{:.1f}"), Unit("{:.2f}")
MICROSECONDS, MILLISECONDS = Unit("{:.1f} µs", 1e6), Unit("{:.0f} ms", 1e3)


@dataclass(frozen=True)
class Target:
    """One figure.

    Args:
        figure, goal: as they are shown.
        part: of ``python -m benchmarks``, which measures it.
        find: the figure's values among the cases of a device.
        unit: of the values.
        least, most: the goal as a bound on the values; neither where the figure is only reported.
        also: other parts whose files may hold the figure.
    """

    figure: str
    goal: str
    part: str
    find: Callable[[Cases], Values]
    unit: Unit
    least: float | None = None
    most: float | None = None
    also: tuple[str, ...] = ()

    def met(self, value: float) -> bool:
        """Whether a value reaches the goal."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


@dataclass(frozen=True)
class Outcome:
    """A target with what the results say of it. ``values`` is empty where no case was measured."""

    target: Target
    values: Values

    @property
    def verdict(self) -> str:
        """``yes``, ``no``, how many of them, ``not measured``, or a dash for what has no goal."""
        if not self.values:
            return "not measured"
        if self.target.least is None and self.target.most is None:
            return "–"
        met = sum(self.target.met(value) for value in self.values.values())
        return "yes" if met == len(self.values) else "no" if not met else f"{met} of {len(self.values)}"

    @property
    def measured(self) -> str:
        """The values with their labels, in the cases' order; a dash where there are none."""
        shown = (f"{label} {self.target.unit.show(value)}".strip() for label, value in self.values.items())
        return ", ".join(shown) or "–"


def outcomes(documents: Iterable[dict], device_type: str) -> list[Outcome]:
    """The targets of a kind of device with the values in result files of that kind.

    Args:
        documents: result files (:func:`benchmarks.record.read_json`).
        device_type: "cpu" or "cuda".
    """
    cases = [case for document in documents if is_on(document, device_type) for case in measured_cases(document)]
    return [
        Outcome(target, target.find([case for case in cases if case["part"] in (target.part, *target.also)]))
        for target in TARGETS[device_type]
    ]


def is_on(document: dict, device_type: str) -> bool:
    """Whether a result file is of the CPU ("cpu") or of a card ("cuda"), at sizes that mean something."""
    return (document["machine"]["device"] == "cpu") == (device_type == "cpu") and not document["arguments"].get("tiny")


def measured_cases(document: dict) -> Cases:
    """The cases that have figures, each with its part: what two parts measured is not compared with each other."""
    return [case | {"part": document["part"]} for case in document["cases"] if case["status"] == "ok"]


# ---- where the values are -----------------------------------------------------------------------------------------------


def fusions(cases: Cases, variant: str, modes: Iterable[str], *, least_batch: int = 1) -> Iterator[dict]:
    """The cases of ``fuse`` itself, of a variant and modes, with all groups weighed (stage 2)."""
    for case in cases:
        parameters = case["parameters"]
        chosen = parameters.get("variant") == variant and parameters.get("mode") in modes and parameters.get("stage") == 2
        if chosen and "operation" not in parameters and parameters["batch"] >= least_batch:
            yield case


def label_of(case: dict) -> str:
    """What tells a case from others of its target."""
    parameters = case["parameters"]
    words = [] if parameters.get("tower", "").startswith("CLIP-L") else [parameters.get("tower", "")]
    words += [f"B={parameters['batch']}"] if "batch" in parameters else []
    words += [parameters["dtype"].replace("bfloat16", "bf16").replace("float32", "fp32")] if "dtype" in parameters else []
    words += [parameters["mode"]] if parameters.get("mode", "forward") != "forward" else []
    return " ".join(words)


def _fuse(metric: str, *modes: str, least: int = 1) -> Callable[[Cases], Values]:
    def find(cases: Cases) -> Values:
        found = fusions(cases, OURS, modes, least_batch=least)
        return {label_of(case): case["metrics"][metric] for case in found if metric in case["metrics"]}

    return find


def _over_compile(cases: Cases) -> Values:
    """Times faster than the best that torch.compile gave: of any formulation in any mode, each against ours of its run."""
    modes = ("forward", "frozen", "trainable")
    ours = {(case["part"], label_of(case)): case["metrics"]["median_s"] for case in fusions(cases, OURS, modes)}
    found: Values = {}
    for variant in sorted({case["parameters"].get("variant") or "" for case in cases}):
        if variant.startswith(COMPILE):
            for case in fusions(cases, variant, modes):
                label = label_of(case)
                if (seconds := ours.get((case["part"], label))) is not None:
                    times = case["metrics"]["median_s"] / seconds
                    found[label] = min(times, found.get(label, times))
    return found


def _allocator_graph(cases: Cases) -> Values:
    chosen = {"operation": "CUDA graph of allocator", "variant": OURS, "batch": 1}
    return {label_of(case): case["metrics"]["median_s"] for case in cases if chosen.items() <= case["parameters"].items()}


def _host(*pieces: str, label: str = "", metric: str = "least_s") -> Callable[[Cases], Values]:
    """What the pieces of the part ``host`` took; several are labelled by what follows ``label`` in their names."""

    def find(cases: Cases) -> Values:
        chosen = [case for case in cases if case["parameters"].get("operation") == "host" and metric in case["metrics"]]
        return {
            piece.removeprefix(label) if len(pieces) > 1 else "": case["metrics"][metric]
            for piece in pieces
            for case in chosen
            if case["parameters"]["piece"].startswith(piece)
        }

    return find


VISION_SIDES = ("streaming, by group", OURS)
"""The library's vision sides, of which a user takes the faster."""


def _over_llava(batch: int, operation: str | None) -> Callable[[Cases], Values]:
    """Time of the vision side over that of LLaVA-1.5's, less one."""

    def find(cases: Cases) -> Values:
        sides = {
            case["parameters"]["variant"]: case["metrics"]["median_s"]
            for case in cases
            if "llm_dim" in case["parameters"]
            and case["parameters"]["batch"] == batch
            and case["parameters"].get("operation") == operation
        }
        ours = [sides[side] for side in VISION_SIDES if side in sides]
        return {f"B={batch}": min(ours) / sides["LLaVA-1.5"] - 1} if ours and "LLaVA-1.5" in sides else {}

    return find


def _share_of_step(cases: Cases) -> Values:
    return {case["parameters"]["setup"]: case["metrics"]["fusion_share"] for case in cases if "fusion_share" in case["metrics"]}


def _apart(what: str) -> Callable[[Cases], Values]:
    def find(cases: Cases) -> Values:
        return {
            f"{case['parameters']['model']}, stage {case['parameters']['stage']}": case["metrics"]["times_faster"]
            for case in cases
            if case["parameters"].get("apart") == what
        }

    return find


STEP = [
    Target("training step: the fusion's share of it", "reported", "training", _share_of_step, SHARE),
    Target("training step, times faster by the loop", "reported", "training_step", _apart("the loop"), TIMES_FINE),
    Target("the same, by the kernels", "reported", "training_step", _apart("the kernels, without the loop"), TIMES_FINE),
]
LAUNCH = "fuse with its launch, "
INFERENCE, FROZEN = f"{LAUNCH}forward, forward pass", f"{LAUNCH}frozen, forward pass"
OTHER_PASSES = tuple(LAUNCH + each for each in ("frozen, backward pass", "trainable, forward pass", "trainable, backward pass"))
HOST = [
    Target("host cost of a call, inference (least)", "25 µs", "host", _host(INFERENCE), MICROSECONDS, most=25e-6),
    Target("the same, frozen tower, forward pass", "25 µs", "host", _host(FROZEN), MICROSECONDS, most=25e-6),
    Target("the same, other passes", "reported", "host", _host(*OTHER_PASSES, label=LAUNCH), MICROSECONDS),
    Target(
        "all of them, medians",
        "reported",
        "host",
        _host(INFERENCE, FROZEN, *OTHER_PASSES, label=LAUNCH, metric="median_s"),
        MICROSECONDS,
    ),
    Target(
        "`import igva_kernels` after torch (least)", "50 ms", "host", _host("import igva_kernels"), MILLISECONDS, most=50e-3
    ),
]
OVER_COMPILE = Target(
    "against the best of `torch.compile`", "faster", "peers", _over_compile, TIMES, least=1, also=("autotune", "kernels")
)
EAGER, COPY = "times_faster_than_official_eager", "share_of_copy"
LARGE = 16
"""Images from which the launch is a small part of a call on a card."""

TARGETS: dict[str, list[Target]] = {
    "cpu": [
        Target("forward, share of a copy beside it", "85 %", "kernels", _fuse(COPY, "forward"), PERCENT, least=0.85),
        Target("forward against official eager", "5 ×", "kernels", _fuse(EAGER, "forward"), TIMES, least=5),
        Target("forward and backward against it", "2.5 ×", "kernels", _fuse(EAGER, "frozen", "trainable"), TIMES, least=2.5),
        OVER_COMPILE,
        *HOST,
        *STEP,
    ],
    "cuda": [
        Target(
            "forward, share of a copy beside it", "95 %", "kernels", _fuse(COPY, "forward", least=LARGE), PERCENT, least=0.95
        ),
        Target("forward against official eager", "4 ×", "kernels", _fuse(EAGER, "forward", least=LARGE), TIMES, least=4),
        OVER_COMPILE,
        Target(
            "both passes, frozen tower, against eager", "3 ×", "kernels", _fuse(EAGER, "frozen", least=LARGE), TIMES, least=3
        ),
        Target("both passes, trained tower", "4 ×", "kernels", _fuse(EAGER, "trainable", least=LARGE), TIMES, least=4),
        Target(
            "backward alone, share of a copy", "90 %", "kernels", _fuse(COPY, *BACKWARD_MODES, least=LARGE), PERCENT, least=0.9
        ),
        Target("both passes, share of a copy", "reported", "kernels", _fuse(COPY, "frozen", "trainable", least=LARGE), PERCENT),
        Target("allocator, replay of a CUDA graph", "60 µs", "kernels", _allocator_graph, MICROSECONDS, most=60e-6),
        Target("vision side over LLaVA-1.5's", "3 %", "vision", _over_llava(16, None), PERCENT_FINE, most=0.03),
        Target("the same in a CUDA graph", "8 %", "vision", _over_llava(1, "CUDA graph of vision"), PERCENT_FINE, most=0.08),
        *HOST,
        *STEP,
    ],
}


def slower_than(cases: Cases) -> list[str]:
    """Where a peer is faster than the library in the same run: one line a case, with both times in milliseconds."""
    ours: dict[tuple[str, str], float] = {}
    lines = []
    for case in cases:
        if case["parameters"].get("variant") == OURS and "median_s" in case["metrics"]:
            ours[case["part"], case["name"].removesuffix(f": {OURS}")] = case["metrics"]["median_s"]
    for case in cases:
        variant = case["parameters"].get("variant")
        name = case["name"].removesuffix(f": {variant}")
        is_peer = variant == BASELINE or (variant or "").startswith(COMPILE) or (variant or "").endswith("AttnRes")
        if not is_peer or (seconds := ours.get((case["part"], name))) is None:
            continue
        if case["metrics"]["median_s"] < seconds:
            lines.append(f"{name}: {variant} {1e3 * case['metrics']['median_s']:.3g} ms, igva_kernels {1e3 * seconds:.3g} ms")
    return lines
