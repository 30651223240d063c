"""Anybody's network, FILE.py:FACTORY: whatever is in the file, the right network comes out, or one line."""

import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import data
import evaluate
import models
import runs
import train

ROOT = Path(__file__).resolve().parent.parent
NET = "import torch\nfrom torch import nn\ndef net(n=3): return nn.Sequential(nn.Flatten(), nn.Linear(4, n))\n"
IMAGES = torch.rand(5, 1, 2, 2)


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def refused(spec, classes=3):
    """The one line in which a spec is refused."""
    with pytest.raises(runs.Unusable) as error:
        models.from_file(str(spec), classes=classes)
    assert "\n" not in str(error.value)
    assert str(spec) in str(error.value)
    assert error.value.code == 2
    return str(error.value)


# --- whose modules -----------------------------------------------------------------------------------------

# A repository as many are: its modules have the names of ours, and data has no __init__.py; some are imported in
# forward, one by its name.
REPOSITORY = {
    "net.py": """
from __future__ import annotations
import importlib
from dataclasses import dataclass
import utils
from data.kind import WHO as data_is
from models import Net
from models.blocks import WHO as blocks_is
import runs, train


@dataclass
class Config:
    width: int = 2


def build():
    attacks = importlib.import_module("attacks")
    return Net(Config().width, [utils.WHO, data_is, blocks_is, runs.WHO, train.WHO, attacks.WHO])
""",
    "models/__init__.py": """
from torch import nn
from .blocks import WHO


class Net(nn.Linear):
    def __init__(self, width, heard):
        super().__init__(width, 3)
        self.heard = [WHO, *heard]

    def forward(self, x):
        import bounds
        from data.late import WHO as late
        import models.late2
        self.heard += [bounds.WHO, late, models.late2.WHO]
        return super().forward(x)
""",
    **dict.fromkeys(["utils.py", "models/blocks.py", "models/late2.py", "runs.py", "train.py"], 'WHO = "{who}"'),
    **dict.fromkeys(["attacks/__init__.py", "bounds.py", "data/kind.py", "data/late.py"], 'WHO = "{who}"'),
}


def repository(folder, who):
    return write(folder / who, {name: text.replace("{who}", who) for name, text in REPOSITORY.items()})


def test_every_repository_finds_its_own_modules_whatever_their_names_and_we_keep_ours(tmp_path):
    ours = {name: sys.modules[name] for name in models.OURS if name in sys.modules}
    path, finders = sys.path[:], sys.meta_path[:]
    one, two = (models.from_file(f"{repository(tmp_path, who)}/net.py:build", classes=3) for who in ("one", "two"))
    for network, who in ((one, "one"), (two, "two"), (one, "one")):
        network(torch.rand(1, 2))
        assert set(network.heard) == {who}
        assert {name: sys.modules[name] for name in models.OURS if name in sys.modules} == ours
        assert (sys.path, sys.meta_path) == (path, finders)
    assert len(one.heard) == 7 + 6
    import bounds  # perhaps for the first time

    assert bounds.__file__ == str(ROOT / "bounds.py")


LOOK = """
from torch import nn


def look():
    import NAMES
    return [FILES]


class Net(nn.Module):
    heard = [look()]

    def forward(self, x):
        self.heard.append(look())
        return x


def build():
    network = Net()
    network.heard.append(look())
    return network
"""


@pytest.mark.parametrize("shape", ["{}.py", "{}/__init__.py", "{}/part.py"])  # a module, a package, a namespace
def test_every_name_of_ours_may_be_theirs(tmp_path, shape):
    """Imported while the file runs, in the factory, and in forward, on a second call as on the first."""
    assert {path.stem for path in ROOT.glob("*.py")} <= models.OURS
    names = [name + ".part" * ("part" in shape) for name in sorted(models.OURS)]
    text = LOOK.replace("NAMES", ", ".join(names)).replace("FILES", ", ".join(f"{name}.__file__" for name in names))
    write(tmp_path, {"net.py": text} | {shape.format(name): "" for name in models.OURS})
    network = models.from_file(f"{tmp_path}/net.py:build", classes=3)
    network(IMAGES), network(IMAGES)
    assert network.heard == [[str(tmp_path / shape.format(name)) for name in sorted(models.OURS)]] * 4
    assert sys.modules["models"] is models


def test_what_a_user_has_not_got_he_gets_from_us_once(tmp_path):
    """And ours stay what they are."""
    text = """
import models, data, runs
from models import cnn


def build():
    models.seen = data, runs, cnn
    return cnn(3)
"""
    write(tmp_path, {"net.py": text})
    specs = [module.__spec__ for module in (models, data, runs)]
    models.from_file(f"{tmp_path}/net.py:build", classes=3)
    assert models.seen == (data, runs, models.cnn)
    assert [module.__spec__ for module in (models, data, runs)] == specs


def test_a_file_may_put_a_repository_on_its_path(tmp_path):
    repository(tmp_path, "one")
    text = f"import sys\nsys.path.insert(0, {str(tmp_path / 'one')!r})\nfrom net import build\n"
    write(tmp_path / "elsewhere", {"wrapper.py": text})
    network = models.from_file(f"{tmp_path}/elsewhere/wrapper.py:build", classes=3)
    network(torch.rand(1, 2))
    assert set(network.heard) == {"one"}


def test_a_file_may_unpickle_a_whole_network_of_its_own_modules(tmp_path):
    """Its classes are found by the names of their modules, in a file that the user chose to load."""
    text = f"""
import torch
from models import Net
PLACE = {str(tmp_path / "net.pt")!r}
def save():
    torch.save(Net(2, ["saved"]), PLACE)
    return Net(2, [])
def build():
    return torch.load(PLACE, weights_only=False)
"""
    write(repository(tmp_path, "one"), {"whole.py": text})
    for factory in ("save", "build"):
        network = models.from_file(f"{tmp_path}/one/whole.py:{factory}", classes=3)
    network(torch.rand(1, 2))
    assert set(network.heard) == {"one", "saved"}


def test_a_file_may_join_networks_of_two_repositories(tmp_path):
    for who in ("one", "two"):
        repository(tmp_path, who)
    text = """
import utils
from models import from_file


def build():
    from torch import nn
    return nn.ModuleList(from_file(f"{utils.PLACE}/{who}/net.py:build", classes=3) for who in ("one", "two"))
"""
    write(tmp_path, {"both.py": text, "utils.py": f"PLACE = {str(tmp_path)!r}\n"})
    for network, who in zip(models.from_file(f"{tmp_path}/both.py:build", classes=3), ("one", "two"), strict=True):
        network(torch.rand(1, 2))
        assert set(network.heard) == {who}


@pytest.mark.parametrize("file", ["pkg/net.py", "pkg/__init__.py", "pkg/sub/deep.py"])
def test_relative_imports_work_in_a_package_and_make_one_copy(tmp_path, file):
    own = {
        "pkg/__init__.py": "from .net import build\n",
        "pkg/layers.py": NET,
        "pkg/net.py": "from .layers import net\nimport pkg.layers as l\ndef build(): return net is l.net and net()\n",
        "pkg/sub/__init__.py": "",
        "pkg/sub/deep.py": "from ..net import build\n",
    }
    assert isinstance(models.from_file(f"{write(tmp_path, own)}/{file}:build", classes=3), nn.Sequential)


def test_a_package_beside_an_installed_one_of_its_name_is_the_users(tmp_path):
    import torchvision

    text = "import torchvision.net\nfrom .layers import net\n"
    write(tmp_path, {"torchvision/__init__.py": "", "torchvision/net.py": text, "torchvision/layers.py": NET})
    assert isinstance(models.from_file(f"{tmp_path}/torchvision/net.py:net", classes=3), nn.Sequential)
    assert sys.modules["torchvision"] is torchvision
    installed = Path(torchvision.__file__).parent / "models" / "squeezenet.py"
    models.from_file(f"{installed}:squeezenet1_1", classes=3)
    assert sys.modules["torchvision"] is torchvision


@pytest.mark.parametrize("name", ["random.py", "torch.py", "my-net.v2.py", "models.py", "evaluate.py", "a b.py"])
def test_a_file_may_have_any_name(tmp_path, name):
    import random

    write(tmp_path, {name: NET})
    assert isinstance(models.from_file(f"{tmp_path}/{name}:net", classes=3), nn.Sequential)
    assert (sys.modules["random"], sys.modules["torch"], sys.modules["models"]) == (random, torch, models)


def test_what_a_file_does_to_the_process_ends_with_it(tmp_path, monkeypatch):
    text = """
import argparse, os, sys, torch
options = argparse.ArgumentParser().parse_args()  # no reader of our command line
torch.set_default_dtype(torch.float64)
torch.set_grad_enabled(False)
os.chdir("/")
"""
    write(tmp_path, {"net.py": text + NET})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--images", "3"])
    models.from_file("net.py:net", classes=3)
    assert Path.cwd() == tmp_path
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert sys.argv == ["evaluate.py", "--images", "3"]


# --- what makes the network --------------------------------------------------------------------------------

FACTORIES = """
import functools

class Net(nn.Linear):
    def __init__(self, num_classes=7):
        super().__init__(4, num_classes)

instance = net(5)
partial = functools.partial(net, 6)
def classes(classes): return net(classes)
def keyword(*, n_classes=1): return net(n_classes)
def other(n=2): return net(n)
"""


@pytest.mark.parametrize(
    ("factory", "outputs"),
    [("net", 3), ("Net", 9), ("instance", 5), ("partial", 6), ("classes", 9), ("keyword", 9), ("other", 2)],
)
def test_a_function_a_class_or_a_network_makes_the_network(tmp_path, factory, outputs):
    write(tmp_path, {"net.py": NET + FACTORIES})
    network = models.from_file(f"{tmp_path}/net.py:{factory}", classes=9)
    assert network(torch.rand(2, 4)).shape == (2, outputs)


@pytest.mark.parametrize("factory", ["net", "instance"])
def test_random_weights_depend_on_the_seed_alone(tmp_path, factory):
    write(tmp_path, {"net.py": NET + FACTORIES})
    one, same, other = (
        models.from_file(f"{tmp_path}/net.py:{factory}", classes=3, seed=seed)[-1].weight for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("text", "factory", "says"),
    [
        ("", "missing", "no 'missing' in it; there are net"),
        ("import nowhere\n", "net", "ModuleNotFoundError: No module named 'nowhere' ({file}, line 1)"),
        ("import broken\n", "net", "SyntaxError: invalid syntax (broken.py, line 2)"),
        ("def f(:\n", "net", "SyntaxError: invalid syntax (net.py, line 1)"),
        ("from .layers import X\n", "net", "put an empty __init__.py beside it"),
        ("from models import Net\n", "net", "cannot import name 'Net'"),
        ("import sys\nsys.exit('no GPU')\n", "net", "SystemExit: no GPU ({file}, line 2)"),
        ("class Empty(Exception): pass\nraise Empty\n", "net", "Empty ({file}, line 2)"),
        ("def f():\n    raise OSError('two\\nlines')\n", "f", "OSError: two lines ({file}, line 2)"),
        ("import torch\ndef f():\n    return torch.load('absent.pt')\n", "f", "absent.pt' ({file}, line 3)"),
        ("import json\nX = json.loads('{')\n", "X", "({file}, line 2)"),
        ("def f(depth, classes): pass\n", "f", "argument: 'depth'; it gets the number of classes at most"),
        ("def f(*, depth): pass\n", "f", "'depth'; it gets the number of classes at most"),
        ("def f(): pass\n", "f", "gives a NoneType; expected is a torch.nn.Module"),
        ("def f(): return net(), 3\n", "f", "gives a tuple"),
        ("def f(): return nn.Linear\n", "f", "gives a type"),
        ("X = 3\n", "X", "gives a int"),
        ("def f(): return nn.LazyLinear(3)\n", "f", "lazy layers"),
    ],
)
def test_a_file_that_fails_is_refused_in_one_line(tmp_path, text, factory, says):
    file = write(tmp_path, {"broken.py": "\ndef\n", "net.py": text + NET}) / "net.py"
    assert says.format(file=file) in refused(f"{file}:{factory}")


def test_what_is_no_spec_is_refused_in_one_line(tmp_path):
    write(tmp_path, {"net.py": NET, "none.py": "", "bad.py": "def", "weights.pt": "x"})
    assert f"{tmp_path}/net.py:FACTORY; there are net" in refused(tmp_path / "net.py")
    assert "there are no functions and no classes" in refused(tmp_path / "none.py")
    assert "SyntaxError" in refused(f"{tmp_path}/bad.py:net")
    assert "no 'None'" not in refused(f"{tmp_path}/net.py:")
    for spec in (f"{tmp_path}/nowhere.py:net", "nowhere", f"{tmp_path}/weights.pt:net"):
        assert "no such file" in refused(spec)


def test_ctrl_c_stays_ctrl_c(tmp_path):
    write(tmp_path, {"net.py": "raise KeyboardInterrupt\n"})
    before = sys.path[:]
    with pytest.raises(KeyboardInterrupt):
        models.from_file(f"{tmp_path}/net.py:net", classes=3)
    assert sys.path == before
    assert sys.modules["models"] is models


def test_names_and_sources_tell_networks_apart(tmp_path):
    for folder in ("a", "b"):
        write(tmp_path / folder, {"net.py": "from layers import net\n", "layers.py": NET + f"# {folder}\n"})
    specs = [f"{tmp_path}/{folder}/net.py:net" for folder in ("a", "b", "a/../a")]
    names = [models.name_of_spec(spec) for spec in specs]
    assert names[0] == names[2] != names[1]
    assert names[0].startswith("net-net-")
    assert models.name_of_spec("a b/c d.py:f").startswith("c_d-f-")
    before = [models.source_of(spec) for spec in specs]
    assert before[0] == before[1] == b"# --- net.py\nfrom layers import net\n"
    for spec in specs:
        models.from_file(spec, classes=3)
    after = [models.source_of(spec) for spec in specs]
    assert after[0] == after[2] != after[1]  # what a file imports counts


# --- what the network returns ------------------------------------------------------------------------------


class Says(nn.Module):
    """A network whose forward pass is `answer`."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.body = answer, nn.Sequential(nn.Flatten(), nn.Linear(4, 3))

    def forward(self, x):
        return self.answer(self.body(x))


class Answer:
    def __init__(self, logits):
        self.logits = logits


def fails(z):
    raise KeyError("head")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (
            lambda z: (z, z),
            "returns a tuple: wrap it in a module whose forward returns network(x)[0]; expected are",
        ),
        (lambda z: [z], "returns a list: "),
        (lambda z: {"out": z, "aux": z}, "network(x)['out']"),
        (Answer, "network(x).logits"),
        (lambda z: None, "returns a NoneType; expected"),
        (lambda z: z.numpy(), "returns a ndarray"),
        (lambda z: z[:, 0], "shape (5,): if it is a logit z"),
        (lambda z: z[:, :1], "torch.stack([0 * z, z], 1)"),
        (lambda z: z[:, :2], "2 classes, and the images have 3"),
        (lambda z: z[:, :, None], "shape (5, 3, 1)"),
        (lambda z: z[:2], "shape (2, 3) for 5 images"),
        (lambda z: z.argmax(1), "one value an image"),
        (lambda z: z.round().long(), "int64"),
        (lambda z: z / 0, "not finite"),
        (fails, "KeyError: 'head' (" + __file__),
    ],
)
def test_an_output_that_is_no_logits_is_refused_with_a_way_out(answer, says):
    with pytest.raises(runs.Unusable) as error:
        models.check_output(Says(answer).eval(), IMAGES, 3)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "answer", [lambda z: z, lambda z: z.log_softmax(1), lambda z: z.half(), lambda z: z.bfloat16()]
)
def test_logits_are_accepted_without_a_word(answer):
    assert models.check_output(Says(answer).eval(), IMAGES, 3) is None


def test_probabilities_get_a_word():
    word = models.check_output(Says(lambda z: z.softmax(1)).eval(), IMAGES, 3)
    assert "rows sum to 1" in word
    assert "without the softmax" in word
    assert "\n" not in word


def test_a_forward_pass_in_place_is_refused_and_the_images_stay():
    images, before = IMAGES.clone(), IMAGES.clone()
    for first in (nn.ReLU(inplace=True), nn.Hardsigmoid(inplace=True)):  # the first one changes nothing above 0
        with pytest.raises(runs.Unusable, match="in place"):
            models.check_output(nn.Sequential(first, nn.Flatten(), nn.Linear(4, 3)).eval(), images, 3)
    assert torch.equal(images, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_of_another_precision_are_named(dtype):
    with pytest.raises(runs.Unusable, match=f"weights are {dtype} on cpu, images torch.float32 on cpu"):
        models.check_output(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).to(dtype).eval(), IMAGES, 3)


KINDS = """
def script(): return torch.jit.script(net())
def frozen(): return torch.jit.freeze(torch.jit.script(net().eval()))
def traced(): return torch.jit.trace(net(), torch.rand(2, 1, 2, 2))
def quantised(): return torch.ao.quantization.quantize_dynamic(net(), {nn.Linear})
def compiled(): return torch.compile(net(), backend="eager")
def lazy():
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    network(torch.rand(1, 1, 2, 2))
    return network
"""


@pytest.mark.filterwarnings("ignore")  # torch's own, of what it gives up
@pytest.mark.parametrize("kind", ["script", "frozen", "traced", "quantised", "compiled", "lazy"])
def test_networks_of_all_kinds_can_be_frozen_and_run(tmp_path, kind):
    write(tmp_path, {"net.py": NET + KINDS})
    network = models.from_file(f"{tmp_path}/net.py:{kind}", classes=3)
    network.eval().requires_grad_(False)
    models.check_output(network, IMAGES, 3)


# --- training it -------------------------------------------------------------------------------------------

MINE = {
    "repo/net.py": """
from models import Net


def build(classes):
    return Net(classes)
""",
    "repo/models.py": """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.norm, self.drop, self.idle = nn.BatchNorm2d(1), nn.Dropout(0.2), nn.Linear(2, 2)
        self.body, self.head = nn.Linear(64, 16), nn.Linear(16, classes)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.head(self.drop(self.act(self.body(self.norm(x).flatten(1)))))
""",
}
SMALL = ["digits", "--subset", 100, "--batch-size", 10, "--epochs", 2]
OFTEN = ["--checkpoint-minutes", 1e-9]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A repository whose module has a name of ours; the working directory beside it."""
    monkeypatch.chdir(write(tmp_path, MINE))
    monkeypatch.setattr(train, "PROBE_IMAGES", 10)
    return tmp_path


def command(program, *arguments):
    """The exit code of a program of ours, in this process."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, arguments)])
        return runs.run_command(program.main)


def begun(name, *more, spec="repo/net.py:build"):
    return command(train, *SMALL, "--model", spec, "--name", name, *more)


def weights(name):
    return runs.read_checkpoint(Path("runs") / name / "checkpoint.pt")["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def warned(name):
    lines = map(json.loads, Path("runs", name, "metrics.jsonl").read_text().splitlines())
    return [line["message"] for line in lines if line.get("event") == "warning"]


def one_line(capsys, code=2, got=2):
    assert got == code
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_users_network_is_trained_killed_resumed_and_kept_with_its_code(mine, monkeypatch):
    assert begun("whole") == 0
    with monkeypatch.context() as patched:
        left, real = iter(range(13)), train.Plan.rate
        patched.setattr(
            train.Plan, "rate", lambda plan, step: real(plan, step) if next(left, None) is not None else 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            begun("died", *OFTEN)
    assert runs.read_checkpoint(mine / "runs/died/checkpoint.pt")["step"] < 13
    (mine / "elsewhere").mkdir()
    monkeypatch.chdir(mine / "elsewhere")  # the spec that is kept is absolute
    assert command(train, "--resume", mine / "runs/died") == 0
    monkeypatch.chdir(mine)
    assert same(weights("whole"), weights("died"))
    assert warned("died") == []
    config = json.loads((mine / "runs/whole/config.json").read_text())
    files = [mine / "repo/net.py", mine / "repo/models.py"]
    assert config["options"]["model"] == f"{files[0]}:build"
    assert config["sources"] == {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    kept = (mine / "runs/whole/source.txt").read_text()
    assert all(f"# --- {f.name}\n{f.read_text()}" in kept for f in files)
    network = models.load(mine / "runs/whole")
    assert type(network).__name__ == "Net"
    assert not network.training


def test_two_processes_train_a_users_network_that_leaves_weights_idle(mine):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "train.py"]
    line += map(str, [*SMALL, "--epochs", 1, "--model", "repo/net.py:build", "--name", "two"])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert runs.read_checkpoint(mine / "runs/two/checkpoint.pt")["step"] == 10


def test_runs_of_a_users_network_are_evaluated_and_compared(mine, capsys):
    assert begun("none", "--method", "none") == begun("fd") == 0
    few = ["--images", 4, "--calibration", 0, "--audit-images", 2, "--blocks", 0, "--attack", "fab", "--norm", "l2"]
    assert command(evaluate, "runs/none", "runs/fd", *few) in (0, None)
    assert "| none | fd |" in (mine / "evaluations/none_vs_fd/report.md").read_text()
    alone = evaluate.open_run(mine / "runs/fd", SimpleNamespace(data_dir=None, size=None, topk=None))
    (mine / "repo/models.py").write_text(MINE["repo/models.py"].replace("self.head(self", "2 * self.head(self"))
    capsys.readouterr()
    other = evaluate.open_run(mine / "runs/fd", SimpleNamespace(data_dir=None, size=None, topk=None))
    assert "models.py has changed since this run began" in capsys.readouterr().err
    assert alone.fingerprint != other.fingerprint  # so that what was measured is measured again


def test_code_that_has_changed_is_named_before_it_is_used(mine, capsys):
    assert begun("a", "--epochs", 1) == 0
    network = mine / "repo/net.py"
    network.write_text("print('executed')\n" + MINE["repo/net.py"])
    for again in (lambda: command(train, "--resume", "runs/a"), lambda: begun("a", "--epochs", 1)):
        assert again() == 0
        said = capsys.readouterr().out
        assert f"warning: {network} has changed since this run began: " in said
        assert said.index("has changed since") < said.rindex("executed")
    assert f"{network} has changed" in warned("a")[0]
    assert "print" not in (mine / "runs/a/source.txt").read_text()
    network.unlink()
    with pytest.raises(runs.Unusable, match="no such file"):
        models.load(mine / "runs/a")
    assert f"{network} is gone" in capsys.readouterr().err


def test_nothing_in_a_run_directory_is_executed(mine, capsys):
    """Neither what a run that came from elsewhere names as its network, nor the copy of the code."""
    assert begun("a", "--epochs", 1) == 0
    state = runs.read_checkpoint(mine / "runs/a/checkpoint.pt")
    (mine / "runs/a/evil.py").write_text("open('executed', 'w')\n")
    state["config"]["options"]["model"] = f"{mine}/runs/a/evil.py:build"
    torch.save(state, mine / "runs/a/checkpoint.pt")
    with pytest.raises(runs.Unusable, match=r"evil\.py lies in the run itself, from where nothing is executed"):
        models.load(mine / "runs/a")
    capsys.readouterr()
    assert "lies in the run itself" in one_line(capsys, got=command(train, "--resume", "runs/a"))
    write(mine, {"runs/a/config.json": json.dumps(state["config"])})
    assert "lies in the run itself" in one_line(capsys, got=command(train, *SMALL, "--init", "runs/a"))
    assert not (mine / "executed").exists()


NETS = """
import torch
from torch import nn
from torch.nn import functional as F


def linear(n=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, n))


class Says(nn.Module):
    def __init__(self, say):
        super().__init__()
        self.say, self.body = say, linear()

    def forward(self, x):
        return self.say(self, self.body(x))


class Output:
    def __init__(self, logits):
        self.logits = logits


def takes_two(width, depth): pass
def returns_a_type(): return nn.Linear
def returns_a_tuple(): return linear(), 3
def returns_logits_inside(): return Says(lambda self, z: Output(z))
def returns_two(): return Says(lambda self, z: (z, z))
def returns_two_in_training(): return Says(lambda self, z: (z, z) if self.training else z)
def raises(): raise OSError("no\\nGPU")
def raises_later(): return Says(lambda self, z: 1 / 0)
def raises_in_training(): return Says(lambda self, z: 1 / (1 - self.training) and z)
def seven(): return linear(7)
def frozen(): return linear().requires_grad_(False)
def detached(): return Says(lambda self, z: z.detach() + self.body[1].bias)
def functional(): return Says(lambda self, z: F.relu(z))
"""


@pytest.mark.parametrize(
    ("factory", "more", "says"),
    [
        ("missing", [], "no 'missing' in it; there are linear, Says, Output"),
        ("takes_two", [], "arguments: 'width' and 'depth'; it gets the number of classes at most"),
        ("returns_a_type", [], "gives a type; expected is a torch.nn.Module"),
        ("returns_a_tuple", [], "gives a tuple; expected"),
        ("returns_logits_inside", [], "returns a Output: wrap it in a module whose forward returns network(x).logits"),
        ("returns_two", [], "returns a tuple: wrap it"),
        ("returns_two_in_training", [], "in training mode it returns a tuple: wrap it"),
        ("raises", [], "OSError: no GPU ({file}, line "),
        ("raises_later", [], "ZeroDivisionError: division by zero ({file}, line "),
        ("raises_in_training", [], "a training step fails: ZeroDivisionError"),
        ("seven", [], "7 classes, and the images have 10"),
        ("frozen", [], "no weights that can be trained"),
        ("detached", [], "no gradient comes through to the images"),
        ("detached", ["--method", "none"], "no gradient comes through to the images"),
        ("functional", ["--activation", "gelu"], "--activation gelu: there is no ReLU among the network's modules"),
        ("linear", ["--init", "absent.pt"], "absent.pt: No such file"),
        ("linear", ["--init", "other.pt"], "does not fit the network in 4 of 4 weights: 0.bias: (3,) there, nothing"),
        ("linear", ["--init", "whole.pt"], "save(network.state_dict(), 'weights.pt')"),
        ("linear", ["--init", "seven.pt"], "1.bias: (7,) there, (10,) here; 1.weight: (7, 64) there, (10, 64) here"),
        ("linear", ["--init", "seven.pt"], "--new-head leaves out the last layer"),
        ("linear", ["--new-head"], "--new-head is about the weights of --init"),
        ("linear", ["--size", 32], "--size 32: these images have a size of their own, 8"),
    ],
)
def test_a_network_or_weights_that_cannot_be_trained_are_refused_in_one_line(mine, capsys, factory, more, says):
    write(mine, {"nets.py": NETS})
    torch.save(nn.Sequential(nn.Linear(2, 3)).state_dict(), "other.pt")
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(64, 7)).state_dict(), "seven.pt")
    torch.save(nn.Sequential(nn.Linear(2, 3)), "whole.pt")
    line = one_line(capsys, got=command(train, *SMALL, "--model", f"nets.py:{factory}", *more))
    assert says.format(file=mine / "nets.py") in line
    assert not (mine / "runs").exists()


@pytest.mark.parametrize("size", [48, 200, 300])
@pytest.mark.parametrize("epochs", [1, 2, 29])
def test_a_size_that_was_asked_for_is_the_last_one_of_any_number_of_epochs(tmp_path, size, epochs):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (90, 80)).save(tmp_path / part / name / "1.jpg")
    images = data.load(str(tmp_path))
    given = {"dataset": str(tmp_path), "model": "resnet50", "size": size, "epochs": epochs}
    sizes = [phase.size for phase in train.resolve(given, images, runs.World("cpu")).phases]
    assert sizes[-1] == size == max(sizes)


def test_a_size_that_no_memory_holds_is_refused_in_one_line(mine, capsys):
    assert "--size" in one_line(capsys, got=command(train, "somewhere", "--size", 10**8))
    assert "--size" in one_line(capsys, got=command(evaluate, "repo/net.py:build", "--size", 10**8))


@pytest.mark.parametrize("option", ["init", "model", "resume", "name", "data-dir", "runs"])
def test_an_option_that_a_shell_left_empty_is_refused_in_one_line(mine, capsys, option):
    """--init "$WEIGHTS" where there is no WEIGHTS must not train from random ones, nor --resume begin a new run."""
    chosen = [] if option == "resume" else SMALL
    assert f"--{option} is empty" in one_line(capsys, got=command(train, *chosen, f"--{option}", ""))
    assert not Path("runs").exists()


@pytest.mark.parametrize("model", ["nets.py", "absent.py:net", "torchvision:resnet19", "resnet"])
def test_a_name_of_no_network_is_refused_in_one_line(mine, capsys, model):
    write(mine, {"nets.py": NETS})
    assert "there are" in (line := one_line(capsys, got=command(train, *SMALL, "--model", model))) or model in line


def test_functions_that_an_activation_cannot_reach_are_named(mine, capsys):
    text = NETS + "def partly(): return nn.Sequential(nn.ReLU(), functional(), nn.ReLU())\n"
    write(mine, {"nets.py": text})
    assert begun("a", "--epochs", 1, "--activation", "silu", spec="nets.py:partly") == 0
    assert warned("a") == ["--activation silu: 1 calls of relu as a function stay (write nn.ReLU())"]
    assert sum(isinstance(m, nn.SiLU) for m in models.load(mine / "runs/a").modules()) == 2


def test_fine_tuning_begins_with_the_weights_and_keeps_the_statistics(mine, monkeypatch, capsys):
    assert begun("plain", "--method", "none") == 0
    states, real = [], train.Trainer.update
    monkeypatch.setattr(
        train.Trainer,
        "update",
        lambda self, *batch: (states.append((self.step, self.plan.lam(self.step))), real(self, *batch)),
    )
    small = ["digits", "--subset", 100, "--batch-size", 10, "--model", "repo/net.py:build", "--init", "runs/plain"]
    capsys.readouterr()
    assert command(train, *small, "--name", "tuned", "--unsquared") == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert ", unsquared; " in first
    assert f"parameters from {mine}/runs/plain; " in first
    assert "20 steps of 10 images, 2 epochs from rate 0.005" in first
    before, after = weights("plain"), weights("tuned")
    buffers = {name for name in before if "running" in name or "num_batches" in name}
    assert buffers
    for name in before:
        assert torch.equal(before[name], after[name]) == (name in buffers or name.startswith("idle")), name
    assert [lam for _, lam in states] == pytest.approx([min(1.0, step / 10) for step in range(20)])
    # And a run that was killed before its first checkpoint begins with them again.
    config = (mine / "runs/tuned/config.json").read_text()
    write(mine, {"runs/again/config.json": config})
    assert command(train, "--resume", "runs/again") == 0
    assert same(weights("tuned"), weights("again"))
    assert (mine / "runs/again/source.txt").read_bytes() == (mine / "runs/tuned/source.txt").read_bytes()


def test_the_page_on_your_network_is_what_happens(tmp_path, monkeypatch):
    """Its files and its commands, one after the other, on a folder of JPEGs; evaluations look at few images."""
    page = (ROOT / "docs/your-network.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (commands,) = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    net = MINE["repo/models.py"].replace("nn.BatchNorm2d(1)", "nn.BatchNorm2d(3)").replace("64, 16", "12288, 16")
    monkeypatch.setattr(train, "PROBE_IMAGES", 4)
    monkeypatch.chdir(write(tmp_path, {"mine/net.py": code, "mine/models.py": net}))
    for part, count in (("train", 16), ("test", 4)):
        for label, name in enumerate(("cat", "dog", "owl")):
            Path("photos", part, name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 100, (90, 70 + i, 3), generator=torch.Generator().manual_seed(i))
                pixels[..., label] += 100
                Image.fromarray(pixels.byte().numpy()).save(f"photos/{part}/{name}/{i}.jpg")
    torch.save(models.from_file("mine/net.py:build", classes=3).state_dict(), "mine/weights.pt")
    torch.save(torchvision.models.resnet18(num_classes=1000).state_dict(), "resnet18.pth")
    few = ["--images", 4, "--calibration", 0, "--audit-images", 2, "--blocks", 0, "--attack", "fab", "--norm", "l2"]
    programs = {"train.py": (train, ["--epochs", 2]), "evaluate.py": (evaluate, few)}
    for line in commands.splitlines():
        _, name, *arguments = shlex.split(line, comments=True)
        if name in programs:
            program, more = programs[name]
            assert command(program, *arguments, *more) in (0, None), line
    assert {path.name for path in Path("runs").iterdir()} == {"robust", "resnet18", "plain", "smooth", "latest"}
    assert "left out" in " ".join(warned("resnet18")) or "begin at random" in " ".join(warned("resnet18"))
    assert weights("robust").keys() == torch.load("mine/weights.pt").keys()
    for name in ("plain", "smooth"):
        config = runs.read_checkpoint(Path("runs", name, "checkpoint.pt"))["config"]
        assert config["options"]["model"] == f"{tmp_path}/mine/net.py:build"
    assert sum(isinstance(m, nn.GELU) for m in models.load("runs/smooth").modules()) == 1
    assert len(list(Path("evaluations").glob("*_vs_*/report.md"))) == 2


def test_a_file_is_evaluated_on_the_images_that_a_split_kept_from_its_run(tmp_path, monkeypatch, capsys):
    """As the run itself, so that both stand in one table; nowhere else is there anything to keep."""
    monkeypatch.chdir(write(tmp_path, MINE))
    for name in ("cat", "dog", "owl"):
        Path("photos/train", name).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(np.full((8, 8), i, np.uint8)).save(f"photos/train/{name}/{i}.png")
    run = ["photos", "--split", 0.4, "--epochs", 1, "--model", "repo/net.py:build", "--name", "run"]
    assert command(train, *run) == 0
    settings = evaluate.Settings(["repo/net.py:build", "runs/run"], dataset="photos", split=0.4)
    file, run = evaluate.open_targets(settings)
    assert 2 <= len(file.source) < 60
    assert len(file.source) == len(run.source)
    rows = range(len(file.source))
    for one, other in zip(file.fetch(rows, torch.device("cpu")), run.fetch(rows, torch.device("cpu")), strict=True):
        assert torch.equal(one, other)
    capsys.readouterr()
    for images in ("digits", "photos"):
        for split in (-0.1, 0.4, 1.0, math.nan):
            if (images, split) != ("photos", 0.4):
                got = command(evaluate, "repo/net.py:build", "--data", images, "--split", split)
                assert "--split" in one_line(capsys, got=got)
    assert not Path("evaluations").exists()


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_network_of_ours_is_fine_tuned_without_a_word_of_torchs(mine):
    assert command(train, *SMALL, "--epochs", 1, "--method", "none", "--activation", "celu", "--name", "plain") == 0
    assert command(train, *SMALL, "--epochs", 1, "--init", "runs/plain", "--lr", 1e-30, "--name", "tuned") == 0
    one, two = (models.load(f"runs/{name}") for name in ("plain", "tuned"))
    assert [type(m) for m in one] == [type(m) for m in two]  # a run knows its activation
    assert all(torch.allclose(weights("plain")[n], weights("tuned")[n], atol=1e-6) for n in weights("plain"))
