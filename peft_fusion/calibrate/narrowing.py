"""Makes the narrow FFNs of a plan, group by group, so that no more than a group's statistics are ever held."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ..ffn import activation_of, read_one
from ..fusing.activations import Activation
from ..fusing.calibrated import cluster_centroids, fuse_calibrated
from ..fusing.centroids import CentroidMoments
from ..fusing.curves import Eliminated
from ..fusing.methods import narrow_by
from ..fusing.recipe import Recipe
from ..fusing.settle import settle
from ..fusing.statistics import FFNStatistics
from ..fusing.weights import FFNWeights, NarrowFFN
from ..observe import ranks
from ..observe.fisher import fisher_sums
from ..observe.gradients import NoGradients
from ..observe.networks import Network
from ..tuner.build import check_readable, whole
from ..tuner.plan import AnyPlanned
from .attribution import contributions
from .budget import added_up, budgeted_widths, measured
from .collect import collect, collect_centroids
from .inputs import Inputs
from .pieces import Piece, pieces_of
from .scales import fit_scales_of
from .sequential import refit_in_sequence, steps_of
from .share import share_measured, share_results
from .starved import Starved

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

    def __init__(self, network: Network, plan: Sequence[AnyPlanned], inputs: Inputs, asked: Recipe, group: int) -> None:
        self.network, self.plan, self.inputs, self.asked = network, list(plan), inputs, asked
        self.source = f"{ranks.sum_of(inputs.count):.0f} sequences of {inputs.source}"
        self.recipe = settle(asked, self.source, gradients=True)
        self.size = group
        self._held: dict[str, FFNStatistics] = {}  # what a budget was made of and the narrow FFNs are made of, too
        self._starved = Starved()
        for p in self.plan:
            check_readable(p)
        for piece in pieces_of(self.plan):
            activation_of(piece.ffn)
        narrowed = [p for group in self.groups for p in group]
        self._steps = steps_of(network, narrowed, inputs) if self.recipe.refit == "sequential" else []

    @property
    def groups(self) -> list[list[AnyPlanned]]:
        """The FFNs that become narrower, group by group."""
        narrowed = [p for p in self.plan if p.width < p.ffn.width]
        return [narrowed[start : start + self.size] for start in range(0, len(narrowed), self.size)]

    def allocate(
        self, replan: Callable[[Mapping[str, int]], list[AnyPlanned]], multiple_of: int, fixed: Collection[str] = ()
    ) -> list[AnyPlanned]:
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
        errors: dict[str, dict[int, float]] = {}
        narrow: dict[str, NarrowFFN] = {}  # of the widths that they are planned with
        for group in self.groups:
            own = self._statistics(group, with_metric=True)
            of_fixed = {one.ffn.name for one in pieces_of(p for p in group if p.ffn.name in fixed)}

            def measure(p: Piece, own: dict[str, FFNStatistics] = own, of_fixed: set[str] = of_fixed) -> Eliminated:
                if p.ffn.name in self._starved.by_weights:
                    return Eliminated({}, {p.width: self._by_weights(p)})
                return measured(p, own[p.ffn.name], multiple_of, p.ffn.name in of_fixed)

            found = share_measured(pieces_of(group), measure)
            narrow |= {p.ffn.name: found[p.ffn.name].narrow[p.width] for p in pieces_of(group)}
            free = [p for p in group if p.ffn.name not in fixed]
            errors |= {p.ffn.name: added_up(found[one.ffn.name].errors for one in pieces_of([p])) for p in free}
            self._held = own if len(self.groups) == ranks.world() == 1 else {}
        widths = budgeted_widths(self.plan, errors, self._contributions(narrow), multiple_of) if errors else {}
        if widths:
            self.plan = replan(widths)
            self.network = self.network.of([p.ffn for p in self.plan])
        return self.plan

    def _contributions(self, narrow: Mapping[str, NarrowFFN]) -> dict[str, float]:
        """FFN name -> what it contributes, all its experts together if it has any, with all narrow ones in place."""
        planned = [p for group in self.groups for p in group]
        try:
            _, of_each = contributions(self.network.of([p.ffn for p in planned]), narrow, self.inputs.for_the_budget)
        except NoGradients as error:
            raise self._no_budget(error) from error
        return {p.ffn.name: sum(of_each[one.ffn.name] for one in pieces_of([p])) for p in planned}

    def narrow_ffns(self) -> dict[str, NarrowFFN]:
        """Name of a dense FFN or an expert -> its narrow one, its scales fitted; what is to stay whole is itself."""
        narrow = {p.ffn.name: whole(p.ffn) for p in pieces_of(self.plan) if p.width == p.ffn.width}
        for group in self.groups:
            narrow |= self._narrowed(group)
        narrowed = {p.ffn.name for group in self.groups for p in group}  # a budget may have left some whole
        if steps := [step for step in self._steps if step.ffn.name in narrowed]:
            refit_in_sequence(self.network, steps, narrow, self.inputs)
        if self.recipe.scale == "ntk" and self.groups:
            fit_scales_of(self.network, self.groups, narrow, self.inputs, self.recipe.seed + 1)
        self._tell_of_starved()
        return {p.ffn.name: narrow[p.ffn.name] for p in pieces_of(self.plan)}

    def _narrowed(self, group: list[AnyPlanned]) -> dict[str, NarrowFFN]:
        """The narrow FFNs of a group, with scales that need no gradients; its statistics are freed one by one."""
        own = self._held or self._statistics(group)
        centroids = self._centroids(group, own)

        def fuse(p: Piece) -> NarrowFFN:
            statistics = own.pop(p.ffn.name)
            if p.ffn.name in self._starved.by_weights:
                return self._by_weights(p)
            return fuse_calibrated(*self._known(p, statistics), centroids.pop(p.ffn.name, None))

        return share_results(pieces_of(group), fuse, "Fusing FFNs")

    def _statistics(self, group: list[AnyPlanned], with_metric: bool = False) -> dict[str, FFNStatistics]:
        """What is known of those FFNs of a group that this rank works on, with the metric if anything asks for it."""
        fishers = self._fisher(group, with_metric)
        statistics = collect(self.network.of([p.ffn for p in group]), self.inputs)
        for name, fisher in fishers.items():
            statistics[name].fisher = fisher
        self._starved.note((p.ffn for p in pieces_of(group)), statistics)
        return {p.ffn.name: statistics[p.ffn.name] for p in ranks.own(pieces_of(group))}

    def _centroids(self, group: list[AnyPlanned], statistics: dict[str, FFNStatistics]) -> dict[str, CentroidMoments]:
        """What a group's centroids do on all training tokens, if the recipe refits centroids."""
        if self.recipe.representative != "centroid" or self.recipe.refit == "none":
            return {}

        def cluster(p: Piece) -> NarrowFFN:
            if p.ffn.name in self._starved.by_weights:
                return self._by_weights(p)
            return cluster_centroids(*self._known(p, statistics[p.ffn.name]))

        network = self.network.of([p.ffn for p in group])
        return collect_centroids(network, share_results(pieces_of(group), cluster, "Clustering"), self.inputs)

    def _known(self, p: Piece, statistics: FFNStatistics) -> Known:
        return read_one(p.ffn), p.width, statistics, activation_of(p.ffn), self.recipe, p.ffn.homogeneity

    def _by_weights(self, p: Piece) -> NarrowFFN:
        """An expert that saw too few tokens, fused without them."""
        asked = self.asked
        recipe = settle(Recipe(asked.method, n_init=asked.n_init, max_iter=asked.max_iter, seed=asked.seed))
        return narrow_by(read_one(p.ffn), p.width, recipe, p.ffn.homogeneity)

    def _tell_of_starved(self) -> None:
        """Records, and warns of, experts that saw too few tokens."""
        if told := self._starved.in_words(self.plan):
            self.recipe = replace(self.recipe, calibration=f"{self.recipe.calibration}; {told}")
            warnings.warn(f"{told[:1].upper()}{told[1:]}. More or longer sequences let them see more.", stacklevel=4)

    def _fisher(self, group: list[AnyPlanned], with_metric: bool) -> dict[str, Tensor]:
        """The group's Fisher information, if the recipe or a budget looks at it.

        Raises:
            ValueError: if it was asked for by name, and the model has no gradients.
        """
        if self.recipe.kernel != "fisher" and not with_metric:
            return {}
        try:
            network = self.network.of([p.ffn for p in group])
            sums = fisher_sums(network, self.inputs.for_the_metric, self.recipe.seed + 2)
            return self._starved.metrics(network.ffns, sums)
        except NoGradients as error:
            if with_metric:
                raise self._no_budget(error) from error
            self.recipe = settle(self.asked, self.source, gradients=False)
            warnings.warn(
                f"No gradients could be taken through {type(self.network.model).__name__}, so errors of its FFNs' "
                f"outputs all count alike: {error}",
                stacklevel=5,
            )
            return {}

    def _no_budget(self, error: NoGradients) -> ValueError:
        return ValueError(
            f'`allocation="fisher"` needs gradients, and none could be taken through '
            f"{type(self.network.model).__name__}: {error}. Give widths by `width_pattern`, or one `ratio`."
        )
