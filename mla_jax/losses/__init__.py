"""Losses: functions of the model's output and a batch that return sums over tokens."""
