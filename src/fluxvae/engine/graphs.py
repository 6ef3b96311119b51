"""CUDA graphs: what one image asks of a GPU, recorded once for a size and a plan, and replayed for every other image.

A decode of 1024x1024 pixels makes a thousand launches, which take Python and the driver longer than some cards need to
carry them out. A graph makes all of them in one call. The price is memory: what the recorded run had allocated is at
fixed addresses, and stays allocated until the graph is dropped.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import closing

import torch

from fluxvae.engine.network import Network
from fluxvae.engine.plan import Plan
from fluxvae.engine.records import parameters, records_of
from fluxvae.engine.runner import Runner
from fluxvae.engine.statistics import raise_first
from fluxvae.errors import InvalidOptionError

__all__ = ["Graph", "Graphs", "addresses", "check_device", "record"]

_MOST = 8
"""Graphs that an engine keeps at most. Each also holds a thousand small objects of the driver's."""


def check_device(device: torch.device | None) -> None:
    """Refuse a device that has no graphs. None stands for wherever the model will be when it is used.

    Raises:
        InvalidOptionError: it is no GPU, or there is none here.
    """
    if not torch.cuda.is_available():
        raise InvalidOptionError("cuda_graphs: got True, but PyTorch sees no GPU with CUDA here; leave it out")
    if device is not None and device.type != "cuda":
        raise InvalidOptionError(
            f"cuda_graphs: got True with a model on {device}; expected one on a GPU: move it there, or leave it out"
        )


class Graph:
    """One image's run, recorded."""

    def __init__(self, runner: Runner, given: torch.Tensor, made: torch.Tensor, held_bytes: int) -> None:
        """Record what ``runner`` asks of the device for one image. Nothing is computed by that.

        Everything that the run needs must have been loaded and compiled before, which is to say that the same run must
        have been done once.

        Args:
            given, made: an image's, of which only the shapes, dtypes and device matter.
            held_bytes: what stays allocated, as the plan says.
        """
        self.held_bytes = held_bytes
        self._given, self._made = (torch.empty(one.shape, dtype=one.dtype, device=one.device) for one in (given, made))
        self._replay = record(lambda: runner.launch(self._given, self._made))
        self._answers = runner.checks.taken()
        self._runner = runner  # whose arena would otherwise be told to be free

    def run(self, given: torch.Tensor, made: torch.Tensor) -> None:
        """Compute an image, as `Runner.run` does.

        Raises:
            NonFiniteMap: a map or the result holds NaN or Inf.
        """
        self._given.copy_(given)
        self._replay()
        made.copy_(self._made)
        raise_first(self._answers)


def record(launch: Callable[[], None]) -> Callable[[], None]:
    """What ``launch`` asks of the current device (see `Kernels.session`), as a function that asks for all of it again.

    Other threads may go on using the device meanwhile. Whatever would have to wait for it makes ``launch`` fail.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        launch()
    return graph.replay


class Graphs:
    """The graphs that one engine keeps; the least recently used one goes first."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()

    @property
    def held_bytes(self) -> int:
        """What all of them hold. It may be asked while another thread decodes."""
        return sum(graph.held_bytes for graph in list(self._graphs.values()))

    def find(self, key: Hashable) -> Graph | None:
        """The graph of this key, which is the most recently used one now."""
        if key not in self._graphs:
            return None
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def make_room(self, allowed: int) -> None:
        """Drop graphs until there may be one more, and those that are left hold no more than ``allowed`` bytes."""
        while self._graphs and (len(self._graphs) >= _MOST or self.held_bytes > allowed):
            self._graphs.popitem(last=False)

    def run(
        self,
        key: Hashable,
        plan: Plan,
        images: list[tuple[torch.Tensor, torch.Tensor]],
        make_runner: Callable[[bool], Runner],
        *,
        limit: int,
        tick: Callable[[int], None],
    ) -> None:
        """Compute images by the graph of this key, after it was recorded if there is none.

        Args:
            key: all that a graph depends on.
            plan: how each image is computed.
            images: what is given, and where to write what is made of it.
            make_runner: makes a runner of this plan, which only records where it is told to.
            limit: bytes that all graphs and this call may hold.
            tick: called with the number of blocks that are done, where it is not the runner that calls it.

        Raises:
            NonFiniteMap: a map or a result holds NaN or Inf.
        """
        graph = self.find(key)
        if graph is None:
            assert plan.graph_bytes is not None
            self.make_room(limit - plan.peak_bytes)
            first, *images = images
            # Libraries load their code, and the Triton language compiles, as they are first used: before a recording.
            with closing(make_runner(False)) as runner:
                runner.run(*first)
            graph = self._graphs[key] = Graph(make_runner(True), *first, plan.graph_bytes)
        for given, made in images:
            graph.run(given, made)
            tick(plan.total_blocks // plan.batch)

    def clear(self) -> None:
        """Drop all."""
        self._graphs.clear()


def addresses(network: Network) -> Hashable:
    """Where the network's weights are. A graph reads them anew each time, but from where they were."""
    records = (record for layer in network.layers for record in records_of(layer))
    return tuple(
        (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        for record in records
        for tensor in parameters(record)
        if tensor is not None
    )
