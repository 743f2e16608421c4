"""The numerics probe: what quantization does to a run's tensors, GEMMs and gradients, sampled on a held micro-batch.

config.py      the recipe's section
statistics.py  sums and maxima of one tensor, and what they say
lab.py         the model's linears again, observed: in low precision, or in high
te_debug.py    requests in the shape of Transformer Engine's debug YAML
damage.py      ranks layers and GEMMs, proposes which to keep in BF16
"""
