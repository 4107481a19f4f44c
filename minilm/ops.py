"""The few operations that are worth more than one line of PyTorch, each with the plain lines that
it must equal (tests/test_ops.py)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


# --- the product with a single token

def _sliced_is_faster() -> bool:
    """MKL's matrix-vector routine is fast on its maker's processors; on AMD's it reads 6 to 14
    GB/s."""
    info = Path("/proc/cpuinfo")
    return info.exists() and "AuthenticAMD" in info.read_text()


SLICED = _sliced_is_faster()


class Linear(nn.Linear):
    """nn.Linear (its plain twin), which reads its matrix faster when there is a single token to
    multiply, as in decoding.

    Limit: a matrix-vector product does 2 operations per weight, so it takes as long as reading the
    matrix once. F.linear prepares a product of matrices, which costs more than it saves on one row:
    in bfloat16 torch.mv takes half of its time. In float32 both end in MKL's matrix-vector routine:
    28 GB/s on an Intel CPU, 6 to 14 on an AMD one, where MKL's batched product of the same matrix
    cut into 4 slices reads 15 to 29 (and on Intel 12). Products of several tokens, gradients and
    GPUs are left to F.linear."""

    def reset_parameters(self):
        if not self.weight.is_meta:  # a loader's: drawing numbers for no memory takes time as well
            super().reset_parameters()

    def forward(self, x):
        weight = self.weight
        out, in_ = weight.shape
        one_token = x.numel() == in_ and x.dtype == weight.dtype
        if not one_token or x.is_cuda or torch.is_grad_enabled():
            return F.linear(x, weight, self.bias)
        if SLICED and x.dtype == torch.float32 and out % 4 == 0:
            y = sliced_product(weight, x)
            return y if self.bias is None else y + self.bias
        vector = x.reshape(in_)
        if self.bias is None:
            y = torch.mv(weight, vector)
        else:
            y = torch.addmv(self.bias, weight, vector)
        return y.view(*x.shape[:-1], out)


def sliced_product(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """F.linear(x, weight) for a single x [..., in], as a batched product of the matrix cut into 4
    slices."""
    out, in_ = weight.shape
    # `.T` of a row, not a column: the strides (1, in) make MKL read the matrix in order, with
    # (1, 1) it is four times slower.
    column = x.reshape(1, in_).T.expand(4, in_, 1)
    slices = weight.view(4, out // 4, in_)
    return torch.bmm(slices, column).view(*x.shape[:-1], out)


# --- the norm

def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, the mean in float32. Plain twin: F.rms_norm(x, (D,),
    weight, eps).

    Limit: 2 reads and 1 write of x forward, 4 reads and 1 write backward. PyTorch has one kernel
    for this on a GPU, but on a CPU it makes about 7 passes forward and 15 backward; written out
    here they are 3 and 6, and training a norm takes half to a third. On a few rows, as in decoding,
    passes cost nothing and calls do: F.rms_norm makes 10 of them (9 microseconds in float32, 15 in
    bfloat16), the trick below 4 (6 in both)."""
    D = x.shape[-1]
    half = x.dtype != torch.float32
    grad = torch.is_grad_enabled()
    if half and (grad or x.is_cuda):
        y = F.rms_norm(x.float(), (D,), None, eps)
        return y.to(x.dtype) * weight
    if x.is_cuda:
        return F.rms_norm(x, (D,), weight, eps)
    if grad:
        return _RMSNorm.apply(x, weight, eps)
    if x.numel() <= 2048:
        # x and -x side by side have mean 0 and variance mean(x^2): one kernel does the rest.
        both = torch.cat((x, -x), -1)
        y = F.layer_norm(both, (2 * D,), eps=eps)
        return y[..., :D] * weight
    y = x * _inverse_rms(x, eps)
    return y.to(x.dtype).mul_(weight)


def _inverse_rms(x, eps):
    """1 / sqrt(mean(x^2) + eps), float32 [..., 1]: a norm takes one pass, a mean of squares two."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        r = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """With g = grad * weight and r = 1/rms:

        dx = r g - x r^3 mean(g x),   dweight = sum over tokens of grad * x * r"""
        x, weight, r = ctx.saved_tensors
        gx = grad * x
        D = x.shape[-1]
        mean = gx.matmul(weight)[..., None].mul_(r.pow(3)).div_(-D)
        dx = (grad * weight).mul_(r).addcmul_(x, mean)
        by_token = gx.reshape(-1, D)
        dweight = r.reshape(1, -1).mm(by_token)[0]
        return dx, dweight, None


# --- the loss

def linear_cross_entropy(h, weight, labels, ignore_index: int = -100, chunk_bytes: int = 2**26):
    """Mean of -log softmax(h weight^T)[label] over the labels that count, without ever holding all
    [N, V] logits. h [..., D], weight [V, D], labels int64 [...]; a scalar. Plain twin:
    F.cross_entropy(F.linear(h, weight), labels).

    The gradient of the logits of a few rows, softmax - onehot, is known as soon as these rows are:
    so one forward pass over chunks of rows computes the loss and both gradients, and drops the
    chunk's logits. Chunks of `chunk_bytes` keep peak memory far below N * V * 4 bytes."""
    # A custom function cannot tell that nobody will ask for these gradients.
    if not torch.is_grad_enabled():
        h, weight = h.detach(), weight.detach()
    device = h.device.type
    if torch.is_autocast_enabled(device):  # a custom function is not autocast by itself
        h = h.to(torch.get_autocast_dtype(device))
    rows = h.reshape(-1, h.shape[-1])
    return _LinearCrossEntropy.apply(rows, weight, labels.reshape(-1), ignore_index, chunk_bytes)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, labels, ignore_index, chunk_bytes):
        N, V = h.shape[0], weight.shape[0]
        rows = max(1, min(N, chunk_bytes // (4 * V)))
        counted = labels != ignore_index
        # No label counted: 1/0 = inf, and the mean over nothing is NaN, as in F.cross_entropy.
        scale = 1.0 / counted.sum()
        need_h, need_w = ctx.needs_input_grad[:2]
        grad_h = torch.empty_like(h) if need_h else None
        grad_w = torch.zeros_like(weight, dtype=torch.float32) if need_w else None
        total = h.new_zeros((), dtype=torch.float32)
        with torch.autocast(h.device.type, enabled=False):
            w = weight.to(h.dtype)
            for at in range(0, N, rows):
                chunk = slice(at, at + rows)
                x, keep = h[chunk], counted[chunk]
                y = labels[chunk].masked_fill(~keep, 0)[:, None]
                logits = (x @ w.T).float()  # (rows, V)
                log_z = logits.logsumexp(-1, keepdim=True)
                losses = log_z - logits.gather(1, y)
                total += (losses * keep[:, None]).sum()
                if not (need_h or need_w):
                    continue
                grad = logits.sub_(log_z).exp_()  # softmax, in the memory of the logits
                grad.scatter_add_(1, y, grad.new_full(y.shape, -1.0))  # - onehot
                if keep.all():
                    grad = grad.mul_(scale)
                else:
                    grad = grad * (keep[:, None] * scale)
                grad = grad.to(h.dtype)
                if need_h:
                    torch.mm(grad, w, out=grad_h[chunk])
                if need_w and grad.dtype == torch.float32:
                    grad_w.addmm_(grad.T, x)
                elif need_w:
                    grad_w += grad.T @ x
        ctx.save_for_backward(grad_h, grad_w.to(weight.dtype) if need_w else None)
        return total * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        grads = []
        for grad in ctx.saved_tensors:
            grads.append(None if grad is None else grad * grad_out.to(grad.dtype))
        return *grads, None, None, None


# --- products of a mixture of experts

def grouped_linear(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Group g's rows of x times its own matrix, transposed: x [S, D] sorted by group, weight [G, F,
    D], ends int32 [G] (group g is rows ends[g-1] to ends[g]) -> [S, F]. One call without a host
    read where `can_group` says so, else its plain twin, the function below."""
    if not can_group(x.device, x.dtype, [weight.shape[1:]]):
        return grouped_linear_plain(x, weight, ends)
    return F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)


def grouped_linear_plain(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    groups = zip(x.split(counts), weight)
    return torch.cat([F.linear(rows, w) for rows, w in groups])


def can_group(device: torch.device, dtype: torch.dtype, shapes) -> bool:
    """Does torch's grouped_mm take matrices of these shapes? It wants rows of a multiple of 16
    bytes, on a GPU compute capability 9 and bfloat16 (elsewhere it is a loop with a host read), on
    a CPU float32 or a 16-bit type."""
    if device.type == "cuda":
        recent = torch.cuda.get_device_capability(device) >= (9, 0)
        fits = recent and dtype == torch.bfloat16
    else:
        fits = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16, torch.float16)
    sides = [side for shape in shapes for side in shape]
    return fits and all(side * dtype.itemsize % 16 == 0 for side in sides)


# --- the step of Muon

def newton_schulz(G: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Approximately U V^T of G = U S V^T, for matrices [..., m, n]: singular values above 1% of G's
    norm end near 1 (0.7 to 1.2).

    Five odd polynomials X <- a X + (b A + c A^2) X, A = X X^T, with the coefficients of Keller
    Jordan's Muon (2024, https://kellerjordan.github.io/posts/muon/), chosen for speed near zero
    rather than for exact convergence to 1. Plain twin: torch.linalg.svd. bfloat16 on a GPU, where
    it is fast and precise enough; float32 on a CPU."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.bfloat16() if G.is_cuda else G.float()
    tall = G.shape[-2] > G.shape[-1]
    if tall:  # the smaller Gram matrix
        X = X.mT
    norm = X.norm(dim=(-2, -1), keepdim=True)
    X = X / (norm + 1e-7)  # the largest singular value is at most 1
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    if tall:
        X = X.mT
    return X.to(G.dtype)
