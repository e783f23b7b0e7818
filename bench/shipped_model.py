"""How good is the shipped model, beside a larger one, on the text that ships with it?

    python bench/shipped_model.py --peer DIR

Bits per byte: the negative log2 likelihood of the held-out documents over their UTF-8 bytes, so
that models with different vocabularies can be compared. Neither model has seen the text.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixllm_compiler.demo import HELDOUT, MODEL_DIR
from mixllm_compiler.demo.train import bits_per_byte, documents
from results_io import Bar, write_results

ALLOWED = 1.35


def main() -> None:
    """Measure both models, print, write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", type=Path, required=True, help="folder of a causal LM")
    args = parser.parse_args()
    texts = documents(HELDOUT.read_text(encoding="utf-8"))
    rows = []
    for name, folder in (("shipped", MODEL_DIR), (args.peer.resolve().name, args.peer)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        bits = bits_per_byte(model, tokenizer, texts)
        size = sum(f.stat().st_size for f in folder.iterdir()) / 1e6
        rows.append(
            {
                "model": name,
                "parameters": model.num_parameters(),
                "files MB": round(size, 2),
                "bits per byte": round(bits, 4),
            }
        )
    ratio = rows[0]["bits per byte"] / rows[1]["bits per byte"]
    bars = [
        Bar.at_most(f"shipped model's bits per byte / {rows[1]['model']}'s", ratio, ALLOWED),
        Bar.at_most("shipped model's files in MB", rows[0]["files MB"], 20.0),
    ]
    write_results(__file__, rows, bars, device="cpu")
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table, f"ratio {ratio:.3f}, allowed {ALLOWED}")


if __name__ == "__main__":
    main()
