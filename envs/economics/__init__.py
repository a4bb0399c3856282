"""Money: plans, credits and the ledger, without queues."""
