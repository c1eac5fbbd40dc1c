"""test.py: the classifier, features, metrics, the judge, the table and its pictures."""
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, call, read_csv, write_checkpoint
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
    _, digits = test.classify(classifier, test.mnist_pixels(images), 500)
    assert test.share(digits == labels) >= 0.995
    assert test.CLASSIFIER.stat().st_size < 1_000_000


def test_classifier_is_trained_as_its_seed_says(monkeypatch, mnist):
    monkeypatch.setattr(test, "load_mnist", lambda *_, **__: tuple(values[:2000] for values in mnist[True]))
    first, again, other = (test.train_classifier(CPU, seed, epochs=2) for seed in (0, 0, 1))
    assert all(p.equal(q) for p, q in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not first.head.weight.equal(other.head.weight)
    _, digits = test.classify(first, test.mnist_pixels(mnist[True][0][:2000]), 500)
    assert test.share(digits == mnist[True][1][:2000]) > 0.5


def test_classifier_is_remade_by_one_command(classifier, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(test, "train_classifier", lambda device, seed: classifier)
    monkeypatch.setattr(test, "CLASSIFIER", tmp_path / "checkpoints/classifier.pth")
    test.main(["--train_classifier", "--device", "cpu"])
    assert float(capsys.readouterr().out.split()[-6].rstrip("%")) >= 99.5
    remade = test.load_classifier(test.CLASSIFIER, CPU)
    assert all(p.equal(q) for p, q in zip(remade.parameters(), classifier.parameters(), strict=True))


def test_distortion_is_slight_and_different_for_each_image(mnist):
    x = (mnist[True][0][:1] / 127.5 - 1).expand(8, -1, -1, -1)
    y = test.distort(x, train.generator(CPU, 0))
    assert y.shape == x.shape and y.abs().max() <= 1
    assert all((y[0] != y[i]).any() for i in range(1, 8))
    assert ((y > 0).float().sum((1, 2, 3)) / (x > 0).float().sum((1, 2, 3)) - 1).abs().max() < 0.5


# ---- features ----
def test_other_forms_are_brought_to_the_classifiers(classifier, mnist):
    images, labels = train.load_mnist(False, image_size=32, channels=3)
    features, digits = test.classify(classifier, test.mnist_pixels(images[:1000]), 256)
    assert features.shape == (1000, 128)
    assert test.share(digits == labels[:1000]) > 0.98


def test_features_do_not_depend_on_the_batch_size(classifier, small_model, mnist):
    images = mnist[False][0][:100]
    for features in (lambda size: test.classify(classifier, test.mnist_pixels(images), size)[0],
                     lambda size: test.latent_features(small_model, images, size)):
        torch.testing.assert_close(features(100), features(7), rtol=1e-4, atol=1e-5)


def test_latent_features_are_the_bottleneck_of_clean_images(small_model, mnist):
    images, seen = mnist[False][0][:10], []
    small_model.mid2.register_forward_hook(lambda module, inputs, output: seen.append(output))
    small_model(images / 127.5 - 1, torch.zeros(10, dtype=torch.int64), torch.full((10,), train.NULL_LABEL))
    torch.testing.assert_close(test.latent_features(small_model, images, 4), seen[0].mean(dim=(2, 3)))


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


# ---- precision and recall ----
def slow_coverage(points, centres, k):
    """Kynkaanniemi et al. 2019, eq. 1, word for word: the mean of f(phi, Phi) over the points phi."""
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
    result = test.coverage(torch.from_numpy(points), torch.from_numpy(centres), k)
    assert 0.1 < result < 0.9
    assert result == pytest.approx(slow_coverage(points, centres, k))


def test_coverage_does_not_depend_on_the_parts_it_is_computed_in():
    rng = train.generator(CPU, 0)
    points, centres = torch.randn(1203, 4, generator=rng) + 1, torch.randn(700, 4, generator=rng)
    parts = [test.coverage(part, centres) * len(part) for part in points.split(100)]
    assert test.coverage(points, centres) == pytest.approx(sum(parts) / 1203)


def test_nearest_is_the_nearest():
    rng = np.random.default_rng(0)
    points, others = rng.normal(size=(50, 6)), rng.normal(size=(700, 6))
    distances, nearest = test.kth_nearest(torch.from_numpy(points), torch.from_numpy(others))
    expected = np.linalg.norm(points[:, None] - others, axis=2)
    assert (nearest.numpy() == expected.argmin(axis=1)).all()
    np.testing.assert_allclose(distances, expected.min(axis=1))


# ---- the judge ----
# It holds 2,000 digits against 2,000 test images and 10,000 training images.

@pytest.fixture(scope="module")
def judge(classifier, mnist, tmp_path_factory):
    torch.manual_seed(0)
    model = train.SimpleUnet(widths=(8, 16)).eval().requires_grad_(False)
    args = SimpleNamespace(root=tmp_path_factory.mktemp("judge"), device=CPU, batch_size=500)
    (args.root / "datas").mkdir()
    test_set, train_set = ([values[:count] for values in mnist[part]] for part, count in ((False, 2000), (True, 10000)))
    judge, copies = test.make_judge(model, classifier, test_set, train_set, args)
    return lambda images, labels: dict(zip(test.METRICS, judge(images, labels)[0], strict=True)), judge, copies


@pytest.fixture(scope="module")
def held_out(mnist):
    """2,000 test images that the judge has not seen, and their labels."""
    return [values[2000:4000] for values in mnist[False]]


@pytest.fixture(scope="module")
def real(judge, held_out):
    """What these get."""
    return judge[0](*held_out)


def test_real_digits_are_good(real, judge):
    assert real["precision"] > 0.75 and real["recall"] > 0.75 and real["accuracy"] > 0.98
    assert real["copies"] < 0.03 and judge[2] == pytest.approx(0.01, abs=0.003)


def noised(images, level):
    noise = torch.randn(images.shape, generator=train.generator(CPU, 0))
    return (images + level * noise).clamp(0, 255).byte()


def blurred(images, sigma):
    return gaussian_blur(images, 7, sigma)


@pytest.mark.parametrize("damage, mild, severe", [(noised, 20, 70), (blurred, 0.8, 2.5)])
def test_damage_shows_in_distances_precision_and_accuracy(damage, mild, severe, judge, held_out, real):
    images, labels = held_out
    mild, severe = (judge[0](damage(images, level), labels) for level in (mild, severe))
    for metric in ("fid_classifier", "fid_latent"):
        assert real[metric] < mild[metric] < severe[metric]
    for metric in ("precision", "accuracy"):
        assert real[metric] > severe[metric] and mild[metric] > severe[metric]


def test_one_class_lacks_variety(judge, mnist, real):
    images, labels = mnist[False]
    sevens = judge[0](images[labels == 7], labels[labels == 7])
    assert sevens["recall"] < 0.3 and min(sevens["precision"], sevens["accuracy"]) > 0.75
    assert all(sevens[metric] > 10 * real[metric] for metric in ("fid_classifier", "fid_latent"))


def test_training_images_pass_for_good_but_are_copies(judge, mnist, real):
    copied = judge[0](*(values[5000:7000] for values in mnist[True]))
    assert copied["copies"] == 1
    assert copied["precision"] > 0.75 and copied["recall"] > 0.75 and copied["accuracy"] > 0.98
    assert copied["fid_classifier"] < 4 * real["fid_classifier"]


def test_slightly_changed_training_images_are_copies_too(judge, mnist):
    assert judge[0](noised(mnist[True][0][:2000], 10), mnist[True][1][:2000])["copies"] > 0.9


def test_wrong_digits_are_wrong_but_no_copies(judge, held_out, real):
    images, labels = held_out
    wrong = judge[0](images, (labels + 1) % 10)
    assert wrong["accuracy"] < 0.02 and wrong["copies"] == real["copies"]


def test_pairs_are_generated_digits_above_their_nearest_training_images(judge, held_out, mnist):
    images = held_out[0].clone()
    images[7], images[1234] = mnist[True][0][8765], mnist[True][0][3]
    _, pairs = judge[1](images, held_out[1])
    assert pairs.shape == (20, 1, 28, 28)
    assert pairs[:2].equal(pairs[10:12]) and not pairs[2].equal(pairs[12])
    assert {tuple(pair.flatten().tolist()) for pair in pairs[:2]} == {
        tuple(mnist[True][0][i].flatten().tolist()) for i in (8765, 3)}


# ---- what is kept of the test images ----
@pytest.fixture
def kept(classifier, mnist, tmp_path):
    """(path, function that returns the features and distances kept there)"""
    test_pixels, train_pixels = (test.mnist_pixels(mnist[part][0][:300]) for part in (False, True))
    path = tmp_path / "reference.npz"
    return path, lambda n=300: test.describe_real(path, classifier, test_pixels, train_pixels[:n], 50)


def test_reference_is_made_once(kept, monkeypatch):
    first = kept[1]()
    monkeypatch.setattr(test, "classify", None)
    assert all(a.equal(b) for a, b in zip(first, kept[1](), strict=True))


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: content[:-100], lambda content: b"x" * 1000,
    lambda content: content[:30_000] + b"x" + content[30_001:],
], ids=["empty", "truncated", "foreign", "one byte"])
def test_damaged_reference_is_made_again(damage, kept):
    path, describe = kept
    first, content = describe(), path.read_bytes()
    path.write_bytes(damage(content))
    assert all(a.equal(b) for a, b in zip(first, describe(), strict=True))
    assert path.read_bytes()[:1000] == content[:1000] and len(path.read_bytes()) == len(content)


def test_reference_of_another_classifier_is_made_again(kept, monkeypatch, tmp_path):
    path, describe = kept
    describe()
    stale = path.read_bytes()
    monkeypatch.setattr(test, "CLASSIFIER", tmp_path / "classifier.pth")
    (tmp_path / "classifier.pth").write_bytes(b"another")
    describe()
    assert path.read_bytes() != stale


def test_reference_of_another_program_is_made_again(kept, monkeypatch):
    path, describe = kept
    describe()
    stale = path.read_bytes()
    monkeypatch.setattr(test, "SOURCES", [b"another"])
    describe()
    assert path.read_bytes() != stale


def test_reference_of_other_data_is_made_again(kept):
    _, describe = kept
    assert not describe()[1].equal(describe(200)[1])


# ---- MSE ----
class KnownMiss(torch.nn.Module):
    """Knows the clean images, so its error is what it adds to the true noise."""

    def __init__(self, images, error):
        super().__init__()
        self.config, self.alphas_cumprod = {"time_steps": 1000}, train.cumulative_alphas(1000)
        self.x_0, self.error, self.seen = images / 127.5 - 1, error, 0

    def forward(self, x_t, t, labels):
        a = train.cumulative_alphas(1000)[t].view(-1, 1, 1, 1)
        x_0 = self.x_0[self.seen:self.seen + len(t)]
        self.seen += len(t)
        return ((x_t - a.sqrt() * x_0) / (1 - a).sqrt()).float() + self.error


@pytest.mark.parametrize("error", [0, 0.5])
def test_mse_is_the_error_of_the_noise(mnist, error):
    images, labels = (values[:300] for values in mnist[False])
    mse, profile = test.noise_mse(KnownMiss(images, error), images, labels, 128)
    assert mse == pytest.approx(error**2, abs=1e-6)
    assert profile == pytest.approx([error**2] * 10, abs=1e-6)


class GrowsWithT(KnownMiss):
    def forward(self, x_t, t, labels):
        return super().forward(x_t, t, labels) + (t // 100).view(-1, 1, 1, 1)


def test_profile_goes_from_the_first_t_to_the_last(mnist):
    images, labels = (values[:500] for values in mnist[False])
    mse, profile = test.noise_mse(GrowsWithT(images, 0), images, labels, 128)
    assert profile == pytest.approx([i**2 for i in range(10)], abs=1e-4)
    assert mse == pytest.approx(28.5)


def test_mse_does_not_depend_on_the_batch_size(small_model, mnist):
    images, labels = (values[:300] for values in mnist[False])
    (first, first_profile), (second, second_profile) = (
        test.noise_mse(small_model, images, labels, size) for size in (7, 256))
    assert first == pytest.approx(second, rel=1e-5) and first_profile == pytest.approx(second_profile, rel=1e-5)


# ---- labels ----
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


# ---- the table ----
@pytest.fixture
def evaluation(tmp_path, monkeypatch, small_model, small_mnist, mnist):
    """(run, sampled, rows) for three checkpoints under tmp_path, at epochs 10, 20 and 30, and few images.

    run(*flags) is 'python src/test.py' with a random classifier; its digits are training images, others for each seed.
    sampled: (epoch, seed) of all sampling so far. rows() reads metrics.csv.
    """
    sampled = []

    def sample(model, labels, seed):
        sampled.append((round(model.conv_out.bias[0].item()), seed))
        return mnist[True][0][torch.randperm(3000, generator=train.generator(CPU, seed))[:len(labels)]][None]

    torch.manual_seed(0)
    features = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 16)).requires_grad_(False)
    classifier = SimpleNamespace(features=features, head=torch.nn.Linear(16, 10))
    monkeypatch.setattr(test, "sample", sample)
    monkeypatch.setattr(test, "load_classifier", lambda *_: classifier)
    for epoch in (10, 20, 30):
        small_model.conv_out.bias[:] = epoch  # by which the checkpoint is known
        write_checkpoint(tmp_path / f"checkpoints/diffusion_epoch_{epoch}.pth", small_model, epoch)
    flags = ["--root", str(tmp_path), "--n_samples", "2000", "--device", "cpu"]
    return (lambda *more: test.main([*flags, *more])), sampled, lambda: read_csv(tmp_path / "datas/metrics.csv")


def test_every_checkpoint_has_a_row(evaluation, tmp_path, capsys):
    run, sampled, rows = evaluation
    run()
    assert sampled == [(10, 0), (20, 0), (30, 0)]
    assert [row["epoch"] for row in rows()] == ["10", "20", "30"]
    assert list(rows()[0]) == test.COLUMNS
    assert {row["latent_epoch"] for row in rows()} == {"30"} and len({row["mse"] for row in rows()}) == 3
    for name in ("metrics", "metrics_profile", "metrics_closest_10", "metrics_closest_20", "metrics_closest_30"):
        with Image.open(tmp_path / f"datas/{name}.png") as picture:
            picture.load()


def test_printed_table_says_what_the_csv_says(evaluation, capsys):
    run, _, rows = evaluation
    run("--epochs", "10", "--seeds", "2")
    _, head, real, row, spread, _ = (line.split() for line in capsys.readouterr().out.splitlines())
    assert (real[:2], row[0], spread[:2]) == (["real", "-"], "10", ["+-", "-"])
    for name, *values in zip(head[1:], real[1:], row[1:], spread[1:], strict=True):
        for column, value in zip((f"real_{name}", name, f"{name}_std"), values, strict=True):
            if value != "-":
                scale, precision = (100, 0.006) if value.endswith("%") else (1, 0.0006)
                assert float(value.rstrip("%")) == pytest.approx(float(rows()[0][column]) * scale, abs=precision)


def test_pictures_show_the_newest_checkpoint_also_when_it_is_known(evaluation, monkeypatch):
    run, _, _ = evaluation
    drawn = []
    monkeypatch.setattr(test, "plot_metrics", lambda datas, rows: drawn.append([row["epoch"] for row in rows]))
    run("--every", "2")
    run()
    run()
    assert drawn == [[10], [10, 30], [10, 20], [10, 20, 30], [10, 20, 30]]


@pytest.mark.parametrize("flags, epochs", [
    (["--every", "2"], [10, 30]), (["--every", "3"], [30]), (["--epochs", "25"], [10, 20])])
def test_which_checkpoints_are_taken(evaluation, flags, epochs):
    run, sampled, rows = evaluation
    run(*flags)
    assert [epoch for epoch, _ in sampled] == epochs
    assert {row["latent_epoch"] for row in rows()} == {str(epochs[-1])}


def test_what_is_known_is_not_evaluated_again_unless_asked(evaluation, capsys):
    run, sampled, rows = evaluation
    run()
    first, table = rows(), capsys.readouterr().out
    run()
    assert len(sampled) == 3 and rows() == first and capsys.readouterr().out == table
    run("--again")
    assert len(sampled) == 6 and rows() == first


def test_other_settings_replace_a_row(evaluation):
    run, sampled, rows = evaluation
    for number, flags in enumerate(("", "--seed 12", "--seeds 2 --seed 1", "--n_samples 2100"), 1):
        run("--epochs", "10", *flags.split())
        assert len(set(sampled)) == len(sampled) - (number == 4) and len(rows()) == 1
    assert rows()[0]["n_samples"] == "2100" and rows()[0]["seeds"] == "1"


def test_another_latent_space_and_another_checkpoint_replace_a_row(evaluation, tmp_path, small_model):
    run, sampled, rows = evaluation
    run("--epochs", "20")
    small_model.conv_out.bias[:] = 11
    write_checkpoint(tmp_path / "checkpoints/diffusion_epoch_10.pth", small_model, 10)
    run("--epochs", "20")
    assert sampled == [(10, 0), (20, 0), (11, 0)]
    run()
    assert sampled[3:] == [(11, 0), (20, 0), (30, 0)]
    assert [(row["epoch"], row["latent_epoch"]) for row in rows()] == [("10", "30"), ("20", "30"), ("30", "30")]


def test_one_checkpoint_leaves_the_other_rows_alone(evaluation, tmp_path):
    run, sampled, rows = evaluation
    run()
    first = rows()
    run("--checkpoint_path", str(tmp_path / "checkpoints/diffusion_epoch_20.pth"))
    assert len(sampled) == 4 and rows()[::2] == first[::2]
    assert rows()[1]["latent_epoch"] == "20"


def test_a_run_that_stops_keeps_its_rows(evaluation, monkeypatch):
    run, sampled, rows = evaluation
    sample = test.sample

    def stop_at_20(model, labels, seed):
        if model.conv_out.bias[0] == 20:
            raise KeyboardInterrupt
        return sample(model, labels, seed)

    monkeypatch.setattr(test, "sample", stop_at_20)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert [row["epoch"] for row in rows()] == ["10"]
    monkeypatch.setattr(test, "sample", sample)
    run()
    assert sampled == [(10, 0), (20, 0), (30, 0)] and len(rows()) == 3


def test_seeds_give_mean_and_standard_deviation(evaluation, tmp_path, capsys):
    run, sampled, rows = evaluation
    single = []
    for seed in "567":
        run("--epochs", "10", "--seed", seed)
        single.append(float(rows()[0]["fid_classifier"]))
        assert rows()[0]["fid_classifier_std"] == "nan"
    capsys.readouterr()
    run("--epochs", "10", "--seed", "5", "--seeds", "3")
    assert sampled[3:] == [(10, 5), (10, 6), (10, 7)]
    assert float(rows()[0]["fid_classifier"]) == pytest.approx(np.mean(single))
    assert float(rows()[0]["fid_classifier_std"]) == pytest.approx(np.std(single, ddof=1))
    assert " +- " in capsys.readouterr().out


def test_damaged_table_is_left_alone(evaluation, tmp_path, capsys):
    run, *_ = evaluation
    run("--epochs", "10")
    path = tmp_path / "datas/metrics.csv"
    content = path.read_bytes()
    for damaged in (content[:-40], content[1:], content.replace(b",0.", b",o.", 1), content + b"\xff,", b""):
        path.write_bytes(damaged)
        with pytest.raises(train.InputError, match=r"metrics\.csv"):
            run("--epochs", "10")
        assert path.read_bytes() == damaged


# ---- command line ----
def test_test_as_a_user_runs_it(trained):
    folder, _ = trained
    done = call(folder, "src/test.py", "--device", "cpu", "--n_samples", "2000")
    assert done.returncode == 0, done.stderr
    rows = read_csv(folder / "datas/metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(math.isfinite(float(row[name])) for row in rows for name in test.COLUMNS[:8])
    assert float(rows[1]["mse"]) < float(rows[0]["mse"]) < 1.1
    assert all(float(row["fid_classifier"]) > float(row["real_fid_classifier"]) > 0 for row in rows)


def test_other_forms_are_evaluated(tmp_path, small_mnist):
    path = write_checkpoint(tmp_path / "x.pth", train.SimpleUnet(3, 32, 100, (8, 16)), 7)
    flags = "--n_samples 2000 --image_size 32 --channels 3 --time_steps 100 --device cpu".split()
    test.main(["--root", str(tmp_path), "--checkpoint_path", str(path), *flags])
    row, = read_csv(tmp_path / "datas/metrics.csv")
    assert row["epoch"] == row["latent_epoch"] == "7"
    assert float(row["real_accuracy"]) > 0.98 and float(row["accuracy"]) < 0.5
    assert 0 < float(row["real_copies"]) < 0.05


def test_script_is_no_unit_test():
    assert not [name for name in vars(test) if name.lower().startswith("test")]
    assert Path(test.__file__) == REPOSITORY / "src/test.py"
