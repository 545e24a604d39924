"""extras/reuters.py on five made-up stories."""

from types import SimpleNamespace

from extras.reuters import subset

import numpy as np
from scipy.sparse import csr_matrix


def test_stories_of_one_root_category_and_the_most_frequent_words():
    words = [[0, 3, 0, 1], [2, 0, 0, 0], [0, 5, 0, 7], [0, 0, 9, 4], [0, 6, 0, 8]]  # in 1, 3, 1, 4 stories
    names = ["MCAT", "C11", "CCAT", "GCAT", "ECAT"]
    topics = [[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1], [0, 1, 0, 1, 0]]
    stories = SimpleNamespace(data=csr_matrix(words), target=csr_matrix(topics), target_names=np.array(names))
    features, labels = subset(stories, stories=3, words=2)
    assert features.dtype == np.float32 and features.tolist() == [[1, 3], [0, 0], [4, 0]]  # not the third
    assert labels.tolist() == [3, 0, 1]  # of CCAT, ECAT, GCAT, MCAT
