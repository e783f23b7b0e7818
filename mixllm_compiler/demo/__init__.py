"""The small trained model that ships with the package, and a text that it never saw."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_DIR: Path = Path(__file__).parent / "model"
HELDOUT: Path = Path(__file__).parent / "heldout.txt"


def load(
    dtype: torch.dtype | str = "float32",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model, ready for inference on the CPU, and its tokenizer, which puts BOS first.

    Raises:
        FileNotFoundError: the package was installed without its data.
    """
    needed = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    missing = [name for name in needed if not (MODEL_DIR / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"the demonstration model is incomplete: {MODEL_DIR} lacks {', '.join(missing)}. "
            "Reinstall mixllm-compiler, or train one with python -m mixllm_compiler.demo.train."
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(MODEL_DIR)
