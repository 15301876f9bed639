"""Training on several processes through Ray Train: the same loop, each worker on its share of every batch.

The workers read the prepared set and the run directory where the caller does, so on several machines both lie on a
shared file system. Checkpoints are those of a single process: a run that was killed goes on from its last one, with
any number of workers; bit for bit the same only with the same number.

Dropout and sampled softmax draw the same numbers in every worker; what depends on the item alone (items hidden behind
the unknown row) is therefore hidden in all of them alike, as in one process.
"""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines import tracking
from pipelines.checkpoint import TrainingError
from pipelines.prepared import PreparedSet
from pipelines.ray_session import ray_session
from pipelines.team import Processes
from pipelines.train import Loop, Trained, begin, build, finish, trained_run
from pipelines.train_config import TrainConfig, config_of, suited
from ranking.devices import pick_device
from recsys.errors import ConfigError


@dataclass(frozen=True)
class Job:
    """What every worker is told, as plain values."""

    config: dict[str, Any]
    prepared: str
    directory: str
    inputs: str
    run_id: str
    uri: str


def train_on_workers(config: TrainConfig, prepared: PreparedSet, directory: Path, uri: str, workers: int) -> Trained:
    """Train a model on several workers, or go on with the run `directory` holds, and give it at its best checkpoint.

    Args:
        config: the run; `batches.rows` are shared out, so a step sees as many rows as in one process.
        prepared: the prepared set.
        directory: of the run, as for `pipelines.train.train`.
        uri: MLflow tracking URI; the first worker alone writes to it.
        workers: processes, one core each, in the Ray of RAY_ADDRESS or one that is started and stopped here.

    Raises:
        ConfigError: fewer than one worker or row each, a model that takes no steps, or a GPU as the device.
        TrainingError: a worker failed; the last checkpoint is kept.

    Cost: some twenty seconds to start Ray and the workers. A step waits for the slowest worker and for one exchange of
    gradients, all numbers of dense ones and the touched rows of sparse ones.
    """
    if workers < 1:
        raise ConfigError(f"workers is {workers}; expected at least 1")
    config = suited(config, prepared)
    if pick_device(config.device).type != "cpu":
        raise ConfigError(f'device = "{config.device}": several workers train on CPUs; set device = "cpu"')
    if build(config, prepared).trains_on == "nothing":
        raise ConfigError(f"{config.name} takes no training steps that could be shared out; train it in one process")
    if config.batches.rows < workers:
        raise ConfigError(f"[batches] rows = {config.batches.rows} for {workers} workers; expected at least one each")
    with begin(config, prepared, directory, uri) as (run, inputs):
        job = Job(
            config.table(),
            str(prepared.directory.resolve()),
            str(directory.resolve()),
            inputs,
            run.run_id,
            _absolute(uri),
        )
        _fit(job, workers)
    return trained_run(directory, prepared)


def _fit(job: Job, workers: int) -> None:
    """Run the job in a group of workers."""
    with ray_session(workers), tempfile.TemporaryDirectory() as storage:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

        trainer = TorchTrainer(
            _work,
            train_loop_config=asdict(job),
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(name=Path(job.directory).name, storage_path=storage),
        )
        try:
            trainer.fit()
        except WorkerGroupError as error:
            reasons = [str(reason).strip().splitlines()[-1] for reason in error.worker_failures.values()]
            raise TrainingError(f"{len(reasons)} of {workers} workers failed: {'; '.join(reasons)}") from error
        except TrainingFailedError as error:
            raise TrainingError(f"Ray Train: {error}") from error


def _work(told: dict[str, Any]) -> None:
    """Train in one worker: the whole loop, in step with the others."""
    job, team = Job(**told), Processes()
    config = config_of(job.config, f"run {job.run_id}")
    run = tracking.Run(job.run_id, job.uri, tracking.tracking_client(job.uri)) if team.rank == 0 else None
    directory = Path(job.directory)
    loop = Loop(config, PreparedSet(Path(job.prepared)), directory, job.inputs, run, team)
    loop.run_to_end()
    if run is not None:
        finish(directory, loop, run)


def _absolute(uri: str) -> str:
    """Return a tracking URI that means the same in every working directory."""
    place = uri.removeprefix(tracking.SQLITE)
    return uri if place == uri else f"{tracking.SQLITE}{Path(place).resolve()}"
