"""Under torch.distributed the Fisher is that of all data together, whatever share each process holds."""

import copy

import pytest
import reference
import torch
from torch import distributed, multiprocessing, nn

from ewc_utils import compute_fisher_information, compute_kronecker_fisher

SHARES = {"even": [slice(0, 6), slice(6, 12)], "uneven": [slice(0, 9), slice(9, 12)], "one is empty": [slice(0, 12), slice(0, 0)]}


class Net(nn.Module):
    """Layers with a closed form, a bare parameter without one, and a tuple as output."""

    def __init__(self):
        super().__init__()
        self.body, self.scale, self.out = nn.Linear(5, 4), nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.body(x).tanh() * self.scale), None


def setting():
    torch.manual_seed(0)
    return Net(), torch.randn(12, 5), torch.randint(3, (12,))


def batches(x, y, rows):
    return [(x[rows][i:i + 4], y[rows][i:i + 4]) for i in range(0, len(x[rows]), 4)]


def process(rank, folder):
    """One of two processes: its Fishers under every share, bare and wrapped, saved for the test to compare."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, x, y = setting()
    wrapped, found = nn.parallel.DistributedDataParallel(model), {}
    for name, rows in SHARES.items():
        for labels in ("exact", "empirical"):
            for kind, m in (("bare", model), ("wrapped", wrapped)):
                found[name, labels, kind] = compute_fisher_information(m, batches(x, y, rows[rank]), nn.CrossEntropyLoss(), labels=labels)
    x4 = x[:, :4]
    found["Kronecker"] = compute_kronecker_fisher(model.out, batches(x4, y, SHARES["one is empty"][rank]), nn.CrossEntropyLoss())
    found["sampled"] = compute_fisher_information(model, [(x, y)], nn.CrossEntropyLoss(), labels="sampled")
    try:
        compute_fisher_information(model, [], nn.CrossEntropyLoss())
    except ValueError as error:
        found["no data"] = str(error)
    try:  # the second process alone holds a bad image
        compute_fisher_information(model, [(x if rank == 0 else x * float("nan"), y)], nn.CrossEntropyLoss())
    except (RuntimeError, ValueError) as error:
        found["bad data in one"] = f"{type(error).__name__}: {error}"
    for compute, name in ((compute_fisher_information, "bad weight in one"), (compute_kronecker_fisher, "bad weight in one, Kronecker")):
        bad = copy.deepcopy(model.out)
        bad.bias.data[0] = float("nan") if rank == 1 else 0.0
        try:
            compute(bad, [(x4, y)], nn.CrossEntropyLoss())
        except (RuntimeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this build of torch has no gloo")
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", ["bare", "wrapped"])
@pytest.mark.parametrize("labels", ["exact", "empirical"])
@pytest.mark.parametrize("share", SHARES)
def test_two_processes_give_the_result_of_one(results, share, labels, kind):
    """With the plain names, and equal bits in both processes."""
    model, x, y = setting()
    for found in results:
        assert reference.error(found[share, labels, kind], reference.fisher(model, [(x, y)], labels)) < 1e-5
    assert all(torch.equal(results[0][share, labels, kind][name], results[1][share, labels, kind][name])
               for name in dict(model.named_parameters()))


def test_kronecker_factors_where_one_process_has_no_data(results):
    model, x, y = setting()
    (wanted,) = compute_kronecker_fisher(model.out, [(x[:, :4], y)], nn.CrossEntropyLoss()).values()
    for found in results:
        for a, b in zip(found["Kronecker"][""], wanted):
            torch.testing.assert_close(a, b)


def test_processes_draw_labels_of_their_own(results):
    """Both hold the same data here. Were their draws the same too, two processes would be no better than one."""
    model, x, y = setting()
    alone = compute_fisher_information(model, [(x, y)], nn.CrossEntropyLoss(), labels="sampled")
    assert not any(torch.allclose(results[0]["sampled"][name], alone[name]) for name in alone)


@pytest.mark.parametrize("what, error", [("bad data in one", "ValueError: the model's outputs are not finite"),
                                         ("bad weight in one", "ValueError: model parameter 'bias' holds NaN"),
                                         ("bad weight in one, Kronecker", "ValueError: model parameter 'bias' holds NaN")])
def test_an_error_in_one_process_is_one_in_all(results, what, error):
    assert "RuntimeError: the Fisher failed on 1 other process(es)" in results[0][what]
    assert error in results[1][what]


def test_no_data_anywhere_is_an_error_in_every_process(results):
    assert all("data_loader gave 0 examples" in found["no data"] for found in results)
