"""What all plots have alike: colours that are readable on white and on black, text as text."""

from __future__ import annotations

from typing import Any

INK = "#7d7d7d"
OURS = "#2f7fd1"

STYLE: dict[str, Any] = {
    "svg.hashsalt": "mixllm", "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
    "xtick.color": INK, "ytick.color": INK, "svg.fonttype": "none", "font.size": 9,
}  # fmt: skip
