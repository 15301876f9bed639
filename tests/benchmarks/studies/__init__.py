"""The studies: a grid of training runs on real data, measured once each, and the tables made from what was found."""
