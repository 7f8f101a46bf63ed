"""Figures of the notebooks, as pure functions: data in, a matplotlib Figure out.

Never pyplot: it is not thread-safe and keeps every figure.
"""
