"""Choosing among candidates: the task, its report and plots."""
