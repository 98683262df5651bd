"""Tasks: image pools and sinusoids sampled inside jit, and the data sets that fill the pools."""

from jaxmaml.data import pools as pools
from jaxmaml.data import sinusoid as sinusoid
from jaxmaml.data import sources as sources
