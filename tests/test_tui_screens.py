"""The dashboard as it runs: every key, every state, the picker, comparing, resizing, and what reaches a terminal."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_tui import benchmark, epoch, event, run_of, step, text_of, to_bytes

import tui

NOW = 1100.0
HOST = tui.socket.gethostname()


@pytest.fixture
def runs(tmp_path):
    """Three runs under one directory, the last record of each at time NOW."""
    for name, lam, scale in (("a", 0.1, 1.0), ("b", 1.0, 2.0), ("c", 1.0, 3.0)):
        records = [step(n, loss=scale / n) for n in range(1, 101)] + [epoch(100)]
        run_of(tmp_path / "runs" / name, *records, options={"lam": lam, "norm": "l2"}, steps_total=200)
    return tmp_path / "runs"


def drive(scenario, *paths, size=(120, 36), clock=lambda: NOW, **options):
    """Run the application without a terminal and let `scenario` use it: await scenario(app, pilot, see)."""

    async def session():
        app = tui.Dash(list(paths), fps=20, clock=clock, **options)
        async with app.run_test(size=size) as pilot:

            async def see(*words, absent=()):
                """Wait until the words are on the screen (and others are not); the test's only clock."""
                for _ in range(400):
                    text = text_of(app.screen.shown) if isinstance(app.screen, tui.Page) else ""
                    if all(word in text for word in words) and not any(word in text for word in absent):
                        return text
                    await pilot.pause(0.01)
                pytest.fail(f"{words} without {absent} is not in\n{text}")

            await scenario(app, pilot, see)

    asyncio.run(session())


def test_every_key_in_a_session(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    async def scenario(app, pilot, see):
        await see("● LIVE", "step 100/200", "1 loss", "6 penalty share")
        board = app.screen
        for key in "123456":
            await pilot.press(key)
            assert board.view.full
            assert board.view.focus == int(key) - 1
            await pilot.press(key)
            assert not board.view.full
        await pilot.press("tab")
        assert board.view.focus == 0
        await pilot.press("shift+tab")
        assert board.view.focus == 5
        await pilot.press("y", "Y", "x", "X", "]", "o", "m")
        assert board.view.logs == set(range(6))
        assert (board.view.axis, board.view.log_x, board.view.clip, board.view.extra) == ("epoch", True, False, 1)
        await see("finite difference", "log x")
        await pilot.press("x")
        await see("all times")
        await pilot.press("x", "X", "f")
        await see("last 50 steps")
        await pilot.press("plus")
        await see("zoomed")
        before = board.view.zoom
        await pilot.press("full_stop")
        assert board.view.zoom[0] > before[0]
        await pilot.press("comma", "minus", "0")
        await see("all steps")
        await pilot.press("left", "shift+left", "right")
        assert board.view.cursor is not None
        await pilot.press("escape")
        assert board.view.cursor is None
        for key, words in (("question_mark", "modulus of continuity"), ("e", "attacked 40.0 %"), ("c", "steps_total")):
            await pilot.press(key)
            await see(words, "back")
            await pilot.press("escape")
            await see("1 loss")
        await pilot.press("C")
        await see("path copied")
        assert app.clipboard == str((runs / "a").resolve())
        await pilot.press("w")
        await see("records in a.csv")
        assert len((tmp_path / "a.csv").read_text().splitlines()) == 102
        await pilot.press("S")
        await see("picture in dashboard.svg")
        assert (tmp_path / "dashboard.svg").read_text().startswith("<svg")
        await pilot.press("S")
        await see("picture in dashboard-2.svg")
        for name in ("light", "ansi", "dark"):
            await pilot.press("t")
            assert app.colours.name == name
        await pilot.press("p")
        await see("PAUSED")
        await pilot.press("p")
        await see("● LIVE", absent=["PAUSED"])
        await pilot.press("q")
        assert not app.is_running or app._exit

    drive(scenario, runs / "a")


def test_every_key_of_the_help_is_taken(runs):
    """No key that the help or the footer names falls through to nothing."""
    named = {word for item in tui.FOOTER.split(",") for word in item.split()[:-1]} - {"1-6", "←", "→"}
    named |= {"Y", "X", "o", ",", ".", "0", "C", "c", "h", *"123456"}

    async def scenario(app, pilot, see):
        await see("1 loss")
        board = app.screen
        monkey = {key: board.command(key) or app.command(key) for key in sorted(named - {"q", "w", "S", "C"})}
        assert all(monkey.values()), monkey

    drive(scenario, runs / "a")


def test_control_c_quits_from_everywhere(runs):
    async def scenario(app, pilot, see):
        await see("1 loss")
        await pilot.press("question_mark")
        await see("keys and terms")
        await pilot.press("ctrl+c")
        assert app._exit

    drive(scenario, runs / "a")


STATES = [
    ("○ WAITING", [], None, ["waiting for", "python train.py"]),
    ("○ WAITING", None, None, ["no such run yet"]),
    ("● LIVE", [step(100)], None, ["ETA"]),
    ("● LIVE", [step(9)], {"state": "running", "phase": "eval", "time": NOW}, ["eval"]),
    ("◐ STALLED", [step(1), step(2)], None, ["no record for 1m 38s"]),
    ("✓ FINISHED", [step(100)], {"state": "finished"}, ["took"]),
    ("■ INTERRUPTED", [step(100)], {"state": "interrupted"}, ["--resume"]),
    ("✗ FAILED", [step(100)], {"state": "failed", "error": "CUDA out of memory"}, ["CUDA out of memory"]),
    ("? GONE", [step(100)], {"state": "running", "pid": 2**22 + 1, "host": HOST}, ["process 4194305 is gone"]),
    ("● LIVE", [step(99), step(100, loss=None, nonfinite=["loss"])], None, ["✗ NaN loss @100"]),
    ("● LIVE", [step(99), event(98, "resume"), step(99), step(100)], None, ["↻ resumed @98"]),
]


@pytest.mark.parametrize(("word", "records", "status", "more"), STATES)
def test_every_state_is_visible_at_a_glance(tmp_path, word, records, status, more):
    if records is not None:
        run_of(tmp_path / "run", *records, status=status)
    seen = []

    async def scenario(app, pilot, see):
        seen.append(await see(word, *more))

    drive(scenario, tmp_path / "run", size=(80, 24))
    assert word in seen[0].splitlines()[0]


def test_a_run_that_appears_grows_is_deleted_and_comes_back(tmp_path):
    path = tmp_path / "run"

    async def scenario(app, pilot, see):
        await see("no such run yet")
        path.mkdir()
        await see("metrics.jsonl does not exist yet")
        (path / "metrics.jsonl").write_bytes(to_bytes(step(1))[:-5])
        await see("no record yet")
        with open(path / "metrics.jsonl", "ab") as file:
            file.write(to_bytes(step(1))[-5:] + to_bytes(step(2)))
        await see("step 2")
        (path / "metrics.jsonl").write_bytes(to_bytes(step(7)))
        await see("step 7")
        shutil.rmtree(path)
        await see("○ DELETED", "step 7")
        run_of(path, step(31), step(32))
        await see("step 32/100", absent=["DELETED"])

    drive(scenario, path)


def test_latest_moves_on_to_the_next_run(runs, tmp_path):
    latest = runs / "latest"
    latest.symlink_to("a")

    async def scenario(app, pilot, see):
        await see("● LIVE   a ", "step 100/200")
        run_of(runs / "d", step(1), step(2), steps_total=50)
        (runs / "d" / "metrics.jsonl").rename(runs / "d" / "later")
        (runs / "new").symlink_to("d")
        (runs / "new").replace(latest)
        await see("waiting for", "metrics.jsonl does not exist yet")
        (runs / "d" / "later").rename(runs / "d" / "metrics.jsonl")
        await see("d  ", "step 2/50")

    drive(scenario, latest)


def test_unreadable_files_are_said_on_the_screen(runs, monkeypatch):
    async def scenario(app, pilot, see):
        await see("step 100")

        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(tui, "open", refuse, raising=False)
        await see("metrics.jsonl: permission denied", "step 100")

    drive(scenario, runs / "a")


def test_reading_goes_on_while_the_picture_is_held(runs):
    async def scenario(app, pilot, see):
        await see("step 100")
        await pilot.press("p")
        await see("PAUSED")
        with open(runs / "a" / "metrics.jsonl", "ab") as file:
            file.write(to_bytes(step(150)))
        while app.screen.runs[0].step != 150:
            await pilot.pause(0.01)
        assert "step 100" in text_of(app.screen.shown)
        await pilot.press("p")
        await see("step 150")

    drive(scenario, runs / "a")


def test_a_long_log_is_read_between_the_keys(tmp_path, monkeypatch):
    """Keys are answered before a log of many slices has been read."""
    run_of(tmp_path / "run", *(step(n) for n in range(1, 30_001)))
    monkeypatch.setattr(tui.Tail.__init__, "__defaults__", (4096,))  # a thousand slices

    loaded = []

    async def scenario(app, pilot, see):
        command = app.screen.command
        app.screen.command = lambda key: loaded.append(app.screen.runs[0].loaded) or command(key)
        await pilot.press("3")
        await see("step 30,000", "3 gradient", absent=["reading"])
        assert app.screen.view.full

    drive(scenario, tmp_path / "run")
    assert loaded[0] < 0.9


@pytest.mark.parametrize("size", [(80, 24), (40, 12), (20, 5), (200, 60)])
def test_resizing_redraws_every_cell(runs, size):
    async def scenario(app, pilot, see):
        await see("1 loss")
        await pilot.resize_terminal(*size)
        await see("terminal too small"[: size[0]] if size[0] < 40 or size[1] < 10 else "1 loss")
        for _ in range(400):
            painted = [strip.text for strip in app.screen._compositor.render_strips()]
            if [len(line) for line in painted] == [size[0]] * size[1] and painted == text_of(app.screen.shown).split(
                "\n"
            ):
                return
            await pilot.pause(0.01)
        assert painted == text_of(app.screen.shown).split("\n")

    drive(scenario, runs / "a")


def test_the_mouse_points_focuses_and_zooms(runs):
    async def scenario(app, pilot, see):
        await see("1 loss")
        board = app.screen
        box = tui.layout(board.view, 120, 36).boxes[1]
        await pilot.mouse_down(offset=(box.x + tui.GUTTER + 10, box.y + 3))
        assert board.view.focus == 1
        assert 0 < board.view.cursor < 100
        await see("2 penalty", "[")
        zoom = tui.x_range(board.runs, board.view, 50)
        board.on_mouse_scroll_up(SimpleNamespace(screen_x=box.x + tui.GUTTER + 10, screen_y=box.y + 3))
        assert board.view.zoom[1] - board.view.zoom[0] == pytest.approx(0.8 * (zoom[1] - zoom[0]), rel=0.2)
        before = board.view
        await pilot.mouse_down(offset=(0, 0))
        assert board.view is before  # there is no chart under the header

    drive(scenario, runs / "a")


# --- picker and comparing ---------------------------------------------------------------------------------


def test_pick_filter_open_and_come_back(runs):
    async def scenario(app, pilot, see):
        await see("3 of 3", "LIVE")
        await pilot.press("slash", "b", "enter")
        await see("1 of 3", "/b")
        await pilot.press("enter")
        text = await see("● LIVE   b", "1 loss")
        assert "step 100/200" in text
        await pilot.press("r")
        await see("3 of 3", "lam=0.1")  # a differs from b, which is open
        await pilot.press("escape")
        await see("● LIVE   b", "1 loss")

    drive(scenario, runs, pick=True)


def test_mark_two_and_compare(runs, monkeypatch):
    async def scenario(app, pilot, see):
        await see("3 of 3")
        names = [run.name for run in app.screen.matching]
        await pilot.press("space", "down", "space")
        await see("◆")
        await pilot.press("enter")
        first, last = names[0], names[2]
        await see(f"━ {first} ", f"━ {last} ", "what differs", "lam")
        await pilot.press("m")
        await see("1 loss test")
        await pilot.press("w")
        await see("records in")

    monkeypatch.chdir(runs)
    drive(scenario, runs, pick=True)


def test_comparing_from_the_command_line_and_opening_one_keeps_what_was_read(runs):
    async def scenario(app, pilot, see):
        await see("━ a ", "━ b ", "━ c ")
        first = {run.name: run for run in app.screen.runs}
        await pilot.press("r")
        await see("3 of 3")
        picked = app.screen.matching[0].name
        await pilot.press("enter")
        await see(f"● LIVE   {picked}")
        assert app.screen.runs == [first[picked]]

    drive(scenario, runs / "a", runs / "b", runs / "c")


def test_no_runs_yet_is_a_calm_screen_that_notices_the_first(tmp_path):
    async def scenario(app, pilot, see):
        await see("no runs in", "python train.py")
        await pilot.press("enter", "space", "down")  # nothing to open, nothing happens
        run_of(tmp_path / "runs" / "first", step(1))
        await see("1 of 1", "first")
        await pilot.press("q")
        assert app._exit

    drive(scenario, tmp_path / "runs", pick=True)


def test_the_picker_reads_little_of_a_long_log(tmp_path, monkeypatch):
    run_of(tmp_path / "run", epoch(1), *(step(n) for n in range(2, 5000)))
    run = tui.glance(tmp_path / "run", size=2000)
    assert run.step == 4999
    assert run.log.lines < 40
    assert tui.last_value(run, tui.SERIES["clean_error_pct"]) == 4


def test_the_shelf_reads_again_only_what_changed(runs):
    shelf = tui.Shelf(runs)
    first = {run.name: run for run in shelf.read()}
    os.utime(runs / "b" / "metrics.jsonl", (2e9, 2e9))
    second = shelf.read()
    assert second[0].name == "b"
    assert [run is first[run.name] for run in second] == [False, True, True]
    (runs / "latest").symlink_to("a")
    assert len(shelf.read()) == 3


# --- what reaches a terminal ------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("columns", "rows"), [(120, 36), (80, 24)])
def test_a_terminal_that_only_got_changes_shows_what_a_full_repaint_shows(tmp_path, columns, rows):
    """The program in a pseudo-terminal, beside a growing log: after many partial repaints no cell is wrong."""
    writer = benchmark.Writer(tmp_path / "run", steps=5000, epoch=100, gap=0.01)
    writer.start = time.time() - 5
    writer.records(250)
    terminal = benchmark.Terminal(str(writer.path), "--fps", "20", columns=columns, rows=rows)
    try:
        terminal.wait("step 250/")
        for _ in range(12):
            writer.records(25)
            terminal.wait(f"step {writer.step:,}/")
        writer.line("event", event="warning", message="the end")
        writer.file.flush()
        writer.status("finished")
        terminal.wait("FINISHED")
        terminal.wait("the end")
        terminal.read(0.3)
        view, run = tui.View(), tui.Run(writer.path).read_all()
        expected = text_of(tui.dashboard([run], view, columns, rows, time.time()))
        assert terminal.screen.text.splitlines() == expected.splitlines()
    finally:
        terminal.close()


def test_no_color_takes_the_colours_away(tmp_path):
    run_of(tmp_path / "run", *(step(n) for n in range(1, 50)))
    code = (
        "import asyncio, sys, tui; from pathlib import Path\n"
        "async def main():\n"
        "    app = tui.Dash([Path(sys.argv[1])])\n"
        "    async with app.run_test(size=(100, 30)) as pilot:\n"
        "        await pilot.pause(0.5)\n"
        "        strips = app.screen._compositor.render_strips()\n"
        "        print({s.style.color.triplet for t in strips for s in t if s.style and s.style.color})\n"
        "asyncio.run(main())"
    )
    root = Path(tui.__file__).parent
    line = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(
        line, cwd=root, env=os.environ | {"NO_COLOR": "1"}, capture_output=True, text=True, check=True
    )
    triplets = [tuple(map(int, t)) for t in re.findall(r"red=(\d+), green=(\d+), blue=(\d+)", done.stdout)]
    assert len(triplets) > 3
    assert all(max(t) - min(t) <= 1 for t in triplets)


def test_the_benchmarks_runs_obey_the_contract(tmp_path):
    """What the figures are measured on has every field that the README documents for a record."""
    writer = benchmark.make(tmp_path / "run", 120, 1000)
    writer.end_epoch()
    writer.file.flush()
    records = [json.loads(line) for line in (writer.path / "metrics.jsonl").read_text().splitlines()]
    kinds = {record["kind"]: set(record) for record in records}
    common = {"kind", "step", "epoch", "time"}
    assert kinds["step"] == common | set(tui.STEP_FIELDS)
    assert kinds["epoch"] == common | set(tui.EPOCH_FIELDS) | {"omega"}
    assert kinds["event"] == common | {"event", "message"}
    assert json.loads((writer.path / "status.json").read_text())["state"] == "running"
