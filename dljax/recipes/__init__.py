"""Recipes make an Experiment from a config and a model; each kind of experiment has one file."""
