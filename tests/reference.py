"""The diagonal Fisher as its definition reads, in float64, by loops and autograd alone.

    F_i = 1/N sum_n sum_y p(y | x_n) (d log p(y | x_n) / d theta_i)^2

Every label y that the model could give an example is written out, jointly over all its positions,
and weighted by its probability. So nothing here knows about layers, batches, square roots of
covariances, or the independence of positions. Below it: tools that several test files share.
"""

import contextlib
import copy
import itertools
from collections import UserDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ewc_utils

CE, BCE, MSE = nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss(), nn.MSELoss()
CRITERIA = {"categorical": CE, "Bernoulli": BCE, "Gaussian": MSE}


def fisher(model, batches, labels="exact", family="categorical", ignore_index=-100, copied=True):
    """{name: float64 tensor}. labels: "exact" or "empirical"; the Gaussian has variance 1/2.

    A copy runs, so that the model stays as it is. copied=False runs a float64 model itself: a copy
    of a hook or of a closure still calls the modules of the original.
    """
    model = (copy.deepcopy(model).double() if copied else model).eval()
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    totals, count = {name: torch.zeros_like(p) for name, p in params.items()}, 0
    for x, y in ((x, y) for batch in batches for x, y in zip(*batch)):
        kept = (y.flatten() != ignore_index) | (family != "categorical")
        if not kept.any():
            continue
        count += 1
        z = model(x[None].double() if x.is_floating_point() else x[None])[0]
        z = (z.reshape(len(z), -1).T if family == "categorical" else z.reshape(-1))[kept]
        empirical = [(1.0, y.flatten()[kept])]
        for p, label in empirical if labels == "empirical" else outcomes(z.detach(), family):
            score = log_likelihood(z, label, family)
            inputs = list(params.values())
            grads = torch.autograd.grad(score, inputs, retain_graph=True, allow_unused=True)
            for name, g in zip(totals, grads):
                totals[name] += p * g.to_dense() ** 2 if g is not None else 0
    return {name: total / count for name, total in totals.items()}


def outcomes(z, family):
    """Every joint label of one example with its probability. z: (positions, C) or (outputs,)."""
    if family == "categorical":
        p = z.softmax(1)
        for y in itertools.product(range(z.shape[1]), repeat=len(z)):
            yield torch.stack([p[t, c] for t, c in enumerate(y)]).prod(), torch.tensor(y)
    elif family == "Bernoulli":
        p = z.sigmoid()
        for bits in itertools.product((0.0, 1.0), repeat=len(z)):
            y = torch.tensor(bits, dtype=z.dtype)
            yield torch.where(y > 0, p, 1 - p).prod(), y
    else:  # z +- sigma has the Gaussian's mean and variance; the squared score needs no more
        for sign in itertools.product((-1.0, 1.0), repeat=len(z)):
            yield 0.5 ** len(z), z + 0.5**0.5 * torch.tensor(sign, dtype=z.dtype)


def log_likelihood(z, y, family):
    """log p(y | z) of one example, summed over its positions, up to a constant."""
    if family == "categorical":
        return z.log_softmax(1).gather(1, y[:, None]).sum()
    if family == "Bernoulli":
        return (y * z - F.softplus(z)).sum()
    return -((z - y) ** 2).sum()


def error(found, truth):
    """The largest error of any tensor, relative to its largest entry. Zero must be found exactly.

    A tensor that only rounding keeps from zero (a bias in front of a normalisation) is measured
    against a millionth of the largest.
    """
    assert found.keys() == truth.keys(), f"names differ: {sorted(found.keys() ^ truth.keys())}"
    largest, worst = max(t.abs().max() for t in truth.values() if t.numel()), 0.0
    for name, t in truth.items():
        assert found[name].shape == t.shape, name
        difference = (found[name].double() - t).abs().max() if t.numel() else torch.zeros(())
        assert not difference.isnan(), name
        if difference > 0:
            assert t.abs().max() > 0, f"{name} must be 0"
            worst = max(worst, (difference / max(t.abs().max(), 1e-6 * largest)).item())
    return worst


# ---------------------------------------------------------------- tools


class Net(nn.Module):
    """Parts by name, and a forward(net, x) that uses them."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.rule = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.rule(self, x)


class TwoInputs(nn.Module):
    """It takes (n, 3) and (n, 2), by position or by name, or both side by side in one tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(2, 3)

    def forward(self, first, second=None):
        first, second = first.split([3, 2], 1) if second is None else (first, second)
        return self.a(first) + self.b(second).sin()


FORMS = {  # of a batch for it
    "a tuple": lambda a, b, y: ((a, b), y),
    "lists": lambda a, b, y: [[a, b], y],
    "a dictionary": lambda a, b, y: ({"second": b, "first": a}, y),
    "a dictionary with labels": lambda a, b, y: {"first": a, "labels": y, "second": b},
    "another mapping": lambda a, b, y: UserDict(first=a, second=b, labels=y),
}


def all_that_runs(model, batches, criterion=CE):
    """{name: a function that runs the model on the batches}"""
    trained = [p for p in model.parameters() if p.requires_grad]
    how = criterion, torch.optim.SGD(trained, lr=0.1), *random_penalty(model), 1.0
    return {
        "Fisher": lambda: ewc_utils.compute_fisher_information(model, batches, criterion),
        "Kronecker": lambda: ewc_utils.compute_kronecker_fisher(model, batches, criterion),
        "accuracy": lambda: ewc_utils.accuracy(model, batches),
        "training": lambda: ewc_utils.train_with_ewc(model, batches, *how),
    }


def draw(*shape, seed=0):
    """Standard normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_penalty(model):
    """A random Fisher and an anchor away from the weights, both of the weights' types."""
    generator, fisher, anchor = torch.Generator().manual_seed(1), {}, {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            a, b = torch.rand(2, *p.shape, generator=generator).to(p.dtype)
            fisher[name], anchor[name] = a, p.detach() + b - 0.5
    return fisher, anchor


def assert_close(found, wanted, **tolerance):
    """Two dictionaries of tensors, or of pairs of tensors, agree."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], **tolerance)


def same_bits(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


@contextlib.contextmanager
def refused(kind, *words):
    """The block raises an error of this kind, whose text names all the words."""
    with pytest.raises(kind) as raised:
        yield raised
    missing = [word for word in words if word.lower() not in str(raised.value).lower()]
    assert not missing, f"{missing} not in: {raised.value}"
