"""The four signs of neural collapse and what goes with them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from diag.result import Result, measured


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredCollapse(Result):
    """The four signs of neural collapse and what goes with them; NaN where something was not given."""

    nc1_ratio: float = measured("NC1~ = Tr S_W / Tr S_B, the form with theorems (Tirer et al., Eq. 3)")
    nc1: float = measured("NC1 = Tr(S_W S_B^+) / K (Papyan et al.)")
    nc2: float = measured("NC2: distance of M M^T from a simplex's, both scaled to norm 1 (Tirer et al.)")
    nc3: float = measured("NC3: distance of W from M, both scaled to norm 1 (Papyan et al. plot its square)")
    nc4: float = measured("NC4: examples whose decision is not the nearest class mean", unit="share")
    degenerate: bool = measured("two class means coincide, so NC1 is not defined")
    nc2_norms: float = measured("spread of the lengths of the centred class means, relative to their mean")
    nc2_angle_spread: float = measured("standard deviation of the cosines between centred class means")
    nc2_angles: float = measured("mean distance of these cosines from a simplex's -1/(K-1)")
    nc2_classifier: float = measured("NC2 of the classifier's rows instead of the class means")
    nc3_product: float = measured("NC3 by the product W M^T: its distance from a simplex's (Zhu et al. 2021)")
    bias_check: float = measured("length of W h_G + c, centred over classes, at the global mean h_G")
    deviation_angle: float = measured(
        "mean angle between a pair's decision direction w_a - w_b and its class-mean difference", unit="degrees"
    )
    cdnv: float = measured("class-distance normalised variance, mean over pairs of classes")
    effective_rank: float = measured("exp of the entropy of the squared singular values of M, normalised")
    feature_norm: float = measured("mean length of the features")
    train_accuracy: float = measured("examples whose label has the largest logit", unit="share")
    held_out_nc1: float = measured("NC1 of held-out features around the class means of the training data")
    held_out_nc4: float = measured("NC4 on held-out data, by the class means of the training data", unit="share")
    num_classes: int = measured("classes present in the data, K")
    num_features: int = measured("features, d")
    singular_values: NDArray[numpy.float64] = measured(
        "singular values of the centred class means, largest first", shape="(min(K - 1, d),)"
    )

    @property
    def is_collapsed(self) -> bool:
        """Whether NC1, NC2 and NC4 are all below their cut-offs."""
        return (
            self.nc1 < self.setting("nc1_collapsed") and self.nc2 < self.setting("nc2_collapsed") and self.nc4 == 0
        )
