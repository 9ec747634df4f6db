"""A training run: model, data, rewards, TRL's trainers, and what is written down at the end."""
