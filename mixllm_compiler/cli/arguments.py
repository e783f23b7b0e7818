"""Arguments that several verbs take, each described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import OptionError

_PLANNING = "What is quantized, and how"
_SCORING = "What it is scored on"
_DEVICE = "Where it runs"


def _option(*names: str, help: str, panel: str | None = None, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **more)


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A model folder, a hub id, or 'demo' for the shipped model."
    ),
]
Bits = Annotated[
    float | None,
    _option(
        "--bits", "-b", help="Budget in true bits per quantized weight; 4.4 by default.",
        panel=_PLANNING,
    ),
]  # fmt: skip
Plan = Annotated[
    Path | None,
    _option("--plan", "-p", help="A plan made before; nothing is scored then.", panel=_PLANNING),
]
Preset = Annotated[
    str,
    _option(
        "--preset",
        help="'best' (the default: a knapsack over two-level rows of 2 to 8 bits, rotated inputs) "
        "or 'paper' (10 % of features by count at 8 bits, the others at 4, asymmetric, not "
        "rotated).",
        panel=_PLANNING,
    ),
]
Widths = Annotated[
    str | None,
    _option(
        "--widths", help="Bits that a row may have, as in 3,4,5,8; by default the preset's.",
        panel=_PLANNING,
    ),
]  # fmt: skip
Group = Annotated[
    int | None,
    _option("--group", help="Group size along K; 128 by default.", panel=_PLANNING),
]
Spans = Annotated[
    str | None,
    _option(
        "--spans",
        help="Group sizes that a two-level row may choose from, in units of --group, as in 1,2; "
        "by default the preset's (1,2 or 1).",
        panel=_PLANNING,
    ),
]
Rotate = Annotated[
    int | None,
    _option(
        "--rotate",
        help="Largest block of the Hadamard transform of every input, 0 for none; by default the "
        "preset's (256 or none).",
        panel=_PLANNING,
    ),
]
Family = Annotated[
    str | None,
    _option("--family", help="Format of rows: 'two-level' or 'asym'; by default the preset's.",
            panel=_PLANNING),
]  # fmt: skip
Quantizer = Annotated[
    str,
    _option(
        "--quantizer",
        help="'rtn' rounds to nearest (the default), 'gptq' quantizes layer by layer on the text, "
        "'search' does so with more effort (two-level rows only).",
        panel=_PLANNING,
    ),
]
LmHead = Annotated[
    bool, _option("--lm-head", help="Quantize the output head, too.", panel=_PLANNING)
]
Exclude = Annotated[
    list[str] | None,
    _option("--exclude", help="Keep matrices of this name pattern float.", panel=_PLANNING),
]
Pin = Annotated[
    list[str] | None,
    _option(
        "--pin", metavar="PATTERN=BITS", help="Give all rows of these matrices one width.",
        panel=_PLANNING,
    ),
]  # fmt: skip
Tile = Annotated[
    int | None,
    _option("--tile", help="Rows that share one width; 64 by default, 1 for free rows.",
            panel=_PLANNING),
]  # fmt: skip
Window = Annotated[
    int | None,
    _option(
        "--window", help="Rows among which those of a tile are found; 1,024 by default, 0 for all.",
        panel=_PLANNING,
    ),
]  # fmt: skip
Siblings = Annotated[
    bool,
    _option(
        "--siblings/--no-siblings",
        help="Whether tiles may cross matrices that read the same activation; they may by default.",
        panel=_PLANNING,
    ),
]
TensorParallel = Annotated[
    int | None,
    _option("--tp", help="Devices that share each matrix by rows.", panel=_PLANNING),
]
FormatsPerLayer = Annotated[
    int | None,
    _option("--formats-per-layer", help="Most widths in one matrix.", panel=_PLANNING),
]
Data = Annotated[
    str,
    _option(
        "--data",
        "-d",
        help="A text file, a data set id, or 'self' (the default): text the model writes itself.",
        panel=_SCORING,
    ),
]
Sequences = Annotated[
    int | None, _option("--sequences", help="How many sequences; 8 by default.", panel=_SCORING)
]
Length = Annotated[
    int | None,
    _option(
        "--length", help="Tokens a sequence; 1,024 by default, or what the model allows.",
        panel=_SCORING,
    ),
]  # fmt: skip
Seed = Annotated[int, _option("--seed", help="Seed of the text it writes.", panel=_SCORING)]
Device = Annotated[
    str | None,
    _option("--device", help="cpu or cuda; the GPU by default if there is one.", panel=_DEVICE),
]
Dtype = Annotated[
    str | None,
    _option(
        "--dtype", help="float32, bfloat16 or float16; by default the checkpoint's own.",
        panel=_DEVICE,
    ),
]  # fmt: skip
Lower = Annotated[
    str,
    _option(
        "--lower",
        help="'inductor' (the default) compiles the whole graph; 'eager' starts in seconds.",
        panel=_DEVICE,
    ),
]
Prompt = Annotated[str | None, typer.Option("--prompt", help="Text to continue.")]
Tokens = Annotated[int, typer.Option("--tokens", "-n", min=1, help="Tokens to write.")]


def planning_options(
    *,
    widths: str | None = None,
    group: int | None = None,
    spans: str | None = None,
    rotate: int | None = None,
    family: str | None = None,
    lm_head: bool = False,
    exclude: list[str] | None = None,
    pin: list[str] | None = None,
    tile: int | None = None,
    window: int | None = None,
    siblings: bool = True,
    tp: int | None = None,
    formats_per_layer: int | None = None,
) -> dict[str, Any]:
    """The backend's options behind these arguments; what was not given is left out.

    Raises:
        OptionError: text that is no list of numbers, or no pin.
    """
    options: dict[str, Any] = {}
    for name, text in (("widths", widths), ("spans", spans)):
        if text is not None:
            options[name] = _numbers(name, text)
    numbers = {
        "group": group,
        "rotate": rotate,
        "tile": tile,
        "window": window,
        "tp": tp,
        "formats_per_layer": formats_per_layer,
    }
    options |= {name: number for name, number in numbers.items() if number is not None}
    if family is not None:
        options["family"] = family
    if not siblings:
        options["siblings"] = False
    if lm_head:
        options["lm_head"] = True
    if exclude:
        options["exclude"] = tuple(exclude)
    if pin:
        options["pins"] = dict(_pin(text) for text in pin)
    return options


def scoring_options(
    *, sequences: int | None = None, length: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Arguments of `mixllm_compiler.score`; what was not given is left out."""
    options: dict[str, Any] = {"seed": seed}
    if sequences is not None:
        options["sequences"] = sequences
    if length is not None:
        options["length"] = length
    return options


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        what, example = {"widths": ("bits", "3,4,5,8"), "spans": ("spans", "1,2")}[name]
        raise OptionError(
            f"--{name} {text!r} is no list of {what}; write for example {example}"
        ) from None


def _pin(text: str) -> tuple[str, int]:
    pattern, _, bits = text.rpartition("=")
    if not pattern or not bits.isdigit():
        raise OptionError(f"--pin {text!r} is not PATTERN=BITS; write for example '*.down_proj=8'")
    return pattern, int(bits)
