"""Meta-gradients in plain torch.func, float64: an implementation that shares nothing with ours.

They are those of MAML with several inner optimizers, of ANIL (the head is w2) and of Meta-SGD.

`python tests/torch_reference.py` writes golden/torch_maml.npz, so that the comparison also runs where
PyTorch is not installed.
"""

import itertools
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "torch_maml.npz"
CASES = list(itertools.product(("sgd", "momentum", "adam"), (1, 3, 10), ("exact", "first")))
VARIANTS = ("anil", "meta_sgd")
NUM_VARIANT_STEPS = 3
RATE, MOMENTUM, EPS_ROOT, EPS = 0.1, 0.9, 1e-8, 1e-8


def problem():
    """Parameters and one 3-way 2-shot task of a tanh network, NumPy float64."""
    rng = np.random.default_rng(7)
    params = {
        "w1": rng.normal(size=(4, 6)),
        "b1": rng.normal(size=6),
        "w2": rng.normal(size=(6, 3)),
    }
    task = {
        f"{part}_{name}": value
        for part in ("support", "query")
        for name, value in (
            ("inputs", rng.normal(size=(6, 4))),
            ("targets", np.repeat(np.arange(3), 2)),
        )
    }
    return params, task


def meta_grad(params, task, optimizer, num_inner_steps, order):
    """Gradient of the query loss after the inner loop, as a dict of NumPy arrays."""
    import torch

    tensors = {name: torch.tensor(value) for name, value in params.items()}
    loss = _loss(torch, task)

    def query_loss(params):
        state = {name: (torch.zeros_like(x), torch.zeros_like(x)) for name, x in params.items()}
        for step in range(1, num_inner_steps + 1):
            grads = torch.func.grad(loss)(params, "support")
            if order == "first":
                grads = {name: grad.detach() for name, grad in grads.items()}
            params, state = _update(torch, optimizer, params, grads, state, step)
        return loss(params, "query")

    return {name: grad.numpy() for name, grad in torch.func.grad(query_loss)(tensors).items()}


def variant_grad(params, task, variant):
    """Gradient of the query loss after three steps, (of the parameters, of the rates or None)."""
    import torch

    tensors = {name: torch.tensor(value) for name, value in params.items()}
    adapts = ("w2",) if variant == "anil" else tuple(tensors)
    rates = {name: torch.full_like(x, RATE) for name, x in tensors.items() if name in adapts}
    loss = _loss(torch, task)

    def query_loss(params, rates):
        for _ in range(NUM_VARIANT_STEPS):
            grads = torch.func.grad(loss)(params, "support")
            params = {n: x - rates[n] * grads[n] if n in adapts else x for n, x in params.items()}
        return loss(params, "query")

    found = torch.func.grad(query_loss, argnums=(0, 1))(tensors, rates)
    return [{name: grad.numpy() for name, grad in grads.items()} for grads in found]


def _loss(torch, task):
    data = {name: torch.tensor(value) for name, value in task.items()}

    def loss(params, part):
        hidden = torch.tanh(data[f"{part}_inputs"] @ params["w1"] + params["b1"])
        logits = hidden @ params["w2"]
        return torch.nn.functional.cross_entropy(logits, data[f"{part}_targets"])

    return loss


def _update(torch, optimizer, params, grads, state, step):
    new_params, new_state = {}, {}
    for name, grad in grads.items():
        first, second = state[name]
        if optimizer == "sgd":
            update = grad
        elif optimizer == "momentum":
            first = update = MOMENTUM * first + grad
        else:
            first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
            mean, square = first / (1 - 0.9**step), second / (1 - 0.999**step)
            update = mean / (torch.sqrt(square + EPS_ROOT) + EPS)
        new_params[name] = params[name] - RATE * update
        new_state[name] = (first, second)
    return new_params, new_state


def name_of(optimizer, num_inner_steps, order):
    """The prefix of a case in the golden file."""
    return f"{optimizer}-{num_inner_steps}-{order}"


if __name__ == "__main__":
    params, task = problem()
    arrays = {
        f"{name_of(*case)}/{name}": grad
        for case in CASES
        for name, grad in meta_grad(params, task, *case).items()
    }
    for variant in VARIANTS:
        for part, grads in zip(
            ("params", "rates"), variant_grad(params, task, variant), strict=True
        ):
            arrays |= {f"{variant}/{part}/{name}": grad for name, grad in grads.items()}
    np.savez_compressed(GOLDEN, **arrays)
