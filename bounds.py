"""Section 2 of the paper: lower bounds on the distance from an image to the nearest misclassified one.

Let l be a loss that is negative exactly where the model is right, so that l0 = 0, and let g = grad l(x).  Then
every misclassified x + v satisfies (Prop. 2.2)

    ||v|| >= -l(x) / L                                      L-bound; L is the Lipschitz constant of l
    ||v|| >= eps   whenever   -l(x) - omega(eps) >= eps ||g||_*                              omega-bound
    omega(eps) = sup over x and ||v|| <= eps of  l(x + v) - l(x) - <v, g>                         # eq. (5)

The proposition is a theorem; L and omega are not known, and this is where a bound can be false.  Three ways to
estimate them, each of which returns an `Estimate`, from the most faithful to the most useful:

    estimate_by_sampling     random v, maxima over batches, a GEV distribution: the paper's.  In high dimension
                             random v find next to nothing; a large share of the omega-bounds can be false.
    estimate_by_ascent       gradient ascent towards the worst v.  Still a supremum seen from below, but of the
                             right size.  Needs no attack.
    estimate_by_calibration  the smallest modulus t eps^q whose bounds are false for a share alpha of images at
                             most, by conformal prediction from adversarial distances of held-out images.

None of them certifies an image.  The only certificate here is randomized smoothing (`certify_smoothing`), and
it speaks of the smoothed classifier, not of the model.  So hold every bound against distances that attacks
found (`violations`), and print the two together.

Two losses.  "probabilities" is the paper's, in [-1, 1].  Its gradient vanishes where the softmax saturates, and
bounds refuse it when more than 1 % of the gradients are exactly zero (masked gradients).  "logits" is the same
difference before the softmax: as valid, since Prop. 2.2 asks only for the sign, much closer to linear, and its
bounds do not change when the logits are multiplied by a constant.

Estimate on held-out images: on training images the loss is saturated, and everything looks smaller.  Labels may
be the model's own predictions; the bounds are then on the distance to another prediction.

Left out: moduli of single images (each costs an attack), a modulus for each bin of gradient norms (no guarantee).
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from torch import Tensor

import gradreg
from gradreg import LossFn, Norm, column, dual_norm, gradient, input_gradient, vector_norm

Model = Callable[[Tensor], Tensor]  # images (N, ...) in [0, 1] -> logits (N, classes)
Loss = Literal["probabilities", "logits"]


# --- losses and margins ------------------------------------------------------------------------------------


def margin_loss(logits: Tensor, labels: Tensor, topk: int = 1, *, loss: Loss = "probabilities") -> Tensor:
    """The k-th largest of the other classes minus the label's (N,): negative iff the label is in the top k.

    loss="probabilities": of the softmax, in [-1, 1], Section 2's modified Carlini-Wagner loss; "logits": of the
    logits themselves.  A tie gives 0 and counts as misclassified.  A class whose logit is -inf or very low cannot win
    and changes nothing.  ValueError, in one line, for what are not logits (N, classes > topk) of these labels.
    """
    return _sound(_margin(logits, labels, topk, loss), labels, lambda x: x, logits)


def _margin(logits: Tensor, labels: Tensor, topk: int, loss: Loss) -> Tensor:
    """`margin_loss`, but NaN for what it refuses of numbers: a loop need not wait for its device at every step."""
    if loss not in ("probabilities", "logits"):
        raise ValueError(f"loss must be probabilities or logits, not {loss!r}")
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not (isinstance(shape, tuple) and len(shape) == 2 and shape[0] == len(labels) and 1 <= topk < shape[1]):
        wanted = f"({len(labels)} images, more than {topk} classes)"
        raise ValueError(f"the model must return logits {wanted}, not {shape}: wrap what returns something else")
    sound = (logits < torch.inf).all(1) & (labels >= 0) & (labels < shape[1])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # differences of 16-bit logits, in 32 bits
    scores, own = logits.softmax(dim=1) if loss == "probabilities" else logits, labels.clamp(0, shape[1] - 1)[:, None]
    others = scores.scatter(1, own, -torch.inf)
    return (others.topk(topk, dim=1).values[:, -1] - scores.gather(1, own)[:, 0]).where(sound, torch.nan)


def _sound(values: Tensor, labels: Tensor, model: Model, images: Tensor) -> Tensor:
    """values that follow from `_margin`.  ValueError where one is NaN."""
    if values.isnan().any():
        classes = model(images[:1]).shape[1]
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"labels must be in 0 .. {classes - 1}, the model's classes")
        raise ValueError("the logits are not finite (-inf, for a class that cannot win, may be)")
    return values


def _margin_of(model: Model, labels: Tensor, topk: int, loss: Loss) -> LossFn:
    return lambda x: _margin(model(x), labels, topk, loss)


class MaskedGradientsError(ValueError):
    """More than 1 % of the margin's gradients are exactly zero: no bound follows from them."""


@dataclass(frozen=True)
class Margins:
    """What a bound needs to know of N images: losses (N, J), dual gradient norms (N, J); see `margins`."""

    losses: Tensor
    grad_norms: Tensor
    norm: Norm
    topk: int
    loss: Loss
    ahead: bool = False

    @property
    def zero_gradients(self) -> float:
        """Share of the images whose gradient is exactly zero."""
        return float((self.grad_norms[:, 0] == 0).double().mean())

    def __getitem__(self, index) -> "Margins":
        """The margins of some of the images."""
        return replace(self, losses=self.losses[index], grad_norms=self.grad_norms[index])


def margins(
    model: Model, images: Tensor, labels: Tensor, *, norm: Norm, topk: int = 1, loss: Loss = "logits",
    rivals: int = 1, ahead: bool = False, batch_size: int = 512,
) -> Margins:  # fmt: skip
    """Losses and gradient norms of each image: one forward pass, and as many backward passes as rivals.

    Column j belongs to the class that is (topk + j)-th largest of the others.  One rival is Section 2.  With
    more, a bound is the smallest over the rivals: calibrated, it is much tighter, because the runner-up at x is
    often not the class that is nearest to x.  With ahead, for a pass more each way, a last column has what the tangent
    of l at another point says of x: where the linearised margin of the nearest rival is 0.  Where a boundary bends, or
    is another rival's, that is nearer to the truth.  Raises ValueError, in one line, for a model in training mode,
    images outside [0, 1], and whatever else bounds cannot speak about.
    """
    _check(model, images, labels)
    losses, norms = [], []
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = model(x)
            columns = [_margin(logits, y, topk + j, loss) for j in range(rivals)]
            grads = [gradient(column, x, retain_graph=True) for column in columns]
        known = torch.stack(columns, 1).detach(), torch.stack([dual_norm(grad, norm) for grad in grads], 1)
        if ahead:
            more = _tangent_ahead(_margin_of(model, y, topk, loss), x.detach(), *known, torch.stack(grads), norm)
            known = [torch.cat(both, 1) for both in zip(known, more, strict=True)]
        losses.append(known[0])
        norms.append(known[1])
    losses = _sound(torch.cat(losses), labels, model, images)
    return Margins(losses, torch.cat(norms), norm, topk, loss, ahead)


def _tangent_ahead(loss_fn: LossFn, x, losses, norms, grads, norm: Norm) -> tuple[Tensor, Tensor]:
    """What l is at x, by its tangent at the nearest point of a linearised boundary, and the norm of that (N, 1) each.

    Where it says that x is misclassified, it says nothing of the distance, and is the nearest rival's column again.
    """
    reach, first = (-losses / norms).nan_to_num(0).clamp(0, math.sqrt(x[0].numel())).min(1, keepdim=True)
    grad = grads[first[:, 0], torch.arange(len(x), device=x.device)]
    point = (x + column(reach, x) * gradreg.steepest(grad, norm)).clamp(0, 1)
    there, slope = input_gradient(loss_fn, point)
    here = (there - (slope * (point - x)).flatten(1).sum(1))[:, None]
    again, slope = here >= 0, dual_norm(slope, norm)[:, None]
    return losses.gather(1, first).where(again, here), norms.gather(1, first).where(again, slope)


# --- Proposition 2.2 ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """L (loss per unit of x), and omega (K,) at the increasing radii eps (K,), for one norm, topk and loss.

    gevs: the fitted distributions, L's and then one for each radius (sampling only).  rivals: how many the bounds must
    be taken over, at least; ahead: and whether over the tangent ahead.
    """

    method: str
    norm: Norm
    topk: int
    loss: Loss
    lipschitz: float
    eps: Tensor
    omega: Tensor
    gevs: "tuple[GEV, ...]" = ()
    rivals: int = 1
    ahead: bool = False


def lipschitz_bound(margins: Margins, estimate: Estimate) -> Tensor:
    """The L-bound of Prop. 2.2 (N,), in units of the images: as true as estimate.lipschitz; 0 if misclassified.

    Raises MaskedGradientsError, and ValueError for an estimate of another norm, topk or loss, or of more rivals.
    """
    _check_match(margins, estimate)
    return ((-margins.losses).clamp_min(0) / estimate.lipschitz).amin(1)


def omega_bound(margins: Margins, estimate: Estimate) -> Tensor:
    """The omega-bound of Prop. 2.2 (N,), in units of the images: as true as estimate.omega; 0 if misclassified.

    Never more than estimate.eps[-1]; a bound that equals it is capped by the largest radius looked at.
    Raises MaskedGradientsError, and ValueError for an estimate of another norm, topk or loss, or of more rivals.
    """
    _check_match(margins, estimate)
    return invert_omega(-margins.losses, margins.grad_norms, estimate.eps, estimate.omega).amin(1)


def invert_omega(gaps: Tensor, grad_norms: Tensor, eps: Tensor, omega: Tensor) -> Tensor:
    """The largest r with  r ||g||_* + omega(r) <= gap,  like gaps: 0 if there is none, at most eps[-1].

    gaps = l0 - l(x) and grad_norms, of one shape; eps (K,) increasing, omega (K,).  Between two radii omega is
    taken at the larger one, and made non-decreasing, since the balls are nested: so true values of omega give
    true bounds.  With linear interpolation they would not.  Raises ValueError if eps does not increase.
    """
    if not (eps.diff() > 0).all():
        raise ValueError("the radii must increase")
    omega = omega.cummax(0).values
    below = torch.cat([eps.new_zeros(1), eps[:-1]])
    reach = torch.minimum((gaps[..., None] - omega) / grad_norms[..., None], eps)
    return torch.where(reach > below, reach, 0).amax(-1)


class Violations(NamedTuple):
    """How far bounds can be trusted: see `violations`."""

    count: int  # bounds that exceed a distance
    images: int
    rate: float  # count / images
    low: float  # 95 % interval of the rate (Clopper-Pearson)
    high: float
    worst: float  # the largest bound / distance among correctly classified images
    tightness: float  # mean bound / mean distance

    def __str__(self) -> str:
        interval = f"95 % interval {100 * self.low:.2f} to {100 * self.high:.2f}"
        counts = f"{100 * self.rate:.2f} % of bounds false ({self.count} of {self.images}, {interval})"
        return f"{counts}, worst {self.worst:.2f} x distance, tightness {self.tightness:.2f}"


def violations(bounds: Tensor, distances: Tensor) -> Violations:
    """Count the bounds (N,) that are false because an adversarial image is nearer: bound > distance (N,).

    distances: of real adversarial images, 0 if misclassified, infinite where none is known (not counted as
    violated, and left out of worst and tightness).  A bound that exceeds its distance by less than 1e-6 of it does not
    count: both are made of float32 logits, and where a bound is sharp their rounding decides.  The rate is a lower
    estimate, as good as the attacks, and its interval is that of these bounds on other images: another draw of the
    estimate has another rate.
    """
    bounds, distances = bounds.double(), distances.to(bounds.device).double()
    _check_distances(distances, len(bounds))
    count, n = int((bounds > distances * (1 + 1e-6)).sum()), len(bounds)
    known = distances.isfinite()
    ratios = (bounds / distances)[known & (distances > 0)]
    interval = scipy.stats.binomtest(count, n).proportion_ci(0.95, "exact")
    worst = float(ratios.max()) if len(ratios) else math.nan
    tightness = float(bounds[known].mean() / distances[known].mean())
    return Violations(count, n, count / n, float(interval.low), float(interval.high), worst, tightness)


def _check_match(margins: Margins, estimate: Estimate) -> None:
    if margins.zero_gradients > 0.01:
        share = f"{margins.zero_gradients:.1%} of the gradients of the {margins.loss} margin"
        raise MaskedGradientsError(f"{share} are exactly zero: no bound follows from them")
    ours, theirs = ((m.norm, m.topk, m.loss) for m in (margins, estimate))
    if ours != theirs:
        raise ValueError(f"the margins have the norm, topk and loss {ours}, the estimate has {theirs}")
    if margins.losses.shape[1] < estimate.rivals:
        raise ValueError(f"the estimate holds for margins with {estimate.rivals} rivals or more")
    if estimate.ahead and not margins.ahead:
        raise ValueError("the estimate holds for margins with the tangent ahead")


# --- estimates of L and omega ------------------------------------------------------------------------------


def estimate_by_sampling(
    model: Model, images: Tensor, labels: Tensor, *, norm: Norm, eps: Tensor | None = None, topk: int = 1,
    loss: Loss = "probabilities", blocks: int = 100, block_size: int = 64, p: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Estimate:  # fmt: skip
    """The paper's estimate, a quantile of fitted batch maxima: NOT an upper bound, often far below the truth.

    That is `fit_maxima` of `sample_maxima`.  The GEV, its likelihood and p are the paper's words; one v an image and
    block, its law, 100 blocks of 64, and that x + v may leave [0, 1], are our reading of one sentence.  Another draw
    gives another omega, and another share of false bounds: look at several.  `gevs[i].status` says whether a fit is to
    be trusted.  Cost: as `sample_maxima`, and `default_radii` without eps.
    """
    eps = default_radii(model, images, labels, norm=norm, topk=topk) if eps is None else eps
    how = {"norm": norm, "topk": topk, "loss": loss}
    draw = {"eps": eps, "blocks": blocks, "block_size": block_size, "generator": generator}
    return fit_maxima(sample_maxima(model, images, labels, **how, **draw), eps, **how, p=p)


def sample_maxima(
    model: Model, images: Tensor, labels: Tensor, *, norm: Norm, eps: Tensor, topk: int = 1,
    loss: Loss = "probabilities", blocks: int = 100, block_size: int = 64, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Maxima over blocks (blocks, 1 + K) of gradient norms, and of the bracket of (5) at the radii eps (K,).

    A block is block_size images, drawn with replacement, and a random v for each, uniform in the ball.
    Cost: blocks * block_size * (K + 1) images forward, one in K + 1 backward.
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
    return _sound(torch.stack(maxima), labels, model, images)


def fit_maxima(
    maxima: Tensor, eps: Tensor, *, norm: Norm, topk: int = 1, loss: Loss = "probabilities", p: float = 1e-3
) -> Estimate:
    """L and omega, which the GEV fitted to block maxima (blocks, 1 + K) exceeds with probability p.

    Never less than the largest value seen.  Raises ValueError for fewer than 5 blocks.
    """
    if not 0 < p < 1:
        raise ValueError(f"0 < p < 1 is needed, not {p}")
    gevs = tuple(fit_gev(column) for column in maxima.double().T.cpu().numpy())
    lipschitz, *omega = (gev.level(p) for gev in gevs)
    omega = torch.tensor(omega).to(maxima).clamp_min(0)  # v = 0 is in every ball
    return Estimate("sampling", norm, topk, loss, lipschitz, torch.as_tensor(eps).to(omega), omega, gevs)


def estimate_by_ascent(
    model: Model, images: Tensor, labels: Tensor, *, norm: Norm, eps: Tensor | None = None, topk: int = 1,
    loss: Loss = "logits", steps: int = 10, restarts: int = 1, known: Sequence[Tensor] = (), batch_size: int = 512,
    generator: torch.Generator | None = None,
) -> Estimate:  # fmt: skip
    """The largest values that gradient ascent finds, among the images that are classified correctly.

    The proof of Prop. 2.2 uses (5) only through (6), and adversarial images lie in [0, 1], so it holds with
        omega'(eps) = sup over x, ||v|| <= eps, x + v in [0, 1] of  l(x + v) - l(x) - ||v|| ||g||_*  <= omega(eps)
        L' = sup over the same of  (l(x + v) - l(x)) / ||v||  <= L.
    Both are read off projected gradient ascent on l in the ball of each radius, from the best point of the radius
    before (at first +g), from `restarts` random points, and from `known`: tensors of adversarial images, each
    like images, with the image itself where there is none.  What is guaranteed: at each radius, a fresh image
    exceeds omega' with probability 1 / (m + 1) at most, m the number of correct images, as far as the same ascent
    can see.  What is not: that ascent sees everything.
    Cost: K (1 + restarts + known) (steps + 1) + 1 forward passes per image (and 1 in `default_radii` without
    eps), nearly as many backward.
    """
    if any(points.shape != images.shape for points in known):
        raise ValueError(f"known points must be like the images, {tuple(images.shape)}")
    model, images, eps = _prepare(model, images, labels, eps, norm, topk)
    found = []
    for rows in torch.arange(len(images), device=images.device).split(batch_size):
        points = [adversarial[rows].to(images) - images[rows] for adversarial in known]
        loss_fn = _margin_of(model, labels[rows], topk, loss)
        found.append(_probe(loss_fn, images[rows], points, eps, norm, steps, restarts, generator))
    losses, _, slopes, brackets = (torch.cat(parts) for parts in zip(*found, strict=True))
    _sound(brackets + losses[:, None], labels, model, images)  # a step along NaN is none
    correct = _some(losses < 0)
    lipschitz, omega = float(slopes[correct].max()), brackets[correct].amax(0).to(eps)
    return Estimate("ascent", norm, topk, loss, lipschitz, eps, omega)


def estimate_by_calibration(
    margins: Margins, distances: Tensor, *, alpha: float = 0.005, exponent: float = 1.5, radii: int = 512
) -> Estimate:
    """The smallest L, and the smallest omega = t eps^exponent, whose bounds are false with probability <= alpha.

    distances (N,): of the adversarial images that attacks found for N held-out images, infinite where they found
    none.  Guarantee (split conformal prediction, Vovk et al. 2005): a fresh image, exchangeable with these, gets
    a bound above the distance that the same attacks would find for it with probability at most alpha.  This is
    an average over the draw of all the images: not a statement about each one, nor about each class.  It assumes
    nothing of the model; the exponent, fixed beforehand, decides only how tight the bounds are (1: kinks at every
    scale, 2: bounded curvature, Remark 2.1).

    The score of an image is the smallest t at which its own bound is true, and t the conformal quantile of the
    scores.  No omega-bound exceeds the largest distance seen.  Cost: no model call.
    Raises ValueError for fewer than 1 / alpha - 1 images, or too few of them with a known distance.
    """
    gaps, grad_norms = -margins.losses.double(), margins.grad_norms.double()
    distances = distances.to(gaps)
    _check_distances(distances, len(gaps))
    if not (0 < alpha < 1 and exponent > 0):
        raise ValueError(f"0 < alpha < 1 and a positive exponent are needed, not {alpha} and {exponent}")
    at_risk = (gaps > 0).all(1) & distances.isfinite()
    d = distances[:, None]
    scores = ((gaps - d * grad_norms) / d**exponent).amin(1).where(at_risk, -torch.inf)
    slopes = (gaps / d).amin(1).where(at_risk, -torch.inf)
    t, lipschitz = (_conformal_quantile(s, alpha) * (1 + 1e-6) for s in (scores, slopes))  # ties stay true
    if not lipschitz > 0:
        raise ValueError("too few distances are known: nothing to calibrate with")
    known = distances[at_risk & (distances > 0)]
    limits = math.log10(float(known.min()) / 100), math.log10(float(known.max()))
    eps = torch.logspace(*limits, radii, dtype=d.dtype, device=d.device)
    omega, rivals = max(t, 0.0) * eps**exponent, margins.losses.shape[1]
    settings = margins.norm, margins.topk, margins.loss
    return Estimate("calibration", *settings, lipschitz, eps, omega, rivals=rivals, ahead=margins.ahead)


class OmegaStatistics(NamedTuple):
    """What a training run logs: omega (K floats), the mean and the largest gradient norm of the margin."""

    omega: list[float]
    grad_norm_mean: float
    grad_norm_max: float


def omega_statistics(
    model: Model, images: Tensor, labels: Tensor, *, norm: Norm, eps: Sequence[float], topk: int = 1,
    loss: Loss = "probabilities", steps: int = 3,
) -> OmegaStatistics:  # fmt: skip
    """omega' of `estimate_by_ascent` at increasing radii, over all images, correct or not: a cheap indicator.

    One ascent from +g, carried on from radius to radius: K (steps + 1) + 1 forward passes of the whole batch.
    """
    model, images, radii = _prepare(model, images, labels, eps, norm, topk)
    loss_fn = _margin_of(model, labels, topk, loss)
    losses, grad_norms, _, brackets = _probe(loss_fn, images, [], radii, norm, steps, 0, None)
    _sound(brackets + losses[:, None], labels, model, images)
    return OmegaStatistics(brackets.amax(0).tolist(), float(grad_norms.mean()), float(grad_norms.max()))


def default_radii(
    model: Model, images: Tensor, labels: Tensor, *, norm: Norm, topk: int = 1, count: int = 24
) -> Tensor:
    """Radii (count,), geometric, from 1/20 of to 4 times the median distance to where the linearised margin is 0."""
    m = margins(model, images, labels, norm=norm, topk=topk)
    median = (-m.losses / m.grad_norms)[_some(m.losses < 0)].median()
    if median.isinf():
        raise MaskedGradientsError("half of the gradients of the margin or more are exactly zero: no radius follows")
    return median * torch.logspace(math.log10(1 / 20), math.log10(4), count).to(images)


def _some(correct: Tensor) -> Tensor:
    if not correct.any():
        raise ValueError("no image is classified correctly: there is nothing to bound")
    return correct


def _conformal_quantile(scores: Tensor, alpha: float) -> float:
    """The k-th largest of n, k = floor(alpha (n + 1)): a fresh score exceeds it with probability <= alpha."""
    k = math.floor(alpha * (len(scores) + 1) * (1 + 1e-12))
    if k < 1:
        raise ValueError(f"alpha = {alpha} needs {math.ceil(1 / alpha) - 1} images or more, not {len(scores)}")
    return float(scores.topk(k).values[-1])


def _prepare(model: Model, images: Tensor, labels: Tensor, eps, norm: Norm, topk: int) -> tuple[Model, Tensor, Tensor]:
    """Model, images and radii (`default_radii` for None) of an estimate, checked, in the precision that it needs.

    That is float64 where a radius is below 1e-2 in l2: the bracket of (5) cancels digits (float32: 40x off at 1e-4).
    """
    _check(model, images, labels)
    eps = default_radii(model, images, labels, norm=norm, topk=topk) if eps is None else torch.as_tensor(eps).to(images)
    if not (len(eps) and eps[0] > 0 and eps[-1] < math.inf and (eps.diff() > 0).all()):
        raise ValueError(f"the radii must be positive, finite and increase, not {eps.tolist()}")
    smallest = float(eps[0]) * (math.sqrt(images[0].numel()) if norm == "linf" else 1)
    if smallest >= 1e-2 or images.dtype == torch.float64:
        return model, images, eps
    if not isinstance(model, torch.nn.Module):
        raise ValueError("radii below 1e-2 need float64: pass a torch.nn.Module, or float64 images")
    return copy.deepcopy(model).double(), images.double(), eps


# --- what bounds refuse, in one line ------------------------------------------------------------------------


def _check(model: Model, images: Tensor, labels: Tensor | None = None) -> None:
    training = [name for name, part in getattr(model, "named_modules", tuple)() if part.training]
    if training:
        raise ValueError(f"the model is in training mode ({training[0] or 'all of it'}): call model.eval() first")
    known = isinstance(images, Tensor) and images.dtype in (torch.float32, torch.float64) and len(images)
    if not (known and ((images >= 0) & (images <= 1)).all()):
        raise ValueError("images must be a float32 or float64 tensor in [0, 1], at least one; normalise in the model")
    known = isinstance(labels, Tensor)
    if labels is not None and not (known and labels.shape == images.shape[:1] and labels.dtype == torch.int64):
        given = f"{labels.dtype} of shape {tuple(labels.shape)}" if known else f"a {type(labels).__name__}"
        raise ValueError(f"labels must be an int64 tensor, one for each of {len(images)} images, not {given}")


def _check_distances(distances: Tensor, n: int) -> None:
    if not n or distances.shape != (n,) or not (distances >= 0).all():
        raise ValueError(f"distances must be {n} numbers of 0 or more, infinite where none is known: one an image")


# --- gradient ascent on the margin -------------------------------------------------------------------------


@torch.no_grad()  # but for `input_gradient`
def _probe(loss_fn, x, points, eps, norm, steps, restarts, generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ascend at every radius: l(x) (N,), ||g||_* (N,), the largest slopes (N,) and brackets (N, K) met."""
    start, grad = input_gradient(loss_fn, x)
    grad_norms = dual_norm(grad, norm)
    slopes, brackets = grad_norms.clone(), x.new_zeros(len(x), len(eps))  # v = 0: neither can be less
    best = gradreg.steepest(grad, norm)
    for radius in eps.tolist():
        highest = torch.full_like(start, -torch.inf)
        onward = best * (radius / column(vector_norm(best, norm).clamp_min(1e-30), x))
        random = [radius * gradreg.uniform_ball(x, norm, generator) for _ in range(restarts)]
        for first in (onward, *random, *points):
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
    for step in range(steps + 1):
        v = gradreg.project(x + v, x, radius, norm) - x
        losses, grad = input_gradient(loss_fn, x + v) if step < steps else (loss_fn(x + v), None)
        yield v, losses
        if step < steps:
            v = v + radius * (1 - step / steps) * gradreg.steepest(grad, norm)


# --- extreme values ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GEV:
    """Generalized extreme value distribution: P(M <= z) = exp(-(1 + xi (z - loc) / scale)^(-1 / xi)).

    xi has the textbooks' sign (scipy's c is -xi): positive for heavy tails, negative for a finite endpoint.
    maxima: the sample, sorted.  status: "ok"; "constant", all equal, and the distribution is that point;
    "capped", more than a tenth of the sample is tied at the top, as if something cut it off; "limit", xi near -1,
    where the likelihood has no maximum.  Only "ok" supports extrapolation.
    """

    xi: float
    loc: float
    scale: float
    maxima: np.ndarray
    status: str

    def quantile(self, p):
        """The value that a maximum exceeds with probability p (float or array): the return level of 1/p blocks."""
        y = -np.log1p(-np.asarray(p, dtype=float))
        return self.loc + self.scale * scipy.special.boxcox(1 / y, self.xi)  # (y^-xi - 1) / xi

    def level(self, p: float) -> float:
        """`quantile(p)`, but never less than the largest value seen."""
        return max(float(self.quantile(p)), float(self.maxima[-1]))


def fit_gev(maxima) -> GEV:
    """Maximum likelihood with xi >= -1; equivariant: the fit of a + b maxima is a + b times the fit.

    The sample is standardised first (scipy.stats.genextreme.fit is not, and fails silently on small numbers);
    the search starts from L-moments.  Raises ValueError for fewer than 5 maxima or a non-finite one.
    """
    maxima = np.sort(np.asarray(maxima, dtype=float))
    if maxima.ndim != 1 or len(maxima) < 5 or not np.isfinite(maxima).all():
        raise ValueError("a GEV fit needs 5 finite maxima or more, in one dimension")
    centre, spread = maxima.mean(), maxima.std()
    if spread <= 1e-12 * np.abs(maxima).max():
        return GEV(0.0, float(maxima[-1]), 0.0, maxima, "constant")
    sample = (maxima - centre) / spread
    xi, loc, log_scale = _minimise(_negative_log_likelihood, _gumbel(sample), sample).x
    capped = (maxima == maxima[-1]).sum() > max(1, len(maxima) / 10)
    status = "capped" if capped else "limit" if xi < -0.99 else "ok"
    return GEV(float(xi), float(centre + spread * loc), float(spread * math.exp(log_scale)), maxima, status)


def _gumbel(sample: np.ndarray) -> np.ndarray:
    """(xi = 0, loc, log scale) of the Gumbel distribution with the L-moments of a sorted sample (Hosking 1990).

    Its support is the whole line, so every sample is possible under it: a start that is never infeasible.
    """
    n, mean = len(sample), sample.mean()
    scale = (2 * (np.arange(n) * sample).sum() / (n * (n - 1)) - mean) / math.log(2)
    return np.array([0.0, mean - np.euler_gamma * scale, math.log(scale)])


def _minimise(objective, start, sample: np.ndarray):
    """Nelder-Mead, and once more from where it stopped: the first simplex sometimes collapses early."""
    for _ in range(2):
        simplex = np.vstack([start, start + 0.1 * np.eye(len(start))])
        options = {"xatol": 1e-9, "fatol": 1e-9, "maxiter": 4000, "maxfev": 4000, "initial_simplex": simplex}
        result = scipy.optimize.minimize(objective, start, sample, method="Nelder-Mead", options=options)
        start = result.x
    return result


def _negative_log_likelihood(x, sample: np.ndarray) -> float:
    """Of x = (xi, loc, log scale); 1e300 for xi < -1 and where the sample leaves the support."""
    xi, loc, log_scale = x
    if xi < -1 or abs(log_scale) > 50:
        return 1e300
    z = (sample - loc) / math.exp(log_scale)
    if (1 + xi * z).min() <= 0:
        return 1e300
    y = z if abs(xi) < 1e-9 else np.log1p(xi * z) / xi
    return min(1e300, len(sample) * log_scale + (1 + xi) * y.sum() + np.exp(np.minimum(-y, 600)).sum())


# --- randomized smoothing ----------------------------------------------------------------------------------


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
    Cohen et al. 2019).  n0 samples choose the class, n fresh ones give a one-sided Clopper-Pearson lower bound pA
    of its probability; the radius is sigma Phi^-1(pA), and where pA <= 1/2 it abstains.  However robust the
    classifier, no radius exceeds cap = sigma Phi^-1(alpha^(1/n)).  x + noise may leave [0, 1], as in training
    with noise.  Cost: n0 + n forward passes per image.
    """
    _check(model, images)
    if not (0 < sigma < math.inf and 0 < alpha < 1 and min(n0, n, batch_size) >= 1):
        given = f"{sigma}, {alpha}, {n0}, {n}, {batch_size}"
        raise ValueError(f"sigma > 0, 0 < alpha < 1 and n0, n, batch_size of 1 or more are needed, not {given}")
    found = []
    for image in images:
        few, many = (_count_classes(model, image, count, sigma, batch_size, generator) for count in (n0, n))
        chosen = few.argmax(keepdim=True)
        found.append(torch.cat([chosen, many.gather(0, chosen), few[-1:] + many[-1:]]))
    classes, hits, unsound = torch.stack(found).cpu().T
    _sound(torch.where(unsound > 0, torch.nan, 0.0), classes * 0, model, images)
    lower = np.where(hits > 0, scipy.stats.beta.ppf(alpha, hits, n - hits + 1), 0.0)
    radii = sigma * torch.special.ndtri(torch.from_numpy(lower))
    cap = sigma * float(scipy.special.ndtri(alpha ** (1 / n)))
    return Certificates(classes.where(radii > 0, -1), radii.clamp_min(0), cap)


def _count_classes(model, image: Tensor, n: int, sigma: float, batch_size: int, generator) -> Tensor:
    """How often each class is predicted for n noisy copies of an image, and how often none can be (classes + 1,)."""
    counts = 0
    for done in range(0, n, batch_size):
        shape = (min(batch_size, n - done), *image.shape)
        noise = torch.randn(shape, generator=generator, device=image.device, dtype=image.dtype)
        with torch.no_grad():
            logits = model(image + sigma * noise)
        zeros = torch.zeros(len(noise), dtype=torch.long, device=image.device)
        sound = ~_margin(logits, zeros, 1, "logits").isnan()
        classes = logits.argmax(1).where(sound, logits.shape[1])
        counts = counts + zeros.new_zeros(logits.shape[1] + 1).index_add(0, classes, torch.ones_like(zeros))
    return counts
