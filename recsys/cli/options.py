"""Options that several verbs share, each declared once."""

from pathlib import Path
from typing import Annotated

import typer

from recsys.errors import ConfigError

WorkspaceOption = Annotated[Path, typer.Option("--workspace", "-w", help="Directory of the log and all made from it.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="section.key=value, on top of the config file.")]
UriOption = Annotated[
    str | None, typer.Option("--mlflow", help="MLflow tracking URI; sqlite in the workspace if absent.")
]
RecommenderOption = Annotated[
    Path | None, typer.Option("--recommender", help="TOML with [recommender], [[filters]] and [[rules]].")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
DEFAULT_WORKSPACE = Path("workspace")


def refuse_given(where: str, **options: object) -> None:
    """Refuse options that would do nothing; those at None, "", False or () were not given.

    Raises:
        ConfigError: names them.
    """
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    if given:
        raise ConfigError(f"{' and '.join(given)} would do nothing {where}")
