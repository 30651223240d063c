"""The dashboard's pure parts: reading files that others write, states, curves as strings, whole screens as cells."""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from textual.color import Color
from typer.testing import CliRunner

import tui

ROOT = Path(__file__).resolve().parent.parent
NAN = math.nan


def load_benchmark():
    """benchmarks/tui.py, which writes runs that obey the contract (it has the name of the module it measures)."""
    spec = importlib.util.spec_from_file_location("tui_benchmark", ROOT / "benchmarks" / "tui.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


benchmark = load_benchmark()


def step(n, **fields):
    record = {"kind": "step", "step": n, "epoch": n / 10, "time": 1000.0 + n, "loss": 1 / n, "penalty": 0.1 / n}
    return record | fields


def epoch(n, **fields):
    record = {"kind": "epoch", "step": n, "epoch": n / 10, "time": 1000.0 + n, "test_loss": 1.5}
    return record | {"clean_error_pct": 4.0, "attacked_error_pct": 40.0, "omega": [0.1, 0.2]} | fields


def event(n, kind, message=""):
    return {"kind": "event", "step": n, "epoch": n / 10, "time": 1000.0 + n, "event": kind, "message": message}


def to_bytes(*records):
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def run_of(path, *records, status=None, **config):
    """A run directory of these records, read to its end."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "metrics.jsonl").write_bytes(to_bytes(*records))
    options = {"norm": "linf", "epochs": 10, "dataset": "digits", "model": "cnn", "lam": 0.3}
    known = {"options": options, "steps_total": 100, "omega_eps": [0.1, 0.5], "omega_method": "ascent", "created": 995}
    (path / "config.json").write_text(json.dumps(known | config))
    if status:
        (path / "status.json").write_text(json.dumps(status))
    return tui.Run(path).read_all()


def evaluated(run, **summary):
    """The run with an evaluation, read."""
    (run.path / "evaluation").mkdir(exist_ok=True)
    (run.path / "evaluation" / "summary.json").write_text(json.dumps(summary))
    return run.read_all()


def text_of(lines):
    return "\n".join(line.plain for line in lines)


def screen(runs, width=120, height=36, now=1071.0, **view):
    """The dashboard as text; every line is exactly as wide as the screen."""
    lines = tui.dashboard(runs, tui.View(**view), width, height, now)
    assert all(line.cell_length == width for line in lines)
    assert len(lines) >= height
    return "\n".join(line.plain.rstrip() for line in lines)


def drawn(run, width=60, height=12, title="loss", **view):
    """One chart of a run, its rows as text."""
    (panel,) = [panel for panel in tui.panels_of([run]) if panel[0][2:].startswith(title)]
    lines = tui.chart([run], tui.View(**view), *panel, width, height)
    assert len(lines) == height
    return [line.truncate(width, pad=True).plain for line in lines]


# --- the module -------------------------------------------------------------------------------------------


def test_importing_it_loads_neither_torch_nor_any_module_of_ours():
    code = "import sys, tui; print(*sorted(m.split('.')[0] for m in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    ours = {path.stem for path in ROOT.glob("*.py")} - {"tui"}
    assert "textual" in out.stdout.split()
    assert not set(out.stdout.split()) & (ours | {"torch", "torchvision", "scipy", "matplotlib"})


# --- numbers ----------------------------------------------------------------------------------------------


@given(st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False))
def test_numbers_are_short_and_right_to_their_digits(value):
    shown = tui.number(value)
    scale = {"k": 1e3, "M": 1e6, "G": 1e9}.get(shown[-1], 1)
    assert len(shown.lstrip("-")) <= 7
    assert float(shown.rstrip("kMG")) * scale == pytest.approx(value, rel=0.051, abs=0)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0.00"),
        (0.01, "0.0100"),
        (9.999, "10.0"),
        (1234, "1.23k"),
        (25712, "25.7k"),
        (2.78e-4, "2.8e-4"),
        (NAN, "–"),
    ],
)
def test_numbers_as_people_read_them(value, shown):
    assert tui.number(value) == shown


def test_durations():
    shown = [tui.duration(s) for s in (0.4, 192, 4020, 183600, -1, NAN)]
    assert shown == ["0:00:00", "0:03:12", "1:07:00", "51:00:00", "–", "–"]


@given(st.text())
def test_text_from_files_cannot_reach_the_terminal_as_commands(text):
    shown = tui.clean(text)
    assert shown.isprintable()
    assert len(shown) <= 300
    assert all(tui.cell_len(char) in (1, 2) for char in shown)


NAMES = st.lists(st.text(alphabet="ab-_1漢", max_size=30), min_size=1, max_size=4)


@given(NAMES, st.integers(6, 30))
def test_names_are_cut_so_that_runs_can_be_told_apart(names, width):
    shown = tui.distinct(names, width)
    assert len(set(shown)) == len(names)
    assert all(len(name) <= width for name in shown)


def test_of_long_names_the_part_that_differs_is_shown():
    names = ["digits-none-seed0", "digits-fd-l2-lam1-seed0"]
    assert tui.distinct(names, 14) == ["none", "fd-l2-lam1"]
    assert tui.distinct(["digits-fd-seed0", "digits-fd-seed1"], 9) == ["seed0", "seed1"]
    assert tui.distinct(["imagenet-fd-l2-lam0.1-h0.01-seed0"], 14) == ["imagen…1-seed0"]


# --- tail -------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=30), max_size=12), st.lists(st.integers(1, 40), max_size=40), st.integers(5, 64))
@settings(max_examples=50)
def test_tail_gives_every_whole_line_once_however_the_file_is_written(tmp_path_factory, chunks, sizes, limit):
    path = tmp_path_factory.mktemp("tail") / "log"
    lines = [chunk.replace(b"\n", b"")[: limit - 1] for chunk in chunks]
    content = b"".join(line + b"\n" for line in lines) + b"half"
    tail, read, at = tui.Tail(path, limit=limit), b"", 0
    for size in [*sizes, len(content)]:
        with open(path, "ab") as file:
            file.write(content[at : at + size])
        at += size
        for _ in range(3):
            block, restarted = tail.poll()
            assert not restarted
            assert block == b"" or block.endswith(b"\n")
            read += block
    while block := tail.poll()[0]:
        read += block
    assert read == content.removesuffix(b"half")
    assert not tail.behind


def test_tail_starts_over_when_the_file_shrinks_is_replaced_or_rewritten(tmp_path):
    path = tmp_path / "log"
    tail = tui.Tail(path)
    assert tail.poll() == (b"", False)
    assert tail.error == "no such file or directory"
    path.write_bytes(b"one\ntwo\n")
    assert tail.poll() == (b"one\ntwo\n", False)
    path.write_bytes(b"one\n")  # truncated
    assert tail.poll() == (b"one\n", True)
    (tmp_path / "new").write_bytes(b"other\nlines\n")
    os.replace(tmp_path / "new", path)  # another inode
    assert tail.poll() == (b"other\nlines\n", True)
    path.write_bytes(b"OTHER\nlines\nand more\n")  # the same inode, longer, other bytes
    assert tail.poll() == (b"OTHER\nlines\nand more\n", True)
    path.unlink()
    assert tail.poll() == (b"", True)  # what was read was another run's
    path.write_bytes(b"back\n")
    assert tail.poll() == (b"back\n", False)


def test_an_endless_line_goes_by_in_bounded_pieces_that_are_no_records(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"x" * 1000 + b"\ngood\n")
    tail, read = tui.Tail(path, limit=64), []
    for _ in range(40):
        read += tail.poll()[0].splitlines()
    assert read[-1] == b"good"
    assert max(map(len, read)) < 64
    assert not any(tui.parse(line) for line in read[:-1])


# --- lines to records -------------------------------------------------------------------------------------

GARBAGE = st.one_of(
    st.binary(max_size=40).map(lambda b: b.replace(b"\n", b" ")),
    st.sampled_from([b"", b"{", b"}", b"{}", b"[1, 2]", b"nan", b'{"kind": "step"}', b'{"kind": ["step"], "step": 1}']),
    st.sampled_from([b'{"a":1},{"b":2}', b'{"a": [{}', b"{}]}, {}", b"[" * 3000, b'{"kind": "step", "step": 1e999}']),
    st.sampled_from(
        [b'{"kind": "event", "event": 3, "step": "x", "message": ["a"]}', b'{"kind": "epoch", "step": null}']
    ),
    st.integers(0, 9).map(lambda n: json.dumps(step(n + 1)).encode()[: 20 + n]),  # half-written
)
WRONG = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=5),
    st.just([1.0]),
    st.just(10**400),
    st.floats(),
    st.integers(-(10**20), 10**20),
)
FIELDS = ("loss", "penalty", "grad_norm_mean", "epoch", "time", "omega", "nonfinite", "lr", "event", "message")


def test_a_record_with_nan_text_is_a_record_without_that_value():
    """NaN is no JSON and no trainer of ours writes it, but json.dumps does."""
    log = tui.Log()
    log.feed(b'{"kind": "step", "step": 1, "loss": NaN, "penalty": 2}\n{"kind": "step", "step": 2, "loss": Infinity}\n')
    assert (log.skipped, log.column("penalty")[0]) == (0, 2)
    assert np.isnan(log.column("loss")).all()


@given(st.data())
def test_fuzzed_logs_never_raise_and_never_hide_a_good_line(data):
    """Good lines with unique steps, in any order, between any garbage: each is there with its value, at its step."""
    steps = data.draw(st.lists(st.integers(1, 10**6), unique=True, max_size=20))
    lines = []
    for n in steps:
        wrong = data.draw(st.dictionaries(st.sampled_from(FIELDS), WRONG, max_size=2))
        lines.append((to_bytes(step(n) | wrong | {"grad_norm_max": n / 7}), n))
        lines += [(garbage + b"\n", None) for garbage in data.draw(st.lists(GARBAGE, max_size=2))]
    log, good = tui.Log(), sorted(n for _, n in lines if n)
    size = data.draw(st.integers(1, 7))
    for at in range(0, len(lines), size):
        log.feed(b"".join(line for line, _ in lines[at : at + size]))
    table = log.tables["step"]
    assert log.lines == len(lines)
    kept = [i for i, x in enumerate(table.column("step")) if x in good and table.column("grad_norm_max")[i] > 0]
    assert [int(table.column("step")[i]) for i in kept] == good
    assert table.column("grad_norm_max")[kept] == pytest.approx([n / 7 for n in good])
    assert (np.diff(table.column("step")) >= 0).all()


def test_what_is_no_record_is_counted_and_nothing_else():
    log = tui.Log()
    log.feed(
        to_bytes(step(1))
        + b'garbage\n\n{"kind": "step", "step": -3}\n{"kind": "step", "step": true}\n'
        + to_bytes(step(2))
    )
    assert (log.lines, log.skipped, log.tables["step"].rows) == (6, 4, 2)


def test_values_of_other_types_are_missing_not_guessed():
    log = tui.Log()
    log.feed(to_bytes(step(1, loss="0.5", penalty=True), step(2, loss=[1], penalty=10**400), step(3, loss=0.25)))
    assert log.column("loss").tolist()[2] == 0.25
    assert np.isnan(log.column("loss")[:2]).all()
    assert np.isnan(log.column("penalty")[:2]).all()


def test_a_resume_voids_later_records_also_within_one_block():
    log = tui.Log()
    before = [*(step(n, loss=9.0) for n in range(1, 21)), epoch(10), epoch(20)]
    log.feed(to_bytes(*before, event(12, "resume"), *(step(n, loss=1.0) for n in range(13, 16))))
    table = log.tables["step"]
    assert table.column("step").tolist() == list(range(1, 16))
    assert table.column("loss").tolist() == [9.0] * 12 + [1.0] * 3
    assert log.tables["epoch"].rows == 1
    assert (log.resumed, log.last["step"]) == (12, 15)


def test_after_a_resume_the_epoch_is_that_of_the_checkpoint():
    log = tui.Log()
    log.feed(to_bytes(step(100), event(50, "resume")))
    assert (log.last["step"], log.last["epoch"]) == (50, 5.0)


def test_a_resume_forgets_what_was_not_finite_in_the_work_that_was_lost():
    log = tui.Log()
    broken = {"loss": None, "nonfinite": ["penalty", "loss"]}
    log.feed(to_bytes(step(1), step(5, **broken), step(9, **broken), event(7, "resume")))
    assert log.nonfinite == [(5, "penalty"), (5, "loss")]
    log.feed(to_bytes(event(4, "resume")))
    assert log.nonfinite == []


def test_epochs_events_and_omega():
    log = tui.Log()
    log.feed(to_bytes(epoch(10), event(10, "checkpoint", "saved"), event(11, "warning", "h is\nsmall\x1b[2J")))
    assert log.column("omega.1").tolist() == [0.2]
    assert np.isnan(log.column("omega.2")).all()
    assert [(e.kind, e.step) for e in log.events] == [("epoch", 10), ("warning", 11)]
    assert log.events[0].text == "1  error 4.00 %  attacked 40.0 %"
    assert log.events[1].text == "h is·small·[2J"
    assert log.checkpoint == 10


# --- the table --------------------------------------------------------------------------------------------


def rows_of(steps, values):
    """Rows for a table of one column: step, epoch and time are the same."""
    return np.stack([np.asarray(steps, float)] * 3 + [np.asarray(values, float)])


@given(st.lists(st.lists(st.tuples(st.integers(0, 99), st.floats(-1e6, 1e6) | st.just(NAN)), min_size=1), max_size=12))
@settings(max_examples=60)
def test_a_table_keeps_every_row_in_the_order_of_the_steps(parts):
    """Rows of one step in the order in which they came."""
    table = tui.Table([*tui.AXES, "loss"])
    for part in parts:
        table.append(rows_of(*zip(*part, strict=True)))
    rows = sorted((row for part in parts for row in part), key=lambda row: row[0])
    assert table.rows == len(rows)
    assert table.column("step").tolist() == [step for step, _ in rows]
    assert np.array_equal(table.column("loss"), [value for _, value in rows], equal_nan=True)


# --- states -----------------------------------------------------------------------------------------------

RUNNING = {"state": "running", "phase": "train", "pid": 1, "time": 1000.0}
QUIET = {"now": 1000.0, "exists": True, "begun": True, "last": 1000.0, "rhythm": 1.0, "status": RUNNING}


def judged(**facts):
    known = QUIET | {"arrived": NAN, "tail": SimpleNamespace(error="")} | facts
    log = SimpleNamespace(last={"step": 9.0 if known["begun"] else NAN, "time": known["last"]})
    run = SimpleNamespace(log=log, **{name: known[name] for name in ("exists", "status", "tail", "arrived")})
    return tui.judge(run, known["now"], known["rhythm"])


NEW = {"begun": False, "last": NAN, "rhythm": NAN}


@pytest.mark.parametrize(
    ("word", "facts"),
    [
        ("WAITING", NEW | {"status": {}}),
        ("WAITING", NEW | {"exists": False, "status": {}}),
        ("LIVE", {}),
        ("LIVE", {"now": 1009.9}),
        ("STALLED", {"now": 1010.1}),
        ("LIVE", {"now": 1099.0, "rhythm": 20.0}),  # five gaps of its own
        ("STALLED", {"now": 1101.0, "rhythm": 20.0}),
        ("LIVE", {"now": 1009.0, "rhythm": NAN}),
        ("LIVE", {"now": 1500.0, "status": RUNNING | {"phase": "eval", "time": 1499.0}}),  # its heartbeat counts
        ("STALLED", {"now": 1500.0, "status": RUNNING | {"time": 1499.0}}),  # in training it does not
        ("STALLED", {"now": 1500.0, "status": RUNNING | {"phase": "eval"}}),
        ("LIVE", {"status": {}}),
        ("STALLED", {"now": 2000.0, "status": {}}),  # silence is never called a crash
        ("STALLED", {"now": 2000.0}),
        ("FINISHED", {"status": {"state": "finished"}, "now": 9e9}),
        ("INTERRUPTED", {"status": {"state": "interrupted"}}),
        ("FAILED", {"status": {"state": "failed", "error": "out of memory"}}),
        ("DELETED", {"exists": False, "status": {}}),
        ("LIVE", {"now": 900.0}),  # a clock that is behind
        ("LIVE", {"last": NAN, "status": {}}),
        ("LIVE", {"now": 1050.0, "last": 20.0, "arrived": 1049.0}),  # the writer's clock is wrong: it came just now
        ("STALLED", {"now": 1050.0, "last": 9e9, "arrived": 1030.0}),
        ("LIVE", NEW | {"status": RUNNING | {"phase": "data"}, "now": 1050.0}),
        ("STALLED", NEW | {"now": 1061.0}),
        ("DELETED", {"exists": False, "status": {"state": "finished"}}),
        ("LIVE", {"status": {"state": ["odd"], "phase": 5, "time": "x"}}),
    ],
)
def test_states(word, facts):
    assert judged(**facts)[0] == word


def test_every_state_looks_different():
    looks = list(tui.STATES.values())
    assert len(set(looks)) == len(looks) == 7
    assert not any(symbol == other for (symbol, _), (other, _) in pairwise(looks[1:]))


def test_a_failed_run_says_why():
    assert judged(status={"state": "failed", "error": "out of\nmemory"})[1] == "out of·memory"
    assert "--resume" in judged(status={"state": "interrupted"})[1]
    assert judged(now=1098.0)[1] == "no record for 0:01:38"


def test_a_run_that_was_just_resumed_is_not_stalled(tmp_path):
    resumed = {"kind": "event", "event": "resume", "step": 2, "time": 50_000.0, "message": "again"}
    run = run_of(tmp_path / "run", step(1), step(2), resumed)
    assert tui.facts(run, 50_001.0)["state"] == "LIVE"
    assert tui.facts(run, 50_100.0)["state"] == "STALLED"


def test_a_trainers_wrong_clock_does_not_make_a_growing_run_stalled(tmp_path):
    run = run_of(tmp_path / "run", step(1), step(2))
    assert tui.facts(run, 50_000.0)["state"] == "STALLED"
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(to_bytes(step(3)))
    run.poll(now=50_000.0)
    assert tui.facts(run, 50_001.0)["state"] == "LIVE"
    assert tui.facts(run, 50_100.0)["state"] == "STALLED"


def test_a_long_log_of_a_dead_run_is_not_live_because_it_was_just_read(tmp_path):
    """What is there when we come did not arrive now, in however many slices it is read."""
    run = run_of(tmp_path / "run", *(step(n) for n in range(1, 60)))
    run = tui.Run(run.path)
    run.tail.limit = 500
    run.read_all()
    assert run.log.lines == 59
    assert tui.facts(run, 50_000.0)["state"] == "STALLED"


def test_speed_and_eta_count_from_the_last_resume(tmp_path):
    fast = [step(n, time=n / 100) for n in range(1, 50)]
    slow = [step(n, time=1000 + n) for n in range(31, 50)]
    known = tui.facts(run_of(tmp_path / "run", *fast, event(30, "resume"), *slow), 0.0)
    assert known["steps_per_s"] == pytest.approx(1)
    assert known["eta_s"] == pytest.approx(51)
    assert known["steps_total"] == 100


def test_one_clock_counts_from_the_runs_start(tmp_path):
    run = run_of(tmp_path / "run", event(0, "start"), *(step(n) for n in range(1, 61)), epoch(60, seconds=9))
    assert tui.facts(run, 1060.0)["elapsed_s"] == 65  # created at 995
    assert "took 0:01:05" in screen([run], now=1060.0)
    early = run_of(tmp_path / "early", step(1, time=900))
    assert tui.facts(early, 1000.0)["elapsed_s"] == 0  # a clock that was set back


def test_small_files_that_are_broken_or_missing_are_empty(tmp_path):
    path = tmp_path / "status.json"
    assert tui.document(path) == {}
    for content, value in ((b'{"a": 1}', {"a": 1}), (b'{"a":', {}), (b"[1]", {}), (b"[" * 100_000, {}), (b"\xff", {})):
        path.write_bytes(content)
        assert tui.document(path) == value


def test_a_run_trained_anew_under_its_name_shows_nothing_of_the_old_one(tmp_path):
    path = tmp_path / "run"
    run = run_of(path, step(50), event(50, "finish"), status={"state": "finished"})
    evaluated(run, images=9)
    assert run.summary == {"images": 9}
    shutil.rmtree(path)
    known = tui.facts(run.read_all(), 2000.0)
    assert known["state"] == "DELETED"  # not FINISHED
    assert (run.summary, run.status, known["step"], known["steps_total"]) == ({}, {}, 50, 100)  # what was read stays
    path.mkdir()
    (path / "config.json").write_text('{"steps_total": 7, "options": {"norm": "l2"}}')
    known = tui.facts(run.read_all(), 2000.0)
    assert (known["state"], known["lines"], known["steps_total"], run.options) == ("WAITING", 0, 7, {"norm": "l2"})
    run_of(path, step(3), status={"state": "running", "time": 1003})
    known = tui.facts(run.read_all(), 1003.0)
    assert (known["state"], known["step"], run.summary) == ("LIVE", 3, {})


@pytest.mark.parametrize(("of", "said"), [(50, None), (40, "of step 40, not 50"), (None, None)])
def test_an_evaluation_of_another_checkpoint_is_marked(tmp_path, of, said):
    run = run_of(tmp_path / "run", step(50), event(50, "checkpoint"), step(60))
    evaluated(run, images=1, norms={"l2": {"mean_distance": 1.0}}, checkpoint_step=of)
    assert tui.facts(run, 0.0)["evaluation_of_another_checkpoint"] == said
    assert ("✗ evaluation of step 40, not 50" in screen([run])) == bool(said)
    both = screen([run, run_of(tmp_path / "other", step(50))])
    assert ("1.00 †" in both) == bool(said)


def test_latest_may_be_a_link_or_a_copy(tmp_path):
    run = run_of(tmp_path / "a", step(1))
    (tmp_path / "link").symlink_to("a")
    for name in ("a", "link"):
        found = tui.Run(tmp_path / name).read_all()
        assert (found.log.last["step"], found.name) == (1, "a")
    shutil.copytree(run.path, tmp_path / "copy")
    assert tui.Run(tmp_path / "copy").read_all().log.last["step"] == 1


# --- curves -----------------------------------------------------------------------------------------------

VALUES = st.lists(st.floats(-100, 100) | st.just(NAN), min_size=1, max_size=60)


def edges_of(left, right, dots):
    edges = np.linspace(left, right, dots + 1)
    edges[-1] = np.nextafter(edges[-1], np.inf)
    return edges


@given(VALUES, st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_bins_are_exact(values, columns, seed):
    """Against the definition, one column at a time: least, greatest and mean of its own records."""
    x = np.sort(np.random.default_rng(seed).uniform(-2, 12, len(values)))
    table = tui.Table([*tui.AXES, "loss"])
    table.append(rows_of(x, values))
    edges = edges_of(0, 10, columns)
    bins = tui.binned(table, "loss", edges)
    v = np.array(values)
    for c in range(columns):
        own = np.flatnonzero((x >= edges[c]) & (x < edges[c + 1]))
        known = v[own][~np.isnan(v[own])]
        assert bins.broken[c] == (len(own) > 0 and len(known) == 0)
        if not len(known):
            assert np.isnan([bins.low[c], bins.high[c], bins.line[c]]).all()
            continue
        assert (bins.low[c], bins.high[c]) == (known.min(), known.max())
        assert bins.line[c] == pytest.approx(known.mean())


def test_a_huge_spike_spoils_no_mean_behind_it():
    table = tui.Table([*tui.AXES, "loss"])
    table.append(rows_of(range(52), [1.0, 3e38, *[1.0] * 50]))
    line = tui.binned(table, "loss", edges_of(0, 51, 26)).line
    assert line[5:].tolist() == [1.0] * 21


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 60), st.booleans())
@example(7e-140, 251514.0, 2, True)
@example(-6.6, 12.0, 2, False)  # on both sides of 0 a step between ticks has to fit
@example(-6.6, 12.0, 3, False)
def test_scales_hold_the_data_and_their_ticks_are_evenly_spaced_rows(low, width, rows, log):
    scale = tui.scale_of(low, low + width, rows, log)
    bottom, top = scale.place(np.array([low, low + width]))
    assert top <= 1 + 1e-6
    assert bottom >= -1e-6 or (scale.log and low <= 1e-12 * (low + width))
    places = scale.place(np.array(list(scale.ticks().values()))) * rows
    assert len(places) >= 1
    assert places == pytest.approx(0.5 + scale.gap * np.arange(len(places)), abs=1e-3)  # in the middle of their rows


@given(st.just(0.0) | st.floats(1e-9, 1e7), st.floats(0, 2), st.integers(4, 40), st.booleans())
def test_no_tick_label_repeats_or_is_cut(low, width, rows, log):
    """Also where a loss lies between 2.3008 and 2.3012 (it was "2.301" three times), or is 0 throughout."""
    scale = tui.scale_of(low, low * (1 + width), rows, log)
    assert len(scale.ticks()) == len(range(0, rows, scale.gap)) >= 1
    assert all(len(label) < tui.GUTTER for label in scale.ticks())


@given(st.floats(-1, 1e6), st.floats(1e-12, 1e9), st.integers(2, 60))
def test_log_scales_hold_what_is_positive_and_put_the_rest_below(low, high, rows):
    scale = tui.scale_of(min(low, high), high, rows, True)
    place = scale.place(np.array([high, 0.0, -1.0]))
    assert 0 <= place[0] <= 1 + 1e-9
    assert scale.log == (high >= 10 * low)  # less than a decade is drawn as it is
    assert not scale.log or place[1] == place[2] == -math.inf


def test_log_scales_have_decades():
    assert list(tui.scale_of(0.02, 300, 12, True).ticks().values()) == pytest.approx([0.01, 0.1, 1, 10, 100, 1000])
    assert list(tui.scale_of(0.02, 8, 8, True).ticks().values()) == pytest.approx([0.01, 0.1, 1, 10])
    assert list(tui.scale_of(1e-9, 1e6, 7, True).ticks().values()) == pytest.approx([1e-10, 1e-5, 1, 1e5])


def dots_as_text(mask):
    return ["".join(char or " " for char in row) for row in tui.braille(mask)]


def test_ribbons_in_braille():
    rising = np.array([0, 0.25, 0.5, 0.75])
    assert dots_as_text(tui.ribbon(rising, rising, 4)) == ["⡠⠊"]
    jump = np.array([0.0, 0.0, 0.99, 0.99])
    assert dots_as_text(tui.ribbon(jump, jump, 8)) == [" ⡏", "⣀⠇"]
    assert dots_as_text(tui.ribbon(np.zeros(4), np.ones(4), 4)) == ["⣿⣿"]
    assert dots_as_text(tui.ribbon(np.array([NAN, 0.5, 0.5, NAN]), np.array([NAN, 0.5, 0.5, NAN]), 4)) == ["⠐⠂"]
    assert dots_as_text(tui.ribbon(np.full(4, 1.5), np.full(4, 1.5), 4)) == ["  "]
    assert dots_as_text(tui.ribbon(np.full(2, 1.0), np.full(2, 1.0), 4)) == ["⠉"]


@given(st.lists(st.floats(0, 1), min_size=2, max_size=40), st.integers(1, 10))
def test_a_line_is_one_connected_curve_that_meets_every_value(values, rows):
    mask = tui.ribbon(np.array(values), np.array(values), 4 * rows)
    dots = [np.flatnonzero(mask[::-1, c]) for c in range(len(values))]
    for value, column in zip(values, dots, strict=True):
        assert min(math.floor(value * 4 * rows), 4 * rows - 1) in column
    for left, right in pairwise(dots):
        assert left.max() >= right.min() - 1
        assert right.max() >= left.min() - 1


def test_gaps_are_bridged_but_breaks_are_not():
    values, none = np.array([0, NAN, 2, NAN, 4, NAN]), np.zeros(6, bool)
    assert np.array_equal(tui.bridged(values, none), [0, 1, 2, 3, 4, NAN], equal_nan=True)
    broken = np.array([0, 0, 0, 1, 0, 0], bool)
    assert np.array_equal(tui.bridged(values, broken), [0, 1, 2, NAN, 4, NAN], equal_nan=True)


def test_the_envelope_is_drawn_to_its_exact_ends(tmp_path):
    """Values 1 and 3 in turn: every column of the plot is filled from the row of 1 to that of 3, and no further."""
    rows = drawn(run_of(tmp_path / "run", *(step(n, loss=1.0 + 2 * (n % 2)) for n in range(1, 1001)), steps_total=1000))
    scale = tui.scale_of(1.0, 3.0, 10, False)
    least, greatest = (10 - math.floor(float(p) * 10) for p in scale.place(np.array([1.0, 3.0])))
    for y, row in enumerate(rows[1:-1], 1):
        cells = row[tui.GUTTER + 1 : -8]
        assert (set(cells) == {" "}) == (not greatest <= y <= least), (y, row)


def test_a_spike_of_one_record_among_ten_thousand_is_seen(tmp_path):
    records = [step(n, loss=9.0 if n == 5000 else 1 + n % 2 / 10) for n in range(1, 10_001)]
    run = run_of(tmp_path / "run", *records, steps_total=10_000)
    (column,) = [i for i, c in enumerate(drawn(run)[1]) if c == "▴"]
    assert column == tui.GUTTER + (60 - tui.GUTTER - 1) // 2  # half way
    assert tui.facts(run, 0.0)["series"]["loss"]["greatest"] == 9


def test_nonfinite_records_are_marked_where_they_are_and_break_the_line(tmp_path):
    records = [step(n) for n in range(1, 101)]
    records[49:60] = [step(n, loss=None, nonfinite=["loss"]) for n in range(50, 61)]
    run = run_of(tmp_path / "run", *records)
    rows = drawn(run)
    marks = [i for i, c in enumerate(rows[1]) if c == "✗"]
    assert len(marks) >= 3
    assert all(row[i] == " " for row in rows[2:-1] for i in range(marks[0] + 1, marks[-1]))
    assert "✗ NaN loss @50" in screen([run])


def test_the_screen_says_where_a_run_was_resumed(tmp_path):
    records = [*(step(n) for n in range(1, 81)), event(40, "resume", "again"), *(step(n) for n in range(41, 90))]
    assert "↻ resumed @40" in screen([run_of(tmp_path / "run", *records)])


def test_the_x_range_stands_still_while_a_run_grows(tmp_path):
    run = run_of(tmp_path / "run", *(step(n) for n in range(1, 501)), steps_total=1000)
    spans = {0: set(), 3: set()}
    for n in range(501, 601):
        run.log.feed(to_bytes(step(n)))
        for zoom, found in spans.items():
            low, high = tui.x_range([run], zoom)
            assert n <= high <= 1.281 * n
            found.add((low, high))
    assert {low for low, _ in spans[0]} == {0}
    assert len(spans[0]) <= 3
    assert len(spans[3]) <= 16


@pytest.mark.parametrize("zoom", range(5))
def test_zooming_shows_the_last_part_of_the_run(tmp_path, zoom):
    run = run_of(tmp_path / "run", *(step(n) for n in range(1, 101)))
    left, right = tui.x_range([run], zoom)
    assert right - left == pytest.approx(100 / 2**zoom)
    assert left < 100 <= right


def test_the_x_axis_names_the_steps_at_its_ends_and_in_its_middle(tmp_path):
    """The middle one where there is room."""
    run = run_of(tmp_path / "run", *(step(1_000_000 + 1000 * n) for n in range(1, 51)), steps_total=1)
    for width in range(24, 90, 7):
        axis = drawn(run, width=width)[-1].rstrip()
        labels = axis.strip(" └").replace("─", " ").split()
        assert labels == (["1.001M", "1.026M", "1.051M"] if width > 28 else ["1.001M", "1.051M"])
        assert len(axis) == width - 1
    assert drawn(run, zoom=2)[-1].replace("─", " ").split() == ["└1.0385M", "1.04475M", "1.051M"]


# --- screens ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    """A run with everything in it."""
    path = tmp_path_factory.mktemp("runs") / "busy"
    more = {"grad_norm_mean": 0.3, "grad_norm_max": 2.0, "fd_error_pct": 0.4, "lr": 0.1, "images_per_s": 900.0}
    records = [step(n, **more) for n in range(1, 61)]
    last = {"margin_grad_norm_mean": 0.2, "margin_grad_norm_max": 1.0, "seconds": 9.0}
    records += [epoch(60, **last)]
    records += [
        event(60, "checkpoint", "at step 60"),
        event(60, "warning", "rounding"),
        step(61, loss=None, nonfinite=["loss"]),
    ]
    records += [event(50, "resume", "again"), *(step(n, **more) for n in range(51, 71)), epoch(70, **last)]
    records[-5] |= {"loss": None, "nonfinite": ["loss"]}
    run = run_of(path, *records)
    norms = {"mean_distance": 1.5, "median_distance": 1.4, "lipschitz_bound_mean": 0.3, "omega_bound_mean": 0.6}
    norms |= {"error_pct": {"0.25": 10.0, "0.5": 30.0, "1": 90.0}}
    return evaluated(run, images=500, clean_error_pct=2.0, norms={"l2": norms | {"violations_pct": 0.2}, "linf": norms})


VIEWS = st.fixed_dictionaries(
    {
        "alone": st.sampled_from(["", "numbers", *"123456789"]),
        "log": st.booleans(),
        "zoom": st.integers(0, 12),
    }
)


@given(VIEWS, st.integers(1, 220), st.integers(1, 70), st.integers(1, 4))
@settings(max_examples=100)
def test_every_view_fills_every_screen_exactly(busy, view, width, height, runs):
    screen([busy] * runs, width, height, **view)


def test_what_the_wide_screen_says(busy):
    text = screen([busy])
    for words in ("● LIVE", "busy", "step 70/100", "epoch 7.0/10", "ETA", "✗ NaN loss", "↻ resumed @50", "70.0%"):
        assert words in text
    for title in ("1 loss nats", "2 penalty λ/2·R nats", "3 gradient ‖∇‖₁", "4 modulus ω", "5 error %", "6 finite"):
        assert title in text
    for label in ("ω(0.1)", "ω(0.5)", "FD error %", "images/s", "attacked %", "margin max"):
        assert label in text
    assert "linf false %" in text
    pairs = " ".join(text.split())
    assert "l2 distance 1.50 l2 err 0.5 30.0" in pairs
    assert "l2 median 1.40 l2 L-bound 0.300" in pairs
    assert "warning    rounding" in text
    assert max(len(line.plain.rstrip()) for line in tui.number_lines(busy, tui.facts(busy, 1071.0))) <= 45
    assert [t for t, _ in tui.panels_of([busy])][6:] == ["7 margin gradient ‖∇‖₁", "8 learning rate", "9 images/s"]


def test_what_is_unknown_is_not_made_up(tmp_path):
    """A run of unknown length is not done, one without a record is at no step."""
    endless = run_of(tmp_path / "endless", step(5), steps_total=None)
    assert "step 5   " in screen([endless])
    assert " 0.0% · all steps" in screen([endless])
    stopped = run_of(tmp_path / "stopped", status={"state": "interrupted"})
    for text in (screen([stopped]), screen([endless, stopped]), screen([stopped, endless], alone="numbers")):
        assert "nan" not in text
    assert "step –/100" in screen([stopped])


def test_as_many_charts_are_shown_as_there_is_room_for_and_each_one_alone(busy):
    titles = [title for title, _ in tui.panels_of([busy])]
    for (width, height), count in {
        (120, 36): 6,
        (80, 24): 4,
        (71, 24): 2,
        (40, 12): 1,
        (40, 9): 1,
        (200, 40): 6,
    }.items():
        text = screen([busy], width, height)
        assert [title in text for title in titles] == [i < count for i in range(len(titles))]
        for i, title in enumerate(titles, 1):
            text = screen([busy], width, height, alone=str(i))
            assert [other for other in titles if other in text] == [title]
    assert "40x10" in screen([busy], 30, 5)
    assert "40x10" in screen([busy], 39, 30)


def test_the_numbers_alone_are_as_long_as_they_need(busy):
    numbers = screen([busy], 60, 10, alone="numbers")
    for words in ("● LIVE", "FD error %", "l2 distance", "linf ω-bound", "bad lines", "resume     again"):
        assert words in numbers
    assert "resume" not in screen([busy], 60, 10, alone="1").splitlines()[-1]


@given(st.integers(1, 4))
@settings(max_examples=4)
def test_nothing_is_offered_that_no_run_has(busy, runs):
    """There is no omega of a radius that was not measured; comparing, each series has its chart, and there is one."""
    panels = tui.panels_of([busy] * runs)
    shown = [s.name for _, series in panels for s in series]
    have = [name for name in tui.SERIES if not np.isnan(busy.log.column(name)).all()]
    assert sorted(shown) == sorted(have) if runs == 1 else shown == have[:9]
    assert "omega.2" not in shown
    assert not any("?" in title for title, _ in panels)
    assert runs == 1 or all(len(series) == 1 for _, series in panels)
    first = [series[0].name for _, series in panels][:5]
    assert first == ["loss", "penalty", "grad_norm_mean", "omega.0", "attacked_error_pct"]


def test_of_every_series_the_last_the_mean_the_least_and_the_greatest_value(tmp_path):
    run = run_of(tmp_path / "run", *(step(n, loss=abs(n - 30) + 1.0, grad_norm_max=float(n % 7)) for n in range(1, 61)))
    known = tui.facts(run, 0.0)
    lines = [line.split() for line in text_of(tui.number_lines(run, known)).splitlines()]
    assert lines[0] == ["last", "mean", "least", "most"]
    assert lines[1] == ["━", "loss", "31.0", "16.5", "1.00", "31.0"]
    mean = f"{np.mean([n % 7 for n in range(31, 61)]):.2f}"
    assert ["━", "‖∇‖₁", "max", "4.00", mean, "0.00", "6.00"] in lines
    assert known["series"]["loss"] == {"last": 31, "mean": 16.5, "least": 1, "greatest": 31}


@pytest.fixture
def several(tmp_path):
    """Four runs of two methods, of which the better three are evaluated."""
    runs = []
    for i, (name, attacked) in enumerate(
        (("none-seed0", 60.0), ("fd-seed0", 20.0), ("none-seed1", 61.0), ("fd-seed1", 22.0))
    ):
        options = {"lam": float(name[:2] == "fd"), "seed": i // 2, "norm": "l2"}
        path = tmp_path / f"digits-{name}"
        records = [step(n, loss=1.0 + i) for n in range(1, 40)]
        run = run_of(path, *records, epoch(40, attacked_error_pct=attacked), options=options, attack_eps=0.25)
        if i:
            errors = {"0.1": 1.0, "0.25": 10.0 * i, "0.5": 50.0, "1": 90.0}
            evaluated(run, images=9, norms={"l2": {"mean_distance": 1.0 / i, "error_pct": errors}})
        runs.append(run)
    return runs


def test_the_error_is_told_at_the_radius_of_training_also_where_it_is_a_fraction(tmp_path):
    """summary.json has four digits of 2/255, config.json all."""
    run = run_of(tmp_path / "run", step(1), attack_eps=2 / 255)
    errors = {"0.007843": 11.0, "0.03137": 55.0, "0.1255": 99.0}
    evaluated(run, images=9, norms={"linf": {"mean_distance": 0.01, "error_pct": errors}})
    assert ("linf err 0.0078", [11.0]) in [fact[:2] for fact in tui.robustness([tui.facts(run, 0.0)])]


def compared(runs, width=math.inf):
    known = [tui.facts(run, 1060.0) for run in runs]
    lines = tui.comparison(known, tui.distinct([run.name for run in runs], 24), width)
    assert all(line.cell_length <= width + 1 for line in lines)
    return [line.split() for line in text_of(lines).splitlines()]


def test_comparing_answers_first_which_is_more_robust(several):
    """Attacked error and evaluation of every run, side by side, in full, the best marked; also in 80 columns."""
    for width in (118, 78, math.inf):
        heads, *rows = compared(several, width)
        assert heads[:9] == ["attacked", "%", "l2", "distance", "l2", "err", "0.25", "clean", "%"]
        rows = [row[1:] for row in rows]  # without the state's symbol
        assert rows[0][:4] == ["none-seed0", "60.0", "–", "–"]
        assert rows[1][:7] == ["fd-seed0", "20.0", "★", "1.00", "★", "10.0", "★"]
        assert rows[3][:4] == ["fd-seed1", "22.0", "0.333", "30.0"]
    assert "lam=1.0 seed=0" in " ".join(rows[1])
    assert "norm" not in " ".join(rows[1])
    assert rows[1][-3:] == ["40/100", "STALLED", "0:00:20"]
    first, second, *_ = screen(several, 80, 24).splitlines()
    assert "which is more robust?" in first
    assert second.split() == heads[:9]
    assert "★" not in screen(several[:1] * 2)  # equal runs: none is better


def test_only_runs_on_the_same_data_and_of_the_present_checkpoint_compete(several):
    """The greatest distance is an old network's: the star is the second one's.  Other data: a race of its own."""
    several[1].summary["checkpoint_step"] = 3
    several[1].log.checkpoint = 40.0
    _, *rows = compared(several)
    assert rows[1][1:8] == ["fd-seed0", "20.0", "★", "1.00", "†", "10.0", "†"]
    assert rows[2][1:7] == ["none-seed1", "61.0", "0.500", "★", "20.0", "★"]
    for run in several[:1] + several[3:]:
        run.options["dataset"] = "cifar10"
    _, *rows = compared(several)
    assert [row[2:4] for row in rows] == [["60.0", "–"], ["20.0", "★"], ["61.0", "0.500"], ["22.0", "★"]]


def test_comparing_names_every_line_in_full(several):
    rows = [line.plain for line in tui.chart(several, tui.View(), *tui.panels_of(several)[0], 37, 9)]
    tags = [row[27:].strip() for row in rows[1:-1] if row[27:].strip()]
    assert tags == ["fd-seed1", "none-seed1", "fd-seed0", "none-seed0"]  # the highest loss at the top, none cut
    text = screen(several, alone="numbers")
    assert all(text.count(name) > 1 for name in ("none-seed0", "fd-seed0", "none-seed1", "fd-seed1"))
    assert text.count("last    mean") == 4


def test_hostile_names_and_options_stay_text(tmp_path):
    evil = {"norm": "\x1b[31m", "dataset": ["x"] * 99, "epochs": "many", "lam": {"a": 1}}
    config = {"options": evil, "steps_total": "1", "omega_eps": ["a", None, 1e999], "omega_method": 5}
    status = {"state": 5, "pid": "x", "phase": 7}
    run = run_of(tmp_path / "e\x1b]0;x\x07v漢il", step(1), epoch(2), **config, status=status)
    (run.path / "evaluation").mkdir()
    norms = '{"l2": 3, "\\u001b": {"mean_distance": "y", "error_pct": {"x": 1, "": []}}}'
    (run.path / "evaluation" / "summary.json").write_text(f'{{"images": "x", "norms": {norms}}}')
    run.read_all()
    for runs in ([run], [run, run_of(tmp_path / "b", step(1))]):
        for alone in ("", "1", "numbers"):
            assert all(line.isprintable() for line in screen(runs, alone=alone).splitlines())
    json.dumps(tui.facts(run, 5.0))


# --- keys -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("keys") / "run", *(step(n) for n in range(1, 1001)), steps_total=1000)


def press(run, *keys):
    view = tui.View()
    for key in keys:
        view = tui.pressed(key, view, [run])
    return view


@given(st.lists(st.sampled_from([*"y+-19", "numbers", "escape"]), max_size=12))
@settings(max_examples=30)
def test_any_sequence_of_keys_gives_a_valid_view_that_can_be_drawn(thousand, keys):
    view = press(thousand, *keys)
    assert view.zoom <= 7
    screen([thousand], 80, 24, **view._asdict())


def test_what_the_keys_do(thousand):
    def after(*keys):
        return press(thousand, *keys)

    assert (after("y").log, after("y", "y").log) == (True, False)
    assert [after(*"+" * n).zoom for n in (0, 1, 6, 7, 8, 20)] == [0, 1, 6, 7, 7, 7]  # at least five records
    assert after("+", "+", "-").zoom == 1
    assert after("-").zoom == 0
    assert [after(*keys).alone for keys in ("3", "33", "32", "9")] == ["3", "", "2", "9"]
    assert "5 error" in screen([thousand], alone="9")  # the last of five
    assert [after(*["numbers"] * n).alone for n in (1, 2)] == ["numbers", ""]
    assert after("+", "numbers", "escape") == tui.View(zoom=1)


def test_a_log_axis_says_so_and_has_powers_of_ten(thousand):
    assert "log" in drawn(thousand, log=True)[0]
    assert "log" not in drawn(thousand)[0]
    labels = [row[: tui.GUTTER - 1].strip() for row in drawn(thousand, log=True)[1:-1]]
    powers = [math.log10(float(label)) for label in labels if label]
    assert len(powers) >= 2
    assert powers == sorted({round(power) for power in powers}, reverse=True)


# --- colours, letters and the command line ----------------------------------------------------------------


@given(st.text(alphabet="━─│┤└▴▾✗●◐○■✓↻‖∇ωλ·–…₁₂∞⣿⡀aé漢★†", max_size=20))
def test_ascii_is_ascii_and_as_long(text):
    assert tui.ascii_of(text).isascii()
    assert len(tui.ascii_of(text)) == len(text)


def styles(lines):
    return {span.style for line in lines for span in line.spans}


@pytest.mark.parametrize("theme", [tui.DARK, *tui.App().available_themes.values()], ids=lambda theme: theme.name)
def test_themes_know_every_style(theme, busy, several):
    used = set()
    for runs in ([busy], several, [several[3]]):
        for alone in ("", "numbers"):
            used |= styles(tui.dashboard(runs, tui.View(alone=alone), 120, 36, 1e4))
    variables = theme.to_color_system().generate()
    names = {word[1:] for style in used for word in style.split() if word[0] == "$"}
    assert {"foreground", "text-success", "text-warning", "text-error", "text-primary"} <= names <= set(variables)


NAMES_OF_COLOURS = {series.colour[1:] for series in tui.SERIES.values()} | {colour[1:] for colour in tui.RUNS}


def luminance(colour):
    parts = [part / 255 for part in colour]
    r, g, b = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("theme", [tui.DARK, tui.App().available_themes["textual-light"]], ids=["dark", "light"])
def test_every_colour_of_text_stands_out_from_the_ground(theme):
    variables = theme.to_color_system().generate()
    ground, text = (Color.parse(variables[name]) for name in ("background", "foreground"))
    colours = {name: Color.parse(value) for name, value in variables.items() if name in NAMES_OF_COLOURS}
    assert len(colours) == len(NAMES_OF_COLOURS)
    for name, colour in (colours | {"bold": text, "dim": ground.blend(text, 0.52)}).items():
        colour = ground + colour if colour.a < 1 else colour
        light, dark = sorted((luminance(colour.rgb), luminance(ground.rgb)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3, name


APP = tui.typer.Typer()
APP.command()(tui.main)


def command(*arguments, width="140"):
    """tui.py in this process, without a terminal: (exit code, standard output, standard error)."""
    done = CliRunner().invoke(APP, [str(a) for a in arguments], env={"COLUMNS": width})
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def test_without_a_terminal_it_prints_a_snapshot(busy, several):
    for arguments in ([busy.path], [busy.path, "--once"], [busy.path / "metrics.jsonl"]):
        code, out, _ = command(*arguments)
        assert code == 0
        assert "step 70/100" in out
        assert "FD error %" in out
        assert "\x1b" not in out
    assert command(busy.path, "--once", "--ascii")[1].isascii()
    closed = ["sh", "-c", f"{sys.executable} {ROOT / 'tui.py'} {busy.path} --once <&-"]
    assert "resumed @50" in subprocess.run(closed, capture_output=True, text=True, check=True).stdout
    assert "which is more robust?" in command(*(run.path for run in several))[1].splitlines()[0]


def test_json_is_one_object_with_null_for_the_unknown(busy):
    known = json.loads(command(busy.path, "--json")[1], parse_constant=pytest.fail)
    assert (known["run"], known["step"], known["not_finite"]) == ("busy", 70, 1)
    assert known["series"]["loss"]["last"] == pytest.approx(1 / 70)
    assert known["evaluation"]["images"] == 500
    assert known["evaluation_of_another_checkpoint"] is None


def test_a_directory_of_runs_is_listed(several):
    code, out, _ = command(several[0].path.parent)
    assert code == 0
    assert all(run.name in out for run in several)
    assert "attacked %" in out
    assert len(command(several[0].path.parent, "--json")[1].splitlines()) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no/such/place/run"], "no such run: no/such/place/run"),
        (["absent", "--once"], "no such run: absent"),
        ([], "no such run: runs"),
        (["a", "b", "c", "d", "e"], "at most four runs can be compared, not 5"),
    ],
)
def test_what_cannot_be_shown_is_one_line_of_its_own_and_exit_code_2(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, error = command(*arguments)
    assert (code, out) == (2, "")
    assert words in error
    assert len(error.splitlines()) == 1


def test_an_empty_directory_of_runs_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert command()[::2] == command("runs")[::2] == (2, "tui.py: no runs in runs\n")


def test_the_list_knows_all_of_long_logs(tmp_path):
    """Half a megabyte, which Tail reads at once, ends in the midst of a line."""
    root = tmp_path / "runs"
    run_of(root / "long", step(1, loss=99.0), *(step(n) for n in range(2, 9000)), epoch(9000))
    assert (root / "long/metrics.jsonl").stat().st_size > 1 << 19
    run_of(root / "late", step(1, time=9e9))
    (root / "latest").symlink_to("long")
    (root / "latest.txt").write_text("long")
    (root / "empty").mkdir()
    late, long = tui.runs_under(root)
    assert (late.name, long.name) == ("late", "long")  # the latest first
    assert long.log.last["step"] == 9000
    known = tui.facts(long, 1e4)
    assert (long.log.lines, known["bad_lines"], known["series"]["loss"]["greatest"]) == (9000, 0, 99.0)
    assert known["series"]["clean_error_pct"]["last"] == 4


def test_any_encoding_will_do_and_a_reader_may_leave(tmp_path):
    """Latin-1 cannot hold braille, nor this name; `| head -1` closes the pipe."""
    run = run_of(tmp_path / "Lauf-é-漢", *(step(n) for n in range(1, 50)))
    line = [sys.executable, str(ROOT / "tui.py"), str(run.path), "--once"]
    done = subprocess.run(line, env=os.environ | {"PYTHONIOENCODING": "latin-1"}, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"Lauf-?-?" in done.stdout
    assert done.stdout.isascii()
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*line[:-1], "--json"], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")
