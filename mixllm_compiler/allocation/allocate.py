"""From scores and a budget to a plan."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from ..errors import OptionError, nearest
from ..formats.fingerprint import Fingerprint
from ..formats.row_format import DEFAULT_GROUP, WIDTHS, RowFormat
from ..formats.tables import same_place
from ..salience.scores import Scores
from .budget import Budget
from .paper import PAPER_FRACTION, PAPER_WIDTHS, top_by_bytes, top_by_count
from .plan import Certificate, Plan, SitePlan
from .problem import Problem, RowTime
from .search import best_tiles
from .tiles import free_rows
from .tiling import TILE, WINDOW, Tiling

PRESETS = ("best", "paper")
NOT_SCORED = "not scored"


def make_plan(
    scores: Scores,
    *,
    bits: float | None = None,
    bytes: int | None = None,
    kl: float | None = None,
    preset: str = "best",
    fraction: float = PAPER_FRACTION,
    widths: tuple[int, ...] | None = None,
    pins: Mapping[str, int] | None = None,
    exclude: Iterable[str] = (),
    float_sites: Mapping[str, str] | None = None,
    tile: int = TILE,
    window: int = WINDOW,
    siblings: bool = True,
    tp: int = 1,
    granularity: str = "tiles",
    formats_per_layer: int | None = None,
    constant: float = 1.0,
    floor: float = 0.0,
    time: RowTime | None = None,
    price: float = 0.0,
    activation_mode: str | None = None,
    rotation: int | None = None,
) -> Plan:
    """Allocate widths to all output features of a model at once.

    Args:
        scores: expected loss of every row in every format.
        bits: budget in true bits per quantized weight: codes, scales, zero points, row widths.
        bytes: the same budget as a size.
        kl: predicted KL in nats per token; the plan is the smallest that meets it. Preset "best"
            needs one of the three.
        preset: "best": the byte-true knapsack; "paper": the rows with the largest loss in the
            low width get the high one, `fraction` of all rows or as many as the budget holds.
        fraction: share of rows, by count, that preset "paper" raises without a budget.
        widths: bits that rows may have; all that were scored by default. For "paper" the low
            and the high one, 4 and 8 by default.
        pins: name pattern → bits of all rows of the matrices it matches; of several patterns the
            last one decides. Pinned rows count in the budget, not in `fraction`.
        exclude: name patterns of matrices that stay float; they are outside of the budget.
        float_sites: name → reason of matrices that stay float anyway, in the fingerprint or not;
            they only travel with the plan.
        tile: rows that share a width; 1 for free rows. Preset "paper" has free rows always.
        window: rows among which those of a tile are found; 0 for whole matrices.
        siblings: whether tiles may cross matrices that read the same activation.
        tp: devices that share each matrix by rows: windows end where a share does.
        granularity: for comparisons, what gets one width instead of "tiles": "rows", "linears",
            or all "siblings" together.
        formats_per_layer: most different widths of a matrix or, with `siblings`, of the matrices
            that read one activation; pinned ones do not count.
        constant, floor: predicted KL = constant · predicted loss + floor; see `Plan.predicted_kl`.
        time: (matrix name, format) → seconds that a row takes, e.g. from a cost model.
        price: nats per token that a second of all these rows' time is worth.
        activation_mode: "token" or "group"; by default "token" if inputs are rotated.
        rotation: Hadamard block of every linear's input, 0 for none; that of the scores by default.

    Patterns are shell-style (`model.layers.*.mlp.*`) and match a matrix's name with or without
    its `.weight`.

    Raises:
        BudgetError: the budget is smaller than the smallest plan, or the KL than the best one's.
        OptionError: a pattern matches nothing, a width was not scored, or options contradict.
    """
    budget = Budget(bits, bytes, kl, constant, floor)
    tiling = Tiling(tile, window, siblings, tp).at(granularity)
    if preset not in PRESETS:
        raise OptionError(f"unknown preset {preset!r}.{nearest(preset, PRESETS)}")
    if preset == "best" and not budget.given:
        raise OptionError("preset 'best' needs a budget, for example bits=4.4")
    if not 0 <= fraction <= 1:
        raise OptionError(f"fraction = {fraction} is no share of rows; give 0 to 1")
    if formats_per_layer is not None and formats_per_layer < 1:
        raise OptionError(f"formats_per_layer = {formats_per_layer} leaves rows no width")
    if kl is not None and (preset == "paper" or time is not None):
        raise OptionError("a predicted KL is a budget of preset 'best' without time")
    default = PAPER_WIDTHS if preset == "paper" else scores.widths
    chosen = tuple(sorted(set(default if widths is None else widths)))
    kept = dict(float_sites or {})
    known = [*scores.fingerprint.matrices, *kept]
    pinned = _pinned(pins or {}, known)
    _check_widths(chosen, pinned.values(), scores)
    if preset == "paper" and len(chosen) != 2:
        raise OptionError(f"preset 'paper' knows a low and a high width, not {chosen}")

    unscored = (name for name in scores.fingerprint.matrices if name not in scores.loss)
    kept = dict.fromkeys(unscored, NOT_SCORED) | _excluded(exclude, known) | kept
    names = [name for name in scores.loss if name not in kept]
    rotation = scores.rotation if rotation is None else rotation
    if not names:
        raise OptionError("no matrix is left to quantize: all are excluded or not scored")

    certificate = None
    if preset == "best":
        problem = Problem.build(scores, names, chosen, pinned, time, price)
        choice, solution = best_tiles(problem, tiling, budget, formats_per_layer)
        certificate = Certificate(
            solution.bytes + problem.fixed_bytes if kl is not None else solution.objective,
            solution.bound + problem.fixed_bytes if kl is not None else solution.bound,
            solution.gap,
            "bytes" if kl is not None else "loss",
        )
        predicted = solution.objective if time is None else problem.predicted_loss(choice)
    else:
        problem = Problem.build(scores, names, chosen, pinned)
        choice = _paper(problem, chosen[0], chosen[1], fraction, budget)
        predicted = problem.predicted_loss(choice)
    rows = problem.rows_of(choice)
    return Plan(
        fingerprint=scores.fingerprint,
        sites={name: _site(scores, name, *rows[name]) for name in names},
        float_sites=kept,
        activation_mode=activation_mode or ("token" if rotation else "group"),
        rotation=rotation,
        asked=_asked(preset, budget, fraction),
        score_kind=scores.kind,
        predicted_loss=predicted,
        certificate=certificate,
        constant=constant,
        floor=floor,
    )


def _site(scores: Scores, name: str, widths: Tensor, spans: Tensor) -> SitePlan:
    longer = spans if bool((spans > 1).any()) else None
    return SitePlan(*scores.shapes[name], widths, scores.group, scores.family, longer)


def uniform_plan(
    fingerprint: Fingerprint,
    shapes: Mapping[str, tuple[int, int]],
    bits: int,
    *,
    group: int = DEFAULT_GROUP,
    family: str = "asym",
    exclude: Iterable[str] = (),
    activation_mode: str | None = None,
    rotation: int = 0,
) -> Plan:
    """Every row of every matrix in `shapes` at `bits` bits: a baseline that needs no scores.

    Args:
        fingerprint: of the model; what it holds beside `shapes` stays float.
        shapes: name → (N, K) of the matrices to quantize, e.g. `fingerprint.shapes`.
        bits: width of all rows.
        group, family: the rest of their format.
        exclude, activation_mode, rotation: as for `make_plan`.

    Raises:
        OptionError: no such format, or a pattern matches nothing.
    """
    RowFormat(bits, group, family)
    float_sites = {name: "not asked for" for name in fingerprint.matrices if name not in shapes}
    float_sites |= _excluded(exclude, list(fingerprint.matrices))
    sites = {
        name: SitePlan(n, k, torch.full((n,), bits, dtype=torch.uint8), group, family)
        for name, (n, k) in shapes.items()
        if name not in float_sites
    }
    return Plan(
        fingerprint=fingerprint,
        sites=sites,
        float_sites=float_sites,
        activation_mode=activation_mode or ("token" if rotation else "group"),
        rotation=rotation,
        asked=f"{bits} bits in every row",
    )


def _paper(problem: Problem, low: int, high: int, fraction: float, budget: Budget) -> Tensor:
    """int64 [R] indices of formats by the paper's rule; pinned rows keep what they must have."""
    items = free_rows(problem)
    at_low, at_high = problem.column(low), problem.column(high)
    choice = items.loss.argmin(1)  # a pinned row has one finite loss
    free = ~problem.pinned[items.tensor]
    score, cost = items.loss[free, at_low], items.cost[free]
    if not budget.given:
        choice[free] = top_by_count(score, fraction, at_low, at_high)
    else:
        extra = cost[:, at_high] - cost[:, at_low]
        pinned = items.cost[~free].gather(1, choice[~free].unsqueeze(1))
        room = budget.in_bytes(problem, items) - int(pinned.sum()) - int(cost[:, at_low].sum())
        choice[free] = top_by_bytes(score, extra, room, at_low, at_high)
    taken = items.loss.gather(1, choice.unsqueeze(1))
    if bool(taken.isinf().any()):
        raise OptionError(
            "preset 'paper' gives a row a width in which its score is infinite; exclude its "
            "matrix or use preset 'best'"
        )
    return choice


def _asked(preset: str, budget: Budget, fraction: float) -> str:
    if not budget.given:
        return f"paper {100 * fraction:g} %"
    return f"paper at {budget}" if preset == "paper" else str(budget)


def _check_widths(widths: Sequence[int], pins: Iterable[int], scores: Scores) -> None:
    if not widths:
        raise OptionError(f"widths is empty; choose from {scores.widths}")
    for bits in (*widths, *pins):
        if bits not in WIDTHS:
            raise OptionError(f"a row cannot have {bits} bits; widths are {WIDTHS}")
        if bits not in scores.widths:
            raise OptionError(
                f"rows were not scored at {bits} bits, only at "
                f"{', '.join(map(str, scores.widths))}; score the model with that width too"
            )


def _pinned(pins: Mapping[str, int], names: Sequence[str]) -> dict[str, int]:
    """Matrix name → bits; later patterns decide."""
    return {name: bits for pattern, bits in pins.items() for name in _matching(pattern, names)}


def _excluded(patterns: Iterable[str], names: Sequence[str]) -> dict[str, str]:
    """Matrix name → why it stays float."""
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    return {name: f"excluded by {p!r}" for p in patterns for name in _matching(p, names)}


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    """Names that a shell-style pattern matches, with or without `.weight`.

    Raises:
        OptionError: none does.
    """
    found = [
        name
        for name in names
        if fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)
    ]
    if not found:
        # A name of the model if one is close, else what there is, without listing every layer.
        close = difflib.get_close_matches(pattern, names, n=1)
        known = names if close else {same_place(name) for name in names}
        raise OptionError(f"no matrix matches {pattern!r}.{nearest(pattern, known)}")
    return found
