"""Safetensors files: their header checked before anything else, values read and written in place."""
