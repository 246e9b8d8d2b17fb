"""Evaluation: greedy episodes over question files, scored with intervals."""
