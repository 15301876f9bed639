"""How long jobs speak to a person: whole sentences and progress bars on stderr; stdout carries results alone."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from recsys.progress import Progress


class Terminal:
    """Speaks on stderr, so that stdout carries results alone."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)

    def say(self, sentence: str) -> None:
        """Show one plain sentence."""
        self.console.print(sentence, markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, title: str) -> Iterator[Progress]:
        """Open a progress bar."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = ("  ", BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Bar(*columns, console=self.console, disable=not self.console.is_terminal) as bar:
            task = bar.add_task(title, total=None)

            def progress(done: int, total: int, words: str = "") -> None:
                bar.update(task, completed=done, total=total, description=words or title)

            yield progress


def print_result(value: Any, as_json: bool) -> None:
    """Print a result on stdout: JSON for machines, aligned lines for people."""
    table = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    if as_json:
        typer.echo(json.dumps(table, indent=2, sort_keys=True, default=str))
        return
    for key, entry in table.items():
        if not isinstance(entry, dict | list):
            typer.echo(f"{key:<24} {entry}")
