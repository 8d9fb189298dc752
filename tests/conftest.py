"""Long files come first; with `--dist loadfile` the tests of a file share what is costly to make. One thread each."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of children too: threads that wait for each other's core wait actively

import pytest  # noqa: E402
import torch  # noqa: E402

LONG = ("test_runner", "test_notebooks", "test_browser", "test_tutorial", "test_cli", "test_house", "test_readme",
        "test_torture", "test_loop")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(autouse=True)
def _one_thread():
    """Commands set the number of threads, and sums are rounded by it."""
    torch.set_num_threads(1)


@pytest.fixture
def no_proxy(monkeypatch):
    """Nothing between a client and a server on this machine, and no other server in its place."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
