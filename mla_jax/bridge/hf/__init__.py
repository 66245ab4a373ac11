"""Hugging Face folders of dense DeepSeek-V2/V3 models: layout, config, export, reading, verification."""
