"""Each bad input raises before any work, in words that name the argument, what it was, and what to do."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ewc_utils import compute_fisher_information, fisher_routes

CE, BCE, MSE = nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss(), nn.MSELoss()
X, Y = torch.ones(6, 4), torch.zeros(6, dtype=torch.long)
NAN, INF = float("nan"), float("inf")


def linear():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def with_weight(value):
    model = linear()
    with torch.no_grad():
        model.weight[1, 2] = value
    return model


def changed(t, value):
    t = t.clone()
    t[2] = value
    return t


class Forward(nn.Module):
    """A linear layer with something done to its output."""

    def __init__(self, change):
        super().__init__()
        self.layer, self.change = linear(), change

    def forward(self, x):
        return self.change(self.layer(x))


class NoSequence:
    """Callable, but not as a model."""

    def __repr__(self):
        return "NoSequence()"


def case(error, *words, model=linear, loader=((X, Y),), criterion=CE, **options):
    return error, words, model, loader, criterion, options


# what is wrong: the error, words that its text must hold, and the call
CASES = {
    "labels unknown": case(ValueError, "labels", "'exact', 'sampled', 'empirical'", "got 'true'", "is the Fisher", labels="true"),
    "labels None": case(ValueError, "labels", "got None", labels=None),
    "criterion sums": case(ValueError, "criterion", "reduction='sum'", "use reduction='mean'", criterion=nn.CrossEntropyLoss(reduction="sum")),
    "criterion does not reduce": case(ValueError, "criterion", "reduction='none'", "use reduction='mean'", criterion=nn.MSELoss(reduction="none")),
    "class weights": case(ValueError, "criterion", "weight=tensor([1., 1., 1.])", "no likelihood", "plain CrossEntropyLoss()",
                          criterion=nn.CrossEntropyLoss(weight=torch.ones(3))),
    "class weights, empirical": case(ValueError, "criterion", "weight=", "plain CrossEntropyLoss()", labels="empirical",
                                     criterion=nn.CrossEntropyLoss(weight=torch.ones(3))),
    "pos_weight": case(ValueError, "criterion", "pos_weight=", "plain BCEWithLogitsLoss()", criterion=nn.BCEWithLogitsLoss(pos_weight=torch.ones(3))),
    "label smoothing": case(ValueError, "criterion", "label_smoothing=0.1", "plain CrossEntropyLoss()", criterion=nn.CrossEntropyLoss(label_smoothing=0.1)),
    "criterion names no distribution": case(ValueError, "labels='exact'", "L1Loss()", "labels='empirical'", criterion=nn.L1Loss()),
    "criterion names none to sample from": case(ValueError, "labels='sampled'", "multi_margin_loss", "labels='empirical'", criterion=F.multi_margin_loss,
                                                labels="sampled"),
    "criterion not callable": case(TypeError, "criterion", "got str", "pass nn.CrossEntropyLoss()", criterion="cross entropy"),
    "criterion None": case(TypeError, "criterion", "got NoneType", criterion=None),
    "criterion returns one loss per example": case(ValueError, "criterion", "one number", "(1, 3)", "take the mean", labels="empirical",
                                                   criterion=lambda z, y: z),
    "model is no module": case(TypeError, "model", "got NoSequence", "pass the network", model=NoSequence),
    "nothing to train": case(ValueError, "model", "0 trainable parameters", "requires_grad_(True)", model=lambda: linear().requires_grad_(False)),
    "NaN weight": case(ValueError, "model", "'weight'", "NaN or infinite", "load finite weights", model=lambda: with_weight(NAN)),
    "infinite weight": case(ValueError, "model", "'weight'", "NaN or infinite", "load finite weights", model=lambda: with_weight(-INF)),
    "model cuts the gradient": case(ValueError, "model", "do not depend on any trainable parameter", "with gradients",
                                    model=lambda: Forward(torch.Tensor.detach)),
    "model returns no tensor": case(TypeError, "model returned str", "wrap it", model=lambda: Forward(str)),
    "model returns a dict without logits": case(TypeError, "model returned NoneType", "'logits'", model=lambda: Forward(lambda z: {"scores": z})),
    "model returns one number": case(ValueError, "model gives a batch of 3", "the batch must come first", model=lambda: Forward(torch.sum)),
    "examples see each other": case(ValueError, "model gives a batch of 3", "no example may see another", model=lambda: Forward(lambda z: z - z.mean(0)),
                                    loader=[(torch.randn(6, 4), Y)]),
    "examples see each other, however small": case(ValueError, "no example may see another", model=lambda: Forward(lambda z: 1e-7 * (z - 0.5 * z.mean(0))),
                                                   loader=[(torch.randn(6, 4), Y)]),
    "examples see each other, one at a time": case(ValueError, "no example may see another", model=lambda: Forward(lambda z: z - 0.5 * z.mean(0)),
                                                   loader=[(x, y) for x, y in zip(torch.randn(6, 1, 4), Y.view(6, 1))]),
    "outputs overflow": case(ValueError, "outputs are not finite", "inputs are finite", "lower the scale", model=lambda: Forward(lambda z: z * 1e38 * 1e38)),
    "no loader": case(TypeError, "data_loader", "got NoneType", "pass a DataLoader", loader=None),
    "empty loader": case(ValueError, "data_loader gave 0 examples", "empty or used up", loader=[]),
    "loader of empty batches": case(ValueError, "data_loader gave 0 examples", loader=[(X[:0], Y[:0])]),
    "all labels ignored": case(ValueError, "data_loader gave 0 examples", "every label is ignored", loader=[(X, torch.full((6,), -100))]),
    "loader used up": case(ValueError, "data_loader gave 0 examples", "used up", loader=iter(())),
    "loader without labels": case(TypeError, "data_loader must yield batches (x, y)", "got Tensor", "wrap it", loader=[X]),
    "loader of triples": case(TypeError, "data_loader must yield batches (x, y)", "got tuple of 3", loader=[(X, Y, Y)]),
    "loader of dicts": case(TypeError, "data_loader must yield batches (x, y)", "got dict", loader=[{"x": X, "y": Y}]),
    "loader of lists": case(TypeError, "data_loader must yield batches (x, y)", "got tuple of 2: list, Tensor", loader=[(X.tolist(), Y)]),
    "a data set in place of a loader": case(ValueError, "data_loader gave 4 inputs", "shape ()", "one label row per input",
                                            loader=torch.utils.data.TensorDataset(X, Y)),
    "inputs too wide": case(RuntimeError, "inputs x of data_loader", "(3, 5) torch.float32", "Give x the shape", loader=[(torch.ones(6, 5), Y)]),
    "inputs of another type": case(RuntimeError, "inputs x of data_loader", "torch.float64", "type", loader=[(X.double(), Y)]),
    "tokens that the embedding has not": case(IndexError, "inputs x of data_loader", "torch.int64", "values", loader=[(Y.view(6, 1) + 9, Y)],
                                              model=lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), linear())),
    "more inputs than labels": case(ValueError, "data_loader gave 6 inputs", "shape (5,)", loader=[(X, Y[:5])]),
    "NaN input": case(ValueError, "inputs x hold NaN", "clean the data", loader=[(changed(X, NAN), Y)]),
    "infinite input": case(ValueError, "inputs x hold NaN or infinite", "clean the data", loader=[(changed(X, INF), Y)]),
    "label too large": case(ValueError, "labels y", "0..2", "got 0..3", "map them", loader=[(X, changed(Y, 3))]),
    "label negative": case(ValueError, "labels y", "0..2", "got -1..0", "map them", loader=[(X, changed(Y, -1))]),
    "label float": case(TypeError, "labels y", "class indices", "torch.float32", "y.long()", loader=[(X, Y.float())]),
    "labels one-hot": case(TypeError, "labels y", "class indices", "torch.float32", loader=[(X, torch.ones(6, 3))]),
    "labels in a column": case(ValueError, "labels y have shape (6, 1)", "want (6,)", "reshape", loader=[(X, Y[:, None])]),
    "no class dimension": case(TypeError, "logits (n, C, ...)", "second dimension", model=lambda: Forward(lambda z: z[:, 0])),
    "BCE target out of range": case(ValueError, "labels y", "0..1", "got 0.0..2.0", criterion=BCE, loader=[(X, changed(torch.zeros(6, 3), 2.0))]),
    "BCE target of another shape": case(ValueError, "labels y have shape (6,)", "want (6, 3)", criterion=BCE, loader=[(X, torch.zeros(6))]),
    "MSE target that would broadcast": case(ValueError, "labels y have shape (6, 1)", "want (6, 3)", criterion=MSE, loader=[(X, torch.zeros(6, 1))]),
    "MSE target NaN": case(ValueError, "labels y", "got nan", criterion=MSE, labels="empirical", loader=[(X, changed(torch.zeros(6, 3), NAN))]),
    "n_samples zero": case(ValueError, "n_samples", "at least 1, got 0", "None means all", n_samples=0),
    "n_samples a fraction": case(ValueError, "n_samples", "got 0.5", n_samples=0.5),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_told_in_plain_words(name):
    error, words, model, loader, criterion, options = CASES[name]
    with pytest.raises(error) as raised:
        compute_fisher_information(model(), loader, criterion, **options)
    for word in words:
        assert word in str(raised.value), f"{word!r} is missing from: {raised.value}"


WITHOUT_DATA = ["labels unknown", "criterion sums", "class weights", "label smoothing", "criterion names no distribution", "criterion not callable",
                "nothing to train", "NaN weight", "n_samples zero"]


@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_what_needs_no_data_is_told_before_any_is_read(name):
    error, _, model, _, criterion, options = CASES[name]

    def loader():
        raise AssertionError("data was read")
        yield

    with pytest.raises(error):
        compute_fisher_information(model(), loader(), criterion, **options)


@pytest.mark.parametrize("name", ["no loader", "empty loader", "loader of dicts", "nothing to train", "NaN weight", "model is no module",
                                  "examples see each other", "model cuts the gradient"])
def test_routes_are_refused_alike(name):
    error, words, model, loader, *_ = CASES[name]
    with pytest.raises(error) as raised:
        fisher_routes(model(), loader)
    assert words[0] in str(raised.value)


@pytest.mark.parametrize("name", ["NaN input", "label too large", "loader of dicts", "examples see each other"])
def test_after_an_error_the_model_is_as_before(name):
    error, _, make, loader, criterion, options = CASES[name]
    model = make().train()
    with pytest.raises(error):
        compute_fisher_information(model, loader, criterion, **options)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_bad_late_batch_is_found_too():
    for bad in ((changed(X, NAN), Y), (X, changed(Y, 7)), (X, Y.float())):
        with pytest.raises((ValueError, TypeError), match="inputs x hold NaN|labels y"):
            compute_fisher_information(linear(), [(X, Y)] * 3 + [bad], CE, max_bytes=1)


def test_a_fisher_that_overflows_is_an_error_that_names_the_parameter():
    with pytest.raises(FloatingPointError, match="Fisher of 'weight' is not finite.*scale the inputs"):
        compute_fisher_information(nn.Linear(4, 3, bias=False), [(1e25 * torch.eye(4), torch.zeros(4, 3))], MSE)
