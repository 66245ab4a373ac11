"""Absorbed attention over the latent cache: one module per implementation of `latent_attention.decode`."""
