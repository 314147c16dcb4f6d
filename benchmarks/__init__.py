"""Ratios against the authors' forms, measured in one run on one machine, and the report of effects."""
