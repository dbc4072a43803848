"""What the Fisher and the penalty cost, beside slower ways and other libraries: python tests/benchmark.py

Not collected as a test. Every figure is a median over rounds in which all candidates take turns, every ratio the median of
the ratios within a round: a busy machine shifts them little. BackPACK, NNGeometry and Avalanche take part where installed.
"limit" is the matrix products of these very shapes alone: a forward pass, ten class back-propagations to the inputs of all
layers but the first, and for the diagonal one product (dense layer) or ten an example (convolution). "error": the largest
relative error of a parameter's Fisher against a float64 loop over 32 examples; for a sampled Fisher, which is a random
number, its distance from the exact one.
"""

import argparse
import contextlib
import copy
import io
import logging
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ewc_utils as ewc  # noqa: E402

backpack = nngeometry = avalanche = None
with contextlib.suppress(ImportError):
    import backpack.extensions
with contextlib.suppress(ImportError):
    import nngeometry.metrics, nngeometry.object  # noqa: E401
with contextlib.suppress(ImportError):
    import avalanche.benchmarks.utils, avalanche.training.plugins  # noqa: E401

CROSS_ENTROPY = nn.CrossEntropyLoss()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=60_000, help="images; the convolutional net gets a sixth of them")
    parser.add_argument("--threads", type=int, default=2, help="with 1, processor time is measured instead of wall time")
    parser.add_argument("--quick", action="store_true", help="6,000 images, 3 rounds")
    args = parser.parse_args()
    n, rounds = (6_000, 3) if args.quick else (args.examples, 5)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    a, b = ewc.load_tasks("FashionMNIST", "MNIST")
    print(f"torch {torch.__version__}, {args.threads} thread(s), {clock.__name__}, {a.source}, medians of {rounds} rounds")
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    conv = nn.Sequential(nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(),
                         nn.Linear(3136, 256), nn.ReLU(), nn.Linear(256, 10))
    fisher_table("784-256-256-10", mlp, a.train_x[:n], a.train_y[:n], clock, rounds)
    fisher_table("conv 1-32-64, 3136-256-10", conv, a.train_x[:n // 6], a.train_y[:n // 6], clock, rounds)
    for name, optimizer in (("SGD", lambda m: torch.optim.SGD(m.parameters(), 0.05)), ("Adam", lambda m: torch.optim.Adam(m.parameters()))):
        training_table(name, optimizer, mlp, a.train_x[:n], a.train_y[:n], b.train_x[:n], b.train_y[:n], clock, rounds)


def interleaved(jobs, clock, rounds):
    """{name: seconds of each round}, all jobs taking turns after one warm-up each; a job that fails is left out."""
    seconds = {name: [] for name in jobs}
    for turn in range(rounds + 1):
        for name in list(seconds):
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    start = clock()
                    jobs[name]()
                    spent = clock() - start
            except Exception as error:  # another library's limits are no reason to stop
                print(f"{name}: fails with {type(error).__name__}: {str(error)[:90]}")
                del seconds[name]
            else:
                seconds[name] += [spent] if turn else []
    return seconds


def over(seconds, name, base, factor=1.0):
    return statistics.median(factor * p / q for p, q in zip(seconds[name], seconds[base])) if base in seconds else float("nan")


def fisher_table(title, model, x, y, clock, rounds):
    ewc.train_with_ewc(model, ewc.TensorLoader(x, y), CROSS_ENTROPY, torch.optim.Adam(model.parameters()), None, None, 0)
    methods = {("this", labels): (ours, 1) for labels in ewc.LABELS}  # {(name, labels): (function, part of the data it is given)}
    methods |= {("torch.func", "exact"): (by_func, 500), ("torch.func", "empirical"): (by_func, 100),
                ("loop", "exact"): (by_loop, 1000), ("loop", "empirical"): (by_loop, 200)}
    if backpack:
        methods |= {("BackPACK", labels): (by_backpack, 1) for labels in ewc.LABELS}
    if nngeometry:
        methods |= {("NNGeometry", "exact"): (by_nngeometry, 10), ("NNGeometry", "sampled"): (by_nngeometry, 2)}
    if avalanche:
        methods |= {("Avalanche", "empirical"): (by_avalanche, 100)}
    parts = {key: max(1, min(part, len(x) // 60)) for key, (_, part) in methods.items()}
    jobs = {("limit", ""): limit(model, x), ("plain epoch", ""): lambda: plain_pass(model, x, y)}
    jobs |= {key: (lambda run=run, key=key, m=len(x) // parts[key]: run(model, x[:m], y[:m], key[1])) for key, (run, _) in methods.items()}
    double = copy.deepcopy(model).double()
    truth = {labels: by_loop(double, x[:32].double(), y[:32], labels) for labels in ("exact", "empirical")}
    seconds = interleaved(jobs, clock, rounds)
    print(f"\n{f'{title}, {len(x):,} images':44}{'seconds':>10} {'x limit':>10}{'x plain':>10}{'x BackPACK':>12}{'error':>10}   * from a part")
    for key in seconds:
        part, (name, labels) = parts.get(key, 1), key
        row = f"{name + ', ' + labels if labels else name:44}{part * statistics.median(seconds[key]):>10.2f}{'*' if part > 1 else ' '}"
        row += "".join(f"{over(seconds, key, (base, ''), part):>10.2f}" for base in ("limit", "plain epoch"))
        if labels:
            found, wanted = methods[key][0](model, x[:32], y[:32], labels), truth["empirical" if labels == "empirical" else "exact"]
            error = max(((found[k] - wanted[k]).norm() / wanted[k].norm()).item() for k in wanted)
            row += f"{over(seconds, key, ('BackPACK', labels), part):>12.2f}{error:>10.1e}"
        print(row)


def limit(model, x, n_classes=10):
    """A job that does the matrix products alone, on numbers of the right shapes; the first layer's input is the data."""
    n, layers = min(len(x), 1000 if isinstance(model[0], nn.Flatten) else 250), []
    a = x[:n]
    for layer in model:
        if hasattr(layer, "weight"):  # patches: (examples, positions, inputs of a position)
            dense, w = isinstance(layer, nn.Linear), layer.weight.detach().flatten(1)
            patches = a.unsqueeze(1) if dense else F.unfold(a, layer.kernel_size, 1, layer.padding, layer.stride).transpose(1, 2).contiguous()
            layers.append((not layers, dense, w, patches, torch.rand(n, patches.shape[1], len(w))))
        a = layer(a).detach()

    def products():
        for row in range(0, len(x) - n + 1, n):
            for first, dense, w, a, g in layers:
                a = x[row:row + n].flatten(1).unsqueeze(1) if first and dense else a
                a.flatten(0, 1) @ w.T
                for _ in range(0 if first else n_classes):
                    g.flatten(0, 1) @ w
                if dense:
                    g[:, 0].T @ a[:, 0]
                    continue
                m = max(1, 2**18 // w.numel())  # the products of so many examples stay in the cache
                out = torch.empty(m, *w.shape)
                for _ in range(n_classes):
                    for gs, some in zip(g.split(m), a.split(m)):
                        torch.bmm(gs.transpose(1, 2), some, out=out[:len(gs)])
    return products


def plain_pass(model, x, y):
    """The gradients of one training epoch at batch 128."""
    for a, b in zip(x.split(128), y.split(128)):
        torch.autograd.grad(CROSS_ENTROPY(model(a), b), list(model.parameters()))


def ours(model, x, y, labels):
    return ewc.compute_fisher_information(model, ewc.TensorLoader(x, y, 1500, shuffle=False), CROSS_ENTROPY, labels=labels)


def by_loop(model, x, y, labels):
    """The definition: the mean over examples of the squared gradients of log p, weighted by p over the classes."""
    params = dict(model.named_parameters())
    totals = {name: torch.zeros_like(p) for name, p in params.items()}
    for row, label in zip(x, y):
        log_p = model(row[None]).log_softmax(1)[0]
        for c in range(len(log_p)) if labels == "exact" else [label.item()]:
            weight = log_p[c].exp().item() if labels == "exact" else 1.0
            for total, g in zip(totals.values(), torch.autograd.grad(log_p[c], params.values(), retain_graph=True)):
                total += weight * g**2 / len(x)
    return totals


def by_func(model, x, y, labels):
    """The same with vmap(grad), 25 examples at once."""
    params, classes = {name: p.detach() for name, p in model.named_parameters()}, torch.eye(10)
    totals = {name: torch.zeros_like(p) for name, p in params.items()}
    score = vmap(grad(lambda params, row, c: functional_call(model, params, (row[None],)).log_softmax(1)[0] @ c), (None, 0, 0))
    for a, b in zip(x.split(25), y.split(25)):
        p = model(a).softmax(1).detach() if labels == "exact" else classes[b]
        for chosen in (c.expand(len(a), -1) for c in classes) if labels == "exact" else [classes[b]]:
            for name, g in score(params, a, chosen).items():
                totals[name] += torch.einsum("n,n...->...", (p * chosen).sum(1), g**2) / len(x)
    return totals


def by_backpack(model, x, y, labels):
    net, loss = backpack.extend(copy.deepcopy(model)), backpack.extend(nn.CrossEntropyLoss(reduction="sum"))
    extension, attribute = {"exact": (backpack.extensions.DiagGGNExact, "diag_ggn_exact"), "sampled": (backpack.extensions.DiagGGNMC, "diag_ggn_mc"),
                            "empirical": (backpack.extensions.SumGradSquared, "sum_grad_squared")}[labels]
    totals = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for a, b in zip(x.split(256), y.split(256)):
        with backpack.backpack(extension()):
            loss(net(a), b).backward()
        for name, p in net.named_parameters():
            totals[name] += getattr(p, attribute) / len(x)
            p.grad = None
    return totals


def by_nngeometry(model, x, y, labels):
    metric = nngeometry.metrics.FIM if labels == "exact" else nngeometry.metrics.FIM_MonteCarlo
    diagonal = metric(model, DataLoader(TensorDataset(x, y), batch_size=250), nngeometry.object.PMatDiag).get_diag()
    parts = diagonal.split([p.numel() for p in model.parameters()])
    return {name: part.view_as(p) for (name, p), part in zip(model.named_parameters(), parts)}


def by_avalanche(model, x, y, labels):
    """It squares the gradients of mini-batches: a Fisher only where those hold one example."""
    data, optimizer = TensorDataset(x, y, torch.zeros_like(y)), torch.optim.SGD(model.parameters(), 0.1)
    found = avalanche.training.plugins.EWCPlugin(1.0).compute_importances(model, CROSS_ENTROPY, optimizer, data, "cpu", 1)
    return {name: part.data for name, part in found.items()}


def training_table(title, maker, model, xa, ya, x, y, clock, rounds):
    """One epoch of MNIST at batch 128 with the penalty and without."""
    springs = ours(model, xa, ya, "exact"), ewc.take_anchor(model)

    def own_loop(penalty=None):
        optimizer = maker(net := copy.deepcopy(model))
        for a, b in ewc.TensorLoader(x, y):
            optimizer.zero_grad()
            loss = CROSS_ENTROPY(net(a), b)
            (loss + ewc.ewc_loss(net, *springs, 1.0) if penalty == "loss" else loss).backward()
            if penalty == "gradient":
                ewc.add_ewc_gradients(net, *springs, 1.0)
            optimizer.step()

    def train(lambda_ewc=1.0, **kwargs):
        ewc.train_with_ewc(net := copy.deepcopy(model), ewc.TensorLoader(x, y), CROSS_ENTROPY, maker(net), *springs, lambda_ewc, **kwargs)

    def by_avalanche(*plugins):
        sets, net = [TensorDataset(x[:m], y[:m]) for m in (128, len(x))], copy.deepcopy(model)  # a first task of one batch
        for data in sets:
            data.targets = data.tensors[1].tolist()
        stream = avalanche.benchmarks.benchmark_from_datasets(train=[avalanche.benchmarks.utils.as_classification_dataset(data) for data in sets])
        strategy = avalanche.training.Naive(model=net, optimizer=maker(net), criterion=CROSS_ENTROPY, train_mb_size=128, plugins=list(plugins),
                                            evaluator=avalanche.training.plugins.EvaluationPlugin(loggers=[]))
        for experience in stream.train_stream:
            strategy.train(experience)

    jobs = {"own loop, no penalty": own_loop, "own loop, ewc_loss": lambda: own_loop("loss"), "own loop, add_ewc_gradients":
            lambda: own_loop("gradient"), "train_with_ewc, lambda 0": lambda: train(0), "train_with_ewc, explicit": train,
            "train_with_ewc, implicit": lambda: train(penalty="implicit"), "train_with_ewc, implicit, every=8": lambda: train(penalty="implicit", every=8)}
    if avalanche:
        jobs |= {"Avalanche, no penalty": by_avalanche, "Avalanche, EWC": lambda: by_avalanche(avalanche.training.plugins.EWCPlugin(1.0))}
    seconds = interleaved(jobs, clock, rounds)
    print(f"\n{f'one epoch of MNIST, {len(x):,} images, {title}':44}{'seconds':>10}{'x own loop':>12}{'x lambda 0':>12}")
    for name in seconds:
        ratios = "".join(f"{over(seconds, name, base):>12.2f}" for base in ("own loop, no penalty", "train_with_ewc, lambda 0"))
        print(f"{name:44}{statistics.median(seconds[name]):>10.2f}{ratios}")


if __name__ == "__main__":
    main()
