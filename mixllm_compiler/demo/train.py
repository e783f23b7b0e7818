"""Train the demonstration model: a small Llama and its tokenizer, from any text, in minutes.

    python -m mixllm_compiler.demo.train TEXT OUT --seconds 300

TEXT is UTF-8, plain or xz, documents separated by two blank lines (or, where there are
none, by one). OUT becomes a folder that `from_pretrained` loads. It is written beside and
renamed, so it is whole or it is not there.

The learning rate follows the clock, not a number of steps: a slower machine sees fewer
tokens and still ends at a learning rate of zero.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import math
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

BOS = "<|endoftext|>"  # begins a document and, in generation, ends it
BOS_ID = 0
LOG_EVERY = 10.0  # seconds
WORD_RUN = 8  # so many equal words in a row count as copied


class TrainingError(Exception):
    """The user's input cannot be trained on; the message says what to change."""


@dataclass(frozen=True)
class Settings:
    """What decides the trained weights, apart from the text and the machine."""

    seconds: float
    seed: int
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    context: int
    batch: int
    learning_rate: float
    weight_decay: float
    compile: bool

    def check(self) -> None:
        """Refuse at the start what would fail later.

        Raises:
            TrainingError: settings that make no Llama.
        """
        if self.hidden % (2 * self.heads):
            raise TrainingError(
                f"--hidden {self.hidden} does not give --heads {self.heads} an even width each"
            )
        if self.heads % self.kv_heads:
            raise TrainingError(
                f"--heads {self.heads} is not a multiple of --kv-heads {self.kv_heads}"
            )
        if self.vocabulary < 257:
            raise TrainingError(
                f"--vocabulary {self.vocabulary} is too small: "
                "256 bytes and one special token need 257"
            )
        if self.context < 2:
            raise TrainingError("--context 1 leaves nothing to predict")
        if self.weight_decay < 0:
            raise TrainingError(f"--weight-decay {self.weight_decay} is negative")


def read_text(path: Path) -> str:
    """The text of a .txt or .txt.xz file.

    Raises:
        TrainingError: missing, damaged, empty or not UTF-8.
    """
    try:
        raw = path.read_bytes()
        text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
    except OSError as error:
        raise TrainingError(f"cannot read {path}: {error.strerror}") from error
    except lzma.LZMAError as error:
        raise TrainingError(f"{path} is not a whole xz file: {error}") from error
    except UnicodeDecodeError as error:
        raise TrainingError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error
    if not text.strip():
        raise TrainingError(f"{path} is empty")
    return text


def documents(text: str) -> list[str]:
    """Split at two blank lines or, in a text that has none, at one."""
    text = text.replace("\r\n", "\n")
    separator = "\n\n\n" if "\n\n\n" in text.strip() else "\n\n"
    return [stripped for part in text.split(separator) if (stripped := part.strip())]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def without_copies(training: Sequence[str], held_out: Sequence[str]) -> list[str]:
    """The training documents of which less than a tenth also stands in the held-out ones."""
    seen: set[tuple[str, ...]] = set()
    for document in held_out:
        words = _words(document)
        seen.update(tuple(words[i : i + WORD_RUN]) for i in range(len(words) - WORD_RUN + 1))

    def copied(document: str) -> bool:
        words = _words(document)
        probes = range(0, len(words) - WORD_RUN + 1, WORD_RUN)
        hits = sum(tuple(words[i : i + WORD_RUN]) in seen for i in probes)
        return hits * 10 > len(probes)

    return [document for document in training if not copied(document)]


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE: every string can be written, and decoding gives it back exactly."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.train_from_iterator(
        texts,
        BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[BOS],
            initial_alphabet=ByteLevel.alphabet(),
            show_progress=False,
        ),
        length=len(texts),
    )
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """All documents as one row of token ids, each beginning with BOS."""
    rows = []
    for start in range(0, len(texts), 1000):
        batch = tokenizer.encode_batch(texts[start : start + 1000])
        rows += [torch.tensor(encoding.ids, dtype=torch.int32) for encoding in batch]
    return torch.cat(rows)


def windows(ids: Tensor, context: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Batches of `[batch, context]`, epoch after epoch, each cut at other places.

    Each window begins with BOS instead of its first token: the model is always used so.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = torch.arange(context, device=ids.device)
    while True:
        offset = int(torch.randint(context, (), generator=generator))
        starts = torch.arange(offset, len(ids) - context + 1, context)
        starts = starts[torch.randperm(len(starts), generator=generator)].to(ids.device)
        for chunk in starts[: len(starts) // batch * batch].view(-1, batch):
            window = ids[chunk[:, None] + steps].long()
            window[:, 0] = BOS_ID
            yield window


def learning_rate_factor(done: float) -> float:
    """Warm up over the first 2 % of the time, hold, fall linearly to 0 over the last 70 %."""
    return max(0.0, min(1.0, done / 0.02, (1.0 - done) / 0.7))


def _causal_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


def build_model(settings: Settings, vocabulary: int) -> LlamaForCausalLM:
    """A fresh Llama."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=BOS_ID,
        eos_token_id=BOS_ID,
    )
    model = LlamaForCausalLM(config)
    make_trainable(model)
    return model


def make_trainable(model: PreTrainedModel) -> None:
    """Residual branches that start small, as deep ones should, and attention that compiles well."""
    # Under torch.compile transformers builds a mask, which keeps flash attention away.
    AttentionInterface.register("causal", _causal_attention)
    model.set_attn_implementation("causal")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_((2 * model.config.num_hidden_layers) ** -0.5)


def make_optimizer(model: LlamaForCausalLM, settings: Settings) -> torch.optim.Optimizer:
    """AdamW; the norms' scales do not decay."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=True,
    )


def train_model(
    model: LlamaForCausalLM, ids: Tensor, settings: Settings, device: torch.device
) -> dict[str, Any]:
    """Train in place until the time is over; returns what happened.

    The first step, which compiles, is outside the time.

    Raises:
        TrainingError: too little text for one batch, or the loss is no longer a number.
    """
    needed = (settings.batch + 1) * settings.context
    if len(ids) < needed:
        raise TrainingError(
            f"the text has {len(ids):,} tokens; a batch of {settings.batch} windows of "
            f"{settings.context} needs {needed:,}. Give more text, or a smaller --batch."
        )
    torch.set_float32_matmul_precision("high")
    torch.nn.Module.to(model, device).train()
    optimizer = make_optimizer(model, settings)

    def loss_of(window: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss: Tensor = model(input_ids=window, labels=window, use_cache=False).loss
        return loss

    compiled = torch.compile(loss_of) if settings.compile else loss_of
    entered = started = logged = time.perf_counter()
    done, step, value = 0.0, 0, math.nan
    for window in windows(ids.to(device), settings.context, settings.batch, settings.seed):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * learning_rate_factor(done)
        loss = compiled(window)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step == 1:
            loss.item()  # wait for the device
            started = time.perf_counter()
        now = time.perf_counter()
        done = (now - started) / settings.seconds
        if step == 1 or done >= 1 or now - logged > LOG_EVERY:
            logged, value = now, loss.item()
            seen = step * window.numel()
            print(
                f"{now - started:6.1f} s  step {step}  {seen / 1e6:.1f} M tokens  "
                f"epoch {seen / len(ids):.2f}  loss {value:.4f}",
                flush=True,
            )
            if not math.isfinite(value):
                raise TrainingError(
                    f"the loss is {value} after {step} steps: give a smaller --learning-rate"
                )
        if done >= 1:
            break
    return {
        "steps": step,
        "tokens_seen": step * settings.batch * settings.context,
        "tokens_of_text": len(ids),
        "seconds_of_first_step": round(started - entered, 1),
        "last_loss": round(value, 4),
    }


@torch.inference_mode()
def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    context: int = 1024,
) -> float:
    """Negative log2 likelihood of the documents over their UTF-8 bytes.

    Each document is cut into windows; each window is BOS and at most `context - 1` tokens.

    Raises:
        ValueError: no documents.
    """
    if not texts:
        raise ValueError("no documents to measure on")
    nats = 0.0
    for document in texts:
        ids = tokenizer(document, add_special_tokens=False, verbose=False).input_ids
        for start in range(0, len(ids), context - 1):
            part = [tokenizer.bos_token_id, *ids[start : start + context - 1]]
            row = torch.tensor([part], device=model.device)
            logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
            nats += float(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum"))
    return nats / math.log(2) / sum(len(document.encode()) for document in texts)


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Weights in bf16, configurations and tokenizer."""
    model.bfloat16().save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def run(text: Path, out: Path, held_out: Sequence[Path], settings: Settings) -> dict[str, Any]:
    """All of it: read, tokenize, train, write, load again, measure, rename.

    Raises:
        TrainingError: what the user can mend.
    """
    settings.check()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrainingError(f"{out} is there already: remove it or name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(settings.seed)

    held_out_texts = {path.name: documents(read_text(path)) for path in held_out}
    training = documents(read_text(text))
    kept = without_copies(training, [d for texts in held_out_texts.values() for d in texts])
    if not kept:
        raise TrainingError(f"every document of {text} also stands in the held-out text")
    print(f"{len(training):,} documents, {len(training) - len(kept)} left out as held out")
    tokenizer = train_tokenizer(kept, settings.vocabulary)
    ids = encode(tokenizer, kept)
    model = build_model(settings, tokenizer.get_vocab_size())
    print(f"{len(ids):,} tokens, {model.num_parameters():,} parameters, {device}", flush=True)
    outcome = train_model(model, ids, settings, device)

    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as beside:
        folder = Path(beside) / out.name
        folder.mkdir()
        save(model, tokenizer, folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.nn.Module.to(loaded, device)
        loaded_tokenizer = AutoTokenizer.from_pretrained(folder)
        report = {
            "arguments": asdict(settings),
            "text": {"name": text.name, "sha256": hashlib.sha256(text.read_bytes()).hexdigest()},
            "documents": len(kept),
            "documents_left_out": len(training) - len(kept),
            "parameters": model.num_parameters(),
            **outcome,
            "bits_per_byte": {
                name: round(bits_per_byte(loaded, loaded_tokenizer, texts, settings.context), 4)
                for name, texts in held_out_texts.items()
            },
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "tokenizers": tokenizers.__version__,
            },
        }
        (folder / "training.json").write_text(json.dumps(report, indent=2) + "\n")
        folder.rename(out)
    return report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mixllm_compiler.demo.train",
        description="Train a small Llama and its tokenizer on a text.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def positive(value: str) -> int:
        if (number := int(value)) < 1:
            raise ValueError
        return number

    def above_zero(value: str) -> float:
        if not 0 < (number := float(value)) < math.inf:
            raise ValueError
        return number

    cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("text", type=Path, help="UTF-8 text, .txt or .txt.xz")
    add("out", type=Path, help="folder to make")
    add(
        "--held-out",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="text to keep out of training and to measure on (may be given again)",
    )
    add("--seconds", type=above_zero, default=300.0, help="time to train, compilation aside")
    add("--seed", type=int, default=0, help="of the weights and of the order of the text")
    add("--vocabulary", type=positive, default=4096, help="tokens, at most")
    add("--hidden", type=positive, default=384, help="hidden size")
    add("--layers", type=positive, default=5, help="blocks")
    add("--heads", type=positive, default=6, help="attention heads")
    add("--kv-heads", type=positive, default=2, help="key and value heads")
    add("--intermediate", type=positive, default=1024, help="width of the MLP")
    add("--context", type=positive, default=1024, help="tokens in a window")
    add("--batch", type=positive, default=96 if cuda else 4, help="windows in a step")
    add("--learning-rate", type=above_zero, default=3e-3, help="at its peak")
    add("--weight-decay", type=float, default=0.2, help="of the matrices")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=cuda,
        help="use torch.compile",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 done, 1 refused or failed with a message."""
    given = vars(_parser().parse_args(arguments))
    text, out, held_out = given.pop("text"), given.pop("out"), given.pop("held_out")
    try:
        report = run(text, out, held_out, Settings(**given))
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
