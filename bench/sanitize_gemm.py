"""What does compute-sanitizer say of the CUDA kernels? Every variant and quantizer once.

    python bench/sanitize_gemm.py                      memcheck, then racecheck
    python bench/sanitize_gemm.py --tools racecheck --variants prefill:256,3,4

A small process launches each kernel on a small matrix of six widths, at numbers of tokens that
leave tails; what the tool reports is counted for the kernel that ran then. Where the tool itself
fails, that is reported, and the rest runs in a new process. Exit code 1 if it found anything.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from typing import Any

import torch

from mixllm_compiler import runtime  # noqa: F401  kernels go into the build cache
from mixllm_compiler.formats.layout import pack
from mixllm_compiler.formats.row_format import WIDTHS
from mixllm_compiler.lowering import fused
from mixllm_compiler.lowering.cuda import dispatch, launch, timing
from mixllm_compiler.lowering.cuda.generate import VERSION, LinearSpec
from mixllm_compiler.lowering.cuda.variants import Variant
from mixllm_compiler.lowering.lowered import LOWERED_LINEAR, LOWERED_QUANTIZE
from mixllm_compiler.lowering.target import Target
from results_io import Bar, write_results

TOOLS = ("memcheck", "racecheck")
N, K = 333, 700
LIMIT = 540  # seconds for a process
MARK = "kernel> "
SOURCES = ("plain", *fused.NORMS, *fused.ACTIVATIONS)
FINDING = re.compile(
    r"=+ (?!ERROR SUMMARY|RACECHECK SUMMARY|COMPUTE-SANITIZER|\s)"
    r"(.*(?:Invalid|[Rr]ace|hazard|Misaligned|out of bounds|Uninitialized|leak).*)"
)
BROKEN = re.compile(r"=+ .*(?:[Ii]nternal|not supported|Unable|unsupported).*")


def launch_all(names: list[str]) -> None:
    """Every kernel once, with its name in front: what the tool watches."""
    layout = blob = None
    for name in names:
        print(MARK + name, flush=True)
        source, _, block = name.partition("/")
        if source in SOURCES:
            quantize(source, int(block))
            torch.cuda.synchronize()
            continue
        if blob is None:
            widths = torch.tensor(WIDTHS, dtype=torch.uint8)[torch.arange(N) % len(WIDTHS)]
            packed = pack(timing.random_weight(widths, K, "cpu"), "cuda64.v1")
            layout, blob = str(packed.layout), packed.blob.cuda()
        variant = Variant.parse(name)
        few = variant.regime in ("decode", "staged")
        for m in (1, variant.tokens) if few else (1, variant.tokens + 1):
            x = torch.randn(m, K).bfloat16().cuda()
            activation = LOWERED_QUANTIZE(x, "token", 128, 0, VERSION)
            with launch.trying(variant):
                LOWERED_LINEAR(*activation, blob, None, layout, torch.bfloat16, VERSION)
            torch.cuda.synchronize()
    print(MARK + "end", flush=True)


def quantize(source: str, block: int) -> None:
    """One quantizer, on rows that end inside a vector where nothing is transformed."""
    k, quantizer = (512 if block else 301), ("token", 128, block, VERSION)
    x, other = (torch.randn(5, k).bfloat16().cuda() for _ in range(2))
    if source == "plain":
        LOWERED_QUANTIZE(x, *quantizer)
    elif source in fused.NORMS:
        w = torch.randn(k).bfloat16().cuda()
        args = (w, w if source == "layer_norm" else None, 1e-5, source, *quantizer)
        fused.NORM_QUANTIZE(x, *args)
        fused.ADD_NORM_QUANTIZE(x, other, *args)
    else:
        fused.ACTIVATION_QUANTIZE(x, other, source, *quantizer)


def check(tool: str, names: list[str]) -> list[dict[str, Any]]:
    """Rows of the table: what the tool found in each kernel."""
    rows: list[dict[str, Any]] = []
    left = list(names)
    # Without torch's cache every tensor is an allocation of its own, whose borders are watched.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    while left:
        command = ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no"]
        command += [sys.executable, __file__, "--child", *left]
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env=environment, timeout=LIMIT, errors="replace",
            )  # fmt: skip
            output, ended = done.stdout, f"the process ended with {done.returncode}"
        except subprocess.TimeoutExpired as error:
            raw = error.stdout or b""
            output = raw.decode(errors="replace") if isinstance(raw, bytes) else raw
            ended = f"no end after {LIMIT} s"
        found = parsed(tool, output, ended)
        if not found:
            tail = " ".join(output.split())[-300:]
            return [*rows, row(tool, left[0], 0, "", f"{ended} before any kernel ran: {tail}")]
        rows += found
        seen = {entry["kernel"] for entry in found}
        left = [name for name in left if name not in seen]
    return rows


def parsed(tool: str, output: str, ended: str) -> list[dict[str, Any]]:
    """Rows of all kernels that a process came to; the last one may not have come to its end."""
    rows: list[dict[str, Any]] = []
    whole = False
    for line in output.splitlines():
        if line.startswith(MARK):
            name = line.removeprefix(MARK)
            whole = name == "end"
            if not whole:
                rows.append(row(tool, name, 0, "", ""))
        elif rows and not whole:
            if match := FINDING.match(line):
                rows[-1]["findings"] += 1
                rows[-1]["first"] = rows[-1]["first"] or match[1].strip()
            elif BROKEN.match(line):
                rows[-1]["tool failed"] = rows[-1]["tool failed"] or line.strip("= \n")
    if rows and not whole and not rows[-1]["tool failed"]:
        last = " ".join(line.strip("= ") for line in output.splitlines()[-3:])
        rows[-1]["tool failed"] = f"{ended}; {last[-200:]}"
    return rows


def row(tool: str, kernel: str, findings: int, first: str, failed: str) -> dict[str, Any]:
    """One line of the table."""
    return {
        "tool": tool,
        "kernel": kernel,
        "findings": findings,
        "first": first,
        "tool failed": failed,
    }


def main() -> int:
    """Compile, run the tools, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tools", nargs="*", default=TOOLS)
    parser.add_argument("--variants", nargs="*", help="only these")
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        launch_all(options.child)
        return 0
    timing.available()
    if shutil.which("compute-sanitizer") is None:
        raise SystemExit("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    target = Target.of("cuda")
    variants = options.variants or sorted(map(str, dispatch.shipped(target)))
    quantizers = [] if options.variants else [f"{s}/{block}" for s in SOURCES for block in (0, 128)]
    specs = (LinearSpec(WIDTHS, torch.bfloat16, Variant.parse(v)) for v in variants)
    launch.compile_ahead(specs)
    rows, bars = [], []
    for tool in options.tools:
        found = check(tool, [*quantizers, *variants])
        for entry in found:
            if entry["findings"] or entry["tool failed"]:
                print(entry, flush=True)
        broken = sum(bool(entry["tool failed"]) for entry in found)
        total = sum(entry["findings"] for entry in found)
        bars.append(Bar.exactly(f"{tool}: findings in {len(found)} kernels", total, 0))
        bars.append(Bar.exactly(f"{tool}: kernels in which the tool itself failed", broken, 0))
        rows += found
    for bar in bars:
        print(f"{'met   ' if bar.met else 'MISSED'} {bar.name}: {bar.measured} {bar.target}")
    if not options.variants and tuple(options.tools) == TOOLS:
        print("written:", write_results(__file__, rows, bars, device="cuda").name)
    return int(any(entry["findings"] for entry in rows))


if __name__ == "__main__":
    raise SystemExit(main())
