"""From tables to pages and terminal text.

A page is a function from tables to a template's context.
May import planning and what lies below it.
"""
