"""A model, its texts, and what quality benches do with them: score, plan, quantize, measure.

Scores are made once per (kind, format, rotation, …) and shared; the float model runs once per text.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import hashlib
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mixllm_compiler import Plan, Scores, score
from mixllm_compiler.allocation.allocate import make_plan, uniform_plan
from mixllm_compiler.calibration.tokens import written_by
from mixllm_compiler.evaluation.measure import Quality, compare, kl_ratio
from mixllm_compiler.evaluation.text import Windows, cut_windows
from mixllm_compiler.formats.bits import true_bits
from mixllm_compiler.formats.neutral import QuantizedWeight
from mixllm_compiler.formats.row_format import WIDTHS
from mixllm_compiler.modules import PackedLinear
from mixllm_compiler.options import Options
from mixllm_compiler.passes.captured_model import CapturedModel, capture_model, even_batch
from mixllm_compiler.passes.fold_rotation import fold_rotation
from mixllm_compiler.passes.quantize_model import QuantizingRun, Recipe, dequantized
from mixllm_compiler.passes.scale_model import scale_model
from mixllm_compiler.transforms.hadamard import block_for, block_hadamard

TEXTS = ("wikitext2_test", "gutenberg_test")
ROTATION = 256
_BATCH = 16  # sequences that go through the model together
ONE_SHOT = Recipe(propagate=False, refit=False, sweeps=0)  # GPTQ + clip, as published
FULL = Recipe()
PAPER_BITS = "the paper's bits"
FOLDED = "fold-rotation"
OWN_TEXT = "its own text"  # as a rewriting: the same model, calibrated on what it writes
_OWN_SEQUENCES = 64
_BETWEEN_DOCUMENTS = "\n\n\n"
RAW = {"family": "asym", "rotate": 0, "widths": (4, 8)}
PAPER_SCORES = {"kind": "paper", "sequences": 64, **RAW}


@dataclass(frozen=True)
class Case:
    """One model to quantize and measure.

    Attributes:
        label, section: for the table.
        bits: true bits, PAPER_BITS for those of the paper's plan, None for what the preset gives.
        scores: arguments of `Lab.scores`; ours by default.
        plan: further arguments of `make_plan`; `{"uniform": 4}` gives all rows that width.
        recipe: of the weight quantizer.
        sequences: of calibration text, None for all.
        rewrite: of the float model, first: a method of `scale_model`, FOLDED, OWN_TEXT, or "".
        runner: quantizes the model.
        gains: width → factor on its losses, where rows of it are quantized better than scored.
    """

    label: str
    bits: float | str | None = None
    section: str = ""
    scores: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    recipe: Recipe = FULL
    sequences: int | None = None
    rewrite: str = ""
    runner: type[QuantizingRun] = QuantizingRun
    gains: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """One quantized model: what a table shows a row of."""

    label: str
    plan: Plan
    true_bits: float
    seconds: float
    quality: Mapping[str, Quality]

    def kl(self, text: str = TEXTS[0]) -> float:
        return self.quality[text].mean_kl.value

    def row(self, baseline: Line | None = None) -> dict[str, Any]:
        """For the JSON: true bits, seconds of quantizing, KL with its error, top-1, perplexity."""
        row: dict[str, Any] = {
            "plan": self.label,
            "true bits": round(self.true_bits, 4),
            "seconds": round(self.seconds, 1),
        }
        for text, quality in self.quality.items():
            row[f"KL {text}"] = _digits(quality.mean_kl.value)
            row[f"se {text}"] = _digits(quality.mean_kl.se, 2)
            row[f"top-1 {text}"] = round(quality.top1.value, 4)
            row[f"perplexity {text}"] = round(quality.perplexity, 3)
            if baseline is not None:
                ratio = kl_ratio(quality, baseline.quality[text])
                row[f"ratio {text}"] = round(ratio.value, 4)
                row[f"ratio se {text}"] = round(ratio.se, 4)
        if baseline is not None:
            row["of"] = baseline.label
        if self.plan.predicted_loss is not None:
            row["score sum"] = _digits(self.plan.predicted_loss)
        row["rows"] = {f"w{bits}": n for bits, n in self.plan.rows_per_width().items()}
        return row


@dataclass
class Lab:
    """One model on one device with calibration and test text; a folder shares scores."""

    model: PreTrainedModel
    calibration: Tensor
    score_sequences: int
    tests: Mapping[str, Windows]
    console: Console
    shared: Path | None = None
    _scores: dict[tuple[object, ...], Scores] = field(default_factory=dict)
    _captured: dict[tuple[object, ...], CapturedModel] = field(default_factory=dict)
    _rewritten: dict[tuple[str, int], Lab] = field(default_factory=dict)

    @classmethod
    def open(cls, args: argparse.Namespace) -> Lab:
        """From the arguments that `arguments` adds."""
        torch.set_num_threads(args.threads)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        read = functools.partial(_running_text, tokenizer=tokenizer)
        calibration = read(args.calibration, count=args.sequences, length=args.length).ids
        tests = {
            text: read(args.texts / f"{text}.txt", count=count, length=args.window)
            for text, count in zip(TEXTS, args.windows, strict=True)
            if count
        }
        console = Console(width=None if Console().is_terminal else 150)
        model = model.to(args.device)
        return cls(model, calibration, args.score_sequences, tests, console, args.shared)

    def scores(
        self,
        kind: str = "kfac",
        family: str = "two-level",
        rotate: int = ROTATION,
        widths: tuple[int, ...] = WIDTHS,
        sequences: int | None = None,
        **options: Any,
    ) -> Scores:
        """Scores on the first calibration sequences, made once by all that share a folder."""
        count = sequences or self.score_sequences
        key = (kind, family, rotate, widths, count, *sorted(options.items()))
        if key in self._scores:
            return self._scores[key]
        settings = {"kind": kind, "widths": widths, "family": family, "rotate": rotate, **options}

        def make() -> Scores:
            started = time.perf_counter()
            scores = score(self.model, self.calibration[:count], **settings)
            self.say(f"scores {kind} {family} rotate {rotate}", started)
            return scores

        self._scores[key] = make() if self.shared is None else _once(self.shared, key, make)
        return self._scores[key]

    def weights(
        self,
        plan: Plan,
        recipe: Recipe,
        scores: Scores | None = None,
        sequences: int | None = None,
        runner: type[QuantizingRun] = QuantizingRun,
    ) -> dict[str, QuantizedWeight]:
        """What `mixllm_compiler.quantize` makes, from a graph that all plans share."""
        key = plan.rotation, sequences
        if key not in self._captured:
            ids = self.calibration[:sequences] if sequences else self.calibration
            batches = ids.split(even_batch(len(ids), max(1, min(_BATCH, len(ids) // 4))))
            options = Options(plan=plan, rotate=plan.rotation, quiet=True)
            self._captured[key] = capture_model(self.model, batches, options)
        curvature = None if scores is None else scores.curvature
        run = runner(self._captured[key], plan.sites, plan.activation_mode, recipe, curvature)
        return run.run()

    def line(
        self,
        label: str,
        plan: Plan,
        recipe: Recipe = FULL,
        scores: Scores | None = None,
        sequences: int | None = None,
        runner: type[QuantizingRun] = QuantizingRun,
    ) -> Line:
        """Quantize and measure."""
        started = time.perf_counter()
        weights = self.weights(plan, recipe, scores, sequences, runner)
        seconds = time.perf_counter() - started
        model = self.simulated(weights, plan.activation_mode)
        line = Line(label, plan, true_bits(weights.values()), seconds, self.measure(model))
        self.say(f"{label}: {line.true_bits:.3f} bits, KL {line.kl():.5f}", started)
        return line

    def simulated(self, weights: Mapping[str, QuantizedWeight], mode: str) -> PreTrainedModel:
        """The model in float arithmetic on dequantized numbers; a bar compares the compiled one."""
        return self._with_linears(weights, lambda weight, bias: _Simulated(weight, bias, mode))

    def packed(self, weights: Mapping[str, QuantizedWeight], mode: str) -> PreTrainedModel:
        """The model with packed linears, as `mixllm_compiler.quantize` leaves it."""
        return self._with_linears(weights, lambda weight, bias: PackedLinear(weight, bias, mode))

    def _with_linears(
        self,
        weights: Mapping[str, QuantizedWeight],
        make: Callable[[QuantizedWeight, Tensor | None], nn.Module],
    ) -> PreTrainedModel:
        """A copy of the model with other modules in place of its linears."""
        model = copy.deepcopy(self.model)
        for name, weight in weights.items():
            bias = getattr(model.get_submodule(name), "bias", None)
            model.set_submodule(name, make(weight, bias))
        return model

    def run(self, case: Case) -> Line:
        """Plan, quantize, measure."""
        if case.rewrite:
            lab = self.rewritten(case.rewrite, int(case.scores.get("rotate", ROTATION)))
            return lab.run(dataclasses.replace(case, rewrite=""))
        scores = self.scores(**case.scores)
        if case.gains:
            factors = torch.tensor([case.gains.get(f.bits, 1.0) for f in scores.formats])
            loss = {name: loss * factors for name, loss in scores.loss.items()}
            scores = replace(scores, loss=loss)
        plan = self.plan(case, scores)
        return self.line(case.label, plan, case.recipe, scores, case.sequences, case.runner)

    def rewritten(self, method: str, rotate: int) -> Lab:
        """This lab with another model of the same float function; the last one is kept."""
        if (method, rotate) not in self._rewritten:
            started = time.perf_counter()
            ids = self.calibration[: self.score_sequences]
            batches = ids.split(even_batch(len(ids), 4))
            model, calibration = self.model, self.calibration
            if method == OWN_TEXT:
                count = min(_OWN_SEQUENCES, len(calibration))
                calibration = written_by(model, count, calibration.shape[1])
            elif method == FOLDED:
                model = fold_rotation(model, batches[0])
            else:
                model = scale_model(model, batches, method, rotate=rotate)
            lab = Lab(model, calibration, self.score_sequences, self.tests, self.console)
            self._rewritten = {(method, rotate): lab}
            self.say(f"model rewritten by {method}, rotate {rotate}", started)
        return self._rewritten[method, rotate]

    def plan(self, case: Case, scores: Scores) -> Plan:
        """The plan of a case."""
        rotation = int(scores.settings["rotate"])
        settings: dict[str, Any] = {"rotation": rotation, **case.plan}
        if "uniform" in settings:
            bits, group = settings.pop("uniform"), scores.group
            return uniform_plan(
                scores.fingerprint,
                scores.shapes,
                bits,
                group=group,
                family=scores.family,
                **settings,
            )
        bits = case.bits
        if bits == PAPER_BITS:
            bits = make_plan(self.scores(**PAPER_SCORES), preset="paper").true_bits
        return make_plan(scores, bits=bits, **settings)

    def measure(self, model: Callable[..., Any]) -> dict[str, Quality]:
        """One model against float on every text."""
        return {
            text: compare(self.model, {"": model}, windows)[""]
            for text, windows in self.tests.items()
        }

    def activation_floor(self, rotation: int) -> float:
        """KL of the float weights with int8 activations per token, on the first text."""
        model = copy.deepcopy(self.model)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.register_forward_pre_hook(functools.partial(_round_input, rotation))
        text = TEXTS[0]
        return compare(self.model, {"": model}, self.tests[text])[""].mean_kl.value

    def with_weights(self, weights: Mapping[str, Tensor]) -> PreTrainedModel:
        """The float model with other weights in some of its linears."""
        model = copy.deepcopy(self.model)
        missing = model.load_state_dict(dict(weights), strict=False)
        assert not missing.unexpected_keys, f"unknown weights: {missing.unexpected_keys[:3]}"
        return model

    def say(self, what: str, started: float) -> None:
        self.console.log(f"{what} [{time.perf_counter() - started:.1f} s]")


def _once(folder: Path, key: tuple[object, ...], make: Callable[[], Scores]) -> Scores:
    """The first process to ask makes the scores, the others wait for them."""
    path = folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()}.safetensors"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            make().save(path)
        return Scores.load(path)


def _running_text(path: Path, tokenizer: Any, count: int, length: int) -> Windows:
    """The first tokens of a file as it stands, blank characters around its documents included."""
    documents = path.read_text(encoding="utf-8").split(_BETWEEN_DOCUMENTS)
    kept = [document for document in documents if document.strip()]
    return cut_windows(kept, tokenizer, count=count, length=length, begin=False, name=str(path))


def _round_input(rotation: int, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """x through int8 and back, in the rotated basis."""
    (x,) = args
    block = block_for(x.shape[-1], rotation)
    turned = block_hadamard(x, block) if block else x
    rounded = dequantized(turned, "token", x.shape[-1])
    return (block_hadamard(rounded, block) if block else rounded,)


class _Simulated(nn.Module):
    """A quantized linear in fp32: y = x̂ Ŵᵀ + b."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, mode: str) -> None:
        super().__init__()
        self.w = weight.dequantize(torch.float32)
        self.bias, self.mode, self.group = bias, mode, weight.group
        self.block = int(weight.transform.removeprefix("hadamard:") or 0)

    def forward(self, x: Tensor) -> Tensor:
        turned = block_hadamard(x, self.block) if self.block else x
        return nn.functional.linear(dequantized(turned, self.mode, self.group), self.w, self.bias)


_LAB: Lab | None = None


def _open(args: argparse.Namespace, started: Synchronized[int] | None = None) -> None:
    """Make this process's lab; processes take turns in choosing among several GPUs."""
    global _LAB
    if started is not None and args.device == "cuda":
        with started.get_lock():
            turn, started.value = started.value, started.value + 1
        torch.cuda.set_device(turn % torch.cuda.device_count())
    _LAB = Lab.open(args)


def _run(case: Case) -> Line:
    assert _LAB is not None
    return _LAB.run(case)


def run_cases(args: argparse.Namespace, cases: Sequence[Case]) -> dict[str, Line]:
    """All cases, in `--workers` processes: one process cannot keep a GPU busy.

    Cases that are not done after `--limit` seconds are left out, and the console says which.
    """
    ends = time.perf_counter() + args.limit
    if args.workers < 2:
        _open(args)
        return {c.label: _run(c) for c in cases if time.perf_counter() < ends}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        args = argparse.Namespace(**{**vars(args), "shared": Path(folder)})
        return _run_side_by_side(args, cases, ends)


def _run_side_by_side(
    args: argparse.Namespace, cases: Sequence[Case], ends: float
) -> dict[str, Line]:
    found: dict[str, Line] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, context, _open, (args, context.Value("i", 0))) as pool:
        futures = {pool.submit(_run, case): case for case in cases}
        left = None if math.isinf(ends) else max(0.0, ends - time.perf_counter())
        try:
            for future in as_completed(futures, left):
                label = futures[future].label
                if future.exception() is None:
                    found[label] = future.result()
                else:
                    print(f"{label} failed: {future.exception()}")
        except TimeoutError:
            late = [case.label for future, case in futures.items() if not future.done()]
            print(f"left out after {args.limit:.0f} s: {', '.join(late)}")
            pool.shutdown(cancel_futures=True, wait=False)
            for process in multiprocessing.active_children():
                process.terminate()
    return {case.label: found[case.label] for case in cases if case.label in found}


def _digits(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def arguments(parser: argparse.ArgumentParser) -> None:
    """What every quality bench needs to know."""
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a causal LM")
    add("--texts", type=Path, required=True, help=f"folder with {' and '.join(TEXTS)} (.txt)")
    add("--calibration", type=Path, required=True, help="text file to calibrate on")
    add("--name", help="of the model in the results; by default the folder's name")
    add("--sequences", type=int, default=128, help="calibration sequences")
    add("--score-sequences", type=int, default=16, help="of them to score on")
    add("--length", type=int, default=1024, help="tokens of each")
    add("--windows", default="24,16", help="windows of the two texts")
    add("--window", type=int, default=1024, help="tokens of each")
    add("--threads", type=int, default=2)
    add("--device", default="cpu", help="cpu or cuda")
    add("--workers", type=int, default=1, help="processes that share the devices")
    add("--limit", type=float, default=math.inf, help="seconds, after which cases are left out")
    add("--quick", action="store_true", help="a few short windows; nothing is written")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Arguments, checked; `--quick` makes everything small."""
    args = parser.parse_args(argv)
    args.shared = None
    args.windows = [int(count) for count in args.windows.split(",")]
    if len(args.windows) != len(TEXTS):
        parser.error(f"--windows needs {len(TEXTS)} numbers, one a text")
    if args.quick:
        args.sequences, args.score_sequences, args.length = 4, 2, 256
        args.windows, args.window = [2, 2], 256
    args.name = args.name or args.model.resolve().name
    return args
