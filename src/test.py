"""Evaluate checkpoints: error of the predicted noise; quality of generated digits.

    python src/test.py                      every checkpoint: a table, datas/metrics.csv and pictures in datas/
    python src/test.py --train_classifier   make checkpoints/classifier.pth, the judge of the digits, anew

This is a script, not a unit test. From top to bottom: classifier, features, metrics, evaluation, output, command line.
"""
import contextlib
import csv
import hashlib
import math

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy import linalg
from torch import nn
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from common import (REPOSITORY, InputError, bounded, generator, has_bf16, load_tensors, make_folder, make_parser,
                    refuse_contradictions, replacing, run, save_tensors, write_csv)
from generate import add_checkpoint_flags, draw_grid, find_checkpoints, load_checkpoint, sample
from train import NULL_LABEL, forward_diffusion_sample, load_mnist

CLASSIFIER = REPOSITORY / "checkpoints/classifier.pth"
SOURCES = [path.read_bytes() for path in sorted((REPOSITORY / "src").glob("*.py"))]
METRICS = ["fid_latent", "fid_classifier", "precision", "recall", "accuracy", "copies"]  # of generated digits
COLUMNS = ["epoch", "mse", *METRICS, *(f"{name}_std" for name in METRICS), *(f"real_{name}" for name in METRICS),
           *(f"mse_{tenth}" for tenth in range(10)), "n_samples", "seeds", "seed", "latent_epoch", "key"]


# ---- classifier ----
class Classifier(nn.Module):
    """(B, 1, 28, 28) in [-1, 1] -> (B, 10) logits. Its features (B, 128) are what Frechet distances compare."""

    def __init__(self):
        def conv(c_in, c_out):
            return [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]

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
    cos, sin = (1 + 0.12 * scale) * (0.2 * angle).cos(), (1 + 0.12 * scale) * (0.2 * angle).sin()
    matrices = torch.stack([cos, 0.2 * shear - sin, 0.14 * dx, sin, cos, 0.14 * dy], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrices, x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def train_classifier(device, seed, epochs=10, batch_size=100):
    """Return a Classifier trained on distorted MNIST training images, ready to predict."""
    torch.manual_seed(seed)
    classifier = Classifier().to(device)
    images, labels = load_mnist(True, device=device)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.005, total_steps=epochs * len(images) // batch_size)
    for epoch in tqdm(range(epochs), desc="classifier", unit=" epochs"):
        order = torch.randperm(len(images), generator=generator(device, seed, 0, epoch), device=device)
        for number, batch in enumerate(order.split(batch_size)):
            x = distort(images[batch] / 127.5 - 1, generator(device, seed, 1, epoch, number))
            with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
                logits = classifier(x).float()
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[batch], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
    return classifier.eval().requires_grad_(False)


def load_classifier(path, device):
    """Return the Classifier in the file, ready to predict. Raises InputError where there is none."""
    classifier = Classifier()
    try:
        classifier.load_state_dict(load_tensors(path))
    except Exception as error:
        raise InputError(f"{path}: missing or damaged; make it with 'python src/test.py --train_classifier'") from error
    return classifier.to(device).eval().requires_grad_(False)


# ---- features ----
# All in float32. Images are (N, C, H, W) uint8 on the model's device; features are returned on the CPU.

def mnist_pixels(images):
    """Return (N, 784) in [-1, 1], of 28 x 28 pixels: channels are averaged, other sizes resized with antialiasing."""
    grey = [part.float().mean(dim=1, keepdim=True) for part in images.split(1000)]
    return torch.cat([(x if x.shape[-1] == 28 else resize(x, [28, 28])).flatten(1) for x in grey]) / 127.5 - 1


def classify(classifier, pixels, batch_size):
    """Return the classifier's features (N, 128) for pixels (N, 784), and the digits (N,) that it reads."""
    features = torch.cat([classifier.features(x.view(-1, 1, 28, 28)) for x in pixels.split(batch_size)])
    return features.cpu(), classifier.head(features).argmax(dim=1).cpu()


def latent_features(model, images, batch_size):
    """Return the model's bottleneck for clean images, at t = 0 with the null label, averaged over space: (N, D)."""
    t = torch.zeros(1, dtype=torch.int64, device=images.device)
    emb = model.embed(t, t + NULL_LABEL)
    bottlenecks = [model.encode(batch / 127.5 - 1, emb)[0].mean(dim=(2, 3)) for batch in images.split(batch_size)]
    return torch.cat(bottlenecks).cpu()


# ---- metrics ----
def frechet_distance(a, b):
    """Return the squared Frechet distance of Gaussians fitted to a (N, D) and b (M, D) (Heusel et al. 2017):

    |mean_a - mean_b|^2 + trace(C_a + C_b - 2 sqrt(C_a C_b)), in float64. The trace of the root comes from the
    eigenvalues of the symmetric sqrt(C_a) C_b sqrt(C_a), which are those of C_a C_b, also for singular C.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = (x.T.cov().reshape(x.shape[1], x.shape[1]).numpy() for x in (a, b))
    values, vectors = linalg.eigh(cov_a)
    root_a = vectors * values.clip(0) ** 0.5 @ vectors.T
    trace_root = (linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0) ** 0.5).sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_root)


def kth_nearest(points, others, k=1):
    """Return distance and index, (N,) and (N,), of the k-th nearest of others (M, D) to each of points (N, D)."""
    found = [torch.cdist(part, others).topk(k, largest=False) for part in points.split(500)]
    return torch.cat([f.values[:, -1] for f in found]), torch.cat([f.indices[:, -1] for f in found])


def coverage(points, centres, k=3):
    """Return the share of points (N, D) that lie within the distance from some centre (M, D) to its k-th neighbour.

    The precision of generated points around real centres, the recall of real points around generated centres
    (Kynkaanniemi et al. 2019, eq. 1 and 2).
    """
    points, centres = points.double(), centres.double()
    radii, _ = kth_nearest(centres, centres, k + 1)  # the nearest is the centre itself
    return share(torch.cat([(torch.cdist(part, centres) <= radii).any(dim=1) for part in points.split(500)]))


def share(condition):
    """Return the share of true among booleans (N,)."""
    return condition.double().mean().item()


def noise_mse(model, images, labels, batch_size):
    """Return the mean squared error of the predicted noise, with true labels: over all t, and in each tenth of 0..T-1.

    The t, spread evenly over the images, and the noise are drawn on the CPU, the same for every checkpoint and machine.
    """
    rng = generator("cpu", 0, 3)
    t = torch.randperm(len(images), generator=rng) * model.config["time_steps"] // len(images)
    noise = torch.randn(images.shape, generator=rng)
    errors = []
    for x, t_x, noise_x, y in zip(*(values.split(batch_size) for values in (images, t, noise, labels)), strict=True):
        t_x, noise_x = t_x.to(x.device), noise_x.to(x.device)
        x_t = forward_diffusion_sample(x / 127.5 - 1, t_x, noise_x, model.alphas_cumprod)
        errors.append((model(x_t, t_x, y) - noise_x).square().mean(dim=(1, 2, 3)))
    errors = torch.cat(errors).double().cpu()
    return errors.mean().item(), [tenth.mean().item() for tenth in errors[t.argsort()].chunk(10)]


# ---- evaluation ----
def spread_labels(labels, n_samples):
    """Return n_samples labels, in order, in the proportions of the labels given."""
    return labels.sort().values[torch.arange(n_samples) * len(labels) // n_samples].cpu()


def pick_images(images, labels, wanted):
    """Return for each digit as many of its first images as wanted (N,), labels in order, asks for."""
    counts = wanted.bincount(minlength=10).tolist()
    return torch.cat([images[labels == digit][:count] for digit, count in enumerate(counts)])


def fingerprint(*parts):
    """Return a hash of this program and the parts: what equal ones made need not be made again."""
    return hashlib.sha256(b"|".join([*SOURCES, CLASSIFIER.read_bytes(), *parts])).hexdigest()[:16]


def describe_real(path, classifier, test_pixels, train_pixels, batch_size):
    """Return the test images' features (N, 128) and distances (N,) to the nearest training image; keep them in path."""
    key = fingerprint(test_pixels.cpu().numpy().tobytes(), train_pixels.cpu().numpy().tobytes())
    with contextlib.suppress(Exception), np.load(path) as file:  # made again if missing or damaged (npz has check sums)
        if file["key"] == key:
            return torch.from_numpy(file["features"]), torch.from_numpy(file["distances"])
    features, _ = classify(classifier, test_pixels, batch_size)
    distances = kth_nearest(test_pixels, train_pixels)[0].cpu()
    with replacing(path) as file:
        np.savez(file, key=key, features=features, distances=distances)
    return features, distances


def make_judge(latent_model, classifier, test_set, train_set, args):
    """Return (judge, copies).

    judge(images, labels) takes generated images (N, C, H, W) uint8 and the digits asked for (N,); it returns the values
    of METRICS and the ten images closest to training images, followed by these. copies: their share in the test set.
    """
    size, labels = args.batch_size, test_set[1].cpu()
    train_pixels, test_pixels = mnist_pixels(train_set[0]), mnist_pixels(test_set[0])
    real, distances = describe_real(args.root / "datas/reference.npz", classifier, test_pixels, train_pixels, size)
    thresholds = torch.stack([distances[labels == digit].quantile(0.01) for digit in range(10)])
    latent = latent_features(latent_model, test_set[0], size)

    def judge(images, labels):
        images = images.to(args.device)
        pixels = mnist_pixels(images)
        features, digits = classify(classifier, pixels, size)
        distances, nearest = kth_nearest(pixels, train_pixels)
        closeness = distances.cpu() / thresholds[digits]  # below 1: a copy
        closest = closeness.argsort()[:10].to(args.device)
        values = [frechet_distance(latent_features(latent_model, images, size), latent),
                  frechet_distance(features, real), coverage(features, real), coverage(real, features),
                  share(digits == labels), share(closeness < 1)]
        return values, torch.cat([images[closest], train_set[0][nearest[closest]]]).cpu()

    return judge, share(distances < thresholds[labels])


@torch.inference_mode()
def evaluate(paths, latent_model, classifier, args):
    """Yield the values of each checkpoint for COLUMNS, but for the last two; draw metrics_closest_{epoch}.png."""
    torch.backends.cudnn.allow_tf32 = False  # float32 in full, so that machines agree
    form = latent_model.config["image_size"], latent_model.config["channels"], args.device
    test_set, train_set = load_mnist(False, *form), load_mnist(True, *form)
    labels = spread_labels(test_set[1], args.n_samples)
    judge, copies = make_judge(latent_model, classifier, test_set, train_set, args)
    real = [*judge(pick_images(*train_set, labels), labels)[0][:-1], copies]
    for path in paths:
        model, checkpoint = load_checkpoint(path, args.device)
        mse, profile = noise_mse(model, *test_set, args.batch_size)
        seeds = range(args.seed, args.seed + args.seeds)
        judged, pairs = zip(*(judge(sample(model, labels, seed=seed)[-1], labels) for seed in seeds), strict=True)
        with replacing(args.root / f"datas/metrics_closest_{checkpoint['epoch']}.png") as file:
            draw_grid(pairs[0], 10).save(file, format="png")
        judged = torch.tensor(judged, dtype=torch.float64)
        std = judged.std(0) if args.seeds > 1 else judged[0] * math.nan
        yield [checkpoint["epoch"], mse, *judged.mean(0).tolist(), *std.tolist(), *real, *profile,
               args.n_samples, args.seeds, args.seed]


# ---- output ----
def plot_metrics(datas, rows):
    """Draw metrics.png, MSE and FID against the epoch, and metrics_profile.png, the MSE of the last row over t."""
    last, epochs = rows[-1], [row["epoch"] for row in rows]
    figure, profile = Figure(figsize=(9, 3.6), layout="constrained"), Figure(figsize=(6, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [row["mse"] for row in rows], "o-", color="#0072B2")
    left.set(title="MSE of the predicted noise, test set", xlabel="epoch")
    for space, color in (("classifier", "#D55E00"), ("latent", "#0072B2")):
        right.errorbar(epochs, [row[f"fid_{space}"] for row in rows], [row[f"fid_{space}_std"] for row in rows],
                       fmt="o-", capsize=3, color=color, label=f"{space} features")
        right.axhline(last[f"real_fid_{space}"], ls="--", color=color, label=f"{space} floor (training images)")
    right.set(title=f"FID of {last['n_samples']:,} digits", xlabel="epoch", yscale="log")
    figure.legend(loc="outside lower right", ncols=4, fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes = profile.subplots()
    axes.bar([0.05 + i / 10 for i in range(10)], [last[f"mse_{i}"] for i in range(10)], width=0.09, color="#0072B2")
    axes.set(title=f"MSE of the predicted noise, epoch {last['epoch']}", xlabel="t / T", yscale="log")
    for name, picture in (("metrics.png", figure), ("metrics_profile.png", profile)):
        with replacing(datas / name) as file:
            picture.savefig(file, format="png", dpi=120)


def print_row(row, first):
    """Print a row of metrics.csv, above the first one the head of the table and what real digits get."""
    def line(name, column):
        values = [row.get(column.format(metric), math.nan) for metric in ("mse", *METRICS)]
        print("{:>6} {:8.5f}{:12.4f}{:16.4f}{:11.3f}{:8.3f}{:10.2%}{:8.2%}".format(name, *values).replace("nan", "  -"))

    if first:
        print("{n_samples:,} digits; seeds: {seeds}; latent space: epoch {latent_epoch}\n epoch      mse  fid_latent"
              "  fid_classifier  precision  recall  accuracy  copies".format(**row))
        line("real", "real_{}")
    line(row["epoch"], "{}")
    if row["seeds"] > 1:
        line("+-", "{}_std")


# ---- command line ----
def make_classifier(args):
    """Train the classifier, write it to its place beside src and print its accuracy on the test set."""
    make_folder(CLASSIFIER.parent)
    classifier = train_classifier(args.device, args.seed)
    save_tensors(CLASSIFIER, classifier.state_dict())
    images, labels = load_mnist(False, device=args.device)
    _, digits = classify(classifier, mnist_pixels(images), args.batch_size)
    print(f"{CLASSIFIER}: reads {share(digits == labels.cpu()):.2%} of the test images right")


def read_rows(path):
    """Return {epoch: row} of metrics.csv, empty if there is none. Raises InputError where it is damaged."""
    with contextlib.suppress(ValueError, csv.Error):
        header, *lines = csv.reader(path.read_text().splitlines()) if path.exists() else [COLUMNS]
        rows = [[*(int(n) if n.isdigit() else float(n) for n in numbers), key] for *numbers, key in lines]
        if header == COLUMNS:
            return {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in rows}
    raise InputError(f"{path}: damaged, or of another version; move it away")


def evaluation_parser():
    parser = make_parser(__doc__)
    add_checkpoint_flags(parser)
    parser.add_argument("--every", type=bounded(int, 1), default=1, help="take every n-th of them, back from the last")
    parser.add_argument("--batch_size", type=bounded(int, 1), default=256, help="test images in a batch")
    parser.add_argument("--image_size", type=bounded(int, 4), help="refuse checkpoints of another size")
    parser.add_argument("--time_steps", type=bounded(int, 1), help="refuse checkpoints of another T")
    parser.add_argument("--n_samples", type=bounded(int, 2000, 50_000), default=10_000, help="digits to generate")
    parser.add_argument("--seeds", type=bounded(int, 1, 100), default=1, help="times to generate them, from --seed on")
    parser.add_argument("--again", action="store_true", help="also evaluate what is in metrics.csv already")
    parser.add_argument("--train_classifier", action="store_true", help="make checkpoints/classifier.pth anew, and end")
    return parser


def main(argv=None):
    args = evaluation_parser().parse_args(argv)
    if args.train_classifier:
        return make_classifier(args)
    make_folder(datas := args.root / "datas")
    paths = find_checkpoints(args.root, args.epochs, args.checkpoint_path)[::-args.every][::-1]
    newest, checkpoint = load_checkpoint(paths[-1], args.device)
    refuse_contradictions(args, paths[-1], newest.config)
    for path in paths:
        if load_checkpoint(path)[0].config != newest.config:
            raise InputError(f"{path} is not of the same form as {paths[-1]}, which is of {newest.config}")
    classifier = load_classifier(CLASSIFIER, args.device)
    settings = paths[-1].read_bytes(), repr((args.n_samples, args.seeds, args.seed)).encode()
    keys = {path: fingerprint(path.read_bytes(), *settings) for path in paths}
    known, rows = {row["key"]: row for row in read_rows(datas / "metrics.csv").values() if not args.again}, []
    unknown = evaluate([path for path in paths if keys[path] not in known], newest, classifier, args)
    for path, key in keys.items():
        rows.append(known.get(key) or dict(zip(COLUMNS, [*next(unknown), checkpoint["epoch"], key], strict=True)))
        if key not in known or path == paths[-1]:
            kept = read_rows(datas / "metrics.csv") | {rows[-1]["epoch"]: rows[-1]}  # another run may have added some
            write_csv(datas / "metrics.csv", [row for _, row in sorted(kept.items())])
            plot_metrics(datas, rows)
        print_row(rows[-1], first=len(rows) == 1)
    print(f"{datas}: metrics.csv, metrics.png, metrics_profile.png, metrics_closest_{checkpoint['epoch']}.png")


if __name__ == "__main__":
    run(main)
