"""Exact answers to test against: linear classifiers in closed form, and small networks trained on digits.

The oracle of the networks is a certificate, not an attack: nine mixed-integer linear programs (one per wrong class)
say how near the nearest misclassified image is.  Every lower bound must stay below it, every attack above it.
"""

import itertools
from functools import cache

import numpy as np
import torch
import torch.autograd.forward_ad as forward_ad
from scipy.optimize import Bounds, LinearConstraint, milp
from sklearn.datasets import load_digits
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import gradreg


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 64), float32 in [0, 1], and labels (1797,), in one fixed shuffled order."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.data / 16, dtype=torch.float32)[order], torch.tensor(data.target)[order]


@cache
def digits_mlp(seed: int, lam: float = 0.0, hidden: int = 20, norm: str = "linf") -> torch.nn.Sequential:
    """Linear(64, hidden), ReLU, Linear(hidden, 10) trained on the first half of `digits`; evaluation mode.

    The objective is eq. (8) with `gradreg.fd_penalty`.  Deterministic in its arguments, about a second of
    training; the network is shared between callers, so do not change it.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(64, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 10))
    images, labels = (part[:898] for part in digits())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        for batch in torch.randperm(len(images), generator=generator).split(64):
            loss_fn = lambda x, y=labels[batch]: gradreg.cross_entropy(model(x), y)  # noqa: E731
            penalised = gradreg.fd_penalty(loss_fn, images[batch], norm=norm, h=0.01)
            optimizer.zero_grad()
            penalised.objective(lam).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


def linear(generator, classes: int, dim: int, dtype=torch.float32, grey_ties: bool = False) -> torch.nn.Linear:
    """Linear(dim, classes) of standard normal weights; with grey_ties, all its logits are 0 on a grey image.

    Then noise, which is grey on average, finds every side of it.
    """
    model = torch.nn.Linear(dim, classes, dtype=dtype).requires_grad_(False).eval()
    model.weight.copy_(torch.randn(classes, dim, generator=generator))
    model.bias.copy_(-model.weight.sum(1) / 2 if grey_ties else torch.randn(classes, generator=generator) / 10)
    return model


def closed_form(model: torch.nn.Linear, images, labels, norm) -> torch.Tensor:
    """The smallest distances (N,) of a linear classifier in the box, by sorting breakpoints, in float64.

    For one other class: min ||d|| with <g, d> >= need and images + d in [0, 1].  Each |d_i| = min(t s_i, room_i)
    grows with t until its room is used up; the breakpoints t_i = room_i / s_i are visited in order.
    """
    weight, bias, images = (value.double().numpy() for value in (model.weight, model.bias, images))
    result = np.full(len(images), np.inf)
    for i, c in itertools.product(range(len(images)), range(len(weight))):
        label = int(labels[i])
        if c == label:
            continue
        g = weight[c] - weight[label]
        need = -(g @ images[i] + bias[c] - bias[label])
        if need <= 0:
            result[i] = 0
            continue
        size, speed = np.abs(g), np.abs(g) if norm == "l2" else np.ones_like(g)
        room = np.where(g > 0, 1 - images[i], images[i])
        order = np.argsort(room / speed)
        full = np.concatenate([[0], np.cumsum((size * room)[order])])[:-1]  # from those whose room is used up
        rate = np.cumsum((size * speed)[order][::-1])[::-1]  # growth of the others
        t = (need - full) / rate
        valid = t <= (room / speed)[order] * (1 + 1e-12)
        if valid.any():
            moves = np.minimum(t[np.argmax(valid)] * speed, room)
            result[i] = min(result[i], np.linalg.norm(moves) if norm == "l2" else moves.max())
    return torch.tensor(result)


def exact_linf_distance(network: torch.nn.Sequential, image: Tensor, label: int, *, upper: float) -> float:
    """min(upper, linf distance from image (d,) to the nearest x in [0, 1]^d that is not classified as label).

    Exact to the solver's tolerance (1e-6) for Sequential(Linear, ReLU, Linear); ties count as misclassified,
    so 0 for an image that is misclassified already.  Any `upper` gives a true statement; one that an attack
    found makes it fast, because every program is bounded by the smallest distance known so far.
    """
    first, _, last = network
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in (first.weight, first.bias, last.weight, last.bias))
    x = image.detach().double().numpy()
    logits = w2 @ np.maximum(w1 @ x + b1, 0) + b2
    others = [t for t in np.argsort(-logits) if t != label]
    if logits[others[0]] >= logits[label]:
        return 0.0
    for target in others:  # most likely class first: it shrinks the box of all that follow
        upper = min(upper, _distance_to(w1, b1, w2[target] - w2[label], b2[target] - b2[label], x, upper))
    return float(upper)


def _distance_to(w1, b1, w, b, x0, upper: float) -> float:
    """min r such that |x - x0| <= r <= upper, x in [0, 1]^d and w . relu(w1 x + b1) + b >= 0; inf if none.

    Variables (x, h, z, r).  h = relu(w1 x + b1) by the usual inequalities, with z binary (1: active) and
    interval bounds low <= w1 x + b1 <= high over the box.
    """
    hidden, d = w1.shape
    left, right = np.maximum(x0 - upper, 0), np.minimum(x0 + upper, 1)
    centre, radius = w1 @ (left + right) / 2 + b1, np.abs(w1) @ (right - left) / 2
    low, high = centre - radius, centre + radius
    eye_d, eye_h = np.eye(d), np.eye(hidden)
    zero_dh, zero_hd = np.zeros((d, hidden)), np.zeros((hidden, d))
    column_d, column_h = np.ones((d, 1)), np.zeros((hidden, 1))
    rows = np.block(
        [
            [eye_d, zero_dh, zero_dh, -column_d],  # x - r <= x0
            [-eye_d, zero_dh, zero_dh, -column_d],  # -x - r <= -x0
            [w1, -eye_h, 0 * eye_h, column_h],  # w1 x + b1 <= h
            [-w1, eye_h, np.diag(-np.minimum(low, 0)), column_h],  # h <= w1 x + b1 - low (1 - z)
            [zero_hd, eye_h, np.diag(-np.maximum(high, 0)), column_h],  # h <= high z
            [np.zeros((1, d)), -w[None], np.zeros((1, hidden)), np.zeros((1, 1))],  # -w h <= b
        ]
    )
    limits = np.concatenate([x0, -x0, -b1, b1 - np.minimum(low, 0), np.zeros(hidden), [b]])
    bounds = Bounds(
        np.concatenate([left, np.zeros(hidden), low > 0, [0]]),
        np.concatenate([right, np.maximum(high, 0), high > 0, [upper]]),
    )
    solution = milp(
        np.concatenate([np.zeros(d + 2 * hidden), [1]]),
        constraints=LinearConstraint(rows, -np.inf, limits),
        integrality=np.concatenate([np.zeros(d + hidden), np.ones(hidden), [0]]),
        bounds=bounds,
        options={"mip_rel_gap": 1e-6},
    )
    if solution.status not in (0, 2):  # solved, infeasible
        raise RuntimeError(f"the oracle's solver gave up: {solution.message}")
    return solution.x[-1] if solution.status == 0 else np.inf


# --- what makes a device wait -----------------------------------------------------------------------------


class Looks(TorchFunctionMode):
    """Context: counts how often Python is given a number that a tensor holds, for which a GPU has to finish first."""

    PYTHON = ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero", "unique")

    def __enter__(self):
        self.count, self.inside = 0, _Below(self)
        self.inside.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        return self.inside.__exit__(*error)

    def __torch_function__(self, function, types, arguments=(), options=None):
        before, result = self.count, function(*arguments, **(options or {}))
        if getattr(function, "__name__", "") in self.PYTHON and self.count == before:
            self.count += 1
        return result


class _Below(TorchDispatchMode):
    """What looks by itself, called by whatever: values read one by one, and masks, whose length is a number."""

    def __init__(self, looks):
        super().__init__()
        self.looks = looks

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        masked = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in arguments[1])
        self.looks.count += masked or name in ("_local_scalar_dense", "nonzero", "bincount", "equal", "masked_select")
        return function(*arguments, **(options or {}))


def forward_penalty(loss_fn, x, *, norm, squared=True):
    """The penalty by forward mode, which moves the whole batch as finite differences do: their limit, h -> 0."""
    loss_fn = gradreg._same_draw(loss_fn, x)
    _, grad = gradreg.input_gradient(loss_fn, x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), gradreg.direction(grad, norm))
        losses, slopes = forward_ad.unpack_dual(loss_fn(dual))
    return gradreg.Penalised(losses, slopes.square() if squared else slopes.abs(), grad)


class NoBackward(torch.autograd.Function):
    """Rounding, as some users write it: forward alone, without a word in backward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.round(decimals=2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        raise NotImplementedError
