"""What several tests need: networks, a small MNIST, a small copy of the repository."""
import csv
import gzip
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # for several processes test at once; to be set before torch
import torch

import test
import train
from common import REPOSITORY, run_script


@pytest.fixture
def small_model():
    """A narrow network, with larger weights than training starts from, for prediction."""
    torch.manual_seed(0)
    model = train.SimpleUnet(widths=(8, 16))
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    return model.eval().requires_grad_(False)


class Oracle(torch.nn.Module):
    """A network that knows the clean images, and predicts v with a constant error.

    x_0: (N, C, H, W), in the order in which it is shown them noised; after the last comes the first
    again.
    """

    def __init__(self, x_0, error=0.0):
        super().__init__()
        self.x_0, self.error, self.seen_t = x_0, error, []
        self.config = {"time_steps": 1000}

    def forward(self, x_t, t, labels):
        x_0 = self.x_0[torch.arange(len(self.seen_t), len(self.seen_t) + len(t)) % len(self.x_0)]
        self.seen_t += t.tolist()
        a = train.cumulative_alphas(1000)[t].view(-1, 1, 1, 1)
        noise = (x_t - a.sqrt() * x_0) / (1 - a).sqrt()
        return (a.sqrt() * noise - (1 - a).sqrt() * x_0).float() + self.error


@pytest.fixture(scope="session")
def mnist():
    """{"train": (images, labels), "test": (images, labels)}, 28 x 28, grey."""
    return {part: train.load_mnist(part) for part in ("train", "test")}


def use_small_mnist(monkeypatch):
    """Shrink MNIST in this process to 500 test images, and 256 in train.py or 3,000 in test.py."""
    load = train.load_mnist
    for module, count in ((train, 256), (test, 3000)):
        def load_few(part, *form, count=count, **keywords):
            limit = count if part == "train" else 500
            return [values[:limit] for values in load(part, *form, **keywords)]
        monkeypatch.setattr(module, "load_mnist", load_few)


@pytest.fixture
def small_mnist(monkeypatch):
    use_small_mnist(monkeypatch)


def write_checkpoint(path, model, epoch, **other):
    """Write a checkpoint as train.py does; other: entries to add or replace."""
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = dict(epoch=epoch, model_state_dict=model.state_dict(), loss=0.5,
                      config=dict(model.config, predicts="v"))
    torch.save(checkpoint | other, path)
    return path


def read_csv(path):
    """Return the rows of a csv file as dicts of strings."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def saved_state(root):
    """Return the numbers in latest.pth, but for times."""
    state = torch.load(root / train.LATEST, weights_only=True)
    state["log"] = [(row["epoch"], row["loss"]) for row in state["log"]]
    del state["seconds"]
    return state


def write_archive(path, array):
    """Write a uint8 array as one of MNIST's archives."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture(scope="session")
def small_repository(tmp_path_factory, mnist):
    """A copy of the repository as a user has it, with 3,000 training and 500 test images."""
    folder = tmp_path_factory.mktemp("repository")
    raw = folder / "mnist/MNIST/raw"
    raw.mkdir(parents=True)
    for part, name, count in (("train", "train", 3000), ("test", "t10k", 500)):
        images, labels = (values[:count].byte().numpy() for values in mnist[part])
        write_archive(raw / f"{name}-images-idx3-ubyte.gz", images[:, 0])
        write_archive(raw / f"{name}-labels-idx1-ubyte.gz", labels)
    shutil.copytree(REPOSITORY / "src", folder / "src",
                    ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "checkpoints").mkdir()
    shutil.copy(REPOSITORY / "checkpoints/classifier.pth", folder / "checkpoints")
    return folder


def call(folder, *command):
    """Run 'python COMMAND' in the folder, as a user does, and return the completed process."""
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def error_of(main, argv, capsys):
    """Return the error message of a script: one line, with an exit code that is not 0."""
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: main(argv))
    code = stop.value.code
    message = capsys.readouterr().err if isinstance(code, int) else code
    assert code != 0 and message and message.strip().count("\n") == 0
    return message


@pytest.fixture(scope="session")
def trained(small_repository):
    """(folder, completed process) of two epochs of 'python src/train.py' in the small one."""
    flags = "--n_epochs 2 --save_every 1 --batch_size 64 --width 16 --device cpu".split()
    return small_repository, call(small_repository, "src/train.py", *flags)
