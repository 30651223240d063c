"""Section 4 of the paper: the smallest adversarial distance of each image, over a suite of attacks.

For an image x of class c the attacks look for

    min ||delta||   such that   m(x + delta) > 0   and   x + delta in [0, 1]^n,   in l2 or linf            (1)

where m(x) = (k-th largest logit among the other classes) - (logit of c) is the margin, positive iff c is not among the
top k.  Whatever they find is an UPPER bound of the true distance, and nothing more: a weak attack makes a weak network
look robust.  So every attack keeps its best iterate and runs it again in other company, and an image that nothing broke
has distance inf, never a missing value.

    pgd              Madry et al. (2018): in a ball of radius eps, and the smallest eps by bisection
    carlini_wagner   Carlini & Wagner (2017): the constraint as a penalty, its weight by binary search
    boundary         Brendel et al. (2018): a walk along the boundary; uses no gradient, only decisions
    logbarrier       Finlay et al. (2019): from outside, the constraint as a logarithmic barrier
    fab              not in the paper; after Croce & Hein (2020): projections onto the linearised boundary

One idea carries fab, logbarrier and the refinement after every attack.  Where m is linearised, (1) can be solved
exactly, box included, in both norms (`nearest`): one gradient buys a whole step along the boundary.

All are called attack(model, images, labels, *, norm, topk=1, start=None, generator=None), with options of their own,
and return images like `images`, no farther than `start` (adversarial images) where that is given.  A row that is
unchanged is an image that was misclassified to begin with, or one that the attack could not break; `smallest` tells
them apart (0 and inf).  ValueError, in one line, for what no attack can work with (`_Best`).  Randomness is drawn in
the shape of one image and serves the whole batch, so that the result of an image does not depend on its neighbours.
Images that are done take part in no further pass.  A `call` is one image through one forward pass, or through one
backward pass.  Left out: targeted attacks, l1.
"""

import copy
import functools
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from gradreg import column, direction, dual_norm, gradient, input_gradient, project, steepest, uniform_ball, vector_norm

Norm = Literal["l2", "linf"]
Model = Callable[[Tensor], Tensor]  # images (N, ...) in [0, 1] -> logits (N, classes)

SUITE = ("fab", "pgd", "boundary", "logbarrier", "carlini_wagner")
CALLS = 300  # an image: the default budget, and the least with which masked gradients are looked for
TOLERANCE = 1e-3  # relative: differences in distance below it are not pursued


class Smallest(NamedTuple):
    """adversarial (N, ...); distances (N,) in float64; attacks: who found it, per image; calls per image."""

    adversarial: Tensor
    distances: Tensor
    attacks: list[str]
    calls: dict[str, float]


def margin(logits: Tensor, labels: Tensor, topk: int = 1) -> Tensor:
    """The k-th largest logit of another class, minus the label's (N,): positive iff not in the top k."""
    label, rival = _compared(logits, labels, topk)
    return rival - label


def distance(images: Tensor, adversarial: Tensor, norm: Norm) -> Tensor:
    """||adversarial_i - images_i|| (N,), in units of images, measured and returned in float64."""
    if norm not in ("l2", "linf"):
        raise ValueError(f"attacks are measured in l2 or linf, not {norm!r}")
    return vector_norm(adversarial.double() - images.double(), norm)


def smallest(
    model: Model, images: Tensor, labels: Tensor, *, norm: Norm, attacks: Sequence[str] = SUITE, topk: int = 1,
    budget: float = CALLS, check: bool = True, generator: Generator | None = None,
) -> Smallest:  # fmt: skip
    """The nearest misclassified image that any of `attacks` finds: an upper bound of the distance of (1).

    distances are 0 for images that are misclassified as they are (attack "clean") and inf for images that no attack
    broke (attack "none", the image unchanged).  Every adversarial image is run again at the end, in other company, and
    moved outwards until it errs each time (`_Best.settle`): so a network that is slightly random, or that rounds
    coarsely, gets a distance at which it errs reliably.

    budget, at least 10: the most calls for each image, without those of the check (5, and 1 in all); one that does not
    hold at the end may cost up to 150 more.  No image uses another's.  They are spent in the order of `_LADDER`: a
    larger budget is the same search, longer, and gives no larger distance, up to rounding; with math.inf every attack
    is run in full.  From the default on, gradients that are masked are looked for (`_in_ball`, `boundary`), and an
    image where they may be, or that nothing broke, gets all attacks, whatever they cost, until two in a row do not
    bring it nearer by 0.1 %.  `calls` holds what was used, by name.

    check=True does what `check_model` does first, and raises what it raises.
    """
    if isinstance(attacks, str) or not attacks or not set(attacks) <= set(SUITE):
        raise ValueError(f"attacks must be a list out of {', '.join(SUITE)}, not {attacks!r}")
    if not budget >= 10:
        raise ValueError(f"budget must be at least 10 calls an image, not {budget}")
    best = _Best(model, images, labels, norm, topk)
    if check:
        _check(best, set(attacks) != {"boundary"})
    calls = {"check": best.network.take(len(images))}
    best.left[:] = budget - 1 - _RUNS
    idle, by = torch.zeros_like(labels), torch.zeros_like(labels)  # attacks in a row without gain; who found it
    doubted = torch.zeros_like(labels, dtype=torch.bool)
    for rung, (name, search, most, guards) in enumerate(_LADDER):
        random, rows = _child(generator), best.todo()
        if rung and budget >= CALLS:
            doubted |= best.distances.isinf()
            best.left[doubted] = math.inf
        rows = rows[~doubted[rows] | (idle[rows] < 2)] if name in attacks else rows[:0]
        rows = rows[best.affords(rows, most + topk - 1)]
        if len(rows) == 0:
            continue
        known, part = best.distances[rows], best.part(rows, keep=name not in ("logbarrier", "carlini_wagner"))
        doubts = search(part, generator=random)
        if name != "fab" and set(attacks) != {"boundary"}:  # along the boundary, by gradients
            _follow(part, None, 20, part.adversarial, (part.distances != known).nonzero()[:, 0], weight=0.5)
        best.update(rows, part.adversarial, part.distances.isfinite())
        calls[name] = calls.get(name, 0) + best.network.take(len(images))
        nearer = best.distances[rows] < known * (1 - TOLERANCE)
        if guards:  # with topk > 1 the first rounds end farther away
            doubted[rows] |= best.distances[rows] < known * (1 - (TOLERANCE if topk == 1 else 0.1))
            doubted[rows] |= False if doubts is None else doubts
        elif name != "fab":
            idle[rows] = torch.where(nearer | best.distances[rows].isinf(), 0, idle[rows] + 1)
        by[rows] = by[rows].where(~nearer, SUITE.index(name))
    best.settle()
    calls["retest"] = best.network.take(len(images))
    pairs = zip(best.distances.tolist(), by.tolist(), strict=True)
    names = ["clean" if d == 0 else "none" if d == math.inf else SUITE[k] for d, k in pairs]
    return Smallest(best.adversarial, best.distances, names, calls)


def check_model(
    model: Model, images: Tensor, labels: Tensor, *, topk: int = 1, gradients: bool = True, rtol: float = 0.05
) -> None:
    """Raise ValueError, saying why, where a distance measured on this model would mean nothing.

    Refused: a module in training mode (it is named); images that are not float32 or float64, not finite or outside [0,
    1]; labels that are not int64 of shape (N,) or out of range; outputs that are not logits (N, classes > topk), or NaN
    or inf (-inf is a class that cannot win); margins that differ from one call to the next, or in another batch, by
    more than rounding and rtol of their median; with gradients=True, margins through which no gradient comes, or whose
    gradient is exactly zero on every image, as where outputs saturate.  Warns where that is so for more than 1 % of the
    images.  Costs 5 calls an image, and one.
    """
    _check(_Best(model, images, labels, "l2", topk), gradients, rtol)


def _check(best: "_Best", gradients: bool, rtol: float = 0.05) -> None:
    every = torch.arange(len(best.labels), device=best.labels.device)
    margins, slack = best._judge(best.logits, every)
    allowed = rtol * margins.abs().median() + 16 * slack  # of margins: an offset, or a class far below, hides nothing
    interact = "outputs depend on the rest of the batch: the images of a batch must not interact"
    for rows, fault in ((every, "the model is random: two calls on the same images differ"),
                        (every.flip(0), interact), (every[:1], interact)):  # fmt: skip
        if ((best.margins(rows, best.images[rows]) - margins[rows]).abs() > allowed[rows]).any():
            raise ValueError(fault)
    if gradients:
        _, grad, _ = best.aim(every, best.images)
        zero = (grad.flatten(1) == 0).all(dim=1).double().mean().item()
        message = f"gradients are exactly zero on {zero:.1%} of the images: attacks that use them are blind"
        if zero == 1:
            raise ValueError(f"{message}; {_BY_DECISIONS}")
        if zero > 0.01:
            warnings.warn(message, stacklevel=3)


# --- attacks: each a search that `_attack` makes public -----------------------------------------------------------


def _attack(search: Callable[..., None]) -> Callable[..., Tensor]:
    """search(best, *, generator, ...) as an attack: the checks before it, the images run again after it."""

    @functools.wraps(search, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    def attack(
        model: Model, images: Tensor, labels: Tensor, *, norm: Norm, topk: int = 1, start: Tensor | None = None,
        generator: Generator | None = None, **options,
    ) -> Tensor:  # fmt: skip
        for name, value in options.items():  # with no run at all every network would be robust
            if isinstance(value, int) and value < least.get(name, 0):
                raise ValueError(f"{name} must be at least {least.get(name, 0)}, not {value}")
        best = _Best(model, images, labels, norm, topk, start)
        search(best, generator=generator, **options)
        best.settle()
        return best.adversarial

    *common, _ = inspect.signature(attack, follow_wrapped=False).parameters.values()
    _, _, *own = inspect.signature(search).parameters.values()
    least = {"steps": 1, "calls": 1, "restarts": int(search.__name__ == "_pgd")}
    attack.__signature__ = inspect.Signature([*common, *own], return_annotation=Tensor)
    attack.search = search
    return attack


@_attack
def fab(best, *, generator, steps: int | None = None, targets: int | None = None, restarts: int = 6) -> None:
    """Smallest distances by projections onto the linearised boundary, class by class.

    After FAB (Croce & Hein 2020).  Each step moves to a mix of two points of the linearised boundary: the one nearest
    to the iterate, and the one nearest to the image (`_follow`).  The first round ascends the margin, in half the
    steps; then one round for each of the `targets` likeliest classes, nearest first; then `restarts` rounds from beyond
    the best found (`_hop`).  A round costs at most 2 * steps + 1 calls an image, and ends for an image where the
    linearised boundary is as far as the best found: nothing to gain, to first order.  By default 80 steps and 9
    targets; with topk > 1, where a round aimed at a fixed set of classes finds next to nothing that the first did not,
    240 (all of them in the first round) and none.
    """
    steps = (80 if best.topk == 1 else 240) if steps is None else steps
    targets = (9 if best.topk == 1 else 0) if targets is None else targets
    _follow(best, None, (steps + 1) // 2 if targets else steps)
    for goal in _goals(best, targets):
        _follow(best, goal, steps)
    _hop(best, generator=generator, steps=steps, rounds=range(restarts), patience=restarts)


def _quick(best, *, generator) -> None:
    """Where most of it is found: 20 steps a round, and with topk = 1 two targets."""
    fab.search(best, generator=generator, steps=20, targets=2 * (best.topk == 1), restarts=1)


def _hop(best, *, generator, steps: int = 20, rounds: range = range(1, 12), patience: float = 6) -> None:
    """Rounds of `fab` that begin elsewhere, where other pieces of the boundary may be nearer.

    The first begins on the line through the best found, twice as far from the image; the others at random points up to
    twice its distance away from it or, every fourth, from the image.  Every other one ascends the logit of a class, the
    likeliest first: from there it is reached where it was not from the image.  An image is left after `patience` rounds
    that brought it no nearer.
    """
    idle, classes = torch.zeros_like(best.labels), best.likeliest(len(rounds))
    for number in rounds:
        known, rows, rank = best.distances.clone(), best.found(), number // 2
        x = (2 * best.adversarial - best.images).clamp(0, 1)
        if number:
            centre = best.images if number % 4 == 3 else best.adversarial
            x = _random_start(centre, 2 * known.where(known.isfinite(), 0), best.norm, generator)
        aimed = number % 2 == 0 < rank < classes.shape[1] and best.topk == 1
        _follow(best, classes[:, rank, None] if aimed else None, steps, x, rows[idle[rows] < patience])
        idle = torch.where(best.distances < known * (1 - TOLERANCE), 0, idle + 1)


def pgd(
    model: Model, images: Tensor, labels: Tensor, *, norm: Norm, topk: int = 1, start: Tensor | None = None,
    generator: Generator | None = None, eps: float | Tensor | None = None, steps: int = 20,
    step_size: float | None = None, restarts: int = 1, targets: int = 1,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Projected gradient ascent in the ball of radius eps from uniform random starts (Madry et al. 2018).

    Every image returned lies in [0, 1] and at most eps away, as `distance` measures it.

    loss=None, for evaluation: ascend the margin, then the logits of the `targets` classes that are nearest to first
    order; all that `restarts` times.  An image is done as soon as it is misclassified, and comes back unchanged if it
    never is.  loss=f, for training: ascend f(logits (N, classes), labels) -> (N,), say `gradreg.cross_entropy`, and
    return the last iterate of every image, untested: steps forward and steps backward passes, from `start` (moved into
    the ball) where that is given.  The model's mode is neither looked at nor changed: in training mode these passes
    update the running statistics of batch normalization.

    eps=None: the smallest eps of each image, by bisection to 0.5 %, below the distance of `start` where those
    (adversarial) images are given; at most 10 rounds of 2 * steps + 1 calls a run.

    eps and step_size are in units of images; eps may be one radius per image (N,).  The default step falls linearly
    from eps to eps / steps.
    """
    if loss is None:
        how = {"norm": norm, "topk": topk, "start": start, "generator": generator, "eps": eps, "steps": steps}
        return _pgd(model, images, labels, **how, step_size=step_size, restarts=restarts, targets=targets)
    if eps is None or restarts != 1:
        raise ValueError("with a loss the last iterate is returned, untested: give eps, and restarts=1")
    _check_images(images)
    images, radius = images.detach(), _radius(eps, images, step_size)
    x = _random_start(images, radius, norm, generator) if start is None else project(start, images, radius, norm)
    for step in range(steps):
        _, grad = input_gradient(lambda z: loss(model(z.clone()), labels), x)
        x = _step_in_ball(x, grad, images, radius, norm, step_size, step / steps)
    return x


@_attack
def _pgd(best, *, generator, eps=None, steps=20, step_size=None, restarts=1, targets=1) -> None:
    runs = [None, *_goals(best, targets)] * restarts
    if eps is None:
        _bisect(best, runs, steps, step_size, generator)
    else:
        best.limit = _radius(eps, best.images, step_size)
        _break(best, best.todo(), best.limit, runs, steps, step_size, generator)


def _radius(eps: float | Tensor, images: Tensor, step_size: float | None) -> Tensor:
    """Checked, one for each image, and no longer than the diagonal of [0, 1]^n, beyond which there is nothing."""
    if isinstance(eps, str):
        raise ValueError(f"eps must be a number, or a tensor of one for each image, not {eps!r}")
    radius = torch.as_tensor(eps, dtype=torch.float64, device=images.device)
    if radius.shape not in ((), images.shape[:1]) or not (radius.isfinite() & (radius >= 0)).all():
        given = " ".join(f"{eps}".split())
        raise ValueError(f"eps must be finite and not negative, one or one for each image, not {given}")
    if step_size is not None and not 0 <= step_size < math.inf:
        raise ValueError(f"step_size must be finite and not negative, not {step_size}")
    return radius.clamp_max(math.prod(images.shape[1:]) ** 0.5).expand(len(images))


def _break(best, rows, radius, runs, steps, step_size, generator) -> Tensor:
    """Run after run (a goal each) on those images `rows` that are not broken; returns those that never are."""
    for goal in runs:
        x = _random_start(best.images, radius, best.norm, generator)[rows]
        for step in range(steps if len(rows) else 0):
            _, grad, margins = best.aim(rows, x, goal)
            stay = (margins <= 0).nonzero()[:, 0]
            x, grad, rows = (part[stay] for part in (x, grad, rows))
            x = _step_in_ball(x, grad, best.images[rows], radius[rows], best.norm, step_size, step / steps)
            if len(rows) == 0:
                break
        rows = rows[best.test(rows, x) <= 0]
    return rows


def _step_in_ball(x, grad, images, radius, norm, step_size: float | None, progress: float) -> Tensor:
    rate = radius * (1 - progress) if step_size is None else torch.full_like(radius, step_size)
    return project(x + column(rate.to(x), x) * steepest(grad, norm), images, radius, norm)


def _random_start(images: Tensor, radius: Tensor, norm: Norm, generator: Generator | None) -> Tensor:
    """One point drawn uniformly from the unit ball, scaled to each image's radius, on every image."""
    around = images + column(radius.to(images), images) * uniform_ball(images[:1], norm, generator)
    return project(around, images, radius, norm)


def _bisect(best, runs, steps, step_size, generator, rounds: int = 10, tol: float = 5e-3) -> None:
    """The smallest radius at which `runs` break an image: from the linearised boundary, or below what is known."""
    eps, unknown = best.distances * (1 - tol), best.distances.isinf().nonzero()[:, 0]
    if len(unknown):
        aimed, grad, _ = best.aim(unknown, best.images[unknown])
        eps[unknown] = 1.2 * (-aimed / dual_norm(grad, best.norm)).double().nan_to_num(1, 1)
    low = torch.zeros_like(eps)
    for _ in range(rounds):
        rows = ((best.distances > low * (1 + tol)) & (best.distances > 0)).nonzero()[:, 0]
        failed = _break(best, rows, _radius(eps, best.images, step_size), runs, steps, step_size, generator)
        low[failed] = eps[failed]
        between = torch.where(low > 0, (low * best.distances).sqrt(), best.distances * 0.9)
        eps = torch.where(best.distances.isinf(), eps * 2, between)


@_attack
def carlini_wagner(best, *, generator, steps: int = 100, rounds: int = 3, targets: int = 1) -> None:
    """Carlini & Wagner (2017): the misclassification constraint as a penalty, minimised by Adam.

    l2    ||delta||^2 + c max(-m, 0); each round is a step of the binary search on c
    linf  sum_i 2 |g_i| max(|delta_i| - tau, 0) + max(-m, 0); each round puts tau between the largest that
          failed (or 0.8 of the best) and the best found; g is the gradient of m

    The weight 2 |g_i| is not the authors' (1 / c), nor is their change of variables that keeps the box: here it is
    clipped.  Deterministic.  All of it once for the margin, and once for each of the `targets` classes nearest to first
    order, 2 * steps * rounds + rounds + 2 calls each.
    """
    rows = best.todo()
    for goal in [None, *_goals(best, targets)] if len(rows) else ():
        aimed, grad, _ = best.aim(rows, best.images[rows], goal)  # the linearised boundary begins and scales the search
        slope, largest = dual_norm(grad, best.norm).clamp_min(torch.finfo(grad.dtype).tiny), dual_norm(grad, "l1")
        reach = (-aimed / slope).clamp(0, grad[0].numel() ** 0.5)
        c, tau, low, high = 3 * reach / slope, reach, torch.zeros_like(reach), torch.full_like(reach, torch.inf)
        for _ in range(rounds):
            if best.norm == "l2":
                reached = _minimise(best, rows, goal, steps, 0.2 * reach * largest / slope, c)
                low, high = low.where(reached, c), c.where(reached, high)
                c = torch.where(high.isinf(), c * 4, (low + high) / 2)
            else:
                _minimise(best, rows, goal, steps, 0.2 * tau, tau)
                known = best.distances[rows].to(tau)
                low = tau.where(known > 1.01 * tau, low)
                tau = torch.where(known.isinf(), 1.5 * tau, (low.maximum(0.8 * known) * known).sqrt())


def _minimise(best, rows, goal, steps, rate, weight) -> Tensor:
    """Adam from the images on the objective of the norm, weight is its c or tau; True where it broke the image."""
    x0, z, weight = best.images[rows], best.images[rows], column(weight, best.images)
    first, second = torch.zeros_like(z), torch.zeros_like(z)
    reached = torch.zeros_like(rows, dtype=torch.bool)
    for step in range(steps):
        _, grad, margins = best.aim(rows, z, goal)
        reached |= margins > 0
        delta, push = z - x0, column(margins <= 0, z) * grad
        if best.norm == "l2":
            total = 2 * delta - weight * push
        else:
            total = 2 * grad.abs() * delta.sign() * (delta.abs() > weight) - push
        first, second = first.lerp(total, 0.1), second.lerp(total.square(), 0.001)
        adam = first / (1 - 0.9 ** (step + 1)) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-12)
        z = (z - column(rate * (1 - step / steps) ** 2, z) * adam).clamp(0, 1)
    return reached | (best.test(rows, z) > 0)


@_attack
def boundary(best, *, generator, calls: int = 450, walks: int | None = None) -> None:
    """A walk on the far side of the boundary, after Brendel et al. (2018): uses no gradient, only decisions.

    Their walk makes a random move along the boundary, then one towards the image, and keeps what is still
    misclassified.  Here a move that is refused counts as well: where the boundary is flat, it says that the opposite
    one would have held.  So a round (`_round`) tries moves in orthogonal directions, and turns the plane that it takes
    the boundary for towards those that held and away from the others (the estimate of HopSkipJump, Chen et al. 2020),
    by an angle found by bisection.  Then it goes to the point of that plane nearest to the image, exact in either norm,
    and from there towards the image, up to the boundary.

    It begins from `start` or, where there is none, from noise.  Of several walks (without a start one for each 4 n
    calls, n values an image) each begins from noise of its own; they share half of the calls, and the nearest place
    that any of them comes to is where the other half begins.  At most calls + 51 * walks + 1 calls; 3 to 4 n of them
    bring it within 5 % of a plane in thousands of dimensions.
    """
    walks = walks or (1 if best.started else max(1, calls // (4 * best.images[0].numel())))
    every, share = best.todo(), calls // (2 * walks)
    for _ in range(walks - 1):
        place = best.part(every)
        _walk(place, share, _child(generator))
        best.update(every, place.adversarial, place.distances.isfinite())
    _walk(best, calls - share * (walks - 1), _child(generator))


def _walk(best, calls: int, generator: Generator) -> None:
    """One walk, from the best found or from noise."""
    _start_from_noise(best, generator)
    rows, shape = best.found(), best.images.shape
    x0, z = best.images[rows].flatten(1), best.adversarial[rows].flatten(1)
    votes = min(round(10 * math.prod(shape[1:]) ** 0.25), calls // 3)
    cost = votes + _TURNS + len(_PARTS) + _HALVINGS
    normal, reach, gain = direction(z - x0, "l2"), torch.full_like(z[:, 0], 0.5), torch.full_like(z[:, 0], 0.5)
    aside = _directions(best.images, generator)
    for _ in range(calls // cost):
        on = best.affords(rows, cost).nonzero()[:, 0]
        rows, x0, z, normal, reach, gain = (part[on] for part in (rows, x0, z, normal, reach, gain))
        if len(rows) == 0:
            return
        moves = list(itertools.islice(aside, votes))
        z, normal, reach, gain = _round(best, rows, x0, z, normal, reach, gain, moves)
        best.update(rows, z.view(-1, *shape[1:]), reach > 0)


_TURNS, _PARTS, _HALVINGS = 4, (1.0, 0.5), 8  # what a round of `boundary` calls for beyond its votes


def _directions(images: Tensor, generator: Generator, coarsest: int = 8):
    """Unit vectors (n,), without end: random orthonormal bases, first of coarse images, then of ever finer ones.

    Photographs, and so the gradients of networks trained on them, vary slowly from pixel to pixel.  A basis is that of
    the discrete cosine transform with random signs, in random order: no matrix is ever stored.
    """
    shape, device = images.shape[1:], images.device
    options = {"generator": generator, "device": generator.device}
    for level in itertools.count():
        coarse = tuple(min(coarsest * 2**level, side) for side in shape[1:]) if len(shape) == 3 else shape[1:]
        n = math.prod((shape[0], *coarse))
        signs = (2.0 * torch.randint(2, (n,), **options) - 1).to(device)
        odd = 2 * torch.arange(n, device=device) + 1
        for k in torch.randperm(n, **options).tolist():
            angle = (k * odd % (4 * n)) * (math.pi / (2 * n))  # exact integers: k odd is too large for float32
            u = (signs * angle.cos()).view(shape[0], *coarse)
            if coarse != shape[1:]:
                u = torch.nn.functional.interpolate(u[None], size=shape[1:], mode="bilinear")[0]
            yield (u / u.norm()).flatten().to(images)


def _round(best, rows, x0, z, normal, reach, gain, moves: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From z on the far side, with the boundary taken for the plane through it with this normal, a nearer z.

    All are (rows, n); the moves aside are as long as `reach` times ||z - x0||_2.
    """

    def holds(x: Tensor) -> Tensor:
        return best.margins(rows, x.view(-1, *best.images.shape[1:])) > 0

    def move(aside: Tensor) -> tuple[Tensor, Tensor]:
        moved = (z + (reach * (z - x0).norm(dim=1))[:, None] * aside).clamp(0, 1)
        return holds(moved), moved - z

    held, kept, every = 0, 0, 0
    for u in moves:
        yes, moved = move(u - (normal @ u)[:, None] * normal)
        held, kept, every = held + yes.to(z), kept + yes[:, None] * moved, every + moved
    share = held / len(moves)
    lean = kept - share[:, None] * every  # along the plane, where those moves go that held
    lean = direction(lean - (lean * normal).sum(dim=1, keepdim=True) * normal, "l2")
    # A move along lean - 2^t normal holds iff <true normal, lean> > 2^t <true normal, normal>.
    none = torch.full_like(share, -7)
    low, high = _bisected(lambda t: move(direction(lean - (2**t)[:, None] * normal, "l2"))[0], none, none + 10, _TURNS)
    normal = direction(normal + torch.where(low > none, 2 ** ((low + high) / 2), 0)[:, None] * lean, "l2")
    # On a flat boundary half of the moves hold: where far fewer or more do, it bends within their reach.
    reach = (reach * (1.3 - 2 * (share - 0.5).abs())).clamp(1e-3, 1)
    # Just nearer than z, in the direction of the plane's nearest point, or else half way there.
    delta, ahead = z - x0, nearest(normal, (normal * (z - x0)).sum(dim=1), x0, best.norm)
    nearer = torch.zeros_like(share, dtype=torch.bool)
    for part in _PARTS:
        tried = delta.lerp(ahead, part)
        shrink = 0.9999 * vector_norm(delta, best.norm) / vector_norm(tried, best.norm)
        tried = (x0 + shrink.nan_to_num(0, 0, 0)[:, None] * tried).clamp(0, 1)
        better = holds(tried) & ~nearer
        z, nearer = tried.where(better[:, None], z), nearer | better
    # Then towards the image, up to the boundary; the share of the way that the last round won is a first guess.
    low, high = torch.zeros_like(gain), torch.ones_like(gain)
    for _ in range(_HALVINGS):
        bracketed = low > 0
        middle = ((low + high) / 2).where(bracketed, high * (1 - gain))
        held = holds(x0.lerp(z, middle[:, None]))
        gain = (2 * gain).clamp_max(0.5).where(held & ~bracketed, gain)
        low, high = low.where(held, middle), middle.where(held, high)
    return x0.lerp(z, high[:, None]), normal, reach, (1 - high).clamp_min(1e-3)


def _bisected(holds, yes: Tensor, no: Tensor, halvings: int) -> tuple[Tensor, Tensor]:
    """Where `holds` changes between yes and no, closed in on by halving from both sides."""
    for _ in range(halvings):
        middle = (yes + no) / 2
        held = holds(middle)
        yes, no = middle.where(held, yes), middle.where(~held, no)
    return yes, no


def _child(generator: Generator | None) -> Generator:
    """A new generator for work whose number of draws depends on the batch: what follows must not."""
    device = "cpu" if generator is None else generator.device
    seed = torch.randint(2**62, (), generator=generator, device=device).item()
    return Generator(device).manual_seed(seed)


def _start_from_noise(best, generator, tries: int = 40, halvings: int = 10) -> None:
    """Noise of growing weight until an image is misclassified, then bisection towards the image.

    Uniform noise and, every other time, black and white in random proportion: that reaches the box's corners.
    """
    for k in range(tries):
        rows = best.distances.isinf().nonzero()[:, 0]
        rows = rows[best.affords(rows, 1 + halvings)]
        if len(rows) == 0:
            break
        x, options = best.images[rows], {"device": generator.device, "generator": generator}
        noise, share = (torch.rand(shape, dtype=x.dtype, **options).to(x.device) for shape in (x.shape[1:], ()))
        noise = (noise < share).to(x) if k % 2 else noise
        best.test(rows, x.lerp(noise.expand_as(x), min(1.0, 0.1 * (k + 1))))
    rows = best.found()
    rows = rows[best.affords(rows, halvings)]
    x, far, here = best.images[rows], best.adversarial[rows], torch.zeros_like(best.images[rows].flatten(1)[:, 0])
    _bisected(lambda part: best.test(rows, x.lerp(far, column(part, x))) > 0, here + 1, here, halvings)


@_attack
def logbarrier(best, *, generator, steps: int = 50) -> None:
    """Finlay et al. (2019): minimise ||delta||^2 / 2 - lam log m from the misclassified side, lam falling to 0.

    From `start` or, where there is none, from noise, or from beyond the linearised boundary of the nearest class where
    that is misclassified and nearer.  A step minimises that function exactly with m linearised at the iterate, box
    included: it finds the point nearest to the image where the linearised margin is

        m = lam ||g||_* / ||delta||,   here with lam = mu ||delta||^2,   mu from 0.5 down to 0.001           (2)

    so that mu is the relative distance still kept from the boundary, whatever the scale of model and image.  A step
    that would be classified correctly is halved, at most 4 times, then not taken.  At most 7 * steps + 64 + topk calls.
    """
    _start_from_noise(best, _child(generator))
    for goal in [] if best.started else _goals(best, 1):  # half as far again as the boundary of the nearest class
        every = torch.arange(len(best.images), device=best.images.device)
        aimed, grad, _ = best.aim(every, best.images, goal)
        best.test(every, (best.images + nearest(grad, -1.5 * aimed, best.images, best.norm)).clamp(0, 1))
    rows = best.found()
    x0, z = best.images[rows], best.adversarial[rows]
    for step in range(steps if len(rows) else 0):
        mu = 0.5 * 0.002 ** (step / max(1, steps - 1))
        aimed, grad, _ = best.aim(rows, z)
        kept = mu * distance(x0, z, best.norm).to(z) * dual_norm(grad, best.norm)  # eq. (2)
        goal = x0 + nearest(grad, _lift(grad, z, x0, aimed) + kept, x0, best.norm)
        todo = torch.arange(len(rows), device=rows.device)
        for k in range(5):
            tried = z[todo].lerp(goal[todo], 0.5**k)
            wrong = best.test(rows[todo], tried) > 0
            z[todo] = tried.where(column(wrong, tried), z[todo])
            todo = todo[(~wrong).nonzero()[:, 0]]


# --- what they share ----------------------------------------------------------------------------------------------


def _follow(best, goal, steps, z=None, rows=None, weight: float = 1.0) -> None:
    """Walk along the boundary towards the images, from z (None: from the images); `best` keeps what is found.

    With the margin linearised at z, p is the point of its boundary nearest to the image, q the one nearest to z.  The
    step goes to (1 - w) q + w p, with w falling from `weight` to 0.02.  Where pieces of the boundary meet in a kink, p
    jumps from piece to piece; so it is taken from a moving average of the linearisations, as in bundle methods, over
    ever more of them as the walk goes on.  p and q aim beyond the boundary by a share of the distance that doubles
    after a step that was classified correctly and halves after one that was not.  goal: the classes that are to
    overtake the label, (images, k), or None for whichever are nearest.  An image whose budget ends on the way is tested
    where it is: a longer walk would have passed there.
    """
    rows = best.todo() if rows is None else rows
    rows = rows[best.affords(rows, 3)]
    least = best.left[best.number[rows]].min().item() if len(rows) else 0
    z = (best.images if z is None else z)[rows]
    beyond = torch.full((len(rows),), 0.01, dtype=z.dtype, device=z.device)
    slope, offset = torch.zeros_like(z), torch.zeros_like(beyond)  # of the averaged linearisation
    for step in range(steps if len(rows) else 0):
        progress, x0 = step / steps, best.images[rows]
        aimed, grad, margins = best.aim(rows, z, goal, 0.3 * (1 - progress) ** 0.5)
        if step:
            safe = (margins if goal is None else aimed) > 0
            beyond = torch.where(safe, beyond / 2, beyond * 2).clamp(TOLERANCE / 4, 0.2)
        need = _lift(grad, z, x0, aimed)
        slope, offset = grad.lerp(slope, 0.9 * progress), need.lerp(offset, 0.9 * progress)
        needs = torch.cat([offset + beyond * offset.abs(), beyond * need.abs() - aimed])
        both = torch.cat([x0, z])  # in one go, for the sake of a device
        p, q = (both + nearest(torch.cat([slope, grad]), needs, both, best.norm)).chunk(2)
        w = max(weight * (1 - progress), 0.02)
        reach = distance(x0, p, best.norm)  # to first order a lower bound of what is found from here, early to a half
        stationary = (margins > 0) & (reach > (1 - TOLERANCE / 4) * distance(x0, z, best.norm))
        keep = (reach < (1.5 - 0.5 * progress) * best.distances[rows]) & ~stationary
        z = q.lerp(p, w).clamp(0, 1)
        more = best.affords(rows, 3)
        if least < 2 * step + 5 and len(ends := (keep & ~more).nonzero()[:, 0]):
            best.test(rows[ends], z[ends])
        stay = (keep & more).nonzero()[:, 0]
        z, rows, beyond, slope, offset = (part[stay] for part in (z, rows, beyond, slope, offset))
        if len(rows) == 0:
            return
    best.test(rows, z)


def _goals(best, targets: int, among: int = 9) -> list[Tensor]:
    """`targets` sets of topk classes (images, topk) to overtake the label, the nearest to first order first.

    The topk - 1 nearest classes and, in turn, each of the next ones, out of the likeliest among + topk - 1.  One
    forward pass, and a backward pass for each class.
    """
    shared, count = best.topk - 1, min(max(among, targets) + best.topk - 1, best.logits.shape[1] - 1)
    rows = best.todo() if targets > 0 else []
    if len(rows) == 0 or len(rows := rows[best.affords(rows, count + 4)]) == 0:
        return []
    classes = best.likeliest(count)
    best.left[best.number[rows]] -= 1 + count
    with torch.enable_grad():
        x = _inside(best.images[rows]).requires_grad_()
        logits = best.network(x)
        leads = logits.gather(1, classes[rows]) - logits.gather(1, best.labels[rows, None])
        grads = [_gradient(lead, x, retain_graph=True) for lead in leads.T]
    reach = torch.stack([-a / dual_norm(grad, best.norm) for a, grad in zip(leads.detach().T, grads, strict=True)], 1)
    classes[rows] = classes[rows].gather(1, reach.argsort(dim=1))
    last = range(shared, min(count, shared + targets))
    return [torch.cat([classes[:, :shared], classes[:, j, None]], dim=1) for j in last]


def _shares(leads: Tensor, blend: float) -> Tensor:
    """Weights (N, k) of sum 1 that fall by e where a lead exceeds the least by blend times their spread."""
    above = leads - leads.amin(dim=1, keepdim=True)
    scale = blend * above.amax(dim=1, keepdim=True)
    return torch.softmax(-above / scale.clamp_min(torch.finfo(leads.dtype).tiny), dim=1)


def _lift(grad: Tensor, z: Tensor, images: Tensor, value: Tensor) -> Tensor:
    """<grad, delta> at which a function with this value and gradient at z, linearised, is 0 at images + delta."""
    return (grad * (z - images)).flatten(1).sum(dim=1) - value


def nearest(grad: Tensor, need: Tensor, images: Tensor, norm: Norm, iterations: int = 12) -> Tensor:
    """The smallest delta, in `norm`, with <grad, delta> >= need (N,) and images + delta in [0, 1].

    It is delta_i = sign(g_i) min(t s_i, room_i) with s = 1 (linf) or |g| (l2) and the smallest t >= 0 that gives
    enough.  <grad, delta> is concave and piecewise linear in t, so Newton's method from t = 0 rises to it in finitely
    many steps.  Where nothing is enough, or g = 0, delta is as far as the box lets it be, or 0.
    """
    g, x = grad.flatten(1), images.flatten(1)
    largest = g.abs().amax(dim=1)
    largest = largest.where(largest > 0, 1)
    size = g.abs() / largest[:, None]
    need = (need / largest).clamp(0, 2 * g.shape[1])  # more than there is
    speed = torch.ones_like(size) if norm == "linf" else size
    room = torch.where(g > 0, 1 - x, x)
    t = torch.zeros_like(need)
    for step in range(iterations):
        missing = need - (size * torch.minimum(t[:, None] * speed, room)).sum(dim=1)
        slope = (size * speed * (t[:, None] * speed < room)).sum(dim=1)
        move = torch.where(slope > 0, missing / slope, 0)
        move = torch.where(move > 1e-6 * t, move, 0)  # row by row: independent of the others in the batch
        t = t + move
        if step == 3 and not move.any():  # as a rule; to look is to wait for the device, so once
            break
    return (g.sign() * torch.minimum(t[:, None] * speed, room)).view_as(grad)


_RUNS = 3  # of every adversarial image in the end


class _Best:
    """An attack under way: per image, the nearest adversarial image met so far; the image itself until there is one.

    distances (N,) in float64: 0 where the image is misclassified as it is, inf where nothing is known.  Rows are
    numbers of images, of which x are candidates.  Raises ValueError for what no attack can work with.
    """

    def __init__(self, model, images, labels, norm, topk, start=None) -> None:
        _check_data(model, images, labels, norm, start)
        self.network = model if isinstance(model, _Network) else _Network(model)
        self.images, self.labels, self.norm, self.topk = images.detach(), labels, norm, topk
        self.started = start is not None
        self.adversarial = self.images.clone()
        with torch.no_grad():
            self.logits = self.network(self.images)
        _check_logits(self.logits, labels, topk)
        label, rival = _compared(self.logits, labels, topk)
        self.distances = torch.full_like(label, torch.inf, dtype=torch.float64).masked_fill(rival > label, 0)
        self.limit = torch.full_like(self.distances, torch.inf)
        self.number, self.left = torch.arange(len(labels), device=labels.device), self.limit.clone()
        self.roundoff = _roundoff(self.logits, labels, topk)
        self.firm = 64 * torch.finfo(label.dtype).eps * (label - rival).clamp_min(0)  # what sums differ by as a rule
        if start is not None:
            rows = self.todo()
            self.test(rows, start[rows])

    def todo(self) -> Tensor:
        """The images that are classified correctly."""
        return (self.distances > 0).nonzero()[:, 0]

    def found(self) -> Tensor:
        """Those of them that are broken."""
        return ((self.distances > 0) & self.distances.isfinite()).nonzero()[:, 0]

    def likeliest(self, count: int) -> Tensor:
        """Of the other classes (images, count), or all of them, for the images as they are."""
        others = self.logits.scatter(1, self.labels[:, None], -torch.inf)
        return others.topk(min(count, others.shape[1] - 1), dim=1).indices

    def affords(self, rows: Tensor, calls: int) -> Tensor:
        """Which of rows have so many calls left.  The others stop here for good.

        So a larger budget buys the same search, longer: nothing is skipped for something cheaper.
        """
        number = self.number[rows]
        left = self.left[number]
        self.left[number] = left.where(left >= calls, 0)
        return left >= calls

    def update(self, rows: Tensor, x: Tensor, wrong: Tensor) -> None:
        """Take x where it is misclassified and nearer."""
        d = distance(self.images[rows], x, self.norm)
        known = self.distances[rows]
        better = wrong & (d < known) & (d <= self.limit[rows])
        self.adversarial[rows] = x.where(column(better, x), self.adversarial[rows])
        self.distances[rows] = d.where(better, known)

    def margins(self, rows: Tensor, x: Tensor) -> Tensor:
        """The margins of x less what rounding may make of them; > 0: misclassified."""
        self.left[self.number[rows]] -= 1
        with torch.no_grad():  # some models cannot take an empty batch
            return self._judge(self.network(x), rows)[0] if len(x) else x.new_zeros(0)

    def test(self, rows: Tensor, x: Tensor) -> Tensor:
        """`margins`, and what is misclassified and nearer is kept."""
        margins = self.margins(rows, x)
        self.update(rows, x, margins > 0)
        return margins

    def aim(self, rows: Tensor, x: Tensor, goal: Tensor | None = None, blend: float = 0.3):
        """What is to become positive (rows,), its gradient, and the margins as from `test`; a call each way.

        That is a mean of the leads over the label of the classes `goal` (images, k) (None: of the k likeliest others),
        weighted towards the least, which alone decides: near the boundary of a top-k set several tie, and each holds
        the point.  It is negative where the least is, and positive where that is.
        """
        label = self.labels[rows, None]
        self.left[self.number[rows]] -= 2
        x = _inside(x)
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            logits = self.network(z)
            margins, slack = self._judge(logits.detach(), rows)
            others = logits.detach().scatter(1, label, -torch.inf)
            leads = logits.gather(1, others.topk(self.topk, dim=1).indices if goal is None else goal[rows])
            leads = leads - logits.gather(1, label)
            ahead = (leads > 0) & (leads.detach().amin(dim=1, keepdim=True) < 0)  # already: no help, no harm
            leads = leads.masked_fill(ahead, 0)
            aimed = (_shares(leads.detach(), blend) * leads).sum(dim=1) - slack
            grad = _gradient(aimed, z)
        self.update(rows, x, margins > 0)
        return aimed.detach(), grad, margins

    def _judge(self, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        label, rival = _compared(logits, self.labels[rows], self.topk)
        slack = self.roundoff[rows] * (label.abs() + rival.abs()) + self.firm[rows]
        return rival - label - slack, slack

    def part(self, rows: Tensor, keep: bool = False) -> "_Best":
        """A search for the images `rows` alone, from what is known of them (keep), or anew."""
        part = copy.copy(self)
        for name in ("images", "labels", "logits", "limit", "roundoff", "firm", "adversarial", "distances", "number"):
            setattr(part, name, getattr(self, name)[rows])
        part.started = keep
        if not keep:
            part.adversarial = part.images.clone()
            part.distances = torch.where(part.distances > 0, torch.inf, part.distances)
        return part

    def settle(self, outwards: int = 16) -> None:
        """Move adversarial images that do not hold outwards, by 0.01 % and ever more up to three times as far.

        None goes beyond `limit`, and one that never holds is not counted as found.
        """
        rows = self.found()
        holds, apart = self._holds(rows, self.adversarial[rows])
        rows, apart = rows[~holds], 1.3 * apart[~holds]  # margins differ less in the smaller company that is to come
        x0, delta = self.images[rows], self.adversarial[rows] - self.images[rows]
        self.distances[rows], self.adversarial[rows] = torch.inf, x0
        for k in range(outwards if len(rows) else 0):
            x = (x0 + (1 + 2.0 ** (k + 2 - outwards)) * delta).clamp(0, 1)
            holds, _ = self._holds(rows, x, 8, apart)
            self.update(rows, x, holds & (distance(x0, x, self.norm) <= self.limit[rows]))
            rows, x0, delta, apart = (part[~holds] for part in (rows, x0, delta, apart))

    def _holds(self, rows: Tensor, x: Tensor, runs: int = _RUNS, apart: Tensor | float = 0) -> tuple[Tensor, Tensor]:
        """Whether x errs by more than its margins differ by, in runs of other orders and batches of other sizes.

        Also by how much they do, at least `apart`.  Where that is a near thing, 8 runs: a random margin must be some
        four standard deviations on the far side.
        """
        if len(rows) == 0:
            return rows > 0, x.new_zeros(0)
        margins = x.new_zeros(runs, len(rows))
        for run in range(runs):
            order = torch.arange(len(rows), device=rows.device).roll(run).flip(0)
            for part in order.tensor_split(1 + run % 3) if len(rows) > 2 else order.split(1):
                with torch.no_grad():
                    margins[run, part] = margin(self.network(x[part]), self.labels[rows[part]], self.topk).to(x)
        least, most = margins.aminmax(dim=0)
        spread = (most - least).clamp_min(apart)
        holds = least > spread
        near = holds & (least < 8 * spread.maximum(spread.median()))  # three runs may agree by chance
        if runs < 8 and near.any():
            holds[near], spread[near] = self._holds(rows[near], x[near], 8, spread[near])
        return holds, spread


class _Network:
    """A model as the attacks see it: it may spoil the images it is given, and each of its calls is counted.

    Logits come in float32 at least, and finite where a class that cannot win has -inf.
    """

    def __init__(self, model: Model) -> None:
        self.model, self.count = model, 0
        self.named_modules = getattr(model, "named_modules", tuple)  # for `_check_data`

    def __call__(self, x: Tensor) -> Tensor:
        self.count += len(x)
        logits = self.model(x.clone())
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
            shape = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"the model must return logits (images, classes) for {len(x)} images, not {shape}: wrap it"
            )
        if logits.requires_grad:
            logits.register_hook(self._backward)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).clamp_min(-1e30)

    def _backward(self, grad: Tensor) -> None:
        self.count += len(grad)

    def take(self, images: int) -> float:
        """Calls per image since the last time this was asked."""
        count, self.count = self.count, 0
        return count / max(1, images)


_BY_DECISIONS = 'attack it by its decisions alone, attacks=["boundary"]'


def _gradient(values: Tensor, x: Tensor, **graph: bool) -> Tensor:
    """`gradreg.gradient`, and what to do where there is none."""
    try:
        return gradient(values, x, **graph)
    except (ValueError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        if isinstance(error, RuntimeError):
            if "not implemented" not in why:
                raise
            why = f"no gradient comes through the model ({why})"
        raise ValueError(f"{why}; {_BY_DECISIONS}") from None


def _inside(x: Tensor) -> Tensor:
    """x, off the faces of the box by a rounding: there a network that clips its images has no gradient."""
    return x.clamp(torch.finfo(x.dtype).eps, 1 - torch.finfo(x.dtype).eps)


def _compared(logits: Tensor, labels: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The two logits that decide, (N,) each: the label's, and the k-th largest of the others."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return logits.gather(1, labels[:, None])[:, 0], others.topk(topk, dim=1).values[:, -1]


def _roundoff(logits: Tensor, labels: Tensor, topk: int) -> Tensor:
    """The relative error of rounding (N,) of the coarsest format that holds the label's and the largest logits exactly.

    A network that computes in 16 bits may well return 32: what its margins are worth shows in the digits, though not in
    those of one logit or two, which may be short by chance.
    """
    largest = logits.topk(min(topk + 5, logits.shape[1]), dim=1).values
    seen = torch.cat([logits.gather(1, labels[:, None]), largest], dim=1)
    eps = torch.full_like(seen[:, 0], torch.finfo(seen.dtype).eps)
    for coarser in (torch.float32, torch.float16, torch.bfloat16):
        eps = eps.masked_fill((seen.to(coarser) == seen).all(1), torch.finfo(coarser).eps)
    return eps / 2


def _check_images(images: Tensor, name: str = "images") -> None:
    known = isinstance(images, Tensor) and images.dtype in (torch.float32, torch.float64)
    if not (known and ((images >= 0) & (images <= 1)).all()):
        raise ValueError(f"{name} must be a float32 or float64 tensor, finite and in [0, 1]; normalise in the model")


def _check_data(model, images: Tensor, labels: Tensor, norm: Norm, start: Tensor | None) -> None:
    training = [name for name, module in getattr(model, "named_modules", tuple)() if module.training]
    if training:
        part = f"a part of the model ({', '.join(training[:3])}) is" if training[0] else "the model is"
        raise ValueError(f"{part} in training mode: call model.eval()")
    _check_images(images)
    known = isinstance(labels, Tensor)
    if not known or labels.shape != images.shape[:1] or labels.dtype != torch.int64 or len(labels) == 0:
        given = f"{labels.dtype} of shape {tuple(labels.shape)}" if known else f"a {type(labels).__name__}"
        raise ValueError(f"labels must be an int64 tensor, one per image, at least one; not {given}")
    if start is not None:
        _check_images(start, "start")
        if start.shape != images.shape:
            raise ValueError(f"start must be like images, {tuple(images.shape)}, not {tuple(start.shape)}")
    distance(images[:0], images[:0], norm)  # raises where norm is none


def _check_logits(logits: Tensor, labels: Tensor, topk: int) -> None:
    if not 1 <= topk < logits.shape[1]:
        raise ValueError(f"logits must be (images, classes > topk), not {tuple(logits.shape)} with topk={topk}")
    if not logits.isfinite().all():
        raise ValueError("the model's outputs are not finite")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels must be in 0 .. {logits.shape[1] - 1}, the model's classes")


# --- how `smallest` runs them ---------------------------------------------------------------------------------------


def _in_ball(best: "_Best", *, generator: Generator | None, probe: float = 0.02, off: float = 0.3) -> Tensor:
    """PGD in a ball of 0.99 of the distance; True (N,) for images whose gradients are not what they should be.

    That is: the margin, at the image or at the nearest adversarial one, falls or rises along its gradient by 30 % more
    or less than the gradient says, over 2 % of the distance; or nothing was found.  On networks that mask nothing that
    ratio was 0.94 to 1.15.  Not with topk > 1, where classes tie and the gradient is that of one.  27 calls.
    """
    doubted, rows = best.distances.isinf(), best.found()
    radius = best.distances.where(best.distances.isfinite(), 0)
    checked = len(rows) > 0 and best.topk == 1
    for x, sign in ((best.images[rows], probe), (best.adversarial[rows], -probe)) if checked else ():
        _, grad, margins = best.aim(rows, x, blend=0)
        moved = (x + column((sign * radius[rows]).to(x), x) * steepest(grad, best.norm)).clamp(0, 1)
        said, done = (grad * (moved - x)).flatten(1).sum(dim=1), best.margins(rows, moved) - margins
        doubted[rows] |= ~((done - said).abs() <= off * said.abs())
    _break(best, rows, 0.99 * radius, [None], 10, None, generator)
    return doubted


# In this order; how many calls an image must afford to begin, where topk > 1, topk - 1 more (`_goals`); whether it is
# a guard.  fab and boundary spend what there is: a step and a test, or a round.
_LADDER = (
    ("fab", _quick, 3, False),
    ("pgd", _in_ball, 27, True),
    ("boundary", functools.partial(boundary.search, calls=45, walks=1), 12, True),
    ("fab", _hop, 3, False),
    ("fab", fab.search, 3, False),
    ("pgd", _pgd.search, 843, False),
    ("boundary", boundary.search, 12, False),
    ("logbarrier", logbarrier.search, 418, False),
    ("carlini_wagner", carlini_wagner.search, 1228, False),
)
