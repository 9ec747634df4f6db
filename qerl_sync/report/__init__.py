"""What a run writes: summary, tables, plots.

Reads reports; measures nothing.
"""
