"""Per-example gradients of a Keras model.

Capture, rules, forms, ways, projections, losses, and the engine that joins them.
May import inputs and what lies below it; no Beam.
"""
