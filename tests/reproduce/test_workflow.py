"""The workflow as its user runs it: whole, again, after a kill, after a change, and with something broken in it."""
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from cft.reproduce.paper import ARTEFACTS, PAPER
from cft.reproduce.settings import Work, model_file, read_settings, rows_file, write_settings
from cft.reproduce.workflow import Graph, only_one, plain_command, plan_text, report, reproduce, warm_workers

ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def quietly(*arguments, **options):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return reproduce(*arguments, **options)


def files(root):
    """Everything that jobs made, with the time of its last change."""
    kept = ("models", "results", "pages", "maps", "worlds", "store", "kept", "guides")
    return {p.relative_to(root).as_posix(): p.stat().st_mtime_ns for k in kept for p in (root / k).rglob("*") if p.is_file()}


def jobs_done(root):
    return [json.loads(line)["job"] for line in (root / "jobs.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Every artefact, by the command line."""
    root = tmp_path_factory.mktemp("all") / "smoke"
    done = subprocess.run([Path(sys.executable).with_name("cft"), "reproduce", "--profile", "smoke", "--out", root],
                          capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root, done.stdout


def test_every_page_is_made(smoke):
    root, told = smoke
    assert f"{len(ARTEFACTS)} of {len(ARTEFACTS)} pages are in" in told
    work = Work(read_settings("smoke"))
    found = report(root, work)
    assert found.ok and found.failures.empty and (found.pages["seconds"] > 0).all()
    for a in ARTEFACTS:
        page = nbformat.read(root / f"pages/{a.key}.ipynb", 4)
        assert not [o for c in page.cells for o in c.get("outputs", ()) if o.output_type == "error"]
        tables = {p.stem: len(pd.read_csv(p)) for p in (root / "artefacts" / a.key).glob("*.csv")}
        assert tables and all(tables.values()), (a.key, tables)
        html = "".join(p.read_text() for p in (root / "artefacts" / a.key).glob("*.html"))
        assert "SMOKE TEST, numbers mean nothing" in html and "DEMO, drawn" not in html
    assert len([j for j in jobs_done(root) if j.startswith("tune")]) == len(work.tuned())
    assert not list(root.rglob("*.tmp"))


def test_a_second_run_starts_no_job(smoke):
    root, _ = smoke
    before, done = files(root), len(jobs_done(root))
    assert quietly("smoke", out=root).ok
    assert files(root) == before and len(jobs_done(root)) == done


def test_a_deleted_checkpoint_redoes_only_what_depends_on_it(smoke):
    root, _ = smoke
    before = files(root)
    gone = root / model_file("demo", "cft-paper.no-concept", 0)
    bytes_before = gone.read_bytes()
    gone.unlink()
    assert quietly("smoke", out=root).ok
    after = files(root)
    changed = {name for name in after if after[name] != before.get(name)}
    assert gone.read_bytes() == bytes_before and changed
    assert all("cft-paper.no-concept" in name or name == "pages/table6.ipynb" for name in changed), changed


def test_a_changed_rate_redoes_its_method_and_no_other(smoke, tmp_path):
    root, _ = smoke
    settings = read_settings("smoke")
    rates = {"demo": dict(settings.rates["demo"]) | {"rrr": 1e-4}}
    mine = write_settings(settings.model_copy(update={"rates": rates}), tmp_path / "mine.yaml")
    before = files(root)
    assert quietly(mine, out=root).ok
    changed = {name for name, when in files(root).items() if when != before.get(name)}
    others = {name for name in changed if not ("demo.rrr." in name or "demo/rrr" in name or name.startswith("pages/"))}
    assert not others and rows_file("demo", "rrr", 0, "adversarial") in changed
    pages = {name for name in changed if name.startswith("pages/")}
    assert pages == {f"pages/{key}.ipynb" for key in ("table1", "table2", "ledger", "table8")}


def test_failures_do_not_stop_the_rest(tmp_path):
    settings = read_settings("smoke")
    rates = {"demo": {name: rate for name, rate in settings.rates["demo"].items() if name != "rrr"}}  # no rate: its job fails
    mine = write_settings(settings.model_copy(update={"rates": rates, "our_form": False}), tmp_path / "mine.yaml")
    root = tmp_path / "run"
    found = quietly(mine, ("table2", "table9"), methods=("RRR", "CFT"), out=root, cores=2)
    status = found.pages.set_index("artefact")["status"]
    assert not found.ok and status["table9"] == "done" and status["table2"] != "done"
    assert found.failures["job"].tolist() == ["tune model=demo method=rrr seed=0"]
    text = str(found)
    for part in ("1 of 2 pages", "no learning rate for rrr on demo; set rates.demo.rrr", "log: logs/tune--model=demo--method=rrr--seed=0.log",
                 "again: cd ", "-m cft.reproduce.jobs tune model=demo method=rrr seed=0", "inputs are missing, first results/rows/"):
        assert part in text, text
    command = found.failures["command"].iloc[0].replace("python", sys.executable, 1)
    again = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=ENV)
    assert again.returncode == 1 and "no learning rate" in again.stderr
    assert (root / found.failures["log"].iloc[0]).read_text().count("Traceback") == 1


def test_a_killed_run_completes_with_the_same_numbers(smoke, tmp_path):
    whole, _ = smoke
    root = tmp_path / "killed"
    command = [Path(sys.executable).with_name("cft"), "reproduce", "--profile", "smoke", "--only", "table7", "--out", root]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV)
    until = time.time() + 240
    while time.time() < until and not list((root / "results/rows").glob("*.parquet")):
        assert started.poll() is None
        time.sleep(0.2)
    started.send_signal(signal.SIGKILL)
    started.wait()
    time.sleep(1.5)  # the children notice
    left = files(root)
    time.sleep(1.5)
    assert files(root) == left and not (root / "pages/table7.ipynb").exists()  # nobody works on
    assert quietly("smoke", ("table7",), out=root, cores=2).ok
    work = Work(read_settings("smoke"), ("table7",))
    for t in work.tested():
        a, b = (pd.read_parquet(r / rows_file(*t)).drop(columns=["commit"]) for r in (root, whole))
        pd.testing.assert_frame_equal(a, b)


# ---- the parts ----


def test_one_folder_one_reproduction(tmp_path):
    with only_one(tmp_path / "r"), pytest.raises(ValueError, match="another `cft reproduce` works in"), only_one(tmp_path / "r"):
        pass
    with only_one(tmp_path / "r"):
        pass


def test_plain_commands(tmp_path):
    write_settings(read_settings("smoke"), tmp_path / "settings.yaml")
    done = subprocess.run(f"{plain_command()} job.log concepts", shell=True, cwd=tmp_path, env=ENV)
    assert done.returncode == 0 and (tmp_path / "concepts.json").exists()
    done = subprocess.run(f"{plain_command()} job.log dance", shell=True, cwd=tmp_path, env=ENV)
    assert done.returncode == 1 and "no job 'dance'" in (tmp_path / "job.log").read_text()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=60):
    """What the condition gives once it gives something."""
    until = time.time() + seconds
    while time.time() < until:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"waited for {seconds} seconds")


def children(pid):
    return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and (p / "stat").exists()
            and (p / "stat").read_text().rsplit(")", 1)[1].split()[1] == str(pid)]


def test_warm_workers(tmp_path):
    write_settings(read_settings("demo"), tmp_path / "settings.yaml")  # its world takes seconds to draw: time to kill it
    with warm_workers(tmp_path) as command:
        assert subprocess.run(f"{command} job.log concepts", shell=True, cwd=tmp_path).returncode == 0 and (tmp_path / "concepts.json").exists()
        assert subprocess.run(f"{command} job.log dance", shell=True, cwd=tmp_path).returncode == 1 and "no job 'dance'" in (tmp_path / "job.log").read_text()
        server = next(p for p in children(os.getpid()) if b"cft.reproduce.workflow" in Path(f"/proc/{p}/cmdline").read_bytes())
        # a client that is killed takes its job with it
        client = subprocess.Popen(f"exec {command} world.log world seed=0", shell=True, cwd=tmp_path)
        job = wait_for(lambda: children(server))[0]
        client.kill()
        wait_for(lambda: not alive(job))
        assert not (tmp_path / "worlds/0.json").exists()
        # a server that ends takes its jobs with it
        client = subprocess.Popen(f"exec {command} world.log world seed=1", shell=True, cwd=tmp_path, stderr=subprocess.DEVNULL)
        job = wait_for(lambda: children(server))[0]
    wait_for(lambda: not alive(job))
    assert client.wait(timeout=20) != 0 and not alive(server) and not (tmp_path / "worlds/1.json").exists()


def test_the_graph_of_the_paper():
    graph = Graph(Work(read_settings("paper")))
    assert graph.to_test("vit_base_patch16_224", "original", 0) == [] and len(graph.shards("all")) == 64
    assert graph.to_tune("cft-paper.class", 2) == ["guides/2/class.json", "guides/2/kept.json"]
    assert "kept/all/kept.json" in graph.to_tune("cft-official", 0) and "kept/all/kept.json" in graph.to_tune("cft-paper.best", 0)
    assert {"kept/all/strict.json", "kept/all/loose.json", "kept/all/kept.json"} <= set(graph.to_page("thresholds"))
    assert sum(len(graph.to_page(a.key)) for a in ARTEFACTS) > len(graph.work.tested())


def test_the_plan_of_the_paper(tmp_path):
    text = plan_text("paper", out=tmp_path / "p")
    work = Work(read_settings("paper"))
    assert f"{work.counts()['fine-tunes']:10}" in text.splitlines()[-4] and str(work.counts()["evaluations"]) in text
    assert "to be filled in: train, answers, grounder_weights, sets.in-v" in text and "hours of fine-tuning" in text and "cft reproduce --rehearse" in text
    (tmp_path / "p/costs.csv").write_text("model,device,what,seconds\n" + "".join(f"{m},a GPU,step,0.36\n{m},a GPU,picture,0.001\n" for m in PAPER.models.values()))
    text = plan_text("paper", ("table3",), out=tmp_path / "p")
    assert f"measured on a GPU: {20 * 9400 * 0.36 / 3600:,.0f} hours of fine-tuning" in text and "rehearse" not in text


@pytest.mark.parametrize("arguments, error, message", [
    ({"only": ("table10",)}, ValueError, "no artefact 'table10'"), ({"methods": ("SGD",)}, ValueError, "unknown methods: SGD"),
    ({"executor": "abacus"}, ImportError, "pip install snakemake-executor-plugin-abacus")])
def test_bad_input(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        reproduce("smoke", out=tmp_path / "x", **arguments)
