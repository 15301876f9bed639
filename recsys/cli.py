"""The command line, and the one place where the packages above the domain meet.

Everything heavy is imported inside the verb that needs it, so that `recsys --help` answers at once.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from recsys import __version__
from recsys.errors import ConfigError, RecsysError
from recsys.terminal import Terminal, print_result

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
def init(
    events: Annotated[Path, typer.Option(help="The log: CSV, Parquet or JSON Lines.")],
    items: Annotated[Path | None, typer.Option(help="The catalogue, if there is one.")] = None,
    out: Annotated[Path, typer.Option(help="TOML file to write.")] = Path("recsys.toml"),
) -> None:
    """Look at a log of your own and write a commented mapping of its columns, to check and edit."""
    from pipelines.guess import write_mapping
    from recsys.files import whole_file

    if out.exists():
        raise ConfigError(f"{out}: already there; give another --out, or remove it")
    text = write_mapping(events, items, out.parent)
    with whole_file(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    typer.echo(text)
    Terminal().say(f"Check {out}, then: recsys ingest --config {out} --workspace {DEFAULT_WORKSPACE}")


@app.command()
def ingest(
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    config: Annotated[Path | None, typer.Option(help="A mapping of your own files; `recsys init` writes one.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="A log this package knows; completejourney if no --config is given.")
    ] = None,
    users: Annotated[int | None, typer.Option(help="Keep a sample of this many users of a dataset.", min=1)] = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read a raw log into the canonical events, items and users of a workspace."""
    from pipelines.datasets import DATASETS
    from pipelines.ingest import ingest as run
    from pipelines.ingest import ingest_files, quarantine_of
    from pipelines.mapping import load_mapping
    from pipelines.workspace import Workspace

    log, name = Workspace(workspace).log, dataset or "completejourney"
    if config is not None:
        if dataset is not None or users is not None:
            raise ConfigError("--dataset and --users choose a known log; expected --config alone")
        card = ingest_files(load_mapping(config, assignments or ()), config.parent, log, config.stem)
    elif assignments:
        raise ConfigError("--set changes a mapping; expected --config with it")
    elif name not in DATASETS:
        raise ConfigError(f"--dataset must be one of {', '.join(DATASETS)}, found {name!r}")
    else:
        card = run(DATASETS[name](users), log)
    if as_json:
        print_result(card, as_json)
    else:
        typer.echo("\n".join(f"{label:<20} {words}" for label, words in card.describe()))
    if card.bad or card.bad_impressions:
        Terminal().say(f"Bad rows: {quarantine_of(log)}")
    if card.order == "position":
        Terminal().say("This log knows only an order: prepare splits it by each user's last requests.")


@app.command()
def prepare(
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    config: Annotated[str, typer.Option(help="A TOML file, or the name of a shipped one.")] = "prepare",
    add: Annotated[
        list[Path] | None,
        typer.Option("--add", help="A log's directory with later events only: kept, and appended to the prepared set."),
    ] = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Pack histories, split by time, build requests, candidates, counts and transitions."""
    from pipelines.append import add_part
    from pipelines.cards import prepare_defaults
    from pipelines.prepare import PrepareConfig
    from pipelines.prepare import prepare as run
    from pipelines.shipped import find_config
    from pipelines.workspace import Workspace
    from recsys.config import overlaid, parse, read_toml

    path = find_config(config)
    place = Workspace(workspace)
    place.require(place.log, "ingest")
    options = parse(PrepareConfig, overlaid(prepare_defaults(place.log), read_toml(path, assignments or ())), str(path))
    if add and assignments:
        raise ConfigError("--add goes on with the settings of the prepared set; expected no --set beside it")
    out = place.require(place.prepared.directory, "prepare") if add else place.prepared.directory
    with Terminal().bar("prepare") as bar:

        def report(words: str, done: int, total: int) -> None:
            bar(done, total, words)

        for part in add or ():
            prepared = add_part(part, place.parts, place.later_parts, out, report)
        if not add:
            prepared = run(place.parts, out, options, report)
    print_result(prepared.manifest, as_json)


@app.command()
def audit(workspace: WorkspaceOption = DEFAULT_WORKSPACE, as_json: JsonOption = False) -> None:
    """Look for leaks in the prepared set: checks that can fail (exit 4) and facts; writes audit.json."""
    from pipelines.audit import audit as run
    from pipelines.audit import refuse_failed
    from pipelines.audit_record import text
    from pipelines.workspace import Workspace

    place = Workspace(workspace)
    place.require(place.prepared.directory, "prepare")
    with Terminal().bar("audit") as bar:
        parts = place.parts if place.log.exists() else []
        found = run(place.prepared, parts, lambda words, done, total: bar(done, total, words))
    found.save(place.audit)
    typer.echo(json.dumps(found.table(), indent=2, sort_keys=True) if as_json else text(found))
    refuse_failed(found)


@app.command()
def train(
    config: Annotated[str, typer.Option(help="A TOML file, or the name of a shipped one, e.g. dare.")],
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    name: Annotated[str | None, typer.Option(help="Directory name of the run; that of the config if absent.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share every batch, through Ray Train.")] = 1,
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
    uri = mlflow or place.tracking_uri
    if workers > 1:
        from pipelines.distributed import train_on_workers

        Terminal().say(f"Training {options.name} on {workers} workers.")
        trained = train_on_workers(options, place.prepared, directory, uri, workers)
    else:
        with Terminal().bar(f"train {options.name}") as bar:
            trained = run(options, place.prepared, directory, uri, bar)
    print_result({"run_id": trained.run_id, **trained.summary.table()}, as_json)


@app.command()
def sweep(
    config: Annotated[str, typer.Option(help="A TOML file, or the name of a shipped one.")] = "sweep",
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    name: Annotated[str | None, typer.Option(help="Directory of the sweep; that of the config if absent.")] = None,
    mlflow: UriOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tune every model with the same budget on the validation period, or go on with a sweep that was interrupted."""
    from pipelines.shipped import find_config
    from pipelines.sweep import load_sweep
    from pipelines.sweep import sweep as run
    from pipelines.workspace import Workspace

    place = Workspace(workspace)
    options = load_sweep(find_config(config), assignments or ())
    place.require(place.prepared.directory, "prepare")
    directory = place.run(name or Path(config).stem)
    with Terminal().bar("sweep") as bar:
        swept = run(options, place.prepared, directory, mlflow or place.tracking_uri, bar)
    typer.echo(json.dumps(swept.table(), indent=2, sort_keys=True) if as_json else swept.markdown())
    Terminal().say(f"Runs, sweep.json and sweep.md: {directory.resolve()}")


@app.command()
def evaluate(
    runs: Annotated[list[str], typer.Argument(help="Directory names of training runs in the workspace.")],
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    config: Annotated[str, typer.Option(help="A TOML file, or the name of a shipped one.")] = "evaluate",
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score the test requests with trained models and write metrics.json, report.html and report.md."""
    from pipelines.audit_record import last_audit
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
    write_report(evaluation, summaries, place.prepared.manifest, place.evaluation, last_audit(place.audit))
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


if __name__ == "__main__":
    main()
