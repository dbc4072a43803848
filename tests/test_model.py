"""The network, its accuracy, and the anchor taken from it."""

import copy
import types

import numpy as np
import pytest
import reference
import torch
from reference import CE, Net, assert_close, refused, same_bits
from torch import nn

import ewc_utils
from ewc_utils import SimpleMLP, accuracy, compute_fisher_information, ewc_loss, take_anchor

SGD = torch.optim.SGD


def network(hidden=(5, 4), n_out=3, **how):
    torch.manual_seed(0)
    return SimpleMLP(6, hidden, n_out, **how)


WIDTHS = [(5, [6, 5, 3]), (np.int64(5), [6, 5, 3]), ((5, 4), [6, 5, 4, 3]), ((), [6, 3])]


@pytest.mark.parametrize("hidden, widths", WIDTHS)
def test_the_network_is_linear_maps_and_relus_on_standardised_bytes_or_floats(hidden, widths):
    plain, model = network(hidden), network(hidden, mean=70, std=90.0)
    model.layers.load_state_dict(plain.layers.state_dict())
    x = torch.randint(256, (7, 1, 2, 3), dtype=torch.uint8)
    weights = [p.detach() for p in model.parameters()]
    assert [w.shape for w in weights[::2]] == [*zip(widths[1:], widths)]
    z = (x.float().flatten(1) - 70) / 90
    for i in range(0, len(weights), 2):
        z = (z if i == 0 else z.clamp(min=0)) @ weights[i].T + weights[i + 1]
    torch.testing.assert_close(model(x), z)
    torch.testing.assert_close(model(x.float()), z)
    torch.testing.assert_close(plain((x.float() - 70) / 90), z)
    torch.testing.assert_close(model.double()(x), z.double())


def test_a_saved_network_keeps_its_mean_and_std(tmp_path):
    model, loaded, x = network(mean=70, std=80), network(), torch.randint(256, (7, 6))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(loaded(x), model(x)) and not torch.equal(loaded(x), network()(x))
    assert {"mean", "std"} < set(model.state_dict()) and len(take_anchor(model)) == 6


def test_accuracy_is_the_share_of_labels_with_the_largest_logit():
    model = Net(lambda net, z: z, unused=nn.Linear(1, 1))
    z = torch.tensor([[2.0, 1, 0], [0, 3, 1], [0, 1, 2], [5, 0, 1]])
    for labels, share in (([0, 1, 2, 0], 1.0), ([0, 1, 1, 1], 0.5), ([1, 0, 0, 1], 0.0)):
        for dtype in (torch.int64, torch.int32, torch.uint8):
            assert accuracy(model, z, torch.tensor(labels, dtype=dtype)) == share
        assert accuracy(model, z.numpy(), np.array(labels), batch_size=3) == share
        positions = z.T[None].repeat(2, 1, 1), torch.tensor([labels, [0, 1, 2, 0]])
        assert accuracy(model, *positions) == (share + 1) / 2


def test_accuracy_does_not_count_what_is_ignored_and_needs_something_to_count():
    model, z = Net(lambda net, z: z, unused=nn.Linear(1, 1)), torch.eye(3)
    assert accuracy(model, z, torch.tensor([0, 1, -100])) == 1.0
    batches = [(z, torch.tensor([-100, 2, -100])), (z, torch.arange(3))]
    assert accuracy(model, iter(batches)) == 3 / 4
    for data in ((z[:0], torch.arange(0)), ([],), (z, torch.full((3,), -100))):
        with refused(ValueError, "0 ", "empty"):
            accuracy(model, *data)


class Merging(nn.Sequential):
    """Its train() does more than set the flag, as that of adapters which eval() merges."""

    merged = False

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)


@pytest.mark.parametrize("mode", [True, False])
def test_evaluation_mode_is_put_back_also_by_a_train_method_of_ones_own(mode):
    torch.manual_seed(0)
    layers = nn.Linear(6, 50), nn.BatchNorm1d(50).requires_grad_(False), nn.Dropout(0.9)
    model, x = Merging(*layers, nn.Linear(50, 3)).train(mode), torch.randn(40, 6)
    model[1].train(not mode)
    modes, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    y = copy.deepcopy(model).eval()(x).argmax(1)
    assert accuracy(model, x, y) == 1.0
    assert same_bits(model.state_dict(), state)
    for run in reference.all_that_runs(model, [(x, y)]).values():
        run()
        assert [m.training for m in model.modules()] == modes
        assert model.merged == (not mode)


def squeezed(logits, loss):
    return logits.squeeze()  # also in a last batch of one example


@pytest.mark.parametrize("wrap", [dict, squeezed, types.SimpleNamespace])
def test_logits_are_found_in_what_the_model_returns(wrap):
    out, x = network(), torch.randn(9, 6)
    model = Net(lambda net, x: wrap(loss=None, logits=net.out(x)), out=out)
    y = out(x).argmax(1)
    assert accuracy(model, x, y, batch_size=4) == 1.0
    found, batches = [], list(zip(x.split(4), y.split(4)))
    for m in (model, network()):
        fisher, optimizer = compute_fisher_information(m, batches, CE), SGD(m.parameters(), lr=0.1)
        (loss,) = ewc_utils.train_with_ewc(m, batches, CE, optimizer, None, None, 0)
        found.append({name.removeprefix("out."): f for name, f in fisher.items()} | {"": loss})
    assert_close(*found)


@pytest.mark.parametrize("kind", [tuple, list])
def test_several_outputs_without_a_name_are_refused_with_what_came_back(kind):
    """Features and logits, say: the first of them need not be the logits."""
    model = Net(lambda net, x: kind([x, net.out(x)]), out=network())
    for run in reference.all_that_runs(model, [(torch.randn(9, 6), torch.arange(9) % 3)]).values():
        with refused(TypeError, "model", "6), (", "3)", "logits"):
            run()


Y = torch.arange(6) % 3
BAD_LABELS = {
    "labels in a column": (3, Y[:, None], ("y", "(6, 1)", "(6,)")),
    "labels too large": (3, Y + 1, ("y", "0..2", "got 3")),
    "soft labels": (3, torch.rand(6, 3), ("y", "class indices", "float32")),
    "one logit": (1, 0 * Y, ("labels y", "two classes")),
    "one logit, squeezed": (0, Y % 2, ("y", "(6,)", "class indices")),
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_accuracy_refuses_labels_that_do_not_fit(name):
    n_out, y, words = BAD_LABELS[name]
    model = Net(lambda net, x: net.a(x) if n_out else net.a(x)[:, 0], a=network(n_out=n_out or 1))
    with refused(ValueError, *words):
        accuracy(model, torch.randn(6, 6), y)
    assert model.training


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_the_anchor_is_a_copy_that_does_not_move_and_can_be_differentiated_around(mode):
    model = network()
    with mode():
        anchor, before = take_anchor(model), copy.deepcopy(dict(model.named_parameters()))
    with torch.no_grad():
        model.layers[1].weight.add_(0.5)
    assert same_bits(anchor, before)
    assert not any(t.requires_grad or t.is_inference() for t in anchor.values())
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    ewc_loss(model, ones, anchor, 2.0).backward()
    torch.testing.assert_close(model.layers[1].weight.grad, torch.full((5, 6), 1.0))


def test_anchor_and_fisher_hold_the_trainable_and_real_parameters_by_their_plain_names():
    model, batch = network(), (torch.randn(9, 6), torch.arange(9) % 3)
    model.layers[1].weight.requires_grad_(False)
    names = [name for name, _ in model.named_parameters()][1:]
    fisher = compute_fisher_information(model, [batch], CE)
    for wrapped in (model, nn.DataParallel(model), nn.DataParallel(torch.compile(model))):
        assert list(take_anchor(wrapped)) == names
        assert_close(compute_fisher_information(wrapped, [batch], CE), fisher)
    with refused(ValueError, "model", "gradients", "[]"):
        take_anchor(network().requires_grad_(False))
    with refused(ValueError, "real", "['w']"):
        take_anchor(Net(None, w=nn.Parameter(torch.zeros(2, dtype=torch.cfloat))))
