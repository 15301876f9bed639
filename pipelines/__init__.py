"""The offline verbs: ingest, prepare, train, evaluate, publish, recommend."""
