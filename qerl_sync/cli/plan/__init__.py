"""The command `qerl-sync plan`: orders and policies side by side, as a table, a picture, a page, an
assertion.

A plan itself is made in `qerl_sync.plan`; here are only the command's questions about it.
"""
