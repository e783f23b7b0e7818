"""How fast are other libraries' linears at the shapes of `gemm.py`? Used by `gemm.py --peers`.

    python bench/gemm_peers.py                                 all peers, a table
    python bench/gemm_peers.py --peer 'gemlite W4A16' --tokens 1,64

A peer quantizes random bf16 weights by its own rules; first its result is compared with the float
product (8-bit weights must come within 6 %, 4-bit ones within 20 %), then it is timed like ours:
replays of CUDA graphs over more weights than the cache holds. Every peer runs in a process of its
own with a time limit, so one that is missing, breaks or tunes without end costs the others nothing;
what it had measured by then counts. `quantizer` says whether a time contains making int8 or fp8
of the activations: inside, outside (codes are given), none (it reads bf16).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gpu_timing import ROTATED_BYTES, capture, medians
from mixed_linears import LLAMA_8B, MIX

TOKENS = (1, 4096, 16, 256, 1024, 64, 8, 128, 32)  # in the order of measuring
LIMIT = 150.0  # seconds for a peer
GROUP = 128
ERRORS = {4: 0.2, 8: 0.06}

Linear = Callable[[Tensor], Tensor]
"""x [M, K] bf16 → y [M, N]"""


@dataclass(frozen=True)
class Peer:
    """Another library's quantized linear.

    Attributes:
        name: library and formats.
        bits: of its weights.
        group: columns of one weight scale, 0 for whole rows.
        quantizer: `"inside"`, `"outside"` or `"none"`.
        make: from a weight [N, K] in bf16.
        prepare: what is done to x before the time begins, where the quantizer is outside.
        least: tokens that it needs.
    """

    name: str
    bits: int
    group: int
    quantizer: str
    make: Callable[[Tensor], Callable[[Any], Tensor]]
    prepare: Callable[[Tensor], Any] = lambda x: x
    least: int = 1


def humming(weight: dict[str, Any], inputs: dict[str, Any] | None) -> Callable[[Tensor], Linear]:
    """Of humming-kernels; its layer quantizes activations itself."""

    def make(w: Tensor) -> Linear:
        from humming.layer import HummingLayer

        n, k = w.shape
        layer = HummingLayer(
            shape_n=n,
            shape_k=k,
            weight_config=dict(weight),
            input_config=None if inputs is None else dict(inputs),
            torch_dtype=torch.bfloat16,
        ).cuda()
        layer.load_from_unquantized(w)
        layer.transform()
        return layer  # type: ignore[no-any-return]

    return make


def gemlite_int4(activations: str) -> Callable[[Tensor], Linear]:
    """Of gemlite: 4-bit groups with zero points, bf16 or dynamically quantized fp8 activations."""

    def make(w: Tensor) -> Linear:
        from gemlite import helper

        codes, scales, zeros = asymmetric(w, GROUP)
        one = "A16W4_HQQ_INT" if activations == "bf16" else "A8W4_HQQ_INT_dynamic"
        processor = getattr(helper, one)(device="cuda:0", dtype=torch.bfloat16)
        columns = (scales.reshape(-1, 1), zeros.reshape(-1, 1))
        return processor.from_weights(codes, *columns, bias=None)  # type: ignore[no-any-return]

    return make


def gemlite_int8(w: Tensor) -> Linear:
    """Of gemlite: int8 weights and dynamically quantized int8 activations."""
    from gemlite import helper

    made: Linear = helper.A8W8_int8_dynamic(device="cuda:0", dtype=torch.bfloat16).from_weights(w)
    return made


def torch_int8(w: Tensor) -> Callable[[Any], Tensor]:
    """cuBLAS's int8 product and the scales behind it."""
    scales = w.float().abs().amax(1, keepdim=True) / 127
    codes = (w.float() / scales).round().to(torch.int8).t()
    row = scales.t().contiguous()

    @torch.compile(dynamic=False)
    def scaled(acc: Tensor, of_tokens: Tensor, of_rows: Tensor) -> Tensor:
        return (acc.float() * of_tokens * of_rows).bfloat16()

    return lambda x: scaled(torch._int_mm(x[0], codes), x[1], row)


def torch_fp8(w: Tensor) -> Callable[[Any], Tensor]:
    """cuBLAS's or CUTLASS's fp8 product with a scale per token and per row."""
    scales = (w.float().abs().amax(1, keepdim=True) / 448).t().contiguous()
    codes = (w.float() / scales.t()).to(torch.float8_e4m3fn).t()

    def run(x: Any) -> Tensor:
        return torch._scaled_mm(
            x[0], codes, x[1], scales, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return run


def torch_int4(w: Tensor) -> Linear:
    """Torch's own weight-only int4 product."""
    codes, scales, zeros = asymmetric(w, GROUP)
    packed = torch._convert_weight_to_int4pack((codes[:, ::2] << 4) | codes[:, 1::2], 8)
    # Its weights are (q - 8) · scale + zero.
    shifted = (8 - zeros) * scales
    both = torch.stack((scales, shifted), -1).transpose(0, 1).contiguous().bfloat16()
    return lambda x: torch._weight_int4pack_mm(x, packed, GROUP, both)


def asymmetric(w: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes [N, K] of 4 bits, scales and zeros [N, K / group]: w ≈ (code - zero) · scale."""
    parts = w.float().unflatten(1, (-1, group))
    low, high = parts.amin(2), parts.amax(2)
    scales = ((high - low) / 15).clamp(min=1e-8)
    zeros = (-low / scales).round()
    codes = (parts / scales.unsqueeze(2) + zeros.unsqueeze(2)).round().clamp(0, 15)
    return codes.flatten(1).to(torch.uint8), scales, zeros


def int8_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and a scale a token."""
    scales = x.float().abs().amax(1, keepdim=True) / 127
    return (x.float() / scales).round().to(torch.int8), scales


def fp8_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same in fp8."""
    scales = x.float().abs().amax(1, keepdim=True) / 448
    return (x.float() / scales).to(torch.float8_e4m3fn), scales


PEERS = (
    Peer("humming W4A16", 4, GROUP, "none", humming({"dtype": "int4", "group_size": GROUP}, None)),
    Peer("humming W4A8 int8", 4, 0, "inside", humming({"dtype": "int4"}, {"dtype": "int8"})),
    Peer(
        "humming W4A8 int8",
        4,
        GROUP,
        "inside",
        humming({"dtype": "int4", "group_size": GROUP}, {"dtype": "int8"}),
    ),
    Peer("humming W4A8 fp8", 4, 0, "inside", humming({"dtype": "int4"}, {"dtype": "float8e4m3"})),
    Peer("humming W8A8 int8", 8, 0, "inside", humming({"dtype": "int8"}, {"dtype": "int8"})),
    Peer("gemlite W4A16", 4, GROUP, "none", gemlite_int4("bf16")),
    Peer("gemlite W4A8 fp8", 4, GROUP, "inside", gemlite_int4("fp8")),
    Peer("gemlite W8A8 int8", 8, 0, "inside", gemlite_int8),
    Peer("torch W4A16", 4, GROUP, "none", torch_int4),
    Peer("torch W8A8 int8", 8, 0, "outside", torch_int8, int8_tokens, least=17),
    Peer("torch W8A8 fp8", 8, 0, "outside", torch_fp8, fp8_tokens),
)


def title(peer: Peer) -> str:
    """`"humming W4A8 int8 g128"`"""
    return f"{peer.name} g{peer.group}" if peer.group else peer.name


def entry(peer: Peer, name: str, m: int) -> dict[str, Any]:
    """A row of the table without its result."""
    return {
        "peer": title(peer),
        "linear": name,
        "tokens": m,
        "group": peer.group,
        "quantizer": peer.quantizer,
    }


def build(peer: Peer, name: str) -> tuple[Tensor, list[Any]]:
    """A weight in bf16, and more quantized copies of it and others than the cache holds."""
    n, k = (MIX["matrices"][name][size] for size in "nk")
    weight = torch.randn(n, k, device="cuda").bfloat16()
    count = int(ROTATED_BYTES // (n * k * peer.bits / 8)) + 1
    return weight, [peer.make(weight) for _ in range(count + 1)]


def measure(peer: Peer, weight: Tensor, linears: list[Any], m: int) -> dict[str, float]:
    """µs and relative error of one linear.

    Raises:
        ValueError: the peer cannot take so many tokens, or its result is wrong.
    """
    if m < peer.least:
        raise ValueError(f"it needs {peer.least} tokens")
    x = torch.randn(m, weight.shape[1], device="cuda").bfloat16()
    given = peer.prepare(x)
    y, exact = linears[0](given).double(), x.double() @ weight.double().T
    error = float((y - exact).norm() / exact.norm())
    if not error < ERRORS[peer.bits]:
        raise ValueError(f"wrong by {error:.1%}")
    over, seconds = (linears, 2e-3) if m <= 256 else (linears[:4], 0.05)
    (taken,) = medians(capture(lambda run: run(given), over, seconds))
    return {"us": taken * 1e6, "relative error": error}


def run_one(wanted: str, tokens: Sequence[int]) -> None:
    """Measure one peer in this process; a line of JSON for every result as soon as it is there."""
    torch.manual_seed(0)
    peer = next(peer for peer in PEERS if title(peer) == wanted)
    built: dict[str, Any] = {}
    for m in tokens:
        torch._dynamo.reset()  # shapes share their code, and with it the limit of recompiling
        for name in LLAMA_8B:
            row = entry(peer, name, m)
            try:
                if name not in built:
                    built[name] = build(peer, name)
                row |= measure(peer, *built[name], m)
            except Exception as error:  # noqa: BLE001  whatever a library raises is its result
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            print(json.dumps(row), flush=True)


def run_all(
    tokens: Sequence[int] = TOKENS, limit: float = LIMIT, wanted: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Rows of all peers, each in a process of its own, and the sums over the four linears."""
    rows: list[dict[str, Any]] = []
    for name in [title(peer) for peer in PEERS if not wanted or title(peer) in wanted]:
        command = [sys.executable, __file__, "--one", name, "--tokens", ",".join(map(str, tokens))]
        start = time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
            output, ended = done.stdout, f"ended with {done.returncode}: {done.stderr[-300:]}"
        except subprocess.TimeoutExpired as error:
            raw = error.stdout or b""
            output = raw.decode() if isinstance(raw, bytes) else raw
            ended = f"stopped after {limit:.0f} s"
        lines = [line for line in output.splitlines() if line.startswith("{") and line[-1] == "}"]
        found = [json.loads(line) for line in lines]
        rows += found
        if len(found) < len(LLAMA_8B) * len(tokens):
            rows.append({"peer": name, "error": ended})
        print(f"{name}: {len(found)} results, {time.monotonic() - start:.0f} s", flush=True)
    return rows + summed(rows)


def summed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The four linears together, where a peer ran them all."""
    parts: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        if "us" in row:
            parts.setdefault((row["peer"], row["tokens"]), []).append(row)
    return [
        {
            "peer": peer,
            "linear": "sum",
            "tokens": m,
            "group": found[0]["group"],
            "quantizer": found[0]["quantizer"],
            "us": sum(row["us"] for row in found),
        }
        for (peer, m), found in parts.items()
        if len(found) == len(LLAMA_8B)
    ]


def comparable(quantizer: str) -> str:
    """Which of our times a peer is held against: with the quantizer if it starts from bf16, too."""
    return "gemm us" if quantizer == "outside" else "both us"


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Sums of all peers by number of tokens, and what did not run."""
    sums = [row for row in rows if row.get("linear") == "sum"]
    tokens = sorted({row["tokens"] for row in sums})
    shown = Table("peer", "quantizer", *map(str, tokens), "did not run", title="µs")
    for peer in dict.fromkeys(row["peer"] for row in rows):
        us = {row["tokens"]: f"{row['us']:.4g}" for row in sums if row["peer"] == peer}
        mine = [row for row in rows if row["peer"] == peer]
        errors = dict.fromkeys(row["error"][:60] for row in mine if "error" in row)
        quantizer = next((row["quantizer"] for row in mine if "quantizer" in row), "")
        shown.add_row(peer, quantizer, *(us.get(m, "") for m in tokens), "; ".join(errors)[:120])
    return shown


def main() -> None:
    """Measure one peer for another process, or all of them for a person."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--peer", nargs="*", default=(), help="only these, by the table's names")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="comma between")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for a peer")
    options = parser.parse_args()
    tokens = tuple(map(int, options.tokens.split(",")))
    if options.one is not None:
        run_one(options.one, tokens)
        return
    Console(width=170).print(table(run_all(tokens, options.limit, options.peer)))


if __name__ == "__main__":
    main()
