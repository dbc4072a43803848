"""Under torch.distributed the Fisher is that of all data, whatever share each process holds."""

import copy
import itertools
import math
from pathlib import Path

import pytest
import reference
import torch
from reference import CE, Net, assert_close, refused, same_bits
from torch import distributed, multiprocessing, nn

from ewc_utils import compute_fisher_information, compute_kronecker_fisher, take_anchor

SHARES = {"even": (6, 6), "uneven": (9, 3), "one is empty": (12, 0)}  # of twelve examples
BOTH = {"diagonal": compute_fisher_information, "Kronecker": compute_kronecker_fisher}


def setting():
    torch.manual_seed(0)
    forward = lambda net, x: {"logits": net.out(net.body(x).tanh() * net.scale)}  # noqa: E731
    parts = {"body": nn.Linear(5, 4), "scale": nn.Parameter(torch.ones(4)), "out": nn.Linear(4, 3)}
    return Net(forward, **parts), torch.randn(12, 5), torch.randint(3, (12,))


def process(rank, folder):
    """One of two processes: what it finds is saved, for the tests to compare."""
    torch.set_num_threads(1)
    meet = (Path(folder) / "meet").as_uri()
    distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    model, x, y = setting()
    wrapped, bad, found = nn.parallel.DistributedDataParallel(model), copy.deepcopy(model.out), {}
    for share, sizes in SHARES.items():
        batches = list(zip(*(t.split(sizes)[rank].split(4) for t in (x, y))))
        for labels in ("exact", "empirical"):
            for kind, m in (("bare", model), ("wrapped", wrapped)):
                fisher = compute_fisher_information(m, batches, CE, labels=labels)
                found[share, labels, kind] = fisher
        found[share] = compute_kronecker_fisher(model.out, [(a[:, :4], b) for a, b in batches], CE)
    found["sampled"] = compute_fisher_information(model, [(x, y)], CE, labels="sampled")
    bad.bias.data[0] *= math.nan if rank else 1
    x = x[:, :4]
    cases = {"no data": (model.out, []), "a bad weight": (bad, [(x, y)])}
    cases["a bad image"] = model.out, [(x * math.nan if rank else x, y)]
    for name, what in itertools.product(BOTH, cases):
        with pytest.raises(Exception) as raised:
            BOTH[name](*cases[what], CE)
        found[name, what] = repr(raised.value)
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this build of torch has no gloo")
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("share", SHARES)
def test_two_processes_give_the_result_of_one(results, share):
    """With the plain names, and equal bits in both processes."""
    model, x, y = setting()
    for labels in ("exact", "empirical"):
        logits = Net(lambda net, x: net.model(x)["logits"], model=model)
        truth = reference.fisher(logits, [(x, y)], labels)
        for kind in ("bare", "wrapped"):
            one, other = (found[share, labels, kind] for found in results)
            assert same_bits(one, other)
            assert reference.error({f"model.{name}": f for name, f in one.items()}, truth) < 1e-5
    wanted = compute_kronecker_fisher(model.out, [(x[:, :4], y)], CE)
    for found in results:
        assert_close(found[share], wanted)


def test_processes_draw_labels_of_their_own(results):
    """Both hold the same data here. With the same draws, two would be no better than one."""
    model, x, y = setting()
    alone = compute_fisher_information(model, [(x, y)], CE, labels="sampled")
    assert not any(torch.allclose(results[0]["sampled"][name], alone[name]) for name in alone)


@pytest.mark.parametrize("name", BOTH)
def test_an_error_in_one_process_is_one_in_all(results, name):
    healthy, failed = results
    for what in ("a bad image", "a bad weight"):
        assert "RuntimeError" in healthy[name, what] and "other process" in healthy[name, what]
        assert "ValueError" in failed[name, what] and "finite" in failed[name, what]
    for found in results:
        assert "ValueError" in found[name, "no data"] and "0 examples" in found[name, "no data"]


def test_fully_sharded_models_are_refused_by_name():
    """Their parameters are shards; a stand-in that has the name is enough to see it."""
    forward = {"forward": lambda self, x: self.module(x)}
    sharded = type("FullyShardedDataParallel", (nn.Module,), forward)()
    sharded.module, batch = nn.Linear(5, 3), (torch.randn(6, 5), torch.arange(6) % 3)
    for model in (sharded, nn.Sequential(sharded)):
        runs = reference.all_that_runs(model, [batch])
        for run in (runs["Fisher"], runs["Kronecker"], lambda m=model: take_anchor(m)):
            with refused((TypeError, ValueError), "FullyShardedDataParallel"):
                run()
