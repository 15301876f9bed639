"""Follows the aliases `champion`, `challenger` and `shadow` of a model registry, beside the service and never in it.

A look at the registry that finds another bundle under an alias fetches it, checks its files, replays its golden
requests, and only then gives the service its new plan; the replicas load it beside the old one and swap a reference.
Whatever fails on the way (registry out of reach, damaged download, an answer that differs) leaves the plan as it is.
"""

import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from recsys.errors import BundleError, ConfigError, RecsysError
from recsys.files import read_json, whole_directory, write_json
from serving.lineup import ROLES, BundlePlace, Plan, Role

logger = logging.getLogger(__name__)

LINEUP = "lineup.json"
BUNDLES = "bundles"
KEPT = 2
"""Bundles kept beside those of the plan, newest first: a way back that needs no registry."""


@dataclass(frozen=True)
class WatchConfig:
    """Where aliases are followed."""

    mlflow: str = ""
    """tracking URI of MLflow; empty follows nothing"""
    model: str = "recsys"
    """registered model"""
    seconds: float = 10.0
    """between two looks"""

    def __post_init__(self) -> None:
        if self.seconds <= 0:
            raise ConfigError(f"[watch] seconds is {self.seconds}; expected more than 0")


@dataclass(frozen=True)
class Registered:
    """A bundle in the registry: its version (the digest of its manifest) and where its files are."""

    version: str
    source: str


class Registry(Protocol):
    """A model registry. Any exception means that it is out of reach."""

    def aliases(self) -> Mapping[Role, Registered]:
        """Return what each alias names now."""
        ...

    def fetch(self, registered: Registered, directory: Path) -> Path:
        """Copy a bundle to somewhere under an empty directory and give its path."""
        ...


class MlflowRegistry:
    """Aliases of a registered model in MLflow, as `recsys publish` sets them.

    Args:
        uri: tracking URI.
        model: name of the registered model.
    """

    def __init__(self, uri: str, model: str) -> None:
        # An unreachable server must be known as such within seconds, not after MLflow's minutes of retries.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self._uri = uri
        self._model = model
        self._client: Any = None

    def aliases(self) -> Mapping[Role, Registered]:
        """Return what each alias names now; a version without the tag `bundle` was not published by this system."""
        client = self._connect()
        found: dict[Role, Registered] = {}
        named = client.get_registered_model(self._model).aliases
        for role in ROLES:
            if role in named:
                version = client.get_model_version(self._model, named[role])
                if "bundle" in version.tags:
                    found[role] = Registered(version.tags["bundle"], version.source)
        return found

    def fetch(self, registered: Registered, directory: Path) -> Path:
        """Download a bundle."""
        import mlflow

        self._connect()
        return Path(
            mlflow.artifacts.download_artifacts(
                artifact_uri=registered.source, dst_path=str(directory), tracking_uri=self._uri
            )
        )

    def _connect(self) -> Any:
        if self._client is None:
            from mlflow import MlflowClient

            logging.getLogger("alembic").setLevel(logging.WARNING)
            self._client = MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)
        return self._client


class Watcher:
    """Brings a service to what the registry's aliases say.

    Args:
        registry: where aliases are read.
        state: directory of the service; fetched bundles and the last plan lie in it.
        plan: what is served now.
        deploy: brings the service to a plan and returns once it serves it; raises `RecsysError` if it does not.
    """

    def __init__(self, registry: Registry, state: Path, plan: Plan, deploy: Callable[[Plan], None]) -> None:
        self._registry = registry
        self._state = state
        self._deploy = deploy
        self._refused: set[str] = set()
        self._reachable = True
        self.plan = plan

    def look(self) -> bool:
        """Look once; gives whether the plan changed. Raises nothing that the registry or a bundle may cause."""
        try:
            wanted = self._registry.aliases()
        except Exception as error:  # whatever the client library raises when its server is away
            if self._reachable:
                logger.warning("the model registry cannot be read (%s); what is served stays", _first_line(error))
            self._reachable = False
            return False
        self._reachable = True
        plan = self._planned(wanted)
        if plan == self.plan:
            return False
        try:
            self._deploy(plan)
        except RecsysError:
            logger.exception("the service did not take %s; %s stays", plan.table(), self.plan.table())
            return False
        logger.info("now served: %s", {role: place.version for role, place in plan.places()})
        self.plan = plan
        keep(self._state, plan)
        return True

    def watch(self, seconds: float, ended: threading.Event) -> None:
        """Look every `seconds` seconds until the event is set."""
        while not ended.wait(seconds):
            try:
                self.look()
            except Exception:  # a full disk, say; a thread that ended here would follow no alias ever after
                logger.exception("looking at the model registry failed; it is looked at again in %g s", seconds)

    def _planned(self, wanted: Mapping[Role, Registered]) -> Plan:
        """Return the plan for the aliases; a role whose bundle is unavailable stays as it is."""
        plan = self.plan
        for role in ROLES:
            registered = wanted.get(role)
            before: BundlePlace | None = getattr(plan, role)
            if registered is None:
                if role != "champion":  # without an alias nobody challenges; somebody must answer
                    plan = plan.with_role(role, None)
            elif (before is None or before.version != registered.version) and registered.version not in self._refused:
                place = self._fetched(role, registered)
                plan = plan if place is None else plan.with_role(role, place)
        return plan

    def _fetched(self, role: Role, registered: Registered) -> BundlePlace | None:
        """Return a checked copy of a bundle, None if there is none to be had."""
        directory = self._state / BUNDLES / registered.version
        try:
            if not directory.exists():
                with whole_directory(directory) as temporary:
                    found = self._registry.fetch(registered, temporary)
                    if found != temporary:
                        _lift(found, temporary)
            check(directory, registered.version)
        except BundleError as error:
            self._refused.add(registered.version)  # it will not mend itself; publishing again gives another version
            shutil.rmtree(directory, ignore_errors=True)
            logger.error("%s bundle %s is refused: %s", role, registered.version, error)
            return None
        except Exception as error:  # the registry or the network; the next look tries again
            logger.warning("%s bundle %s cannot be fetched (%s)", role, registered.version, _first_line(error))
            return None
        return BundlePlace(directory, registered.version)


def check(directory: Path, version: str | None = None) -> str:
    """Load a bundle, golden requests included, and give its version; raises `BundleError` unless it is as published."""
    from ranking.bundle import Bundle

    found = Bundle.load(directory).version
    if version is not None and found != version:
        raise BundleError(f"{directory}: holds bundle {found}, expected {version}; publish it again")
    return found


def adopt(bundle: Path, version: str, state: Path) -> BundlePlace:
    """Return a bundle's place under the state directory, copied there if need be.

    What is served must not change under a replica that starts again, whoever writes into the published one. A copy that
    was damaged is made again.
    """
    directory = (state / BUNDLES / version).resolve()
    if not _sound(directory, version):
        with whole_directory(directory) as temporary:
            shutil.copytree(bundle, temporary, dirs_exist_ok=True)
    return BundlePlace(directory, version)


def _sound(directory: Path, version: str) -> bool:
    """Whether a directory holds a bundle, every file as published."""
    from ranking.manifest import checked_files, read_manifest

    try:
        manifest, found = read_manifest(directory)
        checked_files(directory, manifest)
    except RecsysError:
        return False
    return found == version


def keep(state: Path, plan: Plan) -> None:
    """Write down what is served, and drop fetched bundles that have not been served for long."""
    write_json(state / LINEUP, plan.table())
    served = {place.version for _, place in plan.places()}
    others = [path for path in (state / BUNDLES).glob("*") if path.name not in served]
    for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT:]:
        shutil.rmtree(path, ignore_errors=True)  # a replica that still maps its files keeps them


def last_plan(state: Path) -> Plan | None:
    """Return what was served last, None if nothing was or its bundles are gone."""
    if not (state / LINEUP).exists():
        return None
    plan = Plan.of(read_json(state / LINEUP))
    return plan if all(place.directory.is_dir() for _, place in plan.places()) else None


def _lift(found: Path, directory: Path) -> None:
    """Move what lies in a directory somewhere below another to the top of that other."""
    aside = directory.with_name(f"{directory.name}.aside")
    found.rename(aside)
    shutil.rmtree(directory)
    aside.rename(directory)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
