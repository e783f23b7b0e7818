"""How fast is a decoder layer's chain as it really runs, against the same chain in bf16?

    python bench/layer.py            Llama-3.1-8B, 1 to 4096 tokens; one token with attention, too
    python bench/layer.py --quick    two numbers of tokens; writes no results

Ours: residual + norm + quantizer, qkv, quantizer, o, residual + norm + quantizer, gate and up,
SiLU · up + quantizer, down; every x comes from its predecessor, outputs are in model order, inputs
are transformed in blocks of 256 or of 128, and widths are those of `row_mix.json`. bf16: the same
layer by `torch.compile`, its products by the faster of cuBLAS and cuBLASLt. Both are replays of one
CUDA graph of three layers whose weights are more than the cache holds, timed in turn; times are of
one layer. Without attention o reads the first columns of qkv's output; with it both chains
compile the same function: rotary embedding, a cache of 1,024 tokens, grouped heads.

Before, every step of the chain is held against its definition on the very tensors that the chain
gave it, and replays against a chain without overlap, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gpu_timing import capture, medians, quick_or_whole, without_overlap
from mixed_linears import GROUP, KERNEL, LLAMA_8B, MIX, MixedLinear, row_widths
from mixllm_compiler import runtime  # noqa: F401  kernels go into the build cache
from mixllm_compiler.lowering import fused, lowered
from mixllm_compiler.lowering.agreement import disagreement
from mixllm_compiler.lowering.cuda import launch
from results_io import Bar, write_results

TOKENS = (1, 8, 16, 64, 256, 1024, 4096)
BLOCKS = (256, 128)
LAYERS = 3
SUSTAINED = 512  # tokens from which a sample is long
HEADS, KV_HEADS, HEAD = 32, 8, 128
HIDDEN = HEADS * HEAD
CONTEXT = 1024
EPS = 1e-5
BAR = 2.7  # bf16 / ours, one token, without attention
REPLAYS = 50

Attend = Callable[[Tensor, int], Tensor]
"""(output of qkv, number of the layer) → input of o"""


def first_columns(qkv: Tensor, layer: int) -> Tensor:
    """What stands for attention where it is left out."""
    return qkv[:, :HIDDEN]


class Attention:
    """Of one new token to those of a cache, which it joins as the last one."""

    def __init__(self) -> None:
        shape = (1, KV_HEADS, CONTEXT, HEAD)
        self.caches = [
            (torch.randn(shape, device="cuda").bfloat16(),
             torch.randn(shape, device="cuda").bfloat16())
            for _ in range(LAYERS)
        ]  # fmt: skip
        angles = (CONTEXT - 1) * 5e5 ** (-torch.arange(0, HEAD, 2, device="cuda") / HEAD)
        self.turn = angles.cos().repeat(2).bfloat16(), angles.sin().repeat(2).bfloat16()
        self.last = torch.tensor([CONTEXT - 1], device="cuda")

    def __call__(self, qkv: Tensor, layer: int) -> Tensor:
        return attention(qkv, *self.caches[layer], *self.turn, self.last)


def attention(
    qkv: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, at: Tensor
) -> Tensor:
    """[1, HIDDEN] of one token's qkv [1, …]; writes its key and value into the cache."""
    q, k, v = (
        part.view(1, -1, 1, HEAD)
        for part in qkv.split((HIDDEN, KV_HEADS * HEAD, KV_HEADS * HEAD), -1)
    )
    keys.index_copy_(2, at, turned(k, cos, sin))
    values.index_copy_(2, at, v)
    y = F.scaled_dot_product_attention(turned(q, cos, sin), keys, values, enable_gqa=True)
    return y.reshape(1, HIDDEN)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


@dataclass
class Ours:
    """The chain on generated kernels.

    Attributes:
        linears: by name.
        norms: weights of the two norms.
        hadamard: block of the transform.
        run: calls an op; checks it, too, while the chain is checked.
    """

    linears: dict[str, MixedLinear]
    norms: tuple[Tensor, Tensor]
    hadamard: int
    run: Callable[..., Any] = field(default=lambda op, *args: op(*args))

    def layer(
        self, delta: Tensor, residual: Tensor, number: int, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """What a layer adds and the sum it adds that to, of the same of the layer before."""
        quantizer = ("token", GROUP, self.hadamard, KERNEL)

        def normed(x: Tensor, other: Tensor, norm: Tensor) -> Any:
            args = (x, other, norm, None, EPS, "rms", *quantizer)
            *activation, total = self.run(fused.ADD_NORM_QUANTIZE, *args)
            return activation, total

        def gemm(name: str, activation: Any) -> Tensor:
            linear = self.linears[name]
            args = (linear.blobs[number], None, str(linear.layout), torch.bfloat16, KERNEL)
            y: Tensor = self.run(lowered.LOWERED_LINEAR, *activation, *args)
            return y

        activation, total = normed(delta, residual, self.norms[0])
        x = attend(gemm("qkv", activation), number)
        y = gemm("o", self.run(lowered.LOWERED_QUANTIZE, x, *quantizer))
        activation, total = normed(y, total, self.norms[1])
        gate, up = gemm("gate_up", activation).chunk(2, -1)
        args = (gate, up, "silu", *quantizer)
        return gemm("down", self.run(fused.ACTIVATION_QUANTIZE, *args)), total


@dataclass
class Floats:
    """The same in bf16, compiled.

    Attributes:
        weights: of every layer, in the order of `LLAMA_8B`.
        norms: weights of the two norms.
    """

    weights: list[tuple[Tensor, ...]]
    norms: tuple[Tensor, Tensor]

    def compiled(self, attend: Attend) -> Callable[..., tuple[Tensor, Tensor]]:
        """`Ours.layer` in bf16; new code for every number of tokens."""
        torch._dynamo.reset()

        def layer(
            delta: Tensor, residual: Tensor, weights: tuple[Tensor, ...], number: int
        ) -> tuple[Tensor, Tensor]:
            qkv, o, gate_up, down = weights
            total = delta + residual
            x = fused.normalized(total, self.norms[0], None, EPS, "rms")
            total = total + F.linear(attend(F.linear(x, qkv), number), o)
            x = fused.normalized(total, self.norms[1], None, EPS, "rms")
            gate, up = F.linear(x, gate_up).chunk(2, -1)
            return F.linear(fused.activated(gate, up, "silu"), down), total

        made = torch.compile(layer, fullgraph=True, dynamic=False)
        return lambda delta, residual, number, _: made(
            delta, residual, self.weights[number], number
        )


def chain(
    layer: Callable[..., tuple[Tensor, Tensor]], x: Tensor, residual: Tensor, attend: Attend
) -> tuple[Tensor, Tensor]:
    """All layers, one after the other."""
    for number in range(LAYERS):
        x, residual = layer(x, residual, number, attend)
    return x, residual


def problems(ours: Ours, x: Tensor, residual: Tensor, attend: Attend) -> list[str]:
    """What is wrong with the chain on these inputs."""
    found = []

    def checked(op: Any, *args: Any) -> Any:
        result = op(*args)
        expected = lowered.EXPANSIONS[op](*args)
        name = str(op).split(".")[1]
        if op is lowered.LOWERED_LINEAR:
            if not torch.equal(result, expected):
                found.append(f"{name}: {int((result != expected).sum())} outputs differ")
        else:
            if why := disagreement(result[:3], expected[:3]):
                found.append(f"{name}: {why}")
            if not all(map(torch.equal, result[3:], expected[3:])):
                found.append(f"{name}: the sum is not exact")
        return result

    Ours(ours.linears, ours.norms, ours.hadamard, checked).layer(x, residual, 0, attend)
    return found


def unsteady(ours: Ours, x: Tensor, residual: Tensor) -> int:
    """Replays of the chain that differ from one without overlap in any bit."""
    with launch.trying(programmatic=False):
        expected = chain(ours.layer, x, residual, first_columns)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(ours.layer, x, residual, first_columns)
    wrong = 0
    for _ in range(REPLAYS):
        for tensor in got:
            tensor.fill_(float("nan"))
        graph.replay()
        wrong += not all(map(torch.equal, got, expected))
    return wrong


def measure(
    ours: list[Ours], floats: Floats, m: int, with_attention: bool = False
) -> list[dict[str, Any]]:
    """Rows of the table for M tokens, one for each block of the transform: µs of one layer."""
    seconds, samples = (0.1, 3) if m >= SUSTAINED else (4e-3, 5)
    x, residual = (torch.randn(m, HIDDEN, device="cuda").bfloat16() for _ in range(2))
    attend: Any = Attention() if with_attention else first_columns
    layer = floats.compiled(attend)
    measures, libraries = {}, ("cublas", "cublaslt")
    for library in libraries:
        torch.backends.cuda.preferred_blas_library(library)
        measures[library] = capture(lambda _: chain(layer, x, residual, attend), [0], seconds)
    torch.backends.cuda.preferred_blas_library("default")
    # The compiled function of ours is attention alone: the rest are kernels already.
    between = torch.compile(attend, dynamic=False) if with_attention else attend

    def run(one: Ours) -> Callable[[Any], Any]:
        return lambda _: chain(one.layer, x, residual, between)

    for one in ours:
        measures[f"ours {one.hadamard}"] = capture(run(one), [0], seconds)
        measures[f"apart {one.hadamard}"] = capture(without_overlap(run(one)), [0], seconds)
    times = dict(zip(measures, medians(*measures.values(), samples=samples), strict=True))
    times = {name: value / LAYERS * 1e6 for name, value in times.items()}
    best = min(libraries, key=times.__getitem__)
    return [
        {
            "tokens": m,
            "attention": with_attention,
            "hadamard": one.hadamard,
            "bf16 us": times[best],
            "bf16 by": best,
            "ours us": times[f"ours {one.hadamard}"],
            "no overlap us": times[f"apart {one.hadamard}"],
            "ratio": times[best] / times[f"ours {one.hadamard}"],
            "no overlap ratio": times[best] / times[f"apart {one.hadamard}"],
        }
        for one in ours
    ]


def bars(rows: list[dict[str, Any]], wrong: list[str], unequal: int) -> list[Bar]:
    """What had to be reached."""
    found = [
        Bar.exactly("steps of the chain that differ from their definition", len(wrong), 0),
        Bar.exactly("replays that differ from a chain without overlap", unequal, 0),
    ]
    for row in rows:
        if row["tokens"] == 1 and not row["attention"]:
            name = f"layer chain, M = 1, Hadamard {row['hadamard']}: torch.compile bf16 / ours"
            found.append(Bar.at_least(name, row["ratio"], BAR))
    return found


def table(rows: list[dict[str, Any]]) -> Table:
    """What a person reads."""
    columns = list(rows[0])
    shown = Table(*columns, title=torch.cuda.get_device_name())
    for row in rows:
        cells = (row[column] for column in columns)
        shown.add_row(*(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells))
    return shown


def main() -> None:
    """Check, measure, write, show."""
    options = quick_or_whole(__doc__)
    console = Console(width=max(120, Console().width))
    linears = {
        name: MixedLinear.of(row_widths(name), MIX["matrices"][name]["k"]) for name in LLAMA_8B
    }
    shapes = [(linear.layout.n, linear.layout.k) for linear in linears.values()]
    norms = tuple((1 + 0.1 * torch.randn(HIDDEN, device="cuda")).bfloat16() for _ in range(2))
    ours = [Ours(linears, norms, block) for block in BLOCKS]  # type: ignore[arg-type]
    weights = [
        tuple((torch.randn(n, k, device="cuda") * k**-0.5).bfloat16() for n, k in shapes)
        for _ in range(LAYERS)
    ]
    floats = Floats(weights, norms)  # type: ignore[arg-type]
    wrong, unequal, rows = [], 0, []
    for one in ours:
        for m in (1, 16, 100, 300):
            x, residual = (torch.randn(m, HIDDEN, device="cuda").bfloat16() for _ in range(2))
            found = problems(one, x, residual, first_columns)
            wrong += [f"Hadamard {one.hadamard}, M = {m}, {line}" for line in found]
            unequal += unsteady(one, x, residual)
    console.print(f"{len(wrong)} steps are wrong, {unequal} replays differ")
    for line in wrong:
        console.print(f"WRONG  {line}")
    for m in (1, 1024) if options.quick else TOKENS:
        rows += measure(ours, floats, m)
        torch.cuda.empty_cache()
    rows += measure(ours, floats, 1, with_attention=True)
    console.print(table(rows))
    reached = bars(rows, wrong, unequal)
    for bar in reached:
        console.print(
            f"{'met   ' if bar.met else 'MISSED'} {bar.name}: {bar.measured} {bar.target}"
        )
    if not options.quick:
        extra = {"layers": LAYERS, "context": CONTEXT, "wrong": wrong}
        path = write_results(__file__, rows, reached, device="cuda", extra=extra)
        console.print(f"written: {path.name}")


if __name__ == "__main__":
    main()
