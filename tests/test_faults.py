"""Bad input: one line on stderr that names the flag or file, an exit code that is not 0, nothing lost."""
import shutil

import pytest
import torch
from conftest import REPOSITORY, call, error_of, write_checkpoint

import generate
import test
import train


# ---- flags ----
@pytest.mark.parametrize("main, flags, named", [
    (train.main, "--n_epochs 0", "--n_epochs"),
    (train.main, "--n_epochs many", "--n_epochs"),
    (train.main, "--batch_size -1", "--batch_size"),
    (train.main, "--batch_size 60001", "60000"),
    (train.main, "--image_size 30", "multiple of 4"),
    (train.main, "--image_size 0", "--image_size"),
    (train.main, "--channels 2", "--channels"),
    (train.main, "--time_steps 20", "at least 21"),
    (train.main, "--save_every 0", "--save_every"),
    (train.main, "--seed -1", "--seed"),
    (train.main, "--device tpu", "--device"),
    (train.main, "--device cuda:99", "cuda:99"),
    (train.main, "--learning_rate 1", "--learning_rate"),
    (generate.main, "--n_samples 0", "--n_samples"),
    (generate.main, "--epochs 0", "--epochs"),
    (generate.main, "--labels 10", "--labels"),
    (generate.main, "--labels 9-0", "--labels"),
    (generate.main, "--labels ", "--labels"),
    (generate.main, "--sampler euler", "--sampler"),
    (generate.main, "--device cuda:99", "cuda:99"),
    (test.main, "--n_samples 1999", "at least 2000"),
    (test.main, "--n_samples 50001", "at most 50000"),
    (test.main, "--batch_size 0", "--batch_size"),
])
def test_bad_flags(main, flags, named, tmp_path, capsys):
    assert named in error_of(main, ["--root", str(tmp_path), *flags.split(" ")], capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["train", "generate", "test"])
def test_a_script_says_it_in_one_line(script, tmp_path):
    done = call(tmp_path, REPOSITORY / f"src/{script}.py", "--root", "/dev/null", "--device", "cpu")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"{script}.py: error: ") and "/dev/null" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("main, flag", [(generate.main, "--channels 3"), (test.main, "--channels 3"),
                                        (test.main, "--image_size 32"), (test.main, "--time_steps 200")])
def test_a_flag_that_contradicts_the_checkpoint(main, flag, small_model, tmp_path, capsys):
    path = write_checkpoint(tmp_path / "checkpoints/diffusion_epoch_10.pth", small_model, 10)
    message = error_of(main, ["--root", str(tmp_path), *flag.split()], capsys)
    name, value = flag.split()
    assert name in message and value in message and str(path) in message
    assert str(small_model.config[name[2:]]) in message


def test_more_steps_than_the_model_has(small_model, tmp_path, capsys):
    write_checkpoint(tmp_path / "checkpoints/diffusion_epoch_10.pth", small_model, 10)
    assert "1000" in error_of(generate.main, ["--root", str(tmp_path), "--steps", "1001"], capsys)


# ---- checkpoints ----
def truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path):
    path.write_bytes(b"")


def foreign(path):
    torch.save({"model_state_dict": torch.nn.Linear(2, 2).state_dict()}, path)


def of_another_network(path):
    write_checkpoint(path, torch.nn.Linear(2, 2), 10)


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


torch.nn.Linear.config = {"channels": 1}  # so that write_checkpoint takes it


@pytest.mark.parametrize("main", [generate.main, test.main], ids=["generate", "test"])
@pytest.mark.parametrize("damage", [truncated, empty, foreign, of_another_network, text, list_of_numbers, hostile,
                                    folder])
def test_damaged_checkpoint(main, damage, small_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write_checkpoint(tmp_path / "checkpoints/diffusion_epoch_10.pth", small_model, 10)
    damage(path)
    assert str(path) in error_of(main, ["--root", str(tmp_path)], capsys)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("main", [generate.main, test.main], ids=["generate", "test"])
def test_missing_checkpoint(main, tmp_path, capsys):
    path = tmp_path / "none.pth"
    assert str(path) in error_of(main, ["--root", str(tmp_path), "--checkpoint_path", str(path)], capsys)


def test_no_checkpoint_at_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "REPOSITORY", tmp_path)
    assert "src/train.py" in error_of(generate.main, ["--root", str(tmp_path)], capsys)


# ---- data and the classifier ----
def test_missing_classifier(small_model, tmp_path, monkeypatch, capsys):
    write_checkpoint(tmp_path / "checkpoints/diffusion_epoch_10.pth", small_model, 10)
    monkeypatch.setattr(test, "CLASSIFIER", tmp_path / "classifier.pth")
    assert "--train_classifier" in error_of(test.main, ["--root", str(tmp_path)], capsys)


def missing(archive):
    archive.unlink()


@pytest.mark.parametrize("damage", [missing, truncated], ids=["missing", "truncated"])
def test_archive_that_cannot_be_downloaded(damage, tmp_path, monkeypatch, capsys):
    shutil.copytree(REPOSITORY / "mnist", tmp_path / "mnist", ignore=lambda _, names: [
        name for name in names if name.endswith("ubyte")])
    damage(tmp_path / "mnist/MNIST/raw/train-images-idx3-ubyte.gz")
    monkeypatch.setattr(train, "REPOSITORY", tmp_path)
    monkeypatch.setattr(train.MNIST, "mirrors", [])  # no network
    assert str(tmp_path / "mnist") in error_of(train.main, ["--root", str(tmp_path / "run")], capsys)
    assert not (tmp_path / "run").exists()


# ---- folders ----
@pytest.mark.parametrize("main, name", [(train.main, "checkpoints"), (train.main, "datas"), (test.main, "datas")])
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(main, name, tmp_path, capsys):
    (tmp_path / name).touch()
    assert str(tmp_path / name) in error_of(main, ["--root", str(tmp_path)], capsys)


def test_generate_refuses_a_folder_that_it_cannot_write(small_model, tmp_path, capsys):
    write_checkpoint(tmp_path / "checkpoints/diffusion_epoch_10.pth", small_model, 10)
    (tmp_path / "generated_samples").touch()
    assert "generated_samples" in error_of(generate.main, ["--root", str(tmp_path)], capsys)
