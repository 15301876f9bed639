"""The verbs that answer requests: recommend, serve, quickstart."""

from pathlib import Path
from typing import Annotated, Any

import typer

from recsys.cli.options import DEFAULT_WORKSPACE, SetOption, UriOption, WorkspaceOption
from recsys.terminal import Terminal


def recommend(
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    users: Annotated[
        Path | None, typer.Option(help="Parquet or CSV with a column user_id; all users if absent.")
    ] = None,
    k: Annotated[int, typer.Option(min=1, max=1000, help="Items per user.")] = 10,
    at: Annotated[int | None, typer.Option(help="Moment of the requests, microseconds UTC; now if absent.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes; above 1 they are Ray workers.")] = 1,
) -> None:
    """Recommend to many users at once, with the very request path of the service."""
    from pipelines.recommend import BatchRequest, read_user_ids, recommend_on_workers, recommend_users
    from pipelines.workspace import Workspace
    from ranking.bundle import Bundle
    from ranking.manifest import read_manifest
    from ranking.snapshot import SnapshotReader

    place, moment = Workspace(workspace), _now() if at is None else at
    _, version = read_manifest(place.require(place.bundle, "publish"))
    snapshot = SnapshotReader(place.snapshot)
    ids = read_user_ids(users) if users else snapshot.users(len(snapshot))
    with Terminal().bar("recommend") as bar:
        if workers == 1:
            bundle = Bundle.load(place.bundle)
            count = recommend_users(bundle, snapshot, ids, k, moment, out, progress=lambda done, n: bar(done, n, ""))
        else:
            asked = BatchRequest(k, moment)
            count = recommend_on_workers(
                place.bundle, place.snapshot, ids, asked, out, workers, lambda done, n: bar(done, n, "")
            )
    typer.echo(f"{out}: {count} rows for {len(ids)} users, bundle {version}")


def serve(
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Replicas of the service.")] = 1,
    bare: Annotated[bool, typer.Option("--bare", help="One uvicorn process instead of Ray Serve.")] = False,
) -> None:
    """Serve the published bundle over HTTP until interrupted."""
    from serving.host import run_bare, start

    config = _serve_config(workspace, host, port, replicas)
    if bare:
        run_bare(config)
        return
    with start(config) as running:
        Terminal().say(f"Serving at {running.address}; documentation at {running.address}/docs. Stop with Ctrl-C.")
        running.wait()


def quickstart(
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    users: Annotated[int | None, typer.Option(help="Keep a sample of this many users.", min=1)] = None,
    leave: Annotated[bool, typer.Option("--exit", help="End after the requests instead of going on serving.")] = False,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    config: Annotated[str, typer.Option(help="A TOML file, or the name of a shipped one.")] = "quickstart",
    mlflow: UriOption = None,
    assignments: SetOption = None,
) -> None:
    """Run the main job on real data: raw log, trained models, report, and a live endpoint that answers."""
    from pipelines.quickstart import Job, load_quickstart
    from pipelines.workspace import Workspace
    from serving.demo import show_requests
    from serving.host import start

    terminal, place = Terminal(), Workspace(workspace)
    uri = mlflow or place.tracking_uri
    Job(place, load_quickstart(config, tuple(assignments or ())), terminal, uri, users).run()
    terminal.say("Starting Ray Serve on the published bundle.")
    with start(_serve_config(workspace, "127.0.0.1", port, 1)) as running:
        show_requests(running.address, terminal.say)
        terminal.say(f"Report    {(place.evaluation / 'report.html').resolve()}")
        terminal.say(f"Endpoint  {running.address}/ (open it to try the service by hand)")
        terminal.say(f"MLflow    {uri} (mlflow ui --backend-store-uri {uri})")
        if not leave:
            terminal.say("Serving until Ctrl-C.")
            running.wait()


def _serve_config(workspace: Path, host: str, port: int, replicas: int) -> Any:
    from pipelines.workspace import Workspace
    from serving.host import ServeConfig

    place = Workspace(workspace)
    return ServeConfig(
        bundle=place.require(place.bundle, "publish"),
        snapshot=place.snapshot,
        state=place.state,
        host=host,
        port=port,
        replicas=replicas,
    )


def _now() -> int:
    import time

    return time.time_ns() // 1000
