"""The verbs from a prepared set to a published bundle: train, sweep, evaluate, compare, publish."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recsys.cli.options import DEFAULT_WORKSPACE, JsonOption, SetOption, UriOption, WorkspaceOption, refuse_given
from recsys.cli.search import publish_search, search_parts
from recsys.cli.text import all_text, evaluate_text, is_text_config, train_text
from recsys.errors import ConfigError
from recsys.terminal import Terminal, print_result

if TYPE_CHECKING:
    from pipelines.evaluation import EvaluateConfig
    from pipelines.funnel import Funnel
    from pipelines.prepared import PreparedSet
    from pipelines.train import Trained
    from pipelines.workspace import Workspace
    from ranking.calibration import Calibration
    from ranking.ranker import AnyRanker
    from recsys.progress import Progress


def train(
    config: Annotated[str, typer.Option(help="A TOML file, or the name of a shipped one, e.g. dare.")],
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    name: Annotated[str | None, typer.Option(help="Directory name of the run; that of the config if absent.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share every batch, through Ray Train.")] = 1,
    mlflow: UriOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train one model, or go on with a run that was interrupted; on CUDA where there is one (--set device=cpu)."""
    from pipelines import train
    from pipelines.evaluate import refuse_name
    from pipelines.shipped import find_config
    from pipelines.train_config import load_config, suited
    from pipelines.workspace import Workspace

    place, path = Workspace(workspace), find_config(config)
    if is_text_config(path):
        refuse_given("for a text model", workers=workers > 1)
        train_text(path, place, name, mlflow, assignments or (), as_json)
        return
    directory = place.run(name or Path(config).stem)
    refuse_name(directory.name)
    prepared = _prepared(place)
    options = load_config(path, assignments or ())
    asked, taken = (getattr(model, "category", None) for model in (options.model, suited(options, prepared).model))
    if taken != asked:
        columns = (*prepared.items.columns, *prepared.items.multi_columns)
        named = f"; it has {', '.join(columns)}: `--set model.category={columns[0]}` takes one" if columns else ""
        Terminal().say(f"{options.name} goes without a category: no item column {asked!r}{named}.")
    uri = mlflow or place.tracking_uri
    if workers > 1:
        from pipelines.distributed import train_on_workers

        Terminal().say(f"Training {options.name} on {workers} workers.")
        trained = train_on_workers(options, prepared, directory, uri, workers)
    else:
        with Terminal().bar(f"train {options.name}") as bar:
            trained = train.train(options, prepared, directory, uri, bar)
    print_result({"run_id": trained.run_id, **trained.summary.table()}, as_json)


def sweep(
    config: Annotated[str, typer.Option(help="A TOML file, or the name of a shipped one.")] = "sweep",
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    name: Annotated[str | None, typer.Option(help="Directory of the sweep; that of the config if absent.")] = None,
    mlflow: UriOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tune every model with the same budget on the validation period, or go on with a sweep that was interrupted."""
    from pipelines import sweep
    from pipelines.shipped import find_config
    from pipelines.workspace import Workspace

    place = Workspace(workspace)
    options = sweep.load_sweep(find_config(config), assignments or ())
    prepared = _prepared(place)
    directory = place.run(name or Path(config).stem)
    with Terminal().bar("sweep") as bar:
        swept = sweep.sweep(options, prepared, directory, mlflow or place.tracking_uri, bar)
    typer.echo(json.dumps(swept.table(), indent=2, sort_keys=True) if as_json else swept.markdown())
    Terminal().say(f"Runs, sweep.json and sweep.md: {directory.resolve()}")


def evaluate(
    runs: Annotated[
        list[str], typer.Argument(help="Directory names of training runs in the workspace; of a sweep's, sweep/NAME.")
    ],
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    config: Annotated[str, typer.Option(help="A TOML file, or the name of a shipped one.")] = "evaluate",
    corpus: Annotated[
        str | None, typer.Option(help="Of text models: a folder in BEIR's layout; what they were trained on if absent.")
    ] = None,
    split: Annotated[
        str, typer.Option(help="Of text models: the judged queries; test, where there is that split, if absent.")
    ] = "",
    mlflow: UriOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score the test requests with trained models and write metrics.json, report.html and report.md."""
    from pipelines import evaluate
    from pipelines.audit_record import last_audit
    from pipelines.logged import log_evaluation
    from pipelines.report import write_report
    from pipelines.shipped import find_config
    from pipelines.train import trained_run
    from pipelines.workspace import Workspace
    from recsys.config import parse, read_toml

    place = Workspace(workspace)
    if all_text(place, runs):
        refuse_given("for text models", config=config != "evaluate", set=assignments)
        evaluate_text(runs, place, corpus, split, mlflow, as_json)
        return
    for run in runs if corpus or split else ():
        place.require(place.run(run), "train")
    refuse_given("for rankers, whose split is in the config", corpus=corpus, split=split)
    path = find_config(config)
    options = parse(evaluate.EvaluateConfig, read_toml(path, assignments or ()), str(path))
    if len({Path(name).name for name in runs}) < len(runs):
        raise ConfigError(
            f"runs must differ in their last part, which names them in the report; found {' '.join(runs)}"
        )
    prepared = _prepared(place)
    trained = {Path(run).name: trained_run(place.require(place.run(run), "train"), prepared) for run in runs}
    models = {name: one.model for name, one in trained.items()}
    run_ids = {name: one.run_id for name, one in trained.items()}
    if options.protocol == "leave_one_out":
        _leave_one_out(models, place, options, as_json)
        return
    with Terminal().bar("evaluate") as bar:
        evaluation = replace(evaluate.evaluate(models, prepared, options, bar), run_ids=run_ids)
        funnel = _funnel(place, options, bar)
    summaries = {name: one.summary for name, one in trained.items()}
    evaluation.save(place.evaluation)
    if funnel is not None:
        funnel.save(place.evaluation / "funnel.json")
    write_report(evaluation, summaries, prepared.manifest, place.evaluation, last_audit(place.audit), funnel)
    log_evaluation(evaluation, place.evaluation, run_ids, mlflow or place.tracking_uri)
    Terminal().say(f"Report: {(place.evaluation / 'report.html').resolve()}")
    if as_json:
        typer.echo((place.evaluation / "metrics.json").read_text())


def _prepared(place: "Workspace") -> "PreparedSet":
    """Return the prepared set, and say so if the log has parts that it lacks."""
    place.require(place.prepared.directory, "prepare")
    if missing := place.left_out:
        added = " ".join(f"--add {part}" for part in missing if part != place.log)
        go_on = f"`recsys prepare --workspace {place.root} {added}` appends what is missing; " if added else ""
        Terminal().say(
            f"{place.prepared.directory} lacks {', '.join(map(str, missing))}: an addition was interrupted, or the log "
            f"was ingested since. This goes on with the set as it is. {go_on}"
            f"`recsys prepare --workspace {place.root}` prepares the whole log anew."
        )
    return place.prepared


def _funnel(place: "Workspace", options: "EvaluateConfig", bar: "Progress") -> "Funnel | None":
    """Measure the published bundle, if there is one of this data."""
    from pipelines.funnel import measure_funnel
    from pipelines.funnel_search import measure_search
    from ranking.bundle import Bundle
    from ranking.manifest import MANIFEST, read_manifest

    if not options.funnel_requests or not (place.bundle / MANIFEST).exists():
        return None
    if read_manifest(place.bundle)[0].provenance.data_digest != place.prepared.digest:
        Terminal().say("The published bundle is of other data; its funnel is left out.")
        return None
    bundle = Bundle.load(place.bundle)
    if bundle.ranking_model is None:
        return None
    asked = (place.prepared, options.split, options.funnel_requests, options.resamples, options.seed)
    funnel = measure_funnel(bundle, *asked, bar)
    searches, searched = measure_search(bundle, *asked, bar)
    return replace(funnel, searches=searches, searched=searched)


def _leave_one_out(
    models: "Mapping[str, AnyRanker]", place: "Workspace", options: "EvaluateConfig", as_json: bool
) -> None:
    """Judge models by the protocol of papers: a table and leave_one_out.json instead of the report."""
    from pipelines import leave_one_out

    with Terminal().bar("evaluate") as bar:
        report = leave_one_out.evaluate(
            models,
            place.prepared,
            options.split,
            options.resamples,
            options.level,
            options.seed,
            bar,
        )
    report.save(place.evaluation)
    typer.echo((place.evaluation / "leave_one_out.json").read_text() if as_json else report.markdown())


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(help="Runs of the workspace, MLflow run ids, bundle directories, or kept predictions."),
    ],
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    config: Annotated[str, typer.Option(help="A TOML file, or the name of a shipped one.")] = "compare",
    mlflow: UriOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say which of several models is better, how surely, and how many users it would take; trains nothing."""
    from pipelines import compare
    from pipelines.compare_page import build_page, render_markdown, write_page
    from pipelines.compare_runs import subjects
    from pipelines.shipped import find_config
    from pipelines.workspace import Workspace
    from recsys.config import parse, read_toml

    place, path = Workspace(workspace), find_config(config)
    prepared = _prepared(place)
    options = parse(compare.CompareFile, read_toml(path, assignments or ()), str(path))
    with subjects(runs, place, mlflow or place.tracking_uri) as found, Terminal().bar("compare") as bar:
        compared = compare.compare(found, prepared, options, bar)
    compared.save(place.comparison)
    write_page(compared, place.comparison)
    text = render_markdown(build_page(compared)).partition("## Exploratory")[0].replace("`", "")
    typer.echo((place.comparison / "compare.json").read_text() if as_json else text)
    Terminal().say(f"Comparison: {(place.comparison / 'compare.html').resolve()}")


def publish(
    ranker: Annotated[str | None, typer.Option(help="Directory name of the run that ranks.")] = None,
    retriever: Annotated[str | None, typer.Option(help="Directory name of the run that retrieves.")] = None,
    text_encoder: Annotated[
        str | None,
        typer.Option(help="Run, model folder or backbone (minilm) that search encodes with; none: words alone."),
    ] = None,
    reranker: Annotated[
        str | None,
        typer.Option(help="Run, model folder or Hugging Face cross-encoder that orders the best of a search."),
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="BEIR folder to search; the texts of the items if absent.")
    ] = None,
    fusion: Annotated[str, typer.Option(help="Words and vectors: by-query, a weight, or rrf.")] = "by-query",
    alias: Annotated[str, typer.Option(help="MLflow alias of the new version.")] = "champion",
    gates: Annotated[
        str | None, typer.Option(help="TOML of gates, or the name of a shipped one: exit 4 unless all are passed.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="isotonic or platt: scores of answers are probabilities, fitted on validation impressions."),
    ] = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    mlflow: UriOption = None,
) -> None:
    """Write a bundle and a user snapshot, and register the bundle in MLflow: a ranker, text search, or both."""
    from pipelines import publish
    from pipelines.from_serving import contained
    from pipelines.repeats import pass_over_repeats
    from pipelines.train import trained_run
    from pipelines.workspace import Workspace

    place = Workspace(workspace)
    uri = mlflow or place.tracking_uri
    if ranker is None:
        refuse_given("without --ranker", retriever=retriever, gates=gates, calibration=calibration)
        text = search_parts(text_encoder, reranker, corpus, fusion, place, items=False)
        publish_search(text, corpus, place, uri, alias)
        return
    if retriever is not None:
        _refuse_without_vectors(retriever, place)
    chosen = trained_run(place.require(place.run(ranker), "train"), place.prepared)
    if gates is not None:
        _pass_gates(gates, ranker, chosen.run_id, place)
    found = trained_run(place.require(place.run(retriever), "train"), place.prepared) if retriever else None
    probabilities = _calibration(calibration, chosen, place) if calibration is not None else None
    # Last, since encoding takes minutes and everything else is refused in seconds.
    text = search_parts(text_encoder, reranker, corpus, fusion, place, items=True)
    logs = pass_over_repeats(place.prepared, place.parts, contained(place.prepared, place.parts), place.state)
    bundle_version = publish.publish(
        place.prepared,
        ranker=chosen,
        retriever=found,
        out=place.bundle,
        snapshot=place.snapshot,
        metrics=chosen.summary.table(),
        logs=logs.marks,
        text=text,
        calibration=probabilities,
    )
    for line in logs.told():
        Terminal().say(line)
    version = publish.register(place.bundle, chosen.run_id, uri, alias=alias)
    typer.echo(f"{place.bundle}: bundle {bundle_version}, MLflow version {version}, alias {alias}")


def _refuse_without_vectors(retriever: str, place: "Workspace") -> None:
    """Raise `ConfigError` for a run whose model gives no vectors, naming the runs of the workspace that do."""
    from pipelines.scoring import is_retriever
    from ranking.models import RANKERS
    from recsys.files import read_json

    retrieving = {name for name, (_, model) in RANKERS.items() if is_retriever(model)}
    found = read_json(place.require(place.run(retriever), "train") / "run.json")["config"]["name"]
    if found not in retrieving:
        runs = {path.parent.name: read_json(path)["config"]["name"] for path in place.run("").glob("*/run.json")}
        able = ", ".join(sorted(name for name, model in runs.items() if model in retrieving))
        raise ConfigError(
            f"--retriever {retriever}: {found} gives no vectors of users and items to search by; expected a run of "
            f"{' or '.join(sorted(retrieving))}; there are: {able or 'none'}"
        )


def _calibration(method: str, chosen: "Trained", place: "Workspace") -> "Calibration":
    """Fit what makes the ranker's scores probabilities."""
    from pipelines.calibration import METHODS, fit_calibration

    if method not in METHODS:
        raise ConfigError(f"--calibration {method}; expected one of {', '.join(METHODS)}")
    found = fit_calibration(method, chosen.model, place.prepared)
    Terminal().say(f"Calibration: {method}, fitted on {found.shown:,} items shown in {found.answers:,} answers.")
    return found


def _pass_gates(gates: str, ranker: str, run_id: str, place: "Workspace") -> None:
    """Judge a ranker by the last evaluation of its run; raises `GateError` naming the gates it fails."""
    from pipelines.audit_record import last_audit
    from pipelines.evaluation import Evaluation
    from pipelines.gates import judge, read_gates, refuse_failed
    from pipelines.predictions import same_data
    from pipelines.shipped import find_config

    evaluation = Evaluation.load(place.require(place.evaluation, "evaluate"))
    same_data({"the last evaluation": evaluation.data_digest, "the prepared set": place.prepared.digest})
    passages = judge(read_gates(find_config(gates)), Path(ranker).name, run_id, evaluation, last_audit(place.audit))
    for one in passages:
        Terminal().say(f"Gate {one.name}: {'passed' if one.passed else 'FAILED'}, {one.told}")
    refuse_failed(passages)
