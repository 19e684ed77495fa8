"""Feature networks: our own small one, which ships inside the package, and the papers' networks, for which a person brings the weights."""
