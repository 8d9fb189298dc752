"""A real browser, where there is one."""
import shutil

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
UNUSED = ("gpu", "quic", "background-networking", "component-update", "sync", "dev-shm-usage")
ARGUMENTS = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{what}" for what in UNUSED)]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        running = play.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield running
        running.close()
