"""Plans as text for people."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ..formats.tables import same_place, table

if TYPE_CHECKING:
    from .plan import Plan, SitePlan


def summary(plan: Plan) -> str:
    """Head lines, a table with alike matrices of all layers in one line, what stays float."""
    lines = [f"plan {plan.digest} for {plan.fingerprint}", _size(plan), _activations(plan)]
    if plan.predicted_loss is not None:
        kind = f" ({plan.score_kind})" if plan.score_kind else ""
        lines.append(f"predicted loss +{plan.predicted_loss:.4g} nats per token{kind}")
        if (plan.constant, plan.floor) != (1, 0):
            lines.append(f"predicted KL {plan.predicted_kl:.4g} nats per token")
    if plan.certificate is not None:
        best = (
            "smallest plan of this loss"
            if plan.certificate.of == "bytes"
            else "best plan of this size"
        )
        lines.append(f"gap to the {best} at most {plan.certificate.gap:.1e}")
    if plan.sites:
        lines.append(_table(plan))
    reasons: dict[tuple[str, str], int] = Counter(
        (same_place(name), reason) for name, reason in plan.float_sites.items()
    )
    lines += [f"float: {count}× {name} ({reason})" for (name, reason), count in reasons.items()]
    return "\n".join(lines)


def _size(plan: Plan) -> str:
    asked = f", asked for {plan.asked}" if plan.asked else ""
    if not plan.sites:
        return f"no matrix quantized{asked}"
    size = plan.true_bytes / 1e6
    return f"{plan.true_bits:.3f} true bits, {size:.2f} MB in {len(plan.sites)} matrices{asked}"


def _activations(plan: Plan) -> str:
    rotation = f"rotated in blocks of {plan.rotation}" if plan.rotation else "not rotated"
    return f"activations int8 per {plan.activation_mode}, {rotation}"


def _table(plan: Plan) -> str:
    places: dict[tuple[str, int, int], list[SitePlan]] = {}
    for name, site in plan.sites.items():
        places.setdefault((same_place(name), site.n, site.k), []).append(site)
    widths = list(plan.rows_per_width())
    rows: list[tuple[object, ...]] = []
    for (name, n, k), sites in places.items():
        bits = 8 * sum(s.true_bytes for s in sites) / (n * k * len(sites))
        counts = _counts(sites)
        rows.append((name, len(sites), f"{n}×{k}", f"{bits:.3f}", *(counts[w] for w in widths)))
    whole = plan.rows_per_width()
    rows.append(("all", len(plan.sites), "", f"{plan.true_bits:.3f}", *whole.values()))
    return table(("matrix", "count", "shape", "bits", *(f"rows w{w}" for w in widths)), rows)


def _counts(sites: list[SitePlan]) -> Counter[int]:
    total: Counter[int] = Counter()
    for site in sites:
        total.update(site.rows_per_width())
    return total


def diff(before: Plan, after: Plan) -> str:
    """One line per setting and per matrix that changes; `""` for equal plans."""
    lines = []
    for key in ("fingerprint", "activation_mode", "rotation", "asked", "score_kind"):
        a, b = getattr(before, key), getattr(after, key)
        if a != b:
            lines.append(f"{key.replace('_', ' ')}: {a} → {b}")
    if before.predicted_loss != after.predicted_loss:
        lines.append(f"predicted loss: {_loss(before)} → {_loss(after)}")
    if before.sites and after.sites and before.true_bytes != after.true_bytes:
        lines.append(f"true bits: {before.true_bits:.3f} → {after.true_bits:.3f}")
    for name in [*before.sites, *(n for n in after.sites if n not in before.sites)]:
        change = _site_change(before.sites.get(name), after.sites.get(name))
        if change:
            lines.append(f"{name}: {change}")
    return "\n".join(lines)


def _loss(plan: Plan) -> str:
    return "unknown" if plan.predicted_loss is None else f"{plan.predicted_loss:.4g}"


def _site_change(a: SitePlan | None, b: SitePlan | None) -> str:
    if a is None or b is None:
        return f"{_bits(a)} → {_bits(b)}"
    if a == b:
        return ""
    if (a.n, a.k) != (b.n, b.k):
        return f"{a.n}×{a.k} → {b.n}×{b.k}"
    rows = int((a.widths != b.widths).sum())
    settings = "" if a.group == b.group else f", group {a.group} → {b.group}"
    settings += "" if a.family == b.family else f", {a.family} → {b.family}"
    return f"{_bits(a)} → {_bits(b)}, {rows} of {a.n} rows change{settings}"


def _bits(site: SitePlan | None) -> str:
    return "float" if site is None else f"{site.true_bits:.3f} bits"
