"""Audit any selector: its picks among judged candidates, beside simple rules, fitted baselines and the oracle."""
