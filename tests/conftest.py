"""Long files come first; with `--dist loadfile` the tests of a file share what is costly to make."""
LONG = ("test_workflow", "test_notebooks", "test_browser", "test_tutorial", "test_cli")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
