"""The train and the meta batch of a step, side by side in memory, for one pass over both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from bads_ppl.data import Batch, Data, take
from bads_ppl.errors import InputError


def step_batches(
    train: Data,
    rows: Tensor,
    meta: Data,
    meta_rows: Tensor,
    generator: torch.Generator,
    importance: Tensor | None = None,
) -> tuple[Batch, Batch]:
    """The batches to make a step on: augmented, where the sets say how.

    What needs no augmentation lies in memory one after the other, train first, so that a pass over
    both copies nothing (`join`).

    Args:
        train: the train set.
        rows: (B_t,) rows of it.
        meta: the meta set.
        meta_rows: (B_m,) rows of that.
        generator: what augmentation draws from, for the train set first.
        importance: (B_t,) corrections of the train rows, see `Batch`.
    """
    if train.augment is None and meta.augment is None:
        inputs = _take_both(train.input, rows, meta.input, meta_rows)
        targets = _take_both(train.target, rows, meta.target, meta_rows)
        return (
            Batch(rows, inputs[0], targets[0], len(train), importance),
            Batch(meta_rows, inputs[1], targets[1], len(meta)),
        )
    first, second = train.batch(rows, importance), meta.batch(meta_rows)
    if train.augment is not None:
        first = replace(first, input=train.augment(first.input, generator))
    if meta.augment is not None:
        second = replace(second, input=meta.augment(second.input, generator))
    return first, second


def _take_both(first: Any, rows: Tensor, second: Any, others: Tensor) -> tuple[Any, Any]:
    """The rows (B,) of one tree and (C,) of another, side by side where leaves fit."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.shape[1:] != second.shape[1:] or first.dtype != second.dtype:
            return first.index_select(0, rows), second.index_select(0, others)
        count = rows.numel()
        both = first.new_empty((count + others.numel(), *first.shape[1:]))
        parts = both[:count], both[count:]
        torch.index_select(first, 0, rows, out=parts[0])
        torch.index_select(second, 0, others, out=parts[1])
        return parts
    leaves, form = tree_flatten(first)
    opposite, other_form = tree_flatten(second)
    if form != other_form:
        return take(first, rows), take(second, others)
    pairs = [_take_both(a, rows, b, others) for a, b in zip(leaves, opposite, strict=True)]
    return form.unflatten([a for a, _ in pairs]), form.unflatten([b for _, b in pairs])


def join(first: Any, second: Any) -> Any:
    """Two input trees one after the other, leaf by leaf along the first dimension.

    What lies so in memory already (`step_batches`) is not copied.

    Raises:
        InputError: if the trees or the leaves' other dimensions differ.
    """
    tensors = isinstance(first, Tensor) and isinstance(second, Tensor)
    if tensors and first.shape[1:] == second.shape[1:]:
        return _joined(first, second)
    leaves, form = tree_flatten(first)
    others, other_form = tree_flatten(second)
    if form != other_form or any(
        a.shape[1:] != b.shape[1:] for a, b in zip(leaves, others, strict=True)
    ):
        raise InputError(
            "train and meta inputs must have the same form, got shapes "
            f"{[tuple(x.shape[1:]) for x in leaves]} and {[tuple(x.shape[1:]) for x in others]}"
        )
    return form.unflatten([_joined(*pair) for pair in zip(leaves, others, strict=True)])


def _joined(first: Tensor, second: Tensor) -> Tensor:
    whole = first._base
    if (
        whole is not None
        and whole is second._base
        and whole.shape == (first.size(0) + second.size(0), *first.shape[1:])
        and whole.storage_offset() == first.storage_offset()
        and whole.storage_offset() + first.numel() == second.storage_offset()
        and whole.is_contiguous()
        and first.is_contiguous()
        and second.is_contiguous()
        and not (first.requires_grad or second.requires_grad)
    ):
        return whole
    return torch.cat((first, second))
