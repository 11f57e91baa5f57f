"""The Beam stages.

Each is a thin PTransform over functions of the floors below.
May import signals and what lies below it.
"""
