"""The figures that a report of `fidelity` is made of."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, nan

from torch import Tensor


@dataclass(frozen=True)
class OutputError:
    """How far outputs are from the original's.

    Args:
        absolute: the mean over tokens of the difference's L2 norm.
        relative: that, divided by the mean norm of the original's outputs.
    """

    absolute: float
    relative: float


@dataclass(frozen=True)
class KernelError:
    """How far a tangent kernel K is from the original's K0.

    Args:
        relative: |K - K0| / |K0|, in Frobenius norms.
        cosine: <K, K0> / (|K| |K0|).
        factor: the number a that makes |a K - K0| smallest.
        fitted: |a K - K0| / |K0| with that a: what of the error is not the kernel's size.
    """

    relative: float
    cosine: float
    factor: float
    fitted: float

    @classmethod
    def between(cls, kernel: Tensor, original: Tensor) -> KernelError:
        """The error of a kernel of shape (n, n) against the original's."""
        size, original_size = float(kernel.norm()), float(original.norm())
        difference, inner = float((kernel - original).norm()), float((kernel * original).sum())
        if original_size == 0:
            return cls(0.0 if size == 0 else inf, nan, nan, nan)
        if size == 0:
            return cls(1.0, nan, nan, 1.0)
        factor = inner / size**2
        fitted = float((factor * kernel - original).norm()) / original_size
        return cls(difference / original_size, inner / (size * original_size), factor, fitted)


@dataclass(frozen=True)
class NTKError:
    """The errors of both kernels over the same weights; the Adam kernel is the one the method keeps."""

    adam: KernelError
    sgd: KernelError


_NO_ERROR = KernelError(nan, nan, nan, nan)
NOT_FORMED = NTKError(_NO_ERROR, _NO_ERROR)
"""Of routed experts, whose kernels are not formed."""


@dataclass(frozen=True)
class FFNFidelity:
    """One FFN, or the routed experts of a layer together.

    Args:
        name: its name in the model.
        width: its neurons in the original.
        narrow_width: its neurons now (all of them where its matrices are of low rank).
        output: the error of its output, given the original's inputs.
        ntk: over its weights and biases; of routed experts NaN.
        matrices: over those of one projection; path -> errors; of routed experts none.
    """

    name: str
    width: int
    narrow_width: int
    output: OutputError
    ntk: NTKError
    matrices: dict[str, NTKError]
