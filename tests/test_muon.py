"""muon.py, beside torch's own and the singular value decomposition."""
import torch
from torch.optim import _muon

from muon import Muon, orthogonalize


def kernels_of_several_shapes():
    torch.manual_seed(0)
    # as matrices all of them are wide: torch's Muon moves tall ones by larger steps
    shapes = [(8, 4, 3, 3), (16, 8, 3, 3), (8, 4, 3, 3), (8, 16, 1, 1)]
    return [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]


def test_muon_agrees_with_torch(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # the precision of ours
    ours, theirs = kernels_of_several_shapes(), kernels_of_several_shapes()
    matrices = [torch.nn.Parameter(kernel.detach().flatten(1)) for kernel in theirs]
    optimizer = Muon(ours, 0.95)
    reference = _muon.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0, ns_steps=3)
    optimizer.rate.fill_(0.02)
    for _ in range(5):
        for kernel, matrix in zip(ours, matrices, strict=True):
            kernel.grad = torch.randn_like(kernel)
            matrix.grad = kernel.grad.flatten(1)
        optimizer.step()
        reference.step()
    for kernel, matrix in zip(ours, matrices, strict=True):
        torch.testing.assert_close(kernel.flatten(1), matrix, rtol=1e-4, atol=1e-5)


def test_a_cpu_needs_nothing_of_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "stream", None)  # on a Mac it fails
    monkeypatch.setattr(torch.cuda, "current_stream", None)
    kernels = kernels_of_several_shapes()
    optimizer = Muon(kernels, 0.95)
    optimizer.rate.fill_(0.02)
    before = [kernel.detach().clone() for kernel in kernels]
    for kernel in kernels:
        kernel.grad = torch.randn_like(kernel)
    optimizer.step()
    assert not any(kernel.equal(old) for kernel, old in zip(kernels, before, strict=True))


def test_orthogonalizing_keeps_directions_and_evens_out_singular_values():
    torch.manual_seed(0)
    matrices = torch.randn(3, 16, 40)
    result = orthogonalize(matrices)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    middle = u.mT @ result @ vh.mT  # diagonal where the singular vectors are the same
    values = middle.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(middle, torch.diag_embed(values), rtol=0, atol=1e-4)
    assert 0.5 < values.min() and values.max() < 1.3
