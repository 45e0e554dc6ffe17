"""What is trained, in which phases, from which start: the one table that every room reads. Plain data, no torch.

To add a method, write one file here: its phases and a `Method` of them, as `full.py` does, and give it to
`registry.register`. Metadata, conversions, freezing, planner and commands read it from there. What its phases need and
no other method has (a part of the model in `base.PARTS`, a start, a loss) is made in the room it belongs to.
"""
