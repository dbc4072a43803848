"""The data: where it is looked for, bad networks, bad files, the bundled sample. All offline."""

import contextlib
import gzip
import hashlib
import itertools
import os
import socket
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import refused
from torchvision import datasets

import ewc_utils
from ewc_utils import SAMPLE, TensorLoader, load_tasks

NAMES = ("FashionMNIST", "MNIST")
PARTS = "train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"
FILES = [f"{part}-ubyte" for part in PARTS]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """An empty working folder, no EWC_DATA, no proxy, and every mirror is a port that refuses.

    And whatever a test does: the global socket time-out is as it was.
    """
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("EWC_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    use_mirror(monkeypatch, port=1)
    socket.setdefaulttimeout(1234.5)
    yield
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(None)
    assert timeout == 1234.5


def use_mirror(monkeypatch, port):
    for name in NAMES:
        address = f"http://127.0.0.1:{port}/{name}/"
        monkeypatch.setattr(getattr(datasets, name), "mirrors", [address])


def labels(*values):
    return struct.pack(">ii", 2049, len(values)) + bytes(values)


def raw_files(first_pixel, n_train=20, n_test=10):
    """The four files of a tiny data set, as bytes; its first pixel tells it from another one."""
    for part, n in (FILES[:2], n_train), (FILES[2:], n_test):
        images = struct.pack(">iiiiB", 2051, n, 28, 28, first_pixel) + bytes(784 * n - 1)
        yield from zip(part, (images, labels(*(i % 10 for i in range(n)))))


def write_sets(root, first_pixel=1, names=NAMES, **sizes):
    for name, (file, content) in itertools.product(names, raw_files(first_pixel, **sizes)):
        path = Path(root) / name / "raw" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def first_pixels(tasks):
    return [task.train_x[0, 0, 0, 0].item() for task in tasks]


@contextlib.contextmanager
def mirror(monkeypatch, reply, close=True):
    """A local mirror: it answers each request by reply(file name), and then hangs up or waits."""
    server, connections = socket.create_server(("127.0.0.1", 0)), []

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connections.append(server.accept()[0])
                file = connections[-1].recv(4096).split()[1].decode().rsplit("/", 1)[1]
                connections[-1].sendall(reply(file))
                if close:
                    connections[-1].close()

    threading.Thread(target=serve, daemon=True).start()
    use_mirror(monkeypatch, server.getsockname()[1])
    try:
        yield
    finally:
        for each in (server, *connections):
            each.close()


def working_mirror(monkeypatch):
    """It serves tiny data sets as the real ones do: gzipped, with known md5 sums."""
    archives = {f"{file}.gz": gzip.compress(b, mtime=0) for file, b in raw_files(7)}
    sums = [(file, hashlib.md5(content).hexdigest()) for file, content in archives.items()]
    for name in NAMES:
        monkeypatch.setattr(getattr(datasets, name), "resources", sums)
    head = "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n"
    return mirror(monkeypatch, lambda f: head.format(len(archives[f])).encode() + archives[f])


def assert_sample_was_announced(tasks, printed):
    assert [task.source for task in tasks] == ["bundled sample"] * len(tasks)
    assert [len(task.train_x) for task in tasks] == [5000] * len(tasks)
    notice = "".join(line for line in printed.out.splitlines() if line.startswith("NOTICE"))
    assert "BUNDLED SAMPLE" in notice and "EWC_DATA" in notice and printed.err == ""


def test_each_source_wins_over_those_after_it(monkeypatch, tmp_path, capsys):
    """root, EWC_DATA, data/, the network. An empty EWC_DATA counts as unset."""
    for pixel, folder in enumerate(("argument", "environment", "data"), start=1):
        write_sets(tmp_path / folder, pixel)
    for home in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(home, str(tmp_path))
    with working_mirror(monkeypatch):
        monkeypatch.setenv("EWC_DATA", "~/environment")
        assert first_pixels(load_tasks(*NAMES, root=str(tmp_path / "argument"))) == [1, 1]
        assert first_pixels(load_tasks(*NAMES)) == [2, 2]
        monkeypatch.setenv("EWC_DATA", "")
        assert first_pixels(load_tasks(*NAMES)) == [3, 3]
    assert capsys.readouterr().out == ""


def test_the_network_is_asked_once_and_the_files_tell_the_source(monkeypatch, tmp_path, capsys):
    with working_mirror(monkeypatch):
        assert first_pixels(load_tasks("MNIST")) == [7] and os.listdir("data") == ["MNIST"]
        assert first_pixels(load_tasks(*NAMES)) == [7, 7]
    tasks = load_tasks(*NAMES)  # the host is gone
    out, err = capsys.readouterr()
    assert [line.split()[1] for line in out.splitlines()] == ["MNIST", "FashionMNIST"] and not err
    assert first_pixels(tasks) == [7, 7]
    assert not {task.source for task in tasks} & {"full data", "bundled sample"}
    write_sets(tmp_path, names=["MNIST"], n_train=60_000, n_test=10_000)
    assert load_tasks("MNIST", root=tmp_path)[0].source == "full data"
    assert load_tasks("MNIST", root=SAMPLE)[0].source == "bundled sample"


@pytest.mark.parametrize("found", ["nothing", "one of two tasks", "a file named data"])
def test_without_a_network_all_tasks_are_the_sample_and_that_is_announced(found, capsys):
    if found == "one of two tasks":
        write_sets("data", 3, names=["FashionMNIST"])
    elif found == "a file named data":
        Path("data").write_text("a file, not a folder")
    assert_sample_was_announced(load_tasks(*NAMES), capsys.readouterr())


REPLIES = {
    "a log-in page": b"HTTP/1.1 200 OK\r\nContent-Length: 22\r\n\r\n<html>Log in!</html>\r\n",
    "silent within a file": b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\nx",
}


@pytest.mark.parametrize("reply", REPLIES)
def test_a_bad_host_leads_to_the_sample_and_nothing_of_it_is_used_later(monkeypatch, capsys, reply):
    monkeypatch.setattr(ewc_utils, "TIMEOUT", 0.3)
    with mirror(monkeypatch, lambda file: REPLIES[reply], close="silent" not in reply):
        tasks = []  # loaded in a thread, so that a load that never ends fails here
        load = threading.Thread(target=lambda: tasks.extend(load_tasks(*NAMES)), daemon=True)
        load.start()
        load.join(30)
        assert not load.is_alive()
    assert_sample_was_announced(tasks, capsys.readouterr())
    with working_mirror(monkeypatch):
        assert first_pixels(load_tasks("MNIST")) == [7]


DAMAGE = {
    "missing": lambda content: None,
    "truncated": lambda content: content[:-1],
    "wrong magic": lambda content: struct.pack(">i", 1234) + content[4:],
    "still zipped": gzip.compress,
}
LARGE = struct.pack(">iiii", 2051, 20, 56, 56) + bytes(20 * 56 * 56)
CASES = {f"{file}, {how}": (file, DAMAGE[how]) for file in FILES for how in DAMAGE}
CASES |= {  # files that are whole, and belong to something else
    "large images": (FILES[0], lambda _: LARGE),
    "too few training labels": (FILES[1], lambda _: labels(*range(10))),
    "a test label of 10": (FILES[3], lambda _: labels(*range(1, 11))),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_file_is_an_error_or_leads_to_the_sample(case, monkeypatch, capsys):
    """An error where that folder was asked for, else the sample."""
    (file, damage), folder = CASES[case], Path("data/MNIST/raw")
    write_sets("data")
    content = damage((folder / file).read_bytes())
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    monkeypatch.setenv("EWC_DATA", "data")
    for how in ({}, {"root": "data"}):
        with refused(ValueError, str(folder), "delete" if content else file):
            load_tasks(*NAMES, **how)
    monkeypatch.delenv("EWC_DATA")
    tasks, printed = load_tasks(*NAMES), capsys.readouterr()
    assert_sample_was_announced(tasks, printed)
    assert str(folder) in printed.out


WRONG = {  # EWC_DATA, and what must be told; the sets are in "sets", and zipped in "zipped"
    "another folder": ("elsewhere", ("elsewhere", FILES[0])),
    "quotes": ('"sets"', ('"sets"', FILES[0])),
    "zipped files": ("zipped", ("zipped", FILES[0], ".gz")),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_files_that_are_not_there_are_told_with_the_place_where_they_should_be(monkeypatch, wrong):
    given, words = WRONG[wrong]
    write_sets("sets"), write_sets("zipped")
    for path in Path("zipped").glob("*/raw/*"):
        path.rename(path.with_name(f"{path.name}.gz"))
    monkeypatch.setenv("EWC_DATA", given)
    with refused(ValueError, "MNIST", *words) as raised:
        load_tasks("MNIST")
    assert "download=True" not in str(raised.value) and "damaged" not in str(raised.value)


@pytest.mark.parametrize("name, first", zip(NAMES, ("T-shirt/top", "0")))
def test_torchvision_reads_the_sample_which_is_balanced_and_mixed_without_repeats(name, first):
    (task,) = load_tasks(name, root=SAMPLE)
    assert task.name == name and len(task.classes) == 10 and task.classes[0] == first
    for train, x, y in ((True, task.train_x, task.train_y), (False, task.test_x, task.test_y)):
        data = getattr(datasets, name)(SAMPLE, train=train, download=False)
        assert (x.dtype, y.dtype, x.shape) == (torch.uint8, torch.int64, (len(data), 1, 28, 28))
        for image, label, i in ((*data[i], i) for i in (0, 17, len(data) - 1)):
            assert label == y[i] and torch.equal(torch.from_numpy(np.array(image)), x[i, 0])
        assert y.bincount(minlength=10).tolist() == [500 if train else 100] * 10
        # Mixed, 100 labels in a row lack a class with probability 3e-5; sorted, they lack nine.
        assert all(len(some.unique()) == 10 for some in y.split(100))
    assert len({x.numpy().tobytes() for x in torch.cat([task.train_x, task.test_x])}) == 6000


X = torch.arange(103)


def epoch(loader):
    return torch.cat([x for x, _ in loader]).tolist()


def test_every_epoch_is_a_complete_new_permutation_repeated_by_the_seed():
    one, same, other = (TensorLoader(X, X + 1000, batch_size=10, seed=seed) for seed in (3, 3, 4))
    first, second, random = epoch(one), epoch(one), torch.get_rng_state()
    assert sorted(first) == sorted(second) == X.tolist()
    assert first != second and first != X.tolist() != second
    assert [first, second] == [epoch(same), epoch(same)] and first != epoch(other)
    assert torch.equal(random, torch.get_rng_state())  # the global random state is left alone


@pytest.mark.parametrize("shuffle", [True, False])
def test_labels_stay_with_their_examples_and_the_last_batch_may_be_short(shuffle):
    for batch_size, sizes in ((50, [50, 50, 3]), (103, [103]), (200, [103])):
        loader = TensorLoader(X.numpy(), X + 1000, batch_size, shuffle=shuffle)
        assert [len(a) for a, _ in loader] == sizes and len(loader) == len(sizes)
        assert all(torch.equal(a + 1000, b) for a, b in loader)
        assert shuffle or epoch(loader) == X.tolist()


def test_data_stay_where_they_are_whatever_the_default_device_is():
    torch.set_default_device("meta")
    try:
        loaders = [TensorLoader(x, X, 10, shuffle=s) for x in (X, X.numpy()) for s in (True, False)]
        orders = [epoch(loader) for loader in loaders]
        assert load_tasks("MNIST", root=SAMPLE)[0].test_x.device == X.device
    finally:
        torch.set_default_device(None)
    assert orders[:2] == orders[2:] and [sorted(order) for order in orders] == [X.tolist()] * 4


def test_unknown_names_and_what_cannot_be_cut_into_batches_are_refused():
    for names in (["CIFAR10"], ["MNIST", "mnist"], []):
        with refused(ValueError, "names", "'FashionMNIST'", "'MNIST'", *names):
            load_tasks(*names)
    with refused(ValueError, "x and y", "3", "4"):
        TensorLoader(torch.zeros(3), torch.zeros(4))
