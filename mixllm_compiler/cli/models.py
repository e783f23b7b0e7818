"""Models, tokenizers and inputs for the verbs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionError, UnsupportedModel, nearest
from .verb import stderr

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

DEMO = "demo"
DTYPES = ("float32", "bfloat16", "float16")


def load(
    name: str, device: str | None = None, dtype: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """A model in eval mode and its tokenizer (None if the folder has none).

    Raises:
        UnsupportedModel: there is no such model, or transformers cannot load it.
        OptionError: no such device or dtype.
    """
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"unknown dtype {dtype!r}.{nearest(dtype, DTYPES)}")
    where = _device(device)
    import transformers

    be_quiet()
    path = _location(name)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto")
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"cannot load {name!r}: {_first_lines(error)}") from error
    model.to(where)  # type: ignore[arg-type]
    return model.eval(), tokenizer(path)


def be_quiet() -> None:
    """Keep transformers' own notices and bars out of the way of ours."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _location(name: str) -> str:
    """The folder or hub id behind a name.

    Raises:
        UnsupportedModel: a path without a model in it.
    """
    folder = Path(name).expanduser()
    if name == DEMO and not folder.is_dir():
        from ..demo import MODEL_DIR

        return str(MODEL_DIR)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UnsupportedModel(f"{name!r} is a folder without a config.json, so no model")
        return str(folder)
    if folder.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise UnsupportedModel(f"there is no model folder {name!r}")
    return name


def tokenizer(path: str) -> Any:
    """The tokenizer of a model folder, or None."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError):  # transformers has no error of its own
        return None


def _device(wanted: str | None) -> torch.device:
    import torch

    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise OptionError(f"unknown device {wanted!r}; write cpu, cuda or cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError("there is no CUDA device here; see `mixllm doctor`")
    return device


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


def prompt_ids(model: PreTrainedModel, tokens: Any, prompt: str | None) -> Tensor:
    """Token ids [1, T] of a prompt; eight tokens of the vocabulary where there is none.

    Raises:
        OptionError: a prompt without a tokenizer.
    """
    import torch

    if prompt is None:
        vocabulary = int(model.config.get_text_config().vocab_size)
        ids = torch.arange(2, 10) % vocabulary
        return ids.unsqueeze(0).to(model.device)
    if tokens is None:
        raise OptionError("this model folder has no tokenizer, so it cannot read a prompt")
    ids = tokens(prompt, return_tensors="pt")["input_ids"]
    if not ids.numel():
        raise OptionError("the prompt is empty")
    # Most tokenizers end a text with nothing; those that do would end the answer as well.
    ending = tokens.eos_token_id
    if ids.shape[1] > 1 and ending is not None and ids[0, -1] == ending:
        ids = ids[:, :-1]
    return ids.to(model.device)


def write(
    model: PreTrainedModel, ids: Tensor, count: int, stop_after: int | None = None, **sampling: Any
) -> Tensor:
    """`generate` with a cache of fixed size, so that every step runs one compiled graph.

    Args:
        count: new tokens; the size of the cache, and so the graphs, depend on it.
        stop_after: stop earlier, with the graphs of `count`: that compiles them.

    Returns:
        The ids [1, T + count] or fewer, prompt included.
    """
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    class StopAt(StoppingCriteria):
        def __init__(self, length: int) -> None:
            self.length = length

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            done = input_ids.shape[1] >= self.length
            return torch.full((len(input_ids),), done, device=input_ids.device)

    settings: dict[str, Any] = {"max_new_tokens": count, "do_sample": False, **sampling}
    if getattr(model, "_can_compile_fullgraph", False):
        settings["cache_implementation"] = "static"
    if model.generation_config.pad_token_id is None:
        settings["pad_token_id"] = model.generation_config.eos_token_id or 0
    if stop_after is not None:
        stop = StopAt(ids.shape[1] + stop_after)
        settings["stopping_criteria"] = StoppingCriteriaList([stop])
    generate: Any = model.generate
    with torch.no_grad():
        found: Tensor = generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return found


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, fed with (done, in all)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Elapsed())
    with Progress(*columns, console=stderr(), transient=True) as bar:
        task = bar.add_task(label, total=None)

        def step(done: int, of: int) -> None:
            bar.update(task, completed=done, total=of)

        yield step


@contextmanager
def waiting(label: str) -> Iterator[None]:
    """A spinner on standard error for work that cannot say how far it is."""
    with stderr().status(label):
        yield
