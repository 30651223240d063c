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
from test_tui import benchmark, epoch, event, run_of, step, to_bytes

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


def screen_text(app):
    """What the terminal would show."""
    return "\n".join(strip.text for strip in app.screen._compositor.render_strips())


def drive(scenario, *paths, size=(120, 36), clock=lambda: NOW, **options):
    """Run the application without a terminal and let `scenario` use it: await scenario(app, pilot, see)."""

    async def session():
        app = tui.Dash(list(paths), fps=6, clock=clock, **options)
        async with app.run_test(size=size, notifications=True) as pilot:

            async def see(*words, absent=()):
                """Wait until the words are on the screen (and others are not); the test's only clock."""
                for _ in range(200):
                    text = screen_text(app)
                    if all(word in text for word in words) and not any(word in text for word in absent):
                        return text
                    await pilot.pause(0.03)
                pytest.fail(f"{words} without {absent} is not in\n{text}")

            await scenario(app, pilot, see)

    asyncio.run(session())


def test_every_key_in_a_session(runs, tmp_path):
    async def scenario(app, pilot, see):
        await see("● LIVE", "step 100/200", "1 loss", "6 penalty share")
        board = app.screen
        for index, title in enumerate(("1 loss", "2 penalty", "3 gradient", "4 modulus", "5 error", "6 penalty share")):
            other = "2 penalty" if index != 1 else "1 loss"
            await pilot.press(str(index + 1))
            await see(title, "● LIVE", absent=[other, "─events"])
            assert (board.alone, board.at) == ("charts", index)
            await pilot.press(str(index + 1))
            await see(title, other, "─events")
        await pilot.press("tab")
        assert (board.at, board.focused.index) == (0, 0)
        await pilot.press("shift+tab")
        assert (board.at, board.focused.index) == (5, 5)
        await pilot.press("y", "Y", "x", "X", "]", "o", "m")
        assert board.view.logs == set(range(6))
        assert (board.view.axis, board.view.log_x, board.view.clip, board.view.extra) == ("epoch", True, False, 1)
        await see("log x", "all epochs", "mean of 10")
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
        for key, words, gone in (("e", "attacked 40.0 %", "1 loss"), ("c", "steps_total", "1 loss")):
            await pilot.press(key)
            await see(words, absent=[gone])
            await pilot.press("escape")
            await see("1 loss")
        await pilot.press("question_mark")
        await see("modulus of", "panel 6")  # Textual's help panel: terms and keys
        await pilot.press("escape")
        await see("6 penalty", absent=["modulus of"])
        await pilot.press("C")
        await see("path copied")
        assert app.clipboard == str((runs / "a").resolve())
        await pilot.press("w", "w")
        await see("101 records in", "a-2.csv")  # beside the run, the second one under another name
        assert len((runs / "a.csv").read_text().splitlines()) == 102
        await pilot.press("S")
        await see("a.svg")
        assert (runs / "a.svg").read_text().startswith("<svg")
        await pilot.press("p")
        await see("PAUSED")
        await pilot.press("p")
        await see("● LIVE", absent=["PAUSED"])
        await pilot.press("q")
        assert app._exit

    drive(scenario, runs / "a")


def test_themes_are_chosen_from_textuals_palette(runs):
    async def scenario(app, pilot, see):
        await see("1 loss")
        before = app.styles_by_role["c0"]
        await pilot.press("t")
        await pilot.press(*"light")
        await see("light")
        app.pop_screen()
        app.theme = "light"
        await see("1 loss")
        assert app.styles_by_role["c0"] != before
        await pilot.press("question_mark")
        await pilot.press("ctrl+c")  # quits from everywhere
        assert app._exit

    drive(scenario, runs / "a")


def test_every_key_of_the_footer_and_the_help_does_something(runs):
    """Each binding names an action that there is."""

    async def scenario(app, pilot, see):
        await see("1 loss")
        for key, active in app.screen.active_bindings.items():
            name = active.binding.action.partition("(")[0].rpartition(".")[2]
            assert any(hasattr(node, f"action_{name}") for node in (app, app.screen)), (key, name)
            assert active.binding.description or not active.binding.show

    drive(scenario, runs / "a")


STATES = [
    ("○ WAITING", [], None, []),
    ("● LIVE", [step(100)], None, ["ETA"]),
    ("● LIVE", [step(9)], {"state": "running", "phase": "eval", "time": NOW}, ["eval"]),
    ("● LIVE", [], {"state": "running", "phase": "data", "time": NOW}, ["step 0/100", "data"]),
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
    run = run_of(tmp_path / "run", *records, status=status)
    first = "".join(text for text, _ in tui.top([run], tui.View(smooth=1), 78, NOW)[0])
    assert tui.cell_len(first) <= 78
    assert all(words in first for words in (word, *more))


def test_a_run_is_live_from_its_first_second(tmp_path):
    """status.json says that it runs: the dashboard, at step 0, with its phase; no waiting for a record."""
    run_of(
        tmp_path / "run", event(0, "start"), status={"state": "running", "phase": "data", "time": NOW, "host": "far"}
    )

    async def scenario(app, pilot, see):
        await see("● LIVE", "step 0/100", "data", "1 loss", "no data yet", "start", absent=["waiting"])
        with open(tmp_path / "run" / "metrics.jsonl", "ab") as file:
            file.write(to_bytes(step(1, time=NOW)))
        await see("● LIVE", "step 1/100", "epoch 0.1/10")

    drive(scenario, tmp_path / "run", size=(80, 24))


def test_a_run_that_appears_grows_is_deleted_and_comes_back(tmp_path):
    path = tmp_path / "run"

    async def scenario(app, pilot, see):
        await see("○ WAITING", "no such run yet")
        path.mkdir()
        await see("metrics.jsonl does not exist yet")
        (path / "metrics.jsonl").write_bytes(to_bytes(step(1))[:-5])
        await see("no record yet", "waiting for", "python train.py")
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
        assert "step 100" in screen_text(app)
        await pilot.press("p")
        await see("step 150")

    drive(scenario, runs / "a")


def test_a_long_log_is_read_between_the_keys(tmp_path, monkeypatch):
    """Keys are answered before a log of many slices has been read."""
    run_of(tmp_path / "run", *(step(n) for n in range(1, 10_001)))
    monkeypatch.setattr(tui.Tail.__init__, "__defaults__", (4096, tui.math.inf))  # hundreds of slices

    loaded = []

    async def scenario(app, pilot, see):
        board = app.screen
        alone = board.action_alone
        board.action_alone = lambda part, at: loaded.append(board.runs[0].loaded) or alone(part, at)
        await pilot.press("3")
        await see("step 10,000", "3 gradient", absent=["reading", "1 loss"])

    drive(scenario, tmp_path / "run")
    assert loaded[0] < 0.9


CHARTS = {(120, 36): 6, (80, 24): 4, (71, 24): 2, (40, 12): 1, (20, 5): 0}


def test_as_many_charts_as_there_is_room_for_and_always_the_one_in_focus(runs):
    async def scenario(app, pilot, see):
        for size, count in CHARTS.items():
            await pilot.resize_terminal(*size)
            await see(*(["1 loss"] if count else ["too small", "40x10"]), absent=[] if count else ["1 loss"])
            await pilot.pause()
            shown = [chart for chart in app.screen.charts if chart.display and chart.region.area]
            assert len(shown) == count or not count
            boxes = [chart.region for chart in shown]
            assert not any(a.overlaps(b) for a in boxes for b in boxes if a is not b)
            for _ in range(tui.COUNT if size == (71, 24) else 0):
                await pilot.press("tab")
                await pilot.pause()
                assert app.screen.focused.index == app.screen.at
                assert app.screen.focused.display

    drive(scenario, runs / "a")


def test_the_mouse_points_focuses_and_zooms(runs):
    async def scenario(app, pilot, see):
        await see("1 loss", "2 penalty")
        board = app.screen
        chart = board.charts[1]
        await pilot.mouse_down(chart, offset=(tui.GUTTER + 10, 3))
        assert board.at == 1
        assert 0 < board.view.cursor < 100
        await see("2 penalty", "[")
        left, right = tui.x_range(board.runs, board.view)
        chart.on_mouse_scroll_up(SimpleNamespace(x=tui.GUTTER + 10, y=3, button=0))
        assert board.view.zoom[1] - board.view.zoom[0] == pytest.approx(0.5 * (right - left))
        before = board.view
        await pilot.mouse_down("#top", offset=(2, 0))
        assert board.view is before  # there is no chart under the header

    drive(scenario, runs / "a")


# --- picker and comparing ---------------------------------------------------------------------------------


def test_pick_filter_open_and_come_back(runs):
    async def scenario(app, pilot, see):
        await see("3 of 3", "LIVE")
        await pilot.press("slash", "b")
        await see("1 of 3")
        await pilot.press("enter", "enter")
        text = await see("● LIVE   b", "1 loss")
        assert "step 100/200" in text
        await pilot.press("r")
        await see("3 of 3", "lam=0.1")  # a differs from b, which is open
        await pilot.press("escape")
        await see("● LIVE   b", "1 loss")

    drive(scenario, runs, pick=True)


def test_names_in_the_list_are_whole(runs):
    name = "imagenet-resnet50-fd-linf-lam0.01-h0.001-seed12"
    for seed in "12":
        run_of(runs / f"{name}{seed}", step(1))

    async def scenario(app, pilot, see):
        await see(f"{name}1", f"{name}2")

    drive(scenario, runs, pick=True, size=(80, 24))


def test_mark_two_and_compare(runs):
    async def scenario(app, pilot, see):
        await see("3 of 3")
        names = [run.name for run in app.screen.runs]
        await pilot.press("space", "down", "space")
        await see("◆")
        await pilot.press("enter")
        await see("which is more robust?", "attacked %", "what differs", "lam")
        assert [run.name for run in app.screen.runs] == [names[0], names[2]]
        await pilot.press("m")
        await see("1 loss test")
        await pilot.press("w")
        await see("records in")
        assert sorted(path.name for path in runs.glob("*.csv")) == sorted(
            f"{name}.csv" for name in (names[0], names[2])
        )
        await pilot.press("c")
        await see("what differs", "last value", absent=["1 loss"])

    drive(scenario, runs, pick=True)


def test_comparing_from_the_command_line_and_opening_one_keeps_what_was_read(runs):
    async def scenario(app, pilot, see):
        await see("which is more robust?", " a ", " b ", " c ")
        first = {run.name: run for run in app.screen.runs}
        await pilot.press("r")
        await see("3 of 3")
        picked = Path(app.screen.current).name
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


def test_the_list_reads_only_the_ends_of_long_logs_then_what_is_new(runs, monkeypatch):
    run_of(runs / "long", *(step(n) for n in range(1, 9000)), epoch(9000))
    shelf = tui.Shelf(runs)
    first = {run.name: run for run in shelf.read()}
    long = first["long"]
    assert long.step == 9000
    assert long.log.lines < 5000
    assert tui.last_value(long, tui.SERIES["clean_error_pct"]) == 4
    with open(runs / "b" / "metrics.jsonl", "ab") as file:
        file.write(to_bytes(step(101, time=9e9)))
    second = shelf.read()
    assert second[0].name == "b"  # the latest first
    assert all(run is first[run.name] for run in second)
    (runs / "latest").symlink_to("a")
    (runs / "latest.txt").write_text("a")
    assert len(shelf.read()) == 4


# --- what reaches a terminal ------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("columns", "rows"), [(120, 36), (80, 24)])
def test_a_terminal_that_only_got_changes_shows_what_a_full_repaint_shows(tmp_path, columns, rows):
    """The program in a pseudo-terminal, beside a growing log: after many partial repaints no cell is wrong."""
    writer = benchmark.Writer(tmp_path / "run", steps=5000, epoch=100, gap=0.01)
    writer.start = time.time() - 5
    writer.records(250)
    terminal = benchmark.Terminal(str(writer.path), "--fps", "20", columns=columns, rows=rows)
    other = None
    try:
        terminal.wait("step 250/")
        for _ in range(5):
            writer.records(25)
            terminal.wait(f"step {writer.step:,}/")
        writer.line("event", event="warning", message="the end")
        writer.file.flush()
        writer.status("finished")
        terminal.wait("FINISHED")
        terminal.wait("the end")
        terminal.read(0.3)
        other = benchmark.Terminal(str(writer.path), columns=columns, rows=rows)
        other.wait("the end")
        other.read(0.5)
        assert terminal.screen.text.splitlines() == other.screen.text.splitlines()
    finally:
        terminal.close()
        if other:
            other.close()


def test_ascii_means_all_that_is_sent(runs):
    async def scenario(app, pilot, see):
        text = await see("* LIVE", "1 loss")
        assert text.isascii()

    drive(scenario, runs / "a", ascii_only=True)


def test_no_color_takes_the_colours_away(tmp_path):
    run_of(tmp_path / "run", *(step(n) for n in range(1, 50)))
    code = (
        "import asyncio, sys, tui; from pathlib import Path\n"
        "async def main():\n"
        "    app = tui.Dash([Path(sys.argv[1])])\n"
        "    async with app.run_test(size=(100, 30)) as pilot:\n"
        "        while not app.screen.caught_up:\n"
        "            await pilot.pause(0.01)\n"
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
    assert kinds["step"] == common | set(tui.GIVEN["step"])
    assert kinds["epoch"] == common | set(tui.GIVEN["epoch"]) - {"top5_error_pct"} | {"omega"}
    assert kinds["event"] == common | {"event", "message"}
    assert json.loads((writer.path / "status.json").read_text())["state"] == "running"


def test_it_ends_with_a_terminal_that_goes_without_a_signal(runs):
    """As when the program that held the terminal was killed: nobody is left to read for, or to write to."""
    ours, its = os.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), its)
    how = {"env": os.environ | {"TERM": "xterm"}, "start_new_session": True}
    process = subprocess.Popen([sys.executable, tui.__file__, runs / "a"], **streams, **how)
    os.close(its)
    drawn = b""
    while b"loss" not in drawn:
        drawn += os.read(ours, 65536)
    os.close(ours)
    try:
        assert process.wait(timeout=60) == 1
    finally:
        process.kill()
