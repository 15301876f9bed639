"""The verbs from a raw log to a prepared set: init, ingest, prepare, audit."""

import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from recsys.cli.options import DEFAULT_WORKSPACE, JsonOption, SetOption, WorkspaceOption
from recsys.errors import ConfigError
from recsys.terminal import Terminal, print_result


def init(
    events: Annotated[Path, typer.Option(help="The log: CSV, Parquet or JSON Lines; a file, or a glob in quotes.")],
    items: Annotated[Path | None, typer.Option(help="The catalogue, if there is one.")] = None,
    out: Annotated[Path, typer.Option(help="TOML file to write.")] = Path("recsys.toml"),
) -> None:
    """Look at a log of your own and write a commented mapping of its columns, to check and edit."""
    from pipelines.mapping_draft import write_mapping
    from recsys.files import whole_file

    if out.exists():
        raise ConfigError(f"{out}: already there; give another --out, or remove it")
    text = write_mapping(events, items, out.parent)
    with whole_file(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    typer.echo(text)
    Terminal().say(f"Check {out}, then: recsys ingest --config {out} --workspace {DEFAULT_WORKSPACE}")


def ingest(
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    config: Annotated[Path | None, typer.Option(help="A mapping of your own files; `recsys init` writes one.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="A log this package knows; completejourney if no --config is given.")
    ] = None,
    users: Annotated[int | None, typer.Option(help="Keep a sample of this many users of a dataset.", min=1)] = None,
    newest: Annotated[int | None, typer.Option(help="Keep only this many newest events of each user.", min=1)] = None,
    from_serving: Annotated[
        Path | None, typer.Option(help="State directory of a service: take in what it logged since the last time.")
    ] = None,
    window_days: Annotated[
        float, typer.Option(help="With --from-serving: days after an answer in which an event counts for it.")
    ] = 1.0,
    as_of: Annotated[
        int | None, typer.Option(help="With --from-serving: moment of judgement, microseconds UTC; now if absent.")
    ] = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read a raw log into the canonical events, items and users of a workspace."""
    from pipelines import ingest
    from pipelines.datasets import DATASETS
    from pipelines.datasets import newest as newest_of
    from pipelines.from_serving import forget_again
    from pipelines.mapping import load_mapping
    from pipelines.workspace import Workspace

    log, name = Workspace(workspace).log, dataset or "completejourney"
    if from_serving is not None:
        if config is not None or dataset is not None or users is not None or newest is not None or assignments:
            raise ConfigError("--from-serving reads a service's own logs; expected no other source beside it")
        _ingest_from_serving(Workspace(workspace), from_serving, window_days, as_of, as_json)
        return
    if config is not None:
        if dataset is not None or users is not None or newest is not None:
            raise ConfigError("--dataset, --users and --newest choose a known log; expected --config alone")
        card = ingest.ingest_files(load_mapping(config, assignments or ()), config.parent, log, config.stem)
    elif assignments:
        raise ConfigError("--set changes a mapping; expected --config with it")
    elif name not in DATASETS:
        raise ConfigError(f"--dataset must be one of {', '.join(DATASETS)}, found {name!r}")
    else:
        raw = DATASETS[name](users)
        card = ingest.ingest(raw if newest is None else newest_of(raw, newest), log)
    forget_again(Workspace(workspace))
    if as_json:
        print_result(card, as_json)
    else:
        typer.echo("\n".join(f"{label:<20} {words}" for label, words in card.describe()))
    _tell(card, Workspace(workspace))


def _tell(card: Any, place: Any) -> None:
    """Say what of a log wants a person's eye."""
    from pipelines.ingest import quarantine_of

    if card.bad or card.bad_impressions or card.bad_of_tables:
        Terminal().say(f"Bad rows: {quarantine_of(place.log)}")
    for doubt in card.doubts():
        Terminal().say(doubt)
    if later := place.parts[1:]:
        Terminal().say(
            f"Parts that were added stay beside it: {', '.join(map(str, later))}. Remove those whose events are in "
            "this log."
        )
    if card.order == "position":
        Terminal().say("This log knows only an order: prepare splits it by each user's last requests.")


def _ingest_from_serving(place: Any, state: Path, window_days: float, as_of: int | None, as_json: bool) -> None:
    from dataclasses import asdict

    from pipelines.from_serving import Attribution, ingest_from_serving
    from recsys.history import DAY

    moment = time.time_ns() // 1000 if as_of is None else as_of
    found = ingest_from_serving(state, place, Attribution(round(window_days * DAY), moment))
    print_result(asdict(found), as_json)
    if found.waiting and not found.part:
        Terminal().say(
            "No new events, so no part to put answers in: those that wait are taken in with the next events."
        )
    if found.forgotten or found.part:
        Terminal().say(f"Next: recsys prepare --workspace {place.root}")


def prepare(
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    config: Annotated[str, typer.Option(help="A TOML file, or the name of a shipped one.")] = "prepare",
    add: Annotated[
        list[Path] | None,
        typer.Option(
            "--add",
            help="A second workspace that `recsys ingest` made of later events: kept, and appended to the set.",
        ),
    ] = None,
    late: Annotated[
        Literal["refuse", "leave-out"],
        typer.Option(help="With --add: what becomes of events not after their user's newest event so far."),
    ] = "refuse",
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Pack histories, split by time, build requests, candidates, counts and transitions."""
    from pipelines import prepare
    from pipelines.append import add_part
    from pipelines.cards import prepare_defaults
    from pipelines.late import leave_out_late
    from pipelines.overview import doubts, overview, warnings
    from pipelines.prepared import PreparedSet
    from pipelines.shipped import find_config
    from pipelines.workspace import Workspace
    from recsys.config import overlaid, parse, read_toml
    from recsys.files import work_directory

    path = find_config(config)
    place = Workspace(workspace)
    place.require(place.log, "ingest")
    options = parse(
        prepare.PrepareConfig, overlaid(prepare_defaults(place.log), read_toml(path, assignments or ())), str(path)
    )
    if add and assignments:
        raise ConfigError("--add goes on with the settings of the prepared set; expected no --set beside it")
    if late != "refuse" and not add:
        raise ConfigError(f"--late {late}: expected --add DIR with it")
    out = place.require(place.prepared.directory, "prepare") if add else place.prepared.directory
    told: list[str] = []
    with Terminal().bar("prepare") as bar:
        for part in add or ():
            inside = part / "log"  # of a workspace
            part = inside if inside.exists() and not (part / "events.parquet").exists() else part
            with work_directory(place.root / "late") as work:
                source = part
                if late == "leave-out":
                    source = work / "part"
                    gone = leave_out_late(part, PreparedSet(out), place.parts, source)
                    told.append(f"{part}: {gone:,} late events were left out.")
                prepared = add_part(source, place.parts, place.later_parts, out, bar, part)
        if not add:
            prepared = prepare.prepare(place.parts, out, options, bar, _numbering(place))
    print_result(prepared.manifest | ({} if as_json else overview(prepared.manifest)), as_json)
    for line in [*told, *warnings(prepared.manifest), *doubts(prepared)]:
        Terminal().say(line)


def _numbering(place: Any) -> Path | None:
    """Return the set whose item numbers go on: that of before, where forgotten users would otherwise change them."""
    from pipelines.forgotten import read_list

    there: Path = place.prepared.directory
    return there if read_list(place.root) and (there / "manifest.json").exists() else None


def audit(workspace: WorkspaceOption = DEFAULT_WORKSPACE, as_json: JsonOption = False) -> None:
    """Look for leaks in the prepared set: checks that can fail (exit 4) and facts; writes audit.json."""
    from pipelines import audit
    from pipelines.audit_record import text
    from pipelines.workspace import Workspace

    place = Workspace(workspace)
    place.require(place.prepared.directory, "prepare")
    with Terminal().bar("audit") as bar:
        parts = place.parts if place.log.exists() else []
        found = audit.audit(place.prepared, parts, bar)
    found.save(place.audit)
    typer.echo(json.dumps(found.table(), indent=2, sort_keys=True) if as_json else text(found))
    audit.refuse_failed(found)
