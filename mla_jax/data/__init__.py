"""Tokenizers and training data: synthetic needles (`needle`), JSONL chats (`text`), batches of both (`pipeline`)."""
