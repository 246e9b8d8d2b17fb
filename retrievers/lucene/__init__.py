"""BM25 and other scores of words, by Lucene through Anserini."""
