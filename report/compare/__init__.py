"""Is a run as good as its baseline? Paired loss curves, a confidence interval, a verdict (docs/comparing.md).

readers -> curves       any log -> Curve
pairing                 which run against which, and whether they may be compared
intervals               block lengths, intervals over steps and seeds
limits, analysis        phases, tokens for equal loss, spikes; the verdict
terminal, charts, page  what a person reads
launch                  train both recipes, with a live difference
"""
