"""test.py: the classifier, features, metrics, the table and the plot."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, call, read_csv
from PIL import Image
from pytorch_fid.fid_score import calculate_frechet_distance
from torchvision.transforms.v2.functional import gaussian_blur

import test
import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def classifier():
    return test.load_classifier(test.CLASSIFIER, CPU)


# ---- classifier ----
def test_classifier_is_good_and_small(classifier, mnist):
    images, labels = mnist[False]
    _, digits = test.classify(classifier, images, 500)
    assert test.accuracy(digits, labels) >= 0.995
    assert test.CLASSIFIER.stat().st_size < 1_000_000


def test_classifier_is_trained_as_its_seed_says(monkeypatch, mnist):
    monkeypatch.setattr(test, "load_mnist", lambda *_, **__: tuple(values[:2000] for values in mnist[True]))
    first, again, other = (test.train_classifier(CPU, seed, epochs=2) for seed in (0, 0, 1))
    assert all(p.equal(q) for p, q in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not first.head.weight.equal(other.head.weight)
    _, digits = test.classify(first, mnist[True][0][:2000], 500)
    assert test.accuracy(digits, mnist[True][1][:2000]) > 0.5


def test_distortion_is_slight_and_different_for_each_image(mnist):
    x = (mnist[True][0][:1] / 127.5 - 1).expand(8, -1, -1, -1)
    y = test.distort(x, train.generator(CPU, 0))
    assert y.shape == x.shape and y.abs().max() <= 1
    assert all((y[0] != y[i]).any() for i in range(1, 8))
    assert ((y > 0).float().sum((1, 2, 3)) / (x > 0).float().sum((1, 2, 3)) - 1).abs().max() < 0.5


# ---- features ----
def test_other_forms_are_brought_to_the_classifiers(classifier, mnist):
    images, labels = train.load_mnist(False, image_size=32, channels=3)
    features, digits = test.classify(classifier, images[:1000], 256)
    assert features.shape == (1000, 128)
    assert test.accuracy(digits, labels[:1000]) > 0.98


def test_features_do_not_depend_on_the_batch_size(classifier, small_model, mnist):
    images = mnist[False][0][:100]
    for features in (lambda size: test.classify(classifier, images, size)[0],
                     lambda size: test.latent_features(small_model, images, size)):
        torch.testing.assert_close(features(100), features(7), rtol=1e-4, atol=1e-5)


def test_latent_features_are_the_bottleneck(small_model, mnist):
    assert test.latent_features(small_model, mnist[False][0][:10], 256).shape == (10, 16)


# ---- Frechet distance ----
def reference_distance(a, b):
    a, b = a.double().numpy(), b.double().numpy()
    return calculate_frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))


@pytest.mark.parametrize("n, dim", [(500, 3), (2000, 32), (20, 32)], ids=["small", "large", "singular"])
def test_distance_agrees_with_pytorch_fid(n, dim):
    rng = train.generator(CPU, n, dim)
    a = torch.randn(n, dim, generator=rng) @ torch.randn(dim, dim, generator=rng)
    b = torch.randn(n, dim, generator=rng) @ torch.randn(dim, dim, generator=rng) + 1
    assert test.frechet_distance(a, b) == pytest.approx(reference_distance(a, b), rel=1e-3)


def test_distance_of_equal_covariances_is_that_of_the_means():
    a = torch.randn(500, 8, generator=train.generator(CPU, 0))
    assert test.frechet_distance(a, a + 0.5) == pytest.approx(8 * 0.25, rel=1e-5)


def test_distance_in_one_dimension():
    """(mean_a - mean_b)^2 + (std_a - std_b)^2"""
    a = torch.randn(500, 1, generator=train.generator(CPU, 0))
    b = 3 * torch.randn(700, 1, generator=train.generator(CPU, 1)) + 2
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert test.frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-5)


def test_distance_is_zero_only_for_equals_and_ignores_order():
    a = torch.randn(300, 8, generator=train.generator(CPU, 0))
    a[:, 3] = 0  # as a dead feature
    assert test.frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-6)
    b = a * 1.1
    assert test.frechet_distance(a, b) == pytest.approx(test.frechet_distance(b.flip(0), a), rel=1e-6)
    assert test.frechet_distance(a, b) > 0.01


@pytest.mark.parametrize("space", ["classifier", "latent"])
def test_distance_grows_with_damage(classifier, small_model, mnist, space):
    images, labels = (values[:4000] for values in mnist[False])
    half, rest = images[::2], images[1::2]
    noise = torch.randn(rest.shape, generator=train.generator(CPU, 0))

    def distance(other):
        features = {"classifier": lambda x: test.classify(classifier, x, 500)[0],
                    "latent": lambda x: test.latent_features(small_model, x, 500)}[space]
        return test.frechet_distance(features(half), features(other))

    floor = distance(rest)
    noised = [distance((rest + level * noise).clamp(0, 255).byte()) for level in (20, 60)]
    blurred = [distance(gaussian_blur(rest, 5, sigma)) for sigma in (0.7, 2.0)]
    assert floor < noised[0] < noised[1] and floor < blurred[0] < blurred[1]
    assert distance(rest[labels[1::2] == 7]) > 10 * floor


# ---- other metrics ----
class KnownError(torch.nn.Module):
    """Knows the clean images, so its error is what it adds to the true noise."""

    config = {"time_steps": 1000}

    def __init__(self, images, error):
        super().__init__()
        self.x_0, self.error, self.seen = images / 127.5 - 1, error, 0

    def forward(self, x_t, t, labels):
        a = train.cumulative_alphas(1000)[t].view(-1, 1, 1, 1)
        x_0 = self.x_0[self.seen:self.seen + len(t)]
        self.seen += len(t)
        return ((x_t - a.sqrt() * x_0) / (1 - a).sqrt()).float() + self.error


@pytest.mark.parametrize("error", [0, 0.5])
def test_mse_is_the_error_of_the_noise(mnist, error):
    images, labels = (values[:300] for values in mnist[False])
    assert test.noise_mse(KnownError(images, error), images, labels, 128) == pytest.approx(error**2, abs=1e-6)


def test_mse_does_not_depend_on_the_batch_size(small_model, mnist):
    images, labels = (values[:300] for values in mnist[False])
    first, second = (test.noise_mse(small_model, images, labels, size) for size in (7, 256))
    assert first == pytest.approx(second, rel=1e-5)


def test_labels_have_the_proportions_of_the_test_set(mnist):
    labels = mnist[False][1]
    assert test.spread_labels(labels, 10000).equal(labels.sort().values)
    counts = test.spread_labels(labels, 2000).bincount()
    assert counts.sum() == 2000 and (counts - labels.bincount() / 5).abs().max() < 1


def test_picked_images_have_the_digits_asked_for(mnist):
    wanted = torch.tensor([0, 0, 3, 9])
    picked = test.pick_images(*mnist[True], wanted)
    images, labels = mnist[True]
    expected = [images[labels == 0][0], images[labels == 0][1], images[labels == 3][0], images[labels == 9][0]]
    assert picked.equal(torch.stack(expected))


# ---- command line ----
def test_test_as_a_user_runs_it(trained):
    folder, _ = trained
    done = call(folder, "src/test.py", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    rows = read_csv(folder / "datas/metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    assert float(rows[1]["mse"]) < float(rows[0]["mse"]) < 1.1
    assert all(float(row["fid_classifier"]) > float(row["floor_classifier"]) > 0 for row in rows)
    assert "accuracy" in done.stdout and rows[0]["n_samples"] == "2000"
    with Image.open(folder / "datas/metrics.png") as picture:
        picture.load()


def test_script_is_no_unit_test():
    assert not [name for name in vars(test) if name.lower().startswith("test")]
    assert Path(test.__file__) == REPOSITORY / "src/test.py"
