"""Section 4 of the paper: the smallest adversarial distance of each image, over a suite of attacks.

For an image x of class c the attacks look for

    min ||delta||   such that   m(x + delta) > 0   and   x + delta in [0, 1]^n,   in l2 or linf            (1)

where m(x) = (k-th largest logit among the other classes) - (logit of c) is the margin, positive iff c is not in the
top k, but for ties.  Whatever they find is an UPPER bound of the true distance, and nothing more: a weak attack makes a
weak network look robust.  So every attack keeps its best iterate and runs it again in other company.

One idea carries fab (not in the paper), logbarrier and the refinement after every attack: where m is linearised, (1)
is solved exactly, box included, in both norms (`nearest`).  So one gradient buys a whole step along the boundary.

All are called attack(model, images, labels, *, norm, topk=1, start=None, generator=None), with options of their own,
and return images like `images`, no farther than `start` (adversarial images) where that is given.  A row is unchanged
where the image was misclassified to begin with, or the attack could not break it.  ValueError, in one line, for what no
attack can work with.  Randomness is drawn for one image and serves the whole batch, so that no result depends on an
image's neighbours.  A `call` is one image through one forward or one backward pass.  Left out: targeted attacks, l1.
"""

import copy
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

import gradreg
from gradreg import Model, column, direction, dual_norm, input_gradient, margin, project, steepest, uniform_ball

Norm = Literal["l2", "linf"]

SUITE = ("fab", "pgd", "boundary", "logbarrier", "carlini_wagner")
CALLS = 300  # an image: the default budget, and the least with which masked gradients are looked for
TOLERANCE = 1e-3  # relative: differences in distance below it are not pursued
RUNS = 3  # of every adversarial image in the end
_BY_DECISIONS = 'attack it by its decisions alone, attacks=["boundary"]'


class Smallest(NamedTuple):
    """adversarial (N, ...); distances (N,) in float64; attacks: who found it, per image; calls per image."""

    adversarial: Tensor
    distances: Tensor
    attacks: list[str]
    calls: dict[str, float]


def ahead(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the label (N,): of a larger logit, or of as large a one and first, as for argmax."""
    return (logits.argsort(dim=1, descending=True, stable=True) == labels[:, None]).int().argmax(dim=1)


def distance(images: Tensor, adversarial: Tensor, norm: Norm) -> Tensor:
    """||adversarial_i - images_i|| (N,), in units of images, measured and returned in float64."""
    if norm not in ("l2", "linf"):
        raise ValueError(f"attacks are measured in l2 or linf, not {norm!r}")
    return gradreg.vector_norm(adversarial.double() - images.double(), norm)


def smallest(
    model: Model, images: Tensor, labels: Tensor, *, norm: Norm, attacks: Sequence[str] = SUITE, topk: int = 1,
    budget: float = CALLS, check: bool = True, generator: Generator | None = None,
) -> Smallest:  # fmt: skip
    """The nearest misclassified image that any of `attacks` finds: an upper bound of the distance of (1).

    distances are 0 for images that are misclassified as they are (attack "clean"), and inf, never missing, where no
    attack broke the image (attack "none", the image unchanged).  A network that is slightly random, or rounds coarsely,
    gets a distance at which it errs reliably (`_Best.settle`).

    budget, at least 10: the most calls for each image, without those of the check (5, and 1 in all); one that does not
    hold at the end may cost up to 130 more.  No image uses another's.  They are spent in the order of `_LADDER`: a
    larger budget is the same search, longer, and gives no larger distance, up to rounding; with math.inf every attack
    is run in full.  From the default on, masked gradients are looked for (`_in_ball`, `boundary`), and an image where
    they may be, or that nothing broke, gets all attacks, whatever they cost, until two in a row do not bring it nearer
    by 0.1 %.  `calls` holds what was used, by name.  check=True does what `check_model` does first.
    """
    if isinstance(attacks, str) or not attacks or not set(attacks) <= set(SUITE):
        raise ValueError(f"attacks must be a list out of {', '.join(SUITE)}, not {attacks!r}")
    if not budget >= 10:
        raise ValueError(f"budget must be at least 10 calls an image, not {budget}")
    least = min(most for name, _, most, guard in _LADDER if name in attacks and (name == "boundary" or not guard))
    if budget < min(CALLS, least + topk - 1):  # with no run at all every network would be robust
        raise ValueError(f"budget {budget:g} is too small for {', '.join(attacks)}: give {CALLS} or more, or add fab")
    best, blind = _Best(model, images, labels, norm, topk), set(attacks) == {"boundary"}
    if check:
        _check(best, not blind)
    calls = {"check": best.take()}
    best.budget[:] = best.spent + budget - 1 - RUNS
    idle, by = torch.zeros_like(labels), torch.zeros_like(labels)  # attacks in a row without gain; who found it
    for rung, (name, search, most, guards) in enumerate(_LADDER):
        random = _child(generator)
        if rung and budget >= CALLS:
            best.doubted |= best.distances.isinf()
            best.budget[best.doubted] = math.inf
        rows = best.rows(~best.doubted | (idle < 2), most + topk - 1) if name in attacks else labels[:0]
        if len(rows) == 0:
            continue
        known, part = best.distances.clone(), best.among(rows, anew=name in ("logbarrier", "carlini_wagner"))
        search(part, generator=random)
        if name != "fab" and not blind:  # along the boundary, by gradients
            _follow(part, None, 20, part.adversarial, rows[(part.distances != known)[rows]], weight=0.5)
        best.update(rows, part.adversarial[rows], part.distances[rows].isfinite())
        calls[name] = calls.get(name, 0) + best.take()
        nearer = best.distances < known * (1 - TOLERANCE)
        if guards:
            best.doubted |= best.distances < known * (1 - (0.03 if topk == 1 else 0.1))
        elif name != "fab":
            idle = torch.where(nearer | best.distances.isinf(), 0, idle + 1)
        by = by.where(~nearer, SUITE.index(name))
    best.settle()
    calls["retest"] = best.take()
    by = by.where(best.distances.isfinite(), -1).where(best.distances > 0, -2)
    names = [(*SUITE, "clean", "none")[k] for k in by.tolist()]
    return Smallest(best.adversarial, best.distances, names, calls)


def check_model(model: Model, images: Tensor, labels: Tensor, *, topk: int = 1, gradients: bool = True) -> None:
    """Raise ValueError, saying why, where a distance measured on this model would mean nothing.

    Refused: a module in training mode; images that are not float32 or float64, not finite or outside [0, 1]; labels
    that are not int64 of shape (N,) or out of range; outputs that are not logits (N, classes > topk), or NaN or inf
    (-inf is a class that cannot win); margins that differ from one call to the next, or in another batch, by more than
    rounding and 5 % of their median; with gradients=True, margins through which no gradient comes, or whose gradient is
    exactly zero on every image.  Warns where that is so for more than 1 % of them.  5 calls an image, and one.
    """
    _check(_Best(model, images, labels, "l2", topk), gradients)


def _check(best: "_Best", gradients: bool) -> None:
    every = torch.arange(len(best.labels), device=best.labels.device)
    margins, slack = best.judge(best.logits, every)
    allowed = 0.05 * margins.abs().median() + 16 * slack  # of margins: an offset, or a class far below, hides nothing
    interact = "outputs depend on the rest of the batch: the images of a batch must not interact"
    for rows, fault in ((every, "the model is random: two calls on the same images differ"),
                        (every.flip(0), interact), (every[:1], interact)):  # fmt: skip
        with torch.no_grad():
            again, _ = best.judge(best.call(rows, best.images[rows]), rows)
        if ((again - margins[rows]).abs() > allowed[rows]).any():
            raise ValueError(fault)
    if gradients:
        _, grad, _ = best.aim(every, best.images)
        zero = (grad.flatten(1) == 0).all(dim=1).double().mean().item()
        message = f"gradients are exactly zero on {zero:.1%} of the images: attacks that use them are blind"
        if zero == 1:
            raise ValueError(f"{message}; {_BY_DECISIONS}")
        if zero > 0.01:
            warnings.warn(message, stacklevel=3)


def _attack(search: Callable[..., None]) -> Callable[..., Tensor]:
    """search(best, *, generator, ...) as an attack: the checks before it, the images run again after it."""
    least = {"steps": 1, "calls": 1, "rounds": 1, "restarts": int(search.__name__ == "pgd")}

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

    attack.search, attack.__doc__ = search, search.__doc__
    attack.__name__ = attack.__qualname__ = search.__name__
    return attack


@_attack
def fab(best, *, generator, steps: int | None = None, targets: int = 9, restarts: int = 6) -> None:
    """fab(..., steps, targets=9, restarts=6): projections onto the linearised boundary, class by class.

    After FAB (Croce & Hein 2020); a step is in `_follow`.  The first round ascends the margin, in half the steps; then
    one round for each of the `targets` classes nearest to first order (none with topk > 1); then `restarts` rounds
    from beyond the best found (`_hop`).  A round costs at most 2 * steps + 1 calls an image, and ends where the
    linearised boundary is as far as the best found.  By default 80 steps; with topk > 1 240.
    """
    steps, targets = steps or (80 if best.topk == 1 else 240), targets * (best.topk == 1)
    _follow(best, None, (steps + 1) // 2 if targets else steps)
    for goal in _goals(best, targets):
        _follow(best, goal, steps)
    _hop(best, generator=generator, steps=steps, rounds=range(restarts), patience=restarts)


def _hop(best, *, generator, steps: int = 20, rounds: range = range(1, 12), patience: int = 6) -> None:
    """Rounds of `fab` that begin elsewhere, where other pieces of the boundary may be nearer.

    The first begins on the line through the best found, twice as far from the image; the others at random points up to
    twice its distance from it or, every fourth, from the image.  Every other one ascends the logit of a class, the
    second likeliest of the others first.  An image is left after `patience` rounds without gain.
    """
    idle, classes = torch.zeros_like(best.labels), best.likeliest[:, : len(rounds)]
    for number in rounds:
        known, rank = best.distances.clone(), number // 2
        x = (2 * best.adversarial - best.images).clamp(0, 1)
        if number:
            centre = best.images if number % 4 == 3 else best.adversarial
            x = _random_start(centre, 2 * known.where(known.isfinite(), 0), best.norm, generator)
        aimed = number % 2 == 0 < rank < classes.shape[1] and best.topk == 1
        rows = best.rows(known.isfinite() & (idle < patience))
        _follow(best, classes[:, rank, None] if aimed else None, steps, x, rows)
        idle = torch.where(best.distances < known * (1 - TOLERANCE), 0, idle + 1)


@_attack
def pgd(best, *, generator, eps=None, steps: int = 20, restarts: int = 1, targets: int = 1) -> None:
    """pgd(..., eps=None, steps=20, restarts=1, targets=1): projected gradient ascent in a ball, Madry et al. (2018).

    From uniform random starts, in steps that fall linearly from eps to eps / steps: ascend the margin, then the logits
    of the `targets` classes that are nearest to first order; all that `restarts` times.  An image is done as soon as it
    is misclassified, and comes back unchanged if it never is; none is more than eps away, as `distance` measures it.
    eps is in units of images, one or one for each image (N,).  None: the smallest of each image by bisection to 0.5 %,
    below that of `start` if given, in at most 10 rounds of 2 * steps + 1 calls a run.
    """
    goals, tol = [None, *_goals(best, targets)] * restarts, 5e-3
    if eps is not None:
        best.limit = _radius(eps, best.images)
        _break(best, best.rows(), best.limit, goals, steps, generator)
        return
    radius, low = torch.where(best.distances.isinf(), 1, best.distances * (1 - tol)), torch.zeros_like(best.distances)
    if len(unknown := best.rows(best.distances.isinf())):  # from the linearised boundary on
        aimed, grad, _ = best.aim(unknown, best.images[unknown])
        scale = 1.2 * (aimed.abs() / dual_norm(grad, best.norm)).double().nan_to_num(1, 1)
        radius[unknown] = scale.where(scale > 0, 1)
    for _ in range(10):
        rows = best.rows(best.distances * (1 - tol) > low)
        failed = _break(best, rows, _radius(radius, best.images), goals, steps, generator)
        low[failed] = radius[failed]
        between = torch.where(low > 0, (low * best.distances).sqrt(), best.distances * 0.9)
        radius = torch.where(best.distances.isinf(), radius * 2, between)


def ascend(
    model: Model, images: Tensor, labels: Tensor, *, norm: str, eps: float | Tensor, loss: Callable[..., Tensor],
    steps: int = 20, step_size: float | None = None, start: Tensor | None = None, generator: Generator | None = None,
) -> Tensor:  # fmt: skip
    """Images to train on: `pgd` on loss(logits (N, classes), labels) -> (N,), say `gradreg.cross_entropy`.

    The last iterate of every image, untested, in [0, 1] and at most eps away, from `start` (moved into the ball) or
    uniform noise; norm may be l1, too.  The model's mode is neither looked at nor changed: in training mode these steps
    forward and backward passes update the running statistics of batch normalization.
    """
    gradreg.check_images(images)
    if step_size is not None and not 0 <= step_size < math.inf:
        raise ValueError(f"step_size must be finite and not negative, not {step_size}")
    images, radius = images.detach(), _radius(eps, images)
    x = _random_start(images, radius, norm, generator) if start is None else project(start, images, radius, norm)
    for step in range(steps):
        _, grad = input_gradient(lambda z: loss(model(z.clone()), labels), x)
        rate = radius * (1 - step / steps) if step_size is None else torch.full_like(radius, step_size)
        x = project(x + column(rate.to(x), x) * steepest(grad, norm), images, radius, norm)
    return x


def _radius(eps: float | Tensor, images: Tensor) -> Tensor:
    """Checked, one for each image in float64, and no longer than [0, 1]^n is in any norm."""
    given = math.nan if isinstance(eps, str | None) else eps
    radius = torch.as_tensor(given, dtype=torch.float64, device=images.device)
    if radius.shape not in ((), images.shape[:1]) or not (radius.isfinite() & (radius >= 0)).all():
        given = " ".join(f"{eps}".split())
        raise ValueError(f"eps must be finite and not negative, one or one for each image, not {given}")
    return radius.clamp_max(images[0].numel()).expand(len(images))


def _break(best, rows, radius, goals, steps, generator) -> Tensor:
    """Run after run (a goal each) on those images `rows` that are not broken; returns those that never are."""
    for goal in goals:
        x = _random_start(best.images, radius, best.norm, generator)[rows]
        for step in range(steps if len(rows) else 0):
            _, grad, margins = best.aim(rows, x, goal)
            stay = (margins <= 0).nonzero()[:, 0]
            x, grad, rows = (part[stay] for part in (x, grad, rows))
            if len(rows) == 0:
                break
            x = x + column((radius[rows] * (1 - step / steps)).to(x), x) * steepest(grad, best.norm)
            x = project(x, best.images[rows], radius[rows], best.norm)
        rows = rows[best.test(rows, x) <= 0]
    return rows


def _random_start(images: Tensor, radius: Tensor, norm: Norm, generator: Generator | None) -> Tensor:
    """One point drawn uniformly from the unit ball, scaled to each image's radius, on every image."""
    around = images + column(radius.to(images), images) * uniform_ball(images[:1], norm, generator)
    return project(around, images, radius, norm)


@_attack
def carlini_wagner(best, *, generator, steps: int = 100, rounds: int = 3, targets: int = 1) -> None:
    """carlini_wagner(..., steps=100, rounds=3, targets=1): the constraint as a penalty, minimised by Adam (2017).

    l2    ||delta||^2 + c max(-m, 0); each round is a step of the binary search on c
    linf  sum_i 2 |g_i| max(|delta_i| - tau, 0) + max(-m, 0); each round puts tau between the largest that
          failed (or 0.8 of the best) and the best found; g is the gradient of m, where theirs has 1 / c

    The box is kept by clipping, not by a change of variables.  Deterministic.  All of it once for the margin, and for
    each of the `targets` classes nearest to first order: 2 * steps * rounds + rounds + 2 calls each.
    """
    rows, l2 = best.rows(), best.norm == "l2"
    x0 = best.images[rows]
    for goal in [None, *_goals(best, targets)] if len(rows) else ():
        aimed, grad, _ = best.aim(rows, x0, goal)  # the linearised boundary begins and scales the search
        slope, largest = dual_norm(grad, best.norm).clamp_min(torch.finfo(grad.dtype).tiny), dual_norm(grad, "l1")
        reach = (-aimed / slope).clamp(0, grad[0].numel() ** 0.5)
        weight, low, high = 3 * reach / slope if l2 else reach, torch.zeros_like(reach), reach + torch.inf
        for _ in range(rounds):
            z, first, second, reached = x0, torch.zeros_like(x0), torch.zeros_like(x0), rows < 0
            rate, scale = column(0.2 * (reach * largest / slope if l2 else weight), x0), column(weight, x0)
            for step in range(steps):
                _, grad, margins = best.aim(rows, z, goal)
                reached |= margins > 0
                delta, push = z - x0, column(margins <= 0, z) * grad
                pull = 2 * delta if l2 else 2 * grad.abs() * delta.sign() * (delta.abs() > scale)
                total = pull - (scale * push if l2 else push)
                first, second = first.lerp(total, 0.1), second.lerp(total.square(), 0.001)
                adam = first / (1 - 0.9 ** (step + 1)) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-12)
                z = (z - rate * (1 - step / steps) ** 2 * adam).clamp(0, 1)
            reached |= best.test(rows, z) > 0
            known = best.distances[rows].to(weight)
            low = weight.where(~reached if l2 else known > 1.01 * weight, low)
            high = weight.where(reached, high) if l2 else known
            between = ((low if l2 else low.maximum(0.8 * high)) + high) / 2
            weight = torch.where(high.isinf(), weight * (4 if l2 else 1.5), between)


@_attack
def boundary(best, *, generator, calls: int = 450) -> None:
    """boundary(..., calls=450): a walk on the far side of the boundary that uses no gradient, only decisions.

    After Brendel et al. (2018), from `start` or else from noise.  Their walk moves at random along the boundary, then
    towards the image, and keeps what is still misclassified.  Here a refused move counts, too: on a flat boundary the
    opposite one would have held.  So a round tries orthogonal moves, and turns the plane that it takes the boundary for
    towards those that held and away from the others (the estimate of HopSkipJump, Chen et al. 2020).  3 to 4 n calls
    (n values an image) bring it within 5 % of a plane in thousands of dimensions.  At most calls + 55, and `settle`'s.
    """
    generator = _child(generator)
    _start_from_noise(best, generator)
    rows = best.rows(best.distances.isfinite())
    x0, z = best.images[rows].flatten(1), best.adversarial[rows].flatten(1)
    votes = min(round(10 * best.images[0].numel() ** 0.25), calls // 3)
    cost = votes + 4 + 2 + 8  # of the bisections in `_round`
    normal, reach, before = direction(z - x0, "l2"), torch.full_like(z[:, 0], 0.5), z[:0]
    for _ in range(calls // cost):
        on = best.affords(rows, cost).nonzero()[:, 0]
        rows, x0, z, normal, reach = (part[on] for part in (rows, x0, z, normal, reach))
        moves = _moves(best.images, votes, before, generator)
        before = torch.cat([before, moves]) if len(before) + 2 * votes <= before.shape[1] else before[:0]
        z, normal, reach = _round(best, rows, x0, z, normal, reach, moves)


def _moves(images: Tensor, votes: int, before: Tensor, generator: Generator) -> Tensor:
    """Random directions (votes, n), orthonormal, to `before` too; smooth first, as photographs are, then finer."""
    channels, *sides = images.shape[1:]
    share = ((len(before) + votes) / images[0].numel()) ** 0.5
    coarse = [min(s, max(8, math.ceil(share * s))) for s in sides] if len(sides) == 2 else sides
    u = torch.randn(votes, channels, *coarse, generator=generator, device=generator.device)
    if coarse != sides:
        u = torch.nn.functional.interpolate(u, size=sides, mode="bilinear")
    u = u.flatten(1).to(images)
    once = torch.linalg.qr((u - u @ before.T @ before).T).Q.T  # few digits: smooth, u is nearly in the span of `before`
    return torch.linalg.qr((once - once @ before.T @ before).T).Q.T


def _round(best, rows, x0, z, normal, reach, moves) -> tuple[Tensor, Tensor, Tensor]:
    """A nearer z, all (rows, n), with the boundary taken for the plane through z with this normal; and that turned."""

    def holds(x: Tensor) -> Tensor:
        return best.test(rows, x.view(-1, *best.images.shape[1:])) > 0

    def aside(way: Tensor) -> Tensor:
        return (z + (reach * (z - x0).norm(dim=1))[:, None] * way).clamp(0, 1)

    def nearer(part: Tensor) -> Tensor:  # just nearer than z, in the direction of the plane's nearest point
        x = delta.lerp(flat, part[:, None])
        shrink = 0.9999 * gradreg.vector_norm(delta, best.norm) / gradreg.vector_norm(x, best.norm)
        return (x0 + shrink.nan_to_num(0, 0, 0)[:, None] * x).clamp(0, 1)

    held, kept, every = 0, 0, 0
    for u in moves:
        x = aside(u - (normal @ u)[:, None] * normal)
        yes = holds(x)[:, None]
        held, kept, every = held + yes, kept + yes * (x - z), every + (x - z)
    share = held / len(moves)
    lean = kept - share * every  # along the plane, where those moves go that held
    lean = direction(lean - (lean * normal).sum(dim=1, keepdim=True) * normal, "l2")
    # A move along lean - 2^t normal holds iff <true normal, lean> > 2^t <true normal, normal>.
    low, high = _bisected(lambda t: holds(aside(direction(lean - (2**t)[:, None] * normal, "l2"))), reach, -7, 3, 4)
    normal = direction(normal + torch.where(low > -7, 2 ** ((low + high) / 2), 0)[:, None] * lean, "l2")
    # On a flat boundary half of the moves hold: where far fewer or more do, it bends within their reach.
    reach = (reach * (1.3 - 2 * (share[:, 0] - 0.5).abs())).clamp(1e-3, 1)
    delta = z - x0
    flat = nearest(normal, (normal * delta).sum(dim=1), x0, best.norm)
    part, _ = _bisected(lambda part: holds(nearer(part)), reach, 0, 2, 2)
    z = nearer(part).where(part[:, None] > 0, z)
    t, _ = _bisected(lambda t: holds(x0.lerp(z, 1 - (2**-t)[:, None])), reach, 13, 0, 8)
    return x0.lerp(z, torch.where(t < 13, 1 - 2**-t, 1)[:, None]), normal, reach


def _bisected(holds, like: Tensor, yes: float, no: float, halvings: int) -> tuple[Tensor, Tensor]:
    """Where `holds` changes between yes and no (N,), closed in on by halving from both sides."""
    yes, no = torch.full_like(like, yes), torch.full_like(like, no)
    for _ in range(halvings):
        middle = (yes + no) / 2
        held = holds(middle)
        yes, no = middle.where(held, yes), middle.where(~held, no)
    return yes, no


def _child(generator: Generator | None) -> Generator:
    """A new generator for work whose number of draws depends on the batch: what follows must not."""
    device = "cpu" if generator is None else generator.device
    return Generator(device).manual_seed(torch.randint(2**62, (), generator=generator, device=device).item())


def _start_from_noise(best, generator, halvings: int = 10) -> None:
    """Noise of growing weight, uniform or black and white (the box's corners), then bisection towards the image."""
    for k in range(40):  # all of them are drawn, whatever the batch
        rows = best.rows(best.distances.isinf(), 1 + halvings)
        x, options = best.images[rows], {"device": generator.device, "generator": generator}
        noise, share = (torch.rand(shape, dtype=x.dtype, **options).to(x.device) for shape in (x.shape[1:], ()))
        noise = (noise < share).to(x) if k % 2 else noise
        best.test(rows, x.lerp(noise.expand_as(x), min(1.0, 0.1 * (k + 1))))
    rows = best.rows(best.distances.isfinite(), halvings)
    x, far = best.images[rows], best.adversarial[rows]
    _bisected(lambda part: best.test(rows, x.lerp(far, column(part, x))) > 0, x.flatten(1)[:, 0], 1, 0, halvings)


@_attack
def logbarrier(best, *, generator, steps: int = 50) -> None:
    """logbarrier(..., steps=50): minimise ||delta||^2 / 2 - lam log m from the misclassified side, lam falling to 0.

    Finlay et al. (2019); from `start` or else from noise, or from beyond the linearised boundary of the nearest class
    where that is misclassified and nearer.  A step minimises that function exactly with m linearised at the iterate,
    box included: it finds the point nearest to the image where the linearised margin is

        m = lam ||g||_* / ||delta||,   here with lam = mu ||delta||^2,   mu from 0.5 down to 0.001           (*)

    so that mu is the relative distance still kept from the boundary, at any scale of model and image.  A step that
    would be classified correctly is halved, at most 4 times, then not taken.  At most 7 * steps + 64 + topk calls.
    """
    _start_from_noise(best, _child(generator))
    rows = best.rows()
    for goal in [] if best.started else _goals(best, 1):  # half as far again as the boundary of the nearest class
        aimed, grad, _ = best.aim(rows, best.images[rows], goal)
        best.test(rows, (best.images[rows] + nearest(grad, -1.5 * aimed, best.images[rows], best.norm)).clamp(0, 1))
    rows = best.rows(best.distances.isfinite())
    x0, z = best.images[rows], best.adversarial[rows]
    for step in range(steps if len(rows) else 0):
        mu = 0.5 * 0.002 ** (step / max(1, steps - 1))
        aimed, grad, _ = best.aim(rows, z)
        kept = mu * distance(x0, z, best.norm).to(z) * dual_norm(grad, best.norm)  # (*)
        need = (grad * (z - x0)).flatten(1).sum(dim=1) - aimed + kept
        goal = x0 + nearest(grad, need, x0, best.norm)
        todo = torch.arange(len(rows), device=rows.device)
        for k in range(5):
            tried = z[todo].lerp(goal[todo], 0.5**k)
            wrong = best.test(rows[todo], tried) > 0
            z[todo] = tried.where(column(wrong, tried), z[todo])
            todo = todo[(~wrong).nonzero()[:, 0]]


def _follow(best, goal, steps, z=None, rows=None, weight: float = 1.0) -> None:
    """Walk along the boundary towards the images, from z (None: from the images); `best` keeps what is found.

    With the margin linearised at z, p is the point of its boundary nearest to the image, q the one nearest to z.  The
    step goes to (1 - w) q + w p, with w falling from `weight` to 0.02.  At a kink p jumps from piece to piece; so it is
    taken from a moving average of the linearisations, as in bundle methods, over ever more of them.  p and q aim beyond
    the boundary by a share of the distance that doubles after a step that was classified correctly, and else halves.
    goal: the classes (images, k) that are to overtake the label, or None for whichever are nearest.  An image whose
    budget ends is tested where it is: a longer walk would have passed there.
    """
    rows = best.rows(calls=3) if rows is None else rows[best.affords(rows, 3)]
    least = (best.budget - best.spent)[rows].min().item() if len(rows) else 0
    z = (best.images if z is None else z)[rows]
    beyond = torch.full((len(rows),), 0.01, dtype=z.dtype, device=z.device)
    slope, offset = torch.zeros_like(z), torch.zeros_like(beyond)  # of the averaged linearisation
    for step in range(steps if len(rows) else 0):
        progress, x0 = step / steps, best.images[rows]
        aimed, grad, margins = best.aim(rows, z, goal, 0.3 * (1 - progress) ** 0.5)
        if step:
            safe = (margins if goal is None else aimed) > 0
            beyond = torch.where(safe, beyond / 2, beyond * 2).clamp(TOLERANCE / 4, 0.2)
        need = (grad * (z - x0)).flatten(1).sum(dim=1) - aimed  # <grad, delta> where the linearised margin is 0
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


def _goals(best, targets: int) -> list[Tensor]:
    """`targets` sets of topk classes (images, topk) to overtake the label, the nearest to first order first.

    The topk - 1 nearest and each of the next, out of the likeliest 9 + topk - 1.  A backward pass for each class.
    """
    shared, count = best.topk - 1, min(max(9, targets) + best.topk - 1, best.logits.shape[1] - 1)
    if len(rows := best.rows(targets > 0, count + 4)) == 0:
        return []
    classes = best.likeliest[:, :count].clone()
    with torch.enable_grad():
        x = _inside(best.images[rows]).requires_grad_()
        logits = best.call(rows, x)
        leads = logits.gather(1, classes[rows]) - logits.gather(1, best.labels[rows, None])
        norms = [dual_norm(_gradient(lead, x, retain_graph=True), best.norm) for lead in leads.T]
    best.spent[rows] += count
    reach = -leads.detach() / torch.stack(norms, dim=1)
    classes[rows] = classes[rows].gather(1, reach.argsort(dim=1))
    return [torch.cat([classes[:, :shared], one[:, None]], dim=1) for one in classes[:, shared : shared + targets].T]


def _shares(leads: Tensor, blend: float) -> Tensor:
    """Weights (N, k) of sum 1 that fall by e where a lead exceeds the least by blend times their spread."""
    above = leads - leads.amin(dim=1, keepdim=True)
    scale = blend * above.amax(dim=1, keepdim=True)
    return torch.softmax(-above / scale.clamp_min(torch.finfo(leads.dtype).tiny), dim=1)


def nearest(grad: Tensor, need: Tensor, images: Tensor, norm: Norm) -> Tensor:
    """The smallest delta, in `norm`, with <grad, delta> >= need (N,) and images + delta in [0, 1].

    It is delta_i = sign(g_i) min(t s_i, room_i) with s = 1 (linf) or |g| (l2) and the smallest t >= 0 that gives
    enough: <grad, delta> is concave and piecewise linear in t, so Newton's method from t = 0 rises to it in finitely
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
    for step in range(12):
        missing = need - (size * torch.minimum(t[:, None] * speed, room)).sum(dim=1)
        slope = (size * speed * (t[:, None] * speed < room)).sum(dim=1)
        move = torch.where(slope > 0, missing / slope, 0)
        move = torch.where(move > 1e-6 * t, move, 0)  # row by row: independent of the others in the batch
        t = t + move
        if step == 3 and not move.any():  # as a rule; to look is to wait for the device, so once
            break
    return (g.sign() * torch.minimum(t[:, None] * speed, room)).view_as(grad)


class _Best:
    """An attack under way: per image, the nearest adversarial image met so far; the image itself until there is one.

    distances (N,) in float64: 0 where the image is misclassified as it is, inf where nothing is known; calls `spent`
    and the `budget` of each.  `rows` are numbers of images, x candidates for them.
    """

    def __init__(self, model, images, labels, norm, topk, start=None) -> None:
        gradreg.check_data(model, images, labels)
        if start is not None:
            gradreg.check_images(start, "start")
            if start.shape != images.shape:
                raise ValueError(f"start must be like images, {tuple(images.shape)}, not {tuple(start.shape)}")
        distance(images[:0], images[:0], norm)  # raises where norm is none
        self.model, self.images, self.labels, self.norm, self.topk = model, images.detach(), labels, norm, topk
        self.started, self.adversarial = start is not None, self.images.clone()
        self.active = torch.ones_like(labels, dtype=torch.bool)
        self.doubted, self.spent, self.taken = ~self.active, torch.zeros_like(labels, dtype=torch.float64), 0.0
        self.budget, self.limit = self.spent + torch.inf, self.spent + torch.inf
        with torch.no_grad():
            self.logits = self.call(torch.arange(len(labels), device=labels.device), self.images)
        classes = self.logits.shape[1]
        if not 1 <= topk < classes:
            raise ValueError(f"logits must be (images, classes > topk), not {(len(labels), classes)} with topk={topk}")
        if not self.logits.isfinite().all():
            raise ValueError("the model's outputs are not finite")
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"labels must be in 0 .. {classes - 1}, the model's classes")
        self.likeliest = self.logits.scatter(1, labels[:, None], -torch.inf).argsort(1, descending=True)[:, :-1]
        label, rival = gradreg.compared(self.logits, labels, topk)
        self.distances = self.limit.masked_fill(ahead(self.logits, labels) >= topk, 0)
        self.roundoff = _roundoff(self.logits, labels, topk)
        self.firm = 64 * torch.finfo(label.dtype).eps * (label - rival).clamp_min(0)  # what sums differ by as a rule
        if start is not None:
            self.test(rows := self.rows(), start[rows])

    def rows(self, where: Tensor | bool = True, calls: int = 0) -> Tensor:
        """The images that are classified correctly, as they are, where `where` (N,) is true, that have `calls` left."""
        rows = (self.active & (self.distances > 0) & where).nonzero()[:, 0]
        return rows[self.affords(rows, calls)] if calls else rows

    def among(self, rows: Tensor, anew: bool) -> "_Best":
        """A search for the images `rows` alone, from what is known of them, or anew."""
        part = copy.copy(self)
        part.active, part.started = torch.zeros_like(self.active).index_fill(0, rows, True), not anew
        if anew:
            part.adversarial = self.images.clone()
            part.distances = torch.where(self.distances > 0, torch.inf, self.distances)
        return part

    def affords(self, rows: Tensor, calls: int) -> Tensor:
        """Which of rows have so many calls left.  The others stop for good: more is the same search, longer."""
        enough = self.budget[rows] - self.spent[rows] >= calls
        self.budget[rows] = self.budget[rows].where(enough, 0)
        return enough

    def take(self) -> float:
        """Calls per image since the last time this was asked."""
        before, self.taken = self.taken, self.spent.mean().item()
        return self.taken - before

    def call(self, rows: Tensor, x: Tensor) -> Tensor:
        """The logits of x, in float32 at least, finite where a class that cannot win has -inf; x may not be spoilt."""
        self.spent[rows] += 1
        n, logits = len(x), self.model(x.clone())
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != n:
            given = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the model must return logits (images, classes) for {n} images, not {given}: wrap it")
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).clamp_min(-1e30)

    def update(self, rows: Tensor, x: Tensor, wrong: Tensor) -> None:
        """Take x where it is misclassified and nearer."""
        d, known = distance(self.images[rows], x, self.norm), self.distances[rows]
        better = wrong & (d < known) & (d <= self.limit[rows])
        self.adversarial[rows] = x.where(column(better, x), self.adversarial[rows])
        self.distances[rows] = d.where(better, known)

    def test(self, rows: Tensor, x: Tensor) -> Tensor:
        """The margins of x less what rounding may make of them; > 0: misclassified, and kept where nearer."""
        if len(x) == 0:  # some models cannot take an empty batch
            return x.new_zeros(0)
        with torch.no_grad():
            margins, _ = self.judge(self.call(rows, x), rows)
        self.update(rows, x, margins > 0)
        return margins

    def aim(self, rows: Tensor, x: Tensor, goal: Tensor | None = None, blend: float = 0.3):
        """What is to become positive (rows,), its gradient, and the margins as from `test`; a call each way.

        That is a mean of the leads over the label of the classes `goal` (images, k) (None: of the k likeliest others),
        weighted towards the least, which decides and has its sign: at the boundary of a top-k set several tie.
        """
        label = self.labels[rows, None]
        with torch.enable_grad():
            z = _inside(x).detach().requires_grad_()
            logits = self.call(rows, z)
            margins, slack = self.judge(logits.detach(), rows)
            others = logits.detach().scatter(1, label, -torch.inf)
            leads = logits.gather(1, others.topk(self.topk, dim=1).indices if goal is None else goal[rows])
            leads = leads - logits.gather(1, label)
            leading = (leads > 0) & (leads.detach().amin(dim=1, keepdim=True) < 0)  # already: no help, no harm
            leads = leads.masked_fill(leading, 0)
            aimed = (_shares(leads.detach(), blend) * leads).sum(dim=1) - slack
            grad = _gradient(aimed, z)
        self.spent[rows] += 1
        self.update(rows, z.detach(), margins > 0)
        return aimed.detach(), grad, margins

    def judge(self, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        label, rival = gradreg.compared(logits, self.labels[rows], self.topk)
        slack = self.roundoff[rows] * (label.abs() + rival.abs()) + self.firm[rows]
        return rival - label - slack, slack

    @torch.no_grad()
    def settle(self) -> None:
        """Run adversarial images in other orders and batches of other sizes, and move outwards those that do not hold.

        To hold is to err in 3 runs by more than thrice what the margins differ by; further out in 8, by more than that.
        The way is 0.01 % and ever more, up to three times as far, but not beyond `limit`; else it is not counted.
        """
        rows, spread = self.rows(self.distances.isfinite()), 0
        x0, far = self.images[rows], self.adversarial[rows]
        self.distances[rows], self.adversarial[rows] = torch.inf, x0
        for further, runs, times in ((0, RUNS, 3), *((2.0**k, 8, 1) for k in range(-14, 2))):
            if len(rows) == 0:
                return
            x = x0.lerp(far, 1 + further).clamp(0, 1)
            margins = self.logits.new_zeros(runs, len(rows))
            for run in range(runs):
                for some in torch.arange(len(rows), device=rows.device).roll(run).flip(0).chunk(1 + run % 3):
                    margins[run, some] = margin(self.call(rows[some], x[some]), self.labels[rows[some]], self.topk)
            least, most = margins.aminmax(dim=0)
            spread = (most - least).clamp_min(spread)
            holds = least > times * spread
            self.update(rows, x, holds)
            rows, x0, far, spread = (part[~holds] for part in (rows, x0, far, spread))


def _gradient(values: Tensor, x: Tensor, **graph: bool) -> Tensor:
    """`gradreg.gradient`, and what to do where there is none."""
    try:
        return gradreg.gradient(values, x, **graph)
    except ValueError as error:
        raise ValueError(f"{error}; {_BY_DECISIONS}") from None


def _inside(x: Tensor) -> Tensor:
    """x, off the faces of the box by a rounding: there a network that clips its images has no gradient."""
    return x.clamp(torch.finfo(x.dtype).eps, 1 - torch.finfo(x.dtype).eps)


def _roundoff(logits: Tensor, labels: Tensor, topk: int) -> Tensor:
    """The relative error of rounding (N,) of the coarsest format that holds the label's and the largest logits exactly.

    A network that computes in 16 bits may return 32: a few logits' digits show it; one or two may be short by chance.
    """
    largest = logits.topk(min(topk + 5, logits.shape[1]), dim=1).values
    seen = torch.cat([logits.gather(1, labels[:, None]), largest], dim=1)
    eps = torch.full_like(seen[:, 0], torch.finfo(seen.dtype).eps)
    for coarser in (torch.float32, torch.float16, torch.bfloat16):
        eps = eps.masked_fill((seen.to(coarser) == seen).all(1), torch.finfo(coarser).eps)
    return eps / 2


def _in_ball(best, *, generator: Generator | None) -> None:
    """PGD in a ball of 0.99 of the distance; doubts images whose gradients are not what they should be.

    That is: over 2 % of the distance, from the image or from the nearest adversarial one, the margin changes by 30 %
    more or less than its gradient says (unmasked: 7 % at most).  Not with topk > 1, where classes tie.  27 calls.
    """
    rows, radius = best.rows(best.distances.isfinite()), best.distances.where(best.distances.isfinite(), 0)
    for points, sign in ((best.images, 0.02), (best.adversarial, -0.02)) if len(rows) and best.topk == 1 else ():
        x = points[rows]
        _, grad, margins = best.aim(rows, x, blend=0)
        moved = (x + column((sign * radius[rows]).to(x), x) * steepest(grad, best.norm)).clamp(0, 1)
        said, done = (grad * (moved - x)).flatten(1).sum(dim=1), best.test(rows, moved) - margins
        best.doubted[rows] |= ~((done - said).abs() <= 0.3 * said.abs())
    _break(best, rows, 0.99 * radius, [None], 10, generator)


# In this order; how many calls an image must afford to begin, where topk > 1, topk - 1 more (`_goals`); whether it is
# a guard.  fab and boundary spend what there is: a step and a test, or a round.
_LADDER = (
    ("fab", functools.partial(fab.search, steps=20, targets=2, restarts=1), 3, False),
    ("pgd", _in_ball, 27, True),
    ("boundary", functools.partial(boundary.search, calls=45), 12, True),
    ("fab", _hop, 3, False),
    ("fab", fab.search, 3, False),
    ("pgd", pgd.search, 843, False),
    ("boundary", boundary.search, 12, False),
    ("logbarrier", logbarrier.search, 418, False),
    ("carlini_wagner", carlini_wagner.search, 1228, False),
)
