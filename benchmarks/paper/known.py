"""What is known of the paper's own set-ups and figures."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EXPERIMENTS", "QUOTED", "Experiment"]

QUOTED = (
    "Figures under “theirs” are quoted at second hand, from public summaries of the paper (arXiv 2405.19806), each "
    "with the table that it is said to stand in. Data, models and judges differ from ours: none is comparable with a "
    "figure of ours. What has no figure here was not found."
)


@dataclass(frozen=True)
class Experiment:
    """Describes one of the paper's experiments.

    Attributes:
        title: of the section. kind: of our runs. name: of the sweep, in ``conf/experiment``.
        measured: what the first column of our figures says. others: further figures of a run, by their headers.
        theirs: the paper's set-up. figures: theirs, with the table of each.
        command: makes our runs.
    """

    title: str
    kind: str
    name: str
    measured: str
    others: tuple[str, ...]
    theirs: str
    figures: tuple[tuple[str, str, str], ...]
    command: str


EXPERIMENTS = (
    Experiment(
        "Control",
        "control",
        "pbrl",
        "gain in episode return over the frozen policy",
        (),
        "Theirs: offline control from preferences on 12 of D4RL's MuJoCo datasets, against behaviour cloning and a "
        "policy trained by DPO. In the public code both branches of the labeller swap chosen and rejected, so that its "
        "labels are noise, and copies of simulators restart silently.",
        (("normalized return, Ant, random dataset, five seeds", "31.62", "Table 3"),),
        "python -m benchmarks -m experiment=pbrl",
    ),
    Experiment(
        "Images",
        "images",
        "mnist",
        "mean probability of the right digit by a judge that took no part in the labels",
        ("diversity", "calls"),
        "Theirs: a conditional GAN of perceptrons on MNIST, the best and the worst of about ten draws as a pair, and "
        "the LeNet that labels as the judge. The generator's weights are lost; its draws had .84 by that LeNet. Their "
        "Figure 3 shows images with scores: one pass above RLHF and DPO, two passes almost perfect.",
        (),
        "python -m benchmarks -m experiment=mnist",
    ),
    Experiment(
        "Text",
        "text_autoencoder",
        "imdb",
        "win rate of an independent judge against an independent sentence, at the setting chosen for a cosine of .55",
        ("cosine", "perplexity"),
        "Theirs: positive sentiment on IMDB. GPT-2 writes, a pretrained bottleneck autoencoder of the T5 family "
        "encodes and decodes, and the classifier that labels gives the score.",
        (
            ("win rate by GPT-4 over 100 samples, one pass against none", "100%", "Table 2"),
            ("win rate by GPT-4 over 100 samples, one pass against the policy of PPO", "2%", "Table 2"),
            ("average preference score over 100 samples, the highest listed", "2.7894", "Table 1"),
            ("parameters trained, flow and whole GPT-2", "1.5M and 124M", "Table 6"),
        ),
        "python -m benchmarks.text_autoencoder && python -m benchmarks -m experiment=imdb",
    ),
)
