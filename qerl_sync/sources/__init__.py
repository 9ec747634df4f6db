"""Provide the trainer's weights as a stream of checkpoint names and tensors.

A source knows no engine and no plan: its caller asks for names in an order.
"""
