"""The command line, and the one place where the packages above the domain meet.

Everything heavy is imported inside the verb that needs it, so that `recsys --help` answers at once.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from recsys import __version__
from recsys.errors import ConfigError, RecsysError

app = typer.Typer(
    name="recsys",
    help="Train long-sequence rankers on your log, measure them honestly, serve the winner.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

WorkspaceOption = Annotated[Path, typer.Option("--workspace", "-w", help="Directory of the log and all made from it.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="section.key=value, on top of the config file.")]
UriOption = Annotated[
    str | None, typer.Option("--mlflow", help="MLflow tracking URI; sqlite in the workspace if absent.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
DEFAULT_WORKSPACE = Path("workspace")


class Terminal:
    """Speaks on stderr, so that stdout carries results alone."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)

    def say(self, sentence: str) -> None:
        """Show one plain sentence."""
        self.console.print(sentence, markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, title: str) -> Iterator[Callable[[int, int, str], None]]:
        """Open a progress bar; what it gives is called as (done, total, words)."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = ("  ", BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(title, total=None)

            def report(done: int, total: int, words: str) -> None:
                progress.update(task, completed=done, total=total, description=words or title)

            yield report


def main() -> None:
    """Run the command line; every error raised on purpose becomes one line on stderr and its exit code."""
    # torch reads this once, at import: big temporaries are then mapped in huge pages (4x faster embedding look-ups).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        app()
    except RecsysError as error:
        sys.stderr.write(f"recsys: {error}\n")
        sys.exit(error.exit_code)


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


@app.command()
def ingest(
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    dataset: Annotated[str, typer.Option(help="A log this package knows.")] = "completejourney",
    users: Annotated[int | None, typer.Option(help="Keep a sample of this many users.", min=1)] = None,
    as_json: JsonOption = False,
) -> None:
    """Read a raw log into the canonical events, items and users of a workspace."""
    from pipelines.datasets import DATASETS
    from pipelines.ingest import ingest as run
    from pipelines.workspace import Workspace

    if dataset not in DATASETS:
        raise ConfigError(f"--dataset must be one of {', '.join(DATASETS)}, found {dataset!r}")
    summary = run(DATASETS[dataset](users), Workspace(workspace).log)
    _result(summary, as_json)


@app.command()
def prepare(
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    config: Annotated[str, typer.Option(help="A TOML file, or the name of a shipped one.")] = "prepare",
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Pack histories, split by time, build requests, candidates, counts and transitions."""
    from pipelines.prepare import PrepareConfig
    from pipelines.prepare import prepare as run
    from pipelines.shipped import find_config
    from pipelines.workspace import Workspace
    from recsys.config import parse, read_toml

    path = find_config(config)
    place = Workspace(workspace)
    log = place.require(place.log, "ingest")
    options = parse(PrepareConfig, read_toml(path, assignments or ()), str(path))
    with Terminal().bar("prepare") as bar:
        prepared = run(log, place.prepared.directory, options, lambda words, done, total: bar(done, total, words))
    _result(prepared.manifest, as_json)


@app.command()
def train(
    config: Annotated[str, typer.Option(help="A TOML file, or the name of a shipped one, e.g. dare.")],
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    name: Annotated[str | None, typer.Option(help="Directory name of the run; that of the config if absent.")] = None,
    mlflow: UriOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train one model, or go on with a run that was interrupted."""
    from pipelines.shipped import find_config
    from pipelines.train import load_config
    from pipelines.train import train as run
    from pipelines.workspace import Workspace

    place = Workspace(workspace)
    place.require(place.prepared.directory, "prepare")
    options = load_config(find_config(config), assignments or ())
    directory = place.run(name or Path(config).stem)
    with Terminal().bar(f"train {options.name}") as bar:
        trained = run(options, place.prepared, directory, mlflow or place.tracking_uri, bar)
    _result({"run_id": trained.run_id, **trained.summary.table()}, as_json)


@app.command()
def evaluate(
    runs: Annotated[list[str], typer.Argument(help="Directory names of training runs in the workspace.")],
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    config: Annotated[str, typer.Option(help="A TOML file, or the name of a shipped one.")] = "evaluate",
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score the test requests with trained models and write metrics.json, report.html and report.md."""
    from pipelines.evaluate import EvaluateConfig
    from pipelines.evaluate import evaluate as run
    from pipelines.report import write_report
    from pipelines.shipped import find_config
    from pipelines.train import trained_run
    from pipelines.workspace import Workspace
    from recsys.config import parse, read_toml

    place, path = Workspace(workspace), find_config(config)
    options = parse(EvaluateConfig, read_toml(path, assignments or ()), str(path))
    trained = {name: trained_run(place.require(place.run(name), "train"), place.prepared) for name in runs}
    models = {name: one.model for name, one in trained.items()}
    with Terminal().bar("evaluate") as bar:
        evaluation = run(models, place.prepared, options, lambda words, done, total: bar(done, total, words))
    summaries = {name: one.summary for name, one in trained.items()}
    evaluation.save(place.evaluation)
    write_report(evaluation, summaries, place.prepared.manifest, place.evaluation)
    Terminal().say(f"Report: {(place.evaluation / 'report.html').resolve()}")
    if as_json:
        typer.echo((place.evaluation / "metrics.json").read_text())


@app.command()
def publish(
    ranker: Annotated[str, typer.Option(help="Directory name of the run that ranks.")],
    retriever: Annotated[str | None, typer.Option(help="Directory name of the run that retrieves.")] = None,
    alias: Annotated[str, typer.Option(help="MLflow alias of the new version.")] = "champion",
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    mlflow: UriOption = None,
) -> None:
    """Write a bundle and a user snapshot, and register the bundle in MLflow."""
    from pipelines.publish import publish as run
    from pipelines.publish import register
    from pipelines.train import trained_run
    from pipelines.workspace import Workspace

    place = Workspace(workspace)
    chosen = trained_run(place.require(place.run(ranker), "train"), place.prepared)
    found = trained_run(place.require(place.run(retriever), "train"), place.prepared) if retriever else None
    bundle_version = run(
        place.prepared,
        ranker=chosen,
        retriever=found,
        out=place.bundle,
        snapshot=place.snapshot,
        metrics=chosen.summary.table(),
    )
    version = register(place.bundle, chosen.run_id, mlflow or place.tracking_uri, alias=alias)
    typer.echo(f"{place.bundle}: bundle {bundle_version}, MLflow version {version}, alias {alias}")


@app.command()
def recommend(
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    users: Annotated[
        Path | None, typer.Option(help="Parquet or CSV with a column user_id; all users if absent.")
    ] = None,
    k: Annotated[int, typer.Option(min=1, max=1000, help="Items per user.")] = 10,
    at: Annotated[int | None, typer.Option(help="Moment of the requests, microseconds UTC; now if absent.")] = None,
) -> None:
    """Recommend to many users at once, with the very request path of the service."""
    from pipelines.recommend import read_user_ids, recommend_users
    from pipelines.workspace import Workspace
    from ranking.bundle import Bundle
    from ranking.snapshot import SnapshotReader

    place = Workspace(workspace)
    bundle = Bundle.load(place.require(place.bundle, "publish"))
    snapshot = SnapshotReader(place.snapshot)
    ids = read_user_ids(users) if users else snapshot.users(len(snapshot))
    count = recommend_users(bundle, snapshot, ids, k, _now() if at is None else at, out)
    typer.echo(f"{out}: {count} rows for {len(ids)} users, bundle {bundle.version}")


@app.command()
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


@app.command()
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
        terminal.say(f"Endpoint  {running.address}/ (a page to try it by hand: {running.address}/docs)")
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


def _result(value: Any, as_json: bool) -> None:
    """Print a result: JSON for machines, aligned lines for people."""
    import dataclasses

    table = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    if as_json:
        typer.echo(json.dumps(table, indent=2, sort_keys=True, default=str))
        return
    for key, entry in table.items():
        if not isinstance(entry, dict | list):
            typer.echo(f"{key:<24} {entry}")


def _now() -> int:
    import time

    return time.time_ns() // 1000


if __name__ == "__main__":
    main()
