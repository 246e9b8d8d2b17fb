"""Rollouts: Ray actors that run episodes on their own engine, and the pool that hands them questions."""
