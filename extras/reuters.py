"""Write reuters.npz, the news stories that LSD-C clusters (Rebuffi et al. 2020, 4.1): a download of 650 MB.

    python -m extras.reuters && python lsdc.py --data reuters.npz

features (10,000, 2,000): weights (tf-idf) of the most frequent words in the first stories, in random order, that are in
one root category alone; labels: which. scikit-learn keeps the download in ~/scikit_learn_data. This ran with a stand-in
of the same structure, not with the download.
"""

import numpy as np
from sklearn.datasets import fetch_rcv1

ROOTS = ("CCAT", "ECAT", "GCAT", "MCAT")  # corporate, economics, government, markets


def subset(rcv1, stories=10_000, words=2_000):
    """(features (stories, words) float32, labels (stories,) in 0..3) of what fetch_rcv1 returns."""
    columns = [list(rcv1.target_names).index(name) for name in ROOTS]
    topics = rcv1.target[:, columns].toarray()  # (N, 4) 0 or 1
    rows = np.flatnonzero(topics.sum(1) == 1)[:stories]
    frequent = np.argsort(-rcv1.data.getnnz(axis=0), kind="stable")[:words]
    return rcv1.data[rows][:, frequent].toarray().astype(np.float32), topics[rows].argmax(1)


if __name__ == "__main__":
    features, labels = subset(fetch_rcv1(shuffle=True, random_state=0))
    np.savez("reuters.npz", features=features, labels=labels)
