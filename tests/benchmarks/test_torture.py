"""The harness tells every kind of answer apart, makes what it says it makes, and a sample of it is answered well."""

import random
import signal
import subprocess
import sys

import pandas as pd
import pytest
import spoiled
import torture
from sandbox import Case, Seen, die_at, judge, run, strays

BAR = "\rreading:  50%|█████     | 3/6 [00:00<00:00, 9.1it/s]\n"
TRACE = "Traceback (most recent call last):\n  File x\nKeyError: 7\n"
SAMPLE = "pictures,masks,checkpoints,classes,settings,answers,records,kills: masks"


def seen(tmp_path, code=2, err="", out="", **more):
    return Seen(code, out, err, 0.1, more.pop("hang", False), tmp_path, **more)


@pytest.mark.parametrize("verdict,may,answer", [
    ("good", "refuse", {"err": "cft: odd.csv has no header; expected id,name\n"}),
    ("good", "either", {"err": BAR + "cft: --odd must be above 0; got -1\n"}),
    ("good", "work", {"code": 0}),
    ("good", "either", {"code": 1, "out": "failed   page: odd is missing\n"}),
    ("unclear", "refuse", {"err": "cft: expected str, got int\n"}),
    ("unclear", "refuse", {"err": "cft: odd is bad\nUserWarning: odd\n"}),
    ("unclear", "refuse", {"err": "cft: odd is <class 'int'>\n"}),
    ("unclear", "refuse", {"err": "cft: odd\x1b[2J\n"}),
    ("unclear", "work", {"err": "cft: odd cannot be read\n"}),
    ("unclear", "refuse", {"err": "cft: odd is bad\n", "strays": (".x.draft", )}),
    ("unclear", "refuse", {"err": ""}),
    ("traceback", "either", {"code": 70, "err": TRACE + "odd\n"}),
    ("traceback", "either", {"code": 0, "out": TRACE}),
    ("traceback", "either", {"code": -signal.SIGSEGV}),
    ("traceback", "either", {"err": "cft: an unforeseen KeyError: odd\n"}),
    ("silent", "refuse", {"code": 0, "out": "result   odd\n"}),
    ("hang", "either", {"code": -signal.SIGKILL, "hang": True})])
def test_classes(tmp_path, verdict, may, answer):
    assert judge(Case("x", (), may, ("odd", )), seen(tmp_path, **answer))[0] == verdict


def test_a_wrong_result_is_silent_and_a_costly_refusal_unclear(tmp_path):
    case = Case("x", (), "either", ("odd", ), lambda seen: "12 questions were paid for")
    assert judge(case, seen(tmp_path, 0))[0] == "silent"
    assert judge(case, seen(tmp_path, err="cft: odd\n")) == ("unclear", "12 questions were paid for: cft: odd")


def test_a_child_is_seen_killed_and_cleaned_up_after(tmp_path):
    home = tmp_path / "home"
    home.mkdir()

    def write():
        for k in range(9):
            (home / f"{k}.txt").write_text("x")
        print("all of it")

    whole = run(Case("x", (), call=write), home, tmp_path / "log")
    assert (whole.code, whole.out, len(list(home.iterdir()))) == (0, "all of it\n", 9)
    for file in home.iterdir():
        file.unlink()
    assert run(Case("x", (), call=write, before=die_at(4, home)), home, tmp_path / "log").code == -signal.SIGKILL
    assert len(list(home.iterdir())) == 3
    assert run(Case("x", (), call=lambda: signal.pause()), home, tmp_path / "log", 0.3).hang
    assert "ZeroDivisionError" in run(Case("x", (), call=lambda: 1 / 0), home, tmp_path / "log").err
    left = run(Case("x", (), call=lambda: (home / ".a.draft").touch()), home, tmp_path / "log")
    assert left.strays == (".a.draft", ) and strays(home) == [".a.draft"]


def test_the_table_counts(tmp_path):
    results = [("masks", "a", "good", ""), ("masks", "b", "silent", "x"), ("hub", "c", "good", ""),
               ("hub", "d", "missed", "")]
    table = torture.table_of(results)
    assert list(table.columns) == ["kind", "tried", "good", "unclear", "traceback", "silent", "hang"]
    assert table.set_index("kind").loc[["masks", "hub", "all"], ["tried", "good", "silent"]].values.tolist() == [
        [2, 1, 1], [1, 1, 0], [3, 2, 1]]


def test_enough_is_tried_and_the_seed_draws_it():
    jobs = torture.jobs_of(torture.KINDS, 0, 0)
    kills = [job for job in jobs if job.kind.startswith("kills: ")]
    assert len(kills) >= 200 and sum(job.kind in spoiled.KINDS for job in jobs) >= 500
    assert torture.jobs_of(torture.KINDS, 9, 1) == torture.jobs_of(torture.KINDS, 9, 1)
    with pytest.raises(SystemExit):
        torture.main(["--only", "nothing"])


def test_spoilers_spoil():
    rng = random.Random(0)
    data = bytes(range(200))
    assert spoiled.mutated(rng, data) != data
    assert spoiled.bomb(3, 2).startswith(b"\x89PNG") and len(spoiled.bomb(1, 1_000_000)) < 10_000
    assert spoiled.replaced({"a": [1, {"b": 2}]}, ("a", 1, "b"), str) == {"a": [1, {"b": "2"}]}
    assert spoiled.leaves({"a": [1]}) == [(), ("a", ), ("a", 0)]


@pytest.mark.slow
def test_a_sample_is_answered_well(tmp_path):
    """In a process of its own: it forks, and children of a process with threads would fail by themselves."""
    words = ["--only", SAMPLE, "--sample", "12", "--workers", "1", "--out", tmp_path / "table.csv",
             "--list-bad", tmp_path / "bad.txt"]
    subprocess.run([sys.executable, torture.__file__, *words], check=True, stdout=subprocess.DEVNULL)
    total = pd.read_csv(tmp_path / "table.csv").set_index("kind").loc["all"]
    assert total["tried"] >= 6 and not total[["traceback", "silent", "hang"]].any(), (tmp_path / "bad.txt").read_text()


def test_the_readme_says_what_was_counted():
    table = pd.read_csv(torture.ROOT / "figures/reliability.csv").set_index("kind").drop(index="all")
    told = " ".join((torture.ROOT / "figures/README.md").read_text(encoding="utf-8").split())
    kills, pairs = table[table.index.str.startswith("kills")], table.loc["two at once"]
    rest = table.drop(index=[*kills.index, "disks", "two at once"])
    assert f"{kills['good'].sum()} kills lost nothing" in told and (kills["tried"] == kills["good"]).all()
    assert (f"of {rest['tried'].sum()} spoiled inputs, {rest['good'].sum()} were read right or refused in one sentence "
            f"and {rest['unclear'].sum()} refused unclearly, with no traceback") in told
    assert f"{table.loc['disks', 'good']} full or read-only disks and {pairs['good']} pairs of processes" in told
    assert not table[["traceback", "silent", "hang"]].to_numpy().any()
