"""Makes the narrow FFNs of a plan, group by group, so that no more than a group's statistics are ever held."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor

from ..ffn import check_finite, find_activation, read_ffn
from ..fusing.activations import Activation
from ..fusing.calibrated import cluster_centroids, fuse_calibrated
from ..fusing.centroids import CentroidMoments
from ..fusing.curves import Eliminated
from ..fusing.recipe import Recipe
from ..fusing.settle import settle
from ..fusing.statistics import FFNStatistics
from ..fusing.weights import FFNWeights, NarrowFFN
from ..observe import ranks
from ..observe.fisher import fisher_information
from ..observe.gradients import NoGradients
from ..observe.networks import Network
from ..tuner.build import whole
from ..tuner.plan import PlannedFFN
from .attribution import contributions
from .budget import budgeted_widths, measured
from .collect import collect, collect_centroids
from .inputs import Inputs
from .scales import fit_scales_of
from .share import share_measured, share_results

Known = tuple[FFNWeights, int, FFNStatistics, Activation, Recipe, int | None]
"""What making a narrow FFN, or its centroids, takes."""


class Narrowing:
    """The work of a calibration, in its order.

    Args:
        network: the original model, running, and the planned FFNs.
        plan: which FFNs, and how wide they are to be.
        inputs: what to calibrate on.
        asked: the recipe that was asked for.
        group: how many FFNs to work on at once.

    Raises:
        ValueError: if the recipe cannot use a calibration.
    """

    def __init__(self, network: Network, plan: Sequence[PlannedFFN], inputs: Inputs, asked: Recipe, group: int) -> None:
        self.network, self.plan, self.inputs, self.asked = network, list(plan), inputs, asked
        self.source = f"{ranks.sum_of(inputs.count):.0f} sequences of {inputs.source}"
        self.recipe = settle(asked, self.source, gradients=True)
        self.size = group
        self._held: dict[str, FFNStatistics] = {}  # what a budget was made of and the narrow FFNs are made of, too
        for p in self.plan:
            check_finite(read_ffn(p.ffn), p.ffn)
            find_activation(p.ffn)

    @property
    def groups(self) -> list[list[PlannedFFN]]:
        """The FFNs that become narrower, group by group."""
        narrowed = [p for p in self.plan if p.width < p.ffn.width]
        return [narrowed[start : start + self.size] for start in range(0, len(narrowed), self.size)]

    def allocate(
        self, replan: Callable[[Mapping[str, int]], list[PlannedFFN]], multiple_of: int, fixed: Collection[str] = ()
    ) -> list[PlannedFFN]:
        """Gives each FFN the width at which a neuron is worth as much as in any other, and leaves out those left whole.

        Args:
            replan: FFN name -> width, to a plan of these FFNs.
            multiple_of: what a width is a multiple of.
            fixed: FFNs that keep the width they are planned with.

        Returns:
            The plan from now on. All FFNs together have as many parameters as they were to have before.

        Raises:
            ValueError: if the model has no gradients.
        """
        found: dict[str, Eliminated] = {}
        for group in self.groups:
            own = self._statistics(group, with_metric=True)

            def measure(p: PlannedFFN, own: dict[str, FFNStatistics] = own) -> Eliminated:
                return measured(p, own[p.ffn.name], multiple_of, p.ffn.name in fixed)

            found |= share_measured(group, measure)
            self._held = own if len(self.groups) == ranks.world() == 1 else {}
        errors = {name: one.errors for name, one in found.items() if name not in fixed}
        narrow = {p.ffn.name: found[p.ffn.name].narrow[p.width] for p in self.plan if p.ffn.name in found}
        _, parts = contributions(self.network, narrow, self.inputs.for_the_budget) if errors else (0.0, {})
        widths = budgeted_widths(self.plan, errors, parts, multiple_of)
        if widths:
            self.plan = replan(widths)
            self.network = self.network.of([p.ffn for p in self.plan])
        return self.plan

    def narrow_ffns(self) -> dict[str, NarrowFFN]:
        """FFN name -> its narrow FFN, its scales fitted; an FFN that is to stay whole is itself."""
        narrow = {p.ffn.name: whole(p) for p in self.plan if p.width == p.ffn.width}
        for group in self.groups:
            narrow |= self._narrowed(group)
        if self.recipe.scale == "ntk" and self.groups:
            fit_scales_of(self.network, self.groups, narrow, self.inputs, self.recipe.seed + 1)
        return {p.ffn.name: narrow[p.ffn.name] for p in self.plan}

    def _narrowed(self, group: list[PlannedFFN]) -> dict[str, NarrowFFN]:
        """The narrow FFNs of a group, with scales that need no gradients; its statistics are freed one by one."""
        own = self._held or self._statistics(group)
        centroids = self._centroids(group, own)

        def fuse(p: PlannedFFN) -> NarrowFFN:
            return fuse_calibrated(*self._known(p, own.pop(p.ffn.name)), centroids.pop(p.ffn.name, None))

        return share_results(group, fuse, "Fusing FFNs")

    def _statistics(self, group: list[PlannedFFN], with_metric: bool = False) -> dict[str, FFNStatistics]:
        """What is known of those FFNs of a group that this rank works on, with the metric if anything asks for it."""
        fishers = self._fisher(group, with_metric)
        statistics = collect(self.network.of([p.ffn for p in group]), self.inputs)
        for name, fisher in fishers.items():
            statistics[name].fisher = fisher
        return {p.ffn.name: statistics[p.ffn.name] for p in ranks.own(group)}

    def _centroids(self, group: list[PlannedFFN], statistics: dict[str, FFNStatistics]) -> dict[str, CentroidMoments]:
        """What a group's centroids do on all training tokens, if the recipe refits centroids."""
        if self.recipe.representative != "centroid" or self.recipe.refit == "none":
            return {}

        def cluster(p: PlannedFFN) -> NarrowFFN:
            return cluster_centroids(*self._known(p, statistics[p.ffn.name]))

        network = self.network.of([p.ffn for p in group])
        return collect_centroids(network, share_results(group, cluster, "Clustering"), self.inputs)

    def _known(self, p: PlannedFFN, statistics: FFNStatistics) -> Known:
        return read_ffn(p.ffn), p.width, statistics, find_activation(p.ffn), self.recipe, p.ffn.homogeneity

    def _fisher(self, group: list[PlannedFFN], with_metric: bool) -> dict[str, Tensor]:
        """The group's Fisher information, if the recipe or a budget looks at it.

        Raises:
            ValueError: if it was asked for by name, and the model has no gradients.
        """
        if self.recipe.kernel != "fisher" and not with_metric:
            return {}
        try:
            network = self.network.of([p.ffn for p in group])
            return fisher_information(network, self.inputs.for_the_metric, self.recipe.seed + 2)
        except NoGradients as error:
            if with_metric:
                raise ValueError(
                    f'`allocation="fisher"` needs gradients, and none could be taken through '
                    f"{type(self.network.model).__name__}: {error}. Give widths by `width_pattern`, or one `ratio`."
                ) from error
            self.recipe = settle(self.asked, self.source, gradients=False)
            warnings.warn(
                f"No gradients could be taken through {type(self.network.model).__name__}, so errors of its FFNs' "
                f"outputs all count alike: {error}",
                stacklevel=5,
            )
            return {}
