"""Preference models as such: their measures, reports and plots."""
