"""A real Slurm of two nodes, brought up once a session."""

from collections.abc import Iterator

import pytest
from slurm_cluster import SlurmCluster, slurm_cluster


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    with slurm_cluster(2) as cluster:
        yield cluster
