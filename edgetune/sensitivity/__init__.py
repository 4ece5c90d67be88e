"""What the storage type of each tensor costs, and the choice of types under a size budget."""
