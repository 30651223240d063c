"""What a long run needs and the paper does not mention: processes, files, checkpoints, signals, errors in one line.

train.py and evaluate.py both stand on it; they never import each other and meet in the run directory, which
README.md documents file by file and field by field.
"""

import contextlib
import errno
import json
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

HEARTBEAT = 2.0  # seconds between two updates of status.json
SAME_SIGNAL = 1.0  # seconds in which a second signal is the same one: a terminal and torchrun may both send it
LOST = "closed by peer", "reset by peer", "Broken pipe", "Socket closed", "imed out", "onnection refused", "onnectFull"
# gloo's words for a lost process


# --- errors, in one line ----------------------------------------------------------------------------------


class Failure(Exception):
    """Ends the program with one line on stderr and an exit code: 1 failed, 2 bad usage, 3 diverged, 128 + signal."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


class Unusable(Failure, ValueError):
    """Bad input: a file, a folder, a value that cannot be used.  The message is one line and says what to do."""

    def __init__(self, message: str):
        super().__init__(message, 2)


def run_command(command: Callable[..., None]) -> int:
    """Run a typer command and return its exit code: whatever a user can cause ends in one line, not in a traceback."""
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=FutureWarning)  # torch's own
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    try:
        code = app(standalone_mode=False) or 0
    except Exception as error:
        message, code = explain(error)
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # All is written and closed.  Threads of torch have been seen to abort while the interpreter ends, which
        # makes a failure of a finished job: leave without that.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def explain(error: Exception) -> tuple[str, int]:
    """The line and the exit code for an error that a user can cause; any other is raised again."""
    if isinstance(error, Failure):
        return str(error), error.code
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory on the device; try a smaller --batch-size", 1
    if isinstance(error, OSError):
        return f"{error.filename or 'writing'}: {error.strerror or error}", 1
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in LOST)):
        return "another process of this job is gone; start the same command again, or resume the run", 1
    if type(error).__name__ == "Abort":  # typer's errors; where their classes live depends on its version
        return "stopped", 130
    if hasattr(error, "format_message"):
        return error.format_message(), error.exit_code
    raise error


def reason_of(error: BaseException) -> str:
    """Any error in one line."""
    try:
        return explain(error)[0]
    except BaseException:
        return " ".join(str(error).split()) or type(error).__name__


# --- processes --------------------------------------------------------------------------------------------


class World:
    """The processes of a run, one or those that torchrun started, and this process's device."""

    def __init__(self, device: str | None = None):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        self.restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None  # torchrun
        self.device = self._device(device)
        self.console = Console(quiet=not self.main, soft_wrap=True, highlight=False)
        if self.size > 1:
            self._find_torchrun()
            store, _, _ = next(dist.rendezvous("env://", self.rank, self.size))
            store = dist.PrefixStore(new_prefix(store, self.rank, self.size), store)
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size)

    @property
    def launch(self) -> str | None:
        """What torchrun's restarts have in common, on one machine; None without torchrun."""
        job = os.environ.get("TORCHELASTIC_RUN_ID")
        return f"{job} {socket.gethostname()} {self.parent}" if job else None

    def _find_torchrun(self) -> None:
        """Raise Failure where torchrun, which serves the store, died while this process started: it would wait long."""
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            try:
                socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), 60).close()
            except OSError:
                raise Failure("torchrun is gone; start the same command again", 1) from None

    def _device(self, name: str | None) -> torch.device:
        try:
            device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError:
            raise Failure(f"--device {name}: no such device; use cpu, cuda or cuda:N", 2) from None
        if device.type == "cuda":
            if self.size > 1:
                device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            if (device.index or 0) >= torch.cuda.device_count():
                raise Failure(f"--device {device}: torch sees {torch.cuda.device_count()} CUDA devices here", 2)
            torch.cuda.set_device(device)
        return device

    def sum(self, values: Tensor) -> list[float]:
        """Elementwise sums over the processes."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> list[float]:
        """Elementwise maxima over the processes."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Tensor, operation: Any) -> list[float]:
        values = values.to(self.device, torch.float64)
        if self.size > 1:
            dist.all_reduce(values, operation)
        return values.tolist()

    def same(self, value: Any) -> Any:
        """The main process's value, in every process."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, 0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in every process."""
        box = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(box, value)
        return box

    def join(self, part: Tensor) -> Tensor:
        """The parts of all processes, which have one shape, one after the other, on the CPU."""
        parts = [torch.empty_like(part) for _ in range(self.size)]
        if self.size > 1 and part.numel():
            dist.all_gather(parts, part.contiguous())
        else:
            parts = [part] * self.size
        return torch.cat(parts).cpu()

    def share_buffers(self, network: nn.Module) -> None:
        """Give every process the main one's running statistics: between two of them they differ."""
        if self.size > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def new_prefix(store: dist.Store, rank: int, size: int) -> str:
    """A prefix that exactly the processes of this attempt agree on: after a restart the store, which torchrun keeps,
    still holds what dead processes wrote, and nodes count their restarts differently.

    The main process proposes a name, and confirms it to those that answered under it.
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + store.timeout.total_seconds()
    if rank == 0:
        store.set("attempt", mine)
        store.set(f"{mine} all", b" ".join(store.get(f"{mine} {other}") for other in range(1, size)))
        return mine
    while time.monotonic() < deadline:
        name = store.get("attempt").decode()  # a dead process's, perhaps, which nobody confirms
        store.set(f"{name} {rank}", mine)
        if store.check([f"{name} all"]) and mine in store.get(f"{name} all").decode():
            return name
        time.sleep(0.02)
    raise dist.DistStoreError("the main process did not confirm this one")


# --- the run directory ------------------------------------------------------------------------------------


class Run:
    """The files of one run.  Only the main process writes them; in the others every method does nothing."""

    def __init__(self, path: Path, world: World):
        self.path, self.writes = path, world.main
        self.step, self.epoch, self.beat = 0, 0.0, 0.0
        self.state, self.phase, self.error = "running", "train", None
        self.torn = False
        with contextlib.suppress(OSError), open(path / "metrics.jsonl", "rb") as file:
            file.seek(-1, os.SEEK_END)
            self.torn = file.read() != b"\n"  # a killed process left half a line

    def make_latest(self) -> None:
        """Let the link `latest`, beside the run, point to it."""
        if self.writes:
            link = self.path.parent / f".latest.{os.getpid()}"
            link.unlink(missing_ok=True)
            link.symlink_to(self.path.name)
            os.replace(link, self.path.parent / "latest")

    def record(self, kind: str, **fields: Any) -> None:
        """Append one line to metrics.jsonl, in one write."""
        if not self.writes:
            return
        nonfinite = [name for name, value in fields.items() if not finite(value)]
        fields |= dict.fromkeys(nonfinite) | ({"nonfinite": nonfinite} if nonfinite else {})
        head = {"kind": kind, "step": self.step, "epoch": round(self.epoch, 6), "time": round(time.time(), 3)}
        line = json.dumps(head | fields, allow_nan=False)
        content = self.torn * b"\n" + line.encode() + b"\n"
        with naming(self.path / "metrics.jsonl") as path, open(path, "ab", buffering=0) as file:
            self.torn = True
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.torn = False

    def event(self, event: str, message: str) -> None:
        self.record("event", event=event, message=message)

    def heartbeat(self, *, force: bool = False) -> None:
        """Replace status.json, at most once in HEARTBEAT seconds unless forced."""
        if not self.writes or (time.time() - self.beat < HEARTBEAT and not force):
            return
        self.beat = time.time()
        status = {"state": self.state, "phase": self.phase, "pid": os.getpid(), "host": socket.gethostname()}
        status |= {"time": round(self.beat, 3), "step": self.step, "error": self.error}
        replace(self.path / "status.json", json.dumps(status).encode(), sync=False)

    def end(self, state: str, event: str, message: str, error: str | None = None) -> None:
        """The last event and the last status of this process."""
        self.state, self.error = state, error
        try:
            self.event(event, message)
        finally:
            self.heartbeat(force=True)


def new_directory(root: Path, name: str | None, default: str, config: dict[str, Any]) -> Path:
    """Make root/name, which must not exist yet, or the first free of root/default, root/default-2, ...

    It appears with its config.json in it, in one step: a process that dies meanwhile leaves nothing in the way.
    """
    made = root / f".new.{os.getpid()}"
    made.mkdir(parents=True, exist_ok=True)
    try:
        for i in range(1, 10_000):
            path = root / (name or (default if i == 1 else f"{default}-{i}"))
            if not path.exists():
                replace(made / "config.json", json.dumps(config | {"name": path.name}, indent=2).encode())
                try:
                    return made.rename(path)
                except OSError as error:
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):  # somebody else was faster
                        raise
            if name:
                message = f"--name {name}: {path} exists; choose another name, or go on with --resume {path}"
                raise Failure(message, 2)
        raise Failure(f"{root}: no free name for {default}", 2)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def finite(value: Any) -> bool:
    """False for a float, or a list with a float in it, that is infinite or not a number."""
    return all(math.isfinite(v) for v in (value if isinstance(value, list) else [value]) if isinstance(v, float))


def replace(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Replace the file at `path` in one step: a reader sees the old content or the new, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path), open(temporary, "wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[Path]:
    """Context: an OSError in it, which a full disk raises without saying where, names the file."""
    try:
        yield path
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def refuse_if_running(path: Path) -> None:
    """Raise Failure while a living process of this machine trains the run."""
    try:
        status = json.loads((path / "status.json").read_text())
        here = status["host"] == socket.gethostname() and status["pid"] != os.getpid()
        if status["state"] == "running" and here and lives(status["pid"], status.get("time", math.inf)):
            raise Failure(f"{path}: process {status['pid']} is still working on it", 2)
    except (OSError, ValueError, KeyError, TypeError):
        return


def state_of(path: Path) -> str | None:
    """What status.json says of a run."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads((path / "status.json").read_text())["state"]
    return None


def lives(pid: int, since: float) -> bool:
    """Whether the process that had this number at the time `since` lives: no zombie, and no later one of that number.

    In a container that starts again the numbers are the same, and often nobody buries the dead.
    Raises ProcessLookupError, or another OSError, where there is none, or another user's.
    """
    os.kill(pid, 0)  # asks whether there is one
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        booted = re.search(r"^btime (\d+)", Path("/proc/stat").read_text(), re.MULTILINE)
        started = int(booted[1]) + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, TypeError, IndexError):  # no Linux
        return True
    return fields[0] != "Z" and started < since + HEARTBEAT


# --- checkpoints ------------------------------------------------------------------------------------------


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write path/checkpoint.pt in one step, and keep the one before as checkpoint.previous.pt.

    Raises Failure, with both as they were, where it cannot be written: a full disk, say.
    """
    current, temporary = path / "checkpoint.pt", path / ".checkpoint.pt"
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if current.exists():
            os.replace(current, path / "checkpoint.previous.pt")
        os.replace(temporary, current)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of some
        temporary.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else reason_of(error)
        message = f"{current}: cannot be written ({reason}); the checkpoint before it is whole: make room, then resume"
        raise Failure(message, 1) from None


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """The checkpoint at `path`, tensors on the CPU; nothing in the file is ever executed.

    Raises Unusable for a file that is missing, damaged, or not a checkpoint of this project.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise Unusable(f"{path}: not a readable checkpoint ({reason})") from None
    if not isinstance(state, dict) or not {"config", "model", "step"} <= state.keys():
        raise Unusable(f"{path}: not a checkpoint of this project (no config, model and step in it)")
    return state


def last_checkpoint(path: Path) -> tuple[dict[str, Any], str | None]:
    """The newest whole checkpoint of a run, and a warning where an unusable one is passed over."""
    try:
        return read_checkpoint(path / "checkpoint.pt"), None
    except Unusable as damaged:
        try:
            state = read_checkpoint(path / "checkpoint.previous.pt")
        except Unusable:
            raise Failure(f"{damaged}, and there is no earlier one", 2) from None
        return state, f"{damaged}; going on from the one before it, of step {state['step']}"


# --- people -----------------------------------------------------------------------------------------------


class Stop:
    """Context: the first SIGINT or SIGTERM is noted in `signal`, so that work can end cleanly; a second one kills.

    The death of torchrun counts as SIGTERM: nobody is left who could stop these processes.
    """

    def __init__(self, world: World):
        self.world, self.noted, self.when = world, 0, 0.0

    @property
    def signal(self) -> int:
        orphaned = self.world.parent is not None and os.getppid() != self.world.parent
        return self.noted or (signal.SIGTERM if orphaned else 0)

    def __enter__(self) -> "Stop":
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _: Any) -> None:
        if self.noted and time.monotonic() - self.when > SAME_SIGNAL:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        if not self.noted:
            self.noted, self.when = signum, time.monotonic()
            self.world.console.print("stopping cleanly; once more stops at once")


@contextlib.contextmanager
def progress_bar(console: Console, name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Context: a function that moves a bar on a terminal and does nothing elsewhere."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(name, total=total)
        yield lambda completed: bar.update(task, completed=completed)


def duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def provenance(world: World) -> dict[str, Any]:
    """What a figure has to be quoted with: command, versions, commit, hardware, time."""
    cpu = f"cpu, {torch.get_num_threads()} threads"
    return {
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "commit": git_commit(),
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else cpu,
        "host": socket.gethostname(),
        "processes": world.size,
        "launch": world.launch,
        "created": round(time.time(), 3),
    }


def git_commit() -> str | None:
    """The commit of this code, with a + where files have changed since; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return None
