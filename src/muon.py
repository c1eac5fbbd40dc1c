"""Muon, the optimizer of the convolution kernels (Jordan et al. 2024).

A kernel's gradient, seen as a matrix, has a few large singular values and many small ones. A step
along it learns fast in a few directions and hardly at all in the others. Muon keeps the singular
vectors and brings the singular values near 1, so that many directions are learnt equally fast.
docs/measurements.md reports what that gains here.

The method: https://kellerjordan.github.io/posts/muon/
"""
import torch


def orthogonalize(matrices):
    """Return matrices (N, rows, columns) with their large singular values brought near 1.

    The singular value decomposition would be slow. Each step of this Newton-Schulz iteration, with
    Jordan's coefficients, applies s -> a s + b s^3 + c s^5 to every singular value s, and needs
    matrix products alone. Three steps, where Jordan takes five, let small values grow about
    40-fold.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(3):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G^2
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a X + (b G + c G^2) X
    return x


class Muon:
    """Momentum that is orthogonalized before each step.

    Kernels (out, in, k, k) are seen as matrices (out, in * k * k). Kernels of one shape form one
    stack, so that a few large matrix products do the work of many small ones. Jordan's code
    takes larger steps for tall matrices; this does not.
    """

    def __init__(self, kernels, momentum):
        stacks = {}
        for kernel in kernels:
            stacks.setdefault(kernel.shape, []).append(kernel)
        self.stacks = list(stacks.values())
        self.momentum = momentum
        self.buffers = [torch.zeros_like(torch.stack(stack)).flatten(2) for stack in self.stacks]
        self.rate = torch.zeros((), device=self.buffers[0].device)
        # One stack does not fill a GPU, so each has a stream of its own and all run side by side.
        self.streams = [torch.cuda.Stream() if self.rate.is_cuda else None for _ in self.stacks]

    @torch.no_grad()
    def step(self):
        """Move all kernels by their gradients."""
        for stack, buffer, stream in zip(self.stacks, self.buffers, self.streams, strict=True):
            if stream is None:  # on a CPU
                self.move(stack, buffer)
            else:
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    self.move(stack, buffer)
        for stream in filter(None, self.streams):
            torch.cuda.current_stream().wait_stream(stream)

    def move(self, stack, buffer):
        """Move the kernels of one stack. buffer (N, out, in * k * k): the momentum."""
        gradients = torch.stack([kernel.grad.flatten(1) for kernel in stack])
        buffer.lerp_(gradients, 1 - self.momentum)
        nesterov = gradients.lerp(buffer, self.momentum)  # as if the next gradient were the same
        updates = self.rate * orthogonalize(nesterov)
        for kernel, update in zip(stack, updates, strict=True):
            kernel -= update.view_as(kernel)
