"""A Slurm of two nodes on this machine, in a folder of its own."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

NEEDED = "munged", "slurmctld", "slurmd", "sbatch"
NODES = "n1", "n2"
CONF = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SlurmdTimeout=10
MinJobAge=600
SchedulerParameters=sched_interval=2
KillWait=60
ReturnToService=2
NodeName=n1 NodeHostname=localhost Port={n1} CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname=localhost Port={n2} CPUs=2 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


SACCT = "exec squeue --noheader --states=all --array --format='%i|%T|%N'\n"


def lacking() -> str:
    """What keeps a Slurm from starting here; empty if nothing does."""
    if os.name != "posix" or os.geteuid() != 0:
        return "only root may start a Slurm for others"
    missing = [name for name in NEEDED if not shutil.which(name)]
    return f"{', '.join(missing)} not installed" if missing else ""


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # submitit asks sacct, which needs a database that this Slurm lacks; squeue knows the same of recent jobs.
        (folder / "bin").mkdir()
        (folder / "bin/sacct").write_text("#!/bin/sh\necho 'JobID|State|NodeList'\n" + SACCT)
        (folder / "bin/sacct").chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "SLURM_CONF": str(folder / "slurm.conf"),
            "MASTER_ADDR": "127.0.0.1",
        }

    def ask(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True).stdout

    def state(self, job: str) -> str:
        return self.ask("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}").strip()

    def wait(self, job: str, *states: str, seconds: float = 120) -> str:
        """The first of the states that the job comes to. Raises TimeoutError."""
        until = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            if time.monotonic() > until:
                raise TimeoutError(f"job {job} is {state}, not {states}")
            time.sleep(0.2)
        return state

    def start(self, node: str) -> None:
        """Starts a node, or starts it again after `kill`."""
        subprocess.run(["slurmd", "-N", node, "-L", self.folder / f"{node}.log"], env=self.environment, check=True)
        self.ask("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def kill(self, node: str) -> None:
        """As if its power were cut: its daemon and all that runs on it."""
        pids = [int((self.folder / f"slurmd-{node}.pid").read_text())]
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (process / "environ").read_bytes().split(b"\0")
                if f"SLURMD_NODENAME={node}".encode() in words and str(self.folder).encode() in b"".join(words):
                    pids.append(int(process.name))
                if f"slurmstepd: [{node}".encode() in (process / "cmdline").read_bytes():
                    pids.append(int(process.name))
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A Slurm with two nodes of two CPUs. Raises TimeoutError if they are not up within 30 seconds."""
    controller, n1, n2 = _ports(3)
    for name in "state", "spool/n1", "spool/n2":
        (folder / name).mkdir(parents=True)
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, controller=controller, n1=n1, n2=n2))
    (folder / "cgroup.conf").touch()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    here = Cluster(folder)
    munged = ["munged", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    munged += [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
    try:
        subprocess.run(munged, check=True, stderr=subprocess.DEVNULL)
        subprocess.run(["slurmctld", "-L", folder / "slurmctld.log"], env=here.environment, check=True)
        for node in NODES:
            here.start(node)
        until = time.monotonic() + 30
        while here.ask("sinfo", "--noheader", "--format=%T %D").strip() != "idle 2":
            if time.monotonic() > until:
                raise TimeoutError(here.ask("sinfo") + (folder / "slurmctld.log").read_text())
            time.sleep(0.2)
        yield here
    finally:
        here.ask("scancel", "--signal=KILL", "--user=root")
        for node in NODES:
            with suppress(FileNotFoundError):
                here.kill(node)
        for name in "slurmctld.pid", "munged.pid":
            with suppress(FileNotFoundError, ProcessLookupError):
                os.kill(int((folder / name).read_text()), signal.SIGTERM)
