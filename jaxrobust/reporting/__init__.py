"""Planned and finished runs, their tables and figures."""
