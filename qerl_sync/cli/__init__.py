"""The command `qerl-sync`: one file for each of its commands."""
