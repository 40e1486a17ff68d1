"""From a config and a model to an Experiment: one file for each kind of experiment."""
