"""The examiner: protocol, statistics and reports."""
