"""Families of q(U), one file each."""

from enum import StrEnum

from bnn.inducing.families.base import Family, Params
from bnn.inducing.families.diagonal import DiagonalGaussian
from bnn.inducing.families.ensemble import Ensemble
from bnn.inducing.families.full import FullGaussian
from bnn.inducing.families.matrix_normal import MatrixNormal

__all__ = [
    "DiagonalGaussian",
    "Ensemble",
    "Family",
    "FamilyName",
    "FullGaussian",
    "MatrixNormal",
    "Params",
    "make_family",
]


class FamilyName(StrEnum):
    """Names under which configurations ask for a family."""

    DIAGONAL = "diagonal"
    MATRIX_NORMAL = "matrix_normal"
    FULL = "full"
    ENSEMBLE = "ensemble"


def make_family(name: str, members: int = 1) -> Family:
    """The family called ``name``.

    Args:
        name: one of ``FamilyName``.
        members: size of an ensemble; other families ignore it.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in set(FamilyName):
        raise ValueError(f"unknown family of q(U) {name!r}: choose one of {', '.join(FamilyName)}")
    match FamilyName(name):
        case FamilyName.DIAGONAL:
            return DiagonalGaussian()
        case FamilyName.MATRIX_NORMAL:
            return MatrixNormal()
        case FamilyName.FULL:
            return FullGaussian()
        case FamilyName.ENSEMBLE:
            return Ensemble(members)
