"""Records of a run: metrics, console, manifest, peak FLOP/s, memory. They import only `errors`; the command
`report.compare` may import more."""
