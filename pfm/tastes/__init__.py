"""Several tastes: raters who want different things, in known groups or found by votes alone.

A *taste* is a preference model; K of them make a mixture. Each rater i holds one, taste k with probability pi_k, and
votes independently by it:

    P(votes of i) = sum over k of pi_k prod over i's pairs n of P_k(label_n).

Where groups are known, :meth:`TasteMixture.of_groups` fits one model a group. Where they are not, EM (Dempster et al.
1977) alternates between each rater's responsibilities r_ik ~ pi_k prod_n P_k(label_n) and weighted fits of the models.
A mixture is kept only if it predicts held-out votes of its raters better than one model of all: raters whose names
mean nothing give one taste.

For a new rater of few votes, :meth:`TasteMixture.adapt` fits K + r coefficients with a prior at what the votes say
under the mixture. Fields follow tastes: :func:`taste_flows` fits one a taste, to be blended at run time
(:class:`pfm.flow.composition.Composition`), :func:`with_code` conditions a single field on a code of the rater.
"""

from pfm._internal import lazy as _lazy

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
