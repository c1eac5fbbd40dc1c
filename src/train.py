"""Train a class-conditional diffusion model (DDPM, Ho et al. 2020) on MNIST.

    python src/train.py                                               1000 epochs, meant for a GPU
    python src/train.py --n_epochs 5 --batch_size 128 --save_every 1  a few minutes on a laptop
"""
import argparse
import copy
import signal
import sys
import time
import zlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.datasets import MNIST
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from common import (REPOSITORY, InputError, bounded, catching, earlier_files, epoch_checkpoints, generator, greatest,
                    has_bf16, in_turn, is_first, keep_freed_memory, load_tensors, locked, make_folder, make_parser,
                    refuse_contradictions, replacing, run, save_tensors, write_csv)

NULL_LABEL = 10  # "any digit"
MIN_TIME_STEPS = 21  # at T = 20 the last beta would be 1
LEARNING_RATES = {"muon": 0.02, "adamw": 0.007}  # at their peak
LABEL_DROPOUT = 0.05  # share of labels hidden in training; with the customary 0.1 more digits are drawn wrong
LATEST = "checkpoints/latest.pth"  # under root
SETTINGS = ["n_epochs", "save_every", "batch_size", "image_size", "channels", "time_steps", "seed"]  # kept in it
SAVE_INTERVAL = 45  # seconds; what is killed loses less than a minute


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
        if image_size not in range(4, 257, 4):
            raise InputError(f"image_size must be a multiple of 4 from 4 to 256, not {image_size}")
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
        return F.pixel_shuffle(self.conv_out(F.silu(normalize(h))), 2)


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


# ---- checkpoints ----
def new_state(args):
    """Return all that training changes: model; ema, its average; muon, adamw; step, the number of those taken in the
    run; total_loss, a tensor (), and seconds of the epoch so far; log, a list of the epochs' rows."""
    torch.manual_seed(args.seed)
    model = SimpleUnet(args.channels, args.image_size, args.time_steps).to(args.device)
    ema = copy.deepcopy(model).requires_grad_(False)
    muon, adamw = make_optimizers(model)
    total_loss = torch.zeros((), device=args.device)  # stays there: reading it would make a GPU wait
    return dict(model=model, ema=ema, muon=muon, adamw=adamw, step=0, total_loss=total_loss, seconds=0.0, log=[])


def save_state(state, args, earlier):
    """Write all that --resume needs, the log and the loss curve; only then remove the earlier files, a list."""
    check_finite(state)
    saved = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in state.items()}
    save_tensors(args.root / LATEST, saved | {"args": {name: getattr(args, name) for name in SETTINGS}})
    while earlier:
        earlier.pop().unlink(missing_ok=True)
    if state["log"]:
        write_csv(args.root / "datas/train_log.csv", state["log"])
        plot_losses(args.root / "datas/train_log.png", state["log"])


def load_state(path, parser, argv):
    """Return (state, args) of a run that was stopped. Of its settings flags in argv may change n_epochs and save_every.

    Raises InputError where the file is missing, damaged or foreign, and for other flags that contradict it.
    """
    try:
        saved = load_tensors(path)
        args = parser.parse_args(argv, argparse.Namespace(**saved["args"]))
        refuse_contradictions(args, path, {name: saved["args"][name] for name in SETTINGS[2:]})
        state = new_state(args)
        for name, part in state.items():
            if hasattr(part, "load_state_dict"):
                part.load_state_dict(saved[name])
            else:
                state[name] = saved[name]
        state["total_loss"] = state["total_loss"].to(args.device)
        if len(state["log"]) >= args.n_epochs:
            raise InputError(f"{path} has had its {len(state['log'])} epochs: ask for more by --n_epochs")
    except FileNotFoundError as error:
        raise InputError(f"there is no {path} to resume: start without --resume") from error
    except (InputError, OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(f"{path}: damaged, or not the state of a run; start anew with --overwrite") from error
    return state, args


def check_finite(state):
    """Raise InputError if a loss or weight of the epoch has become infinite or NaN, as their sums then have too."""
    if not (state["total_loss"] + nn.utils.get_total_norm(state["ema"].parameters())).isfinite():
        raise InputError(f"epoch {len(state['log']) + 1}: the loss is no longer finite; the last good state is kept, "
                         "but with the same settings --resume is likely to end here again: try another --seed")


# ---- training ----
def make_optimizers(model):
    """Return Muon, for all kernels but the first and last, and AdamW, for the rest; training_step sets their rates.

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
    return (torch.optim.Muon(matrices, momentum=0.95, weight_decay=0, ns_steps=3),
            torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0, fused=True))


def training_loss(network, alphas_cumprod, x_0, labels, rng):
    """Return the noise's mean squared error (DDPM, eq. 14), weighted; t / T is logit-normal (Esser et al. 2024).

    Of several processes each draws for the whole batch, x_0 (B, C, H, W) and labels (B,), and computes its share.
    """
    batch_size, device, time_steps = len(x_0), x_0.device, len(alphas_cumprod)
    noise = torch.randn(x_0.shape, generator=rng, device=device)
    places = torch.arange(batch_size, device=device) + torch.rand(batch_size, generator=rng, device=device)
    places = (torch.special.ndtri(places / batch_size) - 0.8).sigmoid()  # most at middle t, where the digit takes shape
    t = (places * time_steps).long().clamp(max=time_steps - 1)
    hidden = torch.rand(batch_size, generator=rng, device=device) < LABEL_DROPOUT
    labels = labels.masked_fill(hidden, NULL_LABEL)
    x_t = forward_diffusion_sample(x_0, t, noise, alphas_cumprod)
    weights = alphas_cumprod[t].rsqrt().float()  # halfway between the errors of eps, 1, and of v, 1 / a
    share = slice(dist.get_rank(), None, dist.get_world_size()) if dist.is_initialized() else slice(None)
    with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
        eps = network(x_t[share], t[share], labels[share])
    return (weights[share] * (eps - noise[share]).square().mean((1, 2, 3))).mean()


def training_step(network, state, x_0, labels, seed, total_steps):
    """Move the weights and their average by one batch. network: the model, or its DistributedDataParallel."""
    step, model = state["step"], state["model"]
    model.zero_grad(set_to_none=False)  # Muon sees these gradients' memory
    loss = training_loss(network, model.alphas_cumprod, x_0, labels, generator(x_0.device, seed, 1, step))
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    factor = min((step + 1) / 100, 1 - step / total_steps)  # warm up, then fall linearly to 0
    for name, learning_rate in LEARNING_RATES.items():
        state[name].param_groups[0]["lr"] = factor * learning_rate
        state[name].step()
    decay = min(0.9999, (1 + step) / (10 + step))  # averages over the last tenth of a short run
    get_ema_multi_avg_fn(decay)(list(state["ema"].parameters()), list(model.parameters()), None)
    loss = loss.detach()
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    state["total_loss"] += loss
    state["step"] += 1


def train(state, images, labels, args, earlier):
    """Train up to args.n_epochs epochs; write checkpoints, the state, the log and the loss curve under args.root.

    After SIGINT or SIGTERM it saves the state and returns the signal's number. earlier: files of a run that this one
    replaces, removed as soon as there is something in their place.
    """
    model, size, steps = state["model"], args.batch_size, len(images) // args.batch_size
    if dist.is_initialized() and size % dist.get_world_size():
        raise InputError(f"--batch_size {size} cannot be shared evenly among {dist.get_world_size()} processes")
    network = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if dist.is_initialized() else model
    saved = time.perf_counter()
    with catching(signal.SIGINT, signal.SIGTERM) as signals, \
            tqdm(total=args.n_epochs * steps * size, initial=state["step"] * size, unit=" images", unit_scale=True,
                 disable=not is_first()) as bar:
        for epoch in range(len(state["log"]) + 1, args.n_epochs + 1):
            bar.set_description(f"epoch {epoch}/{args.n_epochs}")
            start = time.perf_counter() - state["seconds"]
            rng = generator(args.device, args.seed, 0, epoch - 1)
            order = torch.randperm(len(images), generator=rng, device=args.device).split(size)[:steps]
            for batch in order[state["step"] - (epoch - 1) * steps:]:
                stop, now = greatest(signals), time.perf_counter()
                state["seconds"] = now - start
                if is_first() and (stop or now - saved > SAVE_INTERVAL):
                    save_state(state, args, earlier)
                    saved = now
                if stop:
                    return stop
                x_0 = images[batch] / 127.5 - 1
                training_step(network, state, x_0, labels[batch], args.seed, args.n_epochs * steps)
                bar.update(size)
            end_epoch(state, time.perf_counter() - start, args, steps, earlier)
            bar.set_postfix(loss=f"{state['log'][-1]['loss']:.4f}")
        if is_first():
            save_state(state, args, earlier)


def end_epoch(state, seconds, args, steps, earlier):
    """Log the epoch; write its checkpoint if it is one of those that args.save_every asks for, or the last."""
    check_finite(state)
    if is_first() and not state["log"]:  # no checkpoint without a state, nor beside another run's
        save_state(state, args, earlier)
    epoch, loss = len(state["log"]) + 1, state["total_loss"].item() / steps
    state["log"].append(dict(epoch=epoch, loss=round(loss, 6), seconds=round(seconds, 3),
                             images_per_second=round(steps * args.batch_size / seconds)))
    state["total_loss"].zero_()
    state["seconds"] = 0.0
    if is_first() and (epoch % args.save_every == 0 or epoch == args.n_epochs):
        save_tensors(args.root / f"checkpoints/diffusion_epoch_{epoch}.pth", dict(
            epoch=epoch, model_state_dict=state["ema"].state_dict(), loss=loss, config=state["model"].config))


def plot_losses(path, log):
    """Draw the loss of every epoch, but of an untrained network's first; log: the rows of train_log.csv."""
    log = log[1:] or log
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["epoch"] for row in log], [row["loss"] for row in log], marker="." if len(log) < 50 else "")
    axes.set(xlabel="epoch", ylabel="training loss (weighted MSE of the noise)")
    axes.grid(alpha=0.3)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


# ---- command line ----
def training_parser():
    parser = make_parser(__doc__)
    parser.add_argument("--n_epochs", type=bounded(int, 1), default=1000, help="passes over the training images")
    parser.add_argument("--batch_size", type=bounded(int, 1, 60_000), default=256, help="images in a step")
    parser.add_argument("--image_size", type=bounded(int, 4, 256), default=28, help="pixels a side, a multiple of 4")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=1, help="1: grey; 3: RGB, all the same")
    parser.add_argument("--time_steps", type=bounded(int, MIN_TIME_STEPS, 10_000), default=1000, help="diffusion steps")
    parser.add_argument("--save_every", type=bounded(int, 1), default=10, help="epochs between checkpoints")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--resume", action="store_true", help="go on with the run that --root holds")
    choice.add_argument("--overwrite", action="store_true", help="replace the run that --root holds")
    return parser


def main(argv=None):
    parser = training_parser()
    args = parser.parse_args(argv)
    keep_freed_memory()
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    if dist.is_torchelastic_launched():  # by torchrun
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device.type == "cuda" else "gloo")
    latest = args.root / LATEST
    make_folder(args.root / "checkpoints")
    make_folder(args.root / "datas")
    with locked(args.root / "checkpoints/.lock"):
        first = [*epoch_checkpoints(args.root).values(), latest][0]
        if first.exists() and not (args.resume or args.overwrite):
            raise InputError(f"{first} is of an earlier run: go on with it by --resume, replace it by --overwrite, or "
                             "choose another --root")
        state, args = load_state(latest, parser, argv) if args.resume else (new_state(args), args)
        with in_turn():  # the first one unpacks what the others then find
            images, labels = load_mnist(True, args.image_size, args.channels, args.device)
        if is_first():
            print(f"training {sum(p.numel() for p in state['model'].parameters()):,} parameters on {args.device}, "
                  f"in {'bfloat16' if has_bf16(args.device) else 'float32'}")
        stop = train(state, images, labels, args, earlier_files(args.root) if args.overwrite else [])
    if is_first() and stop:
        print(f"stopped in epoch {len(state['log']) + 1}; --resume goes on from {latest}", file=sys.stderr)
    elif is_first():
        print(f"checkpoints: {args.root / 'checkpoints'}  log and loss curve: {args.root / 'datas'}")
    if dist.is_initialized():
        dist.destroy_process_group()
    if stop:
        sys.exit(128 + stop)


if __name__ == "__main__":
    run(main)
