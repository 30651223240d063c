"""Faults: whatever is killed, stopped, filled or damaged, the run ends with the weights of one that was left alone.

The jobs here write a checkpoint with every record, that is, every ten steps: that is what a fault may cost.
"""

import contextlib
import ctypes
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import data
import models
import runs
import train
from benchmarks import faults
from benchmarks.faults import JOB, STEPS, Pair, assert_ended_as, free_port, last_step, lost, records, state, weights

ROOT = Path(__file__).resolve().parent.parent
EPOCH = 30  # steps
LITTLE = ["digits", "--subset", f"{2 * EPOCH}", "--batch-size", "2", "--epochs", "2"]
OFTEN = ["--checkpoint-minutes", "1e-9"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
PATIENCE = 120  # seconds, for anything: machines differ

linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes of a job in /proc")
slow = pytest.mark.slow


# --- runs -------------------------------------------------------------------------------------------------


def command(monkeypatch, *arguments):
    """Run train.py's command line in this process, with a shorter look at each epoch; its exit code."""
    monkeypatch.setattr(train, "PROBE_IMAGES", 20)
    monkeypatch.setattr(runs, "DYING", 0.0)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    return runs.run_command(train.main)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """An uninterrupted run of one process."""
    root = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert command(monkeypatch, *LITTLE, "--runs", root, "--name", "run") == 0
    return root / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of two processes; beside it, the seconds that it took."""
    run, seconds = faults.undisturbed(tmp_path_factory.mktemp("two"))
    (run.parent / "seconds").write_text(str(seconds))
    return run


# --- jobs of torchrun -------------------------------------------------------------------------------------


def role(pid):
    """torchrun, or the rank, as text; None for a process that has ended."""
    with contextlib.suppress(OSError):
        process = Path("/proc") / str(pid)
        if process.joinpath("stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return None
        if b"torch.distributed.run" in process.joinpath("cmdline").read_bytes():
            return "torchrun"
        variables = process.joinpath("environ").read_bytes().split(b"\0")
        return next((v[5:].decode() for v in variables if v.startswith(b"RANK=")), "?")
    return None


def processes(root):
    """Process number -> role, of all living processes that name the folder `root` in their command line."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(root).encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found[int(path.parent.name)] = role(path.parent.name)
    return {pid: what for pid, what in found.items() if what}


def kill(root, *roles):
    """kill -9, at once."""
    victims = [pid for pid, what in processes(root).items() if what in roles]
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(victims)


STANDALONE = ["--standalone", "--nproc_per_node", "2"]


class Job:
    """Context: torchrun with train.py, which works on `run`; afterwards all its processes are gone."""

    def __init__(self, run, *arguments, restarts=0, options=STANDALONE):
        line = [sys.executable, "-m", "torch.distributed.run", *options, "--max-restarts", str(restarts)]
        self.line = [*line, str(ROOT / "train.py"), *map(str, arguments)]
        self.run, self.root = run, run.parent
        self.log = self.root.with_name(f"{time.monotonic_ns()}.log")

    def __enter__(self):
        with open(self.log, "wb") as log:
            how = {"env": ENVIRONMENT, "stdout": log, "stderr": log, "start_new_session": True}
            self.process = subprocess.Popen(self.line, **how)
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        kill(self.root, *processes_but_torchrun(self.root).values())

    @property
    def output(self):
        return self.log.read_text(errors="replace")

    def reach(self, step):
        """Wait for the record of a step, not of the last one."""
        faults.wait_until(lambda: last_step(self.run) >= step or self.process.poll() is not None, what=self.output)
        assert self.process.poll() is None, self.output
        assert last_step(self.run) < STEPS, "the run ended before the fault could hit"

    def end(self):
        """The exit code, after which nothing of the job is left; no line of a traceback of ours in what it printed."""
        code = self.process.wait(timeout=PATIENCE)
        faults.wait_until(lambda: not processes_but_torchrun(self.root), seconds=30, what=str(processes(self.root)))
        assert f'File "{ROOT}' not in self.output, self.output
        return code

    def lines(self):
        """What our processes printed on stderr."""
        return [line for line in self.output.splitlines() if line.startswith("train.py: ")]


def processes_but_torchrun(root):
    return {pid: what for pid, what in processes(root).items() if what != "torchrun"}


def named(root, *more, **how):
    """A job that trains root/run."""
    return Job(root / "run", *JOB, "--runs", root, "--name", "run", *more, **how)


def rank(*arguments):
    """What torchrun's agent runs in each process."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).prctl(1, 0)  # PR_SET_PDEATHSIG: who is forked hears of the agent's death, who is started does not
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", closefd=False) for fd in (1, 2))
    sys.argv = ["train.py", *map(str, arguments)]
    train.PROBE_IMAGES = 20
    runs.run_command(train.main)  # leaves with the exit code


class Agent:
    """Context: torchrun's agent, forked with all that it and its two processes need; afterwards it is gone: kill -9."""

    def __init__(self, log, *arguments, restarts=0):
        self.log, self.arguments, self.code = log, arguments, None
        self.how = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "max_restarts": restarts}
        self.how |= {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "start_method": "fork"}

    def __enter__(self):
        self.pid = os.fork()
        if self.pid == 0:
            try:
                output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(output, 1)
                os.dup2(output, 2)
                elastic_launch(LaunchConfig(run_id=self.log.name, monitor_interval=0.1, **self.how), rank)(
                    *self.arguments
                )
                os._exit(0)
            finally:
                os._exit(1)
        return self

    def ended(self):
        """Its exit code, or None while it works."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def until(self, condition):
        faults.wait_until(lambda: condition() or self.ended() is not None, what=self.output)
        assert self.ended() is None, self.output

    def __exit__(self, *_):
        if self.ended() is None:
            os.kill(self.pid, signal.SIGKILL)
            faults.wait_until(lambda: self.ended() is not None)

    @property
    def output(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def lines(self):
        return [line for line in self.output.splitlines() if line.startswith("train.py: ")]


@linux
def test_what_is_wrong_is_told_once_by_a_process_that_knows_it(tmp_path, monkeypatch):
    """By the main one where all know it, before torchrun ends it for another's exit."""

    def told(name, size):
        with Agent(tmp_path / name, "digits", "--batch-size", size, "--runs", tmp_path) as job:
            faults.wait_until(lambda: job.ended() is not None, what=job.output)
        return job.lines()

    (line,) = told("shared", 51)
    assert line.startswith("train.py: --batch-size: 51 images a step")

    def load(*_, real=data.load, **options):
        if os.environ["RANK"] == "1":
            raise data.Unusable("no such disk")
        return real(*_, **options)

    monkeypatch.setattr(data, "load", load)
    first, *others = told("own", 50)
    assert first == "train.py: process 1: no such disk"
    assert others in ([], [f"train.py: {runs.GONE}"])


# --- a job of torchrun, and what may befall it ------------------------------------------------------------


@linux
def test_a_job_through_many_faults(monkeypatch, tmp_path, whole, capsys):
    """A rank is killed and comes back; torchrun is told to stop; the newest checkpoint is cut short; the same command
    goes on; nobody else may; torchrun is killed; and the run ends as one that was left alone.
    """
    root = tmp_path / "runs"
    run = root / "run"
    line = [*JOB, "--runs", root, "--name", "run"]
    with Agent(tmp_path / "first", *line, restarts=1) as job:
        job.until(lambda: last_step(run) >= 20)
        os.kill(json.loads((run / "status.json").read_text())["pid"], signal.SIGKILL)  # rank 0
        job.until(lambda: lost(run) and last_step(run) >= 40)
        os.kill(job.pid, signal.SIGTERM)
        faults.wait_until(job.ended, what=job.output)
        assert "going on with it" in job.output
        assert state(run) == "interrupted"
        assert job.lines()[-1].startswith("train.py: stopped by SIGTERM at step")
    assert last_step(run) == runs.read_checkpoint(run / "checkpoint.pt")["step"] < STEPS
    content = (run / "checkpoint.pt").read_bytes()
    (run / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    with Agent(tmp_path / "second", *line) as again:
        again.until(lambda: len(lost(run)) == 2)
        assert command(monkeypatch, "--resume", run) == 2  # and nothing that the others do changes by it
        assert "is working on it" in capsys.readouterr().err
    faults.wait_until(again.lines, what=again.output)
    assert state(run) == "interrupted"
    assert "going on from the one before it" in again.output
    (stopped,) = again.lines()
    assert stopped.startswith("train.py: stopped by SIGTERM at step")
    with Pair(tmp_path / "log", "--resume", run) as last:
        assert last.end() == [0, 0], last.output
    assert len(lost(run)) == 3
    assert lost(run)[2] == 0
    assert_ended_as(run, whole)


@linux
@slow
@pytest.mark.parametrize(
    ("victims", "name"),
    [("0", "run"), ("1", "run"), ("0", None), ("1", None), ("01", "run"), ("01", None)],
)
def test_killed_ranks_are_started_again_and_go_on(tmp_path, whole, victims, name):
    root = tmp_path / "runs"
    job = Job(root / "latest", *JOB, "--runs", root, restarts=2)
    with named(root, restarts=2) if name else job as job:
        job.reach(20)
        assert kill(root, *victims) == len(victims)
        assert job.end() == 0, job.output
        assert "going on with it" in job.output
    assert [path.name for path in root.iterdir() if path.is_dir() and not path.is_symlink()] == [job.run.resolve().name]
    assert len(lost(job.run)) == 1
    assert_ended_as(job.run, whole)


@linux
@slow
def test_without_torchrun_its_processes_stop_and_the_same_command_goes_on(tmp_path, whole):
    root = tmp_path / "runs"
    with named(root) as job:
        job.reach(20)
        job.process.kill()
        faults.wait_until(lambda: not processes(root), seconds=60, what=str(processes(root)))
        assert job.end() == -signal.SIGKILL
        assert state(job.run) == "interrupted"
        (line,) = job.lines()
        assert line.startswith("train.py: stopped by SIGTERM at step")
    assert runs.read_checkpoint(job.run / "checkpoint.pt")["step"] < STEPS
    with named(root) as again:
        assert again.end() == 0, again.output
    assert lost(job.run) == [0]
    assert_ended_as(job.run, whole)


@linux
@slow
def test_a_torchrun_that_dies_while_its_processes_start_leaves_none(tmp_path):
    """They would wait for its store, for half an hour."""
    root = tmp_path / "runs"
    with named(root) as job:
        faults.wait_until(lambda: len(processes_but_torchrun(root)) == 2)
        job.process.kill()
        faults.wait_until(lambda: not processes(root), seconds=60, what=str(processes(root)))
        assert not (root / "run").exists()
        assert job.end() == -signal.SIGKILL


# --- signals ----------------------------------------------------------------------------------------------


@linux
@slow
@pytest.mark.parametrize(
    ("signum", "to_group", "truncate"),
    [
        (signal.SIGTERM, False, True),
        (signal.SIGTERM, False, False),
        (signal.SIGINT, False, False),
        (signal.SIGINT, True, False),
        (signal.SIGHUP, False, False),
        (signal.SIGHUP, True, False),
    ],
)
def test_a_signal_to_torchrun_ends_with_a_checkpoint(tmp_path, whole, signum, to_group, truncate):
    """A terminal's Ctrl-C, or its end, goes to the whole group.  A checkpoint cut short gives way to the one before."""
    root = tmp_path / "runs"
    with named(root) as job:
        job.reach(20)
        (os.killpg if to_group else os.kill)(job.process.pid, signum)
        assert job.end() not in (0, None)
        assert state(job.run) == "interrupted"
        (line,) = job.lines()
        assert line.startswith(f"train.py: stopped by {signum.name} at step")
    stopped = runs.read_checkpoint(job.run / "checkpoint.pt")["step"]
    assert last_step(job.run) == stopped < STEPS
    if truncate:
        content = (job.run / "checkpoint.pt").read_bytes()
        (job.run / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    with Job(job.run, "--resume", job.run) as again:
        assert again.end() == 0, again.output
        assert ("going on from the one before it" in again.output) == truncate
    assert lost(job.run)[0] == 0 or truncate
    assert_ended_as(job.run, whole)


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_signal_during_an_evaluation_puts_it_off(monkeypatch, tmp_path, alone, epoch):
    """The epoch's record is written after the resume, once."""
    real, calls = data.evaluation_batches, []

    def interrupted(*arguments, **options):
        calls.append(None)
        if len(calls) == epoch:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(data, "evaluation_batches", interrupted)
        assert command(monkeypatch, *LITTLE, "--runs", tmp_path, "--name", "run") == 143
    run = tmp_path / "run"
    assert state(run) == "interrupted"
    assert runs.read_checkpoint(run / "checkpoint.pt")["step"] == EPOCH * epoch
    assert [r["step"] for r in records(run, "epoch")] == [EPOCH, 2 * EPOCH][: epoch - 1]
    assert command(monkeypatch, "--resume", run) == 0
    assert [r["step"] for r in records(run, "epoch")] == [EPOCH, 2 * EPOCH]
    assert lost(run) == [0]
    assert_ended_as(run, alone)


@pytest.mark.parametrize("probe", ["pgd", "omega_statistics"])
def test_a_signal_ends_the_attack_of_an_evaluation_after_the_images_at_hand(monkeypatch, tmp_path, alone, probe):
    module = train.attacks if probe == "pgd" else train.bounds
    real, calls = getattr(module, probe), []

    def interrupted(*arguments, **options):
        calls.append(None)
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(module, probe, interrupted)
        assert command(monkeypatch, *LITTLE, "--runs", tmp_path, "--name", "run") == 143
    assert len(calls) == 1
    assert command(monkeypatch, "--resume", tmp_path / "run") == 0
    assert_ended_as(tmp_path / "run", alone)


# --- the disk ---------------------------------------------------------------------------------------------


def at_step(monkeypatch, step, do):
    """Let `do` happen just after the update of a step."""
    real, steps = train.Watch.add, iter(range(1, step + 1))

    def add(self, *of):
        real(self, *of)
        if next(steps, None) == step:
            do()

    monkeypatch.setattr(train.Watch, "add", add)


def assert_one_line_and_a_whole_checkpoint(capsys, run, message):
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: ")
    assert message in line
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []
    assert runs.read_checkpoint(run / "checkpoint.pt")["step"] == 20


def to_nowhere(path):
    """Let nothing that is written to `path` have room; what was there is put aside."""
    if path.exists():
        path.rename(path.with_name(f"{path.name}.aside"))
    path.symlink_to("/dev/full")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("file", "message"),
    [
        (f".checkpoint.pt.{os.getpid()}.tmp", "checkpoint.pt: cannot be written (No space left on device)"),
        ("metrics.jsonl", "metrics.jsonl: No space left on device"),
        (f".status.json.{os.getpid()}.tmp", "status.json: No space left on device"),
    ],
    ids=["checkpoint", "log", "status"],
)
def test_a_full_disk_is_one_line_and_costs_one_interval(monkeypatch, tmp_path, alone, capsys, file, message):
    run, small = tmp_path / "run", [*LITTLE, *OFTEN, "--runs", tmp_path, "--name", "run"]
    with monkeypatch.context() as patched:
        patched.setattr(runs, "HEARTBEAT", 0.0)
        at_step(patched, 25, lambda: to_nowhere(run / file))
        assert command(patched, *small) == 1
    if file == "metrics.jsonl":
        (run / file).unlink()
        (run / f"{file}.aside").rename(run / file)
    assert_one_line_and_a_whole_checkpoint(capsys, run, message)
    if not file.startswith(".status"):
        assert state(run) == "failed"
    assert command(monkeypatch, *small) == 0
    assert_ended_as(run, alone)


def test_half_a_line_for_which_there_was_room_is_noticed(monkeypatch, tmp_path, alone, capsys):
    run, small = tmp_path / "run", [*LITTLE, *OFTEN, "--runs", tmp_path, "--name", "run"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, ((run / "metrics.jsonl").stat().st_size + 50, before[1]))

    try:
        with monkeypatch.context() as patched:
            at_step(patched, 25, limit)
            assert command(patched, *small) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_one_line_and_a_whole_checkpoint(capsys, run, "metrics.jsonl: File too large")
    assert not (run / "metrics.jsonl").read_bytes().endswith(b"\n")
    assert state(run) == "failed"
    assert command(monkeypatch, *small) == 0
    assert len((run / "metrics.jsonl").read_bytes().splitlines()) == len(records(run)) + 1
    assert_ended_as(run, alone)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own, of 8 MiB."""
    root = tmp_path / "disk"
    root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(root)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system here")
    yield root
    subprocess.run(["umount", "-l", str(root)], check=True)


def fill(path, left):
    """Leave so many bytes on the file system of `path`."""
    with contextlib.suppress(OSError), open(path, "ab", buffering=0) as file:
        while file.write(b"0" * 4096):
            pass
    os.truncate(path, path.stat().st_size - left)


@pytest.mark.parametrize("left", [pytest.param(0, marks=slow), 8192, pytest.param(2**20, marks=slow)])
def test_a_disk_that_is_really_full(monkeypatch, small_disk, alone, capsys, left):
    """With no room, with room for lines only, with room for less than a checkpoint."""
    run, small = small_disk / "run", [*LITTLE, *OFTEN, "--runs", small_disk, "--name", "run"]
    with monkeypatch.context() as patched:
        at_step(patched, 25, lambda: fill(small_disk / "filler", left))
        assert command(patched, *small) == 1
    (small_disk / "filler").unlink()
    assert_one_line_and_a_whole_checkpoint(capsys, run, "No space left on device")
    assert command(monkeypatch, *small) == 0
    assert_ended_as(run, alone)


@linux
@slow
def test_a_full_disk_under_torchrun(tmp_path, whole):
    """Also its restart fails, with the same line; with room again the same command goes on."""
    root = tmp_path / "runs"
    with named(root, restarts=1) as job:
        job.reach(20)
        nowhere = root / "nowhere"
        nowhere.symlink_to("/dev/full")
        while job.process.poll() is None:
            pid = json.loads((job.run / "status.json").read_text())["pid"]  # a restart's is another
            with contextlib.suppress(FileExistsError):  # it is just being written
                os.link(nowhere, job.run / f".checkpoint.pt.{pid}.tmp", follow_symlinks=False)
            time.sleep(0.001)
        assert job.end() not in (0, None)
        assert all("checkpoint.pt: cannot be written (No space left on device)" in line for line in job.lines())
        assert 1 <= len(job.lines()) <= 2
    assert runs.read_checkpoint(root / "run/checkpoint.pt")["step"] < STEPS
    with named(root) as again:
        assert again.end() == 0, again.output
    assert_ended_as(job.run, whole)


def test_killed_between_the_two_renames_of_a_checkpoint(monkeypatch, tmp_path, alone):
    """Then there is no checkpoint.pt, but the one before."""

    class Killed(BaseException):
        pass

    real = os.replace

    def dies(source, target):
        if Path(source).name.startswith(".checkpoint.pt") and runs.read_checkpoint(source)["step"] == 30:
            raise Killed
        real(source, target)

    small = [*LITTLE, *OFTEN, "--runs", tmp_path, "--name", "run"]
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", dies)
        with pytest.raises(Killed):
            command(patched, *small)
    run = tmp_path / "run"
    assert not (run / "checkpoint.pt").exists()
    assert runs.read_checkpoint(run / "checkpoint.previous.pt")["step"] == 20
    assert command(monkeypatch, *small) == 0
    assert lost(run) == [10]
    assert_ended_as(run, alone)


def test_killed_before_anything_is_written(monkeypatch, tmp_path, alone):
    """A directory appears with its config.json in it, and may be begun anew while it has no checkpoint."""

    class Killed(BaseException):
        pass

    def dies(*_, **__):
        raise Killed

    small = [*LITTLE, "--runs", tmp_path, "--name", "run"]
    for owner, function in ((runs, "replace"), (train.Trainer, "__init__"), (train.Trainer, "save")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, function, dies)
            with pytest.raises(Killed):
                command(patched, *small)
        assert (tmp_path / "run/config.json").exists() == (function != "replace")
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert command(monkeypatch, *small) == 0
    assert_ended_as(tmp_path / "run", alone)


def test_killed_after_the_last_checkpoint(monkeypatch, tmp_path, alone):
    """Then a resume has nothing to do but to say that the run is finished."""
    run = Path(shutil.copytree(alone, tmp_path / "run"))
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"state": "running", "pid": 2**22 + 1}))
    assert command(monkeypatch, "--resume", run) == 0
    assert_ended_as(run, alone)


# --- what else two processes may do -----------------------------------------------------------------------


@linux
@slow
def test_a_second_job_is_refused_and_the_first_goes_on(tmp_path):
    """The same command, and a resume: one line each, and nothing of the run changes."""
    root, long = tmp_path / "runs", ["--epochs", "200"]
    with named(root, *long) as job:
        job.reach(0)
        for other in (named(root, *long), Job(job.run, "--resume", job.run)):
            other.__enter__()  # whose exit would end the first job's processes too
            assert other.process.wait(timeout=PATIENCE) not in (0, None)
            (line,) = other.lines()
            assert "is working on it" in line
        reached = last_step(job.run)
        faults.wait_until(lambda: last_step(job.run) > reached, what=job.output)
        job.process.terminate()
        job.end()
    steps = [record["step"] for record in records(job.run, "step")]
    assert steps == sorted(set(steps))
    assert [r["event"] for r in records(job.run, "event") if r["event"] in ("start", "resume")] == ["start"]
    assert state(job.run) == "interrupted"


@linux
@slow
def test_two_processes_that_diverge_say_so_once(tmp_path):
    root = tmp_path / "runs"
    with named(root, "--lr", "1e6") as job:
        assert job.end() not in (0, None)
        (line,) = job.lines()
    assert "diverged: the loss is not finite at step" in line
    assert all(weight.isfinite().all() for weight in weights(job.run).values())
    assert state(job.run) == "failed"


# --- many faults ------------------------------------------------------------------------------------------


def strike(job, chance, seconds):
    """kill -9 of one of the four at a random moment of the job; who, and whether the job was still there."""
    victims = chance.choice(["0", "1", "01", "torchrun"])
    if chance.random() < 0.5:
        step, delay = chance.choice(range(0, STEPS, 10)), chance.uniform(0, 0.3)
        faults.wait_until(lambda: last_step(job.run) >= step or job.process.poll() is not None, what=job.output)
        time.sleep(delay)
    else:
        moment = time.monotonic() + chance.uniform(0, seconds)
        faults.wait_until(lambda: time.monotonic() > moment or job.process.poll() is not None)
    if victims == "torchrun":
        hit = job.process.poll() is None
        job.process.kill()
    else:
        faults.wait_until(lambda: kill(job.root, *victims) or job.process.poll() is not None)
        hit = job.process.poll() is None
    return victims, hit


@linux
@slow
def test_twenty_random_kills(tmp_path, whole):
    chance, table = random.Random(20), {}
    seconds = float((whole.parent / "seconds").read_text())
    for i in range(20):
        root = tmp_path / f"{i}" / "runs"
        root.parent.mkdir()
        with named(root, restarts=3) as job:
            victims, hit = strike(job, chance, seconds)
            if victims == "torchrun":
                faults.wait_until(lambda root=root: not processes(root), seconds=60, what=str(processes(root)))
            code = job.end()
        assert victims == "torchrun" or code == 0, job.output
        if code:
            with named(root) as again:
                assert again.end() == 0, again.output
        assert_ended_as(job.run, whole)
        table.setdefault(victims, []).append((hit, lost(job.run)))
        print(i, victims, hit, code, lost(job.run), flush=True)
    print("\nkilled    times  in time  resumed  lost steps mean  max  bit-equal")
    for victims, rows in sorted(table.items()):
        steps = [step for _, found in rows for step in found]
        mean = sum(steps) / max(len(steps), 1)
        hits = sum(hit for hit, _ in rows)
        print(
            f"{victims:8} {len(rows):6} {hits:8} {len(steps):8} {mean:16.1f} {max(steps, default=0):4} {len(rows):10}"
        )


# --- statistics that differ between processes -------------------------------------------------------------


class Crash(Exception):
    pass


def with_batch_normalization(classes, channels=1):
    norm = nn.BatchNorm2d(4)
    return nn.Sequential(nn.Conv2d(channels, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, classes))


@slow
def test_an_attack_in_training_sees_the_same_statistics_after_a_resume(tmp_path):
    """Between two forward passes of DistributedDataParallel the running statistics of its processes differ."""
    small = [JOB[0], "--method", "at", *JOB[1:], "--runs", tmp_path]

    def prepare(last=None):
        models.cnn = with_batch_normalization
        real, steps = train.Watch.add, iter(range(1, STEPS + 1))

        def add(self, *of):
            real(self, *of)
            if next(steps) == last:
                raise Crash

        train.Watch.add = add

    for log, arguments, last, codes in (
        ("1", [*small, "--name", "whole"], None, [0, 0]),
        ("2", [*small, "--name", "run"], 25, [1, 1]),
        ("3", ["--resume", tmp_path / "run"], None, [0, 0]),
    ):
        with Pair(tmp_path / log, *arguments, prepare=lambda rank, last=last: prepare(last)) as job:
            assert job.end() == codes, job.output
    assert lost(tmp_path / "run") == [0]
    assert_ended_as(tmp_path / "run", tmp_path / "whole")


# --- two nodes --------------------------------------------------------------------------------------------


def node(root, port, *more):
    """One of two agents with a process each; the rendezvous notices within seconds who is gone."""
    quick = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"
    options = ["--nnodes", "1:2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "faults"]
    options += ["--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_conf", quick]
    return named(root, *more, options=options, restarts=3)


def distance(a, b):
    """Of two runs' weights, relative to the length of the first."""
    a, b = (torch.cat([weight.double().flatten() for weight in weights(run).values()]) for run in (a, b))
    return ((a - b).norm() / a.norm()).item()


@linux
@slow
@pytest.mark.parametrize("victim", ["node", "process"])
def test_a_node_that_is_lost(monkeypatch, tmp_path, whole, victim):
    """Without its second node a job goes on in one process: the weights are those of two up to rounding, which may
    grow as much as between a run of one process and a run of two.  A lost process comes back, and bits are equal.
    """
    root, alone = tmp_path / "runs", tmp_path / "alone"
    assert command(monkeypatch, *JOB, "--runs", tmp_path, "--name", "alone") == 0
    port = free_port()
    with node(root, port) as host:
        faults.wait_until(lambda: "torchrun" in processes(root).values())
        time.sleep(1)  # the first to come hosts the rendezvous
        with node(root, port) as guest:
            host.reach(20)
            children = {what: pid for pid, what in processes(root).items() if parent(pid) == guest.process.pid}
            assert len(children) == 1
            (pid,) = children.values()
            os.kill(pid, signal.SIGKILL)
            if victim == "node":
                guest.process.kill()
            assert host.process.wait(timeout=PATIENCE) == 0, host.output
            assert (guest.process.wait(timeout=PATIENCE) == 0) == (victim == "process"), guest.output
        host.end()
    print(lost(host.run), distance(whole, host.run), distance(whole, alone))
    assert lost(host.run)
    if victim == "process":
        assert_ended_as(host.run, whole)
    else:
        assert state(host.run) == "finished"
        assert 0 < distance(whole, host.run) < 3 * distance(whole, alone) < 1e-3


@linux
@slow
def test_a_node_that_comes_back(monkeypatch, tmp_path):
    """Then the agents have counted their restarts differently.

    With the store that it shares by default torchrun itself (2.15) fails when a node joins that it did not begin with.
    """
    monkeypatch.setitem(ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    root, port = tmp_path / "runs", free_port()

    def resumed(processes):
        events = [r["message"] for r in records(root / "run", "event") if r["event"] == "resume"]
        return any(message.endswith(f"{processes} processes") for message in events)

    with node(root, port, "--epochs", "100") as host:
        faults.wait_until(lambda: "torchrun" in processes(root).values())
        time.sleep(1)  # the first to come hosts the rendezvous
        with node(root, port, "--epochs", "100") as guest:
            faults.wait_until(lambda: last_step(host.run) >= 20, what=host.output)
            for pid in [pid for pid in processes(root) if parent(pid) == guest.process.pid]:
                os.kill(pid, signal.SIGKILL)
            guest.process.kill()
            faults.wait_until(lambda: resumed(1), what=host.output)
        with node(root, port, "--epochs", "100") as again:
            faults.wait_until(lambda: resumed(2), what=host.output)
            reached = last_step(host.run)
            faults.wait_until(lambda: last_step(host.run) > reached, what=host.output)
            assert host.process.poll() is None
            assert again.process.poll() is None


def parent(pid):
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None
