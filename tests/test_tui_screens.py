"""The dashboard as it runs: every key, every state, comparing, resizing, and what reaches a terminal."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_tui import benchmark, epoch, event, run_of, step, to_bytes

import tui

NOW = 1100.0


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


def drive(scenario, *paths, size=(120, 36), **options):
    """Run the application without a terminal and let `scenario` use it: await scenario(app, pilot, see)."""

    async def session():
        app = tui.Dash(paths, fps=6, clock=lambda: NOW, **options)
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


def test_every_key_in_a_session(runs):
    async def scenario(app, pilot, see):
        await see("● LIVE", "step 100/200", "1 loss", "5 error")
        for key, title in (("1", "1 loss"), ("2", "2 penalty"), ("5", "5 error")):
            other = "2 penalty" if key != "2" else "1 loss"
            await pilot.press(key)
            await see(title, "● LIVE", absent=[other, "─ events"])
            await pilot.press(key)
            await see(title, other, "─ events")
        await pilot.press("y")
        await see("nats ", " log ")
        assert app.view.log
        await pilot.press("plus")
        await see("last 1/2")
        await pilot.press("minus", "plus", "minus")
        await see("all steps")
        for back in ("c", "escape"):
            await pilot.press("c")
            await see("steps/s", "attacked 40.0 %", absent=["1 loss"])
            await pilot.press(back)
            await see("1 loss")
        await pilot.press("question_mark")
        await see("panel 9")  # Textual's help panel
        await pilot.press("escape")
        await see("1 loss", absent=["panel 9"])
        await pilot.press("q")
        assert app._exit

    drive(scenario, runs / "a")


def test_numbers_that_do_not_fit_are_scrolled(runs):
    async def scenario(app, pilot, see):
        await see("1 loss")
        await pilot.press("c")
        await see("● LIVE", "last    mean", absent=["error 4.00 %"])
        await pilot.press("end")
        await see("error 4.00 %", absent=["● LIVE"])
        await pilot.press("c")
        await see("● LIVE", "1 loss")

    drive(scenario, runs / "a", size=(60, 12))


def test_themes_are_chosen_from_textuals_palette(runs):
    def colours(app):
        return {str(segment.style.color) for y in range(30) for segment in app.pane.render_line(y) if segment.style}

    async def scenario(app, pilot, see):
        await see("1 loss", "^p palette")
        before = colours(app)
        assert len(before) > 8
        await pilot.press("ctrl+p")
        await see("Theme", "Screenshot")
        await pilot.press("escape")
        app.theme = "textual-light"
        await see("1 loss")
        await pilot.pause(0.1)
        assert not colours(app) & before
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
            assert any(hasattr(node, f"action_{name}") for node in (app, app.screen, app.pane)), (key, name)
            assert active.binding.description or not active.binding.show

    drive(scenario, runs / "a")


STATES = [
    ("○ WAITING", [], None, ["metrics.jsonl: no record yet"]),
    ("● LIVE", [step(100)], None, ["step 100/100"]),
    ("● LIVE", [step(9)], {"state": "running", "phase": "eval", "time": NOW}, ["eval"]),
    ("● LIVE", [], {"state": "running", "phase": "data", "time": NOW}, ["step 0/100", "data"]),
    ("◐ STALLED", [step(1), step(2)], None, ["no record for 0:01:38"]),
    ("✓ FINISHED", [step(100)], {"state": "finished"}, ["took"]),
    ("■ INTERRUPTED", [step(100)], {"state": "interrupted"}, ["--resume"]),
    ("✗ FAILED", [step(100)], {"state": "failed", "error": "CUDA out of memory"}, ["CUDA out of memory"]),
    ("✗ FAILED", [step(100)], {"state": "failed", "error": "CUDA out " * 20 + "the end"}, ["CUDA", "…", "the end"]),
    ("● LIVE", [step(99), step(100, loss=None, nonfinite=["loss"])], None, ["✗ NaN loss @100"]),
    ("● LIVE", [step(99), event(98, "resume"), step(99), step(100)], None, ["↻ resumed @98", "ETA"]),
]


@pytest.mark.parametrize(("word", "records", "status", "more"), STATES)
def test_every_state_is_visible_at_a_glance(tmp_path, word, records, status, more):
    run = run_of(tmp_path / "run", *records, status=status)
    first = tui.header(run, tui.facts(run, NOW), 78, "")[0].plain
    assert tui.cell_len(first) <= 78
    assert all(words in first for words in (word, *more))


def test_a_run_is_live_from_its_first_second(tmp_path):
    """status.json says that it runs: the dashboard, at step 0, with its phase; no waiting for a record."""
    run_of(
        tmp_path / "run", event(0, "start"), status={"state": "running", "phase": "data", "time": NOW, "host": "far"}
    )

    async def scenario(app, pilot, see):
        await see("● LIVE", "step 0/100", "data", "1 loss", "no data yet", "start", absent=["WAITING"])
        with open(tmp_path / "run" / "metrics.jsonl", "ab") as file:
            file.write(to_bytes(step(1, time=NOW)))
        await see("● LIVE", "step 1/100", "epoch 0.1/10")

    drive(scenario, tmp_path / "run", size=(80, 24))


def test_a_run_that_appears_grows_is_deleted_and_comes_back(tmp_path):
    path = tmp_path / "run"

    async def scenario(app, pilot, see):
        await see("○ WAITING", "no such run yet", "1 loss no data yet")
        path.mkdir()
        await see("metrics.jsonl: no such file")
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
        await see("○ WAITING", "no such file")
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


def test_a_long_log_is_drawn_after_its_first_slice_and_read_between_the_keys(tmp_path, monkeypatch):
    """The first screen does not wait for the end of a log of many slices, nor do keys."""
    run_of(tmp_path / "run", *(step(n) for n in range(1, 10_001)))
    monkeypatch.setattr(tui.Tail.__init__, "__defaults__", (tui.math.inf, 4096))  # hundreds of slices
    read, draw, pressed = [], tui.dashboard, []
    monkeypatch.setattr(tui, "dashboard", lambda runs, *how: read.append(runs[0].log.lines) or draw(runs, *how))

    async def scenario(app, pilot, see):
        press = app.action_press
        app.action_press = lambda key: pressed.append(app.runs[0].log.lines) or press(key)
        await pilot.press("3")
        await see("step 10,000", "3 gradient", absent=["reading", "1 loss"])

    drive(scenario, tmp_path / "run")
    assert 0 < next(lines for lines in read if lines) < 100
    assert pressed[0] < 9000


def test_growing_and_shrinking_terminals_are_filled(runs):
    async def scenario(app, pilot, see):
        for size, words, absent in (
            ((120, 36), ["1 loss", "5 error", "━ loss"], []),
            ((80, 24), ["1 loss", "4 modulus"], ["5 error", "━ loss"]),
            ((20, 5), ["40x10"], ["1 loss"]),
            ((120, 36), ["1 loss", "5 error"], ["40x10"]),
        ):
            await pilot.resize_terminal(*size)
            text = await see(*words, absent=absent)
            assert {len(line) for line in text.splitlines()} == {size[0]}

    drive(scenario, runs / "a")


def test_runs_are_compared_side_by_side_with_a_name_at_each_line(runs):
    async def scenario(app, pilot, see):
        text = await see("which is more robust?", "attacked %", "1 loss train", "─ events", "lam=0.1", "lam=1.0")
        assert [any(line.rstrip().endswith(f" {name}") for line in text.splitlines()) for name in "abc"] == [True] * 3
        await pilot.press("c")
        await see("last    mean", absent=["1 loss train"])

    drive(scenario, *(runs / name for name in "abc"), size=(140, 36))


# --- what reaches a terminal ------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("columns", "rows"), [(120, 36), (80, 24)])
def test_a_terminal_that_only_got_changes_shows_what_a_full_repaint_shows(tmp_path, columns, rows):
    """The program in a pseudo-terminal, beside a growing log: after many partial repaints no cell is wrong."""
    writer = benchmark.Writer(tmp_path / "run", steps=5000, epoch=100, gap=0.01)
    writer.start = time.time() - 5
    writer.records(250)
    terminal = benchmark.Terminal(str(writer.path), columns=columns, rows=rows)
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
        other.wait("palette")  # the footer comes last
        other.read(0.5)
        assert terminal.screen.text.splitlines() == other.screen.text.splitlines()
    finally:
        terminal.close()
        if other:
            other.close()


def test_ascii_means_all_of_the_screen(runs):
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
        "        while not app.caught_up:\n"
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
    assert kinds["step"] == common | set(tui.FIELDS["step"])
    omegas = {name for name in tui.SERIES if name.startswith("omega.")}
    assert kinds["epoch"] == common | set(tui.FIELDS["epoch"]) - omegas - {"top5_error_pct"} | {"omega", "seconds"}
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
