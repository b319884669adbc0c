"""Benchmarks: what is measured, never what is assumed. Each prints a table and writes JSON."""
