"""One file per algorithm; `jaxmaml` exports the constructors, which return a `MetaLearner`."""
