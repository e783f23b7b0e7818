"""How fast is a whole model on a CPU, against torch.compile of the float model?

    python bench/cpu_model.py                          a random Llama of 8 layers, 1,024 wide
    python bench/cpu_model.py --model path/to/model    another one, as its name in the results

Prefill of 512 tokens and decode of one, static cache of 1,024, logits of the last token only, as
`generate` asks for them; all variants in turn and only where the cores are ours (see `cpu_peaks`).
Rows are two-level at 4.4 bits, inputs rotated, a scale
a token; the output head is float in one variant and of 8 bits or less in the other. Widths come
from weight error, which decides accuracy and not speed.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, StaticCache

from cpu_peaks import Peaks
from mixllm_compiler.lowering.cpp import isa
from mixllm_compiler.runtime import records
from results_io import Bar, write_results

PROMPT, CACHE = 512, 1024
OPTIONS: dict[str, Any] = {
    "bits": 4.4,
    "family": "two-level",
    "rotate": 128,
    "widths": (2, 3, 4, 5, 6, 8),
    "quiet": True,
}
RANDOM = "llama 8x1024"


def load(name: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """The model, in eval mode."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
    )
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


class Steps:
    """Prefill and decode of one compiled variant."""

    def __init__(self, model: PreTrainedModel, run: Callable[..., Any]) -> None:
        self.run = run
        self.cache = StaticCache(config=model.config, max_cache_len=CACHE)
        self.prompt = torch.randint(model.config.vocab_size, (1, PROMPT))
        self.next = self.prompt[:, :1].clone()
        self.at = PROMPT

    def prefill(self) -> Tensor:
        self.cache.reset()
        self.at = PROMPT
        return self._call(self.prompt)

    def decode(self) -> Tensor:
        """One token behind the prompt, or behind those before it; call `prefill` first."""
        if self.at == CACHE:  # start over: the cache counts its tokens itself
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(PROMPT)
            self.at = PROMPT
        self.at += 1
        return self._call(self.next)

    def _call(self, ids: Tensor) -> Tensor:
        return self.run(ids, past_key_values=self.cache, logits_to_keep=1).logits


def variants(name: str | None, dtype: torch.dtype) -> dict[str, tuple[Steps, float]]:
    """Name → (steps, true bits of the linears)."""
    model = load(name, dtype)
    found = {"torch.compile": (Steps(model, torch.compile(model)), 8.0 * dtype.itemsize)}
    for label, head in (("mixllm, float head", False), ("mixllm, quantized head", True)):
        one = copy.deepcopy(model)
        options = {**OPTIONS, "lm_head": head}
        steps = Steps(one, torch.compile(one, backend="mixllm", options=options))
        with records.collect() as graphs:
            steps.prefill()
        if not graphs or not graphs[0].quantized:
            raise SystemExit(f"{label}: nothing was quantized")
        found[label] = (steps, graphs[0].true_bits())
    return found


def measure(
    peaks: Peaks, name: str | None, dtype: torch.dtype, limit: float
) -> list[dict[str, Any]]:
    """One row a variant."""
    found = variants(name, dtype)
    for steps, _ in found.values():
        steps.prefill()
        steps.decode()
    times = {
        kind: peaks.measure({key: getattr(steps, kind) for key, (steps, _) in found.items()}, limit)
        for kind in ("prefill", "decode")
    }
    base = {kind: times[kind]["torch.compile"].seconds for kind in times}
    return [
        {
            "model": RANDOM if name is None else Path(name).name,
            "dtype": str(dtype).removeprefix("torch."),
            "variant": key,
            "true bits": round(bits, 3),
            **{f"{kind} ms": round(times[kind][key].seconds * 1e3, 2) for kind in times},
            **{f"{kind} x": round(base[kind] / times[kind][key].seconds, 2) for kind in times},
            **{f"quiet {kind}": times[kind][key].quiet for kind in times},
        }
        for key, (_, bits) in found.items()
    ]


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """What has to be reached, for either head."""
    found = []
    for row in rows:
        if row["variant"] == "torch.compile":
            continue
        name = f"{row['model']}, {row['dtype']}, {row['variant'].split(', ')[1]}"
        full = row["dtype"] == "float32"
        for kind, least in (("decode", 2.5), ("prefill", 2.8)):
            limit = least if full else 1.0
            found.append(Bar.at_least(f"{name}: {kind}, x torch.compile", row[f"{kind} x"], limit))
    return found


def main() -> None:
    """Measure, write, show."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", action="append", help="a folder or a hub's name; repeatable")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=float, default=60.0, help="seconds to wait for quiet")
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 64  # all variants share the model's forward
    peaks = Peaks(options.threads)
    rows = []
    console = Console(width=140)
    with torch.no_grad():
        for name in options.model or [None]:
            for dtype in options.dtypes:
                torch._dynamo.reset()
                rows += measure(peaks, name, getattr(torch, dtype), options.limit)
                console.print(rows[-3:])
    found = bars(rows)
    if not options.dry:
        extra = {"instructions": isa.current().name, "threads": options.threads}
        path = write_results(__file__, rows, found, device="cpu", extra=extra)
        console.print(path.name)
    for bar in found:
        console.print(
            f"{'met ' if bar.met else 'MISSED'} {bar.name}: {bar.measured} ({bar.target})"
        )


if __name__ == "__main__":
    main()
