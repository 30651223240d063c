"""Bounds against closed forms, exact distances and simulation; GEV fits; smoothing against its known radius."""

import copy
import math
import re
import types
from pathlib import Path

import numpy as np
import oracle
import pytest
import scipy.stats
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import digits, digits_mlp, exact_linf_distance
from torch import nn

import attacks
import bounds
from benchmarks import bounds as benchmark
from bounds import (
    Estimate,
    certify_smoothing,
    estimate_by_ascent,
    estimate_by_calibration,
    estimate_by_sampling,
    fit_gev,
    invert_omega,
    lipschitz_bound,
    margin_loss,
    margins,
    omega_bound,
    omega_statistics,
    violations,
)

ROOT = Path(__file__).resolve().parent.parent
NORMS = ("l2", "linf", "l1")
ORDER = {"l2": 2, "linf": math.inf, "l1": 1}
DUAL = {"l2": 2, "linf": 1, "l1": math.inf}
seeds, norms = st.integers(0, 2**32 - 1), st.sampled_from(NORMS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linear_network(weight, bias, dtype=torch.float64):
    network = nn.Sequential(nn.Flatten(), nn.Linear(weight.shape[1], weight.shape[0], dtype=dtype))
    with torch.no_grad():
        network[1].weight.copy_(weight)
        network[1].bias.copy_(bias)
    return network.eval()


def two_class_line(seed, d=6, count=40):
    """A linear two-class network, images well inside [0, 1], labels it agrees with, its margin and w."""
    draw = generator(seed)
    w = torch.randn(d, generator=draw, dtype=torch.float64)
    images = 0.4 + 0.2 * torch.rand(count, d, generator=draw, dtype=torch.float64)
    bias = -(images.mean(0) @ w)
    network = linear_network(torch.stack([torch.zeros_like(w), w]), torch.stack([0 * bias, bias]))
    signed = images @ w + bias
    return network, images, (signed > 0).long(), signed.abs(), w


class Paraboloid(nn.Module):
    """Margin of label 0: curvature / 2 ||x - centre||^2 - depth, whose omega(eps) is curvature eps^2 / 2 in l2."""

    def __init__(self, curvature, depth, d=5, centre=0.5):
        super().__init__()
        self.curvature, self.depth = curvature, depth
        self.register_buffer("centre", torch.full((d,), centre))

    def forward(self, x):
        margin = self.curvature / 2 * (x - self.centre).square().sum(1) - self.depth
        return torch.stack([torch.zeros_like(margin), margin], 1)


class Counted(nn.Module):
    """Counts the images sent forward and those that gradients come back for."""

    def __init__(self, network):
        super().__init__()
        self.network, self.forwards, self.backwards = network, 0, 0

    def forward(self, x):
        self.forwards += len(x)
        if x.requires_grad:
            x = x * 1
            x.register_hook(self.count)
        return self.network(x)

    def count(self, grad):
        self.backwards += len(grad)


def sampled_estimate(model, images, labels, *, norm, eps=None, loss="probabilities", p=1e-3, **sampling):
    """The paper's estimate, with the radii chosen where there are none."""
    eps = bounds.default_radii(model, images, labels, norm=norm) if eps is None else eps
    maxima = bounds.sample_maxima(model, images, labels, norm=norm, eps=eps, loss=loss, **sampling)
    return estimate_by_sampling(maxima, eps, norm=norm, loss=loss, p=p)


def rows(found, index):
    """The margins of some of the images."""
    return found._replace(losses=found.losses[index], grad_norms=found.grad_norms[index])


# --- losses and margins ------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 4), st.sampled_from(["probabilities", "logits"]))
def test_margin_loss_is_negative_exactly_when_the_label_is_in_the_top_k(seed, k, loss):
    logits = 3 * torch.randn(50, 6, generator=generator(seed), dtype=torch.float64)
    labels = torch.arange(50) % 6
    values = margin_loss(logits, labels, k, loss=loss)
    in_top = (logits.topk(k, dim=1).indices == labels[:, None]).any(1)
    assert torch.equal(values < 0, in_top)
    scores = logits.softmax(1) if loss == "probabilities" else logits
    for row, label, value in zip(scores.tolist(), labels.tolist(), values.tolist(), strict=True):
        others = sorted(row[:label] + row[label + 1 :], reverse=True)
        assert value == pytest.approx(others[k - 1] - row[label], abs=1e-12)


def test_margin_loss_of_a_tie_is_not_negative_and_other_losses_are_refused():
    assert margin_loss(torch.tensor([[1.0, 1.0]]), torch.tensor([0])).item() == 0
    with pytest.raises(ValueError, match="probabilities or logits"):
        margin_loss(torch.zeros(1, 2), torch.tensor([0]), loss="cross-entropy")


@given(seeds, norms, st.integers(1, 2))
def test_margins_of_a_linear_network_are_those_of_its_weights(seed, norm, topk):
    draw = generator(seed)
    weight, bias = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((5, 7), (5,)))
    images = torch.rand(11, 7, generator=draw, dtype=torch.float64)
    labels = torch.arange(11) % 5
    found = margins(linear_network(weight, bias), images, labels, norm=norm, topk=topk, rivals=3, batch_size=4)
    logits = images @ weight.T + bias
    order = logits.scatter(1, labels[:, None], -torch.inf).argsort(1, descending=True)
    for j in range(3):
        rival = order[:, topk - 1 + j]
        difference = torch.linalg.vector_norm(weight[rival] - weight[labels], DUAL[norm], dim=1)
        torch.testing.assert_close(found.grad_norms[:, j], difference)
        gap = (logits.gather(1, rival[:, None]) - logits.gather(1, labels[:, None]))[:, 0]
        torch.testing.assert_close(found.losses[:, j], gap)


class Changed(nn.Module):
    """A network whose logits are passed through a function, or whose images are."""

    def __init__(self, network, logits=lambda z: z, images=lambda x: x):
        super().__init__()
        self.network, self.logits, self.images = network, logits, images

    def forward(self, x):
        return self.logits(self.network(self.images(x)))


def with_class(value):
    return lambda z: torch.cat([z, torch.full_like(z[:, :1], value)], 1)


@settings(max_examples=60)
@given(seeds, norms, st.sampled_from([0.0, 1e2, -1e4]), st.sampled_from([None, -30.0, -1e9, -math.inf]), st.booleans())
def test_offsets_losers_and_16_bit_logits_change_bounds_by_rounding_alone(seed, norm, offset, loser, half):
    """Against exact distances: the same classifier, its logits shifted, a class appended that cannot win, rounded."""
    network, images, labels, gaps, w = two_class_line(seed)
    size = torch.linalg.vector_norm(w, DUAL[norm])
    exact, dtype = gaps / size, torch.bfloat16 if half else torch.float32
    images, offset = images.float(), offset / 1000 if half else offset
    append = with_class(loser + offset) if loser is not None else (lambda z: z)
    model = Changed(network.float(), lambda z: append(z + offset).to(dtype)).eval()
    largest = abs(offset) + 2 * float(w.abs().sum())  # what is summed, on the way to a logit
    rounding = 2 * torch.finfo(dtype).eps * largest
    settings = {"norm": norm, "rivals": 2 if loser is not None else 1}
    found = margins(model, images, labels, **settings)
    assert found.losses.dtype == torch.float32
    torch.testing.assert_close(found.losses[:, 0].double(), -gaps, rtol=1e-6, atol=rounding)
    torch.testing.assert_close(found.grad_norms[:, 0].double(), size.expand(40), rtol=1e-5, atol=0)
    eps = torch.linspace(0.05, 2, 4) * float(exact.max())
    ascent = estimate_by_ascent(model, images, labels, norm=norm, eps=eps, steps=2, generator=generator())
    assert ascent.omega.max() <= rounding + 1e-5
    for bound in (omega_bound(found, ascent), lipschitz_bound(found, ascent)):
        assert (bound.double() <= exact + (rounding + 1e-5) / size).all()
    if not half:
        assert (omega_bound(found, ascent).double() >= exact - (2 * rounding + 1e-5) / size).all()


# --- what cannot be bounded is refused in one line -----------------------------------------------------------


LINE = two_class_line(0)
TRAINING = nn.Sequential(LINE[0], nn.Dropout()).eval()
TRAINING[1].train()


def with_gradient(network):
    return copy.deepcopy(network).requires_grad_(True)


@pytest.mark.parametrize(
    ("model", "images", "labels", "message"),
    [
        (TRAINING, LINE[1], LINE[2], r"a part of the model \(1\) is in training mode"),
        (copy.deepcopy(LINE[0]).train(), LINE[1], LINE[2], "the model is in training mode"),
        (LINE[0], 2 * LINE[1], LINE[2], r"in \[0, 1\]"),
        (LINE[0], LINE[1] - 0.5, LINE[2], r"in \[0, 1\]"),
        (LINE[0], LINE[1] * math.nan, LINE[2], r"in \[0, 1\]"),
        (LINE[0], LINE[1][:0], LINE[2][:0], "at least one"),
        (LINE[0], LINE[1].bfloat16(), LINE[2], "float32 or float64"),
        (LINE[0], (255 * LINE[1]).byte(), LINE[2], "float32 or float64"),
        (LINE[0], LINE[1], LINE[2].int(), r"int64 tensor, one per image, not torch.int32"),
        (LINE[0], LINE[1], LINE[2][:, None], r"not torch.int64 of shape \(40, 1\)"),
        (LINE[0], LINE[1].numpy(), LINE[2], "float32 or float64 tensor"),
        (LINE[0], LINE[1], LINE[2].tolist(), r"int64 tensor, .* not a list"),
        (LINE[0], LINE[1], LINE[2] + 1, r"labels must be in 0 \.\. 1"),
        (LINE[0], LINE[1], LINE[2] - 1, r"labels must be in 0 \.\. 1"),
        (Changed(LINE[0], lambda z: (z, z)).eval(), LINE[1], LINE[2], "not tuple: wrap"),
        (Changed(LINE[0], lambda z: {"logits": z}).eval(), LINE[1], LINE[2], "not dict: wrap"),
        (Changed(LINE[0], lambda z: z[:, 0]).eval(), LINE[1], LINE[2], r"not \(40,\): wrap"),
        (Changed(LINE[0], lambda z: z[:, :1]).eval(), LINE[1], LINE[2], r"not \(40, 1\): wrap"),
        (Changed(LINE[0], lambda z: z[:5]).eval(), LINE[1], LINE[2], r"not \(5, 2\): wrap"),
        (Changed(LINE[0], lambda z: z * math.nan).eval(), LINE[1], LINE[2], "not finite"),
        (Changed(LINE[0], lambda z: z + math.inf).eval(), LINE[1], LINE[2], "not finite"),
        (Changed(LINE[0], images=lambda x: x.detach()).eval(), LINE[1], LINE[2], "no gradient comes through"),
        (Changed(with_gradient(LINE[0]), images=lambda x: x.detach()).eval(), LINE[1], LINE[2], "no gradient comes"),
        (torch.no_grad()(lambda x: LINE[0](x)), LINE[1], LINE[2], "no gradient comes through"),
    ],
)  # fmt: skip
def test_what_cannot_be_bounded_is_refused_in_one_line(model, images, labels, message):
    how = {"norm": "l2", "eps": torch.tensor([0.5])}
    calls = [
        lambda: margins(model, images, labels, norm="l2"),
        lambda: bounds.default_radii(model, images, labels, norm="l2"),
        lambda: estimate_by_ascent(model, images, labels, **how),
        lambda: sampled_estimate(model, images, labels, block_size=len(labels) or 1, **how),
        lambda: omega_statistics(model, images, labels, **how),
    ]
    if "label" not in message and "int64" not in message and "gradient" not in message:
        calls.append(lambda: certify_smoothing(model, images, sigma=1.0, n0=40, batch_size=40))
    for call in calls:
        with pytest.raises(ValueError, match=message) as refused:
            call()
        assert "\n" not in str(refused.value)


FOUND = bounds.Margins(-torch.ones(200, 1), torch.ones(200, 1), "l2", 1, "logits")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *[
            (lambda how=how: certify_smoothing(LINE[0], LINE[1], **{"sigma": 0.5, **how}), "sigma > 0, 0 < alpha < 1")
            for how in (
                {"sigma": -1}, {"sigma": 0}, {"sigma": math.nan}, {"sigma": math.inf}, {"alpha": 1.5}, {"alpha": 0},
                {"alpha": math.nan}, {"n": 0}, {"n0": 0}, {"batch_size": 0},
            )
        ],
        *[
            (lambda eps=eps: estimate_by_ascent(*LINE[:3], norm="l2", eps=torch.tensor(eps)), "radii must be positive")
            for eps in ([], [-0.1, 0.5], [0.0, 0.5], [0.5, 0.5], [0.5, 0.4], [0.1, math.nan], [0.1, math.inf])
        ],
        *[
            (lambda how=how: sampled_estimate(*LINE[:3], norm="l2", eps=torch.ones(1), **how), message)
            for how, message in (
                ({"p": 0}, "0 < p < 1"), ({"p": 1.5}, "0 < p < 1"), ({"blocks": 0}, "blocks of one image"),
                ({"block_size": 0}, "blocks of one image"), ({"blocks": 4}, "5 finite maxima"),
            )
        ],
        (lambda: margins(*LINE[:3], norm="l2", topk=2), r"must be in 1 \.\. 1, not 2"),
        (lambda: margins(*LINE[:3], norm="l2", topk=0), r"must be in 1 \.\. 1, not 0"),
        (lambda: margins(*LINE[:3], norm="l2", rivals=2), r"rivals - 1\) must be in 1 \.\. 1, not 2"),
        (lambda: margins(*LINE[:3], norm="L2"), "norm must be one of"),
        *[
            (lambda how=how: estimate_by_calibration(FOUND, torch.ones(200), **how), "0 < alpha < 1 and a positive")
            for how in ({"alpha": 1.5}, {"alpha": 0}, {"alpha": -1}, {"alpha": math.nan}, {"exponent": 0})
        ],
        *[
            (lambda use=use, d=d: use(d), "distances must be")
            for use in (lambda d: estimate_by_calibration(FOUND, d), lambda d: violations(torch.ones(200), d))
            for d in (torch.ones(199), torch.ones(200, 1), -torch.ones(200), torch.full((200,), math.nan))
        ],
        (lambda: violations(torch.ones(0), torch.ones(0)), "distances must be"),
    ],
)  # fmt: skip
def test_arguments_without_a_meaning_are_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as refused:
        call()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("derivative", [lambda x: torch.special.gammainc(x + 1, x), oracle.NoBackward.apply])
def test_a_model_without_a_derivative_is_refused_in_one_line(derivative):
    """Of torch's own, which says so; of a user's, which may say nothing."""
    model = Changed(LINE[0], images=derivative).eval()
    for call in (
        lambda: margins(model, *LINE[1:3], norm="l2"),
        lambda: omega_statistics(model, *LINE[1:3], norm="l2", eps=[0.5]),
    ):
        with pytest.raises(ValueError, match=r"no gradient comes through the model: .") as refused:
            call()
        assert "\n" not in str(refused.value)


def test_a_model_that_works_in_place_has_the_same_bounds():
    model, images, labels, *_ = LINE
    in_place = Changed(model, images=lambda x: x.mul_(2).div_(2)).eval()
    for norm in NORMS:
        found = [margins(m, images, labels, norm=norm, ahead=True) for m in (model, in_place)]
        assert torch.equal(found[0].losses, found[1].losses)
        assert torch.equal(found[0].grad_norms, found[1].grad_norms)
    how = {"norm": "l2", "eps": torch.tensor([0.2, 0.5])}
    estimates = [estimate_by_ascent(m, images, labels, **how) for m in (model, in_place)]
    assert torch.equal(estimates[0].omega, estimates[1].omega)


def test_a_lack_of_memory_is_told_as_one():
    def exhausted(x):
        if x.dtype == torch.float64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x

    network = linear_network(torch.randn(3, 6), torch.zeros(3), torch.float32)
    images, eps = torch.rand(5, 6), torch.tensor([1e-3, 1e-1])
    model = Changed(network, images=exhausted).eval()
    with pytest.raises(torch.OutOfMemoryError):
        estimate_by_ascent(model, images, network(images).argmax(1), norm="l2", eps=eps)


def test_radii_do_not_follow_from_gradients_that_are_zero():
    model = Changed(LINE[0], images=lambda x: torch.where(torch.arange(40)[:, None] < 30, x.detach(), x)).eval()
    with pytest.raises(ValueError, match="half of the gradients"):
        bounds.default_radii(model, LINE[1], LINE[2], norm="l2")


# --- Proposition 2.2 ---------------------------------------------------------------------------------------


def random_modulus(draw, k=7):
    eps = torch.rand(k, generator=draw, dtype=torch.float64).cumsum(0)
    return eps, torch.rand(k, generator=draw, dtype=torch.float64).cumsum(0) - 0.2


@given(seeds)
def test_inversion_is_the_largest_radius_that_passes(seed):
    """Against a scan of radii: r ||g|| + omega(the next radius of the table) <= gap."""
    draw = generator(seed)
    eps, omega = random_modulus(draw)
    gaps, grads = 4 * torch.rand(2, 20, generator=draw, dtype=torch.float64) - 0.2
    grads = grads.abs()
    found = invert_omega(gaps, grads, eps, omega)
    scan = torch.linspace(0, float(eps[-1]), 4001, dtype=torch.float64)[1:]
    at = omega[torch.searchsorted(eps, scan).clamp(max=len(eps) - 1)]
    passes = scan * grads[:, None] + at <= gaps[:, None]
    expected = torch.where(passes, scan, 0).amax(1)
    torch.testing.assert_close(found, expected, atol=float(eps[-1]) / 4000 + 1e-9, rtol=0)
    assert (found >= expected - 1e-12).all()


@given(seeds)
def test_inversion_is_monotone_in_gap_gradient_and_omega(seed):
    draw = generator(seed)
    eps, omega = random_modulus(draw)
    gaps, grads, more = 3 * torch.rand(3, 20, generator=draw, dtype=torch.float64)
    found = invert_omega(gaps, grads, eps, omega)
    assert (invert_omega(gaps + more, grads, eps, omega) >= found).all()
    assert (invert_omega(gaps, grads + more, eps, omega) <= found).all()
    for bump in torch.rand(5, len(eps), generator=draw, dtype=torch.float64):
        assert (invert_omega(gaps, grads, eps, omega + bump) <= found).all()


@settings(max_examples=40)
@given(seeds, st.floats(1, 3))
def test_steps_are_never_above_the_truth_where_omega_is_convex(seed, power):
    """The step inversion of a table is below the exact inversion, and below linear interpolation."""
    draw = generator(seed)
    eps = torch.rand(6, generator=draw, dtype=torch.float64).cumsum(0)
    gaps, grads = 3 * torch.rand(2, 30, generator=draw, dtype=torch.float64)
    fine = torch.linspace(0, float(eps[-1]), 20001, dtype=torch.float64)[1:]
    exact = invert_omega(gaps, grads, fine, fine**power)
    steps = invert_omega(gaps, grads, eps, eps**power)
    assert (steps <= exact + float(eps[-1]) / 20000).all()
    table = [torch.cat([torch.zeros(1, dtype=torch.float64), column]).numpy() for column in (eps, eps**power)]
    linear = invert_omega(gaps, grads, fine, torch.tensor(np.interp(fine.numpy(), *table)))
    assert (steps <= linear + float(eps[-1]) / 20000).all()


def test_inversion_at_the_edges():
    eps, omega = torch.tensor([0.5, 1.0]), torch.tensor([0.3, 0.1])  # not nested: made non-decreasing
    gaps = torch.tensor([-1.0, 0.0, 0.2, 0.3, 0.4, 9.0, 9.0, math.nan])
    grads = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    expected = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    torch.testing.assert_close(invert_omega(gaps, grads, eps, omega), expected)
    with pytest.raises(ValueError, match="increase"):
        invert_omega(gaps, grads, eps.flip(0), omega)


@settings(max_examples=40)
@given(seeds, norms)
def test_a_linear_margin_has_no_omega_and_its_bounds_are_the_exact_distances(seed, norm):
    network, images, labels, gaps, w = two_class_line(seed)
    exact = gaps / torch.linalg.vector_norm(w, DUAL[norm])
    eps = torch.linspace(0.01, 2, 5) * exact.max()
    estimate = estimate_by_ascent(network, images, labels, norm=norm, eps=eps, steps=2, generator=generator())
    found = margins(network, images, labels, norm=norm)
    assert estimate.omega.abs().max() < 1e-9
    assert estimate.lipschitz == pytest.approx(torch.linalg.vector_norm(w, DUAL[norm]).item(), rel=1e-6)
    for bound in (omega_bound(found, estimate), lipschitz_bound(found, estimate)):
        torch.testing.assert_close(bound, exact, rtol=1e-5, atol=1e-8)


@settings(max_examples=40)
@example(31645, "l2")  # a bound that is sharp: it exceeds the distance by 7e-11 of it
@given(seeds, norms)
def test_exact_moduli_of_a_linear_softmax_never_give_a_false_bound(seed, norm):
    """l = -tanh(u / 2), u the logits' margin: L and omega are suprema over one real variable, taken on a grid."""
    network, images, labels, gaps, w = two_class_line(seed)
    size = torch.linalg.vector_norm(w, DUAL[norm])
    exact = gaps / size
    eps = torch.logspace(-2, 0.5, 12, dtype=torch.float64) * exact.max()
    u = torch.linspace(-10, 10, 401, dtype=torch.float64)
    value, slope = -(u / 2).tanh(), -0.5 / (u / 2).cosh() ** 2
    shift = eps[:, None] * size * torch.linspace(-1, 1, 81, dtype=torch.float64)
    brackets = -((u[:, None, None] + shift) / 2).tanh() - value[:, None, None] - slope[:, None, None] * shift
    omega = brackets.amax((0, 2)) + 1e-3  # more than the grid's error
    estimate = Estimate(norm, 1, "probabilities", float(size / 2), eps, omega)
    found = margins(network, images, labels, norm=norm, loss="probabilities")
    torch.testing.assert_close(found.losses[:, 0], -(gaps / 2).tanh())
    torch.testing.assert_close(found.grad_norms[:, 0], 0.5 * size / (gaps / 2).cosh() ** 2)
    for bound in (omega_bound(found, estimate), lipschitz_bound(found, estimate)):
        assert violations(bound, exact).count == 0
    assert omega_bound(found, estimate).max() > 0


@pytest.mark.parametrize("curvature", [3.0, -3.0])
def test_a_paraboloid_has_the_modulus_of_its_curvature(curvature):
    model = Paraboloid(curvature, 0.3 if curvature > 0 else -0.3, centre=0.5).eval()
    images = 0.5 + 0.1 * torch.rand(64, 5, generator=generator()) * (torch.arange(5) != 0)
    labels = torch.zeros(64, dtype=torch.long) if curvature > 0 else torch.ones(64, dtype=torch.long)
    eps = torch.tensor([0.05, 0.1, 0.2, 0.3])
    # Of label 1 the margin has the opposite sign, so both models have the margin (curvature > 0: convex).
    exact = 1.5 * eps**2
    ascent = estimate_by_ascent(model, images, labels, norm="l2", eps=eps, steps=20, generator=generator())
    torch.testing.assert_close(ascent.omega, exact, rtol=1e-3, atol=0)
    assert (ascent.omega <= exact * (1 + 1e-4)).all()
    sampled = sampled_estimate(
        model, images, labels, norm="l2", eps=eps, loss="logits", blocks=30, generator=generator()
    )
    # Every bracket is curvature ||v||^2 / 2, and 64 points of a ball in 5 dimensions come close to its surface.
    torch.testing.assert_close(sampled.omega, exact, rtol=2e-2, atol=0)
    found = margins(model, images, labels, norm="l2")
    assert sampled.lipschitz >= float(found.grad_norms.max())  # 30 blocks of 64 have seen all the images


class Plateau(nn.Module):
    """Margin of label 0: -1 within 0.05 of x = 0.5, and rising with slope 4 beyond: no gradient says so at 0.5."""

    def forward(self, x):
        margin = 4 * ((x[:, 0] - 0.5).abs() - 0.05).clamp_min(0) - 1
        return torch.stack([torch.zeros_like(margin), margin], 1)


def test_ascent_sees_what_random_points_show_it():
    images, labels, eps = torch.full((8, 1), 0.5), torch.zeros(8, dtype=torch.long), torch.tensor([0.1, 0.2, 0.4])
    settings = {"norm": "linf", "eps": eps, "steps": 5}
    blind = estimate_by_ascent(Plateau().eval(), images, labels, restarts=0, **settings)
    assert blind.omega.tolist() == [0, 0, 0]
    truth = 4 * (eps - 0.05)
    random = estimate_by_ascent(Plateau().eval(), images, labels, generator=generator(), **settings)
    torch.testing.assert_close(random.omega, truth, rtol=1e-4, atol=0)
    assert random.lipschitz == pytest.approx(4 * (0.4 - 0.05) / 0.4, rel=1e-4)


def test_only_images_that_are_classified_correctly_enter_the_ascent():
    class Cubic(nn.Module):
        def forward(self, x):
            margin = x[:, 0] ** 3 - 0.3
            return torch.stack([torch.zeros_like(margin), margin], 1)

    images, eps = torch.tensor([[0.1], [0.2], [0.8]]), torch.tensor([0.1])  # the last one is misclassified
    labels = torch.zeros(3, dtype=torch.long)
    estimate = estimate_by_ascent(Cubic().eval(), images, labels, norm="l2", eps=eps, generator=generator())
    assert float(estimate.omega[0]) == pytest.approx(3 * 0.2 * 0.1**2 + 0.1**3, rel=1e-3)
    omega, _ = omega_statistics(Cubic().eval(), images, labels, norm="l2", eps=[0.1], loss="logits")
    assert float(omega[0]) == pytest.approx(3 * 0.8 * 0.1**2 + 0.1**3, rel=1e-3)


def test_a_concave_margin_has_no_omega():
    model = Paraboloid(-3.0, -0.5).eval()  # margin of label 0: 0.5 - 1.5 ||x - centre||^2
    images = torch.cat([torch.zeros(8, 5), torch.ones(8, 5)])
    labels = torch.zeros(16, dtype=torch.long)
    eps = torch.tensor([0.05, 0.1, 0.2])
    estimate = estimate_by_ascent(model, images, labels, norm="l2", eps=eps, generator=generator())
    assert estimate.omega.abs().max() < 1e-5


def test_small_radii_are_measured_in_float64():
    model = Paraboloid(3.0, 0.3).eval()
    images = (0.4 + 0.2 * torch.rand(16, 5, generator=generator())).float()
    labels = torch.zeros(16, dtype=torch.long)
    eps = torch.tensor([1e-5, 1e-4, 1e-3])
    estimate = estimate_by_ascent(model, images, labels, norm="l2", eps=eps, generator=generator())
    torch.testing.assert_close(estimate.omega, 1.5 * eps**2, rtol=1e-3, atol=0)
    omega, _ = omega_statistics(model, images, labels, norm="l2", eps=eps.tolist(), loss="logits")
    np.testing.assert_allclose(omega, 1.5 * eps.numpy() ** 2, rtol=1e-3)
    assert model.centre.dtype == torch.float32  # the caller's model is left alone
    fixed = torch.nn.Sequential(torch.nn.Linear(5, 3)).eval()
    fixed.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    for unfit in (lambda x: model(x), fixed):
        with pytest.raises(ValueError, match="float64"):
            omega_statistics(unfit, images, labels, norm="l2", eps=[1e-5])
    assert omega_statistics(fixed, images, fixed(images).argmax(1), norm="l2", eps=[0.1])[0] > 0


def test_the_cheap_statistics_are_a_lower_estimate_of_the_ascent_and_change_nothing():
    network, (images, labels) = copy.deepcopy(digits_mlp(0)).requires_grad_(True), digits()
    network.zero_grad()
    images, labels = images[898:1098], labels[898:1098]
    eps = [0.02, 0.05, 0.1, 0.2]
    cheap, grad_norms = omega_statistics(network, images, labels, norm="linf", eps=eps)
    right = network(images).argmax(1) == labels
    full = estimate_by_ascent(
        network, images[right], labels[right], norm="linf", eps=torch.tensor(eps), loss="probabilities",
        steps=20, generator=generator(),
    )  # fmt: skip
    alone, _ = omega_statistics(network, images[right], labels[right], norm="linf", eps=eps)
    assert (cheap.diff() >= 0).all()
    assert (alone <= full.omega + 0.02).all()
    assert (alone >= 0.8 * full.omega).all()
    assert (cheap >= alone).all()
    found = margins(network, images, labels, norm="linf", loss="probabilities")
    torch.testing.assert_close(grad_norms, found.grad_norms[:, 0], rtol=1e-5, atol=0)
    assert all(p.grad is None for p in network.parameters())


# --- the guarantees ----------------------------------------------------------------------------------------


def exact_distances(network, images, labels, upper):
    return torch.tensor(
        [exact_linf_distance(network, x, int(y), upper=float(u)) for x, y, u in zip(images, labels, upper, strict=True)]
    )


def sandwich(lam, checked):
    """Bounds, exact distances and the attack's distances of `checked` images of digits, none of them seen before."""
    network, (images, labels) = digits_mlp(0, lam), digits()
    calibration, check = slice(898, 1348), slice(1348, 1348 + checked)
    both = slice(898, check.stop)
    attack = attacks.smallest(network, images[both], labels[both], norm="linf", attacks=("fab",)).distances
    exact = exact_distances(network, images[check], labels[check], attack[450:])
    ascent = estimate_by_ascent(network, images[calibration], labels[calibration], norm="linf", generator=generator())
    sampled = sampled_estimate(network, images[calibration], labels[calibration], norm="linf", generator=generator())
    logits = margins(network, images, labels, norm="linf", rivals=3)
    calibrated = estimate_by_calibration(rows(logits, calibration), attack[:450])
    probabilities = margins(network, images[check], labels[check], norm="linf", loss="probabilities")
    claims = {
        "ascent": omega_bound(rows(logits, check), ascent),
        "ascent L": lipschitz_bound(rows(logits, check), ascent),
        "calibration": omega_bound(rows(logits, check), calibrated),
        "sampling": omega_bound(probabilities, sampled),
    }
    return claims, exact, attack[450:]


@pytest.mark.parametrize(
    ("lam", "checked"), [(0.0, 50), *(pytest.param(lam, 100, marks=pytest.mark.slow) for lam in (0.0, 0.1, 1.0))]
)
def test_sandwich_bound_below_exact_distance_below_attack(lam, checked):
    claims, exact, attack = sandwich(lam, checked)
    assert (exact <= attack + 1e-5).all()
    found = {name: violations(claim, exact) for name, claim in claims.items()}
    assert found["ascent"].count == 0
    assert found["ascent L"].count == 0
    assert found["calibration"].count <= 1
    assert found["sampling"].count >= 5  # one draw of the paper's estimate, beside the others
    assert found["ascent"].tightness > 0.5
    assert found["calibration"].tightness > 0.6


def test_calibration_keeps_its_promise_over_exchangeable_draws():
    """Synthetic margins and distances, 300 times: false bounds on a fresh half, at most alpha of them on average."""
    draw, alpha, n, counts = generator(0), 0.02, 149, []
    for _ in range(300):
        gaps = 1 + 3 * torch.rand(2 * n, 2, generator=draw)
        grads = 1 + torch.rand(2 * n, 2, generator=draw)
        distances = (gaps / grads).amin(1) * (0.5 + 0.7 * torch.rand(2 * n, generator=draw))
        gaps[::20, 0], gaps[10::20, 0] = -1, 0  # misclassified, and tied
        distances[::10] = 0
        distances[1::10] = torch.inf  # no adversarial image was found
        found = bounds.Margins(-gaps, grads, "l2", 1, "logits")
        estimate = estimate_by_calibration(rows(found, slice(None, n)), distances[:n], alpha=alpha)
        row = []
        for bound in (omega_bound, lipschitz_bound):
            own = violations(bound(rows(found, slice(None, n)), estimate), distances[:n])
            assert own.count <= 2  # floor(0.02 * 150) - 1, exactly the score's rank unless the grid helps
            row.append(violations(bound(rows(found, slice(n, None)), estimate), distances[n:]).rate)
        counts.append(row)
    rates = np.array(counts)
    assert (rates.mean(0) <= alpha + 3 * rates.std(0) / math.sqrt(300)).all()
    assert (rates.mean(0) >= alpha / 2).all()  # and it gives nothing away


def test_calibration_takes_the_smallest_modulus_that_keeps_it():
    draw, n = generator(3), 99
    gaps, grads = 1 + 3 * torch.rand(n, 1, generator=draw), 1 + torch.rand(n, 1, generator=draw)
    distances = (gaps / grads)[:, 0] * (0.5 + 0.5 * torch.rand(n, generator=draw))
    found = bounds.Margins(-gaps, grads, "l2", 1, "logits")
    estimate = estimate_by_calibration(found, distances, alpha=0.05, radii=20_000)
    assert violations(omega_bound(found, estimate), distances).count <= 4
    looser = Estimate("l2", 1, "logits", 0.998 * estimate.lipschitz, estimate.eps, 0.998 * estimate.omega)
    assert violations(omega_bound(found, looser), distances).count >= 5
    assert violations(lipschitz_bound(found, looser), distances).count >= 5
    assert omega_bound(found, estimate).max() <= distances.max() * (1 + 1e-9)
    for alpha in (0.005, 0.0099):
        with pytest.raises(ValueError, match="images or more"):
            estimate_by_calibration(found, distances, alpha=alpha)
    estimate_by_calibration(found, distances, alpha=0.01)  # 99 images are just enough
    with pytest.raises(ValueError, match="too few distances"):
        estimate_by_calibration(found, torch.full((n,), torch.inf), alpha=0.05)


@given(seeds, norms)
def test_the_tangent_ahead_of_a_linear_margin_is_its_own(seed, norm):
    network, images, labels, gaps, _ = two_class_line(seed)
    found = margins(network, images, labels, norm=norm, ahead=True)
    torch.testing.assert_close(found.losses[:, 1], -gaps, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.grad_norms[:, 1], found.grad_norms[:, 0])


def test_the_tangent_ahead_of_a_paraboloid_is_that_of_the_closed_form_and_nearer_to_the_truth():
    """l = C rho^2 / 2 - depth, linearised at rho, is 0 at rho + gap / (C rho); the tangent there, read at rho."""
    model, (curvature, depth) = Paraboloid(3.0, 0.3).eval(), (3.0, 0.3)
    images = 0.55 + 0.05 * torch.rand(240, 5, generator=generator(), dtype=torch.float64)
    labels, rho = torch.zeros(240, dtype=torch.long), (images - 0.5).norm(dim=1)
    found, gap = margins(model, images, labels, norm="l2", ahead=True), depth - curvature / 2 * rho**2
    ahead = rho + gap / (curvature * rho)
    expected = curvature / 2 * ahead**2 - depth - curvature * ahead * (ahead - rho)
    torch.testing.assert_close(found.losses[:, 1], expected)
    torch.testing.assert_close(found.grad_norms[:, 1], curvature * ahead)
    exact, estimates = math.sqrt(2 * depth / curvature) - rho, -found.losses / found.grad_norms
    near, far = ((estimates[:, j] - exact).abs() for j in (1, 0))
    assert (near < far / 2).all()
    estimate = estimate_by_calibration(rows(found, slice(None, 200)), exact[:200], exponent=2)
    assert (omega_bound(rows(found, slice(200, None)), estimate) <= exact[200:] * (1 + 1e-3)).all()
    labels = torch.ones_like(labels)  # misclassified: the bound stays 0
    assert (omega_bound(margins(model, images, labels, norm="l2", ahead=True), estimate) == 0).all()


def test_a_tangent_that_calls_the_image_misclassified_says_nothing():
    class Bump(nn.Module):
        """Margin of label 0: -1 + 2 x, up to x = 0.25, and 1 - 8 (x - 0.5) beyond: at 0.5 it falls."""

        def forward(self, x):
            margin = torch.where(x[:, 0] < 0.25, -1 + 2 * x[:, 0], 1 - 8 * (x[:, 0] - 0.5))
            return torch.stack([torch.zeros_like(margin), margin], 1)

    found = margins(Bump().eval(), torch.tensor([[0.1]]), torch.tensor([0]), norm="l2", ahead=True)
    assert found.losses.tolist() == [[pytest.approx(-0.8)] * 2]
    assert found.grad_norms.tolist() == [[2, 2]]


def test_the_tangent_ahead_costs_a_pass_each_way_and_only_its_own_estimate_asks_for_it():
    network, images, labels, _, _ = two_class_line(0, count=200)
    model = Counted(network).eval()
    found = margins(model, images, labels, norm="linf", ahead=True)
    assert (model.forwards, model.backwards) == (400, 400)
    plain = margins(model, images, labels, norm="linf")
    assert torch.equal(plain.losses, found.losses[:, :1])
    assert torch.equal(plain.grad_norms, found.grad_norms[:, :1])
    distances = (-found.losses / found.grad_norms)[:, 0]
    more, fewer = (estimate_by_calibration(which, distances) for which in (found, plain))
    torch.testing.assert_close(omega_bound(found, fewer), omega_bound(plain, fewer))
    other = found._replace(ahead=False)  # as many columns, of other things
    with pytest.raises(ValueError, match="with the tangent ahead"):
        omega_bound(other, more)


def test_the_tangent_ahead_is_known_where_there_is_no_gradient_and_refused_where_logits_are_not_finite():
    flat = Changed(LINE[0], images=lambda x: torch.where(torch.arange(40)[:, None] < 1, x.detach(), x)).eval()
    found = margins(flat, LINE[1], LINE[2], norm="l2", ahead=True)
    assert found.losses.isfinite().all()
    assert found.losses[0, 0] == found.losses[0, 1]
    calls = []

    def second(z):
        calls.append(1)
        return z * (math.nan if len(calls) == 2 else 1)

    with pytest.raises(ValueError, match="not finite"):
        margins(Changed(LINE[0], second).eval(), LINE[1], LINE[2], norm="l2", ahead=True)


def test_scaled_logits_change_no_bound_of_the_logits_and_are_refused_by_the_probabilities():
    """Logits times 100: the classifier is the same, its softmax gradients are gone."""
    network, (images, labels) = copy.deepcopy(digits_mlp(0)).double(), digits()
    images, labels = images[898:998].double(), labels[898:998]
    scaled = copy.deepcopy(network)
    scaled[2].weight.mul_(100)
    scaled[2].bias.mul_(100)
    distances = attacks.smallest(network, images, labels, norm="linf", attacks=("fab",)).distances
    results = []
    for model in (network, scaled):
        found = margins(model, images, labels, norm="linf")
        ascent = estimate_by_ascent(model, images, labels, norm="linf", steps=4, generator=generator())
        calibrated = estimate_by_calibration(found, distances, alpha=0.02)
        results.append([omega_bound(found, e) for e in (ascent, calibrated)])
    for plain, times_100 in zip(*results, strict=True):
        torch.testing.assert_close(plain, times_100, rtol=1e-5, atol=1e-9)
    single = scaled.float(), images.float(), labels
    masked = margins(*single, norm="linf", loss="probabilities")
    assert (masked.grad_norms == 0).double().mean() > 0.5
    sampled = sampled_estimate(*single, norm="linf", blocks=10, generator=generator())
    for bound in (lipschitz_bound, omega_bound):
        with pytest.raises(ValueError, match="exactly zero"):
            bound(masked, sampled)


def test_bounds_refuse_an_estimate_made_for_something_else():
    found = bounds.Margins(torch.zeros(3, 1), torch.ones(3, 1), "l2", 1, "logits")
    for other in (("linf", 1, "logits"), ("l2", 5, "logits"), ("l2", 1, "probabilities")):
        estimate = Estimate(*other, 1.0, torch.ones(1), torch.ones(1))
        with pytest.raises(ValueError, match="the estimate has"):
            omega_bound(found, estimate)


def test_a_calibration_with_several_rivals_is_not_used_with_fewer():
    gaps, distances = torch.linspace(1, 2, 99)[:, None].expand(99, 3), torch.linspace(0.5, 1, 99)
    found = bounds.Margins(-gaps, torch.ones(99, 3), "l2", 1, "logits")
    estimate = estimate_by_calibration(found, distances, alpha=0.05)
    fewer = bounds.Margins(found.losses[:, :2], found.grad_norms[:, :2], "l2", 1, "logits")
    assert (omega_bound(found, estimate) > 0).all()
    for bound in (omega_bound, lipschitz_bound):
        with pytest.raises(ValueError, match="3 rivals"):
            bound(fewer, estimate)


def test_several_rivals_give_the_smallest_of_their_bounds():
    losses, norms = torch.tensor([[-1.0, -1.5], [-1.0, -4.0]]), torch.tensor([[1.0, 3.0], [1.0, 1.0]])
    found = bounds.Margins(losses, norms, "l2", 1, "logits")
    estimate = Estimate("l2", 1, "logits", 2.0, torch.tensor([5.0]), torch.tensor([0.0]))
    torch.testing.assert_close(omega_bound(found, estimate), torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(lipschitz_bound(found, estimate), torch.tensor([0.5, 0.5]))


def test_nothing_to_bound_is_said():
    network, images, labels, _, _ = two_class_line(0)
    with pytest.raises(ValueError, match="no image is classified correctly"):
        estimate_by_ascent(network, images, 1 - labels, norm="l2")


def test_violations_by_hand():
    found = violations(torch.tensor([0.0, 1.0, 2.0, 3.0, 1.0]), torch.tensor([0.0, 2.0, 1.0, torch.inf, 1.0]))
    assert (found.count, found.images, found.rate, found.worst) == (1, 5, 0.2, 2.0)
    assert found.tightness == pytest.approx(4 / 4)
    interval = scipy.stats.beta.ppf([0.025, 0.975], [1, 2], [5, 4])
    assert (found.low, found.high) == pytest.approx(tuple(interval), abs=1e-9)
    close = torch.tensor([1 + 1e-7, 1 + 1e-5, 1e-9], dtype=torch.float64)  # a rounding above; more; misclassified
    assert violations(close, torch.tensor([1.0, 1.0, 0.0])).count == 2


def test_the_code_of_the_documentation_runs(capsys):
    """On a linear network, where the distance is the bound: none is false, and it is sharp."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "bounds.md").read_text(), flags=re.DOTALL)
    network, images, labels, gaps, w = two_class_line(0, count=240)
    model = Changed(network, with_class(-5.0)).eval()  # three rivals need four classes
    model = Changed(model, with_class(-6.0)).eval()
    attacked = types.SimpleNamespace(distances=gaps / w.norm())
    names = {"model": model, "images": images, "labels": labels, "others": images, "other_labels": labels}
    exec(block, names | {"attacked": attacked, "attacked_others": attacked})
    assert capsys.readouterr().out.startswith("Violations(count=0, images=240, rate=0.0")


# --- figures -------------------------------------------------------------------------------------------------


def test_the_spread_and_the_interval_count_estimates_and_not_images():
    of = lambda rate: violations(torch.arange(100.0) / 100 + rate, torch.ones(100))  # noqa: E731
    found = [of(rate) for rate in (0.11, 0.31, 0.06, 0.21, 0.06)]
    assert [f.count for f in found] == [10, 30, 5, 20, 5]
    assert benchmark.spread(found) == "10.0 (5.0 to 30.0)"
    mean, sd = np.mean([10, 30, 5, 20, 5]), np.std([10, 30, 5, 20, 5], ddof=1)
    low, high = scipy.stats.t.interval(0.95, 4, mean, sd / math.sqrt(5))
    assert benchmark.interval(found) == f"{mean:.2f} ({max(0, low):.2f} to {high:.2f})"
    assert benchmark.interval(found[:1]) == "10.00"
    assert benchmark.interval(found[:2]) == "20.00"  # too few
    assert benchmark.interval(found[:1] * 9) == "10.00"  # that nine agree is no certainty
    assert benchmark.interval([of(1.01)] * 4 + [of(0.01)]).endswith("to 100.00)")


def test_draws_of_the_sampled_estimate_differ_by_their_seed_alone():
    network, images, labels, gaps, w = two_class_line(0)
    model, exact = Changed(network, torch.tanh).eval(), gaps / w.norm()
    first, second = (benchmark.redraws(model, *[(images, labels)] * 2, exact, "l2", draws) for draws in (2, 1))
    assert len(first) == 2
    assert first[0] == second[0]
    assert first[0].tightness != first[1].tightness


def test_the_papers_table_1_contradicts_six_of_its_own_bounds():
    """Where more images have an adversarial one within eps than have a bound below eps, some bound is false."""
    found = {(name, eps): percent for name, eps, percent in benchmark.at_least_false()}
    assert found == {
        ("squared l1 (DBP) lambda=0.1", "2/255"): 15.94,
        ("squared l1 (FD) lambda=0.1", "2/255"): 5.52,
        ("squared l1 (FD) lambda=1 h=0.1", "8/255"): 3.39,
        ("linf For Free AT m=2", "2/255"): 2.53,
        ("squared l1 (DBP) lambda=1", "2/255"): 0.90,
        ("linf 7-step AT eps=2/255", "2/255"): 0.78,
    }


# --- cost --------------------------------------------------------------------------------------------------


def test_a_bound_costs_one_forward_and_one_backward_per_image():
    network, images, labels, _, _ = two_class_line(0)
    model = Counted(network).eval()
    found = margins(model, images, labels, norm="l2", batch_size=7)
    estimate = Estimate("l2", 1, "logits", 2.0, torch.tensor([5.0]), torch.tensor([0.0]))
    omega_bound(found, estimate), lipschitz_bound(found, estimate)
    assert (model.forwards, model.backwards) == (40, 40)


def test_one_zero_gradient_in_a_hundred_is_chance_and_two_are_masked():
    """A gradient may vanish by chance, on an image in a hundred; its bound is then the largest radius."""
    estimate = bounds.Estimate("l2", 1, "logits", 1.0, torch.tensor([0.1, 1.0]), torch.zeros(2))
    for zeros in (1, 2):
        norms = torch.ones(100, 1).index_fill(0, torch.arange(zeros), 0.0)
        found = bounds.Margins(-torch.full((100, 1), 0.5), norms, "l2", 1, "logits")
        if zeros == 1:
            torch.testing.assert_close(omega_bound(found, estimate), torch.tensor([1.0, *[0.5] * 99]))
        else:
            with pytest.raises(ValueError, match=r"2\.0% of the gradients"):
                omega_bound(found, estimate)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_default_radii_span_the_linearised_distances(norm):
    network, images, labels, gaps, w = LINE
    median = (gaps / (w.norm() if norm == "l2" else w.abs().sum())).median()
    radii = bounds.default_radii(network, images, labels, norm=norm, count=5)
    torch.testing.assert_close(radii[[0, -1]] / median, torch.tensor([1 / 20, 4.0], dtype=radii.dtype))
    torch.testing.assert_close(radii[1:] / radii[:-1], torch.full((4,), 80**0.25, dtype=radii.dtype), rtol=1e-5, atol=0)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_gradient_that_is_not_a_number_is_refused_for_what_it_is(ahead):
    """The slope of a root at 0 is infinite, times 0: of a grey image, whose logits are finite."""

    def contrast(x):
        return torch.stack([(x - x.mean(1, keepdim=True)).square().mean(1).sqrt(), 0 * x[:, 0]], 1)

    images = torch.tensor([[0.2, 0.4], [0.5, 0.5]])
    assert contrast(images).isfinite().all()
    with pytest.raises(ValueError, match="the gradient of the margin is not a number on some images"):
        bounds.margins(contrast, images, torch.zeros(2, dtype=torch.int64), norm="l2", ahead=ahead)


def test_sampling_reports_the_fitted_quantile_beyond_what_it_saw():
    network, (images, labels) = digits_mlp(0), digits()
    sampled = sampled_estimate(network, images, labels, norm="linf", blocks=20, p=1e-3, generator=generator())
    maxima = bounds.sample_maxima(
        network, images, labels, norm="linf", eps=sampled.eps, blocks=20, generator=generator()
    )
    levels = np.array([max(fit_gev(column).quantile(1e-3), column.max()) for column in maxima.double().T.numpy()])
    np.testing.assert_allclose([sampled.lipschitz, *sampled.omega], levels, rtol=1e-5)
    assert maxima.shape == (20, 25)
    assert levels[0] > maxima[:, 0].max()


def test_estimates_cost_what_their_documentation_says():
    network, images, labels, _, _ = two_class_line(0)
    model, eps = Counted(network).eval(), torch.tensor([0.1, 0.2, 0.3])
    how = {"norm": "l2", "eps": eps, "generator": generator()}
    estimate_by_ascent(model, images, labels, restarts=2, steps=4, batch_size=16, **how)
    assert model.forwards == 40 * (3 * (1 + 2) * (4 + 1) + 1)
    model.forwards = model.backwards = 0
    sampled_estimate(model, images, labels, blocks=6, block_size=8, **how)
    assert (model.forwards, model.backwards) == (6 * 8 * (3 + 1), 6 * 8)


def test_loops_wait_for_their_device_once_a_pass():
    """Whatever looks at a number makes a GPU finish all it has been given: in a loop, at most once for a pass."""
    network, images, labels, _, _ = two_class_line(0)
    eps, how = torch.tensor([0.1, 0.2]), {"norm": "l2", "generator": generator()}
    three = Changed(network, with_class(-5.0)).eval()

    def looks(call, *arguments, **options):
        with oracle.Looks() as seen:
            call(*arguments, **options)
        return seen.count

    few, many = (looks(estimate_by_ascent, network, images, labels, eps=eps, steps=k, **how) for k in (2, 12))
    passes = 2 * 2 * 10  # radii, starts, steps: each a pass and a projection
    assert few <= many <= few + 2 * passes
    few, many = (looks(sampled_estimate, network, images, labels, eps=eps, blocks=k, **how) for k in (6, 12))
    assert many <= few + 6 * (2 + 1)
    few, many = (looks(margins, three, images, labels, norm="l2", rivals=2, batch_size=k) for k in (40, 5))
    assert many <= few + 7 * 3
    smoothing = {"sigma": 0.5, "n": 40, "generator": generator()}
    few, many = (looks(certify_smoothing, network, images[:k], batch_size=40 // k, **smoothing) for k in (1, 4))
    assert many <= few + (1 + 4) * 4 * 10


def test_looks_at_numbers_are_counted():
    """The counter itself, on each of the ways to look."""
    x = torch.arange(3.0)
    ways = [lambda: x.tolist(), lambda: x[0].item(), lambda: bool(x.any()), lambda: float(x.sum()), lambda: x[x > 1]]
    for way in [*ways, lambda: x.nonzero(), lambda: x.cpu(), lambda: int(x[0])]:
        with oracle.Looks() as seen:
            way()
        assert seen.count == 1
    with oracle.Looks() as seen:
        (x + 1).sum().where(x > 1, 0).topk(2)
    assert seen.count == 0


# --- extreme values ----------------------------------------------------------------------------------------

# Annual maximum sea levels at Port Pirie, 1923-1987, in metres (Coles 2001, Section 3.4.1).
PORT_PIRIE = [
    4.03, 3.83, 3.65, 3.88, 4.01, 4.08, 4.18, 3.80, 4.36, 3.96, 3.98, 4.69, 3.85, 3.96, 3.85, 3.93, 3.75, 3.63, 3.57,
    4.25, 3.97, 4.05, 4.24, 4.22, 3.73, 4.37, 4.06, 3.71, 3.96, 4.06, 4.55, 3.79, 3.89, 4.11, 3.85, 3.86, 3.86, 4.21,
    4.01, 4.11, 4.24, 3.96, 4.21, 3.74, 3.85, 3.88, 3.66, 4.11, 3.71, 4.18, 3.90, 3.78, 3.91, 3.72, 4.00, 3.66, 3.62,
    4.33, 4.55, 3.75, 4.08, 3.90, 3.88, 3.94, 4.33,
]  # fmt: skip


def test_gev_fit_agrees_with_published_values():
    """Coles (2001): loc 3.87, scale 0.198, xi -0.050, log-likelihood 4.34; 100-year level 4.69."""
    gev = fit_gev(PORT_PIRIE)
    assert (gev.loc, gev.scale, gev.xi) == pytest.approx((3.8747, 0.1980, -0.0501), abs=5e-4)
    assert scipy.stats.genextreme.logpdf(PORT_PIRIE, -gev.xi, gev.loc, gev.scale).sum() == pytest.approx(4.34, abs=5e-3)
    assert gev.quantile(0.01) == pytest.approx(4.69, abs=5e-3)


def tails(low, high):
    """xi in thousandths: scipy's own formulas lose all digits at an xi of, say, 1e-300."""
    return st.integers(int(1000 * low), int(1000 * high)).map(lambda k: k / 1000)


def draw_gev(xi, n, seed, loc=0.0, scale=1.0):
    return scipy.stats.genextreme.rvs(-xi, loc, scale, size=n, random_state=seed)


@settings(max_examples=25)
@given(seeds, tails(-0.6, 0.8), st.integers(20, 300))
def test_no_search_of_scipys_likelihood_finds_better(seed, xi, n):
    """Independent density, several starts, on standardised data: our fit's likelihood is the highest with |xi| <= 1."""
    sample = draw_gev(xi, n, seed)
    gev = fit_gev(sample)
    negative = lambda x: -scipy.stats.genextreme.logpdf(sample, -x[0], x[1], math.exp(x[2])).sum()  # noqa: E731
    ours = negative([gev.xi, gev.loc, math.log(gev.scale)])
    for start in ([xi, 0.0, 0.0], [0.1, np.median(sample), math.log(sample.std())]):
        other = scipy.optimize.minimize(negative, start, method="Nelder-Mead")
        assert ours <= other.fun + 1e-4 or abs(other.x[0]) > 1


@given(tails(-0.9, 0.9), st.floats(1e-4, 0.5))
def test_gev_quantiles_are_scipys(xi, p):
    gev = bounds.GEV(xi, 1.5, 0.3)
    reference = scipy.stats.genextreme(-xi, 1.5, 0.3)
    assert float(gev.quantile(p)) == pytest.approx(reference.isf(p), rel=1e-6)


@settings(max_examples=25)
@given(seeds, tails(-0.4, 0.4), st.sampled_from([1e-9, 1e-5, 1e-2, 1.0, 1e4]), st.floats(-2, 2))
def test_gev_fit_is_equivariant(seed, xi, b, a):
    sample = draw_gev(xi, 60, seed)
    plain, moved = fit_gev(sample), fit_gev(a + b * sample)
    assert moved.xi == pytest.approx(plain.xi, abs=1e-4)
    for p in (0.1, 0.001):
        assert (moved.quantile(p) - a) / b == pytest.approx(plain.quantile(p), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_heavy_and_bounded_tails_have_the_textbooks_sign(seed):
    assert fit_gev(draw_gev(0.5, 400, seed)).xi > 0.2
    assert fit_gev(np.random.default_rng(seed).uniform(size=(400, 50)).max(1)).xi < -0.5


@pytest.mark.parametrize(
    "sample",
    [
        [0.3] * 20,
        [0.0] * 20,
        [1.0, 2.0, 2.5, 4.0, 5.0],
        [1e-3] * 10 + [2e-3] * 10,
        np.minimum(draw_gev(0.0, 100, 0), 1.0),
        [0.1] * 99 + [5.0],
        np.round(draw_gev(0.0, 100, 1), 1),
        np.append(draw_gev(-0.2, 99, 2), 100.0),
        np.linspace(0, 1, 50) ** 0.2,
        np.append(np.zeros(50), np.random.default_rng(0).exponential(size=50)),
    ],
    ids=[
        "constant",
        "zeros",
        "five",
        "two values",
        "capped",
        "one outlier in a constant",
        "rounded",
        "one outlier",
        "limit",
        "half of them the same, the least",
    ],
)
def test_awkward_samples_never_give_less_than_their_maximum(sample):
    gev = fit_gev(sample)
    assert math.isfinite(gev.xi + gev.loc + gev.scale)
    assert abs(gev.xi) <= 1
    assert gev.quantile(1e-3) <= np.mean(sample) + 1e4 * np.std(sample)  # no figure of another world
    column = torch.as_tensor(np.array(sample))[:, None].expand(-1, 2)
    for p in (0.5, 0.01, 0.001):
        found = estimate_by_sampling(column, torch.ones(1), norm="l2", p=p)
        assert math.isfinite(found.lipschitz)
        assert found.lipschitz >= np.max(sample)
        assert found.omega.tolist() == pytest.approx([found.lipschitz])


def test_gev_refuses_too_little_or_nonsense():
    for sample in ([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, math.nan, 3.0, 4.0, 5.0], np.ones((5, 5))):
        with pytest.raises(ValueError, match="5 finite maxima"):
            fit_gev(sample)


# --- randomized smoothing ----------------------------------------------------------------------------------


def halfplane(seed=0, d=8):
    draw = generator(seed)
    w = torch.randn(d, generator=draw)
    images = torch.rand(300, d, generator=draw)
    bias = -(images @ w).median()
    model = linear_network(torch.stack([0 * w, w]), torch.stack([0 * bias, bias]), torch.float32)
    return model, images, (images @ w + bias) / w.norm()


def test_smoothed_certificates_of_a_halfplane_fail_at_most_as_often_as_they_say():
    """The smoothed linear classifier is the classifier itself: its exact radius is the distance to the plane."""
    model, images, signed = halfplane()
    alpha = 0.1
    found = certify_smoothing(model, images, sigma=0.5, n0=50, n=200, alpha=alpha, batch_size=64, generator=generator())
    wrong = (found.radii > signed.abs()) | ((found.classes >= 0) & (found.classes != (signed > 0)))
    assert 0 < int(wrong.sum()) <= scipy.stats.binom.ppf(0.999, 300, alpha)
    assert found.cap == pytest.approx(0.5 * scipy.stats.norm.ppf(alpha ** (1 / 200)))
    assert found.radii.max() <= found.cap + 1e-12
    hasty = certify_smoothing(model, images, sigma=0.5, n0=1, n=200, alpha=alpha, generator=generator())
    wrong = (hasty.classes >= 0) & (hasty.classes != (signed > 0))
    assert int(wrong.sum()) <= scipy.stats.binom.ppf(0.999, 300, alpha)  # a wrong choice abstains
    abstained = found.classes == -1
    assert abstained.any()
    assert (found.radii[abstained] == 0).all()
    assert (found.radii[~abstained] > 0).all()
    assert signed[abstained].abs().max() < 0.25  # only near the plane


def test_smoothed_radii_agree_with_the_formula_and_with_direct_simulation():
    model, images, signed = halfplane(1)
    images, signed, sigma, n = images[:40], signed[:40], 0.4, 4000
    found = certify_smoothing(model, images, sigma=sigma, n=n, generator=generator(1))
    for i in range(0, 40, 5):
        noise = np.random.default_rng(i).standard_normal(n) * sigma
        hits = max(int((float(signed[i]) + noise > 0).sum()), int((float(signed[i]) + noise <= 0).sum()))
        lower = scipy.stats.binomtest(hits, n, alternative="greater").proportion_ci(0.999, "exact").low
        spread = 4 * sigma * math.sqrt(0.25 / n) / scipy.stats.norm.pdf(min(2.5, abs(float(signed[i])) / sigma))
        assert float(found.radii[i]) == pytest.approx(max(0, sigma * scipy.stats.norm.ppf(lower)), abs=spread)


def test_a_constant_classifier_gets_the_cap_and_samples_are_fresh():
    seen = []

    class Constant(nn.Module):
        def forward(self, x):
            seen.append(x)
            return torch.tensor([[0.0, 1.0, 0.5]]).expand(len(x), 3)

    image = torch.full((2, 3), 0.5)
    found = certify_smoothing(Constant().eval(), image, sigma=2.0, n0=10, n=50, alpha=0.01, batch_size=20)
    assert found.classes.tolist() == [1, 1]
    np.testing.assert_allclose(found.radii, found.cap, rtol=1e-9)
    noisy = torch.cat(seen)
    assert noisy.shape == (120, 3)
    assert len(noisy.unique(dim=0)) == 120
    assert 1.5 < float((noisy - 0.5).std()) < 2.5


def test_smoothing_is_reproduced_by_its_generator():
    model, images, _ = halfplane(2)
    first, again = (certify_smoothing(model, images[:5], sigma=0.3, n=100, generator=generator(5)) for _ in range(2))
    assert torch.equal(first.radii, again.radii)
