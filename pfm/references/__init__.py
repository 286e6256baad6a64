"""Several references: a pool of frozen generators whose outputs carry the tag of the generator that made them.

The pool's distribution is pi_ref = sum over k of alpha_k pi_k, with the share alpha_k of source k. With b the chance to
beat a draw of the pool and W_kj the chance that a draw of source k beats one of source j:

- one pass is aimed at p1 = 2 pi_ref b. Of its draws the share 2 alpha_k (W alpha)_k stems from source k
  (:func:`winners_shares`; iterated, the replicator dynamics);
- a field conditioned on the tag of its source sample carries a draw of source k to the winner of itself against a
  draw of the pool, and so the pool, tag by tag, to p1 (:class:`PooledFlow`);
- shares may be learned from the votes, in one of two senses: :func:`learned_shares`, :func:`maximin_shares`.

What MRPO (Le et al. 2405.16388) does with log-probabilities of its references - their weighted harmonic mean in the
place of one reference - a pool of frozen generators, which give none, does with draws.
"""

from pfm._internal import lazy as _lazy

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
