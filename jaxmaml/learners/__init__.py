"""One file an algorithm; each is a constructor that returns a `MetaLearner`."""

from jaxmaml.learners.maml import maml as maml
