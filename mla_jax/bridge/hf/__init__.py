"""Folders of dense DeepSeek-V2 and -V3 models in Hugging Face format.

layout      which tensor of theirs is which parameter of ours: the one table for both directions
config      config.json, to and from ModelConfig
export      writes a folder
model_card  its README.md
reader      reads a folder
verify      compares an export with transformers
"""
