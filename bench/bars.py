"""Print the bars of all results in bench/results as one table.

The exit code is 0 also where a bar is missed: a missed bar stays visible, it breaks no build.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from results_io import RESULTS


@dataclass(frozen=True)
class Line:
    """One bar and where it comes from; `problem` says why a file could not be read."""

    result: str
    device: str = ""
    commit: str = ""
    name: str = ""
    target: str = ""
    measured: float | None = None
    se: float | None = None
    met: bool = False
    problem: str = ""


def read(folder: Path) -> list[Line]:
    """The bars of every file, in the files' order."""
    return [line for path in sorted(folder.glob("*.json")) for line in read_file(path)]


def read_file(path: Path) -> list[Line]:
    """The bars of one file; a file that cannot be read is a line that says so."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        where = {"device": content["device"], "commit": content["commit"]}
        return [Line(path.stem, **where, **bar) for bar in content["bars"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [Line(path.stem, problem=f"unreadable: {type(error).__name__}: {error}")]


def number(line: Line) -> str:
    """`0.413 ± 0.006`, or what stands in its place."""
    if line.measured is None:
        return "not measured"
    spread = "" if line.se is None else f" ± {line.se:.2g}"
    return f"{line.measured:.5g}{spread}"


def table(lines: list[Line]) -> Table:
    """One row for each bar."""
    made = Table("result", "bar", "target", "measured", "met", "commit")
    for line in lines:
        if line.problem:
            made.add_row(line.result, Text(line.problem, "red"))
            continue
        met = Text("yes", "green") if line.met else Text("NO", "bold red")
        cells = (line.name, line.target, number(line))
        made.add_row(Text(line.result), *map(Text, cells), met, Text(line.commit))
    return made


def main(argv: list[str] | None = None) -> int:
    """Print the table, or the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--results", type=Path, default=RESULTS, help="another folder of results")
    args = parser.parse_args(argv)
    lines = read(args.results)
    if args.json:
        print(json.dumps([asdict(line) for line in lines], indent=2))
        return 0
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    if not lines:
        console.print("No bars yet: the scripts of bench/ write them to bench/results.")
        return 0
    console.print(table(lines))
    console.print(f"{sum(line.met for line in lines)} of {len(lines)} bars met", style="bold")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
