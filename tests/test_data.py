"""The data: where it is looked for, what happens on a bad network or with bad files, and the bundled sample. No test goes online."""

import contextlib
import gzip
import hashlib
import http.server
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

import ewc_utils
from ewc_utils import SAMPLE, TensorLoader, load_tasks

NAMES = ("FashionMNIST", "MNIST")
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """An empty working folder, no EWC_DATA, no proxy, and every mirror is a port that refuses."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("EWC_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        use_mirrors(monkeypatch, closed.getsockname()[1])


def use_mirrors(monkeypatch, *ports):
    for name in NAMES:
        monkeypatch.setattr(getattr(datasets, name), "mirrors", [f"http://127.0.0.1:{port}/{name}/" for port in ports])


def raw_files(first_pixel, n_train=20, n_test=10):
    """The four idx files of a tiny data set, as bytes; its first pixel tells it from another one."""
    files = []
    for n in (n_train, n_test):
        images = np.random.RandomState(n).randint(0, 256, (n, 28, 28)).astype(np.uint8)
        images[0, 0, 0] = first_pixel
        files.append(struct.pack(">iiii", 2051, n, 28, 28) + images.tobytes())
        files.append(struct.pack(">ii", 2049, n) + bytes(i % 10 for i in range(n)))
    return dict(zip(FILES, files))


def write_sets(root, first_pixel=1, names=NAMES, **sizes):
    for name in names:
        folder = Path(root) / name / "raw"
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in raw_files(first_pixel, **sizes).items():
            (folder / file).write_bytes(content)


def first_pixels(tasks):
    return [round(task.train_x[0, 0, 0, 0].item() * 255) for task in tasks]


def load_or_hang(*names):
    """load_tasks in a thread: a load that never ends fails here and does not stop the test run."""
    result = []
    thread = threading.Thread(target=lambda: result.append(load_tasks(*names)), daemon=True)
    thread.start()
    thread.join(60)
    assert result, "load_tasks did not come back"
    return result[0]


@contextlib.contextmanager
def host(answer):
    """A loopback host that handles each connection by answer(connection); yields its port and the list of connections."""
    server, connections = socket.create_server(("127.0.0.1", 0)), []

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connections.append(server.accept()[0])
                with contextlib.suppress(OSError):
                    answer(connections[-1])

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield server.getsockname()[1], connections
    finally:
        server.close()
        for connection in connections:
            connection.close()


@contextlib.contextmanager
def working_mirror(monkeypatch, first_pixel=7):
    """A host that serves tiny data sets the way the real ones serve theirs: gzipped, with known md5 sums."""
    pages = {f"/{name}/{file}.gz": gzip.compress(content, mtime=0) for name in NAMES for file, content in raw_files(first_pixel).items()}
    for name in NAMES:
        sums = [(f"{file}.gz", hashlib.md5(pages[f"/{name}/{file}.gz"]).hexdigest()) for file in FILES]
        monkeypatch.setattr(getattr(datasets, name), "resources", sums)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            page = pages.get(self.path)
            self.send_response(404 if page is None else 200)
            self.send_header("Content-Length", str(len(page or b"")))
            self.end_headers()
            self.wfile.write(page or b"")

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def assert_sample_was_announced(tasks, printed):
    assert [task.source for task in tasks] == ["bundled sample"] * len(tasks)
    assert [len(task.train_x) for task in tasks] == [5000] * len(tasks)
    notice = [line for line in printed.out.splitlines() if line.startswith("NOTICE")]
    assert len(notice) == 3 and "could not be downloaded" in notice[0] and "BUNDLED SAMPLE" in notice[1] and "EWC_DATA" in notice[2]
    assert printed.err == ""


def files_below(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file()]


# ---------------------------------------------------------------- where the data is looked for


def test_the_root_argument_wins_over_everything(monkeypatch, tmp_path):
    for pixel, folder in enumerate(("argument", "environment", "data"), start=1):
        write_sets(tmp_path / folder, pixel)
    monkeypatch.setenv("EWC_DATA", str(tmp_path / "environment"))
    assert first_pixels(load_tasks(*NAMES, root=tmp_path / "argument")) == [1, 1]
    assert first_pixels(load_tasks(*NAMES, root=str(tmp_path / "argument"))) == [1, 1]


def test_ewc_data_wins_over_the_data_folder(monkeypatch, tmp_path, capsys):
    write_sets(tmp_path / "environment", 2)
    write_sets("data", 3)
    monkeypatch.setenv("EWC_DATA", str(tmp_path / "environment"))
    assert first_pixels(load_tasks(*NAMES)) == [2, 2]
    assert capsys.readouterr().out == ""


def test_an_empty_ewc_data_counts_as_unset(monkeypatch):
    write_sets("data", 3)
    monkeypatch.setenv("EWC_DATA", "")
    assert first_pixels(load_tasks(*NAMES)) == [3, 3]


def test_a_home_folder_in_ewc_data_is_understood(monkeypatch, tmp_path):
    write_sets(tmp_path / "sets", 4)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("EWC_DATA", "~/sets")
    assert first_pixels(load_tasks("MNIST")) == [4]


def test_the_data_folder_wins_over_the_network(monkeypatch, capsys):
    write_sets("data", 3)
    with working_mirror(monkeypatch) as port:
        use_mirrors(monkeypatch, port)
        assert first_pixels(load_tasks(*NAMES)) == [3, 3]
    assert capsys.readouterr().out == ""


def test_the_network_wins_over_the_sample_and_is_asked_once(monkeypatch, capsys):
    with working_mirror(monkeypatch) as port:
        use_mirrors(monkeypatch, port)
        assert first_pixels(load_tasks(*NAMES)) == [7, 7]
    printed = capsys.readouterr()
    assert [line.split()[1] for line in printed.out.splitlines()] == list(NAMES) and printed.err == ""
    assert sorted(path.name for path in files_below("data")) == sorted(FILES * 2)  # no archive, nothing unfinished
    assert first_pixels(load_tasks(*NAMES)) == [7, 7]  # the host is gone
    assert capsys.readouterr().out == ""


def test_only_what_is_asked_for_is_downloaded(monkeypatch):
    with working_mirror(monkeypatch) as port:
        use_mirrors(monkeypatch, port)
        load_tasks("MNIST")
    assert sorted(os.listdir("data")) == ["MNIST"]


def test_all_tasks_come_from_one_source(capsys):
    write_sets("data", 3, names=["FashionMNIST"])
    assert_sample_was_announced(load_tasks(*NAMES), capsys.readouterr())


def test_the_source_is_told_by_what_the_files_hold(monkeypatch, tmp_path):
    write_sets(tmp_path, names=["MNIST"], n_train=60_000, n_test=10_000)
    assert load_tasks("MNIST", root=tmp_path)[0].source == "full data"
    write_sets(tmp_path, names=["MNIST"])
    assert load_tasks("MNIST", root=tmp_path)[0].source == "part of the data"
    monkeypatch.setenv("EWC_DATA", str(SAMPLE))
    assert load_tasks("MNIST")[0].source == "bundled sample"


# ---------------------------------------------------------------- a bad network


def test_without_a_network_the_sample_is_used_and_announced_in_three_lines(capsys):
    assert_sample_was_announced(load_tasks(*NAMES), capsys.readouterr())
    assert files_below("data") == []


def test_a_silent_host_costs_one_time_out_per_mirror(monkeypatch, capsys):
    monkeypatch.setattr(ewc_utils, "TIMEOUT", 0.3)
    with host(lambda connection: None) as (port, connections):
        use_mirrors(monkeypatch, port, port)
        assert_sample_was_announced(load_or_hang(*NAMES), capsys.readouterr())
        assert len(connections) == 2  # one knock at each of the two mirrors, none per file


def test_a_silent_name_server_leads_to_the_sample(monkeypatch, capsys):
    """No socket is open yet then, so that no socket's time-out helps; the same holds for a host with many silent addresses."""
    release = threading.Event()

    def lookup(*args, **kwargs):
        release.wait()
        raise socket.gaierror("never found")

    monkeypatch.setattr(ewc_utils, "TIMEOUT", 0.3)
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    try:
        assert_sample_was_announced(load_or_hang(*NAMES), capsys.readouterr())
    finally:
        release.set()


def test_after_a_silent_mirror_the_next_one_serves(monkeypatch):
    monkeypatch.setattr(ewc_utils, "TIMEOUT", 0.5)
    with host(lambda connection: None) as (silent, _), working_mirror(monkeypatch) as working:
        use_mirrors(monkeypatch, silent, working)
        assert first_pixels(load_or_hang("MNIST")) == [7]


def test_a_host_that_falls_silent_within_a_file_leads_to_the_sample(monkeypatch, capsys):
    monkeypatch.setattr(ewc_utils, "TIMEOUT", 0.5)
    half = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + bytes(1000)
    with host(lambda connection: connection.sendall(half)) as (port, _):
        use_mirrors(monkeypatch, port)
        assert_sample_was_announced(load_or_hang(*NAMES), capsys.readouterr())
    assert files_below("data") == []


@pytest.mark.parametrize("reply", [
    b"this is no HTTP\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 22\r\n\r\n<html>Log in!</html>\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    b"",
], ids=["no HTTP", "a log-in page", "broken chunks", "not found", "hangs up"])
def test_garbage_from_a_host_is_never_used(monkeypatch, capsys, reply):
    def answer(connection):
        connection.recv(4096)
        connection.sendall(reply)
        connection.close()

    with host(answer) as (port, _):
        use_mirrors(monkeypatch, port)
        assert_sample_was_announced(load_or_hang(*NAMES), capsys.readouterr())
    assert files_below("data") == []


def test_a_data_folder_that_cannot_be_written_leads_to_the_sample(capsys):
    Path("data").write_text("a file, not a folder")
    assert_sample_was_announced(load_tasks(*NAMES), capsys.readouterr())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, RuntimeError])
def test_an_interrupted_download_leaves_nothing_that_is_used_later(monkeypatch, error):
    def half_a_file(url, download_root, filename, md5):
        content = raw_files(9)[filename[:-3]]
        (Path(download_root) / filename[:-3]).write_bytes(content[:len(content) // 2])
        raise error("stopped half-way")

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(datasets.mnist, "download_and_extract_archive", half_a_file)
        with host(lambda connection: connection.close()) as (port, _):
            use_mirrors(patch, port)
            load_tasks("MNIST")
    assert files_below("data") == []
    with working_mirror(monkeypatch) as port:
        use_mirrors(monkeypatch, port)
        assert first_pixels(load_tasks("MNIST")) == [7]


@pytest.mark.parametrize("before", [None, 12.5])
def test_the_global_socket_time_out_is_restored(monkeypatch, before):
    default = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(before)
        load_tasks("MNIST")  # fails to download
        assert socket.getdefaulttimeout() == before
        with working_mirror(monkeypatch) as port:
            use_mirrors(monkeypatch, port)
            load_tasks("MNIST")
        assert socket.getdefaulttimeout() == before
    finally:
        socket.setdefaulttimeout(default)


# ---------------------------------------------------------------- bad files


def damage(content, how):
    return {"truncated": content[:-1], "too long": content + b"\0", "empty": b"", "header only": content[:8],
            "wrong magic": struct.pack(">i", 1234) + content[4:], "still zipped": gzip.compress(content)}[how]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["truncated", "too long", "empty", "header only", "wrong magic", "still zipped"])
def test_a_damaged_file_is_named_with_the_remedy_and_never_used(file, how):
    write_sets("data")
    path = Path("data/MNIST/raw") / file
    path.write_bytes(damage(path.read_bytes(), how))
    for root in (None, "data"):
        with pytest.raises(ValueError, match=f"{file} is damaged.*delete it"):
            load_tasks("FashionMNIST", "MNIST", root=root)


def test_images_of_another_size_are_refused():
    write_sets("data")
    path = Path("data/MNIST/raw/train-images-idx3-ubyte")
    path.write_bytes(struct.pack(">iiii", 2051, 5, 56, 56) + bytes(5 * 56 * 56))
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is damaged"):
        load_tasks("MNIST")


@pytest.mark.parametrize("split", ["train", "t10k"])
def test_images_and_labels_that_do_not_match_are_refused(split):
    write_sets("data")
    labels = Path(f"data/MNIST/raw/{split}-labels-idx1-ubyte")
    labels.write_bytes(struct.pack(">ii", 2049, 9) + bytes(9))
    with pytest.raises(ValueError, match="MNIST.*do not match.*delete the folder"):
        load_tasks("MNIST")


@pytest.mark.parametrize("split", ["train", "t10k"])
def test_a_label_above_nine_is_refused(split):
    write_sets("data")
    path = Path(f"data/MNIST/raw/{split}-labels-idx1-ubyte")
    path.write_bytes(path.read_bytes()[:-1] + b"\x0a")
    with pytest.raises(ValueError, match=r"labels are 0\.\.9"):
        load_tasks("MNIST")


@pytest.mark.parametrize("file", FILES)
def test_a_file_missing_under_ewc_data_is_named_with_the_remedy(monkeypatch, tmp_path, file):
    write_sets(tmp_path / "sets")
    (tmp_path / "sets" / "MNIST" / "raw" / file).unlink()
    monkeypatch.setenv("EWC_DATA", str(tmp_path / "sets"))
    with pytest.raises(FileNotFoundError, match=rf"MNIST.raw.{file} is missing: EWC_DATA.*unset it"):
        load_tasks(*NAMES)


def test_an_unknown_or_absent_name_is_refused():
    for names in (["CIFAR10"], ["MNIST", "mnist"], []):
        with pytest.raises(ValueError, match="names must be 'FashionMNIST' or 'MNIST'"):
            load_tasks(*names)


# ---------------------------------------------------------------- the bundled sample


@pytest.mark.parametrize("name", NAMES)
def test_torchvision_reads_the_sample_itself(name):
    task = load_tasks(name, root=SAMPLE)[0]
    for train, x, y in ((True, task.train_x, task.train_y), (False, task.test_x, task.test_y)):
        data = getattr(datasets, name)(SAMPLE, train=train, download=False)
        assert x.dtype == torch.float32 and y.dtype == torch.int64 and x.shape == (len(data), 1, 28, 28)
        for i in (0, 17, len(data) - 1):
            image, label = data[i]
            assert label == y[i] and torch.equal(torch.from_numpy(np.array(image)).float() / 255, x[i, 0])
    assert len(task.classes) == 10 and task.classes[0] == {"MNIST": "0", "FashionMNIST": "T-shirt/top"}[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_sample_is_class_balanced_and_no_image_comes_twice(name):
    task = load_tasks(name, root=SAMPLE)[0]
    assert task.train_y.bincount(minlength=10).tolist() == [500] * 10
    assert task.test_y.bincount(minlength=10).tolist() == [100] * 10
    images = torch.cat([task.train_x, task.test_x])
    assert len({image.numpy().tobytes() for image in images}) == 6000
    assert images.min() == 0 and images.max() == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_sample_comes_in_mixed_order(name):
    """Sorted by class, 100 labels in a row would hold one class; mixed, each class is missing with probability 3e-5."""
    task = load_tasks(name, root=SAMPLE)[0]
    for labels in (*task.train_y.split(100), *task.test_y.split(100)):
        assert len(labels.unique()) == 10


def test_the_sample_packs_to_less_than_ten_megabytes():
    assert sum(len(zlib.compress(path.read_bytes())) for path in files_below(SAMPLE)) < 10e6


def test_the_sample_can_be_drawn_again_byte_for_byte(tmp_path):
    full = os.environ.get("EWC_DATA_FULL")
    if not full:
        pytest.skip("needs the full data: set EWC_DATA_FULL to its folder")
    code = re.search(r"```python\n(.*?)```", (SAMPLE / "README.md").read_text(encoding="utf-8"), re.S).group(1)
    subprocess.run([sys.executable, "-c", code, full, str(tmp_path / "again")], check=True)
    for path in files_below(tmp_path / "again"):
        assert path.read_bytes() == (SAMPLE / path.relative_to(tmp_path / "again")).read_bytes()


# ---------------------------------------------------------------- mini-batches


def epoch(loader):
    return torch.cat([x for x, _ in loader]).tolist()


def test_every_epoch_is_a_complete_new_permutation():
    x = torch.arange(103)
    loader = TensorLoader(x, x + 1000, batch_size=10)
    first, second = epoch(loader), epoch(loader)
    assert sorted(first) == sorted(second) == x.tolist()
    assert first != second and first != x.tolist()


def test_examples_and_labels_stay_together():
    x = torch.arange(103)
    assert all(torch.equal(a + 1000, b) for a, b in TensorLoader(x, x + 1000, batch_size=10))


def test_a_loader_with_the_same_seed_repeats_and_another_seed_does_not():
    x = torch.arange(103)
    one, same, other = (TensorLoader(x, x, batch_size=10, seed=seed) for seed in (3, 3, 4))
    epochs = [epoch(one), epoch(one)]
    assert epochs == [epoch(same), epoch(same)] and epochs[0] != epoch(other)


def test_the_loader_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    epoch(TensorLoader(torch.arange(103), torch.arange(103), batch_size=10))
    assert torch.equal(before, torch.get_rng_state())


def test_without_shuffle_the_order_is_kept():
    x = torch.arange(103)
    assert epoch(TensorLoader(x, x, batch_size=10, shuffle=False)) == x.tolist()


@pytest.mark.parametrize("n, batch_size, sizes", [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 8, [3])])
def test_the_length_is_the_number_of_batches_and_the_last_may_be_short(n, batch_size, sizes):
    loader = TensorLoader(torch.zeros(n, 2), torch.zeros(n), batch_size=batch_size)
    assert [len(x) for x, _ in loader] == sizes and len(loader) == len(sizes)


def test_the_loader_refuses_what_it_cannot_cut():
    with pytest.raises(ValueError, match="one length above 0, got 3 and 4"):
        TensorLoader(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="one length above 0, got 0 and 0"):
        TensorLoader(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        TensorLoader(torch.zeros(3), torch.zeros(3), batch_size=0)


@pytest.mark.parametrize("sources, mark", [({"full data"}, ""), ({"full data", "bundled sample"}, " (bundled sample)")])
def test_every_figure_says_when_it_was_made_from_the_sample(sources, mark, monkeypatch):
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    monkeypatch.setattr(ewc_utils, "_SOURCES", sources)
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf().get_suptitle()))
    ewc_utils.plot_lines({"EWC": ([1, 2], torch.rand(3, 2))}, "x", "y", "a finding")
    plt.close("all")
    assert shown == ["a finding" + mark]
