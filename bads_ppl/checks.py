"""Checks of a network, a loss and labels on a few real points, before a long run starts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.losses import Loss, cross_entropy
from bads_ppl.sites import evaluation_mode


def check_network(network: nn.Module, loss: Loss, *sets: Data) -> None:
    """Refuse a network or loss that does not fit the data.

    Raises:
        InputError: if no parameter can be trained, labels do not fit the network's classes, inputs
            are changed in place, or the loss is not of shape (B,) or not finite.
    """
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise InputError(
            f"{type(network).__name__} has no parameter with requires_grad=True, so nothing to "
            "learn: unfreeze some of its parameters"
        )
    for data in sets:
        batch = data.batch(torch.arange(min(4, len(data)), device=data.device))
        with torch.no_grad(), evaluation_mode(network):
            leaves = tree_leaves(batch.input)
            before = [leaf.clone() for leaf in leaves]
            output = network(batch.input)
            if not all(map(torch.equal, leaves, before)):
                raise InputError(
                    f"{type(network).__name__} changes its inputs in place, and they are looked at "
                    "more than once: let it work on a copy, x = x.clone()"
                )
            if loss is cross_entropy:
                if not isinstance(output, Tensor) or output.ndim != 2:
                    found = tuple(output.shape) if isinstance(output, Tensor) else type(output)
                    raise InputError(
                        f"cross_entropy takes logits of shape (B, classes), got {found}: mend the "
                        "network's output, or give another loss"
                    )
                check_labels(data, output.shape[1])
            losses = loss(output, batch.target)
        if not isinstance(losses, Tensor) or losses.shape != (len(batch),):
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise InputError(
                f"loss must return one value per example, shape ({len(batch)},) for a batch of "
                f"{len(batch)}, got {shape}: use reduction='none'"
            )
        if not bool(losses.isfinite().all()):
            raise InputError(
                f"the loss of the first {data.name} points is not finite: {losses.tolist()}; "
                "check the inputs' scale and the network's initial parameters"
            )


def check_labels(data: Data, classes: int) -> None:
    """Refuse labels that are not integers in 0 to classes - 1.

    Raises:
        InputError: naming the first wrong label and its index.
    """
    target = data.target
    if target.is_floating_point() or target.ndim != 1:
        raise InputError(
            f"{data.name} labels must be integers of shape (N,), got {target.dtype} of shape "
            f"{tuple(target.shape)}"
        )
    wrong = (target < 0) | (target >= classes)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise InputError(
            f"{data.name} labels must be in 0..{classes - 1} for a network of {classes} classes, "
            f"got {int(target[row])} at index {int(data.ids[row])}: mend the label or the network"
        )


def check_classes(test: Data, meta: Data) -> None:
    """Refuse a meta set that lacks a class of the test set.

    Raises:
        InputError: naming the classes.
    """
    missing = sorted(set(test.target.unique().tolist()) - set(meta.target.unique().tolist()))
    if missing:
        raise InputError(
            f"the meta set lacks classes {missing} that the test set has: what it lacks cannot be "
            "selected for; add points of these classes to it"
        )
