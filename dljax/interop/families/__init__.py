"""One file a family, of the name of its model file, with its tensors' names in every source that
has it.

`TABLES` is source -> class of `dljax/models/x.py` -> a `Table`, or where the names depend on the
model's sizes, what makes one for a model. `CONFIGS` is source -> what makes the model from the
content of the config.json that lies beside that source's weights, or gives None where that is of
another family; a family whose sources write no such file has none. `WRITERS`, the reverse, is source
-> class -> what makes that content from a model.
"""
