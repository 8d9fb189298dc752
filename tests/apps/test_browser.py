"""What a reader sees, in a real browser: the explorer in JupyterLab, driven from the keyboard, and the report."""
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

from cft.apps.report import Report
from cft.concepts.filters import demo_concepts
from cft.concepts.masks import build_masks
from cft.data import backdrop
from cft.data.folders import list_folder, scan
from cft.data.models import TINY, base_model
from cft.demo.toy_grounder import toy_grounder
from cft.evaluate.audit import audit
from cft.files import ASSETS

ROOT = Path(__file__).parents[2]
PATIENCE = 120_000  # milliseconds: a busy machine is slow, not wrong
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("browser")]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on loopback in a root of its own, with a notebook that shows an explorer; yields address and token."""
    root = tmp_path_factory.mktemp("lab")
    pictures = backdrop.write(root / "world", {"train": 4}, seed=4) / "images/train"
    for name in set(backdrop.CLASSES) - {"bird", "fish"}:
        shutil.rmtree(pictures / name)
    build_masks(list_folder(pictures), demo_concepts(), toy_grounder(), root / "store", progress=False)
    demo_concepts().save(root / "concepts.json")
    (root / "run").mkdir()
    for seed, file in ((0, "base.safetensors"), (1, "run/model.safetensors")):
        shutil.copy(ASSETS / f"base_{seed}.safetensors", root / file)
    given = {"store": "store", "concepts": "concepts.json", "run": "run"}
    cells = [
        "from cft.apps.explorer import Explorer, Material, first_view",
        f"material = Material.open('world/images/train', '{TINY}', 'base.safetensors', **{given})\n"
        "explorer = Explorer(material, first_view(material, 'bird'), by='Ada')\nexplorer"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, root / "explorer.ipynb")
    shutil.copytree(ROOT / "nbs", root / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copytree(ROOT / "figures", root / "figures")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    home = root / "home"
    settings = home / "settings/@jupyterlab/apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    places = {"IPYTHONDIR": "ipython", "JUPYTERLAB_SETTINGS_DIR": "settings"}
    places |= {f"JUPYTER_{kind}_DIR": kind.lower() for kind in ("CONFIG", "DATA", "RUNTIME")}
    environment = os.environ | {"HOME": str(home), "OMP_NUM_THREADS": "1", "JUPYTER_PREFER_ENV_PATH": "1"}
    environment |= {name: str(home / place) for name, place in places.items()}
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={root}",
        f"--IdentityProvider.token={token}", "--LabApp.expose_app_in_browser=True",
        "--LabApp.extension_manager=readonly", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(root / "server.log", "w") as log:
        server = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api?token={token}", server, root / "server.log")
        yield f"http://127.0.0.1:{port}", token
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def _wait_for(url, server, log):
    deadline = time.time() + PATIENCE / 1000
    while time.time() < deadline:
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                assert "version" in json.load(answer)
                return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"JupyterLab did not answer: {log.read_text()[-2000:]}")


def opened(browser, lab, name):
    """A notebook in JupyterLab, when its first cell is there."""
    address, token = lab
    page = browser.new_page(viewport={"width": 1500, "height": 1500})
    page.set_default_timeout(PATIENCE)
    page.goto(f"{address}/lab/tree/{name}?token={token}&reset", wait_until="domcontentloaded")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    page.wait_for_function("window.jupyterapp !== undefined")
    return page


def test_a_slider_moved_from_the_keyboard_changes_masks_maps_and_numbers(browser, lab, tmp_path):
    page = opened(browser, lab, "explorer.ipynb")
    page.wait_for_function("window.jupyterapp.shell.currentWidget?.sessionContext?.isReady === true")
    page.evaluate("window.jupyterapp.commands.execute('application:toggle-left-area')")
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    pictures = page.locator(".cft-explorer img")
    pictures.nth(2).wait_for()
    assert pictures.count() == 3 and all(pictures.nth(i).get_attribute("alt") for i in range(3))
    explorer = page.locator(".cft-explorer").first
    explorer.screenshot(path=tmp_path / "explorer_before.png")

    # what a screen reader says of them
    for words in ("occurrence ≥", "coverage ≥", "overlay"):
        page.get_by_role("slider", name=words, exact=True).wait_for()
    assert page.get_by_role("slider").count() == 3

    # Tab goes from class to picture to the buttons to the thresholds
    page.locator(".cft-explorer select").first.focus()
    for _ in range(4):
        page.keyboard.press("Tab")
    slider = page.locator(".cft-explorer .widget-slider", has_text="occurrence").locator(".noUi-handle")
    assert slider.evaluate("handle => handle === document.activeElement")

    summary = explorer.locator("p", has_text="pairs of class and concept stay")
    text = summary.inner_text()
    assert "At 15% and 20%" in text
    page.keyboard.press("End")
    page.wait_for_function("document.querySelector('.cft-explorer').innerText.includes('At 100% and 20%')")
    assert summary.inner_text() != text
    page.wait_for_function("document.querySelector('.cft-explorer').innerText.includes('too rare')")
    page.keyboard.press("Home")
    page.wait_for_function("document.querySelector('.cft-explorer').innerText.includes('At 0% and 20%')")
    page.wait_for_function("!document.querySelector('.cft-explorer').innerText.includes('too rare')")

    # concepts are switched off with the space bar: the picture and the number below it change
    source, caption = pictures.first.get_attribute("src"), page.locator(".cft-explorer figcaption").first.inner_text()
    for number, concept in enumerate(("the sky", "clouds"), 1):
        page.get_by_label(concept, exact=True).focus()
        page.keyboard.press("Space")
        words = f"{number} pair{'s are' if number > 1 else ' is'} switched off"
        page.wait_for_function("words => document.querySelector('.cft-explorer').innerText.includes(words)", arg=words)
    page.wait_for_function("source => document.querySelector('.cft-explorer img').src !== source", arg=source)
    assert page.locator(".cft-explorer figcaption").first.inner_text() != caption

    # the overlay's strength changes the maps, and nothing else
    maps = [pictures.nth(i).get_attribute("src") for i in range(3)]
    page.locator(".cft-explorer .widget-slider", has_text="overlay").locator(".noUi-handle").focus()
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    page.wait_for_function("source => document.querySelectorAll('.cft-explorer img')[1].src !== source", arg=maps[1])
    assert pictures.first.get_attribute("src") == maps[0]
    explorer.screenshot(path=tmp_path / "explorer_after.png")

    page.get_by_role("button", name="save as a new version").focus()
    page.keyboard.press("Enter")
    page.locator(".cft-explorer", has_text="saved as concepts.v2.json").first.wait_for()
    assert not page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count()
    page.close()


@pytest.mark.parametrize("name", ["index", "appendix/12_explorer", "paper/table1", "related/05_comparison"])
def test_a_chapter_opens_as_it_was_saved(browser, lab, tmp_path, name):
    page = opened(browser, lab, f"nbs/{name}.ipynb")
    page.locator(".jp-Notebook h1").first.wait_for()
    page.locator(".jp-OutputArea-output").first.wait_for()
    text = page.locator(".jp-Notebook").inner_text()
    assert "Error displaying widget" not in text and "Traceback" not in text and "Javascript Error" not in text
    page.screenshot(path=tmp_path / f"{Path(name).name}.png")
    page.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = backdrop.write(tmp_path_factory.mktemp("report") / "w", {"val": 3}, seed=5)
    folder = scan(root / "images/val", objects=root / "objects/val", classes=list(backdrop.CLASSES))
    before, after = (audit(base_model(seed), folder, progress=False) for seed in (0, 1))
    return Report(before, after, worst=2, random=2).save(root / "report.html")


@pytest.mark.parametrize("width, scheme", [(1100, "light"), (1100, "dark"), (375, "light"), (375, "dark")])
def test_the_report_fits_and_asks_for_nothing(browser, report, tmp_path, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width, "nothing sticks out"
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    style = (ASSETS / "report/report.css").read_text(encoding="utf-8")
    dark = tuple(bytes.fromhex(re.search(r"scheme: dark;.*?--paper: #(\w{6})", style, re.S)[1]))
    assert (colour == f"rgb{dark}") == (scheme == "dark")
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "A"
    page.screenshot(path=tmp_path / f"{width}_{scheme}.png", full_page=True)
    asked = [url for url in asked if not url.startswith(("data:", "file:"))]
    assert not said and not asked, (said, asked)
    page.close()


def test_the_report_prints_with_what_is_folded(browser, report, tmp_path):
    page = browser.new_page()
    page.goto(report.as_uri())
    page.emulate_media(media="print")
    assert page.locator("nav").is_hidden() and page.locator("details.screen").first.is_hidden()
    page.pdf(path=tmp_path / "report.pdf", prefer_css_page_size=True, print_background=True)
    assert (tmp_path / "report.pdf").stat().st_size > 20_000
    page.close()


def test_no_heading_stands_alone_at_the_foot_of_a_page(browser, report):
    """Columns of many heights break where pages would."""
    page = browser.new_page()
    page.goto(report.as_uri())
    page.emulate_media(media="print")
    alone, seen = page.evaluate("""() => {
        const main = document.querySelector('main'), alone = []
        const column = rect => Math.floor((rect.left - main.getBoundingClientRect().left) / 720)
        main.style.cssText = 'width: 700px; column-width: 700px; column-gap: 20px; column-fill: auto'
        let seen = 0
        for (let height = 600; height < 1000; height += 10) {
            main.style.height = `${height}px`
            for (const heading of main.querySelectorAll('h2, h3, caption, thead, summary, .lead')) {
                const next = heading.matches('thead') ? heading.parentElement.rows[1] : heading.nextElementSibling
                const here = [...heading.getClientRects()], there = next.getClientRects()[0]
                if (!here.length || !there) continue
                seen++
                if (column(here[0]) !== column(there)) alone.push(`${height}: ${heading.textContent.slice(0, 60)}`)
            }
        }
        return [alone, seen]
    }""")
    assert seen > 500 and not alone, alone[:5]
    page.close()
