"""Nearest vectors of a sentence encoder, by FAISS."""
