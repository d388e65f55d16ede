"""Has a classifier unlearned: accuracies, membership attacks, and the distance from a classifier trained anew."""
