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
import copy
import http.client
import io
import math
import os
import signal
import socket
import struct
import tempfile
import threading
import time
import urllib.request
import warnings
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call, vjp, vmap
from torch.nn import functional as F
from torch.optim.optimizer import _global_optimizer_pre_hooks

# ---------------------------------------------------------------- data

SAMPLE = Path(__file__).resolve().parent / "tests" / "data"
_SOURCES = set()  # of the tasks loaded so far: every figure says so unless all are "full data"
TIMEOUT = 10.0  # seconds that a download host may stay silent


class Task(NamedTuple):
    """One classification task, wholly in memory.

    x: float32 in [0, 1], (examples, 1, 28, 28); y: int64, (examples,). ``source`` is "full data", "bundled sample" or "part of the data".
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
            yield tuple(t[rows] if order is None else t.index_select(0, order[rows].to(t.device)) for t in (self.x, self.y))


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
    root = root or os.environ.get("EWC_DATA")
    if not root:
        root = Path("data") if _download(makers, Path("data")) else SAMPLE
    tasks = [_read_task(maker, Path(root).expanduser()) for maker in makers]
    _SOURCES.update(task.source for task in tasks)
    return tasks


def _download(makers, root):
    """True when all files lie under ``root`` in the end; otherwise say in three lines why not, and what is used instead."""
    for maker in makers:
        if all(path.exists() for path in _raw_files(maker, root)):
            continue
        print(f"Downloading {maker.__name__} to {root}/ (once, 55 MB on disk) ...", flush=True)
        timeout = socket.getdefaulttimeout()
        try:
            socket.setdefaulttimeout(TIMEOUT)  # torchvision sets none: a silent host would hang for ever
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # its bars and lines
                _fetch(maker, root)
        except _DOWNLOAD_ERRORS as error:
            print(f"NOTICE  {maker.__name__} could not be downloaded: {_last_line(error)}\n"
                  "NOTICE  Using the BUNDLED SAMPLE instead: 5,000 training and 1,000 test images of each task.\n"
                  "NOTICE  For the full data, set EWC_DATA to a folder with FashionMNIST/raw and MNIST/raw, or go online.")
            return False
        finally:
            socket.setdefaulttimeout(timeout)
    return True


_DOWNLOAD_ERRORS = (OSError, RuntimeError, EOFError, ValueError, http.client.HTTPException)


def _fetch(maker, root):
    """torchvision's download, mirror by mirror, into a folder of its own: only whole files reach ``root``, whatever cuts it short."""
    root.mkdir(parents=True, exist_ok=True)
    errors = []
    with tempfile.TemporaryDirectory(dir=root, prefix="unfinished-") as folder:
        for mirror in maker.mirrors:
            try:
                _knock(mirror)
                type(maker.__name__, (maker,), {"mirrors": [mirror]})(folder, download=True)
                break
            except _DOWNLOAD_ERRORS as error:
                errors.append(f"{mirror}: {_last_line(error)}")
        else:
            raise RuntimeError("; ".join(errors))
        for new, path in zip(_raw_files(maker, folder), _raw_files(maker, root)):
            _check_idx(new)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(new, path)


def _knock(mirror):
    """TimeoutError when a host stays silent for TIMEOUT in all; a socket's own time-out counts anew for each of its addresses."""

    def knock():
        with contextlib.suppress(Exception):  # any answer will do: torchvision finds out what it is worth
            urllib.request.urlopen(mirror, timeout=2 * TIMEOUT).close()

    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {TIMEOUT:g} s")


def _last_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _raw_files(maker, root):
    stems = [f"{split}-{kind}" for split in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    return [Path(root) / maker.__name__ / "raw" / stem for stem in stems]


def _read_task(maker, root):
    """Read one data set through torchvision's own class, after its four files were found whole."""
    lengths = [_check_idx(path) for path in _raw_files(maker, root)]
    if lengths[0] != lengths[1] or lengths[2] != lengths[3]:
        raise ValueError(f"{root / maker.__name__} holds {lengths} images, labels, test images, test labels, which do not "
                         "match: delete the folder and load again")
    full = lengths == [60_000, 60_000, 10_000, 10_000]
    source = "full data" if full else "bundled sample" if root.resolve() == SAMPLE else "part of the data"
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
                                "MNIST/raw with four *-ubyte files each, unpacked; unset it to download them")
    images = "images" in path.name
    with open(path, "rb") as file:
        header = file.read(16 if images else 8)
    magic, items = struct.unpack(">ii", header[:8]) if len(header) >= 8 else (None, 0)
    size = 16 + 784 * items if images else 8 + items
    if magic != (2051 if images else 2049) or items < 1 or path.stat().st_size != size or images and header[8:] != struct.pack(">ii", 28, 28):
        raise ValueError(f"{path} is damaged: {path.stat().st_size} bytes, not the {size} its header asks for. It is not "
                         "used: delete it, then load again, without EWC_DATA or root, to fetch a whole one")
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
    device = next((p.device for p in model.parameters()), x.device)
    batches = TensorLoader(x, y, batch_size, shuffle=False)
    with _evaluating(model), torch.no_grad():
        hits = sum((_outputs(model, a.to(device), "accuracy").argmax(1) == b.to(device)).sum().item() for a, b in batches)
    return hits / len(x)


def take_anchor(model):
    """theta*: a detached copy of every trainable parameter, by name. Take it once, right after a task is learned."""
    return {name: p.detach().clone() for name, p in _trainable(model).items()}


def _unwrap(model):
    """The module inside DistributedDataParallel, DataParallel and torch.compile, which has the plain names."""
    while True:
        inner = getattr(model, "_modules", {}).get("_orig_mod")
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _trainable(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {_kind(model)}: pass the network itself")
    params = {name: p for name, p in _unwrap(model).named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("model has 0 trainable parameters: set requires_grad_(True) on those the penalty is to cover")
    return params


def _logits(output):
    """The prediction in what a model returns: a tensor, ``.logits``, ["logits"], or the first of a tuple."""
    if torch.is_tensor(output):
        return output
    if isinstance(output, Mapping):
        output = output.get("logits")
    output = getattr(output, "logits", output)
    output = output[0] if isinstance(output, (tuple, list)) and output else output
    if not torch.is_tensor(output):
        raise TypeError(f"model returned {type(output).__name__}: wrap it so that it returns a tensor, an object or mapping "
                        "with 'logits', or a tuple that starts with the tensor")
    return output


def _outputs(model, x, argument):
    """The logits; where the model cannot take x, torch's error says also what x was."""
    try:
        return _logits(model(x))
    except (RuntimeError, IndexError) as error:
        if type(error) not in (RuntimeError, IndexError):  # out of memory on a GPU, say
            raise
        raise type(error)(f"the model fails on the inputs x of {argument}, {tuple(x.shape)} {x.dtype}: {error}. Give x the shape, "
                          "type and values that its first layer takes") from error


@contextlib.contextmanager
def _evaluating(model):
    """Evaluation mode inside; every module's own mode again outside, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        model.train(modes[0][1])  # a module's own train() may do more than set the flag, and undoes it here
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

    labels      "exact": E_y over the model's own predictive distribution, all classes, no sampling; C - 1 backward passes.
                "sampled": one y per example drawn from it (``seed``); unbiased; 1 pass.
                "empirical": the y of the data; 1 pass; not the Fisher, and near zero where the model fits its data.
    model       any module; bare, compiled or DDP-wrapped. Evaluated in evaluation mode; nothing of it is changed.
    data_loader any iterable of (x, y) batches, batch dimension first. The result does not depend on the batch size.
    criterion   names p: CrossEntropyLoss the categorical (class dimension 1; ``ignore_index`` positions are left out),
                BCEWithLogitsLoss the Bernoulli, MSELoss the Gaussian with variance 1/2, whose negative log-likelihood
                it is. reduction="mean"; class weights, pos_weight and label smoothing are refused, for they are no
                likelihood. Any other criterion(outputs, y) -> scalar works with labels="empirical".
    n_samples   use only this many examples, drawn uniformly without replacement by ``seed``: cost falls in proportion. Per process.
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
    model, params = _unwrap(model), _trainable(model)
    totals = {name: torch.zeros_like(p, dtype=_wide(p.dtype)) for name, p in params.items()}
    count, routes, shape, chunk = 0, None, None, 3
    with _together(params), _undisturbed(model):
        _check_finite_weights(params)
        for x, y in _merged(_batches(data_loader, params, n_samples, seed), lambda: max(3, chunk // 2)):
            routes = routes or _choose_routes(model, params, x)
            if x.shape[1:] != shape:
                shape, chunk = x.shape[1:], _chunk_size(model, params, routes, x, max_bytes)
            even = math.ceil(len(x) / math.ceil(len(x) / chunk))  # no small rest
            for a, b in zip(x.split(even), y.split(even)):
                for name, squares in _squares(model, params, routes, a, b, likelihood, max_bytes).items():
                    totals[name] += squares
                count += likelihood.n_examples(b)
    return _mean_over_processes(totals, count)


def fisher_routes(model, data_loader):
    """How ``compute_fisher_information`` would cover each parameter, decided on the first batch (joined with the next ones up to three examples).

    Returns {parameter name: "closed form", "torch.func" or "loop"}: one matrix product per layer; a vmapped vector-Jacobian
    product; one example at a time. Each choice was checked against autograd on examples of that batch.
    """
    model, params = _unwrap(model), _trainable(model)
    with _undisturbed(model):
        _check_finite_weights(params)
        for x, _ in _merged(_batches(data_loader, params), lambda: 3):
            return _choose_routes(model, params, x)
    raise ValueError("data_loader gave 0 examples to choose the routes by: it is empty or used up")


class _Likelihood:
    """p(y | z) of the logits z: which directions v make sum_v (J^T v)^2 the squared score of one example."""

    def __init__(self, criterion, labels, seed):
        if labels not in LABELS:
            raise ValueError(f"labels must be one of {LABELS}, got {labels!r}: 'exact' is the Fisher itself")
        self.criterion = criterion = _as_module(criterion)
        self.family, self.labels, self.seed, self.generators = _FAMILIES.get(type(criterion)), labels, seed, {}
        _check_criterion(criterion)
        refused = [name for name in ("weight", "pos_weight", "label_smoothing")
                   if self.family and (torch.is_tensor(value := getattr(criterion, name, None)) or value)]
        if refused:
            raise ValueError(f"criterion has {refused[0]}={getattr(criterion, refused[0])}, which is no likelihood: pass a plain "
                             f"{type(criterion).__name__}() for the Fisher")
        if self.family is None and labels != "empirical":
            raise ValueError(f"labels={labels!r} needs the model's distribution, which criterion {criterion!r} does not name: use "
                             "CrossEntropyLoss, BCEWithLogitsLoss or MSELoss, or labels='empirical'")

    def directions(self, z, y, route=None):
        """Yield tensors v like z; every route draws the same labels. Exact: v v^T summed is E_y[s s^T], the covariance of the score
        s = d log p / dz."""
        if self.family is None:
            rows = z.detach().requires_grad_()
            with torch.enable_grad():
                losses = [self.criterion(rows[i:i + 1], y[i:i + 1]) for i in range(len(z))]
                _check_scalar(losses[0], self.criterion)
                yield torch.autograd.grad(sum(losses), rows)[0]
            return
        wide = _widened(z.detach())
        if self.labels == "sampled":
            self.generator = self.generators.setdefault(route, torch.Generator(z.device).manual_seed(self.seed + 10007 * _rank()))
        for v in {"categorical": self._categorical, "Bernoulli": self._bernoulli, "Gaussian": self._gaussian}[self.family](wide, y):
            yield v if v.shape == z.shape and v.dtype == z.dtype else v.to(z.dtype).reshape(z.shape)

    def _categorical(self, z, y):
        p, y = z.reshape(*z.shape[:2], -1).softmax(1), y.reshape(len(z), -1)  # (n, C, T) and (n, T)
        kept = (y != self.criterion.ignore_index).to(p.dtype)
        n, n_classes, n_positions = p.shape
        if self.labels != "exact":
            if self.labels == "sampled":
                rows = p.transpose(1, 2).reshape(-1, n_classes)
                y = torch.searchsorted(rows.cumsum(1), self._uniform(rows[:, :1])).clamp_(max=n_classes - 1).view(n, n_positions)
            else:
                y = y.where(kept > 0, 0).long()
            yield (F.one_hot(y, n_classes).transpose(1, 2) - p) * kept.unsqueeze(1)
            return
        if n_classes == 1:
            yield torch.zeros_like(p)
        p = p.movedim(1, 0).contiguous()  # class by class in memory: (C, n, T)
        q = p.flip(0).cumsum(0).flip(0).clamp_min(torch.finfo(p.dtype).tiny)  # q_c: the probability of class c or a later one
        own = (p[:-1] / q[:-1] * q[1:]).sqrt() * kept
        later, classes = -own / q[1:], torch.arange(n_classes, device=p.device)
        for t in range(n_positions):  # class c against the later ones, at one position at a time: C - 1 directions are enough
            for some in classes[:-1].split(max(1, 128 // n_classes)):
                above = (classes > some.unsqueeze(1)).to(p.dtype)
                vs = p[:, :, t] * (later[some, None, :, t] * above.unsqueeze(2))
                vs[classes[:len(some)], some] = own[some, :, t]
                yield from vs.mT if n_positions == 1 else F.pad(vs.mT.unsqueeze(3), (t, n_positions - 1 - t))

    def _bernoulli(self, z, y):
        p = z.sigmoid()
        if self.labels == "exact":
            yield from _one_at_a_time((p * (1 - p)).sqrt())
        else:
            yield ((self._uniform(p) < p).to(p.dtype) if self.labels == "sampled" else y) - p

    def _gaussian(self, z, y):
        root = math.sqrt(2)  # log p = -(z - y)^2: variance 1/2, and the score 2 (y - z) has variance 2
        if self.labels == "exact":
            yield from _one_at_a_time(torch.full_like(z, root))
        elif self.labels == "sampled":
            yield 2 * (2 * self._uniform(z) - 1).clamp_(min=-1 + 2**-24).erfinv()  # 2 (y - z) = sqrt(2) times a standard normal
        else:
            yield 2 * (y - z)

    def counted(self, y):
        """Which examples count: all, less those in which every position is ignored."""
        kept = y != self.criterion.ignore_index if self.family == "categorical" else torch.ones(len(y), dtype=torch.bool, device=y.device)
        return kept if kept.dim() == 1 else kept.flatten(1).any(1)

    def _uniform(self, like):
        """Numbers in [0, 1), drawn one after the other, so that they do not depend on the cut into chunks (on the CPU)."""
        return torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=self.generator)

    def n_examples(self, y):
        return int(self.counted(y).sum())


def _as_module(criterion):
    """nn.CrossEntropyLoss() for F.cross_entropy and so on; anything else as it is."""
    return next((module() for function, module in _FUNCTIONS.items() if criterion is function), criterion)


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
    with torch.enable_grad():
        z, *alone = [torch.atleast_1d(_outputs(model, rows, "data_loader")) for rows in (x, *x.split(1))]
    _check_finite_output(z, x)
    if not z.requires_grad:
        raise ValueError("the model's outputs do not depend on any trainable parameter: let forward compute its outputs with gradients, "
                         "and set requires_grad_(True) on parameters that it uses")
    z, alone = z.detach(), torch.cat(alone).detach()
    tolerance = torch.finfo(z.dtype).eps ** 0.5  # far above rounding, far below what another formula gives
    if z.shape != alone.shape or len(z) != len(x) or not (z - alone).abs().max() <= tolerance * z.abs().max():
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
                if error <= tolerance * truth[name].abs().max():
                    routes[name] = route
    return routes


def _squares(model, params, routes, x, y, likelihood, max_bytes):
    """{name: sum over the examples of E_y[score^2]} for one chunk, each parameter by its route."""
    def directions(z):
        _check_finite_output(z, x)
        _check_labels(likelihood.criterion, z, y)
        return likelihood.directions(z, y, route)

    found = {}
    for route in dict.fromkeys(routes.values()):
        own = {name: p for name, p in params.items() if routes[name] == route}
        if route == "closed form":
            found.update(_squares_by_closed_form(model, own, x, directions))
        elif route == "torch.func":
            found.update(_squares_by_func(model, own, x, directions, max_bytes))
        left = {name: p for name, p in own.items() if name not in found}  # or where a layer saw only some of these examples
        if left:
            found.update(_squares_by_loop(model, left, x, directions))
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
            if not z_n.requires_grad:
                continue
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
        return {name: _widened(g).square().sum(0) for name, g in grads.items()}

    with torch.no_grad():
        z = _logits(model(x))
    totals = {name: torch.zeros_like(p, dtype=_wide(p.dtype)) for name, p in params.items()}
    at_once = max(1, max_bytes // (12 * len(x) * (sum(p.numel() for p in params.values()) + _activations(model, x[:1]))))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")  # vmap's word on its own state
        for vs in _groups(directions(z), at_once):
            for name, squares in vmap(one, in_dims=(0, 1))(x, torch.stack(vs)).items():
                totals[name] += squares.sum(0)
    return totals


def _squares_by_closed_form(model, params, x, directions):
    """The same by one product per layer: the forward pass records each layer's input, autograd goes only as far as its output."""
    layers = _owned(model, params)
    z, calls = _forward_recorded(model, layers, x)
    rules = {layer: _rule(layer, used) for layer, used in calls.items()}
    edges = [rules[layer].edge(call) for layer, used in calls.items() for call in used]
    zeros = [call.zeros for used in calls.values() for call in used]
    for v in directions(z.detach()):
        grads = torch.autograd.grad(z, edges, v, retain_graph=True, allow_unused=True)
        grads = iter([_widened(zero if g is None else g) for g, zero in zip(grads, zeros)])
        for layer, rule in rules.items():
            rule.add([next(grads) for _ in calls[layer]])
        del grads  # its memory, still in the cache, serves the next direction
    return {layers[layer][own]: total for layer, rule in rules.items()
            for own, total in rule.totals().items() if own in layers[layer]}


class _Call(NamedTuple):
    """One use of a layer: its input, whether gradients go on to it, where the output leaves the layer in the graph, a zero
    gradient of that output, and the activation that alone takes the output, if there is one."""

    input: torch.Tensor
    goes_on: bool
    edge: object
    zeros: torch.Tensor
    activation: object = None


def _forward_recorded(model, layers, x):
    """Logits, and {layer: its calls} for the layers that saw the examples in their first dimension, and whose parameters
    the graph uses nowhere else (as ``F.linear(x, layer.weight)`` would)."""
    calls = {}

    def record(layer, args, output):
        if not output.requires_grad:  # used under torch.no_grad
            return
        a = args[0].detach()
        zeros = torch.zeros((), dtype=output.dtype, device=output.device).expand(output.shape)
        a = a if a.dtype == torch.long else _widened(a)
        calls.setdefault(layer, []).append(_Call(a, args[0].requires_grad, get_gradient_edge(output), zeros))

    hooks = [layer.register_forward_hook(record) for layer in layers]
    try:
        with torch.enable_grad():
            z = _logits(model(x))
    finally:
        for hook in hooks:
            hook.remove()
    takers = _takers(z)
    return z, {layer: [call._replace(activation=_activation(call, takers)) for call in used] for layer, used in calls.items()
               if all(len(call.input) == len(x) for call in used)
               and all(len(takers.get(layer._parameters[own], ())) <= len(used) for own in layers[layer])}


def _takers(z):
    """{parameter or operation: the operations of the graph that ends in z that take it}."""
    takers, nodes = {}, [z.grad_fn]
    while nodes:
        taker = nodes.pop()
        for node, _ in getattr(taker, "next_functions", ()):
            key = getattr(node, "variable", node)
            if key is node and node not in takers:
                nodes.append(node)
            takers.setdefault(key, []).append(taker)
    return takers


_ACTIVATIONS = {f"{name}Backward{i}" for name in ("Relu", "LeakyRelu", "Elu", "Gelu", "Silu", "Tanh", "Sigmoid") for i in (0, 1)}


def _activation(call, takers):
    after = takers.get(call.edge.node, ())
    return after[0] if len(after) == 1 and type(after[0]).__name__ in _ACTIVATIONS else None


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

    def __init__(self, layer, calls):
        self.layer, self.calls, self.sums = layer, calls, {}
        self.prepare([call.input for call in calls])

    def edge(self, call):
        """Where in the graph the gradients are taken."""
        return call.edge

    def add(self, gs):
        for own, squares in self.squares(gs).items():
            self.sums[own] = self.sums[own] + squares if own in self.sums else squares

    def totals(self):
        return self.sums


class _ProductRule(_Rule):
    """Linear, one position per example: sum_n sum_v (g a^T)^2 = (sum_v g^2)^T (a^2), one matrix product in the end."""

    def prepare(self, inputs):
        self.a, self.elements = inputs[0], 2 * inputs[0][0].numel() + 12 * self.layer.out_features
        call, = self.calls
        wide = call.zeros.dtype == _wide(call.zeros.dtype)
        self.activation = call.activation if wide and not call.goes_on else None

    def edge(self, call):
        """In a first layer behind its activation, whose squared derivative then counts once, in the totals, and not per direction."""
        return call.edge if self.activation is None else GradientEdge(self.activation, 0)

    def add(self, gs):
        self.sums = self.sums.addcmul_(gs[0], gs[0]) if torch.is_tensor(self.sums) else gs[0].square()

    @torch.no_grad()
    def totals(self):
        sums = self.sums if self.activation is None else self.activation(self.activation(self.sums))
        return {"weight": sums.T @ self.a.square(), "bias": sums.sum(0)}


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
        plain = {own: torch.full_like(p, own == "weight", dtype=inputs[0].dtype) for own, p in self.layer.named_parameters()}
        plain |= {own: b.to(inputs[0].dtype) for own, b in self.layer.named_buffers()}
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
    return (_ProductRule if one_position else _RULES[type(layer)])(layer, calls)


def _chunk_size(model, params, routes, x, max_bytes):
    """Examples whose temporary arrays fit into max_bytes: at least one, at most 2,000, where more is no faster."""
    closed = {name: p for name, p in params.items() if routes[name] == "closed form"}
    _, calls = _forward_recorded(model, _owned(model, closed), x[:1])
    elements = sum(_rule(layer, used).elements for layer, used in calls.items())
    kept, others = _activations(model, x[:1]), sum(p.numel() for name, p in params.items() if name not in closed)
    elements = max(elements, 2 * kept) + (3 * (others + kept) if others else 0)
    return max(1, min(2000, max_bytes // (4 * max(1, elements))))


def _activations(model, x):
    """Elements that autograd keeps of a forward pass over x, the model's own tensors apart."""
    own, kept = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}, {}

    def note(t):
        kept[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(x)
    return sum(numel for place, numel in kept.items() if place not in own)


def _wide(dtype):
    """The type to add up in: never narrower than float32."""
    return torch.promote_types(dtype, torch.float32)


def _has_float64(device):
    return device.type in ("cpu", "cuda")  # MPS has none, nor have some other accelerators


def _double(t):
    return (t if _has_float64(t.device) else t.cpu()).double()


def _widened(t):
    """t, in the type to add up in."""
    return t if t.dtype in (torch.float32, torch.float64) else t.to(_wide(t.dtype))


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


@contextlib.contextmanager
def _together(params):
    """Under torch.distributed, an error inside on one process is an error on all: none is left waiting for the others' sums."""
    failed = None
    try:
        yield
    except Exception as error:
        failed = error
    if _is_distributed():
        anywhere = torch.tensor(float(failed is not None), device=next(iter(params.values())).device)
        torch.distributed.all_reduce(anywhere)
        if anywhere and failed is None:
            raise RuntimeError(f"the Fisher failed on {int(anywhere)} other process(es): the error there says why")
    if failed is not None:
        raise failed


def _is_distributed():
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _rank():
    """This process's number under torch.distributed, else 0."""
    return torch.distributed.get_rank() if _is_distributed() else 0


def _mean_over_processes(totals, count):
    """totals / count; under torch.distributed both are first summed over the processes, each having its share of the data."""
    if _is_distributed():
        device = next(iter(totals.values())).device
        counted = torch.tensor(float(count), dtype=torch.float64 if _has_float64(device) else torch.float32, device=device)
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
    if not hasattr(data_loader, "__iter__") and not hasattr(data_loader, "__getitem__"):
        raise TypeError(f"{argument} must be an iterable of (x, y) batches, got {_kind(data_loader)}: pass a DataLoader or a list of batches")
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
    generator, pieces, last, held = torch.Generator().manual_seed(seed), [], 1.0, 0
    for x, y in batches:
        fresh = _up_to(last, [(torch.rand(len(x), generator=generator, dtype=torch.float64), x, y)])
        pieces += fresh
        held += sum(len(keys) for keys, _, _ in fresh)
        if held > 2 * n:  # now and then, so that few examples are copied more than once
            last = _nth_key(pieces, n)
            pieces, held = _up_to(last, pieces), n
    for _, x, y in _up_to(_nth_key(pieces, n), pieces):
        yield x, y


def _nth_key(pieces, n):
    keys = torch.cat([torch.ones(1, dtype=torch.float64), *(keys for keys, _, _ in pieces)])
    return keys.kthvalue(min(n, len(keys))).values


def _up_to(last, pieces):
    """Of all (keys, x, y), copies of the examples whose key is at most ``last``."""
    chosen = [tuple(part[(piece[0] <= last).to(part.device)] for part in piece) for piece in pieces]
    return [piece for piece in chosen if len(piece[0])]


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
        else:
            held[-1] = tuple(t.clone() for t in batch)  # a loader may fill the same memory with the next batch
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
    buffers = [(module, name, b, b.clone()) for module in model.modules() for name, b in module._buffers.items() if b is not None]
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())  # cuDNN has no backward in evaluation mode
    with _random_state(model), torch.backends.cudnn.flags(enabled=not recurrent, allow_tf32=False), _evaluating(model):
        try:
            yield
        finally:
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer  # forward may have put another tensor in its place
                if not torch.equal(buffer, before):
                    buffer.data.copy_(before)


def _random_state(model):
    """What puts the random state of the CPU and of the model's devices back, when it is closed, to where it is now."""
    state = contextlib.ExitStack()
    state.callback(torch.set_rng_state, torch.get_rng_state())
    for device in {p.device for p in model.parameters()} - {torch.device("cpu")}:
        generator, which = getattr(torch, device.type, None), () if device.type == "mps" else (device,)
        if hasattr(generator, "get_rng_state"):
            state.callback(generator.set_rng_state, generator.get_rng_state(*which), *which)
    return state


def _check_finite_weights(params):
    for name, p in params.items():
        if not torch.isfinite(p).all():
            raise ValueError(f"model parameter {name!r} holds NaN or infinite values: train again, or load finite weights")


def _check_finite_output(z, x):
    if not all(map(math.isfinite, _range(z))):
        where = ("the inputs are finite: lower the scale of the weights or inputs" if torch.isfinite(x).all() else
                 "the inputs x hold NaN or infinite values: clean the data")
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
    low, high = (0, z.shape[1] - 1) if categorical else (0, 1) if family == "Bernoulli" else (-math.inf, math.inf)
    if family and not _lies_in(y, low, high):
        y = y[y != criterion.ignore_index] if categorical else y
        if not _lies_in(y, low, high):
            raise ValueError("labels y must lie in {}..{}, got {}..{}: map them to that range".format(low, high, *_range(y)))


def _range(t):
    """The smallest and the largest element; NaN where there is one, 0 where there is no element."""
    return (t.min().item(), t.max().item()) if t.numel() else (0, 0)


def _lies_in(t, low, high):
    smallest, largest = _range(t)
    return low <= smallest <= largest <= high


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
    parts = _matched(model, fisher_dict, optimal_params, lambda_ewc, parameters)
    if any(fisher.requires_grad or anchor.requires_grad for _, fisher, anchor in parts):  # then they get gradients as well
        return 0.5 * sum((way * pull).sum() for way, pull in (_way_and_pull(*part, lambda_ewc) for part in parts))
    return _Energy.apply(lambda_ewc, parts, *[p for p, _, _ in parts])


def _way_and_pull(p, fisher, anchor, lambda_ewc):
    """theta - theta* and lambda_ewc F (theta - theta*), in the wider type: a model in bfloat16 has a Fisher in float32."""
    way = p - (anchor if anchor.dtype == fisher.dtype else anchor.to(torch.promote_types(anchor.dtype, fisher.dtype)))
    return way, torch.addcmul(way.new_zeros(()), way, fisher, value=float(lambda_ewc))


class _Energy(torch.autograd.Function):
    """``ewc_loss``. The pulls that its value takes are its gradient: they are kept for the first backward pass, not computed again."""

    @staticmethod
    def forward(ctx, lambda_ewc, parts, *params):
        ctx.lambda_ewc, ctx.parts, ctx.pulls, terms = lambda_ewc, parts, [], []
        for part in parts:
            way, pull = _way_and_pull(*part, lambda_ewc)
            terms.append(torch.dot(way.flatten(), pull.flatten()))
            ctx.pulls.append(pull)
        ctx.save_for_backward(*params)
        return 0.5 * torch.stack(terms).sum()

    @staticmethod
    def backward(ctx, g):
        pulls, ctx.pulls = ctx.pulls, None
        if pulls is None or torch.is_grad_enabled():  # once more, or to be differentiated again: from the weights themselves
            pulls = [_way_and_pull(p, *part[1:], ctx.lambda_ewc)[1] for p, part in zip(ctx.saved_tensors, ctx.parts)]
        return None, None, *(pulls if _is_one(g) else [g * pull for pull in pulls])


def _is_one(g):
    """As where the penalty is a plain term of the loss. On a GPU a look at the value would have to wait for it."""
    try:
        return g.is_cpu and not torch.is_grad_enabled() and g.item() == 1
    except RuntimeError:  # many values at once, under vmap
        return False


@torch.no_grad()
def add_ewc_gradients(model, fisher_dict, optimal_params, lambda_ewc, *, parameters=None):
    """grad += lambda_ewc F (theta - theta*), in place: the gradient of ``ewc_loss`` without autograd, for a loop of one's own.

    Arguments as in ``ewc_loss``. Call it between ``loss.backward()`` and ``optimizer.step()``; with a gradient scaler, after
    its ``unscale_``. A parameter without a gradient gets one. Returns nothing. Raises TypeError, ValueError.
    """
    parts = _matched(model, fisher_dict, optimal_params, lambda_ewc, parameters)
    _Springs(parts if lambda_ewc else [], lambda_ewc).add_gradients()


def _matched(model, fisher_dict, optimal_params, lambda_ewc, parameters):
    """[(parameter, Fisher, anchor)], after every name, shape, device and value was found right."""
    _check_lambda(lambda_ewc)
    params = _covered(model, parameters)
    for argument, given in (("fisher_dict", fisher_dict), ("optimal_params", optimal_params)):
        if not isinstance(given, Mapping):
            raise TypeError(f"{argument} must be a mapping from parameter names to tensors, got {_kind(given)}: take it from "
                            f"{'compute_fisher_information' if argument == 'fisher_dict' else 'take_anchor'}")
        known = params if given.keys() == params.keys() else dict((*_unwrap(model).named_parameters(), *_unwrap(model).named_buffers()))
        missing, extra = sorted(params.keys() - given.keys()), sorted(given.keys() - known.keys())
        if missing or extra and parameters is None:
            raise ValueError(f"{argument} does not fit the model: missing {missing}, unknown {extra}. Take it from this model, or "
                             "say with parameters=[...] which of its parameters the penalty covers")
        for name, p in params.items():
            _check_like(argument, name, given[name], p)
    live = [name for name, p in params.items() if optimal_params[name].data_ptr() == p.data_ptr() != 0]
    if live:
        raise ValueError(f"optimal_params holds the live parameters {live}, which move along and never pull: use take_anchor(model)")
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
    wrong = ~torch.isfinite(value) | (value < 0) if argument == "fisher_dict" else ~torch.isfinite(value)
    if wrong.any():
        bad = value[wrong][0].item()
        wanted = "finite and at least 0" if argument == "fisher_dict" else "finite"
        raise ValueError(f"{argument}[{name!r}] holds {bad}, every entry must be {wanted}: compute it anew from finite weights and data")
    _FOUND_GOOD[key] = value


# ---------------------------------------------------------------- training


def train_with_ewc(model, train_loader, criterion, optimizer, fisher_dict, optimal_params, lambda_ewc, *, epochs=1,
                   penalty="explicit", every=1, scheduler=None, parameters=None, callback=None, callback_steps=100):
    """Minimise L_B(theta) + lambda_ewc / 2 * sum_i F_i (theta_i - theta*_i)^2, from the model's present weights, in place.

    model, criterion, optimizer    any module; a mean loss criterion(outputs, y); any torch optimizer of all its weights but LBFGS.
    train_loader    any iterable of (x, y) batches, gone through ``epochs`` times.
    fisher_dict, optimal_params, lambda_ewc, parameters    as in ``ewc_loss``; or a Kronecker-factored Fisher. lambda_ewc = 0
                    is the control: the same bits as training without a penalty; both dictionaries may then be None.
    penalty         "explicit" adds lambda_ewc F (theta - theta*) to the gradient, as the textbook has it; for plain SGD straight to
                    the weights, times -lr, which is the same step. With SGD it is stable only while lr * lambda_ewc * max F < 2 (1 +
                    momentum); a warning says so beforehand.
                    "implicit" takes the optimizer's step on L_B, then theta <- theta* + (theta - theta*) / (1 + lr lambda_ewc F),
                    the penalty's proximal step: stable for every lambda_ewc, and no optimizer rescales it. With momentum, lr / (1 -
                    momentum) stands for lr: so far a gradient carries in the end, and both forms have one minimum.
    every           implicit only: pull once in so many steps, with their learning rates summed.
    scheduler       a torch learning-rate scheduler, stepped after every batch.
    callback        called as callback(step, model) before the first step, after the last, and every ``callback_steps`` steps,
                    or at the steps in ``callback_steps`` if that is a collection.

    Returns the mean L_B of each epoch, without the penalty. Modes and ``.grad`` are restored. Interrupted, it leaves the
    weights of the last whole step. Raises ValueError or TypeError before the first step; FloatingPointError when the loss or
    a weight turns non-finite, with the weights put back to where they started.
    """
    _check_training(model, train_loader, criterion, optimizer, epochs, penalty, every, callback_steps)
    criterion = _as_module(criterion)
    springs = _springs(model, optimizer, fisher_dict, optimal_params, lambda_ewc, parameters)
    springs.implicit = penalty == "implicit"
    if penalty == "explicit":
        _warn_if_unstable(optimizer, springs)
    before = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    losses, step = [], 0
    with _training(model), _WholeSteps() as whole:
        for _ in range(epochs):
            total, start = 0.0, step
            for x, y in _batches(train_loader, _trainable(model), argument="train_loader"):
                _call(callback, callback_steps, step, model)
                value = _loss_and_gradients(model, criterion, optimizer, x, y)
                if not math.isfinite(value):
                    _give_up(before, step, springs, x)
                whole.inside, step = True, step + 1
                _one_step(optimizer, scheduler, springs, step % every == 0)
                whole.leave()
                total += value
            if step == start:
                raise ValueError("train_loader gave 0 batches: it is empty, or an iterator that is used up; pass a loader")
            springs.pull()
            if not all(torch.isfinite(p).all() for p in model.parameters()):
                _give_up(before, step, springs, x)
            losses.append(total / (step - start))
        _call(callback, {step}, step, model)
    return losses


def run_arm(start, data, fisher_dict=None, optimal_params=None, lambda_ewc=0, *, criterion=nn.CrossEntropyLoss(), seed=0, batch_size=128,
            epochs=1, lr=0.1, tests=(), look=(), penalty="implicit", every=1):
    """One arm of a comparison: a copy of ``start`` goes on with ``data``, by SGD whose rate falls from lr to 0, by a stair every 8 steps.

    data: (x, y) or a loader; tests: the (x, y) to take the accuracy on at the steps in ``look`` and at the end; the others as in
    ``train_with_ewc``. Arms with one seed see the same batches. Returns (model, accuracies (steps looked at, tests)).
    """
    model, seen = copy.deepcopy(start), []
    loader = TensorLoader(*data, batch_size, seed=seed) if isinstance(data, tuple) else data
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    total = epochs * len(loader)
    to_zero = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step // 8 * 8 / total)  # in stairs: springs reuse a rate
    train_with_ewc(model, loader, criterion, optimizer, fisher_dict, optimal_params, lambda_ewc, epochs=epochs, penalty=penalty,
                   every=every, scheduler=to_zero, callback_steps=set(look),
                   callback=lambda step, model: seen.append([accuracy(model, x, y) for x, y in tests]))
    return model, torch.tensor(seen)


def _loss_and_gradients(model, criterion, optimizer, x, y):
    """L_B of one batch; its gradients are then in ``.grad``."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None
    z = _outputs(model, x, "train_loader")
    if isinstance(criterion, (nn.MSELoss, nn.BCEWithLogitsLoss)):
        _check_labels(criterion, z, y)  # these would broadcast, or go below 0, without an error
    try:
        loss = criterion(z, y)
    except (IndexError, RuntimeError, ValueError):
        _check_labels(criterion, z, y)  # says it better, if it is the labels
        raise
    _check_scalar(loss, criterion)
    loss.backward()
    return loss.item()


@torch.no_grad()
def _one_step(optimizer, scheduler, springs, pull_now):
    if springs.implicit:
        springs.wait()
    elif springs.on_weights(optimizer):
        springs.wait()
        springs.pull()
    else:
        springs.add_gradients()
    optimizer.step()
    if springs.implicit and pull_now:
        springs.pull()
    if scheduler is not None:
        scheduler.step()


def _call(callback, steps, step, model):
    """Call back where it is due."""
    if callback is not None and (step % steps == 0 if isinstance(steps, int) else step in steps):
        callback(step, model)


def _springs(model, optimizer, fisher_dict, optimal_params, lambda_ewc, parameters):
    """The springs for a diagonal or a Kronecker-factored Fisher; none where lambda_ewc is 0."""
    _check_lambda(lambda_ewc)
    if fisher_dict is None and optimal_params is None and lambda_ewc == 0:
        return _Springs([], 0, optimizer)
    kronecker = isinstance(fisher_dict, Mapping) and fisher_dict and all(isinstance(f, tuple) for f in fisher_dict.values())
    if kronecker:
        parts = _matched_layers(model, fisher_dict, optimal_params, parameters)
        return (_KroneckerSprings if lambda_ewc else _Springs)(parts if lambda_ewc else [], lambda_ewc, optimizer)
    parts = _matched(model, fisher_dict, optimal_params, lambda_ewc, parameters)
    return _Springs(parts if lambda_ewc else [], lambda_ewc, optimizer)


class _Springs:
    """One spring per weight, fused over all parameters; autograd is not involved."""

    implicit = False

    def __init__(self, parts, lambda_ewc, optimizer=None):
        self.lambda_ewc = lambda_ewc
        self.params = [p for p, _, _ in parts]
        self.fishers = [fisher.to(p.dtype) for p, fisher, _ in parts]
        self.anchors = [anchor.to(p.dtype) for p, _, anchor in parts]
        self.join(self.params, optimizer)
        self.pulled, self.ways = None, None
        self.narrow = any(p.dtype != _wide(p.dtype) for p in self.params)

    def join(self, params, optimizer):
        """Note the optimizer's groups, the number of the group of each parameter, and no rates yet; no groups without an optimizer."""
        self.groups = optimizer.param_groups if optimizer and params else []
        number = {p: i for i, group in enumerate(self.groups) for p in group["params"]}
        self.group_of, self.rates = [number.get(p) for p in params], [0.0] * len(self.groups)

    def max_rate(self):
        """The largest lr * lambda_ewc * F, which decides whether the explicit step is stable."""
        return max((self.groups[i]["lr"] * self.lambda_ewc * f.max().item() for i, f in zip(self.group_of, self.fishers) if f.numel()), default=0.0)

    def on_weights(self, optimizer):
        """Plain SGD: its step along L_B's gradient and its step along the penalty's add up to its step along their sum, and cost less.
        Not in narrow types, which would round twice, nor where a hook is to see the whole gradient."""
        hooks = optimizer._optimizer_step_pre_hooks or _global_optimizer_pre_hooks
        return type(optimizer) is torch.optim.SGD and not hooks and not self.narrow and not any(
            group["momentum"] or group["weight_decay"] or group["maximize"] or group["fused"] for group in optimizer.param_groups)

    def add_gradients(self):
        """grad += lambda_ewc F (theta - theta*)"""
        if self.params:
            for p in self.params:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad.to_dense() if p.grad.is_sparse else p.grad
            ds = torch._foreach_sub(self.params, self.anchors)
            torch._foreach_addcmul_([p.grad for p in self.params], self.fishers, ds, value=self.lambda_ewc)

    def wait(self):
        """Note the rates of a step whose pull is to come."""
        self.rates = [rate + _rate(group) for rate, group in zip(self.rates, self.groups)]

    def pull(self):
        """With r = lr lambda_ewc F, the way r towards theta*; implicit: r / (1 + r), so theta <- theta* + (theta - theta*) / (1 + r)."""
        if any(self.rates):
            if self.rates != self.pulled:  # at a constant learning rate the ways stay as they are
                rates = [min(self.rates[i] * self.lambda_ewc, 1e38) for i in self.group_of]
                self.pulled, self.ways = self.rates, torch._foreach_mul(self.fishers, rates)
                if self.implicit:  # r / (1 + r) as 1 / (1 + 1 / r): right for r = 0 and for r too large for the type
                    torch._foreach_reciprocal_(self.ways)
                    torch._foreach_add_(self.ways, 1)
                    torch._foreach_reciprocal_(self.ways)
            with torch.no_grad():
                torch._foreach_lerp_(self.params, self.anchors, self.ways)
            self.rates = [0.0] * len(self.rates)


class _KroneckerSprings(_Springs):
    """One spring matrix per linear layer: penalty lambda_ewc / 2 tr(G D A D^T), D = [weight bias] - anchor."""

    def __init__(self, parts, lambda_ewc, optimizer):
        self.lambda_ewc, self.parts = lambda_ewc, []
        self.join([params[0] for params, _, _ in parts], optimizer)
        for params, anchors, (a, g) in parts:
            eigen = [tuple(part.to(a) for part in torch.linalg.eigh(_double(factor))) for factor in (a, g)]
            self.parts.append((params, _side_by_side(anchors, a.dtype), a, g, *eigen))

    def max_rate(self):
        return max(self.groups[i]["lr"] * self.lambda_ewc * (ea[-1] * eg[-1]).item()
                   for i, (*_, (ea, _), (eg, _)) in zip(self.group_of, self.parts))

    def on_weights(self, optimizer):
        return False  # a matrix product either way

    def add_gradients(self):
        """grad += lambda_ewc G D A"""
        for params, anchor, a, g, *_ in self.parts:
            pull = self.lambda_ewc * g @ (_side_by_side(params, a.dtype) - anchor) @ a
            for p, part in zip(params, (pull[:, :params[0].shape[1]], pull[:, -1])):
                p.grad = part.to(p.dtype, copy=True) if p.grad is None else p.grad.add_(part)

    @torch.no_grad()
    def pull(self):
        """The same proximal step, element by element in the basis of the eigenvectors of A and G."""
        if any(self.rates):
            for i, (params, anchor, _, _, (ea, qa), (eg, qg)) in zip(self.group_of, self.parts):
                d = qg.T @ (_side_by_side(params, anchor.dtype) - anchor) @ qa
                d /= 1 + min(self.rates[i] * self.lambda_ewc, 1e38) * torch.outer(eg, ea).clamp_(min=0)
                moved = anchor + qg @ d @ qa.T
                for p, part in zip(params, (moved[:, :params[0].shape[1]], moved[:, -1])):
                    p.copy_(part)
            self.rates = [0.0] * len(self.rates)


def _side_by_side(params, dtype):
    """[weight bias], (out, in + 1), or the weight alone."""
    return torch.cat([p.detach().reshape(len(p), -1).to(dtype) for p in params], 1)


def _rate(group):
    """How far the optimizer goes against a constant gradient of 1 in one step: momentum makes it 1 / (1 - momentum) times lr."""
    momentum = group.get("momentum", 0)
    return float(group["lr"]) * (1 - group.get("dampening", 0) if momentum else 1) / (1 - momentum)


def _warn_if_unstable(optimizer, springs):
    if not isinstance(optimizer, torch.optim.SGD):
        return
    momentum, nesterov = (optimizer.param_groups[0][key] for key in ("momentum", "nesterov"))
    rate, limit = springs.max_rate(), 2 * (1 + momentum) / (1 + 2 * momentum * nesterov)
    if rate > limit:
        warnings.warn(f"lr * lambda_ewc * max F = {rate:.3g} is above {limit:.3g}: the explicit step will overshoot and diverge. Use "
                      f"penalty='implicit', or a learning rate {rate / limit:.2g} times smaller", stacklevel=3)


def _give_up(before, step, springs, x):
    with torch.no_grad():
        for t, value in before:
            t.copy_(value)
    remedy = ("Use penalty='implicit' or a smaller learning rate, and a new optimizer" if torch.isfinite(x).all() else
              "train_loader gave inputs x with NaN or infinite values: clean the data")
    raise FloatingPointError(f"training turned non-finite at step {step} (lambda_ewc={springs.lambda_ewc}); the weights are back where they "
                             f"started. {remedy}")


def _check_training(model, train_loader, criterion, optimizer, epochs, penalty, every, callback_steps):
    _check_criterion(criterion)
    params = _trainable(model)
    _check_finite_weights(params)
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs must be a whole number of at least 1, got {epochs!r}")
    if epochs > 1 and isinstance(train_loader, Iterator):  # iter(train_loader) would draw from the random state
        raise ValueError(f"train_loader is an iterator ({_kind(train_loader)}), used up after 1 of {epochs} epochs: pass a list or a loader")
    if penalty not in ("explicit", "implicit"):
        raise ValueError(f"penalty must be 'explicit' or 'implicit', got {penalty!r}")
    if not isinstance(every, int) or every < 1 or every > 1 and penalty == "explicit":
        raise ValueError(f"every must be a whole number of at least 1, and 1 with penalty='explicit', got {every!r}")
    if isinstance(callback_steps, int) and callback_steps < 1:
        raise ValueError(f"callback_steps must be at least 1, or a collection of steps, got {callback_steps!r}")
    if isinstance(optimizer, torch.optim.LBFGS) or not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer must be a torch.optim optimizer that steps without a closure, got {_kind(optimizer)}: pass "
                        "torch.optim.SGD(model.parameters(), lr=0.1), say")
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
    random_state = _random_state(model)
    try:
        model.train()
        yield
    except BaseException:
        random_state.close()
        raise
    finally:
        for module, training in modes:
            module.training = training
        for p, grad in grads:
            p.grad = grad


class _WholeSteps:
    """Ctrl-C waits while a step is under way (``inside``). The handler is set once, for setting it at every step costs time."""

    def __enter__(self):
        self.inside = self.held = False
        self.set = threading.current_thread() is threading.main_thread()  # only there may a handler be set
        self.previous = signal.signal(signal.SIGINT, self._handle) if self.set else None
        return self

    def _handle(self, *_):
        self.held = True
        if not self.inside:
            self.leave()

    def leave(self):
        """The step is whole: what was held back comes now, to whatever handler was there before, the system's own too."""
        self.inside = False
        if self.held:
            self.__exit__()
            self.__enter__()

    def __exit__(self, *_):
        if self.set:
            signal.signal(signal.SIGINT, self.previous)
            if self.held:
                self.held = False
                signal.raise_signal(signal.SIGINT)



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
        arguments = (("fisher_dict", fisher_dict), ("optimal_params", optimal_params))
        for argument, given in arguments:
            missing = sorted(set(names) - set(given))
            if missing:
                raise ValueError(f"{argument} lacks {missing}: name what to keep with parameters=[...]")
        for argument, given in arguments:
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
    model, params = _unwrap(model), _trainable(model)
    layers = {layer: name for name, layer in model.named_modules() if type(layer) is nn.Linear and layer.weight.requires_grad}
    lost = sorted(set(params) - {f"{name}.{own}".removeprefix(".") for layer, name in layers.items() for own, _ in layer.named_parameters()})
    if lost:
        raise ValueError(f"model has trainable parameters outside nn.Linear layers, {lost}: freeze them, or take the diagonal Fisher")
    sums, count = {}, 0
    for layer, name in layers.items():
        n_out, n_in = layer.weight.shape
        for side, size in (("A", n_in + (layer.bias is not None)), ("G", n_out)):
            sums[name, side] = layer.weight.new_zeros(size, size, dtype=_wide(layer.weight.dtype))
    with _together(params), _undisturbed(model):
        _check_finite_weights(params)
        for x, y in _merged(_batches(data_loader, params, n_samples, seed), lambda: 1000):
            for a, b in zip(x.split(2000), y.split(2000)):
                _add_factors(model, layers, likelihood, a, b, sums)
                count += likelihood.n_examples(b)
    means = _mean_over_processes(sums, count)
    return {name: (means[name, "A"], means[name, "G"]) for name in layers.values()}


def _add_factors(model, layers, likelihood, x, y, sums):
    z, calls = _forward_recorded(model, {layer: dict(layer.named_parameters()) for layer in layers}, x)
    _check_finite_output(z, x)
    _check_labels(likelihood.criterion, z, y)
    bad = [name for layer, name in layers.items() if len(calls.get(layer, [])) != 1 or calls[layer][0].input.dim() != 2]
    if bad:
        raise ValueError(f"layers {bad} are not used once with one input per example, (n, in): take the diagonal Fisher")
    edges = [calls[layer][0].edge for layer in layers]
    for v in likelihood.directions(z.detach(), y):
        for name, g in zip(layers.values(), torch.autograd.grad(z, edges, v, retain_graph=True)):
            g = _widened(g)
            sums[name, "G"] += g.T @ g
    for layer, name in layers.items():
        a = calls[layer][0].input[likelihood.counted(y)]
        a = a if layer.bias is None else F.pad(a, (0, 1), value=1.0)
        sums[name, "A"] += a.T @ a


def _matched_layers(model, factors, optimal_params, parameters):
    """[((weight, bias), their anchors, (A, G))] of every layer of a Kronecker-factored Fisher that the penalty covers."""
    params, parts, left = _trainable(model), [], set(_covered(model, parameters))
    modules = dict(_unwrap(model).named_modules())
    for layer, (a, g) in factors.items():
        names = [f"{layer}.{own}".removeprefix(".") for own, _ in modules[layer].named_parameters()] if layer in modules else []
        missing = [name for name in names or [layer] if name not in params or name not in (optimal_params or {})]
        if missing:
            raise ValueError(f"fisher_dict has layer {layer!r}, but {missing} are not in both the model and optimal_params: take both "
                             "from this model")
        if parameters is not None and left.isdisjoint(names):
            continue
        for name in names:
            _check_like("optimal_params", name, optimal_params[name], params[name])
        weight = params[names[0]]
        _check_like("Kronecker fisher_dict", f"{layer}, A", a, weight.new_empty(1, 1).expand(2 * (weight.shape[1] + len(names) - 1,)))
        _check_like("Kronecker fisher_dict", f"{layer}, G", g, weight.new_empty(1, 1).expand(2 * (weight.shape[0],)))
        parts.append(([params[name] for name in names], [optimal_params[name] for name in names], (a, g)))
        left = left.symmetric_difference(names)  # a layer of which only a part is to be covered leaves the other part
    if left:
        raise ValueError(f"fisher_dict has no whole layer for {sorted(left)}: name with parameters=[...] whole layers that it has")
    return parts


def nearest_kronecker_sum(first, second):
    """The one (A, G) whose G (x) A is nearest to the sum of two such products, per layer, in the Frobenius norm.

    first, second: {layer: (A, G)}. Both factors of the best product are mixtures of the given ones, found by alternating
    least squares (Van Loan & Pitsianis 1993).
    """
    result = {}
    for layer in first:
        sides = [list(pair) for pair in zip(first[layer], second[layer])]  # [A1, A2], [G1, G2]
        gram_a, gram_g = (torch.tensor([[(_double(m) * _double(k)).sum().item() for k in side] for m in side],
                                       dtype=torch.float64) for side in sides)  # squares of small factors leave float32
        in_a = in_g = torch.ones(2, dtype=torch.float64)
        for _ in range(50):  # each is the least-squares answer to the other
            in_a = gram_g @ in_g / (in_g @ gram_g @ in_g)
            in_g = gram_a @ in_a / (in_a @ gram_a @ in_a)
        result[layer] = tuple(sum(c.item() * m for c, m in zip(mix, side)) for mix, side in zip((in_a, in_g), sides))
    return result


# ---------------------------------------------------------------- figures

ARMS = {  # one colour (Okabe & Ito 2008, safe for colour-blind readers) and one line style per arm, everywhere
    "fine-tuning": ("#D55E00", "--"), "early stopping": ("#D55E00", (0, (1, 2))), "L2": ("#B8860B", ":"), "EWC": ("#0072B2", "-"),
    "online EWC": ("#56B4E9", (0, (5, 2, 1, 2, 1, 2))), "Kronecker EWC": ("#007A5A", "-."), "replay": ("#AA4499", (0, (3, 1))),
    "joint": ("#555555", (0, (1, 1))), "random direction": ("#555555", (0, (4, 2))),
}


def progress(items, label):
    """Go through ``items`` and show a bar in the notebook meanwhile; silent elsewhere."""
    items, begin, handle = list(items), time.perf_counter(), None
    with contextlib.suppress(ImportError):
        from IPython import get_ipython
        from IPython.display import HTML, display
        handle = display(HTML(""), display_id=True) if get_ipython() else None
    for i in range(len(items) + 1):
        if handle:
            handle.update(HTML(f'<progress value="{i}" max="{len(items)}"></progress> {label}: {i} of {len(items)}, '
                               f"{time.perf_counter() - begin:.0f} s"))
        if i < len(items):
            yield items[i]


def plot_images(rows, title):
    """rows: {name: (images (10, 1, 28, 28), the ten labels)}, one line of pictures each."""
    fig, axes = _figure(len(rows), 10, (9, 1.35 * len(rows) + 0.4))
    for line, (name, (images, labels)) in zip(axes, rows.items()):
        for ax, image, label in zip(line, images, labels):
            ax.imshow(torch.as_tensor(image).squeeze().cpu(), cmap="gray_r")
            ax.set_title(label, fontsize=8)
            ax.set(xticks=[], yticks=[], frame_on=False)
        line[0].set_ylabel(name, fontsize=9)
    _show(fig, title)


def plot_forgetting(curves, tasks, title, *, zoom=False):
    """Accuracy on each task while task B is learned. curves: {arm: (steps, accuracies (seeds, steps, 2))}; zoom: first steps wide."""
    fig, axes = _figure(1, 2, (9.5, 3.3), sharey=True)
    for k, ax in enumerate(axes[0]):
        ends = []
        for arm, (steps, scores) in curves.items():
            ends.append(_band(ax, steps, 100 * torch.as_tensor(scores)[:, :, k], arm))
        ax.axhline(10, color="black", lw=0.8, ls=":")
        ax.axvline(0, color="black", lw=0.8)
        if zoom:
            ax.set_xscale("symlog", linthresh=10)
            ax.set_xlim(left=0)
        _axes(ax, "steps (negative: on task A, positive: on task B)" if min(min(s) for s, _ in curves.values()) < 0 else "steps on task B",
              f"accuracy on\n{tasks[k]} (%)", percent=True)
        _label_ends(ax, ends)
    _show(fig, title)


def plot_tradeoff(points, tasks, title, *, xlim=None):
    """Accuracy on task A over accuracy on task B. points: {arm: [(label, scores (seeds, 2)), ...]}."""
    fig, axes = _figure(1, 1, (7, 4.2))
    ax = axes[0][0]
    for arm, entries in points.items():
        colour, style = ARMS[arm]
        means = [100 * torch.as_tensor(scores).mean(0) for _, scores in entries]
        errors = [100 * torch.as_tensor(scores).std(0) if len(scores) > 1 else torch.zeros(2) for _, scores in entries]
        ax.errorbar([m[1] for m in means], [m[0] for m in means], [e[0] for e in errors], [e[1] for e in errors], color=colour, ls=style,
                    marker="o", ms=4, lw=1.5, elinewidth=0.8, label=arm)
        for (label, _), m in zip(entries, means):
            if label:
                ax.annotate(label, (m[1], m[0]), xytext=(4, 5), textcoords="offset points", fontsize=7, color=colour)
    _axes(ax, f"accuracy on {tasks[1]} (%)", f"accuracy on {tasks[0]} (%)")
    ax.set(xlim=xlim)
    ax.legend(frameon=False, fontsize=8, loc="best")
    _show(fig, title)


def plot_fisher_images(maps, title):
    """maps: {label: (28, 28) tensor}, drawn as pictures on one logarithmic scale."""
    from matplotlib.colors import LogNorm
    fig, axes = _figure(1, len(maps), (2.2 * len(maps) + 1, 2.7))
    high = max(m.max().item() for m in maps.values())
    for ax, (label, m) in zip(axes[0], maps.items()):
        drawn = ax.imshow(m.clamp_min(high * 1e-2).cpu(), cmap="viridis", norm=LogNorm(high * 1e-2, high))
        ax.set_title(label, fontsize=9)
        ax.set(xticks=[], yticks=[])
    fig.colorbar(drawn, ax=list(axes[0]), fraction=0.03, label="Fisher (log scale)")
    _show(fig, title, tight=False)


def plot_distribution(values, title):
    """values: {label: tensor}, histograms over powers of ten."""
    fig, axes = _figure(1, 1, (7, 3))
    for (label, v), (colour, style) in zip(values.items(), (ARMS["EWC"], ARMS["fine-tuning"])):
        v = v.flatten()
        logs = v[v > 0].log10()
        counts, edges = torch.histogram(logs.cpu(), 60, range=(-10.0, 1.0))
        axes[0][0].stairs((100 * counts / len(v)).tolist(), edges.tolist(), color=colour, ls=style, lw=1.5, label=label)
    _axes(axes[0][0], "log10 of the Fisher", "weights (%)")
    axes[0][0].legend(frameon=False, fontsize=8)
    _show(fig, title)


def plot_landscape(grid, losses, paths, points, title):
    """Contours of two losses over two weights, and the paths of training. grid: (w1, w2); losses: {label: (colour, values)}."""
    fig, axes = _figure(1, 1, (7, 4.2))
    ax = axes[0][0]
    for label, (colour, values) in losses.items():
        low = values.min()
        ax.contour(*grid, values, levels=[low + d for d in (0.01, 0.03, 0.1, 0.2, 0.4)], colors=colour, linewidths=0.7, alpha=0.7)
    for arm, path in paths.items():
        colour, style = ARMS[arm]
        ax.plot(path[:, 0], path[:, 1], color=colour, ls=style, lw=2, label=arm)
        ax.plot(*path[-1], "o", color=colour, ms=6)
    for label, (x, y) in points.items():
        ax.plot(x, y, "k*", ms=9)
        ax.annotate(label, (x, y), xytext=(6, 6), textcoords="offset points", fontsize=9)
    _axes(ax, "weight 1", "weight 2")
    ax.legend(frameon=False, fontsize=8)
    _show(fig, title)


def plot_lines(lines, xlabel, ylabel, title, *, log=False, ylim=None):
    """lines: {arm or label: (x, ys (seeds, x))}: mean, band from least to most, label at the right end."""
    fig, axes = _figure(1, 1, (7, 3.3))
    ax, ends = axes[0][0], []
    for label, (x, ys) in lines.items():
        ends.append(_band(ax, x, torch.as_tensor(ys), label))
    if log:
        ax.set(xscale="log", yscale="log")
    else:
        ax.set_xticks(x)
    ax.set(ylim=ylim)
    _axes(ax, xlabel, ylabel)
    _label_ends(ax, ends)
    _show(fig, title)


def plot_matrices(matrices, title):
    """matrices: {label: (tasks, tasks) accuracies}, as heat maps with the percentages written in."""
    fig, axes = _figure(1, len(matrices), (2.4 * len(matrices) + 0.6, 2.9), sharey=True)
    for ax, (label, m) in zip(axes[0], matrices.items()):
        ax.imshow(m, cmap="cividis", vmin=0, vmax=1)
        for i in range(len(m)):
            for j in range(m.shape[1]):
                if not math.isnan(m[i, j]):
                    ax.text(j, i, f"{100 * m[i, j]:.0f}", ha="center", va="center", fontsize=7, color="white" if m[i, j] < 0.6 else "black")
        ax.set_title(label, fontsize=9)
        ax.set(xticks=range(m.shape[1]), xticklabels=range(1, m.shape[1] + 1), yticks=range(len(m)), yticklabels=range(1, len(m) + 1))
        ax.set_xlabel("accuracy on task (%)", fontsize=8)
    axes[0][0].set_ylabel("after task", fontsize=8)
    _show(fig, title)


def _figure(rows, columns, size, **shared):
    import matplotlib.pyplot as plt
    return plt.subplots(rows, columns, figsize=size, squeeze=False, **shared)


def _band(ax, x, ys, arm):
    """Mean line and least-to-most band over seeds; returns (right end, colour, label)."""
    colour, style = ARMS.get(arm, (None, "-"))
    line, = ax.plot(x, ys.mean(0), color=colour, ls=style, lw=1.8)
    if len(ys) > 1:
        ax.fill_between(x, ys.min(0).values, ys.max(0).values, color=line.get_color(), alpha=0.18, lw=0)
    return ys.mean(0)[-1].item(), x[-1], line.get_color(), arm


def _label_ends(ax, ends):
    """Write each line's name at its right end, moved apart where lines end together."""
    transform = ax.transData + ax.transAxes.inverted()
    ends = sorted((transform.transform((x, y))[1], colour, label) for y, x, colour, label in ends)
    heights = [at for at, _, _ in ends]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + 0.075)
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], 1.02 - 0.075 * (len(heights) - 1 - i))
    for height, (at, colour, label) in zip(heights, ends):
        ax.annotate(label, (1.02, height), xycoords="axes fraction", color=colour, fontsize=8, va="center", annotation_clip=False)


def _axes(ax, xlabel, ylabel, percent=False):
    ax.set_xlabel(xlabel, fontsize=9)
    ax.set_ylabel(ylabel, fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
    if percent:
        ax.set_ylim(0, 100)


def _show(fig, title, tight=True):
    import matplotlib.pyplot as plt
    fig.suptitle(" ".join([title, *(f"({source})" for source in sorted(_SOURCES - {"full data"}))]), fontsize=11, x=0.01, ha="left")
    if tight:
        fig.tight_layout()
    plt.show()
