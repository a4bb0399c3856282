"""The served fleet: queues, batches and KV blocks, without money."""
