"""The demonstration: the shipped model from float to quantized, measured against itself.

Score → plan → quantize and compile → compare on text that nothing was calibrated on. Both the
float and the quantized model are compiled by Inductor; `demo.table` shows what comes out.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import api
from ..allocation.allocate import uniform_plan
from ..allocation.plan import Plan
from ..calibration.tokens import split_documents
from ..errors import OptionError
from ..evaluation.measure import Quality, compare
from ..evaluation.speed import Speed, measure_speed
from ..evaluation.text import begin_token, read_windows
from ..modules import PackedLinear
from ..runtime import records
from ..salience.scores import Scores
from . import HELDOUT, load

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..runtime.records import GraphRecord

Tell = Callable[[int, int], None]
Stages = Callable[[str], AbstractContextManager[Tell]]
"""Label of a stage → a context that is told (done, in all) while the stage runs."""

FLOAT, UNIFORM, MIXED = "float", "uniform 4 bits", "mixed"
STORED_BITS = 16  # of the checkpoint: bf16
WINDOW = 512
SEQUENCES = 8
WINDOWS = 16
PROMPT_TOKENS, NEW_TOKENS = 48, 64
REPEATS = 1  # after two calls of each model to warm up
DOCUMENT = 3  # of the held-out text, whose beginning the models continue


@dataclass(frozen=True)
class Line:
    """One model of the table; None where it was not measured.

    Attributes:
        bits: true bits per quantized weight.
        resident: bits per quantized weight in memory while it runs.
        stored: bytes of the whole model on disk, float parts in bf16.
    """

    name: str
    bits: float
    resident: float | None
    stored: float
    perplexity: float
    kl: float | None = None
    kl_error: float | None = None
    top1: float | None = None
    speed: Speed | None = None


@dataclass
class Demonstration:
    """Everything that the demonstration found out.

    Attributes:
        lines: float first, the mixed model last.
        plan: of the mixed model.
        graphs: what was compiled.
        tokens: of held-out text that were predicted.
        prompt, texts: what the models continued, and how: name → text.
        seconds: per stage.
        folder, files: what was written.
    """

    lines: list[Line]
    plan: Plan
    graphs: list[GraphRecord]
    tokens: int
    prompt: str
    texts: dict[str, str]
    seconds: dict[str, float]
    folder: Path
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def run(
    folder: Path,
    stages: Stages,
    *,
    bits: float | None = None,
    widths: Sequence[int] | None = None,
    quick: bool = False,
) -> Demonstration:
    """Do all of it; `folder` receives the plot, the plan and the IR after every pass.

    Args:
        stages: shows progress.
        bits: true bits per quantized weight; the compiler's default without.
        widths: bits that a row may have; the compiler's default without.
        quick: less text and shorter answers, graphs interpreted instead of compiled: for tests.
    """
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"{str(folder)!r} is a file; the demonstration needs a folder")
    folder.mkdir(parents=True, exist_ok=True)
    timed = _Timed(stages)
    more: dict[str, Any] = {} if widths is None else {"widths": tuple(widths)}
    with timed("loading the shipped model"):
        model, tokenizer = load()
    scores = _score(model, timed, quick, more)
    with timed("planning the bits of every row"):
        plan = api.plan(scores, bits=_budget(bits))
        uniform = uniform_plan(scores.fingerprint, scores.shapes, 4, family="asym")
    compiled = copy.deepcopy(model)
    lower = "eager" if quick else "inductor"
    ir = folder / "ir"
    _remove_old_dump(ir)
    settings = {**more, "lower": lower, "dump": ir, "quiet": True}
    api.compile(compiled, plan=plan, dynamic=False, **settings)
    with records.collect() as graphs:
        plain = api.quantize(copy.deepcopy(model), uniform)
        quality, tokens = _quality(model, compiled, plain, tokenizer, timed, quick)
        prompt = _prompt(tokenizer)
        new_tokens = 8 if quick else NEW_TOKENS
        if not quick:
            model.compile(dynamic=False)
        speed = _speed({FLOAT: model, MIXED: compiled}, prompt, new_tokens, timed)
        with timed("writing a paragraph with each") as tell:
            texts = {}
            for at, (name, one) in enumerate({FLOAT: model, MIXED: compiled}.items()):
                texts[name] = _write(one, tokenizer, prompt, new_tokens)
                tell(at + 1, 2)
    resident = {UNIFORM: _packed_bits(plain), MIXED: _resident(graphs)}
    lines = _lines(scores, {UNIFORM: uniform, MIXED: plan}, resident, quality, speed, model)
    asked = str(tokenizer.decode(prompt[0], skip_special_tokens=True))
    found = Demonstration(lines, plan, graphs, tokens, asked, texts, timed.seconds, folder)
    _write_files(found, ir)
    return found


class _Timed:
    """Stages whose seconds are kept."""

    def __init__(self, stages: Stages) -> None:
        self.stages = stages
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, label: str) -> Iterator[Tell]:
        started = time.perf_counter()
        with self.stages(label) as tell:
            yield tell
        self.seconds[label] = time.perf_counter() - started


def _budget(bits: float | None) -> float:
    from ..options import DEFAULT_BITS

    return DEFAULT_BITS if bits is None else bits


def _score(model: PreTrainedModel, timed: _Timed, quick: bool, more: dict[str, Any]) -> Scores:
    """On text that the model writes itself: nothing but the model is needed."""
    with timed("scoring every output feature") as tell:
        return api.score(
            model,
            "self",
            sequences=2 if quick else SEQUENCES,
            length=64 if quick else WINDOW,
            progress=tell,
            **more,
        )


def _quality(
    model: PreTrainedModel,
    compiled: PreTrainedModel,
    plain: PreTrainedModel,
    tokenizer: Any,
    timed: _Timed,
    quick: bool,
) -> tuple[dict[str, Quality], int]:
    count, length = (1, 64) if quick else (WINDOWS, WINDOW)
    windows = read_windows(HELDOUT, tokenizer, count=count, length=length)
    with timed("compiling, and reading held-out text") as tell:
        candidates = {UNIFORM: plain, MIXED: compiled}
        return compare(model, candidates, windows, progress=tell), windows.tokens


def _prompt(tokenizer: Any) -> Tensor:
    """The beginning of a held-out document, with the token that begins one: ids [1, T]."""
    document = split_documents(HELDOUT.read_text(encoding="utf-8"))[DOCUMENT]
    _title, _, body = document.partition("\n")
    text = " ".join(body.split())
    ids = tokenizer.encode(text, add_special_tokens=False)[: PROMPT_TOKENS - 1]
    return torch.tensor([[begin_token(tokenizer) or 0, *ids]])


def _speed(
    models: dict[str, Any], prompt: Tensor, new_tokens: int, timed: _Timed
) -> dict[str, Speed]:
    with timed("compiling both for generation, and timing them") as tell, torch.no_grad():
        return measure_speed(
            models,
            prompt=prompt,
            new_tokens=new_tokens,
            repeats=REPEATS,
            progress=tell,
            cache_implementation="static",
        )


def _write(model: Any, tokenizer: Any, prompt: Tensor, new_tokens: int) -> str:
    """A continuation, sampled from the same seed; the shapes are those that were compiled."""
    torch.manual_seed(0)
    with torch.no_grad():
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=0.7,
            top_k=40,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            cache_implementation="static",
            pad_token_id=0,
        )
    text: str = tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())


def _lines(
    scores: Scores,
    plans: dict[str, Plan],
    resident: dict[str, float],
    quality: dict[str, Quality],
    speed: dict[str, Speed],
    model: PreTrainedModel,
) -> list[Line]:
    weights = sum(n * k for n, k in scores.shapes.values())
    everything = sum(p.numel() for p in model.parameters())
    rest = (everything - weights) * STORED_BITS / 8
    running = next(model.parameters()).element_size() * 8
    line = Line(
        FLOAT,
        STORED_BITS,
        running,
        rest + weights * STORED_BITS / 8,
        quality[MIXED].float_perplexity,
        speed=speed[FLOAT],
    )
    lines = [line]
    for name, made in plans.items():
        measured = quality[name]
        lines.append(
            Line(
                name,
                made.true_bits,
                resident[name],
                rest + made.true_bytes,
                measured.perplexity,
                measured.mean_kl.value,
                measured.mean_kl.se,
                measured.top1.value,
                speed.get(name),
            )
        )
    return lines


def _packed_bits(model: PreTrainedModel) -> float:
    """Bits per weight of the blobs of a model's quantized modules."""
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    bits = 8 * sum(m.packed.numel() for m in packed)
    return bits / sum(m.in_features * m.out_features for m in packed)


def _resident(graphs: Sequence[GraphRecord]) -> float:
    """Bits per weight of the blobs that compiled graphs read."""
    lines = {line.name: line for graph in graphs for line in graph.quantized}.values()
    bits = sum((line.resident_bits or 0.0) * line.n * line.k for line in lines)
    return bits / sum(line.n * line.k for line in lines)


def _remove_old_dump(ir: Path) -> None:
    """Another run may have compiled more graphs than this one will; nothing else is touched."""
    for graph in ir.glob("graph*"):
        if (graph / "00-captured.py").is_file():
            shutil.rmtree(graph)


def _write_files(found: Demonstration, ir: Path) -> None:
    from ..report.bits_map import BitsMap
    from ..report.bits_plot import PlotError, save_bits_plot

    plan, plot = found.folder / "plan.safetensors", found.folder / "bits.svg"
    found.plan.save(plan)
    found.files = [plan, ir]
    title = f"{found.plan.true_bits:.2f} true bits per weight, {found.plan.asked} asked for"
    try:
        save_bits_plot(BitsMap.of_plan(found.plan), plot, title)
    except PlotError as error:
        found.notes.append(str(error))
    else:
        found.files.insert(0, plot)
