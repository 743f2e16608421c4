"""Will it fit, how fast, and how else: a plan of a recipe on hardware that is not there (docs/planning.md).

trace, units     a rank's own modules run on tensors without memory: operations, FLOPs, bytes, lifetimes
fusion           what torch.compile would make of them
layout, partition  which part a rank has, of the model and of the flat buffers of ZeRO
copies, engine, memory  bytes of every copy, at every moment of a step
hardware, calibrate  peaks and bandwidths: of data sheets, or measured
costs, updates, traffic, steps  seconds: a roofline, links, the schedule
plan, search, constraints  a layout's plan; layouts that fit; sizes that kernels refuse
report, table, command  the answer, on a terminal and as JSON
"""
