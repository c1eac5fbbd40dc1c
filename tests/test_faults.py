"""Bad input: one line on stderr that names the flag or file, exit code not 0, nothing lost."""
import multiprocessing
import os
import random
import resource
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from conftest import (REPOSITORY, call, error_of, read_csv, saved_state, use_small_mnist,
                      write_checkpoint)
from PIL import Image

import generate
import test
import train
from common import epoch_checkpoints


def contents(folder):
    """Return {path: bytes} of all files under the folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- flags ----
@pytest.mark.parametrize("main, flags, named", [
    (train.main, "--n_epochs 0", "--n_epochs"),
    (train.main, "--batch_size 60001", "60000"),
    (train.main, "--label_dropout nan", "--label_dropout"),
    (train.main, "--image_size 30", "multiple of 4"),
    (train.main, "--guided_min 0.5", "--guided_max"),
    (train.main, "--time_steps 20", "from 21"),
    (train.main, "--device cuda:99", "cuda:99"),
    (generate.main, "--labels 11", "--labels"),
    (generate.main, "--out digits.jpg", "--out"),
    (generate.main, "--out /dev/null/digits.npz", "/dev/null"),
    (test.main, "--n_samples 1999", "from 2000"),
    (test.main, "--seed 3", "--seed"),
])
def test_bad_flags(main, flags, named, tmp_path, capsys):
    assert named in error_of(main, ["--root", str(tmp_path), *flags.split(" ")], capsys)
    assert not contents(tmp_path)


@pytest.mark.parametrize("script", ["train", "generate", "test"])
def test_a_script_says_it_in_one_line(script, tmp_path):
    done = call(tmp_path, REPOSITORY / f"src/{script}.py", "--root", "/dev/null", "--device", "cpu")
    assert done.returncode == 1 and "/dev/null" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("cannot write /dev/null/")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("main, flag", [
    (generate.main, "--channels 3"), (test.main, "--channels 3"), (test.main, "--image_size 32"),
    (test.main, "--time_steps 200")])
def test_a_flag_that_contradicts_the_checkpoint(main, flag, small_model, tmp_path, capsys):
    path = write_checkpoint(tmp_path / "checkpoints/diffusion_epoch_10.pth", small_model, 10)
    message = error_of(main, ["--root", str(tmp_path), *flag.split()], capsys)
    name, value = flag.split()
    assert name in message and value in message and str(path) in message
    assert str(small_model.config[name[2:]]) in message


def test_more_steps_than_the_model_has(small_model, tmp_path, capsys):
    write_checkpoint(tmp_path / "checkpoints/diffusion_epoch_10.pth", small_model, 10)
    assert "1000" in error_of(generate.main, ["--root", str(tmp_path), "--steps", "1001"], capsys)
    assert not list(tmp_path.glob("generated_samples/*"))


# ---- checkpoints and states ----
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        use_small_mnist(patch)
        flags = "--n_epochs 1 --batch_size 64 --device cpu".split()
        train.main(["--root", str(folder), *flags])
    return folder


@pytest.fixture
def stopped(finished, tmp_path):
    """The folder of a run of one epoch."""
    return shutil.copytree(finished, tmp_path / "stopped")


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


def one_bit_flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # among the weights
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def foreign(path):
    torch.save({"model_state_dict": torch.nn.Linear(2, 2).state_dict()}, path)


def text(path):
    path.write_text("epoch 10")


def list_of_numbers(path):
    torch.save([1, 2, 3], path)


class Hostile:
    def __reduce__(self):
        return (open, ("executed", "w"))


def hostile(path):
    torch.save({"config": Hostile()}, path)


def folder(path):
    path.unlink()
    path.mkdir()


def of_another_network(path):
    content = torch.load(path, weights_only=True)
    content["config"]["widths"] = (4, 8)
    torch.save(content, path)


def of_other_settings(path):
    content = torch.load(path, weights_only=True)
    content["settings"]["forgotten"] = 1
    torch.save(content, path)


@pytest.mark.parametrize("damage", [
    truncated, one_bit_flipped, empty, foreign, text, list_of_numbers, hostile, folder,
    of_another_network])
def test_damaged_checkpoint(damage, small_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write_checkpoint(tmp_path / "checkpoints/diffusion_epoch_10.pth", small_model, 10)
    damage(path)
    assert str(path) in error_of(generate.main, ["--root", str(tmp_path)], capsys)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("main", [generate.main, test.main], ids=["generate", "test"])
def test_missing_checkpoint(main, tmp_path, capsys):
    path = tmp_path / "none.pth"
    flags = ["--root", str(tmp_path), "--checkpoint_path", str(path)]
    assert str(path) in error_of(main, flags, capsys)


def test_a_checkpoint_of_an_earlier_version(small_model, tmp_path, capsys):
    path = write_checkpoint(tmp_path / "x.pth", small_model, 10, config=small_model.config)
    flags = ["--root", str(tmp_path), "--checkpoint_path", str(path)]
    message = error_of(generate.main, flags, capsys)
    assert str(path) in message and "earlier versions" in message


def test_no_weights_at_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "REPOSITORY", tmp_path)
    assert "pretrained.pth" in error_of(generate.main, ["--root", str(tmp_path)], capsys)


@pytest.mark.parametrize("damage", [
    truncated, one_bit_flipped, foreign, hostile, of_other_settings])
def test_damaged_state(damage, stopped, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = stopped / train.LATEST
    damage(path)
    before = contents(stopped)
    message = error_of(train.main, ["--root", str(stopped), "--resume"], capsys)
    assert str(path) in message and "another --root" in message
    assert contents(stopped) == before and not (tmp_path / "executed").exists()


def test_no_state_to_resume(tmp_path, capsys):
    root = tmp_path / "typo"
    assert "without --resume" in error_of(train.main, ["--root", str(root), "--resume"], capsys)
    assert not root.exists()


@pytest.mark.parametrize("flag, kept", [
    ("--batch_size 32", 64), ("--seed 1", 0), ("--model_guidance 0.5", 0.6)])
def test_a_flag_that_contradicts_the_state(flag, kept, stopped, capsys):
    before = contents(stopped)
    message = error_of(train.main, ["--root", str(stopped), "--resume", *flag.split()], capsys)
    assert flag in message and str(kept) in message.partition(train.LATEST)[2]
    assert contents(stopped) == before


# ---- data and the classifier ----
def test_missing_classifier(small_model, tmp_path, monkeypatch, capsys):
    write_checkpoint(tmp_path / "checkpoints/diffusion_epoch_10.pth", small_model, 10)
    monkeypatch.setattr(test, "CLASSIFIER", tmp_path / "classifier.pth")
    assert "--train_classifier" in error_of(test.main, ["--root", str(tmp_path)], capsys)


@pytest.fixture
def copied_mnist(tmp_path, monkeypatch):
    """The folder of a copy of the archives, in place of the repository's."""
    monkeypatch.setattr(train, "REPOSITORY", tmp_path)
    return shutil.copytree(REPOSITORY / "mnist/MNIST/raw", tmp_path / "mnist/MNIST/raw")


def missing(archive):
    archive.unlink()


@pytest.mark.parametrize("damage", [missing, truncated, one_bit_flipped])
def test_damaged_archive(damage, copied_mnist, tmp_path, capsys):
    damage(copied_mnist / "train-images-idx3-ubyte.gz")
    message = error_of(train.main, ["--root", str(tmp_path / "run")], capsys)
    assert str(copied_mnist) in message and "git checkout mnist" in message
    assert not (tmp_path / "run").exists()


# ---- digits from anywhere ----
IMAGES, LABELS = np.zeros((2000, 28, 28), np.uint8), np.arange(2000) % 10


@pytest.mark.parametrize("arrays, named", [
    ((IMAGES[:1999],), "1,999"),
    ((IMAGES.astype(np.float32),), "float32"),
    ((IMAGES[:, :14],), "(2000, 14, 28)"),
    ((IMAGES.reshape(2000, 784),), "(2000, 784)"),
    ((np.zeros((2000, 28, 28, 2), np.uint8),), "(2000, 28, 28, 2)"),
    ((IMAGES, LABELS[:1999]), "(1999,)"),
    ((IMAGES, LABELS + 1), "from 1 to 10"),
    ((IMAGES, LABELS - 1), "from -1 to 8"),
    ((IMAGES, LABELS / 2), "float64"),
    ((IMAGES, LABELS % 2), "digits in the proportions"),
    ((IMAGES, np.array([Hostile()] * 2000)), "arr_1"),
])
def test_digits_of_another_form(arrays, named, tmp_path, monkeypatch, small_mnist, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("digits.npz", *arrays)
    message = error_of(test.main, ["--digits", "digits.npz", "--device", "cpu"], capsys)
    assert "digits.npz" in message and named in message
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("damage", [truncated, one_bit_flipped, text, list_of_numbers, folder])
def test_damaged_digits(damage, tmp_path, capsys):
    path = tmp_path / "digits.npz"
    np.savez(path, IMAGES, LABELS)
    damage(path)
    message = error_of(test.main, ["--digits", str(path), "--device", "cpu"], capsys)
    assert str(path) in message and "pickle" not in message  # no advice to execute it


def test_missing_digits(tmp_path, capsys):
    path = tmp_path / "none.npz"
    message = error_of(test.main, ["--digits", str(path), "--device", "cpu"], capsys)
    assert message.startswith(f"{path} does not exist")


# ---- folders ----
@pytest.mark.parametrize("main, name", [
    (train.main, "checkpoints"), (generate.main, "generated_samples"), (test.main, "datas")])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(main, name, tmp_path,
                                                                   monkeypatch, capsys):
    for module, work in ((train, "take_step"), (generate, "sample"), (test, "Judge")):
        monkeypatch.setattr(module, work, None)
    (tmp_path / name).touch()
    assert str(tmp_path / name) in error_of(main, ["--root", str(tmp_path)], capsys)


# ---- runs ----
def test_checkpoints_of_different_models_in_one_root(small_model, small_mnist, tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    other = train.SimpleUnet(time_steps=200)
    first = write_checkpoint(folder / "diffusion_epoch_10.pth", other, 10)
    write_checkpoint(folder / "diffusion_epoch_20.pth", small_model, 20)
    flags = ["--root", str(tmp_path), "--n_samples", "2000"]
    assert str(first) in error_of(test.main, flags, capsys)


@pytest.fixture
def full_disk():
    """Let no file grow over 4 MB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_the_old_files(stopped, small_mnist, full_disk, capsys):
    before = contents(stopped)
    message = error_of(train.main, ["--root", str(stopped), "--resume", "--n_epochs", "2"], capsys)
    assert str(stopped / train.LATEST) in message and "too large" in message
    assert contents(stopped) == before


def train_a_little(root, flags, begins):
    """Train three epochs of four steps, in a process of its own; save after every step.

    begins: an Event that is set when all is imported.
    """
    sys.stdout = sys.stderr = open(os.devnull, "w")
    torch.set_num_threads(1)
    use_small_mnist(pytest.MonkeyPatch())
    train.SAVE_INTERVAL = 0
    settings = "--n_epochs 3 --save_every 1 --batch_size 64 --device cpu".split()
    begins.set()
    train.main(["--root", str(root), *settings, *flags])


def start_training(root):
    """Start or resume train_a_little in a process; return that once all is imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision"])
    flags = ["--resume"] if (root / train.LATEST).exists() else []
    begins = context.Event()
    process = context.Process(target=train_a_little, args=(root, flags, begins))
    process.start()
    assert begins.wait(timeout=60)
    return process


def check_files(root):
    """Read every file that a run has written so far."""
    for path in epoch_checkpoints(root).values():
        generate.load_checkpoint(path)
    for path in root.glob("datas/*.csv"):
        assert [row["epoch"] for row in read_csv(path)] in (["1"], ["1", "2"], ["1", "2", "3"])
    for path in root.glob("datas/*.png"):
        with Image.open(path) as picture:
            picture.load()


def test_kills_at_any_moment(tmp_path):
    rng = random.Random(0)

    def is_whole(root):
        return (root / train.LATEST).exists() and saved_state(root)["step"] == 12

    def check_whole(root):
        torch.testing.assert_close(saved_state(root), saved_state(tmp_path / "uninterrupted"),
                                   rtol=0, atol=0)
        for epoch, path in epoch_checkpoints(tmp_path / "uninterrupted").items():
            assert epoch_checkpoints(root)[epoch].read_bytes() == path.read_bytes()
        log = read_csv(root / "datas/train_log.csv")
        assert [row["epoch"] for row in log] == ["1", "2", "3"]

    uninterrupted = start_training(tmp_path / "uninterrupted")
    begin = time.perf_counter()
    uninterrupted.join()
    duration = time.perf_counter() - begin
    root = tmp_path / "0"
    steps = []  # taken before each kill
    for number in range(4):
        process = start_training(root)
        process.join(rng.uniform(0, duration))
        process.kill()
        process.join()
        check_files(root)
        if (root / train.LATEST).exists():
            steps.append(saved_state(root)["step"])
        if is_whole(root):
            check_whole(root)
            root = tmp_path / str(number + 1)
    assert any(0 < step < 12 for step in steps)  # else no kill has come in the middle
    if not is_whole(root):
        start_training(root).join()
    check_whole(root)
