"""The Python functions: `compile`, `score`, `plan`, `quantize`, `explain`, `invalidate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import compat
from .allocation.allocate import make_plan
from .allocation.plan import Plan, SitePlan
from .allocation.problem import RowTime
from .backend import mixllm
from .calibration.tokens import DEFAULT_SEQUENCES, calibration_tokens
from .errors import MixLLMError, OptionError, PlanMismatch, UnsupportedModel, nearest
from .formats.fingerprint import fingerprint
from .formats.neutral import QuantizedWeight
from .frames import CompiledForward, own_frame
from .lowering.cost import row_time
from .lowering.target import Target
from .modules import PackedLinear
from .options import Options
from .passes.allocate_bits import plan_arguments
from .passes.annotate_linears import planned_name
from .passes.quantize_model import METHODS, Recipe, quantize_model
from .passes.score_model import score_model
from .passes.summary import table
from .quantizers.rtn import quantize_rtn
from .runtime import records
from .runtime.weights import invalidate as _invalidate
from .salience.kinds import DEFAULT_KIND, ScoreSpec
from .salience.scores import Scores
from .transforms.hadamard import ROTATED_INPUT, block_hadamard, transform_of

QUANTIZE_SEQUENCES = 64  # GPTQ and the refit still gain up to here; scores need 8

# What `compile` hands on to `score`, besides the backend's options.
_SCORING = (
    *("tokenizer", "sequences", "length", "kind", "labels", "clip", "token_weights"),
    *("batch", "seed", "resume"),
)

M = TypeVar("M", bound=nn.Module)
Data = Tensor | Sequence[str] | str | Path


def score(
    model: nn.Module,
    data: Data = "self",
    *,
    kind: str | None = None,
    labels: str | None = None,
    clip: bool | None = None,
    token_weights: Tensor | None = None,
    tokenizer: Any = None,
    sequences: int = DEFAULT_SEQUENCES,
    length: int | None = None,
    batch: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    resume: str | Path | None = None,
    **options: Any,
) -> Scores:
    """Score every output feature of every linear in every candidate format.

    Args:
        model: in eval mode, on one device.
        data: token ids [S, T], texts, a text file, a data set id, or "self" (default): text that
            the model writes itself.
        kind: "kfac" (default), "fisher-token", "fisher-sequence", "paper", "zeroth-order",
            "hessian" or "weight-error"; their formulas are in `salience/kinds.py`.
        labels: "sampled" from the model (default, but for kind "paper") or "text".
        clip: score rows as a search of clipped ranges would round them; by default only two-level
            ones, which are never rounded otherwise.
        token_weights: [S, T], how much the loss of each token counts; 0 for none, for instance in
            prompts.
        sequences, length: how much of the data to use; up to `batch` sequences at a time.
        progress: called with (steps done, steps in all).
        resume: a file that keeps what is done after every block, for kinds with gradients; if it
            exists, scoring goes on from there. It stays until something else is saved there.
        options: those of the backend that matter here: preset, widths, group, family, rotate,
            lm_head, exclude.

    Returns:
        `Scores`: nats per token per row and format.

    Raises:
        MixLLMError: the model cannot be captured in one graph, or the data is unusable.
    """
    opts = Options.parse(options)
    _refuse_training(model)
    kind = kind or ("paper" if opts.preset == "paper" else DEFAULT_KIND)
    clip = opts.family == "two-level" if clip is None else clip
    spec = ScoreSpec(kind, opts.formats, labels or "", seed, clip)
    ids = calibration_tokens(
        data, model, tokenizer=tokenizer, sequences=sequences, length=length, seed=seed
    )
    source = Path(data).name if isinstance(data, str | Path) else type(data).__name__
    return score_model(
        model,
        ids,
        spec,
        opts,
        {"data": source, "seed": str(seed)},
        batch=batch,
        token_weights=token_weights,
        progress=progress,
        resume=None if resume is None else Path(resume),
    )


def plan(
    scores: Scores,
    *,
    bits: float | None = None,
    bytes: int | None = None,
    kl: float | None = None,
    preset: str = "best",
    constant: float = 1.0,
    floor: float = 0.0,
    price: float = 0.0,
    tokens: int = 1,
    target: Target | str | None = None,
    **options: Any,
) -> Plan:
    """One global allocation: the width of every output feature, inside one budget.

    Seconds, whatever the model's size: plan again for another budget.

    Args:
        bits: true bits per quantized weight (codes, scales, zero points, widths).
        bytes: the same budget as a size.
        kl: predicted KL in nats per token; the plan is the smallest that meets it.
        preset: "best" = knapsack over true bytes; "paper" = the top 10 % of features by count, in
            formats of the scores: the paper's own with those of `score(model, preset="paper")`.
        constant, floor: predicted KL = constant · summed scores + floor.
        price: nats per token that a second of all linears' predicted time is worth; 0 looks at
            bytes alone. At 1e3, a microsecond is worth a thousandth of a nat.
        tokens: how many at a time that time is predicted for; one is decoding.
        target: the GPU, by default the one at hand; as text, `"cuda sm_90 NVIDIA H200"`.
        options: pins, exclude, widths, tile, window, siblings, tp, formats_per_layer of the
            backend; group and rotation are those of the scores.
    """
    # Scores of rotated inputs hold for rotated inputs only.
    made_with = {"group": scores.group, "family": scores.family, "rotate": scores.rotation}
    opts = Options.parse({"bits": bits, "preset": preset, **made_with, **options})
    arguments = plan_arguments(opts) | {"rotation": opts.rotate}
    if options.get("widths") is None:
        arguments["widths"] = None  # all that were scored, or the paper's two
    if bytes is not None or kl is not None:
        arguments |= {"bits": bits, "bytes": bytes, "kl": kl}
    if price:
        arguments |= {"time": _row_time(scores, tokens, target), "price": price}
    return make_plan(scores, exclude=opts.exclude, constant=constant, floor=floor, **arguments)


def _row_time(scores: Scores, tokens: int, target: Target | str | None) -> RowTime:
    """Seconds of a row by matrix and format, of the cost model that chooses kernels, too.

    Raises:
        OptionError: times on that device are not known.
    """
    if target is None:
        target = Target.of("cuda" if torch.cuda.is_available() else "cpu")
    found = Target.parse(target) if isinstance(target, str) else target
    time = row_time(scores.shapes, tokens, found)
    if time is None:
        raise OptionError(
            f"price needs predicted times, and none are known for '{found}'; name a target that "
            "lowering/cost.py knows, such as target='cuda sm_90 NVIDIA H200', or leave price out"
        )
    return time


def quantize(
    model: M,
    plan: Plan,
    data: Data | None = None,
    *,
    method: str | None = None,
    refit: bool = True,
    scores: Scores | None = None,
    tokenizer: Any = None,
    sequences: int = QUANTIZE_SEQUENCES,
    length: int | None = None,
    batch: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    recipe: Recipe | None = None,
) -> M:
    """Replace the planned linears by `PackedLinear` modules, in place; returns the model.

    The float weights are freed where nothing else uses them.

    Args:
        data: calibration text as in `score`, "self" included; None rounds to nearest, which
            needs no text.
        method: "gptq" (default with data), "search" or "rtn", see `Recipe`.
        refit: correct weights for the inputs that the quantized model produces.
        scores: of the same model: an error of an output counts as much as its curvature.
        sequences, length: how much of the data to use; `batch` sequences go through together.
        progress: called with (groups of linears done, groups in all).
        recipe: all settings of the quantizers at once, instead of `method` and `refit`.

    Raises:
        PlanMismatch: the plan was made for another model.
        UnsupportedModel: a planned matrix is no Linear or Conv1D module (compile with the plan).
        OptionError: the data is unusable, or a method other than "rtn" got none.
    """
    homes = _linear_modules(model)
    planned = [name for name in homes if planned_name(plan, name)]
    for name in planned:
        compat.refuse_released(homes[name].weight, f"{name}.weight")  # type: ignore[arg-type]
    own = fingerprint({name: _matrix(homes[name]) for name in planned})
    names = {theirs: ours for ours, theirs in plan.match(own, subset=True).items()}
    missing = [name for name in plan.sites if name not in names]
    done = [n for n, m in model.named_modules() if n in missing and isinstance(m, PackedLinear)]
    if done:
        raise UnsupportedModel(
            f"{len(done)} linears of this model are quantized already, the first is {done[0]}; "
            "load the float model to quantize it with another plan"
        )
    fused = _fused_experts(model, missing)
    if fused:
        raise UnsupportedModel(
            f"{len(fused)} matrices of the plan are experts fused in one parameter (first "
            f"{fused[0]}), which no linear module holds; compile the model with the plan instead: "
            "mixllm_compiler.compile(model, plan=plan, quantizer='gptq', data=…)"
        )
    if missing:
        raise PlanMismatch(
            f"the plan has {missing[0]} ({len(missing)} of {len(plan.sites)} in all), which is no "
            "linear module of this model; compile the model with the plan instead"
        )
    found: dict[str, QuantizedWeight] = {}
    if data is not None:
        recipe = recipe or Recipe(method=method or "gptq", refit=refit)
        ids = calibration_tokens(
            data, model, tokenizer=tokenizer, sequences=sequences, length=length, seed=seed
        )
        curvature = None if scores is None else scores.curvature
        found = quantize_model(
            model, plan, ids, recipe, batch=batch, row_weights=curvature, progress=progress
        )
    elif method not in (None, "rtn"):
        raise OptionError(f"method {method!r} needs calibration text: give data=…")
    for name, site in plan.sites.items():
        path = names[name]
        module = homes[path]
        rotation = 0 if hasattr(module, ROTATED_INPUT) else plan.rotation
        weight = found.get(name) or _rounded(module, site, transform_of(site.k, rotation))
        packed = PackedLinear(weight, getattr(module, "bias", None), plan.activation_mode)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, packed.train(module.training))
    return model


def _fused_experts(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those names that are slices of one parameter of the model."""
    stacked = {n for n, p in model.named_parameters() if p.dim() == 3}
    return [name for name in names if name.rpartition(".")[0] in stacked]


def _rounded(module: nn.Module, site: SitePlan, transform: str) -> QuantizedWeight:
    weight = _matrix(module)
    if transform:
        weight = block_hadamard(weight.float(), int(transform.removeprefix("hadamard:")))
    two_level = site.family == "two-level"
    return quantize_rtn(
        weight,
        site.widths,
        site.group,
        transform,
        site.family,
        clip=two_level,
        spans=site.spans,
    )


def _linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    def is_linear(module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"

    found = {name: m for name, m in model.named_modules() if is_linear(m)}
    if not found:
        packed = sum(isinstance(m, PackedLinear) for m in model.modules())
        why = f" ({packed} are quantized already)" if packed else ""
        raise UnsupportedModel(f"{type(model).__name__} has no float linear modules{why}")
    return found


def _matrix(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().t() if type(module).__name__ == "Conv1D" else weight.detach()


def compile(
    model: M,
    *,
    bits: float | None = None,
    plan: Plan | str | Path | None = None,
    data: Data | None = None,
    quantizer: str = "rtn",
    mode: str | None = None,
    dynamic: bool | None = None,
    release: bool = False,
    fullgraph: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> M:
    """Score, plan and compile a whole model; the same object comes back, and `generate` runs it.

    Args:
        bits: true bits per quantized weight; ignored with a plan.
        plan: a finished plan, or its file: nothing is scored then.
        data: text to score and to calibrate on, see `score`; by default the model writes it.
        quantizer: "rtn" rounds to nearest; "gptq" quantizes layer by layer on up to 64 sequences
            of the text, with refit: minutes instead of seconds, for a smaller loss; "search" takes
            longer and loses less, with two-level rows only.
        mode: a `torch.compile` mode.
        dynamic: as in `torch.compile`.
        release: free the float weights after packing; the model cannot be compiled again.
        options: any option of the backend, and those of `score`: `tokenizer`,
            `sequences`, `length`, `kind`, `labels`, `batch`, `seed`, `resume` and so on.
    """
    _refuse_training(model)
    if quantizer not in METHODS:
        raise OptionError(f"unknown quantizer {quantizer!r}.{nearest(quantizer, METHODS)}")
    scoring = {k: options.pop(k) for k in _SCORING if k in options}
    opts = Options.parse({**options, "bits": bits, "plan": plan, "release": release})
    recipe = Recipe(method=quantizer)
    found, scores = opts.resolved_plan(), None
    recipe.require_family(opts.family if found is None else next(iter(found.sites.values())).family)
    if found is None:
        shared = {
            k: v
            for k, v in options.items()
            if k in ("widths", "group", "family", "rotate", "lm_head", "exclude", "preset")
        }
        text: Data = "self" if data is None else data
        scores = score(model, text, progress=progress, **scoring, **shared)
        found = make_plan(scores, **plan_arguments(opts))
    if quantizer != "rtn":
        _calibrate(model, found, recipe, data, scores, progress, scoring)
    settings = {k: v for k, v in options.items() if k != "inductor"}
    settings |= {"plan": found, "release": release}
    settings["inductor"] = {**compat.mode_patches(mode), **dict(opts.inductor)}
    settings["rotate"] = found.rotation
    original = getattr(model, "_mixllm_float_forward", model.forward)
    model._mixllm_float_forward = original  # type: ignore[assignment]
    model._mixllm_options = settings  # type: ignore[assignment]
    model.forward = CompiledForward(
        original, backend=mixllm, options=settings, dynamic=dynamic, fullgraph=fullgraph
    )
    if _fused_experts(model, found.sites):
        compat.keep_grouped_experts(model)
    return model


def _calibrate(
    model: nn.Module,
    plan: Plan,
    recipe: Recipe,
    data: Data | None,
    scores: Scores | None,
    progress: Callable[[int, int], None] | None,
    scoring: Mapping[str, Any],
) -> None:
    """Quantize layer by layer; the backend finds the weights quantized."""
    ids = calibration_tokens(
        "self" if data is None else data,
        model,
        tokenizer=scoring.get("tokenizer"),
        sequences=QUANTIZE_SEQUENCES,
        length=scoring.get("length"),
        seed=scoring.get("seed", 0),
        at_least=2,
    )
    curvature = None if scores is None else scores.curvature
    quantize_model(model, plan, ids, recipe, row_weights=curvature, progress=progress, keep=True)


def invalidate(model: nn.Module) -> int:
    """Tell the compiler that weights were changed with `p.data.copy_(…)`, which nothing can see.

    The next call plans and packs again. Returns how many weights were known.
    """
    return _invalidate(model.parameters())


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What the compiler did with a model; `str()` of it is a table."""

    graphs: tuple[records.GraphRecord, ...]

    def __str__(self) -> str:
        return "\n".join(table(g) for g in self.graphs)


def explain(
    model: nn.Module, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Explanation:
    """Compile the model for these inputs and say, per linear, what became of it.

    Args:
        args, kwargs: inputs of the model.
        options: backend options; by default those the model was compiled with.
    """
    settings = dict(options if options is not None else getattr(model, "_mixllm_options", {}))
    settings |= {"lower": "eager", "quiet": True, "release": False}
    forward = getattr(model, "_mixllm_float_forward", model.forward)
    compiled = torch.compile(own_frame(forward), backend=mixllm, options=settings)
    with torch.no_grad(), records.collect() as graphs:
        compiled(*args, **kwargs)
    if not graphs:
        raise MixLLMError("Dynamo captured no graph from this call; nothing was compiled")
    return Explanation(tuple(graphs))


def _refuse_training(model: nn.Module) -> None:
    if model.training:
        raise UnsupportedModel(
            f"{type(model).__name__} is in training mode; call model.eval() first"
        )


__all__ = [
    "Explanation",
    "compile",
    "explain",
    "invalidate",
    "plan",
    "quantize",
    "score",
]
