"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from neva_hf import base, embedded

# Workers that each use every core get in each other's way, and small models become many times slower.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))


@pytest.fixture(scope="session")
def embedded_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder of this test run: the same one for all workers, so that the model is built once.

    `NEVA_TEST_CACHE` or `NEVA_CACHE` name one that outlives the run.
    """
    named = os.environ.get("NEVA_TEST_CACHE") or os.environ.get("NEVA_CACHE")
    if named:
        return Path(named)
    # Every worker of pytest-xdist has its own folder inside the one of the run.
    run = tmp_path_factory.getbasetemp()
    return (run.parent if "PYTEST_XDIST_WORKER" in os.environ else run) / "neva-cache"


@pytest.fixture(scope="session")
def embedded_base(embedded_cache: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded default model and its tokenizer, whether or not a Hub answers here.

    All tests of a worker share it: whoever changes the model works on a copy or undoes the change.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEVA_CACHE", str(embedded_cache))
        # A copy from the Hub on a developer's machine must not decide what the tests see.
        patch.setattr(base, "try_to_load_from_cache", lambda *args, **kwargs: None)
        patch.setattr(base, "_hub_answers", lambda token: False)
        pair = base.load_base()
    assert embedded.is_complete(embedded_cache / f"smollm2-135m-instruct-{embedded.WHEEL_VERSION}")
    return pair


@pytest.fixture(autouse=True)
def few_threads_for_tiny_models(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread for tests without the embedded model: threads wait longer for each other than tiny matrices take."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if "embedded_base" in request.fixturenames else 1)
    yield
    torch.set_num_threads(before)
