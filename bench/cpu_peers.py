"""How fast and how accurate are whole models on a CPU, ours and those of llama.cpp and torchao?

    python bench/cpu_peers.py --model DIR --texts DIR --calibration FILE

All start from one float checkpoint. Accuracy is KL to its float32 logits on the same windows;
speed is prefill of 512 tokens and decoding behind them, up to 1,024, logits of the last token only,
all variants in turn and only where the cores are ours (see `cpu_peaks`).

* ours: scored and calibrated on text, float32 outside of the linears, once with a float head and
  once with the head among the quantized linears.
* llama.cpp: its own quantizer on a GGUF file that `gguf_llama` writes, with and without an
  importance matrix of the same text; keys and values in float16. It quantizes the head, and the
  embedding with it where the two are one. Nothing is measured before its float32 model
  agrees with the checkpoint's.
* torchao: `quantize_` as it comes, so with the head, then Inductor with frozen weights; bfloat16.

True bits are those of the stored linears, scales included: of the decoder, of the head, of both.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn
from transformers import PreTrainedModel

import lab
from cpu_model import CACHE, PROMPT, Steps
from cpu_peaks import Peaks, Timing
from gguf_llama import importances, stored, write
from lab import TEXTS, Lab
from llama_cpp_model import LlamaCpp, quantize, system
from mixllm_compiler import Plan, plan, score
from mixllm_compiler import quantize as quantize_linears
from mixllm_compiler.evaluation.measure import CausalLM, Quality, compare, kl_ratio
from mixllm_compiler.lowering.cpp import isa
from results_io import Bar, write_results

FLOAT, THEIR_FLOAT = "torch.compile", "llama.cpp F32"
KINDS = ("Q8_0", "Q4_0", "Q4_K_M")
SAME_BITS = ("Q4_0", "Q4_K_M")  # those that ours is compared with; with importances, too
SAME = 1e-5  # KL of one float model to another in nats per token, above which they are not the same
TOKENS = 8  # decoded in one window
HEAD = "lm_head"


class Timed(Protocol):
    """What is timed."""

    def prefill(self) -> Tensor: ...
    def decode(self) -> Tensor: ...


@dataclass(frozen=True)
class Variant:
    """One model: to be timed, and as a function of ids; and what it stores."""

    steps: Timed
    logits: CausalLM
    decoder: float  # bits per weight, as head and linears (both)
    head: float
    linears: float
    more: dict[str, Any] = field(default_factory=dict)


def ours(model: PreTrainedModel, made: Plan, data: Tensor, scores: Any) -> Variant:
    """Quantized as the README's most accurate recipe does it."""
    one = quantize_linears(copy.deepcopy(model), made, data, scores=scores)
    decoder = [site for name, site in made.sites.items() if name != HEAD]
    bits = 8 * sum(s.true_bytes for s in decoder) / sum(s.n * s.k for s in decoder)
    head = made.sites.get(HEAD)
    rest = model.get_output_embeddings().weight
    head_bits = 8 * head.true_bytes / (head.n * head.k) if head else 32.0
    size = sum(s.n * s.k for s in decoder)
    linears = (bits * size + head_bits * rest.numel()) / (size + rest.numel())
    steps = Steps(one, torch.compile(one, backend="mixllm", options={"quiet": True}))
    return Variant(steps, one, bits, head_bits, linears, {"calibration tokens": data.numel()})


def our_variants(there: Lab, budgets: dict[str, float]) -> Iterator[tuple[str, Variant]]:
    """The default plan and one of Q4_0's 4.5 bits, and plans with the head for given budgets."""
    for head, asked in ((False, {"4.4 bits": 4.4, "4.5 bits": 4.5}), (True, budgets)):
        ids = there.calibration[: there.score_sequences]
        scores = score(there.model, ids, lm_head=head)
        for name, bits in asked.items():
            made = plan(scores, bits=bits)
            label = f"mixllm {name}, {'quantized' if head else 'float'} head"
            yield label, ours(there.model, made, there.calibration, scores)


def llama_cpp_variants(
    there: Lab, folder: Path, prompt: Tensor, threads: int
) -> Iterator[tuple[str, Variant]]:
    """The float model, which has to agree with ours, and llama.cpp's types."""
    source = folder / "F32.gguf"
    write(there.model, source)
    jobs: list[tuple[str, Path, dict[str, Tensor] | None]] = [(THEIR_FLOAT, source, None)]
    jobs += [(theirs(kind), folder / f"{kind}.gguf", None) for kind in KINDS]
    matrix = importances(there.model, there.calibration)
    for kind in SAME_BITS:
        jobs.append((f"{theirs(kind)}, imatrix", folder / f"{kind}-imatrix.gguf", matrix))
    for label, path, given in jobs:
        if path != source:
            quantize(source, path, label.removeprefix("llama.cpp ").split(",")[0], threads, given)
        model, size = LlamaCpp(path, prompt, CACHE, threads), stored(path)
        more: dict[str, Any] = {"types": size.types, "head type": size.head_type}
        if given is not None:
            more["calibration tokens"] = there.calibration.numel()
        yield label, Variant(model, model, size.decoder, size.head, size.linears, more)


def torchao_variants(model: PreTrainedModel) -> Iterator[tuple[str, Variant]]:
    """int8 and int4 weights, and int8 of both: what torchao has for CPUs.

    Its int8 × int4 is left out: the wheel declares the op and brings no kernel for it.
    """
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    alone = {"set_inductor_config": False}  # it would set all variants'
    rows = [m for m in model.modules() if isinstance(m, nn.Linear)]
    # A float32 scale a row; a bfloat16 scale and zero point a group of 128.
    eight = 8 + 32 * sum(m.out_features for m in rows) / sum(m.weight.numel() for m in rows)
    for name, config, bits in (
        ("int8 weights", Int8WeightOnlyConfig(**alone), eight),
        ("int8 weights and inputs", Int8DynamicActivationInt8WeightConfig(**alone), eight),
        ("int4 weights", PrototypeInt4WeightOnlyConfig(group_size=128, **alone), 4 + 32 / 128),
    ):
        one = copy.deepcopy(model).bfloat16()
        quantize_(one, config)
        run = torch.compile(one, options={"freezing": True})
        yield f"torchao {name}", Variant(Steps(one, run), one, bits, bits, bits)


def all_variants(
    there: Lab, folder: Path, threads: int, console: Console
) -> Iterator[tuple[str, Variant]]:
    """Everything that is compared, the float models first."""
    model = there.model
    yield FLOAT, Variant(Steps(model, torch.compile(model)), model, 32.0, 32.0, 32.0)
    prompt = there.tests[TEXTS[0]].ids[:1, :PROMPT]
    budgets = {"4.4 bits": 4.4}
    for label, variant in llama_cpp_variants(there, folder, prompt, threads):
        if label in map(theirs, SAME_BITS):
            budgets[f"bits of {label.split()[-1]}"] = variant.linears
        yield label, variant
    try:
        yield from torchao_variants(model)
    except ModuleNotFoundError as error:
        console.log(f"nothing of torchao: {error}")
    yield from our_variants(there, budgets)


def theirs(kind: str) -> str:
    """The name of a type of llama.cpp."""
    return f"llama.cpp {kind}"


def row(variant: Variant, quality: Quality, times: dict[str, Timing]) -> dict[str, Any]:
    """Of the results' table."""
    kl, tokens = quality.mean_kl, {"prefill": PROMPT, "decode": TOKENS}
    return {
        "decoder bits": round(variant.decoder, 3),
        "head bits": round(variant.head, 3),
        "true bits": round(variant.linears, 3),
        **{f"{kind} tokens/s": round(tokens[kind] / t.seconds, 1) for kind, t in times.items()},
        **{f"quiet {kind}": t.quiet for kind, t in times.items()},
        f"KL {TEXTS[0]}": float(f"{kl.value:.4g}"),
        f"se {TEXTS[0]}": float(f"{kl.se:.2g}"),
        f"top-1 {TEXTS[0]}": round(quality.top1.value, 4),
        f"perplexity {TEXTS[0]}": round(quality.perplexity, 3),
        **variant.more,
    }


def decoding(steps: Timed) -> Callable[[], None]:
    """Some tokens, one after the other."""

    def run() -> None:
        for _ in range(TOKENS):
            steps.decode()

    return run


def bars(rows: dict[str, dict[str, Any]], found: dict[str, Quality]) -> Iterator[Bar]:
    """Ours at the bits of a type of llama.cpp against the better one of its two."""
    for kind in SAME_BITS:
        own = f"mixllm bits of {kind}, quantized head"
        plain = theirs(kind)
        best = min((plain, f"{plain}, imatrix"), key=lambda name: found[name].mean_kl.value)
        ratio = kl_ratio(found[own], found[best])
        yield Bar.at_most(f"KL, ours / {best}, at {kind}'s bits", ratio.value, 1.0, se=ratio.se)
        for what in ("prefill", "decode"):
            speed = f"{what} tokens/s"
            times = rows[own][speed] / rows[plain][speed]
            yield Bar.at_least(f"{what}, x {plain}, at its bits", round(times, 2), 1.0)


def main(argv: list[str] | None = None) -> int:
    """Make all variants, compare them with float, time them in turn, write, show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    lab.arguments(parser)
    parser.add_argument("--patience", type=float, default=120.0, help="seconds to wait for quiet")
    parser.set_defaults(sequences=32, windows="4,0")
    args = lab.parse(parser, argv)
    warnings.filterwarnings("ignore")
    torch._dynamo.config.recompile_limit = 64  # all variants share the model's forward
    there = Lab.open(args)
    windows = there.tests[TEXTS[0]]
    variants: dict[str, Variant] = {}
    quality: dict[str, Quality] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for label, variant in all_variants(there, Path(folder), args.threads, there.console):
            started = time.perf_counter()
            quality[label] = compare(there.model, {"": variant.logits}, windows)[""]
            kl = quality[label].mean_kl
            if label == THEIR_FLOAT and kl.value > SAME:
                raise SystemExit(f"{label} is another model than transformers': KL {kl}")
            variant.steps.prefill()
            variant.steps.decode()
            variants[label] = variant
            there.say(f"{label}: KL {kl}", started)
        peaks = Peaks(args.threads)
        calls = {
            "prefill": {label: v.steps.prefill for label, v in variants.items()},
            "decode": {label: decoding(v.steps) for label, v in variants.items()},
        }
        times = {kind: peaks.measure(some, args.patience) for kind, some in calls.items()}
    rows = {
        label: row(variant, quality[label], {kind: times[kind][label] for kind in times})
        for label, variant in variants.items()
    }
    made = list(bars(rows, quality))
    if not args.quick:
        extra = {
            "model": args.name,
            "windows": f"{len(windows)} of {args.window} tokens",
            "instructions": isa.current().name,
            "threads": args.threads,
            "int8 operations/s of the calibration loop": float(f"{peaks.best:.3g}"),
            "llama.cpp": system(),
            "versions": {name: version(name) for name in ("llama-cpp-python", "gguf", "torchao")},
        }
        named = [{"variant": label, **line} for label, line in rows.items()]
        there.console.print(write_results(__file__, named, made, device="cpu", extra=extra).name)
    show(there.console, rows, made)
    return 0


def version(package: str) -> str | None:
    """Of a package that need not be there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def show(console: Console, rows: dict[str, dict[str, Any]], made: list[Bar]) -> None:
    """The table, and what was reached."""
    columns = [name for name in rows[FLOAT] if not name.startswith(("se", "perplexity"))]
    table = Table(Column("variant", no_wrap=True), *columns)
    for label, line in rows.items():
        table.add_row(label, *(str(line[name]) for name in columns))
    console.print(table)
    for bar in made:
        console.print(f"{'met ' if bar.met else 'MISSED'} {bar.name}: {bar.measured:.3g}")


if __name__ == "__main__":
    raise SystemExit(main())
