"""Pure functions that look inside one task, unless they say otherwise; the caller jits and vmaps.

`first_nonfinite` is the exception: it answers in words, and is called outside of `jit`.
"""

from jaxmaml.diagnostics.adaptation import inner_losses as inner_losses
from jaxmaml.diagnostics.adaptation import update_norms as update_norms
from jaxmaml.diagnostics.communication import collectives as collectives
from jaxmaml.diagnostics.features import cka as cka
from jaxmaml.diagnostics.features import feature_reuse as feature_reuse
from jaxmaml.diagnostics.flops import count_flops as count_flops
from jaxmaml.diagnostics.gradients import agreement as agreement
from jaxmaml.diagnostics.gradients import agreement_by_layer as agreement_by_layer
from jaxmaml.diagnostics.gradients import agreement_by_step as agreement_by_step
from jaxmaml.diagnostics.implicit import CgResidual as CgResidual
from jaxmaml.diagnostics.implicit import cg_residual as cg_residual
from jaxmaml.diagnostics.nonfinite import first_nonfinite as first_nonfinite
from jaxmaml.diagnostics.permutations import label_permutations as label_permutations
from jaxmaml.diagnostics.permutations import metric_by_permutation as metric_by_permutation
