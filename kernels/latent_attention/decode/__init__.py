"""Absorbed attention over the latent cache: one file an implementation of `latent_attention.decode`."""
