"""Tables of a page from the files in bench/results, so that no number is typed by hand.

    python -m mixllm_compiler.report.results_table README.md

rewrites what stands between `<!-- results: bench/results/NAME.json -->` and `<!-- end -->`; with
`PEERS.json beside bench/results/NAME.json` it is the table of other libraries and our lines, with
`NAME.json speeds` that of whole models.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_BLOCK = re.compile(
    r"(<!-- results: (\S+)(?: beside (\S+)| (speeds))? -->\n).*?(<!-- end -->)", re.DOTALL
)


def filled(page: str, root: Path) -> str:
    """A page with its tables made anew; result files are found from `root`."""

    def table(match: re.Match[str]) -> str:
        found = [json.loads((root / name).read_text("utf-8")) for name in match.group(2, 3) if name]
        if match[3]:
            made = peers_table(*found)
        else:
            made = speeds_table(*found) if match[4] else equal_bits_table(*found)
        return f"{match[1]}{made}\n{match[5]}"

    return _BLOCK.sub(table, page)


def equal_bits_table(content: Mapping[str, Any]) -> str:
    """One line per plan: true bits, KL on every text, and the ratio to the plan it is held to."""
    rows = [row for row in content["rows"] if "plan" in row]
    texts = [key.removeprefix("KL ") for key in rows[0] if key.startswith("KL ")]
    head = ["plan", "true bits", *(f"1000 KL, {text}" for text in texts), "of", "ratio"]
    lines = [f"| {' | '.join(head)} |", "|---" + "|--:" * (1 + len(texts)) + "|---|--:|"]
    for row in rows:
        cells = [row["plan"], f"{row['true bits']:.3f}"]
        for text in texts:
            cells.append(_kl({"KL": row[f"KL {text}"], "KL se": row[f"se {text}"]}))
        ratio = row.get(f"ratio {texts[0]}")
        spread = row.get(f"ratio se {texts[0]}")
        cells += [row.get("of", "–"), "–" if ratio is None else f"{ratio:.3f} ± {spread:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _source(content)])


def peers_table(peers: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Other libraries' models and ours by true bits: KL on every text, seconds of quantizing."""
    rows = [row for row in ours["rows"] if row.get("plan", "").startswith("ours")]
    rows += peers["rows"]
    texts = [key.removeprefix("KL ") for key in rows[0] if key.startswith("KL ")]
    head = ["", "package", "true bits", *(f"1000 KL, {text}" for text in texts), "seconds"]
    lines = [f"| {' | '.join(head)} |", "|---|---" + "|--:" * (2 + len(texts)) + "|"]
    for row in sorted(rows, key=lambda row: (row["true bits"], "plan" in row)):
        name, package = row.get("peer"), row.get("package", "")
        name = name or f"**{row['plan']}**"
        cells = [name, package, f"{row['true bits']:.3f}"]
        for text in texts:
            cells.append(_kl({"KL": row[f"KL {text}"], "KL se": row[f"se {text}"]}))
        cells.append(f"{row['seconds']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _source(peers), "", f"Ours: {_source(ours)}"])


def speeds_table(content: Mapping[str, Any]) -> str:
    """Whole models: bits of decoder, head and both, KL on every text, tokens per second."""
    rows = content["rows"]
    texts = [key.removeprefix("KL ") for key in rows[0] if key.startswith("KL ")]
    bits, speeds = ("decoder bits", "head bits", "true bits"), ("prefill", "decode")
    head = ["", *bits, *(f"1000 KL, {text}" for text in texts), *(f"{s} tokens/s" for s in speeds)]
    lines = [f"| {' | '.join(head)} |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for row in rows:
        cells = [row["variant"], *(f"{row[key]:.2f}" for key in bits)]
        for text in texts:
            cells.append(_kl({"KL": row[f"KL {text}"], "KL se": row[f"se {text}"]}))
        cells += [f"{row[f'{speed} tokens/s']:,.0f}" for speed in speeds]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _source(content)])


def _source(content: Mapping[str, Any]) -> str:
    torch = content["versions"]["torch"]
    measured = f"`{content['command']}`, {content['device']}, torch {torch}"
    return f"{measured}, commit {content['commit'][:12]}"


def _kl(row: Mapping[str, Any]) -> str:
    if row.get("KL") is None:
        return "–"
    digits = 3 if row["KL"] < 1e-3 else 2
    return f"{1e3 * row['KL']:.{digits}f} ± {1e3 * row['KL se']:.{digits}f}"


def main(arguments: Sequence[str]) -> int:
    """Fill the tables of the pages named; paths of results are relative to the working folder."""
    for name in arguments:
        page = Path(name)
        page.write_text(filled(page.read_text(encoding="utf-8"), Path()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
