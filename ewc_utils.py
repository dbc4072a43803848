"""Elastic Weight Consolidation (EWC): one equation (Kirkpatrick et al. 2017, eq. 3).

    L(theta) = L_B(theta) + lambda / 2 * sum_i F_i (theta_i - theta*_i)^2

L_B     the mean loss over the examples of task B: ``criterion`` with reduction="mean"
F_i     the diagonal Fisher of task A: the mean over its examples of squared per-example gradients
theta*  the anchor: the weights right after task A
1/2     part of the penalty: its gradient is lambda F (theta - theta*)
lambda  N_A / N_B, the numbers of examples, by Bayes' rule; ``lambda_ewc`` in the code
"""

import contextlib
import copy
import io
import math
import os
import socket
import warnings
from collections import namedtuple
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import distributed, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# -------- data

SAMPLE = Path(__file__).resolve().parent / "tests" / "data"
TIMEOUT = 10.0  # seconds that a download host may stay silent

# x: uint8 images (n, 1, 28, 28), y: int64 labels (n,), source: "full data", "bundled sample", ...
Task = namedtuple("Task", "name train_x train_y test_x test_y classes source")


class TensorLoader:
    """Mini-batches (x, y) of tensors or arrays. Each epoch has a new order, decided by the seed."""

    def __init__(self, x, y, batch_size=128, *, shuffle=True, seed=0):
        if len(x) != len(y):
            raise ValueError(f"x and y must have the same length, got {len(x)} and {len(y)}")
        self.x, self.y, self.batch_size = torch.as_tensor(x), torch.as_tensor(y), batch_size
        self.generator = torch.Generator().manual_seed(seed) if shuffle else None

    def __len__(self):
        return math.ceil(len(self.x) / self.batch_size)

    def __iter__(self):
        size, g = self.batch_size, self.generator
        if g is None:
            return zip(self.x.split(size), self.y.split(size))
        order = torch.randperm(len(self.x), generator=g).split(size)
        return ((self.x[rows], self.y[rows]) for rows in order)


def load_tasks(*names, root=None):
    """Load "FashionMNIST", "MNIST" or both, as a list of ``Task``s from one source.

    The source is ``root``, or the folder in the environment variable EWC_DATA, or ``data/`` and a
    download by torchvision; where that fails, the bundled sample, announced. Raises ValueError.
    """
    if not names or not set(names) <= {"FashionMNIST", "MNIST"}:
        raise ValueError(f"names must be 'FashionMNIST' or 'MNIST', got {names}")
    if given := root or os.environ.get("EWC_DATA"):
        return [_read_task(name, Path(given).expanduser()) for name in names]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torchvision sets none: a silent host would hang for ever
    try:
        return [_read_task(name, Path("data"), download=True) for name in names]
    except ValueError as error:
        print(f"NOTICE  {error}")
        print("NOTICE  Using the BUNDLED SAMPLE. For all data go online, or set EWC_DATA.")
    finally:
        socket.setdefaulttimeout(timeout)
    return [_read_task(name, SAMPLE) for name in names]


def _read_task(name, root, download=False):
    from torchvision import datasets

    maker, hidden, parts = getattr(datasets, name), io.StringIO(), []
    if download and not (root / name).exists():
        print(f"Downloading {name} to {root}/ (once, 55 MB on disk) ...", flush=True)
    try:
        for train in (True, False):
            with contextlib.redirect_stdout(hidden), contextlib.redirect_stderr(hidden):
                part = maker(root, train=train, download=download)
            if part.data.shape != (len(part.targets), 28, 28) or part.targets.max() > 9:
                raise ValueError("images and labels do not match")
            parts += [part.data.unsqueeze(1), part.targets]
    except Exception as error:  # torchvision raises many kinds
        raise ValueError(f"{root / name / 'raw'}: {error!r}; delete damaged files") from error
    source = {60_000: "full data", 5_000: "bundled sample"}.get(len(parts[0]), str(root))
    return Task(name, *parts, [label.split(" - ")[0] for label in maker.classes], source)


# -------- model


class SimpleMLP(nn.Module):
    """Fully connected ReLU network: (x - mean) / std, flatten, hidden layers, logits.

    Input (n, ...), bytes or floats; output (n, output_size). hidden_size may be a tuple.
    """

    def __init__(self, input_size=784, hidden_size=400, output_size=10, *, mean=0.0, std=1.0):
        super().__init__()
        hidden = (hidden_size,) if isinstance(hidden_size, int) else tuple(hidden_size)
        self.mean, self.std, layers = float(mean), float(std), [nn.Flatten()]
        for n_in, n_out in zip((input_size, *hidden), (*hidden, output_size)):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x):
        return self.layers((x - self.mean) / self.std)


@torch.no_grad()
def accuracy(model, x, y, *, batch_size=1000):
    """Fraction of labels y (n, ...) that are the largest logit (n, C, ...), in evaluation mode."""
    device, hits, y = next(model.parameters()).device, 0, torch.as_tensor(y)
    with _modes_restored(model):
        model.eval()
        for a, b in TensorLoader(x, y, batch_size, shuffle=False):
            z = _logits(model(a.to(device)), len(a))
            hits += (_Likelihood(F.cross_entropy).fitting(z, b.to(device)) == z.argmax(1)).sum()
    return hits.item() / y.numel()


def take_anchor(model):
    """theta*: a detached copy of every trainable parameter, by name. Take it right after task A."""
    with torch.inference_mode(False):  # its tensors cannot take part in a gradient
        return {name: p.detach().clone() for name, p in _trainable(model).items()}


def _unwrap(model):
    """The module inside torch.compile, DataParallel and DistributedDataParallel."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _unwrap(model.module)
    return _unwrap(model._orig_mod) if hasattr(model, "_orig_mod") else model


def _trainable(model):
    """{name: parameter}, with the names of the unwrapped model."""
    params = {name: p for name, p in _unwrap(model).named_parameters() if p.requires_grad}
    if not params or any(p.is_complex() for p in params.values()):
        raise ValueError(f"model needs real parameters that require gradients, got {[*params]}")
    return params


def _logits(output, n):
    """The tensor (n, ...) in what a model returns for n examples."""
    z = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    z = z[0] if isinstance(z, (tuple, list)) and z else z
    if not torch.is_tensor(z):
        raise TypeError(f"model must return a tensor, or something with 'logits', got {output!r}")
    # squeeze() at the end of forward drops the batch dimension of a single example.
    return z[None] if n == 1 and (z.dim() == 0 or len(z) != 1) else z


@contextlib.contextmanager
def _modes_restored(model):
    """Afterwards every module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        model.train(modes[0][1])  # a module's own train() may do more than set the flag
        for module, training in modes:
            module.training = training


# -------- Fisher

LABELS = ("exact", "sampled", "empirical")
TOGETHER = 384  # examples that run at once
COPIES = 2**22  # numbers in all copies of the weights together, for the cache's sake


@torch.inference_mode(False)  # it turns gradients on, too
def compute_fisher_information(model, data_loader, criterion, *, labels="exact", seed=0):
    """The diagonal Fisher information, a mean over the N examples of ``data_loader``.

    F_i = 1/N sum_n E_y [(d log p(y | x_n, theta) / d theta_i)^2]   (Martens 2020, sec. 5 and 11)

    data_loader: an iterable of batches (x, y).
    criterion: CrossEntropyLoss (p is categorical), BCEWithLogitsLoss (Bernoulli) or MSELoss
      (Gaussian of variance 1/2), without weights. For "empirical" any other mean, too.
    labels: "exact" is all y, weighted by the model's own p, in T (C - 1) backward passes for C
      classes at T positions (pixels, tokens), T C for BCE and MSE. "sampled" is one y drawn from p:
      one pass, unbiased. "empirical" is the y of the data: one pass, not the Fisher.

    Returns {name: tensor >= 0}, float32 or wider. log p sums over an example's positions, without
    ``ignore_index``. A private copy of the model runs, in evaluation mode. Under torch.distributed
    the mean is over all processes. Raises TypeError, ValueError, FloatingPointError.
    """
    likelihood, params = _Likelihood(criterion, labels, seed), _trainable(model)
    totals = {name: torch.zeros_like(_wide(p)) for name, p in params.items()}
    with _mean_over_examples(totals, model) as examples:
        for x, y in _joined(data_loader, params):
            examples.add_squared_scores(totals, likelihood, x, y)
    return totals


class _PerExample:
    """A private copy of a model that gives every example its own copy of the parameters.

    vmap runs all examples at once, and autograd returns one gradient per copy, hence per example;
    a loop stands in where vmap fails. Linear layers and convolutions need no copies: an example's
    gradient is g^T a, with a row for each position of the inputs a and of the gradients g of the
    outputs. For a single position, sum_n sum_v (g^T a)^2 = (sum_v g^2)^T (a^2).
    """

    def __init__(self, model):
        # deepcopy refuses stored activations with a history: take them without.
        stored = [t for m in model.modules() for t in vars(m).values() if torch.is_tensor(t)]
        memo = {id(t): t.detach().clone() for t in stored if not t.is_leaf}
        self.net = copy.deepcopy(model, memo).eval()
        self.params, self.buffers = _trainable(self.net), dict(self.net.named_buffers())
        self.count, self.plans, self.shared, self.calls = 0, {}, {}, {}
        names = {name for name, _ in self.net.named_parameters()}  # a tied parameter has one name
        for name, layer in self.net.named_modules():
            prefix = f"{name}." if name else ""
            own, kind = {prefix + k for k, _ in layer.named_parameters()}, type(layer)
            conv = kind is nn.Conv2d and (layer.groups, layer.padding_mode) == (1, "zeros")
            product = kind is nn.Linear or (conv and isinstance(layer.padding, tuple))
            if product and own & self.params.keys() and prefix + "weight" in own <= names:
                bias = None if layer.bias is None else layer.bias.detach()
                fixed = layer.weight.detach().requires_grad_(), bias
                layer.forward = partial(self.product, prefix, layer, layer.forward, fixed)
                self.shared[prefix] = layer
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is None:
                raise ValueError(f"{name!r} mixes examples: it needs track_running_stats=True")

    def add_squared_scores(self, totals, likelihood, x, y):
        """totals += sum_n E_y[score^2], with the score d log p / d theta."""
        plan = self.plan(x)
        n = math.ceil(len(x) / plan.size)
        parts = zip(x.chunk(n), y.chunk(n))
        zs = [self.add_squares(totals, plan, likelihood, a, b) for a, b in parts]
        self.check_outputs(torch.cat(zs), x)
        self.count += likelihood.counted(y).sum().item()

    def add_squares(self, totals, plan, likelihood, x, y):
        """totals += sum_n sum_v (J_n^T v)^2, with J_n = d z_n / d theta. Returns z."""

        def add(name, squares):
            if name in totals:
                totals[name] += squares.view_as(totals[name])

        z, copies, inputs, outputs = self.run(plan, x)
        single = {k: torch.zeros_like(_wide(t[:, 0])) for k, t in outputs.items() if len(t[0]) == 1}
        for v in likelihood.directions(z.detach(), y):
            for name, g in _gradients(z, copies | outputs, v).items():
                if name in copies:
                    add(name, g.square().sum(0))
                elif name in single:
                    single[name].addcmul_(g[:, 0], g[:, 0])
                else:
                    add(name + "weight", (g.mT @ inputs[name]).square_().sum(0))
                    add(name + "bias", g.sum(1).square().sum(0))
        for layer, g_squared in single.items():
            if layer + "weight" in totals:  # += (sum_v g^2)^T (a^2)
                total = totals[layer + "weight"].flatten(1)
                total.addmm_(g_squared.T, inputs[layer][:, 0].square())
            add(layer + "bias", g_squared.sum(0))
        return z.detach()

    def run(self, plan, x):
        """z, copies {parameter: (n, *shape)}, inputs, outputs {layer: (n, positions, features)}."""

        def alone(copies, row):
            self.calls = {k: [] for k in plan.shared}
            with _EmbeddingGradients():
                z = functional_call(self.net, self.buffers | copies, row[None])
            calls, self.calls = self.calls, {}
            return _logits(z, 1)[0], {k: call[0] for k, call in calls.items() if len(call) == 1}

        copies = {k: self.params[k].detach() for k in plan.copied}
        copies = {k: t.expand(len(x), *t.shape).requires_grad_() for k, t in copies.items()}
        z, calls = plan.map(alone)(copies, x)
        inputs = {k: _wide(a) for k, (a, _) in calls.items()}
        return z, copies, inputs, {k: rows for k, (_, rows) in calls.items()}

    def product(self, name, layer, forward, fixed, a):
        """What a shared layer computes. It notes the rows of its inputs and its outputs."""
        conv = isinstance(layer, nn.Conv2d)
        if name not in self.calls or (conv and a.shape[:-3] != (1,)):
            return forward(a)
        if conv:
            patches = F.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            z = layer._conv_forward(a, *fixed)
            inputs, rows = patches[0].mT, z[0].flatten(1).mT
            z = rows.clone().mT.view(z.shape)  # clone: the model may change z in place
        else:
            inputs = a.reshape(-1, a.shape[-1])
            rows = F.linear(inputs, *fixed)
            z = rows.clone().view(*a.shape[:-1], -1)
        self.calls[name].append((inputs.detach(), rows))
        return z

    def plan(self, x):
        """How x of one shape runs: map, shared layers, copied parameters, size."""
        key = x.shape[1:], x.dtype
        if key not in self.plans:
            z = _logits(self.net(x[:1]), 1)
            reached = _gradients(z, self.params, torch.ones_like(z)).keys()
            if not reached:
                raise ValueError("model outputs do not depend on any trainable parameter")
            try:
                self.plans[key] = self.make_plan(vmap, [*self.shared], x[[0, 0]], reached)
            except RuntimeError as error:
                warnings.warn(f"the Fisher runs one example at a time: {error}", stacklevel=2)
                self.plans[key] = self.make_plan(_loop, [], x[[0, 0]], reached)
        return self.plans[key]

    def make_plan(self, mapped, shared, x, reached):
        plan = SimpleNamespace(map=mapped, shared=shared, copied=[*self.params])
        for _ in range(2):  # first to find out, then to try it
            z, copies, _, outputs = self.run(plan, x)
            used = _gradients(z, copies | outputs, torch.ones_like(z)).keys()
            elsewhere = {_layer_of(name) for name in used & copies.keys()}  # forward uses copies
            plan.shared = [k for k in outputs if k in used and k not in elsewhere]
            plan.copied = [k for k in self.params if _layer_of(k) not in plan.shared]
        if not all(name in used or _layer_of(name) in used for name in reached):
            raise RuntimeError("under vmap some parameters have no gradient")
        sizes = [self.shared[k].weight.numel() for k in plan.shared if len(outputs[k][0]) > 1]
        held = sum(self.params[k].numel() for k in plan.copied) + max(sizes, default=0)
        plan.size = min(TOGETHER, 1 + COPIES // (1 + held))
        return plan

    def check_outputs(self, z, x):
        """Raise unless z, of examples alone, is finite and the same in a batch."""
        if not z.isfinite().all():
            raise ValueError("outputs are not finite: NaN or huge numbers in x or the weights")
        z, x = z[:: 1 + len(z) // 32], x[:: 1 + len(x) // 32]
        batch = _logits(self.net(x), len(x))
        limit = torch.finfo(z.dtype).eps ** 0.5 * z.abs().max()  # far above rounding
        if z.shape != batch.shape or (z - batch).abs().max() > limit:
            raise ValueError("a batch has other outputs: no example may influence another")


def _loop(function):
    def mapped(copies, x):  # like vmap(function), one example after the other
        rows = zip(x, *(t.unbind() for t in copies.values()))
        zs = [function(dict(zip(copies, own)), row)[0] for row, *own in rows]
        return torch.stack(zs), {}

    return mapped


def _layer_of(name):
    """The prefix of a parameter's name: that of its layer, where this is linear."""
    return name.removesuffix("weight").removesuffix("bias")


def _gradients(z, tensors, v):
    """{name: J^T v} for those of the tensors that z depends on, in float32 or wider."""
    if not z.requires_grad:
        return {}
    grads = torch.autograd.grad(z, [*tensors.values()], v, retain_graph=True, allow_unused=True)
    return {name: _wide(g.to_dense()) for name, g in zip(tensors, grads) if g is not None}


class _EmbeddingGradients(TorchFunctionMode):
    """Under vmap the backward pass of an embedding ignores padding_idx: cut that gradient here."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function is F.embedding and kwargs["padding_idx"] is not None:
            padding = args[0] == kwargs["padding_idx"] % len(args[1])
            output = torch.where(padding.unsqueeze(-1), output.detach(), output)
        return output


class _Likelihood:
    """log p(y | z) of the outputs z, as the criterion names it, and its score s = d log p / d z."""

    def __init__(self, criterion, labels=(), seed=0):  # (): for training
        def is_one_of(*kinds):
            return criterion in kinds or type(criterion) in kinds

        if getattr(criterion, "reduction", "mean") != "mean":
            raise ValueError(f"criterion must take the mean, got {criterion!r}")
        self.criterion, self.labels = criterion, labels
        self.categorical = is_one_of(nn.CrossEntropyLoss, F.cross_entropy)
        self.bernoulli = is_one_of(nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits)
        self.gaussian = is_one_of(nn.MSELoss, F.mse_loss)
        self.other = not (self.categorical or self.bernoulli or self.gaussian)
        nothing = -100 if self.categorical else math.nan
        self.ignore_index = getattr(criterion, "ignore_index", nothing)
        options = [getattr(criterion, k, None) for k in ("weight", "pos_weight", "label_smoothing")]
        weighted = options[0] is not None or options[1] is not None or options[2]
        known = labels == "empirical" if self.other else labels in LABELS and not weighted
        if not known and labels != ():
            rule = f"one of {LABELS} for a plain CrossEntropyLoss, BCEWithLogitsLoss or MSELoss"
            got = f"got {labels!r} for criterion {criterion!r}"
            raise ValueError(f"labels must be {rule}, 'empirical' for others, {got}")
        rank = distributed.get_rank() if _is_distributed() else 0
        self.generator = torch.Generator().manual_seed(seed + 10007 * rank)

    def directions(self, z, y):
        """Vectors v like z, one per pass, with sum_v v v^T = E_y[s s^T] for each example."""
        y, wide = self.fitting(z, y), _wide(z)
        counted = (y != self.ignore_index).unsqueeze(1) if self.categorical else 1
        if self.labels == "sampled":
            y = self.sample(wide)
        for v in self.roots(wide) if self.labels == "exact" else [self.score(wide, y)]:
            yield (v * counted).to(z.dtype)

    def roots(self, z):
        """The columns of a root of the covariance of s."""
        if not self.categorical:
            variance = z.sigmoid() * (-z).sigmoid() if self.bernoulli else 0 * z + 2
            for one in torch.eye(z[0].numel(), device=z.device):
                yield variance.sqrt() * one.view_as(z[0])
            return
        # Draw y in C - 1 independent steps, "c or a later class", with one direction each.
        p = z.softmax(1).reshape(*z.shape[:2], -1)
        q = p.flip(1).cumsum(1).flip(1).clamp_min(torch.finfo(p.dtype).tiny)  # c or later
        root = (p[:, :-1] * q[:, 1:] / q[:, :-1]).sqrt()
        for t in range(p.shape[2]):
            for c in range(p.shape[1] - 1):
                v = torch.zeros_like(p)
                v[:, c, t] = root[:, c, t]
                v[:, c + 1 :, t] = p[:, c + 1 :, t] * (-root[:, c, t] / q[:, c + 1, t])[:, None]
                yield v.view_as(z)

    def sample(self, z):
        """One y for each example and position, by the inverse of the distribution function."""
        shape = z[:, :1].shape if self.categorical else z.shape
        u = torch.rand(shape, generator=self.generator).to(z).clamp_min(2**-25)
        if self.categorical:
            return (z.softmax(1).cumsum(1) < u).sum(1).clamp_max(z.shape[1] - 1)
        return (u < z.sigmoid()).to(z) if self.bernoulli else z + torch.special.ndtri(u) / 2**0.5

    def score(self, z, y):
        """d log p(y | z) / d z"""
        if self.categorical:
            return F.one_hot(y.clamp(0, z.shape[1] - 1), z.shape[1]).movedim(-1, 1) - z.softmax(1)
        if not self.other:
            return y - z.sigmoid() if self.bernoulli else 2 * (y - z)
        z = z.detach().requires_grad_()
        loss = sum(self.criterion(z[i : i + 1], y[i : i + 1]) for i in range(len(z)))
        return -torch.autograd.grad(loss, z)[0]

    def fitting(self, z, y):
        """The labels y as the criterion takes them for the outputs z, or an error."""
        if self.other:
            return y
        wanted = z.shape[:1] + z.shape[2:] if self.categorical else z.shape
        scores = not y.is_floating_point() and z.dim() > 1 and z.shape[1] > 1
        if y.shape != wanted or (self.categorical and not scores):
            kind = "class indices, of two classes or more," if self.categorical else "targets"
            got = f"{y.dtype} {tuple(y.shape)} for outputs {tuple(z.shape)}"
            raise ValueError(f"labels y must be {kind} {tuple(wanted)}, got {got}")
        y, high = (y.long(), z.shape[1] - 1) if self.categorical else (y.to(z.dtype), 1)
        if not self.gaussian and y.numel() and not 0 <= y.min() <= y.max() <= high:
            wrong = ~((y >= 0) & (y <= high)) & (y != self.ignore_index)
            if wrong.any():
                raise ValueError(f"labels y must lie in 0..{high}, got {y[wrong][0]}")
        return y

    def counted(self, y):
        """Which examples are not ignored."""
        return (y.long() != self.ignore_index).reshape(len(y), -1).any(1)


def _wide(t):
    """t in float32, or in its own type where that is wider."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _batches(loader, params):
    """The (x, y) of a loader, checked, on the device of the parameters."""
    device = next(iter(params.values())).device
    for batch in loader:
        x, y = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
        got = [tuple(t.shape) if torch.is_tensor(t) else type(t).__name__ for t in (x, y)]
        if str in map(type, got) or not got[0][:1] == got[1][:1] != ():
            raise TypeError(f"a loader must yield tensors (x, y), examples first, got {got}")
        if len(x):
            yield x.to(device), y.to(device)


def _joined(loader, params):
    """The same with small batches of one shape joined, which saves time."""
    held = []
    for x, y in _batches(loader, params):
        size = len(x) + sum(len(a) for a, _ in held)
        if held and (size > TOGETHER or x.shape[1:] != held[0][0].shape[1:]):
            yield tuple(map(torch.cat, zip(*held)))
            held = []
        if len(x) >= TOGETHER:
            yield x, y
        else:
            held.append((x.clone(), y.clone()))  # the loader may fill the same memory again
    if held:
        yield tuple(map(torch.cat, zip(*held)))


def _is_distributed():
    return distributed.is_available() and distributed.is_initialized()


@contextlib.contextmanager
def _mean_over_examples(sums, model):
    """A ``_PerExample``; then sums /= its count, over all processes, which fail together."""
    failure, device = None, next(model.parameters()).device
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    try:
        with (
            torch.random.fork_rng({p.device for p in model.parameters() if p.is_cuda}),
            # cuDNN has no backward pass for recurrent layers in evaluation mode; TF32 is inexact.
            torch.backends.cudnn.flags(enabled=not recurrent, allow_tf32=False),
        ):
            examples = _PerExample(_unwrap(model))
            yield examples
    except Exception as error:
        failure = error
    add_up = distributed.all_reduce if _is_distributed() else lambda t: t
    status = torch.tensor([failure is not None, 0 if failure else examples.count], device=device)
    add_up(status)
    failed, count = status.tolist()
    if failed:
        raise failure or RuntimeError("the Fisher failed in another process")
    if not count:
        raise ValueError("data_loader gave 0 examples: it is empty, used up or ignored")
    for name, total in sums.items():
        add_up(total)
        if not total.div_(count).isfinite().all():
            raise FloatingPointError(f"Fisher of {name!r} is not finite: clean y, scale x down")


# -------- penalty


def ewc_loss(model, fisher_dict, optimal_params, lambda_ewc):
    """lambda_ewc / 2 * sum_i F_i (theta_i - theta*_i)^2   (Kirkpatrick et al. 2017, eq. 3)

    fisher_dict {name: F} is from ``compute_fisher_information``, optimal_params {name: theta*} from
    ``take_anchor``: for every trainable parameter, of its shape, on its device; zeros in F leave it
    free. lambda_ewc: finite, >= 0. Returns a scalar. Raises TypeError and ValueError.
    """
    springs = _springs(model, fisher_dict, optimal_params, lambda_ewc)
    total = sum((spring.fisher * spring.displacement() ** 2).sum() for spring in springs)
    return float(lambda_ewc) / 2 * total


def add_ewc_gradients(model, fisher_dict, optimal_params, lambda_ewc):
    """grad += lambda_ewc F (theta - theta*), in place: what ``ewc_loss`` adds, without autograd.

    Call it between ``loss.backward()`` and ``optimizer.step()``.
    """
    for spring in _springs(model, fisher_dict, optimal_params, lambda_ewc):
        spring.add_gradient(lambda_ewc)


class _Spring:
    """F_i (theta_i - theta*_i)^2 for the entries of one parameter, in float32 or wider."""

    waiting = 0.0  # lr * lambda since the last proximal step

    def __init__(self, name, params, fisher, anchors):
        _check_entry(f"fisher_dict[{name!r}]", fisher, params[0], least=0)
        self.params, self.fisher, self.anchor = params, _wide(fisher), self.joined(anchors)

    def joined(self, tensors):
        return _wide(tensors[0])

    def displacement(self):
        """theta - theta*"""
        return self.joined(self.params) - self.anchor

    def add(self, targets, stiffness, factor):
        """targets += factor * stiffness * (theta - theta*)"""
        targets[0].addcmul_(stiffness, self.displacement(), value=factor)

    @torch.no_grad()
    def add_gradient(self, lambda_ewc):
        for p in self.params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
        self.add([p.grad for p in self.params], self.fisher, float(lambda_ewc))

    def wait(self, lambda_ewc, group):
        """Note a step of SGD; with momentum a gradient counts 1 / (1 - momentum) times."""
        momentum = group["momentum"]
        damping = 1 - group["dampening"] if momentum else 1
        self.waiting += float(lambda_ewc * group["lr"]) * damping / (1 - momentum)

    @torch.no_grad()
    def proximal_step(self):
        """theta <- theta* + (theta - theta*) / (1 + r), with r = F times the waiting lr * lambda"""
        r = (self.fisher * min(self.waiting, 1e30)).clamp_(max=1e30)  # no infinity times 0
        self.add(self.params, r.div_(1 + r), -1)
        self.waiting = 0.0


def _springs(model, fisher_dict, optimal_params, lambda_ewc):
    """The springs of all parameters, after all checks."""
    params, springs = _trainable(model), []
    if not 0 <= lambda_ewc < math.inf:
        raise ValueError(f"lambda_ewc must be finite and at least 0, got {lambda_ewc!r}")
    if not isinstance(fisher_dict, Mapping) or not isinstance(optimal_params, Mapping):
        raise TypeError("fisher_dict and optimal_params must be dictionaries")
    for name, p in params.items():
        _check_entry(f"optimal_params[{name!r}]", optimal_params.get(name), p)
    missing = set(params)
    for name, fisher in fisher_dict.items():
        kind, own = _Spring, [name]
        if isinstance(fisher, tuple):
            kind, own = _KroneckerSpring, [f"{name}.{k}".lstrip(".") for k in ("weight", "bias")]
        own = [k for k in own if k in params]
        if own:
            anchors = [optimal_params[k] for k in own]
            springs.append(kind(name, [params[k] for k in own], fisher, anchors))
            missing -= set(own)
    if missing:
        raise ValueError(f"fisher_dict lacks {sorted(missing)}: zeros leave a parameter free")
    return springs


def _check_entry(entry, value, like, least=-math.inf):
    """Raise unless the value is a finite tensor, shaped and placed like ``like``."""
    wanted = f"{tuple(like.shape)} on {like.device}"
    got = f"{tuple(value.shape)} on {value.device}" if torch.is_tensor(value) else repr(value)
    if got != wanted:
        raise ValueError(f"{entry} must be a tensor {wanted}, got {got}: .to(device)?")
    if value.data_ptr() == like.data_ptr() != 0:
        raise ValueError(f"{entry} is the live parameter: use take_anchor(model)")
    low, high = [bound.item() for bound in value.aminmax()] if value.numel() else (0, 0)
    if not math.isfinite(high - low) or low < least:
        raise ValueError(f"{entry} holds {low}..{high}: entries must be finite, a Fisher's >= 0")


# -------- training


def train_with_ewc(model, train_loader, criterion, optimizer, fisher_dict, optimal_params,
                   lambda_ewc, *, epochs=1, penalty="explicit", every=1, scheduler=None,
                   callback=None):  # fmt: skip
    """Minimise L_B(theta) + lambda_ewc / 2 * sum_i F_i (theta_i - theta*_i)^2, in place.

    train_loader, criterion, optimizer: batches (x, y), a mean loss of (outputs, y), and what steps
      on all trainable weights.
    fisher_dict, optimal_params, lambda_ewc: as in ``ewc_loss``, or Kronecker factors for the first.
      lambda_ewc = 0 is plain training, bit for bit; both may then be None.
    penalty: "explicit" adds lambda_ewc F (theta - theta*) to the gradient; with SGD it is stable
      while lr lambda_ewc max F < 2 (1 + momentum). "implicit" lets SGD step on L_B, then goes to
      theta* + (theta - theta*) / (1 + lr lambda_ewc F), with lr / (1 - momentum) for lr: always
      stable. Adam and others rescale the gradient and are refused.
    every: "implicit" only, one proximal step for so many steps of the optimizer.
    scheduler, callback: scheduler.step() and callback(step, model) follow every step; the callback
      also runs at step 0.

    Returns the mean L_B of each epoch. A model in evaluation mode trains in training mode; else
    every module keeps its mode: eval() freezes the running statistics of BatchNorm, which no
    penalty holds. Raises TypeError, ValueError, and FloatingPointError for NaN or infinity, with
    the weights put back.
    """
    params, likelihood, springs, losses, step = _trainable(model), _Likelihood(criterion), [], [], 0
    groups = _checked_groups(params, train_loader, optimizer, epochs, penalty, every)
    if lambda_ewc != 0:
        springs = _springs(model, fisher_dict, optimal_params, lambda_ewc)
    explicit, implicit = (springs, []) if penalty == "explicit" else ([], springs)
    start = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    callback = callback or (lambda step, model: None)
    with _modes_restored(model):
        if not model.training:
            model.train()
        callback(step, model)
        for _ in range(epochs):
            losses.append([])
            for x, y in _batches(train_loader, params):
                optimizer.zero_grad()
                z = _logits(model(x), len(x))
                loss = criterion(z, likelihood.fitting(z, y))
                loss.backward()
                for spring in explicit:
                    spring.add_gradient(lambda_ewc)  # the penalty: lambda F (theta - theta*)
                optimizer.step()
                step += 1
                for spring in implicit:
                    spring.wait(lambda_ewc, groups[spring.params[0]])
                    if step % every == 0:
                        spring.proximal_step()  # the penalty, in its implicit form
                if scheduler is not None:
                    scheduler.step()
                losses[-1].append(loss.item())
                _check_finite(math.isfinite(losses[-1][-1]), start, step)
                callback(step, model)
            for spring in implicit:
                spring.proximal_step()  # for what ``every`` has left over
            _check_finite(all(p.isfinite().all() for p in params.values()), start, step)
            if not losses[-1]:
                raise ValueError("train_loader gave 0 batches: it is empty or used up")
    return [sum(epoch) / len(epoch) for epoch in losses]


@torch.no_grad()
def _check_finite(finite, start, step):
    """Otherwise put the weights back and raise."""
    if not finite:
        for t, value in start:
            t.copy_(value)
        remedy = "penalty='implicit' or a smaller learning rate, or look for NaN in the data"
        raise FloatingPointError(f"not finite at step {step}, weights put back: {remedy}")


def _checked_groups(params, train_loader, optimizer, epochs, penalty, every):
    """{parameter: its optimizer group}, after checks."""
    if epochs > 1 and hasattr(train_loader, "__next__"):
        raise ValueError(f"train_loader serves 1 of {epochs} epochs: pass a list or a loader")
    if epochs < 1 or not {"explicit": every == 1, "implicit": every >= 1}.get(penalty):
        rule = "'explicit' with every=1, or 'implicit'; epochs and every at least 1"
        raise ValueError(f"penalty must be {rule}; got {penalty!r}, {every=}, {epochs=}")
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    if lost := [name for name, p in params.items() if p not in groups]:
        raise ValueError(f"optimizer lacks {lost}: make it anew, or freeze them")
    if any(group.get("maximize") for group in groups.values()):
        raise ValueError("optimizer has maximize=True: it would repel the weights from theta*")
    if penalty == "implicit" and not all("dampening" in group for group in groups.values()):
        raise ValueError(f"penalty='implicit' is for SGD: use 'explicit' with {optimizer!r}")
    return groups


# -------- many tasks


class EWC:
    """The penalties of all tasks so far as one: ``fisher`` and ``anchor``, for ``ewc_loss``.

    "single": F = sum_k F_k at the newest anchor, Bayes' rule as a recursion (Huszar 2018).
    "online": F = gamma F + F_k, 0 < gamma <= 1, likewise (Schwarz et al. 2018, eq. 9).
    "separate": one penalty per task (Kirkpatrick et al. 2017); their sum pulls like F = sum_k F_k
      at the Fisher-weighted mean of the anchors.
    torch.load(..., weights_only=True) reads a saved ``state_dict()``. Raises ValueError.
    """

    def __init__(self, rule="single", *, gamma=1.0):
        known = {"single": gamma == 1, "online": 0 < gamma <= 1, "separate": gamma == 1}
        if not known.get(rule):
            raise ValueError(f"rule={rule!r}, gamma={gamma!r} unknown; gamma < 1 is for 'online'")
        self.rule, self.gamma, self.n_tasks, self.fisher, self.anchor = rule, gamma, 0, {}, {}

    def consolidate(self, fisher_dict, optimal_params, *, weight=1.0):
        """Add the task just learned; weight: its N_k over the N that lambda_ewc refers to."""
        names = (self.fisher or fisher_dict).keys()
        if not names == fisher_dict.keys() == optimal_params.keys():
            raise ValueError(f"every task needs {[*names | fisher_dict.keys()]}: pad with zeros")
        if not 0 < weight < math.inf:
            raise ValueError(f"weight must be finite and above 0, got {weight!r}")
        fishers, anchors = {}, {}
        for name, new in fisher_dict.items():
            at = optimal_params[name].detach().clone()
            old, was = self.fisher.get(name, 0 * new), self.anchor.get(name, at)
            _check_entry(f"fisher_dict[{name!r}]", new, was, least=0)
            _check_entry(f"optimal_params[{name!r}]", at, old)
            fishers[name], anchors[name] = self.gamma * old + weight * new.detach(), at
            if self.rule == "separate":
                share = (weight * new / fishers[name]).nan_to_num(1.0)  # 0 / 0: the newest
                anchors[name] = (share * at + (1 - share) * was).to(at.dtype)
        self.fisher, self.anchor, self.n_tasks = fishers, anchors, self.n_tasks + 1

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        vars(self).update({name: state[name] for name in vars(self)})


# -------- beyond the diagonal


@torch.inference_mode(False)
def compute_kronecker_fisher(model, data_loader, criterion, *, labels="exact", seed=0):
    """The Kronecker-factored Fisher of a network of linear layers (Martens & Grosse 2015, eq. 1).

    F of a layer = G (x) A: A = mean_n a a^T over its inputs a, a 1 appended for a trainable bias,
    and G = mean_n E_y[g g^T] over the gradients g of its outputs. Exact for one example. Every
    trainable parameter must belong to an nn.Linear layer with one input. Returns {layer: (A, G)}
    for ``train_with_ewc``, best with penalty="implicit", every=8. The penalty is
    lambda_ewc / 2 tr(G D A D^T), D = [weight bias] - anchor (Ritter et al. 2018, eq. 9).
    """
    likelihood, params, sums = _Likelihood(criterion, labels, seed), _trainable(model), {}
    with _mean_over_examples(sums, model) as examples:
        linear = [k for k, layer in examples.shared.items() if isinstance(layer, nn.Linear)]
        layers = [k for k in linear if k + "weight" in params]
        for layer in layers:
            n_out, n_in = params[layer + "weight"].shape
            for side, size in (("A", n_in + (layer + "bias" in params)), ("G", n_out)):
                sums[layer + side] = _wide(params[layer + "weight"]).new_zeros(size, size)
        for x, y in _joined(data_loader, params):
            counted = likelihood.counted(y)
            z, _, inputs, outputs = examples.run(examples.plan(x), x)
            single = [k for k in layers if k in outputs and len(outputs[k][0]) == 1]
            if lost := [name for name in params if _layer_of(name) not in single]:
                raise ValueError(f"freeze {lost}: not of nn.Linear layers used once with one input")
            for v in likelihood.directions(z.detach(), y):
                for layer, g in _gradients(z, outputs, v).items():
                    sums[layer + "G"] += g[:, 0].T @ g[:, 0]
            for layer in layers:
                a = inputs[layer][counted, 0]
                a = F.pad(a, (0, 1), value=1.0) if layer + "bias" in params else a
                sums[layer + "A"] += a.T @ a
            examples.check_outputs(z.detach(), x)
            examples.count += counted.sum().item()
    return {layer[:-1]: (sums[layer + "A"], sums[layer + "G"]) for layer in layers}


class _KroneckerSpring(_Spring):
    """tr(G D A D^T) of one layer: G (x) A is diagonal in the basis of its factors' eigenvectors."""

    def __init__(self, name, params, factors, anchors):
        sizes = sum(p[0].numel() for p in params), len(params[0])
        for factor, size, side in zip(factors, sizes, "AG"):
            _check_entry(f"fisher_dict[{name!r}], {side}", factor, params[0].new_empty(size, size))
        (a, a_axes), (g, g_axes) = (torch.linalg.eigh(f.cpu().double()) for f in factors)
        self.axes = g_axes.to(factors[1]), a_axes.to(factors[0])
        self.fisher = torch.outer(g, a).clamp_min(0).to(factors[0])
        self.params, self.anchor = params, self.joined(anchors)

    def joined(self, tensors):
        """[weight bias] in that basis."""
        d = torch.cat([_wide(t).reshape(len(t), -1) for t in tensors], 1)
        return self.axes[0].T @ d @ self.axes[1]

    def add(self, targets, stiffness, factor):
        pull = self.axes[0] @ (stiffness * self.displacement()) @ self.axes[1].T
        for target, part in zip(targets, pull.split([t[0].numel() for t in targets], 1)):
            target.add_(part.view_as(target), alpha=factor)


def nearest_kronecker_sum(first, second):
    """{layer: (A, G)}, G (x) A nearest to the sum of two such (Van Loan & Pitsianis 1993)."""
    result = {}  # the sum of a g^T, entries of A and of G, has rank 2: take its first part
    for layer in first:
        pairs = list(zip(first[layer], second[layer]))  # (A1, A2), (G1, G2)
        flat = [torch.stack([f.cpu().double().flatten() for f in pair], 1) for pair in pairs]
        (a, a_mix), (g, g_mix) = map(torch.linalg.qr, flat)
        u, s, v = torch.linalg.svd(a_mix @ g_mix.T)
        found = s[0].sqrt() * a @ u[:, 0], s[0].sqrt() * g @ v[0]
        sign = 1 if found[0].view_as(pairs[0][0]).trace() >= 0 else -1
        result[layer] = tuple((sign * f).view_as(p[0]).to(p[0]) for f, p in zip(found, pairs))
    return result
