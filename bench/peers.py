"""Quantize a model with another library, and keep the weights that it stands for.

    python bench/peers.py PEER --model DIR --calibration FILE --out DIR [--bits 4 --group 128]

Writes `OUT/<label>.safetensors`: the dequantized decoder linears in float32 under their names in
`state_dict`, and whatever else the peer changed (AWQ scales norms); embedding and head stay
float. So every peer is measured by the same evaluation: `load_peer` gives the tensors for
`load_state_dict(…, strict=False)`, and what is written beside them in the header: versions,
settings, seconds, and bits as the peer stores them, codes, scales and zero points over weights.
Activations stay float: all of these are weight-only methods.

Each peer needs its own environment (`pip install <package of PEERS>`), with this repository in
PYTHONPATH. EXL3 is simulated (`exl3.py`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixllm_compiler.evaluation.text import read_windows

SCALE_BITS = 16  # peers store scales in the model's 16-bit dtype
DATASET = "mixllm-calibration"


@dataclass
class Job:
    """What a peer is given. It changes `model` in place, or returns another one."""

    model: nn.Module
    tokenizer: Any
    ids: Tensor  # int64 [sequences, tokens], calibration
    args: argparse.Namespace

    def linears(self) -> dict[str, nn.Linear]:
        """The decoder's linears by name."""
        return decoder_linears(self.model)


@dataclass(frozen=True)
class Outcome:
    """What a peer leaves."""

    weights: dict[str, Tensor]  # linear → [N, K], dequantized
    stored_bits: dict[str, float]  # linear → bits of all that is stored for it
    settings: dict[str, Any]  # beyond bits, group and symmetry
    calibration_tokens: int = 0


@dataclass(frozen=True)
class Peer:
    """One method of one library."""

    package: str
    run: Callable[[Job], Outcome]


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """All linears but the output head."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def group_bits(weight: Tensor, bits: float, group: int, zero_bits: float) -> float:
    """Bits of codes, and of a scale and a zero point per group, of a matrix [N, K]."""
    groups = weight.shape[0] * -(-weight.shape[1] // group)
    return weight.numel() * bits + groups * (SCALE_BITS + zero_bits)


def torchao(job: Job) -> Outcome:
    """Round to nearest: torchao's `IntxWeightOnlyConfig`."""
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_

    args, linears = job.args, job.linears()
    mapping = MappingType.SYMMETRIC if args.symmetric else MappingType.ASYMMETRIC
    dtype = getattr(torch, f"int{args.bits:g}")
    config = IntxWeightOnlyConfig(dtype, PerGroup(args.group), mapping)
    quantize_(job.model, config, filter_fn=lambda module, name: name in linears)
    zero = 0 if args.symmetric else 8  # an int8 per group; a symmetric one is always 0
    return Outcome(
        {name: module.weight.dequantize() for name, module in linears.items()},
        {n: group_bits(m.weight, args.bits, args.group, zero) for n, m in linears.items()},
        {"mapping": mapping.name},
    )


def hqq(job: Job) -> Outcome:
    """Half-quadratic quantization, which needs no data."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer

    args = job.args
    config = BaseQuantizeConfig(nbits=int(args.bits), group_size=args.group, axis=1)
    weights, stored = {}, {}
    for name, linear in job.linears().items():
        made = HQQLinear(linear, config, False, torch.float16, args.device)
        meta = made.meta | {"compute_dtype": torch.float32}
        tensors = [made.W_q, meta["scale"], meta["zero"]]
        stored[name] = sum(8.0 * t.numel() * t.element_size() for t in tensors)
        meta |= {key: meta[key].float() for key in ("scale", "zero")}
        weights[name] = Quantizer.dequantize(made.W_q, meta)
    return Outcome(weights, stored, {"axis": 1, "scales and zeros": "float16"})


def auto_round(job: Job) -> Outcome:
    """Learned rounding by signed gradients; `--iters 0` rounds to nearest."""
    return _auto_round(job, {"bits": int(job.args.bits)})


def auto_scheme(job: Job) -> Outcome:
    """AutoRound's choice of a width per layer for `--bits` on average, metadata counted."""
    from auto_round import AutoScheme
    from auto_round.schemes import QuantizationScheme

    options = [
        QuantizationScheme.from_dict(
            # The library keeps 8 bits symmetric.
            {"bits": bits, "group_size": job.args.group, "data_type": "int", "act_bits": 16}
            | {"sym": job.args.symmetric or bits == 8}
        )
        for bits in job.args.widths
    ]
    scheme = AutoScheme(
        avg_bits=job.args.bits,
        options=options,
        nsamples=len(job.ids),
        seqlen=job.ids.shape[1],
        dataset=DATASET,
        batch_size=8,
    )
    return _auto_round(job, {"scheme": scheme}, {"options": job.args.widths})


def _auto_round(
    job: Job, scheme: dict[str, Any], settings: dict[str, Any] | None = None
) -> Outcome:
    from auto_round import AutoRound
    from auto_round.calib_dataset import register_dataset
    from datasets import Dataset

    args = job.args

    @register_dataset(DATASET)
    def tokens(**unused: Any) -> Dataset:
        ones = [1] * job.ids.shape[1]
        rows = [{"input_ids": row, "attention_mask": ones} for row in job.ids.tolist()]
        return Dataset.from_list(rows)

    if "bits" in scheme:
        scheme |= {"sym": args.symmetric, "group_size": args.group}
    with tempfile.TemporaryDirectory() as folder:
        # AutoScheme would reuse scores of any model of this name, on any text; and its worker
        # processes would not know the registered text.
        os.environ |= {"AR_AUTO_SCHEME_CACHE": folder, "AR_ENABLE_AUTO_SCHEME_PARALLEL": "0"}
        os.environ["AR_WORK_SPACE"] = folder
        model, config = AutoRound(
            job.model,
            tokenizer=job.tokenizer,
            dataset=DATASET,
            nsamples=len(job.ids),
            seqlen=job.ids.shape[1],
            iters=args.iters,
            device_map=args.device,
            low_gpu_mem_usage=False,
            enable_torch_compile=False,  # of a small model it takes longer than it saves
            **scheme,
        ).quantize()
    weights, stored = {}, {}
    widths: dict[str, int] = {}
    for name, linear in decoder_linears(model).items():
        entry = config[name]
        bits, group = entry["bits"], entry["group_size"]
        weights[name] = _on_grid(linear.weight, linear.scale, group)
        # As the library counts them: symmetric layers have zero points too.
        stored[name] = group_bits(linear.weight, bits, group, bits)
        widths[str(bits)] = widths.get(str(bits), 0) + linear.weight.numel()
    everything = sum(widths.values())
    job.model = model
    return Outcome(
        weights,
        stored,
        {
            "iters": args.iters,
            "share of weights per width": {b: n / everything for b, n in sorted(widths.items())},
            **(settings or {}),
        },
        job.ids.numel() if args.iters or "scheme" in scheme or args.symmetric else 0,
    )


def _on_grid(weight: Tensor, scale: Tensor, group: int) -> Tensor:
    """Undo the rounding of a bf16 model: weights are integers times the scale of their group.

    An integer below 2⁷ is moved by at most a quarter of a step, so none is mistaken.
    """
    step = scale.float().to(weight.device).repeat_interleave(group, dim=1)[:, : weight.shape[1]]
    integers = weight.float() / step
    assert (integers - integers.round()).abs().max() < 0.3, "weights are off their grid"
    return integers.round() * step


def llm_compressor_gptq(job: Job) -> Outcome:
    """GPTQ with static activation order."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    return _llm_compressor(job, lambda **scheme: [GPTQModifier(**scheme)])


def llm_compressor_awq(job: Job) -> Outcome:
    """AWQ's scales, then rounding to nearest."""
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.cuda.is_available():  # version 0.14 pins memory for a GPU, there or not
        IntermediatesCache.pin_memory = lambda *unused: None
    return _llm_compressor(job, lambda **scheme: [AWQModifier(), QuantizationModifier(**scheme)])


def _llm_compressor(job: Job, recipe: Callable[..., list[Any]]) -> Outcome:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from datasets import Dataset
    from llmcompressor import oneshot

    args = job.args
    form = QuantizationArgs(
        num_bits=int(args.bits), strategy="group", group_size=args.group, symmetric=args.symmetric
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=form)
    rows = [{"input_ids": r, "attention_mask": [1] * len(r)} for r in job.ids.tolist()]
    oneshot(
        model=job.model,
        tokenizer=job.tokenizer,
        dataset=Dataset.from_list(rows),
        recipe=recipe(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        max_seq_length=job.ids.shape[1],
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
    )
    weights, stored = {}, {}
    for name, linear in job.linears().items():
        weights[name] = fake_quantize(
            linear.weight,
            linear.weight_scale,
            getattr(linear, "weight_zero_point", None),
            linear.quantization_scheme.weights,
            getattr(linear, "weight_g_idx", None),
        )
        zero = 0 if args.symmetric else args.bits
        stored[name] = group_bits(linear.weight, args.bits, args.group, zero)
    return Outcome(weights, stored, {}, job.ids.numel())


def gptqmodel(job: Job) -> Outcome:
    """GPTQ with GPTQModel's group-aware order."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    args = job.args
    config = QuantizeConfig(bits=int(args.bits), group_size=args.group, sym=args.symmetric)
    model = GPTQModel.load(str(args.model), config, device=args.device)
    rows = [{"input_ids": r, "attention_mask": [1] * len(r)} for r in job.ids.tolist()]
    model.quantize(rows, batch_size=4)
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        saved = GPTQModel.load(folder, backend=BACKEND.TORCH, device=args.device).model
    linears = job.linears()
    weights = {
        name: module.dequantize_weight().T
        for name, module in saved.named_modules()
        if name in linears
    }
    return Outcome(
        weights,
        # Packed zero points are stored for symmetric matrices, too.
        {n: group_bits(m.weight, args.bits, args.group, args.bits) for n, m in linears.items()},
        {"act_group_aware": config.act_group_aware, "damp_percent": config.damp_percent},
        job.ids.numel(),
    )


def exl3(job: Job) -> Outcome:
    """EXL3, simulated: block after block, on the inputs that quantized blocks deliver."""
    import exl3 as simulation

    args, bits = job.args, int(job.args.bits)
    model = job.model.to(args.device)
    values = simulation.codebook(torch.device(args.device))
    names = {module: name for name, module in job.linears().items()}
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    weights, stored = {}, {}
    with torch.no_grad():
        for block in blocks:
            moments: dict[nn.Module, Tensor] = {}

            def add(module: nn.Module, inputs: tuple[Tensor], into: Any = moments) -> None:
                x = inputs[0].flatten(0, -2)
                into[module] = into.get(module, 0) + x.t() @ x

            linears = [m for m in block.modules() if m in names]
            hooks = [linear.register_forward_pre_hook(add) for linear in linears]
            for ids in job.ids.split(8):
                model(ids.to(args.device))
            for hook in hooks:
                hook.remove()
            for linear in linears:
                name, w = names[linear], linear.weight
                w.copy_(simulation.quantize(w.float(), moments[linear], bits, values))
                weights[name], stored[name] = w, simulation.stored_bits(*w.shape, bits)
    return Outcome(weights, stored, {"simulated": True}, job.ids.numel())


PEERS = {
    "exl3": Peer("torch", exl3),
    "torchao": Peer("torchao", torchao),
    "hqq": Peer("hqq", hqq),
    "auto-round": Peer("auto-round", auto_round),
    "auto-scheme": Peer("auto-round", auto_scheme),
    "llm-compressor-gptq": Peer("llmcompressor", llm_compressor_gptq),
    "llm-compressor-awq": Peer("llmcompressor", llm_compressor_awq),
    "gptqmodel": Peer("gptqmodel", gptqmodel),
}


def load_peer(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors for `load_state_dict(…, strict=False)`, and what is known about them."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["peer"])


def main(argv: list[str] | None = None) -> int:
    """Quantize, write, print what was written."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shapes = {name: linear.weight.shape for name, linear in decoder_linears(model).items()}
    windows = read_windows(
        args.calibration, tokenizer, count=args.sequences, length=args.length, begin=False
    )
    peer = PEERS[args.peer]
    job = Job(model, tokenizer, windows.ids, args)
    started = time.perf_counter()
    outcome = peer.run(job)
    seconds = time.perf_counter() - started

    tensors = {f"{name}.weight": w for name, w in outcome.weights.items()}
    assert {name: w.shape for name, w in outcome.weights.items()} == shapes, "linears are missing"
    with torch.no_grad():
        for name, tensor in job.model.state_dict().items():
            rest = name not in tensors and name in before and "embed" not in name
            if rest and name.split(".")[0] != "lm_head":
                now = tensor.float().cpu()
                if not torch.equal(now, before[name]):
                    tensors[name] = now
        tensors = {n: t.detach().float().cpu().contiguous() for n, t in tensors.items()}
        size = sum(shape.numel() for shape in shapes.values())
        error = sum(
            float((tensors[f"{n}.weight"] - before[f"{n}.weight"]).square().sum()) for n in shapes
        ) / sum(float(before[f"{n}.weight"].square().sum()) for n in shapes)
    others = len(tensors) - len(shapes)
    record = {
        "peer": args.peer,
        "package": f"{peer.package} {importlib.metadata.version(peer.package)}",
        "torch": torch.__version__,
        "model": args.model.resolve().name,
        "bits": args.bits,
        "group": args.group,
        "symmetric": args.symmetric,
        "settings": outcome.settings,
        "true bits": round(sum(outcome.stored_bits.values()) / size, 5),
        # Without meaning where columns were scaled and norms divided by the same.
        "relative squared error of weights": None if others else float(f"{error:.4g}"),
        "other tensors changed": others,
        "calibration tokens": outcome.calibration_tokens,
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": args.threads,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{label_of(args)}.safetensors"
    save_file(tensors, path, metadata={"peer": json.dumps(record)})
    path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))
    return 0


def label_of(args: argparse.Namespace) -> str:
    """Name of the file: `hqq-w4-g128-asym`, `auto-round-w4-g128-asym-200-iters`."""
    if args.peer == "exl3":  # it has neither groups nor zero points
        return f"exl3-w{args.bits:g}-simulated"
    parts = [args.peer, f"w{args.bits:g}", f"g{args.group}", "sym" if args.symmetric else "asym"]
    if PEERS[args.peer].package == "auto-round":
        parts.append(f"{args.iters}-iters")
    return "-".join(parts)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("peer", choices=PEERS)
    add("--model", type=Path, required=True, help="folder of a causal LM")
    add("--calibration", type=Path, required=True, help="text file")
    add("--out", type=Path, required=True, help="folder for the result")
    add("--bits", type=float, default=4, help="of a code; for auto-scheme the mean true bits")
    add("--group", type=int, default=128, help="weights that share a scale")
    add("--symmetric", action="store_true", help="no zero points")
    add("--iters", type=int, default=200, help="of auto-round, per block; 0 rounds to nearest")
    add(
        "--widths",
        type=lambda text: [int(bits) for bits in text.split(",")],
        default=[2, 3, 4, 5, 6, 8],
        help="options of auto-scheme",
    )
    add("--sequences", type=int, default=64, help="of calibration")
    add("--length", type=int, default=1024, help="tokens of each")
    add("--threads", type=int, default=2)
    add("--device", default="cpu", help="cpu or cuda")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
