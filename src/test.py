"""Evaluate checkpoints: the error of the predicted noise, and how good generated digits are.

    python src/test.py                      every checkpoint: a table, datas/metrics.csv, pictures
    python src/test.py --train_classifier   make checkpoints/classifier.pth, their judge, anew

This is a script, not a unit test. The classifier comes first, then features, metrics, evaluation.
"""
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy import linalg
from torch import nn
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from common import (REPOSITORY, InputError, add_flag, blaming, bounded, generator, has_bf16,
                    load_tensors, make_parser, prepare_folder, refuse_contradictions, replacing,
                    run_script, save_tensors, write_csv)
from generate import (DEFAULT_SAMPLER, SAMPLERS, add_checkpoint_flags, check_steps, draw_grid,
                      find_checkpoints, load_checkpoint, sample)
from train import (NULL_LABEL, cumulative_alphas, forward_diffusion_sample, implied_x_0, load_mnist,
                   signal_and_noise)

CLASSIFIER = REPOSITORY / "checkpoints/classifier.pth"
PART = 1000  # images that are looked at together


# ---- classifier ----
class Classifier(nn.Module):
    """(B, 1, 28, 28) in [-1, 1] -> (B, 10) logits. Its features (B, 128) are what is compared."""

    def __init__(self):
        def conv(c_in, c_out):
            return [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out),
                    nn.ReLU()]

        super().__init__()
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


def train_classifier(images, labels, seed=0, epochs=10, batch_size=100):
    """Return a Classifier, ready to predict, trained on images (N, 1, 28, 28) uint8, distorted."""
    torch.manual_seed(seed)
    device, steps = images.device, len(images) // batch_size
    classifier = Classifier().to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.005, total_steps=epochs * steps)
    for epoch in tqdm(range(epochs), desc="classifier", unit=" epochs"):
        rng = generator(device, "order", seed, epoch)
        order = torch.randperm(len(images), generator=rng, device=device)
        for number, batch in enumerate(order.split(batch_size)[:steps]):
            x = distort(images[batch] / 127.5 - 1, generator(device, "step", seed, epoch, number))
            with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
                logits = classifier(x).float()
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[batch], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
    return classifier.eval().requires_grad_(False)


def load_classifier(device):
    """Return the Classifier, ready to predict. Raises InputError where it is missing or damaged."""
    classifier = Classifier()
    with blaming(CLASSIFIER, "make it anew by 'python src/test.py --train_classifier'"):
        classifier.load_state_dict(load_tensors(CLASSIFIER))
    return classifier.to(device).eval().requires_grad_(False)


# ---- features ----
def mnist_pixels(images):
    """Return images (N, C, H, W) uint8 as (N, 784) in [-1, 1].

    Channels are averaged; what is not of 28 x 28 pixels is resized with antialiasing.
    """
    grey = [resize(part.float().mean(dim=1, keepdim=True), [28, 28]) for part in images.split(PART)]
    return torch.cat(grey).flatten(1) / 127.5 - 1


def classify(classifier, pixels):
    """Return the classifier's features (N, 128) of pixels (N, 784), and the digits it reads (N,)"""
    parts = [part.view(-1, 1, 28, 28) for part in pixels.split(PART)]
    features = torch.cat([classifier.features(part) for part in parts])
    return features, classifier.head(features).argmax(dim=1)


def latent_features(model, images):
    """Return the model's bottleneck of clean images, averaged over space: (N, D).

    images: (N, C, H, W) uint8; they are seen at t = 0, with the null label.
    """
    t = torch.zeros(1, dtype=torch.int64, device=images.device)
    emb = model.embed(t, t + NULL_LABEL)
    parts = [model.encode(part / 127.5 - 1, emb)[0] for part in images.split(PART)]
    return torch.cat([part.mean(dim=(2, 3)) for part in parts])


# ---- metrics ----
def frechet_distance(a, b):
    """Return the squared Frechet distance of Gaussians fitted to a (N, D) and b (M, D).

    |mean_a - mean_b|^2 + trace(C_a + C_b - 2 sqrt(C_a C_b)) (Heusel et al. 2017), in float64. The
    trace of the root comes from the eigenvalues of the symmetric sqrt(C_a) C_b sqrt(C_a), which
    are those of C_a C_b, also for singular C.
    """
    a, b = a.double().cpu(), b.double().cpu()
    cov_a, cov_b = (torch.atleast_2d(x.T.cov()).numpy() for x in (a, b))
    values, vectors = linalg.eigh(cov_a)
    root_a = vectors * values.clip(0) ** 0.5 @ vectors.T
    trace_root = (linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0) ** 0.5).sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return float(means + cov_a.trace() + cov_b.trace() - 2 * trace_root)


def kth_nearest(points, others, k=1):
    """Return (distances, indices), each (N,): points' (N, D) k-th nearest of others (M, D)."""
    found = [torch.cdist(part, others).topk(k, largest=False) for part in points.split(PART)]
    distances = torch.cat([part.values[:, -1] for part in found])
    return distances, torch.cat([part.indices[:, -1] for part in found])


def share_inside(points, centres, k=3):
    """Return the share of points (N, D) no farther from some centre (M, D) than its k-th neighbour.

    The precision of generated points around real centres, and the recall of real points around
    generated centres (Kynkaanniemi et al. 2019, eq. 1 and 2).
    """
    points, centres = points.double(), centres.double()
    radii, _ = kth_nearest(centres, centres, k + 1)  # the nearest is the centre itself
    inside = [(torch.cdist(part, centres) <= radii).any(dim=1) for part in points.split(PART)]
    return torch.cat(inside).double().mean().item()


def noise_mse(model, images, labels, batch_size=256):
    """Return the mean squared error of the predicted noise, with true labels, over all t.

    It is the noise left after the clean image that it implies is clipped to [-1, 1], as in
    sampling: alpha_t / sigma_t times the error of that image. The t, spread evenly over the
    images, and the noise are drawn on the CPU, and the network runs in float32: the same for every
    checkpoint and machine.
    """
    rng = generator("cpu", "evaluation", 0)
    t = torch.randperm(len(images), generator=rng) * model.config["time_steps"] // len(images)
    noise = torch.randn(images.shape, generator=rng).to(images.device)
    alphas_cumprod = cumulative_alphas(model.config["time_steps"]).to(images.device)
    batches = [values.split(batch_size) for values in (images, t.to(images.device), noise, labels)]
    total = 0.0
    for images_b, t_b, noise_b, labels_b in zip(*batches, strict=True):
        x_0 = images_b / 127.5 - 1
        alpha_t, sigma_t = signal_and_noise(t_b, alphas_cumprod)
        x_t = forward_diffusion_sample(x_0, t_b, noise_b, alphas_cumprod)
        predicted = implied_x_0(model(x_t, t_b, labels_b), x_t, alpha_t, sigma_t).clamp(-1, 1)
        errors = (alpha_t / sigma_t * (predicted - x_0)).square().mean(dim=(1, 2, 3))
        total += errors.double().sum().item()
    return total / len(images)


# ---- evaluation ----
class Described(NamedTuple):
    """What the metrics need to know of N images."""
    features: torch.Tensor  # (N, 128), the classifier's
    digits: torch.Tensor  # (N,), as the classifier reads them
    latents: torch.Tensor  # (N, D), the diffusion model's
    distances: torch.Tensor  # (N,), in pixels, to the nearest training image
    nearest: torch.Tensor  # (N,), its index


class Judge:
    """Compares digits with MNIST's test images, and looks for copies of its training images.

    train, test: (images, labels) as load_mnist returns them, in the form of the digits. A copy is
    an image nearer to a training image than 99 % of the test images of the digit that it is read
    as. Each digit has its own threshold, because ones lie much nearer to each other than eights.
    """

    def __init__(self, classifier, latent_model, train, test):
        self.classifier, self.latent_model = classifier, latent_model
        self.train_images, self.train_labels = train
        self.test_images, self.test_labels = test
        self.train_pixels = mnist_pixels(self.train_images)
        self.real = self.describe(self.test_images)
        self.thresholds = torch.stack([
            self.real.distances[self.test_labels == digit].quantile(0.01) for digit in range(10)])

    def describe(self, images):
        """Return the Described of images (N, C, H, W) uint8."""
        pixels = mnist_pixels(images)
        return Described(*classify(self.classifier, pixels),
                         latent_features(self.latent_model, images),
                         *kth_nearest(pixels, self.train_pixels))

    def scores(self, made, labels):
        """Return all metrics but the MSE of the Described digits made for labels (N,)."""
        return dict(
            fid_latent=frechet_distance(made.latents, self.real.latents),
            fid_classifier=frechet_distance(made.features, self.real.features),
            precision=share_inside(made.features, self.real.features),
            recall=share_inside(self.real.features, made.features),
            accuracy=(made.digits == labels).double().mean().item(),
            copies=(made.distances < self.thresholds[made.digits]).double().mean().item())

    def closest_pairs(self, images, made):
        """Return the ten images that are most like copies, followed by their training images."""
        closest = (made.distances / self.thresholds[made.digits]).argsort()[:10]
        return torch.cat([images[closest], self.train_images[made.nearest[closest]]])


def spread_labels(labels, n_samples):
    """Return n_samples labels, in order, in the proportions of the labels given."""
    places = torch.arange(n_samples, device=labels.device) * len(labels) // n_samples
    return labels.sort().values[places]


def pick_images(images, labels, wanted):
    """Return the first images of each digit, as many as there are in wanted (N,), in order."""
    counts = wanted.bincount(minlength=10).tolist()
    return torch.cat([images[labels == digit][:count] for digit, count in enumerate(counts)])


def real_row(judge, labels):
    """Return the mark: the metrics of as many training images as there are labels (N,).

    Its copies are those among the test images, since every training image is one of itself.
    """
    images = pick_images(judge.train_images, judge.train_labels, labels)
    scores = judge.scores(judge.describe(images), labels)
    are_copies = judge.real.distances < judge.thresholds[judge.test_labels]
    scores["copies"] = are_copies.double().mean().item()
    return dict(epoch="real", seed=None, mse=math.nan, **scores)


def evaluate(model, epoch, judge, labels, steps, seeds, batch_size):
    """Return (rows, pairs): the metrics, a row for each seed, and the last seed's closest pairs."""
    mse = noise_mse(model, judge.test_images, judge.test_labels, batch_size)
    rows = []
    for seed in seeds:
        images = sample(model, labels, steps=steps, seed=seed)[-1].to(labels.device)
        made = judge.describe(images)
        rows.append(dict(epoch=epoch, seed=seed, mse=mse, **judge.scores(made, labels)))
    return rows, judge.closest_pairs(images, made)


# ---- output ----
METRICS = ["mse", "fid_latent", "fid_classifier", "precision", "recall", "accuracy", "copies"]
HEAD = " epoch      mse  fid_latent  fid_classifier  precision  recall  accuracy  copies"
LINE = ("{:>6} {mse:8.5f} {fid_latent:11.4f} {fid_classifier:15.4f} {precision:10.3f} "
        "{recall:7.3f} {accuracy:9.2%} {copies:7.2%}")


def mean_and_std(rows):
    """Return {metric: mean over rows} and {metric: standard deviation}; 0 for a single row."""
    values = {name: np.array([row[name] for row in rows]) for name in METRICS}
    ddof = 1 if len(rows) > 1 else 0
    return ({name: v.mean() for name, v in values.items()},
            {name: v.std(ddof=ddof) for name, v in values.items()})


def print_rows(rows):
    """Print the means of one epoch's rows and, where there are several, their deviations."""
    means, deviations = mean_and_std(rows)
    print(LINE.format(rows[0]["epoch"], **means), flush=True)
    if len(rows) > 1:
        print(LINE.format("+-", **deviations), flush=True)


def plot_metrics(path, mark, evaluations):
    """Draw MSE and Frechet distances against the epoch.

    mark: real_row's row; evaluations: a list of rows for each epoch.
    """
    epochs = [rows[0]["epoch"] for rows in evaluations]
    means, deviations = zip(*map(mean_and_std, evaluations), strict=True)
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    colours = "tab:blue", "tab:orange", "tab:green"
    for axes, name, colour in zip(figure.subplots(1, 3), METRICS[:3], colours, strict=True):
        axes.errorbar(epochs, [mean[name] for mean in means], [std[name] for std in deviations],
                      fmt="o-", color=colour, capsize=3, label="generated digits")
        axes.set(title=name, xlabel="epoch")
        axes.grid(alpha=0.3, which="both")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if name != "mse":
            axes.set_yscale("log")
            axes.axhline(mark[name], ls="--", color="grey", label="training images")
            axes.legend()
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


# ---- command line ----
def make_classifier(device, seed):
    """Train the classifier, write it to its place beside src and print its test accuracy."""
    classifier = train_classifier(*load_mnist("train", device=device), seed)
    save_tensors(CLASSIFIER, classifier.state_dict())
    images, labels = load_mnist("test", device=device)
    _, digits = classify(classifier, mnist_pixels(images))
    accuracy = (digits == labels).double().mean().item()
    print(f"{CLASSIFIER}: reads {accuracy:.2%} of the test images right")


def evaluation_parser():
    parser = make_parser(__doc__)
    add_checkpoint_flags(parser)
    add_flag(parser, "every", "take every n-th checkpoint, back from the last", 1,
             type=bounded(int, 1))
    add_flag(parser, "batch_size", "test images in a batch of the MSE's", 256,
             type=bounded(int, 1))
    add_flag(parser, "image_size", "refuse checkpoints of another size", type=int)
    add_flag(parser, "time_steps", "refuse checkpoints of another T", type=int)
    add_flag(parser, "n_samples", "digits to generate", 10_000, type=bounded(int, 2000, 50_000))
    add_flag(parser, "steps", "network evaluations for a digit", SAMPLERS[DEFAULT_SAMPLER].steps,
             type=bounded(int, 1))
    add_flag(parser, "seed", "of all random numbers", 0, type=bounded(int, 0))
    add_flag(parser, "seeds", "times to generate them, from --seed on", 1,
             type=bounded(int, 1, 100))
    parser.add_argument("--train_classifier", action="store_true",
                        help="make checkpoints/classifier.pth anew, and end")
    return parser


def load_models(args, device):
    """Return [(path, model, epoch)] of the checkpoints that the flags ask for.

    Raises InputError where one is damaged, or of another form than the last or than the flags say.
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
            raise InputError(f"{path} is of another form than {last_path}: evaluate it apart, by "
                             "--checkpoint_path")
    return found


def make_judge(latent_model, device):
    """Return the Judge of digits of the model's form, with the model's own latent space."""
    form = latent_model.config["image_size"], latent_model.config["channels"]
    train, test = (load_mnist(part, *form, device) for part in ("train", "test"))
    return Judge(load_classifier(device), latent_model, train, test)


def run_evaluation(args, device):
    """Evaluate the checkpoints that the flags ask for; print and write the results as they come."""
    models = load_models(args, device)
    last_path, last_model, last_epoch = models[-1]
    check_steps(last_model, args.steps)
    datas = args.root / "datas"
    prepare_folder(datas)
    judge = make_judge(last_model, device)
    labels = spread_labels(judge.test_labels, args.n_samples)
    seeds = range(args.seed, args.seed + args.seeds)
    print(f"{args.n_samples:,} digits in {args.steps} steps; seeds: {args.seeds}; "
          f"latent space: {last_path}\n{HEAD}")
    mark = real_row(judge, labels)
    print_rows([mark])
    conditions = dict(n_samples=args.n_samples, steps=args.steps, latent_epoch=last_epoch)
    table, evaluations = [mark | conditions], []
    for _, model, epoch in models:
        rows, pairs = evaluate(model, epoch, judge, labels, args.steps, seeds, args.batch_size)
        evaluations.append(rows)
        table += [row | conditions for row in rows]
        write_csv(datas / "metrics.csv", table)
        plot_metrics(datas / "metrics.png", mark, evaluations)
        with replacing(datas / f"metrics_closest_{epoch}.png") as file:
            draw_grid(pairs.cpu(), 10).save(file, format="png")
        print_rows(rows)
    print(f"{datas}: metrics.csv, metrics.png and, for each epoch, metrics_closest_{{epoch}}.png")


def main(argv=None):
    """Evaluate, or train the classifier, as the flags say."""
    args = evaluation_parser().parse_args(argv)
    device = torch.device(args.device)
    if args.train_classifier:
        make_classifier(device, args.seed)
    else:
        # without TF32, that is in float32 throughout, so that machines agree
        with (torch.inference_mode(),
              torch.backends.cudnn.flags(enabled=True, allow_tf32=False)):
            run_evaluation(args, device)


if __name__ == "__main__":
    run_script(main)
