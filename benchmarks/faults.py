"""Two hundred faults in a row: kills, stops and double starts of a job of two processes on digits, and their resumes.

    python benchmarks/faults.py                                   until 200 faults have hit; about ten minutes
    python benchmarks/faults.py --faults 20 --seed 1 --out DIR    fewer of them, others, and where they are kept

A story is one run, from its first process to its last, through up to five faults at random moments.  It has to end
as a run that was left alone: with its weights, bit for bit, and with each of its records, once.  A story that does
not stops the program, and its folder stays.  Stopped, the same command goes on after the last story that ended.

The processes are forked from this one, which has imported torch, and started again by it, so that a start costs a
second and not ten.  What torchrun adds, its own death and its restarts, is in tests/test_faults.py.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import sklearn.datasets  # noqa: F401  here, and not in every process
import torch
import torch._dynamo
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runs
import train

ROOT = Path(__file__).resolve().parent.parent
STEPS, EVERY = 160, 10  # of the job, and between two of its records and checkpoints: what a fault may cost
JOB = ["digits", "--subset", "320", "--batch-size", "4", "--epochs", "2", "--checkpoint-minutes", "1e-9"]
FAULTS = {  # name: whom to signal, and how; a second job beside the first, later or at once
    "kill -9 of rank 0": ([0], signal.SIGKILL),
    "kill -9 of rank 1": ([1], signal.SIGKILL),
    "kill -9 of both": ([0, 1], signal.SIGKILL),
    "SIGTERM to both": ([0, 1], signal.SIGTERM),
    "SIGTERM to rank 1": ([1], signal.SIGTERM),
    "SIGINT to both": ([0, 1], signal.SIGINT),
    "SIGHUP to both": ([0, 1], signal.SIGHUP),
    "started again beside": None,
    "started twice at once": None,
}
PATIENCE = 120.0  # seconds, for anything
GRACE = 10.0  # seconds that a process may take to notice that the other is gone; then it is told, as by torchrun


# --- what a run has written -------------------------------------------------------------------------------


def records(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run, without a line that a killed process left half written."""
    found = []
    with contextlib.suppress(OSError):
        for line in (run / "metrics.jsonl").read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return [record for record in found if kind in (None, record["kind"])]


def last_step(run: Path) -> int:
    return max((record["step"] for record in records(run, "step")), default=-1)


def state(run: Path) -> str | None:
    return runs.state_of(run)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return runs.read_checkpoint(run / "checkpoint.pt")["model"]


def same(a: Path, b: Path) -> bool:
    """Whether two runs have the same weights, bit for bit."""
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def lost(run: Path) -> list[int]:
    """For each time the run was resumed: how many of the recorded steps before it had to be done again."""
    found, reached = [], 0
    for record in records(run):
        if record["kind"] == "step":
            reached = max(reached, record["step"])
        elif record.get("event") == "resume":
            found.append(reached - record["step"])
            reached = record["step"]
    return found


def surviving(run: Path, kind: str) -> list[dict[str, Any]]:
    """The records of a kind that count: a resume at a step voids those of later steps, a record those of its step."""
    kept: list[dict[str, Any]] = []
    for record in records(run):
        resumed = record.get("event") == "resume"
        if resumed or record["kind"] == kind:
            kept = [old for old in kept if old["step"] < record["step"] + resumed]
        if record["kind"] == kind:
            kept.append(record)
    return kept


def assert_ended_as(run: Path, whole: Path) -> None:
    """The run is finished; its weights and (without the work that was lost) its records are those of `whole`."""
    assert state(run) == "finished", state(run)
    assert same(run, whole), "other weights"
    assert all(0 <= steps <= EVERY for steps in lost(run)), lost(run)
    ours, theirs = ([(r["step"], r["test_loss"]) for r in surviving(path, "epoch")] for path in (run, whole))
    assert ours == theirs, (ours, theirs)
    ours, theirs = ({r["step"]: r["loss"] for r in surviving(path, "step")} for path in (run, whole))
    assert len(surviving(run, "step")) == len(ours), "a record twice"
    between = {step for step in ours.keys() - {1} if step % EVERY}  # stopped there: the next record is of fewer images
    assert ours.keys() - between == theirs.keys(), (ours.keys(), theirs.keys())
    assert {step for step in theirs if ours[step] != theirs[step]} <= {step - step % -EVERY for step in between}
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


# --- a job ------------------------------------------------------------------------------------------------


def wait_until(condition: Callable[[], Any], *, seconds: float = PATIENCE, what: str = "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s {what}")
        time.sleep(0.005)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Pair:
    """Context: two processes that run train.py's command line; afterwards both are gone.

    prepare(rank): is called in each before.
    """

    def __init__(self, log: Path, *arguments: Any, prepare: Callable[[int], None] = lambda rank: None):
        self.log, self.codes, self.told = log, [None, None], 0.0
        port = free_port()
        self.pids = [self._fork(rank, port, [*map(str, arguments)], prepare) for rank in range(2)]

    def _fork(self, rank: int, port: int, arguments: list[str], prepare: Callable[[int], None]) -> int:
        if pid := os.fork():
            return pid
        try:
            os.setpgid(0, 0)
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", closefd=False) for fd in (1, 2))
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            torch.set_num_threads(1)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            sys.argv = ["train.py", *arguments]
            prepare(rank)
            runs.run_command(train.main)  # leaves with the exit code
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(1)

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *_: Any) -> None:
        self.signal(signal.SIGKILL, [0, 1])
        wait_until(lambda: not self.living())

    def living(self) -> list[int]:
        """The ranks that have not ended."""
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                self.codes[rank] = os.waitstatus_to_exitcode(status) if ended else None
        return [rank for rank in range(2) if self.codes[rank] is None]

    def signal(self, signum: int, ranks: list[int]) -> int:
        """Signal those of these ranks that live; how many."""
        there = [rank for rank in self.living() if rank in ranks]
        for rank in there:
            os.kill(self.pids[rank], signum)
        return len(there)

    def end(self) -> list[int]:
        """Both exit codes.  One that outlives the other by GRACE is told to stop, then killed: torchrun does that."""
        since, signs = None, iter((signal.SIGTERM, signal.SIGKILL))
        deadline = time.monotonic() + PATIENCE
        while there := self.living():
            since = since or (time.monotonic() if len(there) == 1 else None)
            if since and time.monotonic() > since + GRACE:
                self.told, since = self.told + 1, time.monotonic()
                self.signal(next(signs), there)
            assert time.monotonic() < deadline, self.output
            time.sleep(0.005)
        return self.codes

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")


# --- stories ----------------------------------------------------------------------------------------------


class Story:
    """One run through its faults."""

    def __init__(self, folder: Path, chance: random.Random, seconds: float):
        self.folder, self.chance, self.seconds = folder, chance, seconds
        self.run, self.jobs, self.found = folder / "run", 0, Counter()

    def command(self) -> list[Any]:
        """How somebody may go on: the same command, or a resume."""
        if list(self.run.glob("checkpoint*.pt")) and self.chance.random() < 0.5:
            return ["--resume", self.run]
        return [*JOB, "--runs", self.folder, "--name", "run"]

    def start(self) -> Pair:
        self.jobs += 1
        return Pair(self.folder / f"{self.jobs}.log", *self.command())

    def wait(self, job: Pair) -> None:
        """For a random moment of the job: some step and a little more, or any time since its start."""
        if self.chance.random() < 0.7:
            done = min(max(last_step(self.run), 0), STEPS - EVERY)
            step, more = self.chance.randrange(done, STEPS, EVERY), self.chance.uniform(0, 0.1)
            wait_until(lambda: last_step(self.run) >= step or len(job.living()) < 2)
        else:
            more = self.chance.uniform(0, self.seconds)
        moment = time.monotonic() + more
        wait_until(lambda: time.monotonic() > moment or len(job.living()) < 2)

    def tell(self, faults: int) -> Counter:
        """Go on until the run is finished; what hit it, and how it was resumed."""
        while state(self.run) != "finished" or self.jobs == 0:
            assert self.jobs < 50, "no end"
            with self.start() as job:
                name = self.chance.choice([*FAULTS]) if sum(self.found.values()) < faults else None
                if name == "started twice at once":
                    with self.start() as twin:
                        self.beside(job, twin, name)
                elif name:
                    self.wait(job)
                    hit = len(job.living()) == 2
                    if name == "started again beside":
                        with self.start() as other:
                            self.beside(job, other, name if hit else None)
                    else:
                        ranks, signum = FAULTS[name]
                        job.signal(signum, ranks)
                        self.found[name] += hit
                codes = job.end()
                assert f'File "{ROOT}' not in job.output, job.output
                assert set(codes) <= {0, 1, 2, 128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGHUP} | {
                    -signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP, -signal.SIGINT
                }, (codes, job.output)  # fmt: skip
        return self.found

    def beside(self, job: Pair, other: Pair, name: str | None) -> None:
        """Of two jobs at the same time one is refused, both of its processes, in one line; the other goes on."""
        first = job if name == "started twice at once" else other
        wait_until(lambda: len(first.living()) < 2 or len(other.living()) < 2)
        refused = [pair for pair in (job, other) if 2 in pair.codes]
        for pair in refused:
            assert pair.end() == [2, 2], (pair.codes, pair.output)
            (line,) = [line for line in pair.output.splitlines() if line.startswith("train.py: ")]
            assert "is working on it" in line or "exists; choose another name" in line, line
        assert len(refused) <= 1
        if name and refused:
            self.found[name] += 1
        other.end()


def undisturbed(out: Path) -> tuple[Path, float]:
    """A job that is left alone, and the seconds that it takes."""
    run, begun = out / "whole" / "run", time.monotonic()
    shutil.rmtree(run.parent, ignore_errors=True)
    run.parent.mkdir(parents=True)
    with Pair(run.parent / "log", *JOB, "--runs", run.parent, "--name", "run") as job:
        assert job.end() == [0, 0], job.output
    return run, time.monotonic() - begun


def stories(out: Path, faults: int, seed: int) -> Iterator[dict[str, Any]]:
    """What every story was, until so many faults have hit; those of an earlier call, and then more."""
    out.mkdir(parents=True, exist_ok=True)
    told = out / f"stories-{seed}.jsonl"
    count, number = 0, 0
    if told.exists():
        for line in told.read_text().splitlines():
            yield (row := json.loads(line))
            count, number = count + sum(row["faults"].values()), number + 1
    whole, seconds = undisturbed(out) if count < faults else (out, 0.0)
    while count < faults:
        folder, begun = out / f"story-{seed}-{number}", time.monotonic()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        story = Story(folder, random.Random(1000 * seed + number), seconds)
        found = story.tell(min(5, faults - count))
        assert_ended_as(story.run, whole)
        written = [(r["kind"], r["step"]) for r in records(story.run) if r["kind"] != "event"]
        row = {"story": number, "faults": +found, "starts": story.jobs, "lost": lost(story.run)}
        row |= {"records": len(set(written)), "seconds": round(time.monotonic() - begun, 2)}
        with open(told, "a") as file:
            file.write(json.dumps(row) + "\n")
        shutil.rmtree(folder)
        yield row
        count, number = count + sum(found.values()), number + 1


def main(
    faults: Annotated[int, typer.Option(help="How many have to hit.")] = 200,
    seed: Annotated[int, typer.Option(help="Of what happens, and of when.")] = 0,
    out: Annotated[Path, typer.Option(help="Where runs and results are kept.")] = Path("faults"),
) -> None:
    """Hit runs with faults at random moments, and compare how they end with a run that was left alone."""
    runs.DYING = 0.5  # a second job is refused sooner
    train.PROBE_IMAGES = 20  # a shorter look after each epoch
    os.nice(5)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and its jobs with it
    rows = []
    for row in stories(out.absolute(), faults, seed):
        rows.append(row)
        print(json.dumps(row), flush=True)
    total: Counter[str] = sum((Counter(row["faults"]) for row in rows), Counter())
    again = [steps for row in rows for steps in row["lost"]]
    print("\n".join(f"{name:24}{count:5}" for name, count in sorted(total.items())))
    starts, seconds = sum(row["starts"] for row in rows), sum(row["seconds"] for row in rows)
    print(f"{sum(total.values())} faults in {len(rows)} runs, all bit-equal, no record lost or double")
    mean, most = sum(again) / max(len(again), 1), max(again, default=0)
    print(f"{len(again)} resumes; steps done again: mean {mean:.1f}, most {most}")
    print(f"{starts} jobs of two processes, {seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(runs.run_command(main))
