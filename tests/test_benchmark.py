"""docs/benchmark.py: its tables, of few digits and steps."""
import functools
import inspect
import re

import pytest
import torch
from conftest import write_checkpoint

import benchmark
from common import UserError, write_csv

CPU = torch.device("cpu")


def test_benchmark_of_training(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "TRAINING_STEPS", 1)
    monkeypatch.setitem(benchmark.MEASURED_NOW, "training",
                        functools.partial(benchmark.training_speed, batch_size=8))
    benchmark.main(["training", "--device", "cpu"])
    printed = capsys.readouterr().out
    commit = r"Commit (\w{7,}|unknown)( \(changed\))? of src"
    assert re.match(commit + r"; \d+ threads? of a CPU", printed)
    names = re.findall(r"^\| (.+?) \| [\d,]+ images/s \|", printed, re.MULTILINE)
    assert names == ["the recipe", "baseline D"]
    assert re.search(r"the recipe trains \d+\.\d+ times as fast as D", printed)


@pytest.mark.parametrize("what, rows", [
    ("sampling", 1), ("guidance", len(benchmark.GUIDANCE) + 1), ("samplers", 3), ("floors", 2),
    ("told_apart", 4)])
def test_benchmark_of_digits(what, rows, small_model, tmp_path, small_mnist, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "CHUNK_SIZE", 2)
    monkeypatch.setattr(benchmark, "told_apart", lambda generated, real, seed: 0.5)
    monkeypatch.setattr(benchmark, "train_ablation", lambda name, *_: iter([{name: small_model}]))
    path = write_checkpoint(tmp_path / "small.pth", small_model, 1)
    settings = dict(checkpoint_path=path, n_samples=20, seeds=1, steps=[2])
    table = benchmark.MEASURED_NOW[what]
    known = inspect.signature(table).parameters
    table(CPU, **{name: value for name, value in settings.items() if name in known})
    header, _, *lines = re.findall(r"^\|.*", capsys.readouterr().out, re.MULTILINE)
    assert len(lines) == rows and {line.count("|") for line in lines} == {header.count("|")}


def test_tables_of_runs_are_their_means(tmp_path, monkeypatch, capsys):
    def row(training, epochs, accuracy, **other):
        return dict(training=training, epochs=epochs, seed="",
                    accuracy=accuracy, fid_classifier=1, precision=0.5, recall=0.25, commit="today",
                    machine="B", torch="2", python="3", date="1") | other

    path, read_runs = tmp_path / "runs.csv", benchmark.read_runs
    monkeypatch.setattr(benchmark, "read_runs", lambda _: read_runs(path))
    with pytest.raises(UserError, match="does not exist"):
        benchmark.main(["baselines"])
    write_csv(path, [
        row("training images", "", 1), row("A", 4, 0.6),
        row("A", 2, 0.2), row("A", 2, 0.4, machine="A"),
        row("recipe", 2, 0.5), row("recipe", 2, 0.7),
        row("no_decay", 2, 0.3, machine="C", date="2")])
    columns = "accuracy | Fréchet distance | precision | recall"
    one, two = "1.0000 | 0.500 | 0.250", "1.0000 ± 0.0000 | 0.500 ± 0.000 | 0.250 ± 0.000"
    benchmark.main(["baselines"])
    assert capsys.readouterr().out == f"""\
Commit today of src; A and B; torch 2, Python 3; 1.
Batches of 64; 10,000 digits of each run; 1 or 2 seeds; docs/tables/runs.csv has all runs.

| training | epochs | {columns} |
|---|---|---|---|---|---|
| A: plain DDPM | 2 | 30.00% ± 14.14% | {two} |
| A: plain DDPM | 4 | 60.00% | {one} |
| the recipe | 2 | 60.00% ± 14.14% | {two} |
| real digits |  | 100.00% | {one} |
"""
    benchmark.main(["recipe"])
    assert capsys.readouterr().out == f"""\
Commit today of src; B and C; torch 2, Python 3; 1 and 2.
Batches of 64; 10,000 digits of each run; 1 or 2 seeds; docs/tables/runs.csv has all runs.

| training | epochs | {columns} |
|---|---|---|---|---|---|
| the recipe | 2 | 60.00% ± 14.14% | {two} |
| no learning rate decay | 2 | 30.00% | {one} |
| real digits |  | 100.00% | {one} |
"""


def test_told_apart_are_other_images_but_not_others_of_the_same_kind(mnist):
    images, _ = mnist["train"]
    first, second = images[:400], images[400:800]
    assert benchmark.told_apart(255 - first, second, seed=0) > 0.95
    assert benchmark.told_apart(first, second, seed=0) == pytest.approx(0.5, abs=0.15)
