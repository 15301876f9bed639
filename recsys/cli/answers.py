"""The verbs that answer requests or look back at answers: recommend, replay, serve, compare-online, quickstart."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recsys.cli.options import DEFAULT_WORKSPACE, JsonOption, RecommenderOption, SetOption, UriOption, WorkspaceOption
from recsys.terminal import Terminal, print_result

if TYPE_CHECKING:
    from serving.settings import ServeConfig


def recommend(
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    users: Annotated[
        Path | None, typer.Option(help="Parquet or CSV with a column user_id; all users if absent.")
    ] = None,
    k: Annotated[int, typer.Option(min=1, max=1000, help="Items per user.")] = 10,
    at: Annotated[
        str | None,
        typer.Option(
            help="Moment of the requests: 2024-06-05, 2024-06-05T18:00, microseconds UTC, or `end`, just after the "
            "log's newest event. Now if absent, or the end of a log of positions."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes; above 1 they are Ray workers.")] = 1,
    recommender: RecommenderOption = None,
) -> None:
    """Recommend to many users at once, with the very request path of the service."""
    from pipelines.recommend import BatchRequest, read_user_ids, recommend_on_workers, recommend_users
    from pipelines.workspace import Workspace
    from ranking.as_served import Remembered, forgotten_since
    from ranking.bundle import Bundle
    from ranking.manifest import read_manifest
    from ranking.recommender_config import DEFAULTS, load_recommender
    from ranking.snapshot import SnapshotReader

    place = Workspace(workspace)
    config = load_recommender(recommender) if recommender else DEFAULTS
    _, version = read_manifest(place.require(place.bundle, "publish"))
    snapshot = SnapshotReader(place.snapshot)
    moment = _asked_at(at, snapshot.newest)
    hidden = forgotten_since(place.state, snapshot)
    ids = read_user_ids(users) if users else [user for user in snapshot.users(len(snapshot)) if user not in hidden]
    asked = BatchRequest(k, moment, config, hidden)
    with Terminal().bar("recommend") as bar:
        if workers == 1:
            bundle = Bundle.load(place.bundle)
            count = recommend_users(bundle, snapshot, ids, asked, out, bar)
        else:
            count = recommend_on_workers(place.bundle, place.snapshot, ids, asked, out, workers, bar)
    known = Remembered(snapshot, hidden)
    strangers = sum(known.read(user) is None for user in ids) if users else 0
    told = f", {strangers} of them without a history, served by popularity" if strangers else ""
    typer.echo(f"{out}: {count} rows for {len(ids)} users{told}, bundle {version}")


def replay(
    log: Annotated[Path, typer.Option(help="State directory of a service that logged its answers.")],
    bundle: Annotated[Path | None, typer.Option(help="Bundle to score with; that of the workspace if absent.")] = None,
    snapshot: Annotated[
        Path | None, typer.Option(help="Snapshot that was served; that of the workspace if absent.")
    ] = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    limit: Annotated[int | None, typer.Option(min=1, help="Only this many of the newest answers.")] = None,
    recommender: RecommenderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score logged answers again with any bundle, over the histories as they were, and say what differs."""
    import json

    from pipelines import replay
    from pipelines.workspace import Workspace
    from ranking.bundle import Bundle
    from ranking.recommender_config import DEFAULTS, load_recommender
    from ranking.snapshot import SnapshotReader

    place = Workspace(workspace)
    config = load_recommender(recommender) if recommender else DEFAULTS
    chosen = Bundle.load(bundle or place.require(place.bundle, "publish"), golden=False)
    with Terminal().bar("replay") as bar:
        base = SnapshotReader(snapshot or place.snapshot)
        found = replay.replay(log, chosen, base, config, limit, bar)
    typer.echo(json.dumps(found.table(), indent=2, sort_keys=True) if as_json else found.text())


def serve(
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 if absent.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port to listen on; 8000 if absent.")] = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="Replicas of the service; 1 if absent.")] = None,
    bare: Annotated[bool, typer.Option("--bare", help="One uvicorn process instead of Ray Serve.")] = False,
    watch: Annotated[bool, typer.Option(help="Follow champion, challenger and shadow in MLflow meanwhile.")] = True,
    config: Annotated[str, typer.Option(help="A TOML file, or the name of a shipped one.")] = "serve",
    mlflow: UriOption = None,
    assignments: SetOption = None,
    recommender: RecommenderOption = None,
) -> None:
    """Serve the published bundle over HTTP until interrupted; a new champion is swapped in without a pause."""
    from ranking.recommender_config import load_recommender
    from serving.host import run_bare, start

    given = {name: value for name, value in (("host", host), ("port", port), ("replicas", replicas)) if value}
    options = _serve_config(workspace, given, config, assignments or (), (mlflow or "workspace") if watch else "")
    if recommender:
        options = replace(options, recommender=load_recommender(recommender))
    if bare:
        run_bare(options, lambda address: Terminal().say(_serving_at(address)))
        return
    with start(options) as running:
        Terminal().say(_serving_at(running.address))
        running.wait()


def _serving_at(address: str) -> str:
    return f"Serving at {address}; documentation at {address}/docs. Stop with Ctrl-C."


def compare_online(
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    state: Annotated[Path | None, typer.Option(help="Directory of a service; that of the workspace if absent.")] = None,
    window_hours: Annotated[float, typer.Option(min=0, help="Hours in which events count after a request.")] = 24.0,
    action: Annotated[list[str] | None, typer.Option(help="Count events of this action only; may be repeated.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare challenger and shadow with the champion on the same live requests, by what users did afterwards."""
    from pipelines.workspace import Workspace
    from serving import online_comparison

    directory = state or Workspace(workspace).state
    found = online_comparison.compare_online(directory, int(window_hours * 3.6e9), _now(), tuple(action or ()))
    if as_json:
        print_result([comparison.table() for comparison in found], as_json)
    else:
        typer.echo(online_comparison.describe(found))


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
    with start(_serve_config(workspace, {"port": port})) as running:
        show_requests(running.address, terminal.say)
        terminal.say(f"Report    {(place.evaluation / 'report.html').resolve()}")
        terminal.say(f"Endpoint  {running.address}/ (open it to try the service by hand)")
        terminal.say(f"MLflow    {uri} (mlflow ui --backend-store-uri {uri})")
        if not leave:
            terminal.say("Serving until Ctrl-C.")
            running.wait()


def _serve_config(
    workspace: Path,
    given: Mapping[str, Any],
    config: str = "serve",
    assignments: Sequence[str] = (),
    registry: str = "",
) -> "ServeConfig":
    """Return how to serve a workspace: the config file, what the command line gives above it.

    `registry` is the MLflow to follow: a URI, "workspace" for that of the file, else that of the workspace, or "".
    """
    from pipelines.shipped import find_config
    from pipelines.workspace import Workspace
    from recsys.config import overlaid, parse, read_toml
    from serving.settings import ServeConfig

    place, path = Workspace(workspace), find_config(config)
    table = read_toml(path, assignments)
    if registry == "workspace":
        registry = table.get("watch", {}).get("mlflow") or place.tracking_uri
    paths = {
        "bundle": place.require(place.bundle, "publish"),
        "snapshot": place.snapshot,
        "state": place.state,
        "watch": {"mlflow": registry},
    }
    return parse(ServeConfig, overlaid(overlaid(table, paths), given), str(path))


def _asked_at(text: str | None, newest: int | None) -> int:
    """Return the moment of a batch of requests, microseconds UTC; says so if it is long after the log's end."""
    from datetime import UTC, datetime
    from re import fullmatch

    from recsys.history import DAY, EARLIEST, LATEST, OLD_DAYS, POSITIONS

    end = 0 if newest is None else newest + 1
    if text == "end" or (text is None and newest is not None and abs(newest) < POSITIONS):
        return end
    if text is None:
        if newest is not None and (days := (_now() - newest) // DAY) > OLD_DAYS:
            typer.echo(
                f"The newest event is {days:,} days old, and all that is recent to a model with it; `--at end` asks at "
                "the end of the log.",
                err=True,
            )
        return _now()
    wanted = f"{text!r}; expected a date or time as 2024-06-05T18:00, microseconds UTC, or `end`"
    if fullmatch(r"-?[0-9]+", text):
        if newest is not None and newest >= POSITIONS and not EARLIEST <= int(text) < LATEST:
            raise typer.BadParameter(wanted, param_hint="--at")
        return int(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(wanted, param_hint="--at") from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1_000_000)


def _now() -> int:
    import time

    return time.time_ns() // 1000
