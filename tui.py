"""The dashboard: what a run directory says, in the terminal, while it trains and afterwards.

    python tui.py                       pick a run under runs/
    python tui.py runs/latest           watch one run
    python tui.py runs/a runs/b         compare runs (at most four): which is more robust?
    python tui.py runs/latest --once    one plain-text snapshot; --json: the same for scripts

It only reads.  All it knows is the run directory (config.json, metrics.jsonl, status.json,
evaluation/summary.json), so it runs beside any trainer that writes one, on any machine.

  * Every record counts: curves are drawn from all of them, as an envelope (least to greatest, exact) with the
    mean of the last k records over it.  A spike of one record is visible at any zoom; values outside the axis
    are marked (▴ ▾); numbers that were not finite are marked (✗) and break the line.
  * A half-written line waits, a broken one is skipped and counted, a file that shrinks or is replaced is read
    again from its start, and what was deleted is forgotten.
  * A crash is never guessed from silence: no record for longer than this run's own rhythm is STALLED; FAILED,
    FINISHED and INTERRUPTED are what the run itself says; GONE means that its process no longer exists.

In this order: numbers as text, reading, a run and its state, curves, charts and tables as lines of text (pure
functions of runs, view, size and time), the screens (Textual's own parts), the command line.
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
from itertools import chain, groupby, pairwise, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import orjson
import typer
from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.color import Color
from textual.containers import Grid, Horizontal
from textual.events import MouseEvent
from textual.filter import LineFilter
from textual.geometry import Region, Size
from textual.screen import Screen
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.theme import BUILTIN_THEMES, Theme
from textual.widgets import DataTable, Footer, Input, Static

# ---------------------------------------------------------------- numbers and names as people read them


def number(value: float, form: str = "#.3g") -> str:
    """A number in at most 7 characters (8 with a sign): three digits, or as `form` says; k, M and G from 1,000 on."""
    if math.isnan(value):
        return "–"
    if not (9.995e-4 <= abs(value) < 9.995e11 or value == 0):
        return re.sub(r"\.?0*e\+?(-?)0?", r"e\1", f"{value:{'.1e' if '#' in form else '.2e'}}")
    unit, letter = next((u for u in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= 0.9995 * u[0]), (1.0, ""))
    return f"{value / unit:{form}}".rstrip(".") + letter


def duration(seconds: float) -> str:
    """42 s, 3m 12s, 1h 07m, 2d 03h."""
    if not 0 <= seconds < 1e10:
        return "–"
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days}d {h:02}h" if days else f"{h}h {m:02}m" if h else f"{m}m {s:02}s" if m else f"{s} s"


def counted(n: int, thing: str) -> str:
    return f"{n:,} {thing}{'' if n == 1 else 's'}"


def clean(text: Any, limit: int = 300) -> str:
    """Text from a file, made safe for a terminal: one line, no control characters."""
    return "".join(c if c.isprintable() else "·" for c in str(text)[:limit])


def finite(value: Any, low: float = -3e38, high: float = 3e38) -> float:
    """A JSON value as a float; NaN for anything that is not a number within the limits (float32's)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    return float(value) if low <= value <= high else math.nan


def squeezed(name: str, width: int) -> str:
    """A name in at most `width` cells.  Its ends tell what it is (method, seed), so the middle goes."""
    if cell_len(name) <= width:
        return name
    name = "".join(c if cell_len(c) == 1 else "·" for c in name)
    tail = width // 2
    return f"{name[: width - tail - 1]}…{name[len(name) - tail :]}" if len(name) > width else name


def distinct(names: Sequence[str], width: int) -> list[str]:
    """What tells the names apart, each in at most `width` cells: without the parts at both ends that all share."""
    parts = [re.findall(r"[^-_]+", name) or [name] for name in names]
    for _ in range(2):  # first from the one end, then from the other
        while len(parts) > 1 and min(map(len, parts)) > 1 and len({p[0] for p in parts}) == 1:
            parts = [p[1:] for p in parts]
        parts = [p[::-1] for p in parts]
    shown = [squeezed("-".join(p) if len(names) > 1 else name, width) for p, name in zip(parts, names, strict=True)]
    return shown if len(set(shown)) == len(shown) else [f"{i} {squeezed(s, width - 2)}" for i, s in enumerate(shown, 1)]


# ---------------------------------------------------------------- what a run measures


class Series(NamedTuple):
    """A column of a run's log, as it is named and coloured on the screen."""

    name: str
    table: str
    colour: str
    unit: str
    tag: str  # at the end of its line
    label: str  # in the table of numbers

    @property
    def goal(self) -> bool:
        """Whether less is better: errors and losses.  A small gradient is no merit; untrained networks have it."""
        return self.name.endswith(("loss", "error_pct")) and self.name != "fd_error_pct"


# {dual}, {eps0}, ... are filled in from the run's own configuration; share_pct and omega.i are computed here
SERIES = {
    words[0]: Series(*words[:5], " ".join(words[5:]))
    for line in """\
loss                   step   c0  nats       train   loss
penalty                step   c1  nats       -       penalty
grad_norm_mean         step   c2  nats/unit  mean    {dual} mean
grad_norm_max          step   c3  nats/unit  max     {dual} max
fd_error_pct           step   c1  %          exact   FD error %
lr                     step   c0  -          -       lr
images_per_s           step   c2  1/s        -       images/s
share_pct              step   c5  %          -       share %
test_loss              epoch  c4  nats       test    test loss
clean_error_pct        epoch  c2  %          clean   clean %
top5_error_pct         epoch  c5  %          top5    top 5 %
attacked_error_pct     epoch  c4  %          att.    attacked %
margin_grad_norm_mean  epoch  c2  1/unit     mean    margin
margin_grad_norm_max   epoch  c3  1/unit     max     margin max
fd_rounding_pct        epoch  c0  %          round   FD round %
seconds                epoch  c1  s          -       training s
omega.0                epoch  c5  -          {eps0}  ω({eps0})
omega.1                epoch  c0  -          {eps1}  ω({eps1})
omega.2                epoch  c2  -          {eps2}  ω({eps2})
omega.3                epoch  c1  -          {eps3}  ω({eps3})
""".splitlines()
    for words in [line.split()]
}
AXES = ("step", "epoch", "time")
LIMITS = {"step": 2.0**53, "epoch": 1e9, "time": 1e11}
OMEGAS = tuple(name for name in SERIES if name.startswith("omega."))
FIELDS = {kind: tuple(s.name for s in SERIES.values() if s.table == kind) for kind in ("step", "epoch")}
GIVEN = {"step": FIELDS["step"][:-1], "epoch": FIELDS["epoch"][: -len(OMEGAS)]}  # as they stand in the file

# ---------------------------------------------------------------- reading: files that others write


class Tail:
    """The whole lines of a growing file, each exactly once, also when it is truncated or replaced.

    The file is opened anew at each poll (NFS), so it may appear, vanish and come back; only its inode, its
    first bytes and the offset behind the last newline are remembered.  A line longer than `limit` goes by in
    broken pieces.  Of a longer file only the `last` bytes are read.
    """

    def __init__(self, path: Path, limit: int = 1 << 19, last: float = math.inf):
        self.path, self.limit, self.last, self.error = path, limit, last, ""
        self.offset, self.size, self._known = 0, 0, None

    def poll(self) -> tuple[bytes, bool]:
        """(new whole lines or b"", whether what was read before is void).  Never raises on what it finds."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                void = self._other(os.fstat(file.fileno()), file.read(256))
                file.seek(self.offset)
                chunk, self.error = file.read(self.limit), ""
        except OSError as error:
            self.error, self.size = os.strerror(error.errno or errno.EIO).lower(), self.offset
            gone = isinstance(error, FileNotFoundError) and self._known and self.path.parent.is_dir()
            if gone:  # only the log was deleted: another run begins in this directory
                self.offset, self.size, self._known = 0, 0, None
            return b"", bool(gone)
        end = chunk.rfind(b"\n") + 1
        if end or len(chunk) < self.limit:
            self.offset += end
            return chunk[:end], void
        self.offset += len(chunk)  # a piece of an endless line
        return b"?\n", void

    @property
    def behind(self) -> bool:
        """Whether at least one whole read is still to come."""
        return self.size - self.offset >= self.limit

    def _other(self, stat: os.stat_result, head: bytes) -> bool:
        """Start over unless this is the file that was read before, grown; whether there was one before."""
        inode, self.size = (stat.st_dev, stat.st_ino), stat.st_size
        old, self._known = self._known, (inode, head)
        if old and old[0] == inode and head.startswith(old[1]) and self.size >= self.offset:
            return False
        self.offset = int(max(0, self.size - self.last))
        return old is not None


class Document:
    """A small JSON object in a file, read when it changed; the last good one while it is half written."""

    def __init__(self, path: Path):
        self.path, self.value, self.changed = path, {}, math.nan
        self._stamp = None

    def read(self) -> dict[str, Any]:
        """The object; {} where there is no file: what was deleted is not shown beside what replaced it."""
        try:
            stat = self.path.stat()
            stamp = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if stamp != self._stamp and stat.st_size < 1 << 20:
                value = json.loads(self.path.read_bytes())
                if isinstance(value, dict):
                    self.value, self._stamp, self.changed = value, stamp, stat.st_mtime
        except (FileNotFoundError, NotADirectoryError):
            self.value, self._stamp, self.changed = {}, None, math.nan
        except (OSError, ValueError, RecursionError):
            pass
        return self.value


def parse(block: bytes) -> list[Any]:
    """One item for each line of `block` (whole lines): the JSON value, or None for a line that has none.

    Equal to parsing line by line; the lines of a healthy block are parsed as one array, by orjson, in a quarter
    of the time.
    """
    lines = block.count(b"\n")
    if block.count(b"}\n{") == lines - 1:  # no value can span lines
        with contextlib.suppress(ValueError):
            items = orjson.loads(b"[%b]" % block[:-1].replace(b"\n", b",\n"))
            if len(items) == lines:
                return items
    return [_parse_line(line) for line in block.split(b"\n")[:-1]]


def _parse_line(line: bytes) -> Any:
    """NaN and Infinity are no JSON, but json.dumps writes them: a record that holds them says so in `nonfinite`."""
    with contextlib.suppress(ValueError, RecursionError):
        item = json.loads(line.decode())
        record = item if isinstance(item, dict) else {}
        names = [key for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
        return {"nonfinite": names} | record if names else item


class Table:
    """Rows of numbers in the order of their step, at most `cap` of them however long the run is.

    `x` holds step, epoch and time, (3, rows); `values` mean, least and greatest, (3, fields, rows).  When the
    table is full, neighbouring rows are merged in pairs, whose extremes are kept: no spike is ever lost.
    """

    def __init__(self, names: Sequence[str], cap: int = 1 << 19):
        self.names = {name: i for i, name in enumerate(names)}
        self.cap, self.rows = cap, 0
        self.x, self.values = np.empty((3, 0)), np.empty((3, len(names), 0), np.float32)
        self.known = np.zeros(len(names), bool)  # which fields ever had a value
        self.merged = False

    def __len__(self) -> int:
        return self.rows

    @property
    def step(self) -> np.ndarray:
        return self.x[0, : self.rows]

    def column(self, name: str, part: int = 0) -> np.ndarray:
        """The values of one series, a row each: 0 their mean, 1 the least, 2 the greatest of merged rows."""
        return self.values[part, self.names[name], : self.rows]

    def axis(self, name: str, start: float = math.nan) -> np.ndarray:
        """The rows' positions, never falling: steps, epochs done, or seconds since `start` (nan: the first row)."""
        x = self.x[AXES.index(name), : self.rows]
        if name == "step" or not self.rows:
            return x
        rising = np.fmax.accumulate(x)
        first = np.fmin.reduce(rising)
        return np.nan_to_num(rising, nan=first) - (0 if name == "epoch" else first if math.isnan(start) else start)

    def void(self, step: float) -> int:
        """Forget the rows beyond `step`; returns how many they were."""
        keep = int(np.searchsorted(self.step, step, "right"))
        lost, self.rows = self.rows - keep, keep
        return lost

    def append(self, x: np.ndarray, values: np.ndarray) -> None:
        """Add rows, (3, n) and (fields, n); steps that run backwards are put where they belong."""
        piece = self.cap // 4
        for at in range(0, x.shape[1], piece):
            self._append(x[:, at : at + piece], values[:, at : at + piece])

    def _append(self, x: np.ndarray, values: np.ndarray) -> None:
        if self.rows + x.shape[1] > self.cap:
            self._halve()
        start, end = self.rows, self.rows + x.shape[1]
        if end > self.x.shape[1]:
            more = min(self.cap, max(1024, end + end // 2)) - self.x.shape[1]
            self.x, self.values = (np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, more)]) for a in (self.x, self.values))
        self.x[:, start:end], self.values[:, :, start:end] = x, values
        self.rows, self.known = end, self.known | ~np.isnan(values).all(axis=1)
        if (np.diff(self.step[max(0, start - 1) :]) < 0).any():
            order = np.argsort(self.step, kind="stable")
            self.x[:, :end], self.values[:, :, :end] = self.x[:, order], self.values[:, :, order]

    def _halve(self) -> None:
        """Merge neighbours in pairs; an odd last row stays as it is."""
        n, rows, self.merged = self.rows // 2, self.rows, True
        self.x[:, : rows - n] = np.concatenate([self.x[:, 1 : 2 * n : 2], self.x[:, 2 * n : rows]], axis=1)
        for v in np.moveaxis(self.values, 1, 0):  # one field at a time, for the sake of memory
            low, high = (pick(v[:, 0 : 2 * n : 2], v[:, 1 : 2 * n : 2]) for pick in (np.fmin, np.fmax))
            pairs = [low[0] / 2 + high[0] / 2, low[1], high[2]]  # where one is missing, both are the other
            v[:, : rows - n] = np.concatenate([pairs, v[:, 2 * n : rows]], axis=1)
        self.rows -= n


class Event(NamedTuple):
    time: float
    step: float
    kind: str
    text: str


class Log:
    """All that metrics.jsonl says: two tables of numbers, the last events, and what was wrong with it."""

    def __init__(self, cap: int = 1 << 19):
        self.tables = {"step": Table(FIELDS["step"], cap), "epoch": Table(FIELDS["epoch"], cap // 8)}
        self.events: deque[Event] = deque(maxlen=500)
        self.nonfinite: list[tuple[float, float, float, str]] = []  # where on each axis, and what: the first 500
        self.lines = self.skipped = self.nonfinite_count = self.void_count = 0
        self.last = dict.fromkeys(AXES, math.nan)
        self.resumes: deque[tuple[float, float, float]] = deque(maxlen=50)  # where on each axis
        self.start = self.latest = math.nan  # the one clock: time of the first record, and of the latest
        self.checkpoint = (math.nan, math.nan)  # step and time of the last one

    def feed(self, block: bytes) -> None:
        """Take whole lines.  A line that is no record is counted in `skipped` and changes nothing else."""
        items = [item if isinstance(item, dict) else {} for item in parse(block)]
        self.lines += len(items)
        for kind, group in groupby(items, key=lambda item: item.get("kind")):
            if kind in ("step", "epoch"):
                self._rows(kind, list(group))
            elif kind == "event":
                for record in group:
                    self._event(record)
            else:
                self.skipped += len(list(group))

    def column(self, series: Series, part: int = 0) -> np.ndarray:
        return self.tables[series.table].column(series.name, part)

    def has(self, series: Series) -> bool:
        """Whether the series ever had a value."""
        table = self.tables[series.table]
        return bool(table.known[table.names[series.name]])

    def _rows(self, kind: str, items: list[dict[str, Any]]) -> None:
        columns = _columns(items, (*AXES, *GIVEN[kind]))
        for row, name in enumerate(AXES):
            columns[row, ~((columns[row] >= 0) & (columns[row] <= LIMITS[name]))] = math.nan
        good = ~np.isnan(columns[0])
        if not good.all():
            self.skipped += int((~good).sum())
            items = [item for item, ok in zip(items, good, strict=True) if ok]
            columns = columns[:, good]
        if not items:
            return
        x, values = columns[:3], columns[3:]
        if kind == "step":
            with np.errstate(all="ignore"):
                share = 100 * values[1] / (values[0] + values[1])  # the penalty's part of the objective
            more = [np.where(np.isfinite(share), share, math.nan)]
        else:
            omegas = [item.get("omega") if isinstance(item.get("omega"), list) else [] for item in items]
            more = [[finite((omega + [None] * 4)[i]) for omega in omegas] for i in range(len(OMEGAS))]
            for item, epoch, at, error, attacked in zip(items, *x[1:], *values[1:4:2], strict=True):
                text = f"{epoch:g}  error {number(error)} %  attacked {number(attacked)} %"
                self.events.append(Event(at, finite(item["step"]), "epoch", text))
        self.tables[kind].append(x, np.vstack([values, more]).astype(np.float32))
        self.last = dict(zip(AXES, x[:, -1].tolist(), strict=True))
        self._tick(x[2])
        for i, item in enumerate(items):
            if names := item.get("nonfinite"):
                names = [clean(name, 30) for name in (names[:8] if isinstance(names, list) else [names])]
                self.nonfinite_count += 1
                marks = [(*x[:, i].tolist(), name) for name in sorted(names, key=lambda name: name != "loss")]
                self.nonfinite = (self.nonfinite + marks)[:500]

    def _tick(self, times: np.ndarray) -> None:
        known = times[~np.isnan(times)]
        if len(known):
            self.start = float(known[0]) if math.isnan(self.start) else self.start
            self.latest = float(np.fmax(self.latest, known.max()))

    def _event(self, item: dict[str, Any]) -> None:
        place = step, _, at = tuple(finite(item.get(name), 0, LIMITS[name]) for name in AXES)
        kind = clean(item.get("event", "event"), 20)
        self._tick(np.array([at]))
        if kind == "resume" and not math.isnan(step):  # records beyond its step are void
            self.void_count += sum(table.void(step) for table in self.tables.values())
            self.resumes.append(place)
            self.last["step"], self.checkpoint = step, (step, self.checkpoint[1])
            self.nonfinite = [mark for mark in self.nonfinite if mark[0] <= step]
            self.nonfinite_count *= bool(self.nonfinite)
        elif kind == "checkpoint":
            self.checkpoint = step, at
        last = self.events[-1] if self.events else None
        if kind == "checkpoint" and last and last.kind == "epoch" and last.step == step:
            self.events[-1] = last._replace(text=f"{last.text}  checkpoint")  # one line is enough for both
        else:
            self.events.append(Event(at, step, kind, clean(item.get("message") or "")))


def _columns(items: list[dict[str, Any]], names: Sequence[str]) -> np.ndarray:
    """The numbers of some fields, (fields, records); NaN for what is missing, of another type or not finite."""
    with contextlib.suppress(KeyError, OverflowError):
        rows = list(map(itemgetter(*names), items))
        if set(map(type, chain.from_iterable(rows))) <= {int, float, type(None)}:
            columns = np.array(rows, dtype=np.float64).T  # None becomes NaN
            columns[~(np.abs(columns) <= 3e38)] = math.nan
            return columns
    return np.array([[finite(item.get(name)) for item in items] for name in names])


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
    stall: seconds of silence allowed; by default max(10, 5 rhythms), 60 before the first record.  Before it, and
    in any phase but "train" (evaluating, saving), a run's heartbeat counts as a sign of life; in "train" only
    records do.  ended: what the last event says about the end, for runs without a status.json.
    """
    if not exists:
        gone = State("○", "DELETED", "warn", "its directory is gone; what was read stays here")
        return gone if records else State("○", "WAITING", "dim")
    word = status.get("state") or ended
    if word == "finished":
        return State("✓", "FINISHED", "good")
    if word == "interrupted":
        return State("■", "INTERRUPTED", "warn", "python train.py --resume RUN")
    if word == "failed":
        return State("✗", "FAILED", "bad", clean(status.get("error") or ""))
    if status and alive is False:
        return State("?", "GONE", "bad", f"process {status.get('pid')} is gone and left no word")
    if not records and word != "running":
        return State("○", "WAITING", "dim")
    steady = bool(records) and status.get("phase", "train") == "train"
    signs = [last] if steady else [last, finite(status.get("time"))]
    age = now - max([sign for sign in signs if not math.isnan(sign)], default=now)
    if age > (stall or max(10.0 if records else 60.0, 0.0 if math.isnan(rhythm) else 5 * rhythm)):
        return State("◐", "STALLED", "warn", f"no {'record' if records else 'sign of life'} for {duration(age)}")
    return State("●", "LIVE", "good", "" if steady else clean(status.get("phase", "starting"), 12))


def process_alive(status: dict[str, Any]) -> bool | None:
    """Whether the process of status.json exists; None where that cannot be known (another host)."""
    pid, here = status.get("pid"), status.get("host") == socket.gethostname()
    if os.name != "posix" or not here or type(pid) is not int or not 0 < pid < 1 << 31:
        return None
    try:
        os.kill(pid, 0)  # signal 0: asks, sends nothing
        stat = Path(f"/proc/{pid}/stat").read_text()
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's, or no /proc
    return stat.rpartition(")")[2].split()[:1] != ["Z"]  # a zombie has ended


def resolved(path: Path) -> str:
    """The directory behind a path.  runs/latest is a link, or, where there are none, a file that holds a name."""
    with contextlib.suppress(OSError, ValueError):
        if path.is_file() and path.stat().st_size < 1000 and (name := path.read_text().strip()):
            path = path.parent / name
    return os.path.realpath(path)


class Run:
    """One run directory, followed.  `fetch` touches the disk (any thread), `apply` takes what it brought."""

    def __init__(self, path: Path, stall: float | None = None, last: float = math.inf):
        self.path, self.stall, self.last, self.real = path, stall, last, ""
        self.log = Log()
        self.config, self.status, self.summary = {}, {}, {}
        self.exists, self.evaluated = True, math.nan  # when summary.json was written
        self.arrived = math.nan  # when, by this clock, the last record came in while we watched
        self._caught_up = False
        self._follow(resolved(path))

    def _follow(self, real: str) -> bool:
        """Look at this directory from now on; whether it is another one than before."""
        if real == self.real:
            return False
        self.real, self.tail = real, Tail(Path(real) / "metrics.jsonl", last=self.last)
        names = ("config.json", "status.json", "evaluation/summary.json")
        self._documents = [Document(Path(real) / name) for name in names]
        return True

    def fetch(self) -> tuple[bytes, bool, list[dict[str, Any]], bool]:
        """(new lines, whether the old ones are void, the documents, whether the directory exists).  Never raises."""
        moved = self._follow(resolved(self.path))
        lines, restarted = self.tail.poll()
        return lines, restarted or moved, [d.read() for d in self._documents], os.path.isdir(self.real)

    def apply(self, fetched: tuple[bytes, bool, list[dict[str, Any]], bool], now: float) -> bool:
        """Take what `fetch` brought; whether there were new lines."""
        lines, restarted, (config, self.status, self.summary), self.exists = fetched
        self.evaluated = self._documents[2].changed
        if self.exists or restarted:  # of a deleted run the configuration stays, for the names of its curves
            self.config = config
        if restarted:
            self.log = Log()
        if lines:
            self.log.feed(lines)
            self.arrived = now if self._caught_up else self.arrived
        self._caught_up = self._caught_up or not self.tail.behind
        return bool(lines)

    def read_all(self) -> "Run":
        """Read to the present end of the file, at once."""
        while self.apply(self.fetch(), time.time()) or self.tail.behind:
            pass
        return self

    @property
    def name(self) -> str:
        return clean(os.path.basename(self.real), 100)

    @property
    def loaded(self) -> float:
        """The share of the file that has been read."""
        return self.tail.offset / self.tail.size if self.tail.size and self.tail.behind else 1.0

    @property
    def records(self) -> int:
        return sum(map(len, self.log.tables.values()))

    @property
    def step(self) -> float:
        """Of the last record; 0 for a run without one that says it runs."""
        return self.log.last["step"] if self.records or self.status.get("state") != "running" else 0.0

    @property
    def total(self) -> float:
        return finite(self.config.get("steps_total"), 1)

    def option(self, name: str) -> Any:
        options = self.config.get("options")
        return options.get(name) if isinstance(options, dict) else None

    def axis(self, kind: str, name: str) -> np.ndarray:
        """Where the rows of a table lie on an axis; time counts from the run's start."""
        return self.log.tables[kind].axis(name, self.log.start)

    def places(self, marks: Iterable[Sequence[float]], name: str) -> list[float]:
        """Where marks of the log lie on that axis."""
        return [mark[AXES.index(name)] - (self.log.start if name == "time" else 0) for mark in marks]

    def state(self, now: float) -> State:
        last = self.log.last["time"]
        if not math.isnan(self.arrived):  # a clock that differs from the trainer's must not say STALLED
            last = max(min(last, now), self.arrived) if not math.isnan(last) else self.arrived
        ends = {"finish": "finished", "interrupt": "interrupted", "error": "failed"}
        return judge(
            now=now,
            exists=self.exists,
            records=self.records,
            last=last,
            rhythm=self.rhythm(),
            status=self.status,
            alive=process_alive(self.status) if self.status.get("state") == "running" else None,
            stall=self.stall,
            ended=ends.get(self.log.events[-1].kind) if self.log.events else None,
        )

    def rhythm(self) -> float:
        """The median gap between the last 50 records, seconds."""
        table = self.log.tables["step"]
        times = table.x[2, max(0, len(table) - 50) : len(table)]
        gaps = np.diff(times[~np.isnan(times)])
        return float(np.sort(gaps)[len(gaps) // 2]) if len(gaps) else math.nan

    def speed(self) -> float:
        """Steps a second over the last 200 records since the last resume, pauses included."""
        table = self.log.tables["step"]
        first = max(0, len(table) - 200)
        if self.log.resumes:
            first = max(first, int(np.searchsorted(table.step, self.log.resumes[-1][0], "right")))
        step, _, at = table.x[:, first : len(table)]
        return float((step[-1] - step[0]) / (at[-1] - at[0])) if len(step) > 1 and at[-1] > at[0] else math.nan

    def eta(self) -> float:
        """Seconds left at the present speed."""
        speed = self.speed()
        return max(0.0, self.total - self.step) / speed if speed > 0 else math.nan

    def elapsed(self) -> float:
        """Seconds from the run's start to its latest sign of life, evaluations and pauses included; never negative."""
        latest = float(np.fmax(self.log.latest, finite(self.status.get("time"), 0)))
        return max(0.0, latest - self.log.start) if self.log.start > 0 else math.nan

    def other_evaluation(self) -> str:
        """Why the evaluation is not one of the present checkpoint; empty where it is, or where there is none."""
        step, at = self.log.checkpoint
        of = finite(self.summary.get("checkpoint_step"))
        if self.summary and not math.isnan(of + step) and of != step:
            return f"of step {of:,.0f}, not {step:,.0f}"
        if self.evaluated < finite(self.config.get("created")):
            return "older than this run"
        return "older than the checkpoint" if self.evaluated < at and math.isnan(of) else ""


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
    low, high, line = np.full((3, len(edges) - 1), math.nan)
    cuts = np.searchsorted(x, edges)
    starts, ends = cuts[:-1], cuts[1:]
    has = ends > starts
    if has.any():
        first, stop = starts[has][0], ends[has][-1]
        low[has] = np.fmin.reduceat(table.column(name, 1)[first:stop], starts[has] - first)
        high[has] = np.fmax.reduceat(table.column(name, 2)[first:stop], starts[has] - first)
        line[has] = _window_means(table.column(name), np.minimum(starts, ends - smooth)[has], ends[has])
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
        low, high, values = self.low, self.high, np.asarray(values, float)
        if self.log:
            with np.errstate(divide="ignore", invalid="ignore"):
                low, high, values = math.log10(low), math.log10(high), np.log10(np.maximum(values, 0))
        return (values - low) / (high - low)


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
    """Round limits around low..high; ticks an equal and whole number of rows apart, in the middle of theirs.

    The range is wide enough for the digits that `number` shows to tell the ticks apart.
    """
    low = 0.0 if 0 < low <= 0.4 * high else low
    size = max(abs(high), abs(low)) or 1.0
    width = max(high - low, (0.01 if size >= 0.01 else 0.05) * size, 1e-30)
    wanted, scales = min(max(rows / 4, 4), 7), []
    for gap in range(2, max(3, rows // 2 + 1)):  # rows from tick to tick
        step, end = width * gap / rows, -math.inf
        while end < high - 1e-9 * width:
            step = nice(step * 1.0001, _ROUND)
            first = math.floor(low / step + 1e-9)
            end = (first - 1 / gap / 2 + rows / gap) * step
        ticks = tuple((first + i) * step for i in range((rows - 1) // gap + 1))
        scales.append(Scale((first - 1 / gap / 2) * step, end, False, ticks))
    return min(scales, key=lambda scale: (scale.high - scale.low) * (1 + 0.05 * abs(len(scale.ticks) - wanted)))


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
        bottom, top = (np.floor(np.clip(curve, -1, 2) * dots) for curve in (low, high))
    top[top == dots] -= high[top == dots] <= 1  # the upper limit itself belongs to the top row
    bottom[bottom == dots] -= low[bottom == dots] <= 1
    joined_bottom, joined_top = bottom.copy(), top.copy()
    joined_bottom[1:] = np.fmin(bottom[1:], top[:-1] + 1)
    joined_top[1:] = np.fmax(top[1:], bottom[:-1] - 1)
    height = np.arange(dots)[::-1, None]
    return (height >= joined_bottom) & (height <= joined_top) & ~(np.isnan(bottom) | np.isnan(top))


def braille(dots: np.ndarray) -> np.ndarray:
    """Dots (4 rows, 2 columns to a cell) as braille patterns: code points (rows, columns), 0 where empty."""
    rows, columns = dots.shape[0] // 4, dots.shape[1] // 2
    cells = dots.reshape(rows, 4, columns, 2).transpose(0, 2, 1, 3).reshape(rows, columns, 8)
    codes = cells @ np.array([1, 8, 2, 16, 4, 32, 64, 128])
    return np.where(codes > 0, 0x2800 + codes, 0)


# ---------------------------------------------------------------- charts: pure, from runs and a view to lines of text

Line = list[tuple[str, str]]  # (text, role): see `styles_of`
LABELS = 12  # cells of the labels in the table of numbers
GUTTER = 8  # cells left of a plot: tick labels and the axis
PANELS = (
    ("loss", "loss", "test_loss"),
    ("penalty λ/2·R", "penalty"),
    ("gradient {dual}", "grad_norm_mean", "grad_norm_max"),
    ("modulus ω", *OMEGAS),
    ("error", "attacked_error_pct", "clean_error_pct", "top5_error_pct"),
)
EXTRAS = (  # the last panel shows one of these
    ("penalty share", "share_pct"),
    ("finite difference", "fd_error_pct", "fd_rounding_pct"),
    ("margin gradient {dual}", "margin_grad_norm_mean", "margin_grad_norm_max"),
    ("learning rate", "lr"),
    ("images/s", "images_per_s"),
)
COUNT = len(PANELS) + 1
SMOOTHINGS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000)
DUALS = {"l2": "‖∇‖₂", "linf": "‖∇‖₁", "l1": "‖∇‖∞"}


@dataclass(frozen=True)
class View:
    """Everything a key can change about the charts.  Values of x are in units of the x axis."""

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

    def settled(self, runs: Sequence[Run]) -> "View":
        """This view with its smoothing decided: a thirtieth of the records, at most 100."""
        records = max(len(run.log.tables["step"]) for run in runs)
        fitting = [k for k in SMOOTHINGS if k <= min(records / 30, 100)]
        return replace(self, smooth=self.smooth or max(fitting, default=1))

    def shown(self) -> str:
        """What lies along x, in words."""
        part = f"last {number(self.window, '.4g')} steps" if self.window else f"all {self.axis}s"
        if self.cursor is not None:
            part = f"{self.axis} {duration(self.cursor) if self.axis == 'time' else f'{self.cursor:,.6g}'}"
        return f"{'zoomed' if self.zoom else part}{' · log x' if self.log_x else ''} · mean of {self.smooth}"


def named(run: Run, text: str) -> str:
    """A label with the run's own norm and radii in it."""
    radii = run.config.get("omega_eps")
    known = {f"eps{i}": f"ε{i}" for i in range(len(OMEGAS))}
    known |= {f"eps{i}": number(finite(r), ".4g") for i, r in enumerate(radii if isinstance(radii, list) else ())}
    return text.format(dual=DUALS.get(clean(run.option("norm")), "‖∇‖"), **known).strip("-")


def panel_of(runs: Sequence[Run], view: View, index: int) -> tuple[str, list[Series]]:
    """Title and series of a chart, as far as a run has data; comparing, one series at a time."""
    have = {name for name, series in SERIES.items() if any(run.log.has(series) for run in runs)}
    extras = [extra for extra in EXTRAS if have & set(extra)] or EXTRAS[:1]
    title, *names = PANELS[index] if index < len(PANELS) else extras[view.extra % len(extras)]
    series = [SERIES[name] for name in names if name in have]
    if len(runs) > 1 and series:
        series = [series[view.extra % len(series)]]
        title = f"{title} {named(runs[0], series[0].tag)}"
    return named(runs[0], title.strip()), series


def x_range(runs: Sequence[Run], view: View) -> tuple[float, float]:
    """The x at the left and right edge.  It stays put while a run grows, so that few cells change."""
    axes = [x for run in runs for kind in FIELDS if len(x := run.axis(kind, view.axis))]
    if view.zoom or not axes:
        return view.zoom or (0.0, 1.0)
    low, high = min(float(x[0]) for x in axes), max(float(x[-1]) for x in axes)
    if view.window:  # the last so many steps, whatever the axis
        width = max(_last_steps(run, view) for run in runs) or 1.0
        right = math.ceil(high / width * 8 + 1e-9) * width / 8
        return right - width, right
    low = 0.0 if 0 <= low < 0.3 * high and not view.log_x else low
    if not high > low:
        return low - 0.5 * (view.axis != "time"), low + 1.0
    growing = any(run.step < run.total for run in runs) and not view.log_x
    return low, low + nice(high - low) if growing else high


def _last_steps(run: Run, view: View) -> float:
    step, x = run.log.tables["step"].step, run.axis("step", view.axis)
    if view.axis == "step" or not len(step):
        return view.window if len(step) else 0.0
    return float(x[-1] - x[np.searchsorted(step, step[-1] - view.window)])


def edges_of(left: float, right: float, dots: int, log_x: bool) -> np.ndarray:
    """The borders of the dot columns; the last one includes its right border."""
    left = max(left, right * 1e-6, 1e-300) if log_x else left
    edges = np.geomspace(left, max(right, left * 1.01), dots + 1) if log_x else np.linspace(left, right, dots + 1)
    edges[-1] = np.nextafter(edges[-1], np.inf)
    return edges


def cell_at(x: float | None, edges: np.ndarray) -> int | None:
    """The cell of a plot (two columns of dots) that holds `x`."""
    if x is None or not edges[0] <= x <= edges[-1]:
        return None
    return min(int(np.searchsorted(edges, x, "right")) - 1, len(edges) - 2) // 2


def width_of(line: Line) -> int:
    return sum(cell_len(text) for text, _ in line)


def fit(line: Line, width: int) -> Line:
    """The line, cut or padded to exactly `width` cells."""
    out, left = [], width
    for text, role in line:
        text = text if cell_len(text) <= left else set_cell_size(text, left)
        left -= cell_len(text)
        out += [(text, role)] if text else []
    return [*out, (" " * left, "")] if left else out


def rule(width: int, title: Line, right: str = "", heavy: bool = False) -> Line:
    """A titled horizontal rule."""
    stroke, role = ("━", "accent") if heavy else ("─", "rule")
    end = [(f" {right} ", "dim"), (stroke, role)] if right else []
    title = fit(title, min(width_of(title), max(0, width - width_of(end) - 4)))
    return fit(
        [(stroke, role), (" ", ""), *title, (" ", ""), (stroke * (width - 3 - width_of([*title, *end])), role), *end],
        width,
    )


def joined(parts: Iterable[Line], width: int, gap: str = "   ") -> Line:
    """The first part, and those of the others for which there is room."""
    line: Line = []
    for part in filter(None, parts):
        longer = [*line, *([(gap, "")] if line else []), *part]
        line = longer if not line or width_of(longer) <= width else line
    return line


class Curve(NamedTuple):
    """A series of one run on the dot columns of a chart."""

    run: Run
    series: Series
    colour: str
    tag: str
    bins: Bins
    band: bool  # whether its envelope is drawn


class Plot(NamedTuple):
    """What a chart draws: the cells of the plot, those right of it for the names of its curves, the curves."""

    title: str
    width: int
    height: int
    tags: int
    edges: np.ndarray
    curves: list[Curve]


def plot_of(runs: Sequence[Run], view: View, index: int, width: int, height: int) -> Plot:
    """All series of one run, or one series of all runs (coloured by run), for a chart of width x height cells."""
    (title, series), many = panel_of(runs, view, index), len(runs) > 1
    names = distinct([run.name for run in runs], min(14, width // 3))
    tags = 1 + (max(map(cell_len, names)) if many else 5 * (len(series) > 1))
    columns = max(4, width - GUTTER - tags)
    edges, curves = edges_of(*x_range(runs, view), 2 * columns, view.log_x), []
    for i, run in enumerate(runs):
        for s in series:
            smooth = view.smooth if s.table == "step" else 1
            bins = binned(run.log.tables[s.table], s.name, run.axis(s.table, view.axis), edges, smooth)
            colour, tag, band = s.colour, named(run, s.tag), s.table == "step" and not curves
            if many:  # envelopes would hide each other
                colour, tag, band, bins = f"c{i}", names[i], False, bins._replace(low=bins.line, high=bins.line)
            if not np.isnan(bins.line).all():
                curves.append(Curve(run, s, colour, tag, bins, band))
    return Plot(title, columns, max(1, height - 2), tags, edges, curves)


def chart(runs: Sequence[Run], view: View, index: int, width: int, height: int, focused: bool = False) -> list[Line]:
    """One panel, from its title to its x axis, in exactly width x height cells."""
    plot = plot_of(runs, view, index, width, height)
    column, log = cell_at(view.cursor, plot.edges), index in view.logs
    title = chart_title(plot, column, f"{index + 1} {plot.title}", "accent+" if focused else "bright+", width - 12)
    head = rule(width, title, "log" if log else "", focused)
    if not plot.curves:
        lines = [fit([], width)] * (height - 1)
        lines[height // 2 - 1] = fit([(f"{'no data yet':^{width}}", "dim")], width)
        return [head, *lines]
    scale = (log_scale if log else linear_scale)(*limits([c.bins for c in plot.curves], view.clip), plot.height)
    cells, roles = drawn(plot, scale)
    mark(cells, roles, plot, scale, view)
    if column is not None:
        free = cells[:, column] == ord(" ")
        cells[free, column], roles[free, column] = ord("│"), "dim"
    lines = [head]
    for label, row, kinds, tag in zip(
        tick_labels(scale, plot.height), cells, roles, line_tags(plot, scale), strict=True
    ):
        cuts = [0, *(np.flatnonzero(kinds[1:] != kinds[:-1]) + 1).tolist(), len(row)]
        parts = [("".join(map(chr, row[a:b].tolist())), kinds[a]) for a, b in pairwise(cuts)]
        lines.append(fit([*label, *parts, *tag], width))
    return [*lines, x_labels(plot, view, width)]


def chart_title(plot: Plot, column: int | None, title: str, role: str, width: int) -> Line:
    """Name and unit; with a cursor, the values under it instead of the unit."""
    parts, unit = [[(title, role)]], ""
    for curve in plot.curves[:1]:
        method = curve.run.config.get("omega_method") if curve.series.name in OMEGAS else None
        unit = clean(method or curve.series.unit.strip("-"), 12)
    if column is None:
        return joined([*parts, [(unit, "dim")] if unit else []], width, " ")
    cell, bands = slice(2 * column, 2 * column + 2), []
    for curve in plot.curves:
        line = bridged(curve.bins.line, curve.bins.broken)[cell]
        parts.append([(number(float([math.nan, *line[~np.isnan(line)]][-1])), curve.colour + "+")])
        if curve.band and not np.isnan(curve.bins.low[cell]).all():
            low, high = np.fmin.reduce(curve.bins.low[cell]), np.fmax.reduce(curve.bins.high[cell])
            bands.append([(f"[{number(float(low))}, {number(float(high))}]", "dim")])
    return joined([*parts, *bands], width, " ")


def drawn(plot: Plot, scale: Scale) -> tuple[np.ndarray, np.ndarray]:
    """Characters and roles (rows, columns): a shaded envelope where there is a band, and a line for each curve."""
    dots, shape, first = 4 * plot.height, (plot.height, plot.width), plot.curves[0]
    cells, roles = np.full(shape, ord(" ")), np.full(shape, "", dtype=object)
    shaded, lines = np.zeros(shape, bool), np.zeros((dots, 2 * plot.width), bool)
    if first.band:
        low, high = (bridged(scale.place(values), first.bins.broken) for values in first.bins[:2])
        codes = braille(mask := ribbon(low, high, dots))
        shaded = mask.reshape(plot.height, 4, plot.width, 2).sum(axis=(1, 3)) >= 5
        cells, roles[codes > 0] = np.where(codes > 0, codes, cells), f"{first.colour}-"
        roles[codes == 0x28FF] = f"{first.colour}="
    for curve in reversed(plot.curves):  # the first one on top
        place = bridged(scale.place(curve.bins.line), curve.bins.broken)
        lines |= (mask := ribbon(place, place, dots))
        here = braille(mask) > 0
        cells[here] = braille(lines)[here]
        roles[here] = np.where(shaded[here], f"{curve.colour}/{first.colour}", curve.colour)
    return cells, roles


def mark(cells: np.ndarray, roles: np.ndarray, plot: Plot, scale: Scale, view: View) -> None:
    """▴ above columns with values beyond the axis, ▾ below them, ✗ where a value was not finite."""
    for run, series, colour, _, bins, _ in plot.curves:
        with np.errstate(invalid="ignore"):
            over, under = scale.place(bins.high) > 1 + 1e-9, scale.place(bins.low) < -1e-9
        wrong = run.places([m for m in run.log.nonfinite if m[-1] == series.name], view.axis)
        columns = [cell for x in wrong if (cell := cell_at(x, plot.edges)) is not None]
        over, under = (np.unique(np.flatnonzero(out) // 2) for out in (over, under))
        for row, sign, out, role in ((0, "▴", over, colour), (-1, "▾", under, colour), (0, "✗", columns, "bad+")):
            cells[row, out], roles[row, out] = ord(sign), role


def tick_labels(scale: Scale, rows: int) -> list[Line]:
    """The y axis, a label where a tick lies."""
    labels: dict[int, str] = {}
    for tick, place in zip(scale.ticks, scale.place(np.array(scale.ticks)).tolist(), strict=True):
        row = rows - 1 - min(rows - 1, math.floor(place * rows + 1e-9))
        if row not in labels and row + 1 not in labels:
            labels[row] = number(tick, ".4g")
    return [[(f"{labels.get(y, ''):>{GUTTER - 1}}", "dim"), ("┤" if y in labels else "│", "axis")] for y in range(rows)]


def line_tags(plot: Plot, scale: Scale) -> list[Line]:
    """The names of the lines beside their ends, moved apart where they would collide."""
    ends = []
    for curve in plot.curves if plot.tags > 1 else ():
        line = curve.bins.line[~np.isnan(curve.bins.line)]
        ends.append((float(np.clip(scale.place(line[-1]), 0, 0.999)), curve))
    rows: dict[int, Line] = {}
    ends = sorted(ends, key=itemgetter(0), reverse=True)[: plot.height]
    for below, (place, curve) in zip(range(len(ends) - 1, -1, -1), ends, strict=True):
        wanted = plot.height - 1 - math.floor(place * plot.height)
        rows[max(max(rows, default=-1) + 1, min(wanted, plot.height - 1 - below))] = [(f" {curve.tag}", curve.colour)]
    return [rows.get(y, []) for y in range(plot.height)]


def x_labels(plot: Plot, view: View, width: int) -> Line:
    """The x axis with its ticks, and ↻ where the one run was resumed."""
    row = list(f"{'└':>{GUTTER}}{'─' * plot.width}".ljust(width))
    left, right, free = float(plot.edges[0]), float(plot.edges[-1]), 0
    if view.log_x:
        ticks = [10.0**e for e in range(math.ceil(math.log10(left)), math.floor(math.log10(right)) + 1)]
    else:
        gap = nice((right - left) / max(2, plot.width // 12), _ROUND)
        ticks = [gap * i for i in range(math.ceil(left / gap - 1e-6), math.floor(right / gap + 1e-6) + 1)]
    for tick in ticks:
        label = duration(tick) if view.axis == "time" else number(round(tick, 9), ".4g")
        at = GUTTER + (cell_at(min(max(tick * (1 + 1e-12), left), right), plot.edges) or 0)
        start = min(max(at - len(label) // 2, GUTTER), width - len(label))
        if start >= free:
            row[start : start + len(label)], free = label, start + len(label) + 1
    run = plot.curves[0].run
    resumes = run.places(run.log.resumes, view.axis) if all(c.run is run for c in plot.curves) else []
    for column in (cell_at(x, plot.edges) for x in resumes):
        places = [i for i in range(GUTTER, GUTTER + plot.width) if row[i] == "─" and column is not None]
        if places:
            row[min(places, key=lambda i: abs(i - GUTTER - column))] = "↻"
    return fit([("".join(row), "axis")], width)


# ---------------------------------------------------------------- tables: pure, from runs to rows of cells

Row = Sequence[tuple[str, str]]  # (text, role)


def tabulated(rows: Sequence[Row], least: Sequence[int] = (), left: int = 1) -> list[Line]:
    """Columns as wide as their widest cell, at least `least`; the first `left` of them flush left.

    A row of one cell is a heading over all columns.
    """
    columns = list(zip_longest(*(row for row in rows if len(row) > 1), fillvalue=("", "")))
    widths = [max(cell_len(text) for text, _ in column) for column in columns]
    widths = [max(pair) for pair in zip_longest(widths, least[: len(widths)], fillvalue=0)]
    lines: list[Line] = []
    for row in rows:
        line: Line = []
        for i, (text, role) in enumerate(row if len(row) > 1 else ()):
            blank, gap = " " * (widths[i] - cell_len(text)), " " if i else ""
            line.append((f"{gap}{text}{blank}" if i < left else f"{gap}{blank}{text}", role))
        heading = [row[0], (" " + "─" * (sum(widths) + len(widths) - 2 - cell_len(row[0][0])), "rule")]
        lines.append(line or heading)
    return lines


def last_value(run: Run, series: Series) -> float:
    """The latest value that is a number."""
    recent = run.log.column(series)[-200:]
    recent = recent[~np.isnan(recent)]
    return float(recent[-1]) if len(recent) else math.nan


def recent_mean(run: Run, series: Series, smooth: int) -> float:
    values = run.log.column(series)[-smooth:]
    return float(np.nanmean(values, dtype=np.float64)) if not np.isnan(values).all() else math.nan


def extremes(run: Run, series: Series) -> tuple[float, float, float]:
    """(least value, its step, greatest value) over all records that have one."""
    low, high = run.log.column(series, 1), run.log.column(series, 2)
    least = np.fmin.reduce(low)
    return float(least), float(run.log.tables[series.table].step[np.argmax(low == least)]), float(np.fmax.reduce(high))


def numbers(run: Run, smooth: int, goal: bool) -> list[Row]:
    """Last and mean value of errors and losses (`goal`), with their best one; or of the rest, with its range."""
    ends = ("best", "at step") if goal else ("least", "most")
    rows: list[Row] = [[(text, "dim") for text in ("", "", "last", "mean", *ends)]]
    for series in SERIES.values():
        if series.goal == goal and not math.isnan(value := last_value(run, series)):
            least, at, most = extremes(run, series)
            mean = number(recent_mean(run, series, smooth)) if series.table == "step" else ""
            label = [("━", series.colour), (named(run, series.label), "text"), (number(value), "bright+")]
            ends = (number(least), (f"{at:,.0f}" if at < 1e6 else number(at, ".4g")) if goal else number(most))
            rows.append([*label, *((text, "text") for text in (mean, *ends))])
    return rows if len(rows) > 1 else []


def facts(run: Run, now: float) -> list[Row]:
    """Times, speed, health and what was configured."""
    log, age = run.log, now - run.log.last["time"]
    shown = "–" if run.state(now).ended or math.isnan(age) else "now" if age < 3 else f"{duration(age)} ago"
    cells = [
        *(("since start", duration(run.elapsed())), ("training", duration(last_value(run, SERIES["seconds"])))),
        *(("last record", shown), ("steps/s", number(run.speed()))),
        *(("records", f"{log.lines:,}"), ("bad lines", f"{log.skipped:,}")),
        *(("not finite", f"{log.nonfinite_count:,}"), ("undone", f"{log.void_count:,}")),
    ]
    bad = {"bad lines": log.skipped, "not finite": log.nonfinite_count}
    pairs = [((label, "dim"), (value, "bad+" if bad.get(label) else "text+")) for label, value in cells]
    return [[("run", "dim")], *([*a, *b] for a, b in zip(pairs[::2], pairs[1::2], strict=True))]


def configured(run: Run) -> list[Line]:
    """The options that name a run."""
    words = [clean(run.option(k), 16) for k in ("dataset", "model", "activation", "method", "norm") if run.option(k)]
    signs = {"lam": "λ=", "h": "h=", "batch_size": "batch ", "seed": "seed "}
    more = [f"{sign}{clean(run.option(k), 9)}" for k, sign in signs.items() if run.option(k) is not None]
    return [[(" ".join(part), "text")] for part in (words, more) if part]


def norms_of(run: Run) -> dict[str, dict[str, Any]]:
    norms = run.summary.get("norms")
    return {clean(k, 9): v for k, v in norms.items() if isinstance(v, dict)} if isinstance(norms, dict) else {}


def error_at(runs: Sequence[Run], norm: str) -> tuple[float, list[float]]:
    """(radius, error of each run there): at the runs' own attack radius if it was evaluated, else the middle one."""
    errors = [norms_of(run).get(norm, {}).get("error_pct") for run in runs]
    errors = [{_float(k): finite(v) for k, v in e.items()} if isinstance(e, dict) else {} for e in errors]
    radii = sorted({radius for e in errors for radius in e if radius > 0})
    own = [radius for radius in radii if radius in [run.config.get("attack_eps") for run in runs]]
    radius = (own or radii[(len(radii) - 1) // 2 :] or [math.nan])[0]
    return radius, [e.get(radius, math.nan) for e in errors]


def _float(text: str) -> float:
    with contextlib.suppress(ValueError):
        return float(text)
    return math.nan


SUMMARY = {
    **{"mean_distance": "mean distance", "median_distance": "median distance"},
    **{"lipschitz_bound_mean": "L-bound, mean", "omega_bound_mean": "ω-bound, mean", "violations_pct": "violations %"},
}


def evaluation(run: Run) -> list[Row]:
    """The attacked distances and the bounds of evaluation/summary.json."""
    norms, images, other = norms_of(run), finite(run.summary.get("images")), run.other_evaluation()
    if not run.summary:
        return []
    what = f"evaluation, {counted(int(images), 'image')}" if images > 0 else "evaluation"
    rows: list[Row] = [[(what, "dim")], *([[(f"✗ {other}", "warn+")]] if other else [])]
    error = finite(run.summary.get("clean_error_pct"))
    rows.append([(f"clean error {number(error)} %", "text"), *((norm, "dim") for norm in norms)])
    radii, errors = zip(*(error_at([run], norm) for norm in norms), strict=True) if norms else ((), ())
    lines = {key: [finite(norm.get(key)) for norm in norms.values()] for key in SUMMARY}
    lines |= {"error": [error[0] for error in errors]}
    labels = SUMMARY | {"error": f"error % at {', '.join(number(radius, '.2g') for radius in radii)}"}
    for key, values in lines.items():
        role = "bad+" if key == "violations_pct" and any(value > 1 for value in values) else "text+"
        rows.append([(labels[key], "dim"), *((number(value), role) for value in values)])
    return rows


def differences(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """(option, its value in each run) for the options that are not the same in all runs."""
    options = [run.config.get("options") for run in runs]
    options = [o if isinstance(o, dict) else {} for o in options]
    rows = [(key, [o.get(key, "–") for o in options]) for key in sorted({key for o in options for key in o})]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def verdict(runs: Sequence[Run], view: View, width: int, now: float) -> list[Line]:
    """Which is more robust?  Attacked error and evaluation of every run side by side, the best of each marked ★."""
    norms = list(dict.fromkeys(norm for run in runs for norm in norms_of(run)))
    others = [bool(run.other_evaluation()) for run in runs]
    columns = [("attacked %", [last_value(run, SERIES["attacked_error_pct"]) for run in runs], min, False)]
    for norm in norms:
        radius, errors = error_at(runs, norm)
        distances = [finite(norms_of(run).get(norm, {}).get("mean_distance")) for run in runs]
        columns += [
            (f"{norm} distance", distances, max, True),
            (f"error at {number(radius, '.2g')}", errors, min, True),
        ]
    columns.append(("clean %", [last_value(run, SERIES["clean_error_pct"]) for run in runs], min, False))
    table = [[("", ""), ("", ""), *((f" {column[0]} ", "dim") for column in columns), ("", "")]]
    for i, (run, name) in enumerate(zip(runs, distinct([run.name for run in runs], 24), strict=True)):
        state = run.state(now)
        table.append([(state.symbol, state.role), (name, f"c{i}+")])
        for _, values, best, evaluated in columns:  # what is of another checkpoint does not compete
            known = [v for v, other in zip(values, others, strict=True) if v == v and not (evaluated and other)]
            star = "★" if len(set(known)) > 1 and values[i] == best(known) else " "
            sign = "†" if evaluated and others[i] else star
            table[-1].append((f"{number(values[i])} {sign}", "good+" if sign == "★" else "text+"))
        table[-1].append((f"{state.word} {run.step:,.0f}/{run.total:,.0f}".replace("/nan", ""), state.role))
    while len(table[0]) > 3 and width_of(tabulated(table, left=2)[0]) > width:
        table = [row[:-1] for row in table]
    hint = "† of another checkpoint" if any(others) else view.shown()
    hint = hint if norms else "not evaluated: python evaluate.py RUN RUN"
    return [rule(width, [("which is more robust?", "bright+")], hint), *tabulated(table, left=2)]


def compared(runs: Sequence[Run], wide: int = 0) -> list[Row]:
    """The options in which the runs differ, then the last value of every quantity, a column a run."""
    wide = wide or (7 if len(runs) > 3 else 10)
    names = [(name, f"c{i}+") for i, name in enumerate(distinct([run.name for run in runs], wide))]
    rows: list[Row] = [[("what differs", "dim"), *names]]
    rows += [
        [(clean(k, 10), "dim"), *((clean(v, wide), f"c{i}") for i, v in enumerate(vs))] for k, vs in differences(runs)
    ]
    rows.append([("last value", "dim")])
    for series in SERIES.values():
        values = [last_value(run, series) for run in runs]
        if any(value == value for value in values):
            rows.append([(named(runs[0], series.label), "text"), *((number(v), f"c{i}") for i, v in enumerate(values))])
    return rows


def sidebar(runs: Sequence[Run], view: View, now: float, wide: int = 0) -> list[Line]:
    """Of one run every number, its evaluation, its health; of several what differs, in columns of `wide` cells."""
    run = runs[0]
    if len(runs) > 1:
        return tabulated(compared(runs, wide), least=(10, *[7] * len(runs)))
    goals, others = (tabulated(numbers(run, view.smooth, goal), (1, 10, 7, 7, 7, 7), left=2) for goal in (True, False))
    known = [*tabulated(evaluation(run), (24, 8, 8)), *tabulated(facts(run, now), (11, 9, 9, 9)), *configured(run)]
    return [*goals, *known, *others]


def config_lines(run: Run) -> list[Line]:
    """config.json, option by option."""
    lines: list[Line] = [[(clean(run.real), "bright+")]]
    for key, value in (run.config or {"no config.json": ""}).items():
        inner = value if isinstance(value, dict) else {}
        lines.append([(f"{clean(key, 20):<20} ", "accent"), ("" if inner else clean(value), "text")])
        lines += [[(f"  {clean(k, 18):<18} ", "dim"), (clean(v), "text")] for k, v in inner.items()]
    return lines


def header(run: Run, view: View, width: int, now: float) -> Line:
    """State, name, what must not be overlooked, progress: what fits, the dearest first."""
    state, log = run.state(now), run.log
    name, role = squeezed(run.name, max(12, width // 3)), "bad" if state.role == "bad" else "warn"
    parts = [[(f"{state.symbol} {state.word}", f"{state.role}+")], [(name, "bright+")]]
    parts += [[("‖ PAUSED", "warn+")]] * view.paused
    parts += [[(f"reading {run.loaded:.0%}", "warn")]] * (run.loaded < 1)
    parts += [[(f"✗ NaN {m[3]} @{m[0]:,.0f} ×{log.nonfinite_count}", "bad+")] for m in log.nonfinite[:1]]
    parts += [[(f"↻ resumed @{step:,.0f}", "warn")] for step, *_ in list(log.resumes)[-1:]]
    parts += [[(f"metrics.jsonl: {run.tail.error}", "bad")]] * bool(run.tail.error and run.exists and log.lines)
    note = [(squeezed(state.note, max(12, width - width_of(joined(parts, width)) - 3)), role)] if state.note else []
    if math.isnan(run.step):
        return joined([*parts, note], width)
    total, epochs = (f"/{x:,.0f}" if x > 0 else "" for x in (run.total, finite(run.option("epochs"))))
    left, seconds = ("took", run.elapsed()) if state.ended else ("ETA", run.eta() if state.word == "LIVE" else math.nan)
    where = [[("step ", "dim"), (f"{run.step:,.0f}{total}", "text")]]
    where += [[("epoch ", "dim"), (f"{log.last['epoch']:.1f}{epochs}".replace("nan", "–"), "text")]] * bool(run.records)
    where.append([(f"{left} ", "dim"), (duration(seconds), "text+")])
    return joined([*parts, *where, note] if state.role == "good" else [*parts, note, *where], width)


def progress(run: Run, view: View, width: int, role: str) -> Line:
    """A thin bar, the share of the steps that is done, and what the charts show."""
    share = min(1.0, run.step / run.total) if run.total > 0 and run.step > 0 else 0.0
    right = f" {share:.1%} · {view.shown()}"
    room = max(0, width - cell_len(right))
    full, half = divmod(round(2 * share * room), 2)
    return [("━" * full + "╸" * half, role), ("─" * (room - full - half), "rule"), (right, "dim")]


def top(runs: Sequence[Run], view: View, width: int, now: float, narrow: bool = False) -> list[Line]:
    """The first lines of the screen: how one run stands, or which of several is more robust."""
    run = runs[0]
    if len(runs) > 1:
        return verdict(runs, view, width, now)
    wanted = [SERIES[panel[i]] for i in (1, 2) for panel in PANELS if len(panel) > i] if narrow else []
    values = [(series, last_value(run, series)) for series in wanted]
    parts = [[(f"{named(run, s.label)} ", s.colour), (number(value), "text+")] for s, value in values if value == value]
    return [header(run, view, width, now), progress(run, view, width, run.state(now).role), joined(parts, width, "  ")]


def event_lines(runs: Sequence[Run], count: int = 200) -> list[Line]:
    """The last events, the newest at the bottom; of several runs with the run's name."""
    names = distinct([run.name for run in runs], 14)
    events = sorted(((e, i) for i, run in enumerate(runs) for e in run.log.events), key=lambda e: finite(e[0].time))
    lines: list[Line] = []
    for (at, step, kind, text), i in events[-count:]:
        clock = time.strftime("%H:%M:%S", time.localtime(at)) if at > 0 else "--:--:--"
        role = EVENT_ROLES.get(kind, "text")
        name = [(f"{names[i]:<14} ", f"c{i}")] if len(runs) > 1 else []
        where = f"{'' if math.isnan(step) else f'{step:,.0f}':>11}   "
        lines.append([(clock, "dim"), (where, "accent"), *name, (f"{kind:<11}", role), (text, role)])
    return lines


EVENT_ROLES = {"error": "bad+", "finish": "good", "checkpoint": "dim", "start": "dim"}
EVENT_ROLES |= dict.fromkeys(("warning", "interrupt", "resume"), "warn")


def snapshot(runs: Sequence[Run], view: View, width: int, now: float) -> list[Line]:
    """The dashboard as plain lines: how it stands, the first chart, numbers, last events."""
    view = view.settled(runs)
    plot = chart(runs, view, 0, width, 12)
    blocks = (top(runs, view, width, now), plot, sidebar(runs, view, now), event_lines(runs, 8))
    return [line for block in blocks for line in (*block, [])]


# ---------------------------------------------------------------- lists of runs, JSON, CSV


class Shelf:
    """The runs under a directory, latest first.  Of each only the end is read, then what is new."""

    def __init__(self, root: Path):
        self.root, self.known = root, {}

    def read(self) -> list[Run]:
        """Look at the disk again.  Links are passed over: runs/latest is one of the others."""
        paths: list[Path] = []
        with contextlib.suppress(OSError):
            paths = [p for p in self.root.iterdir() if p.is_dir() and not p.is_symlink() and p.name[0] != "."]
        self.known = {path: self.known.get(path) or Run(path, last=1 << 19) for path in paths}
        for run in self.known.values():
            while run.apply(run.fetch(), math.nan):
                pass
        runs = [run for run in self.known.values() if run.config or run.status or run.log.lines]
        return sorted(runs, key=lambda run: -np.fmax(run.log.latest, finite(run.config.get("created"), 0)))


HEADS = ("state", "run", "step", "done", "loss", "clean %", "attacked %", "age", "differs")


def run_row(run: Run, now: float, current: Run | None = None) -> Row:
    """A run in a list: state, name, progress, loss, errors, age, and how its options differ from the current run's."""
    state, share = run.state(now), run.step / run.total if run.total > 0 else math.nan
    other = differences([run, current]) if current and current.real != run.real else []
    return [
        *((f"{state.symbol} {state.word}", state.role), (run.name, "text")),
        *((number(run.step, ".4g"), "text"), (f"{share:.0%}".replace("nan%", "–"), "dim")),
        *(
            (number(last_value(run, s)), s.colour)
            for s in map(SERIES.get, ("loss", "clean_error_pct", "attacked_error_pct"))
        ),
        (duration(now - run.log.last["time"]), "dim"),
        (" ".join(f"{key}={clean(values[0], 12)}" for key, values in other[:4]), "dim"),
    ]


def summary(run: Run, now: float, smooth: int) -> dict[str, Any]:
    """What the dashboard knows, as one JSON object; null for what is unknown."""
    state, series = run.state(now), {}
    for name, item in SERIES.items():
        if not math.isnan(value := last_value(run, item)):
            least, at, most = extremes(run, item)
            mean = recent_mean(run, item, smooth if item.table == "step" else 1)
            series[name] = {"last": value, "mean": mean, "least": least, "greatest": most}
            series[name] |= {"best": least, "best_step": at} if item.goal else {}
    known = {
        **{"run": run.name, "path": str(run.path), "state": state.word, "note": state.note, "step": run.step},
        **{"steps_total": run.total, "epoch": run.log.last["epoch"], "age_s": now - run.log.last["time"]},
        **{"elapsed_s": run.elapsed(), "eta_s": run.eta(), "steps_per_s": run.speed()},
        **{"lines": run.log.lines, "bad_lines": run.log.skipped, "not_finite": run.log.nonfinite_count},
        **{"undone_by_resume": run.log.void_count, "series": series, "evaluation": run.summary or None},
        **{"evaluation_of_another_checkpoint": run.other_evaluation() or None},
        **{"last_event": run.log.events[-1]._asdict() if run.log.events else None},
    }
    return json.loads(json.dumps(known), parse_constant=lambda _: None)


def write_csv(run: Run, path: Path, axis: str, left: float, right: float) -> int:
    """The records with left <= x <= right as CSV; least and greatest beside the mean where rows were merged."""
    parts, total = [], 0
    for kind, table in run.log.tables.items():
        ends = ("", "_min", "_max") if table.merged else ("",)
        window = slice(*np.searchsorted(run.axis(kind, axis), [left, np.nextafter(right, np.inf)]).tolist())
        names = {f"{k}{end}": (i, n) for n, k in enumerate(table.names) if table.known[n] for i, end in enumerate(ends)}
        columns = [table.values[i, n, window].copy() for i, n in names.values()]  # reading goes on meanwhile
        parts.append((kind, list(names), table.x[:, window].copy(), columns))
    with open(path, "x", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["kind", *AXES, *(name for part in parts for name in part[1])])
        writer.writeheader()
        for kind, names, x, columns in parts:
            for values in zip(*x, *columns, strict=True):
                row = zip((*AXES, *names), values, strict=True)
                writer.writerow({"kind": kind} | {k: f"{v:.{17 if k in AXES else 7}g}" for k, v in row if v == v})
            total += x.shape[1]
    return total


# ---------------------------------------------------------------- keys: pure, from view to view


def pressed(key: str, view: View, runs: Sequence[Run], at: int, edges: np.ndarray) -> View:
    """The view after a key; `at` is the panel with the focus, `edges` its columns of dots."""
    (left, right), step = x_range(runs, view), max((r.log.tables["step"].rows, r.step) for r in runs)
    match key:
        case "y":
            return replace(view, logs=view.logs ^ {at})
        case "Y":
            return replace(view, logs=frozenset(range(COUNT if len(view.logs) < COUNT else 0)))
        case "x":
            return replace(view, axis=AXES[(AXES.index(view.axis) + 1) % len(AXES)], zoom=None, cursor=None)
        case "[" | "]":
            now = view.settled(runs).smooth
            place = min(range(len(SMOOTHINGS)), key=lambda i: abs(SMOOTHINGS[i] - now)) + (1 if key == "]" else -1)
            return replace(view, smooth=SMOOTHINGS[min(max(place, 0), len(SMOOTHINGS) - 1)])
        case "f":  # the last 1/2, 1/5, 1/20, 1/100 of the steps, as far as there are records enough in it; then all
            windows = [nice(step[1] / n, (1.0, 2.0, 5.0)) for n in (2, 5, 20, 100) if step[0] >= 5 * n]
            return replace(view, window=next((w for w in windows if w < (view.window or math.inf)), None), zoom=None)
        case "+" | "-":  # around the cursor or the middle
            factor, around = 0.5 if key == "+" else 2.0, (left + right) / 2 if view.cursor is None else view.cursor
            fine = (right - left) * factor > 1e-9 * max(1.0, abs(left), abs(right))
            return replace(view, zoom=tuple(around + factor * (x - around) for x in (left, right))) if fine else view
        case "," | ".":
            shift = (right - left) * (0.25 if key == "." else -0.25)
            return replace(view, zoom=(left + shift, right + shift))
        case "0":
            return replace(view, zoom=None, window=None)
        case "m":
            return replace(view, extra=view.extra + 1)
        case "X" | "o" | "p":
            name = {"X": "log_x", "o": "clip", "p": "paused"}[key]
            return replace(view, **{name: not getattr(view, name)})
    by = (10 if key.startswith("shift") else 1) * (1 if key.endswith("right") else -1)
    ends = [float(x[-1]) for run in runs if len(x := run.axis("step", view.axis))]
    cell, last = (cell_at(x, edges) for x in (view.cursor, min([*ends, float(edges[-1])])))
    cell = (last or 0) if cell is None else min(max(cell + by, 0), len(edges) // 2 - 1)
    return replace(view, cursor=float(edges[2 * cell + 1]))


def _view(key: str, name: str, shown: str | None = None, more: str = "", bound: str = "") -> Binding:
    return Binding(bound or key, f"view('{key}')", name, show=shown is not None, key_display=shown, tooltip=more)


KEYS = [
    Binding("q", "app.quit", "quit"),
    Binding("question_mark,h", "help", "help", key_display="?"),
    Binding("1", "alone('charts', 0)", "panel", key_display="1-6", tooltip="alone, and back"),
    *[Binding(str(i + 1), f"alone('charts', {i})", f"panel {i + 1}", show=False) for i in range(1, COUNT)],
    Binding("tab", "turn(1)", "the next panel", show=False),
    Binding("shift+tab", "turn(-1)", "the panel before", show=False),
    _view("y", "log", "y"),
    _view("Y", "log y in all panels"),
    _view("x", "axis", "x", "step, epoch, time since the start"),
    _view("X", "log x"),
    _view("[", "mean", "[ ]", "of fewer records", bound="left_square_bracket"),
    _view("]", "mean of more records", bound="right_square_bracket"),
    _view("f", "follow", "f", "the last 1/2, 1/5, 1/20, 1/100 of the run, all of it"),
    _view("+", "zoom", "+ -", "in, around the cursor", bound="plus,equals_sign"),
    _view("-", "zoom out", bound="minus"),
    _view(",", "earlier", bound="comma"),
    _view(".", "later", bound="full_stop"),
    _view("0", "the whole run"),
    _view("left", "cursor", "← →", "values there; shift: ten cells"),
    *[_view(key, "cursor") for key in ("right", "shift+left", "shift+right")],
    _view("m", "more", "m", "series: the sixth panel's; comparing, all"),
    _view("p", "pause", "p", "the picture; reading goes on"),
    _view("o", "cut outliers off, or not"),
    Binding("r", "runs", "runs", tooltip="pick another, or several to compare"),
    Binding("c", "alone('side')", "numbers", tooltip="every number, the evaluation, the configuration"),
    Binding("e", "alone('events')", "events"),
    Binding("w", "csv", "CSV of the window, beside the run", show=False),
    Binding("S", "app.picture", "SVG of the screen, beside the run", show=False),
    Binding("C", "copy", "copy the run's path", show=False),
    Binding("escape", "back", "leave cursor, full screen, zoom", show=False),
]

# ---------------------------------------------------------------- colours and characters

# Okabe and Ito's palette, which survives every common colour blindness, lightened or darkened for the ground.
CURVES = {
    True: ("#56b4e9", "#e69f00", "#2cbf8f", "#f0e442", "#ff7f50", "#d993bf"),
    False: ("#0072b2", "#b87800", "#008a64", "#8f8300", "#d55e00", "#a9487f"),
}
DARK = {"foreground": "#f0f3f6", "background": "#101317", "surface": "#101317", "accent": "#7cc4ff"}
LIGHT = {"foreground": "#0b0e12", "background": "#fcfcfa", "surface": "#fcfcfa", "accent": "#005f9e"}
THEMES = BUILTIN_THEMES | {
    "dark": Theme("dark", "#7cc4ff", success="#2fc796", warning="#f0b429", error="#ff6a4d", **DARK),
    "light": Theme("light", "#005f9e", success="#007a57", warning="#a86400", error="#c43c00", dark=False, **LIGHT),
    "ansi": replace(BUILTIN_THEMES["ansi-dark"], name="ansi"),
}


def styles_of(theme: Theme) -> dict[str, Style]:
    """A style for each role: the theme's colours, shades between its ground and its text, and six for curves.

    `x+` is bold; of a curve `c-` is the edge and `c=` the inside of its envelope, `c/d` its line on that of d.
    """
    colours = theme.to_color_system().generate()
    ground, front, ansi = colours["background"], colours["foreground"], theme.ansi

    def mixed(colour: str, share: float) -> str:
        return "bright_black" if ansi else Color.parse(ground).blend(Color.parse(colour), share).hex

    curves = ("blue", "yellow", "green", "bright_yellow", "red", "magenta") if ansi else CURVES[theme.dark]
    roles = {"dim": mixed(front, 0.52), "axis": mixed(front, 0.36), "rule": mixed(front, 0.16), "bright": front}
    roles |= {"text": front if ansi else mixed(front, 0.83), "accent": colours["accent"], "good": colours["success"]}
    roles |= {"warn": colours["warning"], "bad": colours["error"]} | {f"c{i}": c for i, c in enumerate(curves)}
    styles = {"": Style()}
    for role, colour in roles.items():
        colour = colour.removeprefix("ansi_")
        styles |= {role: Style(color=colour), f"{role}+": Style(color=colour, bold=True)}
    for i, colour in enumerate(curves):
        inside = None if ansi else mixed(colour, 0.24)
        styles[f"c{i}-"], styles[f"c{i}="] = (
            Style(color=mixed(colour, 0.5)),
            Style(color=mixed(colour, 0.24), bgcolor=inside),
        )
        styles |= {f"c{j}/c{i}": Style(color=over, bgcolor=inside) for j, over in enumerate(curves)}
    return styles


def ascii_of(text: str) -> str:
    """The text itself, or the nearest that every terminal can show: dots as *, everything unknown as ?."""
    if text.isascii():
        return text
    return "".join("*" if 0x2800 < ord(c) < 0x2900 else _ASCII.get(c, "?") if c > "~" else c for c in text)


_ASCII = dict(zip("━─╸│┤└▴▾✗●◐○■✓↻‖∇ωλεδ·–←→↑↓…×₁₂∞▌◆▏★†", "=--||+^vx*o.#v~|gwled.-<>^v.x12i>*|*+", strict=True))


class Ascii(LineFilter):
    """What Textual sends to the terminal, in ASCII."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        return [Segment(ascii_of(text), style, control) for text, style, control in segments]


# ---------------------------------------------------------------- the screens


def difference(one: Line, two: Line) -> tuple[int, int]:
    """The cells from .. to outside of which two lines look the same; both 0 where they are equal."""

    def alike(one: Line, two: Line) -> int:
        return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))

    if one == two:
        return 0, 0
    after = alike(one[::-1], two[::-1]) if width_of(one) == width_of(two) else 0
    return width_of(one[: alike(one, two)]), max(width_of(line[: len(line) - after]) for line in (one, two))


class Pane(ScrollView, can_focus=False):
    """Lines of text from column `left` on, of which only what changed is repainted.

    Textual sends a changed line from the left edge of its widget: what changes often has a pane of its own.
    """

    ALLOW_SELECT = False
    lines: Sequence[Line] = ()
    left = 0

    def show(self, lines: Sequence[Line], left: int = 0) -> None:
        """Put these lines in the place of those that are there."""
        old, self.lines = self.lines, lines
        if len(old) != len(lines) or left != self.left:
            self.virtual_size, self.left = Size(0, len(lines)), left
            self.refresh()
        for y, (one, two) in enumerate(zip(old, lines, strict=False)):
            start, end = (max(0, cell - left) for cell in difference(one, two))
            if start < min(end, self.size.width):
                self.refresh(Region(start, y - self.scroll_offset.y, end - start, 1))

    def render_line(self, y: int) -> Strip:
        y += self.scroll_offset.y
        line, styles = self.lines[y] if y < len(self.lines) else [], self.app.styles_by_role
        strip = Strip([Segment(text, styles[role]) for text, role in fit(line, self.left + self.size.width)])
        return strip.crop(self.left).apply_style(self.rich_style)


class Chart(Pane, can_focus=True, inherit_bindings=False):
    """One panel.  It can be focused, maximized and pointed at."""

    def __init__(self, index: int):
        super().__init__()
        self.index = index

    def plot(self) -> Plot:
        return plot_of(self.screen.runs, self.screen.settled, self.index, *self.size)

    def draw(self) -> None:
        if self.is_on_screen and self.size.height > 2:
            focused = self.screen.at == self.index
            self.show(chart(self.screen.runs, self.screen.settled, self.index, *self.size, focused))

    def on_resize(self) -> None:
        self.draw()

    def on_mouse_down(self, event: MouseEvent) -> None:
        self.screen.at = self.index
        edges, column = self.plot().edges, event.x - GUTTER
        if 0 <= column < len(edges) // 2:
            self.screen.change(replace(self.screen.view, cursor=float(edges[2 * column + 1])))

    def on_mouse_move(self, event: MouseEvent) -> None:
        if event.button:
            self.on_mouse_down(event)

    def on_mouse_scroll_up(self, event: MouseEvent) -> None:
        self.on_mouse_down(event)
        self.screen.action_view("+")

    def on_mouse_scroll_down(self, event: MouseEvent) -> None:
        self.on_mouse_down(event)
        self.screen.action_view("-")


TERMS = """\
**loss** mean cross-entropy of the images since the last record · **penalty** lam/2 times the mean penalty: what is
added to the loss · **share** penalty / (loss + penalty) · **‖∇‖** dual norm of each image's input gradient · **ω(ε)**
modulus of continuity of the margin loss at radius ε, an estimate · **error** test images misclassified: clean, and
under config.json's attack · **FD error** finite difference against the exact slope; **round** against float64 ·
**since start** evaluations and pauses too; **training** alone, as of the last epoch.

Shaded: least to greatest value; line: mean of the last records. ▴ ▾ beyond the axis, ✗ not finite, ↻ resumed here,
★ best of the compared runs, † evaluated at another checkpoint.
"""


class Board(Screen, inherit_bindings=False):
    """One run, or several compared: who gets which cells, and what is in them."""

    HELP, BINDINGS = TERMS, KEYS
    caught_up = False

    def __init__(self, runs: Sequence[Run], view: View):
        super().__init__()
        self.runs, self.view, self.at = list(runs), view, 0  # the panel with the focus
        self.alone = ""  # the part of the screen that has all of it
        self.charts, self.note = [Chart(i) for i in range(COUNT)], Static(id="note")
        self.top, self.labels, self.values, self.events = (Pane(id=n) for n in ("top", "labels", "values", "events"))

    def compose(self) -> ComposeResult:
        yield self.top
        yield self.note
        with Horizontal(id="body"):
            with Grid(id="charts"):
                yield from self.charts
            with Horizontal(id="side"):
                yield self.labels
                yield self.values
        yield self.events
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        self.events.border_title = "events"
        self.events.anchor()
        self.charts[0].focus()
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
            self.caught_up = not behind
            if not self.view.paused:
                self.redraw()
            await asyncio.sleep(0 if behind else max(0.01, start + period - time.monotonic()))

    def on_resize(self) -> None:
        """110 columns: charts and numbers side by side; less: charts; least: one chart.  Always the one in focus."""
        (width, height), many, alone = self.size, len(self.runs) > 1, self.alone
        wide, notes = width >= 110, 0 if height < 22 else 3 if height < 34 else 4
        rows = len(self.runs) + 2 if many else 1 + (height >= 16) + (height >= 20 and not wide)
        columns = max(1, min(3, (width - 46 * wide) // 36))
        lines = max(1, min(-(-COUNT // columns), (height - rows - notes - 1) // 8))
        columns, lines = (1, 1) if alone else (columns, lines)
        first = max(0, min(self.at // (columns * lines) * columns * lines, COUNT - columns * lines))
        for chart in self.charts:
            chart.display = first <= chart.index < first + columns * lines
        grid = self.query_one("#charts").styles
        grid.grid_size_columns, grid.grid_size_rows = columns, lines
        self.top.styles.height, self.events.styles.height = rows, "1fr" if alone else notes
        shapes = {f"-{part}": alone == part for part in ("charts", "side", "events")}
        shapes |= {"-narrow": not wide, "-low": not notes, "-small": width < 40 or height < 10}
        for name, on in shapes.items():
            self.set_class(on, name)
        self.redraw()

    @property
    def settled(self) -> View:
        return self.view.settled(self.runs)

    def change(self, view: View) -> None:
        self.view = view
        self.redraw()

    def redraw(self) -> None:
        """Show what the runs say now; only what changed reaches the terminal."""
        if not self.is_mounted:
            return
        now, view, run = self.app.clock(), self.settled, self.runs[0]
        narrow, alone = self.size.width < 110, self.alone == "side"
        self.top.show(top(self.runs, view, self.size.width - 2, now, narrow))
        lines = sidebar(self.runs, view, now, self.size.width // 5 if alone else 0)
        if alone and len(self.runs) == 1:  # there is room for the configuration, beside or below
            more = config_lines(run)
            pairs = zip_longest(lines, more, fillvalue=[])
            lines = [*lines, [], *more] if narrow else [[*fit(one, 48), *two] for one, two in pairs]
        self.labels.show(lines)
        self.values.show(lines, 0 if alone else LABELS)
        self.events.show(event_lines(self.runs))
        for chart in self.charts:
            chart.draw()
        small, waiting = self.has_class("-small"), len(self.runs) == 1 and run.state(now).word == "WAITING"
        self.set_class(waiting, "-waiting")
        if small or waiting:
            self.note.update("too small:\n40x10\nneeded" if small else waiting_for(run))

    def action_view(self, key: str) -> None:
        self.change(pressed(key, self.view, self.runs, self.at, self.charts[self.at].plot().edges))

    def action_help(self) -> None:
        self.app.action_hide_help_panel() if self.query("HelpPanel") else self.app.action_show_help_panel()

    def action_turn(self, by: int) -> None:
        """The next panel, which comes to the screen if it is not there."""
        self.at = (self.at + by) % COUNT
        self.on_resize()
        self.charts[self.at].focus()

    def action_alone(self, part: str, at: int | None = None) -> None:
        """One part of the screen on all of it; again: back."""
        again = self.alone == part and at in (None, self.at)
        self.alone, self.at = "" if again else part, self.at if at is None else at
        self.on_resize()
        panes = {"side": self.values, "events": self.events}
        for name, pane in panes.items():  # these can be scrolled when alone
            pane.can_focus = self.alone == name
        panes.get(self.alone, self.charts[self.at]).focus()

    def action_back(self) -> None:
        if self.query("HelpPanel"):
            self.app.action_hide_help_panel()
        elif self.view.cursor is not None:
            self.change(replace(self.view, cursor=None))
        elif self.alone:
            self.action_alone(self.alone)
        else:
            self.action_view("0")

    def action_runs(self) -> None:
        self.app.push_screen(Picker(Path(self.runs[0].real).parent, self.runs[0]))

    def action_copy(self) -> None:
        self.app.copy_to_clipboard(self.runs[0].real)
        self.notify("path copied, if the terminal allows it")

    def action_csv(self) -> None:
        axis, span = self.view.axis, x_range(self.runs, self.view)

        async def save() -> None:
            for run in self.runs:
                write = partial(write_csv, run, axis=axis, left=span[0], right=span[1])
                await self.app.save(run, ".csv", lambda path, write=write: counted(write(path), "record"))

        self.run_worker(save())


def waiting_for(run: Run) -> str:
    """The calm screen before the first record."""
    what = "no such run yet" if not run.exists else run.tail.error or "no record yet"
    what = "metrics.jsonl does not exist yet" if what == "no such file or directory" else what
    return f"waiting for {clean(run.path)}\n{what}\n\nstart one:  python train.py\nr  pick another run    q  quit"


class Picker(Screen):
    """Choose a run, or mark several to compare."""

    BINDINGS: ClassVar = [
        Binding("enter", "open", "open", priority=True),
        Binding("space", "mark", "mark to compare"),
        Binding("slash", "filter", "filter", key_display="/"),
        Binding("escape", "leave", "back"),
        Binding("q,r", "leave", show=False),
        Binding("j", "app.simulate_key('down')", show=False),
        Binding("k", "app.simulate_key('up')", show=False),
    ]

    def __init__(self, root: Path, current: Run | None = None):
        super().__init__()
        self.shelf, self.current_run, self.shown = Shelf(root), current, {}
        self.runs: list[Run] = []
        self.marked: list[str] = []
        self.table, self.typed = DataTable(cursor_type="row"), Input(placeholder="part of a name", compact=True)

    def compose(self) -> ComposeResult:
        yield from (self.table, self.typed)
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        self.table.focus()
        self.typed.display = False
        self.run_worker(self.follow())

    async def follow(self) -> None:
        while True:
            self.runs = await asyncio.to_thread(self.shelf.read)
            self.redraw()
            await asyncio.sleep(2)

    def redraw(self) -> None:
        """Show the runs that match; the cursor stays on its run."""
        now, pattern, root, here = self.app.clock(), self.typed.value.lower(), clean(self.shelf.root), self.current
        found = {run.real: run for run in self.runs if pattern in run.name.lower()}
        rows = {
            key: [("◆" if key in self.marked else " ", "warn+"), *run_row(run, now, self.current_run)]
            for key, run in found.items()
        }
        if rows != self.shown:
            self.shown = rows
            self.table.clear(columns=True)
            for head, *cells in zip(["", *HEADS], *rows.values(), strict=True):
                self.table.add_column(head, width=max(cell_len(text) for text, _ in [(head, ""), *cells]))
            for key, row in rows.items():
                self.table.add_row(*(Text(text, self.app.styles_by_role[role]) for text, role in row), key=key)
            self.table.move_cursor(row=list(rows).index(here) if here in rows else 0)
        none = f"no runs in {root} yet; start one: python train.py"
        self.table.border_title = f"runs in {root}, {len(found)} of {len(self.runs)}" if self.runs else none

    @property
    def current(self) -> str | None:
        """The run under the cursor."""
        return dict(enumerate(key.value for key in self.table.rows)).get(self.table.cursor_row)

    def action_open(self) -> None:
        if self.typed.has_focus:
            self.table.focus()
        elif self.marked or self.current:
            self.app.open_runs([Path(path) for path in self.marked or [self.current]])

    def action_mark(self) -> None:
        if path := self.current:
            self.marked = [p for p in self.marked if p != path] if path in self.marked else [*self.marked, path][-4:]
            self.redraw()
            self.table.action_cursor_down()

    def action_filter(self) -> None:
        self.typed.display = True
        self.typed.focus()

    def on_input_changed(self) -> None:
        self.redraw()

    def action_leave(self) -> None:
        if self.typed.display:
            self.typed.value, self.typed.display = "", False
            self.table.focus()
        else:
            self.dismiss() if self.current_run else self.app.exit()


class Dash(App):
    """The application: the screens, the themes, the clock."""

    TITLE = "gradreg"
    BINDINGS: ClassVar = [
        Binding("ctrl+c", "quit", show=False, priority=True),
        Binding("t", "change_theme", "theme", show=False),
    ]
    CSS = """
    Screen { layout: vertical; overflow: hidden; background: $background; }
    Pane { scrollbar-size: 0 0; background: $background; }
    #top { margin: 0 1; }
    #charts, #side { overflow: hidden; }
    #charts { grid-gutter: 0 1; }
    #side { width: 46; padding: 0 0 0 1; border-left: solid $foreground 16%; }
    #labels { width: 12; }
    #events { border-top: solid $foreground 16%; border-title-color: $foreground 52%; padding: 0 1; }
    #note { display: none; height: 1fr; content-align: center middle; text-align: center; }
    DataTable { height: 1fr; border-top: solid $foreground 16%; border-title-color: $accent; }
    DataTable, DataTable > .datatable--header, Footer, FooterKey { background: $background; }
    .-narrow #side, .-low #events, .-charts #side, .-charts #events, .-events #body { display: none; }
    .-side #charts, .-side #labels, .-side #events { display: none; }
    .-side #side { display: block; width: 1fr; border: none; }
    .-events #events { display: block; }
    .-waiting #body, .-waiting #events, .-small > * { display: none; }
    .-waiting #note, .-small #note { display: block; }
    """

    def __init__(self, paths: Sequence[Path], *, pick: bool = False, theme: str = "dark", **options: Any):
        """Options: view, fps, stall, ascii_only and clock, as below."""
        super().__init__()
        for name in ("dark", "light", "ansi"):
            self.register_theme(THEMES[name])
        defaults = {"view": View(), "fps": 2.0, "stall": None, "ascii_only": False, "clock": time.time}
        self.__dict__ |= defaults | options
        self.paths, self.pick, self.theme = list(paths), pick, theme

    def watch_theme(self) -> None:
        self.styles_by_role = styles_of(self.current_theme)

    def get_line_filters(self) -> Sequence[LineFilter]:
        return [*super().get_line_filters(), *([Ascii()] if self.ascii_only else [])]

    def on_mount(self) -> None:
        runs = [] if self.pick else [Run(path, self.stall) for path in self.paths]
        self.push_screen(Picker(self.paths[0]) if self.pick else Board(runs, self.view))
        if not self.is_headless:
            self.set_interval(1, self.leave_with_the_terminal)

    def leave_with_the_terminal(self) -> None:
        """End where the terminal is gone without a hang-up signal: reading from it would keep a core busy for ever."""
        if not sys.__stdin__.isatty():
            os._exit(1)

    def open_runs(self, paths: Sequence[Path]) -> None:
        """Leave every screen for a board of these runs; those that are open stay read."""
        boards = [screen for screen in self.screen_stack if isinstance(screen, Board)]
        known = {run.real: run for board in boards for run in board.runs}
        view = replace(boards[-1].view if boards else self.view, zoom=None, cursor=None)
        while len(self.screen_stack) > 1:
            self.pop_screen()
        self.push_screen(Board([known.get(resolved(path)) or Run(path, self.stall) for path in paths], view))

    def svg(self) -> str:
        """The screen as a picture that fetches no font."""
        picture = re.sub(r"@font-face \{.*?\}", "", self.export_screenshot(title=" ", simplify=True), flags=re.DOTALL)
        return picture.replace("Fira Code", "DejaVu Sans Mono, Menlo")

    async def save(self, run: Run, suffix: str, write: Callable[[Path], str]) -> None:
        """Write a new file beside the run, or here where that is not allowed; say where.  Nothing is overwritten."""
        for folder in (Path(run.real).parent, Path.cwd()):
            stem = folder / re.sub(r"[^\w.-]+", "_", run.name)
            paths = (Path(f"{stem}{end}{suffix}") for end in ("", *(f"-{n}" for n in range(2, 10_000))))
            path = next(path for path in paths if not path.exists())
            try:
                return self.notify(f"{await asyncio.to_thread(write, path)} in {path}")
            except OSError as error:
                failed = f"cannot write {path}: {error.strerror}"
        self.notify(failed, severity="error")

    def action_picture(self) -> None:
        picture = self.svg()
        for run in getattr(self.screen, "runs", [])[:1]:
            self.run_worker(
                self.save(run, ".svg", lambda path: f"{path.write_text(picture, encoding='utf-8'):,} bytes")
            )


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
    theme: Annotated[
        str, typer.Option(help="dark, light, ansi (the terminal's colours) or one of Textual's.")
    ] = "dark",
    ascii_only: Annotated[bool, typer.Option("--ascii", help="No characters beyond ASCII.")] = False,
) -> None:
    """Watch training runs in the terminal; without an argument, pick one under runs/."""
    paths = [path.parent if path.name == "metrics.jsonl" else path for path in runs or [Path("runs")]]
    cells = re.fullmatch(r"(\d{2,3})x(\d{2,3})", size)
    if len(paths) > 4:
        fail(f"at most four runs can be compared, not {len(paths)}")
    if theme not in THEMES:
        fail(f"no theme {theme!r}; there are {', '.join(sorted(THEMES))}")
    if not cells:
        fail(f"--size {size}: columns x rows are wanted, as in 120x36")
    own = any((Path(resolved(paths[0])) / name).exists() for name in ("metrics.jsonl", "config.json", "status.json"))
    pick = len(paths) == 1 and not own and (not runs or bool(Shelf(paths[0]).read()))
    plain = once or as_json or picture is not None or not interactive()
    for path in paths:
        check(path, must_exist=plain)
    view, unicode = View(window=window, smooth=smooth), all(map(speaks_unicode, (sys.stdout, sys.stderr)))
    app = Dash(paths, pick=pick, view=view, fps=fps, stall=stall, theme=theme, ascii_only=ascii_only or not unicode)
    if not plain:
        app.run()
        return
    found = Shelf(paths[0]).read() if pick else [Run(path, stall).read_all() for path in paths]
    if not found:
        fail(f"no runs in {paths[0]}")
    now, width = time.time(), shutil.get_terminal_size((100, 24)).columns
    if picture is not None:
        app.paths, app.pick = [run.path for run in found[:4]], False
        write_picture(picture, app, (int(cells[1]), int(cells[2])))
    elif as_json:
        say("\n".join(json.dumps(summary(run, now, view.settled([run]).smooth)) for run in found), False)
    else:
        rows = [[(head, "dim") for head in HEADS], *(run_row(run, now) for run in found)]
        lines = tabulated(rows, left=2) if pick else snapshot(found, view, width, now)
        say("\n".join("".join(text for text, _ in line).rstrip() for line in lines), app.ascii_only)


def write_picture(path: Path, app: Dash, size: tuple[int, int]) -> None:
    """The screen of an application without a terminal, as SVG."""

    async def shoot(pilot: Any) -> None:
        while not (getattr(app.screen, "caught_up", False) and app.screen.query("FooterKey")):
            await pilot.pause(0.01)
        await pilot.pause()
        app.exit(app.svg())

    try:
        path.write_text(app.run(headless=True, size=size, auto_pilot=shoot) or "", encoding="utf-8")
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}")


def say(text: str, ascii_only: bool) -> None:
    """Print; a reader that has left is no reason to fail."""
    try:
        print(ascii_of(text) if ascii_only else text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def speaks_unicode(stream: Any) -> bool:
    """Whether our characters can be written there; whatever comes, writing raises no UnicodeError from now on."""
    with contextlib.suppress(AttributeError, ValueError):
        stream.reconfigure(errors="replace")
    with contextlib.suppress(LookupError, UnicodeEncodeError):
        return bool("⣿▴‖∇".encode(stream.encoding or "ascii"))
    return False


def interactive() -> bool:
    """Whether there is a terminal to draw on (Textual draws on stderr and reads stdin)."""
    return all(f.isatty() for f in (sys.stdin, sys.stdout, sys.stderr)) and os.environ.get("TERM") != "dumb"


def check(path: Path, must_exist: bool) -> None:
    """Exit with code 2 and one line where there is nothing to show and nothing to wait for."""
    try:
        os.listdir(resolved(path))
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
