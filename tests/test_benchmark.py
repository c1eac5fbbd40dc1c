"""docs/benchmark.py: its tables, of few digits and steps."""
import dataclasses
import inspect
import re

import pytest
import torch
from conftest import write_checkpoint

import benchmark
import test
import train

CPU = torch.device("cpu")


def test_benchmark_of_training(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "TRAINING_STEPS", 1)
    benchmark.main(["training", "--batch_size", "8", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert re.match(r"Commit (\w{7,}|unknown) of src(, changed)?; \d+ threads of a CPU", printed)
    names = re.findall(r"^\| (.+?) \| [\d,]+ \w+/s \|", printed, re.MULTILINE)
    assert names[:2] == ["training", "textbook float32"] and "product" in names[-1]
    assert re.search(r"Training is \d+\.\d+ times as fast as the textbook float32 loop", printed)
    mflop = int(re.search(r"An image takes (\d+) MFLOP", printed)[1])
    forwards = 78.1  # twice as much backwards, a quarter for guidance, and 378 MFLOP of Muon a step
    assert mflop == pytest.approx(3.25 * forwards + 378 / 8, rel=0.03)


@pytest.mark.parametrize("what, rows", [
    ("guidance", len(benchmark.GUIDANCE) + 1), ("floors", 2), ("usefulness", 2),
    ("samplers", 3)])
def test_benchmark_of_digits(what, rows, small_model, tmp_path, small_mnist, monkeypatch, capsys):
    given = []

    def classifier(images, labels, seed):
        given.append((images.shape, labels.tolist()))
        return test.load_classifier(CPU)

    monkeypatch.setattr(benchmark, "train_classifier", classifier)
    path = write_checkpoint(tmp_path / "small.pth", small_model, 1)
    settings = dict(checkpoint_path=path, n_samples=20, seeds=1, steps=[2])
    table = benchmark.TABLES[what]
    known = inspect.signature(table).parameters
    table(CPU, **{name: value for name, value in settings.items() if name in known})
    header, _, *lines = capsys.readouterr().out.strip().partition("\n\n")[2].split("\n")
    assert len(lines) == rows and {line.count("|") for line in lines} == {header.count("|")}
    if what == "usefulness":
        real, made = given
        assert real == made and real[0] == (20, 1, 28, 28)


def test_told_apart_are_other_images_but_not_others_of_the_same_kind(mnist):
    images, _ = mnist["train"]
    first, second = images[:400], images[400:800]
    assert benchmark.told_apart(255 - first, second, seed=0) > 0.95
    assert benchmark.told_apart(first, second, seed=0) == pytest.approx(0.5, abs=0.15)


def test_the_textbook_loop_learns(mnist):
    few = [values[:256] for values in mnist["train"]]
    settings = train.Settings(n_epochs=20, batch_size=64)
    before, after = (benchmark.train_textbook(dataclasses.replace(settings, n_epochs=n), *few)
                     for n in (0, 20))
    with torch.inference_mode():
        errors = [test.noise_mse(model, *few) for model in (before, after)]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("name", benchmark.RECIPES)
def test_benchmark_of_the_recipe_trains_by_every_variant(name, mnist):
    few = [values[:64] for values in mnist["train"]]
    settings = train.Settings(n_epochs=2, batch_size=16)
    average = benchmark.train_variant(name, settings, *few)
    assert all(p.isfinite().all() for p in average.parameters())
    usual = benchmark.train_variant("the recipe", settings, *few)
    same = [p.equal(q) for p, q in zip(average.parameters(), usual.parameters(), strict=True)]
    assert all(same) == (name == "the recipe")
