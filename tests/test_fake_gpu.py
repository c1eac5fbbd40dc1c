"""Devices, checked without a GPU: fake tensors claim to be on cuda:0 and have no values.

An operation that brings two devices together raises, as it would on a GPU. So a tensor that was
made without device= is found. What fake tensors cannot do has a stand-in here:
torch.Generator("cuda"), backward(), Module.to, the fused Adam, streams and graphs, and what
sampling reads on the CPU.
"""
import functools
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

import generate
import test
import train

CUDA = torch.device("cuda", 0)
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor",
                                        "ignore:CUDA is not available")


class FakeGenerator(torch.Generator):
    """A generator that claims to be on the device that it was asked for."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self.claimed = torch.device(device)
        return self

    @property
    def device(self):
        return self.claimed

    def manual_seed(self, seed):
        super().manual_seed(seed)
        return self


def fused_adam(*lists, lr, **more):
    assert {tensor.device for tensors in lists for tensor in tensors} == {CUDA} == {lr.device}


def move(self, device, **form):
    """Module.to, which fails with parameters that are fake."""
    for module in self.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    moved = tensor.detach().to(device)
                    tensors[name] = torch.nn.Parameter(moved) if tensor.requires_grad else moved
    return self


@pytest.fixture(autouse=True)
def fake_gpu(monkeypatch):
    levels = generate.noise_levels(1000, 3)
    monkeypatch.setattr(generate, "noise_levels", lambda time_steps, steps: levels)
    monkeypatch.setattr(torch, "_fused_adam_", fused_adam)
    monkeypatch.setattr(torch, "Generator", FakeGenerator)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(train, "capture", lambda state, *batch: functools.partial(
        train.training_step, state))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.nn.Module, "to", move)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def on_gpu(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device=CUDA)


@pytest.fixture
def state(monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "__bool__", lambda self: True)  # Adam: is the rate positive?
        state = train.State(train.Settings(), CUDA)

    def backward(loss):
        assert loss.device == CUDA and loss.requires_grad
        for p in state.model.parameters():
            p.grad = torch.empty_like(p)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    return state


def take_steps(state):
    for batch in train.epoch_batches(state.settings, 0, 1000, CUDA)[:2]:
        assert batch.device == CUDA
        train.take_step(state, on_gpu(1000, 1, 28, 28, dtype=torch.uint8)[batch],
                        on_gpu(1000, dtype=torch.int64)[batch], 10)


def test_training_stays_on_the_gpu(state):
    take_steps(state)
    kept = [*state.model.parameters(), *state.ema.parameters(), *state.muon.buffers,
            state.total_loss, state.muon.rate, state.ema_decay]
    assert state.steps_taken == 2 and all(tensor.device == CUDA for tensor in kept)


def test_a_state_loaded_from_the_cpu_trains_on(state):
    take_steps(state)
    state.load_state_dict(tree_map(lambda value: value.cpu() if isinstance(value, torch.Tensor)
                                   else value, state.state_dict()))
    take_steps(state)
    assert state.adam.param_groups[0]["lr"].device == CUDA
    assert all(value.device == CUDA for values in state.adam.state.values()
               for value in values.values())


@pytest.fixture
def model():
    return train.SimpleUnet().to(CUDA).eval().requires_grad_(False)


@pytest.mark.parametrize("guidance", [1, 2])
@pytest.mark.parametrize("sampler", generate.SAMPLERS)
def test_sampling_runs_on_the_gpu(sampler, guidance, model):
    labels = torch.zeros(130, dtype=torch.int64)
    frames = generate.sample(model, labels, sampler, steps=3, guidance=guidance, n_frames=3)
    assert frames.shape == (3, 130, 1, 28, 28) and frames.device.type == "cpu"


@pytest.fixture
def judge():
    """What Judge's methods use of a Judge; its thresholds depend on values, which are not there."""
    images = on_gpu(2000, 1, 28, 28, dtype=torch.uint8)
    return SimpleNamespace(classifier=test.Classifier().to(CUDA).eval(), train_images=images,
                           train_pixels=test.mnist_pixels(images), thresholds=on_gpu(10))


def test_metrics_run_on_the_gpu(model, judge):
    images, labels = judge.train_images, on_gpu(2000, dtype=torch.int64)
    features, _ = test.classify(judge.classifier, judge.train_pixels)
    assert features.device == test.latent_features(model, images).device == CUDA
    assert test.spread_labels(labels, 2000).device == CUDA
    for measure in (lambda: test.Judge.find_copies(judge, images),
                    lambda: test.share_inside(features, features),
                    lambda: test.noise_mse(model, images, labels, 256)):
        # up to the result, a Python number
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            measure()
