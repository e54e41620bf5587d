"""Tensors only: the rollout record, reductions, entropies, advantages and losses."""
