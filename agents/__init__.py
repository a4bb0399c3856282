"""The policies that are fitted, and the search that tunes the heuristics."""
