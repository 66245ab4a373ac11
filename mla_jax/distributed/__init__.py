"""Jobs of several processes: joining one, deciding together, stopping without loss."""
