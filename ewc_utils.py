"""Elastic Weight Consolidation: the data, the Fisher, the penalty, the training, the figures.

The one equation (Kirkpatrick et al. 2017, eq. 3), with every convention said once:

    L(theta) = L_B(theta) + lambda_ewc / 2 * sum_i F_i (theta_i - theta*_i)^2

L_B      mean loss over the examples of task B: ``criterion`` with reduction="mean"
F_i      diagonal Fisher of task A: the MEAN over its examples of squared per-example gradients
theta*   the anchor: the weights right after task A, fixed from then on (``take_anchor``)
1/2      stands in the penalty, so that its gradient is lambda_ewc * F * (theta - theta*)

With these conventions Bayes' rule gives lambda_ewc = N_A / N_B, the ratio of the numbers of examples.
Dependencies run one way: notebook -> ewc_utils -> torch.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import signal
import socket
import struct
import threading
import time
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call, vjp, vmap
from torch.nn import functional as F

# ---------------------------------------------------------------- data

SAMPLE = Path(__file__).resolve().parent / "tests" / "data"
TIMEOUT = 10.0  # seconds that a download host may stay silent


class Task(NamedTuple):
    """One classification task, wholly in memory.

    x: float32 in [0, 1], (examples, 1, 28, 28); y: int64, (examples,). ``source`` is "full data" or "bundled sample".
    """

    name: str
    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    classes: list[str]
    source: str


class TensorLoader:
    """Mini-batches cut from tensors in memory: an epoch spends no measurable time on loading.

    x, y: tensors of one length; batch_size: positive; shuffle: a new permutation every epoch; seed: a new loader with
    the same seed repeats the same epochs. Yields (x, y), the last one possibly shorter. Raises ValueError.
    """

    def __init__(self, x, y, batch_size=128, *, shuffle=True, seed=0):
        if len(x) != len(y) or len(x) == 0:
            raise ValueError(f"x and y must have one length above 0, got {len(x)} and {len(y)}: pass matching tensors")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}: try 128")
        self.x, self.y, self.batch_size, self.shuffle = x, y, int(batch_size), shuffle
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self):
        return math.ceil(len(self.x) / self.batch_size)

    def __iter__(self):
        order = torch.randperm(len(self.x), generator=self.generator) if self.shuffle else None
        for i in range(0, len(self.x), self.batch_size):
            rows = slice(i, i + self.batch_size)
            rows = rows if order is None else order[rows]
            yield self.x[rows], self.y[rows]


def load_tasks(*names, root=None):
    """Load "FashionMNIST" and/or "MNIST" as ``Task``s, all from the same source.

    Looked for in this order: ``root``, or the folder named by the environment variable EWC_DATA; ``data/``;
    torchvision's download into ``data/``; the bundled sample (5,000 + 1,000 real images each), which is announced.
    Raises FileNotFoundError when ``root`` or EWC_DATA lacks a file, ValueError when a file is damaged or a name unknown.
    """
    from torchvision import datasets

    unknown = [name for name in names if name not in ("FashionMNIST", "MNIST")]
    if unknown or not names:
        raise ValueError(f"names must be 'FashionMNIST' or 'MNIST', got {unknown or names}: pass one or both")
    makers = [getattr(datasets, name) for name in names]
    root, source = root or os.environ.get("EWC_DATA"), "full data"
    if root is None:
        root = Path("data")
        if not _download(makers, root):
            root, source = SAMPLE, "bundled sample"
    return [_read_task(maker, Path(root), source) for maker in makers]


def _download(makers, root):
    """True when all files lie under ``root`` in the end; otherwise say in three lines why not, and what is used instead."""
    for maker in makers:
        if all(path.exists() for path in _raw_files(maker, root)):
            continue
        print(f"Downloading {maker.__name__} to {root}/ (once, about 90 MB on disk) ...", flush=True)
        timeout = socket.getdefaulttimeout()
        try:
            socket.setdefaulttimeout(TIMEOUT)  # torchvision sets none: a silent host would hang for ever
            with contextlib.redirect_stderr(io.StringIO()):
                maker(root, download=True)
        except (OSError, RuntimeError, EOFError, ValueError) as error:
            print(f"NOTICE  {maker.__name__} could not be downloaded: {str(error).splitlines()[0] if str(error) else type(error).__name__}\n"
                  "NOTICE  Using the BUNDLED SAMPLE instead: 5,000 training and 1,000 test images of each task.\n"
                  "NOTICE  For the full data, set EWC_DATA to a folder with FashionMNIST/raw and MNIST/raw, or go online.")
            return False
        finally:
            socket.setdefaulttimeout(timeout)
    return True


def _raw_files(maker, root):
    stems = [f"{split}-{kind}" for split in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    return [Path(root) / maker.__name__ / "raw" / stem for stem in stems]


def _read_task(maker, root, source):
    """Read one data set through torchvision's own class, after its four files were found whole."""
    lengths = [_check_idx(path) for path in _raw_files(maker, root)]
    if lengths[0] != lengths[1] or lengths[2] != lengths[3]:
        raise ValueError(f"{root / maker.__name__} holds {lengths} images, labels, test images, test labels, which do not "
                         "match: delete the folder and load again")
    tensors = []
    for train in (True, False):
        data = maker(root, train=train)
        if data.targets.max() > 9:
            raise ValueError(f"{root / maker.__name__}: a label file holds {data.targets.max()}, labels are 0..9: delete it")
        tensors += [data.data.unsqueeze(1).float().div_(255), data.targets.long()]
    return Task(maker.__name__, *tensors, [str(name).split(" - ")[0] for name in maker.classes], source)


def _check_idx(path):
    """The number of items in a raw idx file; an error that names the file when it is missing or not whole."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: EWC_DATA (or root) must name a folder that holds FashionMNIST/raw and "
                                "MNIST/raw with four *-ubyte files each; unset it to download them")
    images = "images" in path.name
    with open(path, "rb") as file:
        header = file.read(16 if images else 8)
    magic, items = struct.unpack(">ii", header[:8]) if len(header) >= 8 else (None, 0)
    size = 16 + 784 * items if images else 8 + items
    if magic != (2051 if images else 2049) or items < 1 or path.stat().st_size != size or images and header[8:] != struct.pack(">ii", 28, 28):
        raise ValueError(f"{path} is damaged: {path.stat().st_size} bytes, not the {size} its header asks for. It is not "
                         "used: delete it, then load again to fetch a whole one")
    return items


# ---------------------------------------------------------------- model


class SimpleMLP(nn.Module):
    """Fully connected ReLU network: flatten, hidden layers, logits.

    input_size: features of one example; hidden_size: units of the hidden layer, or a tuple, one entry a layer;
    output_size: number of classes. Input (n, ...) with input_size numbers an example; output (n, output_size) logits.
    """

    def __init__(self, input_size=784, hidden_size=400, output_size=10):
        super().__init__()
        hidden = (hidden_size,) if isinstance(hidden_size, int) else tuple(hidden_size)
        sizes = (input_size, *hidden, output_size)
        bad = [size for size in sizes if not isinstance(size, int) or size < 1]
        if bad:
            raise ValueError(f"layer sizes must be integers of at least 1, got {bad}: try SimpleMLP(784, 400, 10)")
        layers = [nn.Flatten()]
        for n_in, n_out in zip(sizes, sizes[1:]):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x):
        return self.layers(x)


def accuracy(model, x, y, *, batch_size=1000):
    """Fraction of the examples (x, y) whose largest logit is the label, in evaluation mode; the modes are restored."""
    with _evaluating(model), torch.no_grad():
        hits = sum((_logits(model(a)).argmax(1) == b).sum().item() for a, b in TensorLoader(x, y, batch_size, shuffle=False))
    return hits / len(x)


def take_anchor(model):
    """theta*: a detached copy of every trainable parameter, by name. Take it once, right after a task is learned."""
    return {name: p.detach().clone() for name, p in _trainable(model).items()}


def _unwrap(model):
    """The module inside DistributedDataParallel, DataParallel and torch.compile, which has the plain names."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _trainable(model):
    return {name: p for name, p in _unwrap(model).named_parameters() if p.requires_grad}


def _logits(output):
    """The prediction in what a model returns: a tensor, ``.logits``, ["logits"], or the first of a tuple."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    output = getattr(output, "logits", output)
    output = output[0] if isinstance(output, (tuple, list)) and output else output
    if not torch.is_tensor(output):
        raise TypeError(f"model returned {type(output).__name__}: wrap it so that it returns a tensor, an object or mapping "
                        "with 'logits', or a tuple that starts with the tensor")
    return output


@contextlib.contextmanager
def _evaluating(model):
    """Evaluation mode inside; every module's own mode again outside, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


# ---------------------------------------------------------------- Fisher

LABELS = ("exact", "sampled", "empirical")
_FAMILIES = {nn.CrossEntropyLoss: "categorical", nn.BCEWithLogitsLoss: "Bernoulli", nn.MSELoss: "Gaussian"}
_FUNCTIONS = {F.cross_entropy: nn.CrossEntropyLoss, F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
              F.mse_loss: nn.MSELoss}


def compute_fisher_information(model, data_loader, criterion, *, labels="exact", n_samples=None, seed=0, max_bytes=2**26):
    """The diagonal Fisher information of ``model``, a mean over the examples of ``data_loader``.

    F_i = 1/N sum_n E_y [(d log p(y | x_n, theta) / d theta_i)^2]      (Martens 2020, eq. 5; diagonal)

    labels      "exact": E_y over the model's own predictive distribution, all classes, no sampling; C backward passes.
                "sampled": one y per example drawn from it (``seed``); unbiased; 1 pass.
                "empirical": the y of the data; 1 pass; not the Fisher, and near zero where the model fits its data.
    model       any module; bare, compiled or DDP-wrapped. Evaluated in evaluation mode; nothing of it is changed.
    data_loader any iterable of (x, y) batches, batch dimension first. The result does not depend on the batch size.
    criterion   names p: CrossEntropyLoss the categorical (class dimension 1; ``ignore_index`` positions are left out),
                BCEWithLogitsLoss the Bernoulli, MSELoss the Gaussian with variance 1/2, whose negative log-likelihood
                it is. reduction="mean"; class weights, pos_weight and label smoothing are refused, for they are no
                likelihood. Any other criterion(outputs, y) -> scalar works with labels="empirical".
    n_samples   use only this many examples, drawn uniformly without replacement by ``seed``: cost falls in proportion.
    max_bytes   bound on the temporary arrays of one chunk of examples (64 MiB), above one example's own need.

    Returns {parameter name: tensor} for every trainable parameter: its shape and device, >= 0, in units of
    1 / parameter^2, float32 or the parameter's wider type. A parameter that the output does not depend on is exactly 0.
    Linear, convolution and normalisation layers go by closed form, the rest by ``torch.func`` or, where that fails, one
    example at a time; ``fisher_routes`` tells which. Under torch.distributed the sums run over all processes.

    An example with many positions (pixels, tokens, outputs) counts once: its log-likelihood is the sum over them. So where
    the criterion also averages over T positions, the Bayesian lambda_ewc is N_A / (N_B T). Never the square of a batch's
    mean gradient: that is about batch-size times smaller. Raises TypeError, ValueError, FloatingPointError.
    """
    likelihood = _Likelihood(criterion, labels, seed)
    model, params = _unwrap(model), _checked_trainable(model)
    totals = {name: torch.zeros_like(p, dtype=_wide(p.dtype)) for name, p in params.items()}
    count, routes, chunk = 0, None, 1
    with _undisturbed(model):
        for x, y in _merged(_batches(data_loader, params, n_samples, seed), lambda: chunk):
            if routes is None:
                routes = _choose_routes(model, params, x)
                chunk = _chunk_size(model, params, routes, x, max_bytes)
            for a, b in zip(x.split(chunk), y.split(chunk)):
                for name, squares in _squares(model, params, routes, a, b, likelihood, max_bytes).items():
                    totals[name] += squares
                count += likelihood.n_examples(b)
    return _mean_over_processes(totals, count)


def fisher_routes(model, data_loader):
    """How ``compute_fisher_information`` would cover each parameter, decided on the first batch.

    Returns {parameter name: "closed form", "torch.func" or "loop"}: one matrix product per layer; a vmapped vector-Jacobian
    product; one example at a time. Each choice was checked against autograd on examples of that batch.
    """
    model, params = _unwrap(model), _checked_trainable(model)
    with _undisturbed(model):
        for x, _ in _batches(data_loader, params):
            return _choose_routes(model, params, x)


class _Likelihood:
    """p(y | z) of the logits z: which directions v make sum_v (J^T v)^2 the squared score of one example."""

    def __init__(self, criterion, labels, seed):
        if labels not in LABELS:
            raise ValueError(f"labels must be one of {LABELS}, got {labels!r}: 'exact' is the Fisher itself")
        self.criterion = criterion = _FUNCTIONS.get(criterion, lambda: criterion)() if callable(criterion) else criterion
        self.family, self.labels, self.seed, self.generator = _FAMILIES.get(type(criterion)), labels, seed, None
        _check_criterion(criterion)
        refused = [name for name in ("weight", "pos_weight", "label_smoothing")
                   if self.family and (torch.is_tensor(value := getattr(criterion, name, None)) or value)]
        if refused:
            raise ValueError(f"criterion has {refused[0]}={getattr(criterion, refused[0])}, which is no likelihood: pass a plain "
                             f"{type(criterion).__name__}() for the Fisher")
        if self.family is None and labels != "empirical":
            raise ValueError(f"labels={labels!r} needs the model's distribution, which criterion {criterion!r} does not name: use "
                             "CrossEntropyLoss, BCEWithLogitsLoss or MSELoss, or labels='empirical'")

    def directions(self, z, y):
        """Yield tensors v like z. Exact: v v^T summed is E_y[s s^T], the covariance of the score s = d log p / dz."""
        if self.family is None:
            rows = z.detach().requires_grad_()
            with torch.enable_grad():
                losses = [self.criterion(rows[i:i + 1], y[i:i + 1]) for i in range(len(z))]
                _check_scalar(losses[0], self.criterion)
                yield torch.autograd.grad(sum(losses), rows)[0]
            return
        wide = z.detach().to(_wide(z.dtype))
        if self.labels == "sampled" and self.generator is None:
            self.generator = torch.Generator(z.device).manual_seed(self.seed)
        for v in {"categorical": self._categorical, "Bernoulli": self._bernoulli, "Gaussian": self._gaussian}[self.family](wide, y):
            yield v.to(z.dtype).view_as(z)

    def _categorical(self, z, y):
        p, y = z.reshape(*z.shape[:2], -1).softmax(1), y.reshape(len(z), -1)  # (n, C, T) and (n, T)
        kept = (y != self.criterion.ignore_index).to(p.dtype)
        n, n_classes, n_positions = p.shape
        if self.labels != "exact":
            if self.labels == "sampled":
                rows = p.transpose(1, 2).reshape(-1, n_classes)
                y = torch.multinomial(rows, 1, generator=self.generator).view(n, n_positions)
            else:
                y = y.where(kept > 0, 0)
            yield (F.one_hot(y, n_classes).transpose(1, 2) - p) * kept.unsqueeze(1)
            return
        weight, unit = p.sqrt() * kept.unsqueeze(1), torch.eye(n_classes, dtype=p.dtype, device=p.device)
        for t in range(n_positions):
            for some in torch.arange(n_classes, device=p.device).split(8):  # sqrt(p_c) (e_c - p), at one position at a time
                vs = (unit[some].unsqueeze(1) - p[:, :, t]) * weight[:, some, t].T.unsqueeze(2)
                yield from vs if n_positions == 1 else F.pad(vs.unsqueeze(3), (t, n_positions - 1 - t))

    def _bernoulli(self, z, y):
        p = z.sigmoid()
        if self.labels == "exact":
            yield from _one_at_a_time((p * (1 - p)).sqrt())
        else:
            yield (torch.bernoulli(p, generator=self.generator) if self.labels == "sampled" else y) - p

    def _gaussian(self, z, y):
        root = math.sqrt(2)  # log p = -(z - y)^2: variance 1/2, and the score 2 (y - z) has variance 2
        if self.labels == "exact":
            yield from _one_at_a_time(torch.full_like(z, root))
        elif self.labels == "sampled":
            yield root * torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=self.generator)
        else:
            yield 2 * (y - z)

    def n_examples(self, y):
        """Examples that count: all, less those in which every position is ignored."""
        if self.family != "categorical":
            return len(y)
        return int((y.reshape(len(y), -1) != self.criterion.ignore_index).any(1).sum())


def _one_at_a_time(values):
    """Each output element of every example alone, the others 0: values like z, (n, ...)."""
    flat = values.flatten(1) if values.dim() > 1 else values.unsqueeze(1)
    for d in range(flat.shape[1]):
        v = torch.zeros_like(flat)
        v[:, d] = flat[:, d]
        yield v


def _choose_routes(model, params, x):
    """The fastest route for each parameter that agrees with autograd, one example at a time, on up to three examples."""
    x = x[:3]
    with torch.no_grad():
        z = _logits(model(x))
        alone = torch.cat([_logits(model(row)) for row in x.split(1)])
    _check_finite_output(z, x)
    loose = z.dtype in (torch.bfloat16, torch.float16)
    if z.shape != alone.shape or not torch.allclose(z, alone, rtol=0.1 if loose else 1e-3, atol=0.1 if loose else 1e-4):
        raise ValueError(f"model gives a batch of {len(x)} other outputs, {tuple(z.shape)}, than its examples alone, {tuple(alone.shape)}: "
                         "the batch must come first, and no example may see another (BatchNorm needs running statistics)")
    probe = [torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)]
    truth = _squares_by_loop(model, params, x, lambda z: probe)
    routes = dict.fromkeys(params, "loop")
    for route, squares in (("torch.func", _squares_by_func), ("closed form", _squares_by_closed_form)):
        with contextlib.suppress(Exception), warnings.catch_warnings():  # what a route cannot do, the next one does
            warnings.simplefilter("ignore")
            for name, found in squares(model, params, x, lambda z: probe).items():
                error = (found - truth[name]).abs().max()
                if error <= (0.1 if loose else 1e-3) * truth[name].abs().max():
                    routes[name] = route
    return routes


def _squares(model, params, routes, x, y, likelihood, max_bytes):
    """{name: sum over the examples of E_y[score^2]} for one chunk, each parameter by its route."""
    def directions(z):
        _check_finite_output(z, x)
        _check_labels(likelihood.criterion, z, y)
        return likelihood.directions(z, y)

    found = {}
    for route in set(routes.values()):
        own = {name: p for name, p in params.items() if routes[name] == route}
        if route == "closed form":
            found.update(_squares_by_closed_form(model, own, x, directions))
        elif route == "torch.func":
            found.update(_squares_by_func(model, own, x, directions, max_bytes))
        else:
            found.update(_squares_by_loop(model, own, x, directions))
    return found


def _squares_by_loop(model, params, x, directions):
    """sum_n sum_v (J_n^T v_n)^2 as it is written: one example and one direction at a time."""
    totals = {name: torch.zeros_like(p, dtype=_wide(p.dtype)) for name, p in params.items()}
    with torch.no_grad():
        z = _logits(model(x))
    with torch.enable_grad():
        alone = [_logits(model(row)) for row in x.split(1)]
    for v in directions(z):
        for n, z_n in enumerate(alone):
            grads = torch.autograd.grad(z_n, list(params.values()), v[n:n + 1], retain_graph=True, allow_unused=True)
            for total, g in zip(totals.values(), grads):
                if g is not None:
                    total += g.to(total.dtype).square()
    return totals


def _squares_by_func(model, params, x, directions, max_bytes=2**26):
    """The same by torch.func: a vector-Jacobian product per example and direction, vmapped over both."""
    free = {name: p.detach() for name, p in params.items()}
    fixed = {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers()) if name not in free}

    def one(row, vs):
        _, pull = vjp(lambda free: _logits(functional_call(model, {**fixed, **free}, (row[None],)))[0], free)
        grads, = vmap(pull)(vs)
        return {name: g.to(_wide(g.dtype)).square().sum(0) for name, g in grads.items()}

    with torch.no_grad():
        z = _logits(model(x))
    totals = {name: torch.zeros_like(p, dtype=_wide(p.dtype)) for name, p in params.items()}
    at_once = max(1, max_bytes // (12 * len(x) * sum(p.numel() for p in params.values())))
    for vs in _groups(directions(z), at_once):
        for name, squares in vmap(one, in_dims=(0, 1))(x, torch.stack(vs)).items():
            totals[name] += squares.sum(0)
    return totals


def _squares_by_closed_form(model, params, x, directions):
    """The same by one product per layer: the forward pass records each layer's input, autograd goes only as far as its output."""
    layers = _owned(model, params)
    z, calls = _forward_recorded(model, layers, x)
    rules = {layer: _rule(layer, used) for layer, used in calls.items()}
    edges = [call.edge for used in calls.values() for call in used]
    zeros = [call.zeros for used in calls.values() for call in used]
    for v in directions(z.detach()):
        grads = torch.autograd.grad(z, edges, v, retain_graph=True, allow_unused=True)
        grads = iter([zero if g is None else g.to(_wide(g.dtype)) for g, zero in zip(grads, zeros)])
        for layer, rule in rules.items():
            rule.add([next(grads) for _ in calls[layer]])
    return {layers[layer][own]: total for layer, rule in rules.items()
            for own, total in rule.totals().items() if own in layers[layer]}


class _Call(NamedTuple):
    """One use of a layer: its input, where its output leaves it in the graph, and a zero gradient of that output."""

    input: torch.Tensor
    edge: object
    zeros: torch.Tensor


def _forward_recorded(model, layers, x):
    """Logits, and {layer: its calls} for the layers that saw the examples in their first dimension."""
    calls = {}

    def record(layer, args, output):
        a = args[0].detach()
        zeros = torch.zeros((), dtype=_wide(output.dtype), device=output.device).expand(output.shape)
        calls.setdefault(layer, []).append(_Call(a if a.dtype == torch.long else a.to(_wide(a.dtype)), get_gradient_edge(output), zeros))

    hooks = [layer.register_forward_hook(record) for layer in layers]
    try:
        with torch.enable_grad():
            z = _logits(model(x))
    finally:
        for hook in hooks:
            hook.remove()
    return z, {layer: used for layer, used in calls.items() if all(len(call.input) == len(x) for call in used)}


def _owned(model, params):
    """{layer: {its own parameter name: full name}} for layers with a rule whose parameters belong to no other module."""
    owners = {}
    for module in model.modules():
        for own, p in module._parameters.items():
            owners.setdefault(p, []).append((module, own))
    layers = {}
    for name, p in params.items():
        (module, own), *others = owners[p]
        if not others and type(module) in _RULES:
            layers.setdefault(module, {})[own] = name
    return layers


class _Rule:
    """Per-example squared gradients of one layer, from its inputs a and the gradients g of its outputs, summed."""

    def __init__(self, layer, inputs):
        self.layer, self.sums = layer, {}
        self.prepare(inputs)

    def add(self, gs):
        for own, squares in self.squares(gs).items():
            self.sums[own] = self.sums[own] + squares if own in self.sums else squares

    def totals(self):
        return self.sums


class _ProductRule(_Rule):
    """Linear, one position per example: sum_n sum_v (g a^T)^2 = (sum_v g^2)^T (a^2), one matrix product in the end."""

    def prepare(self, inputs):
        self.a, self.elements = inputs[0], 2 * inputs[0][0].numel() + 12 * self.layer.out_features

    def add(self, gs):
        self.sums = self.sums.addcmul_(gs[0], gs[0]) if torch.is_tensor(self.sums) else gs[0].square()

    def totals(self):
        return {"weight": self.sums.T @ self.a.square(), "bias": self.sums.sum(0)}


class _PositionsRule(_Rule):
    """Linear and convolution, many positions t per example: (sum_t g_t a_t^T)^2, a product per example. A layer that is
    used twice has the positions of both uses. Shapes: a (n, groups, in, t), g (n, groups, out, t)."""

    def prepare(self, inputs):
        self.a = _joined([_patches(self.layer, a) for a in inputs], -1).transpose(2, 3).contiguous()
        self.elements = 4 * self.a[0].numel() + 6 * self.a.shape[2] * self.layer.weight.shape[0]
        at_once = max(1, 2**18 // self.layer.weight.numel())  # products of so many examples stay in the cache
        self.product = self.a.new_empty(at_once, self.a.shape[1], self.layer.weight.shape[0] // self.a.shape[1], self.a.shape[3])

    def squares(self, gs):
        groups, n, linear = self.a.shape[1], len(self.a), isinstance(self.layer, nn.Linear)
        gs = [g.reshape(n, -1, g.shape[-1]).transpose(1, 2) if linear else g.flatten(2) for g in gs]
        g = _joined(gs, -1).unflatten(1, (groups, -1))
        weight = torch.zeros_like(self.product[0])
        for g_some, a_some in zip(g.split(len(self.product)), self.a.split(len(self.product))):
            weight += torch.matmul(g_some, a_some, out=self.product[:len(g_some)]).square_().sum(0)
        return {"weight": weight.reshape(self.layer.weight.shape), "bias": g.sum(-1).square_().sum(0).flatten()}


def _patches(layer, a):
    """What each output position sees: (n, groups, inputs of one position, positions)."""
    if isinstance(layer, nn.Linear):
        return a.reshape(len(a), -1, a.shape[-1]).transpose(1, 2).unsqueeze(1)
    one = isinstance(layer, nn.Conv1d)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    a = F.pad(a, layer._reversed_padding_repeated_twice, mode=mode)
    kernel, dilation, stride = ((1, *size) if one else size for size in (layer.kernel_size, layer.dilation, layer.stride))
    patches = F.unfold(a.unsqueeze(2) if one else a, kernel, dilation, 0, stride)
    return patches.unflatten(1, (layer.groups, -1))


class _ScaleRule(_Rule):
    """Normalisation layers: weight * a_hat + bias, element by element; a_hat is the layer's output at weight 1, bias 0."""

    def prepare(self, inputs):
        plain = {own: torch.full_like(p, own == "weight") for own, p in self.layer.named_parameters()}
        with torch.no_grad():
            self.a = [functional_call(self.layer, plain, (a,)) for a in inputs]
        self.elements = 4 * sum(a[0].numel() for a in self.a)

    def squares(self, gs):
        weight = sum(self.own(g * a) for g, a in zip(gs, self.a))
        return {"weight": weight.square().sum(0), "bias": sum(map(self.own, gs)).square().sum(0)}

    def own(self, g):
        """Sum over an example's positions: (n, *weight.shape). Layer and RMS norm scale the last dimensions, others the second."""
        shape = self.layer.weight.shape
        if isinstance(self.layer, (nn.LayerNorm, nn.RMSNorm)):
            return g.reshape(len(g), -1, *shape).sum(1)
        return g.reshape(len(g), *shape, -1).sum(-1)


class _EmbeddingRule(_Rule):
    """Embedding: a row's gradient is the sum over the positions that name it; each such row is squared once."""

    def prepare(self, inputs):
        self.tokens = _joined([a.reshape(len(a), -1) for a in inputs], 1)
        self.same = self.tokens.unsqueeze(1) == self.tokens.unsqueeze(2)  # (n, t, t)
        self.elements = 2 * self.same[0].numel() + 4 * self.tokens.shape[1] * self.layer.embedding_dim

    def squares(self, gs):
        g = _joined([g.reshape(*self.tokens.shape[:1], -1, g.shape[-1]) for g in gs], 1)
        same = self.same.to(g.dtype)
        rows = (same @ g).square_() / same.sum(-1, keepdim=True)
        total = g.new_zeros(self.layer.weight.shape).index_add_(0, self.tokens.flatten(), rows.flatten(0, 1))
        if self.layer.padding_idx is not None:
            total[self.layer.padding_idx] = 0
        return {"weight": total}


_RULES = dict.fromkeys((nn.Linear, nn.Conv1d, nn.Conv2d), _PositionsRule) | {nn.Embedding: _EmbeddingRule} | dict.fromkeys(
    (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm), _ScaleRule)


def _rule(layer, calls):
    one_position = isinstance(layer, nn.Linear) and len(calls) == 1 and calls[0].input.dim() == 2
    return (_ProductRule if one_position else _RULES[type(layer)])(layer, [call.input for call in calls])


def _chunk_size(model, params, routes, x, max_bytes):
    """Examples whose temporary arrays fit into max_bytes: at least one, at most 2,000, where more is no faster."""
    closed = {name: p for name, p in params.items() if routes[name] == "closed form"}
    _, calls = _forward_recorded(model, _owned(model, closed), x[:1])
    elements = sum(_rule(layer, used).elements for layer, used in calls.items())
    elements += 3 * sum(p.numel() for name, p in params.items() if name not in closed)
    return max(1, min(2000, max_bytes // (4 * max(1, elements))))


def _wide(dtype):
    """The type to add up in: never narrower than float32."""
    return torch.promote_types(dtype, torch.float32)


def _joined(parts, dim=0):
    """torch.cat, without its copy when there is one part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _groups(items, size):
    """Lists of up to ``size`` items."""
    group = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _mean_over_processes(totals, count):
    """totals / count; under torch.distributed both are first summed over the processes, each having its share of the data."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        device = next(iter(totals.values())).device
        counted = torch.tensor(float(count), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        for tensor in (counted, *totals.values()):
            torch.distributed.all_reduce(tensor)
        count = counted.item()
    if count == 0:
        raise ValueError("data_loader gave 0 examples to take the mean over: it is empty or used up, or every label is ignored")
    for name, total in totals.items():
        if not torch.isfinite(total).all():
            raise FloatingPointError(f"the Fisher of {name!r} is not finite: the data or the activations hold NaN, infinite or "
                                     "huge values; scale the inputs, or compute in float32")
    return {name: total / count for name, total in totals.items()}


def _batches(data_loader, params, n_samples=None, seed=0, argument="data_loader"):
    """Checked (x, y) batches on the device of the parameters; with n_samples, so many examples drawn from all of them."""
    if n_samples is not None and (not isinstance(n_samples, int) or n_samples < 1):
        raise ValueError(f"n_samples must be a whole number of at least 1, got {n_samples!r}: None means all examples")
    if n_samples is not None:
        data_loader = _drawn(_batches(data_loader, params), n_samples, seed)
    device = next(iter(params.values())).device
    for batch in data_loader:
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(map(torch.is_tensor, batch))) or batch[0].dim() == 0:
            raise TypeError(f"{argument} must yield batches (x, y) of tensors, got {_kind(batch)}: wrap it so that it does")
        x, y = batch
        if len(x) != (len(y) if y.dim() else 0):
            raise ValueError(f"{argument} gave {len(x)} inputs with labels of shape {tuple(y.shape)}: one label row per input")
        if len(x):
            yield x.to(device), y.to(device)


def _drawn(batches, n, seed):
    """n of all examples, uniformly and without replacement: those with the n smallest of independent random keys."""
    generator, kept = torch.Generator().manual_seed(seed), None
    for x, y in batches:
        fresh = (torch.rand(len(x), generator=generator, dtype=torch.float64), x, y)
        kept = fresh if kept is None else tuple(map(torch.cat, zip(kept, fresh)))
        best = kept[0].argsort()[:n]
        kept = tuple(part[best.to(part.device)] for part in kept)
    if kept is not None:
        yield kept[1:]


def _merged(batches, size):
    """Small batches joined until ``size()`` examples are together, where their shapes allow it."""
    held = []
    for batch in batches:
        if held and any(a.shape[1:] != b.shape[1:] for a, b in zip(held[0], batch)):
            yield tuple(map(_joined, zip(*held)))
            held = []
        held.append(batch)
        if sum(len(x) for x, _ in held) >= size():
            yield tuple(map(_joined, zip(*held)))
            held = []
    if held:
        yield tuple(map(_joined, zip(*held)))


def _kind(thing):
    """A short description for an error message."""
    if isinstance(thing, (tuple, list)):
        return f"{type(thing).__name__} of {len(thing)}: {', '.join(type(part).__name__ for part in thing[:3])}"
    return type(thing).__name__


@contextlib.contextmanager
def _undisturbed(model):
    """Evaluation mode inside; modes, buffers and random state as they were outside, whatever happens."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())  # cuDNN has no backward in evaluation mode
    with torch.random.fork_rng(devices), torch.backends.cudnn.flags(enabled=not recurrent), _evaluating(model):
        try:
            yield
        finally:
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def _checked_trainable(model):
    params = _trainable(model)
    if not params:
        raise ValueError("model has 0 trainable parameters: set requires_grad_(True) on those the penalty is to cover")
    for name, p in params.items():
        if not torch.isfinite(p).all():
            raise ValueError(f"model parameter {name!r} holds NaN or infinite values: train again, or load finite weights")
    return params


def _check_finite_output(z, x):
    if not torch.isfinite(z).all():
        where = "the inputs x hold NaN or infinite values: clean the data" if not torch.isfinite(x).all() else "the inputs are finite: lower the scale of the weights or inputs"
        raise ValueError(f"the model's outputs are not finite, and {where}")


def _check_criterion(criterion):
    if not callable(criterion):
        raise TypeError(f"criterion must be callable as criterion(outputs, y), got {_kind(criterion)}: pass nn.CrossEntropyLoss()")
    if getattr(criterion, "reduction", "mean") != "mean":
        raise ValueError(f"criterion has reduction={criterion.reduction!r}, but lambda_ewc is defined for the mean loss: use reduction='mean'")


def _check_labels(criterion, z, y):
    """Raise unless the labels y fit the logits z: (n, ...) class indices for (n, C, ...), else one target per output."""
    family = _FAMILIES.get(type(criterion))
    categorical = family == "categorical"
    if categorical and (z.dim() < 2 or y.dtype not in (torch.int64, torch.uint8)):
        raise TypeError(f"labels y must be class indices (int64) for logits (n, C, ...), got {y.dtype} for logits {tuple(z.shape)}: pass "
                        "y.long(), and a model whose second dimension is the classes")
    wanted = (z.shape[0], *z.shape[2:]) if categorical else tuple(z.shape)
    if family and tuple(y.shape) != wanted:
        raise ValueError(f"labels y have shape {tuple(y.shape)}, logits {tuple(z.shape)} want {wanted}: reshape y or the outputs")
    kept = y[y != criterion.ignore_index] if categorical else y
    low, high = (0, z.shape[1] - 1) if categorical else (0, 1) if family == "Bernoulli" else (-math.inf, math.inf)
    if family and kept.numel() and not (kept.min() >= low and kept.max() <= high):
        raise ValueError(f"labels y must lie in {low}..{high}, got {kept.min().item()}..{kept.max().item()}: map them to that range")


def _check_scalar(loss, criterion):
    if not torch.is_tensor(loss) or loss.numel() != 1:
        raise ValueError(f"criterion {criterion!r} must return one number, got {tuple(loss.shape) if torch.is_tensor(loss) else _kind(loss)}: "
                         "take the mean over the examples")


# ---------------------------------------------------------------- penalty


def ewc_loss(model, fisher_dict, optimal_params, lambda_ewc, *, parameters=None):
    """The penalty, differentiable: lambda_ewc / 2 * sum_i F_i (theta_i - theta*_i)^2   (Kirkpatrick et al. 2017, eq. 3).

    fisher_dict     {name: F}, as ``compute_fisher_information`` gives it: the mean over examples; finite, >= 0.
    optimal_params  {name: theta*}, the anchor, as ``take_anchor`` gives it; same shapes and devices.
    lambda_ewc      finite number >= 0; N_A / N_B is the Bayesian value for a mean loss.
    parameters      names that the penalty covers; by default every trainable parameter of the model.

    Returns a scalar to add to task B's mean loss; the 1/2 is inside, so that its gradient is lambda_ewc * F * (theta -
    theta*). In a training loop, ``train_with_ewc`` gets the same gradient for less. Raises TypeError, ValueError.
    """
    springs = _matched(model, fisher_dict, optimal_params, lambda_ewc, parameters)
    terms = []
    for p, fisher, anchor in springs:
        d = p - anchor
        terms.append(torch.dot((d * fisher).flatten(), d.flatten()))
    return 0.5 * lambda_ewc * torch.stack(terms).sum()


def _matched(model, fisher_dict, optimal_params, lambda_ewc, parameters):
    """[(parameter, Fisher, anchor)], after every name, shape, device and value was found right."""
    _check_lambda(lambda_ewc)
    params = _covered(model, parameters)
    known = {name for name, _ in (*_unwrap(model).named_parameters(), *_unwrap(model).named_buffers())}
    for argument, given in (("fisher_dict", fisher_dict), ("optimal_params", optimal_params)):
        if not isinstance(given, Mapping):
            raise TypeError(f"{argument} must be a mapping from parameter names to tensors, got {_kind(given)}")
        missing, extra = sorted(set(params) - set(given)), sorted(set(given) - known)
        if missing or extra and parameters is None:
            raise ValueError(f"{argument} does not fit the model: missing {missing}, unknown {extra}. Take it from this model, or "
                             "say with parameters=[...] which of its parameters the penalty covers")
        for name, p in params.items():
            _check_like(argument, name, given[name], p)
    return [(p, fisher_dict[name], optimal_params[name]) for name, p in params.items()]


def _covered(model, parameters):
    """The trainable parameters, or those of them that ``parameters`` names."""
    params = _trainable(model)
    if parameters is None:
        return params
    parameters = [parameters] if isinstance(parameters, str) else list(parameters)
    unknown = sorted(set(parameters) - set(params))
    if unknown or not parameters:
        raise ValueError(f"parameters must name trainable parameters of the model, got {unknown or parameters}: it has {sorted(params)}")
    return {name: params[name] for name in parameters}


def _check_lambda(lambda_ewc):
    if not isinstance(lambda_ewc, (int, float)) or isinstance(lambda_ewc, bool) or not 0 <= lambda_ewc < math.inf:
        raise ValueError(f"lambda_ewc must be a finite number of at least 0, got {lambda_ewc!r}: 0 switches the penalty off")


_FOUND_GOOD = weakref.WeakValueDictionary()  # the tensors whose values were looked at, while they live


def _check_like(argument, name, value, p):
    """Raise unless value has the parameter's shape and device and finite entries (>= 0 in a Fisher). Values are looked at
    once per version of a tensor, so that a training loop may call this at every step."""
    if not torch.is_tensor(value) or value.shape != p.shape or value.device != p.device:
        got = f"{tuple(value.shape)} on {value.device}" if torch.is_tensor(value) else _kind(value)
        raise ValueError(f"{argument}[{name!r}] must be a tensor like the parameter, {tuple(p.shape)} on {p.device}, got {got}: take it "
                         "anew for this model, or leave the parameter out by parameters=[...]")
    key = (argument, id(value), value._version)
    if _FOUND_GOOD.get(key) is value:
        return
    if not torch.isfinite(value).all() or argument == "fisher_dict" and (value < 0).any():
        bad = value[~torch.isfinite(value) | (value < 0)].flatten()[0].item()
        wanted = "finite and at least 0" if argument == "fisher_dict" else "finite"
        raise ValueError(f"{argument}[{name!r}] holds {bad}, every entry must be {wanted}: compute it anew from finite weights and data")
    _FOUND_GOOD[key] = value


# ---------------------------------------------------------------- training


def train_with_ewc(model, train_loader, criterion, optimizer, fisher_dict, optimal_params, lambda_ewc, *, epochs=1,
                   penalty="explicit", every=1, scheduler=None, parameters=None, callback=None, callback_steps=100):
    """Minimise L_B(theta) + lambda_ewc / 2 * sum_i F_i (theta_i - theta*_i)^2, from the model's present weights, in place.

    model, criterion, optimizer    any module; a mean loss criterion(outputs, y); any torch optimizer of all its weights.
    train_loader    any iterable of (x, y) batches, gone through ``epochs`` times.
    fisher_dict, optimal_params, lambda_ewc, parameters    as in ``ewc_loss``; or a Kronecker-factored Fisher. lambda_ewc = 0
                    is the control: the same bits as training without a penalty; both dictionaries may then be None.
    penalty         "explicit" adds lambda_ewc F (theta - theta*) to the gradient, as the textbook has it. With SGD that is
                    stable only while lr * lambda_ewc * max F < 2 (1 + momentum); a warning says so beforehand.
                    "implicit" takes the optimizer's step on L_B, then theta <- theta* + (theta - theta*) / (1 + lr lambda_ewc F),
                    the penalty's proximal step: stable for every lambda_ewc, and no optimizer rescales it.
    every           implicit only: pull once in so many steps, with their learning rates summed.
    scheduler       a torch learning-rate scheduler, stepped after every batch.
    callback        called as callback(step, model) before the first step, after the last, and every ``callback_steps`` steps,
                    or at the steps in ``callback_steps`` if that is a collection.

    Returns the mean L_B of each epoch, without the penalty. Modes and ``.grad`` are restored. Interrupted, it leaves the
    weights of the last whole step. Raises ValueError or TypeError before the first step; FloatingPointError when the loss or
    a weight turns non-finite, with the weights put back to where they started.
    """
    _check_training(model, train_loader, criterion, optimizer, epochs, penalty, every)
    springs = _springs(model, optimizer, fisher_dict, optimal_params, lambda_ewc, parameters)
    if penalty == "explicit":
        _warn_if_unstable(optimizer, springs)
    before = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    called, losses, step = None, [], 0
    with _training(model):
        for _ in range(epochs):
            total, start = 0.0, step
            for x, y in _batches(train_loader, _trainable(model), argument="train_loader"):
                called = _call(callback, callback_steps, called, step, model)
                value = _loss_and_gradients(model, criterion, optimizer, x, y)
                if not math.isfinite(value):
                    _give_up(before, step, springs)
                with _uninterrupted():
                    step += 1
                    _one_step(optimizer, scheduler, springs, penalty, step % every == 0)
                total += value
            if step == start:
                raise ValueError("train_loader gave 0 batches: it is empty, or an iterator that is used up; pass a loader")
            springs.pull()
            if not all(torch.isfinite(p).all() for p in model.parameters()):
                _give_up(before, step, springs)
            losses.append(total / (step - start))
        _call(callback, {step}, called, step, model)
    return losses


def _loss_and_gradients(model, criterion, optimizer, x, y):
    """L_B of one batch; its gradients are then in ``.grad``."""
    optimizer.zero_grad(set_to_none=True)
    z = _logits(model(x))
    try:
        loss = criterion(z, y)
    except (IndexError, RuntimeError, ValueError):
        _check_labels(criterion, z, y)  # says it better, if it is the labels
        raise
    _check_scalar(loss, criterion)
    loss.backward()
    return loss.item()


@torch.no_grad()
def _one_step(optimizer, scheduler, springs, penalty, pull_now):
    if penalty == "explicit":
        springs.add_gradients()
    else:
        springs.wait()
    optimizer.step()
    if pull_now:
        springs.pull()
    if scheduler is not None:
        scheduler.step()


def _call(callback, steps, called, step, model):
    """Call back where it is due; returns the step of the last call."""
    due = step % steps == 0 if isinstance(steps, int) else step in steps
    if callback is None or not due or called == step:
        return called
    callback(step, model)
    return step


def _springs(model, optimizer, fisher_dict, optimal_params, lambda_ewc, parameters):
    """The springs for a diagonal or a Kronecker-factored Fisher; none where lambda_ewc is 0."""
    _check_lambda(lambda_ewc)
    if fisher_dict is None and optimal_params is None and lambda_ewc == 0:
        return _Springs([], 0, optimizer)
    kronecker = isinstance(fisher_dict, Mapping) and fisher_dict and all(isinstance(f, tuple) for f in fisher_dict.values())
    if kronecker:
        parts = _matched_layers(model, fisher_dict, optimal_params)
        return (_KroneckerSprings if lambda_ewc else _Springs)(parts if lambda_ewc else [], lambda_ewc, optimizer)
    parts = _matched(model, fisher_dict, optimal_params, lambda_ewc, parameters)
    return _Springs(parts if lambda_ewc else [], lambda_ewc, optimizer)


class _Springs:
    """One spring per weight, fused over all parameters; autograd is not involved."""

    def __init__(self, parts, lambda_ewc, optimizer):
        self.lambda_ewc, self.pulls = lambda_ewc, {}
        self.params = [p for p, _, _ in parts]
        self.fishers = [fisher.to(p.dtype) for p, fisher, _ in parts]
        self.anchors = [anchor.to(p.dtype) for p, _, anchor in parts]
        group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
        self.groups = [group_of[p] for p in self.params]
        self.rates = [0.0] * len(parts)

    def max_rate(self):
        """The largest lr * lambda_ewc * F, which decides whether the explicit step is stable."""
        return max((group["lr"] * self.lambda_ewc * f.max().item() for group, f in zip(self.groups, self.fishers)), default=0.0)

    def add_gradients(self):
        """grad += lambda_ewc F (theta - theta*)"""
        if self.params:
            for p in self.params:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            ds = torch._foreach_sub(self.params, self.anchors)
            torch._foreach_addcmul_([p.grad for p in self.params], self.fishers, ds, value=self.lambda_ewc)

    def wait(self):
        """Note the learning rates of a step whose pull is to come."""
        self.rates = [rate + float(group["lr"]) for rate, group in zip(self.rates, self.groups)]

    def pull(self):
        """theta <- theta* + (theta - theta*) / (1 + r), r = lr lambda_ewc F: the way r / (1 + r) towards theta*."""
        if any(self.rates):
            rates = torch._foreach_mul(self.fishers, [rate * self.lambda_ewc for rate in self.rates])
            torch._foreach_div_(rates, torch._foreach_add(rates, 1))
            with torch.no_grad():
                torch._foreach_lerp_(self.params, self.anchors, rates)
            self.rates = [0.0] * len(self.rates)


class _KroneckerSprings:
    """One spring matrix per linear layer: penalty lambda_ewc / 2 tr(G D A D^T), D = [weight bias] - anchor."""

    def __init__(self, parts, lambda_ewc, optimizer):
        self.lambda_ewc, self.parts, self.rate, self.group = lambda_ewc, [], 0.0, optimizer.param_groups[0]
        for params, anchors, (a, g) in parts:
            eigen = [tuple(part.to(a.dtype) for part in torch.linalg.eigh(factor.double())) for factor in (a, g)]
            self.parts.append((params, _side_by_side(anchors), a, g, *eigen))

    def max_rate(self):
        return max(self.group["lr"] * self.lambda_ewc * (ea[-1] * eg[-1]).item() for *_, (ea, _), (eg, _) in self.parts)

    def add_gradients(self):
        """grad += lambda_ewc G D A"""
        for params, anchor, a, g, *_ in self.parts:
            pull = self.lambda_ewc * g @ (_side_by_side(params) - anchor) @ a
            for p, part in zip(params, (pull[:, :params[0].shape[1]], pull[:, -1])):
                p.grad = part.clone() if p.grad is None else p.grad.add_(part)

    def wait(self):
        self.rate += float(self.group["lr"])

    @torch.no_grad()
    def pull(self):
        """The same proximal step, element by element in the basis of the eigenvectors of A and G."""
        if self.rate:
            for params, anchor, _, _, (ea, qa), (eg, qg) in self.parts:
                d = qg.T @ (_side_by_side(params) - anchor) @ qa
                d /= 1 + self.rate * self.lambda_ewc * torch.outer(eg, ea).clamp_(min=0)
                moved = anchor + qg @ d @ qa.T
                for p, part in zip(params, (moved[:, :params[0].shape[1]], moved[:, -1])):
                    p.copy_(part)
            self.rate = 0.0


def _side_by_side(params):
    """[weight bias], (out, in + 1), or the weight alone."""
    return torch.cat([p.detach().reshape(len(p), -1) for p in params], 1)


def _warn_if_unstable(optimizer, springs):
    if not isinstance(optimizer, torch.optim.SGD):
        return
    rate, limit = springs.max_rate(), 2 * (1 + optimizer.param_groups[0]["momentum"])
    if rate > limit:
        warnings.warn(f"lr * lambda_ewc * max F = {rate:.3g} is above {limit:.3g}: the explicit step will overshoot and diverge. Use "
                      f"penalty='implicit', or a learning rate {rate / limit:.2g} times smaller", stacklevel=3)


def _give_up(before, step, springs):
    with torch.no_grad():
        for t, value in before:
            t.copy_(value)
    raise FloatingPointError(f"training turned non-finite at step {step} (lambda_ewc={springs.lambda_ewc}); the weights are back where they "
                             "started. Use penalty='implicit' or a smaller learning rate, and a new optimizer; check the data for NaN")


def _check_training(model, train_loader, criterion, optimizer, epochs, penalty, every):
    _check_criterion(criterion)
    params = _checked_trainable(model)
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs must be a whole number of at least 1, got {epochs!r}")
    if epochs > 1 and iter(train_loader) is train_loader:
        raise ValueError(f"train_loader is an iterator ({_kind(train_loader)}), used up after 1 of {epochs} epochs: pass a list or a loader")
    if penalty not in ("explicit", "implicit"):
        raise ValueError(f"penalty must be 'explicit' or 'implicit', got {penalty!r}")
    if not isinstance(every, int) or every < 1 or every > 1 and penalty == "explicit":
        raise ValueError(f"every must be a whole number of at least 1, and 1 with penalty='explicit', got {every!r}")
    owned = {p for group in optimizer.param_groups for p in group["params"]}
    lost = sorted(name for name, p in params.items() if p not in owned)
    if lost:
        raise ValueError(f"optimizer does not own the model's parameters {lost}: make it from this model's parameters(), or freeze those "
                         "with requires_grad_(False)")


@contextlib.contextmanager
def _training(model):
    """Training mode inside; modes and gradients as they were outside, and after an exception the random state too."""
    modes = [(module, module.training) for module in model.modules()]
    grads = [(p, p.grad) for p in model.parameters()]
    random, on_cuda = torch.get_rng_state(), next(model.parameters()).is_cuda
    random_cuda = torch.cuda.get_rng_state() if on_cuda else None
    try:
        model.train()
        yield
    except BaseException:
        torch.set_rng_state(random)
        if on_cuda:
            torch.cuda.set_rng_state(random_cuda)
        raise
    finally:
        for module, training in modes:
            module.training = training
        for p, grad in grads:
            p.grad = grad


@contextlib.contextmanager
def _uninterrupted():
    """Hold Ctrl-C back until the step is whole."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = []
    previous = signal.signal(signal.SIGINT, lambda *args: held.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if held and callable(previous):
            previous(*held[0])


# ---------------------------------------------------------------- many tasks


class EWC:
    """The penalty of all tasks so far as one quadratic: ``fisher`` and ``anchor``, to hand to ``train_with_ewc`` or ``ewc_loss``.

    rule    "single": F = sum_k F_k at the newest anchor: Bayes' rule as a recursion (Huszar 2018).
            "online": F = gamma F + F_k at the newest anchor, 0 < gamma <= 1 (Schwarz et al. 2018, eq. 9).
            "separate": every task keeps its own anchor (Kirkpatrick et al. 2017). A sum of quadratics is a quadratic: F = sum_k
            F_k around the Fisher-weighted mean of the anchors has the same gradient, and differs by a constant.

    Memory: two tensors per parameter for any number of tasks, ``nbytes``. ``state_dict`` is plain tensors and strings, so
    that ``torch.load(..., weights_only=True)`` reads it.
    """

    def __init__(self, rule="single", *, gamma=1.0):
        if rule not in ("single", "online", "separate"):
            raise ValueError(f"rule must be 'single', 'online' or 'separate', got {rule!r}")
        if not 0 < gamma <= 1 or gamma != 1 and rule != "online":
            raise ValueError(f"gamma must lie in (0, 1], and is for rule='online' only, got {gamma!r} with {rule!r}")
        self.rule, self.gamma, self.n_tasks, self.fisher, self.anchor = rule, gamma, 0, {}, {}

    def consolidate(self, fisher_dict, optimal_params, *, weight=1.0, parameters=None):
        """Add the task just learned: its Fisher and its anchor; weight: N_k / N of the task that lambda_ewc speaks of.

        parameters: the names to keep; by default all, which must be those of the earlier tasks. A name that joins later
        had no Fisher before. Raises ValueError that names what is missing, new or of another shape; then nothing is changed.
        """
        names = list(fisher_dict) if parameters is None else list(parameters)
        self._check(names, fisher_dict, optimal_params, weight, strict=parameters is None)
        fishers, anchors = {}, {}
        for name in names:
            new, at = weight * fisher_dict[name].detach(), optimal_params[name].detach()
            old, was = self.fisher.get(name, torch.zeros_like(new)), self.anchor.get(name, at)
            fishers[name] = self.gamma * old + new
            mix = torch.where(fishers[name] > 0, new / fishers[name].clamp_min(torch.finfo(new.dtype).tiny), 1.0)
            anchors[name] = torch.lerp(was.to(mix.dtype), at.to(mix.dtype), mix).to(at.dtype) if self.rule == "separate" else at.clone()
        self.fisher, self.anchor, self.n_tasks = fishers, anchors, self.n_tasks + 1

    def _check(self, names, fisher_dict, optimal_params, weight, strict):
        if not 0 < weight < math.inf:
            raise ValueError(f"weight must be a finite number above 0, got {weight!r}")
        for argument, given in (("fisher_dict", fisher_dict), ("optimal_params", optimal_params)):
            missing = sorted(set(names) - set(given))
            if missing:
                raise ValueError(f"{argument} lacks {missing}: name what to keep with parameters=[...]")
            for name in names:
                _check_like(argument, name, given[name], self.anchor.get(name, optimal_params[name]))
        changed = sorted(set(names) ^ set(self.fisher)) if strict and self.fisher else []
        if changed:
            raise ValueError(f"parameters {changed} were added, removed or renamed since the last task: name what to keep with "
                             "parameters=[...]")

    @property
    def nbytes(self):
        return sum(t.numel() * t.element_size() for part in (self.fisher, self.anchor) for t in part.values())

    def state_dict(self):
        return {"rule": self.rule, "gamma": self.gamma, "n_tasks": self.n_tasks, "fisher": dict(self.fisher), "anchor": dict(self.anchor)}

    def load_state_dict(self, state):
        missing = sorted({"rule", "gamma", "n_tasks", "fisher", "anchor"} - set(state))
        if missing:
            raise ValueError(f"state lacks {missing}: pass what EWC.state_dict() gave")
        self.__init__(state["rule"], gamma=state["gamma"])
        self.n_tasks, self.fisher, self.anchor = state["n_tasks"], dict(state["fisher"]), dict(state["anchor"])


# ---------------------------------------------------------------- beyond the diagonal


def compute_kronecker_fisher(model, data_loader, criterion, *, labels="exact", n_samples=None, seed=0):
    """The Kronecker-factored Fisher of a network of linear layers: F of one layer = G (x) A (Martens & Grosse 2015, eq. 1).

    A = mean_n a a^T over the layer's inputs a, with a 1 appended for the bias: (in + 1, in + 1). G = mean_n E_y[g g^T] over the
    gradients g of its outputs: (out, out). Exact where A and G are independent: one example, or one linear layer whose g do
    not depend on the input. Arguments as in ``compute_fisher_information``.

    Returns {layer name: (A, G)}, to hand to ``train_with_ewc`` as fisher_dict, best with penalty="implicit", every=8: the
    penalty is lambda_ewc / 2 tr(G D A D^T), D = [weight bias] - anchor (Ritter, Botev & Barber 2018, eq. 9). Raises as there,
    and ValueError where a trainable parameter belongs to anything but an nn.Linear with one input per example.
    """
    likelihood = _Likelihood(criterion, labels, seed)
    model, params = _unwrap(model), _checked_trainable(model)
    layers = {layer: name for name, layer in model.named_modules() if type(layer) is nn.Linear and layer.weight.requires_grad}
    lost = sorted(set(params) - {f"{name}.{own}" for layer, name in layers.items() for own, _ in layer.named_parameters()})
    if lost:
        raise ValueError(f"model has trainable parameters outside nn.Linear layers, {lost}: freeze them, or take the diagonal Fisher")
    sums, count = {}, 0
    with _undisturbed(model):
        for x, y in _merged(_batches(data_loader, params, n_samples, seed), lambda: 1000):
            for a, b in zip(x.split(2000), y.split(2000)):
                _add_factors(model, layers, likelihood, a, b, sums)
                count += likelihood.n_examples(b)
    means = _mean_over_processes(sums, count)
    return {name: (means[name, "A"], means[name, "G"]) for name in layers.values()}


def _add_factors(model, layers, likelihood, x, y, sums):
    z, calls = _forward_recorded(model, layers, x)
    _check_finite_output(z, x)
    _check_labels(likelihood.criterion, z, y)
    bad = [name for layer, name in layers.items() if len(calls.get(layer, [])) != 1 or calls[layer][0].input.dim() != 2]
    if bad:
        raise ValueError(f"layers {bad} are not used once with one input per example, (n, in): take the diagonal Fisher")
    edges = [calls[layer][0].edge for layer in layers]
    for v in likelihood.directions(z.detach(), y):
        for name, g in zip(layers.values(), torch.autograd.grad(z, edges, v, retain_graph=True)):
            sums[name, "G"] = sums.get((name, "G"), 0) + g.T @ g
    for layer, name in layers.items():
        a = calls[layer][0].input
        a = a if layer.bias is None else F.pad(a, (0, 1), value=1.0)
        sums[name, "A"] = sums.get((name, "A"), 0) + a.T @ a


def _matched_layers(model, factors, optimal_params):
    """[((weight, bias), their anchors, (A, G))] of every layer in a Kronecker-factored Fisher."""
    params, parts = _trainable(model), []
    modules = dict(_unwrap(model).named_modules())
    for layer, (a, g) in factors.items():
        names = [f"{layer}.{own}" for own, _ in modules[layer].named_parameters()] if layer in modules else []
        missing = [name for name in names or [layer] if name not in params or name not in (optimal_params or {})]
        if missing:
            raise ValueError(f"fisher_dict has layer {layer!r}, but {missing} are not in both the model and optimal_params")
        for name in names:
            _check_like("optimal_params", name, optimal_params[name], params[name])
        weight = params[names[0]]
        _check_like("Kronecker fisher_dict", f"{layer}, A", a, weight.new_empty(1, 1).expand(2 * (weight.shape[1] + len(names) - 1,)))
        _check_like("Kronecker fisher_dict", f"{layer}, G", g, weight.new_empty(1, 1).expand(2 * (weight.shape[0],)))
        parts.append(([params[name] for name in names], [optimal_params[name] for name in names], (a, g)))
    return parts


def nearest_kronecker_sum(first, second):
    """The one (A, G) whose G (x) A is nearest to the sum of two such products, per layer, in the Frobenius norm.

    first, second: {layer: (A, G)}. Both factors of the best product are mixtures of the given ones, found by alternating
    least squares (Van Loan & Pitsianis 1993).
    """
    result = {}
    for layer in first:
        sides = [list(pair) for pair in zip(first[layer], second[layer])]  # [A1, A2], [G1, G2]
        gram_a, gram_g = (torch.tensor([[(m * k).sum().item() for k in side] for m in side]) for side in sides)
        in_a = in_g = torch.ones(2)
        for _ in range(50):  # each is the least-squares answer to the other
            in_a = gram_g @ in_g / (in_g @ gram_g @ in_g)
            in_g = gram_a @ in_a / (in_a @ gram_a @ in_a)
        result[layer] = tuple(sum(c.item() * m for c, m in zip(mix, side)) for mix, side in zip((in_a, in_g), sides))
    return result
