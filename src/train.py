"""Train a class-conditional diffusion model (DDPM, Ho et al. 2020) on MNIST.

    python src/train.py                                               1000 epochs, meant for a GPU
    python src/train.py --n_epochs 2 --batch_size 64 --save_every 1   a few minutes on a laptop

The way of an image: archive, uint8 tensor, x_0, x_t, eps, loss, step. After it: runs and files.
"""
import contextlib
import copy
import dataclasses
import gzip
import math
import signal
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torchvision.datasets import MNIST
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from common import (REPOSITORY, InputError, bounded, epoch_checkpoints, generator, has_bf16,
                    load_tensors, make_parser, reading, refuse_contradictions, replacing,
                    save_tensors, seed_for, write_csv)

NULL_LABEL = 10  # "any digit"


# ---- settings ----
@dataclasses.dataclass
class Settings:
    """What makes a run what it is: first what flags say, then what the recipe chose."""
    n_epochs: int = 1000
    save_every: int = 10  # epochs between checkpoints
    batch_size: int = 256
    image_size: int = 28
    channels: int = 1
    time_steps: int = 1000
    width: int = 32  # channels at half the image's size; twice as many at a quarter
    seed: int = 0

    muon_rate: float = 0.02  # learning rates at their peak
    adamw_rate: float = 0.007
    muon_momentum: float = 0.95
    adamw_betas: tuple = (0.9, 0.99)
    max_norm: float = 1.0  # of all gradients together
    warmup_steps: int = 100
    ema_decay: float = 0.9999  # at most; a short run averages over its last tenth
    label_dropout: float = 0.05  # hidden, for guidance
    t_mean: float = -0.8  # of logit(t / T), normal: half of t / T lie from 0.19 to 0.47
    t_std: float = 1.0
    loss_power: float = 0.5  # weight alphas_cumprod^-0.5: halfway from eps's error (0) to v's (1)
    model_guidance: float = 0.5  # w, for some t: as a guidance of 1 / (1 - w) in sampling


# ---- data ----
def load_mnist(train, image_size=28, channels=1, device="cpu"):
    """Return MNIST's training or test set whole, on the device.

    images: (N, C, H, W) uint8, resized bilinearly with antialiasing where the size is not 28,
    grey copied to all channels; labels: (N,) int64.
    Raises InputError where an archive is damaged, or missing and cannot be downloaded.
    """
    folder = REPOSITORY / "mnist/MNIST/raw"
    part = "train" if train else "t10k"
    with reading(folder, "restore it, in a clone with 'git checkout mnist'"):
        if len(list(folder.glob("*.gz"))) < len(MNIST.resources):
            MNIST(REPOSITORY / "mnist", download=True)
        pixels = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:]
        digits = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:]
        images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(-1, 1, 28, 28)
        labels = torch.frombuffer(bytearray(digits), dtype=torch.uint8).long()
    images = torch.cat([resize(few, [image_size, image_size]) for few in images.split(1000)])
    return images.to(device).expand(-1, channels, -1, -1), labels.to(device)


# ---- noise ----
def linear_beta_schedule(time_steps):
    """Return betas (T,) in float64: linear from 1e-4 to 0.02 at T = 1000 (DDPM, section 4).

    Other T scale both ends by 1000 / T, so that for every T alphas_cumprod ends near 0 and x_t as
    pure noise. Raises InputError for a T below 21: the last beta would be 1 or more.
    """
    if time_steps < 21:
        raise InputError(f"time_steps must be at least 21, not {time_steps}")
    scale = 1000 / time_steps
    return torch.linspace(1e-4 * scale, 0.02 * scale, time_steps, dtype=torch.float64)


def cumulative_alphas(time_steps):
    """Return alphas_cumprod (T,) in float64, what is left of x_0's variance in x_t."""
    return (1 - linear_beta_schedule(time_steps)).cumprod(0)


def forward_diffusion_sample(x_0, t, noise, alphas_cumprod):
    """Return x_t, drawn from q(x_t | x_0) by noise ~ N(0, 1) (DDPM, eq. 4).

    x_0, noise: (B, C, H, W); t: (B,) int64 in [0, T - 1]; alphas_cumprod: (T,) float64.
    """
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    return a.sqrt().to(x_0) * x_0 + (1 - a).sqrt().to(x_0) * noise


# ---- network ----
def normalize(x):
    """Give each image, over all channels, mean 0 and variance 1: GroupNorm with one group."""
    x = x.permute(0, 2, 3, 1)  # as channels_last has it in memory: there F.group_norm is slow
    with torch.autocast(x.device.type, enabled=False):  # which on a GPU would cast to float32
        return F.layer_norm(x, x.shape[1:]).permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    """(B, c_in, H, W), (B, c_emb) -> (B, c_out, H, W): two convolutions beside a skip.

    The embedding scales and shifts what lies between them.
    """

    def __init__(self, c_in, c_out, c_emb):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.scale_shift = nn.Linear(c_emb, 2 * c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # but for a bias, every block starts as its skip

    def forward(self, x, emb):
        h = self.conv1(F.silu(x))
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, normalize(h), 1 + scale)
        return self.skip(x) + self.conv2(F.silu(h))


class SimpleUnet(nn.Module):
    """A U-Net that predicts the noise in x_t, given t and the digit.

    Squares of 2 x 2 pixels enter as channels (space to depth); it works at a half and at a quarter
    of the image's size, a multiple of 4. On the way up each layer also sees what its counterpart
    on the way down made.
    """

    def __init__(self, channels=1, image_size=28, time_steps=1000, widths=(32, 64)):
        super().__init__()
        if image_size not in range(4, 257, 4):
            raise InputError(f"image_size must be a multiple of 4 up to 256, not {image_size}")
        self.config = dict(channels=channels, image_size=image_size, time_steps=time_steps,
                           widths=widths)
        half, quarter = widths  # channels at H/2 and at H/4
        emb = 4 * half
        self.time_mlp = nn.Sequential(nn.Linear(64, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label_embedding = nn.Embedding(NULL_LABEL + 1, emb)
        self.conv_in = nn.Conv2d(4 * channels, half, 3, padding=1)
        self.down1 = ResBlock(half, half, emb)
        self.downsample = nn.Conv2d(half, half, 3, stride=2, padding=1)
        self.down2 = ResBlock(half, quarter, emb)
        self.mid1 = ResBlock(quarter, quarter, emb)
        self.mid2 = ResBlock(quarter, quarter, emb)
        self.up1 = ResBlock(quarter + quarter, quarter, emb)
        self.up2 = ResBlock(quarter + half, quarter, emb)
        self.upsample = nn.Sequential(nn.Upsample(scale_factor=2),
                                      nn.Conv2d(quarter, quarter, 3, padding=1))
        self.up3 = ResBlock(quarter + half, half, emb)
        self.up4 = ResBlock(half + half, half, emb)
        self.conv_out = nn.Conv2d(half, 4 * channels, 3, padding=1)
        self.register_buffer("alphas_cumprod", cumulative_alphas(time_steps), persistent=False)
        nn.init.normal_(self.label_embedding.weight, std=0.5)
        nn.init.zeros_(self.conv_out.weight)

    def embed(self, t, labels):
        """(B,), (B,) -> (B, emb): sinusoids (Vaswani et al. 2017) of 1000 t / T, and the label."""
        frequencies = 10000 ** -torch.linspace(0, 1, 32, device=t.device)
        angles = t[:, None] * (1000 / self.config["time_steps"]) * frequencies
        time = self.time_mlp(torch.cat([angles.cos(), angles.sin()], dim=1))
        return F.silu(time + self.label_embedding(labels))

    def encode(self, x_t, emb):
        """Return the bottleneck (B, quarter, H/4, W/4), and what the way up needs besides."""
        x = F.pixel_unshuffle(x_t, 2).to(memory_format=torch.channels_last)
        h1 = self.conv_in(x)  # (B, half, H/2, W/2)
        h2 = self.down1(h1, emb)
        h3 = self.downsample(h2)  # (B, half, H/4, W/4)
        h4 = self.down2(h3, emb)  # (B, quarter, H/4, W/4)
        return self.mid2(self.mid1(h4, emb), emb), (h1, h2, h3, h4)

    def forward(self, x_t, t, labels):
        """Return eps like x_t (B, C, H, W). t: (B,) in [0, T - 1]; labels: (B,), 0..10, int64."""
        emb = self.embed(t, labels)
        h, (h1, h2, h3, h4) = self.encode(x_t, emb)
        h = self.up1(torch.cat([h, h4], dim=1), emb)
        h = self.up2(torch.cat([h, h3], dim=1), emb)
        h = self.upsample(h)  # (B, quarter, H/2, W/2)
        h = self.up3(torch.cat([h, h2], dim=1), emb)
        h = self.up4(torch.cat([h, h1], dim=1), emb)
        return F.pixel_shuffle(self.conv_out(F.silu(normalize(h))), 2)


# ---- loss ----
def draw_t(batch_size, settings, rng):
    """Return t (B,) int64 in [0, T - 1]: t / T is logit-normal (Esser et al. 2024).

    It is stratified: the i-th t comes from the i-th of B equally likely parts, so that no batch
    has too many large or small t, and the losses of batches differ less.
    """
    part = torch.arange(batch_size, device=rng.device)
    u = (part + torch.rand(batch_size, generator=rng, device=rng.device)) / batch_size
    t = (settings.t_mean + settings.t_std * torch.special.ndtri(u)).sigmoid() * settings.time_steps
    return t.long().clamp(max=settings.time_steps - 1)


def training_loss(network, x_0, t, noise, labels, alphas_cumprod, settings):
    """Return the mean squared error of the predicted noise (DDPM, eq. 14), weighted by t.

    t rises along the batch, see draw_t. In the second quarter, that is for t / T from 0.19 to 0.31,
    the network learns to guide itself: to predict noise + w (eps_label - eps_null) (model guidance,
    Tang et al. 2025, eq. 18). At larger t that would make digits alike (Kynkaanniemi et al. 2024).
    """
    x_t = forward_diffusion_sample(x_0, t, noise, alphas_cumprod)
    second = slice(len(t) // 4, (len(t) + 1) // 2)  # not empty, even of one image
    with torch.autocast(x_0.device.type, torch.bfloat16, enabled=has_bf16(x_0.device)):
        eps = network(x_t, t, labels)
        with torch.no_grad():  # not before the other: autocast would keep weights without gradients
            nulls = torch.full_like(labels[second], NULL_LABEL)
            eps_null = network(x_t[second], t[second], nulls)
    target = noise.clone()
    target[second] += settings.model_guidance * (eps[second].detach() - eps_null)
    weights = alphas_cumprod[t].pow(-settings.loss_power).float()
    return (weights * (eps - target).square().mean((1, 2, 3))).mean()


# ---- optimizer ----
def orthogonalize(matrices):
    """Return matrices (N, rows, columns) with their large singular values brought near 1.

    Newton-Schulz iteration with a quintic polynomial (Jordan et al. 2024). Three steps of it let
    small singular values grow about 40-fold.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(3):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G^2
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a X + (b G + c G^2) X
    return x


class Muon:
    """Momentum, orthogonalized (Jordan et al. 2024): all directions of a kernel learn equally fast.

    Kernels (out, in, k, k) are matrices (out, in * k * k), of one shape in one stack, in float32.
    On a GPU each stack has its own stream: one alone does not fill it.
    """

    def __init__(self, kernels, momentum):
        stacks = {}
        for kernel in kernels:
            stacks.setdefault(kernel.shape, []).append(kernel)
        self.stacks = list(stacks.values())
        self.momentum = momentum
        self.buffers = [torch.zeros_like(torch.stack(stack)).flatten(2) for stack in self.stacks]
        self.rate = torch.zeros((), device=self.buffers[0].device)
        self.streams = [torch.cuda.Stream() if self.rate.is_cuda else None for _ in self.stacks]

    @torch.no_grad()
    def step(self):
        for stack, buffer, stream in zip(self.stacks, self.buffers, self.streams, strict=True):
            if stream:
                stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
                gradients = torch.stack([kernel.grad.flatten(1) for kernel in stack])
                buffer.lerp_(gradients, 1 - self.momentum)
                # Nesterov's momentum
                updates = orthogonalize(gradients.lerp(buffer, self.momentum))
                _, rows, columns = updates.shape
                updates *= self.rate * max(1, rows / columns) ** 0.5
                for kernel, update in zip(stack, updates, strict=True):
                    kernel -= update.view_as(kernel)
        for stream in filter(None, self.streams):
            torch.cuda.current_stream().wait_stream(stream)


# ---- step ----
class State:
    """A run: its settings, and all that training changes."""

    def __init__(self, settings, device):
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.model = SimpleUnet(settings.channels, settings.image_size, settings.time_steps,
                                widths=(settings.width, 2 * settings.width))
        self.model.to(device, memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.model).requires_grad_(False)  # what checkpoints hold
        self.network = self.model  # what the loss is taken of
        self.rank, self.processes = 0, 1
        if dist.is_initialized():
            self.rank, self.processes = dist.get_rank(), dist.get_world_size()
            self.network = nn.parallel.DistributedDataParallel(self.model)
        named = dict(self.model.named_parameters())
        kernels = [name for name, p in named.items()
                   if p.ndim == 4 and name not in ("conv_in.weight", "conv_out.weight")]
        self.muon = Muon([named.pop(name) for name in kernels], settings.muon_momentum)
        self.adamw = torch.optim.AdamW(named.values(), lr=torch.zeros((), device=device),
                                       betas=settings.adamw_betas, weight_decay=0, fused=True,
                                       capturable=True)
        self.decay = torch.zeros((), device=device)  # of the average
        self.rng = torch.Generator(device)
        self.replay = None  # on one GPU, from the second step on: see capture
        self.step = 0  # steps taken
        self.total_loss = torch.zeros((), device=device)  # of the epoch so far
        self.seconds = 0.0  # that the epoch has taken so far
        self.log = []  # a row for each epoch


@torch.no_grad()
def update_average(averages, weights, decay):
    """averages <- decay averages + (1 - decay) weights, for two lists of tensors."""
    torch._foreach_mul_(averages, decay)
    torch._foreach_add_(averages, torch._foreach_mul(weights, 1 - decay))


def update(state, images, labels):
    """Move the weights and their average.

    What varies from step to step is in tensors and the generator, and nothing is read back: a GPU
    is not waited for, and can replay the step.
    """
    settings, rng, model = state.settings, state.rng, state.model
    x_0 = images / 127.5 - 1
    noise = torch.randn(x_0.shape, generator=rng, device=rng.device)
    t = draw_t(len(x_0), settings, rng)
    hidden = torch.rand(len(x_0), generator=rng, device=rng.device) < settings.label_dropout
    labels = labels.masked_fill(hidden, NULL_LABEL)
    share = slice(state.rank, None, state.processes)  # each process draws all, and takes its share
    loss = training_loss(state.network, x_0[share], t[share], noise[share], labels[share],
                         model.alphas_cumprod, settings)
    model.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), settings.max_norm)
    state.muon.step()
    state.adamw.step()
    update_average(list(state.average.parameters()), list(model.parameters()), state.decay)
    state.total_loss += loss.detach()


def capture(state, images, labels):
    """Record update as a CUDA graph, without running it; return a function that replays it.

    Most of the thousand kernels of a step run for less time than it takes to launch them.
    """
    images, labels = images.clone(), labels.clone()  # what the graph reads
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(state.rng)
    with torch.cuda.graph(graph):
        update(state, images, labels)

    def replay(next_images, next_labels):
        images.copy_(next_images)
        labels.copy_(next_labels)
        graph.replay()
    return replay


def training_step(state, images, labels, total_steps):
    """Take the next of total_steps steps, on a batch: images (B, C, H, W) uint8, labels (B,)."""
    settings, n = state.settings, state.step
    state.rng.manual_seed(seed_for("step", settings.seed, n))
    factor = min((n + 1) / settings.warmup_steps, 1 - n / total_steps)
    state.muon.rate.fill_(factor * settings.muon_rate)
    state.adamw.param_groups[0]["lr"].fill_(factor * settings.adamw_rate)
    state.decay.fill_(min(settings.ema_decay, (1 + n) / (10 + n)))
    if state.replay:
        state.replay(images, labels)
    else:
        update(state, images, labels)
        # after a first step, which makes what a capture cannot: AdamW's state, for one
        if state.rng.device.type == "cuda" and state.processes == 1:
            state.replay = capture(state, images, labels)
    state.step += 1


# ---- runs ----
LATEST = "checkpoints/latest.pth"  # what --resume continues from, under the root
SAVE_INTERVAL = 45  # seconds; what is killed loses less than a minute


def plot_losses(path, log):
    """Draw the loss of every epoch. log: State's."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["epoch"] for row in log], [row["loss"] for row in log], marker=".")
    axes.set(xlabel="epoch", ylabel="training loss (weighted MSE of the noise)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.xaxis.get_major_locator().set_params(integer=True)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


def check_finite(state):
    """Raise InputError if the loss is no longer finite: such a state is not worth saving."""
    if not state.total_loss.isfinite():
        raise InputError(f"epoch {len(state.log) + 1}: the loss is no longer finite; begin anew "
                         "with another --seed and --root")


def save_state(state, root):
    """Write all that load_state needs, the log and the loss curve."""
    check_finite(state)
    save_tensors(root / LATEST, dict(
        settings=dataclasses.asdict(state.settings), model=state.model.state_dict(),
        average=state.average.state_dict(), muon=state.muon.buffers,
        adamw=state.adamw.state_dict(), step=state.step, total_loss=state.total_loss,
        seconds=state.seconds, log=state.log))
    if state.log:
        write_csv(root / "datas/train_log.csv", state.log)
        plot_losses(root / "datas/train_log.png", state.log)


def load_state(root, device):
    """Return the State that save_state wrote. Raises InputError where there is none, or damaged."""
    with reading(root / LATEST, "start a run without --resume, or name another --root"):
        saved = load_tensors(root / LATEST, device)
        state = State(Settings(**saved["settings"]), device)
        state.model.load_state_dict(saved["model"])
        state.average.load_state_dict(saved["average"])
        state.adamw.load_state_dict(saved["adamw"])
        state.muon.buffers, state.total_loss = saved["muon"], saved["total_loss"]
        state.step, state.seconds, state.log = saved["step"], saved["seconds"], saved["log"]
    return state


def batches_left(state, n_images):
    """Return the indices of each batch that the epoch still has; (seed, epoch) gives the order."""
    settings, epoch = state.settings, len(state.log)
    rng = generator("cpu", "order", settings.seed, epoch)  # the same order on every device
    order = torch.randperm(n_images, generator=rng, device="cpu").to(state.rng.device)
    batches = order.split(settings.batch_size)
    steps = n_images // settings.batch_size  # what is left over is left out
    return batches[state.step - epoch * steps:steps]


def end_epoch(state, n_images, start, root):
    """Log the epoch, and write its checkpoint if it is the last or one of every save_every."""
    settings, epoch = state.settings, len(state.log) + 1
    check_finite(state)
    if dist.is_initialized():  # what was summed before a resume is the first process's share alone
        dist.all_reduce(state.total_loss)
        state.total_loss /= state.processes
    loss = state.total_loss.item() / (n_images // settings.batch_size)
    seconds = time.perf_counter() - start
    state.log.append(dict(epoch=epoch, loss=round(loss, 6), seconds=round(seconds, 3)))
    state.total_loss.zero_()
    state.seconds = 0.0
    if state.rank == 0 and (epoch % settings.save_every == 0 or epoch == settings.n_epochs):
        # on the CPU, so that torch.load needs no GPU
        weights = {name: values.cpu() for name, values in state.average.state_dict().items()}
        save_tensors(root / f"checkpoints/diffusion_epoch_{epoch}.pth", dict(
            epoch=epoch, model_state_dict=weights, loss=loss, config=state.model.config))


def train(state, images, labels, root, signals):
    """Train to the last epoch, and write checkpoints, the state and the log under root.

    As soon as there is something in the list signals, it saves the state and returns.
    """
    settings, first = state.settings, state.rank == 0
    total_steps = settings.n_epochs * (len(images) // settings.batch_size)
    saved = -math.inf  # so that the first save comes before the first step
    with tqdm(total=total_steps * settings.batch_size, initial=state.step * settings.batch_size,
              unit=" images", unit_scale=True, disable=not first) as bar:
        while len(state.log) < settings.n_epochs:
            bar.set_description(f"epoch {len(state.log) + 1}/{settings.n_epochs}")
            start = time.perf_counter() - state.seconds
            for batch in batches_left(state, len(images)):
                state.seconds = time.perf_counter() - start
                if signals:
                    save_state(state, root)
                    return
                if first and time.perf_counter() - saved > SAVE_INTERVAL:
                    save_state(state, root)
                    saved = time.perf_counter()
                training_step(state, images[batch], labels[batch], total_steps)
                bar.update(settings.batch_size)
            end_epoch(state, len(images), start, root)
            bar.set_postfix(loss=f"{state.log[-1]['loss']:.4f}")
        if first:
            save_state(state, root)


# ---- command line ----
def training_parser():
    parser, add = make_parser(__doc__)

    def add_setting(name, text, **kind):
        add(name, f"{text} (default: {getattr(Settings, name)})", **kind)

    add_setting("n_epochs", "passes over the training images", type=bounded(int, 1))
    add_setting("save_every", "epochs between checkpoints", type=bounded(int, 1))
    add_setting("batch_size", "images in a step", type=bounded(int, 1, 60_000))
    add_setting("image_size", "pixels a side, a multiple of 4", type=bounded(int, 4, 256))
    add_setting("channels", "1: grey; 3: RGB, all the same", type=int, choices=(1, 3))
    add_setting("time_steps", "T, the steps of the diffusion", type=bounded(int, 21, 10_000))
    add_setting("width", "channels at half the size; twice as many at a quarter of it",
                type=bounded(int, 1, 1024))
    add_setting("seed", "of all random numbers", type=bounded(int, 0))
    parser.add_argument("--resume", action="store_true", help="go on with the run under --root; "
                        "n_epochs and save_every may be changed")
    return parser


def start_state(args, device):
    """Return the State of a new run or, with --resume, of the one under args.root."""
    latest = args.root / LATEST
    given = {name: value for name, value in vars(args).items()
             if hasattr(Settings, name) and value is not None}
    if not args.resume:
        go_on = "go on with it by --resume, " if latest.exists() else ""
        for path in [latest, *epoch_checkpoints(args.root).values()]:
            if path.exists():
                raise InputError(f"{path} is of an earlier run: {go_on}remove it, or choose "
                                 "another --root")
        return State(Settings(**given), device)
    state = load_state(args.root, device)
    kept = dataclasses.asdict(state.settings)
    del kept["n_epochs"], kept["save_every"]
    refuse_contradictions(args, kept, latest)
    state.settings = dataclasses.replace(state.settings, **given)
    if len(state.log) >= state.settings.n_epochs:
        raise InputError(f"{latest} has had its {len(state.log)} epochs: ask for more by "
                         "--n_epochs")
    return state


def start_processes(device):
    """Join the processes that torchrun has started, if it has. Return this process's device.

    A GPU becomes the current one, to which streams and graphs belong.
    """
    launched = dist.is_torchelastic_launched()
    if device != "cpu":
        number = dist.get_node_local_rank() if launched else torch.device(device).index or 0
        device = f"cuda:{number}"
        torch.cuda.set_device(device)
    if launched:
        dist.init_process_group()
    return torch.device(device)


def catch_signals():
    """Return a list to which the first SIGINT or SIGTERM is added; a second one acts as usual.

    With several processes it stays empty: they would have to agree at every step.
    """
    signals = []

    def note(number, frame):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    if not dist.is_initialized():
        signal.signal(signal.SIGINT, note)
        signal.signal(signal.SIGTERM, note)
    return signals


def main(argv=None):
    args = training_parser().parse_args(argv)
    device = start_processes(args.device)
    state = start_state(args, device)
    settings = state.settings
    if settings.batch_size % state.processes:
        raise InputError(f"--batch_size {settings.batch_size} cannot be shared evenly among "
                         f"{state.processes} processes")
    images, labels = load_mnist(True, settings.image_size, settings.channels, device)
    if state.rank == 0:
        print(f"training {sum(p.numel() for p in state.model.parameters()):,} weights on {device}, "
              f"in {'bfloat16' if has_bf16(device) else 'float32'}", flush=True)
    signals = catch_signals()
    train(state, images, labels, args.root, signals)
    if len(state.log) < settings.n_epochs:
        print(f"stopped in epoch {len(state.log) + 1}; go on by "
              f"python src/train.py --root {args.root} --resume", file=sys.stderr)
        sys.exit(128 + signals[0])
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
