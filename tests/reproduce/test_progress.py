"""How far a reproduction is: the bar, what it says of failures, and what is seen from outside."""
import json
import os
import sys
import time

import pytest

from cft.apps.cli import main
from cft.files import locked, write_json
from cft.reproduce.progress import progress_of, standing
from cft.reproduce.steps import Step


def test_progress_counts_steps_as_soon_as_their_files_are_new(tmp_path, capsys):
    steps = [Step("cook", (str(k),), (f"{k}.txt", f"{k}.csv"), print) for k in range(3)]
    for name in ("0.txt", "0.csv", "1.txt", "1.csv"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1, 1))
    with progress_of(tmp_path, steps, True):
        for name in ("0.txt", "0.csv", "1.txt", "2.txt", "2.csv"):  # of step 1 one file is old
            (tmp_path / name).write_text("new")
    assert "2/3" in (said := capsys.readouterr().err) and "3/3" not in said
    with progress_of(tmp_path / "none", steps, False):
        pass
    assert not capsys.readouterr().err


def test_progress_moves_while_the_work_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # a log gets a line every 30 seconds only
    steps = [Step("cook", (str(k),), (f"{k}.txt",), print) for k in range(2)]
    with progress_of(tmp_path, steps, True):
        (tmp_path / "0.txt").touch()
        since, said = time.monotonic(), ""
        while "1/2" not in said and time.monotonic() - since < 60:
            time.sleep(0.1)
            said += capsys.readouterr().err
    assert "1/2" in said


def note(step, error="ValueError: no learning rate", **more):
    return {"step": step, "error": error, "cell": 3, "traceback": ["a", "ValueError: no"], **more}


def test_failures_are_told_while_the_work_goes_on(tmp_path, capsys):
    write_json(tmp_path / "failed/old.json", note("cook old"))
    with progress_of(tmp_path, [Step("cook", ("1",), ("1.txt",), print)], True):
        write_json(tmp_path / "failed/1.json", note("cook 1"))
        since, said = time.monotonic(), ""
        while "failed" not in said and time.monotonic() - since < 60:
            time.sleep(0.1)
            said += capsys.readouterr().err
    assert "failed   cook 1 in cell 3: ValueError: no learning rate\n" in said and "cook old" not in said


@pytest.fixture
def days(tmp_path):
    """A run that has gone on for an hour: one job is over, one runs, one died, one waits."""
    root, now = tmp_path / "r", time.time()
    steps = {"over": ["tune a", "test a"], "runs": ["tune b", "test b"], "died": ["tune c"], "waits": ["tune d"]}
    jobs = {name: {"steps": of} for name, of in steps.items()}
    write_json(root / "plan.json", {"began": now - 3600, "jobs": jobs})
    write_json(root / "jobs/over.json", {"done": True})
    write_json(root / "failed/c.json", note("tune c"))
    for name in ("over", "runs", "died"):
        (root / "logs").mkdir(exist_ok=True)
        (root / f"logs/{name}.log").touch()
    write_json(root / "steps/a.json", {"step": "tune a", "seconds": 1800.0})
    ended = [{"step": "tune z", "ended": now - 9999}, {"step": "tune a", "ended": now - 60}]
    (root / "done.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ended) + '{"step": "tu')
    return root


def test_how_far_it_is(days):
    with locked(days / "lock"):
        found = standing(days)
    assert found.works and found.done == ("tune a", "test a") and found.running == ("runs", "died")
    assert found.waiting == ("tune b", "test b", "tune d") and [n["step"] for n in found.failed] == ["tune c"]
    assert found.rate == pytest.approx(1, rel=0.01)
    assert found.left == pytest.approx(3 * 1800 * 2, rel=0.01)  # half an hour each, as long as one took in an hour
    assert "rate     1 steps an hour; about 3 hours left" in str(found)
    assert str(found).endswith("log: logs/died.log") and "failed   tune c in cell 3: ValueError" in str(found)


def test_nobody_works_there(days, capsys):
    os.remove(days / "done.jsonl")
    assert not standing(days).works and "hours left" not in str(standing(days)) and standing(days).running == ()
    with pytest.raises(SystemExit) as end:
        main(["status", str(days), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert end.value.code == 0 and told["done"] == ["tune a", "test a"] and told["failed"][0]["step"] == "tune c"
    with pytest.raises(SystemExit) as end:
        main(["status", str(days.parent)])
    assert end.value.code == 2 and "no run of a reproduction at" in capsys.readouterr().err
