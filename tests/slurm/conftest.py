"""One Slurm for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing_programs, start, stop
from tests.slurm.site import Site


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(f"needs Debian's packages slurm-wlm and munge (make install-slurm): no {', '.join(missing)}")
    running = start(tmp_path_factory.mktemp("slurm") / "cluster")
    yield running
    stop(running)


@pytest.fixture(scope="session")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(cluster, tmp_path_factory.mktemp("site"))


@pytest.fixture(autouse=True)
def no_job_outlives_its_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that fails leaves its jobs; they would train for hours beside the other tests."""
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").cancel_all()
