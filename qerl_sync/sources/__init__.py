"""The trainer's weights, as a stream of checkpoint names and tensors.

A source knows no engine and no plan: it is asked for names in an order.
"""
