"""Labels of few votes, shrunk to one half or not: python -m benchmarks.studies.few_votes (needs PFM_DATA).

Of the votes on each pair of UKPConvArg's arguments, one or three are drawn; a linear Bradley-Terry model learns from
their shares, once as they are and once shrunk by the prior under which the counts are most likely
(:func:`pfm.data.fit_prior`). Both predict the shares of all votes in debates they were not fitted on.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.core.comparisons import deal_folds
from benchmarks.core.data import data_folder, read_csv, read_jsonl
from pfm import EncodedPairs
from pfm.data import soft_labels
from pfm.encoders import encoder_from_name
from pfm.preferences import BradleyTerry
from pfm.preferences.newton import label_loss
from pfm.statistics import Bootstrap

__all__ = ["Votes", "drawn", "losses", "main"]

FOLDS = 3


@dataclass(frozen=True)
class Votes:
    """Holds pairs of outputs (N, D) and the votes for the first, the second and neither, (N, 3), of debates (N,)."""

    first: Tensor
    second: Tensor
    counts: NDArray[np.int64]
    debate: NDArray[np.int64]

    @classmethod
    def load(cls) -> Votes:
        """Read and encode the arguments; both stances of a debate count as one."""
        folder = data_folder("ukp_convarg")
        arguments = {(row["topic"], row["arg_id"]): row for row in read_jsonl(folder / "arguments.jsonl.gz")}
        rows, ends = [], []
        for row in read_csv(folder / "pairs.csv.gz"):
            first, second = (arguments[row["topic"], row[name]] for name in ("a1", "a2"))
            counts = [int(row[name]) for name in ("votes_a1", "votes_a2", "votes_equal")]
            if sum(counts) and first["text"].strip() != second["text"].strip():
                rows.append((first["title"], counts))
                ends.append((first["text"], second["text"]))
        places: dict[str, int] = {}
        place = torch.tensor([[places.setdefault(text, len(places)) for text in both] for both in ends])
        outputs = (
            encoder_from_name("minilm+surface", long_texts="truncate").encode(list(places), progress=False).float()
        )
        titles = sorted({title for title, _ in rows})
        debate = np.array([titles.index(title) for title, _ in rows])
        return cls(outputs[place[:, 0]], outputs[place[:, 1]], np.array([counts for _, counts in rows]), debate)


def drawn(counts: NDArray[np.int64], number: int, seed: int) -> NDArray[np.int64]:
    """Draw so many of each pair's votes (N, 3) without replacement, or all where there are fewer."""
    generator = np.random.default_rng(seed)
    few = np.minimum(number, counts.sum(1))
    return np.stack([generator.multivariate_hypergeometric(row, n) for row, n in zip(counts, few, strict=True)])


def losses(votes: Votes, few: NDArray[np.int64], prior: float | None, seed: int) -> Tensor:
    """Return each pair's log loss (N,), nats, by a model that learned from ``few`` votes in the other debates."""
    labels = soft_labels(*few.T, prior=prior)
    share = torch.from_numpy((votes.counts[:, 0] + votes.counts[:, 2] / 2) / votes.counts.sum(1))
    fold = torch.from_numpy(deal_folds([str(debate) for debate in votes.debate], FOLDS, seed))
    loss = torch.zeros(len(share), dtype=torch.float64)
    for number in range(FOLDS):
        train, test = fold != number, fold == number
        pairs = EncodedPairs(
            votes.first[train], votes.second[train], weight=labels.weight[train],
            probability=labels.probability[train], group=votes.debate[train.numpy()],
        )  # fmt: skip
        score = BradleyTerry().fit(pairs).score(votes.first[test], votes.second[test])
        loss[test] = label_loss(score.double(), share[test])
    return loss


def main() -> None:
    """Print both losses, and what shrinking gains on debates, by the number of votes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--votes", type=int, nargs="+", default=[1, 3], help="votes drawn of each pair's")
    parser.add_argument("--seeds", type=int, default=2, help="draws of the votes and deals of the debates")
    asked = parser.parse_args()
    votes = Votes.load()
    size = np.bincount(votes.debate)
    print("votes a pair | shares as they are, nats | shrunk | gain of shrinking, 95% interval over debates")
    for number in asked.votes:
        both = torch.zeros(2, len(votes.debate), dtype=torch.float64)
        for seed in range(asked.seeds):
            few = drawn(votes.counts, number, seed)
            both += torch.stack([losses(votes, few, prior, seed) for prior in (0.0, None)]) / asked.seeds
        of_debate = np.bincount(votes.debate, weights=(both[0] - both[1]).numpy())
        gain = Bootstrap(len(size)).ratios(of_debate, size)[0]
        means = " | ".join(f"{float(each.mean()):.3f}" for each in both)
        print(f"{number} | {means} | {gain.text(decimals=3, signed=True) if gain else '–'}", flush=True)


if __name__ == "__main__":
    main()
