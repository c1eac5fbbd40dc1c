"""docs/runs.py: short runs, and what is written of them."""
import functools
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler

import runs
import test
import train
from common import InputError

CPU = torch.device("cpu")


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_is_the_last_that_changed_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "someone")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "someone@example.org")
    (tmp_path / "src").mkdir()

    def commit(path, message):
        (tmp_path / path).write_text(message)
        runs.git("add", path)
        runs.git("commit", "--message", message)
        return runs.git("log", "-1", "--format=%h")

    assert runs.commit_of_src() == "unknown"
    runs.git("init")
    last = commit("src/train.py", "Train better")
    commit("src/train.py", "Mend a comment\n\nNo figure changes.")
    commit("README.md", "Say it better")
    assert runs.commit_of_src() == last
    (tmp_path / "src/train.py").write_text("something else")
    assert runs.commit_of_src() == f"{last} (changed)"


def test_the_textbook_loop_learns(mnist):
    few = [values[:256] for values in mnist["train"]]
    epochs = runs.train_textbook(train.Settings(n_epochs=20, batch_size=64), *few)
    errors = {}
    for epoch, network in enumerate(epochs, start=1):
        if epoch in (1, 20):
            with torch.inference_mode():
                errors[epoch] = test.noise_mse(network, *few)
    assert errors[20] < 0.7 * errors[1]


def test_an_average_follows_the_optimizer():
    weight = torch.nn.Parameter(torch.zeros(()))
    model = torch.nn.ParameterList([weight])
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    average = runs.keep_average(model, optimizer, max_decay=0.5)
    expected = 0
    for n, decay in enumerate([0.1, 2 / 11, 0.25, 4 / 13, 5 / 14, 0.4, 7 / 16, 8 / 17, 0.5, 0.5]):
        weight.grad = torch.tensor(-1.0)
        optimizer.step()
        assert weight == n + 1
        expected = decay * expected + (1 - decay) * (n + 1)
        torch.testing.assert_close(average[0].item(), expected)


def test_a_rate_falls_to_0_in_a_straight_line():
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=0.2)
    runs.let_rate_fall(optimizer, total_steps=4)
    weight.grad = torch.tensor(-1.0)
    for expected in (0.2, 0.35, 0.45, 0.5):  # moved by 0.2, 0.15, 0.1 and 0.05
        optimizer.step()
        assert weight.item() == pytest.approx(expected)


@pytest.mark.parametrize("most", [0.0, 0.9])
def test_the_averaged_textbook_loop_is_the_same_loop(most, mnist):
    few = [values[:64] for values in mnist["train"]]
    settings = train.Settings(n_epochs=2, batch_size=32, ema_decay=most)
    *_, last = runs.train_textbook(settings, *few)
    *_, averaged = runs.train_textbook(settings, *few, runs.TEXTBOOK._replace(averaged=True))
    pairs = zip(last.parameters(), averaged.parameters(), strict=True)
    assert all(p.equal(q) for p, q in pairs) == (most == 0)


def test_t_of_the_cosine_schedule_have_its_noise():
    theirs = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    ours = train.cumulative_alphas(1000)[runs.cosine_t()]
    # Its first and its last steps have less and more noise than any of ours.
    torch.testing.assert_close(ours[5:990].logit(), theirs[5:990].logit(), atol=0.2, rtol=0)


@pytest.fixture(scope="module")
def variant(mnist):
    """A function that returns the network after two epochs of few images by a variant."""
    few = [values[:64] for values in mnist["train"]]

    @functools.cache
    def train_few(name):
        *_, network = runs.train_variant(name, train.Settings(n_epochs=2, batch_size=16), *few)
        return network
    return train_few


@pytest.mark.parametrize("name", list(runs.RECIPES)[1:])
def test_every_variant_trains_and_differs_from_the_recipe(name, variant):
    pairs = list(zip(variant(name).parameters(), variant("the recipe").parameters(), strict=True))
    assert all(p.isfinite().all() for p, _ in pairs)
    assert not all(p.equal(q) for p, q in pairs)


def test_adam_alone_moves_the_kernels_that_muon_had(variant):
    fresh = train.State(train.Settings(), CPU).average
    moved = variant("Adam at 0.001 for all")
    for p, q in zip(moved.parameters(), fresh.parameters(), strict=True):
        assert not p.equal(q)


def test_the_seconds_of_a_run_are_of_training_alone(monkeypatch):
    clock, found = SimpleNamespace(now=0), []
    monkeypatch.setattr(runs, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def epochs(*arguments):
        for _ in range(3):
            clock.now += 10
            yield None

    monkeypatch.setattr(runs, "train_textbook", epochs)
    run = runs.Run("textbook", 64, (1, 3))
    for epoch, _, seconds in runs.networks(run, 0, torch.zeros(1), None):
        found.append((epoch, seconds))
        clock.now += 1000  # its digits are judged
    assert found == [(1, 10), (3, 30)]


def test_a_run_is_done_once_and_anew_if_it_was_stopped(tmp_path, small_mnist, monkeypatch):
    path, networks, begun = tmp_path / "runs.csv", runs.networks, []
    monkeypatch.setattr(runs, "N_SAMPLES", 20)
    monkeypatch.setattr(runs, "RUNS", [runs.Run("the recipe", 50, (1,)),
                                       runs.Run("textbook", 50, (1, 2))])

    def stopped(run, seed, *data):
        begun.append((run.name, seed))
        for network in networks(run, seed, *data):
            yield network
            if begun == [("the recipe", 0), ("textbook", 0)]:
                raise KeyboardInterrupt

    monkeypatch.setattr(runs, "networks", stopped)
    with pytest.raises(KeyboardInterrupt):
        runs.record_runs(path, CPU, seeds=[0])
    runs.record_runs(path, CPU, seeds=[0, 1])
    assert begun == [("the recipe", 0), ("textbook", 0), ("textbook", 0), ("the recipe", 1),
                     ("textbook", 1)]
    mark, *rows = runs.read_runs(path)
    assert mark["training"] == "training images" and mark["accuracy"] > 0.8
    assert [(row["training"], row["epochs"], row["seed"]) for row in rows] == [
        ("the recipe", "1", "0"), ("textbook", "1", "0"), ("textbook", "2", "0"),
        ("the recipe", "1", "1"), ("textbook", "1", "1"), ("textbook", "2", "1")]

    before = path.read_text()
    monkeypatch.setattr(runs, "commit_of_src", lambda: "another")
    with pytest.raises(InputError, match=r"runs\.csv is not of commit another of src"):
        runs.record_runs(path, CPU, seeds=[0, 1, 2])
    assert path.read_text() == before
