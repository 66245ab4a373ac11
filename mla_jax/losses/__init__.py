"""Objectives of training: the interface (`loss`) and one file for each."""
