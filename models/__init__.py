"""The embedded model, as package data (an ordinary model folder)."""
