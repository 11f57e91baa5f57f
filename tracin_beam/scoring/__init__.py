"""Scores of training examples for test examples.

The score written once, top-k, recall, the cost of a search: from gradients or from embeddings.
May import gradients and what lies below it; no Beam.
"""
