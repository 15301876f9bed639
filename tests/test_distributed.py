"""Several workers take the step that one would: shares of a batch, averaged gradients, the same metrics."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

import worlds
from pipelines.batches import BatchConfig, TrainingBatches
from pipelines.distributed import train_on_workers
from pipelines.ray_session import ray_session
from pipelines.team import Alone, Processes
from pipelines.tracking import tracking_client
from pipelines.train import Loop, train
from pipelines.train_config import TrainConfig, load_config
from ranking.embeddings import ItemEmbedding
from recsys.errors import ConfigError

ROWS, WIDTH, MEMBERS = 30, 4, 2


@pytest.mark.parametrize("trains_on", ["requests", "sequences"])
@pytest.mark.parametrize("size", [2, 3])
def test_the_shares_of_a_batch_are_the_batch(prepared, trains_on, size):
    batches = TrainingBatches(prepared, BatchConfig(rows=25), trains_on, 40, seed=5)
    for step in range(4):
        whole = batches.batch(step)
        shares = [batches.batch(step, rank, size) for rank in range(size)]
        assert sum(len(share) for share in shares) == len(whole)
        for rank, share in enumerate(shares):
            mine = worlds.take(whole, np.arange(rank, len(whole), size))
            for got, wanted in ((share.history, mine.history), (share.candidates, mine.candidates)):
                for name, tensor in vars(wanted).items():
                    assert torch.equal(getattr(got, name), tensor), name
            assert torch.equal(share.label, mine.label)
            assert torch.equal(share.weight, mine.weight)
            assert torch.equal(share.request.at, mine.request.at)


class Model(nn.Module):
    """Every kind of parameter: sparse rows, dense ones, ones that no row or only some rows use, running statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.item = ItemEmbedding(20, WIDTH)
        self.seldom = ItemEmbedding(20, WIDTH)
        self.never = ItemEmbedding(20, WIDTH)
        self.dense = nn.Linear(WIDTH, 1)
        self.sometimes = nn.Linear(WIDTH, 1)
        self.unused = nn.Linear(WIDTH, 1)
        self.norm = nn.BatchNorm1d(1)

    def loss(self, item: Tensor, label: Tensor, weight: Tensor) -> Tensor:
        """A weighted mean over rows; a row with label 1 also uses `seldom` and `sometimes`."""
        logit = self.dense(self.item(item).sum(1)).squeeze(1)
        if label.any():
            logit = logit + label * self.sometimes(self.seldom(item).sum(1)).squeeze(1)
        return ((logit - label).square() * weight).sum() / weight.sum()


def task() -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(7)
    item = torch.randint(1, 20, (ROWS, 3), generator=draws)
    label = torch.zeros(ROWS)
    label[::2] = 1.0  # member 1 of two never sees one
    return item, label, torch.rand(ROWS, generator=draws) + 0.1


def member(rank: int, meeting: str) -> None:
    """One member: gradients of its share, averaged, must be those of the whole batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=MEMBERS)
    team = Processes()
    assert (team.rank, team.size) == (rank, MEMBERS)
    item, label, weight = task()
    alone, model = Model(), Model()
    alone.loss(item, label, weight).backward()
    mine = slice(rank, None, MEMBERS)
    model.loss(item[mine], label[mine], weight[mine]).backward()
    model.norm.running_mean += rank
    team.average(model, weight[mine].sum())
    for (name, ours), whole in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert (ours.grad is None) == (whole.grad is None), name
        if whole.grad is not None:
            assert ours.grad.is_sparse == whole.grad.is_sparse, name
            dense = [g.to_dense() if g.is_sparse else g for g in (ours.grad, whole.grad)]
            torch.testing.assert_close(dense[0], dense[1], rtol=1e-5, atol=1e-6, msg=name)
            everybody = [torch.empty_like(dense[0]) for _ in range(MEMBERS)]
            dist.all_gather(everybody, dense[0])
            assert torch.equal(everybody[0], everybody[1]), name  # bit for bit, or the weights would drift apart
    assert model.norm.running_mean.item() == 0.5
    told = [{"gauc": float("nan"), "auc": 0.1 + 0.2}]
    agreed = team.agree(told if rank == 0 else None)
    assert agreed[0]["auc"] == 0.1 + 0.2
    assert np.isnan(agreed[0]["gauc"])
    dist.destroy_process_group()


def test_averaged_gradients_are_those_of_the_whole_batch(tmp_path: Path):
    torch.multiprocessing.spawn(member, args=(str(tmp_path / "meeting"),), nprocs=MEMBERS)


def test_alone_nothing_changes():
    model, team = Model(), Alone()
    model.loss(*task()).backward()
    before = model.item.weight.grad.clone()
    team.average(model, torch.tensor(3.0))
    assert torch.equal(model.item.weight.grad.to_dense(), before.to_dense())
    assert team.agree({"a": 1}) == {"a": 1}


class Listening(Alone):
    """Remembers by what its share of a step was weighed."""

    def average(self, module: nn.Module, weight: Tensor) -> None:
        self.weight = weight


@pytest.mark.parametrize("name", ["dare", "dare_own_counts"])
def test_a_share_weighs_as_much_as_its_loss_is_a_mean_over(prepared, tmp_path, name):
    """A mean over candidates by its candidates, a mean over requests by its requests."""
    team = Listening()
    loop = Loop(replace(config(name), device="cpu"), prepared, tmp_path, "inputs", None, team)
    loop.step()
    batch = loop.batches.batch(0)
    assert float(team.weight) == (len(batch) if name == "dare_own_counts" else float(batch.weight.sum()))


def config(name: str, **stop) -> TrainConfig:
    shipped = load_config(Path(f"pipelines/configs/{name}.toml"))
    stop = {"max_steps": 60, "validate_every": 30, "checkpoint_every": 20, "requests": 300, "epochs": 50.0} | stop
    return replace(shipped, batches=replace(shipped.batches, rows=64), stop=replace(shipped.stop, **stop))


def without_noise(found: TrainConfig) -> TrainConfig:
    """MQSA-TED on requests, without what draws by row: dropout."""
    return replace(found, model=replace(found.model, objective="candidates", dropout=0.0, unknown_rate=0.0))


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with ray_session(2):
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    ("found", "noise"),
    [
        # without dropout and batch statistics two workers compute what one does, to the rounding of sums
        (without_noise(config("mqsa_ted")), 1e-4),
        # DARE's head normalises by the statistics of the share at hand
        (config("dare"), 0.05),
    ],
    ids=["mqsa_ted", "dare"],
)
def test_two_workers_train_what_one_trains(ray, prepared, mlflow_uri, tmp_path, found, noise):
    """The same metrics within noise; then it is finished like any run, and is not taken up again."""
    one = train(found, prepared, tmp_path / "one", mlflow_uri)
    two = train_on_workers(found, prepared, tmp_path / "two", mlflow_uri, 2)
    assert two.summary.steps == one.summary.steps == 60
    for mine, theirs in zip(two.summary.curve, one.summary.curve, strict=True):
        for name in ("valid/gauc", "valid/auc"):
            assert mine[name] == pytest.approx(theirs[name], abs=noise)
    assert abs(two.summary.curve[-1]["valid/gauc"] - 0.5) > 0.02  # there is something to agree on
    logged = tracking_client(mlflow_uri).get_run(two.run_id)
    assert logged.info.status == "FINISHED"
    assert logged.data.metrics["valid/gauc"] == two.summary.curve[-1]["valid/gauc"]
    assert len(tracking_client(mlflow_uri).get_metric_history(two.run_id, "valid/gauc")) == 2
    again = train(found, prepared, tmp_path / "two", mlflow_uri)  # one process takes the same directory up
    assert again.run_id == two.run_id
    for name, tensor in two.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


@pytest.mark.slow
def test_a_run_of_one_process_is_gone_on_with_by_two(ray, prepared, mlflow_uri, tmp_path):
    """Killed after a checkpoint, taken up by a team: it ends where an unbroken run of one process ends."""
    found = without_noise(config("mqsa_ted"))

    def kill(done: int, total: int, words: str) -> None:
        if done == 45:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(found, prepared, tmp_path / "broken", mlflow_uri, kill)
    resumed = train_on_workers(found, prepared, tmp_path / "broken", mlflow_uri, 2)
    whole = train(found, prepared, tmp_path / "whole", mlflow_uri)
    assert resumed.summary.steps == 60
    for mine, theirs in zip(resumed.summary.curve, whole.summary.curve, strict=True):
        assert mine["valid/gauc"] == pytest.approx(theirs["valid/gauc"], abs=1e-4)


def test_what_is_refused(prepared, mlflow_uri, tmp_path):
    for found, workers, words in (
        (config("dare"), 0, "workers is 0"),
        (config("popularity"), 2, "popularity takes no training steps"),
        (config("dare"), 65, "rows = 64 for 65 workers"),
        (replace(config("dare"), device="cuda"), 2, 'device = "cuda"'),
    ):
        with pytest.raises(ConfigError, match=words):
            train_on_workers(found, prepared, tmp_path, mlflow_uri, workers)
