"""Several ranks of one trainer: the lock of each rank, what ranks gather, the verdict on which they agree."""
