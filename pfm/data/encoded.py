"""Preference pairs as tensors, on which flows and preference models are fitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pfm._internal.checks import (
    as_float_tensor,
    check_finite,
    check_length,
    check_number,
    check_seed,
    check_shape,
    checked_column,
    checked_index,
)
from pfm.data.batches import CandidateRows, PairBatch
from pfm.data.storage import read_arrays, write_arrays
from pfm.data.tensors import CHUNK, float_rows, group_numbers, row_hash, same_rows
from pfm.devices import with_standard_defaults

__all__ = ["CandidateRows", "EncodedPairs", "PairBatch"]


@with_standard_defaults
class EncodedPairs:
    """Holds N labelled pairs as tensors; a pair is (chosen, rejected) under one context.

    Repeated outputs and contexts are stored once: the pairs are indices into a table of outputs and a table
    of contexts, gathered batch by batch. A pair set made from plain tensors is its own table.

    All tensors are kept on the device of ``chosen`` (others are moved there) except ``group``, which is on the CPU.

    Args:
        chosen: (N, \\*D) the preferred outputs; any float or integer dtype, all values finite.
        rejected: (N, \\*D) the outputs they were preferred to.
        context: (N, C) the contexts (prompt embeddings, states, labels), or None.
        weight: (N,) weights >= 0 of the pairs, or None for 1.
        probability: (N,) probability in [0, 1] that the chosen output is the preferred one (a soft label),
            or None for 1.
        group: (N,) identity of the prompt; splits never cut a group. Integers are kept; other numbers and strings
            are numbered in ascending order. None: pairs whose contexts are the same up to rounding
            (:func:`pfm.data.tensors.same_rows`) form a group; without contexts each pair is its own group.
        encoder: description of the encoder (JSON values), kept with every flow fitted on these pairs.

    Raises:
        TypeError: an argument is not array-like or holds no numbers.
        ValueError: shapes disagree, the set is empty, or a value is not finite or out of range.

    >>> chosen, rejected = torch.ones(3, 2), torch.zeros(3, 2)
    >>> EncodedPairs(chosen, rejected, context=torch.eye(3))
    EncodedPairs(3 pairs of (2,), context 3)
    """

    def __init__(
        self,
        chosen: Any,
        rejected: Any,
        context: Any = None,
        weight: Any = None,
        *,
        probability: Any = None,
        group: Any = None,
        encoder: Mapping[str, Any] | None = None,
    ) -> None:
        chosen = as_float_tensor("chosen", chosen)
        rejected = as_float_tensor("rejected", rejected)
        if chosen.shape != rejected.shape:
            raise ValueError(
                f"chosen and rejected must have equal shapes: got chosen {tuple(chosen.shape)} "
                f"and rejected {tuple(rejected.shape)}"
            )
        check_shape("chosen and rejected", chosen, ("N", "*D"), hint="for scalar outputs use tensor[:, None]")
        count = chosen.shape[0]
        if count == 0:
            raise ValueError("chosen and rejected hold no pairs: at least one is needed")
        rejected = rejected.to(chosen.device)
        check_finite("chosen", chosen)
        check_finite("rejected", rejected)
        if context is not None:
            context = as_float_tensor("context", context).to(chosen.device)
            hint = "for scalar contexts use tensor[:, None]" if context.ndim == 1 else ""
            check_shape("context", context, (count, "C"), "one row a pair", hint=hint)
            check_finite("context", context)
        every = torch.arange(count, device="cpu").to(chosen.device)
        self._tables = (chosen.flatten(1), rejected.flatten(1))
        self._indices = (every, every)
        self._contexts = context
        self._context_index = every if context is not None else None
        self.event_shape: torch.Size = chosen.shape[1:]
        self.candidates: list[CandidateRows] | None = None
        self._set_columns(count, weight, probability, group, encoder)

    @classmethod
    def from_table(
        cls,
        outputs: Any,
        chosen_index: Any,
        rejected_index: Any,
        *,
        contexts: Any = None,
        context_index: Any = None,
        weight: Any = None,
        probability: Any = None,
        group: Any = None,
        encoder: Mapping[str, Any] | None = None,
        candidates: Sequence[tuple[int, Tensor, Tensor]] | None = None,
        check: bool = True,
    ) -> EncodedPairs:
        """Make pairs that point into a table of unique outputs.

        Args:
            outputs: (M, \\*D) one row an output.
            chosen_index: (N,) rows of ``outputs`` that were preferred.
            rejected_index: (N,) rows of ``outputs`` they were preferred to.
            contexts: (G, C) one row a context, or None.
            context_index: (N,) rows of ``contexts``; needed when ``contexts`` is given.
            weight, probability, group, encoder: as for :class:`EncodedPairs`; ``group`` defaults to
                ``context_index``.
            candidates: for each prompt (context row, or without contexts its group; rows of ``outputs`` (n,);
                scores (n,)), for targets beyond best of two.
            check: check that all values are finite, which reads whole tables.

        Raises:
            ValueError: an index is out of range, or shapes disagree.
        """
        self = cls.__new__(cls)
        table = as_float_tensor("outputs", outputs)
        if table.ndim < 2 or table.shape[0] == 0:
            raise ValueError(f"outputs must be (M, *D) with M >= 1: got {tuple(table.shape)}")
        if check:
            check_finite("outputs", table)
        chosen_rows = checked_index("chosen_index", chosen_index, table)
        rejected_rows = checked_index("rejected_index", rejected_index, table)
        count = chosen_rows.shape[0]
        if rejected_rows.shape[0] != count:
            raise ValueError(
                f"chosen_index and rejected_index must have equal lengths: got {count} and {rejected_rows.shape[0]}"
            )
        if count == 0:
            raise ValueError("chosen_index and rejected_index hold no pairs: at least one is needed")
        context_rows = None
        if contexts is not None:
            contexts = as_float_tensor("contexts", contexts).to(table.device)
            check_shape("contexts", contexts, ("G", "C"))
            if check:
                check_finite("contexts", contexts)
            if context_index is None:
                raise ValueError("contexts needs context_index (N,): which context row belongs to which pair")
            context_rows = checked_index("context_index", context_index, contexts)
            check_length("context_index", context_rows, count, "pair")
            if group is None:
                group = context_rows
        flat = table.flatten(1)
        self._tables = (flat, flat)
        self._indices = (chosen_rows, rejected_rows)
        self._contexts = contexts
        self._context_index = context_rows
        self.event_shape = table.shape[1:]
        self.candidates = None
        if candidates is not None:
            self.candidates = [
                CandidateRows(int(row), checked_index("candidates", rows, flat), scores.float().to(flat.device))
                for row, rows, scores in candidates
            ]
        self._set_columns(count, weight, probability, group, encoder)
        return self

    # -- on disk ------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, dtype: torch.dtype | None = torch.float16) -> Path:
        """Write the pairs to a folder of .npy arrays, from which :meth:`load` maps them into memory.

        Args:
            folder: made if absent; what is there under the same names is replaced.
            dtype: of the outputs and contexts on disk, float16 or float32; None keeps float16 and float32 and
                writes anything else as float32.

        Raises:
            ValueError: a value is too large for float16.
        """
        one_table = self._tables[0] is self._tables[1]
        large: dict[str, Tensor | None] = {
            "outputs": self._tables[0],
            "rejected_outputs": None if one_table else self._tables[1],
            "contexts": self._contexts,
        }
        columns = {
            "chosen_index": self._indices[0],
            "rejected_index": self._indices[1],
            "context_index": self._context_index,
            "weight": self.weight,
            "probability": self.probability,
            "group": self.group if self._grouped else None,
        }
        if self.candidates:
            columns |= {
                "candidate_sizes": torch.tensor([len(entry.rows) for entry in self.candidates]),
                "candidate_contexts": torch.tensor([entry.context_index for entry in self.candidates]),
                "candidate_rows": torch.cat([entry.rows for entry in self.candidates]),
                "candidate_scores": torch.cat([entry.scores for entry in self.candidates]),
            }
        described = {"event_shape": list(self.event_shape), "encoder": self.encoder}
        return write_arrays(folder, large, columns, described, dtype)

    @classmethod
    def load(cls, folder: str | Path) -> EncodedPairs:
        """Map the pairs that :meth:`save` wrote: outputs and contexts stay on disk and are read batch by batch.

        They were checked before they were written, and are not read again here.

        Raises:
            FileNotFoundError: the folder holds no finished pairs. ValueError: its files do not fit each other.
        """
        described, found = read_arrays(folder)
        event_shape = torch.Size(described["event_shape"])
        candidates = None
        if "candidate_sizes" in found:
            sizes = found["candidate_sizes"].tolist()
            candidates = zip(
                found["candidate_contexts"].tolist(), found["candidate_rows"].split(sizes),
                found["candidate_scores"].split(sizes), strict=True,
            )  # fmt: skip
        outputs = found["outputs"]
        if outputs.shape[1:].numel() != event_shape.numel():
            raise ValueError(
                f"{Path(folder).expanduser()}/outputs.npy has rows of {outputs.shape[1]} values, expected {event_shape}"
            )
        pairs = cls.from_table(
            outputs.unflatten(1, event_shape), found["chosen_index"],
            found["rejected_index"] if "rejected_outputs" not in found else found["chosen_index"],
            contexts=found.get("contexts"), context_index=found.get("context_index"), weight=found.get("weight"),
            probability=found.get("probability"), group=found.get("group"), encoder=described["encoder"],
            candidates=None if candidates is None else list(candidates), check=False,
        )  # fmt: skip
        pairs._grouped = "group" in found
        if "group" not in found:
            pairs._group = None
        if "rejected_outputs" in found:
            rejected = found["rejected_outputs"]
            pairs._tables = (pairs._tables[0], rejected)
            pairs._indices = (pairs._indices[0], checked_index("rejected_index", found["rejected_index"], rejected))
        return pairs

    def _set_columns(self, count: int, weight: Any, probability: Any, group: Any, encoder: Any) -> None:
        self.weight: Tensor | None = checked_column("weight", weight, count, 0.0, float("inf"), self.device)
        if self.weight is not None and not bool((self.weight > 0).any()):
            raise ValueError("weight must have at least one entry above zero")
        self.probability: Tensor | None = checked_column("probability", probability, count, 0.0, 1.0, self.device)
        self._group: Tensor | None = None
        self._grouped = group is not None
        if group is not None:
            numbers = group_numbers(group)
            check_shape("group", numbers, (count,))
            self._group = numbers
        self.encoder: dict[str, Any] | None = dict(encoder) if encoder else None

    def __len__(self) -> int:
        return self._indices[0].shape[0]

    def __repr__(self) -> str:
        context = f", context {self.context_dimension}" if self.context_dimension else ""
        return f"EncodedPairs({len(self)} pairs of {tuple(self.event_shape)}{context})"

    @property
    def device(self) -> torch.device:
        """Return the device of all tensors but ``group``."""
        return self._tables[0].device

    @property
    def dimension(self) -> int:
        """Return the number of values in one output."""
        return self._tables[0].shape[1]

    @property
    def decided(self) -> Tensor:
        """Return which pairs (N,) are not labelled as ties, by 1/2; all of them where no label is another."""
        every = torch.ones(len(self), dtype=torch.bool, device=self.device)
        decided = every if self.probability is None else self.probability != 0.5
        return decided if bool(decided.any()) else every

    @property
    def table_bytes(self) -> int:
        """Return the bytes that the tables of outputs and contexts take in memory, or on disk."""
        tables = [*{id(table): table for table in self._tables}.values(), self._contexts]
        return sum(table.numel() * table.element_size() for table in tables if table is not None)

    @property
    def context_dimension(self) -> int:
        """Return the number of values in one context, 0 without contexts."""
        return 0 if self._contexts is None else self._contexts.shape[1]

    @property
    def chosen(self) -> Tensor:
        """Gather the preferred outputs, (N, \\*D)."""
        return self._tables[0][self._indices[0]].unflatten(1, self.event_shape)

    @property
    def rejected(self) -> Tensor:
        """Gather the outputs they were preferred to, (N, \\*D)."""
        return self._tables[1][self._indices[1]].unflatten(1, self.event_shape)

    def output_table(self) -> Tensor:
        """Return the outputs (M, D) as they are stored: an output of several pairs may be stored once."""
        one, other = self._tables
        return one if one is other else torch.cat([one, other])

    def row_numbers(self) -> tuple[Tensor, Tensor]:
        """Return the rows of the chosen and of the rejected outputs in :meth:`output_table`, (N,) each."""
        (one, other), (chosen, rejected) = self._tables, self._indices
        return chosen, rejected if one is other else rejected + len(one)

    def context_table(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Return the contexts (G, C) as they are stored, and the row (N,) of each pair; None for none."""
        if self._contexts is None or self._context_index is None:
            return None, None
        return self._contexts, self._context_index

    @property
    def context(self) -> Tensor | None:
        """Gather the contexts, (N, C), or None."""
        if self._contexts is None or self._context_index is None:
            return None
        return self._contexts[self._context_index]

    @property
    def group(self) -> Tensor:
        """Return the identity of each pair's prompt, (N,) int64, on the CPU."""
        group = self._group
        if group is None:
            group = torch.arange(len(self), device="cpu") if self._contexts is None else self._same_contexts()
            self._group = group
        return group

    @property
    def pool(self) -> Tensor:
        """Return the identity of each pair's context, (N,) int64 on the CPU: outputs of one pool may be joined.

        Pairs of equal contexts share a pool; without contexts those of one group do, if groups were given; else
        all pairs are of one distribution, and of one pool.
        """
        if self._contexts is not None:
            return self._same_contexts()
        return self.group if self._grouped else torch.zeros(len(self), dtype=torch.long, device="cpu")

    def _same_contexts(self) -> Tensor:
        assert self._contexts is not None
        assert self._context_index is not None
        names = torch.cat([row_hash(rows) for rows in self._contexts.split(CHUNK)]).cpu()
        # Most rows that are the same are so to the last bit; only one of each of these is compared with the others.
        _, member = torch.unique(names, return_inverse=True)
        places = torch.arange(len(member), device="cpu")
        one = torch.zeros(int(member.max()) + 1, dtype=torch.long, device="cpu").scatter_(0, member, places)
        number = same_rows(self._contexts[one.to(self.device)].flatten(1))[member]
        return torch.unique(number[self._context_index.cpu()], return_inverse=True)[1]

    def gather(self, index: Tensor) -> PairBatch:
        """Gather the pairs at ``index`` (B,) as flat float32 tensors, on the pairs' device."""
        index = self._here(index)
        ones = torch.ones(len(index), dtype=torch.float32, device=self.device)
        return PairBatch(
            float_rows(self._tables[0], self._indices[0][index]),
            float_rows(self._tables[1], self._indices[1][index]),
            self.contexts_of(index),
            ones if self.weight is None else self.weight[index],
            ones if self.probability is None else self.probability[index],
        )

    def members(self, places: Tensor) -> Tensor:
        """Gather single outputs as flat float32, (B, D); place 2 i is pair i's chosen output, 2 i + 1 its rejected."""
        places = self._here(places)
        pair, rejected = places // 2, places % 2 == 1
        rows = torch.where(rejected, self._indices[1][pair], self._indices[0][pair])
        if self._tables[0] is self._tables[1]:
            return float_rows(self._tables[0], rows)
        if self.device.type != "cpu":  # a mask's length is not known on the host: select from both
            return torch.where(
                rejected[:, None], *(float_rows(t, rows.clamp(max=len(t) - 1)) for t in self._tables[::-1])
            )
        found = torch.empty(len(places), self.dimension, dtype=torch.float32, device=self.device)
        for table, part in zip(self._tables, (~rejected, rejected), strict=True):
            found[part] = float_rows(table, rows[part])
        return found

    def _here(self, index: Tensor) -> Tensor:
        return index.to(self.device, non_blocking=True)

    def contexts_of(self, index: Tensor) -> Tensor | None:
        """Gather the contexts of the pairs at ``index`` as float32, (B, C), or None."""
        if self._contexts is None or self._context_index is None:
            return None
        return float_rows(self._contexts, self._context_index[self._here(index)])

    @property
    def candidate_weights(self) -> Tensor | None:
        """Return the mean weight of the pairs of each candidate set (sets,); None where pairs have no weights.

        A set without pairs has weight 0.
        """
        if self.weight is None or self.candidates is None:
            return None
        keys = (self.group.to(self.device) if self._context_index is None else self._context_index).long()
        entries = torch.tensor([entry.context_index for entry in self.candidates], device="cpu").to(self.device)
        size = int(torch.maximum(keys.max(), entries.max())) + 1
        total = torch.zeros(size, dtype=torch.float32, device=self.device).index_add_(0, keys, self.weight)
        count = torch.bincount(keys, minlength=size).clamp_min(1)
        return (total / count)[entries]

    def output_rows(self, rows: Tensor) -> Tensor:
        """Gather rows of the output table as flat float32, (B, D)."""
        return float_rows(self._tables[0], self._here(rows))

    def context_rows(self, rows: Tensor) -> Tensor | None:
        """Gather rows of the context table as float32, (B, C), or None."""
        return None if self._contexts is None else float_rows(self._contexts, self._here(rows))

    def select(self, index: Any) -> EncodedPairs:
        """Take the pairs at ``index`` (integers or a mask); the tables are shared, not copied.

        Candidate sets follow their prompts: those of prompts that keep no pair are left out.
        """
        numbers = torch.as_tensor(index).cpu()  # of the groups, which are on the CPU
        if numbers.dtype == torch.bool:
            numbers = numbers.nonzero().flatten()
        numbers = numbers.long()
        index = self._here(numbers)
        if index.numel() == 0:
            raise ValueError("index selects no pairs: at least one is needed")
        part = object.__new__(EncodedPairs)
        part._tables = self._tables
        part._indices = (self._indices[0][index], self._indices[1][index])
        part._contexts = self._contexts
        part._context_index = None if self._context_index is None else self._context_index[index]
        part.event_shape = self.event_shape
        part.weight = None if self.weight is None else self.weight[index]
        part.probability = None if self.probability is None else self.probability[index]
        part._group = self.group[numbers]
        part._grouped = self._grouped
        part.encoder = self.encoder
        part.candidates = self.candidates
        if self.candidates is not None:
            kept = set((part.group if part._context_index is None else part._context_index).tolist())
            part.candidates = [entry for entry in self.candidates if entry.context_index in kept]
        return part

    def counted(self) -> EncodedPairs:
        """Drop the pairs of weight 0."""
        if self.weight is None or bool((self.weight > 0).all()) or not bool((self.weight > 0).any()):
            return self
        return self.select(self.weight > 0)

    def to(self, device: Any) -> EncodedPairs:
        """Copy to a device, where batches are then gathered; ``group`` stays on the CPU.

        Args:
            device: as for ``torch.Tensor.to``.
        """
        device = torch.empty(0, device=device).device  # "cuda" is the current one, of a number
        if self.device == device:
            return self
        part = self.select(torch.arange(len(self), device="cpu"))
        same = self._tables[0] is self._tables[1]
        first = self._tables[0].to(device)
        part._tables = (first, first if same else self._tables[1].to(device))
        part._indices = (part._indices[0].to(device), part._indices[1].to(device))
        part._contexts = None if self._contexts is None else self._contexts.to(device)
        part._context_index = None if part._context_index is None else part._context_index.to(device)
        part.weight = None if part.weight is None else part.weight.to(device)
        part.probability = None if part.probability is None else part.probability.to(device)
        if part.candidates is not None:
            part.candidates = [
                CandidateRows(each.context_index, each.rows.to(device), each.scores.to(device))
                for each in part.candidates
            ]
        return part

    def split(self, held_out: float = 0.1, seed: int = 0) -> tuple[EncodedPairs, EncodedPairs]:
        """Split by group into (train, held out): no group is on both sides.

        Args:
            held_out: share of the groups to hold out, in (0, 1); at least one group on each side.
            seed: the same seed gives the same split.

        Raises:
            ValueError: fewer than two groups, or ``held_out`` out of range.
        """
        seed = check_seed(seed)
        held_out = check_number("held_out", held_out, above=0, below=1)
        names, member = torch.unique(self.group, return_inverse=True)
        if len(names) < 2:
            raise ValueError(
                "all pairs belong to one prompt, so no prompt can be held out: add prompts, or give "
                "group=torch.arange(N) to split by pair"
            )
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed), device="cpu")
        count = min(max(round(held_out * len(names)), 1), len(names) - 1)
        out = torch.zeros(len(names), dtype=torch.bool, device="cpu")
        out[order[:count]] = True
        mask = out[member]
        return self.select(~mask), self.select(mask)

    def swap(self) -> EncodedPairs:
        """Exchange chosen and rejected: the control in which every learned gain must change its sign."""
        part = self.select(torch.arange(len(self), device="cpu"))
        part._tables = (self._tables[1], self._tables[0])
        part._indices = (self._indices[1], self._indices[0])
        if self.candidates is not None:
            part.candidates = [CandidateRows(c.context_index, c.rows, -c.scores) for c in self.candidates]
        return part

    def shuffle_labels(self, seed: int = 0) -> EncodedPairs:
        """Exchange chosen and rejected in a random half: the control in which nothing can be learned."""
        return self.flip_labels(0.5, seed)

    def flip_labels(self, share: float, seed: int = 0) -> EncodedPairs:
        """Exchange chosen and rejected of each pair with probability ``share``, as a labeller who errs at random does.

        Candidate sets, whose scores say which label was right, are left out.

        Raises:
            ValueError: ``share`` does not lie in [0, 1].
        """
        seed = check_seed(seed)
        share = check_number("share", share, least=0, most=1)
        # Not the stream of data that were drawn with the same small seed.
        generator = torch.Generator().manual_seed((seed + 0x5EED) * 0x9E3779B1 % 2**63)
        flip = self._here(torch.rand(len(self), generator=generator, dtype=torch.float32, device="cpu") < share)
        if self._tables[0] is self._tables[1]:
            part = self.select(torch.arange(len(self), device="cpu"))
            first, second = self._indices
            part._indices = (torch.where(flip, second, first), torch.where(flip, first, second))
            part.candidates = None
            return part
        both = torch.cat(self._tables)
        first, second = self._indices[0], self._indices[1] + len(self._tables[0])
        part = self.select(torch.arange(len(self), device="cpu"))
        part._tables = (both, both)
        part._indices = (torch.where(flip, second, first), torch.where(flip, first, second))
        part.candidates = None
        return part
