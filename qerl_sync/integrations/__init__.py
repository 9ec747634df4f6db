"""Doors into the frameworks of others."""
