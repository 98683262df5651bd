"""MAML++: Antoniou, Edwards and Storkey 2019 (arXiv 1810.09502)."""

from typing import Any, Literal

import optax

from jaxmaml.checks import check_choice
from jaxmaml.learners.hyperparams import Optimizer, learned_sgd
from jaxmaml.learners.inner_loop import inner_loop, loop_options
from jaxmaml.schedules import QueryWeights, multi_step_weights
from jaxmaml.types import LossFn, MetaLearner

NUM_MULTI_STEP = 5_000
"""The outer steps over which the paper's multi-step loss moves to the last inner step."""


def maml_plus_plus(
    loss_fn: LossFn,
    num_inner_steps: int,
    *,
    inner_lr: float = 0.1,
    learned_rates: bool = True,
    query_weights: QueryWeights | Literal["paper"] | None = "paper",
    **options: Any,
) -> MetaLearner:
    """Returns MAML with the six changes of MAML++, each of which can be left out.

    1. Multi-step loss: `query_weights`. "paper" is `multi_step_weights(num_inner_steps, 5_000)`, 10
       epochs of 500 outer steps, after which only the last step is scored; None leaves it out.
    2. Learned rates per layer and inner step: `learned_rates`. The meta-parameters are then those of
       `jaxmaml.meta_sgd`, `Extended(params, {"hyperparams": rates})`; otherwise bare parameters.
    3. Statistics per inner step, used at test time: a model with `norm="per_step"` (`nn.Conv4`,
       `nn.MLP`), and as `test_loss_fn` and in metrics the model in evaluation mode, the `test_fn` of
       `nn.from_nnx_with_state`. The steps that such a model counts are set to 0 here.
    4. Normalization weights per inner step: `per_step_weights` of the same models.
    5. Cosine outer rate, of the outer optimizer:
       `optax.adam(optax.cosine_decay_schedule(1e-3, num_outer_steps, alpha=1e-2))`.
    6. Derivative-order annealing: `adjoint=Annealed(FirstOrder(), Exact(), at=25_000)` (epoch 50).
       The authors' code is second order in the epochs after its
       `first_order_to_second_order_epoch`, so that `at=(epoch + 1) * 500` reproduces it. Their
       published settings leave it out, and so does the default.

    Args:
        loss_fn: as in `jaxmaml.maml`.
        num_inner_steps: the paper makes 5.
        inner_lr: the initial inner rate of all layers and steps.
        learned_rates, query_weights: see above.
        options: other keyword arguments of `jaxmaml.maml`.

    Raises:
        ValueError: no inner steps; when called, for the meta-parameters of another learner.

    Example:
        >>> import jax.numpy as jnp, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params["w"] - batch) ** 2) / 2
        >>> learner = jaxmaml.maml_plus_plus(loss_fn, 2, inner_lr=0.5)
        >>> jaxmaml.learned_rates(learner.init({"w": jnp.array(0.0)}))["w"].tolist()
        [0.5, 0.5]
    """
    if num_inner_steps == 0:
        raise ValueError("maml_plus_plus needs at least one inner step; got num_inner_steps=0")
    if isinstance(query_weights, str):
        check_choice("query_weights", query_weights, ("paper",))
        query_weights = multi_step_weights(num_inner_steps, NUM_MULTI_STEP)
    optimizer: Optimizer = optax.sgd(inner_lr)
    if learned_rates:
        optimizer = learned_sgd(inner_lr, granularity="layer", num_steps=num_inner_steps)
    settings = loop_options("maml_plus_plus", options, query_weights=query_weights)
    return inner_loop(loss_fn, optimizer, num_inner_steps, settings)
