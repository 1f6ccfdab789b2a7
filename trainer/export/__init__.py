"""Trained networks in formats that others load; see trainer/export/command.py."""
