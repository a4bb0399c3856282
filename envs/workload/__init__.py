"""Requests as arrays: arrivals, lengths, quality, traces."""
