"""Expanded attention, for training and prefill: one module per implementation of `latent_attention.attention`."""
