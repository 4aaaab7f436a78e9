"""Which features carry the forget set: streaming scores, selection of layer and features, subspaces."""
