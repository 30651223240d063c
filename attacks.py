"""Section 4 of the paper: the smallest adversarial distance of each image, over a suite of attacks.

For an image x of class c the attacks look for

    min ||delta||   such that   m(x + delta) > 0   and   x + delta in [0, 1]^n,   in l2 or linf            (1)

where m(x) = (k-th largest logit among the other classes) - (logit of c) is the margin, positive iff c is not
among the top k.  Whatever they find is an UPPER bound of the true distance, and nothing more: a weak attack
makes a weak network look robust.  So every attack keeps its best iterate, every output is tested again by
`smallest`, and an image that nothing broke has distance inf, never a missing value.

    pgd              Madry et al. (2018): in a ball of radius eps, and the smallest eps by bisection
    carlini_wagner   Carlini & Wagner (2017): the constraint as a penalty, its weight by binary search
    boundary         Brendel et al. (2018): a walk along the boundary; uses no gradient, only decisions
    logbarrier       Finlay et al. (2019): from outside, the constraint as a logarithmic barrier
    fab              not in the paper; after Croce & Hein (2020): projections onto the linearised boundary

One idea carries fab, logbarrier and the refinement after every attack.  Where m is linearised, (1) can be
solved exactly, box included, in both norms (`nearest`): one gradient buys a whole step along the boundary.

One convention: every attack returns images like `images`.  A row that is unchanged is an image that was
misclassified to begin with, or one that the attack could not break; `smallest` tells them apart (0 and inf).
Randomness is drawn in the shape of one image and serves the whole batch, so that the result of an image does
not depend on its neighbours: a data set may be attacked in batches of any size, each with a generator of the
same seed.  Images that are done take part in no further pass.

A `call` is one image through one forward pass, or through one backward pass.  Left out: targeted attacks, l1.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from gradreg import column, dual_norm, input_gradient, project, steepest, uniform_ball

Norm = Literal["l2", "linf"]
Model = Callable[[Tensor], Tensor]  # images (N, ...) in [0, 1] -> logits (N, classes)

SUITE = ("fab", "pgd", "boundary", "logbarrier", "carlini_wagner")
TOLERANCE = 1e-3  # relative: differences in distance below it are not pursued


class Smallest(NamedTuple):
    """adversarial (N, ...); distances (N,) in float64; attacks: who found it, per image; calls per image."""

    adversarial: Tensor
    distances: Tensor
    attacks: list[str]
    calls: dict[str, float]


def margin(logits: Tensor, labels: Tensor, topk: int = 1) -> Tensor:
    """The k-th largest logit of another class, minus the label's (N,): positive iff not in the top k."""
    label = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return (others.topk(topk, dim=1).values[:, -1:] - label)[:, 0]


def distance(images: Tensor, adversarial: Tensor, norm: Norm) -> Tensor:
    """||adversarial_i - images_i|| (N,), in units of images, measured and returned in float64."""
    if norm not in ("l2", "linf"):
        raise ValueError(f"attacks are measured in l2 or linf, not {norm!r}")
    order = 2 if norm == "l2" else torch.inf
    return torch.linalg.vector_norm((adversarial.double() - images.double()).flatten(1), order, dim=1)


def smallest(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    norm: Norm,
    attacks: Sequence[str] = SUITE,
    topk: int = 1,
    budget: float = math.inf,
    patience: int = 2,
    check: bool = True,
    generator: Generator | None = None,
) -> Smallest:
    """The nearest misclassified image that any of `attacks` finds: an upper bound of the distance of (1).

    distances are 0 for images that are misclassified as they are (attack "clean") and inf for images that no
    attack broke (attack "none", the image unchanged).  Every adversarial image is tested again at the end.

    Attacks run in the order given, and the result of each is refined along the boundary.  An image is left
    alone once `patience` attacks in a row did not bring it nearer by 0.1 %, but never while its distance is
    inf.  So three attacks of the default suite always run: by projection, in a ball, without gradients.
    budget is the largest number of calls (mean per image): the suite ends before the first attack that might
    exceed it (8 are used if none is run).  `calls` holds what was used, by name; an attack that was not run is
    not in it.

    check=True runs `check_model` first, and raises what it raises.
    """
    counted = _Counted(model)
    if check:
        check_model(counted, images, labels, topk=topk, gradients=set(attacks) != {"boundary"})
    best = _Best(counted, images, labels, norm, topk)
    names = ["clean" if d == 0 else "none" for d in best.distances.tolist()]
    calls = {"check": counted.take(len(images))}
    idle = torch.zeros_like(labels)  # attacks in a row without gain
    for name in attacks:
        attack, *most = _ATTACKS[name]
        rows = best.todo()
        rows = rows[idle[rows] < patience]
        left = budget - sum(calls.values()) - 1  # one call for the last test
        if (most[topk > 1] + topk - 1) * len(rows) / len(images) > left:
            break
        if len(rows) == 0:
            continue
        known = best.distances[rows]
        _run(attack, counted, best, rows, topk, _child(generator))
        calls[name] = counted.take(len(images))
        now = best.distances[rows]
        nearer = now < known * (1 - TOLERANCE)
        idle[rows] = torch.where(nearer | now.isinf(), 0, idle[rows] + 1)
        for row in rows[nearer].tolist():
            names[row] = name
    _retest(counted, best, topk)
    calls["retest"] = counted.take(len(images))
    return Smallest(best.adversarial, best.distances, names, calls)


def check_model(
    model: Model, images: Tensor, labels: Tensor, *, topk: int = 1, gradients: bool = True, rtol: float = 1e-2
) -> None:
    """Raise ValueError, saying why, where a distance measured on this model would mean nothing.

    Refused: a module in training mode; images that are not floating point, not finite or outside [0, 1]; labels
    that are not int64 of shape (N,) or out of range; logits of another shape than (N, classes > topk), not
    finite, different from one call to the next, or different (by more than rtol of the largest) in another
    batch; with gradients=True, margins whose gradient is exactly zero on every image, as where outputs saturate
    or gradients are cut.  Warns where that is so for more than 1 % of the images.  Costs 5 calls an image, and one.
    """
    _check_data(model, images, labels)
    with torch.no_grad():
        logits = model(images)
        _check_logits(logits, images, labels, topk)
        again, flipped, alone = model(images), model(images.flip(0)).flip(0), model(images[:1])
    scale = rtol * logits.abs().max()
    if (again - logits).abs().max() > scale:
        raise ValueError("the model is random: two calls on the same images differ")
    if (flipped - logits).abs().max() > scale or (alone - logits[:1]).abs().max() > scale:
        raise ValueError("outputs depend on the rest of the batch: the images of a batch must not interact")
    if gradients:
        _, grad = _ascent(model, images, labels, topk)
        zero = (grad.flatten(1) == 0).all(dim=1).double().mean().item()
        message = f"gradients are exactly zero on {zero:.1%} of the images: attacks that use them are blind"
        if zero == 1:
            raise ValueError(message)
        if zero > 0.01:
            warnings.warn(message, stacklevel=2)


def _run(attack, model, best, rows, topk, generator) -> None:
    """One attack on the images `rows`, its outputs tested and refined; `best` takes what is nearer."""
    x, y, norm = best.images[rows], best.labels[rows], best.norm
    known = {"start": best.adversarial[rows]} if attack in (pgd, boundary) else {}
    found = attack(model, x, y, norm=norm, topk=topk, generator=generator, **known)
    if attack is not fab:
        found = refine(model, x, y, found, norm=norm, topk=topk)
    best.update(rows, found, _margins(model, found, y, topk))


def _retest(model, best, topk) -> None:
    """Run every adversarial image again, in other company; one that does not hold is not counted as found."""
    with torch.no_grad():
        wrong = margin(model(best.adversarial.flip(0)).flip(0), best.labels, topk) > 0
    lost = ~wrong & best.distances.isfinite()
    if lost.any():
        warnings.warn(f"{int(lost.sum())} adversarial images did not hold when run again", stacklevel=3)
    best.distances[lost] = torch.inf
    best.adversarial[lost] = best.images[lost]


def _check_data(model, images: Tensor, labels: Tensor) -> None:
    if any(module.training for module in getattr(model, "modules", tuple)()):
        raise ValueError("the model is in training mode: call model.eval()")
    if not images.is_floating_point() or not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError("images must be floating point, finite and in [0, 1]; normalise inside the model")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64 or len(labels) == 0:
        raise ValueError(f"labels must be int64, one per image, at least one; not {tuple(labels.shape)}")


def _check_logits(logits: Tensor, images: Tensor, labels: Tensor, topk: int) -> None:
    if logits.ndim != 2 or len(logits) != len(images) or not 1 <= topk < logits.shape[1]:
        raise ValueError(f"logits must be (images, classes > topk), not {tuple(logits.shape)} with topk={topk}")
    if not logits.isfinite().all():
        raise ValueError("the model's outputs are not finite")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels must be in 0 .. {logits.shape[1] - 1}, the model's classes")


def fab(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    norm: Norm,
    topk: int = 1,
    steps: int | None = None,
    targets: int | None = None,
    restarts: int = 6,
    generator: Generator | None = None,
) -> Tensor:
    """Smallest distances by projections onto the linearised boundary, class by class.

    After FAB (Croce & Hein 2020).  Each step moves to a mix of two points of the linearised boundary: the one
    nearest to the iterate, and the one nearest to the image (`_follow`).  The first round ascends the margin;
    then one round for each of the `targets` likeliest classes, nearest first; then `restarts` rounds from
    random points as far away as the best found.  A round costs at most 2 * steps + 1 calls an image, and ends
    for an image where the linearised boundary is as far as the best found: nothing to gain, to first order.
    By default 80 steps and 9 targets; with topk > 1, where a round aimed at a fixed set of classes finds next
    to nothing that the first did not, 240 and none.

    Where it differs from FAB: the weight of the image falls from 1 to 0 in place of being capped at 0.1, how far
    a step overshoots adapts to each image, and a step costs 2 calls, not 2 forward and (classes - 1) backward.
    """
    best = _Best(model, images, labels, norm, topk)
    steps = (80 if topk == 1 else 240) if steps is None else steps
    targets = (9 if topk == 1 else 0) if targets is None else targets
    _follow(model, best, images, None, topk, steps)
    for goal in _goals(model, best, topk, targets):
        _follow(model, best, images, goal, topk, steps)
    for _ in range(restarts):
        radius = best.distances.where(best.distances.isfinite(), 0)
        around = project(_random_start(images, radius, norm, generator), images, radius, norm)
        _follow(model, best, around, None, topk, steps)
    return best.adversarial


def refine(
    model: Model,
    images: Tensor,
    labels: Tensor,
    start: Tensor,
    *,
    norm: Norm,
    topk: int = 1,
    steps: int = 20,
) -> Tensor:
    """`start`, or a nearer adversarial image found from there along the boundary; at most 2 * steps + 2 calls."""
    best = _Best(model, images, labels, norm, topk, start)
    _follow(model, best, best.adversarial, None, topk, steps, weight=0.5)
    return best.adversarial


def pgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    norm: Norm,
    eps: float | Tensor | None = None,
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    targets: int = 1,
    topk: int = 1,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    start: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Projected gradient ascent in the ball of radius eps from uniform random starts (Madry et al. 2018).

    Every image returned lies in [0, 1] and at most eps away, as `distance` measures it.

    loss=None, for evaluation: ascend the margin, then the logits of the `targets` classes that are nearest to
    first order; all that `restarts` times.  An image is done as soon as it is misclassified, and comes back
    unchanged if it never is.  loss=f, for training: ascend
    f(logits (N, classes), labels) -> (N,), say `gradreg.cross_entropy`, and return the last iterate of every
    image, untested: steps forward and steps backward passes, from `start` (moved into the ball) where that is
    given.  The model's mode is neither looked at nor changed: in training mode these passes update the running
    statistics of batch normalization.

    eps=None: the smallest eps of each image, by bisection to 0.5 %, below the distance of `start` where those
    (adversarial) images are given; at most 10 rounds of 2 * steps + 1 calls a run.

    eps and step_size are in units of images; eps may be one radius per image (N,).  The default step falls
    linearly from eps to eps / steps.
    """
    if loss is not None and (eps is None or restarts != 1):
        raise ValueError("with a loss the last iterate is returned, untested: give eps, and restarts=1")
    walk = {"norm": norm, "steps": steps, "step_size": step_size, "generator": generator}
    if loss is not None:
        return _climb(model, images, labels, _radius(eps, images), loss, start, **walk)
    best = _Best(model, images, labels, norm, topk, start)
    runs = [None, *_goals(model, best, topk, targets)] * restarts
    if eps is None:
        _bisect(model, best, runs, topk, walk)
    else:
        _break(model, best, best.todo(), _radius(eps, images), runs, topk, walk)
    return best.adversarial


def _radius(eps: float | Tensor, images: Tensor) -> Tensor:
    return torch.as_tensor(eps, dtype=torch.float64, device=images.device).expand(len(images))


def _climb(model, images, labels, radius, loss, start, *, norm, steps, step_size, generator) -> Tensor:
    start = _random_start(images, radius, norm, generator) if start is None else start
    x = project(start, images, radius, norm)
    for step in range(steps):
        _, grad = input_gradient(lambda z: loss(model(z), labels), x)
        x = _step_in_ball(x, grad, images, radius, norm, _rate(radius, step_size, step, steps))
    return x


def _break(model, best, rows, radius, runs, topk, walk) -> Tensor:
    """Run after run (a goal each) on those images `rows` that are not broken; returns those that never are."""
    for goal in runs:
        rows = _run_in_ball(model, best, rows, radius, goal, topk, **walk)
    return rows


def _run_in_ball(model, best, rows, radius, goal, topk, *, norm, steps, step_size, generator) -> Tensor:
    x = project(_random_start(best.images, radius, norm, generator), best.images, radius, norm)[rows]
    for step in range(steps):
        if len(rows) == 0:
            return rows
        _, grad, margins = _aim(model, x, best.labels[rows], None if goal is None else goal[rows], topk)
        best.update(rows, x, margins)
        x, grad, rows = (part[margins <= 0] for part in (x, grad, rows))
        rate = _rate(radius[rows], step_size, step, steps)
        x = _step_in_ball(x, grad, best.images[rows], radius[rows], norm, rate)
    margins = _margins(model, x, best.labels[rows], topk)
    best.update(rows, x, margins)
    return rows[margins <= 0]


def _rate(radius: Tensor, step_size: float | None, step: int, steps: int) -> Tensor:
    return radius * (1 - step / steps) if step_size is None else torch.full_like(radius, step_size)


def _step_in_ball(x, grad, images, radius, norm, rate) -> Tensor:
    return project(x + column(rate.to(x), x) * steepest(grad, norm), images, radius, norm)


def _random_start(images: Tensor, radius: Tensor, norm: Norm, generator: Generator | None) -> Tensor:
    """One point drawn uniformly from the unit ball, scaled to each image's radius, on every image."""
    return images + column(radius.to(images), images) * uniform_ball(images[:1], norm, generator)


def _bisect(model, best, runs, topk, walk, rounds: int = 10, tol: float = 5e-3) -> None:
    """The smallest radius at which `runs` break an image: from the linearised boundary, or below what is known."""
    eps = best.distances * (1 - tol)
    unknown = best.distances.isinf()
    if unknown.any():
        margins, grad = _ascent(model, best.images[unknown], best.labels[unknown], topk)
        eps[unknown] = 1.2 * (-margins / dual_norm(grad, best.norm)).double().nan_to_num(1, 1)
    low = torch.zeros_like(eps)
    for _ in range(rounds):
        rows = ((best.distances > low * (1 + tol)) & (best.distances > 0)).nonzero()[:, 0]
        failed = _break(model, best, rows, eps, runs, topk, walk)
        low[failed] = eps[failed]
        between = torch.where(low > 0, (low * best.distances).sqrt(), best.distances * 0.9)
        eps = torch.where(best.distances.isinf(), eps * 2, between)


def carlini_wagner(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    norm: Norm,
    topk: int = 1,
    steps: int = 100,
    rounds: int = 3,
    targets: int = 1,
    generator: Generator | None = None,
) -> Tensor:
    """Carlini & Wagner (2017): the misclassification constraint as a penalty, minimised by Adam.

    l2    ||delta||^2 + c max(-m, 0); each round is a step of the binary search on c
    linf  sum_i 2 |g_i| max(|delta_i| - tau, 0) + max(-m, 0); each round puts tau between the largest that
          failed (or 0.8 of the best) and the best found; g is the gradient of m

    The weight 2 |g_i| is not the authors' (1 / c): with it the pull back to tau is as strong as the push beyond
    it in every pixel, where otherwise pixels stop short of tau (on linear classifiers 4 to 6 % too far, now 1 %).
    The box is kept by clipping, which the authors describe too, not by their change of variables tanh: that one
    freezes pixels at exactly 0 or 1.  The first c, tau and the step size come from the distance of the
    linearised boundary, so that they fit the scale of model and image.  All of it once for the margin, and once
    for each of the `targets` classes nearest to first order, 2 * steps * rounds + rounds + 2 calls each.
    Deterministic: generator is accepted so that all attacks are called alike.
    """
    best = _Best(model, images, labels, norm, topk)
    rows = best.todo()
    goals = [None, *_goals(model, best, topk, targets)]
    for goal in goals if len(rows) else ():
        goal = None if goal is None else goal[rows]
        aimed, grad, _ = _aim(model, images[rows], labels[rows], goal, topk)
        tiny = torch.finfo(images.dtype).tiny
        slope, largest = dual_norm(grad, norm).clamp_min(tiny), dual_norm(grad, "l1")
        reach = (-aimed / slope).clamp(0, images[0].numel() ** 0.5)  # distance of the linearised boundary
        if norm == "l2":
            rate, c = 0.2 * reach * largest / slope, 3 * reach / slope
            _search_weight(model, best, rows, goal, topk, steps, rounds, rate, c)
        else:
            _search_tau(model, best, rows, goal, topk, steps, rounds, reach)
    return best.adversarial


def _search_weight(model, best, rows, goal, topk, steps, rounds, rate, c) -> None:
    low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)
    for _ in range(rounds):

        def descent(delta, grad, wrong, c=c):
            return 2 * delta - column(c * ~wrong, grad) * grad

        reached = _minimise(model, best, rows, goal, topk, steps, rate, descent)
        low, high = low.where(reached, c), c.where(reached, high)
        c = torch.where(high.isinf(), c * 4, (low + high) / 2)


def _search_tau(model, best, rows, goal, topk, steps, rounds, tau) -> None:
    low = torch.zeros_like(tau)
    for _ in range(rounds):

        def descent(delta, grad, wrong, tau=tau):
            outside = delta.abs() > column(tau, delta)
            return 2 * grad.abs() * delta.sign() * outside - column(~wrong, grad) * grad

        _minimise(model, best, rows, goal, topk, steps, 0.2 * tau, descent)
        known = best.distances[rows].to(tau)
        low = tau.where(known > 1.01 * tau, low)
        tau = torch.where(known.isinf(), 1.5 * tau, (low.maximum(0.8 * known) * known).sqrt())


def _minimise(model, best, rows, goal, topk, steps, rate, descent) -> Tensor:
    """Adam from the images along descent(delta, grad of m, m > 0); True where it met an adversarial image."""
    x0, z = best.images[rows], best.images[rows]
    first, second = torch.zeros_like(z), torch.zeros_like(z)
    reached = torch.zeros_like(rows, dtype=torch.bool)
    for step in range(steps):
        _, grad, margins = _aim(model, z, best.labels[rows], goal, topk)
        best.update(rows, z, margins)
        reached |= margins > 0
        total = descent(z - x0, grad, margins > 0)
        first, second = first.lerp(total, 0.1), second.lerp(total.square(), 0.001)
        adam = first / (1 - 0.9 ** (step + 1)) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-12)
        z = (z - column(rate * (1 - step / steps) ** 2, z) * adam).clamp(0, 1)
    margins = _margins(model, z, best.labels[rows], topk)
    best.update(rows, z, margins)
    return reached | (margins > 0)


def boundary(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    norm: Norm,
    topk: int = 1,
    calls: int = 450,
    walks: int | None = None,
    start: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """A walk on the far side of the boundary, after Brendel et al. (2018): uses no gradient, only decisions.

    Their walk makes a random move along the boundary, then one towards the image, and keeps what is still
    misclassified.  Here a move that is refused counts as well: where the boundary is flat, it says that the
    opposite one would have held.  So a round (`_round`) tries moves in orthogonal directions, and turns the
    plane that it takes the boundary for towards those that held and away from the others (the estimate of
    HopSkipJump, Chen et al. 2020), by an angle found by bisection.  Then it goes to the point of that plane
    nearest to the image, exact in either norm, and from there towards the image, up to the boundary.

    It begins from `start` (adversarial images) or, where there is none, from noise.  It begins in `walks` places
    (rounded down to a power of two; without a start one for each 4 n calls, n values an image; fewer where calls
    are few; all but the first from noise), of which the farther half is given up again and again, after equal
    shares of the calls.  At most calls + 51 * walks + 1 calls.

    A half-space of thousands of dimensions takes 3 to 4 n calls to 5 %.  Where there are many classes or the
    boundary bends it finds a nearby part of it, not always the nearest.  What it is for is masked gradients.
    All walks of all images go through the model at once.
    """
    n = math.prod(images.shape[1:])
    votes = min(round(10 * n**0.25), calls // 3)
    cost = votes + _TURNS + len(_PARTS) + _HALVINGS  # calls of a round
    walks = walks or (calls // (4 * n) if start is None else 1)
    shares = 1  # of the calls: 2^(shares - 1) walks begin, one is left
    while 2**shares <= walks and (shares + 1) * 2**shares * cost <= calls:
        shares += 1
    starts = [start, *[None] * (2 ** (shares - 1) - 1)]
    places = [_Best(model, images, labels, norm, topk, known) for known in starts]
    walk = _begin(model, places, topk, generator)
    aside = _directions(images.shape[1:], generator)
    for share in reversed(range(shares)):
        rounds = calls // ((share + 1) * 2**share * cost)
        calls -= rounds * 2**share * cost
        for _ in range(rounds if len(walk.rows) else 0):
            moves = [next(aside).to(images) for _ in range(votes)]
            walk = _round(model, walk, moves, images, labels, norm, topk)
        walk = walk.nearer_half(norm) if share else walk
    best = places[0]
    best.update(walk.rows, walk.z.view(-1, *images.shape[1:]), torch.ones_like(walk.reach))
    return best.adversarial


_TURNS, _PARTS, _HALVINGS = 4, (1.0, 0.5), 8  # what a round of `boundary` calls for beyond its votes


class _Walk(NamedTuple):
    """Walks (W,) on the far side, several of an image one after the other: z, the plane, and what adapts."""

    rows: Tensor  # which image
    x0: Tensor  # that image (W, n)
    z: Tensor  # misclassified, near the boundary (W, n)
    normal: Tensor  # of the plane through z that the boundary is taken for (W, n), of length 1
    reach: Tensor  # length of the moves aside, in units of ||z - x0||_2
    gain: Tensor  # share of the distance that the last round won

    def nearer_half(self, norm: Norm) -> "_Walk":
        images = len(self.rows.unique())
        order = distance(self.x0, self.z, norm).view(len(self.rows) // max(1, images), images).argsort(dim=0)
        keep = order[: len(order) // 2] * images + torch.arange(images, device=order.device)
        return _Walk(*(part[keep.flatten()] for part in self))


def _begin(model, places: "list[_Best]", topk: int, generator) -> _Walk:
    """A walk from each place for each image; from the nearest place again where noise found nothing in 40 tries."""
    for place in places:
        _start_from_noise(model, place, topk, _child(generator))
    distances, found = (torch.stack([getattr(p, name) for p in places]) for name in ("distances", "adversarial"))
    least, first = distances.min(dim=0)
    rows = ((least > 0) & least.isfinite()).nonzero()[:, 0]
    nearest_place = found[first[rows], rows].flatten(1)
    z = found[:, rows].flatten(2).where(distances[:, rows, None].isfinite(), nearest_place).flatten(0, 1)
    x0, one = places[0].images[rows].flatten(1).repeat(len(places), 1), torch.ones_like(z[:, 0])
    return _Walk(rows.repeat(len(places)), x0, z, _unit(z - x0), one, one / 2)


def _directions(shape, generator: Generator | None, coarsest: int = 8):
    """Unit vectors (n,), without end: random orthonormal bases, first of coarse images, then of ever finer ones.

    Photographs, and so the gradients of networks trained on them, vary slowly from pixel to pixel.  A basis is
    that of the discrete cosine transform with random signs, in random order: no matrix is ever stored.
    """
    device = "cpu" if generator is None else generator.device
    options = {"generator": generator, "device": device}
    for level in itertools.count():
        coarse = tuple(min(coarsest * 2**level, side) for side in shape[1:]) if len(shape) == 3 else shape[1:]
        n = math.prod((shape[0], *coarse))
        signs = 2.0 * torch.randint(2, (n,), **options) - 1
        odd = 2 * torch.arange(n, device=device) + 1
        for k in torch.randperm(n, **options).tolist():
            angle = (k * odd % (4 * n)) * (math.pi / (2 * n))  # exact integers: k odd is too large for float32
            u = (signs * angle.cos()).view(shape[0], *coarse)
            if coarse != shape[1:]:
                u = torch.nn.functional.interpolate(u[None], size=shape[1:], mode="bilinear")[0]
            yield (u / u.norm()).flatten()


def _round(model, walk: _Walk, moves: list[Tensor], images, labels, norm: Norm, topk: int) -> _Walk:
    rows, x0, z, normal, reach, gain = walk

    def holds(x: Tensor) -> Tensor:
        return _margins(model, x.view(-1, *images.shape[1:]), labels[rows], topk) > 0

    size = (reach * (z - x0).norm(dim=1))[:, None]

    def move(direction: Tensor) -> tuple[Tensor, Tensor]:
        moved = (z + size * direction).clamp(0, 1)
        return holds(moved).to(z), moved - z

    lean, share = _lean(move, normal, moves)
    normal = _turn(move, normal, lean)
    # On a flat boundary half of the moves hold: where far fewer or more do, it bends within their reach.
    reach = (reach * (1.3 - 2 * (share - 0.5).abs())).clamp(1e-3, 1)
    ahead = nearest(normal, (normal * (z - x0)).sum(dim=1), x0, norm)
    z, gain = _approach(holds, x0, _towards(holds, x0, z, ahead, norm), gain)
    return _Walk(rows, x0, z, normal, reach, gain.clamp_min(1e-3))


def _lean(move, normal: Tensor, moves: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The direction along the plane that those moves share that held, and the share of them that did."""
    held, kept, every = 0, 0, 0
    for u in moves:
        yes, moved = move(u - (normal @ u)[:, None] * normal)
        held, kept, every = held + yes, kept + yes[:, None] * moved, every + moved
    share = held / len(moves)
    lean = kept - share[:, None] * every
    return _unit(lean - (lean * normal).sum(dim=1, keepdim=True) * normal), share


def _turn(move, normal: Tensor, lean: Tensor) -> Tensor:
    """The normal, turned towards lean by the angle whose tangent is 2^t, t in -7 .. 3, by bisection; or not.

    A move along lean - 2^t normal holds iff <true normal, lean> > 2^t <true normal, normal>.
    """
    low, high = torch.full_like(normal[:, 0], -7), torch.full_like(normal[:, 0], 3)
    for _ in range(_TURNS):
        middle = (low + high) / 2
        held = move(_unit(lean - (2**middle)[:, None] * normal))[0] > 0
        low, high = middle.where(held, low), high.where(held, middle)
    tangent = torch.where(low > -7, 2 ** ((low + high) / 2), 0)
    return _unit(normal + tangent[:, None] * lean)


def _towards(holds, x0: Tensor, z: Tensor, ahead: Tensor, norm: Norm) -> Tensor:
    """The point in the direction of x0 + ahead, or else half way there, that is just nearer than z; or else z."""
    delta, radius = z - x0, distance(x0, z, norm).to(z) * (1 - 1e-4)
    best, moved = z, torch.zeros_like(radius, dtype=torch.bool)
    for part in _PARTS:
        tried = delta.lerp(ahead, part)
        length = distance(torch.zeros_like(tried), tried, norm).to(z)
        tried = (x0 + tried * (radius / length).where(length > 0, 0)[:, None]).clamp(0, 1)
        better = holds(tried) & ~moved
        best, moved = tried.where(better[:, None], best), moved | better
    return best


def _approach(holds, x0: Tensor, z: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """z moved towards x0 up to the boundary, and the share of the way; `gain` is a first guess of it."""
    low, high = torch.zeros_like(gain), torch.ones_like(gain)
    for _ in range(_HALVINGS):
        bracketed = low > 0
        middle = ((low + high) / 2).where(bracketed, high * (1 - gain))
        held = holds(x0.lerp(z, middle[:, None]))
        gain = (2 * gain).clamp_max(0.5).where(held & ~bracketed, gain)
        low, high = low.where(held, middle), middle.where(held, high)
    return x0.lerp(z, high[:, None]), 1 - high


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=1, eps=torch.finfo(vectors.dtype).tiny)


def _child(generator: Generator | None) -> Generator:
    """A new generator for work whose number of draws depends on the batch: what follows must not."""
    device = "cpu" if generator is None else generator.device
    seed = torch.randint(2**62, (), generator=generator, device=device).item()
    return Generator(device).manual_seed(seed)


def _start_from_noise(model, best, topk, generator, tries: int = 40) -> None:
    """Noise of growing weight until an image is misclassified, then bisection towards the image.

    Uniform noise and, every other time, black and white in random proportion: that reaches the box's corners.
    """
    device = best.images.device if generator is None else generator.device
    for k in range(tries):
        rows = best.distances.isinf().nonzero()[:, 0]
        if len(rows) == 0:
            break
        x = best.images[rows]
        noise, share = (
            torch.rand(shape, dtype=x.dtype, device=device, generator=generator).to(x.device)
            for shape in (x.shape[1:], ())
        )
        noise = (noise < share).to(x) if k % 2 else noise
        x = x.lerp(noise.expand_as(x), min(1.0, 0.1 * (k + 1)))
        best.update(rows, x, _margins(model, x, best.labels[rows], topk))
    _to_boundary(model, best, topk)


def _to_boundary(model, best, topk, halvings: int = 10) -> None:
    """Bisection between each image and the adversarial image known for it."""
    rows = best.found()
    x, far = best.images[rows], best.adversarial[rows]
    low, high = torch.zeros(len(rows)).to(x), torch.ones(len(rows)).to(x)
    for _ in range(halvings):
        middle = (low + high) / 2
        z = x.lerp(far, column(middle, x))
        margins = _margins(model, z, best.labels[rows], topk)
        best.update(rows, z, margins)
        low, high = middle.where(margins <= 0, low), middle.where(margins > 0, high)


def logbarrier(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    norm: Norm,
    topk: int = 1,
    steps: int = 50,
    start: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Finlay et al. (2019): minimise ||delta||^2 / 2 - lam log m from the misclassified side, lam falling to 0.

    From `start` (adversarial images) or, where there is none, from noise, or from beyond the linearised boundary
    of the nearest class where that is misclassified and nearer.  A step minimises that function exactly with m
    linearised at the iterate, box included: it finds the point nearest to the image where the linearised margin
    is

        m = lam ||g||_* / ||delta||,   here with lam = mu ||delta||^2,   mu from 0.5 down to 0.001           (2)

    so that mu is the relative distance still kept from the boundary, whatever the scale of model and image.
    A step that would be classified correctly is halved, at most 4 times, then not taken.  With the gradient of
    the linf norm itself, which is a single pixel, the attack is weak in linf; (2) has no such weakness.  The
    margin is that of the logits (the authors' is of probabilities, where it saturates).  At most
    7 * steps + 64 + topk calls.
    """
    best = _Best(model, images, labels, norm, topk, start)
    _start_from_noise(model, best, topk, _child(generator))
    if start is None:
        _start_beyond(model, best, topk)
    rows = best.found()
    x0, y, z = images[rows], labels[rows], best.adversarial[rows]
    for step in range(steps if len(rows) else 0):
        mu = 0.5 * 0.002 ** (step / max(1, steps - 1))
        aimed, grad, _ = _aim(model, z, y, None, topk)
        kept = mu * distance(x0, z, norm).to(z) * dual_norm(grad, norm)  # eq. (2)
        goal = x0 + nearest(grad, _lift(grad, z, x0, aimed) + kept, x0, norm)
        z = _halve_until_safe(model, best, rows, z, goal, topk)
    return best.adversarial


def _start_beyond(model, best, topk) -> None:
    """The nearest class to first order, half as far again as its linearised boundary."""
    for goal in _goals(model, best, topk, targets=1):
        aimed, grad, _ = _aim(model, best.images, best.labels, goal, topk)
        x = (best.images + nearest(grad, -1.5 * aimed, best.images, best.norm)).clamp(0, 1)
        rows = torch.arange(len(x), device=x.device)
        best.update(rows, x, _margins(model, x, best.labels, topk))


def _halve_until_safe(model, best, rows, z, goal, topk, halvings: int = 4) -> Tensor:
    z, part = z.clone(), 1.0
    todo = torch.arange(len(rows), device=rows.device)
    for _ in range(1 + halvings):
        tried = z[todo].lerp(goal[todo], part)
        margins = _margins(model, tried, best.labels[rows[todo]], topk)
        best.update(rows[todo], tried, margins)
        z[todo[margins > 0]] = tried[margins > 0]
        todo, part = todo[margins <= 0], part / 2
        if len(todo) == 0:
            break
    return z


def _follow(model, best, z, goal, topk, steps, weight: float = 1.0) -> None:
    """Walk along the boundary towards the images, from z; `best` keeps what is found.

    With the margin linearised at z, p is the point of its boundary nearest to the image, q the one nearest to
    z.  The step goes to (1 - w) q + w p, with w falling from `weight` to 0.02.  Where pieces of the boundary
    meet in a kink, p jumps from piece to piece; so it is taken from a moving average of the linearisations, as
    in bundle methods, over ever more of them as the walk goes on.  p and q aim beyond the boundary by a share
    of the distance that doubles after a step that was classified correctly and halves after one that was not.
    goal: the classes that are to overtake the label, (images, k), or None for whichever are nearest.
    """
    rows = best.todo()
    z, beyond = z[rows], torch.full((len(rows),), 0.01, dtype=z.dtype, device=z.device)
    slope, offset = torch.zeros_like(z), torch.zeros_like(beyond)  # of the averaged linearisation
    for step in range(steps if len(rows) else 0):
        progress, x0 = step / steps, best.images[rows]
        blend = 0.3 * (1 - progress) ** 0.5
        aimed, grad, margins = _aim(model, z, best.labels[rows], None if goal is None else goal[rows], topk, blend)
        best.update(rows, z, margins)
        if step:
            safe = (margins if goal is None else aimed) > 0
            beyond = torch.where(safe, beyond / 2, beyond * 2).clamp(TOLERANCE / 4, 0.2)
        need = _lift(grad, z, x0, aimed)
        slope, offset = grad.lerp(slope, 0.9 * progress), need.lerp(offset, 0.9 * progress)
        p = x0 + nearest(slope, offset + beyond * offset.abs(), x0, best.norm)
        q = z + nearest(grad, beyond * need.abs() - aimed, z, best.norm)
        w = max(weight * (1 - progress), 0.02)
        keep = _promising(best, rows, z, margins, distance(x0, p, best.norm), progress)
        z = (1 - w) * q + w * p
        z, rows, beyond, slope, offset = (part[keep] for part in (z, rows, beyond, slope, offset))
        if len(rows) == 0:
            return
    best.update(rows, z, _margins(model, z, best.labels[rows], topk))


def _goals(model, best, topk: int, targets: int, among: int = 9) -> list[Tensor]:
    """`targets` sets of topk classes (images, topk) to overtake the label, the nearest to first order first.

    The topk - 1 nearest classes and, in turn, each of the next ones, out of the likeliest among + topk - 1.
    One forward pass, and a backward pass for each class.
    """
    count = min(max(among, targets) + topk - 1, best.logits.shape[1] - 1)
    if targets == 0 or len(best.todo()) == 0:
        return []
    others = best.logits.scatter(1, best.labels[:, None], -torch.inf)
    classes = others.topk(count, dim=1).indices
    with torch.enable_grad():
        x = best.images.detach().requires_grad_()
        logits = model(x)
        leads = logits.gather(1, classes) - logits.gather(1, best.labels[:, None])
        reach = []
        for j in range(count):
            (grad,) = torch.autograd.grad(leads[:, j].sum(), x, retain_graph=j < count - 1)
            reach.append(-leads[:, j].detach() / dual_norm(grad, best.norm))
    classes = classes.gather(1, torch.stack(reach, dim=1).argsort(dim=1))
    shared = classes[:, : topk - 1]
    return [torch.cat([shared, classes[:, j, None]], dim=1) for j in range(topk - 1, min(count, topk - 1 + targets))]


def _promising(best, rows, z, margins, reach, progress: float) -> Tensor:
    """False where z is stationary, or the linearised boundary lies farther than what is known.

    reach, the distance of the linearised boundary (with what is aimed beyond it), is to first order a lower
    bound of what can be found from here; early in a walk it is not trusted to better than a half.
    """
    stationary = (margins > 0) & (reach > (1 - TOLERANCE / 4) * distance(best.images[rows], z, best.norm))
    return (reach < (1.5 - 0.5 * progress) * best.distances[rows]) & ~stationary


def _aim(model, z, labels, goal, topk, blend: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """What is to become positive, its gradient, and the margin: from one forward and one backward pass.

    That is a mean of the leads over the label of the classes `goal` (None: of the k likeliest others), weighted
    towards the least, which alone decides: near the boundary of a top-k set several tie, and each holds the point.
    It is negative where the least is, and positive where that is.
    """
    margins = []

    def lead(x: Tensor) -> Tensor:
        logits = model(x)
        margins.append(_safe_margin(logits, labels, topk))
        others = logits.detach().scatter(1, labels[:, None], -torch.inf)
        leads = logits.gather(1, others.topk(topk, dim=1).indices if goal is None else goal)
        leads = leads - logits.gather(1, labels[:, None])
        ahead = (leads > 0) & (leads.detach().amin(dim=1, keepdim=True) < 0)  # of the label already: no help, no harm
        leads = leads.masked_fill(ahead, 0)
        return (_shares(leads.detach(), blend) * leads).sum(dim=1) - _slack(logits)

    aimed, grad = input_gradient(lead, z)
    return aimed, grad, margins[0].detach()


def _shares(leads: Tensor, blend: float) -> Tensor:
    """Weights (N, k) of sum 1 that fall by e where a lead exceeds the least by blend times their spread."""
    above = leads - leads.amin(dim=1, keepdim=True)
    scale = blend * above.amax(dim=1, keepdim=True)
    return torch.softmax(-above / scale.clamp_min(torch.finfo(leads.dtype).tiny), dim=1)


def _lift(grad: Tensor, z: Tensor, images: Tensor, value: Tensor) -> Tensor:
    """<grad, delta> at which a function with this value and gradient at z, linearised, is 0 at images + delta."""
    return (grad * (z - images)).flatten(1).sum(dim=1) - value


def nearest(grad: Tensor, need: Tensor, images: Tensor, norm: Norm, iterations: int = 30) -> Tensor:
    """The smallest delta, in `norm`, with <grad, delta> >= need (N,) and images + delta in [0, 1].

    It is delta_i = sign(g_i) min(t s_i, room_i) with s = 1 (linf) or |g| (l2) and the smallest t >= 0 that gives
    enough.  <grad, delta> is concave and piecewise linear in t, so Newton's method from t = 0 rises to it in
    finitely many steps.  Where nothing is enough, or g = 0, delta is as far as the box lets it be, or 0.
    """
    g, x = grad.flatten(1), images.flatten(1)
    largest = g.abs().amax(dim=1)
    largest = largest.where(largest > 0, 1)
    size, need = g.abs() / largest[:, None], (need / largest).clamp_min(0)
    speed = torch.ones_like(size) if norm == "linf" else size
    room = torch.where(g > 0, 1 - x, x)
    t = torch.zeros_like(need)
    for _ in range(iterations):
        missing = need - (size * torch.minimum(t[:, None] * speed, room)).sum(dim=1)
        slope = (size * speed * (t[:, None] * speed < room)).sum(dim=1)
        move = torch.where(slope > 0, missing / slope, 0)
        move = torch.where(move > 1e-6 * t, move, 0)  # row by row: independent of the others in the batch
        if not move.any():
            break
        t = t + move
    return (g.sign() * torch.minimum(t[:, None] * speed, room)).view_as(grad)


class _Best:
    """Per image, the nearest adversarial image met so far; the image itself until there is one.

    distances (N,) in float64: 0 where the image is misclassified as it is, inf where nothing is known.
    """

    def __init__(self, model, images, labels, norm, topk, start=None) -> None:
        self.images, self.labels, self.norm = images, labels, norm
        self.adversarial = images.clone()
        with torch.no_grad():
            self.logits = model(images)
        wrong = margin(self.logits, labels, topk) > 0
        self.distances = torch.zeros_like(wrong, dtype=torch.float64).masked_fill(~wrong, torch.inf)
        if start is not None:
            rows = self.todo()
            self.update(rows, start[rows], _margins(model, start[rows], labels[rows], topk))

    def todo(self) -> Tensor:
        """The images that are classified correctly."""
        return (self.distances > 0).nonzero()[:, 0]

    def found(self) -> Tensor:
        """Those of them that are broken."""
        return ((self.distances > 0) & self.distances.isfinite()).nonzero()[:, 0]

    def update(self, rows: Tensor, x: Tensor, margins: Tensor) -> None:
        """Take x, candidates for the images `rows`, where their margins are positive and they are nearer."""
        d = distance(self.images[rows], x, self.norm)
        better = (margins > 0) & (d < self.distances[rows])
        self.adversarial[rows[better]] = x[better]
        self.distances[rows[better]] = d[better]


class _Counted:
    """A model that counts its calls: an image through a forward pass, or through a backward pass."""

    def __init__(self, model: Model) -> None:
        self.model, self.count = model, 0
        self.modules = getattr(model, "modules", tuple)  # for `check_model`

    def __call__(self, x: Tensor) -> Tensor:
        self.count += len(x)
        logits = self.model(x)
        if logits.requires_grad:
            logits.register_hook(self._backward)
        return logits

    def _backward(self, grad: Tensor) -> None:
        self.count += len(grad)

    def take(self, images: int) -> float:
        """Calls per image since the last time this was asked."""
        count, self.count = self.count, 0
        return count / max(1, images)


def _margins(model: Model, x: Tensor, labels: Tensor, topk: int) -> Tensor:
    if len(x) == 0:  # some models cannot take an empty batch
        return x.new_zeros(0)
    with torch.no_grad():
        return _safe_margin(model(x), labels, topk)


def _ascent(model: Model, x: Tensor, labels: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Margins (N,) and their gradient with respect to x."""
    return input_gradient(lambda z: _safe_margin(model(z), labels, topk), x)


def _safe_margin(logits: Tensor, labels: Tensor, topk: int) -> Tensor:
    """`margin`, less what rounding may change when the image is run in another batch; > 0: misclassified."""
    return margin(logits, labels, topk) - _slack(logits)


def _slack(logits: Tensor) -> Tensor:
    return 64 * torch.finfo(logits.dtype).eps * logits.detach().abs().amax(dim=1)


# The most calls an image takes, with the test of the result and its refinement, as `smallest` runs the attack;
# and where topk > 1, to which topk - 1 are to be added (`_goals`).
_ATTACKS = {
    "fab": (fab, 2590, 3370),
    "pgd": (pgd, 885, 885),
    "boundary": (boundary, 546, 546),
    "logbarrier": (logbarrier, 460, 460),
    "carlini_wagner": (carlini_wagner, 1270, 1270),
}
