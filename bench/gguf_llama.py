"""A Llama of transformers as a GGUF file for llama.cpp, and what a GGUF file stores per weight.

    write(model, Path("model.gguf"))              float32, without a tokenizer: it takes token ids
    stored(Path("model-Q4_K_M.gguf")).decoder     bits per weight of the decoder's linears

Needs the package gguf, by the authors of the format.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

ARCHITECTURE = "llama"
EMBEDDING, HEAD, NORM = "token_embd", "output", "output_norm"
LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


@dataclass(frozen=True)
class Stored:
    """Bits per weight as they are in the file, scales included.

    `decoder` is of the decoder's linears, `head` of the output head (the embedding's where the two
    are one), `linears` of both; `types` counts the decoder's matrices by type.
    """

    decoder: float
    head: float
    linears: float
    types: dict[str, int]
    head_type: str


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k [heads · D, K] in the order that llama.cpp's rotary embedding expects.

    transformers turns the pairs (i, i + D/2) of a head, llama.cpp the pairs (2i, 2i + 1). Queries
    and keys are permuted alike, so their products are the same.
    """
    n, k = weight.shape
    return weight.view(heads, 2, n // heads // 2, k).transpose(1, 2).reshape(n, k)


def tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Name in the file → float32 tensor.

    Raises:
        SystemExit: the model has parameters that this architecture has no place for.
    """
    config = model.config
    heads = {"self_attn.q_proj": config.num_attention_heads}
    heads["self_attn.k_proj"] = config.num_key_value_heads
    names = {"model.embed_tokens": EMBEDDING, "model.norm": NORM, "lm_head": HEAD}
    turned: dict[str, int] = {}
    for layer in range(config.num_hidden_layers):
        for theirs, ours in (LINEARS | NORMS).items():
            names[f"model.layers.{layer}.{theirs}"] = f"blk.{layer}.{ours}"
        turned |= {f"model.layers.{layer}.{name}": count for name, count in heads.items()}
    found = {}
    for name, tensor in model.named_parameters():  # a tied head is listed once, as the embedding
        module, _, kind = name.rpartition(".")
        if module not in names or kind != "weight":
            raise SystemExit(f"{name} has no place in a GGUF file of a {ARCHITECTURE}")
        tensor = tensor.detach().float()
        if module in turned:
            tensor = interleaved(tensor, turned[module])
        found[f"{names[module]}.weight"] = tensor
    return found


def write(model: PreTrainedModel, path: Path) -> None:
    """The whole model in float32."""
    import gguf

    config = model.config
    rope = config.rope_parameters
    if config.model_type != "llama" or rope["rope_type"] != "default":
        raise SystemExit(f"only Llamas with plain rotary embeddings, not {config.model_type}")
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in tensors(model).items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored(path: Path) -> Stored:
    """What a file stores, from the sizes of its tensors."""
    import gguf

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    ends = tuple(f".{name}.weight" for name in LINEARS.values())
    decoder = [tensor for name, tensor in found.items() if name.endswith(ends)]
    head = found.get(f"{HEAD}.weight", found[f"{EMBEDDING}.weight"])

    def bits(some: list[Any]) -> float:
        return float(8 * sum(t.n_bytes for t in some) / sum(t.n_elements for t in some))

    types = Counter(tensor.tensor_type.name for tensor in decoder)
    return Stored(
        bits(decoder), bits([head]), bits([*decoder, head]), dict(types), head.tensor_type.name
    )


def importances(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """llama.cpp's importance matrix: linear → mean square of each input feature, float32 [K].

    Of the decoder's linears, as llama-imatrix makes it by default.
    """
    sums: dict[str, Tensor] = {}

    def watch(linear: nn.Module, name: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor]) -> None:
            squares = inputs[0].flatten(0, -2).square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return linear.register_forward_pre_hook(add)

    hooks = [
        watch(layer.get_submodule(theirs), f"blk.{at}.{ours}.weight")
        for at, layer in enumerate(model.model.layers)
        for theirs, ours in LINEARS.items()
    ]
    with torch.no_grad():
        for some in ids.split(4):
            model.model(some, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: total / ids.numel() for name, total in sums.items()}
