"""The verb that looks back: reproduce."""

from typing import Annotated

import typer

from recsys.cli.options import DEFAULT_WORKSPACE, UriOption, WorkspaceOption
from recsys.errors import GateError
from recsys.terminal import Terminal


def reproduce(
    run: Annotated[str, typer.Argument(help="A run of the workspace by name, or its MLflow run id.")],
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    mlflow: UriOption = None,
) -> None:
    """Train a recorded run again; exit 4 if something else comes out, and say what has changed since."""
    from pipelines.reproduce import find_run
    from pipelines.reproduce import reproduce as again
    from pipelines.workspace import Workspace

    place = Workspace(workspace)
    place.require(place.prepared.directory, "prepare")
    directory = find_run(run, place)
    out = place.root / "reproduced" / directory.name
    with Terminal().bar(f"reproduce {directory.name}") as bar:
        result = again(directory, place, out, mlflow or place.tracking_uri, bar)
    typer.echo(result.words())
    if not result.identical:
        raise GateError(f"{directory.name} was not reproduced; see {out / 'reproduced.json'}")
