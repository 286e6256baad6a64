"""Measurements of preference flows on real preferences: ``python -m benchmarks task=alpaca method=pfm seed=0``.

The way of a run: ``config`` says what is asked, ``tasks`` loads the data and ``methods`` makes what is measured;
``runner`` brings the two together and writes ``metrics.json`` and ``picks.npz``; ``report`` reads these. A new task
is a file in ``tasks`` with a dataclass in ``config`` and a file in ``conf/task``, a new method likewise.
"""
