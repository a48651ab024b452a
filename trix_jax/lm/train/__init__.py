"""A run: `loop` trains it, `run` is its directory, `step` the compiled function,
`evaluate` the loss on a split, `provenance` what a checkpoint belongs to; the rest is
what a run writes and where its arrays lie.
"""
