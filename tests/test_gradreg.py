"""The penalty: finite differences against exact gradients, in closed form where there is one."""

import math
from functools import partial
from unittest import mock

import pytest
import scipy.stats
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import digits, forward_penalty
from torch import nn
from torch.nn.functional import cross_entropy as torch_cross_entropy
from torch.utils.checkpoint import checkpoint

import gradreg
from gradreg import (
    ascent_penalty,
    direction,
    dual_norm,
    exact_penalty,
    fd_penalty,
    input_gradient,
    uniform_ball,
)

NORMS = ("l2", "linf", "l1")
ORDER = {"l2": 2, "linf": math.inf, "l1": 1}
seeds, norms = st.integers(0, 2**32 - 1), st.sampled_from(NORMS)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def smooth_network(seed, dtype=torch.float64, activation=nn.SiLU):
    torch.manual_seed(seed)
    layers = nn.Conv2d(2, 4, 3), activation(), nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 3)
    return nn.Sequential(*layers).to(dtype)


def smooth_case(seed, count=4, dtype=torch.float64):
    """A smooth toy network with its per-image loss and a batch of images."""
    network = smooth_network(seed, dtype)
    labels = torch.arange(count) % 3
    return network, lambda z: gradreg.cross_entropy(network(z), labels), draw(seed + 1, count, 2, 6, 6, dtype=dtype)


def slope(grad, norm):
    return (grad * direction(grad, norm)).flatten(1).sum(1)


def weight_gradient(out, network):
    return torch.cat([g.flatten() for g in torch.autograd.grad(out.penalties.sum(), list(network.parameters()))])


# --- the input gradient is that of the sum ----------------------------------------------------------------


@given(seeds)
def test_input_gradient_of_a_batch_is_that_of_each_image_alone(seed):
    network, loss_fn, x = smooth_case(seed)
    losses, grad = input_gradient(loss_fn, x)
    for i in range(len(x)):
        alone = lambda z, i=i: gradreg.cross_entropy(network(z), torch.tensor([i % 3]))  # noqa: E731
        loss, row = input_gradient(alone, x[i : i + 1])
        torch.testing.assert_close(losses[i : i + 1], loss)
        torch.testing.assert_close(grad[i : i + 1], row)


def test_input_gradient_touches_nothing_else():
    network, loss_fn, x = smooth_case(0)
    before = x.clone()
    losses, grad = input_gradient(loss_fn, x)
    assert all(p.grad is None for p in network.parameters())
    assert not any(tensor.requires_grad for tensor in (losses, grad, x))
    assert torch.equal(x, before)


def test_input_gradient_works_under_no_grad():
    _, loss_fn, x = smooth_case(0)
    with torch.no_grad():
        _, grad = input_gradient(loss_fn, x)
    assert torch.equal(grad, input_gradient(loss_fn, x)[1])


@pytest.mark.parametrize("penalty", [fd_penalty, exact_penalty, ascent_penalty, None])
def test_a_mean_over_the_batch_is_refused(penalty):
    network, _, x = smooth_case(0)
    mean = lambda z: torch_cross_entropy(network(z), torch.arange(4) % 3)  # noqa: E731
    how = {"norm": "l2"} | {fd_penalty: {"h": 0.01}, ascent_penalty: {"lam": 0.1}}.get(penalty, {})
    with pytest.raises(ValueError, match=r"one loss per image, shape \(4,\), not \(\)"):
        penalty(mean, x, **how) if penalty else input_gradient(mean, x)


@given(seeds, st.floats(-1e4, 1e4))
def test_cross_entropy_is_torchs(seed, shift):
    logits, labels = draw(seed, 5, 7) * 10 + shift, torch.arange(5)
    torch.testing.assert_close(
        gradreg.cross_entropy(logits, labels), torch_cross_entropy(logits, labels, reduction="none")
    )


@given(seeds, st.integers(1, 4))
def test_the_penalty_on_a_random_part_is_on_average_that_on_the_whole_batch(seed, m):
    """Over all cyclic parts of m images, in each of which every image is as often as any other."""
    _, loss_fn, x = smooth_case(seed)
    whole = exact_penalty(loss_fn, x, norm="l2")
    means = []
    for start in range(len(x)):
        order = [(start + k) % len(x) for k in range(len(x))]
        part = gradreg.Penalised(*(values[order[:m]] for values in whole))
        out = gradreg.joined(part, whole.losses[order[m:]])
        assert len(out.penalties) == len(out.losses) == len(x)
        torch.testing.assert_close(out.losses, whole.losses[order])
        assert (out.penalties[m:] == 0).all()
        assert len(out.grad) == m
        means.append(out.objective(lam=0.7))
    torch.testing.assert_close(torch.stack(means).mean(), whole.objective(lam=0.7))


# --- norms and directions ---------------------------------------------------------------------------------


@given(seeds, norms)
def test_dual_norm_is_the_steepest_rise_over_the_attacks_unit_ball(seed, norm):
    """||g||_* = max <g, v> over ||v|| <= 1: reached at the known maximiser, exceeded by no random v."""
    g = draw(seed, 3, 2, 5)
    flat = g.flatten(1)
    best = {
        "l2": flat / flat.norm(dim=1, keepdim=True),
        "linf": flat.sign(),
        "l1": torch.nn.functional.one_hot(flat.abs().argmax(1), 10) * flat.sign(),
    }[norm]
    order = {"l2": 2, "linf": math.inf, "l1": 1}[norm]
    torch.testing.assert_close(dual_norm(g, norm), (flat * best).sum(1))
    v = draw(seed + 1, 200, 1, 10)
    v = v / torch.linalg.vector_norm(v, order, dim=2, keepdim=True)
    assert ((flat * v).sum(2) <= dual_norm(g, norm) * (1 + 1e-12)).all()


@given(seeds, norms, st.sampled_from([torch.float32, torch.float64]), st.integers(-30, 30))
def test_direction_gives_the_slope_it_promises_at_every_scale(seed, norm, dtype, exponent):
    g = draw(seed, 4, 3, 4, dtype=dtype) * 10.0**exponent
    d, n = direction(g, norm), 12
    expected = dual_norm(g.double(), norm) / (math.sqrt(n) if norm == "linf" else 1)
    torch.testing.assert_close(slope(g.double(), norm), expected, rtol=1e-5, atol=0)
    assert d.dtype == dtype
    assert d.shape == g.shape
    assert (d.flatten(1).norm(dim=1) <= 1 + 1e-6).all()


@pytest.mark.parametrize("norm", NORMS)
def test_direction_is_zero_where_the_gradient_is_and_nan_where_it_is_nan(norm):
    g = torch.zeros(3, 2, 2)
    g[1, 0, 0], g[2] = 5.0, math.nan
    d = direction(g, norm)
    assert torch.equal(d[0], torch.zeros(2, 2))
    assert d[1, 0, 0] > 0
    assert d[2].isnan().any(), "a NaN gradient must not become a harmless direction"


@pytest.mark.parametrize("call", [lambda g: dual_norm(g, "L2"), lambda g: direction(g, "inf")])
def test_an_unknown_norm_is_refused(call):
    with pytest.raises(ValueError, match="norm must be one of l2, linf, l1"):
        call(torch.zeros(1, 2))


# --- the three penalties ----------------------------------------------------------------------------------


@given(seeds, norms, st.booleans())
def test_exact_and_forward_mode_agree_in_value_and_weight_gradient(seed, norm, squared):
    network, loss_fn, x = smooth_case(seed)
    exact = exact_penalty(loss_fn, x, norm=norm, squared=squared)
    jvp = forward_penalty(loss_fn, x, norm=norm, squared=squared)
    torch.testing.assert_close(exact.penalties, jvp.penalties, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(weight_gradient(exact, network), weight_gradient(jvp, network), rtol=1e-7, atol=1e-10)


@given(seeds, norms)
def test_exact_penalty_is_the_squared_dual_norm_with_its_true_weight_gradient(seed, norm):
    """Against the textbook form: differentiate ||g||_*^2 itself, no direction detached anywhere."""
    network, loss_fn, x = smooth_case(seed)
    out = exact_penalty(loss_fn, x, norm=norm)
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss_fn(x).sum(), x, create_graph=True)
    textbook = dual_norm(g, norm).square() / (x[0].numel() if norm == "linf" else 1)
    torch.testing.assert_close(out.penalties, textbook)
    truth = torch.cat([t.flatten() for t in torch.autograd.grad(textbook.sum(), list(network.parameters()))])
    torch.testing.assert_close(weight_gradient(out, network), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", NORMS)
def test_float32_and_float64_agree(norm, dtype):
    network, loss_fn, x = smooth_case(3, dtype=dtype)
    reference_network, reference_fn, _ = smooth_case(3)
    reference_network.load_state_dict(network.state_dict())
    reference = exact_penalty(reference_fn, x.double(), norm=norm)
    for out in (
        exact_penalty(loss_fn, x, norm=norm),
        forward_penalty(loss_fn, x, norm=norm),
        fd_penalty(loss_fn, x, norm=norm, h=1e-3),
    ):
        assert out.penalties.dtype == out.losses.dtype == out.grad.dtype == dtype
        torch.testing.assert_close(out.penalties.double(), reference.penalties, rtol=5e-3, atol=1e-5)
        torch.testing.assert_close(out.losses.double(), reference.losses, rtol=1e-5, atol=1e-6)


@given(seeds, norms)
def test_fd_error_shrinks_with_h(seed, norm):
    """Its error is O(h), while rounding is far below."""
    _, loss_fn, x = smooth_case(seed)
    exact = slope(input_gradient(loss_fn, x)[1], norm)

    def error(h):
        out = fd_penalty(loss_fn, x, norm=norm, h=h, squared=False)
        return (out.penalties - exact.abs()).abs().max().item()

    assert error(1e-3) <= 0.2 * error(1e-2) + 1e-11


@given(seeds, norms)
def test_fd_weight_gradient_tends_to_that_of_double_backpropagation(seed, norm):
    network, loss_fn, x = smooth_case(seed)
    truth = weight_gradient(exact_penalty(loss_fn, x, norm=norm), network)
    fd = weight_gradient(fd_penalty(loss_fn, x, norm=norm, h=1e-6), network)
    assert (fd - truth).norm() <= 1e-4 * truth.norm() + 1e-7
    rough = weight_gradient(fd_penalty(loss_fn, x, norm=norm, h=1e-2), network)
    assert (fd - truth).norm() <= (rough - truth).norm() + 1e-9


@pytest.mark.parametrize(("activation", "least", "most"), [(torch.relu, 5, 20), (torch.tanh, 0.9, 1.1)])
def test_where_relus_switch_the_variance_of_the_weight_gradient_grows_as_1_over_h(activation, least, most):
    """Each image has biases of its own, so one backward pass gives the weight gradient of each."""
    n, hidden = 20_000, 32
    first, last, x = draw(0, hidden, 8) / 8**0.5, draw(1, 3, hidden) / hidden**0.5, draw(2, n, 8)
    labels, variances = torch.arange(n) % 3, []
    for h in (1e-3, 1e-2):
        biases = torch.zeros(n, hidden, dtype=torch.float64, requires_grad=True)
        loss_fn = lambda z, b=biases: gradreg.cross_entropy(activation(z @ first.T + b) @ last.T, labels)  # noqa: E731
        out = fd_penalty(loss_fn, x, norm="l2", h=h)
        (each,) = torch.autograd.grad(out.penalties.sum(), biases)
        variances.append(each.var(0).sum())
    assert least < variances[0] / variances[1] < most


@given(seeds, norms, st.floats(1e-3, 1.0))
def test_on_a_quadratic_loss_the_fd_error_is_the_closed_form(seed, norm, h):
    """l(x) = b.x + x'Ax/2: the forward quotient is <g, d> + h/2 d'Ad exactly."""
    a, b, x = draw(seed, 6, 6), draw(seed + 1, 6), draw(seed + 2, 3, 6)
    a = a + a.T
    out = fd_penalty(lambda z: z @ b + 0.5 * (z @ a * z).sum(1), x, norm=norm, h=h, squared=False)
    g = b + x @ a
    torch.testing.assert_close(out.grad, g)
    d = direction(g, norm)
    expected = (g * d).sum(1) + h / 2 * (d @ a * d).sum(1)
    torch.testing.assert_close(out.penalties, expected.abs(), rtol=1e-8, atol=1e-8)


def test_an_overshooting_step_still_gives_a_positive_penalty():
    """l(x) = x - 10 x^2 falls by 9 over a step of 1, where it starts to rise: the absolute slope counts."""
    out = fd_penalty(lambda z: (z - 10 * z**2).sum(1), torch.zeros(1, 1), norm="l2", h=1.0, squared=False)
    assert out.penalties.tolist() == [9.0]


@given(seeds, norms)
def test_the_weights_see_the_losses_the_penalty_and_no_direction(seed, norm):
    """d is detached, l(x) is not: the weight gradient is that of the formula with z = x + h d held fixed."""
    network, loss_fn, x = smooth_case(seed)
    h, lam = 0.05, 0.7
    out = fd_penalty(loss_fn, x, norm=norm, h=h)
    got = torch.autograd.grad(out.objective(lam), list(network.parameters()))
    z = x + h * direction(input_gradient(loss_fn, x)[1], norm)
    formula = loss_fn(x).mean() + lam / 2 * ((loss_fn(z) - loss_fn(x)) / h).square().mean()
    for mine, theirs in zip(got, torch.autograd.grad(formula, list(network.parameters())), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("squared", [True, False])
def test_a_zero_gradient_gives_a_zero_penalty_and_finite_weight_gradients(norm, squared):
    """Image 0 sits where the loss is flat; image 1 does not."""
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    loss_fn = lambda z: ((weight * z) ** 2).sum(1)  # noqa: E731
    x = torch.tensor([[0.0] * 4, [1.0] * 4], dtype=torch.float64)
    for penalty, how in (
        (exact_penalty, {}),
        (forward_penalty, {}),
        (fd_penalty, {"h": 1e-3}),
        (ascent_penalty, {"lam": 1.0}),
    ):
        out = penalty(loss_fn, x, norm=norm, squared=squared, **how)
        assert out.penalties[0] == 0
        assert out.penalties[1] > 0
        (g,) = torch.autograd.grad(out.objective(1.0), weight)
        assert g.isfinite().all()


@pytest.mark.parametrize("h", [0.0, -0.1, math.inf, math.nan])
def test_a_step_that_is_not_positive_is_refused(h):
    _, loss_fn, x = smooth_case(0)
    with pytest.raises(ValueError, match="h must be a positive finite number"):
        fd_penalty(loss_fn, x, norm="l2", h=h)


def test_objective_has_the_half_of_eq_8():
    out = gradreg.Penalised(torch.tensor([1.0, 3.0]), torch.tensor([4.0, 8.0]), torch.zeros(2, 1))
    assert out.objective(0.5).item() == 2.0 + 0.25 * 6.0


@given(seeds, norms, st.floats(0.01, 0.99))
def test_proposition_3_1_bounds_the_attack_with_quadratic_cost(seed, norm, share):
    """l(x + v) = l + <g, v> + v'Av/2, of curvature C: no v does better than (8); in l2 with A = C I one equals it."""
    a, g, v = draw(seed, 6, 6), draw(seed + 1, 6), draw(seed + 2, 500, 6)
    a = a + a.T
    eigenvalues, absolute = torch.linalg.eigvalsh(a), a.abs()
    curvature = {"l2": eigenvalues.max().clamp_min(0), "linf": absolute.sum(), "l1": absolute.max()}[norm].item()
    delta = share / max(curvature, 0.1)
    bound = gradreg.penalty_weight(delta, curvature) / 2 * dual_norm(g[None], norm).square()
    v = v * torch.logspace(-3, 2, 500, dtype=v.dtype)[:, None]
    cost = torch.linalg.vector_norm(v, ORDER[norm], dim=1).square() / (2 * delta)
    assert (v @ g + (v @ a * v).sum(1) / 2 - cost <= bound * (1 + 1e-12)).all()
    best = g / (1 / delta - curvature)
    reached = best @ g + curvature * best @ best / 2 - best @ best / (2 * delta)
    torch.testing.assert_close(reached, gradreg.penalty_weight(delta, curvature) / 2 * g @ g)


@pytest.mark.parametrize(
    ("delta", "curvature"), [(0.0, 1.0), (-1.0, 0.0), (0.5, 2.0), (math.nan, 0.0), (1.0, math.nan)]
)
def test_a_quadratic_cost_without_a_maximum_is_refused(delta, curvature):
    with pytest.raises(ValueError, match="delta must be positive and below 1 / curvature"):
        gradreg.penalty_weight(delta, curvature)


# --- eq. (7) by one step ----------------------------------------------------------------------------------


def gradient_of(objective, network):
    return torch.cat([g.flatten() for g in torch.autograd.grad(objective, list(network.parameters()))])


@given(seeds, norms, st.floats(0, 3), st.sampled_from([0.1, 0.5, math.inf]), st.booleans())
def test_one_step_up_has_the_value_of_eq_8_and_the_gradient_at_the_point_it_reaches(seed, norm, lam, h, squared):
    """Against the formula: v is the best step for the linear part of the loss, and held."""
    network, loss_fn, x = smooth_case(seed)
    out, exact = (
        ascent_penalty(loss_fn, x, norm=norm, lam=lam, h=h, squared=squared),
        exact_penalty(loss_fn, x, norm=norm, squared=squared),
    )
    torch.testing.assert_close(out.objective(lam), exact.objective(lam))
    torch.testing.assert_close(out.penalties, exact.penalties.detach())
    g, n = input_gradient(loss_fn, x)[1], x[0].numel()
    size = dual_norm(g, norm)[:, None, None, None]
    largest = (g.abs() == g.abs().flatten(1).amax(1)[:, None, None, None]) * g.sign()
    v = {"l2": g / size, "linf": g.sign(), "l1": largest}[norm] * (lam * size if squared else lam / 2)
    v = v / ((n if squared else math.sqrt(n)) if norm == "linf" else 1)
    v = v * (h / v.flatten(1).norm(dim=1).clamp_min(1e-30)).clamp_max(1)[:, None, None, None]
    truth = gradient_of(loss_fn(x + v).mean(), network)
    torch.testing.assert_close(gradient_of(out.objective(lam), network), truth)


@given(seeds, norms, st.sampled_from([0.05, 0.2, 1.0]))
def test_no_step_of_that_cost_raises_the_linear_loss_further(seed, norm, lam):
    """v maximises <g, v> - ||v||^2 / (2 lam), where it is lam/2 of the penalty (linf: of ||g||_1^2 / n, by lam / n)."""
    g, v = draw(seed, 4, 7), draw(seed + 1, 300, 4, 7)
    out = ascent_penalty(lambda z: (z * g).sum(1), torch.zeros(4, 7, dtype=g.dtype), norm=norm, lam=lam)
    cost = lam / 7 if norm == "linf" else lam
    lengths = torch.linspace(0, 3, 300, dtype=g.dtype)[:, None, None] * cost * dual_norm(g, norm)[:, None]
    v = v / torch.linalg.vector_norm(v, ORDER[norm], dim=2, keepdim=True) * lengths
    gained = (v * g).sum(2) - torch.linalg.vector_norm(v, ORDER[norm], dim=2).square() / (2 * cost)
    assert (gained <= lam / 2 * out.penalties * (1 + 1e-12)).all()


@given(seeds, norms, st.integers(1, 3))
def test_of_a_part_the_first_images_are_moved_the_further_and_the_others_stay(seed, norm, first):
    network, loss_fn, x = smooth_case(seed)
    some = lambda z: gradreg.cross_entropy(network(z), (torch.arange(4) % 3)[: len(z)])  # noqa: E731
    out = ascent_penalty(some, x, norm=norm, lam=0.3, first=first)
    whole = ascent_penalty(loss_fn, x, norm=norm, lam=0.3 * 4 / first)
    truth = gradient_of(torch.cat([whole.losses[:first], loss_fn(x)[first:]]).mean(), network)
    torch.testing.assert_close(gradient_of(out.objective(0.3), network), truth)
    torch.testing.assert_close(out.losses, loss_fn(x))
    exact = exact_penalty(loss_fn, x, norm=norm).penalties
    torch.testing.assert_close(out.penalties, torch.cat([exact[:first] * 4 / first, torch.zeros(4 - first).double()]))


@given(seeds, norms)
def test_one_step_up_and_the_penalty_agree_to_first_order_in_lam(seed, norm):
    """The penalty's weight gradient, from both objectives: what they differ by falls with lam."""
    network, loss_fn, x = smooth_case(seed)
    truth = weight_gradient(exact_penalty(loss_fn, x, norm=norm), network) / len(x)
    plain = gradient_of(loss_fn(x).mean(), network)

    def error(lam):
        got = gradient_of(ascent_penalty(loss_fn, x, norm=norm, lam=lam).objective(lam), network)
        return ((got - plain) * 2 / lam - truth).norm()

    assert error(1e-4) <= 0.11 * error(1e-3) + 1e-7 * truth.norm()


def test_one_step_up_of_the_unsquared_norm_is_the_fast_gradient_sign_method():
    _, loss_fn, x = smooth_case(0)
    seen = []
    ascent_penalty(lambda z: seen.append(z.detach()) or loss_fn(z), x, norm="linf", lam=0.1, squared=False)
    radius = 0.05 / math.sqrt(x[0].numel())
    torch.testing.assert_close(seen[1], x + radius * input_gradient(loss_fn, x)[1].sign())


# --- chance: one call, one draw ---------------------------------------------------------------------------


class Residual(nn.Module):
    """x + drop(x @ w): what drops whole branches needs something to stand beside."""

    def __init__(self, drop):
        super().__init__()
        self.linear, self.drop = nn.Linear(12, 12), drop

    def forward(self, x):
        return x + self.drop(torch.tanh(self.linear(x)))


class Noise(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return x + self.scale * torch.randn_like(x) if self.training else x


class Checkpointed(nn.Sequential):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


RANDOM = {
    "dropout": nn.Dropout,
    "alpha dropout": nn.AlphaDropout,
    "stochastic depth of rows": lambda p: Residual(torchvision.ops.StochasticDepth(p, "row")),
    "stochastic depth of the batch": lambda p: Residual(torchvision.ops.StochasticDepth(p, "batch")),
    "noise": Noise,
    "two of them": lambda p: nn.Sequential(Residual(nn.Dropout(p)), nn.Tanh(), Noise(p)),
    "checkpointed": lambda p: Checkpointed(Residual(nn.Dropout(p))),
}


@settings(max_examples=60)
@given(seeds, norms, st.sampled_from(list(RANDOM)), st.floats(0, 0.9))
def test_every_pass_sees_the_same_draw_and_the_state_moves_by_one_pass(seed, norm, kind, p):
    torch.manual_seed(seed)
    layers = nn.Flatten(), nn.Linear(8, 12), nn.Tanh(), RANDOM[kind](p), nn.Linear(12, 3)
    network, x = nn.Sequential(*layers).double(), draw(seed, 5, 2, 4)
    loss_fn = lambda z: gradreg.cross_entropy(network(z), torch.arange(5) % 3)  # noqa: E731

    def at_the_seed(penalty, **how):
        torch.manual_seed(seed)
        out = penalty(loss_fn, x, norm=norm, **how)
        return out, weight_gradient(out, network) if out.penalties.requires_grad else None, torch.get_rng_state()

    torch.manual_seed(seed)
    loss_fn(x)
    after_one_pass = torch.get_rng_state()
    exact, truth, _ = at_the_seed(exact_penalty)
    for penalty, how in (
        (fd_penalty, {"h": 1e-6}),
        (forward_penalty, {}),
        (partial(ascent_penalty, lam=1e-6), {}),
    ):
        if kind == "checkpointed" and penalty is forward_penalty:
            continue  # torch's checkpoint has no forward mode
        out, gradient, state = at_the_seed(penalty, **how)
        assert torch.equal(out.losses, exact.losses)
        assert torch.equal(state, after_one_pass)
        torch.testing.assert_close(out.grad, exact.grad)
        torch.testing.assert_close(out.penalties, exact.penalties, rtol=1e-4, atol=1e-6)
        if gradient is not None:
            assert (gradient - truth).norm() <= 1e-3 * truth.norm() + 1e-5


def test_the_state_of_the_images_own_device_is_restored_before_every_pass():
    """Of the device alone that x is on; a stand-in, where there is no second one."""
    device, seen = mock.Mock(), []
    device.get_rng_state.return_value = "as it was"
    x = mock.Mock(device=torch.device("cuda:1"))
    with mock.patch.object(torch, "get_device_module", return_value=device) as module:
        loss_fn = gradreg._same_draw(lambda z: seen.append(z), x)
        loss_fn(1), loss_fn(2)
    module.assert_called_once_with(torch.device("cuda:1"))
    assert device.mock_calls == [
        mock.call.get_rng_state(torch.device("cuda:1")),
        *[mock.call.set_rng_state("as it was", torch.device("cuda:1"))] * 2,
    ]
    assert seen == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_network_sees_the_same_draw_in_every_pass(backend):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(8, 12), nn.Tanh(), nn.Dropout(0.5), nn.Linear(12, 3))
    compiled, labels, x = torch.compile(network, backend=backend), torch.arange(5) % 3, torch.rand(5, 2, 4)
    torch.manual_seed(1)
    out = fd_penalty(lambda z: gradreg.cross_entropy(compiled(z), labels), x, norm="l2", h=0.01)
    torch.testing.assert_close(out.penalties, dual_norm(out.grad, "l2").square(), rtol=0.1, atol=1e-4)


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b0", "timm"])
def test_networks_of_others_in_training_mode_are_penalised_for_one_draw(name):
    """With dropout, stochastic depth and batch statistics: the quotient has the slope of the same draw.

    Of two draws it would be thousands of times as large; and another seed draws another penalty.  The twin is forward
    mode, which moves the whole batch too: double backpropagation gives another image's share in a slope to that image.
    """
    if name == "timm":
        timm = pytest.importorskip("timm")
        network = timm.create_model("resnet10t", num_classes=5, drop_rate=0.2, drop_path_rate=0.2)
    else:
        network = torchvision.models.get_model(name, num_classes=5)
    network, x, labels = network.double().train(), draw(0, 4, 3, 64, 64).sigmoid(), torch.tensor([0, 1, 2, 3])
    kinds = {type(module).__name__ for module in network.modules()}
    assert kinds & {"Dropout", "StochasticDepth", "DropPath"}

    def penalties(method, seed=0, **how):
        torch.manual_seed(seed)
        out = method(lambda z: gradreg.cross_entropy(network(z), labels), x, norm="l2", **how).penalties.detach()
        return out, torch.get_rng_state()

    (exact, after), (fd, state) = penalties(forward_penalty), penalties(fd_penalty, h=1e-7)
    torch.testing.assert_close(fd, exact, rtol=1e-2, atol=1e-12)
    assert torch.equal(after, state)
    assert not torch.allclose(penalties(forward_penalty, seed=1)[0], exact, rtol=0.01)


def test_a_network_with_dropout_learns_under_the_penalty():
    """README's loop on digits: with another mask in each pass it stayed at 90 % error."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Dropout(0.3), nn.Linear(100, 10))
    optimizer, (images, labels) = torch.optim.Adam(model.parameters(), lr=5e-3), digits()
    for _ in range(12):
        for batch in torch.randperm(898).split(64):
            loss_fn = lambda x, y=labels[batch]: gradreg.cross_entropy(model(x), y)  # noqa: E731
            optimizer.zero_grad()
            fd_penalty(loss_fn, images[batch], norm="l2", h=0.01).objective(0.1).backward()
            optimizer.step()
    wrong = model.eval()(images[898:]).argmax(1) != labels[898:]
    assert wrong.double().mean() < 0.1


# --- batch normalization, as the module's docstring promises ----------------------------------------------


@pytest.mark.parametrize(
    ("penalty", "updates"),
    [
        (lambda f, x: fd_penalty(f, x, norm="l2", h=0.1), 2),
        (lambda f, x: exact_penalty(f, x, norm="l2"), 1),
        (lambda f, x: ascent_penalty(f, x, norm="l2", lam=0.1), 2),
    ],
)
def test_batch_normalization_updates_its_statistics_once_a_pass(penalty, updates):
    network = nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    labels = torch.arange(5) % 3
    out = penalty(lambda z: gradreg.cross_entropy(network(z), labels), draw(0, 5, 2, 4, dtype=torch.float32))
    assert network[2].num_batches_tracked == updates
    out.objective(1.0).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


# --- points in balls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("d", [1, 3, 50])
def test_ball_samples_follow_the_radius_law(norm, d):
    """Of a uniform point of a ball, ||v||^d is uniform on [0, 1]."""
    v = uniform_ball(torch.zeros(4000, d, dtype=torch.float64), norm, generator(d))
    radii = torch.linalg.vector_norm(v, ORDER[norm], dim=1)
    assert scipy.stats.kstest((radii**d).numpy(), "uniform").pvalue > 1e-3
    assert abs(float(v.mean())) < 0.05


@pytest.mark.parametrize("norm", NORMS)
def test_ball_samples_match_rejection_from_the_cube(norm):
    cube = torch.rand(40_000, 3, generator=generator(1), dtype=torch.float64) * 2 - 1
    inside = cube[torch.linalg.vector_norm(cube, ORDER[norm], dim=1) <= 1][:4000]
    v = uniform_ball(torch.zeros(4000, 3, dtype=torch.float64), norm, generator(2))
    for ours, theirs in ((v[:, 0], inside[:, 0]), (v @ v.new_tensor([1, -2, 1]), inside @ v.new_tensor([1, -2, 1]))):
        assert scipy.stats.ks_2samp(ours.numpy(), theirs.numpy()).pvalue > 1e-3


@given(seeds, norms, st.floats(0.01, 3))
def test_projection_stays_in_the_ball_and_the_box_and_is_nearest(seed, norm, radius):
    x, v = torch.rand(6, 8, generator=generator(seed), dtype=torch.float64), draw(seed, 6, 8)
    p = gradreg.project(x + v, x, radius, norm) - x
    assert (torch.linalg.vector_norm(p, ORDER[norm], dim=1) <= radius * (1 + 1e-12)).all()
    assert ((x + p >= 0) & (x + p <= 1)).all()
    if norm == "l1":
        nearest = gradreg._project_l1(v, torch.full((len(v),), radius))
        others = radius * uniform_ball(v.repeat(50, 1), norm, generator(seed)).view(50, 6, 8)
        better = (others - v).norm(dim=2) < (nearest - v).norm(dim=1) - 1e-9
        assert not better.any()
        sizes = nearest.abs().sum(1)
        torch.testing.assert_close(sizes, v.abs().sum(1).clamp(max=radius))


RADII = st.one_of(
    st.floats(0, 100),
    st.floats(1e-9, 1e-2),
    st.integers(0, 16).map(lambda k: 1 - 10.0**-k),  # beside 1: back from pixel 0 to image 1 are a billion floats
    st.sampled_from([8 / 255, math.inf, math.nan, -1.0, -math.inf]),
)
BOXES = {"unit": (0, 1), "black": (0, 0), "white": (1, 1), "dark": (0, 1e-6), "bytes": (0, 255), "normalised": (-2, 3)}
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


@settings(max_examples=300)
@given(seeds, norms, DTYPES, RADII, st.sampled_from(list(BOXES)), st.sampled_from([1e-3, 1.0, 1e3]))
def test_projection_ends_and_keeps_its_word_for_any_box_radius_and_precision(seed, norm, dtype, radius, box, scale):
    low, high = BOXES[box]
    images = (low + (high - low) * torch.rand(3, 50, generator=generator(seed))).to(dtype)
    x = (images + scale * draw(seed, 3, 50, dtype=torch.float32)).to(dtype)
    with mock.patch.object(gradreg, "vector_norm", wraps=gradreg.vector_norm) as measured:
        p = gradreg.project(x, images, radius, norm)
    assert measured.call_count <= 2 + 53  # float64 has 53 binary digits
    assert p.dtype == dtype
    if low >= 0 and high <= 1 and radius >= 0:
        assert (torch.linalg.vector_norm(p.double() - images.double(), ORDER[norm], dim=1) <= radius).all()
        assert ((p >= 0) & (p <= 1)).all()
        if box == "unit" and 1e-2 <= radius <= 1e-1 and dtype in (torch.float32, torch.float64) and scale >= 1:
            # Nothing is given away: but for rounding and the sides of the box, it reaches the sphere.
            clipped = ((p == 0) | (p == 1)).any(1)
            sizes = torch.linalg.vector_norm((p - images).double(), ORDER[norm], dim=1)
            assert (clipped | (sizes >= radius * (1 - 1e-3))).all()


@given(seeds, norms)
def test_steepest_steps_have_length_one(seed, norm):
    grad = torch.randn(5, 3, 8, generator=generator(seed), dtype=torch.float64)
    grad[0] = 0
    step = gradreg.steepest(grad, norm)
    sizes = torch.linalg.vector_norm(step.flatten(1), ORDER[norm], dim=1)
    torch.testing.assert_close(sizes, torch.tensor([0.0, 1, 1, 1, 1], dtype=torch.float64))
    assert ((grad * step).flatten(1).sum(1)[1:] > 0).all()
