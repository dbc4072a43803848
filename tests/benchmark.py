"""What the Fisher and the penalty cost, in wall time: python tests/benchmark.py [images]

Run it on an idle machine. Ratios are medians of the ratios within a round. "plain" is a forward and
backward pass over the same examples in batches of 128.
"""

import copy
import statistics
import sys
import time
import warnings
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import reference  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
from torch import nn  # noqa: E402

import ewc_utils as ewc  # noqa: E402

CE = nn.CrossEntropyLoss()


def table(title, jobs, rounds=5):
    """Seconds of each job, and how many times those of the first. The first round is left out."""
    spent = {name: [] for name in jobs}
    base = next(iter(jobs))
    for turn in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            spent[name] += [time.perf_counter() - start] if turn else []
    print(f"\n{title:44}{'seconds':>10}{'/ ' + base:>16}")
    for name, own in spent.items():
        ratio = statistics.median(a / b for a, b in zip(own, spent[base]))
        print(f"  {name:42}{statistics.median(own):>10.3f}{ratio:>16.2f}", flush=True)


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


def epoch(model, x, y, make, penalty, how):
    net = copy.deepcopy(model)
    optimizer, loader = make(net.parameters()), ewc.TensorLoader(x, y)
    if how == "train_with_ewc":
        ewc.train_with_ewc(net, loader, CE, optimizer, *penalty)
        return
    for a, b in loader:
        optimizer.zero_grad()
        loss = CE(net(a), b)
        if how == "ewc_loss":
            loss = loss + ewc.ewc_loss(net, *penalty)
        loss.backward()
        optimizer.step()


def time_tables():
    for name, (model, n) in models().items():
        mlp = "MLP" in name
        x, y = examples(int(sys.argv[1]) if mlp and len(sys.argv) > 1 else n, name)
        jobs = {"plain": partial(plain, model.eval(), x, y)}
        jobs |= {labels: partial(fisher, model, x, y, labels) for labels in ewc.LABELS}
        table(f"{name}, {len(x):,} examples", jobs, rounds=5 if mlp else 3)
    name, (model, _) = next(iter(models().items()))
    x, y = examples(25_600, name)
    penalty = fisher(model, x, y), ewc.take_anchor(model), 1.0
    ways = "no penalty", "train_with_ewc", "ewc_loss"
    for kind, make in (("SGD", partial(torch.optim.SGD, lr=0.05)), ("Adam", torch.optim.Adam)):
        jobs = {how: partial(epoch, model, x, y, make, penalty, how) for how in ways}
        table(f"an epoch with {kind}, {len(x):,} examples", jobs)


def main():
    warnings.simplefilter("ignore")
    for threads in dict.fromkeys((torch.get_num_threads(), 1)):
        torch.set_num_threads(threads)
        print(f"\ntorch {torch.__version__}, {threads} threads, wall time, medians of rounds")
        time_tables()


if __name__ == "__main__":
    main()
