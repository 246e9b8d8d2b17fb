"""The pocket policy: a model of a few million parameters, made here from nothing, that learns to search on two CPU cores."""
