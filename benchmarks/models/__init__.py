"""Modules that the published checkpoints of the data folder belong to, written anew from their graphs and names."""
