"""Training: the TRL trainer, adapter publishing, the warm start and the run that ties them together."""
