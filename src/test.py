"""Evaluate checkpoints: the error of the predicted noise, and how good generated digits are.

    python src/test.py                      every checkpoint: a table, datas/metrics.csv, pictures
    python src/test.py --digits FILE.npz    digits from anywhere, by the same metrics
    python src/test.py --train_classifier   train checkpoints/classifier.pth again

This is a script, not a unit test. The classifier comes first, then features, metrics, evaluation.
"""
import contextlib
import itertools
import math
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy import linalg
from torch import nn
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from common import (REPOSITORY, UserError, add_flag, bf16_is_faster, bounded, explain_read_errors,
                    generator, label_log_axis, load_tensors, make_parser, prepare_folder,
                    refuse_contradictions, replacing, run_script, save_tensors, write_csv)
from generate import (DEFAULT_SAMPLER, SAMPLERS, add_checkpoint_flags, draw_grid, find_checkpoints,
                      load_checkpoint, sample)
from train import (NULL_LABEL, alpha_and_sigma, cumulative_alphas, forward_diffusion_sample,
                   load_mnist, x_0_from_v)

CLASSIFIER = REPOSITORY / "checkpoints/classifier.pth"
EVAL_BATCH = 1000  # images that are evaluated together


# ---- classifier ----
class Classifier(nn.Module):
    """(B, 1, 28, 28) in [-1, 1] -> (B, 10) logits. Its features (B, 128) are what is compared."""

    def __init__(self):
        super().__init__()

        def conv(c_in, c_out):
            return [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out),
                    nn.ReLU()]

        self.features = nn.Sequential(
            *conv(1, 32), *conv(32, 32), nn.MaxPool2d(2),
            *conv(32, 64), *conv(64, 64), nn.MaxPool2d(2),
            *conv(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        return self.head(self.features(x))


def distort(x, rng):
    """Rotate, scale, shear and shift each image (B, 1, H, W) a little, at random."""
    angle, scale, shear, dx, dy = torch.rand(5, len(x), generator=rng, device=x.device) * 2 - 1
    cos = (1 + 0.12 * scale) * (0.2 * angle).cos()
    sin = (1 + 0.12 * scale) * (0.2 * angle).sin()
    rows = [cos, 0.2 * shear - sin, 0.14 * dx, sin, cos, 0.14 * dy]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def train_classifier(images, labels, seed=0, epochs=10, exact=False):
    """Return a Classifier, ready to predict, trained on images (N, 1, 28, 28) uint8.

    They are distorted, and seen in bfloat16 where that is faster. With exact they are seen as they
    are, in float32, so that the finest grey levels count.
    """
    torch.manual_seed(seed)
    device = images.device
    steps = len(images) // 100
    classifier = Classifier().to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.005, total_steps=epochs * steps)
    for epoch in tqdm(range(epochs), desc="classifier", unit=" epochs"):
        rng = generator(device, "order", seed, epoch)
        order = torch.randperm(len(images), generator=rng, device=device)
        for number, batch in enumerate(order.split(100)[:steps]):
            x = images[batch] / 127.5 - 1
            if not exact:
                x = distort(x, generator(device, "step", seed, epoch, number))
            with torch.autocast(device.type, torch.bfloat16,
                                enabled=bf16_is_faster(device) and not exact):
                logits = classifier(x).float()
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[batch], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
    return classifier.eval().requires_grad_(False)


def load_classifier(device):
    """Return the Classifier, ready to predict. Raises UserError where it is missing or damaged."""
    classifier = Classifier()
    with explain_read_errors(CLASSIFIER,
                             "make it again by 'python src/test.py --train_classifier'"):
        classifier.load_state_dict(load_tensors(CLASSIFIER))
    return classifier.to(device).eval().requires_grad_(False)


# ---- features ----
def mnist_pixels(images):
    """Return images (N, C, H, W) uint8 as (N, 784) in [-1, 1].

    Channels are averaged; what is not of 28 x 28 pixels is resized with antialiasing.
    """
    parts = [part.float().mean(dim=1, keepdim=True) for part in images.split(EVAL_BATCH)]
    return torch.cat([resize(part, [28, 28]) for part in parts]).flatten(1) / 127.5 - 1


def classify(classifier, pixels):
    """Return the features (N, 128) of pixels (N, 784), and the labels (N,) it predicts."""
    parts = [part.view(-1, 1, 28, 28) for part in pixels.split(EVAL_BATCH)]
    features = torch.cat([classifier.features(part) for part in parts])
    return features, classifier.head(features).argmax(dim=1)


def latent_features(model, images):
    """Return the model's bottleneck of clean images, averaged over space: (N, D).

    images: (N, C, H, W) uint8; they are seen at t = 0, with the null label.
    """
    t = torch.zeros(1, dtype=torch.int64, device=images.device)
    scale_shifts = model.embed(t, t + NULL_LABEL)
    parts = [model.encode(part / 127.5 - 1, scale_shifts)[0] for part in images.split(EVAL_BATCH)]
    return torch.cat([part.mean(dim=(2, 3)) for part in parts])


# ---- metrics ----
def share(condition):
    """Return the share of true values in a boolean tensor."""
    return condition.double().mean().item()


def frechet_distance(a, b):
    """Return the squared Fréchet distance of Gaussians fitted to a (N, D) and b (M, D).

    |mean_a - mean_b|^2 + trace(C_a + C_b - 2 sqrt(C_a C_b)) (Heusel et al. 2017), in float64. The
    trace of the root comes from the eigenvalues of the symmetric sqrt(C_a) C_b sqrt(C_a), which
    are those of C_a C_b, also for singular C.
    """
    a, b = a.double().cpu(), b.double().cpu()
    cov_a, cov_b = a.T.cov().numpy(), b.T.cov().numpy()
    values, vectors = linalg.eigh(cov_a)
    root_a = vectors * values.clip(0) ** 0.5 @ vectors.T
    trace_root = (linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0) ** 0.5).sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return float(means + cov_a.trace() + cov_b.trace() - 2 * trace_root)


def kth_nearest(points, others, k=1):
    """Return (distances, indices) (N,): for each of points (N, D) its k-th nearest of others."""
    found = [torch.cdist(part, others).topk(k, largest=False) for part in points.split(EVAL_BATCH)]
    distances = torch.cat([part.values[:, -1] for part in found])
    return distances, torch.cat([part.indices[:, -1] for part in found])


def share_inside(points, centres, k=3):
    """Return the share of points (N, D) within the radius of some centre (M, D).

    A centre's radius is its distance to the k-th nearest other centre. With generated points and
    real centres this is the precision, with real points and generated centres the recall
    (Kynkäänniemi et al. 2019, eq. 1 and 2).
    """
    points, centres = points.double(), centres.double()
    radii, _ = kth_nearest(centres, centres, k + 1)  # the nearest is the centre itself
    inside = [(torch.cdist(part, centres) <= radii).any(dim=1) for part in points.split(EVAL_BATCH)]
    return share(torch.cat(inside))


def noise_mse(model, images, labels, batch_size):
    """Return the mean squared error of the predicted noise, with true labels, over all t.

    The predicted clean image is clipped, as in sampling, and its error is scaled back to a noise
    error by alpha_t / sigma_t. The t, spread evenly over 0..T-1, and the noise are drawn on the
    CPU, so they are the same for every checkpoint and machine. The network runs in float32.
    """
    rng = generator("cpu", "evaluation", 0)
    t = torch.randperm(len(images), generator=rng) * model.config["time_steps"] // len(images)
    noise = torch.randn(images.shape, generator=rng).to(images.device)
    alphas_cumprod = cumulative_alphas(model.config["time_steps"]).to(images.device)
    batches = [values.split(batch_size) for values in (images, t.to(images.device), noise, labels)]
    total = 0.0
    for images_b, t_b, noise_b, labels_b in zip(*batches, strict=True):
        x_0 = images_b / 127.5 - 1
        alpha_t, sigma_t = alpha_and_sigma(t_b, alphas_cumprod)
        x_t = forward_diffusion_sample(x_0, noise_b, alpha_t, sigma_t)
        predicted = x_0_from_v(model(x_t, t_b, labels_b), x_t, alpha_t, sigma_t).clamp(-1, 1)
        errors = (alpha_t / sigma_t * (predicted - x_0)).square().mean(dim=(1, 2, 3))
        total += errors.double().sum().item()
    return total / len(images)


# ---- labels ----
def spread_labels(labels, n_samples):
    """Return n_samples labels, in order, in the proportions of the labels given."""
    places = torch.arange(n_samples, device=labels.device) * len(labels) // n_samples
    return labels.sort().values[places]


def pick_images(images, labels, wanted):
    """Return the first images of each digit, as many as there are in wanted (N,), in order."""
    counts = wanted.bincount(minlength=10).tolist()
    return torch.cat([images[labels == digit][:count] for digit, count in enumerate(counts)])


# ---- evaluation ----
@contextlib.contextmanager
def judging():
    """Compute without gradients, and in float32 without TF32, so that machines agree.

    Sampling alone uses bfloat16, where that is faster: it switches autocast on itself.
    """
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


class Judge:
    """Compares digits with MNIST's test images, and looks for copies of its training images.

    train, test: (images, labels) as load_mnist returns them, in the digits' size and channels. A
    copy is closer to a training image than 99 % of test digits of its class are. Each class has its
    own threshold, because ones lie much closer to each other than eights.
    """

    def __init__(self, classifier, train, test):
        self.classifier = classifier
        self.train_images, self.train_labels = train
        self.test_images, self.test_labels = test
        self.train_pixels, test_pixels = mnist_pixels(train[0]), mnist_pixels(test[0])
        self.test_features, _ = classify(classifier, test_pixels)
        distances, _ = kth_nearest(test_pixels, self.train_pixels)
        self.thresholds = torch.stack([
            distances[self.test_labels == digit].quantile(0.01) for digit in range(10)])
        self.test_copies = share(distances < self.thresholds[self.test_labels])  # about 1 %

    def scores(self, images, labels=None):
        """Return the metrics of images (N, C, H, W) uint8; without labels (N,) no accuracy."""
        features, digits = classify(self.classifier, mnist_pixels(images))
        scores = dict(fid_classifier=frechet_distance(features, self.test_features),
                      precision=share_inside(features, self.test_features),
                      recall=share_inside(self.test_features, features))
        if labels is not None:
            scores["accuracy"] = share(digits == labels)
        return scores

    def find_copies(self, images):
        """Return the share of copies and ten closest pairs, of images (N, C, H, W) uint8.

        The pairs (20, C, H, W): the ten images most like copies, then their training images. The
        class of an image is what the classifier reads.
        """
        pixels = mnist_pixels(images)
        _, digits = classify(self.classifier, pixels)
        distances, nearest = kth_nearest(pixels, self.train_pixels)
        ratios = distances / self.thresholds[digits]
        closest = ratios.argsort()[:10]
        return share(ratios < 1), torch.cat([images[closest], self.train_images[nearest[closest]]])

    def real_digits(self, labels):
        """Return the first training images of each digit, as many as in labels (N,), in order."""
        return pick_images(self.train_images, self.train_labels, labels)


def make_judge(image_size, channels, device):
    """Return the Judge of digits of this size and number of channels."""
    train, test = (load_mnist(part, image_size, channels, device) for part in ("train", "test"))
    return Judge(load_classifier(device), train, test)


# ---- output ----
FORMATS = {"mse": ".5f", "fid_latent": ".4f", "fid_classifier": ".4f", "precision": ".3f",
           "recall": ".3f", "accuracy": ".2%", "copies": ".2%"}  # of all metrics, in their order


def print_line(first, cells):
    """Print a line of the table. cells: {metric: text}"""
    print(f"{first:>6}" + "".join(f"{text:>{max(len(name), 7) + 2}}"
                                  for name, text in cells.items()), flush=True)


def mean_and_std(rows):
    """Return {metric: mean over rows} and {metric: standard deviation}; 0 for a single row."""
    values = {name: np.array([row[name] for row in rows]) for name in FORMATS if name in rows[0]}
    ddof = 1 if len(rows) > 1 else 0
    return ({name: v.mean() for name, v in values.items()},
            {name: v.std(ddof=ddof) for name, v in values.items()})


def print_rows(first, rows):
    """Print the means of rows and, where there are several, their deviations."""
    means, deviations = mean_and_std(rows)
    print_line(first, {name: format(mean, FORMATS[name]) for name, mean in means.items()})
    if len(rows) > 1:
        print_line("+-", {name: format(std, FORMATS[name]) for name, std in deviations.items()})


def plot_metrics(path, real, evaluations):
    """Draw MSE and Fréchet distances against the epoch.

    real: the row of real digits; evaluations: a list of rows for each epoch.
    """
    epochs = [rows[0]["epoch"] for rows in evaluations]
    means, deviations = zip(*map(mean_and_std, evaluations), strict=True)
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    names = "mse", "fid_latent", "fid_classifier"
    colours = "tab:blue", "tab:orange", "tab:green"
    for axes, name, colour in zip(figure.subplots(1, 3), names, colours, strict=True):
        axes.errorbar(epochs, [mean[name] for mean in means], [std[name] for std in deviations],
                      fmt="o-", color=colour, capsize=3, label="generated digits")
        axes.set(title=name, xlabel="epoch", xscale="log")
        label_log_axis(axes.xaxis)
        axes.grid(alpha=0.3)
        if name != "mse":
            axes.set_yscale("log")
            label_log_axis(axes.yaxis, multiples=(1, 2, 3, 4, 6, 8))
            axes.axhline(real[name], ls="--", color="grey", label="training images")
            axes.legend()
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


# ---- checkpoints ----
def load_models(args, device):
    """Return [(path, model, epoch)] of the checkpoints that the flags ask for.

    Raises UserError where one is damaged, or differs in its config from the last or from the flags.
    """
    paths = find_checkpoints(args.root, args.epochs, args.checkpoint_path)
    found = []
    for path in paths[::-args.every][::-1]:  # the last one is always among them
        model, checkpoint = load_checkpoint(path, device)
        found.append((path, model, checkpoint["epoch"]))
    last_path, last_model, _ = found[-1]
    refuse_contradictions(args, last_model.config, last_path)
    for path, model, _ in found:
        if model.config != last_model.config:
            raise UserError(f"{path} has another config than {last_path}: evaluate it separately, "
                            "by --checkpoint_path and another --root")
    return found


def write_results(datas, real, evaluations, **conditions):
    """Write metrics.csv, with a row for real digits and for each seed, and metrics.png."""
    columns = ["epoch", "seed", *FORMATS]
    rows = [real, *itertools.chain(*evaluations)]
    write_csv(datas / "metrics.csv", [{name: row[name] for name in columns} | conditions
                                      for row in rows])
    plot_metrics(datas / "metrics.png", real, evaluations)


def evaluate_checkpoints(args, device):
    """Evaluate the checkpoints that the flags ask for; print and write the results as they come.

    metrics.csv and metrics.png replace those of an earlier evaluation under the same root.
    """
    models = load_models(args, device)
    last_path, last_model, last_epoch = models[-1]
    datas = args.root / "datas"
    prepare_folder(datas)
    judge = make_judge(last_model.config["image_size"], last_model.config["channels"], device)
    test_latents = latent_features(last_model, judge.test_images)
    labels = spread_labels(judge.test_labels, args.n_samples)

    def score(images):
        distance = frechet_distance(latent_features(last_model, images), test_latents)
        return dict(fid_latent=distance, **judge.scores(images, labels))

    print(f"{args.n_samples:,} digits in {SAMPLERS[DEFAULT_SAMPLER].steps} steps; seeds: "
          f"{args.seeds}; latent space: {last_path}")
    print_line("epoch", {name: name for name in FORMATS})
    # Each training image is a copy of itself, so copies are counted among the test images.
    real = dict(epoch="real", seed=None, mse=math.nan, copies=judge.test_copies,
                **score(judge.real_digits(labels)))
    print_rows("real", [real])
    evaluations = []
    for _, model, epoch in models:
        mse = noise_mse(model, judge.test_images, judge.test_labels, args.batch_size)
        rows = []
        for seed in range(args.seeds):
            images = sample(model, labels, seed=seed)[-1].to(device)
            copies, pairs = judge.find_copies(images)
            rows.append(dict(epoch=epoch, seed=seed, mse=mse, copies=copies, **score(images)))
        evaluations.append(rows)
        write_results(datas, real, evaluations, n_samples=args.n_samples, latent_epoch=last_epoch)
        with replacing(datas / f"metrics_closest_{epoch}.png") as file:  # of the last seed
            draw_grid(pairs.cpu(), 10).save(file, format="png")
        print_rows(epoch, rows)
    print(f"{datas}: metrics.csv, metrics.png and, for each epoch, metrics_closest_{{epoch}}.png")


# ---- digits from anywhere ----
MAX_DIGITS = 50_000  # the row of real digits needs as many training images of each digit


def load_digits(path):
    """Return (images (N, C, H, W) uint8, labels (N,) int64 or None) of an .npz file.

    Nothing in the file is executed. Raises UserError where it is missing, damaged or of another
    form than the advice below says.
    """
    with explain_read_errors(path, "it must be an .npz file with arr_0, images (N, H, H) or "
                             "(N, H, H, C) of uint8, and maybe arr_1, their labels (N,) from 0 to "
                             "9"):
        zipfile.ZipFile(path).close()  # what is no archive, np.load would take for a pickle
        with np.load(path) as file:
            images, labels = file["arr_0"], file.get("arr_1")
        shape = images.shape
        if images.dtype != np.uint8:
            raise ValueError(f"arr_0 is of {images.dtype}")
        if not (len(shape) in (3, 4) and shape[1] == shape[2] and shape[1] in range(4, 257)
                and shape[3:] in ((), (1,), (3,))):
            raise ValueError(f"arr_0 has the shape {shape}")
        n, size = shape[:2]
        if labels is not None:
            if labels.shape != (n,) or labels.dtype.kind not in "iu":
                raise ValueError(f"arr_1 is of {labels.dtype} and has the shape {labels.shape}")
            if labels.min() < 0 or labels.max() > 9:
                raise ValueError(f"arr_1 goes from {labels.min()} to {labels.max()}")
    if not 2000 <= n <= MAX_DIGITS:
        raise UserError(f"{path} holds {n:,} digits: from 2,000 to {MAX_DIGITS:,} can be compared")
    images = torch.from_numpy(images).reshape(n, size, size, -1).permute(0, 3, 1, 2)
    return images, None if labels is None else torch.from_numpy(labels.astype(np.int64))


def fitting_labels(labels, test_labels):
    """Return as many labels in the proportions of test_labels as labels has digits for."""
    counts = labels.bincount(minlength=10)
    # spread_labels rounds the count of each digit by less than one. So no n above this one fits.
    most = ((counts + 1) / test_labels.bincount(minlength=10)).min().item()
    n = min(len(labels), int(most * len(test_labels)) + 1)
    while (spread_labels(test_labels, n).bincount(minlength=10) > counts).any():
        n -= 1
    return spread_labels(test_labels, n)


def evaluate_digits(path, device):
    """Print the metrics of the digits in an .npz file, below those of as many real ones.

    A Fréchet distance depends on the mixture of digits. So where there are labels, as many digits
    are compared as can be taken in the proportions of the test set.
    """
    images, labels = load_digits(path)
    judge = make_judge(images.shape[2], images.shape[1], device)
    images = images.to(device)
    if labels is None:
        wanted = spread_labels(judge.test_labels, len(images))
        print(f"{path}: {len(images):,} digits as they come, without labels")
    else:
        labels = labels.to(device)
        wanted = fitting_labels(labels, judge.test_labels)
        if len(wanted) < 2000:
            raise UserError(f"{path} holds {len(wanted):,} digits in the proportions of the test "
                            "set: 2,000 are needed")
        print(f"{path}: {len(wanted):,} of {len(images):,} digits, in the test set's proportions")
        images, labels = pick_images(images, labels, wanted), wanted
    copies, _ = judge.find_copies(images)
    scores = dict(judge.scores(images, labels), copies=copies)
    real = dict(judge.scores(judge.real_digits(wanted), wanted), copies=judge.test_copies)
    print_line("", {name: name for name in FORMATS if name in scores})
    print_rows("real", [{name: real[name] for name in scores}])
    print_rows("file", [scores])


# ---- command line ----
def make_classifier(device):
    """Train the classifier, write it to CLASSIFIER and print its test accuracy."""
    prepare_folder(CLASSIFIER.parent)
    classifier = train_classifier(*load_mnist("train", device=device))
    save_tensors(CLASSIFIER, classifier.state_dict())
    images, labels = load_mnist("test", device=device)
    with judging():
        _, digits = classify(classifier, mnist_pixels(images))
    print(f"{CLASSIFIER}: test accuracy {share(digits == labels):.2%}")


def evaluation_parser():
    """Return the parser of this script's flags."""
    parser = make_parser(__doc__)
    add_checkpoint_flags(parser)
    add_flag(parser, "every", "take every n-th checkpoint, back from the last", 1,
             type=bounded(int, 1))
    add_flag(parser, "batch_size", "test images in a batch, for the MSE", 256,
             type=bounded(int, 1))
    add_flag(parser, "image_size", "fail unless the checkpoint has this size", type=int)
    add_flag(parser, "time_steps", "fail unless the checkpoint has this T", type=int)
    add_flag(parser, "n_samples", "digits to generate", 10_000,
             type=bounded(int, 2000, MAX_DIGITS))
    add_flag(parser, "seeds", "sets of digits to generate, with seeds from 0 on", 1,
             type=bounded(int, 1, 100))
    add_flag(parser, "digits", "evaluate the digits in this .npz file, as generate.py --out writes "
             "them, instead of checkpoints", type=Path)
    parser.add_argument("--train_classifier", action="store_true",
                        help="train checkpoints/classifier.pth again, and end")
    return parser


def main(argv=None):
    """Evaluate checkpoints or the digits in a file, or train the classifier."""
    args = evaluation_parser().parse_args(argv)
    device = torch.device(args.device)
    if args.train_classifier:
        make_classifier(device)
        return
    with judging():
        if args.digits:
            evaluate_digits(args.digits, device)
        else:
            evaluate_checkpoints(args, device)


if __name__ == "__main__":
    run_script(main)
