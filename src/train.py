"""Train a class-conditional diffusion model on MNIST.

    python src/train.py                                               1000 epochs, meant for a GPU
    python src/train.py --n_epochs 2 --batch_size 64 --save_every 1   a few minutes on a laptop

The file reads forwards, as an image travels: settings, data, noise, network, loss, step. Then come
the run with its files, and the command line.
"""
import argparse
import contextlib
import copy
import dataclasses
import gzip
import math
import signal
import statistics
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from common import (REPOSITORY, UserError, bf16_is_faster, bounded, epoch_checkpoints,
                    explain_read_errors, generator, label_log_axis, load_tensors, make_parser,
                    refuse_contradictions, replacing, run_script, save_tensors, seed_for, write_csv)
from muon import Muon

NULL_LABEL = 10  # stands for "any digit"


# ---- settings ----
def setting(default, text, **options):
    """Return a field of Settings. text and options describe its flag, as argparse wants them."""
    return dataclasses.field(default=default, metadata=dict(help=text, **options))


@dataclasses.dataclass
class Settings:
    """All that determines a run besides the code and the device. Each field is a flag of train.py.

    docs/measurements.md says what the choices of the recipe are worth.
    """
    n_epochs: int = setting(1000, "passes over the training images", type=bounded(int, 1))
    save_every: int = setting(10, "epochs between checkpoints", type=bounded(int, 1))
    batch_size: int = setting(256, "images in a step", type=bounded(int, 1, 60_000))
    image_size: int = setting(28, "pixels a side, a multiple of 4", type=int)
    channels: int = setting(1, "1: grey; 3: RGB, all the same", type=int, choices=(1, 3))
    time_steps: int = setting(1000, "T, the steps of the diffusion", type=bounded(int, 21, 10_000))
    width: int = setting(32, "channels at half resolution; doubled at quarter resolution",
                         type=bounded(int, 1, 1024))
    seed: int = setting(0, "seed of all random numbers", type=bounded(int, 0))

    # logit(t / T) is normal, so that half of all t / T lie from 0.19 to 0.47. There a digit takes
    # its shape. At much larger t there is little to see but noise, at much smaller t little to do.
    t_mean: float = setting(-0.8, "mean of logit(t / T) in training", type=bounded(float, -9, 9))
    t_std: float = setting(1.0, "standard deviation of logit(t / T)", type=bounded(float, 0.001))

    # 0 makes it the plain squared error of v, 2 that of the noise, which is DDPM's loss.
    loss_power: float = setting(1.0, "squared errors of v are weighted by alpha_t to this power",
                                type=bounded(float, -9, 9))

    # Sampling clips images to [-1, 1]. So where the target is black or white, overshooting costs
    # nothing.
    clamp: float = setting(1.0, "no error where prediction and target are both at least clamp "
                           "or both at most -clamp",
                           type=bounded(float, 1, math.inf))

    # The network learns the null label, too, for guidance.
    label_dropout: float = setting(0.05, "share of labels replaced by the null label",
                                   type=bounded(float, 0, 1))

    # For t / T from guided_min to guided_max the network learns its own guided prediction. At
    # larger t that would make digits alike.
    model_guidance: float = setting(0.6, "w of model guidance in training; 0: none",
                                    type=bounded(float, 0, 0.95))
    guided_min: float = setting(0.19, "model guidance begins at this t / T",
                                type=bounded(float, 0.05, 0.95))
    guided_max: float = setting(0.31, "model guidance ends before this t / T",
                                type=bounded(float, 0.05, 0.95))

    # Both learning rates decay linearly to 0 over the run.
    muon_rate: float = setting(0.02, "initial learning rate of Muon", type=bounded(float, 0))
    adam_rate: float = setting(0.007, "initial learning rate of Adam", type=bounded(float, 0))
    muon_momentum: float = setting(0.95, "Nesterov momentum of Muon", type=bounded(float, 0, 1))
    max_norm: float = setting(1.0, "gradients are clipped to this norm",
                              type=bounded(float, 0, math.inf))
    ema_decay: float = setting(0.9999, "the EMA's decay rises to this",
                               type=bounded(float, 0, 1))

    def __post_init__(self):
        if self.guided_min >= self.guided_max:
            raise UserError(f"--guided_min {self.guided_min} must be below --guided_max "
                            f"{self.guided_max}")


# ---- data ----
def read_archive(path, header):
    """Return the bytes of a gzipped file of MNIST's, less its header, as a flat uint8 tensor."""
    return torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())), dtype=torch.uint8,
                            offset=header)


def load_mnist(part, image_size=28, channels=1, device="cpu"):
    """Return MNIST's "train" or "test" split, on the device.

    images: (N, C, H, W) uint8, resized bilinearly with antialiasing where the size is not 28,
    grey copied to all channels; labels: (N,) int64. The training images take 47 MB at their own
    size, so they stay on the device and no step waits for data. Raises UserError where an archive
    is missing or damaged.
    """
    folder = REPOSITORY / "mnist/MNIST/raw"
    name = {"train": "train", "test": "t10k"}[part]
    with explain_read_errors(folder, "restore it, in a clone by 'git checkout mnist'"):
        images = read_archive(folder / f"{name}-images-idx3-ubyte.gz", 16).view(-1, 1, 28, 28)
        labels = read_archive(folder / f"{name}-labels-idx1-ubyte.gz", 8).long()
    resized = [resize(batch, [image_size, image_size]) for batch in images.split(1000)]
    return torch.cat(resized).to(device).expand(-1, channels, -1, -1), labels.to(device)


# ---- noise ----
def linear_beta_schedule(time_steps):
    """Return betas (T,) in float64: linear from 1e-4 to 0.02 at T = 1000 (DDPM, section 4).

    Other T scale both ends by 1000 / T, so that for every T from 21 on alphas_cumprod ends near 0:
    the last x_t is almost pure noise.
    """
    scale = 1000 / time_steps
    return torch.linspace(1e-4 * scale, 0.02 * scale, time_steps, dtype=torch.float64)


def cumulative_alphas(time_steps):
    """Return alphas_cumprod (T,) in float64, what is left of x_0's variance in x_t."""
    return (1 - linear_beta_schedule(time_steps)).cumprod(0)


def alpha_and_sigma(t, alphas_cumprod):
    """Return alpha_t and sigma_t, (B, 1, 1, 1) in float32: the coefficients of x_0 and noise.

    t: (B,) int64 in [0, T - 1]; alphas_cumprod: (T,) float64.
    """
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    return a.sqrt().float(), (1 - a).sqrt().float()


def forward_diffusion_sample(x_0, noise, alpha_t, sigma_t):
    """Return x_t (B, C, H, W), drawn from q(x_t | x_0) by noise ~ N(0, 1) (DDPM, eq. 4)."""
    return alpha_t * x_0 + sigma_t * noise


def x_0_from_v(v, x_t, alpha_t, sigma_t):
    """Return the clean image that v = alpha_t noise - sigma_t x_0 implies (Salimans, Ho 2022).

    alpha_t, sigma_t: as alpha_and_sigma returns them, or floats.
    """
    return alpha_t * x_t - sigma_t * v


# ---- network ----
def normalize(x):
    """Give each image, over all channels, mean 0 and variance 1: GroupNorm with one group.

    F.group_norm is slow for channels_last, the order in which x lies in memory. With the channels
    as the last dimension F.layer_norm computes the same. Autocast is switched off here, for it
    would cast x to float32 first.
    """
    x = x.permute(0, 2, 3, 1)
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, x.shape[1:]).permute(0, 3, 1, 2)


def convolution(c_in, c_out, **options):
    """A convolution of 3 x 3, padded with zeros. A bias gained nothing that could be measured."""
    return nn.Conv2d(c_in, c_out, 3, padding=1, bias=False, **options)


class ResBlock(nn.Module):
    """(B, c_in, H, W), (B, 2 c_out, 1, 1) -> (B, c_out, H, W): two convolutions and a shortcut.

    Between them is adaptive group normalization, by which t and the label reach the block. The
    second convolution starts from zero, so that a new block is its shortcut.
    """

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv1 = convolution(c_in, c_out)
        self.conv2 = convolution(c_out, c_out)
        nn.init.zeros_(self.conv2.weight)
        self.skip = nn.Conv2d(c_in, c_out, 1, bias=False) if c_in != c_out else nn.Identity()

    def forward(self, x, scale_shift):
        h = self.conv1(F.silu(x))
        scale, shift = scale_shift.chunk(2, dim=1)
        h = torch.addcmul(shift, normalize(h), 1 + scale)
        return self.skip(x) + self.conv2(F.silu(h))


class SimpleUnet(nn.Module):
    """A U-Net that predicts v, like x_t in shape, given x_t, t and the digit.

    Squares of 2 x 2 pixels enter as channels (space to depth), which cuts the cost of the first
    layers to a quarter. The network works at half and at quarter resolution; image_size is a
    multiple of 4. Skip connections carry fine detail from the encoder to the decoder.
    """

    def __init__(self, image_size=28, channels=1, time_steps=1000, widths=(32, 64)):
        super().__init__()
        if image_size not in range(4, 257, 4):
            raise UserError(f"image_size must be a multiple of 4 up to 256, not {image_size}")
        # a checkpoint holds it, to build the network again
        self.config = dict(image_size=image_size, channels=channels, time_steps=time_steps,
                           widths=widths)
        half, quarter = widths  # channels at H/2 and at H/4
        emb_width = 4 * half
        self.time_mlp = nn.Sequential(nn.Linear(64, emb_width), nn.SiLU(),
                                      nn.Linear(emb_width, emb_width))
        self.label_embedding = nn.Embedding(NULL_LABEL + 1, emb_width)
        self.conv_in = convolution(4 * channels, half)
        self.down1 = ResBlock(half, half)
        self.downsample = convolution(half, half, stride=2)
        self.down2 = ResBlock(half, quarter)
        self.mid1 = ResBlock(quarter, quarter)
        self.mid2 = ResBlock(quarter, quarter)
        self.up1 = ResBlock(quarter + quarter, quarter)
        self.up2 = ResBlock(quarter + half, quarter)
        self.up3 = ResBlock(quarter + half, half)
        self.up4 = ResBlock(half + half, half)
        self.conv_out = nn.Conv2d(half, 4 * channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)
        # One layer makes the scales and the shifts of all blocks.
        self.scale_shift_sizes = [2 * block.conv2.out_channels for block in self.children()
                                  if isinstance(block, ResBlock)]
        self.scale_shifts = nn.Linear(emb_width, sum(self.scale_shift_sizes))

    def embed(self, t, labels):
        """(B,), (B,) -> eight tensors (B, 2 c, 1, 1): what t and the label tell each block.

        t enters as sinusoids (Vaswani et al. 2017) of 1000 t / T.
        """
        frequencies = 10000 ** -torch.linspace(0, 1, 32, device=t.device)
        angles = t[:, None] * (1000 / self.config["time_steps"]) * frequencies
        time_emb = self.time_mlp(torch.cat([angles.cos(), angles.sin()], dim=1))
        emb = F.silu(time_emb + self.label_embedding(labels))
        return self.scale_shifts(emb)[:, :, None, None].split(self.scale_shift_sizes, dim=1)

    def encode(self, x_t, scale_shifts):
        """Return the bottleneck (B, quarter, H/4, W/4) and the tensors of the skip connections."""
        s1, s2, s3, s4, *_ = scale_shifts
        x = F.pixel_unshuffle(x_t, 2).to(memory_format=torch.channels_last)
        h1 = self.conv_in(x)  # (B, half, H/2, W/2)
        h2 = self.down1(h1, s1)
        h3 = self.downsample(h2)  # (B, half, H/4, W/4)
        h4 = self.down2(h3, s2)  # (B, quarter, H/4, W/4)
        return self.mid2(self.mid1(h4, s3), s4), (h1, h2, h3, h4)

    def forward(self, x_t, t, labels):
        """Return v like x_t (B, C, H, W). t: (B,) in [0, T - 1]; labels: (B,), 0..10, int64."""
        scale_shifts = self.embed(t, labels)
        *_, s5, s6, s7, s8 = scale_shifts
        h, (h1, h2, h3, h4) = self.encode(x_t, scale_shifts)
        h = self.up1(torch.cat([h, h4], dim=1), s5)
        h = self.up2(torch.cat([h, h3], dim=1), s6)
        h = F.interpolate(h, scale_factor=2)  # (B, quarter, H/2, W/2), by copying
        h = self.up3(torch.cat([h, h2], dim=1), s7)
        h = self.up4(torch.cat([h, h1], dim=1), s8)
        return F.pixel_shuffle(self.conv_out(F.silu(normalize(h))), 2)


# ---- loss ----
def draw_t(batch_size, settings, rng):
    """Return t (B,) int64 in [0, T - 1], rising: t / T is logit-normal (Esser et al. 2024).

    They are stratified: the i-th t comes from the i-th of B equiprobable strata, so that no batch
    has too many large or small t, and the losses of batches differ less.
    """
    stratum = torch.arange(batch_size, device=rng.device)
    u = (stratum + torch.rand(batch_size, generator=rng, device=rng.device)) / batch_size
    t = (settings.t_mean + settings.t_std * torch.special.ndtri(u)).sigmoid() * settings.time_steps
    return t.long().clamp(max=settings.time_steps - 1)


def guided_part(t, settings):
    """Return the slice of a batch whose t may lie in the guided interval, and where they do.

    t: (B,), as draw_t returns it. A CUDA graph needs fixed shapes, so the slice depends on B, not
    on t. As t is stratified, at most two of its images lie outside the interval. The second result
    is a mask, (n, 1, 1, 1).
    """
    steps = settings.time_steps
    first, last = (round(bound * steps) for bound in (settings.guided_min, settings.guided_max))
    logit_t = statistics.NormalDist(settings.t_mean, settings.t_std)
    begin, end = (logit_t.cdf(math.log(k / (steps - k))) * len(t) for k in (first, last))
    part = slice(math.floor(begin), math.ceil(end))
    inside = (first <= t[part]) & (t[part] < last)
    return part, inside.view(-1, 1, 1, 1)


def training_loss(model, x_0, t, noise, labels, alphas_cumprod, settings):
    """Return the mean squared error of v, weighted by alpha_t^loss_power, with two changes.

    1. Where the target is black, a prediction darker than black is no error, and likewise for
       white (see Settings.clamp).
    2. In the guided interval the target is not x_0 but x_0 + w (x_label - x_null): model guidance
       (Tang et al. 2025; in an interval: Kynkäänniemi et al. 2024).

    Both concern x_0, so the error of v is computed as that of x_0, divided by sigma_t.

    x_0, noise: (B, C, H, W); t: (B,) int64, sorted and stratified, as draw_t returns it; labels:
    (B,) int64, 0..10; alphas_cumprod: (T,) float64.
    """
    alpha_t, sigma_t = alpha_and_sigma(t, alphas_cumprod)
    x_t = forward_diffusion_sample(x_0, noise, alpha_t, sigma_t)
    target = x_0.clone()
    with torch.autocast(x_0.device.type, torch.bfloat16, enabled=bf16_is_faster(x_0.device)):
        predicted = x_0_from_v(model(x_t, t, labels), x_t, alpha_t, sigma_t)
        if settings.model_guidance:
            # Autocast keeps the weights that it has cast. Casts made under no_grad carry no
            # gradient, so the pass that needs gradients goes first.
            with torch.no_grad():
                part, inside = guided_part(t, settings)
                nulls = torch.full_like(labels[part], NULL_LABEL)
                v_null = model(x_t[part], t[part], nulls)
                x_null = x_0_from_v(v_null, x_t[part], alpha_t[part], sigma_t[part])
                direction = predicted[part].clamp(-1, 1) - x_null.clamp(-1, 1)
                target[part] += settings.model_guidance * inside * direction
    clamp = settings.clamp
    is_right = predicted.clamp(-clamp, clamp) == target.clamp(-clamp, clamp)
    v_errors = ((predicted - target) / sigma_t).masked_fill(is_right, 0)
    return (alpha_t ** settings.loss_power * v_errors.square()).mean()


# ---- step ----
def split_weights(model):
    """Return (kernels, others): what Muon moves, and what is left for Adam.

    Muon is for the convolutions of hidden layers, not for the first and the last.
    """
    kernels, others = [], []
    for name, weights in model.named_parameters():
        if weights.ndim == 4 and name not in ("conv_in.weight", "conv_out.weight"):
            kernels.append(weights)
        else:
            others.append(weights)
    return kernels, others


class State:
    """A run at one moment: its settings and all that training changes.

    state_dict and load_state_dict turn it into what a file can hold, and back.
    """

    def __init__(self, settings, device):
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.model = SimpleUnet(settings.image_size, settings.channels, settings.time_steps,
                                widths=(settings.width, 2 * settings.width))
        self.model.to(device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)  # what checkpoints hold
        self.alphas_cumprod = cumulative_alphas(settings.time_steps).to(device)
        kernels, others = split_weights(self.model)
        self.muon = Muon(kernels, settings.muon_momentum)
        # The learning rate is a tensor, so that a CUDA graph reads its present value. Without
        # capturable torch would refuse to record Adam's step.
        self.adam = torch.optim.Adam(others, lr=torch.zeros((), device=device), fused=True,
                                     capturable=True)
        self.ema_decay = torch.zeros((), device=device)
        self.rng = torch.Generator(device)
        self.rank, self.processes = 0, 1
        if dist.is_initialized():
            self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        self.replay = None  # on one GPU, from the second step on: see capture
        self.steps_taken = 0
        self.total_loss = torch.zeros((), device=device)  # of the epoch's steps so far
        self.seconds = 0.0  # that the epoch has taken so far
        self.log = []  # a row for each epoch that has ended

    def state_dict(self):
        """Return all that load_state_dict needs to go on, as plain types and tensors."""
        return dict(settings=dataclasses.asdict(self.settings), model=self.model.state_dict(),
                    ema=self.ema.state_dict(), muon=self.muon.buffers, adam=self.adam.state_dict(),
                    step=self.steps_taken, total_loss=self.total_loss, seconds=self.seconds,
                    log=self.log)

    def load_state_dict(self, saved):
        """Go on from what state_dict returned, for the same settings."""
        self.model.load_state_dict(saved["model"])
        self.ema.load_state_dict(saved["ema"])
        rate = self.adam.param_groups[0]["lr"]
        self.adam.load_state_dict(saved["adam"])
        self.adam.param_groups[0]["lr"] = rate  # on the device, where a graph reads it
        for buffer, values in zip(self.muon.buffers, saved["muon"], strict=True):
            buffer.copy_(values)
        self.total_loss.copy_(saved["total_loss"])
        self.steps_taken, self.seconds = saved["step"], saved["seconds"]
        self.log = saved["log"]


def average_over_processes(tensors, processes):
    """Replace each tensor by its mean over all processes, with one all_reduce."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    means = (flat / processes).split([tensor.numel() for tensor in tensors])
    for tensor, mean in zip(tensors, means, strict=True):
        tensor.copy_(mean.view_as(tensor))


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema <- decay ema + (1 - decay) model, for all weights; decay: a tensor ()."""
    averages = list(ema.parameters())
    weights = list(model.parameters())
    torch._foreach_mul_(averages, decay)
    torch._foreach_add_(averages, torch._foreach_mul(weights, 1 - decay))


def training_step(state, images, labels):
    """Move the weights by the loss of one batch: images (B, C, H, W) uint8, labels (B,).

    Whatever differs from step to step is in tensors and in the generator, and no value is read
    back: the CPU never waits for a GPU, and a GPU can replay the step as a graph.
    """
    settings, rng = state.settings, state.rng
    x_0 = images / 127.5 - 1
    noise = torch.randn(x_0.shape, generator=rng, device=rng.device)
    t = draw_t(len(x_0), settings, rng)
    dropped = torch.rand(len(x_0), generator=rng, device=rng.device) < settings.label_dropout
    labels = labels.masked_fill(dropped, NULL_LABEL)
    # Each process draws for the whole batch and takes every n-th image, so that n processes see
    # what one would see.
    own = slice(state.rank, None, state.processes)
    loss = training_loss(state.model, x_0[own], t[own], noise[own], labels[own],
                         state.alphas_cumprod, settings)
    state.model.zero_grad()
    loss.backward()
    loss = loss.detach()
    weights = list(state.model.parameters())
    if state.processes > 1:
        average_over_processes([loss, *(p.grad for p in weights)], state.processes)
    nn.utils.clip_grad_norm_(weights, settings.max_norm)
    state.muon.step()
    state.adam.step()
    update_ema(state.ema, state.model, state.ema_decay)
    state.total_loss += loss


def capture(state, images, labels):
    """Record training_step as a CUDA graph, without running it; return a function that replays it.

    A step is a thousand CUDA kernels, and most of them run faster than the CPU can launch them. A
    graph is launched as a whole.
    """
    images, labels = images.clone(), labels.clone()  # the graph reads from these addresses
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(state.rng)
    with torch.cuda.graph(graph):
        training_step(state, images, labels)

    def replay(next_images, next_labels):
        images.copy_(next_images)
        labels.copy_(next_labels)
        graph.replay()
    return replay


def set_rates(state, total_steps):
    """Set the learning rates and the EMA's decay for the next of total_steps steps."""
    settings, n = state.settings, state.steps_taken
    remaining = 1 - n / total_steps
    state.muon.rate.fill_(remaining * settings.muon_rate)
    state.adam.param_groups[0]["lr"].fill_(remaining * settings.adam_rate)
    # A warm-up: the EMA spans about a tenth of the steps taken, and soon forgets the initial
    # weights.
    state.ema_decay.fill_(min(settings.ema_decay, (1 + n) / (10 + n)))


def take_step(state, images, labels, total_steps):
    """Take the next of total_steps steps, on a batch: images (B, C, H, W) uint8, labels (B,)."""
    state.rng.manual_seed(seed_for("step", state.settings.seed, state.steps_taken))
    set_rates(state, total_steps)
    if state.replay:
        state.replay(images, labels)
    else:
        training_step(state, images, labels)
        # The first step runs eagerly: Adam makes its state in it, which a capture cannot. The steps
        # of several processes, with their all_reduce, are not captured.
        if state.rng.device.type == "cuda" and not dist.is_initialized():
            state.replay = capture(state, images, labels)
    state.steps_taken += 1


# ---- run ----
LATEST = "checkpoints/latest.pth"  # what --resume continues from, under the root
SAVE_INTERVAL = 45  # seconds


def plot_losses(path, log):
    """Draw the loss of every epoch. log: State's."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["epoch"] for row in log], [row["loss"] for row in log], marker=".")
    axes.set(xlabel="epoch", ylabel="training loss (weighted MSE)", xscale="log", yscale="log")
    label_log_axis(axes.xaxis)
    label_log_axis(axes.yaxis, multiples=(1, 2, 3, 4, 6, 8))
    axes.grid(alpha=0.3)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


def check_finite(state):
    """Raise UserError if a weight is not finite: that is not worth saving.

    Checking the EMA is enough: it never recovers from a weight that is not finite.
    """
    if not all(weights.isfinite().all() for weights in state.ema.parameters()):
        raise UserError(f"training has diverged by step {state.steps_taken}: start again with "
                        "lower learning rates or another --seed, and another --root")


def save_state(state, root):
    """Write all that load_state needs, the log and the loss curve."""
    check_finite(state)
    save_tensors(root / LATEST, state.state_dict())
    if state.log:
        write_csv(root / "datas/train_log.csv", state.log)
        plot_losses(root / "datas/train_log.png", state.log)


def load_state(root, device):
    """Return the State that save_state wrote.

    Raises UserError where it is missing, damaged, or has other weights or unknown settings.
    """
    path = root / LATEST
    advice = "start a run without --resume, or choose another --root"
    with explain_read_errors(path, advice):
        saved = load_tensors(path)
        settings = Settings(**saved["settings"])
    state = State(settings, device)  # outside: a lack of memory is no fault of the file
    with explain_read_errors(path, advice):
        state.load_state_dict(saved)
    return state


def save_checkpoint(state, root):
    """Write checkpoints/diffusion_epoch_{N}.pth, the model after N epochs, on the CPU."""
    check_finite(state)
    weights = {name: values.cpu() for name, values in state.ema.state_dict().items()}
    last = state.log[-1]
    save_tensors(root / f"checkpoints/diffusion_epoch_{last['epoch']}.pth", dict(
        epoch=last["epoch"], model_state_dict=weights, loss=last["loss"],
        config=dict(state.model.config, predicts="v")))


def epoch_batches(settings, epoch, n_images, device):
    """Return the indices of the images in each batch of an epoch; the first epoch is 0.

    The order depends on the seed and the epoch, on every device alike. The images left over, too
    few for a batch, are not used in this epoch.
    """
    rng = generator("cpu", "order", settings.seed, epoch)
    order = torch.randperm(n_images, generator=rng).to(device)
    return order.split(settings.batch_size)[:n_images // settings.batch_size]


def end_epoch(state, steps_per_epoch, start):
    """Log the finished epoch, which began at time.perf_counter() = start, and reset its sums."""
    loss = state.total_loss.item() / steps_per_epoch  # waits for a GPU's last steps
    seconds = time.perf_counter() - start
    state.log.append(dict(epoch=len(state.log) + 1, loss=round(loss, 6),
                          seconds=round(seconds, 3)))
    state.total_loss.zero_()
    state.seconds = 0.0


def train(state, images, labels, root, signals):
    """Train to the last epoch, and write checkpoints, the state and the log under root.

    It saves the state and returns once the list signals is not empty.
    """
    settings = state.settings
    is_first_process = state.rank == 0  # it alone writes
    steps_per_epoch = len(images) // settings.batch_size
    total_steps = settings.n_epochs * steps_per_epoch
    last_save = -math.inf  # saves before the first step, so an unwritable root fails at once
    with tqdm(total=total_steps * settings.batch_size, unit=" images", unit_scale=True,
              initial=state.steps_taken * settings.batch_size, disable=not is_first_process) as bar:
        while len(state.log) < settings.n_epochs:
            epoch = len(state.log)
            bar.set_description(f"epoch {epoch + 1}/{settings.n_epochs}")
            start = time.perf_counter() - state.seconds  # as if it had never been stopped
            batches = epoch_batches(settings, epoch, len(images), images.device)
            already_taken = state.steps_taken - epoch * steps_per_epoch  # not 0 after a resume
            for batch in batches[already_taken:]:
                state.seconds = time.perf_counter() - start
                if signals:
                    save_state(state, root)
                    return
                if is_first_process and time.perf_counter() - last_save > SAVE_INTERVAL:
                    save_state(state, root)
                    last_save = time.perf_counter()
                take_step(state, images[batch], labels[batch], total_steps)
                bar.update(settings.batch_size)
            end_epoch(state, steps_per_epoch, start)
            bar.set_postfix(loss=f"{state.log[-1]['loss']:.4f}")
            if is_first_process and (len(state.log) % settings.save_every == 0
                                     or len(state.log) == settings.n_epochs):
                save_checkpoint(state, root)
        if is_first_process:
            save_state(state, root)


# ---- command line ----
def training_parser():
    """Return a parser with a flag for each field of Settings.

    A flag that is not given is absent from the arguments.
    """
    parser = make_parser(__doc__)
    for field in dataclasses.fields(Settings):
        options = dict(field.metadata)
        options["help"] += f" (default: {field.default})"
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, **options)
    parser.add_argument("--resume", action="store_true", help="continue the run under --root; "
                        "n_epochs and save_every may be changed, and with n_epochs the learning "
                        "rates jump to where they would be in the longer run")
    return parser


def refuse_overwriting(root):
    """Raise UserError if there is a run under root, so that no second run overwrites it."""
    latest = root / LATEST
    if latest.exists():
        raise UserError(f"{latest} is of an earlier run: continue it with --resume, remove it, or "
                        "choose another --root")
    checkpoints = [*epoch_checkpoints(root).values()]
    if checkpoints:
        raise UserError(f"{checkpoints[0]} is of an earlier run: remove it, or choose another "
                        "--root")


def start_state(args, device):
    """Return the State of a new run or, with --resume, of the one under args.root."""
    names = {field.name for field in dataclasses.fields(Settings)}
    given = {name: value for name, value in vars(args).items() if name in names}
    if not args.resume:
        refuse_overwriting(args.root)
        return State(Settings(**given), device)
    state = load_state(args.root, device)
    kept = dataclasses.asdict(state.settings)
    del kept["n_epochs"], kept["save_every"]
    refuse_contradictions(args, kept, args.root / LATEST)
    state.settings = dataclasses.replace(state.settings, **given)
    if len(state.log) >= state.settings.n_epochs:
        raise UserError(f"{args.root / LATEST} has trained {len(state.log)} epochs already: ask "
                        "for more by --n_epochs")
    return state


def choose_device(name):
    """Return the torch.device of this process: torchrun gives each process a GPU of its own.

    A GPU is made the current device, on which streams and graphs are created.
    """
    device = torch.device(name)
    if device.type == "cuda":
        # plain "cuda" has no index, and is the first
        device = torch.device("cuda", dist.get_node_local_rank(device.index or 0))
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def catch_signals():
    """Yield a list to which a first SIGINT or SIGTERM is added; a second one acts as usual.

    With several processes nothing is caught: they would have to agree at every step.
    """
    caught = () if dist.is_initialized() else (signal.SIGINT, signal.SIGTERM)
    usual = {number: signal.getsignal(number) for number in caught}
    signals = []

    def note(number, frame):
        signals.append(number)
        signal.signal(number, usual[number])

    for number in caught:
        signal.signal(number, note)
    try:
        yield signals
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def main(argv=None):
    """Train. Return None or, where a signal ended the run, 128 + its number."""
    args = training_parser().parse_args(argv)
    device = choose_device(args.device)
    if dist.is_torchelastic_launched():
        dist.init_process_group()
    state = start_state(args, device)
    settings = state.settings
    if settings.batch_size % state.processes:
        raise UserError(f"--batch_size {settings.batch_size} cannot be shared evenly among "
                        f"{state.processes} processes")
    images, labels = load_mnist("train", settings.image_size, settings.channels, device)
    if state.rank == 0:
        print(f"training {sum(p.numel() for p in state.model.parameters()):,} weights on {device}, "
              f"in {'bfloat16' if bf16_is_faster(device) else 'float32'}", flush=True)
    with catch_signals() as signals:
        train(state, images, labels, args.root, signals)
    if dist.is_initialized():
        dist.destroy_process_group()
    if len(state.log) < settings.n_epochs:
        print(f"stopped in epoch {len(state.log) + 1}; continue with: "
              f"python src/train.py --root {args.root} --resume", file=sys.stderr)
        return 128 + signals[0]  # as shells say that a signal ended a process


if __name__ == "__main__":
    run_script(main)
