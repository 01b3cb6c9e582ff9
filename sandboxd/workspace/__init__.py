"""What sessions keep: layers of files on disk, checkpoints made of them, and the sessions that point at
those.
"""
