"""Plain text tables for summaries that go into logs, files and terminals alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns two blanks apart; the first one to the left, the others to the right."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join((row[0].ljust(widths[0]), *rest)).rstrip())
    return "\n".join(lines)


def same_place(name: str) -> str:
    """The name with numbers of layers and experts replaced by `*`, to show alike ones together."""
    return re.sub(r"(^|(?<=\.))\d+(?=\.)|(?<=\.)\d+$", "*", name)
