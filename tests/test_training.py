"""Training with the penalty: against a loop written by hand, closed forms, and known answers."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from reference import BCE, CE, MSE, Net, assert_close, draw, random_penalty, refused, same_bits
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, RMSprop
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

import ewc_utils
from ewc_utils import SimpleMLP, compute_fisher_information, ewc_loss, take_anchor

OPTIMIZERS = {
    "SGD": lambda ps: SGD(ps, lr=0.1),
    "rates": lambda ps: SGD([{"params": [p], "lr": 0.1 / (i + 1)} for i, p in enumerate(ps)]),
    "Nesterov": lambda ps: SGD(ps, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda ps: Adam(ps, lr=0.01),
}
BOTH = pytest.mark.parametrize("penalty", ["explicit", "implicit"])
PLAIN = None, None, 0  # no Fisher, no anchor, lambda 0


def plain(model, lr=0.1):
    return SGD(model.parameters(), lr=lr)


X, Y = draw(70, 6), draw(70, 3, seed=1).argmax(1)
BATCHES = list(zip(X.split(10), Y.split(10)))  # seven


def train(model, *penalty, loader=BATCHES, criterion=CE, optimizer=None, **how):
    """By SGD at the rate 0.1, without a penalty, unless told otherwise."""
    optimizer = optimizer or plain(model)
    return ewc_utils.train_with_ewc(model, loader, criterion, optimizer, *penalty or PLAIN, **how)


def network():
    torch.manual_seed(0)
    return SimpleMLP(6, (5, 4), 3).double()


def by_hand(model, loader, optimizer, *, penalty=None, criterion=CE, after=None):
    """The textbook loop. Returns each batch's L_B."""
    losses = []
    for x, y in loader:
        loss = criterion(model(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss if penalty is None else loss + ewc_loss(model, *penalty)).backward()
        optimizer.step()
        if after is not None:
            after(len(losses))
    return losses


def proximal(model, fisher, anchor, rates):
    """theta* + (theta - theta*) / (1 + rate F), in place. rates: one, or one per parameter."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            rate = rates[name] if isinstance(rates, dict) else rates
            f, fixed = fisher[name].double(), anchor[name].double()
            p.copy_(fixed + (p - fixed) / (1 + rate * f))


def modes(model):
    return [m.training for m in model.modules()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_explicit_step_equals_a_loop_with_ewc_loss_as_a_term(name):
    """Also with a scheduler, which is stepped after every batch, and for a wrapped model."""
    model, twin = network(), network()
    penalty = *random_penalty(model), 3.0
    optimizer, other = (OPTIMIZERS[name](m.parameters()) for m in (model, twin))
    how = {"epochs": 3, "scheduler": ExponentialLR(optimizer, 0.9)}
    offered = ("step", "zero_grad", "param_groups")  # by a wrapper, and no more
    how["optimizer"] = SimpleNamespace(**{name: getattr(optimizer, name) for name in offered})
    losses = train(nn.DataParallel(model), *penalty, **how)
    scheduler = ExponentialLR(other, 0.9)
    after = lambda step: scheduler.step()  # noqa: E731
    own = by_hand(twin, BATCHES * 3, other, penalty=penalty, after=after)
    assert_close(model.state_dict(), twin.state_dict(), rtol=1e-9, atol=1e-11)
    means = [sum(own[i : i + 7]) / 7 for i in (0, 7, 14)]
    assert losses == pytest.approx(means, rel=1e-9)  # L_B alone, without the penalty


@pytest.mark.parametrize("every", [1, 3])
def test_the_implicit_step_equals_a_loop_with_a_proximal_step_after_every_few_steps(every):
    """The rates of each group and step add up, and an epoch ends with a proximal step."""
    model, twin = network(), network()
    fisher, anchor = random_penalty(model)
    optimizer, other = (OPTIMIZERS["rates"](m.parameters()) for m in (model, twin))
    how = {"optimizer": optimizer, "epochs": 2, "scheduler": ExponentialLR(optimizer, 0.9)}
    train(model, fisher, anchor, 5.0, penalty="implicit", every=every, **how)
    waiting = dict.fromkeys(fisher, 0.0)

    def after(step):
        for name, group in zip(fisher, other.param_groups):
            waiting[name] += 5.0 * group["lr"]
            group["lr"] *= 0.9
        if step % every == 0 or step % 7 == 0:  # 7 batches an epoch
            proximal(twin, fisher, anchor, waiting)
            waiting.update(dict.fromkeys(fisher, 0.0))

    by_hand(twin, BATCHES * 2, other, after=after)
    assert_close(model.state_dict(), twin.state_dict(), rtol=1e-9, atol=1e-11)


def noisy():
    """Dropout draws numbers and BatchNorm keeps buffers: an extra draw or pass would show."""
    layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
    return nn.Sequential(*layers)


WAYS = [("SGD", "explicit"), ("SGD", "implicit"), ("Adam", "explicit")]


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name, penalty", WAYS)
def test_lambda_zero_is_plain_training_bit_for_bit(name, penalty, given):
    loader, states = DataLoader(TensorDataset(X.float(), Y), batch_size=16, shuffle=True), []
    for ours in (True, False):
        torch.manual_seed(3)
        model = noisy()
        optimizer = OPTIMIZERS[name](model.parameters())
        args = (*random_penalty(model), 0) if given else PLAIN
        if ours:
            train(model, *args, loader=loader, optimizer=optimizer, penalty=penalty, epochs=2)
        else:
            by_hand(model, itertools.chain(loader, loader), optimizer)
        states.append(model.state_dict() | {"random state": torch.get_rng_state()})
    assert same_bits(*states)


@BOTH
@pytest.mark.parametrize("sparse", [False, True])
def test_unused_parameters_and_untouched_rows_are_pulled_too_empty_ones_do_no_harm(penalty, sparse):
    torch.manual_seed(0)
    parts = {"words": nn.Embedding(9, 4, sparse=sparse), "out": nn.Linear(12, 3)}
    forward = lambda net, x: net.out(net.words(x).flatten(1))  # noqa: E731
    model = Net(forward, **parts, unused=nn.Linear(2, 2), e=nn.Parameter(torch.ones(0))).double()
    model.register_buffer("graph", torch.eye(3).to_sparse())
    twin, batch = copy.deepcopy(model), (torch.randint(5, (20, 3)), torch.arange(20) % 3)
    args = *random_penalty(model), 2.0
    train(model, *args, loader=[batch], penalty=penalty)
    by_hand(twin, [batch], plain(twin), penalty=args if penalty == "explicit" else None)
    if penalty == "implicit":
        proximal(twin, *args[:2], 0.1 * 2.0)
    assert_close(model.state_dict(), twin.state_dict(), rtol=1e-9, atol=1e-11)
    with pytest.raises(FloatingPointError):
        train(model, *args[:2], 1e7, loader=[batch] * 90)
    assert_close(model.state_dict(), twin.state_dict(), rtol=1e-9, atol=1e-11)


SOFT, BITS = draw(70, 3, seed=2).softmax(1), draw(70, 3) > 0
WEIGHTED = nn.CrossEntropyLoss(torch.arange(3.0).double(), label_smoothing=0.1)
LOSSES = {  # the criterion, the labels given, the labels that it takes
    "soft labels": (CE, SOFT, SOFT),
    "class weights": (WEIGHTED, Y, Y),
    "KLDivLoss": (nn.KLDivLoss(reduction="batchmean"), SOFT, SOFT),
    "NLLLoss": (nn.NLLLoss(), Y, Y),
    **{f"CE, {d}": (CE, Y.to(d), Y) for d in (torch.int8, torch.uint8, torch.int16, torch.int32)},
    **{f"BCE, {d}": (BCE, BITS.to(d), BITS.double()) for d in (torch.uint8, torch.bool)},
    "MSE, int16": (MSE, BITS.short(), BITS.double()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_labels_of_every_type_train_as_by_hand(name):
    (criterion, y, wanted), model, twin = LOSSES[name], network(), network()
    args, how = (*random_penalty(model), 3.0), {"criterion": criterion}
    train(model, *args, loader=list(zip(X.split(10), y.split(10))), **how)
    by_hand(twin, zip(X.split(10), wanted.split(10)), plain(twin), penalty=args, **how)
    assert_close(model.state_dict(), twin.state_dict(), rtol=1e-9, atol=1e-11)


def least_squares(x, y):
    solution = torch.linalg.lstsq(F.pad(x, (0, 1), value=1.0), y).solution
    return torch.cat([solution[:-1].T.flatten(), solution[-1]])  # weight and bias


@BOTH
@pytest.mark.parametrize("how", [{}, {"momentum": 0.5}, {"momentum": 0.9, "dampening": 0.9}])
@pytest.mark.parametrize("positions, outputs", [(1, 1), (1, 5), (4, 2)])
def test_ewc_at_the_ratio_of_examples_lands_on_the_joint_solution(penalty, how, positions, outputs):
    """Two linear-Gaussian tasks. A's design is orthogonal, so its Fisher is its whole Hessian.

    The loss is a mean over the numbers of an example, too: lambda is N_A / N_B over their count.
    """
    q, _ = torch.linalg.qr(F.pad(draw(300, 3), (1, 0), value=1.0))
    xa, xb = q[:, 1:] * torch.tensor([20.0, 15, 10], dtype=torch.float64), draw(100, 3, seed=1)
    ya = xa @ draw(3, outputs, seed=2) + 1 + 0.5 * draw(300, outputs, seed=3)
    yb = xb @ draw(3, outputs, seed=4) - 1 + 0.5 * draw(100, outputs, seed=5)
    joint = least_squares(torch.cat([xa, xb]), torch.cat([ya, yb]))
    model = nn.Linear(3, outputs).double()
    nn.utils.vector_to_parameters(least_squares(xa, ya), model.parameters())
    a, b = ([t.unflatten(0, (-1, positions)) for t in task] for task in ((xa, ya), (xb, yb)))
    fisher, anchor = compute_fisher_information(model, [a], MSE), take_anchor(model)

    def solve(lambda_ewc):
        model.load_state_dict(anchor)
        optimizer = SGD(model.parameters(), lr=0.1 * outputs, **how)
        options = {"optimizer": optimizer, "criterion": MSE, "penalty": penalty}
        train(model, fisher, anchor, lambda_ewc, loader=[b] * 600, **options)
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    ratio = len(a[0]) / len(b[0]) / (positions * outputs)
    torch.testing.assert_close(solve(ratio), joint, rtol=1e-8, atol=1e-10)
    assert (solve(ratio / 2) - joint).abs().max() > 0.01  # a 1/2 in the wrong place would be seen


@pytest.mark.parametrize("momentum", [0, 0.5, 0.9])
def test_the_explicit_step_is_stable_up_to_the_documented_limit(momentum):
    """A spring alone (x = 0): the weight shrinks while lr lambda F < 2 (1 + momentum)."""
    zero, model, ends = torch.zeros(1, 1).double(), nn.Linear(1, 1, bias=False).double(), []
    for share in (0.97, 1.03):
        nn.init.ones_(model.weight)
        args = {"weight": zero + 2}, {"weight": zero}, share * 2 * (1 + momentum)
        optimizer = SGD(model.parameters(), lr=0.5, momentum=momentum)
        train(model, *args, loader=[(zero, zero)] * 300, criterion=MSE, optimizer=optimizer)
        ends.append(model.weight.abs().item())
    assert ends[0] < 0.01 and ends[1] > 100


TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("lambda_ewc", [1e-3, 1.0, 1e3, 1e30, 1e300])
def test_the_implicit_step_is_exact_for_every_lambda_and_keeps_free_weights_free(lambda_ewc, dtype):
    model, twin = network().to(dtype), network().to(dtype)
    fisher, anchor = random_penalty(model)
    fisher = {k: f.to(torch.promote_types(dtype, torch.float32)) + 0.1 for k, f in fisher.items()}
    fisher["layers.1.bias"] *= 1e-8  # 0 in float16
    fisher["layers.3.weight"].zero_()  # 0 times a rate too large for the type must be no NaN
    fisher["layers.3.bias"].fill_(1e10)  # nor a product that is too large
    loader = [(x.to(dtype), y) for x, y in BATCHES[:1]]
    train(model, fisher, anchor, lambda_ewc, loader=loader, penalty="implicit")
    by_hand(twin, loader, plain(twin))
    proximal(twin, fisher, anchor, 0.1 * lambda_ewc)
    rtol = atol = TOLERANCES[dtype]
    assert_close(model.state_dict(), twin.state_dict(), rtol=rtol, atol=atol)
    assert not torch.equal(model.layers[3].weight, network().to(dtype).layers[3].weight)


@BOTH
def test_the_callback_comes_before_the_first_step_and_after_every_step(penalty):
    model, twin, seen = network(), network(), []
    fisher, anchor = random_penalty(model)
    before = copy.deepcopy([fisher, anchor])
    callback = lambda step, m: seen.append((step, copy.deepcopy(m.state_dict())))  # noqa: E731
    train(model, fisher, anchor, 2.0, epochs=2, penalty=penalty, callback=callback)
    train(twin, fisher, anchor, 2.0, loader=BATCHES[:3], penalty=penalty)
    assert [step for step, _ in seen] == list(range(15))
    for step, m in ((0, network()), (3, twin), (14, model)):
        assert same_bits(seen[step][1], m.state_dict())
    assert same_bits(fisher, before[0]) and same_bits(anchor, before[1])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("training", [True, False])
def test_modes_are_kept_in_training_and_put_back_after_evaluation(training, error):
    """A BatchNorm that was frozen by eval() stays so within a model in training mode."""
    model, during = noisy().double().train(training), []
    model[1].train(not training)
    before, mean = modes(model), model[1].running_mean.clone()

    def callback(step, m):
        during.append(modes(m))
        if step == 2:
            raise error

    with pytest.raises(error):
        train(model, callback=callback)
    assert during[2] == (before if training else [True] * len(before))
    assert modes(model) == before
    assert torch.equal(model[1].running_mean, mean) == training


ENDS = {  # the batches, a factor for the anchor, lambda
    "a large lambda": (BATCHES * 9, 1.0, 1e7),
    "NaN in the data": ([*BATCHES[:2], (X[:10] * math.nan, Y[:10])], 1.0, 0),
    "an infinite last step": (BATCHES[:1], 1e3, 1.7e308),
}


@pytest.mark.parametrize("end", ENDS)
def test_divergence_is_an_error_with_the_remedy_and_puts_everything_back(end):
    torch.manual_seed(0)
    (loader, factor, lambda_ewc), model = ENDS[end], noisy().double()
    model[3].eval()
    start, before = copy.deepcopy(model.state_dict()), modes(model)
    fisher, anchor = random_penalty(model)
    anchor = {name: factor * a for name, a in anchor.items()}
    words = "step", "penalty='implicit'", "learning rate", "NaN", "data", "new optimizer"
    with refused(FloatingPointError, *words):
        train(model, fisher, anchor, lambda_ewc, loader=loader)
    assert same_bits(model.state_dict(), start) and modes(model) == before


W, V, T = "layers.1.weight", ValueError, TypeError


def case(error, *words, **change):
    return error, words, {"train_loader": [(X, Y)], "lambda_ewc": 1.0} | change


IMPLICIT = {"penalty": "implicit"}
CASES = {
    "empty loader": case(V, "train_loader", "0 batches", train_loader=[]),
    "an iterator": case(V, "train_loader", "1 of 2", epochs=2, train_loader=iter(BATCHES)),
    "LBFGS": case(T, "LBFGS", "closure", optimizer=torch.optim.LBFGS),
    "maximize": case(V, "maximize=True", optimizer=lambda ps: SGD(ps, lr=0.1, maximize=True)),
    "some parameters": case(V, "optimizer", W, optimizer=lambda ps: SGD(list(ps)[1:])),
    "Adam, implicit": case(V, "SGD", "Adam", "'explicit'", optimizer=Adam, **IMPLICIT),
    "RMSprop, implicit": case(V, "SGD", "RMSprop", "'explicit'", optimizer=RMSprop, **IMPLICIT),
    "epochs 0": case(V, "epochs", "at least 1", "0", epochs=0),
    "penalty unknown": case(V, "'explicit'", "'implicit'", "'soft'", penalty="soft"),
    "every 0": case(V, "every", "at least 1", "0", every=0, **IMPLICIT),
    "every 8, explicit": case(V, "every", "1", "8", every=8),
    "momentum 1": case(V, "momentum", "1", optimizer=lambda p: SGD(p, 0.1, 1.0), **IMPLICIT),
    "a plateau": case((T, V), "scheduler", "ReduceLROnPlateau", scheduler=ReduceLROnPlateau),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_told_before_the_first_step(name):
    error, words, change = CASES[name]
    model, (fisher, anchor) = network(), random_penalty(network())
    model.layers[2].eval()
    given = {"criterion": CE, "optimizer": SGD, "fisher_dict": fisher, "optimal_params": anchor}
    given |= change
    given["optimizer"] = given["optimizer"](model.parameters())
    given |= {k: make(given["optimizer"]) for k, make in given.items() if k == "scheduler"}
    with refused(error, *words):
        ewc_utils.train_with_ewc(model, **given)
    assert same_bits(model.state_dict(), network().state_dict())
    assert modes(model).count(False) == 1
