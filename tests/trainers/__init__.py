"""Which of TRL's trainers can be synced, and how (`scripts/trainers` writes docs/trainers.md)."""
