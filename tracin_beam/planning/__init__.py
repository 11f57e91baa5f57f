"""What a run will take, before it starts.

A pilot sample, the choice of the dim, and the arithmetic of a run.
May import stages and what lies below it.
"""
