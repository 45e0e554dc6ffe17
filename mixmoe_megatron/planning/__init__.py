"""Which parallel layouts of a model fit a cluster, what each costs in memory, traffic and time."""
