"""The training lane: data, training, restore, evaluation, generation, reports. Needs
the `lm` extra.
"""
