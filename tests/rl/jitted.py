"""Functions of jaxmaml whose programs the tests of a process share."""

import jax

import jaxmaml
from jaxmaml import rl

collect = jax.jit(rl.collect, static_argnums=(0, 1))
meta_grad = jax.jit(jaxmaml.meta_grad, static_argnums=0, static_argnames="mesh")
