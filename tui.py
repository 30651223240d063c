"""The dashboard: what a run directory says, in the terminal, while it trains and afterwards.

    python tui.py                       pick a run under runs/
    python tui.py runs/latest           watch one run
    python tui.py runs/a runs/b         compare runs (at most four): which is more robust?
    python tui.py runs/latest --once    one plain-text snapshot; --json, --csv: the same for scripts

It only reads, tolerantly, and all it knows is the run directory (docs/run-directory.md), so it runs beside any
trainer that writes one, on any machine.  Curves are drawn from every record: a band from the least to the greatest
value of each column of dots, exact, and their mean over it; no spike is lost at any zoom or length.  A crash is never
guessed from silence: STALLED is no record for longer than the run's own rhythm, the rest is what the run itself says.

One way: files -> whole lines (Tail) -> columns (Table, Log) -> a Run -> facts, and bins -> cells (Canvas) -> the
terminal.  Facts, bins and cells are functions of runs, view, size and time.
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
import sys
import textwrap
import time
from collections import deque, namedtuple
from collections.abc import Sequence
from itertools import chain, compress, groupby, pairwise, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, TextIO

import numpy as np
import orjson
import typer
from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.color import Color
from textual.geometry import Region, Size
from textual.screen import Screen
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.theme import Theme
from textual.widgets import Footer, SelectionList, Static

# ---------------------------------------------------------------- what a run measures, and as people read it


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


def clean(text: Any, limit: int = 300) -> str:
    """Text from a file, made safe for a terminal: one line, no control characters, none without a cell."""
    return "".join(c if c.isprintable() and cell_len(c) else "·" for c in str(text)[:limit])


def finite(value: Any, low: float = -3e38, high: float = 3e38) -> float:
    """A JSON value as a float; NaN for anything that is not a number within the limits (float32's)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    return float(value) if low <= value <= high else math.nan


def distinct(names: Sequence[str], width: int) -> list[str]:
    """What tells the names apart, each in at most `width` cells: not the words at both ends that all share."""
    shown = list(names)
    for _ in range(2 * (len(names) > 1)):  # first from the one end, then from the other
        common = re.match(r"(.*[-_])?", os.path.commonprefix(shown))[0]  # noqa: RUF071
        shown = [name[len(common) :][::-1] for name in shown]
    for i, name in enumerate(shown):
        if cell_len(name) > width:  # the middle goes: the ends tell what it is (method, seed)
            name = "".join(c if cell_len(c) == 1 else "·" for c in name)
            shown[i] = name if len(name) <= width else f"{name[: (width - 1) // 2]}…{name[-(width // 2) :]}"
    if len(set(shown)) < len(shown):
        return [f"{i} {distinct([name], width - 2)[0]}" for i, name in enumerate(shown, 1)]
    return shown


# A column of a run's log: `panel` is its chart, `tag` stands at the end of its line, `label` in the table of numbers.
# {dual}, {eps0}, ... are filled in from the run's own configuration; omega.i is an element of omega.
Series = namedtuple("Series", "name table panel colour unit tag label")
Event = namedtuple("Event", "time step kind text")
SERIES = {
    words[0]: Series(*words[:6], " ".join(words[6:]))
    for line in """\
loss                   step   0  c0  nats       train   loss
penalty                step   1  c1  nats       -       penalty
grad_norm_mean         step   2  c2  nats/unit  mean    {dual} mean
grad_norm_max          step   2  c3  nats/unit  max     {dual} max
fd_error_pct           step   5  c1  %          exact   FD error %
lr                     step   7  c0  -          -       lr
images_per_s           step   8  c2  1/s        -       images/s
test_loss              epoch  0  c4  nats       test    test loss
attacked_error_pct     epoch  4  c4  %          att.    attacked %
clean_error_pct        epoch  4  c2  %          clean   clean %
top5_error_pct         epoch  4  c5  %          top5    top 5 %
margin_grad_norm_mean  epoch  6  c2  1/unit     mean    margin
margin_grad_norm_max   epoch  6  c3  1/unit     max     margin max
fd_rounding_pct        epoch  5  c0  %          round   FD round %
seconds                epoch  -  c1  s          -       training s
omega.0                epoch  3  c5  -          {eps0}  ω({eps0})
omega.1                epoch  3  c0  -          {eps1}  ω({eps1})
omega.2                epoch  3  c2  -          {eps2}  ω({eps2})
omega.3                epoch  3  c1  -          {eps3}  ω({eps3})
""".splitlines()
    for words in [line.split()]
}
PANELS = ("loss", "penalty λ/2·R", "gradient {dual}", "modulus ω", "error")  # there from the first moment
PANELS += ("finite difference", "margin gradient {dual}", "learning rate", "images/s")
AXES = {"step": 2.0**53, "epoch": 1e9, "time": 1e11}  # where a record lies, each with its greatest sensible value
OMEGAS = tuple(name for name in SERIES if name.startswith("omega."))
FIELDS = {kind: tuple(s.name for s in SERIES.values() if s.table == kind) for kind in ("step", "epoch")}
GIVEN = {"step": FIELDS["step"], "epoch": FIELDS["epoch"][: -len(OMEGAS)]}  # as they stand in the file
DUALS = {"l2": "‖∇‖₂", "linf": "‖∇‖₁", "l1": "‖∇‖∞"}

# ---------------------------------------------------------------- reading: files that others write, in bounded memory


class Tail:
    """The whole lines of a growing file, each exactly once, also when it is truncated or replaced.

    It is opened anew at each poll (NFS), so it may appear, vanish and come back; its inode, its first bytes and the
    offset behind the last newline are remembered.  A line longer than `limit` goes by in broken pieces.  With `last`,
    only so many bytes of a longer file are read.
    """

    def __init__(self, path: Path, last: float = math.inf, limit: int = 1 << 19):
        self.path, self.last, self.limit, self.error = path, last, limit, ""
        self.offset, self.size, self._known, self.behind = 0, 0, None, False  # behind: more can be read at once

    def poll(self) -> tuple[bytes, bool]:
        """(new whole lines or b"", whether what was read before is void).  Never raises on what it finds."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                stat, head, old = os.fstat(file.fileno()), file.read(256), self._known
                self.size, self._known = stat.st_size, (stat.st_dev, stat.st_ino, head)
                grown = old and old[:2] == self._known[:2] and head.startswith(old[2]) and self.size >= self.offset
                self.offset = self.offset if grown else int(max(0, self.size - self.last))
                file.seek(self.offset)
                chunk, self.error = file.read(self.limit), ""
                self.behind = len(chunk) == self.limit
        except OSError as error:
            self.error, self.behind = os.strerror(error.errno or errno.EIO).lower(), False
            gone = isinstance(error, FileNotFoundError) and self._known and self.path.parent.is_dir()
            if gone:  # only the log was deleted: another run begins in this directory
                self.offset, self._known = 0, None
            return b"", bool(gone)
        end = chunk.rfind(b"\n") + 1
        endless = self.behind and not end  # a piece of an endless line
        self.offset += len(chunk) if endless else end
        return b"?\n" if endless else chunk[:end], bool(old) and not grown


def document(path: Path, old: dict[str, Any]) -> dict[str, Any]:
    """The JSON object in a small file; the `old` one while it is half written; {} where there is no file."""
    value = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        value = json.loads(path.read_bytes()) if path.stat().st_size < 1 << 20 else None
    return value if isinstance(value, dict) else old if os.path.exists(path) else {}


def parse(block: bytes) -> list[Any]:
    """One item for each line of `block` (whole lines): the JSON value, or None for a line that has none.

    Equal to parsing line by line; the lines of a healthy block are parsed as one array, in a quarter of the time.
    """
    lines = block.count(b"\n")
    if block.count(b"}\n{") == lines - 1:  # no value can span lines
        with contextlib.suppress(ValueError):
            items = orjson.loads(b"[%b]" % block[:-1].replace(b"\n", b",\n"))
            if len(items) == lines:
                return items
    return [parse_line(line) for line in block.split(b"\n")[:-1]]


def parse_line(line: bytes) -> Any:
    """NaN and Infinity are no JSON, but json.dumps writes them: a record that holds them says so in `nonfinite`."""
    with contextlib.suppress(ValueError, RecursionError):
        item = json.loads(line.decode())
        record = item if isinstance(item, dict) else {}
        names = [key for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
        return {"nonfinite": names} | record if names else item


class Table:
    """The records of one kind in the order of their step, in at most `cap` rows however long the run is.

    `data` is (3, columns, rows): mean, least and greatest.  When the table is full, neighbouring rows are merged
    in pairs, whose extremes are kept: no spike is ever lost.  A merged row lies where its later record did.
    """

    def __init__(self, names: Sequence[str], cap: int = 1 << 18):
        self.names = {name: i for i, name in enumerate((*AXES, *names))}
        self.cap, self.rows, self.merged = cap, 0, False
        self.data = np.empty((3, len(self.names), 0))

    def column(self, name: str, part: int = 0) -> np.ndarray:
        """The values of one column, a row each: 0 their mean, 1 the least, 2 the greatest of merged rows."""
        return self.data[part, self.names[name], : self.rows]

    @property
    def steps(self) -> np.ndarray:
        return self.column("step", 2)

    def void(self, step: float) -> int:
        """Forget the rows beyond `step`; returns how many they were."""
        lost = self.rows - int(np.searchsorted(self.steps, step, "right"))
        self.rows -= lost
        return lost

    def append(self, values: np.ndarray) -> None:
        """Add rows, (columns, n); steps that run backwards are put where they belong."""
        for at in range(0, values.shape[1], self.cap // 4):
            piece = values[:, at : at + self.cap // 4]
            if self.rows + piece.shape[1] > self.cap:
                self._halve()
            start, self.rows = self.rows, self.rows + piece.shape[1]
            if (room := self.data.shape[2]) < self.rows:
                self.data = np.pad(self.data, [(0, 0), (0, 0), (0, min(self.cap, 2 * self.rows) - room)])
            self.data[:, :, start : self.rows] = piece
            steps = self.steps
            if (np.diff(steps[max(0, start - 1) :]) < 0).any():
                self.data[:, :, : self.rows] = self.data[:, :, np.argsort(steps, kind="stable")]

    def _halve(self) -> None:
        """Merge neighbours in pairs; an odd last row stays as it is."""
        n, rows, self.merged = self.rows // 2, self.rows, True
        for v in np.moveaxis(self.data, 1, 0):  # one column at a time, for the sake of memory
            low, high = (pick(v[:, 0 : 2 * n : 2], v[:, 1 : 2 * n : 2]) for pick in (np.fmin, np.fmax))
            pairs = [low[0] / 2 + high[0] / 2, low[1], high[2]]  # where one is missing, both are the other
            v[:, : rows - n] = np.concatenate([pairs, v[:, 2 * n : rows]], axis=1)
        self.rows -= n


class Log:
    """All that metrics.jsonl says: two tables of numbers, the last events, and what was wrong with it."""

    def __init__(self, cap: int = 1 << 18):
        self.tables = {"step": Table(FIELDS["step"], cap), "epoch": Table(FIELDS["epoch"], cap // 8)}
        self.events: deque[Event] = deque(maxlen=500)
        self.nonfinite: list[tuple[float, str]] = []  # step and field, the first 500
        self.resumes: deque[float] = deque(maxlen=50)  # their steps
        self.lines = self.skipped = self.nonfinite_count = self.void_count = 0
        self.last, self.checkpoint = dict.fromkeys(AXES, math.nan), math.nan  # where the last ones lie

    def feed(self, block: bytes) -> None:
        """Take whole lines.  A line that is no record is counted in `skipped` and changes nothing else."""
        records = [item if isinstance(item, dict) else {} for item in parse(block)]
        self.lines += len(records)
        for kind, group in groupby(records, key=lambda record: record.get("kind")):
            if kind in ("step", "epoch"):
                self._rows(kind, list(group))
            elif kind == "event":
                for record in group:
                    self._event(record)
            else:
                self.skipped += len(list(group))

    def __contains__(self, name: str) -> bool:
        return not np.isnan(self.column(name, 1)).all()

    def column(self, name: str, part: int = 0) -> np.ndarray:
        return self.tables[SERIES[name].table].column(name, part)

    def _rows(self, kind: str, records: list[dict[str, Any]]) -> None:
        values = numbers_in(records, (*AXES, *GIVEN[kind]))
        for row, limit in zip(values, AXES.values(), strict=False):
            row[~((row >= 0) & (row <= limit))] = math.nan
        good = ~np.isnan(values[0])
        self.skipped += int((~good).sum())
        records, values = list(compress(records, good)), values[:, good]
        if not records:
            return
        if kind == "epoch":
            omegas = [r["omega"] if isinstance(r.get("omega"), list) else [] for r in records]
            more = [[finite((omega + [None] * 4)[i]) for omega in omegas] for i in range(len(OMEGAS))]
            values = np.vstack([values, more])
            for step, epoch, at, _, attacked, error in values[:6].T.tolist():
                text = f"{epoch:g}  error {number(error)} %  attacked {number(attacked)} %"
                self.events.append(Event(at, step, "epoch", text))
        self.tables[kind].append(values)
        self.last = dict(zip(AXES, values[:3, -1].tolist(), strict=True))
        for record, step in zip(records, values[0].tolist(), strict=True):
            if names := record.get("nonfinite"):
                names = [clean(name, 30) for name in (names[:8] if isinstance(names, list) else [names])]
                self.nonfinite_count += 1
                self.nonfinite += [(step, name) for name in sorted(names, key=lambda name: name != "loss")]
                del self.nonfinite[500:]

    def _event(self, record: dict[str, Any]) -> None:
        step, _, at = (finite(record.get(name), 0, limit) for name, limit in AXES.items())
        kind = clean(record.get("event", "event"), 20)
        if kind == "resume" and not math.isnan(step):  # records beyond its step are void
            self.void_count += sum(table.void(step) for table in self.tables.values())
            self.resumes.append(step)
            self.last["step"] = self.checkpoint = step
            self.nonfinite = [mark for mark in self.nonfinite if mark[0] <= step]
            self.nonfinite_count *= bool(self.nonfinite)
        if kind == "checkpoint":  # there is one after each epoch, which has its line
            self.checkpoint = step
        else:
            self.events.append(Event(at, step, kind, clean(record.get("message") or "")))


def numbers_in(records: list[dict[str, Any]], names: Sequence[str]) -> np.ndarray:
    """The numbers of some fields, (fields, records); NaN for what is missing, of another type or not finite."""
    with contextlib.suppress(KeyError, OverflowError):
        rows = list(map(itemgetter(*names), records))
        if set(map(type, chain.from_iterable(rows))) <= {int, float, type(None)}:
            columns = np.array(rows, dtype=np.float64).T  # None becomes NaN
            columns[~(np.abs(columns) <= 3e38)] = math.nan
            return columns
    return np.array([[finite(record.get(name)) for record in records] for name in names])


class Run:
    """One run directory, followed.  `fetch` touches the disk (any thread), `apply` takes what it brought.

    With `last`, only so many bytes of a longer log are read.
    """

    def __init__(self, path: Path, stall: float | None = None, last: float = math.inf):
        self.path, self.stall, self.limit, self.real = path, stall, last, ""
        self.log, self.exists = Log(), True
        self.config, self.status, self.summary, self.options = {}, {}, {}, {}
        self.arrived = math.nan  # when, by this clock, the last record came in while we watched
        self._caught_up = False
        self._follow()

    def _follow(self) -> bool:
        """Look at the directory that the path means now; whether it is another one than before."""
        before, self.real = self.real, resolved(self.path)
        if before != self.real:
            self.name, self.tail = clean(Path(self.real).name, 100), Tail(Path(self.real) / "metrics.jsonl", self.limit)
        return before != self.real

    def fetch(self) -> tuple[bytes, bool, list[dict[str, Any]], bool]:
        """(new lines, whether the old ones are void, the documents, whether the directory exists).  Never raises."""
        moved = self._follow()
        lines, void = self.tail.poll()
        known = {"config.json": self.config, "status.json": self.status, "evaluation/summary.json": self.summary}
        documents = [document(Path(self.real) / name, {} if moved else old) for name, old in known.items()]
        return lines, void or moved, documents, os.path.isdir(self.real)

    def apply(self, fetched: tuple[bytes, bool, list[dict[str, Any]], bool], now: float) -> bool:
        """Take what `fetch` brought; whether there were new lines."""
        lines, void, (config, self.status, self.summary), self.exists = fetched
        if self.exists or void:  # of a deleted run the configuration stays, for the names of its curves
            self.config, options = config, config.get("options")
            self.options = options if isinstance(options, dict) else {}
        if void:
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

    def named(self, text: str) -> str:
        """A label with the run's own norm and radii in it."""
        radii = self.config.get("omega_eps")
        known = {f"eps{i}": f"ε{i}" for i in range(len(OMEGAS))}
        known |= {f"eps{i}": number(finite(r), ".4g") for i, r in enumerate(radii if isinstance(radii, list) else ())}
        return text.format(dual=DUALS.get(clean(self.options.get("norm")), "‖∇‖"), **known).strip("-")


def resolved(path: Path) -> str:
    """The directory behind a path.  runs/latest is a link, or, where there are none, a file that holds a name."""
    with contextlib.suppress(OSError, ValueError):
        if path.is_file() and path.stat().st_size < 1000 and (name := path.read_text().strip()):
            path = path.parent / name
    return os.path.realpath(path)


# ---------------------------------------------------------------- facts: all that is said of a run beside its curves

STATES = {  # as told by a symbol and a colour
    **{"WAITING": ("○", "dim"), "DELETED": ("○", "warn"), "LIVE": ("●", "good"), "STALLED": ("◐", "warn")},
    **{"FINISHED": ("✓", "good"), "INTERRUPTED": ("■", "warn"), "FAILED": ("✗", "bad")},
}
ENDS = {"finish": "finished", "interrupt": "interrupted", "error": "failed"}  # events, for runs without a status.json


def judge(run: Run, now: float, rhythm: float) -> tuple[str, str]:
    """(state, note) of a run, whose records come every `rhythm` seconds (NaN: unknown).

    Silence is allowed for run.stall seconds; by default for max(10, 5 rhythms), 60 before the first record.  Before
    it, and in any phase but "train" (evaluating, saving), the heartbeat is a sign of life; in "train" only records
    are.  A record that came while we watched is as young as that, whatever its writer's clock says.
    """
    status, last, begun = run.status, run.log.last["time"], not math.isnan(run.log.last["step"])
    word = status.get("state") or (ENDS.get(run.log.events[-1].kind) if run.log.events else None)
    if not run.exists:
        return ("DELETED", "its directory is gone; what was read stays here") if begun else ("WAITING", "")
    if word in ("finished", "interrupted", "failed"):
        notes = {"interrupted": "python train.py --resume RUN", "failed": clean(status.get("error") or "")}
        return word.upper(), notes.get(word, "")
    if not begun and word != "running":
        return "WAITING", ""
    steady = begun and status.get("phase", "train") == "train"
    last = float(np.fmax(last if last <= now or math.isnan(run.arrived) else math.nan, run.arrived))
    age = now - np.nan_to_num(last if steady else np.fmax(last, finite(status.get("time"))), nan=now)
    if age > (run.stall or np.fmax(10.0 if begun else 60.0, 5 * rhythm)):
        return "STALLED", f"no {'record' if begun else 'sign of life'} for {duration(age)}"
    return "LIVE", "" if steady else clean(status.get("phase", "starting"), 12)


def facts(run: Run, now: float) -> dict[str, Any]:
    """What header, tables, lists and --json say of a run; NaN for what is unknown.

    `elapsed_s` counts from the making of the run to its latest sign of life, the speed over the last 200 records.
    """
    log, total, place = run.log, finite(run.config.get("steps_total"), 1), run.log.last["step"]
    step, at = (log.tables["step"].column(name, 2)[-200:] for name in ("step", "time"))
    gaps = np.sort(np.diff(at[~np.isnan(at)][-50:]))
    state, note = judge(run, now, float(gaps[len(gaps) // 2]) if len(gaps) else math.nan)
    since = int(np.searchsorted(step, log.resumes[-1], "right")) if log.resumes else 0
    step, at = step[since:], at[since:]
    speed = float((step[-1] - step[0]) / (at[-1] - at[0])) if len(step) > 1 and at[-1] > at[0] else math.nan
    place = 0.0 if math.isnan(place) and run.status.get("state") == "running" else place
    sign, of = np.fmax(log.last["time"], finite(run.status.get("time"))), finite(run.summary.get("checkpoint_step"))
    elapsed = float(np.fmax(0, sign - finite(run.config.get("created")))) if sign == sign else math.nan
    other = f"of step {of:,.0f}, not {log.checkpoint:,.0f}" if abs(of - log.checkpoint) > 0 else None
    return {
        **{"run": run.name, "path": str(run.path), "state": state, "note": note, "step": place, "steps_total": total},
        **{"epoch": log.last["epoch"], "age_s": now - log.last["time"], "steps_per_s": speed},
        **{"elapsed_s": elapsed, "eta_s": max(0.0, total - place) / speed if speed > 0 else math.nan},
        **{"lines": log.lines, "bad_lines": log.skipped, "not_finite": log.nonfinite_count},
        **{"undone_by_resume": log.void_count, "attack_eps": run.config.get("attack_eps")},
        **{"last_event": log.events[-1]._asdict() if log.events else None, "series": readings(log)},
        **{"options": run.options, "evaluation": run.summary or None, "evaluation_of_another_checkpoint": other},
    }


def readings(log: Log) -> dict[str, dict[str, float]]:
    """Every series with a number among its last 200 records; `mean` is that of the last 30."""
    found = {}
    for name, series in SERIES.items():
        recent, low = log.column(name)[-200:], log.column(name, 1)
        if not np.isnan(recent).all():
            last, least = recent[~np.isnan(recent)], float(np.fmin.reduce(low))
            found[name] = {"last": float(last[-1]), "mean": float(np.mean(last[-30:])), "least": least}
            found[name]["greatest"] = float(np.fmax.reduce(log.column(name, 2)))
            if name.endswith(("loss", "error_pct")) and name != "fd_error_pct":  # others: a small one is no merit
                step = log.tables[series.table].steps[np.argmax(low == least)]
                found[name] |= {"best": least, "best_step": float(step)}
    return found


BOUNDS = {"median": "median_distance", "L-bound": "lipschitz_bound_mean"}
BOUNDS |= {"ω-bound": "omega_bound_mean", "false %": "violations_pct"}


def robustness(runs: Sequence[dict[str, Any]]) -> list[tuple[str, list[float], Any, bool]]:
    """(quantity, its value in each run, which is the best, whether evaluated): which is more robust?

    The error under attack in training; then, of each norm that was evaluated, the mean attacked distance, the error
    at that attack's radius (or the middle one), the mean bounds and how often, in %, the omega-bound is false.
    """
    norms = [(known["evaluation"] or {}).get("norms") for known in runs]
    norms = [n if isinstance(n, dict) else {} for n in norms]
    found = [("attacked %", [last_value(known, "attacked_error_pct") for known in runs], min, False)]
    for norm in dict.fromkeys(chain.from_iterable(norms)):
        of, name = [n.get(norm) if isinstance(n.get(norm), dict) else {} for n in norms], clean(norm, 9)
        errors = [e if isinstance(e := known.get("error_pct"), dict) else {} for known in of]
        errors = [{finite(parse_line(radius.encode())): finite(error) for radius, error in e.items()} for e in errors]
        radii = sorted(radius for radius in set(chain.from_iterable(errors)) if radius > 0) or [math.nan]
        own = [radius for radius in radii if radius in [known["attack_eps"] for known in runs]]
        radius = own[0] if own else radii[(len(radii) - 1) // 2]
        found.append((f"{name} distance", [finite(known.get("mean_distance")) for known in of], max, True))
        found.append((f"{name} err {number(radius, '.2g')}", [e.get(radius, math.nan) for e in errors], min, True))
        found += [(f"{name} {k}", [finite(known.get(v)) for known in of], None, True) for k, v in BOUNDS.items()]
    return [*found, ("clean %", [last_value(known, "clean_error_pct") for known in runs], min, False)]


def runs_under(root: Path, now: float) -> list[tuple[Run, dict[str, Any]]]:
    """The runs in a directory with their facts, latest first.  Of each only the end is read."""
    found: list[Run] = []
    with contextlib.suppress(OSError):  # links are passed over: runs/latest is one of the others
        paths = [p for p in root.iterdir() if p.is_dir() and not p.is_symlink() and p.name[0] != "."]
        found = [Run(path, last=1 << 19) for path in paths]
    found = [run for run in found if run.read_all().config or run.status or run.log.lines]
    found.sort(key=lambda run: -np.nan_to_num(np.fmax(run.log.last["time"], finite(run.config.get("created")))))
    return [(run, facts(run, now)) for run in found]


def last_value(known: dict[str, Any], name: str) -> float:
    return known["series"].get(name, {}).get("last", math.nan)


def write_csv(run: Run, file: TextIO) -> None:
    """The records that count as CSV, one table below the other; mean, least and greatest of what was merged."""
    writer = csv.writer(file)
    for kind, table in run.log.tables.items():
        parts = {"": 0, "_min": 1, "_max": 2} if table.merged else {"": 0}
        writer.writerow(["kind", *AXES, *(name + end for end in parts for name in FIELDS[kind])])
        rows = np.vstack([table.data[2, :3, : table.rows], *(table.data[i, 3:, : table.rows] for i in parts.values())])
        writer.writerows([kind, *("" if math.isnan(v) else v for v in row)] for row in rows.T.tolist())


# ---------------------------------------------------------------- charts: from columns to dots to cells

Line = list[tuple[str, str]]  # (text, role): see styles_of
GUTTER = 8  # cells left of a plot: tick labels and the axis
Curve = namedtuple("Curve", "run series colour tag bins")
# A series on the dot columns of a chart; NaN where a column holds nothing, `broken` where it has to.
Bins = namedtuple("Bins", "low high line broken")


class Canvas:
    """Cells, each a character and a role; a part of it shares its cells.  Behind a wide character one is empty."""

    def __init__(self, cells: np.ndarray, roles: np.ndarray):
        self.cells, self.roles = cells, roles
        self.height, self.width = cells.shape

    @classmethod
    def of(cls, lines: Sequence[Line], width: int, height: int = 0) -> "Canvas":
        """These lines, cut to `width`, on a canvas of at least `height`."""
        shape = max(height, len(lines)), width
        return cls(np.full(shape, " ", "U1"), np.full(shape, "", object)).write(0, lines)

    def __getitem__(self, part: tuple[slice, slice]) -> "Canvas":
        return Canvas(self.cells[part], self.roles[part])

    def write(self, y: int, lines: Sequence[Line], x: int = 0) -> "Canvas":
        """Put lines one below the other, as far as there is room."""
        for row, line in enumerate(lines[: max(0, self.height - y)], y):
            at = x
            for text, role in line:
                for char in text:
                    if (end := at + cell_len(char)) > self.width:
                        break
                    self.cells[row, at:end], self.roles[row, at:end] = [char, ""][: end - at], role
                    at = end
        return self

    def head(self, title: str, unit: str = "", right: str = "", heavy: bool = False) -> "Canvas":
        """Put a titled rule into the first row."""
        stroke, role, bold = ("━", "accent", "accent+") if heavy else ("─", "rule", "bright+")
        self.write(0, [[(stroke * self.width, role)]])
        end = self.width - len(right) - 3
        self[:, : end if right else self.width].write(
            0, [[(f" {title} ", bold), (f"{unit} " if unit else "", "dim")]], 1
        )
        return self.write(0, [[(f" {right} ", "dim")]], end) if right else self

    def line(self, y: int) -> Line:
        cuts = [0, *(np.flatnonzero(self.roles[y, 1:] != self.roles[y, :-1]) + 1).tolist(), self.width]
        return [("".join(self.cells[y, a:b]), self.roles[y, a]) for a, b in pairwise(cuts)]

    def changes(self, old: "Canvas") -> list[Region]:
        """Where it differs from one of its size, in spans that are worth a movement of the cursor."""
        spans = []
        for y, row in enumerate((self.cells != old.cells) | (self.roles != old.roles)):
            x = np.flatnonzero(row)
            groups = np.split(x, np.flatnonzero(np.diff(x) > 8) + 1) if len(x) else []
            spans += [Region(int(group[0]), y, int(group[-1] - group[0]) + 1, 1) for group in groups]
        return spans

    @property
    def text(self) -> str:
        return "\n".join("".join(row).rstrip() for row in self.cells)


def binned(table: Table, name: str, edges: np.ndarray) -> Bins:
    """Series `name` on the columns between `edges`: least and greatest value of a column's records, exact, and mean."""
    low, high, line = np.full((3, len(edges) - 1), math.nan)
    cuts = np.searchsorted(table.steps, edges)
    has, own = cuts[1:] > cuts[:-1], slice(cuts[0], cuts[-1])
    if has.any():
        starts, values = cuts[:-1][has] - cuts[0], table.column(name)[own]
        low[has] = np.fmin.reduceat(table.column(name, 1)[own], starts)
        high[has] = np.fmax.reduceat(table.column(name, 2)[own], starts)
        counts = np.add.reduceat(~np.isnan(values), starts, dtype=np.int64)
        line[has] = np.add.reduceat(np.nan_to_num(values), starts) / np.where(counts > 0, counts, math.nan)
    return Bins(low, high, line, has & np.isnan(low))


def nice(value: float, steps: Sequence[float] = (1.0, 2.0, 2.5, 5.0)) -> float:
    """The least round number that is not below `value` > 0."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step for step in (*steps, 10.0) if step * power >= value * (1 - 1e-9)) * power


class Scale(NamedTuple):
    """A y axis of `rows` rows: tick i, (first + i) step (or, with `log`, ten to that), in the middle of row i gap."""

    rows: int
    gap: int
    step: float
    first: int
    log: bool

    def place(self, values: np.ndarray) -> np.ndarray:
        """0 at the bottom, 1 at the top."""
        with np.errstate(divide="ignore"):
            values = np.log10(np.maximum(values, 0)) if self.log else np.asarray(values)
        return ((values / self.step - self.first) * self.gap + 0.5) / self.rows

    def ticks(self) -> dict[str, float]:
        """The ticks from the bottom up, by their labels."""
        ticks = [(self.first + i) * self.step for i in range((self.rows - 1) // self.gap + 1)]
        ticks = [10.0**tick for tick in ticks] if self.log else ticks
        return {number(tick, ".4g" if abs(tick) >= 0.01 else ".3g"): tick for tick in ticks}


def scale_of(low: float, high: float, rows: int, log: bool) -> Scale:
    """The fullest axis that holds low..high with about five ticks, whose labels differ.

    Logarithmic only over a decade or more; what is not positive then lies below it.
    """
    size = max(abs(high), abs(low)) or 1.0
    least = max(low, high * 1e-12) if low > 0 else high * 1e-3
    if log := log and high >= 10 * least > 0:
        low, high, finest = math.log10(least), math.log10(high), 1.0
    else:
        low, finest = 0.0 if 0 < low <= 0.4 * high else low, 0.0
    width, scales = max(high - low, 1e-30 if log else (0.01 if size >= 0.01 else 0.1) * size), []
    for gap in range(max(2, rows // 8), max(3, rows // 2 + 1)):
        step, end = width * gap / rows, -math.inf
        while end < high - 1e-9 * width:
            step = max(nice(step * 1.0001), finest)
            first = math.floor(low / step + 1e-9)
            end = (first - 0.5 / gap + rows / gap) * step
        scales.append(Scale(rows, gap, step, first, log))
    return min(scales, key=lambda s: s.step / s.gap * (1 + 0.05 * abs(rows / s.gap - min(max(rows / 4, 4), 7))))


def limits(bins: Sequence[Bins]) -> tuple[float, float]:
    """The least and the greatest value to show; rare columns far outside are cut off (and marked)."""
    lows, highs = (np.concatenate([b[i][~np.isnan(b[i])] for b in bins]) for i in (0, 1))
    low, high = float(lows.min()), float(highs.max())
    if len(lows) >= 20:
        inner_low, inner_high = float(np.quantile(lows, 0.02)), float(np.quantile(highs, 0.97))
        room = 0.5 * (inner_high - inner_low)
        low, high = low if low >= inner_low - room else inner_low, high if high <= inner_high + room else inner_high
    return low, high


def bridged(values: np.ndarray, broken: np.ndarray) -> np.ndarray:
    """Empty columns filled in a straight line between their neighbours, except across a broken one."""
    full = np.full(len(values), math.nan)
    for part in np.split(np.arange(len(values)), np.flatnonzero(broken)):
        known = part[~np.isnan(values[part])]
        if len(known):
            full[part] = np.interp(part, known, values[known], left=math.nan, right=math.nan)
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
    """Dots (4 rows, 2 columns to a cell) as braille patterns: characters (rows, columns), empty where there is none."""
    rows, columns = dots.shape[0] // 4, dots.shape[1] // 2
    cells = dots.reshape(rows, 4, columns, 2).transpose(0, 2, 1, 3).reshape(rows, columns, 8)
    codes = cells @ np.array([1, 8, 2, 16, 4, 32, 64, 128])
    return np.where(codes > 0, 0x2800 + codes, 0).astype(np.uint32).view("U1")


class View(NamedTuple):
    """Everything a key can change."""

    at: int = 0  # the panel in focus
    alone: str = ""  # what has all of the screen: chart, numbers, events
    logs: frozenset[str] = frozenset({"gradient"})  # panels with a logarithmic y axis, by the first word
    zoom: int = 0  # only the last 1 / 2**zoom of the run


def panels_of(runs: Sequence[Run]) -> list[tuple[str, list[Series]]]:
    """(title, series) of the charts that there is data for, or will be (the first five); comparing, one series each."""
    known = [s for s in SERIES.values() if any(s.name in run.log for run in runs)]
    have = [(title, [s for s in known if s.panel == str(i)]) for i, title in enumerate(PANELS)]
    if len(runs) == 1:
        return [(runs[0].named(title), series) for i, (title, series) in enumerate(have) if series or i < 5]
    turns = zip_longest(*([(f"{title} {s.tag}", s) for s in series] for title, series in have))
    return [(runs[0].named(title).strip(" -"), [s]) for title, s in filter(None, chain(*turns))] or [("loss", [])]


def x_range(runs: Sequence[Run], zoom: int) -> tuple[float, float]:
    """The steps at the left and right edge.  They stay put while a run grows, so that few cells change."""
    steps = [table.steps for run in runs for table in run.log.tables.values() if table.rows]
    low, high = (min(float(x[0]) for x in steps), max(float(x[-1]) for x in steps)) if steps else (0.0, 0.0)
    low = low if low >= 0.3 * high else 0.0
    if not high > low:
        return low - 0.5, low + 1.0
    growing = any(run.log.last["step"] < finite(run.config.get("steps_total"), 1) for run in runs)
    fine = (1.0, 1.25, 1.6, 2.0, 2.5, 3.2, 4.0, 5.0, 6.4, 8.0)
    width = (nice(high - low, fine) if growing or zoom else high - low) / (1 << zoom)
    right = low + (math.ceil((high - low) / width * 8 + 1e-9) / 8 if zoom else 1) * width
    return right - width, right


def chart(canvas: Canvas, runs: Sequence[Run], view: View, index: int, panel: tuple[str, list[Series]]) -> None:
    """One panel, from its title to its x axis, on all of the canvas."""
    (title, series), many, curves = panel, len(runs) > 1, []
    names = distinct([run.name for run in runs], min(14, canvas.width // 3))
    tags = 1 + (max(map(cell_len, names)) if many else 5 * (len(series) > 1))
    rows, columns = canvas.height - 2, canvas.width - GUTTER - tags
    edges = np.linspace(*x_range(runs, view.zoom), 2 * columns + 1)
    edges[-1] = np.nextafter(edges[-1], math.inf)
    for i, run in enumerate(runs):
        for s in series:
            bins = binned(run.log.tables[s.table], s.name, edges)
            colour, tag = (f"c{i}", names[i]) if many else (s.colour, run.named(s.tag))
            bins = bins._replace(low=bins.line, high=bins.line) if many else bins  # envelopes would hide each other
            curves += [Curve(run, s, colour, tag, bins)] if not np.isnan(bins.line).all() else []
    unit, heavy, log = series[0].unit.strip("-") if series else "", index == view.at, title.split()[0] in view.logs
    if not curves:
        canvas.head(f"{index + 1} {title}", unit, heavy=heavy)
        canvas.write(canvas.height // 2, [[("no data yet", "dim")]], canvas.width // 2 - 5)
        return
    scale, plot = scale_of(*limits([c.bins for c in curves]), rows, log), canvas[1:-1, GUTTER : GUTTER + columns]
    canvas.head(f"{index + 1} {title}", unit, "log" * scale.log, heavy)
    draw(plot, curves, scale, band=not many and series[0].table == "step")
    mark(plot, curves, scale, edges)
    canvas.write(1, [[("│", "axis")]] * rows, GUTTER - 1)
    for i, label in enumerate(scale.ticks()):
        canvas.write(rows - i * scale.gap, [[(f"{label:>{GUTTER - 1}}", "dim"), ("┤", "axis")]])
    if tags > 1:
        name_ends(canvas[1:-1, GUTTER + columns :], curves, scale)
    x_labels(canvas[-1:, :], edges)


def draw(plot: Canvas, curves: Sequence[Curve], scale: Scale, band: bool) -> None:
    """A line for each curve, the first on top; with `band`, the envelope of the first below them."""
    dots, lines = 4 * plot.height, np.zeros((4 * plot.height, 2 * plot.width), bool)
    if band:
        low, high = (bridged(scale.place(values), curves[0].bins.broken) for values in curves[0].bins[:2])
        chars = braille(ribbon(low, high, dots))
        plot.cells[chars != ""], plot.roles[chars != ""] = chars[chars != ""], f"{curves[0].colour}-"
    for curve in reversed(curves):
        place = bridged(scale.place(curve.bins.line), curve.bins.broken)
        lines |= (mask := ribbon(place, place, dots))
        here = braille(mask) != ""
        plot.cells[here], plot.roles[here] = braille(lines)[here], curve.colour


def mark(plot: Canvas, curves: Sequence[Curve], scale: Scale, edges: np.ndarray) -> None:
    """▴ above columns with values beyond the axis, ▾ below them, ✗ where a value was not finite."""
    for run, series, colour, _, bins in curves:
        with np.errstate(invalid="ignore"):
            over, under = scale.place(bins.high) > 1 + 1e-9, scale.place(bins.low) < -1e-9
        wrong = np.array([step for step, name in run.log.nonfinite if name == series.name])
        wrong = (np.searchsorted(edges, wrong[(wrong >= edges[0]) & (wrong < edges[-1])], "right") - 1) // 2
        over, under = (np.flatnonzero(out) // 2 for out in (over, under))
        for row, sign, out, role in ((0, "▴", over, colour), (-1, "▾", under, colour), (0, "✗", wrong, "bad+")):
            plot.cells[row, out], plot.roles[row, out] = sign, role


def name_ends(canvas: Canvas, curves: Sequence[Curve], scale: Scale) -> None:
    """The names of the lines beside their ends, moved apart where they would collide."""
    ends = [(float(scale.place(c.bins.line[~np.isnan(c.bins.line)][-1])), c) for c in curves]
    row, ends = -1, sorted(ends, key=itemgetter(0), reverse=True)[: canvas.height]
    for left, (place, curve) in zip(range(len(ends), 0, -1), ends, strict=True):
        wanted = canvas.height - 1 - math.floor(min(max(place, 0), 0.999) * canvas.height)
        row = max(row + 1, min(wanted, canvas.height - left))
        canvas.write(row, [[(curve.tag, curve.colour)]], 1)


def x_labels(canvas: Canvas, edges: np.ndarray) -> None:
    """The x axis with its ticks."""
    cells, left, right = len(edges) // 2, float(edges[0]), float(edges[-1])
    canvas.write(0, [[("└" + "─" * cells, "axis")]], GUTTER - 1)
    gap, free = nice((right - left) / max(2, cells // 12)), GUTTER
    for i in range(math.ceil(left / gap - 1e-6), math.floor(right / gap + 1e-6) + 1):
        label = number(round(i * gap, 9), ".4g")
        start = GUTTER + int((i * gap - left) / (right - left) * cells) - len(label) // 2
        start = min(max(start, GUTTER), canvas.width - len(label))
        if start >= free:
            canvas.write(0, [[(label, "axis")]], start)
            free = start + len(label) + 1


# ---------------------------------------------------------------- tables and screens: from facts to lines to cells


def aligned(rows: Sequence[Sequence[tuple[str, str]]], width: float = math.inf) -> list[Line]:
    """Columns as wide as their widest cell, the first two flush left; those on the right that do not fit go."""
    lines: list[Line] = [[] for _ in rows]
    for i, column in enumerate(zip(*rows, strict=True)):
        size = max(cell_len(text) for text, _ in column)
        width -= size + 1
        for line, (text, role) in zip(lines if width >= -1 else (), column, strict=False):
            blank = " " * (size - cell_len(text))
            line.append((f"{text}{blank} " if i < 2 else f"{blank}{text} ", role))
    return lines


def comparison(runs: Sequence[dict[str, Any]], names: Sequence[str], width: float = math.inf) -> list[Line]:
    """Which is more robust?  Headings, then a row a run, the best of each column marked ★, and how it stands.

    Runs compete on the same data; an evaluation of another checkpoint does not, and is marked †.
    """
    stale = [bool(known["evaluation_of_another_checkpoint"]) for known in runs]
    columns: list[Line] = [[("", ""), *(STATES[known["state"]] for known in runs)]]
    columns.append([("", ""), *((name, f"c{i % 6}+") for i, name in enumerate(names))])
    data = [known["options"].get("dataset") for known in runs]
    for label, values, best, evaluated in (fact for fact in robustness(runs) if fact[2]):
        columns.append([(f"{label}  ", "dim")])
        entries = list(zip(values, [evaluated and other for other in stale], data, strict=True))
        for value, other, own in entries:
            rivals = {v for v, old, of in entries if v == v and not old and of == own}
            sign = "†" if other and value == value else "★" if len(rivals) > 1 and value == best(rivals) else " "
            columns[-1].append((f"{number(value)} {sign}", "good+" if sign == "★" else "text+"))
    steps = [
        f"{known['step']:,.0f}/{known['steps_total']:,.0f}".replace("/nan", "").replace("nan", "–") for known in runs
    ]
    keys = dict.fromkeys(chain.from_iterable(known["options"] for known in runs))  # those that differ, the first four
    keys = [key for key in keys if len({str(known["options"].get(key)) for known in runs}) > 1][:4]
    differ = [" ".join(f"{key}={clean(known['options'].get(key, '–'), 12)}" for key in keys) for known in runs]
    more = {"differs": differ, "step": steps}
    more |= {"state": [known["state"] for known in runs], "age": [duration(known["age_s"]) for known in runs]}
    columns += [[(f"  {head}", "dim"), *((f"  {text}", "text") for text in texts)] for head, texts in more.items()]
    return aligned(list(zip(*columns, strict=True)), width)


def number_lines(run: Run, known: dict[str, Any]) -> list[Line]:
    """Every number of a run: of errors and losses the least one is the best, and has its step; health; options."""
    lines: list[Line] = [[(f"{'last':>20}{'mean':>8}{'least':>8}{'most':>8}", "dim")]]
    for name, found in sorted(known["series"].items(), key=lambda item: "best" not in item[1]):
        series, mean = SERIES[name], number(found["mean"]) if SERIES[name].table == "step" else ""
        end = f"@{number(found['best_step'], '.4g')}" if "best" in found else number(found["greatest"])
        label = [("━ ", series.colour), (f"{run.named(series.label):<10}", "text")]
        label.append((f"{number(found['last']):>8}", "bright+"))
        lines.append([*label, (f"{mean:>8}{number(found['least']):>8}{end:>8}", "text")])
    age = known["age_s"] if known["state"] in ("LIVE", "STALLED") else math.nan
    cells = [(label, number(values[0])) for label, values, _, evaluated in robustness([known]) if evaluated]
    cells += [("since start", duration(known["elapsed_s"])), ("training", duration(last_value(known, "seconds")))]
    cells += [("last record", "now" if age < 3 else duration(age)), ("steps/s", number(known["steps_per_s"]))]
    cells += [("records", f"{known['lines']:,}"), ("bad lines", f"{known['bad_lines']:,}")]
    cells += [("not finite", f"{known['not_finite']:,}"), ("undone", f"{known['undone_by_resume']:,}")]
    parts = [[(f"{label:<14}", "dim"), (f"{value:>7}  ", "text+")] for label, value in cells]
    names = ("dataset", "model", "activation", "method", "norm", "lam", "h", "batch_size", "seed")
    words = " ".join(f"{name}={clean(run.options[name], 16)}" for name in names if name in run.options)
    lines += [[], *([*a, *b] for a, b in zip(parts[::2], parts[1::2], strict=True)), []]
    if other := known["evaluation_of_another_checkpoint"]:
        lines.append([(f"✗ evaluation {other}", "warn+")])
    return [*lines, *([(text, "dim")] for text in textwrap.wrap(words, 44))]


def header(run: Run, known: dict[str, Any], width: int, shown: str) -> list[Line]:
    """State, name, what must not be overlooked, progress: what fits, the dearest first; then a bar."""
    log, state, step, total, epoch = run.log, *(known[key] for key in ("state", "step", "steps_total", "epoch"))
    ended = state in ("FINISHED", "INTERRUPTED", "FAILED")
    word, seconds = ("took", known["elapsed_s"]) if ended else ("ETA", known["eta_s"] if state == "LIVE" else math.nan)
    (symbol, role), epochs = STATES[state], finite(run.options.get("epochs"))
    note = distinct([known["note"]], max(12, width - 45))[0]
    parts: list[Line] = [
        [(f"{symbol} {state}", f"{role}+")],
        [(distinct([run.name], max(12, width // 3))[0], "bright+")],
        [(f"reading {run.tail.offset / run.tail.size:.0%}" if run.tail.behind else "", "warn")],
        *([(f"✗ NaN {name} @{at:,.0f} ×{log.nonfinite_count}", "bad+")] for at, name in log.nonfinite[:1]),
        *([(f"↻ resumed @{at:,.0f}", "warn")] for at in list(log.resumes)[-1:]),
        [(f"metrics.jsonl: {run.tail.error}" if run.tail.error and run.exists and log.lines else "", "bad")],
        [(note, role)] if role != "good" else [],
        [("step ", "dim"), (f"{step:,.0f}/{total:,.0f}".replace("/nan", "").replace("nan", "–"), "text")],
        [("epoch ", "dim"), (f"{epoch:.1f}/{epochs:,.0f}".replace("/nan", ""), "text")] if epoch == epoch else [],
        [(f"{word} ", "dim"), (duration(seconds), "text+")] if seconds == seconds else [],
        [(note, role)] if role == "good" else [],
    ]
    line: Line = []
    for part in (part for part in parts if any(text for text, _ in part)):
        longer = [*line, *([("   ", "")] if line else []), *part]
        line = longer if cell_len("".join(text for text, _ in longer)) <= width or not line else line
    share = float(np.nan_to_num(np.minimum(1.0, step / total)))
    right = f" {share:.1%} · {shown}"
    full = round(share * (room := max(0, width - len(right))))
    return [line, [("━" * full, role), ("─" * (room - full), "rule"), (right, "dim")]]


def event_lines(runs: Sequence[Run], count: int = 200) -> list[Line]:
    """The last events, the newest at the bottom; of several runs with the run's name."""
    names = distinct([run.name for run in runs], 14)
    events = sorted(((e, i) for i, run in enumerate(runs) for e in run.log.events), key=lambda e: finite(e[0].time))
    roles = {"error": "bad+", "warning": "warn", "interrupt": "warn", "resume": "warn", "finish": "good"}
    lines: list[Line] = []
    for (at, step, kind, text), i in events[-count:]:
        clock = time.strftime("%H:%M:%S", time.localtime(at)) if at > 0 else "--:--:--"
        name = [(f"{names[i]:<14} ", f"c{i}")] if len(runs) > 1 else []
        where = (f"{step:>11,.0f}   ".replace("nan", "   "), "accent")
        lines.append([(clock, "dim"), where, *name, (f"{kind:<11}{text}", roles.get(kind, "text"))])
    return lines


def dashboard(runs: Sequence[Run], view: View, width: int, height: int, now: float) -> Canvas:
    """The whole screen, or more to be scrolled: charts, with the one in focus; from 110 columns on numbers, too."""
    run, many, alone, known = runs[0], len(runs) > 1, view.alone, [facts(one, now) for one in runs]
    if width < 40 or height < 10:
        return centred(["too small:", "40x10", "needed"], width, height)
    if not many and known[0]["state"] == "WAITING":
        what = f"metrics.jsonl: {run.tail.error or 'no record yet'}" if run.exists else "no such run yet"
        return centred([f"waiting for {clean(run.path)}", what, "", "start one:  python train.py"], width, height)
    if alone == "events":
        return Canvas.of(event_lines(runs), width, height)
    if alone == "numbers":
        lines: list[Line] = []
        for one, of in zip(runs, known, strict=True):
            lines += [[(clean(one.real), "accent+")], *number_lines(one, of)]
            config = json.dumps(one.config, indent=2, ensure_ascii=False)
            lines += [[(clean(text), "text")] for text in config.splitlines()]
        return Canvas.of(lines, width, height)
    canvas, shown = Canvas.of([], width, height), f"last 1/{1 << view.zoom}" if view.zoom else "all steps"
    top = header(run, known[0], width - 2, shown)[: 1 + (height >= 16)]
    if many:
        evaluated, old = len(robustness(known)) > 2, any(one["evaluation_of_another_checkpoint"] for one in known)
        hint = "† of another checkpoint" if old else shown if evaluated else "not evaluated: python evaluate.py RUN RUN"
        title = Canvas.of([], width - 2, 1).head("which is more robust?", right=hint)
        top = [title.line(0), *comparison(known, distinct([one.name for one in runs], 24), width - 2)]
    canvas.write(0, top, 1)
    bottom = height - (0 if alone or height < 22 else 3 if height < 34 else 4)
    if bottom < height:
        canvas[bottom:, :].head("events").write(1, event_lines(runs, height - bottom - 1), 1)
    if wide := width >= 110 and not many and not alone:
        lines = [*number_lines(run, known[0]), *[[]] * height][: bottom - len(top)]
        canvas.write(len(top), [[("│ ", "rule"), *line] for line in lines], width - 47)
    grid(canvas[len(top) : bottom, : width - 48 * wide], runs, view)
    return canvas


def grid(canvas: Canvas, runs: Sequence[Run], view: View) -> None:
    """The charts, in up to three columns, from the page of the one in focus."""
    panels, width = panels_of(runs), canvas.width + 1
    columns = 1 if view.alone else max(1, min(3, canvas.width // 36))
    rows = 1 if view.alone else max(1, min(-(-6 // columns), canvas.height // 8))
    first = max(0, min(view.at // (columns * rows) * columns * rows, len(panels) - columns * rows))
    for i, panel in enumerate(panels[first : first + columns * rows]):
        y, x = divmod(i, columns)
        tall = slice(canvas.height * y // rows, canvas.height * (y + 1) // rows)
        chart(canvas[tall, width * x // columns : width * (x + 1) // columns - 1], runs, view, first + i, panel)


def centred(words: Sequence[str], width: int, height: int) -> Canvas:
    lines: list[Line] = [[(f"{text:^{width}}", "text")] for text in words]
    return Canvas.of([], width, height).write(max(0, (height - len(lines)) // 2), lines)


def pressed(key: str, view: View, runs: Sequence[Run]) -> View:
    """The view after a key."""
    panels, records = panels_of(runs), max(run.log.tables["step"].rows for run in runs)
    at = view.at % len(panels)
    match key:
        case "y":
            return view._replace(logs=view.logs ^ {panels[at][0].split()[0]})
        case "+":  # at least five records stay
            return view._replace(zoom=view.zoom + (records >> view.zoom >= 10))
        case "-":
            return view._replace(zoom=max(0, view.zoom - 1))
        case "tab" | "shift+tab":
            return view._replace(at=(at + (1 if key == "tab" else -1)) % len(panels))
        case "numbers" | "events":
            return view._replace(alone="" if view.alone == key else key)
        case "escape":
            return view._replace(alone="", zoom=view.zoom if view.alone else 0)
    to = min(int(key), len(panels)) - 1
    return view._replace(at=to, alone="" if (view.alone, at) == ("chart", to) else "chart")


def _key(key: str, name: str, shown: str = "", more: str = "", bound: str = "") -> Binding:
    how = {"show": bool(shown), "key_display": shown or None, "tooltip": more, "priority": "tab" in key}
    return Binding(bound or key, f"press('{key}')", name, **how)


KEYS = [
    Binding("q", "quit", "quit"),
    Binding("ctrl+c", "quit", show=False, priority=True),
    Binding("question_mark,h", "show_help_panel", "help", key_display="?"),
    _key("1", "panel", "1-9", "alone, and back"),
    *[_key(str(i), f"panel {i}") for i in range(2, 10)],
    _key("tab", "next", "tab", "panel; more of them come to the screen"),
    _key("shift+tab", "the panel before"),
    _key("y", "log", "y"),
    _key("+", "zoom", "+ -", "the last half, quarter, ... of the run", "plus,equals_sign"),
    _key("-", "zoom out", bound="minus"),
    _key("numbers", "numbers", "c", "every number, the evaluation, the configuration", "c"),
    _key("events", "events", "e", bound="e"),
    Binding("r", "runs", "runs", tooltip="pick another, or several to compare"),
    _key("escape", "help, part or zoom away"),
    Binding("t", "change_theme", "theme", show=False),
    Binding("S", "screenshot(None, '.')", "picture", tooltip="SVG of the screen, a new file here", show=False),
]

# Okabe and Ito's palette, which survives every common colour blindness, lightened or darkened for the ground.
CURVES = {
    True: ("#56b4e9", "#e69f00", "#2cbf8f", "#f0e442", "#ff7f50", "#d993bf"),
    False: ("#0072b2", "#956100", "#00785a", "#756b00", "#b94d00", "#9b3f73"),
}
GROUND = {"foreground": "#f0f3f6", "background": "#101317", "surface": "#101317", "accent": "#7cc4ff"}
DARK = Theme("dark", "#7cc4ff", success="#2fc796", warning="#f0b429", error="#ff6a4d", **GROUND)


def styles_of(theme: Theme) -> dict[str, Style]:
    """Each role's style: the theme's colours, shades between its ground and text, six for curves; x+ bold, x- dim."""
    known = theme.to_color_system().generate()
    names = {"": "foreground", "bright": "foreground", "ground": "background", "accent": "text-primary"}
    names |= {"good": "text-success", "warn": "text-warning", "bad": "text-error"}
    roles = {role: Color.parse(known[name]) for role, name in names.items()}
    roles |= {f"c{i}": Color.parse(colour) for i, colour in enumerate(CURVES[theme.dark])}
    ground, shades = roles["ground"], {"text": 0.83, "dim": 0.52, "axis": 0.36, "rule": 0.16}
    roles |= {role: ground.blend(roles["bright"], share) for role, share in shades.items()}
    styles = {role: Style(color=colour.rich_color) for role, colour in roles.items()}
    styles |= {f"{role}+": Style(color=colour.rich_color, bold=True) for role, colour in roles.items()}
    return styles | {f"{role}-": Style(color=ground.blend(c, 0.4).rich_color) for role, c in roles.items()}


ASCII = str.maketrans(dict(zip("━─│┤└▴▾✗●◐○■✓↻‖∇ωλεδ·–←→…×₁₂∞◆★†", "=-||+^vx*o.#v~|gwled.-<>.x12i>*+", strict=True)))
ASCII |= dict.fromkeys(range(0x2801, 0x2900), "*")


def ascii_of(text: str) -> str:
    """The text itself, or the nearest that every terminal can show: dots as *, everything unknown as ?."""
    return text.translate(ASCII).encode("ascii", "replace").decode()


# ---------------------------------------------------------------- the application: keys, colours, screen


class Pane(ScrollView, can_focus=True):
    """A canvas, of which only the cells that changed are repainted."""

    ALLOW_SELECT = False
    canvas = Canvas.of([], 1, 1)

    def show(self, canvas: Canvas) -> None:
        old, self.canvas = self.canvas, canvas
        if old.cells.shape != canvas.cells.shape:
            self.virtual_size = Size(canvas.width, canvas.height)
            self.refresh()
        elif changes := canvas.changes(old):
            self.refresh(*(region.translate((0, -self.scroll_offset.y)) for region in changes))

    def render_line(self, y: int) -> Strip:
        y += self.scroll_offset.y
        line = self.canvas.line(y) if y < self.canvas.height else []
        line = [(ascii_of(text), role) for text, role in line] if self.app.ascii_only else line
        strip = Strip([Segment(text, self.app.styles_by_role[role]) for text, role in line])
        return strip.adjust_cell_length(self.size.width).apply_style(self.rich_style)

    def on_resize(self) -> None:
        self.app.redraw()


class Picker(Screen):
    """The runs in a directory, one or several of which can be opened."""

    BINDINGS: ClassVar = [Binding("enter", "open", "open", priority=True), ("escape,q,r", "dismiss", "back")]

    def __init__(self, root: Path, found: list[tuple[Run, dict[str, Any]]], width: int, styles: dict[str, Style]):
        super().__init__()
        head, *rows = comparison([known for _, known in found], [run.name for run, _ in found], width)
        head, *rows = (Text.assemble(*((text, styles[role]) for text, role in line)) for line in (head, *rows))
        none = f"no runs in {clean(root)} yet: python train.py"
        title = f"{clean(root)}: which is more robust? (space: mark, to compare)\n" if rows else none
        self.head = Static(Text.assemble(title, "    " * bool(rows), head))
        self.list = SelectionList(*((row, run.real) for row, (run, _) in zip(rows, found, strict=True)), compact=True)

    def compose(self) -> ComposeResult:
        yield from (self.head, self.list, Footer(compact=True, show_command_palette=False))

    def action_open(self) -> None:
        here = self.list.highlighted
        paths = self.list.selected or ([] if here is None else [self.list.get_option_at_index(here).value])
        self.dismiss(paths[:4]) if paths else None


class Dash(App):
    """One run, or several compared; without any, first of all the list of those under `root`."""

    TITLE, BINDINGS, fps, stall, ascii_only = "gradreg", KEYS, 2.0, None, False
    CSS = """
    Screen, Pane, Footer, FooterKey, SelectionList { background: $background; border: none; }
    Pane { scrollbar-size: 0 0; } SelectionList, SelectionList:focus { height: 1fr; background-tint: transparent; }
    SelectionList > .option-list--option-highlighted { background: $foreground 14%; }
    """
    clock = staticmethod(time.time)

    def __init__(self, paths: Sequence[Path], root: Path, **options: Any):
        """Options: fps, stall, ascii_only and clock, as above."""
        super().__init__()
        self.__dict__ |= options
        self.runs, self.root, self.view = [Run(path, self.stall) for path in paths], root, View()
        self.pane, self.caught_up = Pane(), False
        self.register_theme(DARK)
        self.theme = "dark"

    def compose(self) -> ComposeResult:
        yield from (self.pane, Footer(compact=True, show_command_palette=False))

    def watch_theme(self) -> None:
        self.styles_by_role = styles_of(self.current_theme)

    def on_mount(self) -> None:
        self.run_worker(self.follow())
        if not self.runs:
            self.action_runs()
        if not self.is_headless:  # end with a terminal that goes without a signal: reading from it would never stop
            self.set_interval(1, lambda: sys.__stdin__.isatty() or os._exit(1))

    async def follow(self) -> None:
        """Read what is new and draw, `fps` times a second; a long log in slices, the first at once."""
        period, due = 1 / self.fps, 0.0
        while True:
            for run in self.runs:
                run.apply(await asyncio.to_thread(run.fetch), self.clock())
            behind = any(run.tail.behind for run in self.runs)
            if not behind or time.monotonic() >= due:
                self.caught_up, due = not behind, time.monotonic() + 2 * period
                self.redraw()
            await asyncio.sleep(0 if behind else period)

    def redraw(self) -> None:
        """Show what the runs say now."""
        if self.runs and self.pane.size:
            self.pane.show(dashboard(self.runs, self.view, *self.pane.size, self.clock()))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool:
        return action not in ("press", "runs") or len(self.screen_stack) == 1

    def action_press(self, key: str) -> None:
        if key == "escape" and self.screen.query("HelpPanel"):
            self.action_hide_help_panel()
        elif self.runs:
            self.view = pressed(key, self.view, self.runs)
            self.redraw()
            self.pane.scroll_to(0, 1e6 if self.view.alone == "events" else 0, animate=False)

    @work(exclusive=True, group="runs")
    async def action_runs(self) -> None:
        """Pick a run, or several to be compared; those that are open stay read."""
        root = Path(self.runs[0].real).parent if self.runs else self.root
        found = await asyncio.to_thread(runs_under, root, self.clock())
        picked = await self.push_screen_wait(Picker(root, found, self.size.width - 5, self.styles_by_role))
        known = {run.real: run for run in self.runs}
        if picked:
            self.runs, self.view = [known.get(path) or Run(Path(path), self.stall) for path in picked], View()
        elif not self.runs:
            self.exit()
        self.redraw()


# ---------------------------------------------------------------- the command line


def main(
    runs: Annotated[list[Path] | None, typer.Argument(help="Run directories, or one directory of runs.")] = None,
    once: Annotated[bool, typer.Option(help="Print one plain-text snapshot and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each run and exit.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print all records of a run and exit.")] = False,
    fps: Annotated[float, typer.Option(min=0.1, max=30, help="Pictures a second.")] = 2.0,
    stall: Annotated[float | None, typer.Option(min=1, help="Seconds of silence before STALLED.")] = None,
    ascii_only: Annotated[bool, typer.Option("--ascii", help="No characters beyond ASCII.")] = False,
) -> None:
    """Watch training runs in the terminal; without an argument, pick one under runs/."""
    paths = [path.parent if path.name == "metrics.jsonl" else path for path in runs or [Path("runs")]]
    if len(paths) > 4:
        fail(f"at most four runs can be compared, not {len(paths)}")
    streams, here = (sys.stdin, sys.stdout, sys.stderr), Path(resolved(paths[0]))
    own = any((here / name).exists() for name in ("metrics.jsonl", "config.json", "status.json"))
    pick = len(paths) == 1 and not own and (not runs or bool(runs_under(here, 0.0)))
    plain = once or as_json or as_csv or not all(f.isatty() for f in streams) or os.environ.get("TERM") == "dumb"
    for path in paths:  # runs/ itself may be still to come
        if not os.path.isdir(resolved(path)) and (plain or not os.path.isdir(path.absolute().parent.parent)):
            fail(f"no such run: {path}")
    ascii_only = ascii_only or not all(map(speaks_unicode, streams[1:]))
    if not plain:  # Textual draws on stderr
        Dash([] if pick else paths, here, fps=fps, stall=stall, ascii_only=ascii_only).run()
        return
    now = time.time()
    found = (
        runs_under(here, now)
        if pick
        else [(run, facts(run, now)) for path in paths for run in [Run(path, stall).read_all()]]
    )
    if not found:
        fail(f"no runs in {paths[0]}")
    (opened, known), width = zip(*found, strict=True), max(40, shutil.get_terminal_size((120, 24)).columns)
    try:
        if as_csv:
            write_csv(opened[0], sys.stdout)
        elif as_json:
            print("\n".join(json.dumps(json.loads(json.dumps(one), parse_constant=lambda _: None)) for one in known))
        else:
            lines = comparison(known, [run.name for run in opened])
            canvas = Canvas.of(lines, 1000) if pick else dashboard(opened, View(), width, 40, now)
            print(ascii_of(canvas.text) if ascii_only else canvas.text)
        sys.stdout.flush()
    except BrokenPipeError:  # a reader that has left is no reason to fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def speaks_unicode(stream: Any) -> bool:
    """Whether our characters can be written there; whatever comes, writing raises no UnicodeError from now on."""
    with contextlib.suppress(AttributeError, ValueError, LookupError):
        stream.reconfigure(errors="replace")
        return bool("⣿▴‖∇".encode(stream.encoding))
    return False


def fail(message: str) -> None:
    print(f"tui.py: {message}", file=sys.stderr)
    raise typer.Exit(2)


if __name__ == "__main__":
    typer.run(main)
