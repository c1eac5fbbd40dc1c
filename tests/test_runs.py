"""docs/runs.py: short runs, and what is written of them."""
import functools
import os
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

import runs
import textbook
import train
from common import UserError

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


def test_the_textbook_learns_and_its_digits_are_sampled(mnist):
    images, labels = (values[:256] for values in mnist["train"])
    torch.manual_seed(0)
    model = train.SimpleUnet(widths=(8, 16))
    optimizer = torch.optim.Adam(model.parameters(), 0.002)
    for _ in range(20):
        textbook.train_epoch(model, optimizer, images, labels)
    with torch.inference_mode():
        t = textbook.uniform_t(len(images), CPU)
        loss = textbook.training_loss(model, images / 127.5 - 1, t, labels)
    assert loss < 0.7  # a network that says 0 has 1
    digits = textbook.sample(model, torch.arange(5), steps=10)
    assert digits.shape == (5, 1, 28, 28) and digits.abs().max() <= 1


def test_the_textbooks_sampler_is_ddim(small_model, monkeypatch):
    monkeypatch.setattr(textbook, "bf16_is_faster", lambda device: False)
    reference = DDIMScheduler(1000, beta_start=1e-4, beta_end=0.02, clip_sample=True)
    reference.set_timesteps(9)  # of 111 each
    labels = torch.arange(3)
    torch.manual_seed(0)
    x_t = torch.randn(3, 1, 28, 28)
    for t in range(999, 0, -111):
        eps = small_model(x_t, torch.full((3,), t), labels)
        step = reference.step(eps, t, x_t, use_clipped_model_output=True)
        x_t = step.prev_sample
    torch.manual_seed(0)
    torch.testing.assert_close(textbook.sample(small_model, labels, 9), step.pred_original_sample,
                               rtol=0, atol=1e-3)


def test_the_ema_follows_the_optimizer():
    weight = torch.nn.Parameter(torch.zeros(()))
    model = torch.nn.ParameterList([weight])
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    ema = runs.follow_with_ema(model, optimizer, max_decay=0.5)
    expected = 0
    for n, decay in enumerate([0.1, 2 / 11, 0.25, 4 / 13, 5 / 14, 0.4, 7 / 16, 8 / 17, 0.5, 0.5]):
        weight.grad = torch.tensor(-1.0)
        optimizer.step()
        assert weight == n + 1
        expected = decay * expected + (1 - decay) * (n + 1)
        torch.testing.assert_close(ema[0].item(), expected)


def test_a_learning_rate_decays_to_0_in_a_straight_line():
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=0.2)
    runs.decay_rate(optimizer, total_steps=4)
    weight.grad = torch.tensor(-1.0)
    for expected in (0.2, 0.35, 0.45, 0.5):  # moved by 0.2, 0.15, 0.1 and 0.05
        optimizer.step()
        assert weight.item() == pytest.approx(expected)


@pytest.mark.parametrize("name", runs.BASELINES)
def test_baselines_differ(name, mnist):
    few = [values[:64] for values in mnist["train"]]
    settings = train.Settings(n_epochs=2, batch_size=32)
    *_, trained = runs.train_baseline(name, settings, *few)
    assert list(trained) == (["A", "B"] if name == "A" else [name])
    *_, first = runs.train_baseline("A", settings, *few)
    same = [p.equal(q) for p, q in zip(trained[name].parameters(), first["B"].parameters(),
                                       strict=True)]
    assert not all(same) and all(p.isfinite().all() for p in trained[name].parameters())


def test_a_baseline_is_guided_where_the_recipe_is(small_model):
    labels, nulls = torch.arange(3), torch.full((3,), train.NULL_LABEL)
    torch.manual_seed(0)
    x_t = torch.randn(3, 1, 28, 28)

    def predict(t, labels, guidance=1):
        return runs.predictor_by_noise(small_model, labels, guidance)(x_t, t, 0.8, 0.6)

    for t in (190, 309):
        x_label, x_null = predict(t, labels), predict(t, nulls)
        expected = (x_null + 2.5 * (x_label - x_null)).clamp(-1, 1)
        assert not expected.equal(x_label)
        torch.testing.assert_close(predict(t, labels, 2.5), expected)
    for t in (189, 310):
        assert predict(t, labels, 2.5).equal(predict(t, labels))


def test_e_alone_is_guided(tmp_path, small_model, small_mnist, monkeypatch):
    monkeypatch.setattr(runs, "N_SAMPLES", 20)
    monkeypatch.setattr(runs, "networks", lambda run, *_: [(1, {run.name: small_model})])
    runs.record_runs(tmp_path / "runs.csv", [runs.Run(name, (1,)) for name in "CDE"], CPU, [0])
    _, c, d, e = (row["fid_classifier"] for row in runs.read_runs(tmp_path / "runs.csv"))
    assert c == d != e


def test_t_of_the_cosine_schedule_have_its_noise():
    theirs = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    ours = train.cumulative_alphas(1000)[runs.cosine_t()]
    # Its first and its last steps have less and more noise than any of ours.
    torch.testing.assert_close(ours[5:990].logit(), theirs[5:990].logit(), atol=0.2, rtol=0)


@pytest.fixture(scope="module")
def ablation(mnist):
    """A function that returns the network after two epochs of few images by an ablation."""
    few = [values[:64] for values in mnist["train"]]

    @functools.cache
    def train_few(name):
        *_, trained = runs.train_ablation(name, train.Settings(n_epochs=2, batch_size=16), *few)
        return trained[name]
    return train_few


@pytest.mark.parametrize("name", [*list(runs.ABLATIONS)[1:], *runs.TRIALS])
def test_every_ablation_trains_and_differs_from_the_recipe(name, ablation):
    pairs = list(zip(ablation(name).parameters(), ablation("recipe").parameters(), strict=True))
    assert all(p.isfinite().all() for p, _ in pairs)
    assert not all(p.equal(q) for p, q in pairs)


def test_adam_alone_moves_the_kernels_that_muon_had(ablation):
    fresh = train.State(train.Settings(), CPU).ema
    moved = ablation("no_muon")
    for p, q in zip(moved.parameters(), fresh.parameters(), strict=True):
        assert not p.equal(q)


def test_a_run_is_done_once_and_anew_if_it_was_stopped(tmp_path, small_model, small_mnist,
                                                       monkeypatch):
    path, race, begun = tmp_path / "runs.csv", tmp_path / "race.npz", []
    monkeypatch.setattr(runs, "RUNS_FILE", path)
    monkeypatch.setattr(runs, "RACE_FILE", race)
    monkeypatch.setattr(runs, "N_SAMPLES", 20)
    monkeypatch.setattr(runs, "RUNS", [runs.Run("recipe", (1,)), runs.Run("A", (1, 2))])

    def stopped(run, seed, *data):
        begun.append((run.name, seed))
        for epoch in run.epochs:
            names = ["A", "B"] if run.name == "A" else [run.name]
            yield epoch, dict.fromkeys(names, small_model)
            if begun == [("recipe", 0), ("A", 0)]:
                raise KeyboardInterrupt

    monkeypatch.setattr(runs, "networks", stopped)
    with pytest.raises(KeyboardInterrupt):
        runs.record_runs(path, runs.RUNS, CPU, seeds=[0])
    runs.record_runs(path, runs.RUNS, CPU, seeds=[0, 1])
    assert begun == [("recipe", 0), ("A", 0), ("A", 0), ("recipe", 1), ("A", 1)]
    real, *rows = runs.read_runs(path)
    assert real["training"] == "training images" and real["accuracy"] > 0.8
    one_seed = [("recipe", "1"), ("A", "1"), ("B", "1"), ("A", "2"), ("B", "2")]
    assert [(row["training"], row["epochs"], row["seed"]) for row in rows] == [
        (*run, seed) for seed in "01" for run in one_seed]

    with np.load(race) as file:
        assert file.files == ["recipe_1"] and file["recipe_1"].shape == (10, 1, 28, 28)

    before = path.read_text()
    monkeypatch.setattr(runs, "commit_of_src", lambda: "another")
    with pytest.raises(UserError, match=r"runs\.csv is not of commit another of src"):
        runs.record_runs(path, runs.RUNS, CPU, seeds=[0, 1, 2])
    assert path.read_text() == before
