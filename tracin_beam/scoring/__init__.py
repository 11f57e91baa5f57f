"""Scores of training examples for test examples.

TracInCP and what follows from it, from gradients or from embeddings.
May import gradients and what lies below it; no Beam.
"""
