"""To and from other programs: Hugging Face folders, read and written without torch or transformers."""
