"""What several test modules of this folder use: data, paths of leaves, tasks and meta-gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxmaml


def draw(seed, *shape):
    """Standard normal numbers, in float64 where that is enabled."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def paths(params):
    """The names that a mask sees."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}


def jitter(params):
    """Moves zero biases and unit scales, lest a term left out go unnoticed."""
    leaves, treedef = jax.tree.flatten(params)
    moved = [leaf + 0.1 * draw(i, *leaf.shape).astype(leaf.dtype) for i, leaf in enumerate(leaves)]
    return treedef.unflatten(moved)


def assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected
    )


def is_finite(tree):
    return all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def classified(*shape, way=3, shot=2, seed=1, **extra):
    """A task of that way and shot, as many query as support examples, of inputs of that shape."""
    targets = jnp.repeat(jnp.arange(way), shot)
    batch = lambda seed: {"inputs": draw(seed, way * shot, *shape), "targets": targets, **extra}
    return jaxmaml.Task(support=batch(seed), query=batch(seed + 1))


def meta_gradient(loss_fn, params, task, *, state=(), num_inner_steps=2, **options):
    """(gradient, info) of MAML with an inner rate of 0.1."""
    learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), num_inner_steps, **options)
    grad = jax.jit(jax.grad(learner.loss, has_aux=True))
    return grad(params, task, state=state)


def assert_adjoints_agree(loss_fn, params, task, **options):
    """Forward over reverse and plain reverse mode give one gradient, neither 0 nor NaN; which, info."""
    (ours, info), (plain, _) = (
        meta_gradient(loss_fn, params, task, adjoint=adjoint, **options)
        for adjoint in ("forward_over_reverse", "reverse")
    )
    assert max(abs(leaf).max() for leaf in jax.tree.leaves(plain)) > 1e-6
    assert_trees_close(ours, plain, rtol=1e-10, atol=1e-10)
    return ours, info
