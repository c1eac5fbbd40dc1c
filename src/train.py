"""Train a class-conditional diffusion model (DDPM, Ho et al. 2020) on MNIST.

    python src/train.py                                               1000 epochs, meant for a GPU
    python src/train.py --n_epochs 5 --batch_size 128 --save_every 1  a few minutes on a laptop
"""
import argparse
import contextlib
import copy
import csv
import ctypes
import io
import os
import re
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.datasets import MNIST
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parent.parent  # MNIST and the released weights lie here, wherever one stands
NULL_LABEL = 10  # "any digit"
MIN_TIME_STEPS = 21  # at T = 20 the last beta would be 1


class InputError(ValueError):
    """Bad input from outside, a flag or a file: a script reports it in one line."""


# ---- noise schedule ----
def linear_beta_schedule(time_steps):
    """Return betas (T,) in float64: linear from 1e-4 to 0.02 at T = 1000 (DDPM, section 4).

    Other T scale both ends by 1000 / T, so that for every T alphas_cumprod ends near 0 and x_t as pure noise.
    Raises InputError for a T below MIN_TIME_STEPS.
    """
    if time_steps < MIN_TIME_STEPS:
        raise InputError(f"time_steps must be at least {MIN_TIME_STEPS}, not {time_steps}")
    scale = 1000 / time_steps
    return torch.linspace(1e-4 * scale, 0.02 * scale, time_steps, dtype=torch.float64)


def cumulative_alphas(time_steps):
    """Return alphas_cumprod (T,) in float64, the share of x_t's variance that is x_0's."""
    return (1 - linear_beta_schedule(time_steps)).cumprod(0)


def forward_diffusion_sample(x_0, t, noise, alphas_cumprod):
    """Return x_t, drawn from q(x_t | x_0) by noise ~ N(0, 1) (DDPM, eq. 4).

    x_0, noise: (B, C, H, W); t: (B,) int64 in [0, T - 1]; alphas_cumprod: (T,) float64.
    """
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    return a.sqrt().to(x_0) * x_0 + (1 - a).sqrt().to(x_0) * noise


# ---- network ----
def normalize(x):
    """Give each image, over all channels, mean 0 and variance 1: group normalization with one group."""
    x = x.permute(0, 2, 3, 1)  # as channels_last has it in memory: there a CPU's group_norm is slow
    return F.layer_norm(x, x.shape[1:]).permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    """(B, c_in, H, W), (B, c_emb) -> (B, c_out, H, W): two convolutions; the embedding scales and shifts in between."""

    def __init__(self, c_in, c_out, c_emb):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.scale_shift = nn.Linear(c_emb, 2 * c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # every block starts as its skip

    def forward(self, x, emb):
        h = self.conv1(F.silu(x))
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, normalize(h), 1 + scale)
        return self.skip(x) + self.conv2(F.silu(h))


class SimpleUnet(nn.Module):
    """A U-Net that predicts the noise in x_t, given t and the digit.

    Blocks of 2 x 2 pixels enter as channels (space to depth); it works at a half and a quarter of the image's size,
    which must be a multiple of 4. On the way up each layer also sees what its counterpart on the way down made.
    """

    def __init__(self, channels=1, image_size=28, time_steps=1000, widths=(32, 64)):
        super().__init__()
        if image_size % 4:
            raise InputError(f"image_size must be a multiple of 4, not {image_size}")
        self.config = dict(channels=channels, image_size=image_size, time_steps=time_steps, widths=widths)
        a, b = widths  # channels at H/2 and at H/4
        emb = 4 * a
        self.time_mlp = nn.Sequential(nn.Linear(64, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label_embedding = nn.Embedding(NULL_LABEL + 1, emb)
        self.conv_in = nn.Conv2d(4 * channels, a, 3, padding=1)
        self.down1 = ResBlock(a, a, emb)
        self.downsample = nn.Conv2d(a, a, 3, stride=2, padding=1)
        self.down2 = ResBlock(a, b, emb)
        self.mid1 = ResBlock(b, b, emb)
        self.mid2 = ResBlock(b, b, emb)
        self.up1 = ResBlock(b + b, b, emb)
        self.up2 = ResBlock(b + a, b, emb)
        self.upsample = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(b, b, 3, padding=1))
        self.up3 = ResBlock(b + a, a, emb)
        self.up4 = ResBlock(a + a, a, emb)
        self.conv_out = nn.Conv2d(a, 4 * channels, 3, padding=1)
        self.register_buffer("alphas_cumprod", cumulative_alphas(time_steps), persistent=False)
        nn.init.normal_(self.label_embedding.weight, std=0.5)  # from 0 the classes are learnt late
        nn.init.zeros_(self.conv_out.weight)

    def embed(self, t, labels):
        """(B,), (B,) -> (B, c_emb): sinusoids (Vaswani et al. 2017) of t, scaled to the range of T = 1000; label."""
        frequencies = 10000 ** -torch.linspace(0, 1, 32, device=t.device)
        angles = t[:, None] * (1000 / self.config["time_steps"]) * frequencies
        return F.silu(self.time_mlp(torch.cat([angles.cos(), angles.sin()], dim=1)) + self.label_embedding(labels))

    def encode(self, x_t, emb):
        """Return the bottleneck (B, b, H/4, W/4) and the four outputs of the way down that the way up needs."""
        h1 = self.conv_in(F.pixel_unshuffle(x_t, 2).to(memory_format=torch.channels_last))  # (B, a, H/2, W/2)
        h2 = self.down1(h1, emb)
        h3 = self.downsample(h2)  # (B, a, H/4, W/4)
        h4 = self.down2(h3, emb)  # (B, b, H/4, W/4)
        return self.mid2(self.mid1(h4, emb), emb), (h1, h2, h3, h4)

    def forward(self, x_t, t, labels):
        """Return eps like x_t. x_t: (B, C, H, W); t: (B,) in [0, T - 1]; labels: (B,) int64, 0..9 or NULL_LABEL."""
        emb = self.embed(t, labels)
        h, (h1, h2, h3, h4) = self.encode(x_t, emb)
        h = self.up1(torch.cat([h, h4], dim=1), emb)
        h = self.up2(torch.cat([h, h3], dim=1), emb)
        h = self.upsample(h)  # (B, b, H/2, W/2)
        h = self.up3(torch.cat([h, h2], dim=1), emb)
        h = self.up4(torch.cat([h, h1], dim=1), emb)
        # The layers make v = sqrt(a) eps - sqrt(1 - a) x_0 (Salimans & Ho 2022), of variance about 1 at every t.
        v = F.pixel_shuffle(self.conv_out(F.silu(normalize(h))), 2)
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (1 - a).sqrt().to(x_t) * x_t + a.sqrt().to(x_t) * v


# ---- data ----
def load_mnist(train, image_size=28, channels=1, device="cpu"):
    """Return MNIST's training or test set, whole on the device: images (N, C, H, W) uint8, labels (N,) int64.

    Sizes other than 28 are resized bilinearly with antialiasing; channels beyond the first are copies of it.
    Raises InputError where an archive is missing or damaged and cannot be downloaded.
    """
    folder = REPOSITORY / "mnist/MNIST/raw"
    for name, md5 in MNIST.resources:  # torchvision trusts whatever lies unpacked: compare it with its archive
        archive, unpacked = folder / name, (folder / name).with_suffix("")
        if unpacked.exists() and check_integrity(archive, md5):
            crc32 = int.from_bytes(archive.read_bytes()[-8:-4], "little")  # of the content, as gzip stores it
            if zlib.crc32(unpacked.read_bytes()) != crc32:
                unpacked.unlink()
    try:
        mnist = MNIST(REPOSITORY / "mnist", train=train, download=True)
    except Exception as error:  # a download or a damaged file fails in many ways
        raise InputError(f"{folder}: MNIST can be neither read nor downloaded ({error}); restore the folder, "
                         "with 'git checkout mnist' in a clone") from error
    images = mnist.data[:, None]
    images = torch.cat([resize(part, [image_size, image_size]) for part in images.split(1000)])
    return images.to(device).expand(-1, channels, -1, -1), mnist.targets.to(device)


def generator(device, *key):
    """Return a torch.Generator on the device whose draws depend on the key alone: seed, purpose, number.

    Purposes: 0 the order of an epoch, 1 a step of training, 2 a chunk of samples, 3 the noise of an evaluation.
    """
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64).item()
    return torch.Generator(device).manual_seed(seed)


# ---- files ----
def make_folder(path):
    """Make the folder if it is missing. Raises InputError, before any work is lost, if it cannot be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise InputError(f"cannot write to the folder {path} ({error.strerror}): choose another") from error


@contextlib.contextmanager
def replacing(path):
    """Open a file for writing bytes that takes path's place when all is written: readers see the old one or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path, rows):
    """Write rows, dicts with the same keys, under a header of these keys."""
    writer = csv.writer(text := io.StringIO(), lineterminator="\n")
    writer.writerows([rows[0].keys(), *(row.values() for row in rows)])
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def epoch_checkpoints(root):
    """Return {N: path} of the files checkpoints/diffusion_epoch_{N}.pth under root, in the order of N."""
    matches = [re.fullmatch(r"diffusion_epoch_(\d+)\.pth", path.name) for path in root.glob("checkpoints/*")]
    return dict(sorted((int(match[1]), root / "checkpoints" / match[0]) for match in matches if match))


# ---- training ----
def has_bf16(device):
    """Whether the device computes in bfloat16 (most CPUs only emulate it, slowly)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    cpu = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and any(map(cpu.get, ("avx512_bf16", "amx_bf16", "bf16")))


def make_optimizers(model):
    """Return [(optimizer, peak learning rate)]: Muon for all kernels but the first and last, AdamW for the rest.

    torch's Muon takes matrices: it gets each kernel (out, in, k, k), and its gradient, as a view (out, in * k * k).
    """
    rest, matrices = [], []
    for name, p in model.named_parameters():
        if p.ndim == 4 and not name.startswith(("conv_in", "conv_out")):
            p.grad = torch.zeros_like(p)
            matrices.append(nn.Parameter(p.detach().flatten(1)))
            matrices[-1].grad = p.grad.flatten(1)
        else:
            rest.append(p)
    return [(torch.optim.Muon(matrices, momentum=0.95, weight_decay=0, ns_steps=3), 0.02),
            (torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0, fused=True), 0.007)]


def training_loss(model, x_0, labels, rng):
    """Return the noise's mean squared error (DDPM, eq. 14), weighted, with t spread evenly over the batch."""
    batch_size, device, time_steps = len(x_0), x_0.device, len(model.alphas_cumprod)
    noise = torch.randn(x_0.shape, generator=rng, device=device)
    places = torch.arange(batch_size, device=device) + torch.rand(batch_size, generator=rng, device=device)
    t = (places * (time_steps / batch_size)).long().clamp(max=time_steps - 1)
    nameless = torch.rand(batch_size, generator=rng, device=device) < 0.1
    x_t = forward_diffusion_sample(x_0, t, noise, model.alphas_cumprod)
    with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
        eps = model(x_t, t, labels.masked_fill(nameless, NULL_LABEL))
    weights = model.alphas_cumprod[t].rsqrt().float()  # high t, where the digit takes shape, counts for more
    return (weights * (eps - noise).square().mean((1, 2, 3))).mean()


def train_one_epoch(model, ema, optimizers, images, labels, epoch, args, bar):
    """Train on every full batch of the shuffled images; return the mean loss. Epochs count from 0 here."""
    device, size = images.device, args.batch_size
    order = torch.randperm(len(images), generator=generator(device, args.seed, 0, epoch), device=device)
    steps = len(images) // size
    total_loss = torch.zeros((), device=device)  # stays there: reading it would make a GPU wait
    for step, batch in enumerate(order.split(size)[:steps], epoch * steps):
        model.zero_grad(set_to_none=False)  # Muon sees these gradients' memory
        loss = training_loss(model, images[batch] / 127.5 - 1, labels[batch], generator(device, args.seed, 1, step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = min((step + 1) / 100, 1 - step / (args.n_epochs * steps))  # warm up, then fall linearly to 0
        for optimizer, learning_rate in optimizers:
            optimizer.param_groups[0]["lr"] = factor * learning_rate
            optimizer.step()
        decay = min(0.9999, (1 + step) / (10 + step))  # averages over the last tenth of a short run
        get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), None)
        total_loss += loss.detach()
        bar.update(size)
    return total_loss.item() / steps


def train(model, images, labels, args, earlier):
    """Train for args.n_epochs epochs; write checkpoints, the log and the loss curve under args.root.

    earlier: files of the run to be replaced, removed after the first epoch, when there is something in its place.
    """
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizers = make_optimizers(model)
    images_per_epoch = len(images) // args.batch_size * args.batch_size
    log = []
    with tqdm(total=args.n_epochs * images_per_epoch, unit=" images", unit_scale=True) as bar:
        for epoch in range(args.n_epochs):
            bar.set_description(f"epoch {epoch + 1}/{args.n_epochs}")
            start = time.perf_counter()
            loss = train_one_epoch(model, ema, optimizers, images, labels, epoch, args, bar)
            seconds = time.perf_counter() - start
            bar.set_postfix(loss=f"{loss:.4f}")
            if epoch == 0:
                for path in earlier:
                    path.unlink()
            log.append(dict(epoch=epoch + 1, loss=round(loss, 6), seconds=round(seconds, 3),
                            images_per_second=round(images_per_epoch / seconds)))
            write_csv(args.root / "datas/train_log.csv", log)
            if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.n_epochs:
                checkpoint = dict(epoch=epoch + 1, model_state_dict=ema.state_dict(), loss=loss, config=model.config)
                with replacing(args.root / f"checkpoints/diffusion_epoch_{epoch + 1}.pth") as file:
                    torch.save(checkpoint, file)
                plot_losses(args.root / "datas/train_log.png", log)


def plot_losses(path, log):
    """Draw the loss of every epoch; log: the rows of train_log.csv."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["epoch"] for row in log], [row["loss"] for row in log], marker="." if len(log) < 50 else "")
    axes.set(xlabel="epoch", ylabel="training loss (weighted MSE of the noise)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


# ---- command line ----
def bounded(kind, minimum, maximum=10**9):
    """Return an argparse type: an int or a float, as kind says, from minimum to maximum."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if minimum <= kind(text) <= maximum:
                return kind(text)
        raise argparse.ArgumentTypeError(f"must be {kind.__name__} from {minimum} to {maximum}, not {text!r}")
    return parse


def usable_device(text):
    """The argparse type of --device."""
    match = re.fullmatch(r"cpu|cuda(?::(\d\d?))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, not {text!r}")
    if text != "cpu" and not (torch.cuda.is_available() and int(match[1] or 0) < torch.cuda.device_count()):
        raise argparse.ArgumentTypeError(f"there is no {text} here that torch can use; try --device cpu")
    return torch.device(text)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def make_parser(description):
    """Return a parser with the flags that all scripts share. Without a usage its errors take one line."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0], usage=argparse.SUPPRESS,
                                     formatter_class=HelpFormatter)
    parser.add_argument("--root", type=Path, default=".", help="folder of checkpoints, generated_samples and datas")
    parser.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu, cuda or cuda:N")
    parser.add_argument("--seed", type=bounded(int, 0), default=0, help="of the random numbers")
    return parser


def main(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--n_epochs", type=bounded(int, 1), default=1000, help="passes over the training images")
    parser.add_argument("--batch_size", type=bounded(int, 1, 60_000), default=256, help="images in a step")
    parser.add_argument("--image_size", type=bounded(int, 4, 256), default=28, help="pixels a side, a multiple of 4")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=1, help="1: grey; 3: RGB, all the same")
    parser.add_argument("--time_steps", type=bounded(int, MIN_TIME_STEPS, 10_000), default=1000, help="diffusion steps")
    parser.add_argument("--save_every", type=bounded(int, 1), default=10, help="epochs between checkpoints")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that --root holds")
    args = parser.parse_args(argv)
    with contextlib.suppress(AttributeError, TypeError):  # only in glibc: keep freed memory, every step needs the same
        ctypes.CDLL(None).mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
    torch.manual_seed(args.seed)
    model = SimpleUnet(args.channels, args.image_size, args.time_steps).to(args.device)
    images, labels = load_mnist(True, args.image_size, args.channels, args.device)
    make_folder(args.root / "checkpoints")
    make_folder(args.root / "datas")
    earlier = [*epoch_checkpoints(args.root).values(), *args.root.glob("datas/train_log.*")]
    if earlier and not args.overwrite:
        raise InputError(f"{earlier[0]} is of an earlier run: choose another --root, or replace it with --overwrite")
    print(f"training {sum(p.numel() for p in model.parameters()):,} parameters on {args.device}, "
          f"in {'bfloat16' if has_bf16(args.device) else 'float32'}")
    train(model, images, labels, args, [*earlier, *args.root.glob("datas/metrics*")] if earlier else [])
    print(f"checkpoints: {args.root / 'checkpoints'}  log and loss curve: {args.root / 'datas'}")


def run(main):
    """Run a script's main; bad input ends it with one line on stderr and exit code 1."""
    try:
        main()
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}")  # one line


if __name__ == "__main__":
    run(main)
