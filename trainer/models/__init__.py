"""The networks: our ResNets, how a model is built from its options, and what it consists of."""
