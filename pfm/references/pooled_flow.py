"""PooledFlow: a flow of draws whose sources are known, and a b that reads them."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pfm._internal.archive import load_module, load_tensors, read_description, read_folder, save_folder, save_tensors
from pfm._internal.checks import as_float_tensor, check_same_sizes
from pfm._internal.chunks import map_rows
from pfm._internal.files import replace_json, require_files
from pfm.devices import resolve_device, with_standard_defaults
from pfm.flow.config import FlowConfig
from pfm.flow.fitting import STATISTICS_ROWS, at_most, choose_steps, fit_field, on_unit_sphere
from pfm.flow.inputs import check_inputs
from pfm.flow.preference_flow import PreferenceFlow
from pfm.flow.win import WinHead
from pfm.references.coupling import TaggedEnds
from pfm.references.pairs import TaggedPairs, source_number
from pfm.tastes import append_code

__all__ = ["PooledFlow"]

logger = logging.getLogger(__name__)

DESCRIPTION, TENSORS, FLOW = "pool.json", "pool.safetensors", "flow"


@with_standard_defaults
class PooledFlow:
    """Carries the draws of each source of a pool to the winners of themselves against the pool.

    Made by :meth:`fit` or :meth:`load`. Around a :class:`pfm.generators.GeneratorPool` of the same names,
    :func:`pfm.wrap` chooses among the pool's candidates by b, and passes the generator of each. Its b reads the tag
    beside the output: b(y|x) itself does not depend on the generator of y, but the embedding of y may hold less
    information than the tag.

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
            # A one-hot code is no measurement: its units are kept.
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
        """Return the encoder and the sizes of the outputs and contexts, without tags, that the flow was fitted on."""
        own = {"context_dimension": self.flow.context_dimension - len(self.names)}
        return {name: self.flow.metadata[name] for name in ("encoder", "dimension")} | own

    @property
    def event_shape(self) -> torch.Size:
        """Return the shape of one output."""
        return self.flow.event_shape

    @property
    def guard_margin(self) -> float:
        """Return the smallest difference in b that held-out pairs confirm; infinity if they confirm none."""
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
        """Return the states (T, B, \\*D) along a pass, at ``times`` (T,)."""
        y = as_float_tensor("y", y)
        return self.flow.trajectory(y, append_code(context, self.code(tag, len(y))), times=times)

    def velocity(self, t: float, y: Any, context: Any = None, *, tag: Any) -> Tensor:
        """Return the field v(t, y | x, tag) (B, \\*D)."""
        y = as_float_tensor("y", y)
        return self.flow.velocity(t, y, append_code(context, self.code(tag, len(y))))

    @torch.no_grad()
    def win_probability(self, y: Any, context: Any = None, *, tag: Any = None) -> Tensor:
        """Return b(y|x) (B,): the chance that y, known to be of its source, beats an independent draw of the pool."""
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
        """Return b(y|x) (B,) of candidates whose generators are named by ``tags`` (B,)."""
        if tags is None:
            raise ValueError(
                f"this flow needs to know which of {', '.join(self.names)} made each candidate: wrap a "
                "pfm.generators.GeneratorPool with generators of these names, or give generators to .refine"
            )
        return self.win_probability(y, context, tag=tags)

    def alignment(self, y: Any, context: Any = None, *, tag: Any = None) -> Tensor:
        """Return how far candidates (B, \\*D) lie along their displacement, as :meth:`pfm.PreferenceFlow.alignment`."""
        y = as_float_tensor("y", y)
        return self.flow.alignment(y, append_code(context, self.code(tag, len(y))))

    def code(self, tag: Any, count: int) -> Tensor:
        """Return the one-hot codes (B, K) of a tag for all rows, or of B tags, names or numbers.

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
        numbers = {value: source_number(value, self.names) for value in set(listed)}
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


def _split(tagged: TaggedPairs, validation: TaggedPairs | None, config: FlowConfig) -> tuple[TaggedPairs, TaggedPairs]:
    """Hold out prompts, or pairs where all are of one prompt; tags follow their pairs."""
    pairs = tagged.pairs
    if validation is not None:
        check_same_sizes("validation", validation.pairs, pairs, "the training pairs'")
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
