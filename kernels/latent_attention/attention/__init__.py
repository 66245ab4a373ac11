"""Expanded attention, for training and prefill: one file an implementation of `latent_attention.attention`."""
