"""A race on a dask cluster gives the results of this process."""

from __future__ import annotations

import warnings
from pathlib import Path

import joblib
import pytest

from cdat_lab import backends, races
from cdat_lab.races import Job, Race

pytestmark = pytest.mark.filterwarnings("default")  # the cluster's warnings are not ours


def test_a_dask_cluster_gives_the_results_of_this_process(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="dask's scheduler is not installed")
    backend = "numpy" if "numpy" in {b.name for b in backends.available()} else "torch"
    race = Race("deep-linear", "momentum", backend, ("cdat-1.9", "armijo", "greedy"), 8, (0,))
    jobs = [Job.of(key) for key in race.result_keys()]
    alone = races.execute(jobs, tmp_path / "alone", resume=False, processes=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
        with (
            distributed.LocalCluster(**settings) as cluster,
            distributed.Client(cluster),
            joblib.parallel_config("dask"),
        ):
            found = races.execute(jobs, tmp_path / "dask", resume=False, processes=2)
    assert found.keys() == alone.keys()
    for key, result in found.items():
        numbers = ["loss", "learning_rate", "sharpness"]
        assert result.run.frame.select(numbers).equals(alone[key].run.frame.select(numbers))
        assert (tmp_path / "dask" / result.files[0]).is_file()
