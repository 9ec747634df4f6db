"""`python -m qerl_sync.cli`."""

from qerl_sync.cli.main import main

main()
