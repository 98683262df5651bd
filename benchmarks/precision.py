"""The exact meta-gradient in less than float32: its angle and error against float64.

    python benchmarks/precision.py

On a CPU every matmul precision computes in float32. "default" is TF32 on a GPU and bfloat16 on a TPU.
"""

import functools
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree

import jaxmaml
from jaxmaml import nn
from jaxmaml.types import Task

POLICIES = [
    {"matmul_precision": "highest", "compute_dtype": "float32"},
    {"matmul_precision": "high", "compute_dtype": "float32"},
    {"matmul_precision": "default", "compute_dtype": "float32"},
    {"matmul_precision": "default", "compute_dtype": "bfloat16"},
]


def meta_gradient(
    dtype: Any, policy: dict[str, str], tasks: Task, num_filters: int, num_inner_steps: int
) -> np.ndarray:
    """Returns the flat exact meta-gradient of Conv4.

    Args:
        dtype: the dtype of parameters and images.
        policy: one of `POLICIES`.
        tasks: the tasks.
        num_filters: filters of each convolution.
        num_inner_steps: steps of SGD.
    """
    # The network.
    module = nn.Conv4(
        5, num_filters=num_filters, head_init=nnx.initializers.normal(0.1), rngs=nnx.Rngs(0)
    )
    compute = None if policy["compute_dtype"] == "float32" else policy["compute_dtype"]
    apply_fn, params = nn.from_nnx(module, compute_dtype=compute)
    learner = jaxmaml.maml(nn.cross_entropy(apply_fn), optax.sgd(0.1), num_inner_steps)

    # Its meta-gradient.
    cast = lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.float32 else leaf
    with jax.default_matmul_precision(policy["matmul_precision"]):
        run = jax.jit(lambda params, tasks: jaxmaml.meta_grad(learner, params, tasks)[1])
        return np.asarray(ravel_pytree(run(*jax.tree.map(cast, (params, tasks))))[0])


def main() -> None:
    """Measures, prints and appends the rows."""
    options = common.parser(__doc__).parse_args()
    filters, num_tasks = (8, 2) if options.quick else (64, 8)
    tasks = common.image_tasks(num_tasks, 5, 1, 5)
    rows, table = [], common.Rows(options)
    policies = POLICIES[-1:] if options.quick else POLICIES
    for steps in (1,) if options.quick else (1, 5):
        measured = functools.partial(measure, tasks, filters, steps, policies)
        rows += table.of({"inner steps": steps}, measured)
    columns = ["inner steps", "matmul_precision", "compute_dtype", "1 - cosine", "relative error"]
    common.print_table(rows, columns)


def measure(
    tasks: Task, num_filters: int, num_inner_steps: int, policies: list[dict[str, str]]
) -> list[dict[str, Any]]:
    """Returns a row per policy: the angle and the error of its meta-gradient."""
    with jax.enable_x64(True):
        exact = meta_gradient(jnp.float64, POLICIES[0], tasks, num_filters, num_inner_steps)
    rows = []
    for policy in policies:
        found = meta_gradient(jnp.float32, policy, tasks, num_filters, num_inner_steps)
        norms = np.linalg.norm(found), np.linalg.norm(exact)
        rows.append({
            **policy, "1 - cosine": float(1 - found @ exact / (norms[0] * norms[1])),
            "relative error": float(np.linalg.norm(found - exact) / norms[1]),
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
