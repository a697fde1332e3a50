"""The linear-algebra helpers against dense identities."""

import pytest
import torch
from bnn_cases import raw_of

from bnn.linalg import inverse_softplus, lower_triangular, safe_cholesky, triangular_inverse


@pytest.fixture(name="K")
def gram_matrices(generator):
    A = torch.randn(4, 3, 3, generator=generator, dtype=torch.float64)
    return A @ A.mT


@pytest.mark.parametrize("jitter", [0.0, 1e-2])
def test_cholesky_reproduces_the_matrix_plus_relative_jitter(K, jitter):
    L = safe_cholesky(K, jitter)
    mean_diagonal = K.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    torch.testing.assert_close(L @ L.mT, K + jitter * mean_diagonal * torch.eye(3), rtol=1e-12, atol=1e-12)
    assert (L.diagonal(dim1=-2, dim2=-1) > 0).all()
    assert torch.equal(L, L.tril())


def test_cholesky_jitter_makes_a_singular_matrix_definite():
    assert safe_cholesky(torch.ones(3, 3, dtype=torch.float64), jitter=1e-8).isfinite().all()


def test_cholesky_marks_only_the_indefinite_matrix_with_nan(K):
    K[2] = -torch.eye(3)
    L = safe_cholesky(K)
    assert L[2].isnan().all()
    assert L[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize(
    ("K", "message"),
    [(torch.ones(3, 2), "square"), (torch.eye(2, dtype=torch.bfloat16), "float32 or float64")],
)
def test_cholesky_refuses(K, message):
    with pytest.raises(ValueError, match=message):
        safe_cholesky(K)


def test_triangular_inverse(K):
    L = safe_cholesky(K)
    torch.testing.assert_close(triangular_inverse(L) @ L, torch.eye(3, dtype=L.dtype).expand(4, 3, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_softplus_inverts_from_tiny_to_large(dtype):
    x = torch.tensor([1e-6, 1e-3, 0.1, 1.0, 5.0, 30.0, 1e4], dtype=dtype)
    # softplus(y) for y << 0 is exp(y): an absolute error of eps * |y| in y is the relative error here
    torch.testing.assert_close(torch.nn.functional.softplus(inverse_softplus(x)), x, rtol=1e-5, atol=0)


def test_lower_triangular_is_triangular_with_positive_diagonal(generator):
    raw = 3 * torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    L = lower_triangular(raw)
    assert torch.equal(L, L.tril())
    assert (L.diagonal(dim1=-2, dim2=-1) > 0).all()
    relative = L / L.diagonal(dim1=-2, dim2=-1)[..., None]
    torch.testing.assert_close(relative.tril(-1), raw.tril(-1) / 2)
    torch.testing.assert_close(raw_of(L).tril(), raw.tril())
