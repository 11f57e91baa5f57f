"""What lies on disk.

Files on any file system, records, embeddings, tables, and the layout and state of an output
directory.
May import errors and config.
"""
