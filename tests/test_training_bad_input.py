"""Bad input to the penalty and the training: the error names the argument, the value and the remedy, before any work."""

import copy

import pytest
import torch
from torch import nn

from ewc_utils import SimpleMLP, ewc_loss, take_anchor, train_with_ewc

CE = nn.CrossEntropyLoss()
W = "layers.1.weight"  # (4, 5)


def batch(n=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 5, generator=generator), torch.randint(0, 3, (n,), generator=generator)


class Setting:
    """Arguments that work, to be spoilt one at a time."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = SimpleMLP(5, 4, 3)
        self.train_loader, self.criterion = [batch()] * 3, CE
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.fisher_dict = {name: torch.ones_like(p) for name, p in self.model.named_parameters()}
        self.optimal_params, self.lambda_ewc, self.options = take_anchor(self.model), 1.0, {}

    def train(self):
        return train_with_ewc(self.model, self.train_loader, self.criterion, self.optimizer, self.fisher_dict, self.optimal_params,
                              self.lambda_ewc, **self.options)

    def penalty(self):
        return ewc_loss(self.model, self.fisher_dict, self.optimal_params, self.lambda_ewc, parameters=self.options.get("parameters"))


@pytest.fixture
def setting():
    return Setting()


def refused(setting, error, *parts, call="train"):
    """The error holds all the parts, and the model is as it was: weights, modes, gradients, random state."""
    setting.model.layers[2].eval()
    state, modes = copy.deepcopy(setting.model.state_dict()), [m.training for m in setting.model.modules()]
    random = torch.get_rng_state()
    with pytest.raises(error) as caught:
        getattr(setting, call)()
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert all(torch.equal(value, state[name]) or value.isnan().any() for name, value in setting.model.state_dict().items())
    assert [m.training for m in setting.model.modules()] == modes and torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in setting.model.parameters()) and not setting.optimizer.state


def test_the_setting_itself_works(setting):
    assert len(setting.train()) == 1 and setting.penalty().item() >= 0


def test_work_has_not_begun_when_the_error_comes(setting):
    """The loader is not touched before the arguments are found right."""
    class Untouchable:
        def __iter__(self):
            raise AssertionError("the loader was asked for a batch")
    setting.train_loader, setting.lambda_ewc = Untouchable(), -1.0
    refused(setting, ValueError, "lambda_ewc")


# ---------------------------------------------------------------- lambda, Fisher, anchor


@pytest.mark.parametrize("call", ["train", "penalty"])
@pytest.mark.parametrize("value", [-1, -1e-9, float("nan"), float("inf"), float("-inf"), "1", None, True, torch.tensor(1.0)])
def test_lambda_must_be_a_finite_number_of_at_least_0(setting, call, value):
    setting.lambda_ewc = value
    refused(setting, ValueError, "lambda_ewc must be a finite number of at least 0", repr(value), "0 switches the penalty off", call=call)


DICTIONARIES = pytest.mark.parametrize("argument", ["fisher_dict", "optimal_params"])
BOTH_CALLS = pytest.mark.parametrize("call", ["train", "penalty"])


@BOTH_CALLS
@DICTIONARIES
def test_missing_names_are_listed(setting, argument, call):
    del getattr(setting, argument)[W]
    refused(setting, ValueError, f"{argument} does not fit the model", f"missing ['{W}']", "parameters=[...]", call=call)


@BOTH_CALLS
@DICTIONARIES
def test_unknown_names_are_listed(setting, argument, call):
    getattr(setting, argument)["head.weight"] = torch.ones(2)
    refused(setting, ValueError, f"{argument} does not fit the model", "unknown ['head.weight']", "Take it from this model", call=call)


@BOTH_CALLS
@DICTIONARIES
def test_another_shape_is_told_with_both_shapes(setting, argument, call):
    getattr(setting, argument)[W] = torch.ones(5, 4)
    refused(setting, ValueError, f"{argument}['{W}']", "(4, 5)", "got (5, 4)", "take it anew", call=call)


@BOTH_CALLS
@DICTIONARIES
def test_another_device_is_told_with_both_devices(setting, argument, call):
    getattr(setting, argument)[W] = torch.ones(4, 5, device="meta")
    refused(setting, ValueError, f"{argument}['{W}']", "on cpu", "on meta", call=call)


@BOTH_CALLS
@DICTIONARIES
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_entries_are_told_by_name_and_value(setting, argument, value, call):
    given = getattr(setting, argument)
    given[W] = given[W].clone()
    given[W][0, 0], given[W][2, 3] = 1.0 if argument == "fisher_dict" else -1.0, value
    refused(setting, ValueError, f"{argument}['{W}'] holds {value}", "finite", "compute it anew", call=call)


@BOTH_CALLS
def test_a_negative_fisher_is_told_by_name_and_value(setting, call):
    setting.fisher_dict[W][1, 1] = -0.25
    refused(setting, ValueError, f"fisher_dict['{W}'] holds -0.25", "at least 0", call=call)


def test_a_tensor_that_was_found_good_is_looked_at_again_after_a_change(setting):
    setting.penalty()
    setting.fisher_dict[W][1, 1] = float("nan")
    refused(setting, ValueError, f"fisher_dict['{W}'] holds nan", call="penalty")


@BOTH_CALLS
@DICTIONARIES
@pytest.mark.parametrize("value, kind", [(None, "NoneType"), ([1, 2], "list of 2"), (3.0, "float")])
def test_no_dictionary_where_lambda_is_above_0(setting, argument, value, kind, call):
    setattr(setting, argument, value)
    remedy = "compute_fisher_information" if argument == "fisher_dict" else "take_anchor"
    refused(setting, TypeError, f"{argument} must be a mapping", f"got {kind}", remedy, call=call)


def test_both_dictionaries_none_is_for_lambda_0_only(setting):
    setting.fisher_dict = setting.optimal_params = None
    refused(setting, TypeError, "fisher_dict must be a mapping", "got NoneType")
    setting.lambda_ewc = 0
    assert len(setting.train()) == 1


@BOTH_CALLS
def test_an_entry_that_is_no_tensor(setting, call):
    setting.fisher_dict[W] = [1.0]
    refused(setting, ValueError, f"fisher_dict['{W}'] must be a tensor like the parameter", "got list of 1", call=call)


@BOTH_CALLS
@pytest.mark.parametrize("names", [["layers.9.weight"], [], "layers", ["layers.1.weight", "x"]])
def test_parameters_must_name_trainable_parameters(setting, names, call):
    setting.options["parameters"] = names
    refused(setting, ValueError, "parameters must name trainable parameters of the model, got", "layers.3.bias", call=call)


# ---------------------------------------------------------------- loader, inputs, labels


@pytest.mark.parametrize("loader", [[], (), iter([]), [(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))]])
def test_an_empty_loader(setting, loader):
    setting.train_loader = loader
    refused(setting, ValueError, "train_loader gave 0 batches", "empty", "pass a loader")


def test_an_iterator_cannot_serve_two_epochs(setting):
    for loader in (iter([batch()]), (b for b in [batch()])):
        setting.train_loader, setting.options["epochs"] = loader, 2
        refused(setting, ValueError, "train_loader is an iterator", "1 of 2 epochs", "pass a list or a loader")


X, Y = batch()


@pytest.mark.parametrize("thing, kind", [
    (X, "Tensor"), ((X,), "tuple of 1: Tensor"), ((X, Y, Y), "tuple of 3"), ({"x": X, "y": Y}, "dict"), ((X, [0, 1]), "tuple of 2: Tensor, list"),
    (("a", "b"), "str, str"), (None, "NoneType"), ((X.numpy(), Y.numpy()), "ndarray, ndarray")])
def test_a_loader_that_yields_something_else(setting, thing, kind):
    setting.train_loader = [thing]
    refused(setting, TypeError, "train_loader must yield batches (x, y) of tensors", kind, "wrap it")


@pytest.mark.parametrize("x", [torch.ones(8, 6), X.double()], ids=["too wide", "float64"])
def test_inputs_that_the_model_cannot_take(setting, x):
    setting.train_loader = [(x, Y)]
    refused(setting, RuntimeError, f"inputs x of train_loader, {tuple(x.shape)} {x.dtype}", "Give x the shape")


def test_inputs_and_labels_of_different_lengths(setting):
    setting.train_loader = [(X, Y[:5])]
    refused(setting, ValueError, "train_loader gave 8 inputs with labels of shape (5,)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_inputs_put_the_weights_back_and_name_the_inputs(setting, value):
    x = X.clone()
    x[3, 2] = value
    setting.train_loader = [(X, Y), (X, Y), (x, Y)]
    before = take_anchor(setting.model)
    with pytest.raises(FloatingPointError, match="step 2.*train_loader gave inputs x with NaN or infinite values: clean the data"):
        setting.train()
    assert all(torch.equal(p, before[name]) for name, p in setting.model.named_parameters())


def test_non_finite_weights(setting):
    with torch.no_grad():
        setting.model.layers[1].weight[0, 0] = float("nan")
    refused(setting, ValueError, f"model parameter '{W}' holds NaN", "load finite weights")


@pytest.mark.parametrize("y, error, parts", [
    (Y + 1, ValueError, ("labels y must lie in 0..2", "3", "map them")),
    (Y - 1, ValueError, ("labels y must lie in 0..2", "got -1")),
    (Y.float(), TypeError, ("class indices (int64)", "torch.float32", "y.long()")),
    (Y.int(), TypeError, ("class indices (int64)", "torch.int32", "y.long()")),
    (Y.unsqueeze(1), ValueError, ("labels y have shape (8, 1)", "logits (8, 3) want (8,)", "reshape")),
], ids=["too large", "negative", "float", "int32", "column"])
@pytest.mark.parametrize("criterion", [CE, nn.functional.cross_entropy], ids=["module", "function"])
def test_labels_that_do_not_fit_the_classes(setting, y, error, parts, criterion):
    setting.train_loader, setting.criterion = [(X, y)], criterion
    refused(setting, error, *parts)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("criterion, y, parts", [
    (nn.MSELoss(), torch.zeros(8), ("labels y have shape (8,)", "(8, 3)")),
    (nn.MSELoss(), torch.zeros(8, 1), ("labels y have shape (8, 1)", "(8, 3)")),
    (nn.MSELoss(), torch.full((8, 3), float("nan")), ("labels y", "got nan")),
    (nn.functional.mse_loss, torch.zeros(8), ("labels y have shape (8,)", "(8, 3)")),
    (nn.BCEWithLogitsLoss(), torch.zeros(8, 1), ("labels y have shape (8, 1)", "(8, 3)")),
    (nn.BCEWithLogitsLoss(), torch.full((8, 3), 2.0), ("labels y must lie in 0..1", "got 2.0")),
    (nn.BCEWithLogitsLoss(), torch.full((8, 3), -1.0), ("labels y must lie in 0..1", "got -1.0")),
])
def test_targets_that_would_broadcast_or_lie_outside_their_range(setting, criterion, y, parts):
    setting.criterion, setting.train_loader = criterion, [(X, y)]
    refused(setting, ValueError, *parts)


# ---------------------------------------------------------------- criterion, optimizer, model, options


@pytest.mark.parametrize("make", [nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss, nn.NLLLoss])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_criterion_that_is_no_mean(setting, make, reduction):
    setting.criterion = make(reduction=reduction)
    refused(setting, ValueError, f"criterion has reduction='{reduction}'", "mean loss", "use reduction='mean'")


def test_a_criterion_that_returns_one_number_per_example(setting):
    setting.criterion = lambda z, y: nn.functional.cross_entropy(z, y, reduction="none")
    refused(setting, ValueError, "criterion", "must return one number, got (8,)", "take the mean")


@pytest.mark.parametrize("criterion", ["CrossEntropyLoss", None])
def test_a_criterion_that_cannot_be_called(setting, criterion):
    setting.criterion = criterion
    refused(setting, TypeError, "criterion must be callable", type(criterion).__name__, "nn.CrossEntropyLoss()")


def test_what_is_no_optimizer_or_needs_a_closure(setting):
    for optimizer in (None, "SGD", torch.optim.LBFGS(setting.model.parameters())):
        setting.optimizer = optimizer
        with pytest.raises(TypeError, match=f"optimizer must be a torch.optim optimizer.* got {type(optimizer).__name__}: pass torch.optim.SGD"):
            setting.train()


def test_an_optimizer_of_another_model(setting):
    setting.optimizer = torch.optim.SGD(SimpleMLP(5, 4, 3).parameters(), lr=0.1)
    refused(setting, ValueError, "optimizer does not own", "layers.3.bias", "make it from this model's parameters()")


def test_an_optimizer_of_only_some_parameters(setting):
    setting.optimizer = torch.optim.SGD(setting.model.layers[3].parameters(), lr=0.1)
    refused(setting, ValueError, f"optimizer does not own the model's parameters ['layers.1.bias', '{W}']", "requires_grad_(False)")
    for p in setting.model.layers[1].parameters():
        p.requires_grad_(False)
    assert len(setting.train()) == 1  # the remedy


@BOTH_CALLS
def test_a_model_with_nothing_to_train(setting, call):
    for p in setting.model.parameters():
        p.requires_grad_(False)
    refused(setting, ValueError, "model has 0 trainable parameters", "requires_grad_(True)", call=call)


def test_an_anchor_of_nothing_is_refused():
    with pytest.raises(ValueError, match="model has 0 trainable parameters"):
        take_anchor(SimpleMLP(5, 4, 3).requires_grad_(False))


def test_a_model_that_returns_no_tensor(setting):
    setting.model.forward = lambda x: "logits"
    refused(setting, TypeError, "model returned str", "wrap it")


@pytest.mark.parametrize("option, value, parts", [
    ("epochs", 0, ("epochs must be a whole number of at least 1, got 0",)),
    ("epochs", -1, ("epochs", "got -1")),
    ("epochs", 1.5, ("epochs", "got 1.5")),
    ("epochs", "3", ("epochs", "got '3'")),
    ("penalty", "proximal", ("penalty must be 'explicit' or 'implicit', got 'proximal'",)),
    ("every", 0, ("every must be a whole number of at least 1", "got 0")),
    ("every", 8, ("every", "1 with penalty='explicit'", "got 8")),
    ("callback_steps", 0, ("callback_steps must be at least 1, or a collection of steps, got 0",)),
    ("callback_steps", -5, ("callback_steps", "got -5")),
])
def test_options_outside_their_range(setting, option, value, parts):
    setting.options[option] = value
    refused(setting, ValueError, *parts)
