"""The runner as its user calls it: whole, again, after a kill, after a change, and with something broken in it."""
import contextlib
import io
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import papermill
import psutil
import pytest
import torch
from filelock import FileLock

from cft.apps.cli import main
from cft.data.testsets import CARDS
from cft.files import read_json, seconds, write_json
from cft.reproduce import runner
from cft.reproduce.paper import PAPER
from cft.reproduce.progress import failures
from cft.reproduce.publish import notebook_of
from cft.reproduce.runner import (
    OF_RELATED,
    calibrate,
    device_slot,
    jobs_of,
    open_work,
    page_problem,
    page_steps,
    plan_text,
    report,
    reproduce,
    run_job,
)
from cft.reproduce.settings import (
    RELATED,
    Work,
    calibration,
    measured_costs,
    model_file,
    read_settings,
    rows_file,
    write_settings,
)
from cft.reproduce.steps import Notes, Step, in_order, undone
from cft.train import loop

ENV = os.environ | {"OMP_NUM_THREADS": "1"}
CFT = str(Path(sys.executable).with_name("cft"))
KEYS, METHODS = ("fig1", "table2", "table3", "table8"), ("CFT", "RRR", "RRDA")  # a few pages and methods, for all runs


def again(root, profile="smoke", keys=KEYS, **changes):
    """Reproduce, and show neither bars nor lines."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return reproduce(profile, keys, methods=METHODS, out=root, cores=2, progress=False, **changes)


def made(root, since=0):
    """The steps that were made, in order, from some number on."""
    return [json.loads(line)["step"] for line in (root / "done.jsonl").read_text().splitlines()][since:]


def files(root):
    """Everything that steps left, with the time of its last change."""
    places = ("models", "results", "pages", "artefacts", "maps", "worlds", "store", "kept", "guides", "steps")
    found = (path for place in places for path in (root / place).rglob("*"))
    return {path.relative_to(root).as_posix(): path.stat().st_mtime_ns for path in found if path.is_file()}


def numbers(root, tested):
    return pd.concat([pd.read_parquet(root / rows_file(*t)).drop(columns="commit") for t in sorted(tested)])


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """Some artefacts, by the command line."""
    root = tmp_path_factory.mktemp("all") / "smoke"
    command = [CFT, "reproduce", "--profile", "smoke", "--only", ",".join(KEYS), "--methods", ",".join(METHODS)]
    done = subprocess.run([*command, "--out", root], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return SimpleNamespace(root=root, said=done.stdout, work=Work(read_settings("smoke"), KEYS, methods=METHODS))


@pytest.fixture
def copy(smoke, tmp_path):
    """The same, to change it."""
    return Path(shutil.copytree(smoke.root, tmp_path / "smoke"))


@pytest.mark.slow
def test_every_page_is_made_once(smoke):
    assert f"{len(KEYS)} of {len(KEYS)} pages are in {smoke.root / 'pages'}" in smoke.said
    pages = page_steps(smoke.work, smoke.root)
    found = report(smoke.root, smoke.work, pages)
    assert found.ok and found.failures.empty and (found.pages["seconds"] > 0).all()
    for key in KEYS:
        page = nbformat.read(smoke.root / f"pages/{key}.ipynb", 4)
        assert not [o for c in page.cells for o in c.get("outputs", ()) if o.output_type == "error"]
        tables = {p.stem: len(pd.read_csv(p)) for p in (smoke.root / "artefacts" / key).glob("*.csv")}
        assert tables and all(tables.values()), (key, tables)
        html = "".join(p.read_text() for p in (smoke.root / "artefacts" / key).glob("*.html"))
        assert "SMOKE TEST, numbers mean nothing" in html and "DEMO, drawn" not in html
    done = made(smoke.root)
    assert sorted(done) == sorted(step.name for step in in_order(pages)), "each step once"
    assert sum(name.startswith("fine-tune") for name in done) == len(smoke.work.tuned()) == 3
    assert len(numbers(smoke.root, smoke.work.tested())) and not list(smoke.root.rglob("*.tmp"))
    plan = read_json(smoke.root / "plan.json")
    assert set(plan["jobs"]) == {"pages"}, "a single seed is one job"
    assert {path.stem for path in (smoke.root / "jobs").iterdir()} == set(plan["jobs"])
    assert (smoke.root / "settings.yaml").read_text() == write_settings(
        smoke.work.settings, smoke.root.parent / "s.yaml").read_text()


@pytest.mark.slow
def test_papermill_makes_a_page_from_nothing_with_equal_rows(smoke, tmp_path):
    """The other way to the same table: neither finds anything that the other has made."""
    told = {"profile": "smoke", "out": str(tmp_path / "r"), "device": "cpu", "methods": ["CFT"]}
    papermill.execute_notebook(notebook_of("table3"), tmp_path / "table3.ipynb", told, cwd=tmp_path,
                               kernel_name="python3", progress_bar=False)
    said = (tmp_path / "table3.ipynb").read_text()
    assert "1 of 1 pages are in" in said and "steps: 100%" in said
    tested = Work(read_settings("smoke"), ("table3",), methods=("CFT",)).tested()
    pd.testing.assert_frame_equal(numbers(tmp_path / "r", tested), numbers(smoke.root, tested))
    mine, theirs = ({name: (root / f"artefacts/table3/{name}.csv").read_text() for name in ("table", "claims")}
                    for root in (tmp_path / "r", smoke.root))
    assert mine == theirs


@pytest.mark.slow
def test_a_second_run_starts_nothing(smoke, copy):
    for root in (smoke.root, copy):  # also where it was moved to
        before = files(root)
        assert again(root).ok and files(root) == before and made(root) == made(smoke.root)
    assert again(copy, keys=("table3",)).ok and files(copy) == before, "nor does a part of it"


@pytest.fixture(scope="session")
def changed(smoke, tmp_path_factory):
    """A copy in which a checkpoint was deleted, RRR has another rate, RRDA has none; and what came of one more run."""
    root = Path(shutil.copytree(smoke.root, tmp_path_factory.mktemp("changed") / "smoke"))
    rates = {name: rate for name, rate in smoke.work.settings.rates["demo"].items() if name != "rrda"}
    settings = smoke.work.settings.model_copy(update={"rates": {"demo": rates | {"rrr": 1e-4}}})
    (root / model_file("demo", "cft-paper", 0)).unlink()
    before, known = files(root), len(made(root))
    found = again(root, write_settings(settings, root.parent / "mine.yaml"))
    now, done = files(root), made(root, known)
    touched = {name for name in {*before, *now} if before.get(name) != now.get(name)}
    return SimpleNamespace(root=root, found=found, made=done, touched=touched)


@pytest.mark.slow
def test_a_deleted_checkpoint_redoes_only_what_hangs_on_it(smoke, changed):
    name = model_file("demo", "cft-paper", 0)
    assert (changed.root / name).read_bytes() == (smoke.root / name).read_bytes()
    of_cft = [step for step in changed.made if "cft-paper" in step or step in ("page fig1", "page table3")]
    assert of_cft == ["fine-tune demo cft-paper 0"], "it comes out the same, and the rest stays"


@pytest.mark.slow
def test_a_changed_rate_redoes_its_method_and_no_other(changed):
    of_rrr = {f"evaluate demo rrr 0 {name}" for name in ("si_location", "si_rotation", "si_size")}
    own = {"fine-tune demo rrr 0", *of_rrr, "page table8"}  # which shows all settings
    assert {step for step in changed.made if "cft-paper" not in step} == own
    words = ("rrr", "rrda", "table2", "table8", "demo/cft-paper/0", "fine-tune--demo--cft-paper--0")
    assert not [name for name in changed.touched if not any(word in name for word in words)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_failures_do_not_stop_the_rest(smoke, changed, capsys, monkeypatch):
    found, status = changed.found, changed.found.pages.set_index("artefact")["status"]
    assert not found.ok and status.to_dict() == dict.fromkeys(KEYS, "done") | {"table2": "missing"}
    assert found.failures["step"].tolist() == ["fine-tune demo rrda 0"]
    told = ("3 of 4 pages", "no learning rate for rrda on demo; set rates.demo.rrda in the settings", "again: cd ",
            "-m cft.reproduce.runner 'fine-tune demo rrda 0'", "inputs are missing, first: evaluate demo rrda 0")
    for part in told:
        assert part in str(found), str(found)
    assert str(found).splitlines()[-1].strip().startswith("again: ")
    log = (changed.root / found.failures["log"].iloc[0]).read_text()
    assert log.count("Traceback") == 1 and found.failures["tail"].iloc[0][-1] in log
    folder, module, *words = re.fullmatch(r"cd (.*) && python\S* -m (\S+) '(.*)'",
                                          found.failures["command"].iloc[0]).groups()
    monkeypatch.setattr(sys, "argv", ["alone", *words])
    monkeypatch.delenv("CFT_RUNNER")
    with monkeypatch.context() as there, pytest.raises(SystemExit) as end:
        there.chdir(folder)
        runpy.run_module(module, run_name="__main__")
    assert end.value.code == 1 and "no learning rate" in capsys.readouterr().err
    # with the rates as they were, the next run makes what is missing, with the same numbers
    assert again(changed.root, keys=("table2",)).ok and not list((changed.root / "failed").glob("*"))
    tested = smoke.work.tested()
    pd.testing.assert_frame_equal(numbers(changed.root, tested), numbers(smoke.root, tested))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def works_in(root):
    """The processes whose working directory is this folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            found += [int(place.parent.name)] if place.resolve() == root and alive(place.parent.name) else []
    return found


def wait_for(condition, seconds=120):
    """What the condition gives once it gives something."""
    until = time.time() + seconds
    while time.time() < until:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"waited for {seconds} seconds")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds processes by /proc")
def test_a_killed_run_completes_with_the_same_numbers(smoke, copy):
    for name in ("models", "results"):
        shutil.rmtree(copy / name)
    known = len(made(copy))
    command = [CFT, "reproduce", "--profile", "smoke", "--only", ",".join(KEYS), "--methods", ",".join(METHODS)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": ENV}
    runner = subprocess.Popen([*command, "--out", copy], **quiet)
    try:
        wait_for(lambda: runner.poll() is not None or len(made(copy)) > known)
        assert runner.poll() is None and works_in(copy)
        with pytest.raises(ValueError, match="another `cft reproduce` works in"):
            again(copy, epochs=7)
    finally:
        runner.send_signal(signal.SIGKILL)
        runner.wait()
    wait_for(lambda: not works_in(copy), 60)  # the children notice
    assert "epochs: 1\n" in (copy / "settings.yaml").read_text()
    done = made(copy, known)
    assert again(copy).ok
    whole = made(copy, known)
    assert len(set(whole)) == len(whole) > len(done) > 0, "what was done is not done again"
    tested = {"evaluate " + " ".join(map(str, t)) for t in smoke.work.tested()}
    tuned = {"fine-tune " + " ".join(map(str, t)) for t in smoke.work.tuned()}
    named = {name for name in whole if not name.startswith("page ")}
    assert named <= tested | tuned, "the weights came out the same"
    assert len((tested | tuned) - named) <= 1  # a kill may fall between a step's note and its line in done.jsonl
    pd.testing.assert_frame_equal(numbers(copy, smoke.work.tested()), numbers(smoke.root, smoke.work.tested()))
    same = [path.relative_to(smoke.root) for path in smoke.root.glob("models/*/*/*/model.safetensors")]
    assert len(same) == 3 and all((copy / name).read_bytes() == (smoke.root / name).read_bytes() for name in same)


# ---- the parts ----


def test_the_steps_of_pages(tmp_path):
    work = Work(read_settings("smoke"), ("table2", "table8"), methods=("RRR",))
    table2, table8 = page_steps(work, tmp_path)
    names = [step.name for step in in_order([table2, table8])]
    assert sorted(name for name in names if name.startswith("fine-tune")) == ["fine-tune demo rrr 0"]
    assert {name for name in names if name.startswith("page")} == {"page table2", "page table8"} and not table8.needs
    assert (table2.folder, table2.writes) == ("artefacts/table2", ("pages/table2.ipynb",))
    assert table2.depends["methods"] == ["RRR"]
    other = lambda **changes: page_steps(Work(read_settings("smoke", **changes), ("table2", "table8")), tmp_path)
    pages = other(), other(epochs=9), other(stamp="X")
    assert [page.depends == pages[0][0].depends for page, _ in pages] == [True, True, False]
    assert [page.depends == pages[0][1].depends for _, page in pages] == [True, False, False]
    assert set(OF_RELATED) == set(RELATED)


def planned(*told):
    """Steps by name, job, part and what they need."""
    known = {}
    for name, job, part, *needs in told:
        known[name] = Step("s", (name,), (name,), print, needs=tuple(known[n] for n in needs), job=job, part=part,
                           gpu=part == "gpu")
    return list(known.values())


def test_jobs():
    steps = planned(("w", "masks", ""), ("a", "tune", "A", "w"), ("b", "tune", "B", "w"), ("c", "tune", "C", "w"),
                    ("ta", "tune", "A", "a"), ("tc", "tune", "C", "c"), ("g", "maps", "gpu", "ta"))
    jobs = jobs_of(steps, 3)
    assert {name: job.steps for name, job in jobs.items()} == {
        "tune": ("s w", "s a", "s b", "s c", "s ta", "s tc"), "maps": ("s g",)}
    assert {name: job.after for name, job in jobs.items()} == {"tune": (), "maps": ("tune",)}
    assert [job.gpu for job in jobs.values()] == [False, True], "what needs a GPU is a job of its own"
    split = jobs_of(steps, 2)
    assert {name: job.steps for name, job in split.items()} == {
        "masks": ("s w",), "tune-0": ("s a", "s b", "s ta"), "tune-1": ("s c", "s tc"), "maps": ("s g",)}
    assert split["maps"].after == ("tune-0",) and split["tune-1"].after == ("masks",), "two wait for one"
    alone = jobs_of(steps, 1)
    assert set(alone) == {"masks", "tune-0", "tune-1", "tune-2", "maps"}
    line = planned(("a", "tune", "A"), ("b", "test", "B", "a"), ("c", "page", "", "b", "a"))
    assert [jobs_of(line, n)[name].steps for n, name in ((2, "page"), (1, "tune"), (1, "page"))] == [
        ("s a", "s b", "s c"), ("s a",), ("s b", "s c")], "no more parts than go together"
    assert jobs_of(steps[4:], 3)["tune"].after == (), "only what is not done gets into a job, or is waited for"
    assert jobs_of([], 3) == {}


@pytest.mark.parametrize("profile, keys", [("smoke", ()), ("demo", ("table1", "demo")), ("paper", ())])
def test_jobs_hold_every_step_once_and_wait_for_no_circle(tmp_path, profile, keys):
    work = Work(read_settings(profile, seeds=2), *([keys] if keys else []), models=("ViT-B",))
    steps = undone(page_steps(work, tmp_path), Notes(tmp_path))
    jobs = jobs_of(steps, work.settings.together)
    held = [name for job in jobs.values() for name in job.steps]
    assert sorted(held) == sorted(step.name for step in steps) and len(set(held)) == len(held)
    place, ended = {name: job for job, of in jobs.items() for name in of.steps}, set()
    for step in steps:
        assert {place[need.name] for need in step.needs} <= {*jobs[place[step.name]].after, place[step.name]}
    while ready := [name for name, job in jobs.items() if name not in ended and set(job.after) <= ended]:
        ended |= set(ready)
    assert ended == set(jobs)
    assert max(len({step.part for step in steps if place[step.name] == job}) for job in jobs) <= work.settings.together


def test_one_job(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("CFT_RUNNER", raising=False)
    write_settings(read_settings("smoke"), tmp_path / "settings.yaml")
    plan = {"keys": ["table3"], "models": [], "methods": [], "jobs": {"first": {"steps": ["concepts"]}}}
    write_json(tmp_path / "plan.json", plan)
    assert run_job(["first"], tmp_path) and (tmp_path / "concepts.json").is_file()
    assert read_json(tmp_path / "jobs/first.json") == {"done": True} and run_job(["concepts"], tmp_path)
    with pytest.raises(ValueError, match="no job or step 'dance' in"):
        run_job(["first", "dance"], tmp_path)
    assert not run_job(["guide 0 kept"], tmp_path), "what it needs is not there, and it does not make it"
    write_json(tmp_path / "plan.json", plan | {"jobs": {"second": {"steps": ["guide 0 kept"]}}})
    assert run_job(["second"], tmp_path), "a job goes well even so: what does not need its steps goes on"
    assert read_json(tmp_path / "jobs/second.json") == {"done": False} and made(tmp_path) == ["concepts"]


def hold(root, log):
    """Hold a slot for a moment and say which device was seen."""
    os.environ["CFT_GPUS"] = "2"
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    with device_slot(root, "cuda"):
        began = time.time()
        time.sleep(0.4)
        log.put((os.environ["CUDA_VISIBLE_DEVICES"], began, time.time()))


def test_no_two_jobs_see_the_same_gpu(tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    log = context.Queue()
    workers = [context.Process(target=hold, args=(tmp_path, log)) for _ in range(4)]
    for worker in workers:
        worker.start()
    seen = [log.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert {device for device, _, _ in seen} == {"0", "1"}
    for device in ("0", "1"):
        spans = sorted((began, ended) for name, began, ended in seen if name == device)
        assert all(ended <= began for (_, ended), (began, _) in zip(spans, spans[1:]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7,9")  # of which two are ours
    monkeypatch.setenv("CFT_GPUS", "2")
    with device_slot(tmp_path, "cpu"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,7,9"
    with FileLock(tmp_path / "gpu-0.lock"), device_slot(tmp_path, "cuda:0"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    monkeypatch.setenv("CFT_GPUS", "1")
    with device_slot(tmp_path / "none", "cuda"):
        assert not (tmp_path / "none").exists()


def test_one_folder_one_reproduction(tmp_path):
    """Who comes second changes nothing, the settings of the first included."""
    root, _ = open_work("smoke", ("table3",), out=tmp_path / "r")
    with FileLock(root / "lock"), pytest.raises(ValueError, match="another `cft reproduce` works in .*/r; wait for it"):
        again(root, keys=("table3",), epochs=9)
    assert [path.name for path in root.iterdir()] == ["lock"]


def test_a_page_is_done_by_what_it_holds(tmp_path):
    error = nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])
    code = nbformat.v4.new_code_cell("1 / 0", outputs=[error])
    problem = lambda: page_problem(tmp_path, "table1")
    assert problem() == "pages/table1.ipynb is not there"
    for folder in ("pages", "artefacts/table1"):
        (tmp_path / folder).mkdir(parents=True)
    page = tmp_path / "pages/table1.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[code]), page)
    assert problem() == "pages/table1.ipynb holds an error"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]), page)
    assert problem() == "artefacts/table1 has no table"
    (tmp_path / "artefacts/table1/table.csv").write_text("a,b\n")
    assert problem() == "artefacts/table1 has an empty table"
    (tmp_path / "artefacts/table1/table.csv").write_text("a,b\n1,2\n")
    assert problem() == ""


def test_the_plan_of_the_paper(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text, work = plan_text("paper", out=tmp_path / "p"), Work(read_settings("paper"))
    lines = {line.split()[0]: line.split() for line in text.splitlines()}
    counts = work.counts()
    assert lines["together"][1:3] == [str(counts["fine-tunes"]), str(counts["evaluations"])]
    for key in work.keys:
        assert [int(lines[key][k]) for k in (1, 3)] == [len(work.tuned(key)), len(work.tested(key))]
    assert sum(int(lines[key][2]) for key in work.keys) == counts["fine-tunes"], "new: each is counted once"
    assert sum(int(lines[key][4]) for key in work.keys) == counts["evaluations"]
    assert "to be filled in: train, answers, grounder_weights, sets.in-v" in text
    assert "cost: not known" in text and text.endswith("cft reproduce --calibrate"), "nothing was measured"
    assert not (tmp_path / "p").exists(), "a plan changes nothing"
    for profile in ("demo", "smoke", "cue", "closed", "photographs"):
        keys = (profile,) if profile in ("cue", "closed", "photographs") else ("table3",)
        text = plan_text(profile, keys, out=tmp_path / "p")
        assert "cost: not known, for" in text and "`cft status`" in text and not re.search("minute|hour", text)
    assert "cost: not known, for" in plan_text("paper", ("table8",), out=tmp_path / "p"), "which trains nothing"


def test_a_plan_in_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for device in ("A GPU", "CPU, 1 thread(s)"):
        more = {"step": 0.36, "picture": 0.001, "masks": 1.2, "memory": 11.5, "host": 20.5, "weights": 0.35}
        rows = [f"{m},{device.split(',')[0]},{k},{v}\n" for m in PAPER.models.values() for k, v in more.items()]
        calibration(device).parent.mkdir(exist_ok=True)
        calibration(device).write_text("model,device,what,value\n" + "".join(rows))
    text = plan_text("paper", ("table3",), 4, out=tmp_path / "p")
    tuned, masks = 20 * 9400 * 0.36 / 3600, 1000 * 30 * 1.2 / 3600
    tested = 24 * CARDS["in-segmentation"].pictures * 0.001 / 3600
    assert f"measured on A GPU: {tuned:,.0f} hours of fine-tuning" in text and f"{masks:,.0f} of building masks" in text
    assert f"{(tuned + masks + tested) / 4:,.0f} hours on 4 such" in text and "takes 11.5 GB" in text
    assert "measured on CPU" in plan_text("paper", ("table3",), out=tmp_path / "p", device="cpu")
    root, work = open_work("paper", ("table3",), out=tmp_path / "p")
    steps = undone(page_steps(work, root), Notes(root))
    runner._write_plan(root, work, jobs := jobs_of(steps, 1), steps)
    minutes = read_json(root / "plan.json")["minutes"]
    one = next(name for name, job in jobs.items() if any(step.startswith("fine-tune") for step in job.steps))
    assert read_json(root / "plan.json")["memory"] == 30750, "MB, half more than a process took"
    assert minutes[one] == 10 + int((9400 * 0.36 + CARDS["in-segmentation"].pictures * 0.001) / 30)


def test_calibration(tmp_path, monkeypatch):
    """A small network of timm stands for the paper's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name = {"names.vit_base_patch16_224": "test_vit", "device": "cpu", "batch": 2}
    mine = calibration(f"CPU, {torch.get_num_threads()} thread(s)")
    mine.parent.mkdir()
    timed = []
    for module in (runner, loop):
        monkeypatch.setattr(module, "seconds", lambda step: timed.append(1) or seconds(step))
    before = "".join(f"{m},CPU,{what},9\n" for m in ("vit_base_patch16_224", "other") for what in ("step", "picture"))
    mine.write_text("model,device,what,value\n" + before)
    assert (file := calibrate("paper", models=("ViT-B",), **name)) == mine
    cost = (costs := measured_costs(file))["vit_base_patch16_224"]
    assert costs["other"].step == 9 != cost.step, "what is measured again takes the place of what was"
    assert file.parent == tmp_path / "cft" and cost.device.startswith("CPU") and cost.memory > 0
    assert min(cost.step, cost.picture, cost.steps["rrda"]) > 0 and 0 < cost.weights < 0.01 and cost.masks == 0
    assert cost.host >= cost.memory and len(timed) == 7 + 1, "seven recipes and a test, each from idle to idle"


def test_fewer_seeds(tmp_path):
    root, work = open_work("demo", ("table1",), seeds=2, out=tmp_path / "x", epochs=3)
    assert (work.settings.seeds, work.settings.ablation_seeds, work.settings.epochs) == (2, 2, 3) and not root.exists()
    root, work = open_work("demo", seeds=9)
    assert work.settings == read_settings("demo") and root == Path("runs/demo").resolve()


@pytest.mark.parametrize("arguments, error, message", [
    ({"only": ("table10",)}, ValueError, "unknown artefacts: table10; expected some of"),
    ({"methods": ("SGD",)}, ValueError, "unknown methods: SGD"),
    ({"models": ("ViT-L",)}, ValueError, "unknown models: ViT-L"), ({"epochs": 0}, ValueError, "smoke.yaml: epochs: "),
    ({"profile": "quick"}, ValueError, "profile must be one of closed, cue, demo, paper, photographs, smoke"),
    ({"executor": "abacus"}, ImportError, "pip install snakemake-executor-plugin-abacus")])
def test_bad_input(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        reproduce(**({"profile": "smoke", "out": tmp_path / "x"} | arguments))
    assert not (tmp_path / "x").exists()


def test_bad_input_on_the_command_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["reproduce", "--profile", "smoke", "--only", "table10", "--out", str(tmp_path / "x")])
    said = capsys.readouterr()
    assert end.value.code == 2 and not said.out and not (tmp_path / "x").exists()
    assert said.err.startswith("cft: unknown artefacts: table10; expected some of fig1, ")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("where", ["plain", "runs {x} [1]"])
def test_snakemake_runs_what_we_mean(tmp_path, monkeypatch, where):
    """Not what a profile of the cluster or of another project says; and a job asks for memory."""
    for place in ("mine", "profiles/default"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.yaml").write_text("dry-run: true\n")
    monkeypatch.setenv("SNAKEMAKE_PROFILE", str(tmp_path / "mine"))
    monkeypatch.setenv("HOME", "/proc/nobody")  # which nobody can write to
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.chdir(tmp_path)
    root, work = open_work("smoke", ("table8",), out=tmp_path / where)
    runner._write_plan(root, work, {"a": runner.Job((), (), False)})
    plan = read_json(root / "plan.json")
    assert plan["memory"] == 4000
    write_json(root / "plan.json", plan | {"command": "touch jobs/a.json; true"})
    words = "--cores 1 --resources gpu=1 --quiet all".split()
    runner._snakemake(root, words, True)
    assert (root / "jobs/a.json").exists()
    with pytest.raises(ValueError, match="Snakemake takes other options: .*unrecognized arguments: --frobnicate"):
        runner._snakemake(root, [*words, "--frobnicate"], True)


def on_jobs(root, command, *names):
    """A plan of jobs that call a command with their name."""
    root, work = open_work("smoke", ("table8",), out=root)
    runner._write_plan(root, work, {name: runner.Job((), (), False) for name in names})
    write_json(root / "plan.json", read_json(root / "plan.json") | {"command": command})
    return root


def test_what_snakemake_says_of_errors_is_kept(tmp_path):
    root = on_jobs(tmp_path / "r", "echo out of luck; false", "a")
    runner._snakemake(root, "--cores 1 --quiet all".split(), True)
    (note,) = failures(root)
    assert (note["step"], note["error"], note["log"]) == ("job a", runner.DIED, "logs/a.log")
    lost = {"b": {"after": ["c"], "gpu": False, "steps": []}}
    write_json(root / "plan.json", read_json(root / "plan.json") | {"jobs": lost})
    (root / "failed/job--a.json").unlink()
    runner._snakemake(root, "--cores 1 --quiet all".split(), True)
    (note,) = failures(root)
    assert note["step"] == "Snakemake" and "KeyError: 'c'" in note["error"], "before its first job"
    found = report(root, Work(read_settings("smoke"), ("table8",)), [])
    assert found.failures["step"].tolist() == ["Snakemake"]


def test_an_interruption_ends_the_jobs_at_once(tmp_path):
    root = on_jobs(tmp_path / "r", f"{sys.executable} -c 'import time; time.sleep(300)' cft.reproduce.runner", "a")
    sleeps = lambda: [p for p in psutil.Process().children(recursive=True) if "time.sleep(300)" in str(p.cmdline())]

    def interrupt():
        wait_for(lambda: len(sleeps()) > 1)  # the shell and Python
        os.kill(os.getpid(), signal.SIGINT)

    since, before = time.time(), [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        runner._snakemake(root, "--cores 1 --quiet all".split(), True)
    assert time.time() - since < 100 and not sleeps()
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_only_what_failed_is_tried_again(tmp_path):
    alone = [(name, job, "") for name, job in zip("abc", ("one", "two", "three"))]
    steps = planned(*alone, ("d", "four", "", "a"), ("e", "four", "", "c"))
    jobs = {name: {"steps": [s.name for s in steps if s.job == name]} for name in ("one", "two", "three", "four")}
    assert runner._failed(tmp_path, steps) == []
    write_json(tmp_path / "plan.json", {"jobs": jobs})
    for name in ("one", "two"):
        write_json(tmp_path / f"jobs/{name}.json", {"done": name == "two"})
    write_json(tmp_path / "failed/a.json", {"step": "s a"})
    assert [s.name for s in runner._failed(tmp_path, steps)] == ["s a", "s d"], "and what rests on it"
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/three.log").touch()  # of a job that died
    assert [s.name for s in runner._failed(tmp_path, steps)] == ["s a", "s c", "s d", "s e"]


def test_damaged_files_of_the_runner_are_named(tmp_path):
    root, work = open_work("smoke", ("table8",), out=tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ValueError, match="plan.json is no sound JSON"):
        report(root, work, page_steps(work, root))
    for folder in ("pages", "artefacts/table8"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "pages/table8.ipynb").write_text("{")
    assert page_problem(root, "table8") == "pages/table8.ipynb or a table in artefacts/table8 is damaged"


def test_a_device_that_is_not_here_is_told_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="no device 'banana' here"):
        reproduce("smoke", ("table8",), out=tmp_path / "r", device="banana")
    assert not (tmp_path / "r").exists()
