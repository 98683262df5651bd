"""MAML's meta-gradient in PyTorch and in the libraries on top of it, each as its authors advise.

A peer is built from a `Model` and gives its leaf tensors and a function that leaves the mean
meta-gradient in their `.grad`. An exception in building or running one is the caller's to report.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peer_models import Data, Model, Tensors


class Peer(NamedTuple):
    """A side of the comparison.

    Attributes:
        params: leaf tensors, what an outer optimiser updates.
        run: fills `.grad` of every leaf with the mean meta-gradient.
    """

    params: Tensors
    run: Callable[[], None]


class Net(torch.nn.Module):
    """The model as a module, which some libraries ask for."""

    def __init__(self, model: Model):
        super().__init__()
        self.names = list(model.params)
        self.apply_fn = model.apply
        for name, leaf in _leaves(model).items():
            self.register_parameter(name, torch.nn.Parameter(leaf))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Outputs of one task's batch."""
        return self.apply_fn({name: getattr(self, name) for name in self.names}, inputs)


def autograd(model: Model) -> Peer:
    """torch.autograd.grad(create_graph=True), one task after the other."""
    params = _leaves(model)

    def query_loss(support: Data, query: Data) -> torch.Tensor:
        adapted = dict(params)
        for _ in range(model.num_inner_steps):
            grads = _grads(model, model.loss(adapted, support), adapted)
            changed = {
                name: adapted[name] - model.inner_lr * grad
                for name, grad in zip(model.adapted, grads, strict=True)
            }
            adapted = {**adapted, **changed}
        return model.loss(adapted, query)

    return Peer(params, _accumulate(model, params, query_loss))


def func_loop(model: Model) -> Peer:
    """torch.func.grad, one task after the other."""
    return _loop(model, _task_gradient(model))


def func_vmap(model: Model) -> Peer:
    """torch.func.grad under torch.func.vmap over tasks."""
    return _vmap(model, lambda function: function)


def compile_loop(model: Model) -> Peer:
    """torch.compile of one task's torch.func.grad, one task after the other."""
    return _loop(model, torch.compile(_task_gradient(model)))


def compile_vmap(model: Model) -> Peer:
    """torch.compile of torch.func.grad under torch.func.vmap over tasks."""
    return _vmap(model, torch.compile)


def higher(model: Model) -> Peer:
    """The library higher: a patched module and a differentiable SGD."""
    library: Any = importlib.import_module("higher")
    net = Net(model)
    params: Tensors = dict(net.named_parameters())
    fixed = [leaf for name, leaf in params.items() if name not in model.adapted]
    groups = [
        {"params": [params[name] for name in model.adapted]},
        *([{"params": fixed, "lr": 0.0}] if fixed else []),
    ]
    optimizer = torch.optim.SGD(groups, lr=model.inner_lr)
    tasks = model.tasks()

    def run() -> None:
        net.zero_grad()
        for support, query in tasks:
            with library.innerloop_ctx(
                net, optimizer, copy_initial_weights=False, track_higher_grads=model.exact
            ) as (patched, inner):
                for _ in range(model.num_inner_steps):
                    inner.step(model.score(patched(support[0]), support[1]))
                loss = model.score(patched(query[0]), query[1]) / len(tasks)
                if model.exact:
                    loss.backward()
                else:
                    _add(params, torch.autograd.grad(loss, list(patched.fast_params)))

    return Peer(params, run)


def torchopt(model: Model) -> Peer:
    """The library torchopt: its differentiable functional SGD."""
    library: Any = importlib.import_module("torchopt")
    params = _leaves(model)
    optimizer = library.sgd(lr=model.inner_lr)

    def query_loss(support: Data, query: Data) -> torch.Tensor:
        adapted = dict(params)
        inner = tuple(params[name] for name in model.adapted)
        state = optimizer.init(inner)
        for _ in range(model.num_inner_steps):
            grads = _grads(model, model.loss(adapted, support), adapted)
            updates, state = optimizer.update(grads, state, params=inner, inplace=False)
            inner = library.apply_updates(inner, updates, inplace=False)
            adapted = {**adapted, **dict(zip(model.adapted, inner, strict=True))}
        return model.loss(adapted, query)

    return Peer(params, _accumulate(model, params, query_loss))


def learn2learn(model: Model) -> Peer:
    """The library learn2learn: what its MAML.clone and MAML.adapt do, sparing fixed parameters."""
    library: Any = importlib.import_module("learn2learn")
    net = Net(model)

    def query_loss(support: Data, query: Data) -> torch.Tensor:
        clone = library.clone_module(net)
        for _ in range(model.num_inner_steps):
            params = dict(clone.named_parameters())
            grads = _grads(model, model.score(clone(support[0]), support[1]), params)
            known = dict(zip(model.adapted, grads, strict=True))
            by_parameter = [known.get(name) for name in params]
            clone = library.algorithms.maml_update(clone, model.inner_lr, by_parameter)
        return model.score(clone(query[0]), query[1])

    params: Tensors = dict(net.named_parameters())
    return Peer(params, _accumulate(model, params, query_loss))


PEERS: dict[str, Callable[[Model], Peer]] = {
    "torch.autograd": autograd,
    "torch.func loop": func_loop,
    "torch.func vmap": func_vmap,
    "torch.compile loop": compile_loop,
    "torch.compile vmap": compile_vmap,
    "higher": higher,
    "torchopt": torchopt,
    "learn2learn": learn2learn,
}
"""Every peer, by the name it has in the table."""


def _leaves(model: Model) -> Tensors:
    return {name: leaf.clone().requires_grad_() for name, leaf in model.params.items()}


def _grads(model: Model, loss: torch.Tensor, params: Tensors) -> tuple[torch.Tensor, ...]:
    inputs = [params[name] for name in model.adapted]
    return torch.autograd.grad(loss, inputs, create_graph=model.exact)


def _accumulate(
    model: Model, params: Tensors, query_loss: Callable[[Data, Data], torch.Tensor]
) -> Callable[[], None]:
    """One backward pass a task, so that one task's graph is alive at a time."""
    tasks = model.tasks()

    def run() -> None:
        for leaf in params.values():
            leaf.grad = None
        for support, query in tasks:
            (query_loss(support, query) / len(tasks)).backward()

    return run


def _add(params: Tensors, grads: Any) -> None:
    for leaf, grad in zip(params.values(), grads, strict=True):
        leaf.grad = grad if leaf.grad is None else leaf.grad + grad


def _task_gradient(model: Model) -> Callable[[Tensors, Data, Data], Tensors]:
    """(params, support, query) -> one task's meta-gradient."""

    def adapt(params: Tensors, support: Data) -> Tensors:
        for _ in range(model.num_inner_steps):
            inner = {name: params[name] for name in model.adapted}
            # Bound here: torch.func traces this function within this iteration.
            grads = torch.func.grad(lambda x, fixed=params: model.loss({**fixed, **x}, support))(
                inner
            )
            changed = {name: inner[name] - model.inner_lr * grads[name] for name in inner}
            params = {**params, **changed}
        return params

    def first_order(params: Tensors, support: Data, query: Data) -> Tensors:
        return torch.func.grad(model.loss)(adapt(params, support), query)

    def exact(params: Tensors, support: Data, query: Data) -> Tensors:
        return torch.func.grad(lambda x: model.loss(adapt(x, support), query))(params)

    return exact if model.exact else first_order


def _loop(model: Model, gradient: Callable[[Tensors, Data, Data], Tensors]) -> Peer:
    # Not requires_grad: autograd would record what torch.func differentiates.
    params = {name: leaf.clone() for name, leaf in model.params.items()}
    tasks = model.tasks()

    def run() -> None:
        for leaf in params.values():
            leaf.grad = None
        for support, query in tasks:
            _add(params, gradient(params, support, query).values())
        for leaf in params.values():
            leaf.grad = None if leaf.grad is None else leaf.grad / len(tasks)

    return Peer(params, run)


def _vmap(model: Model, transform: Callable[[Any], Any]) -> Peer:
    params = {name: leaf.clone() for name, leaf in model.params.items()}
    task_gradient = _task_gradient(model)

    def mean_gradient(params: Tensors, support: Data, query: Data) -> Tensors:
        grads = torch.func.vmap(task_gradient, in_dims=(None, 0, 0))(params, support, query)
        return {name: grad.mean(0) for name, grad in grads.items()}

    gradient = transform(mean_gradient)

    def run() -> None:
        for name, grad in gradient(params, model.support, model.query).items():
            params[name].grad = grad

    return Peer(params, run)
