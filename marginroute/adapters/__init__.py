"""Adapters: each builds the same View from what its gateway knows."""
