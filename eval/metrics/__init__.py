"""Metrics, one file per family: pure functions of arrays, and a record of each."""
