"""Write a run's results: summary, tables, plots.

This package reads reports and measures nothing.
"""
