"""MLflow runs: several trainings may begin at once in a new workspace."""

import subprocess
import sys
import time
from pathlib import Path

from pipelines.tracking import default_uri, tracking_client

BEGIN = """
import sys, time
from pipelines.tracking import run
import mlflow.store.tracking.sqlalchemy_store  # what takes long, before the start they share
time.sleep(max(0.0, float(sys.argv[3]) - time.time()))
with run(sys.argv[1], sys.argv[2]) as opened:
    opened.metrics({"auc": 0.5}, step=1)
"""


def test_trainings_that_begin_at_once_in_a_new_workspace_share_its_database(tmp_path: Path) -> None:
    uri, start = default_uri(tmp_path), time.time() + 8
    processes = [
        subprocess.Popen([sys.executable, "-c", BEGIN, uri, f"run {n}", str(start)], stderr=subprocess.PIPE, text=True)
        for n in range(4)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, errors
    client = tracking_client(uri)
    (experiment,) = (found for found in client.search_experiments() if found.name == "recsys")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.run_name for run in runs} == {f"run {n}" for n in range(4)}
    assert all(run.info.status == "FINISHED" for run in runs)
