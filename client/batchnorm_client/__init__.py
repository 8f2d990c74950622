"""The light half of the batch-normalization service: the wire's documents, tensors and problems."""
