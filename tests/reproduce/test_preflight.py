"""What is looked for before the first job."""
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from cft.data.testsets import miniature
from cft.reproduce import preflight
from cft.reproduce.preflight import faults, places, slurm_options, tell_srun
from cft.reproduce.runner import reproduce
from cft.reproduce.settings import Work, read_settings


def found(tmp_path, *keys, models=(), more=None, **changes):
    work = Work(read_settings("paper", **({"device": "cpu"} | changes)), keys, models)
    return faults(tmp_path / "r", work, **(more or {}))


def test_an_unfilled_profile_is_refused_with_all_that_it_lacks(tmp_path):
    code = ("import atexit, sys; from cft.apps.cli import main; "
            "atexit.register(lambda: print('torch' in sys.modules)); main()")
    command = [sys.executable, "-c", code, "reproduce", "--profile", "paper", "--out", tmp_path / "r"]
    said = subprocess.run(command, capture_output=True, text=True)
    *lines, slow = said.stdout.splitlines()
    assert slow == "False", "torch alone would take half of the ten seconds that this may take"
    assert said.returncode == 2 and not (tmp_path / "r").exists()
    names = [line.split()[1] for line in lines]
    work = Work(read_settings("paper"))
    assert names == [*places(work), "device"] and len(names) == 18
    of_pictures = "its pictures: unknown, see the source)"
    assert f"hendrycks/natural-adv-examples (656 MiB; its repository: MIT; {of_pictures}" in said.stdout
    assert "gtsegs_ijcv.mat (one file, about 1 GB; licence unknown, see the source)" in said.stdout
    assert "(330 MiB; Apache-2.0)" in said.stdout and "sam_vit_h_4b8939.pth (2,446 MiB; Apache-2.0)" in said.stdout
    assert said.stderr == "cft: 18 things are missing, as said above; nothing was begun\n"


def test_only_what_is_needed_is_asked_for(tmp_path):
    names = [line.split()[0] for line in found(tmp_path, "table2", models=("ViT-B",))]
    sets = [f"sets.si-{name}" for name in ("location", "rotation", "size")]
    assert names == ["train", "answers", "grounder_weights", *sets, "weights.vit_base_patch16_224"]
    assert found(tmp_path, "table8") == [], "which trains and tests nothing"
    assert faults(tmp_path / "r", Work(read_settings("smoke"))) == []


def test_what_is_there_is_looked_into(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1")
    sound = shutil.copy(Path(preflight.__file__).parents[1] / "assets/base_0.safetensors", tmp_path / "w.safetensors")
    (tmp_path / "train/n01440764").mkdir(parents=True)
    there = {"sets.si-location": miniature("si-location", tmp_path / "sets"), "train": tmp_path / "train", "ask": True,
             "answers": tmp_path / "answers.jsonl", "grounder_weights": tmp_path, "sets.si-size": tmp_path / "none"}
    there["weights.vit_base_patch16_224"] = tmp_path / "pointer.pth"
    said = found(tmp_path, "table2", models=("ViT-B",), **there)
    by = {line.split()[0].rstrip(":"): line for line in said}
    assert "fewer than 30 pictures in 1000 of 1000 class folders, first n01440764. It is" in by["train"]
    assert "weights are missing" in by["grounder_weights"] and "expected 50" not in by["grounder_weights"]
    assert "pictures in" in by["sets.si-location"] and "there is nothing. It is SI-Score" in by["sets.si-size"]
    assert "perhaps a pointer of Git LFS" in by["weights.vit_base_patch16_224"]
    assert "OPENAI_API_KEY" in by and "answers" not in by, "it will be written"
    assert not [w for w in found(tmp_path, "table2", **{"weights.vit_base_patch16_224": sound}) if "vit_base" in w]


def test_the_machine(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 9, 10**9))
    work = Work(read_settings("paper"))
    assert "1.0 GB free, and" in (full := next(f for f in faults(tmp_path, work) if "GB free" in f)) and "--out" in full
    monkeypatch.setattr(preflight, "_cuda_devices", lambda: 2)
    assert not [f for f in faults(tmp_path, work, gpus=2) if "device" in f]
    assert "the driver has 2 for 3 asked for" in " ".join(faults(tmp_path, work, gpus=3))
    assert not [f for f in faults(tmp_path, work, executor="slurm", gpus=3) if "device" in f], "jobs run elsewhere"
    with pytest.raises(ValueError, match="(?s)train is not filled in.*grounder_weights is"):
        reproduce("paper", out=tmp_path / "r", device="cpu")


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Programs that stand for those of a cluster; what `scontrol` says can be set."""
    pytest.importorskip("snakemake_executor_plugin_slurm")
    for name in ("sbatch", "squeue", "scancel", "sinfo", "scontrol", "srun"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        program = f"#!/bin/sh\ncat {tmp_path}/{name}.txt; echo $SLURM_CONF; exit $(cat {tmp_path}/rc)"
        (tmp_path / "bin" / name).write_text(program)
        (tmp_path / "bin" / name).chmod(0o755)
        (tmp_path / f"{name}.txt").touch()
    (tmp_path / "rc").write_text("0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return tmp_path


def test_a_cluster(slurm, monkeypatch):
    config, check = slurm / "scontrol.txt", lambda: found(slurm, "table8", more={"executor": "slurm"})
    config.write_text("AccountingStorageType   = accounting_storage/none\nMinJobAge               = 300 sec\n")
    assert check() == [] and "squeue" in (words := slurm_options()) and "--slurm-requeue" in words
    assert "--slurm-requeue" not in slurm_options(["--slurm-no-requeue"])
    config.write_text("AccountingStorageType = accounting_storage/none\nMinJobAge = 60 sec\n")
    assert "forgets jobs after 60 s" in check()[0] and "Set MinJobAge=300" in check()[0]
    config.write_text("AccountingStorageType = accounting_storage/slurmdbd\nMinJobAge = 60 sec\n")
    assert check() == [] and "squeue" not in slurm_options(), "accounts know"
    (slurm / "rc").write_text("1")
    assert check()[0].startswith("Slurm does not answer")
    (slurm / "bin/sbatch").unlink()
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "sbatch" else name)
    assert check()[0].startswith("sbatch is not on the PATH")
    assert "pip install snakemake-executor-plugin-abacus" in found(slurm, "table8", more={"executor": "abacus"})[0]


def test_srun_is_told_where_the_configuration_is(slurm, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", "/somewhere else/slurm.conf")
    for _ in range(2):
        tell_srun(slurm / "r")
    monkeypatch.delenv("SLURM_CONF")  # as the plugin does
    said = subprocess.run(["srun"], capture_output=True, text=True)
    assert said.stdout == "/somewhere else/slurm.conf\n"
