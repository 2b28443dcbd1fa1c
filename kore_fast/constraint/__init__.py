"""Old knowledge → covariances → the null space that new knowledge is trained in."""

from kore_fast.constraint.collection import collect_covariance
from kore_fast.constraint.factors import kore_factors
from kore_fast.constraint.initialization import KoreConfig, get_kore_model, layer_ranks, replace_linears
from kore_fast.constraint.leak import LayerLeak
from kore_fast.constraint.residual import to_residual, to_zero_delta
from kore_fast.constraint.selection import decoder_linears, select_linears
from kore_fast.constraint.spectrum import spectra
from kore_fast.constraint.store import CovarianceStore
from kore_fast.ops.factors import leak

__all__ = [
    "CovarianceStore",
    "KoreConfig",
    "LayerLeak",
    "collect_covariance",
    "decoder_linears",
    "get_kore_model",
    "kore_factors",
    "layer_ranks",
    "leak",
    "replace_linears",
    "select_linears",
    "spectra",
    "to_residual",
    "to_zero_delta",
]
