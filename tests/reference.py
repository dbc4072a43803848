"""The diagonal Fisher as its definition reads, in float64, by nothing but loops and autograd: the tests' second route.

    F_i = 1/N sum_n sum_y p(y | x_n) (d log p(y | x_n) / d theta_i)^2

Every label y that the model could give an example is written out, jointly over all its positions, and weighted by its
probability. So nothing here knows about layers, chunks, square roots of covariances, or independence of positions.
"""

import copy
import itertools

import torch


def fisher(model, batches, labels="exact", family="categorical", ignore_index=-100):
    """{name: float64 tensor}: labels "exact" or "empirical"; family "categorical", "Bernoulli" or "Gaussian" (variance 1/2)."""
    model = copy.deepcopy(model).double().eval()
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    totals, count = {name: torch.zeros_like(p) for name, p in params.items()}, 0
    for xs, ys in batches:
        for x, y in zip(xs, ys):
            kept = y.flatten() != ignore_index if family == "categorical" else torch.ones(y.numel(), dtype=torch.bool)
            if not kept.any():
                continue
            count += 1
            z = logits(model(x[None].double() if x.is_floating_point() else x[None]))[0]
            z = (z.reshape(len(z), -1).T if family == "categorical" else z.reshape(-1))[kept]
            chosen = [(1.0, y.flatten()[kept])] if labels == "empirical" else outcomes(z.detach(), family)
            for probability, label in chosen:
                grads = torch.autograd.grad(log_likelihood(z, label, family), list(params.values()), retain_graph=True,
                                            allow_unused=True)
                for total, g in zip(totals.values(), grads):
                    if g is not None:
                        total += probability * g.to_dense() ** 2
    return {name: total / count for name, total in totals.items()}


def outcomes(z, family):
    """Every joint label of one example with its probability. z: (positions, classes), or (outputs,)."""
    if family == "categorical":
        p = z.softmax(1)
        for y in itertools.product(range(z.shape[1]), repeat=len(z)):
            yield torch.stack([p[t, c] for t, c in enumerate(y)]).prod(), torch.tensor(y)
    elif family == "Bernoulli":
        p = z.sigmoid()
        for y in itertools.product((0.0, 1.0), repeat=len(z)):
            y = torch.tensor(y, dtype=z.dtype)
            yield torch.where(y > 0, p, 1 - p).prod(), y
    else:  # z +- sigma has the mean and the variance of the Gaussian, and the squared score asks for no more
        for sign in itertools.product((-1.0, 1.0), repeat=len(z)):
            yield 0.5 ** len(z), z + 0.5 ** 0.5 * torch.tensor(sign, dtype=z.dtype)


def log_likelihood(z, y, family):
    """log p(y | z) of one example, summed over its positions, up to a constant."""
    if family == "categorical":
        return z.log_softmax(1).gather(1, y[:, None]).sum()
    if family == "Bernoulli":
        return (y * z - torch.nn.functional.softplus(z)).sum()
    return -((z - y) ** 2).sum()


def logits(output):
    """The prediction in what a model returns."""
    if isinstance(output, dict):
        return output["logits"]
    if isinstance(output, (tuple, list)):
        return output[0]
    return getattr(output, "logits", output)


def error(found, truth):
    """Largest error of any tensor, relative to that tensor's largest entry; a tensor that is zero must be found so exactly.
    A tensor that only rounding keeps from zero (a bias in front of a normalisation) is measured against a millionth of the largest."""
    assert found.keys() == truth.keys(), f"names differ: {sorted(found.keys() ^ truth.keys())}"
    largest, worst = max(t.abs().max() for t in truth.values()), 0.0
    for name, t in truth.items():
        assert found[name].shape == t.shape, name
        difference = (found[name].double() - t).abs().max()
        assert difference == 0 or t.abs().max() > 0, f"{name} must be 0"
        worst = max(worst, (difference / max(t.abs().max(), 1e-6 * largest)).item() if difference > 0 else 0.0)
        assert not difference.isnan(), name
    return worst
