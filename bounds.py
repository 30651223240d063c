"""Section 2 of the paper: lower bounds on the distance from an image to the nearest misclassified one.

Let l be a loss that is negative exactly where the model is right, so that l0 = 0, and let g = grad l(x).  Then
every misclassified x + v satisfies (Prop. 2.2)

    ||v|| >= -l(x) / L                                      L-bound; L is the Lipschitz constant of l
    ||v|| >= eps   whenever   -l(x) - omega(eps) >= eps ||g||_*                              omega-bound
    omega(eps) = sup over x and ||v|| <= eps of  l(x + v) - l(x) - <v, g>                         # eq. (5)

The proposition is a theorem; L and omega are not known, and this is where a bound can be false.  Three ways to
estimate them, from the most faithful to the most useful:

    estimate_by_sampling     random v, block maxima, a GEV: the paper's.  A large share of the bounds can be false.
    estimate_by_ascent       gradient ascent towards the worst v: a supremum seen from below, but of the right size.
    estimate_by_calibration  the smallest t eps^q whose bounds are false for a share alpha of images at most.

None certifies an image: on held-out images, hold every bound against distances that attacks found (`violations`).  The
only certificate here, `certify_smoothing`, is the smoothed classifier's.  Labels may be the model's own predictions.

Two losses.  "probabilities" is the paper's, in [-1, 1]; its gradient vanishes where the softmax saturates, and bounds
refuse it when more than 1 % of the gradients are exactly zero.  "logits" is the same difference before the softmax: as
valid, since only the sign counts, nearer to linear, and no bound changes when logits are multiplied by a constant.
"""

import copy
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy import optimize, special, stats
from torch import Tensor

import gradreg
from gradreg import LossFn, Model, Norm, column, dual_norm, gradient, input_gradient, margin, vector_norm

Loss = Literal["probabilities", "logits"]
NOTHING = "no image is classified correctly: there is nothing to bound"


def margin_loss(logits: Tensor, labels: Tensor, topk: int = 1, *, loss: Loss = "probabilities") -> Tensor:
    """The k-th largest of the other classes minus the label's (N,): negative iff the label is in the top k.

    loss="probabilities": of the softmax, Section 2's modified Carlini-Wagner loss; "logits": of the logits themselves.
    A tie gives 0 and counts as misclassified.  A class whose logit is -inf cannot win and changes nothing.
    ValueError, in one line, for what are not logits (N, classes > topk) of these labels.
    """
    if loss not in ("probabilities", "logits"):
        raise ValueError(f"loss must be probabilities or logits, not {loss!r}")
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not (isinstance(shape, tuple) and len(shape) == 2 and shape[0] == len(labels) and shape[1] > 1):
        wanted = f"({len(labels)} images, classes)"
        raise ValueError(f"the model must return logits {wanted}, not {shape}: wrap what returns something else")
    if not 1 <= topk < shape[1]:
        raise ValueError(f"topk (with rivals, topk + rivals - 1) must be in 1 .. {shape[1] - 1}, not {topk}")
    own = labels.clamp(0, shape[1] - 1)
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))  # differences of 16-bit logits, in 32 bits
    scores = scores.softmax(dim=1) if loss == "probabilities" else scores
    losses, in_range = margin(scores, own, topk), (own == labels).all()
    if not (in_range & (logits < torch.inf).all() & ~losses.isnan().any()):
        reason = "the logits are not finite (-inf, for a class that cannot win, may be)"
        raise ValueError(reason if in_range else f"labels must be in 0 .. {shape[1] - 1}, the model's classes")
    return losses


def _margin_of(model: Model, labels: Tensor, topk: int, loss: Loss) -> LossFn:
    return lambda x: margin_loss(model(x.clone()), labels, topk, loss=loss)  # it may work in place


class Margins(NamedTuple):
    """What a bound needs to know of N images: losses (N, J), dual gradient norms (N, J); see `margins`."""

    losses: Tensor
    grad_norms: Tensor
    norm: Norm
    topk: int
    loss: Loss
    ahead: bool = False


def margins(
    model: Model, images: Tensor, labels: Tensor, *, norm: Norm, topk: int = 1, loss: Loss = "logits",
    rivals: int = 1, ahead: bool = False, batch_size: int = 512,
) -> Margins:  # fmt: skip
    """Losses and gradient norms of each image: one forward pass, and as many backward passes as rivals.

    Column j belongs to the class that is (topk + j)-th largest of the others.  One rival is Section 2.  With more, a
    bound is the smallest over them: calibrated, it is much tighter, since the runner-up at x is often not the class
    nearest to x.  With ahead, for a pass more each way, a last column has what the tangent of l says of x at the point
    where the linearised margin of the nearest rival is 0 (l1: on the way to it).  ValueError for what has no bound.
    """
    gradreg.check_data(model, images, labels)
    parts = []
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = model(x.clone())
            losses = [margin_loss(logits, y, topk + j, loss=loss) for j in range(rivals)]
            grads = [gradient(values, x, retain_graph=True) for values in losses]
        if torch.stack(grads).isnan().any():
            raise ValueError("the gradient of the margin is not a number on some images")
        found = [(torch.stack(losses, 1).detach(), torch.stack([dual_norm(grad, norm) for grad in grads], 1))]
        if ahead:
            loss_fn = _margin_of(model, y, topk, loss)
            found.append(_tangent_ahead(loss_fn, x.detach(), *found[0], torch.stack(grads), norm))
        parts.append([torch.cat(columns, 1) for columns in zip(*found, strict=True)])
    losses, grad_norms = (torch.cat(rows) for rows in zip(*parts, strict=True))
    return Margins(losses, grad_norms, norm, topk, loss, ahead)


def _tangent_ahead(loss_fn: LossFn, x, losses, norms, grads, norm: Norm) -> tuple[Tensor, Tensor]:
    """What l is at x (N, 1), by its tangent at the nearest point of a linearised boundary, and the norm of that."""
    reach, first = (-losses / norms).nan_to_num(0).clamp(0, math.sqrt(x[0].numel())).min(1, keepdim=True)
    grad = grads[first[:, 0], torch.arange(len(x), device=x.device)]
    point = (x + column(reach, x) * gradreg.steepest(grad, norm)).clamp(0, 1)
    there, slope = input_gradient(loss_fn, point)
    here = (there - (slope * (point - x)).flatten(1).sum(1))[:, None]
    again, slope = here >= 0, dual_norm(slope, norm)[:, None]  # misclassified, it says: then it tells no distance
    return losses.gather(1, first).where(again, here), norms.gather(1, first).where(again, slope)


class Estimate(NamedTuple):
    """L (loss per unit of x), and omega (K,) at the increasing radii eps (K,), for margins such as it was made for."""

    norm: Norm
    topk: int
    loss: Loss
    lipschitz: float
    eps: Tensor
    omega: Tensor
    rivals: int = 1  # at least so many
    ahead: bool = False


def lipschitz_bound(margins: Margins, estimate: Estimate) -> Tensor:
    """The L-bound of Prop. 2.2 (N,), in units of the images: as true as estimate.lipschitz; 0 if misclassified.

    Raises ValueError for masked gradients, and for an estimate that was made for other margins.
    """
    _check_match(margins, estimate)
    return ((-margins.losses).clamp_min(0) / estimate.lipschitz).amin(1)


def omega_bound(margins: Margins, estimate: Estimate) -> Tensor:
    """The omega-bound of Prop. 2.2 (N,), in units of the images: as true as estimate.omega; 0 if misclassified.

    Never more than estimate.eps[-1], the largest radius looked at.  Raises as `lipschitz_bound`.
    """
    _check_match(margins, estimate)
    return invert_omega(-margins.losses, margins.grad_norms, estimate.eps, estimate.omega).amin(1)


def invert_omega(gaps: Tensor, grad_norms: Tensor, eps: Tensor, omega: Tensor) -> Tensor:
    """The largest r with  r ||g||_* + omega(r) <= gap,  like gaps: 0 if there is none, at most eps[-1].

    gaps = l0 - l(x) and grad_norms, of one shape; eps (K,) increasing, or ValueError; omega (K,), which is made
    non-decreasing, since balls are nested.  Between two radii it is taken at the larger one: so true values of omega
    give true bounds; with linear interpolation they would not.
    """
    if not (eps.diff() > 0).all():
        raise ValueError("the radii must increase")
    reach = torch.minimum((gaps[..., None] - omega.cummax(0).values) / grad_norms[..., None], eps)
    return torch.where(reach > 0, reach, 0).amax(-1)  # one that ends before its radius begins is not the largest


def _check_match(margins: Margins, estimate: Estimate) -> None:
    if (zero := float((margins.grad_norms[:, 0] == 0).double().mean())) > 0.01:
        share = f"{zero:.1%} of the gradients of the {margins.loss} margin"
        raise ValueError(f"{share} are exactly zero: no bound follows from them")
    ours, theirs = ((m.norm, m.topk, m.loss) for m in (margins, estimate))
    if ours != theirs:
        raise ValueError(f"the margins have the norm, topk and loss {ours}, the estimate has {theirs}")
    if margins.losses.shape[1] < estimate.rivals:
        raise ValueError(f"the estimate holds for margins with {estimate.rivals} rivals or more")
    if estimate.ahead and not margins.ahead:
        raise ValueError("the estimate holds for margins with the tangent ahead")


class Violations(NamedTuple):
    """How far bounds can be trusted: see `violations`."""

    count: int  # bounds that exceed a distance
    images: int
    rate: float  # count / images
    low: float  # 95 % interval of the rate (Clopper-Pearson)
    high: float
    worst: float  # the largest bound / distance among correctly classified images
    tightness: float  # mean bound / mean distance


def violations(bounds: Tensor, distances: Tensor) -> Violations:
    """Count the bounds (N,) that are false because an adversarial image is nearer: bound > distance (N,).

    distances: of real adversarial images, 0 if misclassified, infinite where none is known (not counted as violated,
    and left out of worst and tightness).  An excess of less than 1e-6, float32's rounding, does not count.  The rate is
    a lower estimate, as good as the attacks; its interval is over images: another draw of the estimate has another.
    """
    bounds, distances = bounds.double(), distances.to(bounds.device).double()
    _check_distances(distances, len(bounds))
    count, n = int((bounds > distances * (1 + 1e-6)).sum()), len(bounds)
    known = distances.isfinite()
    ratios = (bounds / distances)[known & (distances > 0)]
    interval = stats.binomtest(count, n).proportion_ci(0.95, "exact")
    worst = float(ratios.max()) if len(ratios) else math.nan
    tightness = float(bounds[known].mean() / distances[known].mean())
    return Violations(count, n, count / n, float(interval.low), float(interval.high), worst, tightness)


def _check_distances(distances: Tensor, n: int) -> None:
    if not n or distances.shape != (n,) or not (distances >= 0).all():
        raise ValueError(f"distances must be {n} numbers of 0 or more, infinite where none is known: one an image")


def sample_maxima(
    model: Model, images: Tensor, labels: Tensor, *, norm: Norm, eps: Tensor, topk: int = 1,
    loss: Loss = "probabilities", blocks: int = 100, block_size: int = 64, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Maxima over blocks (blocks, 1 + K) of gradient norms, and of the bracket of (5) at the radii eps (K,).

    A block is block_size images, drawn with replacement, and a random v for each, uniform in the ball; x + v may leave
    [0, 1].  Cost: blocks * block_size * (K + 1) images forward, one in K + 1 backward.
    """
    if min(blocks, block_size) < 1:
        raise ValueError(f"blocks of one image or more are needed, not {blocks} of {block_size}")
    model, images, eps = _prepare(model, images, labels, eps, norm, topk)
    maxima, radii = [], eps.tolist()
    for _ in range(blocks):
        index = torch.randint(len(images), (block_size,), generator=generator, device=images.device)
        x, loss_fn = images[index], _margin_of(model, labels[index], topk, loss)
        start, grad = input_gradient(loss_fn, x)
        v = gradreg.uniform_ball(x, norm, generator)
        slope = (v * grad).flatten(1).sum(1)
        with torch.no_grad():
            brackets = [(loss_fn(x + r * v) - start - r * slope).max() for r in radii]  # eq. (5)
        maxima.append(torch.stack([dual_norm(grad, norm).max(), *brackets]))
    return torch.stack(maxima)


def estimate_by_sampling(
    maxima: Tensor, eps: Tensor, *, norm: Norm, topk: int = 1, loss: Loss = "probabilities", p: float = 1e-3
) -> Estimate:
    """The paper's estimate, a quantile of fitted batch maxima: NOT an upper bound, often far below the truth.

    L and omega are what the GEV of `sample_maxima` (blocks, 1 + K) at the radii eps (K,) exceeds with probability p, or
    the largest seen.  Only the law of v and a block's size are not the paper's.  ValueError for too few blocks.
    """
    if not 0 < p < 1:
        raise ValueError(f"0 < p < 1 is needed, not {p}")
    columns = maxima.double().T.cpu().numpy()
    lipschitz, *omega = (max(float(fit_gev(values).quantile(p)), float(values.max())) for values in columns)
    omega = torch.tensor(omega).to(maxima).clamp_min(0)  # v = 0 is in every ball
    return Estimate(norm, topk, loss, lipschitz, torch.as_tensor(eps).to(omega), omega)


def estimate_by_ascent(
    model: Model, images: Tensor, labels: Tensor, *, norm: Norm, eps: Tensor | None = None, topk: int = 1,
    loss: Loss = "logits", steps: int = 10, restarts: int = 1, batch_size: int = 512,
    generator: torch.Generator | None = None,
) -> Estimate:  # fmt: skip
    """The largest values that gradient ascent finds, among the images that are classified correctly.

    The proof of Prop. 2.2 uses (5) only through (6), and adversarial images lie in [0, 1], so it holds with
        omega'(eps) = sup over x, ||v|| <= eps, x + v in [0, 1] of  l(x + v) - l(x) - ||v|| ||g||_*  <= omega(eps)
        L' = sup over the same of  (l(x + v) - l(x)) / ||v||  <= L.
    Both are read off projected gradient ascent on l in the ball of each radius, from the best point of the radius
    before (at first +g), and from `restarts` random points.  Guaranteed: at each radius, the same ascent on a fresh
    image exceeds omega' with probability 1 / (m + 1) at most, m correct images.  Not: that ascent sees everything.
    Cost: K (1 + restarts) (steps + 1) + 1 forward passes per image, nearly as many backward.
    """
    model, images, eps = _prepare(model, images, labels, eps, norm, topk)
    found = []
    for rows in torch.arange(len(images), device=images.device).split(batch_size):
        loss_fn = _margin_of(model, labels[rows], topk, loss)
        found.append(_probe(loss_fn, images[rows], eps, norm, steps, restarts, generator))
    losses, _, slopes, brackets = (torch.cat(parts) for parts in zip(*found, strict=True))
    correct = losses < 0
    if not correct.any():
        raise ValueError(NOTHING)
    return Estimate(norm, topk, loss, float(slopes[correct].max()), eps, brackets[correct].amax(0).to(eps))


def estimate_by_calibration(
    margins: Margins, distances: Tensor, *, alpha: float = 0.005, exponent: float = 1.5, radii: int = 512
) -> Estimate:
    """The smallest L, and the smallest omega = t eps^exponent, whose bounds are false with probability <= alpha.

    distances (N,): of the adversarial images that attacks found for N held-out images, infinite where they found none.
    Guarantee (split conformal prediction, Vovk et al. 2005): a fresh image, exchangeable with these, gets a bound above
    the distance that the same attacks would find for it with probability at most alpha, on average over the draw of all
    the images.  It assumes nothing of the model; the exponent, fixed beforehand, decides only how tight the bounds are
    (1: kinks at every scale, 2: bounded curvature, Remark 2.1).  No omega-bound exceeds the largest distance seen.
    Raises ValueError for fewer than 1 / alpha - 1 images, or too few of them with a known distance.
    """
    gaps, grad_norms = -margins.losses.double(), margins.grad_norms.double()
    distances = distances.to(gaps)
    _check_distances(distances, len(gaps))
    if not (0 < alpha < 1 and exponent > 0):
        raise ValueError(f"0 < alpha < 1 and a positive exponent are needed, not {alpha} and {exponent}")
    rank = math.floor(alpha * (len(gaps) + 1) * (1 + 1e-12))  # a fresh score exceeds the rank-th with <= alpha
    if rank < 1:
        raise ValueError(f"alpha = {alpha} needs {math.ceil(1 / alpha) - 1} images or more, not {len(gaps)}")
    at_risk, d = (gaps > 0).all(1) & distances.isfinite(), distances[:, None]
    # The scores of an image: the smallest t, and the smallest L, at which its own bound is true.
    scores = ((gaps - d * grad_norms) / d**exponent).amin(1), (gaps / d).amin(1)
    ranked = (values.where(at_risk, -torch.inf).topk(rank).values[-1] for values in scores)
    t, lipschitz = (float(value) * (1 + 1e-6) for value in ranked)  # ties stay true
    if not lipschitz > 0:
        raise ValueError("too few distances are known: nothing to calibrate with")
    known = distances[at_risk & (distances > 0)]
    limits = math.log10(float(known.min()) / 100), math.log10(float(known.max()))
    eps = torch.logspace(*limits, radii, dtype=d.dtype, device=d.device)
    how = margins.norm, margins.topk, margins.loss, lipschitz, eps, max(t, 0.0) * eps**exponent
    return Estimate(*how, rivals=margins.losses.shape[1], ahead=margins.ahead)


def omega_statistics(
    model: Model, images: Tensor, labels: Tensor, *, norm: Norm, eps: Sequence[float], topk: int = 1,
    loss: Loss = "probabilities", steps: int = 3,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """omega' of `estimate_by_ascent` (K,) at increasing radii, and ||g||_* (N,), of all images, correct or not: cheap.

    One ascent from +g, carried on from radius to radius: K (steps + 1) + 1 forward passes of the whole batch.
    """
    model, images, radii = _prepare(model, images, labels, eps, norm, topk)
    _, grad_norms, _, brackets = _probe(_margin_of(model, labels, topk, loss), images, radii, norm, steps, 0, None)
    return brackets.amax(0), grad_norms


def default_radii(
    model: Model, images: Tensor, labels: Tensor, *, norm: Norm, topk: int = 1, count: int = 24
) -> Tensor:
    """Radii (count,), geometric, from 1/20 of to 4 times the median distance to where the linearised margin is 0."""
    m = margins(model, images, labels, norm=norm, topk=topk)
    median = (-m.losses / m.grad_norms)[m.losses < 0].median()  # NaN, of none
    if not median < torch.inf:
        masked = "half of the gradients of the margin or more are exactly zero: no radius follows"
        raise ValueError(NOTHING if median.isnan() else masked)
    return median * torch.logspace(math.log10(1 / 20), math.log10(4), count).to(images)


def _prepare(model: Model, images: Tensor, labels: Tensor, eps, norm: Norm, topk: int) -> tuple[Model, Tensor, Tensor]:
    """Model, images and radii (`default_radii` for None) of an estimate, checked, in the precision that it needs."""
    gradreg.check_data(model, images, labels)
    eps = default_radii(model, images, labels, norm=norm, topk=topk) if eps is None else torch.as_tensor(eps).to(images)
    if not (len(eps) and eps[0] > 0 and eps[-1] < math.inf and (eps.diff() > 0).all()):
        raise ValueError(f"the radii must be positive, finite and increase, not {eps.tolist()}")
    # The bracket of (5) cancels digits: at 1e-4 float32 is 40 times off.
    smallest = float(eps[0]) * (math.sqrt(images[0].numel()) if norm == "linf" else 1)
    if smallest >= 1e-2 or images.dtype == torch.float64:
        return model, images, eps
    try:  # not a function, nor a network that fixes its precision somewhere
        (exact := copy.deepcopy(model).double())(images[:1].double())
    except (AttributeError, RuntimeError, TypeError) as error:
        if "memory" in str(error):
            raise
        raise ValueError("radii below 1e-2 need float64, in which this model, or its copy, does not run") from None
    return exact, images.double(), eps


@torch.no_grad()  # but for `input_gradient`
def _probe(loss_fn, x, eps, norm, steps, restarts, generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ascend at every radius: l(x) (N,), ||g||_* (N,), the largest slopes (N,) and brackets (N, K) met."""
    start, grad = input_gradient(loss_fn, x)
    grad_norms = dual_norm(grad, norm)
    slopes, brackets = grad_norms.clone(), x.new_zeros(len(x), len(eps))  # v = 0: neither can be less
    best = gradreg.steepest(grad, norm)
    for radius in eps.tolist():
        highest = torch.full_like(start, -torch.inf)
        onward = best * (radius / column(vector_norm(best, norm).clamp_min(1e-30), x))
        random = [radius * gradreg.uniform_ball(x, norm, generator) for _ in range(restarts)]
        for first in (onward, *random):
            for v, losses in _ascend(loss_fn, x, first, radius, norm, steps):
                r, rise = vector_norm(v, norm), losses - start
                slopes = torch.maximum(slopes, torch.where(r > 1e-3 * eps[0], rise / r, 0))  # rounding over r
                bracket = (rise - r * grad_norms)[:, None].where(r[:, None] <= eps, 0)  # every larger ball holds v
                brackets = torch.maximum(brackets, bracket)
                best = torch.where(column(losses > highest, x), v, best)
                highest = torch.maximum(losses, highest)
    return start, grad_norms, slopes, brackets


def _ascend(loss_fn: LossFn, x: Tensor, v: Tensor, radius: float, norm: Norm, steps: int):
    """Projected gradient ascent on l with linearly shrinking steps: yields v and l(x + v), steps + 1 times."""
    radius *= 1 - 1e-6  # so that the rounding of x + v - x does not push v out of its ball
    v = gradreg.project(x + v, x, radius, norm) - x
    for step in range(steps):
        losses, grad = input_gradient(loss_fn, x + v)
        yield v, losses
        v = v + radius * (1 - step / steps) * gradreg.steepest(grad, norm)
        v = gradreg.project(x + v, x, radius, norm) - x
    yield v, loss_fn(x + v)


class GEV(NamedTuple):
    """Generalized extreme value distribution: P(M <= z) = exp(-(1 + xi (z - loc) / scale)^(-1 / xi)).

    xi has the textbooks' sign (scipy's c is -xi): positive for heavy tails, negative for a finite endpoint.
    """

    xi: float
    loc: float
    scale: float

    def quantile(self, p):
        """The value that a maximum exceeds with probability p (float or array): the return level of 1/p blocks."""
        y = -np.log1p(-np.asarray(p, dtype=float))
        return self.loc + self.scale * special.boxcox(1 / y, self.xi)  # (y^-xi - 1) / xi


def fit_gev(maxima) -> GEV:
    """Maximum likelihood with |xi| <= 1, on the standardised sample; a point where all maxima are equal.

    (scipy's genextreme.fit fails silently on small numbers.)  ValueError for fewer than 5 maxima or a non-finite one.
    """
    maxima = np.sort(np.asarray(maxima, dtype=float))
    if maxima.ndim != 1 or len(maxima) < 5 or not np.isfinite(maxima).all():
        raise ValueError("a GEV fit needs 5 finite maxima or more, in one dimension")
    n, centre, spread = len(maxima), maxima.mean(), maxima.std()
    if spread <= 1e-12 * np.abs(maxima).max():
        return GEV(0.0, float(maxima[-1]), 0.0)
    sample = (maxima - centre) / spread
    # Begin with the Gumbel distribution of the same L-moments (Hosking 1990), under which every sample is possible.
    scale = (2 * (np.arange(n) * sample).sum() / (n * (n - 1)) - sample.mean()) / math.log(2)
    x = np.array([0.0, sample.mean() - np.euler_gamma * scale, math.log(scale)])
    options = {"xatol": 1e-9, "fatol": 1e-9, "maxiter": 4000, "maxfev": 4000}
    for _ in range(2):  # the first simplex sometimes collapses early
        options["initial_simplex"] = np.vstack([x, x + 0.1 * np.eye(3)])
        x = optimize.minimize(_negative_log_likelihood, x, sample, method="Nelder-Mead", options=options).x
    return GEV(float(x[0]), float(centre + spread * x[1]), float(spread * math.exp(x[2])))


@np.errstate(all="ignore")
def _negative_log_likelihood(x, sample: np.ndarray) -> float:
    """Of x = (xi, loc, log scale); 1e300 for |xi| > 1, where no maximum need exist, and off the sample's support."""
    xi, loc, log_scale = x
    if abs(xi) > 1 or abs(log_scale) > 50:
        return 1e300
    t = special.inv_boxcox((sample - loc) / math.exp(log_scale), xi)  # (1 + xi z)^(1 / xi); off the support NaN
    return np.nan_to_num(len(sample) * log_scale + ((1 + xi) * np.log(t) + 1 / t).sum(), nan=1e300, posinf=1e300)


class Certificates(NamedTuple):
    """classes (N,) that the smoothed classifier predicts, -1 where it abstains; radii (N,) in l2, 0 there; cap."""

    classes: Tensor
    radii: Tensor
    cap: float


def certify_smoothing(
    model: Model, images: Tensor, *, sigma: float, n0: int = 100, n: int = 10_000, alpha: float = 1e-3,
    batch_size: int = 1000, generator: torch.Generator | None = None,
) -> Certificates:  # fmt: skip
    """The smoothed classifier is constant in each l2 ball returned, with probability 1 - alpha for each image.

    That classifier is argmax_c P(model(x + sigma N(0, 1)) = c), and the certificate is about it alone (CERTIFY of
    Cohen et al. 2019).  n0 samples choose the class, n fresh ones give a one-sided Clopper-Pearson lower bound pA of
    its probability; the radius is sigma Phi^-1(pA), at most cap = sigma Phi^-1(alpha^(1/n)), and where pA <= 1/2 it
    abstains.  x + noise may leave [0, 1], as in training with noise.  Cost: n0 + n forward passes per image.
    """
    gradreg.check_data(model, images, torch.zeros(len(images) if isinstance(images, Tensor) else 0, dtype=torch.int64))
    if not (0 < sigma < math.inf and 0 < alpha < 1 and min(n0, n, batch_size) >= 1):
        given = f"{sigma}, {alpha}, {n0}, {n}, {batch_size}"
        raise ValueError(f"sigma > 0, 0 < alpha < 1 and n0, n, batch_size of 1 or more are needed, not {given}")
    counts = [_count_classes(model, image, size, sigma, batch_size, generator) for image in images for size in (n0, n)]
    few, many = torch.stack(counts[::2]).cpu(), torch.stack(counts[1::2]).cpu()
    classes = few.argmax(1)
    hits = many.gather(1, classes[:, None])[:, 0]
    lower = np.where(hits > 0, stats.beta.ppf(alpha, hits, n - hits + 1), 0.0)
    radii = sigma * torch.special.ndtri(torch.from_numpy(lower))
    cap = sigma * float(special.ndtri(alpha ** (1 / n)))
    return Certificates(classes.where(radii > 0, -1), radii.clamp_min(0), cap)


@torch.no_grad()
def _count_classes(model, image: Tensor, n: int, sigma: float, batch_size: int, generator) -> Tensor:
    """How often each class is predicted for n noisy copies of an image (classes,)."""
    counts = 0
    for done in range(0, n, batch_size):
        shape = (min(batch_size, n - done), *image.shape)
        logits = model(image + sigma * torch.randn(shape, generator=generator, device=image.device, dtype=image.dtype))
        margin_loss(logits, torch.zeros(shape[:1], dtype=torch.long, device=image.device))  # refuses what are none
        counts = counts + torch.bincount(logits.argmax(1), minlength=logits.shape[1])
    return counts
