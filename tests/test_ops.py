"""Each operation of ops.py against its plain twin: the fused loss against cross-entropy of all
logits, Newton-Schulz against an SVD. (The experts' grouped product has its twin in test_moe.py.)"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from minilm.data import IGNORE, generator
from minilm.ops import Linear, linear_cross_entropy, newton_schulz, rms_norm


def problem(N=23, D=8, V=31, seed=0, dtype=torch.float32):
    gen = generator(seed, "problem")
    h, weight = (
        torch.randn(N, D, generator=gen).to(dtype),
        torch.randn(V, D, generator=gen).to(dtype),
    )
    labels = torch.randint(V, (N,), generator=gen)
    labels[::4] = IGNORE
    return h.requires_grad_(), weight.requires_grad_(), labels


def test_loss_by_hand():
    # two logits (0, 0): -log(1/2); the second row is not counted
    loss = linear_cross_entropy(torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([1, IGNORE]))
    torch.testing.assert_close(loss, torch.tensor(2.0).log())


@settings(max_examples=40, deadline=None)
@given(
    N=st.integers(1, 40), V=st.integers(2, 70), rows=st.integers(1, 50), seed=st.integers(0, 10**6)
)
def test_loss_and_both_gradients_equal_the_plain_twin_for_every_size_and_chunk(N, V, rows, seed):
    h, weight, labels = problem(N, 8, V, seed)
    labels[-1] = V - 1  # at least one label counts
    plain = F.cross_entropy(F.linear(h, weight), labels)
    expected = torch.autograd.grad(plain, (h, weight))
    loss = linear_cross_entropy(h, weight, labels, chunk_bytes=rows * 4 * V)
    torch.testing.assert_close(loss, plain)
    for got, want in zip(torch.autograd.grad(3 * loss, (h, weight)), expected):
        torch.testing.assert_close(got, 3 * want, atol=1e-5, rtol=1e-4)


def test_only_the_gradients_that_are_needed_are_made():
    h, weight, labels = problem()
    linear_cross_entropy(h, weight.detach(), labels).backward()
    assert h.grad is not None and weight.grad is None
    linear_cross_entropy(h.detach(), weight, labels).backward()
    expected = torch.autograd.grad(F.cross_entropy(F.linear(h, weight), labels), weight)[0]
    torch.testing.assert_close(weight.grad, expected, atol=1e-6, rtol=1e-4)


def test_a_loss_that_is_only_evaluated_costs_one_matrix_product():
    h, weight, labels = problem(N=16, D=8, V=32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert not linear_cross_entropy(h, weight, labels).requires_grad
    assert (
        counter.get_total_flops() == 2 * 16 * 8 * 32
    )  # h W^T, and no gradient of a weight that asks for one


def test_batch_and_time_axes_may_stay_and_half_precision_keeps_its_types():
    h, weight, labels = problem(24, dtype=torch.bfloat16)
    loss = linear_cross_entropy(h.view(2, 12, 8), weight, labels.view(2, 12))
    loss.backward()
    assert loss.dtype == torch.float32 and h.grad.dtype == weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(
        loss, F.cross_entropy(F.linear(h.float(), weight.float()), labels), atol=0.02, rtol=0.01
    )


def test_a_second_derivative_is_refused_rather_than_wrong():
    h, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(
        linear_cross_entropy(h, weight, torch.tensor([0, 1, 2])).square(), h, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_mean_over_no_label_is_nan_as_in_torch():
    h, weight, labels = problem()
    assert linear_cross_entropy(h, weight, torch.full_like(labels, IGNORE)).isnan()


# --- Newton-Schulz


@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12), (3, 16, 24)])
def test_newton_schulz_keeps_the_singular_vectors_and_brings_every_singular_value_near_one(shape):
    G = torch.randn(shape, generator=generator(0, "G"))
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    values = torch.einsum(
        "...mk,...mn,...kn->...k", U, newton_schulz(G), Vh
    )  # the diagonal of U^T X V
    strong = S / S.norm(dim=-1, keepdim=True) > 0.01  # five steps lift what is above 1% of the norm
    assert values[strong].min() > 0.6 and values[strong].max() < 1.3
    rest = newton_schulz(G) - torch.einsum("...mk,...k,...kn->...mn", U, values, Vh)
    assert rest.abs().max() < 1e-3  # nothing outside the singular directions


def test_newton_schulz_is_its_polynomial_five_times_on_every_singular_value():
    gen = generator(2, "G")
    U, V = (torch.linalg.qr(torch.randn(n, 6, generator=gen)).Q for n in (6, 9))
    S = torch.tensor([1.0, 0.5, 0.2, 0.1, 0.05, 0.01])
    value = S / S.norm()
    for _ in range(5):  # a s + b s^3 + c s^5: it moves each of them alone
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    torch.testing.assert_close(newton_schulz(U * S @ V.mT), U * value @ V.mT, atol=1e-4, rtol=1e-3)
    assert value.min() > 0.6  # the weakest, 1% of the norm, arrives with the fifth


def test_newton_schulz_does_not_see_the_gradients_scale_and_leaves_zero_alone():
    G = torch.randn(8, 8, generator=generator(1, "G"))
    torch.testing.assert_close(newton_schulz(G), newton_schulz(1000 * G), atol=1e-3, rtol=1e-3)
    assert torch.equal(newton_schulz(torch.zeros(4, 6)), torch.zeros(4, 6))


# --- the norm and the product with a single token


@pytest.mark.parametrize("shape", [(5, 7, 12), (3, 4, 2, 6), (1, 8)])
def test_rms_norm_and_both_gradients_equal_the_plain_twin(shape):
    gen = generator(0, "norm")
    x, weight = (
        torch.randn(shape, generator=gen).requires_grad_(),
        torch.randn(shape[-1], generator=gen).requires_grad_(),
    )
    grad = torch.randn(shape, generator=gen)
    plain, ours = F.rms_norm(x, (shape[-1],), weight, 1e-6), rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(ours, plain)
    for got, want in zip(
        torch.autograd.grad(ours, (x, weight), grad), torch.autograd.grad(plain, (x, weight), grad)
    ):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 8), (1, 1, 64), (3, 4, 2, 6), (40, 70)]
)  # few numbers and many: two roads
@torch.no_grad()
def test_a_norm_without_gradients_equals_the_plain_twin_too(shape, dtype):
    gen = generator(0, "norm")
    x, weight = (10 * torch.randn(n, generator=gen).to(dtype) for n in (shape, shape[-1]))
    plain = F.rms_norm(x.float(), (shape[-1],), weight.float(), 1e-6)
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    torch.testing.assert_close(rms_norm(x, weight, 1e-6).float(), plain, atol=1e-5, rtol=tolerance)
    assert rms_norm(x, weight, 1e-6).dtype == dtype


def test_the_norm_of_a_zero_vector_is_zero_and_its_gradient_is_finite():
    x = torch.zeros(2, 4, requires_grad=True)
    y = rms_norm(x, torch.ones(4), 1e-6)
    y.sum().backward()
    assert y.abs().max() == 0 and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "out, in_, bias", [(8, 6, False), (12, 5, False), (7, 6, False), (8, 6, True)]
)  # 7 rows cannot be cut into four
@torch.no_grad()
def test_one_token_gets_the_same_product_whichever_routine_reads_the_matrix(
    out, in_, bias, dtype, sliced, monkeypatch
):
    monkeypatch.setattr("minilm.ops.SLICED", sliced)
    linear = Linear(in_, out, bias=bias).to(dtype)
    tolerance = (
        {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    )
    transposed = torch.randn(in_, 2, generator=generator(0, "y")).T[
        :1
    ]  # a row that is not contiguous
    for x in [
        *(
            torch.randn(shape, generator=generator(0, "x"))
            for shape in [(in_,), (1, in_), (1, 1, in_), (2, 3, in_)]
        ),
        transposed,
    ]:
        x = x.to(dtype)
        torch.testing.assert_close(linear(x), F.linear(x, linear.weight, linear.bias), **tolerance)
        assert linear(x).shape == (*x.shape[:-1], out) and linear(x).dtype == dtype
