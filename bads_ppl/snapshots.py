"""Networks kept along the chains: predictions, and weights for points that arrive later.

A chain keeps the trained parameters and the buffers of all its networks at some of its draws,
evenly spaced, as safetensors files `snapshot-<draw>.safetensors` in its folder. Frozen parameters
are the network's own: a few of their values tell whether it is the same one. Averages over
snapshots are Monte-Carlo estimates over the same chains as the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bads_ppl.atomic import atomic_path
from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.program import capture_features
from bads_ppl.shards import together
from bads_ppl.sites import NetworkSite, evaluation_mode, frozen
from bads_ppl.weights import WeightNetwork

FROZEN = ".frozen"
"""Behind the name of a network: the key of what tells its frozen parameters."""


def _beginnings(parameters: dict[str, Tensor]) -> Tensor:
    """The first values of each parameter."""
    several = [together(value.detach()).flatten()[:8] for value in parameters.values()]
    return torch.cat(several).float().cpu()


def save_snapshot(folder: Path | None, draw: int, networks: dict[str, NetworkSite]) -> None:
    """Write the trained parameters and buffers of a chain's networks, companions left out.

    Without a folder nothing is written: a sharded network is put together by all processes.
    """
    tensors = {}
    for name, site in networks.items():
        if site.companion is not None:
            continue
        fixed = frozen(site.module)
        for key, value in site.module.state_dict().items():
            if key not in fixed:
                whole = together(value.detach()).cpu()
                tensors[f"{name}/{key}"] = whole.clone(memory_format=torch.contiguous_format)
        if fixed:
            tensors[f"{name}{FROZEN}"] = _beginnings(fixed)
    if folder is None:
        return
    with atomic_path(folder / f"snapshot-{draw:06d}.safetensors") as path:
        save_file(tensors, path)


def drop_snapshots(folder: Path, after: int) -> None:
    """Remove networks of draws after `after`: a stopped run left them, its checkpoint did not."""
    for path in folder.glob("snapshot-*.safetensors"):
        if int(path.stem.removeprefix("snapshot-")) > after:
            path.unlink()


class Snapshots:
    """The networks kept by the chains of a run.

    Args:
        run_dir: the run's folder, with `chain-<k>` below it.

    Raises:
        InputError: if there are none.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.paths = sorted(Path(run_dir).glob("chain-*/snapshot-*.safetensors"))
        if not self.paths:
            raise InputError(
                f"{run_dir} holds no networks: give the folder of a finished run (run_dir=...), "
                "made with snapshots of 1 or more"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def _each(self, **modules: nn.Module) -> Iterator[None]:
        """Load one snapshot after another into the modules given by group."""
        for path in self.paths:
            try:
                tensors = load_file(path)
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path} cannot be read ({error}): it is damaged") from error
            for name, module in modules.items():
                fixed, known = frozen(module), tensors.get(f"{name}{FROZEN}")
                if known is not None and not torch.equal(known, _beginnings(fixed)):
                    raise InputError(
                        f"{path} holds a {name!r} whose frozen parameters are others: give a "
                        "network that is made from the same pretrained model"
                    )
                own = {
                    key[len(name) + 1 :]: value
                    for key, value in tensors.items()
                    if key.startswith(f"{name}/")
                }
                state = {**fixed, **own}
                try:
                    module.load_state_dict(state)
                except RuntimeError as error:
                    raise InputError(
                        f"{path} holds no {name!r} of this shape: give the network (and weights) "
                        f"of the run. {error}"
                    ) from error
            yield

    @torch.no_grad()
    def predict(
        self,
        network: nn.Module,
        data: Data,
        link: Callable[[Tensor], Tensor] = lambda output: output.softmax(dim=1),
    ) -> Tensor:
        """Posterior predictive: the mean of link(output), (M, ...), over the snapshots.

        Args:
            network: a network of the run's shape; its trained parameters are overwritten.
            data: points to predict, on the network's device; targets are not used.
            link: outputs to what is averaged; default class probabilities from logits.
        """
        total: Tensor | None = None
        for _ in self._each(theta=network):
            with evaluation_mode(network):
                parts = [link(network(batch.input)) for batch in data.batches()]
            values = torch.cat(parts)
            total = values if total is None else total + values
        assert total is not None
        return total / len(self)

    @torch.no_grad()
    def weigh(
        self, network: nn.Module, weights: WeightNetwork, data: Data, head: nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean (M,) and standard deviation (M,) of the weights of new points, without retraining.

        Args:
            network: a network of the run's shape; its trained parameters are overwritten.
            weights: a weight network of the run's shape; likewise.
            data: points to weigh, with their labels where the weight network uses them.
            head: the layer whose input is the embedding; default `embedding_layer(network)`.
        """
        draws = []
        for _ in self._each(theta=network, phi=weights):
            parts = []
            with evaluation_mode(network), capture_features(network, head) as features:
                for batch in data.batches():
                    network(batch.input)
                    parts.append(weights(features.pop(), batch.target))
            draws.append(torch.cat(parts))
        stacked = torch.stack(draws)
        return stacked.mean(dim=0), stacked.std(dim=0, unbiased=False)
