"""Per-example gradients of a Keras model and their projections. No Beam in here."""
