"""Tokenizers and training data: synthetic needles (`needle`), JSONL chats (`jsonl`), batches of both (`pipeline`)."""
