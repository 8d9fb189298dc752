"""Jobs on a real Slurm of one node: munged, slurmctld and slurmd on loopback, in a folder of their own, no accounts."""
import asyncio
import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import threading
import time

import psutil
import pytest

from cft.files import read_json, write_json
from cft.reproduce import runner
from cft.reproduce.preflight import faults, slurm_options, tell_srun
from cft.reproduce.progress import failures
from cft.reproduce.runner import Job, open_work

DAEMONS = ("munged", "slurmctld", "slurmd")
PLACES = os.environ["PATH"] + ":/usr/sbin:/sbin"
MISSING = [name for name in (*DAEMONS, "sbatch") if shutil.which(name, path=PLACES) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}; Debian has them in slurm-wlm and munge")]
CONFIG = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
AuthInfo=socket={root}/munge.socket
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000 Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP
"""


def ports(count):
    """Some ports that nobody uses."""
    with contextlib.ExitStack() as stack:
        open_ones = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in open_ones:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in open_ones]


def wait_for(condition, seconds=60):
    until = time.time() + seconds
    while not (value := condition()):
        assert time.time() < until, f"waited for {seconds} seconds"
        time.sleep(0.1)
    return value


class Cluster:
    """Three daemons, each a child of the test."""

    def __init__(self, root):
        self.root, self.children, host = root, {}, socket.gethostname().partition(".")[0]
        for name in ("state", "spool"):
            (root / name).mkdir()
        controller, daemon = ports(2)
        user = subprocess.run(["id", "-un"], capture_output=True, text=True).stdout.strip()
        told = CONFIG.format(host=host, controller=controller, daemon=daemon, root=root, user=user)
        (root / "slurm.conf").write_text(told)
        (root / "gres.conf").write_text("Name=gpu File=/dev/null\n")  # which stands for a GPU
        key = root / "key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))

    def start(self, name):
        places = {"key-file": "key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log",
                  "seed-file": "munged.seed"}
        words = ["--foreground", "--force", *(f"--{k}={self.root / v}" for k, v in places.items())]
        words = words if name == "munged" else ["-D"]
        with (self.root / f"{name}.out").open("ab") as log:
            self.children[name] = subprocess.Popen([shutil.which(name, path=PLACES), *words], stdout=log, stderr=log)

    def ready(self):
        said = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout
        return said.strip() in ("idle", "mixed", "allocated")

    def lose_node(self):
        """End slurmd and the steps of jobs with all that they have started, as if their machine were gone."""
        kept, place = {self.children[name].pid for name in ("munged", "slurmctld")}, os.environ["SLURM_CONF"]
        mine = [process for process in psutil.process_iter(["environ"])
                if process.pid not in kept and (process.info["environ"] or {}).get("SLURM_CONF") == place]
        with contextlib.suppress(psutil.NoSuchProcess):
            steps = {p for process in mine for p in process.parents() if p.name() == "slurmstepd"}
        for process in (psutil.Process(self.children["slurmd"].pid), *steps, *mine):  # who could report goes first
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.children["slurmd"].wait()

    def stop(self):
        """End all of it."""
        self.lose_node()
        for name in ("slurmctld", "munged"):
            self.children[name].kill()
            self.children[name].wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    pytest.importorskip("snakemake_executor_plugin_slurm")
    root = tmp_path_factory.mktemp("slurm")
    root.chmod(0o755)
    with pytest.MonkeyPatch.context() as outer:
        outer.setenv("SLURM_CONF", str(root / "slurm.conf"))
        outer.setenv("PATH", PLACES)
        outer.setenv("CFT_RUNNER", "")
        looks = "snakemake_interface_executor_plugins.executors.remote.RemoteExecutor.sleep"
        outer.setattr(looks, lambda _: asyncio.sleep(0.5))  # and not every ten seconds, and then less often
        found = Cluster(root)
        try:
            for name in DAEMONS:
                found.start(name)
            wait_for(found.ready, 30)
            yield found
        finally:
            found.stop()


CHAIN = {"first": Job((), (), False), "second": Job((), ("first",), False)}


def on(cluster, root, script, jobs=CHAIN, **more):
    """Run jobs, of which each calls a script with its name."""
    root, work = open_work("smoke", ("table8",), out=root)
    assert faults(root, work, "slurm") == []
    runner._write_plan(root, work, jobs)
    (root / "job.sh").write_text(f"#!/bin/sh\n{script}\n")
    write_json(root / "plan.json", read_json(root / "plan.json") | {"command": "sh job.sh", "memory": 100} | more)
    tell_srun(root)
    words = [*slurm_options(), "--slurm-init-seconds-before-status-checks", "1"]
    runner._snakemake(root, ["--executor", "slurm", "--jobs", "2", "--quiet", "all", "--retries", "1", *words], False)
    return root


def test_a_job_asks_for_what_the_plan_says_and_the_queue_stays_short(cluster, tmp_path):
    script = 'scontrol show job $SLURM_JOB_ID >$1.txt; squeue -h | wc -l >>queued; echo {} >jobs/$1.json'
    jobs = {name: Job((), (), name == "a") for name in "abc"}
    root = on(cluster, tmp_path / "r", script, jobs, minutes=dict(a=17, b=18, c=80), memory=123)
    asked = {name: (root / f"{name}.txt").read_text() for name in jobs}
    for name, limit in zip(jobs, ("00:17:00", "00:18:00", "01:20:00")):
        assert f" TimeLimit={limit} " in asked[name] and "MinMemoryNode=123M" in asked[name]
        assert bool(re.search("TresPerJob=gres.gpu:1", asked[name])) == (name == "a")
    queued = [*map(int, (root / "queued").read_text().split())]
    assert len(queued) == 3 and max(queued) <= 2, "no more than --jobs at a time, and one Slurm job for each of ours"


def test_jobs_end_without_accounts_and_a_lost_node_brings_them_again(cluster, tmp_path):
    root = tmp_path / "r"
    script = 'echo $1 >>tries; [ "$(grep -c $1 tries)" -gt 1 -o $1 = second ] || sleep 300; echo {} >jobs/$1.json'

    def accident():
        wait_for(lambda: (root / "tries").is_file(), 60)
        cluster.lose_node()
        update = lambda *words: subprocess.run(["scontrol", "update", *words], check=True)
        update("nodename=ALL", "state=down", "reason=lost")  # what Slurm finds out by itself after some minutes
        cluster.start("slurmd")
        queue = lambda: subprocess.run(["squeue", "-h", "-t", "PD", "-o", "%i"], capture_output=True, text=True).stdout
        for job in wait_for(queue, 60).split():
            update(f"jobid={job}", "starttime=now")  # it would rest for two minutes

    watcher = threading.Thread(target=accident)
    watcher.start()
    on(cluster, root, script)
    watcher.join()
    tries = (root / "tries").read_text().split()
    assert tries[:2] == ["first", "first"] and tries[-1] == "second"
    assert {path.stem for path in (root / "jobs").iterdir()} == {"first", "second"}


def test_what_a_cluster_says_of_a_job_is_told(cluster, tmp_path):
    root = on(cluster, tmp_path / "r", "echo out of luck; exit 3")
    (note,) = failures(root)
    assert note["step"] == "job first" and "FAILED" in note["error"] and note["log"], note
    assert not list((root / "jobs").glob("*"))
