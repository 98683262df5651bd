"""MAML's meta-gradient in PyTorch and in libraries on top of it, each used as its authors advise.

A peer is built from a `Model`. It has leaf tensors, and a function that leaves the mean meta-gradient
in their `.grad`. Building or running a peer may raise any exception, which the caller reports.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peer_models import Data, Model, Tensors


class Peer(NamedTuple):
    """A side of the comparison.

    Attributes:
        params: leaf tensors, which an outer optimizer updates.
        run: fills `.grad` of every leaf with the mean meta-gradient.
    """

    params: Tensors
    run: Callable[[], Any]


class Net(torch.nn.Module):
    """The model as a module, which some libraries require."""

    def __init__(self, model: Model):
        super().__init__()
        self.names = list(model.params)
        self.apply_fn = model.apply
        for name, leaf in _leaves(model).items():
            self.register_parameter(name, torch.nn.Parameter(leaf))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns the outputs of one task's batch."""
        return self.apply_fn({name: getattr(self, name) for name in self.names}, inputs)


def autograd(model: Model) -> Peer:
    """Returns the peer of torch.autograd.grad(create_graph=True), one task after the other."""
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
    """Returns the peer of torch.func.grad, one task after the other."""
    return _loop(model, _task_gradient(model))


def func_vmap(model: Model) -> Peer:
    """Returns the peer of torch.func.grad under torch.func.vmap over tasks."""
    return _vmap(model, lambda function: function)


def compile_loop(model: Model) -> Peer:
    """Returns the peer of torch.compile of a task's torch.func.grad, one task after the other."""
    return _loop(model, torch.compile(_task_gradient(model)))


def compile_vmap(model: Model) -> Peer:
    """Returns the peer of torch.compile of torch.func.grad under torch.func.vmap over tasks."""
    return _vmap(model, torch.compile)


def higher(model: Model) -> Peer:
    """Returns the peer of the library higher: a patched module and a differentiable SGD."""
    # A module and its optimizer; a rate of zero leaves fixed parameters alone.
    library: Any = importlib.import_module("higher")
    net = Net(model)
    params: Tensors = dict(net.named_parameters())
    fixed = [leaf for name, leaf in params.items() if name not in model.adapted]
    groups = [
        {"params": [params[name] for name in model.adapted]},
        *([{"params": fixed, "lr": 0.0}] if fixed else []),
    ]
    optimizer = torch.optim.SGD(groups, lr=model.inner_lr)
    # One task after the other.
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
    """Returns the peer of the library torchopt: its differentiable functional SGD."""
    library: Any = importlib.import_module("torchopt")
    params = _leaves(model)
    optimizer = library.sgd(lr=model.inner_lr)

    def query_loss(support: Data, query: Data) -> torch.Tensor:
        # The optimizer sees only the parameters that are adapted.
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
    """Returns the peer of learn2learn: MAML.clone and MAML.adapt, without the fixed parameters."""
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


def metalearn_vmap(model: Model) -> Peer:
    """Returns the peer of parallel-metalearn: MAML.step, all tasks at once."""
    # The library's own layer computes moments, too: autograd outside of vmap differentiates
    # PyTorch's batch_norm of a convolution twice with a wrong result (a relative error of 1e-4 to 4e-2).
    return _metalearn(model._replace(apply=model.apply_by_moments), "vmap")


def metalearn_loop(model: Model) -> Peer:
    """Returns the peer of parallel-metalearn: MAML.step, one task after the other."""
    return _metalearn(model, "sequential")


PEERS: dict[str, Callable[[Model], Peer]] = {
    "torch.autograd": autograd,
    "torch.func loop": func_loop,
    "torch.func vmap": func_vmap,
    "torch.compile loop": compile_loop,
    "torch.compile vmap": compile_vmap,
    "higher": higher,
    "torchopt": torchopt,
    "learn2learn": learn2learn,
    "parallel-metalearn vmap": metalearn_vmap,
    "parallel-metalearn loop": metalearn_loop,
}
"""Every peer, by its name in the table."""
COMPILED = ("torch.compile loop", "torch.compile vmap")
"""The peers that compile for minutes."""


def _metalearn(model: Model, backend: str) -> Peer:
    """Returns the peer of parallel-metalearn with one of its two backends."""
    algorithms, optimizers, losses, wrappers = (
        importlib.import_module(f"metalearn.{name}")
        for name in ("algorithms", "inner_optimizers", "loss", "model_wrappers")
    )

    class Backbone(Net):
        def forward(self, inputs: torch.Tensor, **_: Any) -> torch.Tensor:
            return super().forward(inputs)

    class Head(torch.nn.Module):
        def forward(self, outputs: torch.Tensor, **_: Any) -> torch.Tensor:
            return outputs

    class Score(losses.BaseLoss):
        def forward(self, out_dict: Any, targets: torch.Tensor, **_: Any) -> tuple[Any, Any]:
            loss = model.score(out_dict["logits"], targets)
            return loss, loss.detach()  # a loss and a metric

    net = Backbone(model)
    wrapped = wrappers.MAML_Model(net, Head(), fast_weights_names=list(model.adapted))
    inner = optimizers.InnerSGD(
        wrapped.get_fast_weights(), first_order=not model.exact, learn_lr=False
    )
    # In the precision of the model: the library rounds the rate to float32.
    inner.to(next(iter(model.params.values())).dtype)
    for rate in inner.parameters():
        rate.data.fill_(model.inner_lr)
    learner = algorithms.MAML(
        model=wrapped, optimizer=_NoStep(wrapped.parameters(), {}), inner_optimizer=inner,
        support_loss_fn=Score(), inner_steps=model.num_inner_steps, backend=backend,
        device=model.support[0].device,
    )  # fmt: skip
    batch = (*model.support, *model.query)
    return Peer(dict(net.named_parameters()), lambda: learner.step(iter([batch])))


class _NoStep(torch.optim.Optimizer):
    """Leaves the parameters to the caller's optimizer."""

    def step(self, closure: Any = None) -> None:
        """Changes nothing."""


def _leaves(model: Model) -> Tensors:
    return {name: leaf.clone().requires_grad_() for name, leaf in model.params.items()}


def _grads(model: Model, loss: torch.Tensor, params: Tensors) -> tuple[torch.Tensor, ...]:
    inputs = [params[name] for name in model.adapted]
    return torch.autograd.grad(loss, inputs, create_graph=model.exact)


def _accumulate(
    model: Model, params: Tensors, query_loss: Callable[[Data, Data], torch.Tensor]
) -> Callable[[], None]:
    """Returns a `run` with one backward pass per task, so that one graph is alive at a time."""
    tasks = model.tasks()

    def run() -> None:
        _forget_grads(params)
        for support, query in tasks:
            (query_loss(support, query) / len(tasks)).backward()

    return run


def _forget_grads(params: Tensors) -> None:
    for leaf in params.values():
        leaf.grad = None


def _add(params: Tensors, grads: Any) -> None:
    for leaf, grad in zip(params.values(), grads, strict=True):
        leaf.grad = grad if leaf.grad is None else leaf.grad + grad


def _task_gradient(model: Model) -> Callable[[Tensors, Data, Data], Tensors]:
    """Returns `(params, support, query) -> ` the meta-gradient of one task."""

    def adapt(params: Tensors, support: Data) -> Tensors:
        for _ in range(model.num_inner_steps):
            inner = {name: params[name] for name in model.adapted}
            # `fixed` binds the parameters of this iteration, in which torch.func traces the loss.
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
    """Returns the peer that adds up the gradients of one task after the other."""
    # Without requires_grad: autograd would record what torch.func differentiates.
    params = {name: leaf.clone() for name, leaf in model.params.items()}
    tasks = model.tasks()

    def run() -> None:
        _forget_grads(params)
        for support, query in tasks:
            _add(params, gradient(params, support, query).values())
        for leaf in params.values():
            leaf.grad = None if leaf.grad is None else leaf.grad / len(tasks)

    return Peer(params, run)


def _vmap(model: Model, transform: Callable[[Any], Any]) -> Peer:
    """Returns the peer that computes all tasks at once, in a function that is transformed."""
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
