"""The dashboard: what a run directory says, in the terminal, while it trains and afterwards.

    python tui.py                       pick a run under runs/
    python tui.py runs/latest           watch one run
    python tui.py runs/a runs/b         overlay runs (at most four)
    python tui.py runs/latest --once    one plain-text snapshot; --json: the same for scripts

It only reads.  All it knows is the run directory that the README documents (config.json, metrics.jsonl,
status.json, evaluation/summary.json), so it runs beside any trainer that writes one, on any machine.  What
the file says is what is drawn:

  * every record counts: curves are drawn from all of them, as an envelope (least to greatest, exact) with the
    mean of the last k records over it; a spike of one record is visible at any zoom; values outside the axis
    are marked (▴ ▾), numbers that were not finite are marked (✗) and break the line;
  * a line that is half written waits, a line that is broken is skipped and counted, a file that shrinks or is
    replaced is read again from its start;
  * a crash is never guessed from silence: no record for longer than this run's own rhythm is STALLED; FAILED,
    FINISHED and INTERRUPTED are what the run itself says; GONE means that its process no longer exists.

The file in the order of its parts: numbers as text, reading, a run, its state, curves, the view, painting
(pure functions from runs, view, size and time to lines of text), screens, the command line.
"""

import asyncio
import contextlib
import csv
import errno
import json
import math
import os
import re
import shutil
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from itertools import chain, groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import orjson
import typer
from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.events import Key, MouseEvent
from textual.geometry import Region
from textual.screen import Screen
from textual.strip import Strip
from textual.widget import Widget

# ---------------------------------------------------------------- numbers as people read them


def number(value: float, digits: int = 3) -> str:
    """A measured number in at most 8 characters: `digits` significant ones, k, M and G from 10,000 on."""
    if not math.isfinite(value) or 999.5 <= abs(value) < 9999.5:
        return f"{value:.0f}" if math.isfinite(value) else "–"
    exact = value
    value = float(f"{value:.{digits - 1}e}")  # first to the digits that are shown: 9.999 has one before the point
    size, unit = abs(value), ""
    if not (1e-3 <= size < 1e12 or size == 0):
        return re.sub(r"e([+-])0", r"e\1", f"{exact:.1e}")
    for threshold, scale, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= threshold:
            value, size, unit = value / scale, size / scale, letter
            break
    whole = math.floor(math.log10(size) + 1e-9) if size else digits - 1
    return f"{value:.{max(0, digits - 1 - whole)}f}{unit}"


def short(value: float) -> str:
    """A tick label: as few characters as the number needs."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if unit <= abs(value) < 1e12:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}" if value == 0 or 1e-4 <= abs(value) < 1e4 else f"{value:.0e}".replace("e-0", "e-")


def duration(seconds: float | None) -> str:
    """42 s, 3m 12s, 1h 07m, 2d 03h."""
    if seconds is None or not 0 <= seconds < 1e10:
        return "–"
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days}d {h:02}h" if days else f"{h}h {m:02}m" if h else f"{m}m {s:02}s" if m else f"{s} s"


def clean(text: Any, limit: int = 300) -> str:
    """Text from a file, made safe for a terminal: one line, no control characters."""
    return "".join(c if c.isprintable() else "·" for c in str(text)[:limit])


def finite(value: Any, low: float = -3e38, high: float = 3e38) -> float:
    """A JSON value as a float; NaN for anything that is not a number within the limits (float32's)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    return float(value) if low <= value <= high else math.nan


# ---------------------------------------------------------------- reading: a file that others write


class Tail:
    """The whole lines of a growing file, each exactly once, also when it is truncated or replaced.

    The file is opened anew at each poll (NFS), so it may appear, vanish and come back; only its inode, its
    first bytes and the offset behind the last newline are remembered.  `restarted` says that what was read
    before is void.  A line longer than `limit` is dropped up to its newline.
    """

    def __init__(self, path: Path, limit: int = 1 << 19):
        self.path, self.limit = path, limit
        self.offset = self.size = 0
        self.error = ""
        self._inode: tuple[int, int] | None = None
        self._head = b""
        self._dropping = False

    def poll(self) -> tuple[bytes, bool]:
        """(new whole lines, restarted); b"" when there is nothing new.  Never raises on what it finds."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                self.error = ""
                restarted = self._restart_if_other(file)
                file.seek(self.offset)
                return self._whole_lines(file.read(self.limit)), restarted
        except OSError as error:
            self.error, self.size = os.strerror(error.errno or errno.EIO).lower(), self.offset
            return b"", False

    @property
    def behind(self) -> bool:
        """Whether at least one whole read is still to come."""
        return self.size - self.offset >= self.limit

    def _restart_if_other(self, file) -> bool:
        stat = os.fstat(file.fileno())
        inode, self.size = (stat.st_dev, stat.st_ino), stat.st_size
        head = file.read(256)
        file.seek(max(0, self.offset - 1))
        joined = self.offset == 0 or self._dropping or file.read(1) == b"\n"
        same = inode == self._inode and head.startswith(self._head) and self.size >= self.offset and joined
        restarted = self._inode is not None and not same
        if not same:
            self.offset, self._dropping = 0, False
        self._inode, self._head = inode, head
        return restarted

    def _whole_lines(self, chunk: bytes) -> bytes:
        end = chunk.rfind(b"\n") + 1
        if not end and len(chunk) == self.limit:  # one endless line: let it go by
            self._dropping, end = True, len(chunk)
            chunk = b""
        elif end and self._dropping:
            self._dropping = False
            chunk = b"?" + chunk[chunk.find(b"\n") : end]  # its last piece stays, as one broken line
        else:
            chunk = chunk[:end]
        self.offset += end
        return chunk


class Document:
    """A small JSON object in a file, read when it changed; the last good one while it is broken or missing."""

    def __init__(self, path: Path):
        self.path, self.value, self._stamp = path, {}, None

    def read(self) -> dict[str, Any]:
        try:
            stat = self.path.stat()
            stamp = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if stamp != self._stamp and stat.st_size < 1 << 20:
                value = json.loads(self.path.read_bytes())
                self.value = value if isinstance(value, dict) else self.value
                self._stamp = stamp
        except (OSError, ValueError, RecursionError):
            pass
        return self.value


def parse(block: bytes) -> list[Any]:
    """One item for each line of `block` (whole lines): the JSON value, or None for a line that has none.

    Equal to parsing line by line; the lines of a healthy block are parsed as one array, by orjson, in a quarter
    of the time.  NaN and Infinity are no JSON, but json.dumps writes them: records that hold them say so in
    `nonfinite`.
    """
    lines, seen = block.count(b"\n"), []
    if block.count(b"}\n{") == lines - 1:  # no value can span lines
        with contextlib.suppress(ValueError):
            items = orjson.loads(b"[%b]" % block[:-1].replace(b"\n", b",\n"))
            if len(items) == lines:
                return items
    decode = json.JSONDecoder(parse_constant=lambda name: seen.append(name) or math.nan).decode
    items = [_decoded(decode, line) for line in block.split(b"\n")[:-1]]
    return [_name_nonfinite(item) for item in items] if seen else items


def _decoded(decode: Callable[[str], Any], text: bytes) -> Any:
    with contextlib.suppress(ValueError, RecursionError):
        return decode(text.decode())


def _name_nonfinite(item: Any) -> Any:
    record = item if isinstance(item, dict) else {}
    names = [key for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
    return {"nonfinite": names} | record if names else item


class Table:
    """Columns of numbers in the order of their step, at most `cap` rows of them however long the run is.

    `x` holds step, epoch and time (float64); `mean`, `low` and `high` a float32 column for each name.  The
    three are the same arrays until the table is full; then neighbouring rows are merged in pairs, whose
    least, mean and greatest value are kept: no spike is ever lost.
    """

    def __init__(self, cap: int = 1 << 20):
        self.cap, self.rows = cap, 0
        self.origin = math.nan  # the time that counts as 0; nan: of the first row
        self.x = {name: np.empty(0) for name in AXES}
        self.mean: dict[str, np.ndarray] = {}
        self.low = self.high = self.mean

    def __len__(self) -> int:
        return self.rows

    @property
    def merged(self) -> bool:
        return self.low is not self.mean

    def append(self, x: dict[str, np.ndarray], values: dict[str, np.ndarray]) -> None:
        """Add rows; steps that run backwards are put where they belong."""
        if not len(x["step"]):
            return
        for part in np.array_split(np.arange(len(x["step"])), -(-len(x["step"]) // (self.cap // 4))):
            self._append({k: v[part] for k, v in x.items()}, {k: v[part] for k, v in values.items()})

    def axis(self, name: str) -> np.ndarray:
        """The rows' positions, never falling: steps, epochs done, or seconds since `origin`."""
        x = self.x[name][: self.rows]
        if name == "step" or not self.rows:
            return x
        rising = np.fmax.accumulate(x)
        first = np.fmin.reduce(rising)
        origin = first if math.isnan(self.origin) else self.origin
        return np.nan_to_num(rising, nan=first) - (origin if name == "time" else 0)

    def column(self, name: str) -> np.ndarray:
        """The values of one series, one a row (means of merged rows); empty if there is no such series."""
        return self.mean.get(name, _NOTHING)[: self.rows]

    def void(self, step: float) -> int:
        """Forget the rows beyond `step`; returns how many they were."""
        keep = int(np.searchsorted(self.x["step"][: self.rows], step, "right"))
        self.rows, lost = keep, self.rows - keep
        return lost

    def _append(self, x: dict[str, np.ndarray], values: dict[str, np.ndarray]) -> None:
        if self.rows + len(x["step"]) > self.cap:
            self._merge()
        start, end = self.rows, self.rows + len(x["step"])
        self._reserve(end, values)
        for name, column in self.x.items():
            column[start:end] = x[name]
        for columns in self._parts():
            for name, column in columns.items():
                column[start:end] = values.get(name, math.nan)
        self.rows = end
        steps = self.x["step"][max(0, start - 1) : end]
        if (steps[1:] < steps[:-1]).any():
            self._sort()

    def _parts(self) -> tuple[dict[str, np.ndarray], ...]:
        return (self.mean, self.low, self.high) if self.merged else (self.mean,)

    def _reserve(self, rows: int, names: Iterable[str]) -> None:
        capacity = len(self.x["step"])
        if rows > capacity:
            capacity = min(self.cap, max(1024, rows + rows // 2))
            for columns in (self.x, *self._parts()):
                for name, old in columns.items():
                    columns[name] = np.resize(old, capacity) if len(old) else np.empty(capacity, old.dtype)
        for name in names:
            if name not in self.mean:
                for columns in self._parts():
                    columns[name] = np.full(capacity, math.nan, np.float32)

    def _merge(self) -> None:
        n, odd = divmod(self.rows, 2)
        if not self.merged:
            self.low = {k: v.copy() for k, v in self.mean.items()}
            self.high = {k: v.copy() for k, v in self.mean.items()}
        for name, mean in self.mean.items():
            for columns, pick in ((self.low, np.fmin), (self.high, np.fmax)):
                columns[name][:n] = pick(columns[name][: 2 * n : 2], columns[name][1 : 2 * n : 2])
            one, two = mean[: 2 * n : 2], mean[1 : 2 * n : 2]
            mean[:n] = np.where(np.isnan(one), two, np.where(np.isnan(two), one, one / 2 + two / 2))
        for column in self.x.values():
            column[:n] = column[1 : 2 * n : 2]
        for columns in (self.x, *self._parts()) if odd else ():
            for column in columns.values():
                column[n] = column[2 * n]
        self.rows = n + odd

    def _sort(self) -> None:
        order = np.argsort(self.x["step"][: self.rows], kind="stable")
        for columns in (self.x, *self._parts()):
            for column in columns.values():
                column[: self.rows] = column[order]


_NOTHING = np.empty(0, np.float32)
AXES = ("step", "epoch", "time")
LIMITS = {"step": 2.0**53, "epoch": 1e9, "time": 1e11}
STEP_FIELDS = ("loss", "penalty", "grad_norm_mean", "grad_norm_max", "fd_error_pct", "lr", "images_per_s")
EPOCH_FIELDS = (
    *("test_loss", "clean_error_pct", "attacked_error_pct", "margin_grad_norm_mean", "margin_grad_norm_max"),
    *("fd_rounding_pct", "seconds"),
)
OMEGAS = tuple(f"omega.{i}" for i in range(4))


class Event(NamedTuple):
    time: float
    step: float
    kind: str
    text: str


class Log:
    """All that metrics.jsonl says: two tables of numbers, the last events, and what was wrong with it."""

    def __init__(self, cap: int = 1 << 20):
        self.tables = {"step": Table(cap), "epoch": Table(cap // 8)}
        self.events: deque[Event] = deque(maxlen=500)
        self.nonfinite: deque[tuple[float, str]] = deque(maxlen=500)  # (step, name)
        self.lines = self.skipped = self.nonfinite_count = self.void_count = 0
        self.first_nonfinite: tuple[float, str] | None = None
        self.last = dict.fromkeys(AXES, math.nan)
        self.resumes: deque[float] = deque(maxlen=50)

    def feed(self, block: bytes) -> None:
        """Take whole lines.  A line that is no record is counted in `skipped` and changes nothing else."""
        items = parse(block)
        self.lines += len(items)
        for kind, group in groupby(zip(_kinds(items), items, strict=True), key=itemgetter(0)):
            records = [item for _, item in group]
            if kind in self.tables:
                self._rows(kind, records)
            elif kind == "event":
                for record in records:
                    self._event(record)
            else:
                self.skipped += len(records)

    def _rows(self, kind: str, items: list[dict[str, Any]]) -> None:
        fields = STEP_FIELDS if kind == "step" else EPOCH_FIELDS
        columns = _columns(items, (*AXES, *fields))
        for row, name in enumerate(AXES):
            columns[row, ~((columns[row] >= 0) & (columns[row] <= LIMITS[name]))] = math.nan
        good = ~np.isnan(columns[0])
        if not good.all():
            self.skipped += int((~good).sum())
            items = [item for item, ok in zip(items, good, strict=True) if ok]
            columns = columns[:, good]
        if not items:
            return
        values = dict(zip(fields, columns[len(AXES) :], strict=True))
        if kind == "step":
            with np.errstate(all="ignore"):
                share = 100 * values["penalty"] / (values["loss"] + values["penalty"])
            values["share_pct"] = np.where(np.isfinite(share), share, math.nan)
        else:
            values |= {name: np.array([_nth(item, i) for item in items]) for i, name in enumerate(OMEGAS)}
            self.events.extend(_epoch_event(item) for item in items)
        x = dict(zip(AXES, columns[: len(AXES)], strict=True))
        for table in self.tables.values():  # one zero for all curves
            table.origin = table.origin if table.origin == table.origin else float(np.fmin.reduce(x["time"]))
        self.tables[kind].append(x, {name: column.astype(np.float32) for name, column in values.items()})
        self.last = {name: float(column[-1]) for name, column in x.items()}
        self._note_nonfinite(items)

    def _note_nonfinite(self, items: list[dict[str, Any]]) -> None:
        for item in items:
            if "nonfinite" in item:
                names = item["nonfinite"] if isinstance(item["nonfinite"], list) else [item["nonfinite"]]
                for name in names[:8]:
                    self.nonfinite.append((finite(item["step"]), clean(name, 30)))
                if names:
                    worst = "loss" if "loss" in names else clean(names[0], 30)
                    self.nonfinite_count += 1
                    self.first_nonfinite = self.first_nonfinite or (finite(item["step"]), worst)

    def _event(self, item: dict[str, Any]) -> None:
        step = finite(item.get("step"), 0, LIMITS["step"])
        kind = clean(item.get("event", "event"), 20)
        if kind == "resume" and not math.isnan(step):
            self._resume(step)
        message = clean(item.get("message") or "")
        last = self.events[-1] if self.events else None
        if kind == "checkpoint" and last and last.kind == "epoch" and last.step == step:
            self.events[-1] = last._replace(text=f"{last.text}  checkpoint")  # one line is enough for both
        else:
            self.events.append(Event(finite(item.get("time"), 0, LIMITS["time"]), step, kind, message))

    def _resume(self, step: float) -> None:
        """Records beyond `step` are void, and what was wrong with them is forgotten."""
        self.void_count += sum(table.void(step) for table in self.tables.values())
        self.resumes.append(step)
        self.last["step"] = step
        self.nonfinite = deque((item for item in self.nonfinite if item[0] <= step), maxlen=500)
        if self.first_nonfinite and self.first_nonfinite[0] > step:
            self.first_nonfinite, self.nonfinite_count = None, 0


def _kinds(items: list[Any]) -> list[str | None]:
    """What each record says it is; None for what is no record."""
    kinds = [item.get("kind") if isinstance(item, dict) else None for item in items]
    return [kind if isinstance(kind, str) else None for kind in kinds]


def _columns(items: list[dict[str, Any]], names: Sequence[str]) -> np.ndarray:
    """The numbers of some fields, (fields, records); NaN for what is missing, of another type or not finite."""
    try:
        rows = list(map(itemgetter(*names), items))
        if set(map(type, chain.from_iterable(rows))) <= {int, float, type(None)}:
            columns = np.array(rows, dtype=np.float64).T  # None becomes NaN
            columns[~(np.abs(columns) <= 3e38)] = math.nan
            return columns
    except (KeyError, OverflowError):
        pass
    return np.array([[finite(item.get(name)) for item in items] for name in names])


def _nth(item: dict[str, Any], i: int) -> float:
    omega = item.get("omega")
    return finite(omega[i]) if isinstance(omega, list) and i < len(omega) else math.nan


def _epoch_event(item: dict[str, Any]) -> Event:
    clean_error, attacked = finite(item.get("clean_error_pct")), finite(item.get("attacked_error_pct"))
    text = f"{finite(item.get('epoch')):g}  error {number(clean_error)} %  attacked {number(attacked)} %"
    step = finite(item.get("step"), 0, LIMITS["step"])
    return Event(finite(item.get("time"), 0, LIMITS["time"]), step, "epoch", text)


# ---------------------------------------------------------------- a run and its state


class State(NamedTuple):
    """What a run is doing, told in three ways at once: a symbol, a word and a colour."""

    symbol: str
    word: str
    role: str
    note: str = ""

    @property
    def ended(self) -> bool:
        return self.word in ("FINISHED", "INTERRUPTED", "FAILED")


def judge(
    *,
    now: float,
    exists: bool,
    records: int,
    last: float,
    rhythm: float,
    status: dict[str, Any],
    alive: bool | None = None,
    stall: float | None = None,
    ended: str | None = None,
) -> State:
    """The state of a run: a pure function of what is on disk and of the time.

    last, rhythm: time of the last record and the median gap between records, seconds (NaN: unknown).
    status: status.json ({} if there is none).  alive: whether its process exists (None: cannot be known).
    stall: seconds of silence allowed; by default max(10, 5 rhythms).  While the run says that it is not in
    phase "train" (evaluating, saving), its heartbeat counts as a sign of life; in "train" only records do.
    ended: what the last event says about the end, for runs without a status.json.
    """
    word = status.get("state") or ended
    if word == "finished":
        return State("✓", "FINISHED", "good")
    if word == "interrupted":
        return State("■", "INTERRUPTED", "warn", "python train.py --resume RUN")
    if word == "failed":
        return State("✗", "FAILED", "bad", clean(status.get("error") or ""))
    if status and alive is False:
        return State("?", "GONE", "bad", f"process {status.get('pid')} is gone and left no word")
    if not exists and records:
        return State("○", "DELETED", "warn", "its directory is gone; what was read stays here")
    if not records:
        return State("○", "WAITING", "dim")
    train = status.get("phase", "train") == "train"
    signs = [last] if train else [last, finite(status.get("time"))]
    age = now - max([sign for sign in signs if not math.isnan(sign)], default=now)
    limit = stall or max(10.0, 0.0 if math.isnan(rhythm) else 5 * rhythm)
    if age > limit:
        return State("◐", "STALLED", "warn", f"no record for {duration(age)}")
    return State("●", "LIVE", "good", "" if train else clean(status.get("phase"), 12))


def process_alive(status: dict[str, Any]) -> bool | None:
    """Whether the process of status.json exists; None where that cannot be known (another host)."""
    pid = status.get("pid")
    if (
        os.name != "posix"
        or status.get("host") != socket.gethostname()
        or type(pid) is not int
        or not 0 < pid < 1 << 31
    ):
        return None
    try:
        os.kill(pid, 0)  # signal 0: asks, sends nothing
        status = Path(f"/proc/{pid}/stat").read_text()
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's, or no /proc
    return status.rpartition(")")[2].split()[:1] != ["Z"]  # a zombie has ended


class Fetched(NamedTuple):
    """What one look at the disk brought."""

    real: str  # the directory behind the path: runs/latest moves on to newer runs
    lines: bytes
    restarted: bool
    documents: list[dict[str, Any]]
    exists: bool


class Run:
    """One run directory, followed.  `fetch` touches the disk (any thread), `apply` takes what it brought."""

    def __init__(self, path: Path, stall: float | None = None):
        self.path, self.stall = path, stall
        self.real = ""
        self.log = Log()
        self.config, self.status, self.summary = {}, {}, {}
        self.exists = True
        self.arrived = math.nan  # when, by this clock, the last record came in while we watched
        self._caught_up = False
        self._follow(os.path.realpath(path))

    def _follow(self, real: str) -> bool:
        """Look at this directory from now on; whether it is another one than before."""
        if real == self.real:
            return False
        self.real, path = real, Path(real)
        self.tail = Tail(path / "metrics.jsonl")
        self._documents = [Document(path / name) for name in ("config.json", "status.json", "evaluation/summary.json")]
        return True

    def fetch(self, tail: bool = True) -> Fetched:
        """Everything new on disk.  Never raises on what it finds."""
        moved = self._follow(os.path.realpath(self.path))
        lines, restarted = self.tail.poll() if tail else (b"", False)
        documents = [document.read() for document in self._documents]
        return Fetched(self.real, lines, restarted or moved, documents, os.path.isdir(self.real))

    def apply(self, fetched: Fetched, now: float) -> bool:
        """Take what `fetch` brought; whether there were new lines."""
        (self.config, self.status, self.summary), self.exists = fetched.documents, fetched.exists
        if fetched.restarted:
            self.log = Log()
        if fetched.lines:
            self.log.feed(fetched.lines)
            if self._caught_up:
                self.arrived = now
        self._caught_up = self._caught_up or not self.tail.behind
        return bool(fetched.lines)

    def read_all(self) -> "Run":
        """Read to the present end of the file, at once."""
        while self.apply(self.fetch(), time.time()) or self.tail.behind:
            pass
        return self

    @property
    def name(self) -> str:
        return clean(os.path.basename(self.real), 60)

    @property
    def loaded(self) -> float:
        """The share of the file that has been read."""
        return self.tail.offset / self.tail.size if self.tail.size and self.tail.behind else 1.0

    def option(self, name: str) -> Any:
        options = self.config.get("options")
        return options.get(name) if isinstance(options, dict) else None

    def state(self, now: float) -> State:
        last = self.log.last["time"]
        if not math.isnan(self.arrived):  # a clock that differs from the trainer's must not say STALLED
            last = max(min(last, now), self.arrived) if not math.isnan(last) else self.arrived
        return judge(
            now=now,
            exists=self.exists,
            records=sum(map(len, self.log.tables.values())),
            last=last,
            rhythm=self.rhythm(),
            status=self.status,
            alive=process_alive(self.status) if self.status.get("state") == "running" else None,
            stall=self.stall,
            ended=self._ended(),
        )

    def rhythm(self) -> float:
        """The median gap between the last 50 records, seconds."""
        table = self.log.tables["step"]
        times = table.x["time"][max(0, len(table) - 50) : len(table)]
        gaps = np.diff(times[~np.isnan(times)])
        return float(np.sort(gaps)[len(gaps) // 2]) if len(gaps) else math.nan

    def steps_per_second(self) -> float:
        """Over the last 200 records since the last resume, pauses included."""
        table = self.log.tables["step"]
        first = max(0, len(table) - 200)
        if self.log.resumes:
            first = max(first, int(np.searchsorted(table.x["step"][: len(table)], self.log.resumes[-1], "right")))
        step, at = (table.x[k][first : len(table)] for k in ("step", "time"))
        if len(step) < 2 or not at[-1] > at[0]:
            return math.nan
        return float((step[-1] - step[0]) / (at[-1] - at[0]))

    @property
    def step(self) -> float:
        return self.log.last["step"]

    @property
    def total(self) -> float:
        return finite(self.config.get("steps_total"), 1)

    def eta(self) -> float:
        """Seconds left at the present speed."""
        speed = self.steps_per_second()
        return (self.total - self.step) / speed if speed > 0 else math.nan

    def elapsed(self) -> float:
        table = self.log.tables["step"]
        at = table.x["time"][: len(table)]
        return float(at[-1] - at[0]) if len(at) else math.nan

    def _ended(self) -> str | None:
        kind = self.log.events[-1].kind if self.log.events else None
        return {"finish": "finished", "interrupt": "interrupted", "error": "failed"}.get(kind)


# ---------------------------------------------------------------- curves: from columns to braille


class Bins(NamedTuple):
    """A series on the dot columns of a chart; NaN where a column holds nothing, `broken` where it has to."""

    low: np.ndarray
    high: np.ndarray
    line: np.ndarray
    broken: np.ndarray


def binned(table: Table, name: str, x: np.ndarray, edges: np.ndarray, smooth: int) -> Bins:
    """Series `name` on the columns between `edges`: least and greatest value (exact), and the mean line.

    The line is the mean of a column's own records, or of the last `smooth` records up to its end where those
    are more.  A column whose records all lack the value is `broken`.
    """
    columns = len(edges) - 1
    empty = np.full(columns, math.nan)
    if name not in table.mean or not len(x):
        return Bins(empty, empty, empty, np.zeros(columns, bool))
    cuts = np.searchsorted(x, edges)
    starts, ends = cuts[:-1], cuts[1:]
    has = ends > starts
    if not has.any():
        return Bins(empty, empty, empty, np.zeros(columns, bool))
    low, high, line = empty.copy(), empty.copy(), empty.copy()
    first, stop = starts[has][0], ends[has][-1]
    low[has] = np.fmin.reduceat(table.low[name][first:stop], starts[has] - first)
    high[has] = np.fmax.reduceat(table.high[name][first:stop], starts[has] - first)
    line[has] = _window_means(table.mean[name], np.minimum(starts, ends - smooth)[has], ends[has])
    broken = has & np.isnan(low)
    line[broken] = math.nan
    return Bins(low, high, line, broken)


def _window_means(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """mean(values[start:end]) without NaN, for windows that may overlap; NaN where nothing is left."""
    starts = np.maximum(starts, 0)
    first = starts.min()
    part = values[first : ends[-1]]
    known = ~np.isnan(part)
    pairs = (np.stack([starts, ends], axis=1).ravel() - first)[:-1]  # every second piece is a window
    if known.all():
        return np.add.reduceat(part, pairs, dtype=np.float64)[::2] / (ends - starts)
    sums = np.add.reduceat(np.where(known, part, 0), pairs, dtype=np.float64)[::2]
    counts = np.add.reduceat(known, pairs, dtype=np.int64)[::2]
    return np.divide(sums, counts, out=np.full(len(sums), math.nan), where=counts > 0)


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic axis from `low` to `high`, with its ticks."""

    low: float
    high: float
    log: bool = False
    ticks: tuple[float, ...] = ()

    def place(self, values: np.ndarray) -> np.ndarray:
        """0 at `low`, 1 at `high`; on a log axis what is not positive lies below it."""
        if not self.log:
            return (np.asarray(values, float) - self.low) / (self.high - self.low)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log10(np.maximum(np.asarray(values, float), 0))
        return (logs - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))


_NICE = (1.0, 1.1, 1.25, 1.4, 1.6, 1.8, 2.0, 2.25, 2.5, 2.8, 3.2, 3.6, 4.0, 4.5, 5.0, 5.6, 6.4, 7.2, 8.0, 9.0)
_ROUND = (1.0, 2.0, 2.5, 5.0)


def nice(value: float, steps: Sequence[float] = _NICE) -> float:
    """The least round number that is not below `value` > 0."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step for step in (*steps, 10.0) if step * power >= value * (1 - 1e-9)) * power


def limits(bins: Sequence[Bins], clip: bool) -> tuple[float, float]:
    """The least and the greatest value to show; with `clip`, rare columns far outside may be cut off."""
    lows, highs = np.concatenate([b.low for b in bins]), np.concatenate([b.high for b in bins])
    lows, highs = lows[~np.isnan(lows)], highs[~np.isnan(highs)]
    low, high = float(lows.min()), float(highs.max())
    if clip and len(lows) >= 20:
        inner_low, inner_high = np.quantile(lows, 0.02), np.quantile(highs, 0.97)
        room = 0.5 * (inner_high - inner_low)
        low = low if low >= inner_low - room else float(inner_low)
        high = high if high <= inner_high + room else float(inner_high)
    return low, high


def linear_scale(low: float, high: float, rows: int) -> Scale:
    """Round limits around low..high, with ticks an equal and whole number of rows apart."""
    if 0 < low <= 0.4 * high:
        low = 0.0
    width = max(high - low, 1e-5 * max(abs(high), abs(low)), 1e-30)
    scales = [_linear_with_gap(low, high, width, rows, gap) for gap in range(2, max(3, rows // 2 + 1))]
    wanted = min(max(rows / 4, 4), 7)  # ticks
    return min(scales, key=lambda scale: (scale.high - scale.low) * (1 + 0.05 * abs(len(scale.ticks) - wanted)))


def _linear_with_gap(low: float, high: float, width: float, rows: int, gap: int) -> Scale:
    step, start, half, end = width * gap / rows, 0.0, 0.0, -math.inf
    while end < high - 1e-9 * width:
        step = nice(step * 1.0001, _ROUND)
        start = math.floor(low / step + 1e-9) * step
        half = step / gap / 2  # ticks lie in the middle of their rows
        end = start - half + step * rows / gap
    return Scale(start - half, end, False, tuple(start + i * step for i in range((rows - 1) // gap + 1)))


def log_scale(low: float, high: float, rows: int) -> Scale:
    """Limits that are 1, 2 or 5 times a power of ten; ticks at the decades, or at 1-2-5 within two of them."""
    high = high if high > 0 else 1.0
    low = min(max(low, high * 1e-12, 1e-300) if low > 0 else high * 1e-3, high)
    top = nice(high * 1.0001, (1.0, 2.0, 5.0))
    power = 10.0 ** math.floor(math.log10(low))
    bottom = max(step * power for step in (1.0, 2.0, 5.0) if step * power <= low * (1 + 1e-9) or step == 1)
    bottom = min(bottom, top / 2)
    exponents = range(math.floor(math.log10(bottom) + 1e-9), math.ceil(math.log10(top) - 1e-9) + 1)
    thin = max(1, -(-2 * len(exponents) // max(rows, 1)))
    marks = (1.0,) if top / bottom > 10 ** (rows / 6 + 1) else (1.0, 2.0, 5.0) if rows > 5 else (1.0, 3.0)
    ticks = [m * 10.0**e for e in exponents if len(marks) > 1 or e % thin == 0 for m in marks]
    return Scale(bottom, top, True, tuple(t for t in ticks if bottom * 0.999 <= t <= top * 1.001))


def bridged(values: np.ndarray, broken: np.ndarray) -> np.ndarray:
    """Empty columns filled in a straight line between their neighbours, except across a broken one."""
    known = np.flatnonzero(~np.isnan(values))
    if not len(known):
        return values
    at = np.arange(len(values))
    full = np.interp(at, known, values[known], left=math.nan, right=math.nan)
    breaks = np.cumsum(broken)
    after = known[np.minimum(np.searchsorted(known, at), len(known) - 1)]
    before = known[np.maximum(np.searchsorted(known, at, "right") - 1, 0)]
    full[breaks[after] != breaks[before]] = math.nan
    full[known] = values[known]
    return full


def ribbon(low: np.ndarray, high: np.ndarray, dots: int) -> np.ndarray:
    """Dots (dots, columns) between two curves given as places 0..1 per column, joined to their neighbours.

    Row 0 is the top.  With low = high it is a line.  What lies outside 0..1 is not drawn.
    """
    with np.errstate(invalid="ignore"):
        bottom = np.floor(np.clip(low, -1, 2) * dots)
        top = np.floor(np.clip(high, -1, 2) * dots)
    top[top == dots] -= high[top == dots] <= 1  # the upper limit itself belongs to the top row
    bottom[bottom == dots] -= low[bottom == dots] <= 1
    joined_bottom, joined_top = bottom.copy(), top.copy()
    joined_bottom[1:] = np.fmin(bottom[1:], top[:-1] + 1)
    joined_top[1:] = np.fmax(top[1:], bottom[:-1] - 1)
    height = np.arange(dots)[::-1, None]
    empty = np.isnan(bottom) | np.isnan(top)
    return (height >= joined_bottom) & (height <= joined_top) & ~empty


def braille(dots: np.ndarray) -> np.ndarray:
    """Dots (4 rows, 2 columns to a cell) as braille patterns: code points (rows, columns), 0 where empty."""
    rows, columns = dots.shape[0] // 4, dots.shape[1] // 2
    cells = dots.reshape(rows, 4, columns, 2).transpose(0, 2, 1, 3).reshape(rows, columns, 8)
    codes = cells @ np.array([1, 8, 2, 16, 4, 32, 64, 128])
    return np.where(codes > 0, 0x2800 + codes, 0)


# ---------------------------------------------------------------- the view: what is shown, and how


class Series(NamedTuple):
    """A column of a run's log, as it is named and coloured on the screen."""

    name: str
    table: str
    colour: str
    best: str  # which value is the remarkable one: the "least", the "most" or none ("-")
    unit: str
    tag: str  # at the end of its line
    label: str  # in the table of numbers


# {dual}, {eps0}, ... are filled in from the run's own configuration
SERIES = {
    words[0]: Series(*words[:6], " ".join(words[6:]))
    for line in """\
loss                   step   c0  least  nats       train   loss
penalty                step   c1  least  nats       -       penalty
share_pct              step   c5  most   %          -       share %
grad_norm_mean         step   c2  least  nats/unit  mean    {dual} mean
grad_norm_max          step   c3  most   nats/unit  max     {dual} max
fd_error_pct           step   c1  most   %          exact   FD error %
lr                     step   c0  -      -          -       lr
images_per_s           step   c2  most   1/s        -       images/s
test_loss              epoch  c4  least  nats       test    test loss
clean_error_pct        epoch  c2  least  %          clean   clean %
attacked_error_pct     epoch  c4  least  %          att.    attacked %
omega.0                epoch  c5  least  -          {eps0}  ω({eps0})
omega.1                epoch  c0  least  -          {eps1}  ω({eps1})
omega.2                epoch  c2  least  -          {eps2}  ω({eps2})
omega.3                epoch  c1  least  -          {eps3}  ω({eps3})
margin_grad_norm_mean  epoch  c2  least  1/unit     mean    margin
margin_grad_norm_max   epoch  c3  most   1/unit     max     margin max
fd_rounding_pct        epoch  c0  most   %          round   FD round %
seconds                epoch  c1  -      s          -       train s
""".splitlines()
    for words in [line.split()]
}


class Panel(NamedTuple):
    title: str
    series: tuple[Series, ...]


def _panel(title: str, *names: str) -> Panel:
    return Panel(title, tuple(SERIES[name] for name in names))


PANELS = (
    _panel("loss", "loss", "test_loss"),
    _panel("penalty λ/2·R", "penalty"),
    _panel("gradient {dual}", "grad_norm_mean", "grad_norm_max"),
    _panel("modulus ω", *OMEGAS),
    _panel("error", "clean_error_pct", "attacked_error_pct"),
)
EXTRAS = (  # the last panel shows one of these
    _panel("penalty share", "share_pct"),
    _panel("finite difference", "fd_error_pct", "fd_rounding_pct"),
    _panel("margin gradient {dual}", "margin_grad_norm_mean", "margin_grad_norm_max"),
    _panel("learning rate", "lr"),
    _panel("images/s", "images_per_s"),
)
COUNT = len(PANELS) + 1


@dataclass(frozen=True)
class View:
    """Everything a key can change.  Values of x are in units of the x axis."""

    focus: int = 0
    full: bool = False
    logs: frozenset[int] = frozenset({2})  # panels with a logarithmic y axis
    axis: str = "step"
    log_x: bool = False
    smooth: int | None = None  # records in the mean; None: by the length of the run
    window: float | None = None  # follow the last so many steps
    zoom: tuple[float, float] | None = None
    cursor: float | None = None
    clip: bool = True
    extra: int = 0
    paused: bool = False
    message: str = ""

    def settled(self, runs: Sequence[Run]) -> "View":
        """This view with its smoothing decided: a thirtieth of the records, at most 100."""
        records = max(len(run.log.tables["step"]) for run in runs)
        fitting = [k for k in SMOOTHINGS if k <= min(records / 30, 100)]
        return replace(self, smooth=self.smooth or max(fitting, default=1))

    def panel(self, index: int) -> Panel:
        return PANELS[index] if index < len(PANELS) else EXTRAS[self.extra % len(EXTRAS)]


SMOOTHINGS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000)
DUALS = {"l2": "‖∇‖₂", "linf": "‖∇‖₁", "l1": "‖∇‖∞"}


def named(run: Run, text: str) -> str:
    """A label with the run's own norm and radii in it."""
    radii = run.config.get("omega_eps")
    radii = [finite(radius) for radius in radii] if isinstance(radii, list) else []
    known = {f"eps{i}": f"ε{i}" for i in range(len(OMEGAS))}
    known |= {f"eps{i}": short(radius) for i, radius in enumerate(radii) if radius > 0}
    return text.format(dual=DUALS.get(clean(run.option("norm")), "‖∇‖"), **known) if "{" in text else text.strip("-")


Span = tuple[float, float]


def x_range(runs: Sequence[Run], view: View, dots: int) -> Span:
    """The x at the left and right edge.  It stays put while a run grows, so that few cells change."""
    if view.zoom:
        return view.zoom
    axes = [table.axis(view.axis) for run in runs for table in run.log.tables.values() if len(table)]
    if not axes:
        return 0.0, 1.0
    low, high = min(float(x[0]) for x in axes), max(float(x[-1]) for x in axes)
    if view.window:
        return _following(runs, view, high)
    low = 0.0 if 0 <= low < 0.3 * high and not view.log_x else low
    if not high > low:
        return low - 0.5 * (view.axis != "time"), low + 1.0
    growing = any(run.step < run.total for run in runs) and not view.log_x
    return low, low + nice((high - low) / dots) * dots if growing else high


def _following(runs: Sequence[Run], view: View, high: float) -> tuple[float, float]:
    width = view.window
    if view.axis != "step":  # the same steps, on another axis
        spans = [_last_steps(run.log.tables["step"], view) for run in runs]
        width = max([span for span in spans if span > 0], default=1.0)
    jump = width / 8
    right = math.ceil(high / jump + 1e-9) * jump
    return right - width, right


def _last_steps(table: Table, view: View) -> float:
    if not len(table):
        return 0.0
    step, x = table.axis("step"), table.axis(view.axis)
    return float(x[-1] - x[np.searchsorted(step, step[-1] - view.window)])


def edges_of(left: float, right: float, dots: int, log_x: bool) -> np.ndarray:
    """The borders of the dot columns; the last one includes its right border."""
    if log_x:
        left = max(left, right * 1e-6, 1e-300)
        edges = np.geomspace(left, max(right, left * 1.01), dots + 1)
    else:
        edges = np.linspace(left, right, dots + 1)
    edges[-1] = np.nextafter(edges[-1], np.inf)
    return edges


# ---------------------------------------------------------------- painting: pure, one list of lines a screen

Line = list[tuple[str, str]]  # (text, role): the roles are in `Theme`
GUTTER = 7  # cells left of a plot: tick labels and the axis


def width_of(line: Line) -> int:
    return sum(cell_len(text) for text, _ in line)


def fit(line: Line, width: int) -> Line:
    """The line, cut or padded to exactly `width` cells."""
    out, left = [], width
    for text, role in line:
        size = cell_len(text)
        if size > left:
            text, size = set_cell_size(text, left), left
        if text:
            out.append((text, role))
        left -= size
    return [*out, (" " * left, "")] if left else out


def block(lines: Sequence[Line], width: int, height: int) -> list[Line]:
    """The lines, cut or padded to exactly width x height cells."""
    return [fit(line, width) for line in (*lines[:height], *[[]] * (height - len(lines)))]


def beside(*blocks: Sequence[Line]) -> list[Line]:
    """Blocks of the same height, next to each other."""
    return [[part for line in lines for part in line] for lines in zip(*blocks, strict=True)]


def rule(width: int, title: Line, right: str = "", heavy: bool = False) -> Line:
    """A titled horizontal rule."""
    stroke, role = ("━", "accent") if heavy else ("─", "rule")
    title = fit(title, min(width_of(title), max(0, width - cell_len(right) - 6)))
    end = [(f" {right} ", "dim"), (stroke, role)] if right else []
    middle = max(0, width - 3 - width_of(title) - width_of(end))
    return fit([(stroke, role), (" ", ""), *title, (" ", ""), (stroke * middle, role), *end], width)


def joined(parts: Iterable[Line], width: int, gap: str = "   ") -> Line:
    """The parts in one line, without those for which there is no room."""
    line: Line = []
    for part in parts:
        space = [(gap, "")] if line else []
        if width_of(line) + width_of(space) + width_of(part) <= width:
            line += [*space, *part]
    return line


class Curve(NamedTuple):
    """A series of one run on the dot columns of a chart."""

    run: Run
    series: Series
    colour: str
    tag: str
    bins: Bins
    band: bool  # whether its envelope is drawn


class Geometry(NamedTuple):
    """The cells of the plot within a chart, and those right of it for the names of the lines."""

    width: int
    height: int
    tags: int


def geometry(runs: Sequence[Run], view: View, panel: int, width: int, height: int) -> Geometry:
    tags = 6 if len(view.panel(panel).series) > 1 else 1
    if len(runs) > 1:
        tags = min(max(cell_len(run.name) for run in runs), 9) + 1
    return Geometry(max(4, width - GUTTER - tags), max(1, height - 2), tags)


def curves_of(runs: Sequence[Run], view: View, panel: Panel, edges: np.ndarray) -> list[Curve]:
    """All series of one run, or one series of all runs (coloured by run)."""
    if len(runs) > 1:
        series = panel.series[view.extra % len(panel.series)]
        wanted = [(run, series, f"c{i}", run.name) for i, run in enumerate(runs)]
    else:
        wanted = [(runs[0], series, series.colour, named(runs[0], series.tag)) for series in panel.series]
    curves = []
    for run, series, colour, tag in wanted:
        table = run.log.tables[series.table]
        smooth = view.smooth if series.table == "step" else 1
        bins = binned(table, series.name, table.axis(view.axis), edges, smooth)
        if len(runs) > 1:  # envelopes would hide each other
            bins = bins._replace(low=bins.line, high=bins.line)
        band = series.table == "step" and len(runs) == 1 and not curves
        if not np.isnan(bins.line).all():
            curves.append(Curve(run, series, colour, tag, bins, band))
    return curves


def chart(runs: Sequence[Run], view: View, index: int, width: int, height: int, span: Span) -> list[Line]:
    """One panel, from its title to its x axis, in exactly width x height cells."""
    size = geometry(runs, view, index, width, height)
    edges = edges_of(*span, size.width * 2, view.log_x)
    curves = curves_of(runs, view, view.panel(index), edges)
    column = cell_at(view.cursor, edges)
    log = index in view.logs
    title = chart_title(runs, view, index, curves, column, width - 12 if log else width - 6)
    head = rule(width, title, "log" if log else "", index == view.focus)
    if not curves:
        return [head, *centred([[("no data", "dim")]], width, height - 1)]
    bounds = limits([curve.bins for curve in curves], view.clip)
    scale = (log_scale if log else linear_scale)(*bounds, size.height)
    cells, roles = drawn(curves, scale, size)
    mark(cells, roles, curves, scale, view, edges)
    if column is not None:
        free = cells[:, column] == ord(" ")
        cells[free, column], roles[free, column] = ord("│"), "dim"
    plot = [parts_of(cells[y], roles[y]) for y in range(size.height)]
    return [
        head,
        *beside(tick_labels(scale, size.height), plot, line_tags(curves, scale, size)),
        x_labels(runs, view, edges, width, size),
    ]


def drawn(curves: Sequence[Curve], scale: Scale, size: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Characters and roles (rows, columns): a shaded envelope where there is a band, and a line for each curve."""
    dots = 4 * size.height
    cells = np.full((size.height, size.width), ord(" "))
    roles = np.full(cells.shape, "", dtype=object)
    shaded = np.zeros(cells.shape, bool)
    lines = np.zeros((dots, 2 * size.width), bool)
    if curves[0].band:
        bins, colour = curves[0].bins, curves[0].colour
        low, high = (bridged(scale.place(values), bins.broken) for values in (bins.low, bins.high))
        codes = braille(mask := ribbon(low, high, dots))
        shaded = mask.reshape(size.height, 4, size.width, 2).sum(axis=(1, 3)) >= 5
        cells, roles[codes > 0] = np.where(codes > 0, codes, cells), f"{colour}-"
        roles[codes == 0x28FF] = f"{colour}="
    for curve in reversed(curves):  # the first one on top
        place = bridged(scale.place(curve.bins.line), curve.bins.broken)
        lines |= (mask := ribbon(place, place, dots))
        here = braille(mask) > 0
        cells[here] = braille(lines)[here]
        roles[here] = np.where(shaded[here], f"{curve.colour}/{curves[0].colour}", curve.colour)
    return cells, roles


def mark(
    cells: np.ndarray, roles: np.ndarray, curves: Sequence[Curve], scale: Scale, view: View, edges: np.ndarray
) -> None:
    """▴ above columns with values beyond the axis, ▾ below them, ✗ where a value was not finite."""
    for run, series, colour, _, bins, _ in curves:
        with np.errstate(invalid="ignore"):
            over, under = scale.place(bins.high) > 1 + 1e-9, scale.place(bins.low) < -1e-9
        for row, sign, out in ((0, "▴", over), (-1, "▾", under)):
            columns = np.unique(np.flatnonzero(out) // 2)
            cells[row, columns], roles[row, columns] = ord(sign), colour
        steps = [step for step, name in run.log.nonfinite if name == series.name]
        columns = cells_of_steps(run, steps, series.table, view, edges)
        cells[0, columns], roles[0, columns] = ord("✗"), "bad+"


def cells_of_steps(run: Run, steps: Sequence[float], table: str, view: View, edges: np.ndarray) -> list[int]:
    """The cells of a plot in which the first records at or after these steps lie, as far as they are visible."""
    rows = run.log.tables[table]
    if not len(steps):
        return []
    at = np.searchsorted(rows.x["step"][: len(rows)], steps)
    found = (cell_at(float(x), edges) for x in rows.axis(view.axis)[at[at < len(rows)]])
    return [cell for cell in found if cell is not None]


def cell_at(x: float | None, edges: np.ndarray) -> int | None:
    """The cell of a plot that holds `x`."""
    if x is None or not edges[0] <= x <= edges[-1]:
        return None
    return min(int(np.searchsorted(edges, x, "right")) - 1, len(edges) - 2) // 2


def parts_of(cells: np.ndarray, roles: np.ndarray) -> Line:
    """A row of characters as parts of equal role."""
    text = "".join(map(chr, cells.tolist()))
    cuts = [0, *(np.flatnonzero(roles[1:] != roles[:-1]) + 1).tolist(), len(text)]
    return [(text[a:b], roles[a]) for a, b in pairwise(cuts)]


def tick_labels(scale: Scale, rows: int) -> list[Line]:
    labels: dict[int, str] = {}
    for tick, place in zip(scale.ticks, scale.place(np.array(scale.ticks)).tolist(), strict=True):
        row = rows - 1 - min(rows - 1, math.floor(place * rows + 1e-9))
        if row not in labels and row + 1 not in labels:
            labels[row] = short(round(tick, 12) if abs(tick) > 1e-9 or not scale.log else tick)[:6]
    blank = [(" " * 6, ""), ("│", "axis")]
    return [[(f"{labels[y]:>6}", "dim"), ("┤", "axis")] if y in labels else blank for y in range(rows)]


def line_tags(curves: Sequence[Curve], scale: Scale, size: Geometry) -> list[Line]:
    """The names of the lines beside their ends, moved apart where they would collide."""
    ends = []
    for curve in curves:
        line = curve.bins.line[~np.isnan(curve.bins.line)]
        if len(line) and size.tags > 1:
            ends.append((float(np.clip(scale.place(line[-1:])[0], 0, 0.999)), curve))
    rows: dict[int, Line] = {}
    ends = sorted(ends, key=itemgetter(0), reverse=True)[: size.height]
    for below, (place, curve) in zip(range(len(ends) - 1, -1, -1), ends, strict=True):
        wanted = size.height - 1 - math.floor(place * size.height)
        row = max(max(rows, default=-1) + 1, min(wanted, size.height - 1 - below))
        rows[row] = [(" ", ""), (set_cell_size(curve.tag, size.tags - 1), curve.colour)]
    return [fit(rows.get(y, []), size.tags) for y in range(size.height)]


def x_labels(runs: Sequence[Run], view: View, edges: np.ndarray, width: int, size: Geometry) -> Line:
    """The x axis with its ticks, and ↻ where the run was resumed."""
    row = list(f"{'└':>{GUTTER}}{'─' * size.width}".ljust(width))
    left, right, free = float(edges[0]), float(edges[-1]), 0
    if view.log_x:
        ticks = [10.0**e for e in range(math.ceil(math.log10(left)), math.floor(math.log10(right)) + 1)]
    else:
        gap = nice((right - left) / max(2, size.width // 12), _ROUND)
        ticks = [gap * i for i in range(math.ceil(left / gap - 1e-6), math.floor(right / gap + 1e-6) + 1)]
    for tick in ticks:
        label = duration(tick) if view.axis == "time" else short(round(tick, 9))
        at = GUTTER + (cell_at(min(max(tick * (1 + 1e-12), left), right), edges) or 0)
        start = min(max(at - len(label) // 2, GUTTER), width - len(label))
        if start >= free:
            row[start : start + len(label)], free = label, start + len(label) + 1
    for column in cells_of_steps(runs[0], runs[0].log.resumes, "step", view, edges) if len(runs) == 1 else ():
        places = [i for i in range(GUTTER, GUTTER + size.width) if row[i] == "─"]
        row[min(places, key=lambda i: abs(i - GUTTER - column), default=GUTTER)] = "↻"
    return fit([("".join(row), "axis")], width)


def chart_title(
    runs: Sequence[Run], view: View, index: int, curves: Sequence[Curve], column: int | None, width: int
) -> Line:
    """Number, name and unit; with a cursor, the values under it instead of the unit."""
    panel, focus = view.panel(index), "accent+" if index == view.focus else "bright+"
    series = panel.series[view.extra % len(panel.series) if len(runs) > 1 else 0]
    name = f"{index + 1} {named(runs[0], panel.title)}"
    parts: list[Line] = [[(name, focus)]]
    if len(runs) > 1 and len(panel.series) > 1:
        parts.append([(named(runs[0], series.tag), "text")])
    if column is None:
        method = clean(runs[0].config.get("omega_method") or "", 12) if series.name in OMEGAS else ""
        return joined([*parts, [(method or series.unit.strip("-"), "dim")]], width, " ")
    cell = slice(2 * column, 2 * column + 2)  # two columns of dots
    for curve in curves:
        line = bridged(curve.bins.line, curve.bins.broken)[cell]
        line = line[~np.isnan(line)]
        parts.append([(number(float(line[-1])) if len(line) else "–", curve.colour + "+")])
    for curve in curves:
        if curve.band and not np.isnan(curve.bins.low[cell]).all():
            low, high = np.fmin.reduce(curve.bins.low[cell]), np.fmax.reduce(curve.bins.high[cell])
            parts.append([(f"[{number(float(low))}, {number(float(high))}]", "dim")])
    return joined(parts, width, " ")


def header(runs: Sequence[Run], view: View, width: int, now: float) -> Line:
    """State, name, progress and age: what fits, the dearest first."""
    if len(runs) > 1:
        states = [(run, run.state(now)) for run in runs]
        parts = [[(f"━ {run.name} ", f"c{i}+"), (f"{s.symbol} {s.word}", s.role)] for i, (run, s) in enumerate(states)]
        return fit(joined(parts, width), width)
    run, state = runs[0], runs[0].state(now)
    name = run.name if len(run.name) <= width // 4 else run.name[: width // 4 - 1] + "…"
    parts = [[(f"{state.symbol} {state.word}", state.role + "+")], [(name, "bright+")], *flags(run, view)]
    room = max(0, width - width_of(joined(parts, width)) - 3)
    role = "bad" if state.role == "bad" else "warn"
    note = [(set_cell_size(state.note, min(room, cell_len(state.note))), role)] if state.note and room else []
    if not math.isnan(run.step):
        total, epochs = (f"/{x:,.0f}" if x > 0 else "" for x in (run.total, finite(run.option("epochs"))))
        parts += [note] if state.role != "good" else []
        parts.append([("step ", "dim"), (f"{run.step:,.0f}{total}", "text")])
        parts.append([("epoch ", "dim"), (f"{run.log.last['epoch']:.1f}{epochs}".replace("nan", "–"), "text")])
        left = ("took", run.elapsed()) if state.ended else ("ETA", run.eta() if state.word == "LIVE" else math.nan)
        parts.append([(f"{left[0]} ", "dim"), (duration(left[1]), "text+")])
        parts += [note] if state.role == "good" else []
    return fit(joined([part for part in parts if part], width), width)


def flags(run: Run, view: View) -> list[Line]:
    """What must not be overlooked, whatever the state is."""
    parts: list[Line] = []
    if view.paused:
        parts.append([("‖ PAUSED", "warn+")])
    if run.loaded < 1:
        parts.append([(f"reading {run.loaded:.0%}", "warn")])
    if run.log.first_nonfinite:
        step, name = run.log.first_nonfinite
        parts.append([(f"✗ NaN {name} @{step:,.0f} ×{run.log.nonfinite_count}", "bad+")])
    if run.log.resumes:
        parts.append([(f"↻ resumed @{run.log.resumes[-1]:,.0f}", "warn")])
    if run.tail.error and run.exists and run.log.lines:
        parts.append([(f"metrics.jsonl: {run.tail.error}", "bad")])
    return parts


def progress(run: Run, width: int, role: str) -> Line:
    """A thin bar and the share of the steps that is done."""
    share = run.step / run.total if run.total > 0 and run.step > 0 else 0.0
    full, half = divmod(min(2 * (width - 8), round(2 * share * (width - 8))), 2)
    rest = width - 8 - full - half
    return [("━" * full + "╸" * half, role), ("─" * rest, "rule"), (f"{share:7.1%} " if share else " " * 8, "dim")]


def numbers_line(run: Run, width: int) -> Line:
    """The most watched numbers in one line, for screens without room for the table."""
    wanted = [panel.series[i] for i in (0, 1) for panel in PANELS if len(panel.series) > i]
    values = [(series, last_value(run, series)) for series in wanted]
    parts = [[(f"{named(run, s.label)} ", s.colour), (number(value), "text+")] for s, value in values if value == value]
    return fit([(" ", ""), *joined(parts, width - 2, "  ")], width)


def last_value(run: Run, series: Series) -> float:
    """The latest value that is a number."""
    recent = run.log.tables[series.table].column(series.name)[-200:]
    recent = recent[~np.isnan(recent)]
    return float(recent[-1]) if len(recent) else math.nan


def recent_mean(run: Run, series: Series, smooth: int) -> float:
    values = run.log.tables[series.table].column(series.name)[-smooth:]
    return float(np.nanmean(values, dtype=np.float64)) if not np.isnan(values).all() else math.nan


def best_of(run: Run, series: Series) -> tuple[float, float]:
    """(least value, or greatest where that is the remarkable one; its step): over all records; NaN for neither."""
    table, most = run.log.tables[series.table], series.best == "most"
    values = (table.high if most else table.low).get(series.name, _NOTHING)[: len(table)]
    best = (np.fmax if most else np.fmin).reduce(values) if len(values) and series.best != "-" else math.nan
    return float(best), float(table.x["step"][np.argmax(values == best)]) if best == best else math.nan


def sidebar(run: Run, view: View, width: int, height: int, now: float) -> list[Line]:
    """The table of numbers, then whatever else the run's directory says, as far as there is room."""
    rows = {
        kind: [numbers_row(run, s, view.smooth) for s in SERIES.values() if s.table == kind] for kind in run.log.tables
    }
    rows = {kind: [row for row in found if row] for kind, found in rows.items()}
    lines = [NUMBERS_HEAD, *rows["step"]]
    if rows["epoch"]:
        lines += [section("per epoch"), *rows["epoch"]]
    lines += [*evaluation(run), section("run"), *facts(run, now)]
    return block([[(" ", ""), *line] for line in lines], width, height)


def section(title: str) -> Line:
    return [(f"{title} ", "dim"), ("─" * (41 - cell_len(title)), "rule")]


NUMBERS_HEAD: Line = [(f"{'':<12}{'last':>8}{'mean':>8}{'best':>8} at", "dim")]


def numbers_row(run: Run, series: Series, smooth: int, label: str = "", colour: str = "") -> Line | None:
    """Last, mean and best value of a series; None if it has none."""
    value, (best, at) = last_value(run, series), best_of(run, series)
    if math.isnan(value):
        return None
    mean = number(recent_mean(run, series, smooth)) if series.table == "step" else ""
    return [
        ("━ ", colour or series.colour),
        (set_cell_size(label or named(run, series.label), 10), "text"),
        (f"{number(value):>8}", "bright+"),
        (f"{mean:>8}{number(best) if best == best else '':>8}", "text"),
        (f"{'▴' if series.best == 'most' else ' '}{short(float(f'{at:.3g}')) if best == best else '':<5}", "dim"),
    ]


def facts(run: Run, now: float) -> list[Line]:
    """Times, speed, health and what was configured."""
    log, age = run.log, now - run.log.last["time"]
    shown = "–" if run.state(now).ended else "now" if age < 3 else duration(age)
    pairs = [
        (("elapsed", duration(run.elapsed())), ("steps/s", number(run.steps_per_second()))),
        (("records", f"{log.lines:,}"), ("last", shown)),
        (("not finite", f"{log.nonfinite_count:,}"), ("bad lines", f"{log.skipped:,}")),
    ]
    if log.void_count:
        pairs.append((("undone", f"{log.void_count:,}"), ("resumes", f"{len(log.resumes)}")))
    bad = {"not finite"} if log.nonfinite_count else set()
    bad |= {"bad lines"} if log.skipped else set()
    lines = [
        [
            part
            for label, value in pair
            for part in ((f"{label:<10}", "dim"), (f"{value:>9}  ", "bad+" if label in bad else "text+"))
        ]
        for pair in pairs
    ]
    words = [
        clean(run.option(name), 16) for name in ("dataset", "model", "activation", "method", "norm") if run.option(name)
    ]
    signs = {"lam": "λ=", "h": "h=", "batch_size": "batch ", "seed": "seed "}
    more = [f"{sign}{clean(run.option(name), 9)}" for name, sign in signs.items() if run.option(name) is not None]
    return [*lines, [(" ".join(words), "text")], [(" ".join(more), "text")]]


def evaluation(run: Run) -> list[Line]:
    """The attacked distances and the bounds of evaluation/summary.json."""
    norms = run.summary.get("norms")
    norms = {k: v for k, v in norms.items() if isinstance(v, dict)} if isinstance(norms, dict) else {}
    if not run.summary:
        return []
    images, error = finite(run.summary.get("images")), finite(run.summary.get("clean_error_pct"))
    lines = [section(f"evaluation, {images:,.0f} images" if images > 0 else "evaluation")]
    lines.append(
        [(f"{f'clean error {number(error)} %':<20}", "text"), ("".join(f"{clean(k, 9):>10}" for k in norms), "dim")]
    )
    for key, label in _SUMMARY.items():
        values = [finite(norm.get(key)) for norm in norms.values()]
        role = "bad+" if key == "violations_pct" and any(value > 0 for value in values) else "text+"
        lines.append([(f"{label:<20}", "dim"), ("".join(f"{number(value):>10}" for value in values), role)])
    return lines


_SUMMARY = {
    **{"mean_distance": "mean distance", "median_distance": "median distance"},
    **{"lipschitz_bound_mean": "L-bound, mean", "omega_bound_mean": "ω-bound, mean", "violations_pct": "violations %"},
}


def compared(runs: Sequence[Run], view: View, width: int, height: int) -> list[Line]:
    """For each quantity one row a run, then the options in which the runs differ."""
    lines: list[Line] = [section("what differs")]
    for key, values in differences(runs):
        parts = [part for i, value in enumerate(values) for part in ((" ", ""), (clean(value, 12), f"c{i}"))]
        lines.append([(f"{clean(key, 12):<12}", "dim"), *parts])
    lines.append(NUMBERS_HEAD)
    for panel in PANELS:
        at = view.extra % len(panel.series)
        for series in panel.series if len(runs) == 2 else panel.series[at : at + 1]:
            rows = [numbers_row(run, series, view.smooth, run.name, f"c{i}") for i, run in enumerate(runs)]
            if any(rows):
                lines += [section(named(runs[0], series.label)), *(row for row in rows if row)]
    return block([[(" ", ""), *line] for line in lines], width, height)


def differences(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """(option, its value in each run) for the options that are not the same in all runs."""
    options = [run.config.get("options") for run in runs]
    options = [o if isinstance(o, dict) else {} for o in options]
    rows = [(key, [o.get(key, "–") for o in options]) for key in sorted({key for o in options for key in o})]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def event_lines(run: Run, width: int, height: int) -> list[Line]:
    """The last events, the newest at the bottom."""
    lines = []
    for at, step, kind, text in list(run.log.events)[-height:]:
        clock = time.strftime("%H:%M:%S", time.localtime(at)) if at > 0 else "--:--:--"
        where = f"{step:>11,.0f}" if not math.isnan(step) else f"{'':>11}"
        role = _EVENT_ROLES.get(kind, "text")
        lines.append([(f" {clock}", "dim"), (where, "accent"), (f"   {kind:<11}", role), (text, role)])
    return block(lines, width, height)


_EVENT_ROLES = {
    **{"warning": "warn", "error": "bad+", "interrupt": "warn", "finish": "good", "resume": "warn"},
    **{"checkpoint": "dim", "start": "dim"},
}
FOOTER = (
    "q quit,? help,1-6 panel,tab focus,y log,x axis,[ ] smooth,f follow,+ - zoom,← → cursor,r runs,e events,m more,"
    "p pause,w csv,S svg,t theme"
)


def footer(view: View, width: int) -> Line:
    """The keys, as many as fit, and at the right what is shown along x; or a message."""
    if view.message:
        return fit([(f" {view.message}", "warn+")], width)
    shown = "zoomed" if view.zoom else f"last {short(view.window)} steps" if view.window else f"all {view.axis}s"
    if view.cursor is not None:
        where = duration(view.cursor) if view.axis == "time" else f"{view.cursor:,.6g}"
        shown = f"{view.axis} {where}"
    right = f"{shown}{' · log x' if view.log_x else ''} · mean {view.smooth} "
    keys = [item.rpartition(" ") for item in FOOTER.split(",")]
    left = joined([[(key, "accent+"), (f" {word}", "dim")] for key, _, word in keys], width - len(right) - 3, " ")
    return [*fit([(" ", ""), *left], width - len(right)), (right, "dim")]


class Box(NamedTuple):
    """A chart's place on the screen."""

    panel: int
    x: int
    y: int
    width: int
    height: int


class Layout(NamedTuple):
    boxes: tuple[Box, ...]
    side: int  # width of the table of numbers, 0 for none
    numbers: int  # rows of numbers above the charts
    events: int  # rows of events, with their rule
    top: int  # rows of the header
    area: int  # rows of the charts


def layout(view: View, width: int, height: int) -> Layout:
    """Who gets which cells.  110 columns: charts and numbers side by side; less: charts; least: one chart."""
    top = 1 if height < 16 else 2
    side = 44 if width >= 110 and not view.full else 0
    numbers = int(not side and height >= 20)
    events = 0 if height < 22 or view.full else 3 if height < 34 else 4
    area = height - top - numbers - events - 1
    columns = 1 if view.full else max(1, min(3, (width - side) // 38))
    rows = 1 if view.full else max(1, min(-(-COUNT // columns), area // 8))
    count = min(COUNT, rows * columns)
    first = view.focus if view.full else max(0, min(view.focus // count * count, COUNT - count))
    boxes = []
    for i in range(count):
        row, column = divmod(i, columns)
        x0, x1 = ((width - side) * k // columns for k in (column, column + 1))
        y0, y1 = (area * k // rows for k in (row, row + 1))
        boxes.append(Box(first + i, x0, top + numbers + y0, x1 - x0 - (columns > 1), y1 - y0))
    return Layout(tuple(boxes), side, numbers, events, top, area)


def dashboard(runs: Sequence[Run], view: View, width: int, height: int, now: float) -> list[Line]:
    """The whole screen: `height` lines of `width` cells."""
    if width < 40 or height < 10:
        return centred([[("terminal too small (need 40x10)", "warn")]], width, height)
    plan, run, view = layout(view, width, height), runs[0], view.settled(runs)
    state = run.state(now)
    lines = [fit([(" ", ""), *header(runs, view, width - 2, now)], width)]
    if plan.top > 1:
        lines.append(fit([(" ", ""), *progress(run, width - 1, state.role)], width))
    if len(runs) == 1 and state.word == "WAITING":
        return [*lines, *waiting(run, width, height - plan.top - 1), footer(view, width)]
    if plan.numbers:
        lines.append(numbers_line(run, width))
    body = charts(runs, view, plan, width - plan.side)
    if plan.side:
        size = plan.side - 1, plan.area
        table = compared(runs, view, *size) if len(runs) > 1 else sidebar(run, view, *size, now)
        body = beside(body, [[("│", "rule")]] * plan.area, table)
    lines += body
    if plan.events:
        lines += [rule(width, [("events", "dim")]), *event_lines(run, width, plan.events - 1)]
    return [*lines, footer(view, width)]


def charts(runs: Sequence[Run], view: View, plan: Layout, width: int) -> list[Line]:
    first = plan.boxes[0]
    span = x_range(runs, view, 2 * geometry(runs, view, first.panel, first.width, first.height).width)
    rows: list[Line] = []
    for _, boxes in groupby(plan.boxes, key=lambda box: box.y):
        blocks = [chart(runs, view, box.panel, box.width, box.height, span) for box in boxes]
        rows += beside(*[part for lines in blocks for part in (lines, [[(" ", "")]] * len(lines))])
    return block(rows, width, plan.area)


def waiting(run: Run, width: int, height: int) -> list[Line]:
    """The calm screen before the first record."""
    what = "no such run yet" if not run.exists else "no record yet" if not run.tail.error else run.tail.error
    what = "metrics.jsonl does not exist yet" if what == "no such file or directory" else what
    lines = [[("○", "accent+")], [], [(f"waiting for {clean(run.path)}", "bright+")], [(what, "dim")], []]
    lines += [[("start one:  ", "dim"), ("python train.py", "accent")], [("r  pick another run    q  quit", "dim")]]
    return centred(lines, width, height)


def centred(lines: Sequence[Line], width: int, height: int) -> list[Line]:
    lines = [[(" " * max(0, (width - width_of(line)) // 2), ""), *line] for line in lines]
    return block([*[[]] * max(0, (height - len(lines)) // 2), *lines], width, height)


# ---------------------------------------------------------------- colours

# Okabe and Ito's palette, which survives every common colour blindness, lightened or darkened for the ground.
THEMES: dict[str, dict[str, str]] = {
    "dark": {
        **{"ground": "#101317", "text": "#c9ced6", "dim": "#7d8590", "rule": "#2d333b", "axis": "#59616c"},
        **{"bright": "#f0f3f6", "accent": "#7cc4ff", "good": "#2fc796", "warn": "#f0b429", "bad": "#ff6a4d"},
        **{"c0": "#56b4e9", "c1": "#e69f00", "c2": "#2cbf8f", "c3": "#f0e442", "c4": "#ff7f50", "c5": "#d993bf"},
    },
    "light": {
        **{"ground": "#fcfcfa", "text": "#2f3640", "dim": "#6f7782", "rule": "#d5d8dc", "axis": "#8b929b"},
        **{"bright": "#0b0e12", "accent": "#005f9e", "good": "#007a57", "warn": "#a86400", "bad": "#c43c00"},
        **{"c0": "#0072b2", "c1": "#b87800", "c2": "#008a64", "c3": "#8f8300", "c4": "#d55e00", "c5": "#a9487f"},
    },
    "ansi": {
        **{"ground": "default", "text": "default", "dim": "bright_black", "rule": "bright_black"},
        **{"axis": "bright_black", "bright": "default", "accent": "cyan", "good": "green", "warn": "yellow"},
        **{"bad": "red", "c0": "blue", "c1": "yellow", "c2": "green", "c3": "bright_yellow", "c4": "red"},
        **{"c5": "magenta"},
    },
}


class Theme:
    """Roles to terminal styles."""

    def __init__(self, name: str, ascii_only: bool = False):
        self.name, self.colours, self.ascii_only = name, THEMES[name], ascii_only
        self._styles: dict[str, Style] = {}

    def style(self, role: str) -> Style:
        """`c` a colour, `c+` bold, `c-` the edge and `c=` the inside of its envelope, `c/d` on the envelope of d."""
        if role not in self._styles:
            self._styles[role] = self._make(role)
        return self._styles[role]

    def _make(self, role: str) -> Style:
        name, _, band = role.partition("/")
        kind = name[-1:] if name.endswith(("+", "-", "=")) else ""
        colour = self.colours.get(name.rstrip("+-="), self.colours["text"])
        ground = self.colours["ground"]
        if self.name == "ansi":
            return Style(color="bright_black" if kind in ("-", "=") else colour, bold=kind == "+")
        if kind == "=":
            inside = mixed(colour, ground, 0.24)
            return Style(color=inside, bgcolor=inside)
        colour = mixed(colour, ground, 0.5) if kind == "-" else colour
        return Style(
            color=colour, bgcolor=mixed(self.colours[band], ground, 0.24) if band else ground, bold=kind == "+"
        )

    def text(self, text: str, role: str) -> str:
        """The text itself, or with --ascii its nearest: dots of a line as *, of an envelope as :."""
        if not self.ascii_only or text.isascii():
            return text
        dot = ":" if role.endswith(("-", "=")) else "*"
        return "".join(dot if 0x2800 < ord(c) < 0x2900 else _ASCII.get(c, "?") if c > "~" else c for c in text)


def mixed(colour: str, ground: str, share: float) -> str:
    """`share` of one #rrggbb colour on another."""
    one, two = (bytes.fromhex(c[1:]) for c in (colour, ground))
    return "#" + bytes(round(share * a + (1 - share) * b) for a, b in zip(one, two, strict=True)).hex()


_ASCII = dict(zip("━─╸│┤└▴▾✗●◐○■✓↻‖∇ωλεδ·–←→↑↓…×₁₂∞▌◆▏", "=--||+^vx*o.#v~|gwled.-<>^v.x12i>*|", strict=True))


# ---------------------------------------------------------------- other files: lists of runs, CSV, pictures


def glance(path: Path, size: int = 1 << 16, far: int = 1 << 22) -> Run:
    """A run as its last 64 kB and its last epoch tell it: enough for a row in a list."""
    run = Run(path)
    run.apply(run.fetch(tail=False), math.nan)
    with contextlib.suppress(OSError), open(run.tail.path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - far))
        lines = file.read(far)
        lines = lines[: lines.rfind(b"\n") + 1]
        recent = lines.find(b"\n", len(lines) - size) + 1 if len(lines) > size else 0
        epoch = lines.rfind(b'"kind": "epoch"', 0, recent)
        if epoch >= 0:
            run.log.feed(lines[lines.rfind(b"\n", 0, epoch) + 1 : lines.find(b"\n", epoch) + 1])
        run.log.feed(lines[recent:])
    return run


class Shelf:
    """The runs under a directory, newest first; each is read again only when one of its files changed."""

    def __init__(self, root: Path):
        self.root = root
        self._known: dict[Path, tuple[list[int], Run]] = {}

    def read(self) -> list[Run]:
        known = {}
        for path in self._directories():
            stamp = self._stamp(path)
            if any(stamp):
                old = self._known.get(path)
                known[path] = old if old and old[0] == stamp else (stamp, glance(path))
        self._known = known
        return [run for _, run in sorted(known.values(), key=lambda item: -max(item[0]))]

    def _directories(self) -> list[Path]:
        with contextlib.suppress(OSError):
            paths = [path for path in self.root.iterdir() if not path.name.startswith(".")]
            return [path for path in paths if os.path.isdir(path) and not path.is_symlink()]
        return []

    @staticmethod
    def _stamp(path: Path) -> list[int]:
        stamps = [0, 0, 0]
        for i, name in enumerate(("metrics.jsonl", "status.json", "config.json")):
            with contextlib.suppress(OSError):
                stamps[i] = (path / name).stat().st_mtime_ns
        return stamps


def run_columns(width: int) -> Line:
    """The heads of the columns of `run_row`."""
    name = f"{'run':<{name_width(width)}}"
    return [(f"   {'state':<14}{name}{'step':>8}{'done':>6}{'loss':>9}{'error':>9}{'attacked':>10}{'age':>8}", "dim")]


def name_width(width: int) -> int:
    return min(max(width - 67, 12), 28)


def run_row(run: Run, current: Run | None, here: bool, marked: bool, width: int, now: float) -> Line:
    """State, name, progress, loss, errors, age, and how its options differ from the current run's."""
    state, share = run.state(now), run.step / run.total if run.total > 0 else math.nan
    errors = [number(last_value(run, series)) for series in PANELS[4].series]
    other = differences([run, current]) if current and current.real != run.real else []
    return [
        *((("▌" if here else " "), "accent+"), ("◆ " if marked else "  ", "warn+")),
        (f"{state.symbol} {state.word:<12}", state.role),
        (set_cell_size(run.name, name_width(width) - 1) + " ", "bright+" if here else "text"),
        (f"{short(run.step) if run.step >= 0 else '–':>8}", "text"),
        (f"{share:>6.0%}" if share == share else f"{'–':>6}", "dim"),
        (f"{number(last_value(run, SERIES['loss'])):>9}", "c0"),
        *((f"{errors[0]:>7} %", "c2"), (f"{errors[1]:>8} %", "c4")),
        (f"{duration(now - run.log.last['time']):>8}  ", "dim"),
        (" ".join(f"{key}={clean(values[0], 12)}" for key, values in other[:4]), "dim"),
    ]


def no_runs(root: Path) -> list[Line]:
    return [
        [(f"no runs in {clean(root)} yet", "bright+")],
        [],
        [("start one:  ", "dim"), ("python train.py", "accent")],
    ]


def unused(name: str) -> Path:
    """A file name in the working directory that does not exist yet."""
    path, n = Path(name), 1
    while path.exists():
        n += 1
        path = Path(f"{Path(name).stem}-{n}{Path(name).suffix}")
    return path


def write_csv(run: Run, path: Path, axis: str, left: float, right: float) -> int:
    """The records with left <= x <= right as CSV; least and greatest beside the mean where rows were merged."""
    tables = {kind: visible_columns(table, axis, left, right) for kind, table in run.log.tables.items()}
    names = list(dict.fromkeys(name for columns in tables.values() for name in columns))
    total = 0
    with open(path, "x", newline="") as file:
        writer = csv.DictWriter(file, ["kind", *names])
        writer.writeheader()
        for kind, columns in tables.items():
            for values in zip(*columns.values(), strict=True):
                row = {k: f"{v:.{17 if k in AXES else 7}g}" for k, v in zip(columns, values, strict=True) if v == v}
                writer.writerow({"kind": kind} | row)
                total += 1
    return total


def visible_columns(table: Table, axis: str, left: float, right: float) -> dict[str, np.ndarray]:
    window = slice(*np.searchsorted(table.axis(axis), [left, np.nextafter(right, np.inf)]).tolist())
    ends = {"": table.mean} | ({"_min": table.low, "_max": table.high} if table.merged else {})
    columns = {name: table.x[name][: len(table)][window] for name in AXES}
    columns |= {f"{k}{end}": v[: len(table)][window] for end, part in ends.items() for k, v in part.items()}
    return {name: values for name, values in columns.items() if name in AXES or not np.isnan(values).all()}


def svg(lines: Sequence[Line], theme: Theme, w: float = 8.4, h: float = 18.0) -> str:
    """The screen as an SVG that needs no special font: dots, rules and shades are shapes (cells of w x h)."""
    theme = theme if theme.name != "ansi" else Theme("dark")
    width, height = width_of(lines[0]) * w, len(lines) * h
    shapes: dict[str, list[str]] = {}  # by layer and colour
    texts = []
    for y, line in enumerate(lines):
        x = 0
        for text, role in line:
            style, cells = theme.style(role), cell_len(text)
            if style.bgcolor.name != theme.colours["ground"]:
                box = f"M{x * w:.1f} {y * h:.1f}h{cells * w:.1f}v{h:.1f}h{-cells * w:.1f}z"
                shapes.setdefault("0" + style.bgcolor.name, []).append(box)
            path, rest = svg_shapes(text, x * w, y * h, w, h)
            shapes.setdefault("1" + style.color.name, []).append(path)
            for word in re.finditer(r"\S+(?: \S+)*", rest):
                at = (x + cell_len(rest[: word.start()])) * w
                texts.append(svg_text(word[0], at, (y + 0.72) * h, w, style))
            x += cells
    paths = [f'<path fill="{key[1:]}" d="{"".join(parts)}"/>' for key, parts in sorted(shapes.items()) if any(parts)]
    frame = f'x="-14" y="-12" width="{width + 28:.0f}" height="{height + 24:.0f}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-14 -12 {width + 28:.0f} {height + 24:.0f}">'
        f'<rect {frame} rx="10" fill="{theme.colours["ground"]}"/>{"".join(paths)}'
        f'<g font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="13.6">{"".join(texts)}</g></svg>\n'
    )


def svg_text(text: str, x: float, y: float, w: float, style: Style) -> str:
    bold = ' font-weight="bold"' if style.bold else ""
    place = f'x="{x:.1f}" y="{y:.1f}" textLength="{cell_len(text) * w:.1f}"'
    return f'<text {place} fill="{style.color.name}"{bold}>{escape(text)}</text>'


def svg_shapes(text: str, x: float, y: float, w: float, h: float) -> tuple[str, str]:
    """(path data of the characters that are shapes, the text with blanks in their place)."""
    path, rest = [], []
    for i, char in enumerate(text):
        left, code = x + i * w, ord(char) - 0x2800
        if char in _STROKES:
            thick, a, b, down = _STROKES[char]
            path.append(f"M{left + a * w:.1f} {y + h / 2 - thick / 2:.1f}h{(b - a) * w:.1f}v{thick}h{(a - b) * w:.1f}z")
            path.append(f"M{left + w / 2 - 0.5:.1f} {y:.1f}h1v{down * h:.1f}h-1z" if down else "")
        elif 0 < code < 256:
            dots = [_DOTS[bit] for bit in range(8) if code >> bit & 1]
            corners = [(left + (column + 0.18) * w / 2, y + (row + 0.18) * h / 4) for column, row in dots]
            path += [f"M{a:.1f} {b:.1f}h{w * 0.32:.1f}v{h * 0.16:.1f}h{-w * 0.32:.1f}z" for a, b in corners]
        rest.append(" " if char in _STROKES or 0 < code < 256 else char)
    return "".join(path), "".join(rest)


_DOTS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3))
_STROKES = {  # thickness, from and to across the cell, how far down
    **{"━": (2.4, 0, 1, 0), "╸": (2.4, 0, 0.5, 0), "─": (1, 0, 1, 0)},
    **{"│": (0, 0, 0, 1), "┤": (1, 0, 0.5, 1), "└": (1, 0.5, 1, 0.5)},
}


def summary(run: Run, now: float, smooth: int) -> dict[str, Any]:
    """What the dashboard knows, as one JSON object; null for what is unknown."""
    state, series = run.state(now), {}
    for name, item in SERIES.items():
        if not math.isnan(value := last_value(run, item)):
            best, at = best_of(run, item)
            mean = recent_mean(run, item, smooth if item.table == "step" else 1)
            series[name] = {"last": value, "mean": mean, "best": best, "best_step": at}
    known = {
        **{"run": run.name, "path": str(run.path), "state": state.word, "note": state.note, "step": run.step},
        **{"steps_total": run.total, "epoch": run.log.last["epoch"], "age_s": now - run.log.last["time"]},
        **{"elapsed_s": run.elapsed(), "eta_s": run.eta(), "steps_per_s": run.steps_per_second()},
        **{"lines": run.log.lines, "bad_lines": run.log.skipped, "not_finite": run.log.nonfinite_count},
        **{"undone_by_resume": run.log.void_count, "series": series, "evaluation": run.summary or None},
        **{"last_event": run.log.events[-1]._asdict() if run.log.events else None},
    }
    return json.loads(json.dumps(known), parse_constant=lambda _: None)


def snapshot(runs: Sequence[Run], view: View, width: int, now: float) -> list[Line]:
    """The dashboard as plain lines: header, first chart, numbers, last events."""
    view, size = view.settled(runs), geometry(runs, view, view.focus, width, 12)
    curve = chart(runs, view, view.focus, width, 12, x_range(runs, view, 2 * size.width))
    table = compared(runs, view, width, 60) if len(runs) > 1 else sidebar(runs[0], view, width, 60, now)
    while table and not "".join(text for text, _ in table[-1]).strip():
        table.pop()
    events = event_lines(runs[0], width, min(8, len(runs[0].log.events)))
    return [header(runs, view, width, now), progress(runs[0], width, "text"), [], *curve, [], *table, [], *events]


# ---------------------------------------------------------------- keys: pure, from view to view


class Visible(NamedTuple):
    """What a key may have to know of the screen: the x range, its cells, the last step and its x."""

    left: float
    right: float
    cells: int
    step: float
    end: float


def press(key: str, view: View, seen: Visible) -> View | None:
    """The view after a key, or None if the key changes no view."""
    change = partial(replace, view)
    match key:
        case "tab" | "shift+tab":
            return change(focus=(view.focus + (1 if key == "tab" else -1)) % COUNT)
        case "escape":
            if view.cursor is not None:
                return change(cursor=None)
            return change(full=False) if view.full else change(zoom=None, window=None)
        case "y":
            return change(logs=view.logs ^ {view.focus})
        case "Y":
            everything = frozenset(range(COUNT))
            return change(logs=frozenset() if view.logs == everything else everything)
        case "x":
            return change(axis=AXES[(AXES.index(view.axis) + 1) % len(AXES)], zoom=None, cursor=None)
        case "X":
            return change(log_x=not view.log_x, zoom=None)
        case "[" | "]":
            at = min(range(len(SMOOTHINGS)), key=lambda i: abs(SMOOTHINGS[i] - view.smooth))
            at = min(max(at + (1 if key == "]" else -1), 0), len(SMOOTHINGS) - 1)
            return change(smooth=SMOOTHINGS[at])
        case "f":
            windows = [nice(max(seen.step, 1) / n, (1.0, 2.0, 5.0)) for n in (2, 5, 20, 100)]
            return change(window=next((w for w in windows if w < (view.window or math.inf)), None), zoom=None)
        case "+" | "=" | "-":
            return zoomed(view, seen, 2.0 if key == "-" else 0.5)
        case "," | ".":
            shift = (seen.right - seen.left) / (4 if key == "." else -4)
            return change(zoom=(seen.left + shift, seen.right + shift))
        case "0":
            return change(zoom=None, window=None)
        case "left" | "right" | "shift+left" | "shift+right":
            by = (10 if key.startswith("shift") else 1) * (1 if key.endswith("right") else -1)
            edges = edges_of(seen.left, seen.right, 2 * seen.cells, view.log_x)
            at = cell_at(view.cursor, edges)
            start = cell_at(min(seen.end, seen.right), edges) or 0
            at = start if at is None else min(max(at + by, 0), seen.cells - 1)
            return change(cursor=float(edges[2 * at + 1]))
        case "o" | "p":
            return change(clip=not view.clip) if key == "o" else change(paused=not view.paused)
        case "m":
            return change(extra=view.extra + 1)
    if key.isdigit() and 1 <= int(key) <= COUNT:
        index = int(key) - 1
        return change(focus=index, full=not (view.full and view.focus == index))
    return None


def zoomed(view: View, seen: Visible, factor: float, around: float | None = None) -> View:
    """The x range made `factor` times as wide, around a point, the cursor or the middle."""
    around = view.cursor if around is None else around
    around = (seen.left + seen.right) / 2 if around is None else around
    if (seen.right - seen.left) * factor <= 1e-9 * max(1.0, abs(seen.left), abs(seen.right)):
        return view
    return replace(view, zoom=tuple(around + factor * (end - around) for end in (seen.left, seen.right)))


HELP = """\
1-6      a panel, full screen; again: back      tab   the next panel
y  Y     logarithmic y: this panel, all panels  o     cut outliers off, or not
x  X     x axis: step, epoch, time; log x       [ ]   mean over fewer, more
f        follow the last 1/2, 1/5, 1/20, 1/100 of the run, or all of it
+ - , .  zoom in, out, earlier, later           0     the whole run again
← →      cursor (shift: ten at once); or click and drag; the wheel zooms
m        more: the sixth panel's other series; comparing: every panel's
r        runs: pick another, compare            e     events
c        every number, the evaluation, the configuration
p        hold the picture, reading goes on      t     theme: dark, light, ansi
w  S     CSV of the window, SVG of the screen   C     copy the run's path
esc      leave the cursor, the full screen, the zoom
q        quit (ctrl+c too)                      ?  h  this page

loss     mean cross-entropy of the images since the last record, nats
penalty  lam/2 times the mean penalty: what is added to the loss, nats
share    penalty / (loss + penalty)
‖∇‖      dual norm of each image's input gradient: mean, greatest
ω(ε)     modulus of continuity of the margin loss at radius ε: an estimate
error    test images misclassified: clean, and under config.json's attack
FD       finite difference against the exact slope; round: against float64

shaded   from the least to the greatest value   ▴ ▾   beyond the axis
line     mean of the last k records             ✗     not finite
best     least value, or ▴ the greatest; at     ↻     resumed here
"""


# ---------------------------------------------------------------- screens


class Tile(Widget):
    """A few columns of a page.  Textual writes a changed line from its widget's left edge: keep that near."""

    WIDTH = 8
    DEFAULT_CSS = "Tile { width: 8; height: 100%; }"
    ALLOW_SELECT = False

    def __init__(self, index: int):
        super().__init__()
        self.left = index * self.WIDTH

    def render_line(self, y: int) -> Strip:
        strips = self.screen.strips
        return strips[y].crop(self.left, self.left + self.WIDTH) if y < len(strips) else Strip.blank(self.WIDTH)

    def repaint(self, spans: Iterable[tuple[int, int, int]]) -> None:
        """Repaint cells [a, b) of line y for each (y, a, b) in columns of the page, as far as they are mine."""
        inside = [(y, max(a - self.left, 0), min(b - self.left, self.WIDTH)) for y, a, b in spans]
        regions = [Region(a, y, b - a, 1) for y, a, b in inside if a < b]
        if regions:
            self.refresh(*regions)


def changed_spans(old: Line, new: Line, bridge: int = 4) -> list[Span]:
    """The cells [a, b) in which two lines differ; spans closer than `bridge` are joined."""
    if old == new:
        return []
    one, two = cells_of(old), cells_of(new)
    spans: list[Span] = [(0, len(two))] if len(one) != len(two) else []
    for i, (a, b) in enumerate(zip(one, two, strict=not spans)):
        if a != b and spans and i - spans[-1][1] < bridge:
            spans[-1] = (spans[-1][0], max(i + 1, spans[-1][1]))
        elif a != b:
            spans.append((i, i + 1))
    return spans


def cells_of(line: Line) -> list[tuple[str, str]]:
    """(character, role) for each cell; a wide character counts twice."""
    return [(c, role) for text, role in line for c in text for _ in range(1 if c.isascii() else cell_len(c))]


class Page(Screen):
    """Lines of text, made by `paint`, of which only the cells that changed are repainted; `command` takes keys."""

    app: "Dash"

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[Line] = []
        self.strips: list[Strip] = []
        self._colours: Theme | None = None

    def compose(self) -> ComposeResult:
        yield from map(Tile, range(-(-self.app.size.width // Tile.WIDTH)))

    def paint(self, width: int, height: int) -> list[Line]:
        raise NotImplementedError

    def command(self, key: str) -> bool:
        raise NotImplementedError

    def redraw(self) -> None:
        width, height = self.size
        if not (self.is_current and width and height):
            return
        lines, colours = self.paint(width, height), self.app.colours
        if len(lines) == len(self.shown) and colours is self._colours:
            changes = [(y, a, b) for y, line in enumerate(lines) for a, b in changed_spans(self.shown[y], line)]
        else:
            changes = [(y, 0, width) for y in range(height)]
            self.strips = [Strip([])] * height
        for y in {y for y, _, _ in changes}:
            self.strips[y] = Strip([Segment(colours.text(t, role), colours.style(role)) for t, role in lines[y]])
        self.shown, self._colours = lines, colours
        for tile in self.query(Tile) if changes else ():
            tile.repaint(changes)

    def on_mount(self) -> None:
        self.redraw()

    def on_resize(self) -> None:
        self.mount(*map(Tile, range(len(self.query(Tile)), -(-self.size.width // Tile.WIDTH))))
        self.call_after_refresh(self.redraw)

    def on_screen_resume(self) -> None:
        self.redraw()

    def on_key(self, event: Key) -> None:
        key = event.character if event.is_printable and event.character else event.key
        if self.command(key) or self.app.command(key):
            event.stop()
            event.prevent_default()


class Text(Page):
    """Help, configuration or events: lines that scroll."""

    MOVES: ClassVar = {"up": -1, "k": -1, "down": 1, "j": 1, "pageup": -20, "pagedown": 20, " ": 20}

    def __init__(self, title: str, lines: list[Line], at_end: bool = False):
        super().__init__()
        self.heading, self.lines, self.top = title, lines, len(lines) if at_end else 0

    def paint(self, width: int, height: int) -> list[Line]:
        room = height - 2
        self.top = max(0, min(self.top, len(self.lines) - room))
        more = f"{self.top + 1}–{min(len(self.lines), self.top + room)} of {len(self.lines)}"
        head = rule(width, [(self.heading, "accent+")], more if len(self.lines) > room else "", heavy=True)
        shown = [[(" ", ""), *line] for line in self.lines[self.top : self.top + room]]
        foot = [(" esc", "accent+"), (" back   ", "dim"), ("↑ ↓", "accent+"), (" scroll", "dim")]
        return [head, *block(shown, width, room), fit(foot, width)]

    def command(self, key: str) -> bool:
        if key in ("escape", "q", "?", "h", "c", "e"):
            self.dismiss()
        elif key in self.MOVES:
            self.top += self.MOVES[key]
            self.redraw()
        return key not in ("t", "S")


class Board(Page):
    """One run, or several overlaid."""

    def __init__(self, runs: Sequence[Run], view: View):
        super().__init__()
        self.runs, self.view = list(runs), view

    def on_mount(self) -> None:
        self.redraw()
        self.run_worker(self.follow())

    async def follow(self) -> None:
        """Read what is new and draw, `fps` times a second; a long log is read in slices between the keys."""
        period = 1 / self.app.fps
        while True:
            start, behind = time.monotonic(), True
            while behind and time.monotonic() < start + 2 * period:
                for run in self.runs:
                    run.apply(await asyncio.to_thread(run.fetch), self.app.clock())
                behind = any(run.tail.behind for run in self.runs)
                await asyncio.sleep(0)
            if not self.view.paused:
                self.redraw()
            await asyncio.sleep(0 if behind else max(0.01, start + period - time.monotonic()))

    def paint(self, width: int, height: int) -> list[Line]:
        return dashboard(self.runs, self.view, width, height, self.app.clock())

    def show(self, view: View) -> None:
        self.view = view
        self.redraw()

    def seen(self) -> Visible:
        box = layout(self.view, *self.size).boxes[0]
        cells = geometry(self.runs, self.view, box.panel, box.width, box.height).width
        tables = [run.log.tables["step"] for run in self.runs if len(run.log.tables["step"])]
        step, end = (max((float(t.axis(a)[-1]) for t in tables), default=0.0) for a in ("step", self.view.axis))
        return Visible(*x_range(self.runs, self.view, 2 * cells), cells, step, end)

    def command(self, key: str) -> bool:
        view = press(key, self.view.settled(self.runs) if key in "[]" else self.view, self.seen())
        if view is not None:
            self.show(view)
        elif key == "q":
            self.app.exit()
        elif key == "r":
            self.app.push_screen(Picker(self.runs[0].path.absolute().parent, self.runs[0]))
        elif key in ("?", "h"):
            self.app.push_screen(Text("keys and terms", [[(line, "text")] for line in HELP.splitlines()]))
        elif key == "e":
            lines = [line for run in self.runs for line in event_lines(run, 240, len(run.log.events))]
            self.app.push_screen(Text("events", lines, at_end=True))
        elif key == "c":
            self.app.push_screen(Text("everything", self.details()))
        elif key == "C":
            self.app.copy_to_clipboard(self.runs[0].real)
            self.say("path copied, if the terminal allows it")
        elif key == "w":
            self.run_worker(self.save_csv())
        else:
            return False
        return True

    def details(self) -> list[Line]:
        """Numbers, evaluation and configuration, however small the screen is."""
        if len(self.runs) > 1:
            return config_lines(self.runs)
        table = sidebar(self.runs[0], self.view.settled(self.runs), 46, 60, self.app.clock())
        return [*(line for line in table if "".join(text for text, _ in line).strip()), [], *config_lines(self.runs)]

    def say(self, message: str) -> None:
        """A word in the footer, for four seconds."""
        self.show(replace(self.view, message=message))
        self.set_timer(4, lambda: self.show(replace(self.view, message="")))

    async def save_csv(self) -> None:
        left, right, *_ = self.seen()
        for run in self.runs:
            path = unused(re.sub(r"[^\w.-]+", "_", run.name) + ".csv")
            try:
                rows = await asyncio.to_thread(write_csv, run, path, self.view.axis, left, right)
                self.say(f"{rows:,} records in {path}")
            except OSError as error:
                self.say(f"cannot write {path}: {error.strerror}")

    def x_at(self, x: int, y: int) -> tuple[int, float] | None:
        """(panel, value on its x axis) under a cell of the screen."""
        for box in layout(self.view, *self.size).boxes:
            cells = geometry(self.runs, self.view, box.panel, box.width, box.height).width
            column = x - box.x - GUTTER
            if 0 <= column < cells and box.y <= y < box.y + box.height:
                left, right, *_ = self.seen()
                return box.panel, float(edges_of(left, right, 2 * cells, self.view.log_x)[2 * column + 1])
        return None

    def on_mouse_down(self, event: MouseEvent) -> None:
        if hit := self.x_at(event.screen_x, event.screen_y):
            self.show(replace(self.view, focus=hit[0], cursor=hit[1]))

    def on_mouse_move(self, event: MouseEvent) -> None:
        if event.button:
            self.on_mouse_down(event)

    def on_mouse_scroll_up(self, event: MouseEvent) -> None:
        if hit := self.x_at(event.screen_x, event.screen_y):
            self.show(zoomed(self.view, self.seen(), 0.8, hit[1]))

    def on_mouse_scroll_down(self, event: MouseEvent) -> None:
        if hit := self.x_at(event.screen_x, event.screen_y):
            self.show(zoomed(self.view, self.seen(), 1.25, hit[1]))


def config_lines(runs: Sequence[Run]) -> list[Line]:
    """config.json, option by option; of several runs the differences."""
    if len(runs) > 1:
        rows = [("", [run.name for run in runs]), *differences(runs)]
        return [
            [(f"{clean(key, 20):<22}", "dim"), *((f"{clean(v, 22):<24}", f"c{i}") for i, v in enumerate(values))]
            for key, values in rows
        ]
    lines: list[Line] = [[(clean(runs[0].real), "bright+")], []]
    for key, value in runs[0].config.items():
        if isinstance(value, dict):
            lines.append([(clean(key, 20), "accent+")])
            lines += [[(f"  {clean(k, 22):<24}", "dim"), (clean(v), "text")] for k, v in value.items()]
        else:
            lines.append([(f"{clean(key, 24):<26}", "dim"), (clean(value), "text")])
    return lines if runs[0].config else [*lines, [("no config.json", "dim")]]


class Picker(Page):
    """Choose a run, or mark several to compare."""

    MOVES: ClassVar = {"up": -1, "k": -1, "down": 1, "j": 1, "pageup": -10, "pagedown": 10}

    def __init__(self, root: Path, current: Run | None = None):
        super().__init__()
        self.shelf, self.current = Shelf(root), current
        self.runs: list[Run] = []
        self.marked: list[Path] = []
        self.at, self.pattern, self.typing = 0, "", False

    def on_mount(self) -> None:
        self.redraw()
        self.run_worker(self.follow())

    async def follow(self) -> None:
        while True:
            self.runs = await asyncio.to_thread(self.shelf.read)
            self.redraw()
            await asyncio.sleep(2)

    @property
    def matching(self) -> list[Run]:
        return [run for run in self.runs if self.pattern.lower() in run.name.lower()]

    def paint(self, width: int, height: int) -> list[Line]:
        runs, room, now = self.matching, height - 3, self.app.clock()
        self.at = max(0, min(self.at, len(runs) - 1))
        top = max(0, min(self.at - room // 2, len(runs) - room))
        title: Line = [("runs ", "accent+"), (clean(self.shelf.root), "dim")]
        head = [rule(width, title, f"{len(runs)} of {len(self.runs)}", heavy=True), fit(run_columns(width), width)]
        shown = runs[top : top + room]
        rows = [
            run_row(run, self.current, i + top == self.at, run.path in self.marked, width, now)
            for i, run in enumerate(shown)
        ]
        body = block(rows, width, room) if self.runs else centred(no_runs(self.shelf.root), width, room)
        last = "back" if self.current else "quit"
        keys = (("enter", "open"), ("space", "mark to compare"), ("/", "filter"), ("esc", last))
        foot: Line = [part for key, word in keys for part in ((f" {key}", "accent+"), (f" {word} ", "dim"))]
        if self.typing or self.pattern:
            foot = [(f" /{self.pattern}", "warn+"), ("▏ " if self.typing else "  ", "accent"), *foot]
        return [*head, *body, fit(foot, width)]

    def command(self, key: str) -> bool:
        if self.typing and (len(key) == 1 or key == "backspace"):
            self.pattern = self.pattern[:-1] if key == "backspace" else self.pattern + key
        elif key in self.MOVES:
            self.at += self.MOVES[key]
        elif key == " " and self.matching:
            self.mark(self.matching[self.at].path)
        elif key == "/":
            self.typing = True
        elif key == "enter" and self.typing:
            self.typing = False
        elif key == "enter" and (self.marked or self.matching):
            self.app.open_runs(self.marked or [self.matching[self.at].path])
        elif key == "escape" and (self.typing or self.pattern):
            self.typing, self.pattern = False, ""
        elif key in ("escape", "q", "r"):
            self.dismiss() if self.current else self.app.exit()
        else:
            return False
        self.redraw()
        return True

    def mark(self, path: Path) -> None:
        self.marked = [p for p in self.marked if p != path] if path in self.marked else [*self.marked, path][-4:]
        self.at += 1


class Dash(App):
    """The application: the screens, the theme, the clock."""

    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar = [Binding("ctrl+c", "quit", show=False, priority=True)]
    CSS = "Screen { layout: horizontal; overflow: hidden; }"

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        pick: bool = False,
        view: View | None = None,
        fps: float = 2.0,
        stall: float | None = None,
        colours: Theme | None = None,
        clock: Callable[[], float] = time.time,
    ):
        self.colours = colours or Theme("dark")
        super().__init__(ansi_color=self.colours.name == "ansi")
        self.paths, self.pick, self.first_view = list(paths), pick, view or View()
        self.fps, self.stall, self.clock = fps, stall, clock

    def on_mount(self) -> None:
        runs = [] if self.pick else [Run(path, self.stall) for path in self.paths]
        self.push_screen(Picker(self.paths[0]) if self.pick else Board(runs, self.first_view))

    def open_runs(self, paths: Sequence[Path]) -> None:
        """Leave every screen for a board of these runs; those that are open stay read."""
        boards = [screen for screen in self.screen_stack if isinstance(screen, Board)]
        known = {run.real: run for board in boards for run in board.runs}
        view = replace(boards[-1].view if boards else self.first_view, zoom=None, cursor=None, full=False)
        while len(self.screen_stack) > 1:
            self.pop_screen()
        self.push_screen(Board([known.get(os.path.realpath(path)) or Run(path, self.stall) for path in paths], view))

    def command(self, key: str) -> bool:
        if key == "t":
            names = list(THEMES)
            name = names[(names.index(self.colours.name) + 1) % len(names)]
            self.colours, self.ansi_color = Theme(name, self.colours.ascii_only), name == "ansi"
            self.screen.redraw()
        elif key == "S":
            path = unused("dashboard.svg")
            try:
                path.write_text(svg(self.screen.shown, self.colours))
                message = f"picture in {path}"
            except OSError as error:
                message = f"cannot write {path}: {error.strerror}"
            if isinstance(self.screen, Board):
                self.screen.say(message)
        return key in ("t", "S")


# ---------------------------------------------------------------- the command line


def main(
    runs: Annotated[list[Path] | None, typer.Argument(help="Run directories, or one directory of runs.")] = None,
    once: Annotated[bool, typer.Option(help="Print one plain-text snapshot and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each run and exit.")] = False,
    picture: Annotated[Path | None, typer.Option("--svg", help="Write one picture of the screen and exit.")] = None,
    size: Annotated[str, typer.Option(help="Columns and rows of that picture.")] = "120x36",
    fps: Annotated[float, typer.Option(min=0.1, max=30, help="Pictures a second.")] = 2.0,
    stall: Annotated[float | None, typer.Option(min=1, help="Seconds of silence before STALLED.")] = None,
    window: Annotated[float | None, typer.Option(min=1, help="Follow the last so many steps.")] = None,
    smooth: Annotated[int | None, typer.Option(min=1, help="Records in the mean.")] = None,
    theme: Annotated[str, typer.Option(help="dark, light or ansi (the terminal's own colours).")] = "dark",
    ascii_only: Annotated[bool, typer.Option("--ascii", help="No characters beyond ASCII.")] = False,
) -> None:
    """Watch training runs in the terminal; without an argument, pick one under runs/."""
    paths = [path.parent if path.name == "metrics.jsonl" else path for path in runs or [Path("runs")]]
    cells = re.fullmatch(r"(\d{2,3})x(\d{2,3})", size)
    if theme not in THEMES or len(paths) > 4 or not cells:
        fail(f"at most four runs, --theme {', '.join(THEMES)} and --size like 120x36")
    view, colours = View(window=window, smooth=smooth), Theme(theme, ascii_only)
    pick = len(paths) == 1 and is_shelf(paths[0], given=bool(runs))
    plain = once or as_json or picture is not None or not interactive()
    for path in paths:
        check(path, must_exist=plain)
    if not plain:
        Dash(paths, pick=pick, view=view, fps=fps, stall=stall, colours=colours).run()
        return
    found = Shelf(paths[0]).read() if pick else [Run(path, stall).read_all() for path in paths]
    if not found:
        fail(f"no runs in {paths[0]}")
    if picture is not None:
        write_picture(picture, found[:4], view, colours, *map(int, cells.groups()))
    elif as_json:
        for run in found:
            print(json.dumps(summary(run, time.time(), view.settled([run]).smooth), ensure_ascii=ascii_only))
    else:
        print_snapshot(found, view, colours, pick)


def write_picture(path: Path, runs: Sequence[Run], view: View, colours: Theme, width: int, height: int) -> None:
    try:
        path.write_text(svg(dashboard(runs, view, width, height, time.time()), colours))
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}")


def print_snapshot(runs: Sequence[Run], view: View, colours: Theme, pick: bool) -> None:
    """One run, several compared, or (pick) a list of them, as plain text."""
    now, width = time.time(), shutil.get_terminal_size((100, 24)).columns
    rows: list[Line] = [run_columns(width), *(run_row(run, None, False, False, width, now) for run in runs)]
    for line in rows if pick else snapshot(runs, view, width, now):
        print("".join(colours.text(text, role) for text, role in line).rstrip())


def is_shelf(path: Path, given: bool) -> bool:
    """Whether a path is a directory of runs rather than a run."""
    own = any((path / name).exists() for name in ("metrics.jsonl", "config.json", "status.json"))
    return not own and (not given or bool(Shelf(path).read()))


def interactive() -> bool:
    """Whether there is a terminal to draw on (Textual draws on stderr and reads stdin)."""
    return all(f.isatty() for f in (sys.stdin, sys.stdout, sys.stderr)) and os.environ.get("TERM") != "dumb"


def check(path: Path, must_exist: bool) -> None:
    """Exit with code 2 and one line where there is nothing to show and nothing to wait for."""
    try:
        os.listdir(path)
    except FileNotFoundError:
        if must_exist or not os.path.isdir(path.absolute().parent.parent):  # runs/ itself may be still to come
            fail(f"no such run: {path}")
    except OSError as error:
        fail(f"cannot read {path}: {os.strerror(error.errno or errno.EIO).lower()}")


def fail(message: str) -> None:
    print(f"tui.py: {message}", file=sys.stderr)
    raise typer.Exit(2)


if __name__ == "__main__":
    typer.run(main)
