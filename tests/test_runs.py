"""What runs.py promises: one owner, whole files, errors of one line, and that no screen, clock or name ends a run.

All in this process, or in a child that it forks: torchrun and its jobs are in test_faults.py.
"""

import contextlib
import errno
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

import runs

ROOT = Path(__file__).resolve().parent.parent
HERE = f"process {os.getpid()} on {socket.gethostname()}"
PATIENCE = 60  # seconds, for anything: machines differ


@pytest.fixture
def world():
    return runs.World("cpu")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Nobody is dying here: refuse at once."""
    monkeypatch.setattr(runs, "DYING", 0.0)


def child(do):
    """A forked process that runs `do`, which tells its exit code; its number."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = do() or 0
        finally:
            os._exit(code)
    return pid


def end_of(pid):
    """A child's exit code, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words", "code"),
    [
        (runs.Failure("two\nlines", 3), "two lines", 3),
        (runs.Unusable("bad"), "bad", 2),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "--batch-size", 1),
        (RuntimeError("alloc_cpu.cpp:1: DefaultCPUAllocator: can't allocate memory"), "--batch-size", 1),
        (MemoryError(), "out of memory", 1),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: No space left on device", 1),
        (socket.gaierror(-2, "Name or service not known"), "MASTER_ADDR: Name or service not known", 1),
        (OSError(errno.ENOSPC, "No space left on device"), "writing: No space left on device", 1),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "another process of this job is gone", 1),
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]"), "another process of this job is gone", 1),
        (torch.distributed.DistStoreError("no"), "another process of this job is gone", 1),
        (typer.BadParameter("no\nnumber"), "no number", 2),
        (typer.Abort(), "stopped", 130),
        (ZeroDivisionError(), "ZeroDivisionError", None),
        (RuntimeError("mat1 and mat2"), "mat1 and mat2", None),
    ],
)  # fmt: skip
def test_an_error_is_one_line_and_a_code_unless_it_is_ours(error, words, code):
    line, found = runs.explain(error)
    assert words in line
    assert len(line.splitlines()) == 1
    assert found == code


# --- the screen -------------------------------------------------------------------------------------------


@given(st.text(st.characters()), st.sampled_from(["utf-8", "latin-1", "ascii", "cp1252", "cp437"]))
def test_no_letter_ends_a_run(text, encoding):
    """What the screen has, it shows; in place of any other letter something stands.  Lone surrogates too."""
    for errors in ("replace", "backslashreplace"):
        raw = io.BytesIO()
        screen = runs.Screen(raw, encoding, errors, newline="")
        screen.write(text)
        screen.flush()
        shown = raw.getvalue().decode(encoding)
        with contextlib.suppress(UnicodeEncodeError):
            assert shown == text.encode(encoding).decode(encoding)
        assert len(shown) == len(text) or errors != "replace"


def test_a_table_keeps_its_shape_on_a_poor_screen():
    raw = io.BytesIO()
    screen = runs.Screen(raw, "latin-1", "replace")
    table = Table(title="ε ≤ ‖g‖")
    table.add_column("∞-norm")
    table.add_row("½ … ✗")
    Console(file=screen, width=40).print(table)
    screen.flush()
    lines = raw.getvalue().decode("latin-1").splitlines()[1:]
    assert {line[0] for line in lines} <= {"+", "|"}
    assert len({len(line) for line in lines}) == 1


class Gone(io.RawIOBase):
    """A pipe without a reader, a terminal that was closed, a full disk."""

    def __init__(self, number):
        self.number = number

    def writable(self):
        return True

    def write(self, content):
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("size", [1, 100_000])
def test_a_screen_that_is_gone_ends_nothing(number, size):
    screen = runs.Screen(io.BufferedWriter(Gone(number)), "utf-8", line_buffering=True)
    for _ in range(3):
        assert screen.write("x" * size + "\n") == size + 1
        screen.flush()


SCRIPT = """
import sys, runs
def main() -> None:
    console = runs.World("cpu").console
    for i in range(2000):
        console.print(f"{i} ε [/] [red]x :smile: \\udcff")
    print("ε", i, file=sys.stderr)
sys.exit(runs.run_command(main))
"""


def test_a_reader_that_leaves_changes_neither_work_nor_exit_code():
    """`python train.py | head -n 2`, on a terminal of another alphabet; and text is shown as it is, not as markup."""
    how = {"cwd": ROOT, "env": os.environ | {"PYTHONIOENCODING": "ascii"}, "text": True}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=pipe, stderr=pipe, **how) as process:
        first = [process.stdout.readline() for _ in range(2)]
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(PATIENCE) == 0
    assert first == [f"{i} ? [/] [red]x :smile: ?\n" for i in range(2)]
    assert errors == "\\u03b5 1999\n"


# --- processes --------------------------------------------------------------------------------------------

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
VALUES = st.sampled_from(["0", "1", "2", "10", "-1", "", "x", "1.0", "127.0.0.1"])


@given(st.dictionaries(st.sampled_from(VARIABLES), VALUES))
def test_half_a_launch_is_refused_in_one_line(variables):
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        whole = variables.keys() == set(VARIABLES)
        try:
            rank, size = runs.launched()
        except runs.Unusable as error:
            line = str(error)
            assert len(line.splitlines()) == 1
            assert "torchrun" in line
            assert variables
        else:
            assert 0 <= rank < size
            assert (rank, size) == (int(variables.get("RANK", 0)), int(variables.get("WORLD_SIZE", 1)))
            assert size == 1 or whole


def test_what_is_missing_is_named(monkeypatch, capsys):
    def main() -> None:
        runs.World("cpu")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(os, "_exit", lambda code: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert runs.run_command(main) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: WORLD_SIZE is 2, and RANK, MASTER_ADDR, MASTER_PORT not set: ")


def test_tasks_of_slurm_without_torchrun_are_told(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    runs.World("cpu")
    assert "SLURM_NTASKS is 2 and this is no torchrun" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "0")
    runs.World("cpu")
    assert capsys.readouterr().out == ""


def test_other_processes_are_silent_but_about_what_they_alone_know(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(runs.time, "sleep", lambda seconds: None)
    for name, value in {"WORLD_SIZE": "1", "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, value)

    def ending(rank, error):
        def main() -> None:
            raise error

        monkeypatch.setenv("RANK", str(rank))
        return runs.run_command(main), capsys.readouterr().err

    everyones, own, gone = runs.Unusable("no such file"), runs.Unusable("no disk"), torch.distributed.DistError("x")
    assert ending(0, everyones) == (2, "train.py: no such file\n")  # of the command line: there is no store yet
    assert ending(1, everyones) == (2, "")
    monkeypatch.setattr(runs.World, "store", torch.distributed.HashStore())
    assert ending(1, own) == (2, "train.py: process 1: no disk\n")
    assert ending(0, gone) == (1, f"train.py: {runs.GONE}\n")
    assert ending(2, gone) == (1, "")
    assert ending(0, everyones) == (2, "train.py: no such file\n")
    assert ending(1, everyones) == (2, "")
    unreadable = OSError(errno.ENOENT, os.strerror(errno.ENOENT), b"/nowhere-\xff".decode(errors="surrogateescape"))
    assert ending(1, unreadable)[0] == 1
    code, said = ending(1, torch.OutOfMemoryError("CUDA"))
    assert code == 1
    assert said.startswith("train.py: process 1: out of memory")


@pytest.mark.parametrize("name", ["nonsense", "meta", "mps", "cpu:x", "cuda:1000"])
def test_a_device_that_cannot_be_used_is_refused(name):
    with pytest.raises(runs.Unusable, match="--device"):
        runs.World(name)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_processes_agree_on_a_prefix_whatever_dead_ones_left(first):
    """Whoever comes first, and whatever an earlier attempt (that may have had another size) wrote."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    seen = []
    for attempt, size in enumerate((3, 2, 3)):
        found = {}

        def take_part(rank, size=size, found=found):
            store = torch.distributed.TCPStore("127.0.0.1", server.port, is_master=False)
            found[rank] = runs.new_prefix(store, rank, size)

        if attempt:
            server.set("dead 1", "somebody")
        order = sorted(range(size), key=lambda rank: rank != first)
        threads = [threading.Thread(target=take_part, args=(rank,), daemon=True) for rank in order]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        for thread in threads:
            thread.join(PATIENCE)
        assert sorted(found) == list(range(size))
        assert len(set(found.values())) == 1
        seen += set(found.values())
    assert len(set(seen)) == 3


# --- one owner --------------------------------------------------------------------------------------------


def refusal(path, world):
    """What `owned` says where it refuses, else None."""
    try:
        with runs.owned(path, world):
            return None
    except runs.Failure as error:
        return f"{error}" if error.code == 2 else pytest.fail(f"code {error.code}")


def test_a_second_owner_is_refused_and_told_who_the_first_is(tmp_path, world):
    with runs.owned(tmp_path, world):
        for _ in range(2):
            assert refusal(tmp_path, world) == f"{tmp_path}: {HERE} is working on it; let it end, or stop it"
            with pytest.raises(runs.Failure, match=f"{HERE} is still working on it"):
                runs.refuse_if_running(tmp_path)
        assert end_of(child(lambda: 7 if HERE in str(refusal(tmp_path, world)) else 0)) == 7
    assert refusal(tmp_path, world) is None
    runs.refuse_if_running(tmp_path)


def test_who_only_looks_neither_makes_a_lock_nor_excludes_others(tmp_path):
    runs.refuse_if_running(tmp_path)  # a run from before there were locks
    assert files(tmp_path) == []
    (tmp_path / "lock").write_text("process 1 on elsewhere")
    with open(tmp_path / "lock", "rb") as file:
        assert runs.owner_of(file, shared=True) is None
        runs.refuse_if_running(tmp_path)


def test_every_process_of_the_job_is_refused(tmp_path):
    other = types.SimpleNamespace(main=False, restarts=0, same=lambda value: "process 1 on node7")
    assert "process 1 on node7" in refusal(tmp_path, other)
    assert files(tmp_path) == []


def test_a_lock_ends_with_its_process_and_not_with_its_children(tmp_path, world):
    """kill -9, while a worker that it forked lives on."""
    ready, pids = tmp_path / "ready", tmp_path / "pids"

    def dies():
        with runs.owned(tmp_path, world):
            worker = child(lambda: time.sleep(PATIENCE))
            pids.write_text(str(worker))
            ready.touch()
            time.sleep(PATIENCE)

    pid = child(dies)
    wait_until(ready.exists)
    try:
        assert f"process {pid} on" in refusal(tmp_path, world)
        os.kill(pid, signal.SIGKILL)
        assert end_of(pid) == -signal.SIGKILL
        os.kill(int(pids.read_text()), 0)  # there it is
        assert refusal(tmp_path, world) is None
    finally:
        os.kill(int(pids.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_process_that_is_dying_is_waited_for(monkeypatch, tmp_path, world, restarts):
    """For a moment, or for longer after a restart by torchrun."""
    world.restarts = restarts
    monkeypatch.setattr(runs, "RESTARTED" if restarts else "DYING", PATIENCE)
    first = contextlib.ExitStack()
    first.enter_context(runs.owned(tmp_path, world))
    thread = threading.Timer(0.1, first.close)
    thread.start()
    assert refusal(tmp_path, world) is None
    thread.join()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_users_process_is_an_owner_too(tmp_path, world):
    """Whom we may not signal: that counted as dead."""
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o777)
    with runs.owned(tmp_path, world):
        (tmp_path / "lock").chmod(0o666)

        def as_nobody():
            os.setuid(65534)
            return 7 if HERE in refusal(tmp_path, world) else 0

        assert end_of(child(as_nobody)) == 7


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_without_locks_a_run_goes_on_with_a_warning(monkeypatch, tmp_path, world, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(runs.fcntl, "flock", flock)
    assert refusal(tmp_path, world) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path}/lock: no lock can be had here ({os.strerror(number)})")


def test_an_owner_clears_away_what_a_killed_one_left_half_written(tmp_path, world):
    for name in (".checkpoint.pt.17.tmp", ".status.json.17.tmp", ".latest.17.tmp", ".hidden", "mine.tmp"):
        (tmp_path / name).touch()
    assert refusal(tmp_path, world) is None
    assert files(tmp_path) == [".hidden", "lock", "mine.tmp"]


def test_a_lock_that_cannot_be_opened_is_one_line_that_names_it(tmp_path, world):
    (tmp_path / "lock").mkdir()
    with pytest.raises(OSError) as caught, runs.owned(tmp_path, world):  # noqa: PT011
        pass
    assert runs.explain(caught.value) == (f"{tmp_path}/lock: Is a directory", 1)


# --- names ------------------------------------------------------------------------------------------------

REFUSED = [
    "latest",
    "Latest",
    "../esc",
    "a/b",
    "/abs",
    "a\\b",
    ".hidden",
    "..",
    "",
    " ",
    "a ",
    "a\nb",
    "\x1b[2J",
    "\udcff",
    "ü" * 101,
]
TAKEN = ["a", "ü" * 100, "digits-fd-l2-lam1-seed0", "latest2", "x.y", "naïve [red] run", "-x", "1"]


@pytest.mark.parametrize("name", [*REFUSED, *TAKEN])
def test_names_that_would_lie_elsewhere_are_refused(name):
    if name in TAKEN:
        assert runs.check_name(name) is None
    else:
        with pytest.raises(runs.Unusable) as caught:
            runs.check_name(name)
        assert str(caught.value).isprintable()


@settings(max_examples=50)
@given(st.text(st.characters(), min_size=1, max_size=30))
def test_a_run_lies_directly_in_its_root_and_has_its_name(tmp_path_factory, name):
    root = tmp_path_factory.mktemp("root") / "runs"
    try:
        path = runs.new_directory(root, name, "default", {"a": 1})
    except runs.Unusable:
        assert not root.exists() or files(root) == []
        return
    assert files(root) == [path.name] == [name]
    assert files(path) == ["config.json"]
    assert json.loads((path / "config.json").read_text()) == {"a": 1, "name": name}
    with pytest.raises(runs.Failure, match=re.escape(f"{path} exists")):
        runs.new_directory(root, name, "default", {})
    assert files(root) == [name]


def test_runs_that_nobody_names_find_places_beside_each_other(tmp_path):
    """Also when they look for one at the same moment."""
    pids = [child(lambda: runs.new_directory(tmp_path, None, "run", {"pid": os.getpid()}) and 0) for _ in range(6)]
    assert [end_of(pid) for pid in pids] == [0] * 6
    assert files(tmp_path) == ["run", *(f"run-{i}" for i in range(2, 7))]
    configs = [json.loads((path / "config.json").read_text()) for path in tmp_path.iterdir()]
    assert sorted(config["pid"] for config in configs) == sorted(pids)


# --- the newest run ---------------------------------------------------------------------------------------


def begun(path, world):
    """A run that has made itself the newest; the warnings in its log."""
    path.mkdir()
    runs.Run(path, world).make_latest()
    with contextlib.suppress(FileNotFoundError):
        return [json.loads(line)["message"] for line in (path / "metrics.jsonl").read_text().splitlines()]
    return []


def test_latest_is_a_link(tmp_path, world):
    for name in "ab":
        assert begun(tmp_path / name, world) == []
        assert os.readlink(tmp_path / "latest") == name
        assert (tmp_path / "latest").resolve() == (tmp_path / name).resolve()
    assert files(tmp_path) == ["a", "b", "latest"]


def test_where_no_link_can_be_made_that_is_told(monkeypatch, tmp_path, world, capsys):
    def symlink_to(self, *_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(self))

    monkeypatch.setattr(Path, "symlink_to", symlink_to)
    (warning,) = begun(tmp_path / "a", world)
    assert warning == f"{tmp_path}/latest: left as it is, Operation not permitted; this run is {tmp_path}/a"
    assert f"warning: {warning}" in capsys.readouterr().out
    assert files(tmp_path) == ["a"]


def test_a_folder_called_latest_is_left_alone(tmp_path, world):
    """cp -rL and scp -r make one of the link."""
    shutil.copytree(ROOT / "tests", tmp_path / "latest", ignore=lambda folder, names: names[3:])
    before = files(tmp_path / "latest")
    (warning,) = begun(tmp_path / "a", world)
    assert warning == f"{tmp_path}/latest: left as it is, Is a directory; this run is {tmp_path}/a"
    assert files(tmp_path / "latest") == before
    assert files(tmp_path) == ["a", "latest"]
    assert files(tmp_path / "a") == ["metrics.jsonl"]


# --- the log and the status -------------------------------------------------------------------------------


def test_what_json_cannot_say_is_null_and_named(tmp_path, world):
    fields = {"a": 1.0, "b": math.nan, "c": [1.0, math.inf], "d": [1, 1e300], "e": None, "f": "nan", "g": 1e300, "h": 2}
    runs.Run(tmp_path, world).record("step", **fields)
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert {name: line[name] for name in fields} == fields | {"b": None, "c": None}
    assert line["nonfinite"] == ["b", "c"]
    runs.Run(tmp_path, world).record("step", a=1.0)
    assert "nonfinite" not in (tmp_path / "metrics.jsonl").read_text().splitlines()[1]


def test_half_a_line_that_a_kill_left_stays_alone(tmp_path, world):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "st')
    for _ in range(2):
        runs.Run(tmp_path, world).event("resume", "")
    first, *others = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert first == '{"kind": "st'
    assert [json.loads(line)["event"] for line in others] == ["resume"] * 2


@given(st.lists(st.floats(-1e5, 1e5), min_size=1, max_size=6))
def test_a_clock_that_is_set_back_stops_no_heartbeat_and_no_record_goes_back(tmp_path_factory, jumps):
    path = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as monkeypatch:
        clock = types.SimpleNamespace(time=lambda: 1e9 + jump, monotonic=lambda: 10.0 * beats)
        monkeypatch.setattr(runs, "time", clock)
        jump, beats = 0.0, 0
        run = runs.Run(path, types.SimpleNamespace(main=True))
        for beats, jump in enumerate(jumps):
            run.step = beats
            run.heartbeat()
            run.record("step")
            status = json.loads((path / "status.json").read_text())
            assert (status["step"], status["time"]) == (beats, round(1e9 + jump, 3))
    times = [json.loads(line)["time"] for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert times == sorted(times)
    assert times[0] >= 1e9
    assert times[-1] == pytest.approx(1e9 + max(0, *jumps), abs=1e-3)


def test_a_heartbeat_is_not_written_at_every_step(tmp_path, world):
    run = runs.Run(tmp_path, world)
    run.heartbeat()
    run.step = 1
    run.heartbeat()
    assert json.loads((tmp_path / "status.json").read_text())["step"] == 0
    run.heartbeat(force=True)
    assert json.loads((tmp_path / "status.json").read_text())["step"] == 1


def test_only_the_main_process_writes(tmp_path):
    other = types.SimpleNamespace(main=False)
    run, checkpoints = runs.Run(tmp_path, other), runs.Checkpoints(tmp_path, other)
    run.make_latest()
    run.heartbeat(force=True)
    run.event("start", "")
    run.end("finished", "finish", "")
    checkpoints.save(STATE)
    assert not checkpoints.due(-1)
    assert files(tmp_path) == []


class Killed(BaseException):
    pass


@pytest.mark.parametrize("old", [b"old", None])
def test_a_file_is_replaced_as_a_whole_or_not_at_all(monkeypatch, tmp_path, old):
    """Whatever fails, at whatever call."""
    path = tmp_path / "file"
    for name in ("fsync", "replace"):
        if old:
            path.write_bytes(old)
        with monkeypatch.context() as patched:
            patched.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space")))
            with pytest.raises(OSError, match="No space"):
                runs.replace(path, b"new")
        assert (path.read_bytes() if path.exists() else None) == old
        assert files(tmp_path) == ["file"] * bool(old)
    runs.replace(path, b"new")
    assert path.read_bytes() == b"new"


# --- checkpoints ------------------------------------------------------------------------------------------

STATE = {"config": {}, "model": {"weight": torch.ones(3)}, "step": 0}


def saved(path, world, *steps):
    checkpoints = runs.Checkpoints(path, world)
    for step in steps:
        checkpoints.save(STATE | {"step": step})
    return checkpoints


def test_the_newest_checkpoint_is_loaded_and_the_one_before_kept(tmp_path, world):
    checkpoints = saved(tmp_path, world, 1, 2, 3)
    state, warning = checkpoints.load()
    assert (state["step"], warning) == (3, None)
    assert torch.equal(state["model"]["weight"], torch.ones(3))
    assert files(tmp_path) == ["checkpoint.previous.pt", "checkpoint.pt"]
    content = checkpoints.newest.read_bytes()
    for damaged in (b"", b"garbage", content[: len(content) // 2]):
        checkpoints.newest.write_bytes(damaged)
        state, warning = checkpoints.load()
        assert state["step"] == 2
        assert "going on from the one before it, of step 2" in warning
    checkpoints.previous.unlink()
    with pytest.raises(runs.Failure, match="and there is no earlier one"):
        checkpoints.load()


def test_a_checkpoint_is_due_after_its_minutes(monkeypatch, tmp_path, world):
    now = [0.0]
    monkeypatch.setattr(runs, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    checkpoints = runs.Checkpoints(tmp_path, world)
    for seconds, due in ((599, False), (601, True)):
        now[0] = seconds
        assert checkpoints.due(10) is due
    checkpoints.save(STATE)
    assert not checkpoints.due(10)


@pytest.mark.parametrize("before", [0, 1, 2])
def test_killed_at_any_call_there_is_a_whole_checkpoint(tmp_path, before):
    """The new one or the one before, at every call that changes the disk; the next owner finds nothing in its way."""
    for call in range(10):
        path = tmp_path / str(call)
        path.mkdir()
        checkpoints, left = saved(path, runs.World("cpu"), *range(before)), iter(range(call))
        with pytest.MonkeyPatch.context() as monkeypatch:
            for name in ("fsync", "replace", "unlink"):
                real = getattr(os, name)

                def dying(*arguments, real=real, left=left, **how):
                    if next(left, None) is None:
                        raise Killed
                    return real(*arguments, **how)

                monkeypatch.setattr(os, name, dying)
            try:
                checkpoints.save(STATE | {"step": before})
                killed = False
            except Killed:
                killed = True
        if before or not killed:
            assert checkpoints.load()[0]["step"] in ({before - 1, before} if killed else {before})
        with runs.owned(path, runs.World("cpu")):
            assert all(name.startswith(("checkpoint", "lock")) for name in files(path))
        if not killed:
            return
    pytest.fail("never came to an end")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_checkpoint_for_which_there_is_no_room_is_one_line(tmp_path, world):
    checkpoints = saved(tmp_path, world, 1, 2)
    (tmp_path / f".checkpoint.pt.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(runs.Failure, match=r"checkpoint.pt: cannot be written \(No space left on device\)") as caught:
        checkpoints.save(STATE | {"step": 3})
    assert caught.value.code == 1
    assert [runs.read_checkpoint(path)["step"] for path in (checkpoints.newest, checkpoints.previous)] == [2, 1]
    assert files(tmp_path) == ["checkpoint.previous.pt", "checkpoint.pt"]


# --- signals ----------------------------------------------------------------------------------------------

STOPPING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def _heard():
    """A shell has SIGINT ignored in what it starts in the background, these tests perhaps."""
    before = {signum: signal.signal(signum, signal.default_int_handler) for signum in STOPPING}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


class Forbidden(io.TextIOBase):
    """A stream that a signal finds in the middle of a write: any other write to it would fail."""

    def write(self, text):
        raise RuntimeError("reentrant call")


@pytest.mark.parametrize("signum", STOPPING)
def test_a_signal_is_noted_without_a_touch_of_the_streams(monkeypatch, world, signum):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Forbidden())
    before = signal.getsignal(signum)
    with runs.Stop(world) as stop:
        assert stop.signal == 0
        os.kill(os.getpid(), signum)
        os.kill(os.getpid(), signum)  # a terminal's and torchrun's: the same one
        assert stop.signal == signum
    assert signal.getsignal(signum) == before


@pytest.mark.parametrize("signum", STOPPING)
def test_a_signal_that_is_ignored_stays_ignored(world, signum):
    """nohup ignores SIGHUP, a shell SIGINT for what it starts in the background."""
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        with runs.Stop(world) as stop:
            os.kill(os.getpid(), signum)
            assert stop.signal == 0
    finally:
        signal.signal(signum, before)


@pytest.mark.parametrize("second", STOPPING)
def test_a_second_signal_kills_unless_a_terminal_hangs_up(monkeypatch, world, second):
    monkeypatch.setattr(runs, "SAME_SIGNAL", 0.0)

    def twice():
        with runs.Stop(world):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            os.kill(os.getpid(), second)
            return 7

    assert end_of(child(twice)) == (7 if second == signal.SIGHUP else -second)


def test_the_death_of_torchrun_counts_as_a_signal(world):
    world.parent = os.getppid()
    assert runs.Stop(world).signal == 0
    world.parent = 2**22 + 1
    assert runs.Stop(world).signal == signal.SIGTERM


# --- where figures come from ------------------------------------------------------------------------------


def test_the_commit_is_gits_and_says_where_files_have_changed(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    assert runs.git_commit() is None

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q")
    (tmp_path / "runs.py").touch()
    git("add", ".")
    git("commit", "-qm", "a")
    git("tag", "-am", "a", "v1")
    commit = git("rev-parse", "--short=12", "HEAD").strip()
    (tmp_path / "untracked").touch()
    assert runs.git_commit() == commit
    (tmp_path / "runs.py").write_text("changed")
    assert runs.git_commit() == f"{commit}+"
