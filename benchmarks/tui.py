"""What the dashboard costs, on synthetic runs that obey the contract of the run directory.

    python benchmarks/tui.py                                measure everything (about 2 minutes, 400 MB of disk)
    python benchmarks/tui.py make DIR --records 200000      only write a run, to look at
    python benchmarks/tui.py live DIR --rate 50             write one and let it grow
    python benchmarks/tui.py picture OUT.svg RUN [RUN]      the screen as a picture, as those in docs/

The measurements drive the real program in a pseudo-terminal of 120 x 36 cells and count what arrives there.
The runs are invented; their shape is not: losses fall with the learning rate's steps, gradient norms have a
heavy tail, epochs end in an epoch record and a checkpoint.
"""

import asyncio
import codecs
import fcntl
import json
import math
import os
import pty
import random
import re
import select
import signal
import socket
import struct
import sys
import tempfile
import termios
import time
from pathlib import Path
from typing import Annotated

import typer

RADII = [0.05, 0.5]
TUI = Path(__file__).resolve().parent.parent / "tui.py"
app = typer.Typer(add_completion=False)


def config(name: str, steps: int, epoch: int, created: float) -> dict:
    """config.json of a made-up run."""
    options = {
        **{"dataset": "cifar10", "method": "fd", "norm": "l2", "lam": 0.1, "h": 0.01, "model": "resnet18"},
        **{"activation": "gelu", "epochs": steps // epoch, "batch_size": 128, "seed": 0, "lr": 0.1},
    }
    return {
        **{"format": 1, "name": name, "command": "python train.py", "options": options, "created": created},
        **{"device": "cuda", "host": socket.gethostname(), "processes": 1, "steps_per_epoch": epoch},
        **{"steps_total": steps, "images_train": 50000, "images_test": 10000, "classes": 10},
        **{"attack_eps": 0.5, "omega_eps": RADII, "omega_method": "ascent"},
    }


class Writer:
    """Writes a run as a trainer does: whole lines, flushed; `gap` seconds of its clock between two records."""

    def __init__(self, path: Path, *, steps: int = 1_000_000, epoch: int = 5000, gap: float = 0.02, seed: int = 0):
        self.path, self.steps, self.epoch, self.gap = path, steps, epoch, gap
        self.random, self.step, self.start = random.Random(seed), 0, time.time()
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(config(path.name, steps, epoch, self.start)))
        self.file = open(path / "metrics.jsonl", "a", buffering=1 << 20)  # noqa: SIM115

    def line(self, kind: str, **fields) -> None:
        where = {"kind": kind, "step": self.step, "epoch": self.step / self.epoch}
        at = {"time": self.start + self.step * self.gap}
        self.file.write(json.dumps(where | at | fields) + "\n")

    def records(self, count: int) -> None:
        """Step records, with whatever an epoch's end adds; one step each."""
        for _ in range(count):
            self.step += 1
            self.record()
            if self.step % self.epoch == 0:
                self.end_epoch()
        self.file.flush()

    def level(self) -> float:
        """How much there is left to learn, from 1 to 0."""
        done = self.step / self.steps
        return math.exp(-9 * done) + (0.28 if done < 0.45 else 0.11 if done < 0.75 else 0.05)

    def record(self) -> None:
        noise, level, done = self.random.lognormvariate, self.level(), self.step / self.steps
        mean = (0.25 + 0.75 * math.exp(-4 * done)) * noise(0, 0.12)
        self.line(
            "step",
            **{"loss": 2.3 * level * noise(0, 0.18), "penalty": 0.05 * mean * mean * noise(0.2, 0.2)},
            **{"grad_norm_mean": mean, "grad_norm_max": mean * (2 + noise(0, 0.6))},
            **{"fd_error_pct": abs(self.random.gauss(0, 0.4)), "images_per_s": 25000 * noise(0, 0.03)},
            lr=0.1 if done < 0.45 else 0.01 if done < 0.75 else 0.001,
        )

    def end_epoch(self) -> None:
        noise, level = self.random.gauss, self.level()
        norm = 0.3 + 0.5 * math.exp(-4 * self.step / self.steps)
        self.line(
            "epoch",
            **{"test_loss": 2.3 * level + 0.18 + noise(0, 0.02), "clean_error_pct": 5 + 60 * level + noise(0, 0.7)},
            **{"attacked_error_pct": min(99.0, 26 + 75 * level + noise(0, 1))},
            **{"omega": [min(2, 6 * r**0.5 * norm * (1 + noise(0, 0.03))) for r in RADII]},
            **{"margin_grad_norm_mean": norm, "margin_grad_norm_max": norm * (4 + noise(0, 0.3))},
            seconds=self.epoch * self.gap,
        )
        self.line("event", event="checkpoint", message=f"checkpoint.pt at epoch {self.step // self.epoch}")

    def status(self, state: str = "running", phase: str = "train", error: str | None = None) -> None:
        known = {"state": state, "phase": phase, "pid": os.getpid(), "host": socket.gethostname()}
        known |= {"time": time.time(), "step": self.step, "error": error}
        temporary = self.path / "status.json.new"
        temporary.write_text(json.dumps(known))
        temporary.replace(self.path / "status.json")


@app.command()
def make(path: Path, records: int = 200_000, steps: int = 1_000_000) -> Writer:
    """Write a run whose last record is of this moment."""
    writer = Writer(path, steps=steps)
    writer.start = time.time() - records * writer.gap
    writer.records(records)
    writer.status()
    return writer


def grow(writer: Writer, seconds: float) -> None:
    """Let a run grow at the rate of its clock."""
    begun, first, beat = time.time(), writer.step, 0.0
    while (now := time.time()) < begun + seconds:
        writer.records(int((now - begun) / writer.gap) - (writer.step - first))
        if now > beat + 2:
            beat = now
            writer.status()
        time.sleep(0.02)


@app.command()
def live(path: Path, records: int = 0, rate: float = 50, seconds: float = 3600, steps: int = 1_000_000) -> None:
    """Write a run that grows by `rate` records a second, and finishes."""
    writer = Writer(path, steps=steps, gap=1 / rate)
    writer.start = time.time() - records * writer.gap
    writer.records(records)
    grow(writer, seconds)
    writer.status("finished")


class Screen:
    """As much of a terminal as the dashboard needs: it moves the cursor and writes characters."""

    TOKENS = re.compile(r"\x1b\[(\d+);(\d+)H|\x1b\[[0-?]*[ -/]*[@-~]|\x1b[^\[]|([^\x1b\x00-\x1f]+)|[\x00-\x1f]")

    def __init__(self, columns: int, rows: int):
        self.rows = [[" "] * columns for _ in range(rows)]
        self.x = self.y = 0
        self._rest = ""

    def feed(self, text: str) -> None:
        text = self._rest + text
        cut = text.rfind("\x1b")  # a sequence may be cut in two
        cut = len(text) if cut < 0 or re.match(r"\x1b\[[0-?]*[@-~]", text[cut:]) else cut
        text, self._rest = text[:cut], text[cut:]
        for token in self.TOKENS.finditer(text):
            if token[1]:
                self.y, self.x = int(token[1]) - 1, int(token[2]) - 1
            for char in token[3] or "":
                if self.y < len(self.rows) and self.x < len(self.rows[self.y]):
                    self.rows[self.y][self.x] = char
                self.x += 1

    @property
    def text(self) -> str:
        return "\n".join("".join(row) for row in self.rows)


class Terminal:
    """The dashboard in a pseudo-terminal."""

    def __init__(self, *arguments: str, columns: int = 120, rows: int = 36):
        self.begun, self.bytes = time.monotonic(), 0
        self.screen, self._decoder = Screen(columns, rows), codecs.getincrementaldecoder("utf-8")("replace")
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            known = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
            known |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
            os.execve(sys.executable, [sys.executable, str(TUI), *arguments], known)
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self, seconds: float) -> int:
        """Bytes that arrive within some time."""
        end, count = time.monotonic() + seconds, self.bytes
        while (left := end - time.monotonic()) > 0:
            if select.select([self.fd], [], [], left)[0]:
                received = os.read(self.fd, 1 << 16)
                self.bytes += len(received)
                self.screen.feed(self._decoder.decode(received))
        return self.bytes - count

    def wait(self, text: str, timeout: float = 60, gone: bool = False) -> float:
        """Seconds from now until `text` is on the screen, or gone from it."""
        begun = time.monotonic()
        while (text in self.screen.text) == gone:
            if time.monotonic() > begun + timeout:
                raise TimeoutError(f"{text!r} in {timeout} s:\n{self.screen.text}")
            self.read(0.004)
        return time.monotonic() - begun

    def press(self, key: str) -> None:
        os.write(self.fd, key.encode())

    def cpu(self) -> float:
        """Seconds of processor time so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_megabytes(self) -> float:
        line = next(x for x in Path(f"/proc/{self.pid}/status").read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.fd)


def measure_start(path: Path, n: int = 5) -> None:
    seconds, cpu = [], []
    for _ in range(n):
        terminal = Terminal(str(path))
        terminal.wait("1 loss")
        seconds.append(time.monotonic() - terminal.begun)
        cpu.append(terminal.cpu())
        terminal.close()
    print(f"start to first screen     {min(seconds):.2f} s least, {sorted(seconds)[n // 2]:.2f} s median of {n}")
    print(f"  processor time          {min(cpu):.2f} s least")


def measure_million(path: Path) -> None:
    writer = make(path, 1_000_000, 1_000_000)
    megabytes = (path / "metrics.jsonl").stat().st_size / 1e6
    terminal = Terminal(str(path))
    terminal.wait("1 loss")
    first = time.monotonic() - terminal.begun
    delays = []
    while f"step {writer.step:,}/" not in terminal.screen.text:
        terminal.press("c")
        delays.append(terminal.wait("1 loss", gone=True))
        terminal.press("c")
        delays.append(terminal.wait("1 loss"))
        terminal.read(1)
    done = time.monotonic() - terminal.begun
    print(f"1,000,000 lines, {megabytes:.0f} MB   first screen {first:.2f} s, all read {done:.2f} s")
    print(f"  processor time          {terminal.cpu():.2f} s")
    print(f"  key to picture          {max(delays) * 1e3:.0f} ms slowest of {len(delays)} while reading")
    terminal.read(3)
    print(f"  peak memory             {terminal.peak_megabytes():.0f} MB")
    terminal.close()


def measure_growth(path: Path, seconds: float = 30) -> None:
    writer = make(path, 200_000)
    if (child := os.fork()) == 0:
        grow(writer, seconds + 15)
        os._exit(0)
    terminal = Terminal(str(path))
    terminal.read(8)
    cpu, begun = terminal.cpu(), time.monotonic()
    count = terminal.read(seconds)
    share = (terminal.cpu() - cpu) / (time.monotonic() - begun)
    print(f"200,000 lines + 50/s      {share:.1%} of a core, {count / seconds / 1e3:.2f} kB/s to 120x36, at 2 Hz")
    print(f"  peak memory             {terminal.peak_megabytes():.0f} MB")
    terminal.close()
    os.waitpid(child, 0)


@app.command()
def picture(out: Path, runs: list[Path], size: str = "120x36") -> None:
    """Write the screen as an SVG that fetches no font."""
    sys.path.insert(0, str(TUI.parent))
    sys.modules.pop("tui", None)  # this file has the name of the module it measures
    from tui import Dash

    async def shoot() -> str:
        dash = Dash(runs)
        async with dash.run_test(size=tuple(map(int, size.split("x")))) as pilot:
            while not (dash.caught_up and dash.screen.query("FooterKey")):
                await pilot.pause(0.01)
            await pilot.pause()
            return dash.export_screenshot(title=" ", simplify=True)

    svg = re.sub(r"@font-face \{.*?\}", "", asyncio.run(shoot()), flags=re.DOTALL)
    out.write_text(svg.replace("Fira Code", "DejaVu Sans Mono, Menlo"))


@app.command()
def measure(only: Annotated[str, typer.Option(help="start, million or growth.")] = "") -> None:
    """Every figure of the README's table."""
    print(f"python {sys.version.split()[0]}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "small", 2000, 5000)
        steps = {
            "start": lambda: measure_start(Path(folder) / "small"),
            "million": lambda: measure_million(Path(folder) / "million"),
            "growth": lambda: measure_growth(Path(folder) / "growth"),
        }
        for name, step in steps.items():
            if only in ("", name):
                step()


@app.callback(invoke_without_command=True)
def default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        measure("")


if __name__ == "__main__":
    app()
