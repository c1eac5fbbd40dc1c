"""What the three scripts share beside the model: errors and signals, devices and processes, files, flags."""
import argparse
import contextlib
import csv
import ctypes
import io
import os
import re
import signal
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

try:
    import fcntl
except ImportError:  # on Windows, where nothing keeps two runs from one root
    fcntl = None

REPOSITORY = Path(__file__).resolve().parent.parent  # MNIST and the released weights lie here, wherever one stands


# ---- errors and signals ----
class InputError(ValueError):
    """Bad input from outside, a flag or a file: a script reports it in one line."""


def run(main):
    """Run a script's main; bad input ends it with one line on stderr and exit code 1, Ctrl-C with 130."""
    name = Path(sys.argv[0]).name
    try:
        main()
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"{name}: error: {' '.join(str(error).split())}")  # one line
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def catching(*signals):
    """Yield a list that takes up these signals' numbers when they come, and keep them from doing anything else."""
    caught = []
    handlers = {number: signal.signal(number, lambda number, _: caught.append(number)) for number in signals}
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ---- devices and processes ----
def has_bf16(device):
    """Whether the device computes in bfloat16 (most CPUs only emulate it, slowly)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    cpu = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and any(map(cpu.get, ("avx512_bf16", "amx_bf16", "bf16")))


def keep_freed_memory():
    """Let the C library keep what is freed, as each step needs the same again: 5 to 15 % of the time. glibc alone."""
    with contextlib.suppress(AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD


def generator(device, *key):
    """Return a torch.Generator on the device whose draws depend on the key alone: seed, purpose, number.

    Purposes: 0 the order of an epoch, 1 a step of training, 2 a chunk of samples, 3 the noise of an evaluation.
    """
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64).item()
    return torch.Generator(device).manual_seed(seed)


def is_first():
    """Whether this process is the only one or, of several, the one that writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def greatest(signals):
    """Return the greatest number in the lists of all processes, 0 if they are empty."""
    number = torch.tensor(max(signals, default=0))  # on the CPU: no GPU has to wait
    if dist.is_initialized():
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


@contextlib.contextmanager
def in_turn():
    """Let the processes go through the block one after another."""
    rank, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 0)
    for _ in range(rank):
        dist.barrier()
    yield
    for _ in range(rank, count):
        dist.barrier()


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
    """Open a file for writing bytes that takes path's place when all is written: readers see the old one or the new.

    Raises InputError, with the old file as it was, where it cannot be written: on a full disk, say.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): make room, or choose another place; "
                         "what it held is kept") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def locked(path):
    """Hold an exclusive lock on the file, until this process ends at the latest, for all those that train together.

    Raises InputError where another one holds it.
    """
    with open(path, "w") as file:
        try:
            if fcntl and is_first():
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{path} is locked, another run trains there: wait, or choose another --root") from error
        except OSError:  # a file system without locks, as on some clusters
            pass
        yield


def save_tensors(path, content):
    """Write the content, plain types and tensors, as torch.save does."""
    torch.save(content, buffer := io.BytesIO())  # not at once to the file: what a full disk raises would not be clear
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def load_tensors(path):
    """Return what save_tensors wrote. Damage raises nearly any exception; nothing that the file holds is executed."""
    with zipfile.ZipFile(path) as file:
        if file.testzip():  # check sums, at which torch.load does not look
            raise ValueError("damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


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


def earlier_files(root):
    """Return the files of the run that root holds, but for its state, and of its evaluation."""
    pattern = r"train_log\.(csv|png)|metrics(_profile)?\.(csv|png)|metrics_closest_\d+\.png"
    datas = [path for path in root.glob("datas/*") if re.fullmatch(pattern, path.name)]
    return [*epoch_checkpoints(root).values(), *datas]


# ---- flags ----
def bounded(kind, minimum, maximum=10**9):
    """Return an argparse type: an int or a float, as kind says, from minimum to maximum."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if minimum <= kind(text) <= maximum:
                return kind(text)
        raise argparse.ArgumentTypeError(f"must be {kind.__name__} from {minimum} to {maximum}, not {text!r}")
    return parse


def usable_device(text):
    """The argparse type of --device. cuda is the first GPU, under torchrun each process's own."""
    match = re.fullmatch(r"cpu|cuda(?::(\d\d?))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, not {text!r}")
    if text == "cpu":
        return torch.device("cpu")
    own = os.environ.get("LOCAL_RANK")  # torchrun numbers the processes on a machine
    if match[1] and own:
        raise argparse.ArgumentTypeError("must be cuda, without a number, under torchrun, which deals out the GPUs")
    index = int(match[1] or own or 0)
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"there is no cuda:{index} here that torch can use; try --device cpu")
    return torch.device("cuda", index)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names the default of every flag that has one."""

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


def refuse_contradictions(args, path, config):
    """Raise InputError for a flag that was given and says otherwise than the config in the checkpoint."""
    for name, value in config.items():
        given = getattr(args, name, None)
        if given not in (None, value):
            raise InputError(f"--{name} {given} contradicts {path}, whose {name} is {value}")
