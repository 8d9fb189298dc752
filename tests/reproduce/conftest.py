"""A published folder with made-up numbers."""
import pytest
from made_results import write_small


@pytest.fixture
def small(tmp_path):
    return write_small(tmp_path)
