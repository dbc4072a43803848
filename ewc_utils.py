"""Elastic Weight Consolidation (EWC): one equation (Kirkpatrick et al. 2017, eq. 3).

    L(theta) = L_B(theta) + lambda / 2 * sum_i F_i (theta_i - theta*_i)^2

L_B     the loss on task B: a mean over examples, ``criterion`` with reduction="mean"
F_i     the diagonal Fisher of task A: the mean over its examples of squared per-example gradients
theta*  the anchor: the weights right after task A
1/2     part of the penalty: its gradient is lambda F (theta - theta*)
lambda  ``lambda_ewc``. By Bayes' rule N_A / N_B, the numbers of examples. Where the criterion also
        averages over K numbers per example (outputs of MSELoss, pixels, tokens): N_A / (N_B K),
        because the log-likelihood of an example is the sum over them. N_A is the size of the task,
        also where the Fisher is a mean over a part of it.

The file follows the story: data, model, penalty, Fisher, training, many tasks, Kronecker factors,
lesson. The rest, the engine, is for those who want to know how it is done for any module.
"""

import contextlib
import io
import itertools
import math
import os
import random
import socket
import threading
import warnings
from collections import Counter, namedtuple
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import distributed, nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.func import functional_call, vmap
from torch.nn import functional as F

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
        self.x = x if torch.is_tensor(x) else torch.as_tensor(x, device="cpu")
        self.y = y if torch.is_tensor(y) else torch.as_tensor(y, device="cpu")
        self.batch_size = batch_size
        self.generator = torch.Generator("cpu").manual_seed(seed) if shuffle else None

    def __len__(self):
        return math.ceil(len(self.x) / self.batch_size)

    def __iter__(self):
        if self.generator is None:
            return zip(self.x.split(self.batch_size), self.y.split(self.batch_size))
        order = torch.randperm(len(self.x), generator=self.generator, device="cpu")
        return ((self.x[rows], self.y[rows]) for rows in order.split(self.batch_size))


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

    maker = getattr(datasets, name)
    raw = root / name / "raw"
    parts = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    lost = [f"{part}-ubyte" for part in parts if not (raw / f"{part}-ubyte").exists()]
    if lost and not download:
        found = sorted(os.listdir(raw)) if raw.is_dir() else "no such folder"
        remedy = f"set EWC_DATA or root to the folder that holds {name}/raw, and unpack .gz files"
        raise ValueError(f"{raw.absolute()} lacks {lost} (found: {found}): {remedy}")
    if lost:
        print(f"Downloading {name} to {root}/ (once, 55 MB on disk) ...", flush=True)
    hidden = io.StringIO()
    tensors = []
    try:
        for train in (True, False):
            with contextlib.redirect_stdout(hidden), contextlib.redirect_stderr(hidden):
                part = maker(root, train=train, download=download)
            if part.data.shape != (len(part.targets), 28, 28) or part.targets.max() > 9:
                raise ValueError("images and labels do not match")
            tensors += [part.data.unsqueeze(1), part.targets]
    except Exception as error:  # torchvision raises many kinds
        reason = "the download failed" if lost else "delete damaged files"
        raise ValueError(f"{raw}: {reason} ({' '.join(str(error).split())})") from error
    source = {60_000: "full data", 5_000: "bundled sample"}.get(len(tensors[0]), str(root))
    return Task(name, *tensors, [label.split(" - ")[0] for label in maker.classes], source)


# -------- model


class SimpleMLP(nn.Module):
    """Fully connected ReLU network: (x - mean) / std, flatten, hidden layers, logits.

    Input (n, ...), bytes or floats; output (n, output_size). hidden_size may be a tuple.
    """

    def __init__(self, input_size=784, hidden_size=400, output_size=10, *, mean=0.0, std=1.0):
        super().__init__()
        hidden = tuple(hidden_size) if isinstance(hidden_size, (tuple, list)) else (hidden_size,)
        sizes = [int(size) for size in (input_size, *hidden, output_size)]
        self.register_buffer("mean", torch.tensor(float(mean)))
        self.register_buffer("std", torch.tensor(float(std)))
        layers = [nn.Flatten()]
        for n_in, n_out in zip(sizes, sizes[1:]):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x):
        return self.layers((x - self.mean) / self.std)


@torch.no_grad()
def accuracy(model, x, y=None, *, batch_size=1000):
    """Fraction of labels y (n, ...) that are the largest logit (n, C, ...), in evaluation mode.

    ``accuracy(model, x, y)`` for tensors, ``accuracy(model, loader)`` for batches (x, y). The label
    -100 is not counted. Raises TypeError and ValueError.
    """
    loader = x if y is None else TensorLoader(x, y, batch_size, shuffle=False)
    hits = 0
    count = 0
    with _mode(model, training=False):
        for inputs, labels in _batches(loader, next(model.parameters()).device):
            z = _logits(model, inputs, len(labels))
            hits += (_class_indices(z, labels) == z.argmax(1)).sum().item()
            count += (labels != -100).sum().item()
    if not count:
        raise ValueError("x, y or the loader gave 0 labels to compare: empty, used up or ignored")
    return hits / count


def take_anchor(model):
    """theta*: a detached copy of every trainable parameter, by name. Take it right after task A."""
    with torch.inference_mode(False):  # its tensors cannot take part in a gradient
        return {name: p.detach().clone() for name, p in _trainable(model).items()}


# -------- penalty


def ewc_loss(model, fisher_dict, optimal_params, lambda_ewc):
    """lambda_ewc / 2 * sum_i F_i (theta_i - theta*_i)^2   (Kirkpatrick et al. 2017, eq. 3)

    fisher_dict: {name: F} from ``compute_fisher_information``, or {layer: (A, G)} from
      ``compute_kronecker_fisher``. Zeros leave a parameter free; ones hold all alike (L2).
    optimal_params: {name: theta*} from ``take_anchor``. Both: an entry for every trainable
      parameter, of its shape, on its device. lambda_ewc: finite, >= 0.

    Returns a scalar to add to the loss on task B. Raises TypeError and ValueError.
    """
    springs = _springs(model, fisher_dict, optimal_params, lambda_ewc)
    return float(lambda_ewc) / 2 * sum(spring.energy() for spring in springs)


def add_ewc_gradients(model, fisher_dict, optimal_params, lambda_ewc):
    """grad += lambda_ewc F (theta - theta*), in place: what ``ewc_loss`` adds, without autograd.

    Call it between ``loss.backward()`` and ``optimizer.step()``, on gradients of the loss itself:
    after ``scaler.unscale_(optimizer)``, and before a clip that is meant for both terms.
    """
    for spring in _springs(model, fisher_dict, optimal_params, lambda_ewc):
        spring.add_gradient(float(lambda_ewc))


class _Spring:
    """F_i (theta_i - theta*_i)^2 for the weights of one parameter, in float32 or wider."""

    waiting = 0.0  # lr * lambda since the last proximal step
    rate = None  # lr * lambda of the last one

    def __init__(self, name, params, fisher, anchors):
        self.name = name
        self.params = list(params.values())
        self.param = self.params[0]
        self.hold(fisher, [anchors[k] for k in params])

    def hold(self, fisher, anchors):
        self.fisher = _wide(fisher)
        self.anchor = _wide(anchors[0])

    @staticmethod
    def entries(name, params, fisher):
        """What ``_check_entries`` is to know of the Fisher."""
        return [(f"fisher_dict[{name!r}]", fisher, params[name], 0.0)]

    def displacement(self):
        """theta - theta*"""
        return _wide(self.param) - self.anchor

    def energy(self):
        """sum_i F_i (theta_i - theta*_i)^2"""
        d = self.displacement()
        return (self.fisher * d * d).sum()

    @torch.no_grad()
    def add_gradient(self, lambda_ewc):
        """grad += lambda F (theta - theta*)"""
        _dense_gradient(self.param).addcmul_(self.fisher, self.displacement(), value=lambda_ewc)

    @torch.no_grad()
    def proximal_step(self):
        """theta <- theta* + (theta - theta*) / (1 + r), with r = F times the waiting lr * lambda"""
        theta = _wide(self.param)
        self.param.copy_(torch.lerp(self.anchor, theta, self.share(self.fisher), out=theta))

    def share(self, stiffness):
        """1 / (1 + r), the share of the displacement that a proximal step leaves."""
        if self.waiting != self.rate:
            self.rate = self.waiting
            r = stiffness * min(self.rate, 1e30)  # no infinity times 0
            self.left = r.add_(1).reciprocal_()
        self.waiting = 0.0
        return self.left


class _KroneckerSpring(_Spring):
    """tr(G D A D^T) with D = [weight bias] - anchor, for the weights of one linear layer."""

    axes = None

    def hold(self, fisher, anchors):
        self.a, self.g = map(_wide, fisher)
        self.anchor = self.joined(anchors)

    @staticmethod
    def entries(name, params, fisher):
        first = next(iter(params.values()))
        sizes = sum(p[0].numel() for p in params.values()), len(first)
        squares = [first.new_empty(size, size) for size in sizes]
        titles = [f"fisher_dict[{name!r}], {side}" for side in "AG"]
        return [(*entry, -math.inf) for entry in zip(titles, fisher, squares)]

    def joined(self, tensors):
        """[weight bias]"""
        return torch.cat([_wide(t).reshape(len(t), -1) for t in tensors], 1)

    def displacement(self):
        return self.joined(self.params) - self.anchor

    def energy(self):
        d = self.displacement()
        return (d * _between(self.g, d, self.a)).sum()

    @torch.no_grad()
    def add_gradient(self, lambda_ewc):
        """grad += lambda G D A"""
        pull = _between(self.g, self.displacement(), self.a)
        self.add([_dense_gradient(p) for p in self.params], pull, lambda_ewc)

    @torch.no_grad()
    def proximal_step(self):
        """The same step as a diagonal spring's, in the basis of the factors' eigenvectors."""
        if self.axes is None:
            a, right = torch.linalg.eigh(self.a.cpu().double())
            g, left = torch.linalg.eigh(self.g.cpu().double())
            self.axes = left.to(self.g), right.to(self.a)
            self.stiffness = torch.outer(g, a).clamp_min(0).to(self.a)
        left, right = self.axes
        taken = (1 - self.share(self.stiffness)) * _between(left.T, self.displacement(), right)
        self.add(self.params, _between(left, taken, right.T), -1)

    def add(self, targets, pull, factor):
        parts = pull.split([t[0].numel() for t in targets], 1)
        for target, part in zip(targets, parts):
            target.add_(part.view_as(target), alpha=factor)


def _between(left, d, right):
    with torch.autocast(d.device.type, enabled=False):  # it would round to bfloat16
        return left @ d @ right


def _dense_gradient(p):
    """The gradient of p, made if there is none, dense."""
    p.grad = torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
    return p.grad


def _springs(model, fisher_dict, optimal_params, lambda_ewc):
    """The springs of all trainable parameters, after all checks."""
    if not hasattr(lambda_ewc, "__float__"):
        raise TypeError(f"lambda_ewc must be a number, got {lambda_ewc!r}")
    if not 0 <= lambda_ewc < math.inf:
        raise ValueError(f"lambda_ewc must be finite and at least 0, got {lambda_ewc!r}")
    if not isinstance(fisher_dict, Mapping) or not isinstance(optimal_params, Mapping):
        raise TypeError("fisher_dict and optimal_params must be dictionaries")
    params = _trainable(model)
    springs = []
    entries = []
    held = {"fisher_dict": [], "optimal_params": optimal_params}
    for name, fisher in fisher_dict.items():
        parts = [name]
        kind = _Spring
        if isinstance(fisher, tuple):
            parts = [f"{name}.{part}".lstrip(".") for part in ("weight", "bias")]
            kind = _KroneckerSpring
        own = {k: params[k] for k in parts if k in params}
        held["fisher_dict"] += own
        if own:  # else frozen, or unknown
            entries += kind.entries(name, own, fisher)
            springs.append((kind, name, own, fisher))
    for argument, given in (("fisher_dict", fisher_dict), ("optimal_params", optimal_params)):
        if lost := [name for name in params if name not in held[argument]]:
            remedy = "pad a new parameter with zeros, rename the entries, or freeze it"
            raise ValueError(f"{argument} lacks {lost}, it has {[*given]}: {remedy}")
    for name, p in params.items():
        entries.append((f"optimal_params[{name!r}]", optimal_params[name], p, -math.inf))
    _check_entries(entries)
    return [kind(*spring, optimal_params) for kind, *spring in springs]


def _check_entries(entries):
    """Raise unless each (entry, value, like, least) is a tensor like that, finite, >= least."""
    for entry, value, like, _ in entries:
        wanted = f"{tuple(like.shape)} on {like.device}"
        got = f"{tuple(value.shape)} on {value.device}" if torch.is_tensor(value) else repr(value)
        if got != wanted:
            raise ValueError(f"{entry} must be a tensor {wanted}, got {got}: .to(device)?")
        if value.numel() and value.data_ptr() == like.data_ptr():
            raise ValueError(f"{entry} is the live parameter: use take_anchor(model)")
    filled = [entry for entry in entries if entry[1].numel()]
    device = entries[0][1].device
    bounds = [b.float().to(device) for _, value, *_ in filled for b in value.aminmax()]
    bounds = torch.stack(bounds).tolist()  # one wait for the device
    for (entry, *_, least), low, high in zip(filled, bounds[::2], bounds[1::2]):
        if not math.isfinite(high - low) or low < least:
            wanted = "entries must be finite, a Fisher's >= 0"
            raise ValueError(f"{entry} holds {low}..{high}: {wanted}")


# -------- Fisher

LABELS = ("exact", "sampled", "empirical")


@torch.inference_mode(False)
def compute_fisher_information(model, data_loader, criterion, *, labels="exact", seed=0):
    """The diagonal Fisher information, a mean over the N examples of ``data_loader``.

    F_i = 1/N sum_n E_y [(d log p(y | x_n, theta) / d theta_i)^2]   (Martens 2020, sec. 5 and 11)

    data_loader: an iterable of batches (x, y); x is a tensor, a tuple for ``model(*x)`` or a
      dictionary for ``model(**x)``; or a dictionary with "labels". ``tqdm(loader)`` shows progress,
      ``itertools.islice(loader, k)`` takes a part of the task.
    criterion: CrossEntropyLoss or, on log-probabilities, NLLLoss (p is categorical),
      BCEWithLogitsLoss (Bernoulli), MSELoss (Gaussian of variance 1/2: for a loss that is half of
      it, halve F), without weights. For "empirical" any other mean over examples, too. F belongs
      to the function that ``model`` computes: for Q-values with MSELoss, to those of all actions.
    labels: "exact" is all y, weighted by the model's own p, in T (C - 1) backward passes for C
      classes at T positions (pixels, tokens), T C for BCE and MSE. "sampled" is one y drawn from p:
      one pass, unbiased. "empirical" is the y of the data: one pass, not the Fisher.

    Returns {name: tensor >= 0}, float32 or wider. log p sums over an example's positions, without
    ``ignore_index``. The model itself runs, in evaluation mode, and is left as it was; two threads
    need a copy each. Under torch.distributed the mean is over all processes. Raises TypeError,
    ValueError, FloatingPointError; warns where it has to go one example at a time.
    """
    likelihood = _Likelihood(criterion, labels, seed)
    fisher = {name: _wide(p.new_zeros(p.shape)) for name, p in _trainable(model).items()}
    count = 0
    with _recorder(model) as recorder:
        for x, y in recorder.batches(data_loader):
            for run in recorder.runs(x, y, likelihood):  # the batch, or where need be each example
                count += likelihood.counted(run.y).sum().item()
                for v in run.directions:  # sum_v v v^T = E_y[s s^T]
                    run.backward(v)  # g = J^T v at the outputs of every layer
                    for layer in run.linear:  # example n has the gradient g_n a_n^T, and ...
                        layer.g_squared.addcmul_(layer.g, layer.g)
                    for name, gradients in run.example_gradients():  # (examples, *shape)
                        fisher[name] += _sum_of_squares(gradients)
                for layer in run.linear:  # ... sum_v (g a^T)^2 = (sum_v g^2) (a^2)^T
                    if layer.weight in fisher:
                        squares = layer.g_squared.T @ layer.a**2
                        fisher[layer.weight] += squares.view_as(fisher[layer.weight])
                    if layer.bias in fisher:
                        fisher[layer.bias] += layer.g_squared.sum(0)
    return _divided(fisher, count)  # by N


def _sum_of_squares(gradients):
    """sum_n gradients[n]^2, in the order in which the numbers lie in memory."""
    order = sorted(range(1, gradients.dim()), key=gradients.stride, reverse=True)
    squares = gradients.permute(0, *order).square().sum(0)
    return squares.permute([order.index(d) for d in range(1, gradients.dim())])


# -------- training


def train_with_ewc(model, train_loader, criterion, optimizer, fisher_dict, optimal_params,
                   lambda_ewc, *, epochs=1, penalty="explicit", every=1, scheduler=None,
                   callback=None):  # fmt: skip
    """Minimise L_B(theta) + lambda_ewc / 2 * sum_i F_i (theta_i - theta*_i)^2, in place.

    train_loader, criterion, optimizer: batches as in ``compute_fisher_information``, a mean loss of
      (outputs, y), and what steps on all trainable weights.
    fisher_dict, optimal_params, lambda_ewc: as in ``ewc_loss``. lambda_ewc = 0 is plain training,
      bit for bit; the other two may then be None.
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
    params = _trainable(model)
    likelihood = _Likelihood(criterion)
    penalised = model, fisher_dict, optimal_params, lambda_ewc
    springs = _springs(*penalised) if lambda_ewc != 0 else []
    _check_training(train_loader, epochs, penalty, every, scheduler)
    groups = _checked_groups(params, springs, optimizer, penalty)
    start = [(t, t.detach().clone()) for t in (*params.values(), *model.buffers())]
    callback = callback or (lambda step, model: None)
    means = []
    step = 0
    with _mode(model, training=True):
        callback(step, model)
        for _ in range(epochs):
            losses = []
            for x, y in _batches(train_loader, start[0][0].device):
                optimizer.zero_grad()
                z = _logits(model, x, len(y))
                loss = criterion(z, likelihood.fitting(z, y))
                loss.backward()
                if penalty == "explicit":
                    for spring in springs:  # the penalty: grad += lambda F (theta - theta*)
                        spring.add_gradient(float(lambda_ewc))
                optimizer.step()
                step += 1
                if penalty == "implicit":
                    _proximal_steps(springs, lambda_ewc, groups, now=step % every == 0)
                if scheduler:
                    scheduler.step()
                losses.append(loss.item())
                _check_finite(math.isfinite(losses[-1]), start, step)
                callback(step, model)
            for spring in springs:
                spring.proximal_step()  # for what ``every`` has left over
            _check_finite(all(p.isfinite().all() for p in params.values()), start, step)
            means.append(_mean(losses))
    return means


def _mean(losses):
    if not losses:
        raise ValueError("train_loader gave 0 batches: it is empty or used up")
    return sum(losses) / len(losses)


def _proximal_steps(springs, lambda_ewc, groups, now):
    """Note a step of SGD; with momentum a gradient counts 1 / (1 - momentum) times."""
    for spring in springs:
        group = groups[spring.params[0]]
        damping = 1 - group["dampening"] if group["momentum"] else 1
        spring.waiting += float(lambda_ewc * group["lr"]) * damping / (1 - group["momentum"])
        if now:
            spring.proximal_step()


@torch.no_grad()
def _check_finite(finite, start, step):
    """Otherwise put the weights back and raise."""
    if not finite:
        for t, value in start:
            t.copy_(value)
        remedy = "penalty='implicit' or a smaller learning rate, or look for NaN in the data"
        fresh = "make a new optimizer, since its momentum may be spoilt"
        raise FloatingPointError(f"not finite at step {step}, weights put back: {remedy}; {fresh}")


def _check_training(train_loader, epochs, penalty, every, scheduler):
    if epochs > 1 and hasattr(train_loader, "__next__"):
        raise ValueError(f"train_loader serves 1 of {epochs} epochs: pass a list or a loader")
    known = every == 1 if penalty == "explicit" else every >= 1 and penalty == "implicit"
    if not known or epochs < 1:
        rule = "'explicit' with every=1, or 'implicit'; epochs and every at least 1"
        raise ValueError(f"penalty must be {rule}; got {penalty!r}, {every=}, {epochs=}")
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise TypeError("scheduler.step() follows every step: step ReduceLROnPlateau by yourself")


def _checked_groups(params, springs, optimizer, penalty):
    """{parameter: its optimizer group}, after checks."""
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    if lost := [name for name, p in params.items() if p not in groups]:
        raise ValueError(f"optimizer lacks {lost}: make it anew, or freeze them")
    if any(group.get("maximize") for group in groups.values()):
        raise ValueError("optimizer has maximize=True: it would repel the weights from theta*")
    if penalty == "implicit":
        if not all("dampening" in group for group in groups.values()):
            raise ValueError(f"penalty='implicit' is for SGD: use 'explicit' with {optimizer!r}")
        if any(group["momentum"] >= 1 for group in groups.values()):
            raise ValueError("penalty='implicit' needs a momentum below 1")
        for spring in springs:
            if len({groups[p]["lr"] for p in spring.params}) > 1:
                raise ValueError(f"weight and bias of {spring.name!r} need one learning rate")
    return groups


# -------- many tasks


class EWC:
    """The penalties of all tasks so far as one: ``fisher`` and ``anchor``, for ``ewc_loss``.

    "single": F = sum_k F_k at the newest anchor, Bayes' rule as a recursion (Huszar 2018).
    "online": F = gamma F + F_k, 0 < gamma <= 1, likewise (Schwarz et al. 2018, eq. 9).
    "separate": one penalty per task (Kirkpatrick et al. 2017); their sum pulls like F = sum_k F_k
      at the Fisher-weighted mean of the anchors. With weights and clients for tasks it is FedCurv;
      a Fisher of ones gives L2-SP and FedProx.
    torch.load(..., weights_only=True) reads a saved ``state_dict()``. Raises TypeError, ValueError.
    """

    def __init__(self, rule="single", *, gamma=1.0):
        if rule not in ("single", "online", "separate") or not 0 < gamma <= 1:
            raise ValueError(f"rule={rule!r}, gamma={gamma!r} unknown; gamma < 1 is for 'online'")
        if gamma != 1 and rule != "online":
            raise ValueError(f"rule={rule!r} takes no gamma={gamma!r}: gamma < 1 is for 'online'")
        self.rule = rule
        self.gamma = gamma
        self.n_tasks = 0
        self.fisher = {}
        self.anchor = {}

    def consolidate(self, fisher_dict, optimal_params, *, weight=1.0):
        """Add the task just learned; weight: its N_k over the N that lambda_ewc refers to."""
        if any(isinstance(fisher, tuple) for fisher in fisher_dict.values()):
            raise TypeError("fisher_dict holds Kronecker factors: add with nearest_kronecker_sum")
        names = (self.fisher or fisher_dict).keys()
        if not names == fisher_dict.keys() == optimal_params.keys():
            raise ValueError(f"every task needs {[*names | fisher_dict.keys()]}: pad with zeros")
        if not 0 < weight < math.inf:
            raise ValueError(f"weight must be finite and above 0, got {weight!r}")
        fishers = {}
        anchors = {}
        for name, new in fisher_dict.items():
            at = optimal_params[name].detach().clone()
            was = self.anchor.get(name, at)
            fisher = f"fisher_dict[{name!r}]", new, was, 0.0
            _check_entries([fisher, (f"optimal_params[{name!r}]", at, new, -math.inf)])
            fishers[name] = self.gamma * self.fisher.get(name, 0 * new) + weight * new.detach()
            anchors[name] = at
            if self.rule == "separate":
                share = (weight * new / fishers[name]).nan_to_num(1.0)  # 0 / 0: the newest
                anchors[name] = (share * at + (1 - share) * was).to(at.dtype)
        self.fisher = fishers
        self.anchor = anchors
        self.n_tasks += 1

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        vars(self).update({name: state[name] for name in vars(self)})


# -------- Kronecker


@torch.inference_mode(False)
def compute_kronecker_fisher(model, data_loader, criterion, *, labels="exact", seed=0):
    """The Kronecker-factored Fisher of a network of linear layers (Martens & Grosse 2015, eq. 1).

    F of a layer = G (x) A: A = mean_n a a^T over its inputs a, a 1 appended for a trainable bias,
    and G = mean_n E_y[g g^T] over the gradients g of its outputs. Exact for one example. Every
    trainable parameter must belong to an nn.Linear layer used once with one input an example.
    Returns {layer: (A, G)} for ``train_with_ewc``, with penalty="implicit" and every=8, say. The
    penalty is lambda_ewc / 2 tr(G D A D^T), D = [weight bias] - anchor (Ritter et al. 2018, eq. 9).
    """
    likelihood = _Likelihood(criterion, labels, seed)
    params = _trainable(model)
    factors = {}
    count = 0
    for name, layer in _unwrap(model).named_modules():
        if type(layer) is nn.Linear and layer.weight.requires_grad:
            one = layer.bias is not None and layer.bias.requires_grad
            for side, size in (("A", layer.in_features + one), ("G", layer.out_features)):
                factors[name, side] = _wide(layer.weight.new_zeros(size, size))
    with _recorder(model) as recorder:
        for x, y in recorder.batches(data_loader):
            for run in recorder.runs(x, y, likelihood):
                counted = likelihood.counted(run.y)
                count += counted.sum().item()
                layers = {k.name: k for k in run.linear if (k.name, "A") in factors}
                held = [name for layer in layers.values() for name in layer.names.values()]
                if lost := [name for name in params if name not in held]:
                    rule = "only nn.Linear layers, used once with one input, have factors"
                    raise ValueError(f"freeze {lost}: {rule}")
                for name, layer in layers.items():
                    ones = len(factors[name, "A"]) - layer.a.shape[1]
                    a = F.pad(layer.a, (0, ones), value=1.0)[counted]
                    factors[name, "A"] += a.T @ a
                for v in run.directions:
                    run.backward(v)
                    for name, layer in layers.items():
                        factors[name, "G"] += layer.g.T @ layer.g
    factors = _divided(factors, count)
    return {name: (factors[name, "A"], factors[name, "G"]) for name, side in factors if side == "A"}


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


# -------- lesson

STYLE = {"fine-tuning": ("#C44E00", "--"), "Adam": ("#A6307E", (0, (1, 1))),
         "L2": ("#8A6D00", "-."), "two numbers": ("#007F5F", (0, (7, 2))),
         "EWC": ("#0060B0", "-"), "Kronecker EWC": ("#1A1A1A", (0, (5, 1, 1, 1))),
         "joint": ("#6E6E6E", ":")}  # fmt: skip
FIGURES = {"figure.figsize": (7.5, 3.3), "figure.constrained_layout.use": True, "font.size": 9,
           "axes.spines.top": False, "axes.spines.right": False,
           "axes.titlelocation": "left"}  # fmt: skip


def side_by_side(function, jobs):
    """[function(*job) for job in jobs]: one thread a job, a job a core, and a progress bar."""
    from IPython.display import HTML, display

    bar = display(HTML(""), display_id=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = []
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for result in pool.map(function, *zip(*jobs)):
                results.append(result)
                bar.update(HTML(f"<progress value={len(results)} max={len(jobs)}></progress>"))
        return results
    finally:
        torch.set_num_threads(threads)
        bar.update(HTML(""))


def choose(run, grids):
    """Scores run(method, value) for every value of a grid, and the value with the best mean."""
    jobs = [(method, value) for method, values in grids.items() for value in values]
    scores = dict(zip(jobs, side_by_side(run, jobs)))
    trials = {m: {v: scores[m, v] for v in values} for m, values in grids.items()}
    return trials, {m: max(found, key=lambda v: sum(found[v])) for m, found in trials.items()}


def show(fig, **how):
    """Show a figure once, described by its titles for readers who cannot see it."""
    from IPython.display import display
    from matplotlib import pyplot as plt

    plt.close(fig)
    titles = [fig.get_suptitle(), *(ax.get_title("left") for ax in fig.axes)]
    text = ". ".join(filter(None, titles)).replace("\n", " ")
    return display(fig, metadata={"image/png": {"alt": text}}, **how)


def show_images(images, names, title, rows=1):
    """Images of 28 x 28 pixels in rows, each below its name."""
    from matplotlib import pyplot as plt

    size = 7.5, 0.4 + 0.9 * rows + 0.15 * names[0].count("\n")
    fig, axes = plt.subplots(rows, len(images) // rows, figsize=size, squeeze=False)
    for ax, image, name in zip(axes.flat, images, names):
        ax.imshow(image.reshape(28, 28), cmap="gray_r")
        ax.set_title(name, fontsize=9, loc="center")
        ax.axis("off")
    fig.suptitle(title, x=0.01, ha="left")
    show(fig)


def name_lines(ax, ends):
    """Beside each (x, y, method, text) the text, moved up where two would overlap."""
    y, top = ax.get_ylim()
    gap = 0.15 * (top - y) / ax.figure.get_figheight()
    for x, end, method, text in sorted(ends, key=lambda end: end[1]):
        y = max(end, y + gap)
        ax.text(x, y, f"  {text}", color=STYLE[method][0], va="center")


def plot_curves(ax, every, curves, title, *, ends=None, level=None, **options):
    """For each method the mean over the seeds (rows), and a band from the worst to the best."""
    labels = {"xlabel": "steps on the digits", "ylabel": "accuracy on the clothes (%)"}
    ax.set(title=title, **labels | options)
    names = []
    for method, rows in curves.items():
        color, line = STYLE[method]
        y = torch.atleast_2d(torch.as_tensor(rows)).numpy()
        x = range(0, every * y.shape[1], every)
        ax.plot(x, y.mean(0), color=color, ls=line, lw=2)
        ax.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.15, lw=0)
        end = " {:.0f} % (digits {:.0f} %)".format(*ends[method].mean(0)) if ends else ""
        names.append((x[-1], y[:, -1].mean(), method, method + end))
    ax.set_xlim(0, x[-1])
    if level:
        ax.axhline(level, color="0.6", lw=1, ls=":")
        ax.text(x[-1], level, "before", ha="right", va="bottom")
    name_lines(ax, names)


def plot_tradeoff(ax, trials, chosen, title, **options):
    """Accuracy on A over that on B: a dot per value in the frame's height, large where chosen."""
    ax.set(title=title, xlabel="accuracy on the digits, held out (%)",
           ylabel="accuracy on the clothes, held out (%)", **options)  # fmt: skip
    names = []
    for method, found in trials.items():
        color, line = STYLE[method]
        points = {v: (b, a) for v, (a, b) in found.items() if a > ax.get_ylim()[0]}
        ax.plot(*zip(*points.values()), color=color, ls=line, lw=2)
        for v, point in points.items():
            ax.plot(*point, "o", color=color, ms=10 if chosen[method] == v else 4)
            ax.annotate(f"{v:g}", point, (-6, 7), textcoords="offset points", color=color)
        names.append((*max(points.values()), method, method))
    name_lines(ax, names)


def table(header, rows):
    """Print rows {name: entries} in Markdown. A tensor over seeds: mean ± standard deviation."""

    def shown(v):
        if torch.is_tensor(v) and v.dim():
            v = f"{v.mean():.1f} ± {v.std():.1f}"
        return v if isinstance(v, str) else f"{v:.3g}"

    cells = [header.split(" | "), *([shown(v) for v in (k, *row)] for k, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    for row in cells:
        print("|", " | ".join(cell.ljust(width) for cell, width in zip(row, widths)), "|")
    print()


# -------- engine: you need not read on
#
# How the gradient of each example is found for any module, how it is checked, and what is put back.

TOGETHER = 1024, 2**24  # the most examples in one pass, and the bytes that may be kept for them
PRODUCTS = 2**22  # numbers in the gradients of some examples

FAMILIES = {
    "categorical": (nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss),
    "Bernoulli": (nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits),
    "Gaussian": (nn.MSELoss, F.mse_loss),
}


class _Likelihood:
    """log p(y | z) of the outputs z, as the criterion names it, and its score s = d log p / d z."""

    def __init__(self, criterion, labels=None, seed=0):  # no labels: for training
        kinds = criterion, type(criterion)
        families = [k for k, members in FAMILIES.items() if any(m in kinds for m in members)]
        self.criterion = criterion
        self.labels = labels
        self.family = families[0] if families else "other"
        nothing = -100 if self.family == "categorical" else math.nan
        self.ignore_index = getattr(criterion, "ignore_index", nothing)
        rank = distributed.get_rank() if _is_distributed() else 0
        self.generator = torch.Generator("cpu").manual_seed(seed + 10007 * rank)
        if getattr(criterion, "reduction", "mean") not in ("mean", "batchmean"):
            raise ValueError(f"criterion must take the mean, got {criterion!r}")
        if labels not in (None, *LABELS):
            raise ValueError(f"labels must be one of {LABELS}, got {labels!r}")
        if self.family == "other" and labels in ("exact", "sampled"):
            remedy = "take labels='empirical', CrossEntropyLoss, BCEWithLogitsLoss or MSELoss"
            raise ValueError(f"criterion {criterion!r} names no distribution: {remedy}")
        for option in ("weight", "pos_weight", "label_smoothing"):
            value = getattr(criterion, option, None)
            if labels and families and (torch.is_tensor(value) or value):
                remedy = f"take a plain {type(criterion).__name__}() for the Fisher"
                raise ValueError(f"criterion has {option}={value}: {remedy}, this one for training")

    def directions(self, z, y):
        """Vectors v like z, one for each pass, with sum_v v v^T = E_y[s s^T] for each example."""
        wide = _wide(z.detach())
        for v in self.roots(wide, y) if self.labels == "exact" else [self.score(wide, y)]:
            yield v.to(z.dtype)

    def roots(self, z, y):
        """The columns of a root of the covariance of s."""
        passes = z[0].numel()
        if self.family == "categorical":
            passes -= passes // len(z[0])
        if passes > 1000:
            text = f"labels='exact' takes {passes} backward passes for each batch, 'sampled' one"
            warnings.warn(text, stacklevel=2)
        if self.family != "categorical":  # independent outputs: one direction for each
            variance = z.sigmoid() * (-z).sigmoid() if self.family == "Bernoulli" else 0 * z + 2
            for one in torch.eye(passes, device=z.device):
                yield variance.sqrt() * one.view_as(z[0])
            return
        # Draw y in C - 1 independent steps, "c or a later class": one direction for each.
        counted = (y != self.ignore_index).movedim(0, -1)
        rows = z.movedim(0, -1).contiguous().softmax(0) * counted
        p = rows.reshape(len(rows), -1, len(z))  # (classes, positions, examples)
        q = p.flip(0).cumsum(0).flip(0).clamp_min(torch.finfo(p.dtype).tiny)  # c or later
        root = (p[:-1] * q[1:] / q[:-1]).sqrt()
        later = -root / q[1:]
        for t in range(p.shape[1]):
            for c in range(p.shape[0] - 1):
                v = torch.zeros_like(p)
                v[c, t] = root[c, t]
                v[c + 1 :, t] = p[c + 1 :, t] * later[c, t]
                yield v.view_as(rows).movedim(-1, 0)

    def score(self, z, y):
        """d log p(y | z) / d z"""
        if self.family == "categorical":
            one = F.one_hot(y.clamp(0, z.shape[1] - 1), z.shape[1]).movedim(-1, 1)
            return (one - z.softmax(1)) * (y != self.ignore_index).unsqueeze(1)
        if self.family == "Bernoulli":
            return y - z.sigmoid()
        if self.family == "Gaussian":
            return 2 * (y - z)
        z = z.detach().requires_grad_()
        alone = sum(self.criterion(z[i : i + 1], y[i : i + 1]) for i in range(len(z)))
        (score,) = torch.autograd.grad(-alone, z)
        (batch,) = torch.autograd.grad(-self.criterion(z, y), z)
        if (score - len(z) * batch).abs().max() > 1e-3 * score.abs().max() + 1e-30:
            remedy = "the Fisher needs a plain mean over examples"
            raise ValueError(f"criterion {self.criterion!r} mixes or weights examples: {remedy}")
        return score

    def labelled(self, z, y):
        """y as it fits the outputs z, checked; drawn from p(y | z) for "sampled"."""
        y = self.fitting(z, y)
        z = _wide(z.detach())
        negative_log = self.criterion is F.nll_loss or type(self.criterion) is nn.NLLLoss
        if negative_log and (z.logsumexp(1).abs() > 0.01).any():
            raise ValueError("criterion NLLLoss needs log-probabilities: end with log_softmax")
        if self.labels != "sampled":
            return y
        # by the inverse of the distribution function: the same numbers for every batch size
        u = torch.rand(y.shape, generator=self.generator, device="cpu").to(z).clamp_min(2**-25)
        if self.family == "categorical":
            drawn = (z.softmax(1).cumsum(1) < u.unsqueeze(1)).sum(1).clamp_max(z.shape[1] - 1)
            return drawn.where(y != self.ignore_index, y)
        if self.family == "Bernoulli":
            return (u < z.sigmoid()).to(z)
        return z + torch.special.ndtri(u) / 2**0.5

    def fitting(self, z, y):
        """The labels y as the criterion takes them for the outputs z, or an error."""
        if self.family == "other":
            return y
        if self.family == "categorical":
            soft = y.is_floating_point() and y.shape == z.shape
            return y if soft and not self.labels else _class_indices(z, y, self.ignore_index)
        if y.shape != z.shape:
            got = f"{tuple(y.shape)} for outputs {tuple(z.shape)}"
            raise ValueError(f"labels y must be targets {tuple(z.shape)}, got {got}")
        if self.family == "Bernoulli" and y.numel() and not 0 <= y.min() <= y.max() <= 1:
            raise ValueError(f"labels y must lie in 0..1, got {y.min()}..{y.max()}")
        return y.to(z.dtype)

    def counted(self, y):
        """Which examples are not ignored."""
        return (y != self.ignore_index).reshape(len(y), -1).any(1)


@contextlib.contextmanager
def _recorder(model):
    """A ``_Recorder`` of the model, in evaluation mode; afterwards all is as it was."""
    recorder = _Recorder(_unwrap(model))
    kind = recorder.device.type
    with (
        _failing_together(recorder.device),
        torch.autocast(kind, enabled=False),  # products in float32
        torch.enable_grad(),
        _untouched(recorder.net),
        contextlib.ExitStack() as hooks,
    ):
        inside = set()
        for module in recorder.modules:  # parents first: each owns all that is in it
            own = any(id(p) in recorder.names for p in module.parameters(recurse=False))
            own = own and not isinstance(module, torch.jit.ScriptModule)  # it takes no hooks
            if own and module not in inside:
                inside.update(module.modules())
                hook = module.register_forward_hook(recorder.note, prepend=True, with_kwargs=True)
                hooks.callback(hook.remove)
        yield recorder


class _Recorder:
    """Runs the caller's own model and takes its batches apart into the gradients of the examples.

    Forward hooks note each call of a module that owns trainable parameters: its inputs, and the
    place of its outputs in the graph. One backward pass to these places gives g at all of them, and
    from a call's inputs and g follow the gradients of its parameters, example by example. Some
    examples are run alone, too, and autograd's own gradient is the judge: where the two differ,
    the batch goes one example at a time, which is right by definition.
    """

    def __init__(self, net):
        self.net = net
        self.params = _trainable(net)
        self.device = next(iter(self.params.values())).device
        self.names = {id(p): name for name, p in self.params.items()}
        self.modules = {module: name for name, module in net.named_modules()}
        self.thread = threading.get_ident()
        self.calls = None
        self.limits = {}  # how many examples of a kind go together
        self.turns = Counter()  # how many batches of a kind there were
        self.slow = set()  # the kinds that go one example at a time
        self.random = random.Random(0)
        kind = self.device.type
        outside = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        self.autocast = lambda: torch.autocast(kind, *outside)
        for module, name in self.modules.items():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                raise ValueError(f"{name!r} mixes examples: it needs track_running_stats=True")

    def note(self, module, args, *more):
        if self.calls is not None and threading.get_ident() == self.thread:
            kwargs, output = more
            found = {i: t for i, t in enumerate(_leaves(output)) if _has_gradient(t)}
            edges = {i: get_gradient_edge(t) for i, t in found.items()}  # before it is changed
            if found:
                self.calls.append((module, (args, kwargs), edges, list(found.values())))

    def batches(self, loader):
        """The loader's batches; small ones are joined, and large ones cut, where memory asks it."""
        for key, group in itertools.groupby(_batches(loader, self.device), _key):
            held = []
            waiting = 0  # how many examples are held
            for batch in group:
                size = len(batch[1])
                # A batch of more than half the limit goes by itself, without a copy.
                if held and max(waiting, size) + size > self.limits[key]:
                    yield _joined(held)
                    held = []
                    waiting = 0
                start = 0
                while start < size and 2 * (size - start) > self.limits.get(key, 1):
                    stop = start + self.limits.get(key, 1)  # 1: to learn how many fit
                    yield _rows(batch, start, stop)
                    start = stop
                if start < size:  # a copy: the loader may fill its memory again
                    held.append(_mapped(torch.clone, _rows(batch, start, size)))
                    waiting += size - start
            if held:
                yield _joined(held)

    def runs(self, x, y, likelihood):
        """The batch in one run; or, where it cannot be taken apart, each example in its own."""
        key = _key((x, y))
        if key not in self.slow:
            try:
                yield self.judged(key, x, y, likelihood)
                return
            except _Inseparable as reason:
                if not self.slow:
                    warnings.warn(f"the Fisher runs one example at a time: {reason}", stacklevel=4)
                self.slow.add(key)
        for i in range(len(y)):
            z = self.outputs(x, y, i)
            yield _Alone(self.params, z, likelihood.labelled(z, y[i : i + 1]), likelihood)

    def outputs(self, x, y, i=None):
        """The outputs of all examples, or of example i alone."""
        if i is not None:
            x, y = _rows((x, y), i, i + 1)
        with self.autocast():
            return _logits(self.net, x, len(y))

    def kept(self, x, y):
        """The bytes that autograd keeps of a forward pass, without the weights."""
        weights = {p.data_ptr() for p in self.net.parameters()}
        sizes = []

        def count(t):
            if t.layout == torch.strided and t.data_ptr() not in weights:
                sizes.append(t.nbytes)

        with saved_tensors_hooks(count, lambda nothing: nothing):
            self.outputs(x, y)
        return sum(sizes)

    def judged(self, key, x, y, likelihood):
        """The run of a batch, if autograd confirms it. Raises _Inseparable if not."""
        n = len(y)
        turn = self.turns[key]
        self.turns[key] += 1
        self.calls = []
        z = self.outputs(x, y)
        calls = self.calls
        self.calls = None
        chosen = {0, n - 1, self.random.randrange(n)} if turn < 2 else {self.random.randrange(n)}
        alone = {i: self.outputs(x, y, i) for i in chosen}
        noise = _rounding([z, *(t for call in calls for t in call[-1])])
        self.check_outputs(x, y, z, alone, noise)
        run = _Batch(self, calls, z, likelihood.labelled(z, y), likelihood)
        if not calls:
            raise _Inseparable("no module uses its parameters in its own forward")
        if key not in self.limits:
            size = self.kept(x, y) + sum(call.held for call in run.calls)
            self.limits[key] = max(1, min(TOGETHER[0], TOGETHER[1] * n // (1 + size)))
        self.judge(run, turn, alone, noise)
        return run

    def judge(self, run, turn, alone, noise):
        """Compare the first direction's gradients with autograd's. Raises _Inseparable."""
        v = next(run.directions)
        run.backward(v)
        run.directions = itertools.chain([v], run.directions)
        if turn < 2 or turn % 8 == 0:
            for i, z_i in alone.items():
                rows = slice(i, i + 1)
                self.compare(z_i, v[rows], run.summed(rows), noise)
        # All examples: now and then, and always where x holds numbers such as those of padding.
        if turn % 32 == 1 or any(call.numbered for call in run.calls):
            self.compare(run.z, v, run.summed(slice(len(v))), noise)

    def check_outputs(self, x, y, z, alone, noise):
        """Raise unless the outputs are finite and those of an example do not depend on others."""
        if not z.requires_grad:
            raise ValueError("model outputs do not depend on any trainable parameter")
        z = z.detach()
        if not z.max() < math.inf:
            raise ValueError("outputs are not finite: NaN or huge numbers in x or the weights")
        size = z.abs().nan_to_num(posinf=0).amax(0)
        floor = size.flatten().sort().values[size.numel() // 4]  # some may be masked by -1e9

        def differ(a, b):
            apart = (a - b).detach().abs() > _tolerance(noise) * size + noise * floor
            return (apart & (a != b)).any()

        for i, z_i in alone.items():
            if len(z) != len(y) or z[i : i + 1].shape != z_i.shape:
                got = f"{tuple(z.shape)} for {len(y)} examples, {tuple(z_i.shape)} for one"
                raise ValueError(f"outputs must have a row for each example, got {got}")
            if differ(z[i : i + 1], z_i):
                if differ(self.outputs(x, y, i), z_i):
                    raise ValueError("outputs are random: two passes differ (dropout, noise)")
                raise ValueError("a batch has other outputs: no example may influence another")

    def compare(self, z, v, found, noise):
        """Raise unless the gradients found are autograd's own."""
        wanted = _gradients(z, self.params, v)
        norms = {name: g.norm() for name, g in wanted.items()}
        floor = 10 * noise * max(norms.values(), default=0)
        for name in self.params.keys() & (wanted.keys() | found.keys()):
            apart = (wanted.get(name, 0) - found.get(name, 0)).norm()
            if not apart <= _tolerance(noise) * norms.get(name, 0) + floor:
                raise _Inseparable(f"{name!r} has another gradient: used outside of its module?")


class _Inseparable(Exception):  # noqa: N818
    """A batch that cannot be taken apart into the gradients of its examples."""


class _Alone:
    """The run of one example: autograd's own gradients."""

    linear = ()

    def __init__(self, params, z, y, likelihood):
        self.params = params
        self.z = z
        self.y = y
        self.directions = likelihood.directions(z, y)

    def backward(self, v):
        self.found = _gradients(self.z, self.params, v)

    def example_gradients(self):
        return ((name, g.unsqueeze(0)) for name, g in self.found.items())


class _Batch:
    """The run of a batch: the calls of its modules."""

    v = None

    def __init__(self, recorder, calls, z, y, likelihood):
        self.z = z
        self.y = y
        self.directions = likelihood.directions(z, y)
        self.calls = []
        for module, *call in calls:
            kind = _ProductCall if _is_product(module) else _Call
            self.calls.append(kind(recorder, len(y), module, *call))
        names = [name for call in self.calls for name in call.names.values()]
        alone = [c for c in self.calls if all(names.count(k) == 1 for k in c.names.values())]
        self.linear = [call for call in alone if call.single]
        self.groups = [[call] for call in alone if not call.single]
        self.groups.append([call for call in self.calls if call not in alone])
        for layer in self.linear:
            layer.g_squared = layer.a.new_zeros(len(y), layer.width)

    def backward(self, v):
        """g = J^T v at the outputs of every call."""
        if v is not self.v:
            self.v = v
            edges = [edge for call in self.calls for edge in call.edges]
            found = torch.autograd.grad(self.z, edges, v, retain_graph=True, allow_unused=True)
            for call in self.calls:
                call.receive(found[: len(call.edges)])
                found = found[len(call.edges) :]

    def example_gradients(self, rows=slice(None)):
        """(name, gradients of some of these examples), for all calls but the linear ones."""
        first, last, _ = rows.indices(len(self.y))
        for calls in filter(None, self.groups):
            numbers = sum(p.numel() for call in calls for p in call.params.values())
            size = max(1, PRODUCTS // (1 + numbers))
            for start in range(first, last, size):
                sums = {}  # over the calls
                for call in calls:
                    for name, g in call.gradients(slice(start, min(start + size, last))):
                        _add(sums, name, g)
                yield from sums.items()

    def summed(self, rows):
        """{name: gradient}, the sum over these examples."""
        sums = {}
        for layer in self.linear:
            g = layer.g[rows]
            product = (g.T @ layer.a[rows]).view_as(layer.module.weight)
            sums |= {layer.weight: product, layer.bias: g.sum(0)}
        for name, g in self.example_gradients(rows):
            _add(sums, name, g.sum(0))
        return sums


class _Call:
    """A call of any module: vmap gives every example its own copy of the module's parameters."""

    single = False  # whether the gradient of an example is one product g a^T

    def __init__(self, recorder, n, module, inputs, edges, outputs):
        self.n = n
        self.module = module
        self.name = recorder.modules[module]
        self.title = f"{self.name!r} ({type(module).__name__})"
        self.params = {k: p for k, p in module.named_parameters() if id(p) in recorder.names}
        self.names = {k: recorder.names[id(p)] for k, p in self.params.items()}
        self.places, self.edges = zip(*edges.items())
        self.rows = len(outputs[0]) if outputs[0].dim() else 0
        numbers = [t for t in _leaves(inputs) if torch.is_tensor(t) and not t.is_floating_point()]
        self.numbered = bool(numbers) and type(module) is not nn.Embedding
        self.prepare(recorder, inputs)

    def split(self, t):
        """(rows, ...) as (examples, rows of each, ...)"""
        if t.dim() == 0 or len(t) != self.rows or self.rows % self.n:
            raise _Inseparable(f"{self.title} sees {tuple(t.shape)} for {self.n} examples")
        return t.detach().unflatten(0, (self.n, -1))

    def prepare(self, recorder, inputs):
        """Run the module once more, with a copy of its parameters for each example."""

        def has_rows(t):
            return torch.is_tensor(t) and t.dim() > 0 and len(t) == self.rows

        def alone(copies, rows):
            rows = iter(rows)
            own = _mapped(lambda t: next(rows) if has_rows(t) else t, inputs)
            leaves = _leaves(functional_call(self.module, copies, *own))
            return [leaves[i] for i in self.places]

        copies = {k: p.detach().expand(self.n, *p.shape) for k, p in self.params.items()}
        self.copies = {k: p.requires_grad_() for k, p in copies.items()}
        self.held = 4 * sum(p.numel() for p in copies.values())
        try:
            rows = [self.split(t) for t in _leaves(inputs) if has_rows(t)]
            with recorder.autocast():
                self.outputs = vmap(alone)(self.copies, rows)
        except Exception as error:  # of many kinds: what vmap cannot do
            raise _Inseparable(f"vmap cannot run {self.title}: {error}") from error

    def receive(self, g):
        z = [z for z, t in zip(self.outputs, g) if t is not None]
        v = [self.split(t).to(z.dtype) for z, t in zip(self.outputs, g) if t is not None]
        try:
            self.found = _gradients(z, self.copies, v)
        except RuntimeError as error:  # sparse gradients
            raise _Inseparable(f"vmap cannot run {self.title}: {error}") from error
        if type(self.module) is nn.Embedding and self.module.padding_idx is not None:
            for g in self.found.values():
                g[:, self.module.padding_idx] = 0  # vmap does not know of it

    def gradients(self, rows):
        """(name, gradients) of the examples in these rows."""
        return ((self.names[k], g[rows]) for k, g in self.found.items())


def _is_product(module):
    """Whether the module is a linear layer or a convolution, just as torch defines them."""
    if "forward" in vars(module) or "weight" not in module._parameters:
        return False  # patched, or its weight is computed
    if type(module) is nn.Conv2d:
        ordinary = module.groups == 1 and module.padding_mode == "zeros"
        return ordinary and not isinstance(module.padding, str)
    return type(module) is nn.Linear


class _ProductCall(_Call):
    """nn.Linear, nn.Conv2d: an example's gradient is g^T a, with a row of each for every position.

    The rows of ``a`` are the inputs of the layer, or the patches of the image under the outputs.
    """

    def prepare(self, recorder, inputs):
        (a,) = (self.split(t) for t in _leaves(inputs) if torch.is_tensor(t))
        self.weight = self.names.get("weight")
        self.bias = self.names.get("bias")
        self.width = len(self.module.weight)
        self.held = 0
        self.conv = self.module if type(self.module) is nn.Conv2d else None
        if self.conv:
            if a.dim() != 5:
                raise _Inseparable(f"{self.title} sees one image at a time")
            how = self.conv.kernel_size, self.conv.dilation, self.conv.padding, self.conv.stride
            a = F.unfold(a.flatten(0, 1), *how).mT
            self.held = a.nbytes
        self.a = _wide(a).reshape(self.n, -1, a.shape[-1])
        self.single = self.a.shape[1] == 1
        if self.single:
            self.a = self.a[:, 0]

    def receive(self, g):
        (g,) = g
        shape = (*self.a.shape[:-1], self.width)
        if g is None:  # an output that is not used
            self.g = self.a.new_zeros(shape)
        else:
            self.g = _wide(g.flatten(2).mT if self.conv else g).reshape(shape)

    def gradients(self, rows):
        a, g = (t[rows].reshape(len(t[rows]), -1, t.shape[-1]) for t in (self.a, self.g))
        if self.weight:
            yield self.weight, (g.mT @ a).view(len(g), *self.module.weight.shape)
        if self.bias:
            yield self.bias, g.sum(1)


# -------- small parts of the sections above


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
    sharded = any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())
    if sharded or any(hasattr(p, "device_mesh") for p in params.values()):
        raise TypeError("model is sharded (FullyShardedDataParallel): gather it on one device")
    return params


def _logits(model, x, n):
    """The outputs of the model for the n examples x: a tensor (n, ...)."""
    if isinstance(x, Mapping):
        output = model(**x)
    else:
        output = model(*x) if isinstance(x, (tuple, list)) else model(x)
    z = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(z, (tuple, list)):
        tensors = [t for t in z if torch.is_tensor(t)]
        z = tensors[0] if len(tensors) == 1 else z
    if not torch.is_tensor(z):
        got = _mapped(lambda t: tuple(t.shape), output)
        raise TypeError(f"model must return a tensor, or something with 'logits', got {got!r}")
    # squeeze() at the end of forward drops the batch dimension of a single example.
    return z[None] if n == 1 and (z.dim() == 0 or len(z) != 1) else z


def _class_indices(z, y, ignore_index=-100):
    """y as class indices for the outputs z (n, C, ...), or an error."""
    wanted = z.shape[:1] + z.shape[2:]
    if y.shape != wanted or y.is_floating_point() or z.dim() < 2 or z.shape[1] < 2:
        rule = f"class indices, of two classes or more, {tuple(wanted)}"
        got = f"{y.dtype} {tuple(y.shape)} for outputs {tuple(z.shape)}"
        raise ValueError(f"labels y must be {rule}, got {got}")
    y = y.long()
    wrong = ((y < 0) | (y >= z.shape[1])) & (y != ignore_index)
    if wrong.any():
        raise ValueError(f"labels y must lie in 0..{z.shape[1] - 1}, got {y[wrong][0]}")
    return y


def _batches(loader, device):
    """The batches of a loader as (inputs, targets), checked, on the device."""

    def place(t):
        t = t.to(device)
        return t.clone() if t.is_inference() else t

    for batch in loader:
        x = batch
        y = None
        if isinstance(batch, Mapping) and "labels" in batch:
            x = {name: t for name, t in batch.items() if name != "labels"}
            y = batch["labels"]
        elif isinstance(batch, (tuple, list)) and len(batch) == 2:
            x, y = batch
        x = dict(x) if isinstance(x, Mapping) else x
        first = _leaves(x)[0] if isinstance(x, (tuple, list, dict)) and x else x
        shapes = [tuple(t.shape) if torch.is_tensor(t) else "" for t in (first, y)]
        if not all(shapes) or shapes[0][0] != shapes[1][0]:
            rule = "tensors (x, y), examples first, or ((x1, x2), y), or a dict with 'labels'"
            got = [shape or type(t).__name__ for t, shape in zip((x, y), shapes)]
            raise TypeError(f"a loader must yield {rule}; got {got}")
        if len(y):
            yield _mapped(place, x), place(y)


def _rows(batch, start, stop):
    """Examples start to stop of a batch (x, y)."""
    n = len(batch[1])
    return _mapped(lambda t: t[start:stop] if t.dim() and len(t) == n else t, batch)


def _joined(batches):
    """One batch of several."""
    sizes = [len(y) for _, y in batches]

    def join(*parts):
        return torch.cat(parts) if [len(t) for t in parts if t.dim()] == sizes else parts[-1]

    return _mapped(join, *batches)


def _leaves(tree):
    """The tensors, and what else there is, in tuples, lists and dictionaries."""
    parts = list(tree.values()) if isinstance(tree, Mapping) else tree
    if isinstance(parts, (tuple, list)):
        return [leaf for part in parts for leaf in _leaves(part)]
    return [tree]


def _mapped(function, tree, *others):
    """The same tuples, lists and dictionaries, with function(tensor, *others) for each tensor."""
    if isinstance(tree, dict):
        return {k: _mapped(function, t, *(other[k] for other in others)) for k, t in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(_mapped(function, *leaves) for leaves in zip(tree, *others))
    return function(tree, *others) if torch.is_tensor(tree) else tree


def _key(x):
    """What batches of one kind have in common: shapes but for the examples, and types."""
    return tuple((t.shape[1:], t.dtype) if torch.is_tensor(t) else str(t) for t in _leaves(x))


@contextlib.contextmanager
def _mode(model, training):
    """Training or evaluation mode. Afterwards every module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        if model.training != training or not training:
            model.train(training)
        yield
    finally:
        model.train(modes[0][1])  # a module's own train() may do more than set the flag
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _untouched(net):
    """Evaluation mode, by the flags alone. Afterwards flags, attributes, buffers are as before."""
    modules = list(net.modules())
    spaces = [s for m in modules for s in (vars(m), vars(m).get("_buffers")) if isinstance(s, dict)]
    before = [(module.training, module) for module in modules], [(s, dict(s)) for s in spaces]
    limited = [module.weight for module in modules if getattr(module, "max_norm", None)]
    values = [(t, t._version, t.detach().clone()) for t in (*net.buffers(), *limited)]
    try:
        for module in modules:
            module.training = False
            if isinstance(module, nn.RNNBase) and module.weight_ih_l0.is_cuda:
                module.training = True  # cuDNN has no other backward pass
                module.dropout = 0.0
        yield
    finally:
        for training, module in before[0]:
            module.training = training
        for space, content in before[1]:
            space.update(content)
        with torch.no_grad():
            for t, version, value in values:
                if t._version != version:
                    t.copy_(value)


def _rounding(tensors):
    """The relative rounding error of the narrowest arithmetic in use."""
    noise = max(torch.finfo(t.dtype).eps for t in tensors if _has_gradient(t))
    if torch.get_float32_matmul_precision() != "highest":
        noise = max(noise, torch.finfo(torch.bfloat16).eps)
    return max(noise, 2**-11) if tensors[0].is_cuda and noise > 1e-12 else noise  # TF32


def _tolerance(noise):
    """The relative error that rounding can explain, far above the noise where it is small."""
    return min(noise**0.5, max(3e-4, 10 * noise))


def _gradients(z, inputs, v):
    """{name: J^T v}, in float32 or wider, for the inputs that z depends on."""
    z = _leaves(z)
    if not z or not all(map(_has_gradient, z)):
        return {}
    how = {"retain_graph": True, "allow_unused": True}
    found = torch.autograd.grad(z, [*inputs.values()], _leaves(v), **how)
    return {name: _wide(g.to_dense()) for name, g in zip(inputs, found) if g is not None}


def _has_gradient(t):
    return torch.is_tensor(t) and t.requires_grad


def _wide(t):
    """t in float32, or in its own type where that is wider."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _add(sums, name, t):
    sums[name] = sums[name] + t if name in sums else t


def _is_distributed():
    return distributed.is_available() and distributed.is_initialized()


@contextlib.contextmanager
def _failing_together(device):
    """An error in one process of torch.distributed is an error in all."""
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    if _is_distributed():
        failures = torch.tensor(int(failure is not None), device=device)
        distributed.all_reduce(failures)
        if failures and failure is None:
            failure = RuntimeError("the Fisher failed in another process")
    if failure is not None:
        raise failure


def _divided(sums, count):
    """sums / count, over all processes of torch.distributed."""
    if _is_distributed():
        total = torch.tensor(count, device=next(iter(sums.values())).device)
        for t in (total, *sums.values()):
            distributed.all_reduce(t)
        count = total.item()
    if not count:
        raise ValueError("data_loader gave 0 examples: it is empty, used up or ignored")
    for name, total in sums.items():
        if not total.div_(count).isfinite().all():
            raise FloatingPointError(f"Fisher of {name!r} is not finite: clean y, scale x down")
    return sums
