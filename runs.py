"""What a long run needs and no paper mentions: processes, signals, errors, and the files of docs/run-directory.md."""

import fcntl
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

HEARTBEAT = 2.0  # seconds between two updates of status.json
DYING, RESTARTED = 5.0, 60.0  # seconds to wait for a run's lock: its process may be ending; after torchrun's restart
SAME_SIGNAL = 1.0  # seconds in which a second signal is the same one: a terminal and torchrun may both send it
GONE = "another process of this job is gone; start the same command again, or resume the run"
LOST = "closed by peer", "reset by peer", "Broken pipe", "Socket closed", "imed out", "onnection refused", "onnectFull"


# --- errors, in one line ----------------------------------------------------------------------------------


def one_line(text: str) -> str:
    """The text on one line that every terminal of UTF-8 can show: file names may hold any bytes."""
    return " ".join(text.encode(errors="backslashreplace").decode().split())


class Failure(Exception):
    """Ends the program with one line on stderr and an exit code: 1 failed, 2 bad usage, 3 diverged, 128 + signal."""

    def __init__(self, message: str, code: int | None = None):
        super().__init__(one_line(message))
        self.code = code or (2 if isinstance(self, Unusable) else 1)


class Unusable(Failure, ValueError):
    """Bad input: a file, a folder, a value that cannot be used.  The message is one line and says what to do."""


def explain(error: BaseException) -> tuple[str, int | None]:
    """One line for an error, and the exit code; None, and any text, for an error that no user can cause."""
    text = one_line(getattr(error, "format_message", error.__str__)()) or type(error).__name__  # the former: typer's
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return "out of memory; try a smaller --batch-size (train.py) or --size", 1
    gone = isinstance(error, RuntimeError | ConnectionError) and any(words in text for words in LOST)
    if gone or isinstance(error, dist.DistError):
        return GONE, 1
    if isinstance(error, OSError):
        where = "MASTER_ADDR" if isinstance(error, socket.gaierror) else "writing"
        return f"{error.filename or where}: {error.strerror or text}", 1
    if type(error).__name__ == "Abort":  # typer's, wherever its version keeps the class
        return "stopped", 130
    return text, getattr(error, "code" if isinstance(error, Failure) else "exit_code", None)


class Screen(io.TextIOWrapper):
    """A stream that may go away (`| head`, a closed window, a full disk), or lack a letter: the work goes on."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def run_command(command: Callable[..., None]) -> int:
    """Run a typer command and return its exit code: whatever a user can cause ends in one line, not in a traceback."""
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=FutureWarning)  # torch's own
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        if (stream := getattr(sys, name)) and stream is getattr(sys, f"__{name}__"):  # else a test's
            setattr(sys, name, Screen(stream.buffer, stream.encoding, errors, line_buffering=True))
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    try:
        code = app(standalone_mode=False) or 0
    except Exception as error:
        message, code = explain(error)
        if code is None:
            raise
        tell(one_line(message.replace("Value error, ", "")))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        print(end="", flush=True)
        os._exit(code)  # all is written; threads of torch have been seen to abort while the interpreter ends
    return code


def tell(message: str) -> None:
    """Print the line of an error: the main process its own, another what the main one has not said soon after."""
    rank = os.environ.get("RANK", "0") if "MASTER_ADDR" in os.environ else "0"
    line = f"{Path(sys.argv[0]).name}: {f'process {rank}: ' * (rank != '0')}{message}"
    if rank == "0":
        print(line, file=sys.stderr, flush=True)
    if World.store and message != GONE:  # before there is one all have the same error
        with suppress(RuntimeError):  # it may be gone: without torchrun the main process has it, and so waits a second
            World.store.add(message, int(rank == "0"))
            time.sleep(0.5 if rank != "0" else "TORCHELASTIC_RUN_ID" not in os.environ)
            if not World.store.add(message, 0):
                print(line, file=sys.stderr, flush=True)


# --- processes --------------------------------------------------------------------------------------------


class World:
    """The processes of a run, which share values (`same`: the main one's), sums and maxima; this process's device."""

    store: ClassVar[dist.Store | None] = None  # of several processes

    def __init__(self, device: str | None = None):
        self.rank, self.size = launched()
        self.main, job = self.rank == 0, os.environ.get("TORCHELASTIC_RUN_ID")
        self.restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        self.parent = os.getppid() if job else None  # torchrun
        self.launch = f"{job} {socket.gethostname()} {self.parent}" if job else None  # the same after its restarts
        self.console = Console(quiet=not self.main, soft_wrap=True, highlight=False, markup=False, emoji=False)
        if self.size > 1:
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # without torchrun's store one would wait long
                socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), 60).close()
            store, _, _ = next(dist.rendezvous("env://", self.rank, self.size))
            World.store = dist.PrefixStore(new_prefix(store, self.rank, self.size), store)
        elif "RANK" not in os.environ and (tasks := os.environ.get("SLURM_NTASKS", "1")) != "1":
            self.console.print(f"warning: SLURM_NTASKS is {tasks} and this is no torchrun: each task works alone")
        self.device = self._device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.size > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=World.store, rank=self.rank, world_size=self.size)

    def _device(self, name: str) -> torch.device:
        known = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        own = f"cuda:{os.environ.get('LOCAL_RANK', self.rank)}"
        full = own if name == "cuda" or (self.size > 1 and name.startswith("cuda")) else name
        if full not in known:
            raise Unusable(f"--device {name}: no such device; this machine has {', '.join(known)}")
        if full != "cpu":
            torch.cuda.set_device(full)
        return torch.device(full)

    def max(self, values: Tensor) -> list[float]:
        return torch.stack(self.gather(values.cpu().double())).amax(0).tolist()

    def sum(self, values: Tensor) -> list[float]:
        return torch.stack(self.gather(values.cpu().double())).sum(0).tolist()

    def same(self, value: Any) -> Any:
        return self.gather(value)[0]

    def gather(self, value: Any) -> list[Any]:
        box = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(box, value)
        return box

    def share_buffers(self, network: nn.Module) -> None:
        """Give every process the main one's running statistics: between two of them they differ."""
        for buffer in network.buffers() if self.size > 1 else ():
            dist.broadcast(buffer, 0)


def launched() -> tuple[int, int]:
    """This process's rank, and how many there are, from torchrun's variables.  Raises Unusable where some lack."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    sound = rank.isdecimal() and size.isdecimal() and int(rank) < int(size)
    if not sound or (int(size) > 1 and missing):
        what = f"{', '.join(missing)} not set" if missing else f"RANK is {rank}"
        raise Unusable(f"WORLD_SIZE is {size}, and {what}: start the job with torchrun, which sets them, or unset all")
    return int(rank), int(size)


def new_prefix(store: dist.Store, rank: int, size: int) -> str:
    """A prefix that exactly the processes of this attempt agree on: torchrun's store keeps what dead ones wrote."""
    mine = os.urandom(16).hex()
    if rank == 0:
        store.set("attempt", mine)  # a proposal, confirmed to those that answer under it
        store.set(f"{mine} all", b" ".join(store.get(f"{mine} {other}") for other in range(1, size)))
        return mine
    for _ in range(15_000):  # five minutes
        name = store.get("attempt").decode()  # a dead process's, perhaps, which nobody confirms
        store.set(f"{name} {rank}", mine)
        if store.check([f"{name} all"]) and mine in store.get(f"{name} all").decode():
            return name
        time.sleep(0.02)
    raise dist.DistStoreError("the main process did not confirm this one")


# --- the run directory ------------------------------------------------------------------------------------


class Run:
    """The log and the status of one run; only the main process writes, in the others every method does nothing."""

    def __init__(self, path: Path, world: World):
        self.path, self.world, self.step, self.epoch = path, world, 0, 0.0
        self.beat, self.time = -math.inf, time.time()  # of the last heartbeat (no clock's), of the last record
        self.state, self.phase, self.error = "running", "train", None

    def make_latest(self) -> None:
        """Let `latest`, beside the run, be a link to it; where none can be made, that is told."""
        latest, new = self.path.with_name("latest"), self.path / f".latest.{os.getpid()}.tmp"
        try:
            if self.world.main:
                new.symlink_to(self.path.name)
                os.replace(new, latest)
        except OSError as error:  # no links on this disk, or a folder is there, which a copy has made of the link
            new.unlink(missing_ok=True)
            self.warn(f"{latest}: left as it is, {error.strerror}; this run is {self.path}")

    def record(self, kind: str, **fields: Any) -> None:
        """Append one line to metrics.jsonl, in one write."""
        if not self.world.main:
            return
        numbers = {k: torch.tensor(v, dtype=torch.float64) for k, v in fields.items() if isinstance(v, float | list)}
        nonfinite = [name for name, number in numbers.items() if not number.isfinite().all()]
        fields |= dict.fromkeys(nonfinite) | ({"nonfinite": nonfinite} if nonfinite else {})
        self.time = max(self.time, time.time())  # a clock may be set back
        head = {"kind": kind, "step": self.step, "epoch": round(self.epoch, 6), "time": round(self.time, 3)}
        line = json.dumps(head | fields, allow_nan=False).encode() + b"\n"
        path = self.path / "metrics.jsonl"
        try:
            with open(path, "a+b") as file:
                end = file.seek(0, os.SEEK_END)
                half = end and os.pread(file.fileno(), 1, end - 1) != b"\n"  # a line, left by a kill or a full disk
                file.write(b"\n" + line if half else line)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None

    def event(self, event: str, message: str) -> None:
        self.record("event", event=event, message=message)

    def warn(self, message: str) -> None:
        self.world.console.print(f"warning: {message}")
        self.event("warning", message)

    def heartbeat(self, *, force: bool = False) -> None:
        """Replace status.json, at most once in HEARTBEAT seconds unless forced."""
        now = time.monotonic()
        if not self.world.main or (now - self.beat < HEARTBEAT and not force):
            return
        self.beat = now
        status = {"state": self.state, "phase": self.phase, "pid": os.getpid(), "host": socket.gethostname()}
        status |= {"time": round(time.time(), 3), "step": self.step, "error": self.error}
        replace(self.path / "status.json", json.dumps(status).encode(), sync=False)

    def end(self, state: str, event: str, message: str) -> None:
        """The last status and the last event of this process; of a failure, the message is the error."""
        self.state, self.error = state, message if state == "failed" else None
        self.heartbeat(force=True)
        self.event(event, message)


def new_directory(root: Path, name: str | None, default: str, config: dict[str, Any]) -> Path:
    """Make root/name, or the first free of root/default, root/default-2, ...: in one step, with config.json in it."""
    check_name(name or default)
    made = root / f".new.{os.getpid()}"
    made.mkdir(parents=True, exist_ok=True)
    try:
        names = [name] if name else (f"{default}-{i}".removesuffix("-1") for i in range(1, sys.maxsize))
        for path in map(root.joinpath, names):
            replace(made / "config.json", json.dumps(config | {"name": path.name}, indent=2).encode())
            try:
                return made.rename(path)
            except OSError:
                if not os.path.lexists(path):
                    raise
        raise Failure(f"--name {name}: {path} exists; choose another, or go on with --resume {path}", 2)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def check_name(name: str) -> None:
    """Raise Unusable for a run's name that would lie elsewhere, be hidden, break lines, or be taken for the newest."""
    fits = re.fullmatch(r"(?!latest$)[^./\\\s][^/\\]*(?<!\s)", name, re.IGNORECASE) and name.isprintable()
    if not fits or len(os.fsencode(name)) > 200:
        rule = "has no dot in front, no slash, no control character, no blank around it, 200 bytes, and is not latest"
        raise Unusable(f"--name {name!r}: a run's name {rule}")


def replace(path: Path, content: bytes, *, sync: bool = True, previous: Path | None = None) -> None:
    """Replace a file in one step: a reader sees the old content or the new.  With `previous`, the old is kept there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except OSError as error:  # of a full disk it does not say where
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def owned(path: Path, world: World) -> Iterator[None]:
    """Context: this job, and no other, works on the run at `path`.  To be entered before the data is read.

    The main process holds a flock on path/lock.  Raises Failure, in every process, if another job's does not end soon.
    """
    with open(path / "lock", "a+b", buffering=0) if world.main else nullcontext() as file:
        if owner := world.same(owner_of(file, RESTARTED if world.restarts else DYING) if file else None):
            raise Failure(f"{path}: {owner} is working on it; let it end, or stop it", 2)
        if file:
            os.register_at_fork(after_in_child=file.close)  # a child that outlives this process has no lock
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            for left in path.glob(".*.tmp"):  # by a process that was killed
                left.unlink(missing_ok=True)
        yield


def owner_of(file: IO[bytes], patience: float = 0.0, *, shared: bool = False) -> str | None:
    """Who else has the lock of an open file, for so many seconds; None: this process has it, or none can be had."""
    for left in range(int(20 * patience), -1, -1):
        try:
            return fcntl.flock(file, fcntl.LOCK_NB | (fcntl.LOCK_SH if shared else fcntl.LOCK_EX))
        except BlockingIOError:
            time.sleep(0.05 * (left > 0))
        except OSError as error:
            problem = f"no lock can be had here ({error.strerror}): start no second process on this run"
            return print(f"warning: {file.name}: {problem}", file=sys.stderr)
    file.seek(0)
    return file.read().decode() or "another process"


def refuse_if_running(path: Path) -> None:
    """Raise Failure while a process works on the run."""
    with suppress(OSError), open(path / "lock", "rb") as file:
        if owner := owner_of(file, shared=True):
            raise Failure(f"{path}: {owner} is still working on it", 2)


def state_of(path: Path) -> str | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads((path / "status.json").read_text())["state"]


class Checkpoints:
    """The newest checkpoint of a run, and the one before it.  Only the main process writes them."""

    def __init__(self, path: Path, world: World):
        self.world, self.saved = world, time.monotonic()
        self.newest, self.previous = path / "checkpoint.pt", path / "checkpoint.previous.pt"

    def due(self, minutes: float) -> bool:
        """Whether the main process saved its last one, or began, longer ago than that; False in the others."""
        return self.world.main and time.monotonic() - self.saved > 60 * minutes

    def save(self, state: dict[str, Any]) -> None:
        """Make it the newest, and the newest the previous one.  Raises Failure, with both as they were: a full disk."""
        if not self.world.main:
            return
        torch.save(state, content := io.BytesIO())
        try:
            replace(self.newest, content.getbuffer(), previous=self.previous)
        except OSError as error:
            advice = "the checkpoint before it is whole: make room, then resume"
            raise Failure(f"{self.newest}: cannot be written ({error.strerror}); {advice}", 1) from None
        self.saved = time.monotonic()

    def load(self) -> tuple[dict[str, Any], str | None]:
        """The newest whole one, and a warning where an unusable one is passed over.  Raises Failure: there is none."""
        try:
            return read_checkpoint(self.newest), None
        except Unusable as damaged:
            try:
                state = read_checkpoint(self.previous)
            except Unusable:
                raise Failure(f"{damaged}, and there is no earlier one", 2) from None
            return state, f"{damaged}; going on from the one before it, of step {state['step']}"


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """The checkpoint at `path`, on the CPU; nothing in it is ever executed.  Raises Unusable for any other file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file, any
        reason = getattr(error, "strerror", None) or f"damaged: {type(error).__name__}"
        raise Unusable(f"{path}: not a readable checkpoint ({reason})") from None
    if not isinstance(state, dict) or not {"config", "model", "step"} <= state.keys():
        raise Unusable(f"{path}: not a checkpoint of this project (no config, model and step in it)")
    return state


class Stop(ExitStack):
    """Context: the first SIGINT, SIGTERM or SIGHUP is noted in `signal`, so that work can end cleanly.

    A later SIGINT or SIGTERM kills.  Ignored signals, as by nohup, stay so.  The death of torchrun counts as SIGTERM.
    """

    def __init__(self, world: World):
        super().__init__()
        self.world, self.noted, self.when = world, 0, 0.0

    @property
    def signal(self) -> int:
        return self.noted or signal.SIGTERM * (self.world.parent not in (None, os.getppid()))

    def __enter__(self) -> "Stop":
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if (before := signal.getsignal(signum)) != signal.SIG_IGN:
                self.callback(signal.signal, signum, before)
                signal.signal(signum, self._note)
        return self

    def _note(self, signum: int, _: Any) -> None:
        if not self.noted:
            self.noted, self.when = signum, time.monotonic()
            if self.world.main and sys.__stderr__:  # else 2 is another file
                with suppress(OSError):  # past the buffers, which the signal may have found half changed
                    os.write(2, b"stopping cleanly; once more stops at once\n")
        elif time.monotonic() - self.when > SAME_SIGNAL and signum != signal.SIGHUP:  # which may come several times
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)


@contextmanager
def progress_bar(console: Console, name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Context: a function that moves a bar on a terminal and does nothing elsewhere."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(name, total=total)
        yield lambda completed, **fields: bar.update(task, completed=completed, **fields)


def duration(seconds: float) -> str:
    unit, length = ("h", 3600) if seconds >= 7200 else ("min", 60) if seconds >= 120 else ("s", 1)
    return f"{seconds / length:.{0 if unit == 's' else 1}f} {unit}"


def provenance(world: World) -> dict[str, Any]:
    """What a figure has to be quoted with: command, versions, commit, hardware, time."""
    cpu, cuda = f"cpu, {torch.get_num_threads()} threads", world.device.type == "cuda"
    made = {"command": shlex.join(["python", *sys.argv])}
    made |= {"versions": {"python": sys.version.split()[0], "torch": str(torch.__version__)}, "commit": git_commit()}
    made |= {"device": torch.cuda.get_device_name(world.device) if cuda else cpu, "host": socket.gethostname()}
    return made | {"processes": world.size, "launch": world.launch, "created": round(time.time(), 3)}


def git_commit() -> str | None:
    """The commit of this code, with a + where files have changed since; None outside a checkout."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
