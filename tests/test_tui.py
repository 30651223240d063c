"""The dashboard's pure parts: reading files that others write, states, curves as strings, whole screens as lines."""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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
    known = {"options": options, "steps_total": 100, "omega_eps": [0.1, 0.5], "omega_method": "ascent"} | config
    (path / "config.json").write_text(json.dumps(known))
    if status:
        (path / "status.json").write_text(json.dumps(status))
    return tui.Run(path).read_all()


def text_of(lines):
    return "\n".join("".join(text for text, _ in line) for line in lines)


def widths(lines):
    return [tui.width_of(line) for line in lines]


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
    assert [tui.duration(s) for s in (0.4, 192, 4020, 183600, -1, NAN)] == [
        "0 s",
        "3m 12s",
        "1h 07m",
        "2d 03h",
        "–",
        "–",
    ]


@given(st.text())
def test_text_from_files_cannot_reach_the_terminal_as_commands(text):
    shown = tui.clean(text)
    assert shown.isprintable()
    assert len(shown) <= 300


NAMES = st.lists(st.text(alphabet="ab-_1漢", max_size=30), min_size=1, max_size=4)


@given(NAMES, st.integers(6, 30))
def test_names_are_cut_so_that_runs_can_be_told_apart(names, width):
    shown = tui.distinct(names, width)
    assert len(set(shown)) == len(names)
    assert all(tui.cell_len(name) <= width for name in shown)


def test_of_long_names_the_part_that_differs_is_shown():
    names = ["digits-none-seed0", "digits-fd-l2-lam1-seed0"]
    assert tui.distinct(names, 14) == ["none", "fd-l2-lam1"]
    assert tui.distinct(["digits-fd-seed0", "digits-fd-seed1"], 9) == ["seed0", "seed1"]
    assert tui.distinct(["imagenet-fd-l2-lam0.1-h0.01-seed0"], 14) == ["imagen…1-seed0"]
    assert tui.squeezed("a_run_with_a_long_name_seed12", 12) == "a_run…seed12"


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
    assert not any(tui.parse(line + b"\n")[0] for line in read[:-1])


def test_of_a_long_file_only_the_end_may_be_wanted(tmp_path):
    (tmp_path / "log").write_bytes(b"".join(b"%d\n" % n for n in range(1000)))
    assert tui.Tail(tmp_path / "log", last=9).poll()[0].splitlines()[1:] == [b"998", b"999"]


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


@given(st.lists(st.one_of(GARBAGE, st.integers(1, 50).map(lambda n: to_bytes(step(n)).rstrip())), max_size=30))
def test_a_block_parses_as_its_lines_do(lines):
    block = b"".join(line + b"\n" for line in lines)
    one_by_one = [tui.parse(line + b"\n")[0] for line in lines]
    assert repr(tui.parse(block)) == repr(one_by_one)


def test_a_record_with_nan_text_says_which_fields_were_not_finite():
    block = b'{"kind": "step", "step": 1, "loss": NaN, "penalty": -Infinity}\n{"kind": "step", "step": 2}\n'
    first, second = tui.parse(block)
    assert first["nonfinite"] == ["loss", "penalty"]
    assert "nonfinite" not in second


@given(st.data())
def test_fuzzed_logs_never_raise_and_never_hide_a_good_line(data):
    """Good lines with unique steps, in any order, between any garbage: each is there with its value, at its step."""
    steps = data.draw(st.lists(st.integers(1, 10**6), unique=True, max_size=20))
    lines = []
    for n in steps:
        wrong = data.draw(st.dictionaries(st.sampled_from(FIELDS), WRONG, max_size=2))
        lines.append((to_bytes(step(n) | wrong | {"grad_norm_max": n / 7}), n))
        lines += [(garbage + b"\n", None) for garbage in data.draw(st.lists(GARBAGE, max_size=2))]
    log, good = tui.Log(cap=64), sorted(n for _, n in lines if n)
    size = data.draw(st.integers(1, 7))
    for at in range(0, len(lines), size):
        log.feed(b"".join(line for line, _ in lines[at : at + size]))
    table = log.tables["step"]
    assert log.lines == len(lines)
    kept = [i for i, x in enumerate(table.step) if x in good and table.column("grad_norm_max")[i] > 0]
    assert [int(table.step[i]) for i in kept] == good
    assert table.column("grad_norm_max")[kept] == pytest.approx([n / 7 for n in good], rel=1e-6)
    assert (np.diff(table.step) >= 0).all()


def test_what_is_no_record_is_counted_and_nothing_else():
    log = tui.Log()
    log.feed(
        to_bytes(step(1))
        + b'garbage\n\n{"kind": "step", "step": -3}\n{"kind": "step", "step": true}\n'
        + to_bytes(step(2))
    )
    assert (log.lines, log.skipped, len(log.tables["step"])) == (6, 4, 2)


def test_values_of_other_types_are_missing_not_guessed():
    log = tui.Log()
    log.feed(to_bytes(step(1, loss="0.5", penalty=True), step(2, loss=[1], penalty=10**400), step(3, loss=0.25)))
    assert log.tables["step"].column("loss").tolist()[2] == 0.25
    assert np.isnan(log.tables["step"].column("loss")[:2]).all()
    assert np.isnan(log.tables["step"].column("penalty")[:2]).all()


def test_a_resume_voids_later_records_also_within_one_block():
    log = tui.Log()
    before = [*(step(n, loss=9.0) for n in range(1, 21)), epoch(10), epoch(20)]
    log.feed(to_bytes(*before, event(12, "resume"), *(step(n, loss=1.0) for n in range(13, 16))))
    table = log.tables["step"]
    assert table.step.tolist() == list(range(1, 16))
    assert table.column("loss").tolist() == [9.0] * 12 + [1.0] * 3
    assert len(log.tables["epoch"]) == 1
    assert (log.void_count, [mark[0] for mark in log.resumes], log.last["step"]) == (9, [12], 15)


def test_a_resume_forgets_what_was_not_finite_in_the_work_that_was_lost():
    log = tui.Log()
    broken = {"loss": None, "nonfinite": ["penalty", "loss"]}
    log.feed(to_bytes(step(1), step(5, **broken), step(9, **broken), event(7, "resume")))
    assert (log.nonfinite_count, log.nonfinite) == (2, [(5, 0.5, 1005, "loss"), (5, 0.5, 1005, "penalty")])
    log.feed(to_bytes(event(4, "resume")))
    assert (log.nonfinite_count, log.nonfinite) == (0, [])


def test_one_clock_counts_from_the_runs_start(tmp_path):
    run = run_of(
        tmp_path / "run", event(-5, "start") | {"step": 0}, *(step(n) for n in range(1, 61)), epoch(60, seconds=9)
    )
    assert run.axis("step", "time")[-1] == run.axis("epoch", "time")[0] == run.elapsed() == 65
    first = text_of(tui.tabulated(tui.facts(run, 1060))).splitlines()[1]
    assert first.split() == ["since", "start", "1m", "05s", "training", "9", "s"]


def test_a_clock_that_goes_back_gives_no_negative_time(tmp_path):
    run = run_of(tmp_path / "run", step(1, time=5000), step(2, time=1400), step(3, time=1401))
    assert run.elapsed() == 0
    assert (np.diff(run.axis("step", "time")) >= 0).all()
    assert tui.summary(run, 1000.0, 1)["elapsed_s"] == 0


def test_epochs_events_and_omega():
    log = tui.Log()
    log.feed(to_bytes(epoch(10), event(10, "checkpoint", "saved"), event(11, "warning", "h is\nsmall\x1b[2J")))
    assert log.tables["epoch"].column("omega.1").tolist() == pytest.approx([0.2])
    assert np.isnan(log.tables["epoch"].column("omega.2")).all()
    assert [e.kind for e in log.events] == ["epoch", "warning"]
    assert "checkpoint" in log.events[0].text
    assert log.events[1].text == "h is·small·[2J"


def test_the_share_is_the_penaltys_part_of_the_objective():
    log = tui.Log()
    log.feed(to_bytes(step(1, loss=3.0, penalty=1.0), step(2, loss=0.0, penalty=0.0)))
    assert log.tables["step"].column("share_pct")[0] == 25
    assert np.isnan(log.tables["step"].column("share_pct")[1])


# --- the table --------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32) | st.just(NAN), min_size=1, max_size=40), max_size=12))
@settings(max_examples=60)
def test_a_full_table_merges_rows_and_keeps_every_extreme(parts):
    table, values = tui.Table(["loss"], cap=32), [v for part in parts for v in part]
    at = 0
    for part in parts:
        x = np.arange(at, at + len(part), dtype=float)
        table.append(np.stack([x] * 3), np.array([part], np.float32))
        at += len(part)
        assert len(table) <= 32
    known = [v for v in values if v == v]
    mean, low, high = (table.column("loss", part) for part in range(3))
    assert bool(table.known[0]) == bool(known)
    if known:
        assert np.nanmin(low) == min(known)
        assert np.nanmax(high) == max(known)
        assert table.step[-1] == at - 1
    with np.errstate(invalid="ignore"):
        assert not (low > mean + 1e-3 * np.abs(low) + 1e-6).any()


def test_merged_rows_hold_least_mean_and_greatest_of_their_pair():
    table = tui.Table(["loss"], cap=8)
    for n in range(0, 8, 2):
        table.append(np.array([[n, n + 1.0]] * 3), np.array([[n, n + 4]], np.float32))
    assert np.array_equal(table.column("loss", 1), table.column("loss", 2))
    table.append(np.full((3, 1), 8.0), np.array([[100]], np.float32))
    assert table.step.tolist() == [1, 3, 5, 7, 8]
    assert table.column("loss", 1).tolist() == [0, 2, 4, 6, 100]
    assert table.column("loss").tolist() == [2, 4, 6, 8, 100]
    assert table.column("loss", 2).tolist() == [4, 6, 8, 10, 100]


def test_the_time_axis_never_falls_and_starts_at_zero():
    table, times = tui.Table(["loss"]), np.array([NAN, 50.0, 40.0, 60.0])
    table.append(np.stack([np.arange(4.0), times, times]), np.zeros((1, 4), np.float32))
    assert table.axis("time").tolist() == [0, 0, 0, 10]
    assert table.axis("epoch").tolist() == [50, 50, 50, 60]


# --- states -----------------------------------------------------------------------------------------------

RUNNING = {"state": "running", "phase": "train", "pid": 1, "time": 1000.0}
QUIET = {"now": 1000.0, "exists": True, "records": 9, "last": 1000.0, "rhythm": 1.0, "status": RUNNING, "alive": True}


@pytest.mark.parametrize(
    ("word", "facts"),
    [
        ("WAITING", {"records": 0, "status": {}}),
        ("WAITING", {"records": 0, "exists": False, "status": {}}),
        ("LIVE", {}),
        ("LIVE", {"now": 1009.9}),
        ("STALLED", {"now": 1010.1}),
        ("LIVE", {"now": 1099.0, "rhythm": 20.0}),  # five gaps of its own
        ("STALLED", {"now": 1101.0, "rhythm": 20.0}),
        ("STALLED", {"now": 1003.0, "stall": 2.0}),
        ("LIVE", {"now": 1009.0, "rhythm": NAN}),
        ("LIVE", {"now": 1500.0, "status": RUNNING | {"phase": "eval", "time": 1499.0}}),  # its heartbeat counts
        ("STALLED", {"now": 1500.0, "status": RUNNING | {"time": 1499.0}}),  # in training it does not
        ("STALLED", {"now": 1500.0, "status": RUNNING | {"phase": "eval"}}),
        ("LIVE", {"status": {}, "alive": None}),
        ("STALLED", {"now": 2000.0, "status": {}, "alive": None}),  # silence is never called a crash
        ("STALLED", {"now": 2000.0, "alive": None}),
        ("GONE", {"alive": False}),
        ("GONE", {"alive": False, "records": 0}),
        ("FINISHED", {"status": {"state": "finished"}, "now": 9e9}),
        ("INTERRUPTED", {"status": {"state": "interrupted"}}),
        ("FAILED", {"status": {"state": "failed", "error": "out of memory"}, "alive": False}),
        ("FINISHED", {"status": {}, "ended": "finished", "alive": None}),
        ("LIVE", {"ended": "interrupted"}),  # resumed: status.json is newer than the last event
        ("DELETED", {"exists": False, "status": {}, "alive": None}),
        ("LIVE", {"now": 900.0}),  # a clock that is behind
        ("LIVE", {"last": NAN, "status": {}, "alive": None}),
        ("LIVE", {"records": 0, "last": NAN, "rhythm": NAN, "status": RUNNING | {"phase": "data"}, "now": 1050.0}),
        ("STALLED", {"records": 0, "last": NAN, "rhythm": NAN, "now": 1061.0}),
        ("DELETED", {"exists": False, "status": {"state": "finished"}, "ended": "finished"}),
    ],
)
def test_states(word, facts):
    state = tui.judge(**QUIET | facts)
    assert state.word == word
    assert state.symbol != ""


def test_every_state_looks_different():
    words = {"WAITING", "LIVE", "STALLED", "FINISHED", "INTERRUPTED", "FAILED", "GONE"}
    facts = [
        {"records": 0, "status": {}},
        {},
        {"now": 1e4},
        *({"status": {"state": s}} for s in ("finished", "interrupted", "failed")),
    ]
    states = [tui.judge(**QUIET | f) for f in (*facts, {"alive": False})]
    assert {s.word for s in states} == words
    assert len({s.symbol for s in states}) == len(words)


def test_a_failed_run_says_why():
    assert tui.judge(**QUIET | {"status": {"state": "failed", "error": "out of\nmemory"}}).note == "out of·memory"


def test_the_process_of_a_run(tmp_path):
    host = tui.socket.gethostname()
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    child.stdout.read()  # it has ended, or is about to
    while Path("/proc").is_dir() and tui.process_alive({"pid": child.pid, "host": host}):
        pass  # until it is a zombie, which nobody has waited for
    child.wait()
    assert tui.process_alive({"pid": os.getpid(), "host": host}) is True
    assert tui.process_alive({"pid": child.pid, "host": host}) is False
    assert tui.process_alive({"pid": child.pid, "host": "elsewhere"}) is None
    for pid in (None, "1", -1, 0, 2**40, True):
        assert tui.process_alive({"pid": pid, "host": host}) is None


def test_a_trainers_wrong_clock_does_not_make_a_growing_run_stalled(tmp_path):
    run = run_of(tmp_path / "run", step(1), step(2))
    assert run.state(now=50_000.0).word == "STALLED"
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(to_bytes(step(3)))
    run.apply(run.fetch(), now=50_000.0)
    assert run.state(now=50_001.0).word == "LIVE"
    assert run.state(now=50_100.0).word == "STALLED"


def test_speed_and_eta_count_from_the_last_resume(tmp_path):
    fast = [step(n, time=n / 100) for n in range(1, 50)]
    slow = [step(n, time=1000 + n) for n in range(31, 50)]
    run = run_of(tmp_path / "run", *fast, event(30, "resume"), *slow)
    assert run.speed() == pytest.approx(1)
    assert run.eta() == pytest.approx(51)
    assert run.total == 100


def test_broken_small_files_keep_their_last_good_value_but_deleted_ones_do_not(tmp_path):
    document = tui.Document(tmp_path / "status.json")
    assert document.read() == {}
    for content, value in (('{"a": 1}', {"a": 1}), ('{"a":', {"a": 1}), ("[1]", {"a": 1}), ('{"a": 22}', {"a": 22})):
        document.path.write_text(content)
        assert document.read() == value
    document.path.unlink()
    assert document.read() == {}


def test_a_run_trained_anew_under_its_name_shows_nothing_of_the_old_one(tmp_path):
    path = tmp_path / "run"
    run = run_of(path, step(50), event(50, "finish"), status={"state": "finished"})
    (path / "evaluation").mkdir()
    (path / "evaluation" / "summary.json").write_text('{"images": 9}')
    assert run.read_all().summary == {"images": 9}
    shutil.rmtree(path)
    assert run.read_all().state(2000).word == "DELETED"  # not FINISHED
    assert (run.summary, run.status, run.step, run.total) == ({}, {}, 50, 100)  # what was read stays
    path.mkdir()
    (path / "config.json").write_text('{"steps_total": 7, "options": {"norm": "l2"}}')
    assert run.read_all().state(2000).word == "WAITING"
    assert (run.records, run.total, run.option("norm")) == (0, 7, "l2")
    run_of(path, step(3), status={"state": "running", "time": 1003})
    assert run.read_all().state(1003).word == "LIVE"
    assert (run.step, run.summary) == (3, {})


@pytest.mark.parametrize(
    ("more", "written", "said"),
    [
        ({"checkpoint_step": 50}, 2000, ""),
        ({"checkpoint_step": 40}, 2000, "of step 40, not 50"),
        ({"checkpoint_step": 50}, 900, "older than this run"),
        ({"checkpoint_step": None}, 2000, ""),
        ({}, 2000, ""),  # summaries that were written before the key: the file's time against the checkpoint's
        ({}, 1040, "older than the checkpoint"),
    ],
)
def test_an_evaluation_of_another_checkpoint_is_marked(tmp_path, more, written, said):
    run = run_of(tmp_path / "run", step(50), event(50, "checkpoint"), step(60), created=950)
    file = run.path / "evaluation" / "summary.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"images": 1, "norms": {"l2": {"mean_distance": 1.0}}} | more))
    os.utime(file, (written, written))
    assert run.read_all().other_evaluation() == said
    assert said in text_of(tui.tabulated(tui.evaluation(run)))
    other = run_of(tmp_path / "other", step(50))
    assert ("†" in text_of(tui.verdict([run, other], tui.View(), 120, 0))) == bool(said)


def test_what_is_of_another_checkpoint_does_not_compete(several):
    """The greatest distance is an old network's: the star is the second one's."""
    several[1].summary["checkpoint_step"] = 3
    several[1].log.checkpoint = (40.0, 1040.0)
    rows = [
        line.split()[1:] for line in text_of(tui.verdict(several, tui.View(smooth=1), 118, 1060.0)).splitlines()[2:]
    ]
    assert rows[1][:7] == ["fd-seed0", "20.0", "★", "1.00", "†", "10.0", "†"]
    assert rows[2][:6] == ["none-seed1", "61.0", "0.500", "★", "20.0", "★"]


def test_latest_may_be_a_link_a_file_with_the_name_in_it_or_a_copy(tmp_path):
    run = run_of(tmp_path / "a", step(1))
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "file").write_text("a\n")
    for name in ("a", "link", "file"):
        assert tui.Run(tmp_path / name).read_all().step == 1
        assert tui.Run(tmp_path / name).name == "a"
    shutil.copytree(run.path, tmp_path / "copy")
    assert tui.Run(tmp_path / "copy").read_all().step == 1


# --- curves -----------------------------------------------------------------------------------------------

VALUES = st.lists(st.floats(-100, 100, width=32) | st.just(NAN), min_size=1, max_size=60)


@given(VALUES, st.integers(1, 12), st.integers(1, 25), st.integers(0, 2**32 - 1))
def test_bins_are_exact(values, columns, smooth, seed):
    """Against the definition, one column at a time: extremes of its own records, mean of its own or the last k."""
    x = np.sort(np.random.default_rng(seed).uniform(0, 10, len(values)))
    table = tui.Table(["loss"])
    table.append(np.stack([x] * 3), np.array([values], np.float32))
    edges = tui.edges_of(0, 10, columns, False)
    bins = tui.binned(table, "loss", x, edges, smooth)
    v = np.array(values)
    for c in range(columns):
        own = np.flatnonzero((x >= edges[c]) & (x < edges[c + 1]))
        known = v[own][~np.isnan(v[own])]
        assert bins.broken[c] == (len(own) > 0 and len(known) == 0)
        if not len(known):
            assert np.isnan([bins.low[c], bins.high[c], bins.line[c]]).all()
            continue
        assert (bins.low[c], bins.high[c]) == (known.min(), known.max())
        window = v[min(own[0], max(own[-1] + 1 - smooth, 0)) : own[-1] + 1]
        assert bins.line[c] == pytest.approx(np.nanmean(window), abs=1e-4)


def test_a_huge_spike_spoils_no_mean_behind_it():
    table, values = tui.Table(["loss"]), np.array([[1.0, 3e38, *[1.0] * 50]], np.float32)
    x = np.arange(52.0)
    table.append(np.stack([x] * 3), values)
    line = tui.binned(table, "loss", x, tui.edges_of(0, 51, 26, False), 4).line
    assert line[5:].tolist() == [1.0] * 21


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(1, 60))
def test_linear_scales_hold_the_data_and_their_ticks_are_evenly_spaced_rows(low, width, rows):
    high = low + width
    scale = tui.linear_scale(low, high, rows)
    slack = 1e-6 * (scale.high - scale.low)
    assert scale.low <= low + slack
    assert scale.high >= high - slack
    places = scale.place(np.array(scale.ticks)) * rows
    assert len(places) >= 1
    assert places - np.floor(places + 1e-6) == pytest.approx(0.5, abs=1e-3)  # in the middle of their rows
    assert np.ptp(np.diff(places)) < 1e-6 if len(places) > 2 else True


@given(st.just(0.0) | st.floats(1e-9, 1e7), st.floats(0, 2), st.integers(4, 40), st.booleans())
def test_no_tick_label_repeats_or_is_cut(low, width, rows, log):
    """Also where a loss lies between 2.3008 and 2.3012 (it was "2.301" three times), or is 0 throughout."""
    scale = (tui.log_scale if log else tui.linear_scale)(low, low * (1 + width), rows)
    shown = ["".join(text for text, _ in line) for line in tui.tick_labels(scale, rows)]
    labels = [text[:-1].strip() for text in shown if text.strip(" │┤")]
    assert len(labels) == len(set(labels)) >= 1
    assert all(len(text) == tui.GUTTER for text in shown)


@given(st.floats(-1, 1e6), st.floats(1e-12, 1e9), st.integers(1, 60))
def test_log_scales_hold_what_is_positive_and_put_the_rest_below(low, high, rows):
    scale = tui.log_scale(low, high, rows)
    place = scale.place(np.array([high, 0.0, -1.0]))
    assert 0 <= place[0] <= 1
    assert place[1] == place[2] == -math.inf
    assert all(scale.low * 0.99 <= tick <= scale.high * 1.01 for tick in scale.ticks)


def test_log_scales_have_decades():
    assert tui.log_scale(0.02, 300, 12).ticks == pytest.approx((0.1, 1, 10, 100))
    assert tui.log_scale(1.1, 9, 12).ticks == pytest.approx((1, 2, 5, 10))


def dots_as_text(mask):
    return ["".join(map(chr, row)).replace("\0", " ") for row in tui.braille(mask)]


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


def chart_text(run, view=None, index=0, width=60, height=12):
    view = (view or tui.View()).settled([run])
    lines = tui.chart([run], view, index, width, height)
    assert widths(lines) == [width] * height
    return lines


def test_a_spike_of_one_record_among_ten_thousand_is_seen(tmp_path):
    records = [step(n, loss=9.0 if n == 5000 else 1 + n % 2 / 10) for n in range(1, 10_001)]
    run = run_of(tmp_path / "run", *records)
    clipped, whole = (chart_text(run, tui.View(clip=clip)) for clip in (True, False))
    (column,) = [i for i, c in enumerate(text_of(clipped[1:2])) if c == "▴"]
    assert "▴" not in text_of(whole)
    assert {line[column] for line in text_of(whole).splitlines()[2:-3]} != {" "}
    assert all(line[30] == " " for line in text_of(whole).splitlines()[2:8] if column != 30)


def test_nonfinite_records_are_marked_where_they_are_and_break_the_line(tmp_path):
    records = [step(n) for n in range(1, 101)]
    records[49:60] = [step(n, loss=None, nonfinite=["loss"]) for n in range(50, 61)]
    run = run_of(tmp_path / "run", *records)
    rows = text_of(chart_text(run)).splitlines()
    marks = [i for i, c in enumerate(rows[1]) if c == "✗"]
    assert len(marks) >= 3
    inner = range(marks[0] + 1, marks[-1])
    assert all(row[i] == " " for row in rows[2:-1] for i in inner)
    assert "✗ NaN loss @50 ×11" in text_of([tui.header(run, tui.View(), 120, 1101.0)])


def test_the_x_axis_shows_a_resume(tmp_path):
    run = run_of(
        tmp_path / "run", *(step(n) for n in range(1, 81)), event(40, "resume"), *(step(n) for n in range(41, 90))
    )
    assert "↻" in text_of(chart_text(run)[-1:])
    assert "↻ resumed @40" in text_of([tui.header(run, tui.View(), 120, 1090.0)])


def test_the_x_range_stands_still_while_a_run_grows(tmp_path):
    run = run_of(tmp_path / "run", *(step(n) for n in range(1, 501)), steps_total=1000)
    spans = set()
    for n in range(501, 601):
        run.log.feed(to_bytes(step(n)))
        low, high = tui.x_range([run], tui.View())
        assert low == 0
        assert n <= high <= 1.26 * n
        spans.add(high)
    assert len(spans) <= 3


@pytest.mark.parametrize("axis", tui.AXES)
def test_a_window_follows_the_last_steps_on_every_axis(tmp_path, axis):
    run = run_of(tmp_path / "run", *(step(n) for n in range(1, 101)))
    left, right = tui.x_range([run], tui.View(axis=axis, window=40))
    unit = 0.1 if axis == "epoch" else 1
    assert right - left == pytest.approx(40 * unit)
    assert left < run.axis("step", axis)[-1] <= right


# --- charts, tables ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    """A run with everything in it."""
    path = tmp_path_factory.mktemp("runs") / "busy"
    more = {"grad_norm_mean": 0.3, "grad_norm_max": 2.0, "fd_error_pct": 0.4, "lr": 0.1, "images_per_s": 900.0}
    records = [step(n, **more) for n in range(1, 61)]
    last = {"margin_grad_norm_mean": 0.2, "margin_grad_norm_max": 1.0, "fd_rounding_pct": 0.1, "seconds": 9.0}
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
    (path / "evaluation").mkdir()
    summary = {"images": 500, "clean_error_pct": 2.0, "norms": {"l2": norms | {"violations_pct": 0.2}, "linf": norms}}
    (path / "evaluation" / "summary.json").write_text(json.dumps(summary))
    return run.read_all()


VIEWS = st.builds(
    tui.View,
    logs=st.frozensets(st.integers(0, tui.COUNT - 1)),
    axis=st.sampled_from(tui.AXES),
    log_x=st.booleans(),
    smooth=st.none() | st.integers(1, 2000),
    window=st.none() | st.floats(1, 1e6),
    zoom=st.none() | st.tuples(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6)).map(lambda z: (z[0], z[0] + z[1])),
    cursor=st.none() | st.floats(-100, 1e4),
    clip=st.booleans(),
    extra=st.integers(0, 9),
    paused=st.booleans(),
)


@given(VIEWS, st.integers(0, tui.COUNT - 1), st.integers(20, 220), st.integers(4, 60), st.integers(1, 3))
@settings(max_examples=100)
def test_every_view_fills_every_chart_exactly(busy, view, index, width, height, runs):
    view = view.settled([busy])
    assert widths(tui.chart([busy] * runs, view, index, width, height)) == [width] * height
    assert max(widths(tui.top([busy], view, width, 1071.0, True))[1:]) <= max(width, 60)


def test_what_the_wide_screen_says(busy):
    view = tui.View().settled([busy])
    top = text_of(tui.top([busy], view, 118, 1071.0))
    for words in (
        "● LIVE",
        "busy",
        "step 70/100",
        "epoch 7.0/10",
        "ETA",
        "✗ NaN loss",
        "↻ resumed @50",
        "70.0% · all steps",
    ):
        assert words in top
    charts = text_of(line for i in range(tui.COUNT) for line in tui.chart([busy], view, i, 37, 9))
    titles = ("1 loss nats", "2 penalty", "3 gradient ‖∇‖₁", "4 modulus ω ascent", "5 error %", "6 penalty share %")
    for title in titles:
        assert title in charts
    side = text_of(tui.sidebar([busy], view, 1071.0))
    for label in ("ω(0.1)", "ω(0.5)", "FD error %", "images/s", "attacked %", "margin max", "evaluation, 500 images"):
        assert label in side
    assert "violations %" in side
    assert max(widths(tui.sidebar([busy], view, 1071.0))) <= 44  # as wide as its place beside the charts
    assert "warning    rounding" in text_of(tui.event_lines([busy]))


@given(st.integers(0, tui.COUNT - 1), st.integers(1, 4), st.integers(0, 30))
@settings(max_examples=40)
def test_nothing_is_offered_that_no_run_has(busy, index, runs, extra):
    """`m` goes round the series that have data; there is no omega of a radius that was not measured."""
    title, series = tui.panel_of([busy] * runs, tui.View(extra=extra), index)
    assert series
    assert all(busy.log.has(s) for s in series)
    assert "ε" not in title


def test_errors_and_losses_have_a_best_value_everything_else_a_range(tmp_path):
    """The least gradient norm is that of the untrained network: no merit."""
    run = run_of(tmp_path / "run", *(step(n, loss=abs(n - 30) + 1.0, grad_norm_max=float(n % 7)) for n in range(1, 61)))
    goals, others = (text_of(tui.tabulated(tui.numbers(run, 2, goal))).splitlines() for goal in (True, False))
    assert goals[0].split() == ["last", "mean", "best", "at", "step"]
    assert goals[1].split() == ["━", "loss", "31.0", "30.5", "1.00", "30"]
    assert others[0].split() == ["last", "mean", "least", "most"]
    assert others[2].split() == ["━", "‖∇‖₁", "max", "4.00", "3.50", "0.00", "6.00"]
    known = tui.summary(run, 0.0, 2)["series"]
    assert (known["loss"]["best"], known["loss"]["best_step"]) == (1, 30)
    assert "best" not in known["grad_norm_max"]


@pytest.fixture
def several(tmp_path):
    """Four runs of two methods, of which the better three are evaluated."""
    runs = []
    for i, (name, attacked) in enumerate(
        (("none-seed0", 60.0), ("fd-seed0", 20.0), ("none-seed1", 61.0), ("fd-seed1", 22.0))
    ):
        options = {"lam": float(name[:2] == "fd"), "seed": i // 2}
        path = tmp_path / f"digits-{name}"
        records = [step(n, loss=1.0 + i) for n in range(1, 40)]
        run = run_of(path, *records, epoch(40, attacked_error_pct=attacked), options=options, attack_eps=0.5)
        if i:
            (path / "evaluation").mkdir()
            norms = {"l2": {"mean_distance": 1.0 / i, "error_pct": {"0.25": 1.0, "0.5": 10.0 * i, "1": 90.0}}}
            (path / "evaluation" / "summary.json").write_text(json.dumps({"images": 9, "norms": norms}))
        runs.append(run.read_all())
    return runs


def test_comparing_answers_first_which_is_more_robust(several):
    """Attacked error and evaluation of every run, side by side, in full, the best marked; also in 80 columns."""
    for width in (118, 78):
        lines = tui.verdict(several, tui.View(smooth=1), width, 1060.0)
        text = text_of(lines)
        assert max(widths(lines)) <= width
        assert len(lines) == len(several) + 2
        assert "which is more robust?" in text.splitlines()[0]
        assert text.splitlines()[1].split() == ["attacked", "%", "l2", "distance", "error", "at", "0.5", "clean", "%"]
        rows = [line.split()[1:] for line in text.splitlines()[2:]]
        assert rows[0][:4] == ["none-seed0", "60.0", "–", "–"]
        assert rows[1][:7] == ["fd-seed0", "20.0", "★", "1.00", "★", "10.0", "★"]
        assert rows[3][:4] == ["fd-seed1", "22.0", "0.333", "30.0"]
    alone = tui.verdict(several[:1] * 2, tui.View(smooth=1), 118, 1060.0)
    assert "not evaluated: python evaluate.py" in text_of(alone)
    assert "★" not in text_of(alone)  # equal runs: none is better


def test_comparing_shows_what_differs_and_names_every_line(several):
    side = text_of(tui.sidebar(several, tui.View(smooth=1), 1060.0))
    assert max(widths(tui.sidebar(several, tui.View(smooth=1), 1060.0))) <= 44
    rows = {line.split()[0]: line.split()[1:] for line in side.splitlines()}
    assert rows["lam"] == ["0.0", "1.0", "0.0", "1.0"]
    assert rows["seed"] == ["0", "0", "1", "1"]
    assert "norm" not in rows
    assert rows["loss"] == ["1.00", "2.00", "3.00", "4.00"]
    text = text_of(tui.chart(several, tui.View(smooth=1), 0, 37, 9))
    tags = [line[-10:].strip() for line in text.splitlines()[1:-1] if line[-10:].strip()]
    assert tags == ["fd-seed1", "none-seed1", "fd-seed0", "none-seed0"]  # the highest loss at the top, none cut
    notes = text_of(tui.event_lines(several, 4))
    assert all(name in notes for name in ("none-seed0", "fd-seed0", "none-seed1", "fd-seed1"))


def test_hostile_names_and_options_stay_text(tmp_path):
    evil = {"norm": "\x1b[31m", "dataset": ["x"] * 99, "epochs": "many", "lam": {"a": 1}}
    config = {"options": evil, "steps_total": "1", "omega_eps": ["a", None, 1e999], "omega_method": 5}
    status = {"state": 5, "pid": "x", "phase": 7}
    run = run_of(tmp_path / "e\x1b]0;x\x07vil", step(1), epoch(2), **config, status=status)
    (run.path / "evaluation").mkdir()
    norms = '{"l2": 3, "\\u001b": {"mean_distance": "y", "error_pct": {"x": 1, "": []}}}'
    (run.path / "evaluation" / "summary.json").write_text(f'{{"images": "x", "norms": {norms}}}')
    run.read_all()
    view = tui.View(smooth=1)
    other = run_of(tmp_path / "b", step(1))
    for runs in ([run], [run, other]):
        lines = [*tui.top(runs, view, 118, 5.0, True), *tui.sidebar(runs, view, 5.0), *tui.event_lines(runs)]
        lines += [*tui.chart(runs, view, 3, 60, 9), *tui.config_lines(run), *tui.tabulated([tui.run_row(run, 5.0)])]
        assert all(text.isprintable() for line in lines for text, _ in line)
    json.dumps(tui.summary(run, 5.0, 3), allow_nan=False)


PARTS = st.lists(st.tuples(st.sampled_from(["a", "bc", "é", "漢", "⣿", " "]), st.sampled_from(["x", "y"])), max_size=12)


@given(PARTS, st.data())
def test_repainting_the_changed_cells_gives_the_new_line(parts, data):
    new = data.draw(st.permutations(parts) | PARTS)
    cells, wanted = (
        [(c, r) for t, r in tui.fit(line, 40) for c in t for _ in range(tui.cell_len(c))] for line in (parts, new)
    )
    start, end = tui.difference(parts, new)
    assert cells[:start] == wanted[:start]
    assert cells[end:] == wanted[end:]


# --- keys -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("keys") / "run", *(step(n) for n in range(1, 1001)), steps_total=1000)


EDGES = tui.edges_of(0, 1000, 100, False)
VIEW_KEYS = [*"yYxX[]f+-,.0omp", "left", "right", "shift+left", "shift+right"]


def press(run, *keys, view=None):
    view = view or tui.View(smooth=30)
    for key in keys:
        view = tui.pressed(key, view, [run], 0, EDGES)
    return view


@given(st.lists(st.sampled_from(VIEW_KEYS), max_size=12))
@settings(max_examples=50)
def test_any_sequence_of_keys_gives_a_valid_view_that_can_be_drawn(thousand, keys):
    view = press(thousand, *keys)
    assert view.axis in tui.AXES
    assert view.smooth in tui.SMOOTHINGS
    assert view.zoom is None or view.zoom[0] < view.zoom[1]
    assert len(tui.chart([thousand], view, 0, 40, 8)) == 8


def test_what_the_keys_do(thousand):
    def after(*keys):
        return press(thousand, *keys)

    assert after("y").logs == {0, 2}
    assert after("Y").logs == set(range(tui.COUNT))
    assert after("Y", "Y").logs == frozenset()
    assert [after(*"x" * n).axis for n in range(4)] == ["step", "epoch", "time", "step"]
    assert (after("[").smooth, after("]").smooth) == (10, 100)
    assert [after(*"f" * n).window for n in range(6)] == [None, 500, 200, 50, 10, None]
    assert after("+").zoom == (250, 750)
    assert after("-").zoom == (-500, 1500)
    assert after(".").zoom == (250, 1250)
    assert after(",").zoom == (-250, 750)
    assert after("+", "0").zoom is None
    assert after("right").cursor == pytest.approx(990)  # the cell of the last record: 980 to 1000
    assert after("right", "left").cursor == pytest.approx(970)
    assert after("right", *["shift+left"] * 9).cursor == pytest.approx(10)
    assert after(*["left"] * 3, "+").zoom == pytest.approx((475, 975))  # the cursor's 950 stays where it is
    assert (after("o").clip, after("p").paused, after("m").extra, after("X").log_x) == (False, True, 1, True)


def test_following_a_short_run_shows_data_or_all_of_it(tmp_path):
    """A window holds at least five records; where there are too few of them there is none (it was "no data")."""
    for count in (1, 3, 12, 40):
        run = run_of(tmp_path / str(count), *(step(10 * n) for n in range(1, count + 1)), steps_total=10 * count)
        view = tui.View(smooth=1)
        for _ in range(5):
            view = tui.pressed("f", view, [run], 0, EDGES)
            left, right = tui.x_range([run], view)
            assert ((run.log.tables["step"].step >= left) & (run.log.tables["step"].step <= right)).sum() >= min(
                count, 4
            )


# --- other files and the command line ---------------------------------------------------------------------


def test_csv_holds_the_window_and_nothing_else(tmp_path, busy):
    rows = tui.write_csv(busy, tmp_path / "out.csv", "step", 20, 60)
    lines = (tmp_path / "out.csv").read_text().splitlines()
    header, first = lines[0].split(","), lines[1].split(",")
    assert rows == len(lines) - 1 == 41
    assert header[:5] == ["kind", "step", "epoch", "time", "loss"]
    assert not any(name.endswith(("_min", "_max")) for name in header if "norm" not in name)
    assert (float(first[1]), float(first[4])) == (20, pytest.approx(1 / 20, rel=1e-6))
    with pytest.raises(FileExistsError):
        tui.write_csv(busy, tmp_path / "out.csv", "step", 0, 1)


@given(st.text(alphabet="━─╸│┤└▴▾✗●◐○■✓↻‖∇ωλεδ·–←→…×₁₂∞⣿⡀aé漢★†", max_size=20))
def test_ascii_is_ascii_and_as_long(text):
    assert tui.ascii_of(text).isascii()
    assert len(tui.ascii_of(text)) == len(text)


@pytest.mark.parametrize("name", sorted(tui.THEMES))
def test_themes_know_every_role(name, busy, several):
    styles, view = tui.styles_of(tui.THEMES[name]), tui.View(smooth=1, cursor=40.0)
    lines = [
        line for runs in ([busy], several) for i in range(tui.COUNT) for line in tui.chart(runs, view, i, 60, 9, i == 1)
    ]
    for runs in ([busy], several):
        lines += [*tui.top(runs, view, 118, 1e4), *tui.sidebar(runs, view, 1e4), *tui.event_lines(runs)]
    assert {role for line in lines for _, role in line} <= set(styles)


def luminance(colour):
    parts = [part / 255 for part in colour]
    r, g, b = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("name", ["dark", "light"])
def test_every_colour_of_text_stands_out_from_the_ground(name):
    ground = luminance(tui.Color.parse(tui.THEMES[name].background).rgb)
    for role, style in tui.styles_of(tui.THEMES[name]).items():
        if role and role[-1] not in "-=" and "/" not in role and role.rstrip("+") not in ("rule", "axis"):
            light, dark = sorted((luminance(style.color.triplet), ground), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 3, role


APP = tui.typer.Typer()
APP.command()(tui.main)


def command(*arguments, width="140"):
    """tui.py in this process, without a terminal: (exit code, standard output, standard error)."""
    done = CliRunner().invoke(APP, [str(a) for a in arguments], env={"COLUMNS": width})
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def test_without_a_terminal_it_prints_a_snapshot(busy, several):
    for arguments in ([busy.path], [busy.path, "--once"]):
        code, out, _ = command(*arguments)
        assert code == 0
        assert "step 70/100" in out
        assert "\x1b" not in out
    assert command(busy.path, "--once", "--ascii")[1].isascii()
    assert "which is more robust?" in command(*(run.path for run in several))[1].splitlines()[0]


def test_json_is_one_object_with_null_for_the_unknown(busy):
    known = json.loads(command(busy.path, "--json")[1], parse_constant=pytest.fail)
    assert (known["run"], known["step"], known["not_finite"], known["undone_by_resume"]) == ("busy", 70, 1, 12)
    assert known["series"]["loss"]["last"] == pytest.approx(1 / 70)
    assert known["evaluation"]["images"] == 500


def test_a_picture_is_xml_that_fetches_nothing(busy, tmp_path):
    code, out, _ = command(busy.path, "--svg", tmp_path / "out.svg", "--size", "80x24", "--theme", "light")
    assert (code, out) == (0, "")
    words = "".join(xml.parse(tmp_path / "out.svg").getroot().itertext())
    assert "resumed" in words
    assert "url(http" not in words
    place = tmp_path / "no" / "out.svg"
    assert command(busy.path, "--svg", place)[::2] == (2, f"tui.py: cannot write {place}: No such file or directory\n")


def test_a_directory_of_runs_is_listed(several):
    code, out, _ = command(several[0].path.parent)
    assert code == 0
    assert all(run.name in out for run in several)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no/such/place/run"], "no such run: no/such/place/run"),
        (["absent", "--once"], "no such run: absent"),
        ([], "no such run: runs"),
        (["a", "b", "c", "d", "e"], "at most four runs can be compared, not 5"),
        (["--theme", "pink"], "no theme 'pink'; there are ansi, "),
        (["--svg", "x.svg", "--size", "abc"], "--size abc: columns x rows are wanted, as in 120x36"),
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
    assert command()[::2] == (2, "tui.py: no runs in runs\n")


def test_a_run_without_permission_is_one_line(tmp_path, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tui.os, "listdir", refuse)
    with pytest.raises(tui.typer.Exit) as stopped:
        tui.check(tmp_path, must_exist=False)
    assert stopped.value.exit_code == 2
    assert capsys.readouterr().err == f"tui.py: cannot read {tmp_path}: permission denied\n"


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
