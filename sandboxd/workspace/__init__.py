"""What sessions keep: layers of files on disk, and the checkpoints that are made of them."""
