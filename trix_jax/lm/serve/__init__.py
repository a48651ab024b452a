"""What reads a trained model: `load` opens runs and exports, `generate` samples,
`export`, `stablehlo`, `card` and `hub` take it out, `harness` lends it to
lm-evaluation-harness.
"""
