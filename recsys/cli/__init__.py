"""The command line, and the one place where the packages above the domain meet.

Everything heavy is imported inside the verb that needs it, so that `recsys --help` answers at once.
"""

import os
import re
import signal
import sys
from collections.abc import Sequence
from itertools import pairwise
from types import FrameType
from typing import Annotated

import typer

from recsys import __version__
from recsys.cli import answers, data, judging, models
from recsys.errors import ConfigError, RecsysError

VERBS = (
    data.init,
    data.ingest,
    data.prepare,
    data.audit,
    models.train,
    models.sweep,
    models.evaluate,
    models.compare,
    models.publish,
    judging.reproduce,
    answers.recommend,
    answers.serve,
    answers.compare_online,
    answers.replay,
    answers.quickstart,
)

app = typer.Typer(
    name="recsys",
    help="Train long-sequence rankers on your log, measure them honestly, serve the winner.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

BEFORE_TORCH = {"THP_MEM_ALLOC_ENABLE": "1", "GOMP_SPINCOUNT": "20000"}
"""What is read once, when torch is imported. Big temporaries are mapped in huge pages (4x faster embedding look-ups).
Threads that wait for each other give the core up after some 0.1 ms instead of milliseconds: as fast where nothing else
runs, and DIN's training beside two busy processes takes half to a quarter of the time.
"""

for verb in VERBS:
    app.command()(verb)


def main() -> None:
    """Run the command line; every error raised on purpose becomes one line on stderr and its exit code.

    A verb that is terminated ends its processes and removes what it had half written, as an interrupted one does.
    """
    signal.signal(signal.SIGTERM, _end)
    for name, value in BEFORE_TORCH.items():
        os.environ.setdefault(name, value)
    try:
        app()
    except RecsysError as error:
        sys.stderr.write(f"recsys: {told(error, sys.argv)}\n")
        sys.exit(error.exit_code)


def told(error: RecsysError, arguments: Sequence[str]) -> str:
    """Return an error's words, and which `--set` of the command line they are of: its key may be in no file."""
    text = str(error)
    given = [
        second if first == "--set" else first.removeprefix("--set=")
        for first, second in pairwise([*arguments, ""])
        if first == "--set" or first.startswith("--set=")
    ]
    if isinstance(error, ConfigError) and "--set" not in text:
        for one in reversed(given):  # the last of one key counts
            if _names(text, one.partition("=")[0].strip()):
                return f"{text} (by --set {one})"
    return text


def _names(text: str, key: str) -> bool:
    """Whether a message is of a dotted key: by its whole name, as unknown, or in its section."""
    *sections, last = parts = key.split(".")
    if any(f"unknown key {part!r}" in text for part in parts) or (
        sections and re.search(rf"(?<![\w.]){re.escape(key)}\b", text)
    ):
        return True
    there = f"[{sections[-1]}]" in text if sections else "[" not in text
    return there and re.search(rf"(?<![\w.']){re.escape(last)}(:|=| is | must )", text) is not None


def _end(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the verb."""
