"""The book as static pages, in small; in a real browser without an error, light and dark, wide and narrow."""
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("README.md,figures/README.md,nbs/index.ipynb,nbs/14_losses.ipynb,nbs/paper/table1.ipynb,"
         "build/reference/cft.evaluate.intervals.rst")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    words = ["-q", "-b", "html", "-c", ROOT / "nbs/site", "-d", out / "trees", "-D", f"include_patterns={PAGES}"]
    done = subprocess.run([sys.executable, "-m", "sphinx", *words, ROOT, out / "html"], capture_output=True, text=True)
    missing = [line for line in done.stderr.splitlines() if "ERROR" in line or "docstring" in line]
    assert done.returncode == 0 and not missing, missing or done.stderr[-2000:]
    return out / "html"


@pytest.fixture(scope="module")
def address(site):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, args=(0.02, ), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_pages_have_pictures_formulas_and_docstrings(site):
    first = (site / "README.html").read_text(encoding="utf-8")
    assert 'href="nbs/index.html"' in first and 'href="figures/README.html' in first
    for page in site.rglob("*.html"):
        for image in re.findall(r'<img[^>]*src="([^":]+)"', page.read_text(encoding="utf-8")):
            assert (page.parent / image).is_file(), (page, image)
    chapter = (site / "nbs/14_losses.html").read_text(encoding="utf-8")
    assert "Show the code" in chapter  # long cells are folded
    assert chapter.count("<math") >= 5 and not [word for word in ("MathJax.js", "cdn", "merror") if word in chapter]
    told = (site / "build/reference/cft.evaluate.intervals.html").read_text(encoding="utf-8")
    assert "table_of_means" in told and '<code class="docutils literal' in told and "system-message" not in told


@pytest.mark.parametrize("scheme, width", [("light", 1280), ("dark", 390)])
def test_in_a_browser(address, browser, scheme, width):
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
    said, asked = [], []
    page.on("console", lambda told: said.append((told.text, told.location)) if told.type == "error" else None)
    page.route("**/favicon.ico", lambda route: route.fulfill(status=204))  # a browser asks every server for one
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    shades = set()
    for name in ("README", "nbs/14_losses", "nbs/paper/table1", "figures/README"):
        page.goto(f"{address}/{name}.html")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        shades.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    page.goto(f"{address}/search.html?q=alignment")
    page.wait_for_selector("#search-results li", timeout=60_000)
    assert said == [] and [url for url in asked if not url.startswith((address, "data:"))] == []
    light = [sum(map(int, re.findall(r"\d+", shade)[:3])) > 380 for shade in shades]
    assert set(light) == {scheme == "light"}
    page.close()
