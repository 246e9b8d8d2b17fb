"""An index folder: the corpus it is built from, its manifest, its passages."""
