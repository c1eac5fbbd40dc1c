"""test.py: the classifier, features, metrics, scores, the table and its pictures."""
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Oracle, call, read_csv, write_checkpoint
from PIL import Image
from pytorch_fid.fid_score import calculate_frechet_distance

import test
import train
from common import generator

CPU = torch.device("cpu")


def random_numbers(*shape, key=0):
    return torch.randn(*shape, generator=generator(CPU, "evaluation", key))


@pytest.fixture(scope="module")
def classifier():
    return test.load_classifier(CPU)


# ---- classifier ----
def test_classifier_is_good_and_small(classifier, mnist):
    images, labels = (values[:2000] for values in mnist["test"])
    _, digits = test.classify(classifier, test.mnist_pixels(images))
    assert test.share(digits == labels) > 0.99
    assert test.CLASSIFIER.stat().st_size < 1_000_000


def test_classifier_is_trained_as_its_seed_says(mnist):
    images, labels = (values[:500] for values in mnist["train"])
    first, again, other = (test.train_classifier(images, labels, seed, epochs=1)
                           for seed in (0, 0, 1))
    for p, q in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert p.equal(q)
    assert not first.head.weight.equal(other.head.weight)


def test_an_exact_classifier_is_trained_on_images_as_they_are(mnist, monkeypatch):
    few = [values[:200] for values in mnist["train"]]
    before, distorted_before = (test.train_classifier(*few, epochs=1, exact=exact)
                                for exact in (True, False))
    monkeypatch.setattr(test, "distort", lambda x, rng: torch.zeros_like(x))
    after, distorted_after = (test.train_classifier(*few, epochs=1, exact=exact)
                              for exact in (True, False))
    assert after.head.weight.equal(before.head.weight)
    assert not distorted_after.head.weight.equal(distorted_before.head.weight)


def test_classifier_is_remade_by_one_command(classifier, monkeypatch, tmp_path, small_mnist,
                                             capsys):
    monkeypatch.setattr(test, "train_classifier", lambda images, labels: classifier)
    monkeypatch.setattr(test, "CLASSIFIER", tmp_path / "checkpoints/classifier.pth")
    test.main(["--train_classifier", "--device", "cpu"])
    accuracy = re.search(r"test accuracy (.*)%", capsys.readouterr().out)[1]
    assert float(accuracy) >= 99
    remade = test.load_classifier(CPU)
    for p, q in zip(remade.parameters(), classifier.parameters(), strict=True):
        assert p.equal(q)


def test_distortion_is_slight_and_different_for_each_image(mnist):
    x = (mnist["train"][0][:1] / 127.5 - 1).expand(8, -1, -1, -1)
    y = test.distort(x, generator(CPU, "step", 0))
    assert y.shape == x.shape and y.abs().max() <= 1
    assert all((y[0] != y[i]).any() for i in range(1, 8))
    ink_x, ink_y = ((z > 0).float().sum((1, 2, 3)) for z in (x, y))
    assert (ink_y / ink_x - 1).abs().max() < 0.5


# ---- features ----
def test_other_forms_are_brought_to_the_classifiers(classifier):
    images, labels = train.load_mnist("test", 32, 3)
    features, digits = test.classify(classifier, test.mnist_pixels(images[:1000]))
    assert features.shape == (1000, 128)
    assert test.share(digits == labels[:1000]) > 0.98


def test_features_do_not_depend_on_the_batch_size(classifier, small_model, mnist, monkeypatch):
    images = mnist["test"][0][:100]
    pixels = test.mnist_pixels(images)
    whole = test.classify(classifier, pixels)[0], test.latent_features(small_model, images)
    monkeypatch.setattr(test, "EVAL_BATCH", 7)
    parts = test.classify(classifier, pixels)[0], test.latent_features(small_model, images)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def test_latent_features_are_the_bottleneck_of_clean_images(small_model, mnist):
    images, seen = mnist["test"][0][:10], []
    small_model.mid2.register_forward_hook(lambda module, inputs, output: seen.append(output))
    t = torch.zeros(10, dtype=torch.int64)
    small_model(images / 127.5 - 1, t, torch.full((10,), train.NULL_LABEL))
    torch.testing.assert_close(test.latent_features(small_model, images),
                               seen[0].mean(dim=(2, 3)))


# ---- Fréchet distance ----
def reference_distance(a, b):
    a, b = a.double().numpy(), b.double().numpy()
    return calculate_frechet_distance(a.mean(0), np.cov(a, rowvar=False),
                                      b.mean(0), np.cov(b, rowvar=False))


@pytest.mark.parametrize("n, dim", [(500, 3), (2000, 32), (20, 32)],
                         ids=["small", "large", "singular"])
def test_distance_agrees_with_pytorch_fid(n, dim):
    a = random_numbers(n, dim, key=0) @ random_numbers(dim, dim, key=1)
    b = random_numbers(n, dim, key=2) @ random_numbers(dim, dim, key=3) + 1
    assert test.frechet_distance(a, b) == pytest.approx(reference_distance(a, b), rel=1e-3)


def test_distance_is_zero_only_for_equals_and_ignores_order():
    a = random_numbers(300, 8)
    a[:, 3] = 0  # as a dead feature
    assert test.frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-6)
    b = a * 1.1
    assert test.frechet_distance(a, b) == pytest.approx(test.frechet_distance(b.flip(0), a),
                                                        rel=1e-6)
    assert test.frechet_distance(a, b) > 0.01


# ---- precision and recall ----
def slow_share_inside(points, centres, k):
    """Kynkäänniemi et al. 2019, eq. 1, word for word: the mean of f(phi, Phi) over points phi."""
    def f(phi):
        for i, centre in enumerate(centres):
            others = np.delete(centres, i, axis=0)
            radius = np.sort(np.linalg.norm(others - centre, axis=1))[k - 1]
            if np.linalg.norm(phi - centre) <= radius:
                return 1
        return 0
    return np.mean([f(phi) for phi in points])


@pytest.mark.parametrize("k", [1, 3])
def test_coverage_agrees_with_the_papers_definition(k):
    rng = np.random.default_rng(k)
    centres, points = rng.normal(size=(60, 4)), rng.normal(0.5, 1.2, size=(90, 4))
    result = test.share_inside(torch.from_numpy(points), torch.from_numpy(centres), k)
    assert 0.1 < result < 0.9
    assert result == pytest.approx(slow_share_inside(points, centres, k))


def test_coverage_does_not_depend_on_the_parts_it_is_computed_in():
    points, centres = random_numbers(1203, 4) + 1, random_numbers(700, 4, key=1)
    parts = [test.share_inside(part, centres) * len(part) for part in points.split(100)]
    assert test.share_inside(points, centres) == pytest.approx(sum(parts) / 1203)


def test_nearest_is_the_nearest():
    rng = np.random.default_rng(0)
    points, others = rng.normal(size=(50, 6)), rng.normal(size=(700, 6))
    distances, nearest = test.kth_nearest(torch.from_numpy(points), torch.from_numpy(others))
    expected = np.linalg.norm(points[:, None] - others, axis=2)
    assert (nearest.numpy() == expected.argmin(axis=1)).all()
    np.testing.assert_allclose(distances, expected.min(axis=1))


# ---- scores ----
# 2,000 digits are held against 2,000 test images and 10,000 training images.

@pytest.fixture(scope="module")
def judge(classifier, mnist):
    (train_images, train_labels), (test_images, test_labels) = mnist["train"], mnist["test"]
    judge = test.Judge(classifier, (train_images[:10000], train_labels[:10000]),
                       (test_images[:2000], test_labels[:2000]))
    assert judge.test_copies == pytest.approx(0.01, abs=0.003)
    return judge


@pytest.fixture(scope="module")
def scores(judge):
    """A function that returns the scores of images and labels, also in a latent space."""
    torch.manual_seed(0)
    model = train.SimpleUnet(widths=(8, 16)).eval().requires_grad_(False)
    real = test.latent_features(model, judge.test_images)
    return lambda images, labels: dict(
        fid_latent=test.frechet_distance(test.latent_features(model, images), real),
        copies=judge.find_copies(images)[0], **judge.scores(images, labels))


@pytest.fixture(scope="module")
def held_out(mnist):
    """2,000 test images that the judge has not seen, and their labels."""
    return [values[2000:4000] for values in mnist["test"]]


@pytest.fixture(scope="module")
def real(scores, held_out):
    """What these get."""
    return scores(*held_out)


def test_real_digits_are_good(real):
    assert real["precision"] > 0.75 and real["recall"] > 0.75 and real["accuracy"] > 0.98
    assert real["copies"] < 0.03


def noised(images, level):
    return (images + level * random_numbers(*images.shape)).clamp(0, 255).byte()


def test_damage_shows_in_distances_precision_and_accuracy(scores, held_out, real):
    images, labels = held_out
    mild, severe = (scores(noised(images, level), labels) for level in (20, 70))
    for metric in ("fid_classifier", "fid_latent"):
        assert real[metric] < mild[metric] < severe[metric]
    for metric in ("precision", "accuracy"):
        assert real[metric] > severe[metric] and mild[metric] > severe[metric]


def test_one_class_lacks_variety(scores, mnist, real):
    images, labels = mnist["test"]
    sevens = scores(images[labels == 7], labels[labels == 7])
    assert sevens["recall"] < 0.3 and min(sevens["precision"], sevens["accuracy"]) > 0.75
    for metric in ("fid_classifier", "fid_latent"):
        assert sevens[metric] > 10 * real[metric]


def test_training_images_pass_for_good_but_are_copies(scores, mnist, real):
    copied = scores(*(values[5000:7000] for values in mnist["train"]))
    assert copied["copies"] == 1
    assert copied["precision"] > 0.75 and copied["recall"] > 0.75 and copied["accuracy"] > 0.98
    assert copied["fid_classifier"] < 4 * real["fid_classifier"]


def test_slightly_changed_training_images_are_copies_too(judge, mnist):
    assert judge.find_copies(noised(mnist["train"][0][:1000], 10))[0] > 0.9


def test_pairs_are_generated_digits_above_their_nearest_training_images(judge, held_out):
    images = held_out[0].clone()
    images[7], images[1234] = judge.train_images[8765], judge.train_images[3]
    _, pairs = judge.find_copies(images)
    assert pairs.shape == (20, 1, 28, 28)
    assert pairs[:2].equal(pairs[10:12]) and not pairs[2].equal(pairs[12])
    found = {tuple(image.flatten().tolist()) for image in pairs[:2]}
    assert found == {tuple(judge.train_images[i].flatten().tolist()) for i in (8765, 3)}


# ---- MSE ----
@pytest.mark.parametrize("error", [0, 0.5])
def test_mse_is_the_error_of_the_noise_over_all_t_after_clipping(mnist, error):
    images, labels = (values[:500] for values in mnist["test"])
    x_0 = images / 127.5 - 1
    model = Oracle(x_0, error)
    mse = test.noise_mse(model, images, labels, 128)
    assert sorted(model.seen_t) == list(range(0, 1000, 2))
    a = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[model.seen_t].reshape(-1, 1, 1, 1)
    left = np.clip(x_0.numpy() - np.sqrt(1 - a) * error, -1, 1) - x_0.numpy()
    assert mse == pytest.approx((a / (1 - a) * left ** 2).mean(), abs=1e-5)


# ---- labels ----
def test_labels_have_the_proportions_of_the_test_set(mnist):
    labels = mnist["test"][1]
    assert test.spread_labels(labels, 10000).equal(labels.sort().values)
    counts = test.spread_labels(labels, 2000).bincount()
    assert counts.sum() == 2000 and (counts - labels.bincount() / 5).abs().max() < 1


def test_picked_images_have_the_digits_asked_for(mnist):
    images, labels = mnist["train"]
    picked = test.pick_images(images, labels, torch.tensor([0, 0, 3, 9]))
    zeros, threes, nines = (images[labels == digit] for digit in (0, 3, 9))
    assert picked.equal(torch.stack([zeros[0], zeros[1], threes[0], nines[0]]))


# ---- the table ----
@pytest.fixture
def evaluation(tmp_path, monkeypatch, small_model, small_mnist, mnist):
    """(run, sampled, rows) for three checkpoints under tmp_path, at epochs 10, 20 and 30.

    run(*flags) is 'python src/test.py' with a random classifier and few images; the digits are
    training images, others for each seed. sampled: the seeds of all sampling so far. rows() reads
    metrics.csv.
    """
    sampled = []

    def sample(model, labels, seed):
        sampled.append(seed)
        order = torch.randperm(3000, generator=generator(CPU, "samples", seed))
        return mnist["train"][0][order[:len(labels)]][None]

    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 16))
    classifier = SimpleNamespace(features=layers, head=torch.nn.Linear(16, 10))
    monkeypatch.setattr(test, "sample", sample)
    monkeypatch.setattr(test, "load_classifier", lambda device: classifier)
    for epoch in (10, 20, 30):
        small_model.conv_out.bias += 0.1
        write_checkpoint(tmp_path / f"checkpoints/diffusion_epoch_{epoch}.pth", small_model, epoch)
    flags = ["--root", str(tmp_path), "--n_samples", "2000", "--device", "cpu"]
    return (lambda *more: test.main([*flags, *more]), sampled,
            lambda: read_csv(tmp_path / "datas/metrics.csv"))


def test_every_checkpoint_has_a_row(evaluation, tmp_path):
    run, sampled, rows = evaluation
    run()
    assert sampled == [0, 0, 0]
    assert [row["epoch"] for row in rows()] == ["real", "10", "20", "30"]
    assert list(rows()[0]) == ["epoch", "seed", *test.FORMATS, "n_samples", "latent_epoch"]
    assert {row["latent_epoch"] for row in rows()} == {"30"}
    assert len({row["mse"] for row in rows()[1:]}) == 3
    for name in ("metrics", "metrics_closest_10", "metrics_closest_20", "metrics_closest_30"):
        with Image.open(tmp_path / f"datas/{name}.png") as picture:
            picture.load()


def test_printed_table_says_what_the_csv_says(evaluation, capsys):
    run, _, rows = evaluation
    run("--epochs", "10", "--seeds", "2")
    _, head, *lines = (line.split() for line in capsys.readouterr().out.splitlines()[:-1])
    real, *of_seeds = rows()
    for line, name in zip(lines, ("real", "10", "+-"), strict=True):
        assert line[0] == name
        for metric, printed in zip(head[1:], line[1:], strict=True):
            values = [float(row[metric]) for row in of_seeds]
            value = {"real": real[metric], "10": np.mean(values),
                     "+-": np.std(values, ddof=1)}[name]
            if value == "nan":
                assert printed == "nan"
            else:
                scale, precision = (100, 0.006) if printed.endswith("%") else (1, 0.0006)
                assert float(printed.rstrip("%")) == pytest.approx(float(value) * scale,
                                                                   abs=precision)


@pytest.mark.parametrize("flags, epochs", [
    (["--every", "2"], ["10", "30"]), (["--every", "3"], ["30"]),
    (["--epochs", "25"], ["10", "20"])])
def test_which_checkpoints_are_taken(evaluation, flags, epochs):
    run, _, rows = evaluation
    run(*flags)
    assert [row["epoch"] for row in rows()] == ["real", *epochs]
    assert {row["latent_epoch"] for row in rows()} == {epochs[-1]}


def test_every_seed_has_a_row(evaluation):
    run, sampled, rows = evaluation
    run("--epochs", "10", "--seeds", "3")
    assert sampled == [0, 1, 2]
    assert [row["seed"] for row in rows()] == ["", "0", "1", "2"]
    assert len({row["fid_classifier"] for row in rows()}) == 4


def test_a_run_that_stops_keeps_its_rows(evaluation, tmp_path, monkeypatch):
    run, sampled, rows = evaluation
    sample = test.sample

    def stop_at(count):
        def stopping_sample(*arguments, **settings):
            if len(sampled) == count:
                raise KeyboardInterrupt
            return sample(*arguments, **settings)
        monkeypatch.setattr(test, "sample", stopping_sample)
        with pytest.raises(KeyboardInterrupt):
            run()

    stop_at(1)
    assert [row["epoch"] for row in rows()] == ["real", "10"]
    assert (tmp_path / "datas/metrics.png").exists()
    before = rows()
    stop_at(1)  # nothing new is known: what was known is kept
    assert rows() == before


def test_evaluation_computes_in_float32_and_leaves_torch_as_it_was(evaluation, monkeypatch):
    def settings():
        cudnn = torch.backends.cudnn
        return cudnn.enabled, cudnn.allow_tf32, torch.is_inference_mode_enabled()

    run, *_ = evaluation
    sample, seen = test.sample, []
    monkeypatch.setattr(test, "sample", lambda *arguments, **more: (
        seen.append(settings()), sample(*arguments, **more))[1])
    run("--epochs", "10")
    assert seen == [(True, False, True)] and settings() == (True, True, False)


# ---- command line ----
def test_test_as_a_user_runs_it(trained):
    folder, _ = trained
    done = call(folder, "src/test.py", "--device", "cpu", "--n_samples", "2000", "--every", "2")
    assert done.returncode == 0, done.stderr
    real, row = read_csv(folder / "datas/metrics.csv")
    assert row["epoch"] == "2"
    assert all(math.isfinite(float(row[name])) for name in test.FORMATS)
    assert float(row["mse"]) < 0.9  # a network that says 0 has 1
    assert float(row["fid_classifier"]) > float(real["fid_classifier"]) > 0


def test_other_forms_are_evaluated(tmp_path, small_mnist, monkeypatch):
    rng = generator(CPU, "samples", 0)
    noise = torch.randint(256, (1, 2000, 3, 32, 32), generator=rng, dtype=torch.uint8)
    monkeypatch.setattr(test, "sample", lambda model, labels, seed: noise)
    path = write_checkpoint(tmp_path / "x.pth", train.SimpleUnet(32, 3, 100, (8, 16)), 7)
    flags = "--n_samples 2000 --image_size 32 --channels 3 --time_steps 100 --device cpu".split()
    test.main(["--root", str(tmp_path), "--checkpoint_path", str(path), *flags])
    real, row = read_csv(tmp_path / "datas/metrics.csv")
    assert row["epoch"] == row["latent_epoch"] == "7"
    assert float(real["accuracy"]) > 0.98 and float(row["accuracy"]) < 0.5
    assert 0 < float(real["copies"]) < 0.05


# ---- digits from anywhere ----
def evaluate_digits(path, capsys):
    """Return (first line, {metric: of real digits}, {metric: of the file's}) as printed."""
    test.main(["--digits", str(path), "--device", "cpu"])
    first, head, real, made = capsys.readouterr().out.splitlines()

    def values(line):
        return dict(zip(head.split(), (float(text.rstrip("%")) for text in line.split()[1:]),
                        strict=True))
    return first, values(real), values(made)


def test_as_many_digits_are_taken_as_fit_the_proportions(mnist):
    real = mnist["test"][1]
    wanted = test.fitting_labels(torch.arange(3000) % 10, real)
    assert wanted.equal(test.spread_labels(real, len(wanted)))
    assert wanted.bincount().max() == 300  # these are ones, as 1,135 of 10,000 test images are
    assert test.spread_labels(real, len(wanted) + 1).bincount().max() == 301
    for n in range(2000, 2400):
        assert len(test.fitting_labels(test.spread_labels(real, n), real)) == n
    assert len(test.fitting_labels(torch.full((5000,), 7), real)) < 10


def test_digits_with_labels_are_compared_in_the_proportions_of_the_test_set(
        tmp_path, mnist, small_mnist, capsys):
    images, labels = (values[:3000].numpy() for values in mnist["train"])
    np.savez(tmp_path / "digits.npz", images[:, 0], labels)
    first, real, made = evaluate_digits(tmp_path / "digits.npz", capsys)
    used = int(re.search(r"([\d,]+) of 3,000 digits", first)[1].replace(",", ""))
    assert 2000 < used < 2900
    assert made["accuracy"] > 99 and made["copies"] == 100
    assert made["fid_classifier"] == pytest.approx(real["fid_classifier"], abs=1e-3)


def test_digits_without_labels_are_compared_as_they_are(tmp_path, mnist, small_mnist, capsys):
    images = mnist["test"][0][:500].numpy().transpose(0, 2, 3, 1)
    np.savez_compressed(tmp_path / "digits.npz", np.tile(images, (4, 1, 1, 1)))
    first, real, made = evaluate_digits(tmp_path / "digits.npz", capsys)
    assert "2,000 digits" in first and "without labels" in first
    assert list(made) == ["fid_classifier", "precision", "recall", "copies"]
    assert made["precision"] == made["recall"] == 1
    assert made["fid_classifier"] < 0.001 < real["fid_classifier"]
