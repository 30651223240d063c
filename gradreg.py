"""Section 3 of the paper: input gradient regularization.

The training objective is eq. (8), written as a mean over images,

    mean_i  l(x_i; w)  +  lam/2  mean_i  ||grad_x l(x_i; w)||_*^2                   # eq. (8)

where ||.||_* is dual to the norm that measures attacks: l2 <-> l2, linf <-> l1, l1 <-> linf.  (Algorithm 1 has lam for
lam/2.  In linf every penalty is ||g||_1^2 / n, n values per image, so that one lam means one thing; for finite
differences this is the paper's own scale, for its double backpropagation we assume it.)

One idea carries the whole module.  Let g = grad_x l(x; w), and let d be the unit direction of Prop. 3.2, in which the
loss rises fastest.  Then <g, d> *is* the dual norm of g (for linf attacks divided by sqrt(n), see `direction`), and
because d maximises <g, .>, the derivative of <g, d> with respect to the weights does not see d move (the envelope
theorem).  So d is detached without approximation, and what is left is a directional derivative, of any `LossFn`:

    fd_penalty     (l(x + h d) - l(x)) / h      finite difference: eq. (9) and Algorithm 1
    exact_penalty  <g, d>                       double backpropagation (Drucker & LeCun 1991): the slow twin
    ascent_penalty l(x + lam <g, d> d)          not this bound but eq. (7) itself, by one step: cheaper

Chance.  The penalty of a network in training mode is that of one draw of it (dropout, stochastic depth, noise): every
pass begins with torch's random state, of the CPU and of x's device, as the first one found it.  Not so a generator of
the network's own, Python's or numpy's: there the quotient is noise over h.  While a CUDA graph is captured it raises.

Batch normalization.  In training mode the images of a batch interact, and g_i is the gradient of the *sum* of the
batch's losses with respect to image i, as in the authors' code.  Every pass uses its own batch statistics and updates
the running ones: twice a step, or once for `exact`.

From `column` on it is the geometry that attacks, bounds and training share: balls of a norm, and the box [0, 1].  Left
out: the Mahalanobis penalty of Roth et al. (2018), and penalties of the logits' Jacobian.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Norm = Literal["l2", "linf", "l1"]  # of the ATTACK; its dual is taken in `dual_norm` and nowhere else
LossFn = Callable[[Tensor], Tensor]  # images (N, ...) -> one loss per image (N,)
Model = Callable[[Tensor], Tensor]  # images (N, ...) in [0, 1] -> logits (N, classes)


class Penalised(NamedTuple):
    """Losses (N,) and penalties (N,), both with their graph to the weights; input gradient (N, ...), detached."""

    losses: Tensor
    penalties: Tensor
    grad: Tensor

    def objective(self, lam: float) -> Tensor:
        """The scalar of eq. (8), mean(losses) + lam/2 * mean(penalties): means are taken here, once."""
        return self.losses.mean() + lam / 2 * self.penalties.mean()


def joined(part: Penalised, rest: Tensor) -> Penalised:
    """Eq. (8), penalised on a uniformly drawn part of the batch: m of n images, and the losses (n - m,) of the rest.

    penalties_i = n/m ||g_i||_*^2 for i in the part, else 0:   E[mean_i penalties_i] = mean_i ||g_i||_*^2

    A step of `fd` costs 3 + 4 m/n units, for 7.  Part and rest have their own batch statistics; grad is the part's.
    """
    n, m = len(part.losses) + len(rest), len(part.losses)
    penalties = torch.cat([part.penalties * (n / m), torch.zeros_like(rest)])
    return Penalised(torch.cat([part.losses, rest]), penalties, part.grad)


def penalty_weight(delta: float, curvature: float = 0.0) -> float:
    """Prop. 3.1: the lam of (8) from the delta of the quadratic cost ||v||^2 / (2 delta) in (2) and (7).

    max_v l(x + v) - ||v||^2 / (2 delta)  <=  l(x) + lam/2 ||g||_*^2   where omega(eps) <= curvature eps^2 / 2.
    In linf multiply it by n for the penalties below.  ValueError where the left side can be infinite.
    """
    if not (delta > 0 and delta * curvature < 1):
        raise ValueError(f"delta must be positive and below 1 / curvature, not {delta} with curvature {curvature}")
    return delta / (1 - delta * curvature)


def check_norm(norm: str) -> None:
    """Raise ValueError unless `norm` names an attack norm."""
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be one of {', '.join(get_args(Norm))} (the norm of the attack), not {norm!r}")


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image (N,), in nats, from logits (N, classes): differentiable in every mode."""
    shifted = logits - logits.detach().amax(dim=1, keepdim=True)
    return shifted.exp().sum(dim=1).log() - shifted.gather(1, labels[:, None])[:, 0]


def input_gradient(loss_fn: LossFn, x: Tensor, **graph: bool) -> tuple[Tensor, Tensor]:
    """Losses (N,) and grad (N, ...), both detached: row i of grad is the gradient of the loss of image i.

    One forward pass and one backward pass to the input alone, which touches no gradient of the weights.  With torch's
    retain_graph the losses keep their graph, with create_graph both.  ValueError unless there is one loss per image.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        losses = _per_image(loss_fn(x), x)
    return losses if graph else losses.detach(), gradient(losses, x, **graph)


@torch.enable_grad()
def gradient(losses: Tensor, x: Tensor, **graph: bool) -> Tensor:
    """d(sum of the losses)/dx; graph: retain_graph, create_graph.  ValueError, in one line, where there is none."""
    try:
        grad = torch.autograd.grad(losses.sum(), x, allow_unused=True, **graph)[0] if losses.requires_grad else None
    except NotImplementedError as error:
        why = str(error).partition("\n")[0] or "a part of it has no backward pass"
        raise ValueError(f"no gradient comes through the model: {why}") from None
    if grad is None:
        raise ValueError("no gradient comes through to the images: something detaches them, or runs under no_grad")
    return grad


def _per_image(losses: Tensor, x: Tensor) -> Tensor:
    if (got := tuple(losses.shape)) != (len(x),):
        raise ValueError(f"loss_fn must return one loss per image, shape ({len(x)},), not {got}: use reduction='none'")
    return losses


def _same_draw(loss_fn: LossFn, x: Tensor) -> LossFn:
    """loss_fn, every call of which begins with the random state of this moment (read in microseconds)."""
    restores = [(torch.set_rng_state, torch.get_rng_state())]
    if x.device.type not in ("cpu", "meta"):
        device = torch.get_device_module(x.device)
        restores.append((device.set_rng_state, device.get_rng_state(x.device), x.device))

    def replayed(z: Tensor) -> Tensor:
        for restore, *state in restores:
            restore(*state)
        return loss_fn(z)

    return replayed


def dual_norm(grad: Tensor, norm: Norm) -> Tensor:
    """||grad_i||_* (N,), dual to the attack's norm: l2 -> l2, linf -> l1, l1 -> linf.  Loss per unit of x."""
    return vector_norm(grad, {"linf": "l1", "l1": "linf"}.get(norm, norm))


def direction(grad: Tensor, norm: Norm) -> Tensor:
    """The direction d of Prop. 3.2, like grad and of l2-norm at most 1; exactly 0 where grad is 0.

    l2    g / ||g||_2                              <g, d> = ||g||_2
    linf  sign(g) / sqrt(n), n values per image    <g, d> = ||g||_1 / sqrt(n): the factor is Section 3.1's
    l1    sign(g_j) e_j at the largest |g_j|       <g, d> = ||g||_inf: in the authors' code, not in the paper
    """
    check_norm(norm)
    flat = grad.flatten(1)
    if norm == "linf":
        d = _sign(flat) / math.sqrt(flat.shape[1])
    elif norm == "l1":
        largest = flat.abs().argmax(dim=1, keepdim=True)
        d = torch.zeros_like(flat).scatter(1, largest, _sign(flat.gather(1, largest)))
    else:  # divided by the largest entry first: the squares of tiny gradients would underflow
        largest = flat.abs().amax(dim=1, keepdim=True)
        d = torch.nn.functional.normalize(flat / largest.where(largest != 0, 1), dim=1)
    return d.view_as(grad)


def fd_penalty(loss_fn: LossFn, x: Tensor, *, norm: Norm, h: float, squared: bool = True) -> Penalised:
    """Algorithm 1: the penalty without double backpropagation; slopes exceed the exact ones by omega(h)/h at most (6).

    penalties_i = ((l(x_i + h d_i) - l(x_i)) / h)^2                                        # eq. (9)

    squared=False gives the absolute slope: l + delta ||g||_* of Section 3 with delta = lam/2 (in linf
    lam / (2 sqrt(n))).  h, positive and finite, is an l2 length in units of x.  The paper's 0.01 (of pixels) is small:
    ReLUs and pooling that switch on the way to x + h d give the weights' gradient a variance of 1/h.  Digits cancel
    below 1e-3 in float32, below 0.1 in TF32 or bfloat16.  A training step costs 7 forward passes' worth (plain: 3).
    """
    if not 0 < h < math.inf:
        raise ValueError(f"h must be a positive finite number, not {h}")
    loss_fn = _same_draw(loss_fn, x)
    losses, grad = input_gradient(loss_fn, x, retain_graph=True)
    step = h * direction(grad, norm)  # built from a detached gradient: line "detach d" of Algorithm 1
    ahead = _per_image(loss_fn(x.detach() + step), x)
    slopes = (ahead - losses) / h
    return Penalised(losses, slopes.square() if squared else slopes.abs(), grad)


def exact_penalty(loss_fn: LossFn, x: Tensor, *, norm: Norm, squared: bool = True) -> Penalised:
    """The exact penalty ||g||_*^2 (linf: ||g||_1^2 / n) by double backpropagation, "DBP" in Tables 1 and 2.

    loss_fn must be twice differentiable by autograd.  A training step costs 6 forward passes' worth, but through a
    graph that is kept alive and walked twice.  squared=False as in `fd_penalty`.
    """
    losses, grad = input_gradient(loss_fn, x, create_graph=True)
    slopes = (grad * direction(grad.detach(), norm)).flatten(1).sum(1)  # detaching d is exact, and safe where g = 0
    return Penalised(losses, slopes.square() if squared else slopes.abs(), grad.detach())


def ascent_penalty(
    loss_fn: LossFn, x: Tensor, *, norm: Norm, lam: float, h: float = math.inf, squared: bool = True, first: int = 0
) -> Penalised:
    """Its objective(lam) has the value of (8), and as its gradient that of (7), of which (8) is the upper bound:

    max_v l(x_i + v) - ||v||^2 / (2 lam)    by the step from 0 that maximises its linear part: v = min(lam <g, d>, h) d

    Danskin's theorem: v is held where it is.  For h = inf both gradients agree to first order in lam (in linf over n,
    as everywhere here); h keeps v short where the loss is far from linear, as in the first epochs.  squared=False has
    the hard constraint ||v||_2 <= lam/2: in linf the fast gradient sign method.  By more steps: Sinha, Namkoong and
    Duchi (2018).  No digits cancel: loss_fn may compute in bfloat16.  A training step costs 5 forward passes' worth.
    `first` of n images may be moved alone, by n / first times lam: 3 + 2 first / n; random layers then draw anew.
    """
    loss_fn, m = _same_draw(loss_fn, x), first or len(x)
    losses, grad = input_gradient(loss_fn, x[:m])
    d, scale = direction(grad, norm), len(x) / m
    slopes = (grad * d).flatten(1).sum(1)
    reach = (scale * lam * (slopes if squared else torch.full_like(slopes, 0.5))).clamp_max(h)
    ahead = _per_image(loss_fn(torch.cat([x[:m] + column(reach, x) * d, x[m:]]).detach()), x)
    penalties = ahead.new_zeros(len(x))
    penalties[:m] = scale * (slopes.square() if squared else slopes)
    return Penalised(torch.cat([losses, ahead[m:].detach()]) + (ahead - ahead.detach()), penalties, grad)


def check_images(images: Tensor, name: str = "images") -> None:
    known = isinstance(images, Tensor) and images.dtype in (torch.float32, torch.float64) and len(images)
    if not (known and ((images >= 0) & (images <= 1)).all()):
        raise ValueError(f"{name} must be a float32 or float64 tensor in [0, 1], at least one; normalise in the model")


def check_data(model: Callable, images: Tensor, labels: Tensor) -> None:
    """ValueError, in one line, for what attacks and bounds cannot work with; not for labels that are no classes."""
    if training := [name for name, module in getattr(model, "named_modules", tuple)() if module.training]:
        part = f"a part of the model ({', '.join(training[:3])}) is" if training[0] else "the model is"
        raise ValueError(f"{part} in training mode: call model.eval()")
    check_images(images)
    known = isinstance(labels, Tensor)
    if not known or labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        given = f"{labels.dtype} of shape {tuple(labels.shape)}" if known else f"a {type(labels).__name__}"
        raise ValueError(f"labels must be an int64 tensor, one per image, not {given}")


def compared(logits: Tensor, labels: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The two logits that decide, (N,) each: the label's, and the k-th largest of the others."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return logits.gather(1, labels[:, None])[:, 0], others.topk(topk, dim=1).values[:, -1]


def margin(logits: Tensor, labels: Tensor, topk: int = 1) -> Tensor:
    """The k-th largest logit of another class, minus the label's (N,): positive where it is not in the top k."""
    label, rival = compared(logits, labels, topk)
    return rival - label


def column(values: Tensor, like: Tensor) -> Tensor:
    """One value per image (N,), shaped to multiply images `like` (N, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def vector_norm(v: Tensor, norm: Norm) -> Tensor:
    """||v_i|| (N,) in the attack's own norm."""
    check_norm(norm)
    return torch.linalg.vector_norm(v.flatten(1), {"l2": 2, "linf": math.inf, "l1": 1}[norm], dim=1)


def steepest(grad: Tensor, norm: Norm) -> Tensor:
    """The steepest step of length 1 in the attack's norm, like grad; 0 where grad is 0.

    In l1 a tenth of the pixels share it: ascent that moves a single one a step does not get far.
    """
    if norm == "l1":
        flat = grad.flatten(1)
        cut = flat.abs().topk(math.ceil(flat.shape[1] / 10), dim=1).values[:, -1:]
        kept = flat.sign().where(flat.abs() >= cut, 0)
        return (kept / kept.abs().sum(1, keepdim=True).clamp_min(1)).view_as(grad)
    return _sign(grad) if norm == "linf" else direction(grad, norm)


def project(x: Tensor, images: Tensor, radius: Tensor | float, norm: Norm) -> Tensor:
    """x, moved into the ball of `radius` (one, or one per image) around each image, and into [0, 1].

    For images in [0, 1] and radius >= 0 the result is never beyond radius, measured in float64.  Nothing is checked:
    for a negative radius the result is the image, and NaN stays NaN.
    """
    radius = torch.as_tensor(radius, dtype=torch.float64, device=x.device).expand(len(x))
    r, delta = column(radius.to(x), x), x - images
    if norm == "linf":
        delta = delta.clamp(-r, r)
    elif norm == "l2":
        delta = delta * (r / column(vector_norm(delta, norm), x).clamp_min(torch.finfo(x.dtype).tiny)).clamp_max(1)
    else:
        delta = _project_l1(delta.flatten(1).double(), radius).view_as(x).to(x)
    x = (images + delta).clamp(0, 1)
    share, beyond = torch.finfo(x.dtype).eps, vector_norm(x.double() - images.double(), norm) > radius
    while share <= 1:  # what is beyond by a rounding goes back by a growing share of its way, at last by all of it
        x = torch.where(column(beyond, x), torch.nextafter(x.lerp(images, share), images), x)
        share, beyond = 2 * share, vector_norm(x.double() - images.double(), norm) > radius
        if not beyond.any():  # as a rule after the first share: one look at the device a call
            break
    return x


def _project_l1(v: Tensor, radius: Tensor) -> Tensor:
    """The nearest point of the l1 ball, for the rows of v (N, n): soft thresholding (Duchi et al. 2008)."""
    sizes = v.abs().sort(1, descending=True).values
    excess = (sizes.cumsum(1) - radius[:, None]) / torch.arange(1, v.shape[1] + 1, device=v.device)
    threshold = excess.amax(1, keepdim=True).clamp_min(0)
    return v.sign() * (v.abs() - threshold).clamp_min(0)


def uniform_ball(like: Tensor, norm: Norm, generator: torch.Generator | None = None) -> Tensor:
    """Points drawn uniformly from the unit ball of the attack's norm, one for each row of `like` (N, ...)."""
    check_norm(norm)
    n, d = like.flatten(1).shape
    options = {"dtype": like.dtype, "device": generator.device if generator else like.device, "generator": generator}
    if norm == "linf":
        v = torch.rand(n, d, **options) * 2 - 1
    elif norm == "l2":
        v = torch.randn(n, d, **options)
        v = v / v.norm(dim=1, keepdim=True) * torch.rand(n, 1, **options) ** (1 / d)
    else:  # d of d + 1 exponentials over their sum are the spacings of uniform numbers; signs at random
        e = -torch.rand(n, d + 1, **options).clamp_min(1e-30).log()
        v = torch.randn(n, d, **options).sign() * e[:, :d] / e.sum(1, keepdim=True)
    return v.view_as(like).to(like.device)


def _sign(values: Tensor) -> Tensor:
    """The sign, and NaN for NaN, which torch.sign turns into a harmless 0."""
    return torch.where(values.isnan(), values, values.sign())
