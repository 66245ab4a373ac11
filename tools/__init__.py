"""Small command-line tools: `python -m tools.NAME --help`."""
