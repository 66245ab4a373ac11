"""Conversion of Llama-style models to latent attention."""
