"""Exact traces of a pair of models: recording them, and replaying any policy on them."""
