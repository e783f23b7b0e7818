"""Tables of a page from the files in bench/results, so that no number is typed by hand.

    python -m mixllm_compiler.report.results_table README.md

rewrites what stands between `<!-- results: bench/results/NAME.json -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str, root: Path) -> str:
    """A page with its tables made anew; result files are found from `root`."""

    def table(match: re.Match[str]) -> str:
        content = json.loads((root / match[2]).read_text(encoding="utf-8"))
        make = quality_table if "text" in content["rows"][0] else equal_bits_table
        return f"{match[1]}{make(content)}\n{match[3]}"

    return _BLOCK.sub(table, page)


def quality_table(content: Mapping[str, Any]) -> str:
    """One line per plan, the texts beside each other; below, how it was measured."""
    rows: Sequence[Mapping[str, Any]] = content["rows"]
    texts = list(dict.fromkeys(row["text"] for row in rows))
    plans = list(dict.fromkeys(row["plan"] for row in rows))
    by_place = {(row["text"], row["plan"]): row for row in rows}
    head = ["plan", "true bits", "resident bits", "file MB"]
    head += [f"{figure}, {text}" for text in texts for figure in ("perplexity", "1000 KL")]
    lines = [f"| {' | '.join(head)} |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for plan in plans:
        row = by_place[texts[0], plan]
        cells = [plan, *(f"{row[key]:.2f}" for key in ("true bits", "resident bits", "file MB"))]
        for text in texts:
            one = by_place[text, plan]
            cells += [f"{one['perplexity']:.2f}", _kl(one)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _source(content)])


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
