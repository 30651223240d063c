"""The dashboard: what a run directory says, in the terminal, while it trains and afterwards.

    python tui.py                       the runs under runs/
    python tui.py runs/latest           watch one run
    python tui.py runs/a runs/b         compare runs (at most four): which is more robust?
    python tui.py runs/latest --once    one plain-text snapshot; --json: the same for scripts

It only reads, tolerantly, and all it knows is the run directory (docs/run-directory.md).  Curves are drawn from every
record: a band from the least to the greatest value of each column of dots, and their mean over it.  A crash is never
guessed from silence: STALLED is no record for longer than the run's own rhythm, the rest is what the run itself says.

One way: files -> whole lines (Tail) -> columns (Table, Log) -> a Run -> facts, and bins -> lines of text -> the
terminal.  Facts, bins and lines are functions of runs, view, size and time; styles are those of Textual's themes.
"""

import asyncio
import contextlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections import deque, namedtuple
from collections.abc import Sequence
from functools import partial
from itertools import chain, compress, groupby, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import orjson
import typer
from rich.cells import cell_len
from rich.segment import Segment
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.content import Content
from textual.geometry import Region, Size
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.theme import Theme
from textual.widgets import Footer

# --- what a run measures, and as people read it -----------------------------------------------------------------------


def number(value: float, form: str = "#.3g") -> str:
    """A number in at most 7 characters (8 with a sign): three digits, or as `form` says; k, M and G from 1,000 on."""
    if math.isnan(value):
        return "–"
    if not (9.995e-4 <= abs(value) < 9.995e11 or value == 0):
        return re.sub(r"\.?0*e\+?(-?)0?", r"e\1", f"{value:{'.1e' if '#' in form else '.2e'}}")
    unit, letter = next((u for u in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= 0.9995 * u[0]), (1.0, ""))
    return f"{value / unit:{form}}".rstrip(".") + letter


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 26:03:09."""
    minutes, s = divmod(int(seconds), 60) if 0 <= seconds < 1e10 else (-1, 0)
    return f"{minutes // 60}:{minutes % 60:02}:{s:02}" if minutes >= 0 else "–"


def progress(done: float, total: float, form: str = ",.0f") -> str:
    return f"{done:{form}}/{total:,.0f}".replace("/nan", "").replace("nan", "–")


def clean(text: Any, limit: int = 300) -> str:
    """Text from a file, made safe for a terminal: one line, no control characters, none without a cell."""
    return "".join(c if c.isprintable() and cell_len(c) else "·" for c in str(text)[:limit])


def finite(value: Any, low: float = -3e38, high: float = 3e38) -> float:
    """A JSON value as a float; NaN for anything that is not a number within the limits (float32's)."""
    return float(value) if type(value) in (int, float) and low <= value <= high else math.nan


def entries(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def distinct(names: Sequence[str], width: int) -> list[str]:
    """What tells the names apart, each at most `width` long: not the words at both ends that all share."""
    shown = list(names)
    for _ in range(2 * (len(names) > 1)):  # first from the one end, then from the other
        common = re.match(r"(.*[-_])?", os.path.commonprefix(shown))[0]  # noqa: RUF071
        shown = [name[len(common) :][::-1] for name in shown]
    for i, name in enumerate(shown):  # of a long one the middle goes: the ends tell what it is (method, seed)
        shown[i] = name if len(name) <= width else f"{name[: (width - 1) // 2]}…{name[-(width // 2) :]}"
    return shown if len(set(shown)) == len(shown) else [f"{i} {name[2:]}" for i, name in enumerate(shown, 1)]


# A column of a run's log, in the order of the charts that compare runs: `panel` is its chart, `tag` stands at the end
# of its line, `label` in the table of numbers.  {dual}, {0}, ... are its own norm and radii.
Series = namedtuple("Series", "name table panel colour unit tag label")
Event = namedtuple("Event", "time step kind text")
SERIES = {
    words[0]: Series(*words[:3], f"$text-{words[3]}", *words[4:6], " ".join(words[6:]))
    for line in """\
loss                   step   0  primary    nats       train   loss
penalty                step   1  warning    nats       -       penalty
grad_norm_mean         step   2  success    nats/unit  mean    {dual} mean
omega.0                epoch  3  accent     -          {0}     ω({0})
attacked_error_pct     epoch  4  error      %          att.    attacked %
clean_error_pct        epoch  4  success    %          clean   clean %
test_loss              epoch  0  error      nats       test    test loss
grad_norm_max          step   2  secondary  nats/unit  max     {dual} max
margin_grad_norm_mean  epoch  6  success    1/unit     mean    margin
fd_error_pct           step   5  warning    %          exact   FD error %
lr                     step   7  primary    -          -       lr
images_per_s           step   8  success    1/s        -       images/s
omega.1                epoch  3  primary    -          {1}     ω({1})
margin_grad_norm_max   epoch  6  secondary  1/unit     max     margin max
omega.2                epoch  3  success    -          {2}     ω({2})
top5_error_pct         epoch  4  accent     %          top5    top 5 %
omega.3                epoch  3  warning    -          {3}     ω({3})
""".splitlines()
    for words in [line.split()]
}
PANELS = ("loss", "penalty λ/2·R", "gradient {dual}", "modulus ω", "error")  # there from the first moment
PANELS += ("finite difference", "margin gradient {dual}", "learning rate", "images/s")
FILES = ("config.json", "status.json", "evaluation/summary.json", "metrics.jsonl")
AXES = ("step", "epoch", "time")  # where a record lies
FIELDS = {kind: (*AXES, *(s.name for s in SERIES.values() if s.table == kind)) for kind in ("step", "epoch")}
DUALS = {"l2": "‖∇‖₂", "linf": "‖∇‖₁", "l1": "‖∇‖∞"}
ASCII = str.maketrans("━─│┤└▴▾✗●◐○■✓↻‖∇ωλ·–…₁₂∞★†", "=-||+^vx*o.#v~|gwl.-.12i*+")
ASCII |= dict.fromkeys(range(0x2801, 0x2900), "*")  # braille

# --- reading: files that others write ---------------------------------------------------------------------------------


class Tail:
    """The whole lines of a growing file, each exactly once, also when it is truncated or replaced.

    Opened anew at each poll (NFS); a line longer than `limit` goes by in pieces.
    """

    def __init__(self, path: Path, limit: int = 1 << 19):
        self.path, self.limit, self.error = path, limit, ""
        self.offset, self.size, self._known, self.behind = 0, 0, None, False  # behind: more can be read at once

    def poll(self) -> tuple[bytes, bool]:
        """(new whole lines or b"", whether what was read before is void).  Never raises on what it finds."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                stat, head, old = os.fstat(file.fileno()), file.read(256), self._known
                self.size, self._known = stat.st_size, (stat.st_dev, stat.st_ino, head)
                grown = old and old[:2] == self._known[:2] and head.startswith(old[2]) and self.size >= self.offset
                self.offset = self.offset if grown else 0
                file.seek(self.offset)
                chunk, self.error = file.read(self.limit), ""
                self.behind = len(chunk) == self.limit
        except OSError as error:
            self.error, self.behind = (error.strerror or str(error)).lower(), False
            if gone := isinstance(error, FileNotFoundError) and self._known and self.path.parent.is_dir():
                self.offset, self._known = 0, None  # only the log was deleted: another run begins in this directory
            return b"", bool(gone)
        end = chunk.rfind(b"\n") + 1
        endless = self.behind and not end  # a piece of an endless line
        self.offset += len(chunk) if endless else end
        return b"?\n" if endless else chunk[:end], bool(old) and not grown


def parse(text: bytes) -> Any:
    """The value of a line or a small file; None where there is none (NaN, which is no JSON, is taken, too)."""
    for loads in (orjson.loads, partial(json.loads, parse_int=float)):
        try:
            return loads(text)
        except (ValueError, RecursionError):
            continue
    return None


class Table:
    """The records of one kind in the order of their step: `data` is (columns, rows or more)."""

    def __init__(self, names: Sequence[str]):
        self.names, self.rows, self.data = {name: i for i, name in enumerate(names)}, 0, np.empty((len(names), 0))

    def column(self, name: str) -> np.ndarray:
        return self.data[self.names[name], : self.rows]

    def append(self, values: np.ndarray) -> None:
        """Add rows, (columns, rows); steps that run backwards are put where they belong."""
        start, self.rows = self.rows, self.rows + values.shape[1]
        if (room := self.data.shape[1]) < self.rows:
            self.data = np.pad(self.data, [(0, 0), (0, 2 * self.rows - room)])
        self.data[:, start : self.rows] = values
        steps = self.column("step")
        if (np.diff(steps[max(0, start - 1) :]) < 0).any():
            self.data[:, : self.rows] = self.data[:, np.argsort(steps, kind="stable")]


class Log:
    """All that metrics.jsonl says: two tables of numbers, the last events, and what was wrong with it."""

    def __init__(self):
        self.tables = {kind: Table(names) for kind, names in FIELDS.items()}
        self.events: deque[Event] = deque(maxlen=500)
        self.nonfinite: list[tuple[float, str]] = []  # step and field, the first 500
        self.lines = self.skipped = 0
        self.last = dict.fromkeys(AXES, math.nan)  # where the last record lies
        self.resumed = self.checkpoint = math.nan  # steps

    def feed(self, block: bytes) -> None:
        """Take whole lines.  A line that is no record is counted in `skipped` and changes nothing else."""
        records = [entries(parse(line)) for line in block.split(b"\n")[:-1]]
        self.lines += len(records)
        for kind, group in groupby(records, key=lambda record: record.get("kind")):
            if kind in ("step", "epoch"):
                self._rows(kind, list(group))
            elif kind == "event":
                for record in group:
                    self._event(record)
            else:
                self.skipped += len(list(group))

    def column(self, name: str) -> np.ndarray:
        return self.tables[SERIES[name].table].column(name)

    def _rows(self, kind: str, records: list[dict[str, Any]]) -> None:
        if kind == "epoch":
            omegas = [r["omega"] if isinstance(r.get("omega"), list) else () for r in records]
            records = [r | {f"omega.{i}": v for i, v in enumerate(o)} for r, o in zip(records, omegas, strict=True)]
        rows = [[v if type(v) in (int, float) else None for v in map(r.get, FIELDS[kind])] for r in records]
        values = np.array(rows, dtype=np.float64).T  # None becomes NaN
        values[~(np.abs(values) <= 3e38)] = math.nan
        values[:3][~((values[:3] >= 0) & (values[:3] <= 1e11))] = math.nan
        good = ~np.isnan(values[0])
        self.skipped += int((~good).sum())
        if not good.any():
            return
        self.tables[kind].append(values := values[:, good])
        self.last = dict(zip(AXES, values[:3, -1].tolist(), strict=True))
        for record, (step, epoch, at) in zip(compress(records, good), values[:3].T.tolist(), strict=True):
            if kind == "epoch":
                error, attacked = (number(finite(record.get(f"{of}_error_pct"))) for of in ("clean", "attacked"))
                self.events.append(Event(at, step, kind, f"{epoch:g}  error {error} %  attacked {attacked} %"))
            names = record.get("nonfinite")
            self.nonfinite += [(step, clean(name, 30)) for name in (names if isinstance(names, list) else ())]
        del self.nonfinite[500:]

    def _event(self, record: dict[str, Any]) -> None:
        step, at = (finite(record.get(name), 0, 1e11) for name in ("step", "time"))
        kind = clean(record.get("event", "event"), 20)
        if kind == "resume" and not math.isnan(step):  # records beyond its step are void
            for table in self.tables.values():
                table.rows = int(np.searchsorted(table.column("step"), step, "right"))
            self.last["step"] = self.checkpoint = self.resumed = step
            self.last |= {"time": np.fmax(self.last["time"], at), "epoch": finite(record.get("epoch"), 0)}
            self.nonfinite = [mark for mark in self.nonfinite if mark[0] <= step]
        if kind == "checkpoint":  # there is one after each epoch, which has its line
            self.checkpoint = step
        else:
            self.events.append(Event(at, step, kind, clean(record.get("message") or "")))


class Run:
    """One run directory, followed."""

    def __init__(self, path: Path):
        self.path, self.real, self.log, self.exists = path, os.path.realpath(path), Log(), True
        self.name, self.tail = clean(Path(self.real).name, 100), Tail(Path(self.real) / FILES[-1])
        self.config, self.status, self.summary, self.options = {}, {}, {}, {}
        self.arrived, self._caught_up = math.nan, False  # when, by our clock, a record came in while we watched

    def poll(self, now: float) -> bool:
        """Read what is new, of the log at most a slice; whether there was any of it.  Never raises."""
        if os.path.realpath(self.path) != self.real:  # runs/latest has moved on
            self.__init__(self.path)
        lines, void = self.tail.poll()
        self.exists = os.path.isdir(self.real)
        config, self.status, self.summary = (document(Path(self.real) / name) for name in FILES[:-1])
        if self.exists:  # of a deleted run the configuration stays, for the names of its curves
            self.config, self.options = config, entries(config.get("options"))
        if void:
            self.log = Log()
        if lines:
            self.log.feed(lines)
            self.arrived = now if self._caught_up else self.arrived
        self._caught_up = self._caught_up or not self.tail.behind
        return bool(lines)

    def read_all(self) -> "Run":
        """Read to the present end of the file, at once."""
        while self.poll(time.time()) or self.tail.behind:
            pass
        return self

    def named(self, text: str) -> str:
        """A label with the run's own norm and radii in it."""
        radii = self.config.get("omega_eps")
        known = [number(finite(radius), ".4g") for radius in (radii if isinstance(radii, list) else ())]
        return text.format(*known, *"????", dual=DUALS.get(clean(self.options.get("norm")), "‖∇‖")).strip("-")


def document(path: Path) -> dict[str, Any]:
    """The JSON object in a small file, which is replaced in one step; {} where there is none."""
    with contextlib.suppress(OSError):
        return entries(parse(path.read_bytes()))
    return {}


# --- facts: all that is said of a run beside its curves ---------------------------------------------------------------

BOLD, DIM, AXIS, RULE = "bold $foreground", "$foreground 52%", "$foreground 36%", "$foreground 16%"
GOOD, WARN, BAD, ACCENT = "$text-success", "$text-warning", "$text-error", "$text-primary"
RUNS = (ACCENT, WARN, GOOD, "$text-secondary")  # the colours of runs that are compared
STATES = {"WAITING": ("○", DIM), "DELETED": ("○", WARN), "LIVE": ("●", GOOD), "STALLED": ("◐", WARN)}
STATES |= {"FINISHED": ("✓", GOOD), "INTERRUPTED": ("■", WARN), "FAILED": ("✗", BAD)}  # told by symbol and colour
BOUNDS = {"median": "median_distance", "L-bound": "lipschitz_bound_mean"}
BOUNDS |= {"ω-bound": "omega_bound_mean", "false %": "violations_pct"}


def judge(run: Run, now: float, rhythm: float) -> tuple[str, str]:
    """(state, note) of a run, whose records come every `rhythm` seconds (NaN: unknown).

    Silence is allowed for max(10, 5 rhythms) seconds, 60 before the first record.  Before it, and in any phase but
    "train" (evaluating, saving), the heartbeat is a sign of life; in "train" only records are.  A record that came
    while we watched is as young as that, whatever its writer's clock says.
    """
    status, last, begun = run.status, run.log.last["time"], not math.isnan(run.log.last["step"])
    if not run.exists:
        return ("DELETED", "what was read of it stays here") if begun else ("WAITING", "no such run yet")
    if (word := status.get("state")) in ("finished", "interrupted", "failed"):
        notes = {"interrupted": "python train.py --resume RUN", "failed": clean(status.get("error") or "")}
        return word.upper(), notes.get(word, "")
    if not begun and word != "running":
        return "WAITING", f"metrics.jsonl: {run.tail.error or 'no record yet'}"
    steady = begun and status.get("phase", "train") == "train"
    last = float(np.fmax(last if last <= now or math.isnan(run.arrived) else math.nan, run.arrived))
    age = now - np.nan_to_num(last if steady else np.fmax(last, finite(status.get("time"))), nan=now)
    if age > np.fmax(10.0 if begun else 60.0, 5 * rhythm):
        return "STALLED", f"no {'record' if begun else 'sign of life'} for {duration(age)}"
    return "LIVE", "" if steady else clean(status.get("phase", "starting"), 12)


def facts(run: Run, now: float) -> dict[str, Any]:
    """What header, tables, lists and --json say of a run; NaN for what is unknown.

    `elapsed_s` counts from the making of the run to its latest sign of life, the speed over the last 200 records.
    """
    log, total, place = run.log, finite(run.config.get("steps_total"), 1), run.log.last["step"]
    step, at = (log.tables["step"].column(name)[-200:] for name in ("step", "time"))
    gaps = np.sort(np.diff(at[~np.isnan(at)][-50:]))
    state, note = judge(run, now, float(gaps[len(gaps) // 2]) if len(gaps) else math.nan)
    own = ~(step <= log.resumed)  # of before a resume, the speed is another one
    step, at = step[own], at[own]
    speed = float((step[-1] - step[0]) / (at[-1] - at[0])) if len(step) > 1 and at[-1] > at[0] else math.nan
    place = 0.0 if math.isnan(place) and run.status.get("state") == "running" else place
    sign, of = np.fmax(log.last["time"], finite(run.status.get("time"))), finite(run.summary.get("checkpoint_step"))
    elapsed = float(np.fmax(0, sign - finite(run.config.get("created")))) if sign == sign else math.nan
    other = f"of step {of:,.0f}, not {log.checkpoint:,.0f}" if abs(of - log.checkpoint) > 0 else None
    known = {"run": run.name, "path": str(run.path), "state": state, "note": note, "step": place, "steps_total": total}
    known |= {"epoch": log.last["epoch"], "age_s": now - log.last["time"], "steps_per_s": speed, "elapsed_s": elapsed}
    known |= {"eta_s": max(0.0, total - place) / speed if speed > 0 else math.nan, "lines": log.lines}
    known |= {"bad_lines": log.skipped, "not_finite": len(log.nonfinite), "attack_eps": run.config.get("attack_eps")}
    known |= {"options": run.options, "series": readings(log), "evaluation": run.summary or None}
    return known | {"evaluation_of_another_checkpoint": other}


def readings(log: Log) -> dict[str, dict[str, float]]:
    """Every series with a number among its last 200 records; `mean` is that of the last 30."""
    found = {}
    for name in SERIES:
        recent = (column := log.column(name))[-200:]
        if len(recent := recent[~np.isnan(recent)]):
            low, high = np.fmin.reduce(column), np.fmax.reduce(column)
            values = {"last": recent[-1], "mean": recent[-30:].mean(), "least": low, "greatest": high}
            found[name] = {key: float(value) for key, value in values.items()}
    return found


def robustness(runs: Sequence[dict[str, Any]]) -> list[tuple[str, list[float], Any, bool]]:
    """(quantity, its value in each run, which is the best, whether evaluated): which is more robust?

    The error under attack in training; then, of each norm that was evaluated, the mean attacked distance, the error
    at that attack's radius (or the middle one), the mean bounds and how often, in %, the omega-bound is false.
    """
    last = [{name: found["last"] for name, found in known["series"].items()} for known in runs]
    found = [("attacked %", [known.get("attacked_error_pct", math.nan) for known in last], min, False)]
    norms = [entries(entries(known["evaluation"]).get("norms")) for known in runs]
    for norm in dict.fromkeys(chain.from_iterable(norms)):
        of, name = [entries(known.get(norm)) for known in norms], clean(norm, 9)
        errors = [entries(known.get("error_pct")).items() for known in of]
        errors = [{finite(parse(radius.encode())): finite(error) for radius, error in e} for e in errors]
        radii = sorted(radius for radius in set(chain.from_iterable(errors)) if radius > 0) or [math.nan]
        attacked = [r for r in radii if any(math.isclose(r, finite(k["attack_eps"]), rel_tol=1e-3) for k in runs)]
        radius = (attacked or radii[(len(radii) - 1) // 2 :])[0]
        found.append((f"{name} distance", [finite(known.get("mean_distance")) for known in of], max, True))
        found.append((f"{name} err {number(radius, '.2g')}", [e.get(radius, math.nan) for e in errors], min, True))
        found += [(f"{name} {k}", [finite(known.get(v)) for known in of], None, True) for k, v in BOUNDS.items()]
    return [*found, ("clean %", [known.get("clean_error_pct", math.nan) for known in last], min, False)]


def runs_under(root: Path) -> list[Run]:
    """The runs in a directory, latest first.  Links, as runs/latest, are passed over."""
    paths = [p for p in root.glob("*") if p.is_dir() and not p.is_symlink() and p.name[0] != "."]
    found = [Run(path).read_all() for path in paths]
    found.sort(key=lambda run: -np.nan_to_num(np.fmax(run.log.last["time"], finite(run.config.get("created")))))
    return [run for run in found if run.config or run.status or run.log.lines]


# --- charts: from columns to dots to lines of text --------------------------------------------------------------------

Part = tuple[str, str]  # text and its style
GUTTER = 8  # cells left of a plot: tick labels and the axis
Curve = namedtuple("Curve", "run series colour tag bins")
# A series on the dot columns of a chart; NaN where a column holds nothing, `broken` where it has to.
Bins = namedtuple("Bins", "low high line broken")


class View(NamedTuple):
    """Everything a key can change."""

    alone: str = ""  # what has all of the screen: numbers, or a chart by its number
    log: bool = False  # logarithmic y axes everywhere, not for the gradient alone
    zoom: int = 0  # only the last 1 / 2**zoom of the run


def binned(table: Table, name: str, edges: np.ndarray) -> Bins:
    """Series `name` on the columns between `edges`: least and greatest value of a column's records, exact, and mean."""
    low, high, line = np.full((3, len(edges) - 1), math.nan)
    cuts = np.searchsorted(table.column("step"), edges)
    has, own = cuts[1:] > cuts[:-1], slice(cuts[0], cuts[-1])
    if has.any():
        starts, values = cuts[:-1][has] - cuts[0], table.column(name)[own]
        low[has], high[has] = np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)
        counts = np.add.reduceat(~np.isnan(values), starts, dtype=np.int64)
        line[has] = np.add.reduceat(np.nan_to_num(values), starts) / np.where(counts > 0, counts, math.nan)
    return Bins(low, high, line, has & np.isnan(low))


def nice(value: float) -> float:
    """The least round number that is not below `value` > 0."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(n for n in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if n * power >= value * (1 - 1e-9)) * power


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
    """An axis of two rows or more that holds low..high, nearly full, with about five ticks, whose labels differ.

    Logarithmic only over a decade or more; what is not positive then lies below it.
    """
    size, least = max(abs(high), abs(low)) or 1.0, max(low, high * 1e-12) if low > 0 else high * 1e-3
    if log := log and high >= 10 * least > 0:
        low, high = math.log10(least), math.log10(high)
        step, gap = 1.0, min(rows - 1, max(2, int((rows - 0.5) / (high - math.floor(low)))))
    else:
        low, gap = 0.0 if 0 < low <= 0.4 * high else low, min(rows - 1, max(2, round(rows / 5)))
        step = nice(max(high - low, (0.01 if size >= 0.01 else 0.1) * size) * gap / rows)
    while (math.floor(low / step + 1e-9) + (rows - 0.5) / gap) * step < high - 1e-9 * step:
        step = step + 1 if log else nice(step * 1.0001)
    return Scale(rows, gap, step, math.floor(low / step + 1e-9), log)


def limits(bins: Sequence[Bins]) -> tuple[float, float]:
    """The least and the greatest value to show; rare columns far outside are cut off (and marked)."""
    lows, highs = (np.sort(np.concatenate([b[i][~np.isnan(b[i])] for b in bins])) for i in (0, 1))
    low, high = float(lows[len(lows) // 50]), float(highs[-1 - len(highs) // 33])
    room = 0.5 * (high - low)
    return float(lows[0]) if lows[0] >= low - room else low, float(highs[-1]) if highs[-1] <= high + room else high


def bridged(values: np.ndarray, broken: np.ndarray) -> np.ndarray:
    """Empty columns filled in a straight line between their neighbours, except a broken one."""
    known = np.flatnonzero(~np.isnan(values))  # chart() draws nothing that is empty
    full = np.interp(np.arange(len(values)), known, values[known], left=math.nan, right=math.nan)
    return np.where(broken, math.nan, full)


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


def panels_of(runs: Sequence[Run]) -> list[tuple[str, list[Series]]]:
    """(title, series) of up to nine charts: the first five, and others with data; comparing, one series each."""
    known = [s for s in SERIES.values() if any(not np.isnan(run.log.column(s.name)).all() for run in runs)]
    panels = [(title, [s for s in known if s.panel == str(i)]) for i, title in enumerate(PANELS)]
    panels = [panel for i, panel in enumerate(panels) if panel[1] or i < 5]
    if len(runs) > 1:
        panels = [(f"{PANELS[int(s.panel)]} {s.tag}", [s]) for s in known][:9] or panels[:1]
    return [(f"{i} {runs[0].named(title)}".strip(), series) for i, (title, series) in enumerate(panels, 1)]


def x_range(runs: Sequence[Run], zoom: int) -> tuple[float, float]:
    """The steps at the left and right edge.  They mostly stay put while a run grows, so that few cells change."""
    steps = [table.column("step")[[0, -1]] for run in runs for table in run.log.tables.values() if table.rows]
    low, high = (float(np.min(steps)), float(np.max(steps))) if steps else (0.0, 0.0)
    low = low if low >= 0.3 * high else 0.0
    span = max(high - low, 1.0)
    width = nice(span) / (1 << zoom)
    right = low + math.ceil(span / width * 8 - 1e-9) / 8 * width
    return max(low, right - width), right


def head(width: int, title: str, unit: str = "", right: str = "") -> Content:
    """A titled rule."""
    left = [("─", RULE), (f" {title} ", BOLD), (f"{unit} " if unit else "", DIM)]
    end = [(f" {right} ", DIM), ("─", RULE)] if right else []
    room = width - sum(cell_len(text) for text, _ in left + end)
    return Content.assemble(*left, ("─" * room, RULE), *end)


def chart(runs: Sequence[Run], view: View, title: str, series: list[Series], width: int, height: int) -> list[Content]:
    """One panel, from its title to its x axis."""
    many, curves = len(runs) > 1, []
    names = distinct([run.name for run in runs], min(14, width // 3))
    tags = 1 + (max(map(cell_len, names)) if many else 5 * (len(series) > 1))
    rows, columns = height - 2, width - GUTTER - tags
    edges = np.linspace(*x_range(runs, view.zoom), 2 * columns + 1)
    edges[-1] = np.nextafter(edges[-1], math.inf)
    for i, run in enumerate(runs):
        for s in series:
            bins = binned(run.log.tables[s.table], s.name, edges)
            colour, tag = (RUNS[i], names[i]) if many else (s.colour, run.named(s.tag))
            bins = bins._replace(low=bins.line, high=bins.line) if many else bins  # envelopes would hide each other
            curves += [Curve(run, s, colour, tag, bins)] if not np.isnan(bins.line).all() else []
    if not curves or rows < 2:
        return [head(width, title, "no room" if curves else "no data yet")]
    scale = scale_of(*limits([c.bins for c in curves]), rows, view.log or "gradient" in title)
    cells, roles = draw(curves, scale, edges, band=not many and series[0].table == "step")
    labels = {rows - 1 - i * scale.gap: label for i, label in enumerate(scale.ticks())}
    ends = name_ends(curves, scale) if tags > 1 else {}
    lines = [head(width, title, series[0].unit.strip("-"), "log" * scale.log)]
    for y in range(rows):
        gutter = (f"{labels.get(y, ''):>{GUTTER - 1}}", DIM), ("┤" if y in labels else "│", AXIS)
        runs_of = groupby(zip(cells[y], roles[y], strict=True), key=itemgetter(1))
        plot = [("".join(char for char, _ in group), role) for role, group in runs_of]
        lines.append(Content.assemble(*gutter, *plot, *ends.get(y, ())))
    first, middle, last = (number(round(step), ".6g") for step in edges[[0, columns, -1]])
    room = columns - 2 * (size := max(len(first), len(last)))
    axis = f"{first:─<{size}}{middle if room > len(middle) else '':─^{room}}{last:─>{size}}"
    return [*lines, Content.assemble((f"{'└':>{GUTTER}}{axis}", AXIS))]


def draw(curves: Sequence[Curve], scale: Scale, edges: np.ndarray, band: bool) -> tuple[np.ndarray, np.ndarray]:
    """(characters, styles) of a plot: a line for each curve, the first on top; with `band`, its envelope below them.

    ▴ stands above columns with values beyond the axis, ▾ below them, ✗ where a value was not finite.
    """
    rows, columns = scale.rows, len(edges) // 2
    cells, roles = np.full((rows, columns), " ", "U1"), np.full((rows, columns), "", object)
    lines = np.zeros((4 * rows, 2 * columns), bool)
    if band:
        low, high = (bridged(scale.place(values), curves[0].bins.broken) for values in curves[0].bins[:2])
        chars = braille(ribbon(low, high, 4 * rows))
        cells[chars != ""], roles[chars != ""] = chars[chars != ""], f"{curves[0].colour} 40%"
    for curve in reversed(curves):
        place = bridged(scale.place(curve.bins.line), curve.bins.broken)
        lines |= (mask := ribbon(place, place, 4 * rows))
        here = braille(mask) != ""
        cells[here], roles[here] = braille(lines)[here], curve.colour
    for run, series, colour, _, bins in curves:
        with np.errstate(invalid="ignore"):
            over, under = scale.place(bins.high) > 1 + 1e-9, scale.place(bins.low) < -1e-9
        wrong = np.array([step for step, name in run.log.nonfinite if name == series.name])
        wrong = np.searchsorted(edges, wrong[(wrong >= edges[0]) & (wrong < edges[-1])], "right") - 1
        marks = ((0, "▴", np.flatnonzero(over), colour), (-1, "▾", np.flatnonzero(under), colour))
        for row, sign, dots, role in (*marks, (0, "✗", wrong, f"bold {BAD}")):
            cells[row, dots // 2], roles[row, dots // 2] = sign, role
    return cells, roles


def name_ends(curves: Sequence[Curve], scale: Scale) -> dict[int, list[Part]]:
    """The names of the lines by the row of their ends, moved apart where they would collide."""
    ends = [(float(scale.place(c.bins.line[~np.isnan(c.bins.line)][-1])), c) for c in curves]
    row, ends, names = -1, sorted(ends, key=itemgetter(0), reverse=True)[: scale.rows], {}
    for left, (place, curve) in zip(range(len(ends), 0, -1), ends, strict=True):
        wanted = scale.rows - 1 - math.floor(min(max(place, 0), 0.999) * scale.rows)
        row = max(row + 1, min(wanted, scale.rows - left))
        names[row] = [(f" {curve.tag}", curve.colour)]
    return names


def comparison(runs: Sequence[dict[str, Any]], names: Sequence[str], width: float) -> list[Content]:
    """Which is more robust?  Headings, then a row a run, the best of each column marked ★, and how it stands.

    Runs compete on the same data; an evaluation of another checkpoint does not (†).  Columns that do not fit go.
    """
    columns: list[list[Part]] = [[("", ""), *(STATES[known["state"]] for known in runs)]]
    columns.append([("", ""), *((name, f"bold {RUNS[i % 4]}") for i, name in enumerate(names))])
    for label, values, best, evaluated in (fact for fact in robustness(runs) if fact[2]):
        columns.append([(f"{label}  ", DIM)])
        old = [evaluated and bool(known["evaluation_of_another_checkpoint"]) for known in runs]
        rows = list(zip(values, old, [str(known["options"].get("dataset")) for known in runs], strict=True))
        for value, other, data in rows:
            rivals = {v for v, stale, of in rows if v == v and not stale and of == data}
            sign = "†" if other and value == value else "★" if len(rivals) > 1 and value == best(rivals) else " "
            columns[-1].append((f"{number(value)} {sign}", f"bold {GOOD}" if sign == "★" else BOLD))
    keys = dict.fromkeys(chain.from_iterable(known["options"] for known in runs))  # those that differ, the first four
    keys = [key for key in keys if len({str(known["options"].get(key)) for known in runs}) > 1][:4]
    differ = [" ".join(f"{key}={clean(known['options'].get(key, '–'), 12)}" for key in keys) for known in runs]
    more = {"differs": differ, "step": [progress(known["step"], known["steps_total"]) for known in runs]}
    more |= {"state": [known["state"] for known in runs], "age": [duration(known["age_s"]) for known in runs]}
    columns += [[(f"  {title}", DIM), *((f"  {text}", "") for text in texts)] for title, texts in more.items()]
    lines: list[list[Part]] = [[] for _ in columns[0]]
    for i, column in enumerate(columns):
        size = max(cell_len(text) for text, _ in column)
        width -= size + 1
        for line, (text, role) in zip(lines if width >= -1 else (), column, strict=False):
            blank = " " * (size - cell_len(text))
            line.append((f"{text}{blank} " if i < 2 else f"{blank}{text} ", role))
    return [Content.assemble(*line) for line in lines]


def number_lines(run: Run, known: dict[str, Any]) -> list[Content]:
    """Every number of a run: its series, in the order of the charts, and its evaluation."""
    lines: list[list[Part]] = [[(f"{'last':>20}{'mean':>8}{'least':>8}{'most':>8}", DIM)]]
    for series in sorted(map(SERIES.get, known["series"]), key=lambda series: series.panel):
        last, *more = map(number, known["series"][series.name].values())
        label = [("━ ", series.colour), (f"{run.named(series.label):<10}", ""), (f"{last:>8}", BOLD)]
        lines.append([*label, ("".join(f"{value:>8}" for value in more), "")])
    cells = [(label, number(values[0])) for label, values, _, evaluated in robustness([known]) if evaluated]
    cells += [("steps/s", number(known["steps_per_s"])), ("bad lines", f"{known['bad_lines']:,}")]
    parts = [[(f"{label:<14}", DIM), (f"{value:>7}  ", BOLD)] for label, value in cells]
    lines += [[], *([*a, *b] for a, b in zip(parts[::2], parts[1::2], strict=True))]
    return [Content.assemble(*line) for line in lines]


def header(run: Run, known: dict[str, Any], width: int, shown: str) -> list[Content]:
    """State, name, what must not be overlooked, progress, the dearest first; then a bar."""
    log, state, step, total, epoch = run.log, *(known[key] for key in ("state", "step", "steps_total", "epoch"))
    (symbol, role), epochs = STATES[state], finite(run.options.get("epochs"))
    times = {"ETA": known["eta_s"] if state == "LIVE" else math.nan, "took": known["elapsed_s"]}
    parts: list[list[Part]] = [
        [(f"{symbol} {state}", f"bold {role}")],
        [(distinct([run.name], max(12, width // 3))[0], BOLD)],
        [(distinct([known["note"]], max(12, width - 45))[0], role)],
        [(f"reading {run.tail.offset / run.tail.size:.0%}" if run.tail.behind else "", WARN)],
        [(f"✗ NaN {name} @{at:,.0f}", f"bold {BAD}") for at, name in log.nonfinite[:1]],
        [(f"↻ resumed @{log.resumed:,.0f}" if log.resumed == log.resumed else "", WARN)],
        [(f"metrics.jsonl: {run.tail.error}" if run.tail.error and run.exists and log.lines else "", BAD)],
        [(f"✗ evaluation {other}" if (other := known["evaluation_of_another_checkpoint"]) else "", WARN)],
        [("step ", DIM), (progress(step, total), "")],
        [("epoch ", DIM), (progress(epoch, epochs, ".1f"), "")] if epoch == epoch else [],
        *([(f"{word} ", DIM), (duration(seconds), BOLD)] for word, seconds in times.items() if seconds == seconds),
    ]
    words = [Content.assemble(*part) for part in parts if any(text for text, _ in part)]
    while (line := Content("   ").join(words)).cell_length > width and len(words) > 1:
        words.pop()
    share = float(np.nan_to_num(np.minimum(1.0, step / total)))
    right = f" {share:.1%} · {shown}"
    full = round(share * (room := max(0, width - len(right))))
    return [line, Content.assemble(("━" * full, role), ("─" * (room - full), RULE), (right, DIM))]


def event_lines(runs: Sequence[Run]) -> list[Content]:
    """The last events, the newest at the bottom; of several runs with the run's name."""
    names = distinct([run.name for run in runs], 14)
    events = sorted(((e, i) for i, run in enumerate(runs) for e in run.log.events), key=lambda e: finite(e[0].time))
    roles = {"error": f"bold {BAD}", "warning": WARN, "interrupt": WARN, "resume": WARN, "finish": GOOD}
    lines = []
    for (at, step, kind, text), i in events[-200:]:
        clock = time.strftime("%H:%M:%S", time.localtime(at)) if at > 0 else "--:--:--"
        name = (f"{names[i]:<14} " if len(runs) > 1 else "", RUNS[i])
        where = (f"{step:>11,.0f}   ".replace("nan", "   "), ACCENT)
        lines.append(Content.assemble((f" {clock}", DIM), where, name, (f"{kind:<11}{text}", roles.get(kind, ""))))
    return lines


def grid(runs: Sequence[Run], view: View, width: int, height: int) -> list[Content]:
    """As many charts as there is room for, in up to three columns; or one of them alone."""
    panels = panels_of(runs)
    columns = max(1, min(3, width // 36))
    rows = max(1, min(-(-6 // columns), height // 8))
    if view.alone:
        panels, rows, columns = panels[min(int(view.alone), len(panels)) - 1 :], 1, 1
    lines: list[Content] = []
    for y in range(rows):
        row = [Content("")] * (height * (y + 1) // rows - height * y // rows)
        for x, panel in enumerate(panels[y * columns : (y + 1) * columns]):
            start, end = (width + 1) * x // columns, (width + 1) * (x + 1) // columns
            drawn = chart(runs, view, *panel, end - start - 1, len(row))
            pairs = zip_longest(row, drawn, fillvalue=Content(""))
            row = [Content.assemble(left.truncate(start, pad=True), right) for left, right in pairs]
        lines += row
    return lines


def dashboard(runs: Sequence[Run], view: View, width: int, height: int, now: float) -> list[Content]:
    """The whole screen, or more to be scrolled, in lines of `width` cells: charts; from 110 columns on numbers, too."""
    if width < 40 or height < 9:  # a line is the footer's
        return [Content(text).truncate(width, pad=True) for text in ["40x10 cells are needed"] + [""] * (height - 1)]
    known, many, events = [facts(run, now) for run in runs], len(runs) > 1, event_lines(runs)
    shown = f"last 1/{1 << view.zoom}" if view.zoom else "all steps"
    top = header(runs[0], known[0], width - 2, shown)[: 1 + (height >= 16)]
    if many:
        names = distinct([run.name for run in runs], 24)
        top = [head(width - 2, "which is more robust?", right=shown), *comparison(known, names, width - 2)]
    lines = [Content.assemble(" ", line) for line in top]
    if view.alone == "numbers":
        tables = [[Content(f" {run.name}"), *number_lines(run, of)] for run, of in zip(runs, known, strict=True)]
        lines += [*chain.from_iterable(tables), Content(""), *events]
    else:
        count = 0 if view.alone or height < 22 else 3 if height < 34 else 4
        wide = 48 * (width >= 110 and not many and not view.alone)
        charts = grid(runs, view, width - wide, height - len(top) - count)
        beside = number_lines(runs[0], known[0]) if wide else []
        for left, right in zip_longest(charts, beside[: len(charts)], fillvalue=Content("")):
            lines.append(Content.assemble(left.truncate(width - wide, pad=True), (" │ "[:wide], RULE), right))
        lines += [head(width, "events"), *events[1 - count :]] if count else []
    return [line.truncate(width, pad=True) for line in [*lines, *[Content("")] * (height - len(lines))]]


def pressed(key: str, view: View, runs: Sequence[Run]) -> View:
    """The view after a key."""
    if key == "y":
        return view._replace(log=not view.log)
    if key in ("+", "-"):  # at least five records stay
        more = max(run.log.tables["step"].rows for run in runs) >> view.zoom >= 10
        return view._replace(zoom=view.zoom + more if key == "+" else max(0, view.zoom - 1))
    return view._replace(alone="" if key in ("escape", view.alone) else key)


def ascii_of(text: str) -> str:
    """The text itself, or the nearest that every terminal can show: dots as *, everything unknown as ?."""
    return text.translate(ASCII).encode("ascii", "replace").decode()


# --- the screen: keys, colours, the command line ----------------------------------------------------------------------

# Okabe and Ito's palette, which survives every common colour blindness, lightened for the dark ground.
PALETTE = {"primary": "#56b4e9", "warning": "#e69f00", "success": "#2cbf8f", "secondary": "#f0e442"}
PALETTE |= {"error": "#ff7f50", "accent": "#d993bf"}
GROUND = {"foreground": "#f0f3f6", "background": "#101317", "surface": "#101317", "accent": PALETTE["primary"]}
DARK = Theme("dark", **PALETTE | GROUND, variables={f"text-{name}": colour for name, colour in PALETTE.items()})


class Pane(ScrollView, can_focus=True):
    """Lines of text, of which only those that changed are repainted."""

    BINDINGS: ClassVar = [
        Binding("1", "app.press('1')", "panel", key_display="1-9", tooltip="alone, and back"),
        *(Binding(str(i), f"app.press('{i}')", f"panel {i}", show=False) for i in range(2, 10)),
        Binding("y", "app.press('y')", "log"),
        Binding("plus,equals_sign", "app.press('+')", "zoom", key_display="+ -", tooltip="the last half, quarter, ..."),
        Binding("minus", "app.press('-')", "zoom out", show=False),
        Binding("c", "app.press('numbers')", "numbers", tooltip="and events, all of them"),
        Binding("escape", "app.press('escape')", "help or part away", show=False),
    ]
    ALLOW_SELECT, shown = False, ()

    def show(self, lines: Sequence[Content]) -> None:
        old, self.shown, width = self.shown, lines, lines[0].cell_length
        self.virtual_size = Size(width, len(lines))
        if rows := [y for y, line in enumerate(lines) if y >= len(old) or not line.is_same(old[y])]:
            self.refresh(*(Region(0, y - self.scroll_offset.y, width, 1) for y in rows))

    def render_line(self, y: int) -> Strip:
        y += self.scroll_offset.y
        segments = self.shown[y].render_segments(self.visual_style) if y < len(self.shown) else []
        segments = [Segment(ascii_of(s.text), s.style) for s in segments] if self.app.ascii_only else segments
        return Strip(segments).adjust_cell_length(self.size.width, self.visual_style.rich_style)

    def on_resize(self) -> None:
        self.app.due.set()


class Dash(App):
    """One run, or several compared."""

    TITLE, fps, ascii_only = "gradreg", 2.0, False
    BINDINGS: ClassVar = [
        Binding("q", "quit", "quit"),
        Binding("ctrl+c", "quit", show=False, priority=True),
        Binding("question_mark", "show_help_panel", "help", key_display="?"),
    ]
    CSS = """
    Screen, Pane, Footer, FooterKey { background: $background; }
    Pane { scrollbar-size: 0 0; color: $foreground 83%; }
    """
    clock = staticmethod(time.time)

    def __init__(self, paths: Sequence[Path], **options: Any):
        """Options: fps (pictures a second), ascii_only and clock, as above."""
        super().__init__()
        self.__dict__ |= options
        self.runs, self.view, self.pane = [Run(path) for path in paths], View(), Pane()
        self.due, self.caught_up = asyncio.Event(), False  # due: a picture that does not wait for its time
        self.register_theme(DARK)
        self.theme = "dark"

    def compose(self) -> ComposeResult:
        yield from (self.pane, Footer(compact=True))

    def on_mount(self) -> None:
        self.run_worker(self.follow())
        if not self.is_headless:  # end with a terminal that goes without a signal: reading from it would never stop
            self.set_interval(1, lambda: sys.__stdin__.isatty() or os._exit(1))

    async def follow(self) -> None:
        """Read what is new and draw, `fps` times a second and after keys; a long log in slices, the first at once."""
        period, drawn = 1 / self.fps, -math.inf
        while True:
            for run in self.runs:
                await asyncio.to_thread(run.poll, self.clock())
            behind = any(run.tail.behind for run in self.runs)
            if self.pane.size and (not behind or self.due.is_set() or time.monotonic() > drawn + 2 * period):
                self.due.clear()
                self.pane.show(dashboard(self.runs, self.view, *self.pane.size, self.clock()))
                self.caught_up, drawn = not behind, time.monotonic()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.due.wait(), 0 if behind else period)

    def action_press(self, key: str) -> None:
        if key == "escape" and self.screen.query("HelpPanel"):
            self.action_hide_help_panel()
        else:
            self.view = pressed(key, self.view, self.runs)
            self.due.set()
            self.pane.scroll_to(0, 0, animate=False)


def main(
    runs: Annotated[list[Path] | None, typer.Argument(help="Run directories, or one directory of runs.")] = None,
    once: Annotated[bool, typer.Option(help="Print one plain-text snapshot and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each run and exit.")] = False,
    ascii_only: Annotated[bool, typer.Option("--ascii", help="No characters beyond ASCII.")] = False,
) -> None:
    """Watch training runs in the terminal; of a directory of runs (by default runs/), tell which is more robust."""
    paths = [path.parent if path.name == "metrics.jsonl" else path for path in runs or [Path("runs")]]
    if len(paths) > 4:
        fail(f"at most four runs can be compared, not {len(paths)}")
    here = Path(os.path.realpath(paths[0]))
    listed = len(paths) == 1 and here.is_dir() and not any((here / name).exists() for name in FILES)
    live = all(f and f.isatty() for f in (sys.stdin, sys.stdout, sys.stderr)) and os.environ.get("TERM") != "dumb"
    live = live and not (once or as_json or listed)
    for path in paths:  # of a run that is named even the directory of runs may be still to come
        if not os.path.isdir(os.path.realpath(path)) and not (live and runs and path.absolute().parent.parent.is_dir()):
            fail(f"no such run: {path}")
    ascii_only = ascii_only or not all("utf" in (f.encoding or "").lower() for f in (sys.stdout, sys.stderr))
    if live:  # Textual draws on stderr
        Dash(paths, ascii_only=ascii_only).run()
        return
    opened = runs_under(here) if listed else [Run(path).read_all() for path in paths]
    if not opened:
        fail(f"no runs in {paths[0]}")
    now, width = time.time(), max(40, shutil.get_terminal_size((120, 24)).columns)
    known = [facts(run, now) for run in opened]
    if as_json:  # NaN is no JSON
        lines = [json.dumps(json.loads(json.dumps(one), parse_constant=lambda _: None)) for one in known]
    else:
        names, room = [run.name for run in opened], width if sys.stdout.isatty() else math.inf
        lines = comparison(known, names, room) if listed else dashboard(opened, View(), width, 40, now)
        lines = [ascii_of(line.plain.rstrip()) if ascii_only else line.plain.rstrip() for line in lines]
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:  # a reader that has left is no reason to fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(message: str) -> None:
    print(f"tui.py: {message}", file=sys.stderr)
    raise typer.Exit(2)


if __name__ == "__main__":
    typer.run(main)
