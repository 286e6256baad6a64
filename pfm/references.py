"""Several references: a pool of frozen generators whose outputs carry the tag of the generator that made them.

The pool's law is pi_ref = sum over k of alpha_k pi_k, with the share alpha_k of source k. With b the chance to beat a
draw of the pool and W_kj the chance that a draw of source k beats one of source j:

- one pass is aimed at p1 = 2 pi_ref b. Of its draws the share 2 alpha_k (W alpha)_k stems from source k
  (:func:`winners_shares`; iterated, the replicator dynamics);
- a field conditioned on the tag of its source sample carries a draw of source k to the winner of itself against a
  draw of the pool, and so the pool, tag by tag, to p1 (:class:`PooledFlow`);
- shares may be learned from the votes, in one of two senses: :func:`learned_shares`, :func:`maximin_shares`.

What MRPO (Le et al. 2405.16388) does with log-probabilities of its references - their weighted harmonic mean in the
place of one reference - a pool of frozen generators, which give none, does with draws.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pfm._internal.archive import load_module, load_tensors, read_description, read_folder, save_folder, save_tensors
from pfm._internal.chunks import map_rows
from pfm._internal.files import replace_json, require_files
from pfm.data.encoded import EncodedPairs, as_float_tensor
from pfm.devices import resolve_device, standard_defaults, with_standard_defaults
from pfm.flow.config import FlowConfig
from pfm.flow.couplings import SOURCES, Coupled
from pfm.flow.fitting import STATISTICS_ROWS, at_most, choose_steps, fit_field, on_unit_sphere
from pfm.flow.inputs import check_inputs
from pfm.flow.preference_flow import PreferenceFlow
from pfm.flow.win import WinHead
from pfm.tastes import append_code, check_names

__all__ = ["PooledFlow", "TaggedPairs", "WinRates", "learned_shares", "maximin_shares", "winners_shares"]

logger = logging.getLogger(__name__)

DESCRIPTION, TENSORS, FLOW = "pool.json", "pool.safetensors", "flow"


@dataclass(frozen=True)
class WinRates:
    """Holds how K sources do against each other.

    ``rates`` (K, K) chance that row beats column, rates + rates' = 1; ``votes`` (K, K) weight of the pairs behind
    each, symmetric. Sources that never met are at 1/2.
    """

    names: tuple[str, ...]
    rates: Tensor
    votes: Tensor


@dataclass(frozen=True)
@with_standard_defaults
class TaggedPairs:
    """Holds pairs whose outputs carry the tags of their sources.

    Attributes:
        pairs: N labelled pairs, both outputs drawn from the pool.
        chosen_tag, rejected_tag: (N,) int64, numbers of the sources.
        names: of the sources.
    """

    pairs: EncodedPairs
    chosen_tag: Tensor
    rejected_tag: Tensor
    names: tuple[str, ...]

    @classmethod
    def of(
        cls,
        pairs: EncodedPairs,
        chosen_tags: Sequence[Hashable] | Tensor,
        rejected_tags: Sequence[Hashable] | Tensor,
        names: Sequence[Hashable] | None = None,
    ) -> TaggedPairs:
        """Join pairs and tags.

        Args:
            pairs: N pairs.
            chosen_tags, rejected_tags: (N,) tags, as :class:`pfm.generators.GeneratorPool` gives them with its texts.
            names: the sources that there should be; None for those that there are.

        Raises:
            ValueError: tags are missing or too many, or a named source made none of the outputs.
        """
        chosen, rejected = (
            check_names(name, tags, len(pairs))
            for name, tags in (("chosen_tags", chosen_tags), ("rejected_tags", rejected_tags))
        )
        present = set(chosen) | set(rejected)
        listed = sorted(present, key=str) if names is None else list(names)
        if unknown := sorted(present - set(listed), key=str):
            raise ValueError(f"tags must be among {listed}: got {unknown} too")
        if empty := [name for name in listed if name not in present]:
            raise ValueError(f"source {empty[0]!r} made none of the outputs: leave it out of names, or add pairs of it")
        places = {name: place for place, name in enumerate(listed)}
        first, second = (torch.tensor([places[tag] for tag in tags]) for tags in (chosen, rejected))
        return cls(pairs, first, second, tuple(map(str, listed)))

    def __len__(self) -> int:
        return len(self.pairs)

    def select(self, index: Tensor) -> TaggedPairs:
        """Take the pairs at ``index`` (integers or a mask)."""
        tags = self.chosen_tag[index.cpu()], self.rejected_tag[index.cpu()]
        return TaggedPairs(self.pairs.select(index), *tags, self.names)

    def to(self, device: Any) -> TaggedPairs:
        """Copy the pairs to a device; the tags stay on the CPU."""
        return TaggedPairs(self.pairs.to(device), self.chosen_tag, self.rejected_tag, self.names)

    def within(self, name: str) -> EncodedPairs:
        """Take the pairs of which one source made both outputs: what a flow of that source alone is fitted on.

        Raises:
            ValueError: there is no such source, or no such pair.
        """
        number = self.number(name)
        both = (self.chosen_tag == number) & (self.rejected_tag == number)
        if not bool(both.any()):
            raise ValueError(f"source {name!r} has no pairs of two outputs of its own: a flow of it alone needs some")
        return self.pairs.select(both)

    def number(self, name: str) -> int:
        """Give the number of a source."""
        return _number(name, self.names)

    def shuffle_labels(self, seed: int = 0) -> TaggedPairs:
        """Exchange chosen and rejected, tags with them, in a random half: the control in which nothing is learned."""
        generator = torch.Generator().manual_seed((seed + 0x5EED) * 0x9E3779B1 % 2**63)
        flip = torch.rand(len(self), generator=generator, device="cpu") < 0.5
        chosen, rejected = self.pairs.chosen, self.pairs.rejected
        rows = flip.to(self.pairs.device).view(-1, *[1] * len(self.pairs.event_shape))
        pairs = EncodedPairs(
            torch.where(rows, rejected, chosen), torch.where(rows, chosen, rejected), self.pairs.context,
            self.pairs.weight, probability=self.pairs.probability, group=self.pairs.group, encoder=self.pairs.encoder,
        )  # fmt: skip
        return TaggedPairs(
            pairs, torch.where(flip, self.rejected_tag, self.chosen_tag),
            torch.where(flip, self.chosen_tag, self.rejected_tag), self.names,
        )  # fmt: skip

    @property
    def shares(self) -> Tensor:
        """Give the share (K,) of each source among the outputs, by the pairs' weights."""
        weight = self._weight.double()
        count = torch.zeros(len(self.names), dtype=torch.float64)
        count.index_add_(0, self.chosen_tag, weight).index_add_(0, self.rejected_tag, weight)
        return (count / count.sum()).float()

    def win_rates(self, prior: float = 1.0) -> WinRates:
        """Count how often outputs of each source beat those of each other.

        Args:
            prior: votes for either side that are added to those cast: sources that hardly met stay near 1/2.
        """
        if not (math.isfinite(prior) and prior > 0):
            raise ValueError(f"prior must be a positive number of votes: got {prior}")
        probability = self.pairs.probability
        won = self._weight.double() if probability is None else (self._weight * probability.cpu()).double()
        lost = self._weight.double() - won
        wins = torch.zeros(len(self.names), len(self.names), dtype=torch.float64)
        wins.index_put_((self.chosen_tag, self.rejected_tag), won, accumulate=True)
        wins.index_put_((self.rejected_tag, self.chosen_tag), lost, accumulate=True)
        votes = wins + wins.T
        rates = (wins + prior) / (votes + 2 * prior)
        return WinRates(self.names, rates.fill_diagonal_(0.5).float(), votes.float())

    def with_codes(self, unit: float) -> EncodedPairs:
        """Append its tag's one-hot code, of length ``unit``, to each output: for models that know who made it."""
        code, device = unit * torch.eye(len(self.names), device="cpu"), self.pairs.device
        batch = self.pairs.gather(torch.arange(len(self), device="cpu"))
        return EncodedPairs(
            torch.cat([batch.chosen, code[self.chosen_tag].to(device)], dim=1),
            torch.cat([batch.rejected, code[self.rejected_tag].to(device)], dim=1),
            batch.context, batch.weight, group=self.pairs.group, encoder=self.pairs.encoder,
            probability=None if self.pairs.probability is None else batch.probability,
        )  # fmt: skip

    @property
    def _weight(self) -> Tensor:
        return torch.ones(len(self.pairs), device="cpu") if self.pairs.weight is None else self.pairs.weight.cpu()


def winners_shares(rates: Any, shares: Any) -> Tensor:
    """Give the share (K,) of each source among the winners of two draws of the pool: 2 alpha_k (W alpha)_k."""
    rates = _checked_rates(rates)
    shares = _checked_shares(shares, rates)
    return (2 * shares * (rates @ shares)).float()


@standard_defaults
def learned_shares(rates: Any, shares: Any = None, *, temperature: float = 0.1) -> Tensor:
    """Give the shares that beat the pool in use most often, at a price for departing from it.

    They maximise over alpha the mean chance to beat a draw of the pool, alpha . W alpha_0, less
    ``temperature`` KL(alpha || alpha_0); the solution is alpha_k ~ alpha_0k exp((W alpha_0)_k / temperature).

    Args:
        rates: :class:`WinRates`, or (K, K) chances that row beats column.
        shares: (K,) of the pool in use, alpha_0; None for equal ones.
        temperature: in units of chance a nat; towards 0 only the best source remains, towards infinity all stays.

    Raises:
        ValueError: rates + rates' is not 1, shares are negative or do not sum to 1, or the temperature is not positive.
    """
    rates = _checked_rates(rates)
    shares = torch.full((len(rates),), 1 / len(rates)) if shares is None else shares
    shares = _checked_shares(shares, rates)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a positive number: got {temperature}")
    return (shares.log() + rates @ shares / temperature).softmax(0).float()


@standard_defaults
def maximin_shares(rates: Any) -> Tensor:
    """Give the shares whose worst source to meet is met best: max over alpha of min over j of (alpha' W)_j.

    That is an optimal strategy of the symmetric game with these chances, the maximal lottery or von Neumann winner:
    defined for cycles of sources too, and the best source alone where one beats every other.
    It takes the rates at their word: sources of few votes look strong by chance, which a larger ``prior`` of
    :meth:`TaggedPairs.win_rates` guards against.
    """
    from scipy.optimize import linprog

    rates = _checked_rates(rates)
    count = len(rates)
    # Maximise the value u with alpha' W >= u for every column, alpha >= 0, sum alpha = 1.
    bounds = torch.cat([-rates.T, torch.ones(count, 1, dtype=torch.float64)], dim=1)
    found = linprog(
        [0.0] * count + [-1.0], A_ub=bounds.numpy(), b_ub=[0.0] * count,
        A_eq=[[1.0] * count + [0.0]], b_eq=[1.0], bounds=[(0, None)] * count + [(None, None)],
    )  # fmt: skip
    if found.x is None:
        raise RuntimeError(f"no optimal shares were found: {found.message}")
    shares = torch.tensor(found.x[:count]).clamp_min(0)
    return (shares / shares.sum()).float()


class TaggedEnds:
    """Joins each member of a pair, with its own tag in the context, to the pair's winner.

    ``source="reference"``: items are the members of all pairs; ``source="rejected"``: the losers. A soft label p
    joins to either output, with weights p and 1 - p.
    """

    def __init__(self, tagged: TaggedPairs, source: str) -> None:
        if source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}: got {source!r}")
        self.pairs, self.reference = tagged.pairs, source == "reference"
        self.soft = tagged.pairs.probability is not None
        if self.soft and not self.reference:
            raise ValueError("source='rejected' with soft labels has no one loser a pair: use source='reference'")
        self.rows_per_item = 2 if self.soft else 1
        self._code = torch.eye(len(tagged.names), dtype=torch.float32, device=self.device)
        self._tags = torch.stack([tagged.chosen_tag, tagged.rejected_tag], dim=1).flatten().to(self.device)
        weight = tagged.pairs.weight
        self._mean_weight = 1.0 if weight is None else float(weight.mean())

    @property
    def device(self) -> torch.device:
        """Return the device of the samples."""
        return self.pairs.device

    def __len__(self) -> int:
        return len(self.pairs) * (2 if self.reference else 1)

    def _places(self, index: Tensor) -> Tensor:
        return index if self.reference else 2 * index + 1

    def group_of(self, index: Tensor) -> Tensor:
        """Give the prompts of the source samples at ``index`` (B,), on the CPU."""
        return self.pairs.group[self._places(index).cpu() // 2]

    def draw(self, index: Tensor, generator: torch.Generator | None = None) -> Coupled:
        """Join the source samples at ``index`` (B,) to winners, ``rows_per_item * B`` rows."""
        places = self._places(index.to(self.pairs.device, non_blocking=True))
        pair = places // 2
        source = self.pairs.members(places)
        batch = self.pairs.gather(pair)
        code = self._code[self._tags[places]]
        context = code if batch.context is None else torch.cat([batch.context, code], dim=1)
        weight = batch.weight / self._mean_weight
        if not self.soft:
            return Coupled(source, batch.chosen, context, weight)
        # The mean weight stays 1: p + (1 - p) of an item are two rows.
        weights = torch.cat([weight * batch.probability, weight * (1 - batch.probability)]) * 2
        return Coupled(source.repeat(2, 1), torch.cat([batch.chosen, batch.rejected]), context, weights, 2)


@with_standard_defaults
class PooledFlow:
    """Carries the draws of each source of a pool to the winners of themselves against the pool.

    Made by :meth:`fit` or :meth:`load`. Around a :class:`pfm.generators.GeneratorPool` of the same names,
    :func:`pfm.wrap` chooses among the pool's candidates by b, and tells it who made each. Its b reads the tag beside
    the output: b(y|x) itself does not depend on who made y, but y as an encoder sees it may not tell what is known
    of its maker.

    Attributes:
        flow: a flow whose contexts end in the tag's one-hot code. win: the head of b, on (y, code).
        names: of the sources. shares: (K,) of the pool that was fitted on. rates: (K, K), see :class:`WinRates`.
        unit: length of a code beside an output, in b.
    """

    def __init__(
        self, flow: PreferenceFlow, win: WinHead, names: Sequence[str], shares: Tensor, rates: Tensor, unit: float
    ) -> None:
        self.flow, self.win, self.names = flow, win.eval(), tuple(names)
        self.shares, self.rates, self.unit = shares, rates, float(unit)

    @classmethod
    def fit(
        cls,
        tagged: TaggedPairs,
        config: FlowConfig | Mapping[str, Any] | None = None,
        validation: TaggedPairs | None = None,
        *,
        progress: bool = True,
    ) -> PooledFlow:
        """Fit on tagged pairs of the pool.

        Args:
            tagged: the pairs, of outputs that were drawn from the pool whoever made them.
            config: settings; ``coupling`` must be "paired", ``best_of`` 2 and ``context_free`` False.
            validation: tagged pairs of other prompts; None holds out a share of the prompts.

        Raises:
            TypeError: not TaggedPairs. ValueError: settings that have no meaning here, or shapes disagree.
        """
        if not isinstance(tagged, TaggedPairs):
            raise TypeError(f"tagged must be TaggedPairs: got {type(tagged).__name__}; make them by TaggedPairs.of")
        config = config if isinstance(config, FlowConfig) else FlowConfig.from_dict(dict(config or {}))
        if config.coupling != "paired" or config.best_of != 2 or config.context_free:
            raise ValueError(
                "a pooled flow joins the members of pairs by their tags: it goes with coupling='paired', best_of=2 and "
                f"context_free=False, got {config.coupling!r}, {config.best_of} and {config.context_free}"
            )
        if validation is not None and validation.names != tagged.names:
            raise ValueError(f"validation must have the sources {tagged.names}: got {validation.names}")
        began = time.perf_counter()
        pairs, sources = tagged.pairs, len(tagged.names)
        train, held = _split(tagged, validation, config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            flow = PreferenceFlow(pairs.event_shape, pairs.context_dimension + sources, config)
        device = resolve_device(config.device)
        flow.to(device)
        train, held = train.to(device), held.to(device)
        some = train.select(at_most(len(train), STATISTICS_ROWS, config.seed))
        with torch.no_grad():
            batch = some.pairs.gather(torch.arange(len(some), device="cpu"))
            code = torch.eye(sources, device="cpu")[some.rejected_tag]
            flow.normalize_by(batch.chosen, batch.rejected, append_code(batch.context, code), batch.weight)
            # A one-hot code is no measurement: its units stay as they are.
            flow.normalizer.context_mean[-sources:] = 0
            flow.normalizer.context_scale[-sources:] = 1
        coupling, check = (TaggedEnds(part, config.source) for part in (train, held))
        found = fit_field(flow.field, flow.normalizer, coupling, check, config, progress=progress)
        unit = float((batch.chosen - batch.chosen.mean(0)).square().sum(1).mean().sqrt())
        win = WinHead(pairs.dimension + sources, pairs.context_dimension).to(device)
        head = win.fit(tagged.with_codes(unit), seed=config.seed)
        if isinstance(flow.win, WinHead):
            flow.win.drop_network()
        steps = choose_steps(flow.field, flow.normalizer, check, config)
        flow.metadata |= (
            steps._asdict()
            | found.to_dict()
            | {
                "encoder": pairs.encoder,
                "dimension": flow.dimension,
                "context_dimension": flow.context_dimension,
                "pairs": len(pairs),
                "prompts": len(torch.unique(pairs.group)),
                "win": head.to_dict(),
                "win_network_kept": False,  # of the flow's own head, which is not fitted
                "unit_norm": on_unit_sphere(batch.chosen, batch.rejected, config),
                "seconds": round(time.perf_counter() - began, 3),
            }
        )
        logger.info("fitted on %d pairs of %s: %s", len(pairs), ", ".join(tagged.names), json.dumps(flow.metadata))
        return cls(flow.eval(), win, tagged.names, tagged.shares, tagged.win_rates().rates, unit)

    def to(self, device: Any) -> PooledFlow:
        """Move the flow and the head of b to a device, and return the pooled flow itself."""
        self.flow.to(device)
        self.win.to(device)
        return self

    def __repr__(self) -> str:
        shares = ", ".join(f"{name}: {share:.3g}" for name, share in zip(self.names, self.shares.tolist(), strict=True))
        return f"PooledFlow({{{shares}}} on outputs {tuple(self.flow.event_shape)})"

    @property
    def metadata(self) -> dict[str, Any]:
        """Give the encoder and the sizes of the outputs and contexts, without tags, that the flow was fitted on."""
        own = {"context_dimension": self.flow.context_dimension - len(self.names)}
        return {name: self.flow.metadata[name] for name in ("encoder", "dimension")} | own

    @property
    def event_shape(self) -> torch.Size:
        """Give the shape of one output."""
        return self.flow.event_shape

    @property
    def guard_margin(self) -> float:
        """Give the smallest difference in b that held-out pairs confirm; infinity if they confirm none."""
        return float(self.win.margin)

    def transport(self, y: Any, context: Any = None, *, tag: Any = None, **options: Any) -> Tensor:
        """Carry outputs (B, \\*D) of known sources along the flow.

        Args:
            y, context: as for :meth:`pfm.PreferenceFlow.transport`.
            tag: the name of the source of all rows, or B names or numbers.
            options: ``strength``, ``steps``, ``on_failure`` of :meth:`pfm.PreferenceFlow.transport`.
        """
        if refused := sorted(options.keys() - {"strength", "steps", "on_failure"}):
            raise TypeError(f"options must be strength, steps or on_failure: got {', '.join(refused)}")
        y = as_float_tensor("y", y)
        return self.flow.transport(y, append_code(context, self.code(tag, len(y))), **options)

    def trajectory(self, y: Any, context: Any = None, *, tag: Any, times: Any) -> Tensor:
        """Give the states (T, B, \\*D) along a pass, at ``times`` (T,)."""
        y = as_float_tensor("y", y)
        return self.flow.trajectory(y, append_code(context, self.code(tag, len(y))), times=times)

    def velocity(self, t: float, y: Any, context: Any = None, *, tag: Any) -> Tensor:
        """Give the field v(t, y | x, tag) (B, \\*D)."""
        y = as_float_tensor("y", y)
        return self.flow.velocity(t, y, append_code(context, self.code(tag, len(y))))

    @torch.no_grad()
    def win_probability(self, y: Any, context: Any = None, *, tag: Any = None) -> Tensor:
        """Give b(y|x) (B,): the chance that y, known to be of its source, beats an independent draw of the pool."""
        y = as_float_tensor("y", y).float()
        joined = append_code(context, self.code(tag, len(y)))
        y, joined = check_inputs(y, joined, self.flow.event_shape, self.flow.context_dimension)

        def judge(rows: Tensor, joined: Tensor | None) -> tuple[Tensor]:
            assert joined is not None
            own, code = joined.split([joined.shape[1] - len(self.names), len(self.names)], dim=1)
            inputs = torch.cat([rows, self.unit * code], dim=1)
            return (torch.sigmoid(self.win(inputs, own if own.shape[1] else None)),)

        return map_rows(judge, y.flatten(1), joined, self.flow.device)[0]

    def candidate_probabilities(
        self, y: Any, context: Any, prompt: Tensor, tags: Sequence[str] | None = None
    ) -> Tensor:
        """Give b(y|x) (B,) of candidates whose generators are named by ``tags`` (B,)."""
        if tags is None:
            raise ValueError(
                f"this flow needs to know which of {', '.join(self.names)} made each candidate: wrap a "
                "pfm.generators.GeneratorPool with generators of these names, or give generators to .refine"
            )
        return self.win_probability(y, context, tag=tags)

    def alignment(self, y: Any, context: Any = None, *, tag: Any = None) -> Tensor:
        """Give how far candidates (B, \\*D) lie along their displacement, as :meth:`pfm.PreferenceFlow.alignment`."""
        y = as_float_tensor("y", y)
        return self.flow.alignment(y, append_code(context, self.code(tag, len(y))))

    def code(self, tag: Any, count: int) -> Tensor:
        """Give the one-hot codes (B, K) of a tag for all rows, or of B tags, names or numbers.

        Raises:
            TypeError: there is no tag.
            ValueError: there is no such source, or the number of tags is not that of rows.
        """
        if tag is None:
            raise TypeError(f"tag is missing: name the source of the outputs, one or each of {', '.join(self.names)}")
        if isinstance(tag, Tensor):
            tag = tag.tolist()
        listed = [tag] * count if isinstance(tag, str | int) else list(tag)
        if len(listed) != count:
            raise ValueError(f"tag must be one for all rows, or {count}: got {len(listed)}")
        numbers = {value: _number(value, self.names) for value in set(listed)}
        rows = torch.tensor([numbers[value] for value in listed], dtype=torch.long, device="cpu")
        return torch.eye(len(self.names), dtype=torch.float32, device="cpu")[rows]

    def save(self, folder: str | Path) -> Path:
        """Write the flow, the head of b and what is known of the sources to a folder, as a whole."""
        folder = Path(folder).expanduser()
        tensors = {f"win.{name}": value for name, value in self.win.state_dict().items()}
        described = {
            "version": 1,
            "names": list(self.names),
            "unit": self.unit,
            "network": self.win.network is not None,
        }
        with save_folder(folder) as staging:
            self.flow.save_pretrained(staging / FLOW)
            save_tensors(staging / TENSORS, tensors | {"shares": self.shares, "rates": self.rates})
            replace_json(staging / DESCRIPTION, described)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> PooledFlow:
        """Load what :meth:`save` wrote.

        Raises:
            FileNotFoundError: the folder or one of its files is not there. ValueError: a file is damaged.
        """
        folder = Path(folder).expanduser()
        return read_folder(folder, (DESCRIPTION, TENSORS, f"{FLOW}/*"), lambda: cls._load(folder))

    @classmethod
    def _load(cls, folder: Path) -> PooledFlow:
        require_files(folder, (DESCRIPTION, TENSORS), "PooledFlow.save")
        flow = PreferenceFlow.from_pretrained(folder / FLOW)
        try:
            described = read_description(folder / DESCRIPTION)
            names, network, unit = tuple(described["names"]), described["network"], described["unit"]

            def build() -> WinHead:
                head = WinHead(flow.dimension + len(names), flow.context_dimension - len(names))
                if not network:
                    head.drop_network()
                return head

            win = load_module(build, folder / TENSORS, DESCRIPTION, prefix="win.")
            tensors = load_tensors(folder / TENSORS)
            return cls(flow, win, names, tensors["shares"], tensors["rates"], unit)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} holds a damaged pooled flow ({error}): save or fit it again") from error


def _number(name: Any, names: Sequence[str]) -> int:
    if isinstance(name, int) and not isinstance(name, bool) and 0 <= name < len(names) and str(name) not in names:
        return name
    if str(name) not in names:
        raise ValueError(f"tag must be one of {', '.join(names)}: got {name!r}")
    return names.index(str(name))


def _split(tagged: TaggedPairs, validation: TaggedPairs | None, config: FlowConfig) -> tuple[TaggedPairs, TaggedPairs]:
    """Hold out prompts, or pairs where all are of one prompt; tags follow their pairs."""
    pairs = tagged.pairs
    if validation is not None:
        for name in ("event_shape", "context_dimension"):
            ours, theirs = getattr(pairs, name), getattr(validation.pairs, name)
            if ours != theirs:
                raise ValueError(f"validation must have the training pairs' {name} {ours}: got {theirs}")
        return tagged, validation
    if len(pairs) < 2:
        raise ValueError("one pair is not enough to fit and to validate: at least two are needed")
    names, member = torch.unique(pairs.group, return_inverse=True)
    if len(names) < 2:
        names = member = torch.arange(len(pairs), device="cpu")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(config.seed), device="cpu")
    count = min(max(round(config.validation_share * len(names)), 1), len(names) - 1)
    held = torch.isin(member, order[:count])
    return tagged.select(~held), tagged.select(held)


def _checked_rates(rates: Any) -> Tensor:
    found = as_float_tensor("rates", rates.rates if isinstance(rates, WinRates) else rates).double()
    if found.ndim != 2 or found.shape[0] != found.shape[1] or len(found) == 0:
        raise ValueError(f"rates must be (K, K), the chance that row beats column: got {tuple(found.shape)}")
    if not bool(((found >= 0) & (found <= 1)).all()):
        raise ValueError("rates must lie in [0, 1] and be finite")
    off = (found + found.T - 1).abs()
    if float(off.max()) > 1e-4:
        row, column = divmod(int(off.argmax()), len(found))
        raise ValueError(
            f"rates must be skew about 1/2, rates[i, j] + rates[j, i] = 1: [{row}, {column}] and its mirror sum to "
            f"{float(found[row, column] + found[column, row]):g}"
        )
    return found


def _checked_shares(shares: Any, rates: Tensor) -> Tensor:
    from pfm.flow.composition import check_weights

    found = check_weights("shares", shares, len(rates))
    if found.ndim != 1:
        raise ValueError(f"shares must be ({len(rates)},), one a source: got {tuple(found.shape)}")
    return found.double()
