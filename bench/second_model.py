"""Train a model of another family than wiki-88m for the quality benches, in minutes on one GPU.

    python bench/second_model.py --texts DIR --tokenizer DIR --out DIR

Its decoder differs from a Llama's where quantizing may notice: biases on queries, keys and
values, and an output head that shares nothing with the embedding (Qwen2). The tokenizer, and with
it the vocabulary, are those of another checkpoint. Training text that also stands in the texts to
measure on is left out. OUT becomes a folder that `from_pretrained` loads, with weights in bf16.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mixllm_compiler.demo.train import (
    BOS,
    BOS_ID,
    Settings,
    bits_per_byte,
    documents,
    encode,
    make_trainable,
    read_text,
    train_model,
    without_copies,
)
from results_io import write_results

TRAINING = "wikipedia_train.txt.xz"
HELD_OUT = ("wikipedia_valid", "wikitext2_test", "gutenberg_test")
QUICK_DOCUMENTS, QUICK_CHARACTERS = 400, 4000  # of the training text; of each held-out text


def main(argv: Sequence[str] | None = None) -> int:
    """Read, tokenize, train, save, load again, measure; results unless `--quick`."""
    args, settings = _arguments(argv)
    settings.check()
    if args.out.exists():
        raise SystemExit(f"{args.out} is there already: remove it or name another folder")
    torch.manual_seed(settings.seed)
    started = time.perf_counter()

    held_out = {name: documents(read_text(args.texts / f"{name}.txt")) for name in HELD_OUT}
    training = documents(read_text(args.texts / TRAINING))
    if args.quick:
        training = training[:QUICK_DOCUMENTS]
        held_out = {name: [texts[0][:QUICK_CHARACTERS]] for name, texts in held_out.items()}
    kept = without_copies(training, [text for texts in held_out.values() for text in texts])
    ids = encode(_begins_with_bos(args.tokenizer / "tokenizer.json"), kept)
    model: Any = build_model(settings)  # train_model's type is the Llama that it was written for
    prepared = time.perf_counter() - started
    print(
        f"{len(training):,} documents, {len(training) - len(kept)} of them left out; "
        f"{len(ids):,} tokens, {model.num_parameters():,} parameters, {prepared:.0f} s",
        flush=True,
    )
    outcome = train_model(model, ids, settings, args.device)
    biases = {
        name: float(weight.detach().float().abs().mean())
        for name, weight in model.named_parameters()
        if name.endswith("proj.bias")
    }
    assert min(biases.values()) > 0, "a bias was not trained"
    save(model, args.tokenizer, args.out)

    rows = measure(args.out, held_out, settings.context, args.device)
    if not args.quick:
        extra = {
            "settings": asdict(settings),
            "parameters": model.num_parameters(),
            "documents": len(kept),
            "documents left out": len(training) - len(kept),
            "mean size of a bias": round(sum(biases.values()) / len(biases), 4),
            **outcome,
        }
        print(write_results(__file__, rows, [], device=args.device, extra=extra))
    table = Table("text", "bytes", "bits per byte", title=args.out.name)
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table, f"{time.perf_counter() - started:.0f} s in all")
    return 0


def build_model(settings: Settings) -> Qwen2ForCausalLM:
    """A fresh Qwen2 with biases and a head of its own."""
    config = Qwen2Config(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=False,
        rms_norm_eps=1e-6,
        bos_token_id=BOS_ID,
        eos_token_id=BOS_ID,
    )
    model = Qwen2ForCausalLM(config)
    make_trainable(model)
    return model


def _begins_with_bos(path: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(path))
    if tokenizer.token_to_id(BOS) != BOS_ID:
        raise SystemExit(f"{path}: token {BOS_ID} is not {BOS}, which begins a document here")
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def save(model: Qwen2ForCausalLM, tokenizer: Path, folder: Path) -> None:
    """Weights in bf16, configurations and, unchanged, the tokenizer."""
    model.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def measure(
    folder: Path, held_out: Mapping[str, Sequence[str]], context: int, device: torch.device
) -> list[dict[str, Any]]:
    """Bits per byte of the saved model on each text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        {
            "text": name,
            "bytes": sum(len(text.encode()) for text in texts),
            "bits per byte": round(bits_per_byte(model, tokenizer, texts, context), 4),
        }
        for name, texts in held_out.items()
    ]


def _arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--texts", type=Path, required=True, help=f"folder with {TRAINING}, {', '.join(HELD_OUT)}")
    add("--tokenizer", type=Path, required=True, help="folder of a checkpoint; its tokenizer.json")
    add("--out", type=Path, required=True, help="folder to make")
    add(
        "--seconds",
        type=float,
        default=80.0,
        help="time to train, compilation aside; too much, and the model learns its text by heart",
    )
    add("--hidden", type=int, default=512)
    add("--layers", type=int, default=8)
    add("--batch", type=int, default=96, help="windows of 1,024 tokens in a step")
    add("--learning-rate", type=float, default=1e-3, help="at its peak")
    add("--device", type=torch.device, default=torch.device("cuda"))
    add("--quick", action="store_true", help="a tiny model on little text; nothing is reported")
    args = parser.parse_args(argv)
    settings = Settings(
        seconds=args.seconds,
        seed=0,
        vocabulary=Tokenizer.from_file(str(args.tokenizer / "tokenizer.json")).get_vocab_size(),
        hidden=args.hidden,
        layers=args.layers,
        heads=args.hidden // 64,
        kv_heads=max(1, args.hidden // 256),
        intermediate=3 * args.hidden,
        context=1024,
        batch=args.batch,
        learning_rate=args.learning_rate,
        weight_decay=0.2,
        compile=args.device.type == "cuda",
    )
    if args.quick:
        settings = replace(settings, seconds=12.0, hidden=128, layers=2, heads=2, kv_heads=1)
        settings = replace(settings, intermediate=384, context=256, batch=4)
    return args, settings


if __name__ == "__main__":
    raise SystemExit(main())
