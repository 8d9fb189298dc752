"""Tests that share what is costly to make stay together, and long ones come first."""
import pytest

LONG = ("test_workflow", "test_notebooks", "test_browser", "test_tutorial", "test_cli")


def pytest_itemcollected(item):
    if item.path.stem != "test_notebooks":
        item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
