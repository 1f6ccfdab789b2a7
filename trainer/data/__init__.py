"""From files on a disk to batches on a device: which images there are, in which order, how they are cut and decoded."""
