"""Evaluate checkpoints: error of the predicted noise; quality of generated digits.

    python src/test.py                      every checkpoint: prints, datas/metrics.csv, datas/metrics.png
    python src/test.py --train_classifier   make checkpoints/classifier.pth, the judge of the digits, anew

This is a script, not a unit test. From top to bottom: the classifier, features, metrics, the plot, the command line.
"""
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy import linalg
from torch import nn
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from generate import add_checkpoint_flags, find_checkpoints, load_checkpoint, refuse_contradictions, sample
from train import (
    NULL_LABEL,
    REPOSITORY,
    InputError,
    cumulative_alphas,
    forward_diffusion_sample,
    generator,
    has_bf16,
    load_mnist,
    make_folder,
    make_parser,
    replacing,
    run,
    whole_number,
    write_csv,
)

CLASSIFIER = REPOSITORY / "checkpoints/classifier.pth"


# ---- classifier ----
class Classifier(nn.Module):
    """(B, 1, 28, 28) in [-1, 1] -> (B, 10) logits. Its features (B, 128) are what Frechet distances compare."""

    def __init__(self):
        super().__init__()

        def conv(c_in, c_out):
            return [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]

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
        classifier.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load meets damage with nearly any exception
        raise InputError(f"{path}: missing or damaged; make it with 'python src/test.py --train_classifier'") from error
    return classifier.to(device).eval().requires_grad_(False)


# ---- features ----
# Each takes images (N, C, H, W) uint8, works in float32 and returns its result on the CPU.

def classify(classifier, images, batch_size):
    """Return the classifier's features (N, 128) and the digits (N,) that it reads.

    Images of another form are brought to its own: channels are averaged, sizes resized bilinearly with antialiasing.
    """
    features = []
    for batch in images.split(batch_size):
        x = batch.float().mean(dim=1, keepdim=True)
        x = x if x.shape[-1] == 28 else resize(x, [28, 28])
        features.append(classifier.features(x / 127.5 - 1))
    features = torch.cat(features)
    return features.cpu(), classifier.head(features).argmax(dim=1).cpu()


def latent_features(model, images, batch_size):
    """Return the model's bottleneck for clean images, at t = 0 with the null label, averaged over space: (N, D)."""
    features = []
    for batch in images.split(batch_size):
        t = torch.zeros(len(batch), dtype=torch.int64, device=batch.device)
        bottleneck, _ = model.encode(batch / 127.5 - 1, model.embed(t, torch.full_like(t, NULL_LABEL)))
        features.append(bottleneck.mean(dim=(2, 3)))
    return torch.cat(features).cpu()


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
    return (a.mean(0) - b.mean(0)).square().sum().item() + cov_a.trace() + cov_b.trace() - 2 * trace_root


def accuracy(digits, labels):
    """Return the share of digits (N,) that equal labels (N,)."""
    return (digits == labels.cpu()).double().mean().item()


def noise_mse(model, images, labels, batch_size):
    """Return the mean squared error of the predicted noise, over all images, with their true labels.

    The t, spread evenly over 0..T-1, and the noise are drawn on the CPU: every checkpoint and machine gets the same.
    """
    rng, time_steps = generator("cpu", 0, 3), model.config["time_steps"]
    t = (torch.randperm(len(images), generator=rng) * time_steps // len(images)).to(images.device)
    noise = torch.randn(images.shape, generator=rng)
    alphas_cumprod = cumulative_alphas(time_steps).to(images.device)
    total = 0.0
    for x, t_x, noise_x, y in zip(*(values.split(batch_size) for values in (images, t, noise, labels)), strict=True):
        noise_x = noise_x.to(x.device)
        x_t = forward_diffusion_sample(x / 127.5 - 1, t_x, noise_x, alphas_cumprod)
        total += F.mse_loss(model(x_t, t_x, y), noise_x, reduction="sum").item()
    return total / noise.numel()


def plot_metrics(path, rows):
    """Draw MSE and both Frechet distances, with their floors, against the epoch; rows: those of metrics.csv."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    left.plot(epochs, [row["mse"] for row in rows], "o-", color="#0072B2")
    left.set(title="MSE of the predicted noise, test set", xlabel="epoch")
    for space, color in (("classifier", "#D55E00"), ("latent", "#0072B2")):
        right.plot(epochs, [row[f"fid_{space}"] for row in rows], "o-", color=color, label=f"{space} features")
        right.axhline(rows[-1][f"floor_{space}"], ls="--", color=color, label=f"{space} floor (training images)")
    right.set(title=f"FID of {rows[-1]['n_samples']:,} digits", xlabel="epoch", yscale="log")
    figure.legend(loc="outside lower right", ncols=4, fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
        axes.xaxis.get_major_locator().set_params(integer=True)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


# ---- evaluation ----
def spread_labels(labels, n_samples):
    """Return n_samples labels, in order, in the proportions of the labels given."""
    return labels.sort().values[torch.arange(n_samples) * len(labels) // n_samples]


def pick_images(images, labels, wanted):
    """Return for each digit as many of its first images as wanted (N,), labels in order, asks for."""
    counts = wanted.bincount(minlength=10).tolist()
    return torch.cat([images[labels == digit][:count] for digit, count in enumerate(counts)])


@torch.inference_mode()
def evaluate(paths, args):
    """Print and yield the row of metrics.csv, a dict, of each checkpoint. The newest one's latent space serves all."""
    torch.backends.cudnn.allow_tf32 = False  # float32 in full, so that machines agree
    newest, checkpoint = load_checkpoint(paths[-1], args.device)
    latent_epoch = checkpoint["epoch"]
    refuse_contradictions(args, paths[-1], newest.config)
    classifier = load_classifier(CLASSIFIER, args.device)
    form = newest.config["image_size"], newest.config["channels"], args.device
    test_images, test_labels = load_mnist(False, *form)
    wanted = spread_labels(test_labels, args.n_samples)

    def features(images):
        images = images.to(args.device)
        of_classifier, digits = classify(classifier, images, args.batch_size)
        return {"latent": latent_features(newest, images, args.batch_size), "classifier": of_classifier}, digits

    real, _ = features(test_images)
    floor, digits = features(pick_images(*load_mnist(True, *form), wanted))
    floors = {f"floor_{space}": frechet_distance(floor[space], real[space]) for space in real}
    print(f"{args.n_samples:,} digits; latent space of epoch {latent_epoch}; floor: as many training images\n"
          " epoch       MSE  FID latent  FID classifier  accuracy\n"
          f" floor           {floors['floor_latent']:12.4f}  {floors['floor_classifier']:14.4f}"
          f"  {accuracy(digits, wanted):8.2%}")
    for path in paths:
        model, checkpoint = load_checkpoint(path, args.device)
        if model.config != newest.config:
            raise InputError(f"{path} is of {model.config}, but {paths[-1]} of {newest.config}")
        fake, digits = features(sample(model, wanted, seed=args.seed))
        row = dict(epoch=checkpoint["epoch"], mse=noise_mse(model, test_images, test_labels, args.batch_size),
                   **{f"fid_{space}": frechet_distance(fake[space], real[space]) for space in real},
                   accuracy=accuracy(digits, wanted), n_samples=args.n_samples, **floors, latent_epoch=latent_epoch)
        print("{epoch:6}  {mse:8.5f}  {fid_latent:10.4f}  {fid_classifier:14.4f}  {accuracy:8.2%}".format(**row))
        yield row


# ---- command line ----
def make_classifier(args):
    """Train the classifier, write it to its place beside src and print its accuracy on the test set."""
    make_folder(CLASSIFIER.parent)
    classifier = train_classifier(args.device, args.seed)
    with replacing(CLASSIFIER) as file:
        torch.save(classifier.state_dict(), file)
    images, labels = load_mnist(False, device=args.device)
    _, digits = classify(classifier, images, args.batch_size)
    print(f"{CLASSIFIER}: reads {accuracy(digits, labels):.2%} of the test images right")


def main(argv=None):
    parser = make_parser(__doc__)
    add_checkpoint_flags(parser)
    parser.add_argument("--batch_size", type=whole_number(1), default=256, help="test images in a batch")
    parser.add_argument("--image_size", type=whole_number(4), help="refuse checkpoints of another size")
    parser.add_argument("--time_steps", type=whole_number(1), help="refuse checkpoints of another T")
    parser.add_argument("--n_samples", type=whole_number(2000, 50_000), default=2000, help="digits to generate")
    parser.add_argument("--train_classifier", action="store_true", help="make checkpoints/classifier.pth anew, and end")
    args = parser.parse_args(argv)
    if args.train_classifier:
        return make_classifier(args)
    make_folder(args.root / "datas")
    rows = []
    for row in evaluate(find_checkpoints(args.root, args.epochs, args.checkpoint_path), args):
        rows.append(row)
        write_csv(args.root / "datas/metrics.csv", rows)
        plot_metrics(args.root / "datas/metrics.png", rows)
    print(args.root / "datas/metrics.csv", args.root / "datas/metrics.png")


if __name__ == "__main__":
    run(main)
