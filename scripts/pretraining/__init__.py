"""The parts of pretrain_base.py: text to documents, documents to rows of tokens, rows to a small base."""
