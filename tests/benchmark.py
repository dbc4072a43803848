"""What the Fisher and the penalty cost, as ratios: python tests/benchmark.py [images]

Not collected as a test. Run it on an idle machine. It measures wall time, which is what a user
waits for, first with the threads that torch chooses, then with one. The candidates of a table take
turns in one process, after a warm-up each. A ratio is the median of the ratios within a round.
"plain" is a forward and backward pass over the same examples, in batches of 128. "products" are the
matrix products alone: a forward pass, ten back-propagations to the inputs of all layers but the
first, and one product for each weight. BackPACK and NNGeometry take part where they are installed.
"""

import contextlib
import copy
import os
import statistics
import sys
import time
import warnings
from functools import partial
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import reference  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

import ewc_utils as ewc  # noqa: E402

CE = nn.CrossEntropyLoss()


def table(title, jobs, *bases, rounds=5):
    """Seconds of each job, and how many times those of the bases. The first round is left out."""
    spent, bases = {name: [] for name in jobs}, [base for base in bases if base in jobs]
    for turn in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            spent[name] += [time.perf_counter() - start] if turn else []
    print(f"\n{title:44}{'seconds':>10}" + "".join(f"{'/ ' + base:>16}" for base in bases))
    for name, own in spent.items():
        line = f"  {name:42}{statistics.median(own):>10.3f}"
        for base in bases:
            line += f"{statistics.median(a / b for a, b in zip(own, spent[base])):>16.2f}"
        print(line, flush=True)


def models():
    torch.manual_seed(0)
    dense = nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    conv = nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU()
    head = nn.Flatten(), nn.Linear(3136, 256), nn.ReLU(), nn.Linear(256, 10)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    encoder = nn.Linear(28, 64), nn.TransformerEncoder(layer, 2)
    # A sequence as one vector: the last output of a recurrent layer, or else the mean.
    pooled = reference.Net(lambda _, h: h[0][:, -1] if isinstance(h, tuple) else h.mean(1))
    rows, gru, out = nn.Flatten(1, 2), nn.GRU(28, 64, batch_first=True), nn.Linear(64, 10)
    return {  # (model, number of examples)
        "MLP 784-256-256-10": (nn.Sequential(nn.Flatten(), *dense), 20_000),
        "conv 1-32-64, 3136-256-10": (nn.Sequential(*conv, *head), 1024),
        "ResNet-18, 3x32x32": (torchvision.models.resnet18(num_classes=10), 16),
        "transformer encoder": (nn.Sequential(rows, *encoder, pooled, out), 128),
        "GRU": (nn.Sequential(rows, gru, pooled, out), 64),
    }


def examples(n, name):
    torch.manual_seed(1)
    shape = (3, 32, 32) if "ResNet" in name else (1, 28, 28)
    return torch.rand(n, *shape), torch.randint(10, (n,))


def fisher(model, x, y, labels="exact"):
    loader = ewc.TensorLoader(x, y, 1500, shuffle=False)
    return ewc.compute_fisher_information(model, loader, CE, labels=labels)


def plain(model, x, y):
    for a, b in zip(x.split(128), y.split(128)):
        torch.autograd.grad(CE(model(a), b), list(model.parameters()))


def products(model, x, n=1000):
    weights = [layer.weight.detach() for layer in model if isinstance(layer, nn.Linear)]
    grads, hidden = ([torch.rand(n, w.shape[i]) for w in weights] for i in (0, 1))
    for rows in x.flatten(1).split(n):
        for i, (w, g, a) in enumerate(zip(weights, grads, [rows, *hidden[1:]])):
            a @ w.T
            for _ in range(10 if i else 0):
                g @ w
            g[: len(a)].T @ a


def by_backpack(backpack, model, x, y):
    net, loss = backpack.extend(copy.deepcopy(model)), nn.CrossEntropyLoss(reduction="sum")
    extended, totals = backpack.extend(loss), dict.fromkeys(dict(net.named_parameters()), 0)
    for a, b in zip(x.split(256), y.split(256)):
        with backpack.backpack(backpack.extensions.DiagGGNExact()):
            extended(net(a), b).backward()
        for name, p in net.named_parameters():
            totals[name] = totals[name] + p.diag_ggn_exact / len(x)
            p.grad = None
    return totals


def by_nngeometry(nngeometry, model, x, y):
    loader = DataLoader(TensorDataset(x, y), batch_size=250)
    return nngeometry.metrics.FIM(model, loader, nngeometry.object.PMatDiag).get_diag()


def other_libraries():
    found = {}
    with contextlib.suppress(ImportError):
        import backpack.extensions

        found["BackPACK"] = partial(by_backpack, backpack)
    with contextlib.suppress(ImportError):
        import nngeometry.metrics
        import nngeometry.object

        found["NNGeometry"] = partial(by_nngeometry, nngeometry)
    for name in {"BackPACK", "NNGeometry"} - found.keys():
        print(f"{name} is not installed: its rows are left out")
    return found


def epoch(model, x, y, make, penalty, how):
    net, (f, anchor, strength) = copy.deepcopy(model), penalty
    optimizer, loader = make(net.parameters()), ewc.TensorLoader(x, y)
    if how == "train_with_ewc":
        return ewc.train_with_ewc(net, loader, CE, optimizer, *penalty)
    for a, b in loader:
        optimizer.zero_grad()
        loss = CE(net(a), b)
        if how == "ewc_loss":
            loss = loss + ewc.ewc_loss(net, *penalty)
        elif how == "plain formula":
            terms = [(f[k] * (p - anchor[k]) ** 2).sum() for k, p in net.named_parameters()]
            loss = loss + strength / 2 * sum(terms)
        loss.backward()
        optimizer.step()
    return None


def training_step(model, x, y):
    for a, b in ewc.TensorLoader(x, y, 512):
        CE(model(a), b).backward()


def peak(job):
    """The most megabytes that the job holds at once, beyond what there was before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        job()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return held.cumsum(0).max().item() / 1e6


def time_tables(others):
    for name, (model, n) in models().items():
        small, mlp = "MLP" in name or "conv" in name, "MLP" in name
        x, y = examples(int(sys.argv[1]) if mlp and len(sys.argv) > 1 else n, name)
        jobs = {"plain": partial(plain, model.eval(), x, y)}
        jobs |= {"products": partial(products, model, x)} if mlp else {}
        jobs |= {labels: partial(fisher, model, x, y, labels) for labels in ewc.LABELS}
        jobs |= {other: partial(run, model, x, y) for other, run in others.items() if small}
        title, bases = f"{name}, {len(x):,} examples", ("plain", "products", "BackPACK")
        table(title, jobs, *bases, rounds=5 if mlp else 3)
    name, (model, _) = next(iter(models().items()))
    x, y = examples(25_600, name)
    penalty = fisher(model, x, y), ewc.take_anchor(model), 1.0
    ways = "no penalty", "train_with_ewc", "ewc_loss", "plain formula"
    for kind, make in (("SGD", partial(torch.optim.SGD, lr=0.05)), ("Adam", torch.optim.Adam)):
        jobs = {how: partial(epoch, model, x, y, make, penalty, how) for how in ways}
        table(f"an epoch with {kind}, {len(x):,} examples", jobs, "no penalty", rounds=5)


def main():
    warnings.simplefilter("ignore")
    others = other_libraries()
    for threads in dict.fromkeys((torch.get_num_threads(), 1)):
        torch.set_num_threads(threads)
        print(f"\ntorch {torch.__version__}, {threads} threads, wall time, medians of rounds")
        time_tables(others)
    print(f"\n{'':44}{'error':>10}{'Fisher, MB':>14}{'a step + 2 Fishers, MB':>26}")
    for name, (model, n) in models().items():
        x, y = examples(512, name)
        some = [t[: 4 if "ResNet" in name else 16] for t in (x, y)]
        found, truth = fisher(model, *some), reference.fisher(model, [some])
        error = max(((found[k] - t).norm() / t.norm()).item() for k, t in truth.items())
        two = 2 * sum(p.numel() for p in model.parameters()) * 4e-6
        step = peak(partial(training_step, model, x, y))
        most = peak(partial(fisher, model, x[:n], y[:n]))
        print(f"  {name:42}{error:>10.1e}{most:>14.0f}{step + two:>26.0f}", flush=True)
    print("error: the largest of a tensor, relative, to float64. MB: at the peak; step: of 512")


if __name__ == "__main__":
    main()
