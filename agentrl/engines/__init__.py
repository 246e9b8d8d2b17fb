"""Engines sample token ids from a language model. `base` is the contract; each other module is one implementation."""
