"""Anybody's network, FILE.py:FACTORY: whatever is in the file, the right network comes out, or one line."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import data
import models
import runs

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
    """A folder of weights called models, or of images called data, is no module; ours stay what they are."""
    text = """
import models, data, runs
from models import cnn


def build():
    models.seen = data, runs, cnn
    return cnn(3)
"""
    write(tmp_path, {"net.py": text, "models/x.pt": "", "data/a/x.png": "", "runs/x/config.json": ""})
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
        (
            "import torch\n@torch.inference_mode()\ndef f(): return net()\n",
            "f",
            "torch.inference_mode allow no gradient",
        ),
    ],
)
def test_a_file_that_fails_is_refused_in_one_line(tmp_path, text, factory, says):
    file = write(tmp_path, {"broken.py": "\ndef\n", "net.py": text + NET}) / "net.py"
    assert says.format(file=file) in refused(f"{file}:{factory}")


def test_what_is_no_spec_is_refused_in_one_line(tmp_path):
    write(tmp_path, {"net.py": NET, "none.py": "", "bad.py": "def", "weights.pt": "x"})
    assert f"{tmp_path}/net.py:FACTORY; there are net" in refused(tmp_path / "net.py")
    assert "there is no function or class in it" in refused(tmp_path / "none.py")
    assert "SyntaxError" in refused(f"{tmp_path}/bad.py:net")
    assert "no 'None'" not in refused(f"{tmp_path}/net.py:")
    for spec in (f"{tmp_path}/nowhere.py:net", "nowhere", f"{tmp_path}/weights.pt:net"):
        assert "no such file (.py) or run" in refused(spec)


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
    assert before[0] == before[1] == b"from layers import net\n"
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


def test_a_submodule_in_training_mode_is_named():
    network = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(4, 3), nn.Dropout())).eval()
    network[1][1].train()
    with pytest.raises(runs.Unusable, match=r"1\.1 is in training mode"):
        models.check_output(network, IMAGES, 3)
    with pytest.raises(runs.Unusable, match="the network itself is in training mode"):
        models.check_output(network.train(), IMAGES, 3)


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
