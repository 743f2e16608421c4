"""Records of a run: metrics, console, manifest, peak FLOP/s, memory. Imports only `errors`."""
